"""Seconds of pieces of work, measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes, on a GPU to its end."""
    import torch

    settle = torch.cuda.synchronize if torch.cuda.is_available() else int
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def fastest(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each piece of work: its best of several rounds, in which all take turns."""
    seconds = dict.fromkeys(work, float("inf"))
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for name, piece in work.items():
            seconds[name] = min(seconds[name], timed(piece))
    return seconds
