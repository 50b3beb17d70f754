"""Processes that train one model together, started by torchrun; without torchrun, there is one process.

DistributedDataParallel averages the gradients. Other values that the processes share (a step's number of tokens,
whether to stop) go through gloo on the CPU, so that nothing waits for a GPU.
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
PATIENCE = datetime.timedelta(hours=24)  # long enough for rank 0 to download or decode; a dead rank fails at once


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes. All processes must call the methods in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine, and the number of the process's GPU."""
    local_size: int = 1
    """Processes on this machine."""

    @property
    def main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    @property
    def share(self) -> dict[str, Any]:
        """Options of make_dataloader for this process's share of each batch."""
        return {"rank": self.rank, "world_size": self.size}

    def sum(self, *numbers: float) -> list[float]:
        """Sum each number over all processes."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor([*numbers, 0.0], dtype=torch.float64)  # one more, as gloo cannot sum an empty tensor
        dist.all_reduce(totals)
        return totals.tolist()[:-1]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Collect every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """The first process's value."""
        return self.gather(value)[0]

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.sum()


ALONE = World()


def join_world(device: str) -> World:
    """Connect the processes that torchrun has started. Raises UserError for more processes than GPUs."""
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
    """Disconnect from the other processes."""
    if world.size > 1:
        dist.destroy_process_group()
