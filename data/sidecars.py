"""Match pictures with the text files beside them, and choose one text where a picture has several."""

from __future__ import annotations

import codecs
from collections import Counter
from pathlib import Path

from data.budget import open_file
from data.kinds import TEXT_SUFFIXES


def texts_beside(pictures: list[Path], files: list[Path], kind: str | None = None) -> dict[Path, list[Path]]:
    """Map each picture of a folder to its texts among the folder's files (sorted); the first text is the one to use.

    The texts of a.jpg are a.caption, a.txt (often tags), a.jpg.caption and a.jpg.txt, in this order; if there is an
    a.png too, the long names come first. Texts with the suffix `kind` come before others, and empty ones last.
    """
    texts: dict[str, list[Path]] = {}
    for file in sorted(reversed(files), key=lambda file: file.suffix.lower()):  # a.txt wins over a.TXT
        if file.suffix.lower() in TEXT_SUFFIXES:
            texts.setdefault(file.stem, []).append(file)
    times = Counter(name for picture in pictures for name in {picture.stem, picture.name})
    found = {}
    for picture in pictures:
        names = dict.fromkeys((picture.name, picture.stem) if times[picture.stem] > 1 else (picture.stem, picture.name))
        beside = [text for name in names for text in texts.get(name, [])]
        if len(beside) > 1:  # a single text need not be opened
            beside.sort(key=lambda text: (not has_caption(text), text.suffix[1:].lower() != kind))
        found[picture] = beside
    return found


def has_caption(text: Path) -> bool:
    """Whether a text holds more than white space."""
    with open_file(text) as file:
        return bool(file.read().removeprefix(codecs.BOM_UTF8).strip())
