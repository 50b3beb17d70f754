"""METEOR's table of paraphrases: 5.3 million pairs of phrases, in a memory-mapped index that is cached on disk."""

from __future__ import annotations

import gzip
import zlib
from array import array
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from config import UserError
from utils import atomic, cache_file, delete_older, key_of, locked, stamps

LONGEST = 7
"""Longest phrase of the table, in words."""
VERSION = 1  # of the index: add one when its layout changes


class Paraphrases:
    """The paraphrases of phrases, by the table that comes with METEOR. It has three lines for each pair: a probability
    (which METEOR ignores), a phrase, and a paraphrase. The opposite direction counts only if it is listed too.
    """

    def __init__(self, table: Path) -> None:
        """Map the table's index into memory. If the cache has none, build it first: about 20 seconds, 0.5 GB of memory.

        Raises UserError where the table cannot be read or the index cannot be written to the cache.
        """
        try:
            path = cache_file("paraphrases", str(table.absolute()), key_of(VERSION, stamps([table])))
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}.lock")):
                if not self._map(path):
                    print(f"cache       indexing METEOR's paraphrases, once, in {path}", flush=True)
                    with atomic(path) as unfinished:
                        _write_index(table, unfinished)
                    delete_older(path)
                    self._map(path)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(
                f"METEOR's paraphrases ({table.name}) cannot be indexed ({error}): reinstall pycocoevalcap, or set "
                "VIT_GPT2_CACHE to a folder that can be written to"
            ) from error

    def _map(self, path: Path) -> bool:
        """Map the index; return whether it exists and is complete: two sizes, then the three arrays of _write_index."""
        if not path.exists() or path.stat().st_size < 16:
            return False
        content = np.memmap(path, np.uint8, "r")
        phrases, pairs = (int(size) for size in content[:16].view(np.int64))
        starts, targets = 16 + 8 * phrases, 16 + 8 * phrases + 4 * (phrases + 1)
        if len(content) != targets + 4 * pairs:
            return False
        self.keys: NDArray[np.int64] = content[16:starts].view(np.int64)  # (phrases,) ascending
        self.starts: NDArray[np.uint32] = content[starts:targets].view(np.uint32)  # (phrases + 1,)
        self.targets: NDArray[np.uint32] = content[targets:].view(np.uint32)  # (pairs,)
        return True

    def among(self, phrases: Iterable[str]) -> dict[str, list[str]]:
        """Phrase -> those of its paraphrases that are among the phrases, in the table's order; no entry for none."""
        different = list(dict.fromkeys(phrases))
        keys = np.array([_key(phrase.encode()) for phrase in different], np.int64)
        order = np.argsort(keys)
        place = np.searchsorted(self.keys, keys[order])
        known = self.keys[np.minimum(place, len(self.keys) - 1)] == keys[order]
        order, place = order[known], place[known]  # place is ascending
        first = self.starts[place].astype(np.int64)
        size = self.starts[place + 1] - first
        source = np.repeat(np.arange(len(place)), size)
        target = self.targets[np.arange(len(source)) + np.repeat(first - (np.cumsum(size) - size), size)]
        found = np.searchsorted(place, target)
        hit = np.append(place, -1)[found] == target
        answer: dict[str, list[str]] = {}
        for one, other in zip(order[source[hit]].tolist(), order[found[hit]].tolist(), strict=True):
            answer.setdefault(different[one], []).append(different[other])
        return answer


def _key(phrase: bytes) -> int:
    """A 64-bit hash of a phrase. Of three million phrases, two collide in one of four million tables."""
    return int.from_bytes(blake2b(phrase, digest_size=8).digest(), "little", signed=True)


def _write_index(table: Path, path: Path) -> None:
    """Write the number of phrases and of pairs, the phrases' keys, where each phrase's paraphrases start, and the
    paraphrases."""
    number: dict[bytes, int] = {}
    phrase, paraphrase = array("I"), array("I")
    with gzip.open(table) as lines:
        for _, one, other in zip(lines, lines, lines, strict=True):
            phrase.append(number.setdefault(one.rstrip(b"\n"), len(number)))
            paraphrase.append(number.setdefault(other.rstrip(b"\n"), len(number)))
    if not number:
        raise ValueError("it is empty")
    keys = np.fromiter(map(_key, number), np.int64, len(number))
    number.clear()
    order = np.argsort(keys)
    place = np.empty(len(keys), np.uint32)
    place[order] = np.arange(len(keys))
    source = place[np.frombuffer(phrase, np.uint32)]
    target = place[np.frombuffer(paraphrase, np.uint32)][np.argsort(source, kind="stable")]
    starts = np.append(0, np.cumsum(np.bincount(source, minlength=len(keys))))
    with path.open("wb") as file:
        for part in (np.array([len(keys), len(target)]), keys[order], starts.astype(np.uint32), target):
            file.write(part.tobytes())
