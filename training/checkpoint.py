"""Checkpoints: written atomically with a manifest of hashes, and loaded only if the hashes match.

    runs/X/checkpoints/step-00000100/
        model.safetensors        the model, ready to use; with an average (--ema) the averaged weights
        optimizer.safetensors    the optimizers' moments; with an average also the weights in training
        state.json               step, schedule, scaler, best score: all else that the next step depends on
        manifest.json            size and SHA-256 of the files above, written last

`checkpoints/latest` and `checkpoints/best` are links for the user, where the system allows links; the code reads the
best one's name from state.json.
Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from utils import atomic, file_hash, first_line, locked, sync, unfinished_name, write_json
from weights.file import write_tensors

ROOM_FOR_JSON = 1 << 20  # bytes for the JSON files, besides the tensors
FILES = {"model.safetensors", "optimizer.safetensors", "state.json"}
KINDS: dict[str, Any] = {  # the types of state.json's values
    "best": float | int | None,
    "waited": int,
    "losses": list,
    "rewards": list,
    "epoch": list,
    "seconds": float | int,
    "scaler": dict,
    "overflows": float | int,
}


def training_in(run: Path) -> AbstractContextManager[None]:
    """Lock the folder against a second training process. Raises UserError if another process is training there."""
    return locked(run / ".lock", f"{run}: another process is training there: stop it, or choose another --output-dir")


def in_use(run: Path) -> bool:
    """Whether a process is training in the folder."""
    try:
        with training_in(run):
            return False
    except UserError:
        return True


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, with damaged ones."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def save_checkpoint(
    run: Path,
    step: int,
    save_model: Callable[[Path], None],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    size: int,
    *,
    best: str | None,
    keep: int,
) -> None:
    """Write a step's checkpoint and update the links latest and best (`best` is a checkpoint's name). Delete all but
    the newest `keep` and the best. Later steps' checkpoints are deleted too: they are damaged, so the run went back.

    `size`: bytes that the files need at least. If the disk has less, raises UserError before anything is written.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    unfinished = unfinished_name(folder)
    unfinished.parent.mkdir(exist_ok=True)
    needed, free = size + ROOM_FOR_JSON, shutil.disk_usage(run).free
    if needed > free:
        raise no_room(folder, needed, free)
    try:
        unfinished.mkdir()
        save_model(unfinished / "model.safetensors")
        write_tensors(tensors, unfinished / "optimizer.safetensors")
        write_json(unfinished / "state.json", state | {"best_checkpoint": best})
        written = sorted(unfinished.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in written}
        write_json(unfinished / "manifest.json", manifest)
        sync(unfinished)
        if folder.exists():  # a damaged one of the same step
            remove(folder)
        unfinished.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise no_room(folder, needed, shutil.disk_usage(run).free, error) from error
    link_all(folder, best)
    newest = [path for path in checkpoints(run) if path.name <= folder.name][-keep:]
    for path in checkpoints(run):
        if path not in newest and path.name != best:
            with contextlib.suppress(OSError):  # Windows deletes no file that somebody is reading: the next save does
                remove(path)


def no_room(folder: Path, needed: int, free: int, error: Exception | None = None) -> UserError:
    """The error for a checkpoint that cannot be written."""
    why = f" ({first_line(error)})" if error else ""
    return UserError(
        f"{folder} cannot be written{why}: it needs {needed:,} bytes and {free:,} are free. The previous checkpoint is "
        "complete: free some disk space, and the same command resumes from there"
    )


def remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a killed process leaves nothing that looks like one."""
    delete(folder.rename(unfinished_name(folder)))


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def put_aside(run: Path) -> Path | None:
    """Move a run's checkpoints to checkpoints.previous, with copies of run.json and metrics.jsonl, for a new run to
    start. Returns that folder, None without checkpoints. An older checkpoints.previous is deleted, to save space."""
    old, aside = run / "checkpoints", run / "checkpoints.previous"
    if not checkpoints(run):
        return None
    if aside.exists() or aside.is_symlink():
        remove(aside)
    old.rename(aside)
    for name in ("run.json", "metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError), atomic(aside / name) as copy:
            shutil.copyfile(run / name, copy)
    return aside


def link_all(folder: Path, best: str | None) -> None:
    """Link `latest` to this checkpoint, and `best` to the checkpoint with that name, if it exists."""
    link(folder, "latest")
    if best and folder.with_name(best).is_dir():
        link(folder.with_name(best), "best")


def link(folder: Path, name: str) -> None:
    """Make `name`, beside the folder, a link to it. The link is replaced atomically. Windows allows links only in its
    developer mode, and some disks and network folders have none: then there is no link."""
    path = folder.with_name(name)
    if path.is_dir() and not path.is_symlink():  # in a copy of a run, the links may have become folders
        remove(path)
    new = unfinished_name(path)
    with contextlib.suppress(OSError):
        new.symlink_to(folder.name)
        if os.name == "nt":  # it does not replace a link to a folder
            path.unlink(missing_ok=True)
        new.replace(path)


def clean(run: Path) -> None:
    """Delete the unfinished files of killed processes."""
    for path in [*run.glob(".*.unfinished"), *run.glob("checkpoints/.*.unfinished")]:
        with contextlib.suppress(OSError):
            delete(path)


def check(folder: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest, and return its state. Raises UserError that names what is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if set(manifest) != FILES:
            raise ValueError("manifest.json does not list the checkpoint's files")
        for name, known in manifest.items():
            path = folder / name
            if path.stat().st_size != known["bytes"] or file_hash(path) != known["sha256"]:
                raise ValueError(f"{name} has changed since it was written")
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        best = state["best_checkpoint"]
        fits = folder.name == f"step-{state['step']:08d}" and (best is None or re.fullmatch(r"step-\d{8,}", best))
        if not fits or not all(isinstance(state[name], kind) for name, kind in KINDS.items()):
            raise ValueError("state.json has missing or wrong values")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged ({first_line(error)})") from error
    return state


def newest_complete(run: Path) -> Path | None:
    """The newest checkpoint that matches its manifest, None without checkpoints. Raises UserError if all of them are
    damaged: a new run would overwrite files that the user may still repair."""
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            check(folder)
            return folder
        except UserError as error:
            print(f"{error}: skipped")
    if found:
        raise UserError(f"{run}: no checkpoint can be read: restore one, or start again with --resume never")
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The weights, optimizer tensors and state of a checkpoint, which must have been checked."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors"), state


def final_checkpoint(run: Path) -> tuple[Path, str, dict[str, Any]]:
    """The best checkpoint, "" and the newest checkpoint's state. If the best one is lost: the newest one, and an error
    message. Raises UserError if the newest one is damaged; the same command then writes it again."""
    newest = newest_complete(run)
    if newest is None or newest != checkpoints(run)[-1]:
        raise UserError(f"{run}: the newest checkpoint is lost: the same command resumes from the one before")
    *_, state = load_checkpoint(newest)
    best = newest.with_name(state["best_checkpoint"] or "best")
    try:
        check(best)
        return best, "", state
    except UserError as error:
        return newest, f"the best checkpoint is lost, so the model is the newest, {newest.name}: {error}", state


# Optimizers as tensors


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' moments, by names that load_optimizers reads. With a sharded model all processes must call it."""
    return {
        f"{number}.{index}.{name}": collected(value)
        for number, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizers(tensors: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Load the moments into the optimizers."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    learned = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for key, tensor in tensors.items():
        number, index, name = key.split(".", 2)
        parameter = learned[int(number)][int(index)]
        tensor = tensor.clone()  # else the checkpoint's file would stay mapped, and Windows deletes no mapped file
        value = like(parameter, tensor) if tensor.shape == parameter.shape else tensor  # else AdamW's step count
        states[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
