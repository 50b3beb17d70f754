"""Log a run's numbers: to metrics.jsonl, to Weights & Biases if wanted, and as drawn curves.

Weights & Biases never asks a question and never ends a run. If its server is not available, the data stays in the run's
folder for `wandb sync`.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import re
import threading
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from config import TrainConfig, UserError
from scoring.report import finite, loss_ends
from utils import atomic, named, printable, read_log, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERVER = "https://api.wandb.ai"
MARKERS = 15  # at most per curve, so that a long one still looks like a line
TRAINING = {"color": "#E69F00", "linewidth": 1.3}  # Okabe and Ito's colours
VALIDATION = {"color": "#0072B2", "linewidth": 2, "linestyle": "--", "marker": "o"}
SECONDS = 10  # timeout of Weights & Biases: for its server's answer, and for sending the remaining data at a run's end


class MetricLog:
    """Appends JSON lines to metrics.jsonl. When a run is resumed, lines after the checkpoint's step are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        write_text(path, "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Write one line and flush it."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._file.name} cannot be written ({error.strerror}): free some disk space; the same command resumes from "
                "the newest checkpoint"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Log:
    """The log of the first process: metrics.jsonl and Weights & Biases. The other processes have a SilentLog."""

    def __init__(self, run: Path, step: int, config: TrainConfig) -> None:
        """Resume after `step`: later lines of an earlier process are dropped."""
        self._file = MetricLog(run / "metrics.jsonl", step)
        self._wandb = start_wandb(run, config)

    def write(self, step: int, **values: Any) -> None:
        """Write one line."""
        self._file.write(step, **values)
        if self._wandb:
            with contextlib.suppress(Exception):  # no error of Weights & Biases may end a run
                numbers = {name: value for name, value in values.items() if not isinstance(value, dict)}
                if samples := values.get("samples"):
                    import wandb

                    rows = [list(sample) for sample in samples.items()]
                    numbers["samples"] = wandb.Table(["picture", "caption"], rows)
                self._wandb.log(numbers | {"step": step})

    def close(self) -> None:
        """Close the file, and give Weights & Biases up to SECONDS to send the remaining data."""
        self._file.close()
        if self._wandb:
            ending = threading.Thread(target=self._wandb.finish, daemon=True)
            ending.start()
            ending.join(SECONDS)


class SilentLog:
    """A log that writes nothing."""

    def write(self, step: int, **values: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def wandb_mode(config: TrainConfig) -> tuple[Literal["online", "offline", "off"], str]:
    """online, offline or off, and the reason."""
    wanted, server = config.wandb, os.environ.get("WANDB_BASE_URL", SERVER)
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") and wanted == "auto":
        wanted = "offline" if os.environ["WANDB_MODE"] == "offline" else "off"
    if wanted == "off":
        return "off", "requested"
    host = urlsplit(server).hostname or ""
    try:
        import wandb  # noqa: F401
    except ImportError:
        return "off", "not installed: pip install wandb"
    if wanted == "offline":
        return "offline", "requested"
    key = os.environ.get("WANDB_API_KEY")
    if not key:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            key = (netrc.netrc().authenticators(host) or [None] * 3)[2]
    if not re.fullmatch("[!-~]*", key := (key or "").strip()):
        return "off", "the key has an invalid character: run `wandb login` again, or set WANDB_API_KEY"
    if not key:
        return "off", "no key: run `wandb login`, or set WANDB_API_KEY"
    try:
        urlopen(server, timeout=SECONDS).close()
    except HTTPError:
        pass  # the server answered
    except (OSError, HTTPException, ValueError) as error:
        why = printable(str(getattr(error, "reason", error)))
        return "offline", f"{host} is not available ({why}): send the data later with `wandb sync`"
    return "online", "found a key"


def start_wandb(run: Path, config: TrainConfig) -> Any:
    """Start a Weights & Biases run, or return None. Prints one line with the mode and the reason."""
    mode, reason = wandb_mode(config)
    if mode != "off":
        os.environ.setdefault("WANDB_SILENT", "true")  # else it prints before it reads its settings
        import wandb

        settings = wandb.Settings(init_timeout=SECONDS, silent=True, console="off", disable_git=True)
        options: dict[str, Any] = {"project": config.wandb_project, "name": run.name, "dir": run, "resume": "allow"}
        options |= {"config": config.to_dict(), "id": run_id(run)}
        modes: tuple[Literal["online", "offline"], ...] = ("online", "offline") if mode == "online" else ("offline",)
        for chosen in modes:
            try:
                started = wandb.init(mode=chosen, settings=settings, **options)
                started.define_metric("*", step_metric="step")
                print(f"wandb       {chosen} ({reason})", flush=True)
                return started
            except Exception as error:
                reason = named(error)
                with contextlib.suppress(Exception):
                    wandb.teardown()  # else the run still counts as in use
        mode = "off"
    print(f"wandb       {mode} ({reason})", flush=True)
    return None


def run_id(run: Path) -> str:
    """The Weights & Biases id of a run's folder; it stays the same when the run is resumed."""
    path = run / "wandb.id"
    if not path.exists():
        write_text(path, f"{run.name}-{os.urandom(4).hex()}")
    return path.read_text()


def draw_curves(run: Path) -> None:
    """Draw curves.png: losses, CIDEr-D on validation pictures and the learning rate, by step."""
    with atomic(run / "curves.png") as unfinished:
        curves(read_log(run / "metrics.jsonl")).savefig(unfinished, format="png", dpi=100)


def curves(lines: Sequence[dict[str, Any]]) -> Figure:
    """Plot a log's lines. Curves also differ in lightness, dashes and markers, for colour-blind readers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    scored = any("val_cider_d" in line or "reward" in line for line in lines)
    heights = [3, 2, 1] if scored else [3, 1]
    figure = Figure(figsize=(8, 2 + len(heights) * 2), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axis, name, style, label in (
        (axes[0], "loss", TRAINING, "training"),
        (axes[0], "val_loss", VALIDATION, "validation"),
        (axes[1], "reward", TRAINING, "training, sampled"),
        (axes[1], "val_cider_d", VALIDATION, "validation, greedy"),
        (axes[-1], "learning_rate", {"color": "black"}, None),
    ):
        points = [(line["step"], line[name]) for line in lines if finite(line.get(name))]
        every = 1 + len(points) // MARKERS
        marks: dict[str, Any] = {"marker": "o"} if len(points) == 1 else {}  # one point draws no line
        if points:  # the last point always has a marker
            marks |= {"markevery": ((len(points) - 1) % every, every), "zorder": 3, "label": label}
            axis.plot(*zip(*points, strict=True), **style | marks)
    for axis, name in zip(axes, ("loss (nats a token)", *["CIDEr-D"] * scored, "learning rate"), strict=True):
        axis.set_ylabel(name)
        axis.set_ylim(0, 1.1 * max((max(line.get_ydata()) for line in axis.lines), default=0) or 1)
        axis.grid(color="0.9")
        if axis is not axes[-1] and axis.lines:
            axis.legend()
    axes[0].set_ylim(loss_ends(lines))
    last = max((line["step"] for line in lines), default=0) or 1
    axes[-1].set_xlim(-0.02 * last, 1.02 * last)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[-1].set_xlabel("step")
    return figure
