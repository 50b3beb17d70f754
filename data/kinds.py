"""Tell pictures from other files below a folder by their names. Opens none of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from utils import counted

HEIC = dict.fromkeys((".heic", ".heif", ".hif"), " (pip install pillow-heif)")
SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pcx .pgm .png .ppm .qoi .tga .tif .tiff .webp"
PICTURE_SUFFIXES = (*SUFFIXES.split(), *(HEIC if find_spec("pillow_heif") else ()))
TEXT_SUFFIXES = (".caption", ".txt")
BESIDE = (*TEXT_SUFFIXES, ".csv", ".tsv", ".json", ".jsonl")  # expected beside pictures: not reported


def is_picture(name: str | Path) -> bool:
    """Whether a file has a picture's suffix."""
    return Path(name).suffix.lower() in PICTURE_SUFFIXES


def folders_below(root: str) -> Iterator[tuple[str, list[str]]]:
    """The folder and those below it, each with the sorted names of its files; hidden ones are skipped. Linked folders
    come last, and each folder comes once, so that links in a circle end."""
    visited, waiting = set(), [root]
    for start in waiting:  # grows during the loop
        for folder, inside, names in os.walk(start):
            new = (real := os.path.realpath(folder)) not in visited
            visited.add(real)
            inside[:] = sorted(name for name in inside if new and not name.startswith("."))
            waiting += [path for name in inside if os.path.islink(path := os.path.join(folder, name))]
            if new:
                yield folder, sorted(name for name in names if not name.startswith("."))


def files_below(root: str | Path) -> Iterator[Path]:
    """Every file below root except hidden ones, folder by folder."""
    return (Path(folder, name) for folder, names in folders_below(str(root)) for name in names)


def left_out(files: Iterable[str | Path]) -> dict[str, int]:
    """{kind: number} of the files that are neither pictures nor captions, the most frequent first."""
    kinds = sorted(Counter(Path(file).suffix.lower() for file in files).items(), key=lambda each: (-each[1], each[0]))
    others = [(kind, number) for kind, number in kinds if kind not in PICTURE_SUFFIXES + BESIDE]
    return {f"{kind or 'without a suffix'}{HEIC.get(kind, '')}": number for kind, number in others}


def in_words(kinds: dict[str, int]) -> str:
    """The result of left_out in one line; "" for nothing."""
    return "skipped: " + ", ".join(counted(number, kind) for kind, number in kinds.items()) if kinds else ""
