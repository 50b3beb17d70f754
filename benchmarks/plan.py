"""benchmark.py plan: what hundreds of millions of pictures take on a cluster, computed from measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAILURES = 419 / (54 * 24 * 16_384)
"""Interruptions of a GPU an hour, in the pre-training of Llama 3 (arXiv:2407.21783, table 5): 419 in 54 days of 16,384."""


@dataclass(kw_only=True)
class PlanBenchmark:
    """Compute the hours, money, traffic and failures of captioning many pictures and of training on them. Measures
    nothing: the default rates were measured on one H100 (EXPERIMENTS.md), the others are assumptions to replace."""

    pairs: float = 400e6
    """Pictures to caption, and picture-caption pairs to train on."""
    gpus: int = 64
    """GPUs of the cluster."""
    caption_rate: float = 4153
    """Captions per second and GPU: base size, greedy, 512 at a time."""
    train_rate: float = 1889
    """Pairs per second and GPU in training: base size, compiled, one caption a picture (7,489 with five)."""
    efficiency: float = 0.9
    """Share of these rates that each GPU of many reaches (assumed)."""
    picture_kilobytes: float = 25
    """Size of a picture in a shard (assumed: JPEG, 256 pixels)."""
    decode_rate: float = 1090
    """Pictures per second that a CPU core decodes (measured for JPEGs of 640 x 480)."""
    caption_bytes: float = 150
    """Size of a caption with its score in the output (assumed)."""
    shard: int = 10_000
    """Pictures in a shard."""
    price: float = 2.5
    """Dollars for a GPU and hour (assumed)."""
    checkpoint_minutes: float = 30
    """Minutes between checkpoints."""
    restart_minutes: float = 5
    """Minutes until a stopped run trains again (assumed)."""
    output: Path = Path("benchmark-plan.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Compute both jobs, print a table in Markdown, and return all figures."""
        lost_shard = self.shard / 2 / self.caption_rate / 3600  # GPU-hours: half a shard, of one GPU
        lost_steps = (self.checkpoint_minutes / 2 + self.restart_minutes) / 60 * self.gpus
        found = {
            "captioning": self.job(self.caption_rate, lost_shard, self.pairs * self.caption_bytes),
            "training": self.job(self.train_rate, lost_steps, 0.0),
        }
        names = {
            "gpu_hours": ("GPU-hours", "{:,.0f}"),
            "hours": (f"hours on {self.gpus} GPUs", "{:,.2f}"),
            "dollars": (f"dollars, at {self.price:g} a GPU-hour", "{:,.0f}"),
            "read_terabytes": ("read, TB", "{:,.1f}"),
            "written_gigabytes": ("written, GB", "{:,.0f}"),
            "read_gigabits": ("read, Gbit/s for all", "{:,.1f}"),
            "pictures": ("pictures a second", "{:,.0f}"),
            "cores": ("CPU cores to decode them", "{:,.0f}"),
            "failures": ("failures expected", "{:.3f}"),
            "lost_gpu_hours": ("lost by a failure, GPU-hours", "{:,.4g}"),
        }
        print(f"{self.pairs:,.0f} pictures with {self.gpus} GPUs, {self.shard:,} pictures a shard\n")
        print("| | captioning | training, one pass |\n|---|---|---|")
        for name, (text, form) in names.items():
            print(f"| {text} | " + " | ".join(form.format(found[job][name]) for job in found) + " |")
        return found

    def job(self, rate: float, lost_gpu_hours: float, written: float) -> dict[str, float]:
        """What a job takes at a rate per GPU; lost_gpu_hours: lost by each failure; written: bytes."""
        seconds = self.pairs / (rate * self.efficiency * self.gpus)
        read = self.pairs * self.picture_kilobytes * 1e3
        gpu_hours = seconds / 3600 * self.gpus
        failures = gpu_hours * FAILURES
        return {
            "gpu_hours": gpu_hours,
            "hours": seconds / 3600,
            "dollars": gpu_hours * self.price,
            "read_terabytes": read / 1e12,
            "written_gigabytes": written / 1e9,
            "read_gigabits": 8 * read / seconds / 1e9,
            "pictures": self.pairs / seconds,
            "cores": self.pairs / seconds / self.decode_rate,
            "failures": failures,
            "lost_gpu_hours": lost_gpu_hours,
        }
