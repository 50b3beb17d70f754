"""Several processes that train one model together, as torchrun starts them; without torchrun, a world of one.

Gradients are averaged by DistributedDataParallel; what little else the processes must agree on (how many tokens a step
has, whether to stop) goes through gloo on the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from config import UserError

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=24)  # for others that download or decode; one that dies is noticed at once


@dataclass(frozen=True)
class World:
    """Which of how many processes this is. Its methods must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which on this machine: the number of its GPU."""
    local_size: int = 1
    """How many on this machine."""

    @property
    def main(self) -> bool:
        """Whether it is this process that prints and writes."""
        return self.rank == 0

    @property
    def share(self) -> dict[str, Any]:
        """make_dataloader's options for this process's share of each batch."""
        return {"rank": self.rank, "world_size": self.size}

    def sum(self, *numbers: float) -> list[float]:
        """The numbers, each added up over all processes."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor([*numbers, 0.0], dtype=torch.float64)  # one more, as gloo cannot add up nothing
        dist.all_reduce(totals)
        return totals.tolist()[:-1]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """The first process's value."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        self.sum()


ALONE = World()


def join_world(device: str) -> World:
    """The world that torchrun has described in the environment. Raises UserError for more processes than GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    world = World(*(int(os.environ[name]) for name in names))
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus:
        if world.local_size > gpus:
            raise UserError(f"{world.local_size} processes for {gpus} GPUs: give torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    return world


def leave_world(world: World) -> None:
    """Ends the connections to the others."""
    if world.size > 1:
        dist.destroy_process_group()
