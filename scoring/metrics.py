"""Metrics of captions: BLEU, ROUGE-L and CIDEr-D as in the COCO evaluation, their uncertainty, and diversity.

On equal tokens the numbers are those of the official COCO evaluation. Needs no Java, torch or network, and reads only
files that CiderD.save wrote.

Everywhere, N is the number of pictures, candidates[i] is the one caption under test of picture i, and references[i] are
its reference captions; R references in all. A caption is a str, which is tokenized here, or a list of words, which is
used unchanged.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from config import UserError
from scoring.ngrams import MAX_N, Floats, Integers, References, Table, Vocabulary, sum_by
from scoring.tokens import characters as characters
from scoring.tokens import tokenize as tokenize
from utils import atomic, first_line, json_of

Caption: TypeAlias = str | Sequence[str]


class Scores(NamedTuple):
    """One metric over N pictures."""

    corpus: float  # the number that papers report: the mean of per_picture, except for BLEU
    per_picture: Floats  # (N,) the same metric for each picture alone


def score_captions(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]], *, per_picture: bool = False
) -> dict[str, Any]:
    """bleu_1 ... bleu_4 and rouge_l as fractions, cider_d on its own scale of 0 to 10 (see bleu, rouge_l, cider_d).

    One number each, or with per_picture one float64 array (N,) each. Raises UserError where the two lists differ in
    length or are empty, and where a picture has no reference.
    """
    statistics = Statistics(candidates, references)
    return statistics.per_picture() if per_picture else statistics.scores()


def bleu(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> list[Scores]:
    """BLEU-1 ... BLEU-4, fractions (Papineni et al. 2002, "BLEU", ACL).

    BLEU-n is the geometric mean of the clipped precisions of 1- ... n-grams. It is multiplied by exp(1 - r / c) where
    the candidates have fewer words, c, than the references closest to them in length, r (of two equally close, the
    shorter). For the corpus, counts and lengths are first summed over the pictures. Two small numbers of coco-caption
    avoid 0 / 0; they only affect the scores of single pictures. A corpus without a common n-gram has 0.
    """
    counts = Statistics(candidates, references).table[:, :-2]
    corpus, each = _bleu_of_sums(counts.sum(0)), _bleu_of_counts(counts)
    return [Scores(float(corpus[n]), each[:, n]) for n in range(MAX_N)]


def _bleu_counts(table: Table) -> Floats:
    """(N, 2 * MAX_N + 2) counts for BLEU: correct and possible n-grams, words, and the closest reference's words.

    An n-gram of the candidate is correct if it is in a reference; it counts at most as often as one reference has it.
    """
    references, length = table.references, table.length
    correct = []
    for counts, runs, run in zip(table.counts, references.runs, table.run, strict=True):
        hit = np.flatnonzero(run >= 0)
        clipped = np.minimum(counts.times[hit], runs.most()[run[hit]])
        correct.append(sum_by(counts.caption[hit], clipped, len(length)))
    possible = [np.maximum(length - n, 0) for n in range(MAX_N)]
    distance = np.abs(references.length - length[references.picture])
    # One integer to minimize orders by distance first, then by length.
    longest = references.length.max() + 1
    nearest = np.minimum.reduceat(distance * longest + references.length, references.first) % longest
    return np.stack([*correct, *possible, length, nearest], axis=1).astype(np.float64)


def _bleu_of_counts(counts: Floats) -> Floats:
    """(..., MAX_N) BLEU-1 ... BLEU-4 from the counts (..., 2 * MAX_N + 2) of _bleu_counts, or from their sums."""
    tiny, small = 1e-15, 1e-9
    precision = (counts[..., :MAX_N] + tiny) / (counts[..., MAX_N:-2] + small)
    mean = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    ratio = (counts[..., -2] + tiny) / (counts[..., -1] + small)
    return np.asarray(mean * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None])


def _bleu_of_sums(counts: Floats) -> Floats:
    """The same from sums over pictures; exactly 0 where no n-gram is correct, instead of the tiny number."""
    return np.where(counts[..., :MAX_N] > 0, _bleu_of_counts(counts), 0.0)


def rouge_l(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
    """ROUGE-L, a fraction (Lin 2004, "ROUGE", ACL workshop), over several references as in coco-caption.

    P is the longest common subsequence divided by the candidate's length, R the same divided by the reference's length,
    each the largest over the references. The score is (1 + b^2) P R / (R + b^2 P), b = 1.2; the corpus has the mean.
    """
    return _mean(Statistics(candidates, references).table[:, -2])


def _rouge_l(candidates: list[Sequence[str]], references: list[list[Sequence[str]]]) -> Floats:
    beta_squared = 1.2**2
    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        common = _common_subsequence_lengths(candidate, captions)
        precision = max(common) / max(len(candidate), 1)
        recall = max(words / max(len(caption), 1) for words, caption in zip(common, captions, strict=True))
        scores.append((1 + beta_squared) * precision * recall / (recall + beta_squared * precision) if recall else 0.0)
    return np.array(scores)


def _common_subsequence_lengths(candidate: Sequence[str], captions: Sequence[Sequence[str]]) -> list[int]:
    """Length in words of the longest common subsequence of the candidate and each caption.

    Hyyro 2004, "Bit-parallel LCS-length computation revisited": a column of the usual table is one integer, in which
    a 0 at bit i means that the length grows at the candidate's word i.
    """
    bits: dict[str, int] = {}
    for position, word in enumerate(candidate):
        bits[word] = bits.get(word, 0) | 1 << position
    every = (1 << len(candidate)) - 1
    lengths = []
    for caption in captions:
        column = every
        for word in caption:
            hits = column & bits.get(word, 0)
            column = (column + hits | column - hits) & every
        lengths.append((column ^ every).bit_count())
    return lengths


def cider_d(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
    """CIDEr-D, 0 to 10, the "CIDEr" that papers report (Vedantam et al. 2015, "CIDEr", CVPR, section 5).

    For each n, a caption becomes the vector of its n-gram counts times idf = ln N - ln(pictures with that n-gram in a
    reference). A candidate and a reference are compared by the cosine of their vectors, with the candidate's entries
    clipped at the reference's, times exp(-d^2 / (2 * 6^2)) where their lengths differ by d words. The score is the mean
    over the references and over n, times 10. The idf comes from the given references, so numbers over different sets of
    pictures cannot be compared, unless CiderD fixes the idf. With one picture every idf, and so the score, is 0.
    """
    return _mean(Statistics(candidates, references).table[:, -1])


class CiderD:
    """CIDEr-D with document frequencies fixed by one set of pictures (see cider_d for the formula).

    This makes numbers over different pictures, and rewards of small batches, comparable:

        cider = CiderD(references)                        # counts once
        rewards = cider.reward(pictures, sampled)         # (C,) C sampled captions, pictures[c] is the picture of each
        cider.save("coco-train.npz")
        CiderD.load("coco-train.npz").score(candidates, other_references)
    """

    path: Path | None = None  # the file it was loaded from, if any

    _references: References | None = None

    def __init__(self, references: Sequence[Sequence[Caption]]) -> None:
        """Count the references of N pictures. Raises UserError where a picture has none."""
        self._vocabulary = Vocabulary()
        self._references = counted = References(_reference_words(references), self._vocabulary)
        self._know(counted.num_pictures, [np.bincount(runs.key // counted.num_pictures) for runs in counted.runs])

    def _know(self, num_pictures: int, pictures_with: list[Integers]) -> None:
        """Set the document frequencies: pictures_with[n - 1] has the number of pictures with each n-gram. N-grams
        beyond its end are in no picture."""
        self.num_pictures, self._pictures_with = num_pictures, pictures_with
        self._idf = [np.log(num_pictures) - np.log(np.maximum(np.append(number, 0), 1)) for number in pictures_with]

    def score(self, candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
        """CIDEr-D of candidates against any references; against those of the constructor, equal to cider_d."""
        words, reference_words = _as_words(candidates, references)
        return _mean(self.of_table(Table(words, np.arange(len(words)), self.counted(reference_words))))

    def reward(self, pictures: Sequence[int] | Integers, candidates: Sequence[Caption]) -> Floats:
        """(C,) CIDEr-D of C candidates, each against the references of its picture, 0..N-1 in the constructor's order.

        A picture may have any number of candidates, as in self-critical training (Rennie et al. 2017, "Self-critical
        Sequence Training", CVPR). Lists of words save the time to tokenize.
        """
        if self._references is None:
            raise UserError("this CiderD has frequencies but no references: give load the references, or call score")
        picture, num_pictures = np.asarray(pictures, dtype=np.int64).reshape(-1), self._references.num_pictures
        if len(picture) != len(candidates):
            raise UserError(f"{len(candidates)} candidates but {len(picture)} pictures: give one picture per candidate")
        if len(picture) and not 0 <= picture.min() <= picture.max() < num_pictures:
            raise UserError(
                f"a picture is outside 0..{num_pictures - 1}: the references are of {num_pictures} pictures"
            )
        return self.of_table(Table([_words(caption) for caption in candidates], picture, self._references))

    def counted(self, references: Sequence[Sequence[Sequence[str]]]) -> References:
        """Count references (as lists of words), with n-grams numbered by a copy of this object's vocabulary."""
        return References(references, self._vocabulary.copy())

    def idf(self, n: int, gram: Integers) -> Floats:
        """Weights of n-grams, shaped like gram; n counts from 0."""
        return np.asarray(self._idf[n][np.minimum(gram, len(self._idf[n]) - 1)])

    def norms(self, captions: References | Table) -> list[Floats]:
        """MAX_N arrays (C,) or (R,): the lengths of the captions' vectors. 1 instead of 0, as their products are 0."""
        weights = [one.times * self.idf(n, one.gram) for n, one in enumerate(captions.counts)]
        pairs = zip(captions.counts, weights, strict=True)
        norms = [np.sqrt(sum_by(counts.caption, w**2, len(captions.length))) for counts, w in pairs]
        return [np.where(norm > 0, norm, 1.0) for norm in norms]

    @cached_property
    def _reference_norms(self) -> list[Floats]:
        assert self._references is not None
        return self.norms(self._references)

    def of_table(self, table: Table) -> Floats:
        """(C,) CIDEr-D of each candidate."""
        references, norms = table.references, self.norms(table)
        reference_norms = self._reference_norms if references is self._references else self.norms(references)
        # The official code counts lengths in bigrams, so an empty caption is as long as one of one word.
        bigrams, reference_bigrams = np.maximum(table.length - 1, 0), np.maximum(references.length - 1, 0)
        total = np.zeros(len(table.length))
        for n, pairs in enumerate(table.pairs()):
            difference = bigrams[pairs.candidate] - reference_bigrams[pairs.reference]
            clipped = np.minimum(pairs.times, pairs.reference_times) * pairs.reference_times
            product = clipped * self.idf(n, pairs.gram) ** 2 * np.exp(difference**2 / (-2 * 6.0**2))
            cosine = product / (norms[n][pairs.candidate] * reference_norms[n][pairs.reference])
            total += sum_by(pairs.candidate, cosine, len(total))
        return 10 / MAX_N * total / references.number[table.picture]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frequencies, but not the references, to an .npz file, atomically."""
        vocabulary, path = self._vocabulary, Path(path)
        words = np.frombuffer(json.dumps(list(vocabulary.words)).encode(), np.uint8)
        arrays: dict[str, NDArray[Any]] = {"words": words, "num_pictures": np.array(self.num_pictures)}
        for n in range(MAX_N):
            arrays |= {f"keys_{n + 1}": vocabulary.keys[n], f"numbers_{n + 1}": vocabulary.numbers[n]}
            arrays[f"pictures_with_{n + 1}"] = self._pictures_with[n]
        with atomic(path) as unfinished, unfinished.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # NumPy's stub expects its flags

    @classmethod
    def load(cls, path: str | os.PathLike[str], references: Sequence[Sequence[Caption]] | None = None) -> CiderD:
        """Load the frequencies that save wrote; references are needed only for reward.

        Raises UserError, with the file's name, where the file is missing, damaged, or of another kind.
        """
        loaded = cls.__new__(cls)
        loaded._vocabulary = vocabulary = Vocabulary()
        try:
            with np.load(path, allow_pickle=False) as arrays:
                words = json_of(arrays["words"].tobytes())
                vocabulary.words = {word: number for number, word in enumerate(words)}
                vocabulary.keys = [arrays[f"keys_{n + 1}"] for n in range(MAX_N)]
                vocabulary.numbers = [arrays[f"numbers_{n + 1}"] for n in range(MAX_N)]
                pictures_with = [arrays[f"pictures_with_{n + 1}"] for n in range(MAX_N)]
                num_pictures = int(arrays["num_pictures"])
            if len(words) != len(vocabulary.keys[0]):
                raise ValueError("its words and its 1-grams differ")
            for keys, numbers, pictures in zip(vocabulary.keys, vocabulary.numbers, pictures_with, strict=True):
                if not len(keys) == len(numbers) >= len(pictures) or (numbers >= len(numbers)).any():
                    raise ValueError("its tables do not match")
            loaded._know(num_pictures, pictures_with)
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path} holds no document frequencies ({first_line(error)}): write it again with CiderD.save"
            ) from error
        loaded.path = Path(path)
        if references is not None:
            loaded._references = References(_reference_words(references), vocabulary)
        return loaded


class Statistics:
    """Candidates and their references, counted once. From the counts come the metrics of score_captions for the corpus
    and for each picture and, as they are functions of sums over pictures, for resampled pictures.
    """

    def __init__(
        self, candidates: Sequence[Caption], references: Sequence[Sequence[Caption]], frequencies: CiderD | None = None
    ) -> None:
        """CIDEr-D uses the given document frequencies, or those of the references. Raises what score_captions does."""
        self.candidates, words = _as_words(candidates, references)
        self.frequencies = frequencies or CiderD(words)
        counted = None if frequencies else self.frequencies._references  # already counted
        known = counted or self.frequencies.counted(words)
        table = Table(self.candidates, np.arange(len(words)), known)
        cider = self.frequencies.of_table(table)
        self.has_cider = any(self.frequencies.idf(n, counts.gram).any() for n, counts in enumerate(known.counts))
        """Whether CIDEr-D can be computed: not where every picture's references have the same n-grams."""
        self.number = len(words)
        self.table: Floats = np.column_stack([_bleu_counts(table), _rouge_l(self.candidates, words), cider])  # (N, K)

    def scores(self) -> dict[str, float]:
        """Metric -> its value for the corpus."""
        return {name: float(score) for name, score in self._metrics(self.table.sum(0)).items()}

    def per_picture(self) -> dict[str, Floats]:
        """Metric -> its values (N,) for each picture alone."""
        return _named(_bleu_of_counts(self.table[:, :-2]), self.table)

    def intervals(self, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """Metric -> its 95 % interval (see bootstrap)."""
        drawn = self._metrics(resampled_sums(self.table, resamples, seed))
        return {name: interval_of(values) for name, values in drawn.items()}

    def differences(self, other: Statistics, resamples: int = 1000, seed: int = 0) -> dict[str, Difference]:
        """Metric -> how much better other captions of the same pictures are (see paired_bootstrap)."""
        # Both tables in one, so that both are scored on the same resampled sets.
        sums = resampled_sums(np.concatenate([self.table, other.table], axis=1), resamples, seed)
        drawn_self, drawn_other = (self._metrics(half) for half in np.split(sums, 2, axis=1))
        scores, other_scores = self.scores(), other.scores()
        differences = {}
        for name in scores:
            drawn = drawn_other[name] - drawn_self[name]
            wrong = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
            p_value = min(1.0, 2 * (1 + wrong) / (1 + resamples))
            differences[name] = Difference(other_scores[name] - scores[name], interval_of(drawn), p_value)
        return differences

    def _metrics(self, sums: Floats) -> dict[str, Floats]:
        """Metric -> its values (...), from sums (..., K) of N rows of the table."""
        return _named(_bleu_of_sums(sums[..., :-2]), sums / self.number)


def _named(bleus: Floats, table: Floats) -> dict[str, Floats]:
    """Metric -> its values (...), from BLEU-1 ... BLEU-4 (..., MAX_N) and the last two columns of a table."""
    metrics = {f"bleu_{n + 1}": bleus[..., n] for n in range(MAX_N)}
    return metrics | {"rouge_l": table[..., -2], "cider_d": table[..., -1]}


def bootstrap(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]], resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of every metric of score_captions (Efron & Tibshirani 1993, "An Introduction to the
    Bootstrap", chapter 13): the 2.5th and 97.5th percentile over sets of N pictures drawn with replacement.

    BLEU is computed again from each set's counts; the others are means of the per-picture values. CIDEr-D always uses
    the document frequencies of all references: repeated pictures would change them, which has nothing to do with the
    captions.
    """
    return Statistics(candidates, references).intervals(resamples, seed)


class Difference(NamedTuple):
    """How much better b is than a by one metric."""

    difference: float
    """b - a over the given pictures."""
    interval: tuple[float, float]
    """The 95 % interval of the difference."""
    p_value: float
    """0 to 1, two-sided: small where chance is unlikely to explain the difference (see paired_bootstrap)."""


def paired_bootstrap(
    a: Sequence[Caption],
    b: Sequence[Caption],
    references: Sequence[Sequence[Caption]],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Whether b is better than a by each metric of score_captions, on the same pictures.

    Paired bootstrap resampling (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation",
    EMNLP): both are scored on each resampled set of pictures (as in bootstrap, with fixed document frequencies), and
    the share of sets on which the worse one wins is the probability of error. It is two-sided and counts the original
    set, so p is never 0: p = min(1, 2 (1 + min(sets with b - a <= 0, sets with b - a >= 0)) / (1 + resamples)).
    """
    return Statistics(a, references).differences(Statistics(b, references), resamples, seed)


def resampled_sums(table: Floats, resamples: int, seed: int) -> Floats:
    """(resamples, K) sums of N rows of the table (N, K), drawn with replacement."""
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: it must be positive")
    rng, number = np.random.default_rng(seed), len(table)
    at_a_time = max(1, 2**22 // number)  # so that the arrays fit into 100 MB
    sums = []
    for start in range(0, resamples, at_a_time):
        rows = min(at_a_time, resamples - start)
        drawn = rng.integers(0, number, (rows, number)) + number * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * number).reshape(rows, number)
        sums.append(weights.astype(np.float64) @ table)
    return np.concatenate(sums)


def mean_intervals(
    each: dict[str, Sequence[float]], resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals (as in bootstrap) of metrics that are means over pictures, from N values each."""
    if not each:
        return {}
    drawn = resampled_sums(np.column_stack(list(each.values())), resamples, seed)
    number = len(next(iter(each.values())))
    return {name: interval_of(values / number) for name, values in zip(each, drawn.T, strict=True)}


def interval_of(values: Floats) -> tuple[float, float]:
    """The interval that holds the middle 95 % of the values (n,)."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def diversity(candidates: Sequence[Caption]) -> dict[str, float]:
    """How varied captions are, without their references.

    distinct_1, distinct_2: different words and different word pairs, each divided by the number of words (Li et al.
    2016, "A Diversity-Promoting Objective Function", NAACL, section 5). vocabulary: number of different words.
    unique_captions: share of captions that differ as lists of words. mean_length: words per caption. All 0 without
    captions.
    """
    captions = [_words(caption) for caption in candidates]
    num_words, vocabulary = sum(map(len, captions)), len(set(chain.from_iterable(captions)))
    return {
        "distinct_1": vocabulary / max(num_words, 1),
        "distinct_2": len({pair for caption in captions for pair in pairwise(caption)}) / max(num_words, 1),
        "vocabulary": vocabulary,
        "unique_captions": len(set(map(tuple, captions))) / max(len(captions), 1),
        "mean_length": num_words / max(len(captions), 1),
    }


def novelty(candidates: Sequence[Caption], training_captions: Sequence[Caption]) -> float:
    """Share of candidates, 0 to 1, that are not among the training captions, compared word by word; 0 for none.

    A low share means that the model mostly repeats training captions (Vinyals et al. 2015, "Show and Tell", CVPR, on
    the diversity of its captions). Repeated candidates count each time.
    """
    known = {tuple(_words(caption)) for caption in training_captions}
    new = sum(tuple(_words(caption)) not in known for caption in candidates)
    return new / max(len(candidates), 1)


def self_cider(captions: Sequence[Sequence[Caption]], frequencies: CiderD | None = None) -> Scores:
    """Self-CIDEr, 0 to 1: how different several captions of one picture are (Wang & Chan 2019, "Describing like
    Humans: on Diversity in Image Captioning", CVPR, arXiv:1903.12020, section 3).

    captions[i] are m >= 2 captions of picture i. Their kernel K (m, m) has the CIDEr of every pair: CIDEr-D's cosine
    without clipping and without the length factor, averaged over n, so that K is positive semi-definite. With its
    eigenvalues l_1 >= ... >= l_m, the picture's score is -log_m(sqrt(l_1) / sum_i sqrt(l_i)): 0 where all captions are
    equal (or no n-gram has weight), 1 where no two share an n-gram. The corpus has the mean.

    The idf comes from `frequencies` (in the paper: of COCO's training captions), or else from the captions themselves;
    for a single picture these give only 0.
    """
    words = _reference_words(captions)
    for picture, picture_words in enumerate(words):
        if len(picture_words) < 2:
            raise UserError(f"picture {picture} (counted from 0) has one caption: self-CIDEr compares two or more")
    weights = frequencies or CiderD(words)
    own = (None if frequencies else weights._references) or weights.counted(words)
    norms = weights.norms(own)
    table = Table(list(chain.from_iterable(words)), own.picture, own)

    last = np.cumsum(own.number**2)  # the kernels are stored one after the other, (sum of m^2,)
    row = np.arange(len(own.length)) - own.first[own.picture]  # (R,) of each caption in its kernel
    kernels = np.zeros(last[-1])
    for n, pairs in enumerate(table.pairs()):
        product = pairs.times * pairs.reference_times * weights.idf(n, pairs.gram) ** 2
        cosine = product / (norms[n][pairs.candidate] * norms[n][pairs.reference])
        size, first = own.number[table.picture[pairs.candidate]], (last - own.number**2)[table.picture[pairs.candidate]]
        kernels += sum_by(first + row[pairs.candidate] * size + row[pairs.reference], cosine, len(kernels)) / MAX_N
    return _mean(np.array([_spread(kernel) for kernel in np.split(kernels, last[:-1])]))


def _spread(kernel: Floats) -> float:
    """-log_m of the largest singular value's share, for a kernel (m * m,)."""
    size = int(np.sqrt(len(kernel)))
    roots = np.sqrt(np.linalg.eigvalsh(kernel.reshape(size, size)).clip(min=0))
    return float(np.log(roots.sum() / roots[-1]) / np.log(size)) if roots[-1] > 0 else 0.0


def _mean(per_picture: Floats) -> Scores:
    return Scores(float(per_picture.mean()), per_picture)


def _words(caption: Caption) -> Sequence[str]:
    return tokenize(caption) if isinstance(caption, str) else caption


def _reference_words(references: Sequence[Sequence[Caption]]) -> list[list[Sequence[str]]]:
    """Each picture's references as lists of words. Raises UserError where a picture has none."""
    if len(references) == 0:
        raise UserError("no captions to score: give the candidate and the references of at least one picture")
    for picture, captions in enumerate(references):
        if isinstance(captions, str):
            raise UserError(f"the references of picture {picture} (counted from 0) are a str: give a list of captions")
        if len(captions) == 0:
            raise UserError(f"picture {picture} (counted from 0) has no reference: add one or remove the picture")
    return [[_words(one) for one in captions] for captions in references]


def _as_words(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> tuple[list[Sequence[str]], list[list[Sequence[str]]]]:
    """Both as lists of words. Raises UserError where they do not match."""
    if len(candidates) != len(references):
        raise UserError(
            f"{len(candidates)} candidates but references of {len(references)} pictures: give one candidate per picture"
        )
    reference_words = _reference_words(references)
    return [_words(caption) for caption in candidates], reference_words
