"""When a captioner should say "I do not know": precision against coverage, by the confidence in each caption.

A caption is right if its score reaches a given level. Leaving out captions of low confidence raises the precision (the share
of right captions among those given) and lowers the coverage (the share of pictures with a caption).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from config import UserError
from utils import atomic

FEWEST = 30  # captions that a precision is computed from


class Point(NamedTuple):
    """Precision and coverage at a threshold of the confidence."""

    threshold: float
    coverage: float
    precision: float
    low: float
    high: float
    """Of the precision, a 95 % interval."""


def curve(confidences: Sequence[float], scores: Sequence[float], level: float) -> list[Point]:
    """The point of each threshold that leaves FEWEST captions or more, the highest threshold first. Raises UserError if
    there are fewer pictures, or if the lists have different lengths."""
    if len(confidences) != len(scores):
        raise UserError(f"{len(confidences)} confidences but {len(scores)} scores: give both for each picture")
    if len(scores) < FEWEST:
        raise UserError(f"{len(scores)} pictures are too few to calibrate with: have at least {FEWEST}")
    order = np.argsort(-np.asarray(confidences), kind="stable")
    sorted_confidences = np.asarray(confidences)[order]
    right = np.cumsum(np.asarray(scores)[order] >= level)
    last = np.append(np.diff(sorted_confidences) != 0, True)  # equal confidences are kept or left out together
    numbers = np.flatnonzero(last & (np.arange(len(right)) >= FEWEST - 1)) + 1
    return [
        Point(float(sorted_confidences[n - 1]), n / len(right), right[n - 1] / n, *wilson(int(right[n - 1]), int(n)))
        for n in numbers
    ]


def threshold_for(points: Sequence[Point], wanted: float) -> Point:
    """The point with the largest coverage whose precision is at least `wanted` even at the low end of its interval: the
    precision itself is a bit too high, as the threshold is chosen by it. Raises UserError if there is none."""
    good = [point for point in points if point.low >= wanted]
    if not good:
        best = max(points, key=lambda point: point.low)
        raise UserError(
            f"no threshold gives a precision of {wanted:g} for sure: the best is {best.precision:.3f} ({best.low:.3f} to "
            f"{best.high:.3f}), at a coverage of {best.coverage:.3f}: ask for less, or for a lower level"
        )
    return max(good, key=lambda point: point.coverage)


def at(confidences: Sequence[float], scores: Sequence[float], level: float, threshold: float) -> Point:
    """The point of a threshold that was chosen on other pictures."""
    given = np.asarray(confidences) >= threshold
    right, number = int((np.asarray(scores)[given] >= level).sum()), int(given.sum())
    return Point(threshold, number / max(len(scores), 1), right / max(number, 1), *wilson(right, number))


def wilson(right: int, number: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, "Probable Inference", J. Am. Stat. Assoc. 22)."""
    if not number:
        return 0.0, 1.0
    share, spread = right / number, z * z / number
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / number + spread / (4 * number)) / (1 + spread)
    return middle - half, middle + half


def read_scores(folder: Path, score: str) -> tuple[list[float], list[float]]:
    """The confidence and a score of each picture, from an evaluation's per_picture.csv."""
    with (folder / "per_picture.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"confidence", score} <= rows[0].keys():
        raise UserError(f"{folder}: no confidence and {score} of each picture in it: evaluate a model on --data-dir")
    return [float(row["confidence"]) for row in rows], [float(row[score]) for row in rows]


def in_words(point: Point, level: float, score: str) -> str:
    """A point in a line."""
    return (
        f"confidence {point.threshold:.4f}: precision {point.precision:.3f} ({point.low:.3f} to {point.high:.3f}), "
        f"coverage {point.coverage:.3f}; right is a {score} of {level:g} or more"
    )


def draw(path: Path, points: Sequence[Point], chosen: Point, level: float, score: str) -> None:
    """Draw the curve with its intervals and the chosen point."""
    from matplotlib.figure import Figure

    coverage: NDArray[np.float64] = np.array([point.coverage for point in points])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(coverage, [p.low for p in points], [p.high for p in points], color="#0072b2", alpha=0.2, lw=0)
    axes.plot(coverage, [point.precision for point in points], color="#0072b2")
    axes.plot([chosen.coverage], [chosen.precision], "o", color="#d55e00")
    axes.annotate(
        f"confidence {chosen.threshold:.3f}", (chosen.coverage, chosen.precision), (6, 6), textcoords="offset points"
    )
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="coverage: pictures with a caption",
        ylabel=f"precision: {score} of {level:g} or more",
    )
    axes.grid(alpha=0.3)
    with atomic(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)
