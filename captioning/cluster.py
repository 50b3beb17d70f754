"""Caption shards on a Ray cluster: Ray Data has the queue, restarts dead actors and scales their number."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from captioning.shards import Done, Shard, Work
from config import UserError
from utils import ROOT


class Captioner:
    """An actor with the model; captions one shard at a time."""

    def __init__(self, work: Work, folder: str) -> None:
        os.chdir(folder)  # the driver's, so that relative names mean the same
        self.work, self.model = work, work.load()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Caption a shard; its fields -> those of Done."""
        shard = Shard(row["name"], row["path"], tuple(row["pictures"]))
        return dataclasses.asdict(self.work.run(shard, self.model))


def run_on_ray(work: Work, shards: Sequence[Shard], address: str | None) -> Iterator[Done]:
    """Caption shards on the Ray cluster at this address, or on one that is started here.

    The nodes need this repository, the model, the shards and the output under the same paths. Each actor has one GPU if the
    cluster has any, or else up to two CPUs. Raises UserError if Ray or the cluster is not available.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install -r requirements/ray.txt") from error
    if not ray.is_initialized():
        try:
            ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster at {address}: start one (ray start --head), or leave --address out"
            ) from error
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    smallest = min(int(node["Resources"].get("CPU", 0)) or 1 for node in ray.nodes() if node["Alive"])
    each: dict[str, Any] = {"num_gpus": 1} if gpus else {"num_cpus": min(2, smallest)}  # an actor has to fit on a node
    most = max(1, gpus or cpus // each["num_cpus"])
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = list(map(dataclasses.asdict, shards))
    actor: Any = Captioner
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        actor,
        fn_constructor_args=(work, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(rows)), max_tasks_in_flight_per_actor=1),
        **each,
    )
    for row in data.iter_rows():
        yield Done(**row)
