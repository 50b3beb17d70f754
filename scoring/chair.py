"""CHAIR: how often captions name objects that their picture does not have, by COCO's instances and captions."""

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
    """CHAIR over N captions, as fractions; lower is better."""

    chair_s: float
    """Share of captions that name an object which is not in the picture."""
    chair_i: float
    """Share of the mentioned objects that are not in the picture; 0 where no object is mentioned."""
    invented: dict[Any, list[str]]
    """Image id -> COCO's names of the invented objects, one entry per mention; only captions that have any."""


def chair(
    captions: Mapping[Any, str], instances_json: Path, references: Mapping[Any, Sequence[str]] | None = None
) -> Chair:
    """Count how often captions name one of COCO's 80 kinds of objects that the picture does not have.

    Rohrbach et al. 2018, "Object Hallucination in Image Captioning", arXiv:1809.02156. A picture has the objects that
    COCO's instances_*.json outlines in it and, with references (image id -> captions), those that the references name.
    The paper uses both; without references the numbers are higher. Every mention counts.

    Limits: the synonyms were collected for this project, so the numbers are close to published ones, but compare only
    with others of this function. Words are looked up without their context: "no dog", "a toy car", "a painting of a
    boat" and "ties a knot" count as the objects. Words with several common meanings ("orange", "glass", "computer",
    "plant", "chicken") count only in phrases that make the meaning clear. Objects outside the 80 kinds are ignored.

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
        there = present[image].union(*map(objects_in, (references or {}).get(image, ())))
        named = objects_in(caption)
        mentions += len(named)
        if absent := [name for name in named if name not in there]:
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
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
            coco.createIndex()
        names = {number: category["name"] for number, category in coco.cats.items()}
        present = {image: {names[one["category_id"]] for one in coco.imgToAnns.get(image, ())} for image in coco.imgs}
    except OSError as error:
        raise UserError(f"{instances_json}: cannot be read ({error.strerror})") from error
    except Exception as error:  # pycocotools checks nothing, so a wrong file can raise any exception
        why = in_one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{instances_json}: not COCO's instances ({why}): use instances_*.json") from error
    if not present or not names or not set(names.values()) <= synonyms().keys():
        raise UserError(f"{instances_json}: it does not hold COCO's 80 kinds of objects: use instances_*.json")
    return present


def objects_in(caption: str) -> list[str]:
    """COCO's names of the objects that a caption mentions, in order, one entry per mention. The longest phrase counts.

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
    """COCO's names -> everyday words, separated by commas, from chair.txt; "nothing" -> phrases that name no object."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(": ") for line in lines if not line.startswith("#"))
    return {name: listed for name, _, listed in pairs}


@lru_cache(maxsize=1)
def _phrases() -> dict[tuple[str, ...], str]:
    """Words of a phrase -> COCO's name, or "" for phrases that only sound like an object."""
    synonyms_of = synonyms()
    table = dict.fromkeys(_listed(synonyms_of.pop("nothing")), "")
    for name, listed in synonyms_of.items():
        table |= dict.fromkeys(_listed(f"{name}, {listed}"), name)
        if name in _ANIMALS:  # or "baby" and "mother" would count as persons
            table |= {(young, *words): name for young in _YOUNG for words in _listed(f"{name}, {listed}")}
    # "orange" alone is more often a colour than a fruit.
    del table[("orange",)]
    table |= {("an", "orange", after): "orange" for after in ("on", "in", "is", "sitting", "next", "with")}
    return table


def _listed(phrases: str) -> list[tuple[str, ...]]:
    """Split a comma-separated list into phrases, each in the singular and the plural."""
    singular = [phrase.strip() for phrase in phrases.split(",") if phrase.strip()]
    return [tuple(form.split()) for phrase in singular for form in (phrase, _plural(phrase))]


def _plural(phrase: str) -> str:
    """The plural of a phrase: by rule, or by _ENDINGS for irregular words.

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
