"""Checkpoints that cannot be lost: written whole or not at all, with a manifest of hashes, and read only if they match.

    runs/X/checkpoints/step-00000100/
        model.safetensors        the model as one file, ready to use; its averages where the run keeps any
        optimizer.safetensors    the optimizers' moments; with averages also the weights that are being trained
        state.json               step, schedule, scaler, best score: all else that the next step depends on
        manifest.json            size and SHA-256 of the files above, written last

`checkpoints/latest` and `checkpoints/best` are links to such folders. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import UserError
from training.sharding import collected, like
from utils import file_hash, first_line, locked, sync, write_json
from weights.file import write_tensors

ROOM_FOR_JSON = 1 << 20  # bytes, beside the tensors


def training_in(run: Path) -> AbstractContextManager[None]:
    """Keeps a second process from training in the same folder. Raises UserError where one does already."""
    return locked(run / ".lock", f"{run}: another process is training there: stop it, or choose another --output-dir")


def in_use(run: Path) -> bool:
    """Whether a process is training in the folder."""
    try:
        with training_in(run):
            return False
    except UserError:
        return True


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "manifest.json").is_file())


def save_checkpoint(
    run: Path,
    step: int,
    save_model: Callable[[Path], None],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    size: int,
    *,
    best: bool,
    keep: int,
) -> None:
    """Writes the checkpoint of a step, links it as latest (and best), and deletes what is older than the newest `keep`,
    and what is newer: a run that went back behind damaged ones has passed over those.

    `size` is what its files will have at least, in bytes: UserError before a byte is written where the disk has less.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.parent.mkdir(exist_ok=True)
    needed, free = size + ROOM_FOR_JSON, shutil.disk_usage(run).free
    if needed > free:
        raise no_room(folder, needed, free)
    link_to_best = run / "checkpoints" / "best"
    kept = folder.name if best else os.readlink(link_to_best) if link_to_best.is_symlink() else None
    try:
        unfinished.mkdir()
        save_model(unfinished / "model.safetensors")
        write_tensors(tensors, unfinished / "optimizer.safetensors")
        write_json(unfinished / "state.json", state | {"best_checkpoint": kept})
        written = sorted(unfinished.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in written}
        write_json(unfinished / "manifest.json", manifest)
        sync(unfinished)
        if folder.exists():  # damaged, and come by again
            remove(folder)
        unfinished.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise no_room(folder, needed, shutil.disk_usage(run).free, error) from error
    link_all(folder, kept)
    newest = [path for path in checkpoints(run) if path.name <= folder.name][-keep:]
    for path in checkpoints(run):
        if path not in newest and path.name != kept:
            remove(path)


def no_room(folder: Path, needed: int, free: int, error: Exception | None = None) -> UserError:
    """What to say when a checkpoint cannot be written."""
    said = f" ({first_line(error)})" if error else ""
    return UserError(
        f"{folder} cannot be written{said}: it needs {needed:,} bytes and {free:,} are free. The checkpoint before it is "
        "whole: make room, and the same command goes on from there"
    )


def remove(folder: Path) -> None:
    """Deletes a checkpoint; one that is killed meanwhile leaves nothing that looks like a checkpoint."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old.unfinished")))


def link_all(folder: Path, best: str | None) -> None:
    """Makes `latest` lead to this checkpoint and `best` to the one of that name beside it, if there is one."""
    link(folder, "latest")
    if best and folder.with_name(best).is_dir():
        link(folder.with_name(best), "best")


def link(folder: Path, name: str) -> None:
    """Makes `name`, beside the folder, lead to it: to the old one or the new one at any time."""
    new = folder.with_name(f".{name}.unfinished")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    new.replace(folder.with_name(name))


def clean(run: Path) -> None:
    """Deletes what a process that was killed has left half-written."""
    for path in [*run.glob(".*.unfinished"), *run.glob("checkpoints/.*.unfinished")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def load_checkpoint(run: Path) -> tuple[Path, dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is as its manifest says: folder, weights, tensors and state. None where there is none."""
    for folder in reversed(checkpoints(run)):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            for name, known in manifest.items():
                if file_hash(folder / name) != known["sha256"]:
                    raise ValueError(f"{name} is not what was written")
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
            return folder, weights, load_file(folder / "optimizer.safetensors"), state
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            print(f"{folder} is damaged ({first_line(error)}): going back to the one before")
    return None


# Optimizers as tensors


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' moments by names that load_optimizers understands. All processes of a sharded model must ask."""
    return {
        f"{number}.{index}.{name}": collected(value)
        for number, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizers(tensors: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Gives the optimizers their moments back."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    learned = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for key, tensor in tensors.items():
        number, index, name = key.split(".", 2)
        parameter = learned[int(number)][int(index)]
        own = like(parameter, tensor) if tensor.shape == parameter.shape else tensor  # AdamW also counts its steps
        states[int(number)].setdefault(int(index), {})[name] = own
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
