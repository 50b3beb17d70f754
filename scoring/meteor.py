"""METEOR 1.5 for English without Java, with the same scores as the official jar.

Denkowski and Lavie 2014, "Meteor Universal: Language Specific Translation Evaluation for Any Target Language" (WMT).
Where the jar differs from the paper, or the paper gives no detail, this file does what the jar does; both were compared
on thousands of captions. WordNet, the function words and the paraphrases are read from an installed pycocoevalcap.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from scoring.paraphrases import LONGEST, Paraphrases

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
WEIGHTS = (1.0, 0.6, 0.8, 0.6)
"""Weight of a matched word, by the stage that matched it."""
BEAM = 40
"""Width of the beam search: partial alignments that are extended."""

# What the jar takes as lower-case letters. Everything else is a separate word, except digits . , and -
_LETTER = "a-zß-öø-ž\u0430-\u052f\u1d00-\u1d7f"
_NORMALIZED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        ("--", "-"),
        (rf"([{_LETTER}\d.])-([{_LETTER}\d.])", r"\1 \2"),  # t-shirt; bar-b-que is cut only once, as matches overlap
        (rf"([^{_LETTER}\d\s.'`,-])", r" \1 "),
        (r"(?<!\d),|,(?!\d)", " , "),
        (rf"(?<![{_LETTER}\d])'|'(?![{_LETTER}])", " ' "),  # 's becomes two words
        (r"(\d)'s", r"\1 's"),
        (rf"([{_LETTER}])'([{_LETTER}])", r"\1 '\2"),  # o'clock becomes o 'clock
    ]
]
_PLAIN = str.maketrans({"‘": "'", "’": "'", "`": "'", "“": '"', "”": '"', "–": " - "})
_ACRONYM = re.compile(rf"[{_LETTER}\d]+(?:\.[{_LETTER}\d]+)+\.")

# WordNet's rules of detachment (ending/replacement): the first base form that is in WordNet counts.
_SUFFIXES = [
    rule.split("/")
    for rule in (
        *("s/", "ses/s", "xes/x", "zes/z", "ches/ch", "shes/sh", "men/man", "ies/y", "es/e", "es/"),
        *("ed/e", "ed/", "ing/e", "ing/", "er/", "est/", "er/e", "est/e"),
    )
]

# Partial alignments are ordered by one number: most words first, then fewest chunks, then the least distance.
_CHUNK, _WORD = 1 << 40, 1 << 60


class Match(NamedTuple):
    """Words of the reference that match words of the candidate."""

    start: int  # position of the first word in the reference
    length: int
    other: int  # position of the first word in the candidate
    other_length: int
    stage: int


class Caption(NamedTuple):
    """A caption's W words and what the tables say about them."""

    words: list[str]  # (W,)
    is_function: list[bool]  # (W,)
    phrases: list[tuple[int, int, str]]  # phrases that have paraphrases: (position, number of words, phrase)
    places: dict[str, list[int]]  # positions of each phrase that has paraphrases or is one


def meteor_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, list[float]]:
    """METEOR of the corpus (from counts summed over pictures) and of each of the N pictures, as fractions.

    candidates[i] holds the words of the caption under test of picture i, references[i] those of its references, by
    tokens.tokenize. Only the reference with the best score counts.
    Raises UserError where pycocoevalcap or nltk (requirements/full.txt) is missing, or the cache cannot be written to.
    """
    normalized = {(key := " ".join(words)): normalize(key) for words in itertools.chain(candidates, *references)}
    english = English(normalized.values())
    captions = {key: english.caption(words) for key, words in normalized.items()}
    counts, scores = np.zeros(11), []
    for candidate, known in zip(candidates, references, strict=True):
        tested = captions[" ".join(candidate)]
        others = [captions[" ".join(reference)] for reference in known]
        each = [count(tested, other, align(tested, other, english)) for other in others]
        best = max(each, key=score)
        scores.append(score(best))
        counts += best
    return score(counts.tolist()), scores


def packaged(*parts: str) -> Path:
    """Path of a file inside the installed pycocoevalcap. Raises UserError where it is missing."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UserError("pycocoevalcap is not installed: pip install -r requirements/full.txt")
    path = Path(next(iter(package.submodule_search_locations)), *parts)
    if not path.is_file():
        raise UserError(f"{path} is missing: install pycocoevalcap 1.2")
    return path


def normalize(caption: str) -> list[str]:
    """Split a tokenized caption further, as METEOR's -norm does: t-shirt, 's and 5:30 are several words."""
    text = caption.lower().translate(_PLAIN)
    for pattern, replacement in _NORMALIZED:
        text = pattern.sub(replacement, text)
    words = text.split()
    return [part for i, word in enumerate(words) for part in _period(word, "".join(words[i + 1 : i + 2]))]


def _period(word: str, following: str) -> list[str]:
    """Make a final period a separate word where a sentence may end; p.m. becomes pm."""
    if len(word) < 2 or word[-1] != "." or word[-2] == ".":
        return [word]
    if "." in word[:-1] and not word.replace(".", "").isdigit():
        return [word.replace(".", "") if _ACRONYM.fullmatch(word) else word]
    return [word] if word in ("v.", "vs.", "rev.") or "a" <= following[:1] <= "z" else [word[:-1], "."]


def phrases_of(words: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """All phrases that the table can hold: (position, number of words, phrase)."""
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            yield start, end - start, " ".join(words[start:end])


class English:
    """Stems, synonyms, paraphrases and function words for a given set of captions."""

    def __init__(self, captions: Iterable[Sequence[str]]) -> None:
        try:
            from nltk.stem.snowball import SnowballStemmer
        except ImportError:
            raise UserError("nltk is not installed: pip install -r requirements/full.txt") from None
        path = packaged("meteor", "meteor-1.5.jar")
        try:
            with zipfile.ZipFile(path) as jar:
                parts = ("function/english.words", "synonym/english.synsets", "synonym/english.exceptions")
                function, synsets, exceptions = (jar.read(part).decode().split("\n") for part in parts)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read ({error}): reinstall pycocoevalcap") from error
        self.function = frozenset(function)
        self.synsets = dict(zip(synsets[::2], synsets[1::2], strict=False))
        self.bases: dict[str, list[str]] = defaultdict(list)
        for base, forms in zip(exceptions[::2], exceptions[1::2], strict=False):
            for form in forms.split():
                self.bases[form].append(base)
        self.stemmer = SnowballStemmer("english")
        table = Paraphrases(packaged("meteor", "data", "paraphrase-en.gz"))
        self.paraphrases = table.among(phrase for words in captions for _, _, phrase in phrases_of(words))
        self.phrases = self.paraphrases.keys() | set(itertools.chain.from_iterable(self.paraphrases.values()))
        self.known: dict[str, tuple[str, frozenset[str]]] = {}
        self.stages: dict[tuple[str, str], list[int]] = {}

    def stem(self, word: str) -> str:
        """The Snowball stem. nltk keeps a final e in realization and rotational, which Snowball removes."""
        stem: str = self.stemmer.stem(word)
        return stem[:-1] if stem.endswith(("ize", "ate")) and re.search("ization|izer|ational", word) else stem

    def senses(self, word: str) -> frozenset[str]:
        """Numbers of WordNet's synsets of a word and of its base form."""
        if word in self.bases or len(word) <= 2 or word.endswith("ss"):
            bases = self.bases.get(word, [])
        else:
            cut = (word.removesuffix(end) + new for end, new in _SUFFIXES if word.endswith(end))
            bases = [base for base in cut if base in self.synsets][:1]
        return frozenset(" ".join(self.synsets.get(one, "") for one in (word, *bases)).split())

    def stages_of(self, one: str, other: str) -> list[int]:
        """The stages of METEOR (exact, stem, synonym) at which two words match, as numbers."""
        if one == other:
            return [EXACT]
        if (one, other) not in self.stages:
            for word in (one, other):
                if word not in self.known:
                    self.known[word] = self.stem(word), self.senses(word)
            (stem, senses), (other_stem, other_senses) = self.known[one], self.known[other]
            related = stem == other_stem, not senses.isdisjoint(other_senses)
            self.stages[one, other] = [stage for stage, is_so in zip((STEM, SYNONYM), related, strict=True) if is_so]
        return self.stages[one, other]

    def caption(self, words: list[str]) -> Caption:
        """Look up a caption's words and phrases."""
        phrases, places = [], defaultdict(list)
        for start, length, phrase in phrases_of(words):
            if phrase in self.phrases:
                places[phrase].append(start)
                if phrase in self.paraphrases:
                    phrases.append((start, length, phrase))
        return Caption(words, [word in self.function for word in words], phrases, dict(places))


def matches(candidate: Caption, reference: Caption, english: English) -> list[list[Match]]:
    """All matches of all stages, listed by the reference's word at which they start.

    Their order decides between equally good alignments. A pair of phrases that the table lists in both directions
    matches twice.
    """
    found = [
        Match(start, 1, other, 1, stage)
        for start, word in enumerate(reference.words)
        for other, candidate_word in enumerate(candidate.words)
        for stage in english.stages_of(word, candidate_word)
    ]
    found.sort(key=attrgetter("stage"))
    for start, length, phrase in reference.phrases:
        for paraphrase in english.paraphrases[phrase]:
            for other in candidate.places.get(paraphrase, ()):
                found.append(Match(start, length, other, paraphrase.count(" ") + 1, PARAPHRASE))
    for other, other_length, phrase in candidate.phrases:
        for paraphrase in english.paraphrases[phrase]:
            for start in reference.places.get(paraphrase, ()):
                found.append(Match(start, paraphrase.count(" ") + 1, other, other_length, PARAPHRASE))
    beginning: list[list[Match]] = [[] for _ in reference.words]
    for match in found:
        beginning[match.start].append(match)
    return beginning


def align(candidate: Caption, reference: Caption, english: English) -> list[Match]:
    """Find the best set of matches without overlap by beam search; return it in the order of the reference.

    The best set has the most words, then the fewest chunks, then the least distance. Like the jar, this differs from
    the paper in three points. A match that is not exact counts half of its words, rounded down, so a stem counts
    nothing and is skipped where it would start a chunk. Making a match costs the distances of those listed before it,
    and making none costs the distances of all. A match that overlaps no other is always made.
    """
    beginning = matches(candidate, reference, english)
    covered, other_covered = [0] * len(reference.words), [0] * len(candidate.words)
    for match in itertools.chain.from_iterable(beginning):
        for position in range(match.start, match.start + match.length):
            covered[position] += 1
        for position in range(match.other, match.other + match.other_length):
            other_covered[position] += 1
    # (order, next word of the reference, word of the candidate after the last match or -1, its used words, matches)
    partials: list[tuple[int, int, int, int, tuple]] = [(0, 0, -1, 0, ())]
    for position, here in enumerate(beginning):
        options = [_option(match) for match in here]
        alone = len(here) == 1 and _is_alone(here[0], covered, other_covered)
        extended = []
        for partial in partials[:BEAM]:
            order, following, end, taken, made = partial
            if following > position:
                extended.append(partial)
                continue
            for match, words, counted, distance in options:
                if taken & words:
                    continue
                new = order + (_CHUNK if end not in (-1, match.other) else 0) - counted + alone * distance
                after = match.other + match.other_length
                extended.append((new, position + match.length, after, taken | words, (made, match)))
                order += distance
            if not alone:
                extended.append((order + (_CHUNK if end != -1 else 0), position + 1, -1, taken, made))
        extended.sort(key=itemgetter(0))
        partials = extended
    made = min(partials[:BEAM], key=lambda partial: partial[0] + (_CHUNK if partial[2] != -1 else 0))[-1]
    alignment: list[Match] = []
    while made:
        made, match = made
        alignment.append(match)
    return alignment[::-1]


def _option(match: Match) -> tuple[Match, int, int, int]:
    """(match, bits of the candidate's words that it uses, what it adds to the order, its distance)."""
    divisor = 1 if match.stage == EXACT else 2
    counted = match.length // divisor + match.other_length // divisor
    return match, (1 << match.other_length) - 1 << match.other, counted * _WORD, abs(match.start - match.other)


def _is_alone(match: Match, covered: list[int], other_covered: list[int]) -> bool:
    """Whether this match shares no word with another match."""
    counts = covered[match.start : match.start + match.length]
    return max(counts + other_covered[match.other : match.other + match.other_length]) == 1


def count(candidate: Caption, reference: Caption, alignment: list[Match]) -> list[float]:
    """(11,) counts that a score is computed from; they may be summed over pictures.

    For the candidate, then for the reference: number of content words, number of function words, total weight of the
    matched ones of each, and number of matched words. Last, the number of chunks: 0 where all words match in one chunk.
    """
    counts: list[float] = []
    for side, length, caption in (("other", "other_length", candidate), ("start", "length", reference)):
        five = [len(caption.words) - sum(caption.is_function), sum(caption.is_function), 0.0, 0.0, 0]
        for match in alignment:
            first = getattr(match, side)
            for is_function in caption.is_function[first : first + getattr(match, length)]:
                five[2 + is_function] += WEIGHTS[match.stage]
                five[4] += 1
        counts += five
    breaks = [
        last.start + last.length != match.start or last.other + last.other_length != match.other
        for last, match in itertools.pairwise(alignment)
    ]
    is_whole = counts[4] == len(candidate.words) and counts[9] == len(reference.words) and not any(breaks)
    return [*counts, 0 if is_whole else sum(breaks) + bool(alignment)]


def score(counts: Sequence[float]) -> float:
    """The score of the counts: a weighted harmonic mean of precision and recall, minus a penalty for chunks."""
    content, function, content_matched, function_matched, words = counts[:5]
    known_content, known_function, known_content_matched, known_function_matched, known_words = counts[5:10]
    chunks = counts[10]
    matched = DELTA * content_matched + (1 - DELTA) * function_matched
    known_matched = DELTA * known_content_matched + (1 - DELTA) * known_function_matched
    if not matched or not known_matched:
        return 0.0
    precision = matched / (DELTA * content + (1 - DELTA) * function)
    recall = known_matched / (DELTA * known_content + (1 - DELTA) * known_function)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    return mean * (1 - GAMMA * (chunks / ((words + known_words) / 2)) ** BETA)
