"""Captions beside their references, whoever wrote them: scored, compared, read from and written to files.

A folder of results holds captions.json and references.json (COCO's formats), per_picture.csv and report.html. Knows
nothing of models.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from config import FEW, UserError
from data.pictures import PictureSource
from data.pictures import decode as decode_picture
from data.reading import MADE_BY
from scoring.metrics import (
    CiderD,
    Scores,
    Statistics,
    characters,
    diversity,
    mean_intervals,
    novelty,
    self_cider,
    tokenize,
    without_blanks,
)
from scoring.report import THUMBNAIL, Report, write_report
from utils import file_hash, in_one_line, json_of, read_log, shown, write_csv, write_json

ENDS = ("low", "high")  # of a 95 % interval
FEWEST = 30  # pictures that a p is given for
LONG = 40  # words of a caption
DOMAIN = r"[a-z]{1,20}-domain"  # in-domain, near-domain, out-domain
TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"ptb": tokenize, "characters": characters}
NO_CIDER = "cannot be computed, as each word is in every picture's references"


@dataclass
class Captioned:
    """Captions of a loader's pictures, in its order: rows of its table, captions, their references, which were cut."""

    rows: list[int]
    captions: list[str]
    references: list[list[str]]
    cut: list[bool]
    several: list[list[str]] = field(default_factory=list)
    """Where more than one caption a picture was asked for, all of them; the first is the one in captions."""
    frequencies: CiderD | None = None
    """Document frequencies to score with, else those of the references."""
    tokenizer: str = "ptb"
    """What makes words of captions: one of TOKENIZERS."""
    domains: list[str] = field(default_factory=list)
    """Where the benchmark has several (nocaps: in-domain, near-domain, out-domain), that of each picture."""

    @cached_property
    def statistics(self) -> Statistics:
        """All n-grams, counted once."""
        words = TOKENIZERS[self.tokenizer]
        known = [list(map(words, own)) for own in self.references]
        return Statistics(list(map(words, self.captions)), known, self.frequencies)

    def by_domain(self) -> Iterator[tuple[str, Statistics]]:
        """Of each domain by itself, with its own document frequencies, as nocaps' server has it."""
        words, known = (
            self.statistics.candidates,
            [list(map(TOKENIZERS[self.tokenizer], own)) for own in self.references],
        )
        for domain in sorted(set(self.domains)):
            rows = [row for row, own in enumerate(self.domains) if own == domain]
            own_words, own_known = [words[row] for row in rows], [known[row] for row in rows]
            yield domain.replace("-", "_"), Statistics(own_words, own_known, self.frequencies)

    @cached_property
    def self_cider(self) -> Scores | None:
        """How different the captions of a picture are, where there are several."""
        several = [list(map(TOKENIZERS[self.tokenizer], own)) for own in self.several]
        return self_cider(several, self.statistics.frequencies) if several else None

    def metrics(self) -> dict[str, float]:
        """BLEU-1..4, ROUGE-L and CIDEr-D, how varied the captions are, and the share cut off at max_length."""
        scores = self.statistics.scores() | diversity(self.statistics.candidates)
        if self.self_cider:
            scores["self_cider"] = self.self_cider.corpus
        return scores | ({"cut_captions": sum(self.cut) / len(self.cut)} if self.cut else {})


@dataclass(frozen=True)
class MoreScores:
    """What is wanted besides: METEOR and SPICE by Java, CHAIR with COCO's instances, CLIPScore and PAC-S by a CLIP each;
    CIDEr-D with other document frequencies; other words; the share of captions that are not among those trained on."""

    java: bool = False
    instances: Path | None = None
    clip: str | None = None
    pac: str | None = None
    frequencies: CiderD | None = None
    tokenizer: str = "ptb"
    training_captions: Sequence[str] | None = None

    def score(
        self,
        names: Sequence[int | str],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
        picture: Callable[[int], PictureSource] | None,
    ) -> tuple[dict[str, float], dict[str, Sequence[float]], list[str]]:
        """The numbers, those of each picture, and a line for each metric that was left out."""
        from scoring.chair import chair
        from scoring.clip import clip_scores
        from scoring.java import java_scores

        corpus: dict[str, float] = {}
        each: dict[str, Sequence[float]] = {}
        notes = [] if self.java else ["METEOR and SPICE: not asked for (--java)"]
        if self.java:
            java = java_scores(captions, references)
            corpus, each, notes = dict(java.corpus), dict(java.per_picture), list(java.notes)
        try:
            if self.instances:
                known = dict(zip(names, references, strict=True))
                objects = chair(dict(zip(names, captions, strict=True)), self.instances, known)
                corpus |= {"chair_s": objects.chair_s, "chair_i": objects.chair_i}
        except UserError as error:
            notes.append(f"CHAIR: {error}")
        kinds: dict[str, tuple[Literal["clip", "pac"], str | None]]
        kinds = {"CLIPScore": ("clip", self.clip), "PAC-S": ("pac", self.pac)}
        for name, (kind, model) in kinds.items():
            try:
                if model and picture:
                    pictures = [picture(i) for i in range(len(captions))]
                    found = clip_scores(captions, pictures, references, model, metric=kind)
                    corpus |= found.corpus
                    each |= {name: scores.tolist() for name, scores in found.per_picture.items()}
                elif model:
                    notes.append(f"{name}: no pictures at hand, name a model and --data-dir")
            except UserError as error:
                notes.append(f"{name}: {error}")
        if self.training_captions is None:
            notes.append("share of new captions: no training captions at hand")
        else:
            corpus["novel_captions"] = novelty(captions, self.training_captions)
        return corpus, each, notes


def about_scores(
    number: int, references: Sequence[Sequence[str]], frequencies: CiderD | None, tokenizer: str = "ptb"
) -> dict[str, Any]:
    """What numbers must share to be compared, whoever wrote the captions."""
    counted = f"of the {number:,} picture{'s' * (number > 1)} evaluated"
    if frequencies:
        counted = f"of {frequencies.num_pictures:,} pictures, from {frequencies.path}"
    known, words = [text for own in references for text in own], TOKENIZERS[tokenizer]
    length = sum(len(text.split() if words is tokenize else words(text)) for text in known)  # near enough, and quick
    return {
        "tokenizer": f"{'PTB' if words is tokenize else 'PTB and characters'}, by metrics.{words.__name__}",
        "document_frequencies": counted,
        "pictures": number,
        "references_per_picture": f"{len(known) / number:.4g}",
        "words_per_reference": f"{length / len(known):.4g}",
        **({"without_blanks": unspaced} if words is tokenize and (unspaced := sum(map(without_blanks, known))) else {}),
    }


def about_results(results: Path) -> dict[str, Any]:
    """What the evaluation that wrote a file of captions said of their making; unknown for anybody else's."""
    facts: dict[str, Any] = {"decoding": "unknown", "weights_sha256": "unknown"}
    try:
        said = json_of((results.parent / "metrics.json").read_text(encoding="utf-8"))
        if said["captions_sha256"] == file_hash(results):
            names = ("data", "split", *facts, "precision", "pictures_trained_on")
            return {n: said[n] for n in names if isinstance(said.get(n), int if n == "pictures_trained_on" else str)}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no evaluation's folder
    return facts


def write_evaluation(
    directory: Path,
    title: str,
    captioned: Captioned,
    names: Sequence[int | str],
    known: dict[str, Any],
    about: dict[str, Any],
    more: MoreScores,
    picture: Callable[[int], PictureSource] | None = None,
) -> dict[str, Any]:
    """Writes captions.json and references.json (COCO's formats), per_picture.csv and report.html into the folder, and
    all_captions.json where a picture has several.

    Returns everything a table says: the metrics (those known before and all others), how they were made, and the 95 %
    interval of each.
    """
    captions, references = captioned.captions, captioned.references
    added, added_each, left_out = more.score(names, captions, references, picture)
    write_captions(directory, captioned, names)
    numbers = captioned.metrics() | known | added
    intervals = captioned.statistics.intervals()
    intervals |= mean_intervals(
        {n: own for n, own in added_each.items() if n != "meteor"}
    )  # which is no mean of pictures
    if not captioned.statistics.has_cider:
        left_out = [f"CIDEr-D {NO_CIDER}", *left_out]
        del numbers["cider_d"], intervals["cider_d"]
    for domain, statistics in captioned.by_domain():
        numbers[f"pictures_{domain}"] = statistics.number
        numbers |= {f"{name}_{domain}": score for name, score in statistics.scores().items()}
        intervals |= {f"{name}_{domain}": interval for name, interval in statistics.intervals().items()}
    facts = {
        **about_scores(len(captions), references, captioned.frequencies, captioned.tokenizer),
        **about,
        **({"java_tokenizer": "Stanford's own, for METEOR and SPICE"} if more.java else {}),
        **({"training_captions": len(more.training_captions)} if more.training_captions else {}),
        "captions_sha256": file_hash(directory / "captions.json"),
        "left_out": "; ".join(left_out) or "nothing",
    }
    scored = captioned.statistics.per_picture()
    first = ("cider_d",) if captioned.statistics.has_cider else ()  # as pictures are ranked by it
    names_of = dict.fromkeys((*first, *(name for name in scored if name != "cider_d")))
    each: dict[str, Sequence[float]] = {name: scored[name].tolist() for name in names_of} | added_each
    if captioned.self_cider:
        each["self_cider"] = captioned.self_cider.per_picture.tolist()
    rows = zip(names, captions, *([f"{x:.6f}" for x in scores] for scores in each.values()), strict=True)
    write_csv(directory / "per_picture.csv", [("picture", "caption", *each), *rows])
    report = Report(
        title=title,
        facts={name.replace("_", " "): f"{said:,}" if isinstance(said, int) else said for name, said in facts.items()},
        warnings=warnings_about(facts | numbers),
        metrics=numbers,
        intervals=intervals,
        captions=captions,
        references=references,
        per_picture=each,
        names=[str(name) for name in names],
        load=picture and (lambda i: Image.fromarray(decode_picture(picture(i), THUMBNAIL))),
        history=read_log(directory / "metrics.jsonl"),
    )
    write_report(directory / "report.html", report)
    bounds = {f"{name}_{end}": value for name, both in intervals.items() for end, value in zip(ENDS, both, strict=True)}
    return numbers | facts | bounds


def write_captions(directory: Path, captioned: Captioned, names: Sequence[int | str]) -> None:
    """captions.json, references.json, and all_captions.json where a picture has several."""
    own = zip(names, captioned.captions, strict=True)
    write_json(directory / "captions.json", [{"image_id": name, "caption": caption} for name, caption in own])
    texts = [(name, text) for name, own in zip(names, captioned.references, strict=True) for text in own]
    annotations = [{"id": i, "image_id": name, "caption": text} for i, (name, text) in enumerate(texts)]
    write_json(directory / "references.json", {"images": [{"id": i} for i in names], "annotations": annotations})
    if captioned.several:
        several = zip(names, captioned.several, strict=True)
        write_json(directory / "all_captions.json", [{"image_id": name, "captions": own} for name, own in several])


def warnings_about(metrics: dict[str, Any]) -> list[str]:
    """What to know before the numbers are believed."""
    number, found = metrics["pictures"], []
    if number < FEW:
        found.append(
            f"These numbers rest on {number:,} picture{'s' * (number > 1)}: below {FEW} they are mostly chance."
        )
    if seen := metrics.get("pictures_trained_on"):
        found.append(
            f"{seen:,} of the {number:,} pictures were trained on: these numbers say nothing about new pictures."
        )
    if part := metrics.get("subset"):
        found.append(f"Only {part} of the references are scored: these numbers do not compare with those of all.")
    if metrics.get("references_per_picture") == "1":
        found.append("One reference a picture: the metrics were made for five, and compare with others of one only.")
    if metrics.get("without_blanks", 0) > 0:
        found.append(
            f"{metrics['without_blanks']:,} references are of a script without blanks between words, and count as one word "
            "each, so that nearly right is wrong: --tokenizer characters scores them by characters."
        )
    elif float(metrics.get("words_per_reference", 2)) < 2:
        found.append("Most references are one word: these metrics compare sentences.")
    if max(float(metrics.get("words_per_reference", 0)), metrics.get("mean_length", 0)) > LONG:
        found.append(
            f"Captions of more than {LONG} words: these metrics were made for one sentence, and say little of several."
        )
    if NO_CIDER in metrics.get("left_out", ""):
        found.append(f"CIDEr-D {NO_CIDER}.")
    if not math.isfinite(metrics.get("loss", 0.0)):
        found.append("The loss is no number: the model, or a picture, holds one that is not finite.")
    if "loss" in metrics and metrics["loss_shuffled_pictures"] - metrics["loss"] < 0.02:
        found.append(
            "The model ignores the picture: with the pictures shuffled its loss is "
            f"{metrics['loss_shuffled_pictures']:.3f} instead of {metrics['loss']:.3f}."
        )
    different = round(metrics["unique_captions"] * number)
    if number >= 20 and different <= max(1, 0.02 * number):
        found.append(f"Nearly the same caption for every picture: {different:,} for {number:,} pictures.")
    if metrics.get("cut_captions", 0) > 0.1:
        found.append(f"{metrics['cut_captions']:.0%} of the captions never ended and were cut off: raise --max-length.")
    return found


def read_results(results: Path, references: Path) -> tuple[list[int | str], list[str], list[list[str]]]:
    """Image ids, candidates and their references; see matched."""
    found = matched(results, references)
    return found.names, found.captions, found.references


class Matched(NamedTuple):
    """Captions and their references, picture by picture."""

    names: list[int | str]
    captions: list[str]
    references: list[list[str]]
    facts: dict[str, str]
    """What tables are to say of the matching."""
    domains: list[str]
    """Of each picture, where the references have domains."""


def matched(results: Path, references: Path, subset: bool = False) -> Matched:
    """Image ids, candidates and their references from two files.

    A candidate that is there again, as distributed samplers fill up with, is dropped and counted. Raises UserError unless
    each picture of the references (with subset: any of them) has one candidate, and no other picture has one; but
    candidates of pictures whose references were all rejected (VizWiz) are dropped as well.
    """
    known: dict[int | str, list[str]] = defaultdict(list)
    for image, caption in read_captions(references):
        known[image].append(caption)
    domains, rejected, unscored = read_pictures(references, known)
    if not known:
        raise UserError(f"{references}: no captions in it: name a file of references")
    entries = [(image, caption) for image, caption in read_captions(results) if image not in unscored]
    times = Counter(image for image, _ in dict.fromkeys(entries))
    if len(times) < times.total():
        image, number = times.most_common(1)[0]
        raise UserError(f"{results}: {number} captions for picture {in_one_line(str(image))}: give one for each")
    partners = _partners(times, known)
    captions = {partners[image]: caption for image, caption in entries if image in partners}
    lacking = [image for image in known if image not in captions]
    odd = [image for image in times if image not in partners]
    advice = "both need the same pictures" + (", or say --subset" if captions and not odd else "")
    others = lacking or list(known)
    if odd and {*map(type, odd)} != {*map(type, others)}:
        advice = in_one_line(f"the types of the ids differ, {odd[0]!r} here and {others[0]!r} there")
    for images, problem in ((lacking, "no caption for {} pictures of"), (odd, "{} pictures that are not in")):
        if images and (images is odd or not subset or not captions):
            some = in_one_line(", ".join(map(str, images[:3])))
            raise UserError(f"{results}: {problem.format(len(images))} {references} ({some}): {advice}")
    facts = {"subset": f"{len(captions):,} of the {len(known):,} pictures"} if lacking else {}
    if again := len(entries) - len(times):
        facts["equal_captions_dropped"] = f"{again:,}"
    if rejected:
        facts["references_rejected"] = f"{rejected:,}, and so {len(unscored):,} pictures without any"
    names = [image for image in known if image in captions]
    own_domains = [domains[image] for image in names if image in domains]
    if len(own_domains) < len(names):
        own_domains = []
    return Matched(names, [captions[image] for image in names], [known[image] for image in names], facts, own_domains)


def read_pictures(path: Path, known: Collection[int | str]) -> tuple[dict[int | str, str], int, set[int | str]]:
    """Of a file of references: {picture: its domain}, how many references were rejected, and the pictures that have none
    but such."""
    try:
        content = json_of(path.read_bytes())
    except ValueError:  # JSON lines
        return {}, 0, set()
    lists = [content.get(name) if isinstance(content, dict) else None for name in ("images", "annotations")]
    images, annotations = ([e for e in own if isinstance(e, dict)] if isinstance(own, list) else [] for own in lists)
    named = ((image.get("id"), str(image.get("domain"))) for image in images)
    domains = {
        image: domain for image, domain in named if isinstance(image, int | str) and re.fullmatch(DOMAIN, domain)
    }
    rejected = [entry.get("image_id") for entry in annotations if is_rejected(entry)]
    return domains, len(rejected), {image for image in rejected if isinstance(image, int | str)} - set(known)


def is_rejected(entry: Any) -> bool:
    """Whether an annotation of VizWiz is not to count: rejected, or one of the sentences for pictures that show nothing."""
    return isinstance(entry, dict) and any(entry.get(name) is True for name in ("is_rejected", "is_precanned"))


def _partners(ids: Collection[int | str], known: Collection[int | str]) -> dict[int | str, int | str]:
    """{id: the known one that it means}: the same, or, where either is the only one of its kind, the one alike."""
    partners = {image: image for image in ids if image in known}
    alike: dict[int | str, tuple[list[int | str], list[int | str]]] = defaultdict(lambda: ([], []))
    for side, images in enumerate((ids, known)):
        for image in images:
            if image not in partners:
                alike[_number(image)][side].append(image)
    return partners | {own[0]: others[0] for own, others in alike.values() if len(own) == len(others) == 1}


def _number(image: int | str) -> int | str:
    """The number in "042", "42.0", COCO_val2014_000000000042.jpg; of other names what is between folder and suffix."""
    name = re.sub(r".*[/\\]|\.[A-Za-z]\w*$", "", str(image))
    number = re.fullmatch(r"(?:COCO_\w+_)?(\d{1,99})(?:\.0+)?", name)
    return int(number[1]) if number else name


def read_captions(path: Path) -> list[tuple[int | str, str]]:
    """Image id (or file name) and caption of each entry of COCO's results or annotations, JSON lines, {id: caption}."""
    try:
        entries = []
        for image, caption in _entries(path.read_bytes()):
            image = int(image) if type(image) is float and image.is_integer() else image
            if type(image) not in (int, str) or not isinstance(caption, str):
                raise TypeError(f"picture {image!r}, caption {caption!r}")
            f"{image}{caption}".encode()  # half a character is refused here, as no file can hold it
            entries.append((image, caption))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = in_one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{path}: not in COCO's format ({reason}): expected [{{image_id, caption}}, ...]") from error
    return entries


def _entries(data: bytes) -> Iterator[tuple[Any, Any]]:
    """(image, caption) of each entry, whatever they are."""

    def fields(pairs: list[tuple[str, Any]]) -> Any:
        """A dictionary, or the pairs where a key is there twice: of these json keeps the last one only."""
        return dict(pairs) if len(dict(pairs)) == len(pairs) else pairs

    text, decoder = data.decode(json.detect_encoding(data)).strip(), json.JSONDecoder(object_pairs_hook=fields)
    values: list[Any] = []
    end = 0
    while end < len(text) or not values:  # one value, or one a line
        value, end = decoder.raw_decode(text, re.compile(r"\s*").match(text, end).end())  # type: ignore[union-attr]
        values.append(value)
    content = values[0] if len(values) == 1 else values
    if isinstance(content, dict):
        named = content.get("annotations", content.get("data"))  # TextCaps calls them data
        content = named if isinstance(named, list) else [content] if "caption" in content else content.items()
    for entry in content:
        if isinstance(entry, tuple):  # id and caption, or captions
            yield from ((entry[0], caption) for caption in (entry[1] if isinstance(entry[1], list) else entry[1:]))
        elif list(entry) != [MADE_BY] and not is_rejected(entry):
            yield entry.get("image_id", entry.get("file_name")), entry.get("caption", entry.get("caption_str"))


def compare(
    a: Path,
    b: Path,
    references: Path,
    frequencies: CiderD | None = None,
    subset: bool = False,
    tokenizer: str = "ptb",
) -> dict[str, Any]:
    """Whether results b are better than results a on the same pictures: prints a table, and returns it."""
    names, ours, known, facts, _ = matched(a, references, subset)
    others, theirs, _, other_facts, _ = matched(b, references, subset)
    if names != others:
        raise UserError(f"{a} and {b}: captions of other pictures: name files for the same ones")
    words = TOKENIZERS[tokenizer]
    known_words = [list(map(words, captions)) for captions in known]
    first, second = (Statistics(list(map(words, own)), known_words, frequencies) for own in (ours, theirs))
    table: dict[str, Any] = about_scores(len(known), known, frequencies, tokenizer)
    sides = {"a": (a, facts), "b": (b, other_facts)}
    table |= {side: {"captions": str(path), **about_results(path), **more} for side, (path, more) in sides.items()}
    for name, said in table.items():
        text = ", ".join(f"{k} {v}" for k, v in said.items()) if isinstance(said, dict) else said
        print(f"{name:22} {shown(text)}")
    print("differences with 95 % intervals by paired bootstrap")
    print(f"{'':10} {'A':>8} {'B':>8} {'B - A':>9}  {'95 % interval':^19} {'p':>6}")
    before, after = first.scores(), second.scores()
    few = len(known) < FEWEST
    for name, found in first.differences(second).items():
        if name == "cider_d" and not first.has_cider:
            table["left_out"] = f"CIDEr-D {NO_CIDER}"
            continue
        table[name] = {"a": before[name], "b": after[name], **found._asdict(), **({"p_value": None} if few else {})}
        low, high = found.interval
        scores = f"{before[name]:8.4f} {after[name]:8.4f} {found.difference:+9.4f}"
        print(f"{name:10} {scores}  {low:+8.4f} to {high:+8.4f} {'-' if few else f'{found.p_value:.3f}':>6}")
    if "left_out" in table:
        print(f"WARNING: {table['left_out']}")
    if few:
        print(f"WARNING: no p for fewer than {FEWEST} pictures: what {len(known)} show is chance")
    for side in ("a", "b"):
        if seen := table[side].get("pictures_trained_on"):
            print(f"WARNING: {side.upper()}: {seen:,} of the {len(known):,} pictures were trained on")
    return table


def print_metrics(metrics: dict[str, Any]) -> None:
    """One line a metric, with its 95 % interval where there is one; then what to know before they are believed."""
    for name, value in metrics.items():
        if name.rsplit("_", 1)[-1] in ENDS:
            continue
        low, high = (metrics.get(f"{name}_{end}") for end in ENDS)
        interval = "" if low is None else f"   ({low:.4f} to {high:.4f})"
        print(f"{name:26} {value:.4f}{interval}" if isinstance(value, float) else f"{name:26} {shown(value)}")
    for warning in warnings_about(metrics):
        print(f"WARNING: {warning}")
