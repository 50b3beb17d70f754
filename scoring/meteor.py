"""METEOR 1.5 for English without Java, with the official jar's numbers.

Denkowski and Lavie 2014, "Meteor Universal: Language Specific Translation Evaluation for Any Target Language" (WMT).
Where the paper is silent or the jar does otherwise the jar decided, run beside this file on thousands of captions.
WordNet, the list of function words and the paraphrases are read where an installed pycocoevalcap has them.
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
"""What a word counts that was matched by each stage."""
BEAM = 40
"""Partial alignments that are followed further."""

# Letters to the jar, of those in lower case. All else but digits, periods, commas and hyphens is a word by itself.
_LETTER = "a-zß-öø-ž\u0430-\u052f\u1d00-\u1d7f"
_NORMALIZED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        ("--", "-"),
        (rf"([{_LETTER}\d.])-([{_LETTER}\d.])", r"\1 \2"),  # t-shirt, but bar-b-que is cut only once
        (rf"([^{_LETTER}\d\s.'`,-])", r" \1 "),
        (r"(?<!\d),|,(?!\d)", " , "),
        (rf"(?<![{_LETTER}\d])'|'(?![{_LETTER}])", " ' "),  # 's is two words,
        (r"(\d)'s", r"\1 's"),
        (rf"([{_LETTER}])'([{_LETTER}])", r"\1 '\2"),  # but o'clock: o 'clock
    ]
]
_PLAIN = str.maketrans({"‘": "'", "’": "'", "`": "'", "“": '"', "”": '"', "–": " - "})
_ACRONYM = re.compile(rf"[{_LETTER}\d]+(?:\.[{_LETTER}\d]+)+\.")

# WordNet's rules of detachment: of the bases that are in it the first counts.
_SUFFIXES = [
    rule.split("/")
    for rule in (
        *("s/", "ses/s", "xes/x", "zes/z", "ches/ch", "shes/sh", "men/man", "ies/y", "es/e", "es/"),
        *("ed/e", "ed/", "ing/e", "ing/", "er/", "est/", "er/e", "est/e"),
    )
]

# What partial alignments are ordered by, in one number: most words, then fewest chunks, then the least distance.
_CHUNK, _WORD = 1 << 40, 1 << 60


class Match(NamedTuple):
    """Words of a reference for which words of the candidate may stand."""

    start: int  # the first of them
    length: int
    other: int  # the candidate's first
    other_length: int
    stage: int


class Caption(NamedTuple):
    """What is looked up of a caption's words: W of them."""

    words: list[str]  # (W,)
    is_function: list[bool]  # (W,)
    phrases: list[tuple[int, int, str]]  # those that have paraphrases, with the first word and the number of words
    places: dict[str, list[int]]  # where each phrase begins, of those that have paraphrases or are some


def meteor_scores(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, list[float]]:
    """METEOR of the corpus, by its summed counts, and of each of the N pictures, fractions.

    candidates[i] holds the words of the caption under test of picture i, references[i] those of what people wrote for
    it, by tokens.tokenize; of these the one counts that gives the best score.
    Raises UserError, in one line, where pycocoevalcap or nltk (requirements/full.txt) is missing, or the cache cannot
    be written to.
    """
    normalized = {(key := " ".join(words)): normalize(key) for words in itertools.chain(candidates, *references)}
    english = English(normalized.values())
    captions = {key: english.caption(words) for key, words in normalized.items()}
    counts, scores = np.zeros(11), []
    for candidate, known in zip(candidates, references, strict=True):
        said = captions[" ".join(candidate)]
        others = [captions[" ".join(reference)] for reference in known]
        each = [count(said, other, align(said, other, english)) for other in others]
        best = max(each, key=score)
        scores.append(score(best))
        counts += best
    return score(counts.tolist()), scores


def packaged(*parts: str) -> Path:
    """A file inside the installed pycocoevalcap."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UserError("pycocoevalcap is not installed: pip install -r requirements/full.txt")
    path = Path(next(iter(package.submodule_search_locations)), *parts)
    if not path.is_file():
        raise UserError(f"{path} is missing: install pycocoevalcap 1.2")
    return path


def normalize(caption: str) -> list[str]:
    """The words of a tokenized caption as METEOR's -norm cuts them once more: t-shirt, 's and 5:30 are several."""
    text = caption.lower().translate(_PLAIN)
    for pattern, replacement in _NORMALIZED:
        text = pattern.sub(replacement, text)
    words = text.split()
    return [part for i, word in enumerate(words) for part in _period(word, "".join(words[i + 1 : i + 2]))]


def _period(word: str, following: str) -> list[str]:
    """A period at the end is a word by itself where a sentence may end; p.m. is pm."""
    if len(word) < 2 or word[-1] != "." or word[-2] == ".":
        return [word]
    if "." in word[:-1] and not word.replace(".", "").isdigit():
        return [word.replace(".", "") if _ACRONYM.fullmatch(word) else word]
    return [word] if word in ("v.", "vs.", "rev.") or "a" <= following[:1] <= "z" else [word[:-1], "."]


def phrases_of(words: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """All phrases that the table may hold: the first word, the number of words, and the phrase."""
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            yield start, end - start, " ".join(words[start:end])


class English:
    """Stems, synonyms, paraphrases and function words, of the captions that it is made for."""

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
            raise UserError(f"{path} cannot be read ({error}): install pycocoevalcap anew") from error
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
        """The Snowball stem. nltk leaves an e at the end of realization and rotational that Snowball takes off."""
        stem: str = self.stemmer.stem(word)
        return stem[:-1] if stem.endswith(("ize", "ate")) and re.search("ization|izer|ational", word) else stem

    def senses(self, word: str) -> frozenset[str]:
        """WordNet's synsets of a word and of its base form."""
        if word in self.bases or len(word) <= 2 or word.endswith("ss"):
            bases = self.bases.get(word, [])
        else:
            cut = (word.removesuffix(end) + new for end, new in _SUFFIXES if word.endswith(end))
            bases = [base for base in cut if base in self.synsets][:1]
        return frozenset(" ".join(self.synsets.get(one, "") for one in (word, *bases)).split())

    def stages_of(self, one: str, other: str) -> list[int]:
        """The stages that match a word with another."""
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
        """A caption's words, looked up."""
        phrases, places = [], defaultdict(list)
        for start, length, phrase in phrases_of(words):
            if phrase in self.phrases:
                places[phrase].append(start)
                if phrase in self.paraphrases:
                    phrases.append((start, length, phrase))
        return Caption(words, [word in self.function for word in words], phrases, dict(places))


def matches(candidate: Caption, reference: Caption, english: English) -> list[list[Match]]:
    """All matches of all stages, for each word of the reference those that begin there.

    Their order decides between alignments that are equally good. A pair of phrases that the table holds both ways
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
    """The matches, none overlapping another, that a beam search finds best, in the order of the reference.

    Most words are best, then fewest chunks, then the least distance. The jar departs from the paper, and so does this:
    a match that is not exact counts half of its words, rounded down, so that a stem counts nothing and is left out
    where it would begin a chunk; distance is that of the matches listed before the one that is made, or of all where
    none is made; and a match that no other competes with is always made.
    """
    beginning = matches(candidate, reference, english)
    covered, other_covered = [0] * len(reference.words), [0] * len(candidate.words)
    for match in itertools.chain.from_iterable(beginning):
        for place in range(match.start, match.start + match.length):
            covered[place] += 1
        for place in range(match.other, match.other + match.other_length):
            other_covered[place] += 1
    # Order, next word of the reference, word of the candidate after the last match or -1, its words taken, matches.
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
    """A match, the candidate's words that it takes as bits, what it adds to the order, and its distance."""
    divisor = 1 if match.stage == EXACT else 2
    counted = match.length // divisor + match.other_length // divisor
    return match, (1 << match.other_length) - 1 << match.other, counted * _WORD, abs(match.start - match.other)


def _is_alone(match: Match, covered: list[int], other_covered: list[int]) -> bool:
    """Whether no other match has a word of this one."""
    own = covered[match.start : match.start + match.length]
    return max(own + other_covered[match.other : match.other + match.other_length]) == 1


def count(candidate: Caption, reference: Caption, alignment: list[Match]) -> list[float]:
    """(11,) what a score is made of, which may be summed over pictures.

    For the candidate and then for the reference: the content words, the function words, the weights of those of them
    that are matched, and the number of words matched; then the number of chunks, of which a match of all words has none.
    """
    counts: list[float] = []
    for side, length, caption in (("other", "other_length", candidate), ("start", "length", reference)):
        own = [len(caption.words) - sum(caption.is_function), sum(caption.is_function), 0.0, 0.0, 0]
        for match in alignment:
            first = getattr(match, side)
            for is_function in caption.is_function[first : first + getattr(match, length)]:
                own[2 + is_function] += WEIGHTS[match.stage]
                own[4] += 1
        counts += own
    breaks = [
        last.start + last.length != match.start or last.other + last.other_length != match.other
        for last, match in itertools.pairwise(alignment)
    ]
    is_whole = counts[4] == len(candidate.words) and counts[9] == len(reference.words) and not any(breaks)
    return [*counts, 0 if is_whole else sum(breaks) + bool(alignment)]


def score(counts: Sequence[float]) -> float:
    """The score of what count counted: a mean of precision and recall, less what falling into chunks costs."""
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
