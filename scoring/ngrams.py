"""Count the n-grams of captions, and those that a candidate shares with its picture's references.

BLEU, CIDEr-D and self-CIDEr are sums over these arrays. Vocabulary numbers the n-grams, Table matches them.
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
    """How often each n-gram of one length is in each caption: E entries, each (caption, n-gram) at most once."""

    caption: Integers  # (E,) number of the caption
    gram: Integers  # (E,) number of the n-gram
    times: Integers  # (E,)


class Vocabulary:
    """Numbers n-grams, separately for each length.

    An n-gram's key is 2^32 times the number of the (n - 1)-gram that it starts with, plus the number of its last word.
    Keys are unique while there are fewer than 2^31 n-grams.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.keys: list[Integers] = [np.empty(0, np.int64)] * MAX_N
        """[n - 1] (n-grams,) the keys, ascending."""
        self.numbers = self.keys[:]
        """[n - 1] (n-grams,) the number of each key's n-gram."""

    def copy(self) -> Vocabulary:
        """A copy that can learn n-grams without changing this vocabulary."""
        copied = Vocabulary()
        copied.words, copied.keys, copied.numbers = dict(self.words), self.keys[:], self.numbers[:]
        return copied

    def count(self, captions: Sequence[Sequence[str]]) -> list[Counts]:
        """Count the n-grams of 1 ... MAX_N words. Unknown ones get numbers above all others, valid in this result."""
        return self._count(captions)[0]

    def learn(self, captions: Sequence[Sequence[str]]) -> list[Counts]:
        """Count the n-grams and add the unknown ones to the vocabulary."""
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
        """The counts, the unknown words with their new numbers, and the unknown keys (ascending)."""
        known, different = self.words, dict.fromkeys(chain.from_iterable(captions))
        new_words = {word: number for number, word in enumerate((w for w in different if w not in known), len(known))}
        number_of = {word: known[word] if word in known else new_words[word] for word in different}
        words = np.fromiter(map(number_of.__getitem__, chain.from_iterable(captions)), np.int64)
        # Padding words of no caption (-1) after the last word, so that reading ahead stays inside the array.
        word = np.append(words, [0] * MAX_N)
        caption = np.append(np.repeat(np.arange(len(captions)), _lengths(captions)), [-1] * MAX_N)

        start = np.arange(len(words))  # position of each n-gram's first word
        gram = np.zeros_like(words)  # and the n-gram's number
        counts, new_keys = [], []
        for n in range(MAX_N):
            inside = caption[start + n] == caption[start]
            start = start[inside]
            key = gram[inside] << 32 | word[start + n]
            # Sort equal n-grams next to each other; the stable sort keeps the order of captions.
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
        """The number of each of the keys, which are all different, and the unknown ones among them."""
        index = _find(self.keys[n], keys)
        new = index < 0
        numbers = np.empty_like(keys)
        numbers[~new] = self.numbers[n][index[~new]]
        numbers[new] = len(self.keys[n]) + np.arange(np.count_nonzero(new))
        return numbers, keys[new]


class Runs(NamedTuple):
    """The entries of all references for one n, in runs of the same n-gram and picture: U runs, E entries."""

    key: Integers  # (U,) n-gram * N + picture, ascending
    start: Integers  # (U + 1,) index of each run's first entry, and the end
    reference: Integers  # (E,) number of the reference, 0..R-1
    times: Integers  # (E,)

    def most(self) -> Integers:
        """(U,) the largest number of times that one of the picture's references has the n-gram."""
        return np.maximum.reduceat(self.times, self.start[:-1]) if len(self.times) else self.times


class References:
    """N-gram counts of the R references of N pictures."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], vocabulary: Vocabulary) -> None:
        """Adds the references' n-grams to the vocabulary."""
        captions = list(chain.from_iterable(references))
        self.vocabulary = vocabulary
        self.num_pictures = len(references)
        self.number = np.array([len(known) for known in references])  # (N,) references per picture
        self.first = np.cumsum(self.number) - self.number  # (N,) index of each picture's first reference
        self.picture = np.repeat(np.arange(self.num_pictures), self.number)  # (R,)
        self.length = _lengths(captions)  # (R,) in words
        self.counts = vocabulary.learn(captions)
        self.runs = [self._runs(counts) for counts in self.counts]

    def _runs(self, counts: Counts) -> Runs:
        key = counts.gram * self.num_pictures + self.picture[counts.caption]
        order = np.argsort(key, kind="stable")
        key = key[order]
        start = np.flatnonzero(_first_of_run(key))
        return Runs(key[start], np.append(start, len(key)), counts.caption[order], counts.times[order])


class Pairs(NamedTuple):
    """P matches: an n-gram that a candidate shares with a reference of its picture."""

    candidate: Integers  # (P,)
    reference: Integers  # (P,)
    gram: Integers  # (P,)
    times: Integers  # (P,) how often the candidate has it
    reference_times: Integers  # (P,) how often the reference has it


class Table:
    """N-gram counts of C candidates, matched with the references of their pictures."""

    def __init__(self, candidates: Sequence[Sequence[str]], picture: Integers, references: References) -> None:
        """picture (C,) is the number of each candidate's picture."""
        self.picture, self.references = picture, references
        self.length = _lengths(candidates)  # (C,)
        self.counts = references.vocabulary.count(candidates)
        self.run = [
            _find(runs.key, counts.gram * references.num_pictures + picture[counts.caption])
            for counts, runs in zip(self.counts, references.runs, strict=True)
        ]
        """[n - 1] (E,) for each entry of the candidates, the index of the references' run with it, or -1."""

    def pairs(self) -> Iterator[Pairs]:
        """The shared n-grams of 1 ... MAX_N words."""
        for counts, runs, run in zip(self.counts, self.references.runs, self.run, strict=True):
            hit = np.flatnonzero(run >= 0)
            first = runs.start[run[hit]]
            size = runs.start[run[hit] + 1] - first
            ours = np.repeat(hit, size)
            theirs = np.arange(len(ours)) + np.repeat(first - (np.cumsum(size) - size), size)
            yield Pairs(
                counts.caption[ours], runs.reference[theirs], counts.gram[ours], counts.times[ours], runs.times[theirs]
            )


def _find(keys: Integers, wanted: Integers) -> Integers:
    """The index of each wanted key in keys (ascending), or -1 where it is missing."""
    index = np.searchsorted(keys, wanted)
    there = index < len(keys)
    there[there] = keys[index[there]] == wanted[there]
    return np.where(there, index, -1)


def _first_of_run(values: Integers) -> NDArray[np.bool_]:
    """True where a value differs from the one before."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def sum_by(owner: Integers, values: Floats | Integers, num_owners: int) -> Floats:
    """(num_owners,) the sum of the values of each owner."""
    return np.asarray(np.bincount(owner, values, minlength=num_owners), dtype=np.float64)


def _lengths(captions: Sequence[Sequence[str]]) -> Integers:
    return np.fromiter(map(len, captions), np.int64, len(captions))
