"""Pictures to skip: missing or damaged ones, and those that a model must not be scored on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from config import UserError
from data.budget import why_missing
from data.table import CaptionTable
from utils import counted, write_csv


def pictures_seen(trained_on: np.ndarray, table: CaptionTable) -> list[int]:
    """Rows of the table whose pictures a model was trained on."""
    return np.flatnonzero(np.isin(table.keys(), trained_on)).tolist()


def check_overlap(trained_on: np.ndarray, table: CaptionTable, allowed: bool) -> None:
    """Raise UserError, unless allowed, if the model was trained on some of the table's pictures."""
    used = pictures_seen(trained_on, table)
    if used and not allowed:
        some = ", ".join(str(table.id_of(row)) for row in used[:3])
        raise UserError(
            f"{len(used):,} of the {len(table):,} {table.split} pictures ({some}{', ...' if len(used) > 3 else ''}) were "
            "trained on, so a score on them means nothing: choose other pictures, or add --allow-overlap"
        )


class BadPictures:
    """Missing or damaged pictures: skipped, counted, listed in a CSV file; too many of them are an error."""

    def __init__(self, path: Path, tables: Iterable[CaptionTable], most: float = 0.01, go_on: bool = False) -> None:
        """`most` is the largest allowed share of bad pictures in the tables. With `go_on` (a resumed run) the file's
        entries stay; otherwise the file is deleted."""
        self.path, self.most = path, most
        self.total = sum(len(table) + len(table.missing) for table in {id(table): table for table in tables}.values())
        self.found: dict[tuple[str, str], str] = {}
        """(split, picture) -> what is wrong."""
        if go_on and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                self.found = {(split, picture): why for split, picture, why in list(csv.reader(file))[1:]}
        else:
            path.unlink(missing_ok=True)

    @property
    def notes(self) -> list[str]:
        """One line with the number of skipped pictures; none for 0."""
        return [f"{counted(len(self.found), 'pictures')} skipped, named in {self.path}"] if self.found else []

    def add_known(self, table: CaptionTable, damaged: Mapping[int, str]) -> None:
        """Add the table's missing pictures, and rows that could not be decoded, with the reason."""
        named = [(str(path := table.root / name), why_missing(path)) for name in table.missing]
        self._add(table, [*named, *((table.name_of(row), reason) for row, reason in damaged.items())])

    def add(self, table: CaptionTable, rows: Sequence[tuple[int, str]]) -> None:
        """Add a batch's bad rows. Raises UserError when there are too many."""
        self._add(table, [(table.name_of(row), reason) for row, reason in rows])

    def _add(self, table: CaptionTable, named: Sequence[tuple[str, str]]) -> None:
        new = {(table.split, name): reason for name, reason in named if (table.split, name) not in self.found}
        if not new:
            return
        self.found |= new
        write_csv(self.path, [("part", "picture", "reason"), *((*key, why) for key, why in self.found.items())])
        if (number := len(self.found)) > self.most * self.total:
            raise UserError(
                f"{number:,} of {self.total:,} pictures are missing or damaged, {number / self.total:.1%} where "
                f"{self.most:.1%} are allowed: they are listed in {self.path}, fix them or raise --max-bad-share"
            )
