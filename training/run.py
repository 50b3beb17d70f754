"""A run's folder: how it is named and found, its run.json, and its checkpoints."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import NEWER_SETTINGS, TrainConfig, UserError
from training.checkpoint import check, checkpoints, in_use
from utils import dated_folder, file_hash, writable_directory
from weights.file import MODEL_FILE

OWN_DATA = ("auto", "imagefolder", "webdataset", "csv", "sidecar")  # layouts of users' data, not of a known data set


def name_of(config: TrainConfig) -> str:
    """The start of a new run's name: for the user's data its folder or Hub name, else the preset."""
    name, folder = config.dataset.rpartition("/")[2], config.data_dir and config.data_dir.expanduser().resolve()
    if config.dataset in OWN_DATA and folder and not any(folder.glob("annotations/captions_train20*.json")):
        name = (folder.parent if folder.is_file() else folder).name
    elif "/" not in config.dataset:
        name = ""
    return re.sub(r"[^\w.-]+", "_", name).strip("._-") or config.preset


@dataclass(frozen=True)
class Run:
    """A run on disk. Another process may be training it, so every property reads the disk again."""

    folder: Path

    @property
    def about(self) -> dict[str, Any]:
        """The content of run.json; empty if it cannot be read."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            about = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            return about if isinstance(about, dict) else {}
        return {}

    @property
    def finished(self) -> bool:
        """Whether run.json says that the run is finished."""
        return bool(self.about.get("finished"))

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, oldest first, with damaged ones."""
        return checkpoints(self.folder)

    @property
    def readable(self) -> bool:
        """Whether run.json exists, and its values that resuming needs have the right types."""
        about = {"fingerprint": None, "tokenizer": "", "data": "", "device": "", "precision": "fp32"} | self.about
        texts = all(isinstance(about[name], str) for name in ("fingerprint", "tokenizer", "data", "device"))
        return texts and about["precision"] in ("fp32", "fp16", "bf16")

    def check(self, config: TrainConfig) -> Run:
        """Check that the run can be resumed with this config, and return it. Raises UserError if not."""
        if not self.readable:
            raise UserError(
                f"{self.folder}: run.json is lost or damaged, so the run cannot be resumed: restore it, or start again "
                "with --resume never"
            )
        if self.about.get("fingerprint") != config.fingerprint:
            raise UserError(
                f"{self.folder} has a run with other settings{self.difference(config)}: choose another --output-dir, or "
                "--resume never to replace it"
            )
        return self

    def difference(self, config: TrainConfig) -> str:
        """The settings in which the run differs, as text in brackets; empty if they are not known."""
        with contextlib.suppress(TypeError, AttributeError, KeyError):
            newer = {name: getattr(TrainConfig, name) for name in NEWER_SETTINGS}  # older runs lack them
            ours, theirs = newer | config.learned_from, newer | self.about.get("config", {})
            ours, theirs = ours | ours["model"], theirs | theirs["model"] | {"compile": bool(theirs["compile"])}
            names = [n for n, value in ours.items() if n != "model" and n in theirs and theirs[n] != value]
            if names:
                return f" ({', '.join(f'{n} {theirs[n]!r} instead of {ours[n]!r}' for n in names[:3])})"
        return ""

    @classmethod
    def find(cls, config: TrainConfig) -> Run:
        """The run that the config names, an unfinished run with the same settings to resume, or a new run."""
        if config.resume not in ("auto", "never"):
            run = cls(Path(config.resume))
            if not run.checkpoints:
                raise UserError(f"{run.folder}: no checkpoint to resume from there: name a run's folder, auto or never")
            run.check(config)
            return cls(writable_directory(run.folder))
        if config.output_dir is not None:
            run = cls(config.output_dir)
            if config.resume == "auto" and run.checkpoints:
                run.check(config)
            return cls(writable_directory(run.folder))
        if config.resume == "auto":
            for run in map(cls, sorted(Path("runs").glob("*-*"), reverse=True)):
                if run.checkpoints and not run.readable:
                    print(f"{run.folder} is not resumed: its run.json is lost or damaged")
                elif run.about.get("fingerprint") == config.fingerprint and not run.finished and run.checkpoints:
                    if not in_use(run.folder):
                        return cls(writable_directory(run.folder))
                    print(
                        f"{run.folder} has the same settings, but another process is training there: this is a new run"
                    )
        return cls.new(name_of(config))

    @classmethod
    def new(cls, called: str) -> Run:
        """Create a new folder in runs/."""
        return cls(dated_folder(f"runs/{called}"))

    @classmethod
    def of_model(cls, path: Path) -> Run | None:
        """The run whose folder contains a model's file, or one in ./runs with the same file; else None."""
        if not path.is_file():
            return None
        for folder in path.absolute().parents[:3]:  # the finished model's run, or a checkpoint's
            if (folder / "run.json").is_file():
                return cls(folder)
        size = path.stat().st_size
        candidates = [file for file in Path("runs").glob(f"*/{MODEL_FILE}") if file.stat().st_size == size]
        same = [file.parent for file in candidates if file_hash(file) == file_hash(path)]
        return cls(same[0]) if same and (same[0] / "run.json").is_file() else None


def check_model(path: Path) -> None:
    """Raise UserError if a model (a file or its folder) has changed since its run wrote it. Models outside of a run are
    not checked."""
    path = path / MODEL_FILE if path.is_dir() else path
    if (path.parent / "manifest.json").is_file():
        check(path.parent)
    known = Run(path.parent).about.get("model_sha256")
    if known and path.name == MODEL_FILE and path.is_file() and file_hash(path) != known:
        raise UserError(f"{path} is damaged (it has changed since the run wrote it): the run's command writes it again")
