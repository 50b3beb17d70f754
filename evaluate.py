"""A model, or a file of captions, against references: numbers, captions, a report, a contact sheet.

    python evaluate.py MODEL --data-dir flickr8k
    python evaluate.py MODEL --data-dir flickr8k --split test
    python evaluate.py --results captions.json --references captions_val2014.json
    python evaluate.py --compare a/captions.json b/captions.json --references a/references.json

Models and settings are chosen on the val part, which is the default; the test part is for the number at the end.
Decodes with 3 beams and no sampling unless told. Imports config, model, metrics, pictures, report, dataset, table and
utils.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from config import UserError
from dataset import CaptionDataset, decode, load_picture, load_table, make_dataloader, to_device
from metrics import CiderD, Scores, Statistics, diversity, novelty, self_cider, tokenize
from model import ImageCaptionModel
from pictures import PictureSource, in_one_line
from pictures import decode as decode_picture
from report import THUMBNAIL, Report, write_report
from table import CaptionTable
from utils import (
    autocast,
    choose_device,
    choose_precision,
    file_hash,
    parse_flags,
    read_log,
    run_script,
    writable_directory,
    write_json,
)

NUM_BEAMS = 3
SEED = 0  # of sampling
ENDS = ("low", "high")  # of a 95 % interval


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

    @cached_property
    def statistics(self) -> Statistics:
        """All n-grams, counted once."""
        return Statistics(self.captions, self.references, self.frequencies)

    @cached_property
    def self_cider(self) -> Scores | None:
        """How different the captions of a picture are, where there are several."""
        return self_cider(self.several, self.statistics.frequencies) if self.several else None

    def metrics(self) -> dict[str, float]:
        """BLEU-1..4, ROUGE-L and CIDEr-D, how varied the captions are, and the share cut off at max_length."""
        scores = self.statistics.scores() | diversity(self.statistics.candidates)
        if self.self_cider:
            scores["self_cider"] = self.self_cider.corpus
        return scores | ({"cut_captions": sum(self.cut) / len(self.cut)} if self.cut else {})


def caption_loader(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    **decoding: Any,
) -> Captioned:
    """Captions every picture of the loader; `decoding` goes to model.generate, with 3 beams unless it samples.

    Samples are the same every time. With num_return_sequences all captions of a picture are kept beside the first.
    """
    decoding = default_decoding(decoding)
    if decoding.get("do_sample"):
        decoding = {"generator": torch.Generator(device).manual_seed(SEED)} | decoding
    number = decoding.get("num_return_sequences", 1)
    result = Captioned([], [], [], [])
    was_training = model.training
    model.eval()  # for all of them: in training mode generate keeps nothing from batch to batch
    for batch in tqdm(dataloader, "captioning", unit="batch", disable=not progress):
        with autocast(device, dtype):
            sequences = model.generate(batch["pixel_values"].to(device), **decoding).sequences.cpu()
        bad = {row for row, _ in batch.get("bad", ())}
        good = [place for place, row in enumerate(batch["rows"]) if row not in bad]
        texts = decode(tokenizer, sequences)
        captions = [texts[number * place : number * (place + 1)] for place in good]
        result.rows += [batch["rows"][place] for place in good]
        result.captions += [own[0] for own in captions]
        result.several += captions if number > 1 else []
        result.references += [batch["captions"][place] for place in good]
        result.cut += (sequences[::number][good] != model.config.end_token_id).all(-1).tolist()
    model.train(was_training)
    return result


def default_decoding(decoding: dict[str, Any]) -> dict[str, Any]:
    """The options given, and as many beams as evaluations search with."""
    given = {name: value for name, value in decoding.items() if value is not None}
    beams = 1 if given.get("do_sample") else max(NUM_BEAMS, given.get("num_return_sequences", 1))
    return {"num_beams": beams} | given


def evaluate_captions(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device | str,
    **decoding: Any,
) -> dict[str, float]:
    """All metrics of a model on a loader, as fractions (CIDEr-D on its scale of 0 to 10)."""
    device = torch.device(device)
    dtype, _ = choose_precision("auto", device)
    return caption_loader(model.to(device), dataloader, tokenizer, device, dtype, **decoding).metrics()


def evaluate(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device | str,
    **decoding: Any,
) -> float:
    """BLEU-4 of a model on a loader, between 0 and 1."""
    return evaluate_captions(model, dataloader, tokenizer, device, **decoding)["bleu_4"]


@torch.no_grad()
def caption_loss(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    device: torch.device,
    dtype: torch.dtype,
    shuffle_pictures: bool = False,
) -> float:
    """Mean negative log likelihood of a reference token, in nats.

    With shuffle_pictures each picture gets its neighbour's captions: a model that looks at pictures must lose by it.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    other = None
    for batch in dataloader:
        batch = to_device(batch, device)
        pixels: Tensor = batch["pixel_values"]
        if shuffle_pictures:  # a batch of one takes the last picture of the batch before it
            pixels, other = pixels.roll(1, 0) if len(pixels) > 1 or other is None else other, pixels[-1:]
        tokens = int(batch["lengths"].sum())
        with autocast(device, dtype):
            output = model(
                pixels,
                batch["input_ids"],
                batch["lengths"],
                batch["labels"],
                batch["positions"],
            )
        total, count = total + output.loss.item() * tokens, count + tokens
    model.train(was_training)
    return total / max(1, count)


def contact_sheet(
    path: Path, pictures: Sequence[Tensor], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Pictures (uint8 (3, S, S)) in a grid, each with its caption and, in grey, two references."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns, width = 4, 34
    rows = -(-len(pictures) // columns)
    with pyplot.rc_context({"text.parse_math": False}):  # a $ in a caption is no formula
        figure, axes = pyplot.subplots(rows, columns, figsize=(columns * 3.2, rows * 4.1), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, picture, caption, known in zip(axes.flat, pictures, captions, references, strict=False):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            lines = textwrap.wrap(caption, width) or ["(nothing)"]
            place = {"transform": axis.transAxes, "va": "top"}
            axis.text(0, -0.03, "\n".join(lines), weight="bold", size=9.5, **place)
            grey = "\n".join(textwrap.shorten(text, 44, placeholder="…") for text in known[:2])
            axis.text(0, -0.05 - 0.075 * len(lines), grey, color="0.4", size=8, **place)
        figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.1, hspace=0.45, wspace=0.1)
        figure.savefig(path, dpi=90)
        pyplot.close(figure)


def evaluate_dataset(
    model: ImageCaptionModel,
    dataset: CaptionDataset,
    device: torch.device,
    dtype: torch.dtype,
    directory: Path,
    batch_size: int = 64,
    bad: BadPictures | None = None,
    more: MoreScores | None = None,
    **decoding: Any,
) -> tuple[Captioned, dict[str, Any]]:
    """Captions and scores a data set; writes what write_evaluation does, and samples.png, into the folder.

    The metrics hold, besides the caption metrics, the loss with the right pictures and with each other's. Pictures that
    are missing or damaged are left out, counted, and named in the folder's bad_samples.csv.
    """
    table, more = dataset.table, more or MoreScores()
    bad = bad or BadPictures(directory / "bad_samples.csv", [dataset.table])
    loader = make_dataloader(dataset, batch_size)
    captioned = caption_loader(model, loader, model.tokenizer, device, dtype, **decoding)
    captioned.frequencies = more.frequencies
    bad.add_known(dataset)
    if not captioned.captions:
        raise UserError(f"{table.root}: no picture of the {table.split} part can be read")
    rows = captioned.rows
    metrics = write_evaluation(
        directory,
        f"{table.split} pictures of {table.root.name}",
        captioned,
        [table.id_of(row) for row in rows],
        {
            "loss": caption_loss(model, loader, device, dtype),
            "loss_shuffled_pictures": caption_loss(model, loader, device, dtype, shuffle_pictures=True),
            "pictures_left_out": len(table) + len(table.missing) - len(rows),
            "pictures_trained_on": len(pictures_seen(model.trained_on, table)),
        },
        {
            "data": table.root.name,
            "split": table.split,
            **about_decoding(model, decoding),
            "precision": str(dtype).removeprefix("torch."),
        },
        more,
        lambda i: table.picture(rows[i]),
    )
    number = len(captioned.captions)
    chosen = range(0, number, max(1, number // 12))[:12]  # spread over the set: good and bad as they fall
    contact_sheet(
        directory / "samples.png",
        [load_picture(table.picture(rows[i]), 256) for i in chosen],
        [captioned.captions[i] for i in chosen],
        [captioned.references[i] for i in chosen],
    )
    return captioned, metrics


@dataclass(frozen=True)
class MoreScores:
    """What is wanted besides: of scorers.py METEOR and SPICE by Java, CHAIR with COCO's instances, CLIPScore by a CLIP;
    CIDEr-D with other document frequencies; the share of captions that are not among those trained on."""

    java: bool = False
    instances: Path | None = None
    clip: str | None = None
    frequencies: CiderD | None = None
    training_captions: Sequence[str] | None = None

    def score(
        self,
        names: Sequence[int | str],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
        picture: Callable[[int], PictureSource] | None,
    ) -> tuple[dict[str, float], dict[str, Sequence[float]], list[str]]:
        """The numbers, those of each picture, and a line for each metric that was left out."""
        from scorers import chair, clip_scores, java_scores

        corpus: dict[str, float] = {}
        each: dict[str, Sequence[float]] = {}
        notes = [] if self.java else ["METEOR and SPICE: not asked for (--java)"]
        if self.java:
            found = java_scores(captions, references)
            corpus, each, notes = dict(found.corpus), dict(found.per_picture), list(found.notes)
        try:
            if self.instances:
                known = dict(zip(names, references, strict=True))
                objects = chair(dict(zip(names, captions, strict=True)), self.instances, known)
                corpus |= {"chair_s": objects.chair_s, "chair_i": objects.chair_i}
        except UserError as error:
            notes.append(f"CHAIR: {error}")
        try:
            if self.clip and picture:
                clip = clip_scores(captions, [picture(i) for i in range(len(captions))], references, self.clip)
                corpus |= clip.corpus
                each |= {name: scores.tolist() for name, scores in clip.per_picture.items()}
        except UserError as error:
            notes.append(f"CLIPScore: {error}")
        if self.training_captions is None:
            notes.append("share of new captions: no training captions at hand")
        else:
            corpus["novel_captions"] = novelty(captions, self.training_captions)
        return corpus, each, notes


def about_decoding(model: ImageCaptionModel, decoding: dict[str, Any]) -> dict[str, str]:
    """Which weights wrote captions, and how."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    options = {"max_length": min(32, model.config.max_length)} | default_decoding(decoding)
    if options.get("do_sample"):
        options["seed"] = SEED
    said = ", ".join(f"{name} {value}" for name, value in options.items() if value is not False)
    return {"weights_sha256": digest.hexdigest(), "decoding": said}


def about_scores(number: int, references: Sequence[Sequence[str]], frequencies: CiderD | None) -> dict[str, Any]:
    """What numbers must share to be compared, whoever wrote the captions."""
    return {
        "tokenizer": "PTB, by metrics.tokenize",
        "document_frequencies": f"of {frequencies.num_pictures:,} pictures, from {frequencies.path}"
        if frequencies
        else f"of the {number:,} pictures evaluated",
        "pictures": number,
        "references_per_picture": f"{sum(map(len, references)) / number:.4g}",
    }


def about_results(results: Path) -> dict[str, Any]:
    """What the evaluation that wrote a file of captions said of their making; unknown for anybody else's."""
    facts: dict[str, Any] = {"decoding": "unknown", "weights_sha256": "unknown"}
    try:
        said = json.loads((results.parent / "metrics.json").read_text(encoding="utf-8"))
        if said["captions_sha256"] == file_hash(results):
            names = ("data", "split", *facts, "precision", "pictures_trained_on")
            return {name: said[name] for name in names if name in said}
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
    write_json(
        directory / "captions.json",
        [{"image_id": name, "caption": caption} for name, caption in zip(names, captions, strict=True)],
    )
    texts = [(name, text) for name, own in zip(names, references, strict=True) for text in own]
    annotations = [{"id": i, "image_id": name, "caption": text} for i, (name, text) in enumerate(texts)]
    write_json(directory / "references.json", {"images": [{"id": i} for i in names], "annotations": annotations})
    if captioned.several:
        several = zip(names, captioned.several, strict=True)
        write_json(directory / "all_captions.json", [{"image_id": name, "captions": own} for name, own in several])
    numbers = captioned.metrics() | known | added
    facts = {
        **about_scores(len(captions), references, captioned.frequencies),
        **about,
        **({"java_tokenizer": "Stanford's own, for METEOR and SPICE"} if more.java else {}),
        **({"training_captions": len(more.training_captions)} if more.training_captions else {}),
        "captions_sha256": file_hash(directory / "captions.json"),
        "left_out": "; ".join(left_out) or "nothing",
    }
    scored = captioned.statistics.per_picture()
    each: dict[str, Sequence[float]] = {"cider_d": scored["cider_d"].tolist()}  # first, as pictures are ranked by it
    each |= {name: scores.tolist() for name, scores in scored.items()} | added_each
    if captioned.self_cider:
        each["self_cider"] = captioned.self_cider.per_picture.tolist()
    with open(directory / "per_picture.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "caption", *each])
        writer.writerows(zip(names, captions, *([f"{x:.6f}" for x in scores] for scores in each.values()), strict=True))
    intervals = captioned.statistics.intervals()
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


def warnings_about(metrics: dict[str, Any]) -> list[str]:
    """What to know before the numbers are believed."""
    number, found = metrics["pictures"], []
    if seen := metrics.get("pictures_trained_on"):
        found.append(
            f"{seen:,} of the {number:,} pictures were trained on: these numbers say nothing about new pictures."
        )
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


def pictures_seen(trained_on: np.ndarray, table: CaptionTable) -> list[int]:
    """Rows of the table whose pictures a model was trained on."""
    return np.flatnonzero(np.isin(table.keys(), trained_on)).tolist()


def check_overlap(trained_on: np.ndarray, table: CaptionTable, allowed: bool) -> None:
    """Raises UserError unless allowed, where pictures of the table are among those that a model was trained on."""
    seen = pictures_seen(trained_on, table)
    if seen and not allowed:
        some = ", ".join(str(table.id_of(row)) for row in seen[:3])
        raise UserError(
            f"{len(seen):,} of the {len(table):,} {table.split} pictures ({some}{', ...' if len(seen) > 3 else ''}) were "
            "trained on, so a score on them means nothing: choose other pictures, or add --allow-overlap"
        )


class BadPictures:
    """Pictures that are missing or damaged: skipped, counted, named in a CSV file; too many of them are an error."""

    def __init__(self, path: Path, tables: Iterable[CaptionTable], most: float = 0.01, go_on: bool = False) -> None:
        """`most` is the largest share of the tables' pictures that may be so. What an earlier run has named in the file
        is taken over when going on with it, and gone otherwise."""
        self.path, self.most = path, most
        self.total = sum(len(table) + len(table.missing) for table in {id(table): table for table in tables}.values())
        self.found: dict[tuple[str, str], str] = {}
        """(part, picture) -> what is wrong."""
        if go_on and path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                self.found = {(part, picture): why for part, picture, why in list(csv.reader(file))[1:]}
        else:
            path.unlink(missing_ok=True)

    @property
    def notes(self) -> list[str]:
        """How many were found, in words."""
        return [f"{len(self.found):,} pictures skipped, named in {self.path}"] if self.found else []

    def add_known(self, dataset: CaptionDataset) -> None:
        """Takes over what is missing from the data set's table, and what has failed to decode."""
        table = dataset.table
        named = [(str(table.root / name), "no such file") for name in table.missing]
        self._add(table, [*named, *((table.name_of(row), reason) for row, reason in dataset.pixels.bad.items())])

    def add(self, dataset: CaptionDataset, rows: Sequence[tuple[int, str]]) -> None:
        """Takes over a batch's bad rows. Raises UserError where they become too many."""
        if rows:
            self._add(dataset.table, [(dataset.table.name_of(row), reason) for row, reason in rows])

    def _add(self, table: CaptionTable, named: Sequence[tuple[str, str]]) -> None:
        new = {(table.split, name): reason for name, reason in named if (table.split, name) not in self.found}
        if not new:
            return
        self.found |= new
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [("part", "picture", "reason"), *((*key, why) for key, why in self.found.items())]
            )
        if (number := len(self.found)) > self.most * self.total:
            raise UserError(
                f"{number:,} of {self.total:,} pictures are missing or damaged, {number / self.total:.1%} where "
                f"{self.most:.1%} are allowed: they are named in {self.path}, mend them or raise --max-bad-share"
            )


def read_results(results: Path, references: Path) -> tuple[list[int | str], list[str], list[list[str]]]:
    """Image ids, candidates in COCO's results format and their references from an annotation file, matched by the id.

    Raises UserError unless each picture of the references has one candidate, and no other picture has any.
    """
    entries = read_captions(results)
    known: dict[int | str, list[str]] = {}
    for image, caption in read_captions(references, annotations=True):
        known.setdefault(image, []).append(caption)
    candidates = dict(entries)
    if len(candidates) < len(entries):
        image, times = Counter(image for image, _ in entries).most_common(1)[0]
        raise UserError(f"{results}: {times} captions for picture {image}: give one for each")
    for found, others, problem in (
        (known, candidates, f"no caption for {{}} pictures of {references}"),
        (candidates, known, f"{{}} pictures that are not in {references}"),
    ):
        if odd := [in_one_line(str(image)) for image in found if image not in others]:
            raise UserError(
                f"{results}: {problem.format(len(odd))} ({', '.join(odd[:3])}): both need the same pictures"
            )
    return list(known), [candidates[image] for image in known], list(known.values())


def read_captions(path: Path, annotations: bool = False) -> list[tuple[int | str, str]]:
    """Image id and caption of each entry of a file in COCO's results format, or of COCO annotations."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [
            (entry["image_id"], entry["caption"]) for entry in (content["annotations"] if annotations else content)
        ]
        for image, caption in entries:
            if type(image) not in (int, str) or not isinstance(caption, str):
                raise TypeError(f"picture {image!r}, caption {caption!r}")
            f"{image}{caption}".encode()  # half a character is refused here, as no file can hold it
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = in_one_line(f"{type(error).__name__}: {error}")
        shape = "{annotations: [{image_id, caption}, ...]}" if annotations else "[{image_id, caption}, ...]"
        raise UserError(f"{path}: not in COCO's format ({reason}): expected {shape}") from error
    return entries


def compare(a: Path, b: Path, references: Path, frequencies: CiderD | None = None) -> dict[str, Any]:
    """Whether results b are better than results a on the same pictures: prints a table, and returns it."""
    _, ours, known = read_results(a, references)
    _, theirs, _ = read_results(b, references)
    known_words = [[tokenize(caption) for caption in captions] for captions in known]
    first, second = (Statistics(captions, known_words, frequencies) for captions in (ours, theirs))
    table: dict[str, Any] = about_scores(len(known), known, frequencies)
    table |= {side: {"captions": str(path), **about_results(path)} for side, path in (("a", a), ("b", b))}
    for name, said in table.items():
        print(f"{name:22} {', '.join(f'{k} {v}' for k, v in said.items()) if isinstance(said, dict) else said}")
    print("differences with 95 % intervals by paired bootstrap")
    print(f"{'':10} {'A':>8} {'B':>8} {'B - A':>9}  {'95 % interval':^19} {'p':>6}")
    before, after = first.scores(), second.scores()
    for name, found in first.differences(second).items():
        table[name] = {"a": before[name], "b": after[name], **found._asdict()}
        low, high = found.interval
        print(
            f"{name:10} {before[name]:8.4f} {after[name]:8.4f} {found.difference:+9.4f}  {low:+8.4f} to {high:+8.4f} {found.p_value:6.3f}"
        )
    for side in ("a", "b"):
        if seen := table[side].get("pictures_trained_on"):
            print(f"WARNING: {side.upper()}: {seen:,} of the {len(known):,} pictures were trained on")
    return table


@dataclass(kw_only=True)
class EvaluateConfig:
    """Score a model on a data set, or a file of captions against references."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """The model: a file, a folder or a Hub name."""
    data_dir: Path | None = None
    """Folder of the data."""
    dataset: str = "auto"
    """Layout of the data, recognised from the folder with auto; or user/name on the Hugging Face Hub."""
    image_column: str | None = None
    """Column of the pictures, where a table's has no usual name."""
    caption_column: str | None = None
    """Column of the captions, where a table's has no usual name."""
    max_bad_share: float = 0.01
    """Largest share of pictures that may be missing or damaged; they are left out and counted."""
    allow_overlap: bool = False
    """Score the model although it was trained on some of the pictures."""
    split: Literal["train", "val", "test"] = "val"
    """Which part of the data; test is for the number at the end, once all choices are made."""
    results: Path | None = None
    """Captions in COCO's results format, from anybody's model."""
    references: Path | None = None
    """COCO annotations that results are scored against, or the references.json of an evaluation."""
    compare: tuple[Path, Path] | None = None
    """Two files of captions in COCO's results format: is the second better?"""
    document_frequencies: Path | None = None
    """A .npz of metrics.CiderD(...).save: CIDEr-D with its frequencies, not those of the pictures evaluated."""
    java: bool = False
    """Also METEOR and SPICE, where Java and pycocoevalcap are (requirements-full.txt)."""
    instances: Path | None = None
    """COCO's instances_*.json of the pictures, for CHAIR: objects that are named and not there."""
    clip: str | None = None
    """A CLIP by its Hub name or folder, such as openai/clip-vit-base-patch32, for CLIPScore."""
    output_dir: Path = Path("evaluation")
    """Folder for metrics.json, captions.json, per_picture.csv, report.html and samples.png."""
    num_captions: int = 1
    """Captions of each picture: the first is scored, and self-CIDEr says how much they differ."""
    num_beams: int | None = None
    """Beams; 1 is greedy (default: 3, or as many as captions; 1 when sampling)."""
    length_penalty: float = 1.0
    """Above 0, longer captions win more often."""
    max_length: int | None = None
    """Longest caption, in tokens (default: 32, or what the model can hold)."""
    do_sample: bool = False
    """Draw each token by its probability, the same way every time."""
    temperature: float = 1.0
    """Of sampling; below 1 likely tokens become likelier."""
    top_k: int = 50
    """Sampling draws from so many tokens; 0 is all."""
    top_p: float = 1.0
    """Sampling draws from the likeliest tokens that share this probability, 0 to 1."""
    batch_size: int = 64
    """Pictures decoded at a time."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to run."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    """Of matrix products; int8 for captions on a CPU."""
    debug: bool = False
    """Show tracebacks of errors."""


def main() -> None:
    """The command line."""
    config = parse_flags(EvaluateConfig, __doc__)
    frequencies = CiderD.load(config.document_frequencies) if config.document_frequencies else None
    more = MoreScores(config.java, config.instances, config.clip, frequencies)
    if config.compare and config.references:
        differences = compare(*config.compare, config.references, frequencies)
        write_json(writable_directory(config.output_dir) / "comparison.json", differences)
        return
    if config.results and config.references:
        names, captions, known = read_results(config.results, config.references)
        directory = writable_directory(config.output_dir)
        title = f"{config.results.name} against {config.references.name}"
        about = {"results": str(config.results), "references": str(config.references), **about_results(config.results)}
        captioned = Captioned([], captions, known, [], frequencies=frequencies)
        metrics = write_evaluation(directory, title, captioned, names, {}, about, more)
    elif config.model and (config.data_dir or "/" in config.dataset):
        model = ImageCaptionModel.from_pretrained(config.model)
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
        data_dir = config.data_dir or Path()
        table = load_table(config.dataset, data_dir, config.split, **columns)
        check_overlap(model.trained_on, table, config.allow_overlap)
        if table.split == "test":
            print("the test part is for the number at the end: choose models and settings on val")
        if table.split != "train":
            with contextlib.suppress(UserError):  # no such part, or none of its pictures: then it is left out
                trained = load_table(config.dataset, data_dir, "train", **columns)
                more = dataclasses.replace(more, training_captions=trained.captions().to_pylist())
        device, _ = choose_device(config.device)
        dtype, _ = choose_precision(config.precision, device)
        directory = writable_directory(config.output_dir)
        data = CaptionDataset(table, model.tokenizer, model.config)
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        _, metrics = evaluate_dataset(
            model.to(device),
            data,
            device,
            dtype,
            directory,
            config.batch_size,
            BadPictures(directory / "bad_samples.csv", [table], config.max_bad_share),
            more,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            max_length=config.max_length,
            num_return_sequences=None if config.num_captions == 1 else config.num_captions,
            int8=config.precision == "int8",
            **(sampling if config.do_sample else {}),
        )
    else:
        raise UserError("name a model and --data-dir, or --results (or --compare) and --references (see --help)")
    write_json(directory / "metrics.json", metrics)
    print_metrics(metrics)
    print(f"written to {directory}")


def print_metrics(metrics: dict[str, Any]) -> None:
    """One line a metric, with its 95 % interval where there is one; then what to know before they are believed."""
    for name, value in metrics.items():
        if name.rsplit("_", 1)[-1] in ENDS:
            continue
        low, high = (metrics.get(f"{name}_{end}") for end in ENDS)
        interval = "" if low is None else f"   ({low:.4f} to {high:.4f})"
        print(f"{name:26} {value:.4f}{interval}" if isinstance(value, float) else f"{name:26} {value}")
    for warning in warnings_about(metrics):
        print(f"WARNING: {warning}")


if __name__ == "__main__":
    run_script(main)
