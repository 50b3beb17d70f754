"""Read captions and references from two files, in any of several formats, and match them picture by picture."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError
from data.reading import MADE_BY, domain_of, is_rejected
from utils import counted, in_one_line, json_of


def read_results(results: Path, references: Path) -> tuple[list[int | str], list[str], list[list[str]]]:
    """Image ids, candidates and references of two files (see matched)."""
    found = matched(results, references)
    return found.names, found.captions, found.references


class Matched(NamedTuple):
    """Captions and their references, matched picture by picture."""

    names: list[int | str]
    captions: list[str]
    references: list[list[str]]
    facts: dict[str, str]
    """Notes on the matching, for the table of results."""
    domains: list[str]
    """Domain of each picture, or empty where the references have none."""


def matched(results: Path, references: Path, subset: bool = False) -> Matched:
    """Match the captions of two files.

    Repeated equal candidates, with which distributed samplers fill up, are dropped and counted. Candidates of pictures
    whose references were all rejected (VizWiz) are dropped too. Raises UserError unless each picture of the references
    (with subset: at least one of them) has exactly one candidate, and no other picture has one.
    """
    known: dict[int | str, list[str]] = defaultdict(list)
    for image, caption in read_captions(references):
        known[image].append(caption)
    domains, rejected, unscored = read_pictures(references, known)
    if not known:
        raise UserError(f"{references}: it holds no captions: name a file of references")
    entries = [(image, caption) for image, caption in read_captions(results) if image not in unscored]
    times = Counter(image for image, _ in dict.fromkeys(entries))
    if len(times) < times.total():
        image, number = times.most_common(1)[0]
        raise UserError(f"{results}: {number} captions for picture {in_one_line(str(image))}: give one per picture")
    partners = _partners(times, known)
    captions = {partners[image]: caption for image, caption in entries if image in partners}
    lacking = [image for image in known if image not in captions]
    odd = [image for image in times if image not in partners]
    advice = "both need the same pictures" + (", or add --subset" if captions and not odd else "")
    others = lacking or list(known)
    if odd and {*map(type, odd)} != {*map(type, others)}:
        advice = in_one_line(f"the types of the ids differ, {odd[0]!r} here and {others[0]!r} there")
    for images, problem in ((lacking, "no caption for {} of"), (odd, "{} not in")):
        if images and (images is odd or not subset or not captions):
            some = in_one_line(", ".join(map(str, images[:3])))
            raise UserError(
                f"{results}: {problem.format(counted(len(images), 'pictures'))} {references} ({some}): {advice}"
            )
    facts = {"subset": f"{len(captions):,} of the {len(known):,} pictures"} if lacking else {}
    if again := len(entries) - len(times):
        facts["equal_captions_dropped"] = f"{again:,}"
    if rejected:
        facts["references_rejected"] = f"{rejected:,}; pictures without any other: {len(unscored):,}"
    names = [image for image in known if image in captions]
    own_domains = [domains[image] for image in names if image in domains]
    if len(own_domains) < len(names):
        own_domains = []
    return Matched(names, [captions[image] for image in names], [known[image] for image in names], facts, own_domains)


def read_pictures(path: Path, known: Collection[int | str]) -> tuple[dict[int | str, str], int, set[int | str]]:
    """From a file of references: {picture: its domain}, the number of rejected references, and the pictures whose
    references are all rejected."""
    try:
        content = json_of(path.read_bytes())
    except ValueError:  # JSON lines
        return {}, 0, set()
    lists = [content.get(name) if isinstance(content, dict) else None for name in ("images", "annotations")]
    images, annotations = ([e for e in each if isinstance(e, dict)] if isinstance(each, list) else [] for each in lists)
    named = {image["id"]: domain_of(image) for image in images if isinstance(image.get("id"), int | str)}
    rejected = [entry.get("image_id") for entry in annotations if is_rejected(entry)]
    domains = {image: domain for image, domain in named.items() if domain}
    return domains, len(rejected), {image for image in rejected if isinstance(image, int | str)} - set(known)


def _partners(ids: Collection[int | str], known: Collection[int | str]) -> dict[int | str, int | str]:
    """{id: the known id that it matches}: the same id, or the one with the same number or name (see _number), where
    both are unique."""
    partners = {image: image for image in ids if image in known}
    alike: dict[int | str, tuple[list[int | str], list[int | str]]] = defaultdict(lambda: ([], []))
    for side, images in enumerate((ids, known)):
        for image in images:
            if image not in partners:
                alike[_number(image)][side].append(image)
    return partners | {here[0]: there[0] for here, there in alike.values() if len(here) == len(there) == 1}


def _number(image: int | str) -> int | str:
    """The number in "042", "42.0" or COCO_val2014_000000000042.jpg; else the name without folder and suffix."""
    name = re.sub(r".*[/\\]|\.[A-Za-z]\w*$", "", str(image))
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{1,99})(?:\.0+)?", name)
    return int(number[1]) if number else name


def read_captions(path: Path) -> list[tuple[int | str, str]]:
    """(image id or file name, caption) of each entry of COCO results or annotations, JSON lines, or {id: caption}."""
    try:
        entries = []
        for image, caption in _entries(path.read_bytes()):
            image = int(image) if type(image) is float and image.is_integer() else image
            if type(image) not in (int, str) or not isinstance(caption, str):
                raise TypeError(f"picture {image!r}, caption {caption!r}")
            f"{image}{caption}".encode()  # refuses half a character, which no file can hold
            entries.append((image, caption))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = in_one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: not in COCO's format ({reason}): expected [{{image_id, caption}}, ...]") from error
    return entries


def _entries(data: bytes) -> Iterator[tuple[Any, Any]]:
    """(image, caption) of each entry, of unchecked types."""

    def fields(pairs: list[tuple[str, Any]]) -> Any:
        """A dictionary, or the pairs where a key is repeated, as json would drop all but the last one."""
        return dict(pairs) if len(dict(pairs)) == len(pairs) else pairs

    text, decoder = data.decode(json.detect_encoding(data)).strip(), json.JSONDecoder(object_pairs_hook=fields)
    values: list[Any] = []
    end = 0
    while end < len(text) or not values:  # one value, or one per line
        value, end = decoder.raw_decode(text, re.compile(r"\s*").match(text, end).end())  # type: ignore[union-attr]
        values.append(value)
    content = values[0] if len(values) == 1 else values
    if isinstance(content, dict):
        named = content.get("annotations", content.get("data"))  # TextCaps calls them data
        content = named if isinstance(named, list) else [content] if "caption" in content else content.items()
    for entry in content:
        if isinstance(entry, tuple):  # id and caption, or id and list of captions
            yield from ((entry[0], caption) for caption in (entry[1] if isinstance(entry[1], list) else entry[1:]))
        elif list(entry) != [MADE_BY] and not is_rejected(entry):
            yield entry.get("image_id", entry.get("file_name")), entry.get("caption", entry.get("caption_str"))
