"""Pictures that are left out: missing or damaged ones, and those that a model must not be scored on."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from config import UserError
from data.budget import why_missing
from data.table import CaptionTable
from utils import write_csv


def pictures_seen(trained_on: np.ndarray, table: CaptionTable) -> list[int]:
    """Rows of the table whose pictures a model was trained on."""
    return np.flatnonzero(np.isin(table.keys(), trained_on)).tolist()


def check_overlap(trained_on: np.ndarray, table: CaptionTable, allowed: bool) -> None:
    """Raises UserError unless allowed, where pictures of the table are among those that a model was trained on."""
    seen = pictures_seen(trained_on, table)
    if seen and not allowed:
        some = ", ".join(str(table.id_of(row)) for row in seen[:3])
        raise UserError(
            f"{len(seen):,} of the {len(table):,} {table.split} pictures ({some}{', ...' if len(seen) > 3 else ''}) were "
            "trained on, so a score on them means nothing: choose other pictures, or add --allow-overlap"
        )


class BadPictures:
    """Pictures that are missing or damaged: skipped, counted, named in a CSV file; too many of them are an error."""

    def __init__(self, path: Path, tables: Iterable[CaptionTable], most: float = 0.01, go_on: bool = False) -> None:
        """`most` is the largest share of the tables' pictures that may be so. What an earlier run has named in the file
        is taken over when going on with it, and gone otherwise."""
        self.path, self.most = path, most
        self.total = sum(len(table) + len(table.missing) for table in {id(table): table for table in tables}.values())
        self.found: dict[tuple[str, str], str] = {}
        """(part, picture) -> what is wrong."""
        if go_on and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                self.found = {(part, picture): why for part, picture, why in list(csv.reader(file))[1:]}
        else:
            path.unlink(missing_ok=True)

    @property
    def notes(self) -> list[str]:
        """How many were found, in words."""
        return [f"{len(self.found):,} pictures skipped, named in {self.path}"] if self.found else []

    def add_known(self, table: CaptionTable, damaged: Mapping[int, str]) -> None:
        """Takes over what is missing from the table, and rows that have failed to decode, with the reason."""
        named = [(str(path := table.root / name), why_missing(path)) for name in table.missing]
        self._add(table, [*named, *((table.name_of(row), reason) for row, reason in damaged.items())])

    def add(self, table: CaptionTable, rows: Sequence[tuple[int, str]]) -> None:
        """Takes over a batch's bad rows. Raises UserError where they become too many."""
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
                f"{self.most:.1%} are allowed: they are named in {self.path}, mend them or raise --max-bad-share"
            )
