"""Find copies of pictures among others: the same file, or a near duplicate.

    known = Known(view)
    known.add(0)
    known.find(view, 1)        (0, 3): picture 1 looks like picture 0, 3 bits of their hashes differ

Near duplicates are resized, recompressed or slightly cropped copies: pictures whose perceptual hashes (pHash, 64 bits)
differ in at most 4 bits, and whose colours, averaged over an 8 x 8 grid, differ nowhere by more than 24 of 255. Of 906
resized or recompressed copies of photographs all but two are within both limits. Of the 32.7 million pairs in Flickr8k
one pair is, a photograph that is there twice. The colours are needed because the hash ignores them: by the hash alone,
half of the demo's drawn scenes look alike.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from config import UserError
from data.budget import OverBudget, read_file
from data.pictures import load_picture, reason
from data.table import CaptionTable

SIZE, GRID = 64, 8  # pixels and grid cells per side of the copy that is compared
MAX_DISTANCE = 4  # bits
MAX_DIFFERENCE = 24  # of a cell's colour, of 255
BANDS = MAX_DISTANCE + 1  # two hashes that differ in MAX_DISTANCE bits are equal in at least one of so many parts

PHash = Callable[[Image.Image], Any]


def find_phash() -> PHash | None:
    """ImageHash's pHash, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        from imagehash import phash

        return phash  # type: ignore[no-any-return]
    return None


class View:
    """Hashes and mean colours of a split's N pictures, to find copies by."""

    def __init__(self, number: int) -> None:
        self.sha256 = [b""] * number  # empty for a picture that cannot be decoded
        self.phash = np.zeros(number, np.uint64)
        self.cells = np.zeros((number, 3 * GRID * GRID), np.int16)  # mean colours
        self.hashed = np.zeros(number, bool)
        self.bad: dict[int, str] = {}  # row -> why it cannot be decoded


def look_at(table: CaptionTable, phash: PHash | None, view: View, row: int) -> None:
    """Read and decode a picture, and fill in its row of the view."""
    name = table.name_of(row)
    try:
        source = table.picture(row)
        data = source if isinstance(source, bytes) else read_file(source)
        pixels = load_picture(data, SIZE, name).numpy()
    except (OSError, OverBudget) as error:
        view.bad[row] = reason(error)
        return
    except UserError as error:
        view.bad[row] = str(error).removeprefix(f"{name}: ")
        return
    view.sha256[row] = hashlib.sha256(data).digest()
    if phash is not None:
        bits = phash(Image.fromarray(pixels.transpose(1, 2, 0))).hash
        side = SIZE // GRID
        view.phash[row] = np.packbits(bits).view(np.uint64)[0]
        view.cells[row] = pixels.reshape(3, GRID, side, GRID, side).mean((2, 4)).ravel()
        view.hashed[row] = True


class Known:
    """Pictures of a view that others are compared with. A picture is compared with those that have a part of its hash, so
    a million pictures take minutes."""

    def __init__(self, view: View) -> None:
        """Start without pictures."""
        self.view = view
        self.files: dict[bytes, int] = {}
        self.bands: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]

    def add(self, row: int) -> None:
        """Add a picture of the view; one that cannot be decoded is left out."""
        if digest := self.view.sha256[row]:
            self.files.setdefault(digest, row)
        if self.view.hashed[row]:
            for rows, part in zip(self.bands, _parts(self.view.phash[row]), strict=True):
                rows.setdefault(part, []).append(row)

    def find(self, view: View, row: int) -> tuple[int, int | None] | None:
        """The known picture that a picture of a view is a copy of, and how many bits of their hashes differ: None for the
        same file. None if there is no such picture."""
        if (digest := view.sha256[row]) in self.files:
            return self.files[digest], None
        if not view.hashed[row] or not digest:
            return None
        alike = zip(self.bands, _parts(view.phash[row]), strict=True)
        rows = np.array(sorted({other for rows, part in alike for other in rows.get(part, ())}), np.int64)
        distance = np.bitwise_count(self.view.phash[rows] ^ view.phash[row])
        close = distance <= MAX_DISTANCE
        close &= np.abs(self.view.cells[rows] - view.cells[row]).max(1, initial=0) <= MAX_DIFFERENCE
        if not close.any():
            return None
        nearest = np.flatnonzero(close)[distance[close].argmin()]
        return int(rows[nearest]), int(distance[nearest])


def _parts(bits: np.uint64) -> list[int]:
    """A hash of 64 bits in BANDS parts."""
    width = -(-64 // BANDS)
    return [int(bits) >> width * band & (1 << width) - 1 for band in range(BANDS)]
