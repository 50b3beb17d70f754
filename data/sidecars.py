"""Texts beside pictures: which of them is whose, and which one counts."""

from __future__ import annotations

import codecs
from collections import Counter
from pathlib import Path

from data.budget import open_file
from data.kinds import TEXT_SUFFIXES


def texts_beside(pictures: list[Path], files: list[Path], kind: str | None = None) -> dict[Path, list[Path]]:
    """Each picture of a folder with its texts among the folder's files (sorted), first the one that counts.

    Of a.jpg these are a.caption, a.txt (often tags), a.jpg.caption and a.jpg.txt, in this order; with the long names first
    where there is an a.png too. Texts of the suffix `kind` come before others, and empty ones last.
    """
    texts: dict[str, list[Path]] = {}
    for file in sorted(reversed(files), key=lambda file: file.suffix.lower()):  # of a.TXT and a.txt the latter counts
        if file.suffix.lower() in TEXT_SUFFIXES:
            texts.setdefault(file.stem, []).append(file)
    times = Counter(name for picture in pictures for name in {picture.stem, picture.name})
    found = {}
    for picture in pictures:
        names = dict.fromkeys((picture.name, picture.stem) if times[picture.stem] > 1 else (picture.stem, picture.name))
        own = [text for name in names for text in texts.get(name, [])]
        if len(own) > 1:  # or none need be opened
            own.sort(key=lambda text: (not has_caption(text), text.suffix[1:].lower() != kind))
        found[picture] = own
    return found


def has_caption(text: Path) -> bool:
    """Whether a text holds more than white space."""
    with open_file(text) as file:
        return bool(file.read().removeprefix(codecs.BOM_UTF8).strip())
