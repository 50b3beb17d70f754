"""CHAIR: objects that a caption names and its picture does not have, by COCO's instances and captions."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from scoring.metrics import tokenize
from utils import in_one_line, json_of


class Chair(NamedTuple):
    """CHAIR over N captions, fractions: the lower, the better."""

    chair_s: float
    """Share of the captions that name an object which is not in the picture."""
    chair_i: float
    """Share of the mentions of objects that are of such an object; 0 where no object is named."""
    invented: dict[Any, list[str]]
    """Image id -> COCO's names of the objects that its caption made up, each mention; only captions with any."""


def chair(
    captions: Mapping[Any, str], instances_json: Path, references: Mapping[Any, Sequence[str]] | None = None
) -> Chair:
    """How often captions name one of COCO's 80 kinds of objects that the picture has not got.

    Rohrbach et al. 2018, "Object Hallucination in Image Captioning", arXiv:1809.02156. A picture has the objects that
    COCO's instances_*.json outlines in it and, with references (image id -> captions), those that people named: the
    paper counts both, and without them the numbers are higher. Every mention counts.

    Its limits: the synonyms are our own, so the numbers come close to published ones and are to be compared only with
    others of this function. Words are looked up, not understood: "no dog", "a toy car", "a painting of a boat" and
    "ties a knot" count as the objects; words with more than one common meaning ("orange", "glass", "computer",
    "plant", "chicken") count only in phrases that settle it; and an object outside the 80 kinds is never noticed.

    Raises UserError where pycocotools is missing, the file cannot be used, or a caption's picture is not in it.
    """
    present = _objects_in_pictures(instances_json)
    unknown = [image for image in captions if image not in present]
    if unknown:
        raise UserError(
            f"{instances_json}: {len(unknown)} of the captions' pictures are not in it ({unknown[0]!r}, ...)"
        )
    mentions, invented = 0, {}
    for image, caption in captions.items():
        seen = present[image].union(*map(objects_in, (references or {}).get(image, ())))
        named = objects_in(caption)
        mentions += len(named)
        if absent := [name for name in named if name not in seen]:
            invented[image] = absent
    wrong = sum(map(len, invented.values()))
    return Chair(len(invented) / max(1, len(captions)), wrong / max(1, mentions), invented)


def _objects_in_pictures(instances_json: Path) -> dict[Any, set[str]]:
    """Image id -> names of the kinds of objects outlined in it."""
    try:
        from pycocotools.coco import COCO  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("CHAIR needs pycocotools: pip install -r requirements/full.txt") from None
    try:
        coco = COCO()
        coco.dataset = dict(**json_of(instances_json.read_text(encoding="utf-8-sig")))
        with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
            coco.createIndex()
        names = {number: category["name"] for number, category in coco.cats.items()}
        present = {image: {names[one["category_id"]] for one in coco.imgToAnns.get(image, ())} for image in coco.imgs}
    except OSError as error:
        raise UserError(f"{instances_json}: cannot be read ({error.strerror})") from error
    except Exception as error:  # pycocotools checks nothing, so a wrong file fails with anything
        why = in_one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{instances_json}: not COCO's instances ({why}): use instances_*.json") from error
    if not present or not names or not set(names.values()) <= synonyms().keys():
        raise UserError(f"{instances_json}: has none or others than COCO's 80 kinds of objects: use instances_*.json")
    return present


def objects_in(caption: str) -> list[str]:
    """COCO's names of the objects that a caption mentions, in its order, each mention; the longest phrase counts.

    >>> objects_in("Two men eat hot dogs by a fire engine near the bus stop")
    ['person', 'hot dog', 'truck']
    """
    phrases = _phrases()
    longest = max(map(len, phrases))
    words = [part for word in tokenize(caption) for part in word.split("-")]
    found, at = [], 0
    while at < len(words):
        lengths = (n for n in range(longest, 0, -1) if tuple(words[at : at + n]) in phrases)
        length = next(lengths, 0)
        if length and (name := phrases[tuple(words[at : at + length])]):
            found.append(name)
        at += max(1, length)
    return found


def synonyms() -> dict[str, str]:
    """COCO's names, and "nothing" for what only sounds like an object -> everyday words, with commas: chair.txt."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(": ") for line in lines if not line.startswith("#"))
    return {name: listed for name, _, listed in pairs}


@lru_cache(maxsize=1)
def _phrases() -> dict[tuple[str, ...], str]:
    """Words of a phrase -> COCO's name, or nothing for phrases that only sound like an object."""
    synonyms_of = synonyms()
    table = dict.fromkeys(_listed(synonyms_of.pop("nothing")), "")
    for name, listed in synonyms_of.items():
        table |= dict.fromkeys(_listed(f"{name}, {listed}"), name)
        if name in _ANIMALS:  # or the baby and the mother would be persons
            table |= {(young, *words): name for young in _YOUNG for words in _listed(f"{name}, {listed}")}
    # A colour more often than a fruit.
    del table[("orange",)]
    table |= {("an", "orange", after): "orange" for after in ("on", "in", "is", "sitting", "next", "with")}
    return table


def _listed(phrases: str) -> list[tuple[str, ...]]:
    """The phrases of a list with commas, in the singular and the plural."""
    singular = [phrase.strip() for phrase in phrases.split(",") if phrase.strip()]
    return [tuple(form.split()) for phrase in singular for form in (phrase, _plural(phrase))]


def _plural(phrase: str) -> str:
    """By rule, and by _ENDINGS where the rules fail.

    >>> [_plural(word) for word in ("wine glass", "pony", "fireman", "toy", "knife")]
    ['wine glasses', 'ponies', 'firemen', 'toys', 'knives']
    """
    for ending, plural in _ENDINGS.items():
        if phrase.endswith(ending):
            return phrase.removesuffix(ending) + plural
    if re.search("[^aeiou]y$", phrase):
        return phrase[:-1] + "ies"
    return phrase + ("es" if re.search("(s|x|z|ch|sh)$", phrase) else "s")


_ENDINGS = {"person": "people", "child": "children", "man": "men", "goose": "geese", "mouse": "mice", "knife": "knives"}
_ENDINGS |= {"calf": "calves", "ox": "oxen", **{same: same for same in ("sheep", "scissors", "skis")}}
_YOUNG = ("baby", "mother", "mama", "mommy", "momma", "parent", "father", "daddy", "child", "infant")
_ANIMALS = frozenset(["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"])
