"""How good captions are: the COCO evaluation's tokens, BLEU, ROUGE-L, CIDEr-D, and diversity.

Imports the standard library, NumPy and config's UserError. Never reads a file, never needs Java, torch or a network,
and never changes a score to suit a model: on equal tokens the numbers are those of the official COCO evaluation.

Everywhere, N is the number of pictures, candidates[i] is the one caption under test of picture i and references[i]
are the captions people wrote for it. A caption is a str, which is tokenized here, or a list of words, taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Literal, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from config import UserError

Caption: TypeAlias = str | Sequence[str]
Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

MAX_N = 4
"""Longest n-gram that BLEU and CIDEr-D count, in words."""

# Typography that the Stanford tokenizer writes in ASCII (it does call a pound "#" and a euro "$").
_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": " -- ", "—": " -- ", "…": "...", "£": "#"}
    | {"€": "$", "¢": " cents ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "\u00ad": "", "\u200b": " ", "\ufeff": " "}
)
# Brackets become words: the evaluation's list of punctuation has -LRB-, but only after everything is lower case.
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
_TWO_WORDS = {whole: (whole[:3], whole[3:]) for whole in ("cannot", "gonna", "gotta", "wanna", "gimme", "lemme")}

# Abbreviations that own their period anywhere, only when capitalized, and only before a number.
_ABBREVIATIONS = r"""
    jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu(?:rs)?|fri|mr|mrs|ms|drs?|prof|sr|jr|esq|rev|hon
    |pres|govs?|sens?|reps?|gen|lt|col|maj|capt|cpl|sgt|pvt|cmdr|comdr|adm|brig|messrs|mme|mlle|insp|supt|treas|asst
    |ste?|mt|ft|ave|blvd|rd|ct|sq|rt|bldg|inc|cos?|corp|ltd|bros|assn|assoc|plc|cie|mfg|intl|natl|univ|dept|elec
    |ala|ariz|calif|colo|conn|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|nev|neb|okla|penn|tenn|va|vt|wisc?|wyo
    |etc|al|cf|vs|ph|ph\.d|tel|ext|est|seq|adj|adv|det|wm|jos|alex"""
_CAPITALIZED = "Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERED = "nos?|figs?|pp|art|ca|op|prop"
# After a single letter and a period these open a new sentence, and the period is the end of the old one.
_OPENERS = """
    An?|The|There|This|That|These|It|He|She|They|We|You|In|At|One|Some|Many|Her|But|As|If|When|While|What|Here|Other
    |Our|Their|Then|After|However|Once|Since|So"""

_LETTER = r"[^\W\d_]"
_TOKEN = re.compile(
    rf"""
    # Most words. All that stands next to a mark meets the rules below.
      {_LETTER}++(?=\s)
    # <unk>, http://flickr.com, me@flickr.com
    | </?[A-Za-z][^<>\s]*> | (?i:https?://\S*[\w/]) | [\w.]++@[\w.]*\w
    # rock 'n' roll, 's 'll 'em '50s '08, 't is, is n't
    | (?i:'n' | '(?:[smd]|ll|re|ve|em|till?|cause|n|[2-9]0s|\d\d(?!"))(?!\w) | 't(?=(?:is|was)\b))
    | (?i:n't(?!\w) | {_LETTER}+?(?=n't(?!\w)))
    # words around an apostrophe: o'clock, d'oeuvres, y' all
    | (?i:ma'am|s'mores|c'mon|cap'n|ol'|[en]?e'er|[dol]'{_LETTER}{{2,}} | [dljy]'(?!(?:[smd]|ll|re|ve)\b))
    # and/or, 1/2, 12/25/2010, then t-shirt, 5-year-old, u.s.-made, then AT&T
    | (?:\d+-)?[A-Za-z\d]+(?:-[A-Za-z]+){{0,2}}(?:/[A-Za-z\d]+(?:-[A-Za-z]+){{0,2}}){{1,2}}
    | [^\W_]++(?:[.,]+[^\W_]++)*+(?:[.,]*-[^\W_]+)+(?:\.(?=[,;:]))?
    | [A-Z]+(?:[&+][A-Z]+)+
    # 1,000 3.5 5:30, then 22nd 4x4 50s, then -5
    | (?:[-+]?\d*(?:[.,:]\d+)+ | \d+{_LETTER}\w* | [-+]?\d+)(?:\.(?=[,;:]))?
    # periods that stay: u.s. p.m, then j. smith (but not the last word of "plan b."), then mr.
    | {_LETTER}(?:\.{_LETTER})+\.?(?!\.?\w)
    | {_LETTER}\.(?!\w|$|\s(?:{_OPENERS})\b)
    | (?:(?i:{_ABBREVIATIONS})|{_CAPITALIZED}|(?i:{_NUMBERED})(?=\.\s?\d))\.(?!{_LETTER})
    # any other word: "mat" of "mat.", all of flickr.com, wow!what and, before a comma, mat.
    | {_LETTER}\w*(?:[.!?]{_LETTER}\w*)*(?:\.(?=[,;:]))?
    # :) #tag @name ?! and single symbols, among which dropped punctuation is left out
    | [:;=]-?[()DPp](?!\w) | [#@]{_LETTER}+ | \#+ | \*+ | _+ | [?!]{{2,}}
    | [^\w\s.,:;?!'"`\u2010-\u201f\U00010000-\U0010ffff-]
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Words of a caption as the COCO evaluation counts them: lower case, clitics apart, punctuation dropped.

    The rules are those of Stanford's PTBTokenizer 3.4.1 with -preserveLines -lowerCase (Marcus et al. 1993, "Building
    a Large Annotated Corpus of English", and its tokenization sheet) and the list of punctuation of Chen et al. 2015,
    "Microsoft COCO Captions", arXiv:1504.00325. White space is collapsed first, so that no odd line separator inside
    a caption can cut it in two.

    >>> tokenize("A man's dog isn't at the U.S. Open (5:30 p.m.)...")
    ['a', 'man', "'s", 'dog', 'is', "n't", 'at', 'the', 'u.s.', 'open', '-lrb-', '5:30', 'p.m.', '-rrb-']
    """
    found = " ".join(_TOKEN.findall(" ".join(caption.translate(_PLAIN).split())))
    words = found.lower().translate(_BRACKETS).split()
    return [part for word in words for part in _TWO_WORDS.get(word, (word,))]


class Scores(NamedTuple):
    """One metric over N pictures."""

    corpus: float
    """The number papers report. Only for BLEU is it not the mean of per_picture."""
    per_picture: Floats
    """(N,) the same metric for each picture by itself."""


@overload
def score_captions(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]], *, per_picture: Literal[False] = False
) -> dict[str, float]: ...
@overload
def score_captions(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]], *, per_picture: Literal[True]
) -> dict[str, Floats]: ...
def score_captions(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]], *, per_picture: bool = False
) -> dict[str, float] | dict[str, Floats]:
    """bleu_1 ... bleu_4 and rouge_l as fractions, cider_d on its own scale of 0 to 10 (see bleu, rouge_l, cider_d).

    One number each, or with per_picture one float64 array (N,) each. Raises UserError when the two lists differ in
    length, when they are empty, and when a picture has no reference.
    """
    words, reference_words = _as_words(candidates, references)
    scores = {f"bleu_{n}": score for n, score in enumerate(bleu(words, reference_words), start=1)}
    scores |= {"rouge_l": rouge_l(words, reference_words), "cider_d": cider_d(words, reference_words)}
    if per_picture:
        return {name: score.per_picture for name, score in scores.items()}
    return {name: score.corpus for name, score in scores.items()}


def bleu(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> list[Scores]:
    """BLEU-1 ... BLEU-4, fractions (Papineni et al. 2002, "BLEU", ACL).

    BLEU-n is the geometric mean of the clipped precisions of 1- ... n-grams, times exp(1 - r / c) where the candidates
    have fewer words c than the references closest to them in length, r (of two as close, the shorter). For the
    corpus, counts and lengths are summed over the pictures first. The two small numbers that keep 0 / 0 away are
    coco-caption's, which only a picture by itself can notice.
    """
    table = _Table(*_as_words(candidates, references))
    correct = np.stack([_clipped_matches(table, ngrams) for ngrams in table.ngrams], axis=1)  # (N, MAX_N)
    length = table.length[: table.num_pictures]
    possible = np.maximum(length[:, None] - np.arange(MAX_N), 0)  # (N, MAX_N)
    distance = np.abs(table.length - length[table.picture])
    # One integer to minimize orders by distance first, then by length.
    longest = table.length.max() + 1
    nearest = np.minimum.reduceat((distance * longest + table.length), table.first_reference) % longest  # (N,)

    corpus = _bleu_of_counts(correct.sum(0), possible.sum(0), length.sum(), nearest.sum())
    each = _bleu_of_counts(correct, possible, length, nearest)
    return [Scores(float(corpus[n]), each[:, n]) for n in range(MAX_N)]


def _clipped_matches(table: _Table, ngrams: _Ngrams) -> Floats:
    """(N,) n-grams of the candidate found in its references, each at most as often as in the one with most of it."""
    keys, inverse = np.unique(ngrams.reference_key, return_inverse=True)
    most = np.zeros(len(keys))
    np.maximum.at(most, inverse, ngrams.reference_count)
    clipped = np.minimum(ngrams.candidate_count, _look_up(keys, most, ngrams.candidate_key))
    return _sum_by(ngrams.candidate_key // ngrams.num_grams, clipped, table.num_pictures)


def _bleu_of_counts(correct: Floats, possible: Integers, length: Integers, reference_length: Integers) -> Floats:
    """(..., MAX_N) BLEU-1 ... BLEU-4 from counts (..., MAX_N) and lengths (...)."""
    tiny, small = 1e-15, 1e-9
    precision = (correct + tiny) / (possible + small)
    mean = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_N + 1))
    ratio = (length + tiny) / (reference_length + small)
    return mean * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]


def rouge_l(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> Scores:
    """ROUGE-L, a fraction (Lin 2004, "ROUGE", ACL workshop), as coco-caption takes it over several references.

    With P = the longest common subsequence over the candidate's length and R = the same over the reference's length,
    each at its best over the references, the score is (1 + b^2) P R / (R + b^2 P), b = 1.2; the corpus has the mean.
    """
    beta_squared = 1.2**2
    scores = []
    for candidate, captions in zip(*_as_words(candidates, references), strict=True):
        common = _common_subsequence_lengths(candidate, captions)
        precision = max(common) / max(len(candidate), 1)
        recall = max(words / max(len(caption), 1) for words, caption in zip(common, captions, strict=True))
        scores.append((1 + beta_squared) * precision * recall / (recall + beta_squared * precision) if recall else 0.0)
    return Scores(float(np.mean(scores)), np.array(scores))


def _common_subsequence_lengths(candidate: Sequence[str], captions: Sequence[Sequence[str]]) -> list[int]:
    """Words of the longest common subsequence of the candidate and each caption.

    Hyyro 2004, "Bit-parallel LCS-length computation revisited": a column of the usual table is one integer, in which
    a 0 at bit i says that the length grows at the candidate's word i.
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

    A caption is, for each n, the vector of its n-gram counts times idf = ln N - ln(pictures with that n-gram in a
    reference). A candidate meets a reference in the cosine of their vectors, the candidate's entries clipped at the
    reference's, times exp(-d^2 / (2 * 6^2)) where their lengths differ by d words; then the mean over the references
    and over n, times 10. The idf comes from the references given: never compare numbers over different sets of
    pictures. With one picture every idf, and so the score, is 0.
    """
    table = _Table(*_as_words(candidates, references))
    picture = table.picture[table.num_pictures :]  # (R,) of each reference
    # The field counts a caption's length in bigrams, so that an empty caption is as long as one word.
    bigrams = np.maximum(table.length - 1, 0)
    difference = bigrams[picture] - bigrams[table.num_pictures :]
    cosine = np.mean([_clipped_cosines(table, ngrams) for ngrams in table.ngrams], axis=0)
    similarity = 10 * cosine * np.exp(-(difference**2) / (2 * 6.0**2))  # (R,)
    scores = _sum_by(picture, similarity, table.num_pictures) / np.bincount(picture)
    return Scores(float(scores.mean()), scores)


def _clipped_cosines(table: _Table, ngrams: _Ngrams) -> Floats:
    """(R,) similarity of each reference to its picture's candidate for one n, the length aside."""
    pictures_with = np.bincount(np.unique(ngrams.reference_key) % ngrams.num_grams, minlength=ngrams.num_grams)
    idf = np.log(table.num_pictures) - np.log(np.maximum(pictures_with, 1))  # (num_grams,)
    candidate = ngrams.candidate_count * idf[ngrams.candidate_key % ngrams.num_grams]
    reference = ngrams.reference_count * idf[ngrams.reference_key % ngrams.num_grams]

    clipped = np.minimum(reference, _look_up(ngrams.candidate_key, candidate, ngrams.reference_key))
    picture = table.picture[table.num_pictures :]
    dot = _sum_by(ngrams.reference, clipped * reference, len(picture))
    reference_norm = np.sqrt(_sum_by(ngrams.reference, reference**2, len(picture)))
    candidate_norm = np.sqrt(_sum_by(ngrams.candidate_key // ngrams.num_grams, candidate**2, table.num_pictures))
    norms = reference_norm * candidate_norm[picture]
    # Where a norm is 0, so is the product, and 0 / 1 stands for 0 / 0.
    return dot / np.where(norms > 0, norms, 1.0)


def diversity(candidates: Sequence[Caption]) -> dict[str, float]:
    """How varied captions are, whatever they describe.

    distinct_1, distinct_2: different words and different word pairs, each over the number of words (Li et al. 2016,
    "A Diversity-Promoting Objective Function", NAACL, section 5); unique_captions: how many captions differ as words;
    mean_length: words a caption. All 0 without captions.
    """
    captions = [_words(caption) for caption in candidates]
    num_words = sum(map(len, captions))
    return {
        "distinct_1": len(set(chain.from_iterable(captions))) / max(num_words, 1),
        "distinct_2": len({pair for caption in captions for pair in pairwise(caption)}) / max(num_words, 1),
        "unique_captions": float(len(set(map(tuple, captions)))),
        "mean_length": num_words / max(len(captions), 1),
    }


class _Ngrams(NamedTuple):
    """How often each n-gram of one length stands in each caption: C entries of candidates, E entries of references.

    A key is picture * num_grams + gram, so equal keys mean the same n-gram at the same picture.
    """

    num_grams: int
    """Different n-grams in all captions, at least 1 so that keys can be divided by it."""
    candidate_key: Integers
    """(C,) ascending, all different."""
    candidate_count: Integers
    """(C,)"""
    reference_key: Integers
    """(E,)"""
    reference_count: Integers
    """(E,)"""
    reference: Integers
    """(E,) which of all R references, 0..R-1."""


class _Table:
    """N candidates and their R references, counted. S = N + R captions: first the candidates, then the references."""

    def __init__(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
        captions = [*candidates, *chain.from_iterable(references)]
        num_references = np.array([len(captions) for captions in references])
        pictures = np.arange(len(candidates))
        self.num_pictures = len(candidates)
        self.picture: Integers = np.concatenate([pictures, np.repeat(pictures, num_references)])  # (S,)
        self.length: Integers = np.array([len(caption) for caption in captions])  # (S,), words
        self.first_reference: Integers = self.num_pictures + np.cumsum(num_references) - num_references  # (N,)
        self.ngrams = self._count(captions)

    def _count(self, captions: Sequence[Sequence[str]]) -> list[_Ngrams]:
        """The n-grams of 1 ... MAX_N words."""
        numbers: dict[str, int] = {}
        words = [numbers.setdefault(word, len(numbers)) for word in chain.from_iterable(captions)]
        # Behind the last word stand words of no caption, so that looking ahead needs no care.
        word = np.array(words + [0] * MAX_N, dtype=np.int64)
        caption = np.concatenate([np.repeat(np.arange(len(captions)), self.length), np.full(MAX_N, -1)])

        start = np.arange(len(words))  # where an n-gram begins
        gram = word[start]  # and which one it is
        counted = []
        for n in range(MAX_N):
            if n > 0:
                inside = caption[start + n] == caption[start]
                start = start[inside]
                # One number for the n-gram before and its next word, then numbered anew: int64 always suffices.
                gram = np.unique(gram[inside] * len(numbers) + word[start + n], return_inverse=True)[1]
            counted.append(self._split(caption[start], gram))
        return counted

    def _split(self, caption: Integers, gram: Integers) -> _Ngrams:
        """Counts equal (caption, gram) and sets candidates and references apart."""
        num_grams = int(gram.max(initial=0)) + 1
        key, count = np.unique(caption * num_grams + gram, return_counts=True)
        caption, gram = np.divmod(key, num_grams)
        key = self.picture[caption] * num_grams + gram
        split = np.searchsorted(caption, self.num_pictures)
        return _Ngrams(
            num_grams, key[:split], count[:split], key[split:], count[split:], caption[split:] - self.num_pictures
        )


def _look_up(keys: Integers, values: Floats, wanted: Integers) -> Floats:
    """The value of each wanted key, 0 for a key that is not there; keys ascend."""
    place = np.searchsorted(keys, wanted)
    keys, values = np.append(keys, -1), np.append(values, 0.0)
    return np.where(keys[place] == wanted, values[place], 0.0)


def _sum_by(owner: Integers, values: Floats, num_owners: int) -> Floats:
    """(num_owners,) sum of the values of each owner."""
    return np.asarray(np.bincount(owner, values, minlength=num_owners), dtype=np.float64)


def _words(caption: Caption) -> Sequence[str]:
    return tokenize(caption) if isinstance(caption, str) else caption


def _as_words(
    candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> tuple[list[Sequence[str]], list[list[Sequence[str]]]]:
    """Both as words; raises UserError where they do not fit together."""
    if len(candidates) != len(references):
        raise UserError(
            f"{len(candidates)} candidates but references of {len(references)} pictures: give one candidate a picture"
        )
    if len(candidates) == 0:
        raise UserError("no captions to score: give the candidate and the references of one picture at least")
    for picture, captions in enumerate(references):
        if isinstance(captions, str):
            raise UserError(f"the references of picture {picture} (counted from 0) are a str: give a list of captions")
        if len(captions) == 0:
            raise UserError(f"picture {picture} (counted from 0) has no reference: add one or leave the picture out")
    return [_words(caption) for caption in candidates], [[_words(one) for one in captions] for captions in references]
