"""Score captions of any origin against references, compare them, and write the results to files.

A folder of results holds captions.json and references.json (COCO's formats), per_picture.csv and report.html. This file
does not depend on models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from config import FEW, UserError
from data.pictures import PictureSource
from data.pictures import decode as decode_picture
from scoring.matching import matched
from scoring.metrics import (
    CiderD,
    Scores,
    Statistics,
    diversity,
    mean_intervals,
    novelty,
    self_cider,
    tokenize,
)
from scoring.report import THUMBNAIL, Report, write_report
from scoring.tokens import TOKENIZERS, without_spaces
from utils import file_hash, json_of, read_log, shown, write_csv, write_json

ENDS = ("low", "high")  # of a 95 % interval
FEWEST = 30  # smallest number of pictures for which p is given
LONG = 40  # longer captions, in words, get a warning
ABOUT_WORDS = {
    "ptb": "PTB, by metrics.tokenize",
    "characters": "PTB and characters, by metrics.characters",
    "icu": "PTB and ICU's words, by tokens.icu",
}
NO_CIDER = "cannot be computed, as each word is in every picture's references"


@dataclass
class Captioned:
    """Captions of a loader's pictures, in its order: rows of its table, captions, references, which were cut off."""

    rows: list[int]
    captions: list[str]
    references: list[list[str]]
    cut: list[bool]
    several: list[list[str]] = field(default_factory=list)
    """All captions of each picture, if several were generated; the first is the one in captions."""
    frequencies: CiderD | None = None
    """Document frequencies to score with (default: those of the references)."""
    tokenizer: str = "ptb"
    """Splits captions into words: one of TOKENIZERS."""
    domains: list[str] = field(default_factory=list)
    """Domain of each picture, if the benchmark has several (nocaps: in-domain, near-domain, out-domain)."""
    confidences: list[float] = field(default_factory=list)
    """Geometric mean of the probabilities of each caption's tokens, if requested."""

    @cached_property
    def statistics(self) -> Statistics:
        """The counts behind all metrics, computed once."""
        words = TOKENIZERS[self.tokenizer]
        known = [list(map(words, captions)) for captions in self.references]
        return Statistics(list(map(words, self.captions)), known, self.frequencies)

    def by_domain(self) -> Iterator[tuple[str, Statistics]]:
        """(name, statistics) of each domain, with document frequencies of that domain only, as on nocaps' server."""
        words, known = (
            self.statistics.candidates,
            [list(map(TOKENIZERS[self.tokenizer], captions)) for captions in self.references],
        )
        for domain in sorted(set(self.domains)):
            rows = [row for row, other in enumerate(self.domains) if other == domain]
            domain_words, domain_known = [words[row] for row in rows], [known[row] for row in rows]
            yield domain.replace("-", "_"), Statistics(domain_words, domain_known, self.frequencies)

    @cached_property
    def self_cider(self) -> Scores | None:
        """How different the captions of a picture are; None where there is only one."""
        several = [list(map(TOKENIZERS[self.tokenizer], captions)) for captions in self.several]
        return self_cider(several, self.statistics.frequencies) if several else None

    def metrics(self) -> dict[str, float]:
        """BLEU-1 to 4, ROUGE-L, CIDEr-D, diversity, and the share of captions cut off at max_length."""
        scores = self.statistics.scores() | diversity(self.statistics.candidates)
        if self.self_cider:
            scores["self_cider"] = self.self_cider.corpus
        return scores | ({"cut_captions": sum(self.cut) / len(self.cut)} if self.cut else {})


@dataclass(frozen=True)
class MoreScores:
    """Further scores that are requested: METEOR; SPICE, by Java; CHAIR, with COCO's instances; CLIPScore and PAC-S, by
    a CLIP each; the share of captions that are not among the training captions. Also the document frequencies for
    CIDEr-D, and the tokenizer."""

    meteor: bool = False
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
        """Corpus scores, scores of each picture, and a note for each metric that was skipped."""
        from scoring.chair import chair
        from scoring.clip import clip_scores
        from scoring.java import java_scores

        corpus: dict[str, float] = {}
        each: dict[str, Sequence[float]] = {}
        notes = ["METEOR and SPICE: not asked for (--java)"]
        if self.meteor or self.java:
            java = java_scores(captions, references, spice=self.java)
            corpus, each, notes = dict(java.corpus), dict(java.per_picture), list(java.notes)
            notes += [] if self.java else ["SPICE: not asked for (--java)"]
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
                    notes.append(f"{name}: no pictures, name a model and --data-dir")
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
    """Facts that must be equal for numbers to be compared, whatever wrote the captions."""
    counted = f"of the {number:,} picture{'s' * (number > 1)} evaluated"
    if frequencies:
        counted = f"of {frequencies.num_pictures:,} pictures, from {frequencies.path}"
    known, words = [text for own in references for text in own], TOKENIZERS[tokenizer]
    length = sum(len(text.split() if words is tokenize else words(text)) for text in known)  # split() is close enough
    return {
        "tokenizer": ABOUT_WORDS[tokenizer],
        "document_frequencies": counted,
        "pictures": number,
        "references_per_picture": f"{len(known) / number:.4g}",
        "words_per_reference": f"{length / len(known):.4g}",
        **({"without_blanks": unspaced} if words is tokenize and (unspaced := sum(map(without_spaces, known))) else {}),
    }


def about_results(results: Path) -> dict[str, Any]:
    """How a file of captions was made, by the metrics.json of the evaluation that wrote it; else "unknown"."""
    facts: dict[str, Any] = {"decoding": "unknown", "weights_sha256": "unknown"}
    try:
        found = json_of((results.parent / "metrics.json").read_text(encoding="utf-8"))
        if found["captions_sha256"] == file_hash(results):
            names = ("data", "split", *facts, "precision", "pictures_trained_on")
            return {n: found[n] for n in names if isinstance(found.get(n), int if n == "pictures_trained_on" else str)}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not the folder of an evaluation
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
    """Write captions.json and references.json (COCO's formats), per_picture.csv and report.html to the folder, and
    all_captions.json where pictures have several captions.

    Returns everything for the table of results: the metrics (those in known, and those computed here), the facts about
    them, and their 95 % intervals.
    """
    captions, references = captioned.captions, captioned.references
    added, added_each, left_out = more.score(names, captions, references, picture)
    write_captions(directory, captioned, names)
    numbers = captioned.metrics() | known | added
    intervals = captioned.statistics.intervals()
    intervals |= mean_intervals(
        {n: values for n, values in added_each.items() if n != "meteor"}
    )  # METEOR of the corpus is not the mean over pictures
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
        **({"java_tokenizer": "Stanford's own, for SPICE"} if more.java else {}),
        **({"training_captions": len(more.training_captions)} if more.training_captions else {}),
        "captions_sha256": file_hash(directory / "captions.json"),
        "left_out": "; ".join(left_out) or "nothing",
    }
    scored = captioned.statistics.per_picture()
    first = ("cider_d",) if captioned.statistics.has_cider else ()  # first, as pictures are ranked by it
    names_of = dict.fromkeys((*first, *(name for name in scored if name != "cider_d")))
    each: dict[str, Sequence[float]] = {name: scored[name].tolist() for name in names_of} | added_each
    if captioned.self_cider:
        each["self_cider"] = captioned.self_cider.per_picture.tolist()
    if captioned.confidences:
        each["confidence"] = captioned.confidences
    rows = zip(names, captions, *([f"{x:.6f}" for x in scores] for scores in each.values()), strict=True)
    write_csv(directory / "per_picture.csv", [("picture", "caption", *each), *rows])
    report = Report(
        title=title,
        facts={name.replace("_", " "): f"{fact:,}" if isinstance(fact, int) else fact for name, fact in facts.items()},
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
    """Write captions.json, references.json, and all_captions.json where pictures have several captions."""
    pairs = zip(names, captioned.captions, strict=True)
    write_json(directory / "captions.json", [{"image_id": name, "caption": caption} for name, caption in pairs])
    texts = [(name, text) for name, known in zip(names, captioned.references, strict=True) for text in known]
    annotations = [{"id": i, "image_id": name, "caption": text} for i, (name, text) in enumerate(texts)]
    write_json(directory / "references.json", {"images": [{"id": i} for i in names], "annotations": annotations})
    if captioned.several:
        several = zip(names, captioned.several, strict=True)
        write_json(directory / "all_captions.json", [{"image_id": name, "captions": each} for name, each in several])


def warnings_about(metrics: dict[str, Any]) -> list[str]:
    """Warnings about the numbers, for the user."""
    number, found = metrics["pictures"], []
    if number < FEW:
        found.append(
            f"These numbers come from {number:,} picture{'s' * (number > 1)}: below {FEW} they are mostly chance."
        )
    if trained := metrics.get("pictures_trained_on"):
        found.append(
            f"{trained:,} of the {number:,} pictures were trained on: these numbers do not show how good the model is "
            "on new pictures."
        )
    if part := metrics.get("subset"):
        found.append(f"Only {part} of the references are scored: do not compare them with numbers of all references.")
    if metrics.get("references_per_picture") == "1":
        found.append(
            "One reference per picture: the metrics were made for five. Compare only with numbers of one reference."
        )
    if metrics.get("without_blanks", 0) > 0:
        found.append(
            f"{metrics['without_blanks']:,} references are in a script without spaces between words and count as one word "
            "each, so nearly right captions score 0: add --tokenizer icu, or --tokenizer characters."
        )
    elif float(metrics.get("words_per_reference", 2)) < 2:
        found.append("Most references are one word: these metrics compare sentences.")
    if max(float(metrics.get("words_per_reference", 0)), metrics.get("mean_length", 0)) > LONG:
        found.append(
            f"Captions of more than {LONG} words: these metrics were made for one sentence, and mean little for several."
        )
    if NO_CIDER in metrics.get("left_out", ""):
        found.append(f"CIDEr-D {NO_CIDER}.")
    if not math.isfinite(metrics.get("loss", 0.0)):
        found.append("The loss is not finite: the model or a picture holds a value that is not finite.")
    if "loss" in metrics and metrics["loss_shuffled_pictures"] - metrics["loss"] < 0.02:
        found.append(
            "The model ignores the picture: with the pictures shuffled its loss is "
            f"{metrics['loss_shuffled_pictures']:.3f} instead of {metrics['loss']:.3f}."
        )
    different = round(metrics["unique_captions"] * number)
    if number >= 20 and different <= max(1, 0.02 * number):
        found.append(f"Nearly the same caption for every picture: {different:,} for {number:,} pictures.")
    if metrics.get("cut_captions", 0) > 0.1:
        found.append(
            f"{metrics['cut_captions']:.0%} of the captions were cut off at the length limit: raise "
            "--max-length of evaluate.py, --caption-length of main.py."
        )
    return found


def compare(
    a: Path,
    b: Path,
    references: Path,
    frequencies: CiderD | None = None,
    subset: bool = False,
    tokenizer: str = "ptb",
) -> dict[str, Any]:
    """Test whether results b are better than results a on the same pictures; print a table, and return its values.

    frequencies: document frequencies for CIDEr-D; subset: accept results for only some of the references' pictures.
    """
    names, ours, known, facts, _ = matched(a, references, subset)
    others, theirs, _, other_facts, _ = matched(b, references, subset)
    if names != others:
        raise UserError(f"{a} and {b}: captions of different pictures: name files of the same pictures")
    words = TOKENIZERS[tokenizer]
    known_words = [list(map(words, captions)) for captions in known]
    first, second = (Statistics(list(map(words, captions)), known_words, frequencies) for captions in (ours, theirs))
    table: dict[str, Any] = about_scores(len(known), known, frequencies, tokenizer)
    sides = {"a": (a, facts), "b": (b, other_facts)}
    table |= {side: {"captions": str(path), **about_results(path), **more} for side, (path, more) in sides.items()}
    for name, fact in table.items():
        text = ", ".join(f"{k} {v}" for k, v in fact.items()) if isinstance(fact, dict) else fact
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
        print(f"WARNING: no p for fewer than {FEWEST} pictures: differences on {len(known)} are mostly chance")
    for side in ("a", "b"):
        if trained := table[side].get("pictures_trained_on"):
            print(f"WARNING: {side.upper()}: {trained:,} of the {len(known):,} pictures were trained on")
    return table


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print one line per metric, with its 95 % interval where there is one, then the warnings."""
    for name, value in metrics.items():
        if name.rsplit("_", 1)[-1] in ENDS:
            continue
        low, high = (metrics.get(f"{name}_{end}") for end in ENDS)
        interval = "" if low is None else f"   ({low:.4f} to {high:.4f})"
        print(f"{name:26} {value:.4f}{interval}" if isinstance(value, float) else f"{name:26} {shown(value)}")
    for warning in warnings_about(metrics):
        print(f"WARNING: {warning}")
