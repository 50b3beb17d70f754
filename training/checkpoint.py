"""Checkpoints that cannot be lost: written whole or not at all, with a manifest of hashes, and read only if they match.

    runs/X/checkpoints/step-00000100/
        model.safetensors        the model as one file, ready to use; its averages where the run keeps any
        optimizer.safetensors    the optimizers' moments; with averages also the weights that are being trained
        state.json               step, schedule, scaler, best score: all else that the next step depends on
        manifest.json            size and SHA-256 of the files above, written last

`checkpoints/latest` and `checkpoints/best` are links to such folders, for people: state.json knows the best one's name.
Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import json
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
from utils import file_hash, first_line, locked, sync, unfinished_name, whole, write_json
from weights.file import write_tensors

ROOM_FOR_JSON = 1 << 20  # bytes, beside the tensors
FILES = {"model.safetensors", "optimizer.safetensors", "state.json"}
KINDS: dict[str, Any] = {  # of what state.json holds
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
    """The checkpoints of a run, oldest first, damaged ones too."""
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
    """Writes the checkpoint of a step, links it as latest and that of the name `best` as best, and deletes what is older than
    the newest `keep`, and what is newer: a run that went back behind damaged ones has passed over those.

    `size` is what its files will have at least, in bytes: UserError before a byte is written where the disk has less.
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
        if folder.exists():  # damaged, and come by again
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
    delete(folder.rename(unfinished_name(folder)))


def delete(path: Path) -> None:
    """Deletes a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def put_aside(run: Path) -> Path | None:
    """Gives a run's checkpoints, with its run.json and metrics.jsonl, another name for a new one to begin; returns that,
    None where there are none. What was there by that name goes: one generation, as each is as large as the run."""
    old, aside = run / "checkpoints", run / "checkpoints.previous"
    if not checkpoints(run):
        return None
    if aside.exists() or aside.is_symlink():
        remove(aside)
    old.rename(aside)
    for name in ("run.json", "metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError), whole(aside / name) as copy:
            shutil.copyfile(run / name, copy)
    return aside


def link_all(folder: Path, best: str | None) -> None:
    """Makes `latest` lead to this checkpoint and `best` to the one of that name beside it, if there is one."""
    link(folder, "latest")
    if best and folder.with_name(best).is_dir():
        link(folder.with_name(best), "best")


def link(folder: Path, name: str) -> None:
    """Makes `name`, beside the folder, lead to it: to the old one or the new one at any time."""
    place = folder.with_name(name)
    if place.is_dir() and not place.is_symlink():  # a copy that was made of a run has folders in the links' places
        remove(place)
    new = unfinished_name(place)
    new.symlink_to(folder.name)
    new.replace(place)


def clean(run: Path) -> None:
    """Deletes what a process that was killed has left half-written."""
    for path in [*run.glob(".*.unfinished"), *run.glob("checkpoints/.*.unfinished")]:
        delete(path)


def check(folder: Path) -> dict[str, Any]:
    """A checkpoint's state. Raises UserError, saying what is damaged, unless it is as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if set(manifest) != FILES:
            raise ValueError("manifest.json does not name its files")
        for name, known in manifest.items():
            path = folder / name
            if path.stat().st_size != known["bytes"] or file_hash(path) != known["sha256"]:
                raise ValueError(f"{name} is not what was written")
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        best = state["best_checkpoint"]
        fits = folder.name == f"step-{state['step']:08d}" and (best is None or re.fullmatch(r"step-\d{8,}", best))
        if not fits or not all(isinstance(state[name], kind) for name, kind in KINDS.items()):
            raise ValueError("state.json does not hold what it should")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged ({first_line(error)})") from error
    return state


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is as its manifest says, None where there is none at all. Raises UserError where there are
    some and all are damaged: a run that began anew would overwrite what may be mended."""
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            check(folder)
            return folder
        except UserError as error:
            print(f"{error}: passed over")
    if found:
        raise UserError(f"{run}: no checkpoint can be read: bring one back, or start anew with --resume never")
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The weights, tensors and state of a checkpoint that was checked."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors"), state


def final_checkpoint(run: Path) -> tuple[Path, str, dict[str, Any]]:
    """The best checkpoint; where that is lost the newest one, and what is to be said of it; and the newest one's state.
    Raises UserError where the newest is damaged, which the same command makes anew."""
    newest = newest_whole(run)
    if newest is None or newest != checkpoints(run)[-1]:
        raise UserError(f"{run}: the newest checkpoint is lost: the same command goes on from the one before")
    *_, state = load_checkpoint(newest)
    best = newest.with_name(state["best_checkpoint"] or "best")
    try:
        check(best)
        return best, "", state
    except UserError as error:
        return newest, f"the best checkpoint is lost, so the model is the newest, {newest.name}: {error}", state


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
