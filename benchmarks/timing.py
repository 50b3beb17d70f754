"""Timing of functions that take turns, facts about the machine, and rows of the printed tables."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from config import ViTGPT2Config


@dataclass(frozen=True)
class Row:
    """A row of a table: a figure, or None with the reason in more."""

    name: str
    value: float | None = None
    unit: str = ""
    more: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    """All figures of this row, for the JSON."""

    def line(self, predicted: str) -> str:
        """The row as text, with its prediction."""
        value = "-" if self.value is None else f"{self.value:.2f}"
        return f"  {self.name:48} {value:>9} {self.unit:8} {predicted:>13}  {self.more}".rstrip()


def about_machine() -> dict[str, Any]:
    """Facts that the figures depend on: versions, cores, the GPU."""
    import torch

    about = {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    return about | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def sizes(tiny: bool = False) -> ViTGPT2Config:
    """The sizes of a base model, or of a tiny one to check that every line runs."""
    if not tiny:
        return ViTGPT2Config(dropout=0.0)
    vision: Any = {"image_size": 32, "vision_embed_dim": 64, "vision_num_layers": 1, "vision_num_heads": 2}
    text: Any = {"vocab_size": 300, "max_length": 32, "decoder_embed_dim": 64, "decoder_num_layers": 1}
    return ViTGPT2Config(dropout=0.0, **vision, **text, decoder_num_heads=2)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a call takes, including its work on the GPU."""
    import torch

    settle = torch.cuda.synchronize if torch.cuda.is_available() else int
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def fastest(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The best time of each function in seconds, over several rounds in which all take turns."""
    seconds = dict.fromkeys(work, float("inf"))
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for name, piece in work.items():
            seconds[name] = min(seconds[name], timed(piece))
    return seconds
