"""Which files below a folder are pictures, by their names, and what the others are. Opens none of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

HEIC = dict.fromkeys((".heic", ".heif", ".hif"), " (pip install pillow-heif)")
SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pcx .pgm .png .ppm .qoi .tga .tif .tiff .webp"
PICTURE_SUFFIXES = (*SUFFIXES.split(), *(HEIC if find_spec("pillow_heif") else ()))
TEXT_SUFFIXES = (".caption", ".txt")
BESIDE = (*TEXT_SUFFIXES, ".csv", ".tsv", ".json", ".jsonl")  # what is expected where pictures lie


def is_picture(name: str | Path) -> bool:
    """Whether a file is a picture by its name."""
    return Path(name).suffix.lower() in PICTURE_SUFFIXES


def folders_below(root: str) -> Iterator[tuple[str, list[str]]]:
    """The folder and those below it with their files' names, in order, hidden ones left out. Linked folders come after
    all others, and each folder once: no link leads round in a circle."""
    seen, waiting = set(), [root]
    for start in waiting:  # which grows meanwhile
        for folder, inside, names in os.walk(start):
            new = (real := os.path.realpath(folder)) not in seen
            seen.add(real)
            inside[:] = sorted(name for name in inside if new and not name.startswith("."))
            waiting += [path for name in inside if os.path.islink(path := os.path.join(folder, name))]
            if new:
                yield folder, sorted(name for name in names if not name.startswith("."))


def files_below(root: str | Path) -> Iterator[Path]:
    """Every file below root but hidden ones, folder by folder."""
    return (Path(folder, name) for folder, names in folders_below(str(root)) for name in names)


def left_out(files: Iterable[str | Path]) -> dict[str, int]:
    """{kind: how many} of the files that are neither pictures nor texts, the most frequent first."""
    kinds = sorted(Counter(Path(file).suffix.lower() for file in files).items(), key=lambda each: (-each[1], each[0]))
    others = [(kind, number) for kind, number in kinds if kind not in PICTURE_SUFFIXES + BESIDE]
    return {f"{kind or 'without a suffix'}{HEIC.get(kind, '')}": number for kind, number in others}


def in_words(kinds: dict[str, int]) -> str:
    """What left_out found, in one line; "" for nothing."""
    return "left out: " + ", ".join(f"{number:,} {kind}" for kind, number in kinds.items()) if kinds else ""
