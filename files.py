"""Files written whole or not at all, folders that can be written into, locks, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import UserError


def write_text(path: Path, text: str) -> None:
    """Writes all of a file or nothing of it."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)  # after a power cut a name without its content would be there
    unfinished.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, all of it or nothing."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def writable_directory(path: Path) -> Path:
    """Makes the folder; raises UserError where it cannot be made or written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}): choose another --output-dir") from error
    return path


def put_in_place(source: Path, target: Path) -> Path | None:
    """Copies source to target; a different file standing there is kept as *.previous.*, whose path is returned."""
    if target.exists() and file_hash(target) == file_hash(source):
        return None
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.copyfile(source, unfinished)
    previous = None
    if target.exists():
        previous = target.with_name(f"{target.stem}.previous{target.suffix}")
        target.replace(previous)
    unfinished.replace(target)
    return previous


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds a lock that one process at a time can have; without waiting, BlockingIOError where another has it.

    It goes with the process, however that ends. (Windows has no such guard.)
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as lock:
        os.register_at_fork(after_in_child=lock.close)  # or a loader's worker would hold it on for a while
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
