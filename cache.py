"""What is worked out once and kept on disk: a folder of files, each named after what went into it.

The folder is VIT_GPT2_CACHE from the environment, else vit-gpt2-captioning in the user's cache folder (XDG_CACHE_HOME,
~/.cache, or where the user has no home the folder for temporary files); it may be deleted at any time. A file appears
whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The folder, which may not exist yet."""
    if chosen := os.environ.get("VIT_GPT2_CACHE"):
        return Path(chosen).expanduser()
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a container's user without a home
        home = Path(tempfile.gettempdir())
    return home / "vit-gpt2-captioning"


def key_of(*parts: Any) -> str:
    """16 hexadecimal digits that are equal for equal parts (anything JSON can hold, and paths)."""
    return hashlib.blake2b(json.dumps(parts, default=str, sort_keys=True).encode(), digest_size=8).hexdigest()


def stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of files: what a key needs to notice that one was edited."""
    return [(str(path.absolute()), (s := path.stat()).st_size, s.st_mtime_ns) for path in paths]


def kept_file(kind: str, owner: Any, key: str) -> Path:
    """The file for this key; files of the same kind and owner with other keys are older versions of it."""
    return cache_dir() / f"{kind}-{key_of(owner)}-{key}"


def forget_older(path: Path) -> None:
    """Deletes the older versions of a kept file."""
    for other in path.parent.glob(f"{path.name.rpartition('-')[0]}-*"):
        if not other.name.startswith(path.name) and not other.name.endswith((".part", ".lock")):
            other.unlink(missing_ok=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path` when the block ends well, and is deleted when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
