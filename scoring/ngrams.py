"""The n-gram core: which n-grams captions have, and which of them a candidate shares with its picture's references.

BLEU, CIDEr-D and self-CIDEr are sums over the arrays made here. All n-grams are numbered by Vocabulary and met by
Table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

MAX_N = 4
"""Longest n-gram that BLEU and CIDEr-D count, in words."""


class Counts(NamedTuple):
    """How often each n-gram of one length stands in each caption: E entries, no (caption, n-gram) twice."""

    caption: Integers  # (E,)
    gram: Integers  # (E,) its number
    times: Integers  # (E,)


class Vocabulary:
    """Numbers the n-grams it has learnt, those of each length by themselves.

    An n-gram's key is 2^32 times the number of the (n - 1)-gram that it begins with, plus the number of its last word:
    exact while there are fewer than 2^31 n-grams.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.keys: list[Integers] = [np.empty(0, np.int64)] * MAX_N
        """[n - 1] (n-grams,) ascending."""
        self.numbers = self.keys[:]
        """[n - 1] (n-grams,) the number for each key."""

    def copy(self) -> Vocabulary:
        """One that can learn without this one's learning it too."""
        copied = Vocabulary()
        copied.words, copied.keys, copied.numbers = dict(self.words), self.keys[:], self.numbers[:]
        return copied

    def count(self, captions: Sequence[Sequence[str]]) -> list[Counts]:
        """The n-grams of 1 ... MAX_N words; those never learnt have numbers above all others, in this answer alone."""
        return self._count(captions)[0]

    def learn(self, captions: Sequence[Sequence[str]]) -> list[Counts]:
        """The same, and keeps the numbers."""
        counts, new_words, new_keys = self._count(captions)
        self.words |= new_words
        for n, new in enumerate(new_keys):
            if not len(new):
                continue
            keys = np.concatenate([self.keys[n], new])
            numbers = np.concatenate([self.numbers[n], np.arange(len(self.keys[n]), len(keys))])
            order = np.argsort(keys, kind="stable")
            self.keys[n], self.numbers[n] = keys[order], numbers[order]
        return counts

    def _count(self, captions: Sequence[Sequence[str]]) -> tuple[list[Counts], dict[str, int], list[Integers]]:
        """The counts, and what was not known: words with their numbers, and keys, ascending."""
        known, different = self.words, dict.fromkeys(chain.from_iterable(captions))
        new_words = {word: number for number, word in enumerate((w for w in different if w not in known), len(known))}
        number_of = {word: known[word] if word in known else new_words[word] for word in different}
        words = np.fromiter(map(number_of.__getitem__, chain.from_iterable(captions)), np.int64)
        # Behind the last word stand words of no caption, so that looking ahead needs no care.
        word = np.append(words, [0] * MAX_N)
        caption = np.append(np.repeat(np.arange(len(captions)), _lengths(captions)), [-1] * MAX_N)

        start = np.arange(len(words))  # where an n-gram begins
        gram = np.zeros_like(words)  # and which one it is
        counts, new_keys = [], []
        for n in range(MAX_N):
            inside = caption[start + n] == caption[start]
            start = start[inside]
            key = gram[inside] << 32 | word[start + n]
            # Equal n-grams come together, within them the captions in their order.
            order = np.argsort(key, kind="stable")
            owner, ordered = caption[start[order]], key[order]
            first = _first_of_run(ordered)
            numbers, unknown = self._numbers_of(n, ordered[first])
            ordered = numbers[np.cumsum(first) - 1]
            gram = np.empty_like(key)
            gram[order] = ordered
            entry = np.flatnonzero(first | _first_of_run(owner))
            counts.append(Counts(owner[entry], ordered[entry], np.diff(np.append(entry, len(key)))))
            new_keys.append(unknown)
        return counts, new_words, new_keys

    def _numbers_of(self, n: int, keys: Integers) -> tuple[Integers, Integers]:
        """The number of each key, all different, and those of them that were not known."""
        place = _find(self.keys[n], keys)
        new = place < 0
        numbers = np.empty_like(keys)
        numbers[~new] = self.numbers[n][place[~new]]
        numbers[new] = len(self.keys[n]) + np.arange(np.count_nonzero(new))
        return numbers, keys[new]


class Runs(NamedTuple):
    """The entries of all references for one n, in runs of the same n-gram at the same picture: U runs, E entries."""

    key: Integers  # (U,) n-gram * N + picture, ascending
    start: Integers  # (U + 1,) where each run begins, and the end
    reference: Integers  # (E,) which reference, 0..R-1
    times: Integers  # (E,)

    def most(self) -> Integers:
        """(U,) how often the n-gram stands in the picture's reference that has it most."""
        return np.maximum.reduceat(self.times, self.start[:-1]) if len(self.times) else self.times


class References:
    """The R references of N pictures, counted."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], vocabulary: Vocabulary) -> None:
        """The vocabulary learns their n-grams."""
        captions = list(chain.from_iterable(references))
        self.vocabulary = vocabulary
        self.num_pictures = len(references)
        self.number = np.array([len(own) for own in references])  # (N,) references of each picture
        self.first = np.cumsum(self.number) - self.number  # (N,)
        self.picture = np.repeat(np.arange(self.num_pictures), self.number)  # (R,)
        self.length = _lengths(captions)  # (R,)
        self.counts = vocabulary.learn(captions)
        self.runs = [self._runs(counts) for counts in self.counts]

    def _runs(self, counts: Counts) -> Runs:
        key = counts.gram * self.num_pictures + self.picture[counts.caption]
        order = np.argsort(key, kind="stable")
        key = key[order]
        start = np.flatnonzero(_first_of_run(key))
        return Runs(key[start], np.append(start, len(key)), counts.caption[order], counts.times[order])


class Pairs(NamedTuple):
    """Where a candidate and a reference of its picture share an n-gram: P times."""

    candidate: Integers  # (P,)
    reference: Integers  # (P,)
    gram: Integers  # (P,)
    times: Integers  # (P,) how often the candidate has it
    reference_times: Integers  # (P,) how often the reference has it


class Table:
    """C candidates, counted, beside the references of their pictures."""

    def __init__(self, candidates: Sequence[Sequence[str]], picture: Integers, references: References) -> None:
        """picture (C,) is the picture of each candidate."""
        self.picture, self.references = picture, references
        self.length = _lengths(candidates)  # (C,)
        self.counts = references.vocabulary.count(candidates)
        self.run = [
            _find(runs.key, counts.gram * references.num_pictures + picture[counts.caption])
            for counts, runs in zip(self.counts, references.runs, strict=True)
        ]
        """[n - 1] (E,) which of the references' runs has the candidates' entry, -1 for none."""

    def pairs(self) -> Iterator[Pairs]:
        """The shared n-grams of 1 ... MAX_N words."""
        for counts, runs, run in zip(self.counts, self.references.runs, self.run, strict=True):
            hit = np.flatnonzero(run >= 0)
            first = runs.start[run[hit]]
            size = runs.start[run[hit] + 1] - first
            mine = np.repeat(hit, size)
            theirs = np.arange(len(mine)) + np.repeat(first - (np.cumsum(size) - size), size)
            yield Pairs(
                counts.caption[mine], runs.reference[theirs], counts.gram[mine], counts.times[mine], runs.times[theirs]
            )


def _find(keys: Integers, wanted: Integers) -> Integers:
    """Where each wanted key stands among keys, which ascend; -1 for one that is not there."""
    place = np.searchsorted(keys, wanted)
    there = place < len(keys)
    there[there] = keys[place[there]] == wanted[there]
    return np.where(there, place, -1)


def _first_of_run(values: Integers) -> NDArray[np.bool_]:
    """True where a value differs from the one before."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def sum_by(owner: Integers, values: Floats | Integers, num_owners: int) -> Floats:
    """(num_owners,) sum of the values of each owner."""
    return np.asarray(np.bincount(owner, values, minlength=num_owners), dtype=np.float64)


def _lengths(captions: Sequence[Sequence[str]]) -> Integers:
    return np.fromiter(map(len, captions), np.int64, len(captions))
