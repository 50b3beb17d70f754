"""A model, or a file of captions, against references: numbers, captions, a report, a contact sheet.

    python evaluate.py MODEL --data-dir flickr8k --split test
    python evaluate.py --results captions.json --references captions_val2014.json
    python evaluate.py --compare a/captions.json b/captions.json --references a/references.json

Imports config, model, metrics, report, dataset and utils. Decodes with 3 beams and no sampling unless told.
"""

from __future__ import annotations

import csv
import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from metrics import bootstrap, diversity, paired_bootstrap, score_captions, tokenize
from model import ImageCaptionModel
from pictures import PictureSource
from report import Report, write_report
from table import CaptionTable
from utils import (
    autocast,
    choose_device,
    choose_precision,
    parse_flags,
    read_log,
    run_script,
    writable_directory,
    write_json,
)

NUM_BEAMS = 3
ENDS = ("low", "high")  # of a 95 % interval


@dataclass
class Captioned:
    """Captions of a loader's pictures, in its order: rows of its table, captions, their references, which were cut."""

    rows: list[int]
    captions: list[str]
    references: list[list[str]]
    cut: list[bool]

    def metrics(self) -> dict[str, float]:
        """BLEU-1..4, ROUGE-L and CIDEr-D, how varied the captions are, and the share cut off at max_length."""
        scores = score_captions(self.captions, self.references)
        return scores | diversity(self.captions) | {"cut_captions": sum(self.cut) / max(1, len(self.cut))}


def caption_loader(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    **decoding: Any,
) -> Captioned:
    """Captions every picture of the loader; `decoding` goes to model.generate, with 3 beams unless it samples."""
    if not decoding.get("do_sample"):
        decoding = {"num_beams": NUM_BEAMS} | decoding
    result = Captioned([], [], [], [])
    was_training = model.training
    model.eval()  # for all of them: in training mode generate keeps nothing from batch to batch
    for batch in tqdm(dataloader, "captioning", unit="batch", disable=not progress):
        with autocast(device, dtype):
            sequences = model.generate(batch["pixel_values"].to(device), **decoding).sequences.cpu()
        bad = {row for row, _ in batch.get("bad", ())}
        good = [place for place, row in enumerate(batch["rows"]) if row not in bad]
        captions = decode(tokenizer, sequences)
        result.rows += [batch["rows"][place] for place in good]
        result.captions += [captions[place] for place in good]
        result.references += [batch["captions"][place] for place in good]
        result.cut += (sequences[good] != model.config.end_token_id).all(-1).tolist()
    model.train(was_training)
    return result


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
    bad = bad or BadPictures(directory / "bad_samples.csv", [dataset.table])
    loader = make_dataloader(dataset, batch_size)
    captioned = caption_loader(model, loader, model.tokenizer, device, dtype, **decoding)
    bad.add_known(dataset)
    if not captioned.captions:
        raise UserError(f"{dataset.table.root}: no picture of the {dataset.table.split} part can be read")
    metrics: dict[str, Any] = captioned.metrics()
    metrics["loss"] = caption_loss(model, loader, device, dtype)
    metrics["loss_shuffled_pictures"] = caption_loss(model, loader, device, dtype, shuffle_pictures=True)
    metrics["pictures"] = len(captioned.captions)
    metrics["pictures_left_out"] = len(dataset.table) + len(dataset.table.missing) - len(captioned.captions)
    metrics["pictures_trained_on"] = len(pictures_seen(model.trained_on, dataset.table))
    table, rows = dataset.table, captioned.rows
    metrics |= write_evaluation(
        directory,
        f"{table.split} pictures of {table.root.name}",
        metrics,
        [table.id_of(row) for row in rows],
        captioned.captions,
        captioned.references,
        about_decoding(model, decoding),
        more,
        lambda: [table.picture(row) for row in rows],
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
    """Which metrics of scorers.py are wanted: METEOR and SPICE by Java, CHAIR with COCO's instances, CLIPScore by a CLIP."""

    java: bool = False
    instances: Path | None = None
    clip: str | None = None

    def score(
        self,
        names: Sequence[int | str],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
        pictures: Callable[[], Sequence[PictureSource]] | None,
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
            if self.clip and pictures:
                clip = clip_scores(captions, pictures(), references, self.clip)
                corpus |= clip.corpus
                each |= {name: scores.tolist() for name, scores in clip.per_picture.items()}
        except UserError as error:
            notes.append(f"CLIPScore: {error}")
        return corpus, each, notes


def about_decoding(model: ImageCaptionModel, decoding: dict[str, Any]) -> dict[str, str]:
    """Which weights wrote captions, and how."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    options = {"num_beams": NUM_BEAMS} | decoding
    said = ", ".join(f"{name} {value}" for name, value in options.items() if value not in (None, False))
    return {"weights_sha256": digest.hexdigest(), "decoding": said}


def write_evaluation(
    directory: Path,
    title: str,
    metrics: dict[str, Any],
    names: Sequence[int | str],
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    about: dict[str, str],
    more: MoreScores | None = None,
    pictures: Callable[[], Sequence[PictureSource]] | None = None,
) -> dict[str, Any]:
    """Writes captions.json and references.json (COCO's formats), per_picture.csv and report.html into the folder.

    Returns what belongs beside the metrics in any table: more of them where asked for, how all of them were made, and the
    95 % interval of each.
    """
    added, added_each, left_out = (more or MoreScores()).score(names, captions, references, pictures)
    facts = {
        "tokenizer": "PTB, by metrics.tokenize",
        "document_frequencies": f"of the {len(captions):,} pictures evaluated",
        "references_per_picture": f"{sum(map(len, references)) / len(references):.4g}",
        **about,
        "left_out": "; ".join(left_out) or "nothing",
    }
    write_json(
        directory / "captions.json",
        [{"image_id": name, "caption": caption} for name, caption in zip(names, captions, strict=True)],
    )
    texts = [(name, text) for name, known in zip(names, references, strict=True) for text in known]
    annotations = [{"id": i, "image_id": name, "caption": text} for i, (name, text) in enumerate(texts)]
    write_json(directory / "references.json", {"images": [{"id": i} for i in names], "annotations": annotations})
    words, known_words = [tokenize(c) for c in captions], [[tokenize(c) for c in known] for known in references]
    scored = score_captions(words, known_words, per_picture=True)
    each = {
        name: scored[name].tolist() for name in ("cider_d", *scored)
    }  # the one that pictures are ranked by comes first
    each |= added_each
    with open(directory / "per_picture.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "caption", *each])
        writer.writerows(zip(names, captions, *([f"{x:.6f}" for x in scores] for scores in each.values()), strict=True))
    intervals = bootstrap(words, known_words)
    log = directory / "metrics.jsonl"

    def thumbnail(i: int) -> Image.Image:
        assert pictures
        return Image.fromarray(load_picture(pictures()[i], 256).permute(1, 2, 0).numpy())

    report = Report(
        title=title,
        facts={name.replace("_", " "): said for name, said in facts.items()} | {"pictures": f"{len(captions):,}"},
        warnings=warnings_about(metrics),
        metrics=metrics | added,
        intervals=intervals,
        captions=list(captions),
        references=[list(known) for known in references],
        per_picture=each,
        names=[str(name) for name in names],
        load=pictures and thumbnail,
        history=read_log(log) if log.exists() else [],
    )
    write_report(directory / "report.html", report)
    bounds = {f"{name}_{end}": value for name, both in intervals.items() for end, value in zip(ENDS, both, strict=True)}
    return added | facts | bounds


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
    if number >= 20 and metrics["unique_captions"] <= max(1, 0.02 * number):
        found.append(
            f"Nearly the same caption for every picture: {metrics['unique_captions']:.0f} for {number:,} pictures."
        )
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
    """Image ids, candidates in COCO's results format and their references from an annotation file, matched by the id."""
    name = results
    try:
        entries = [(entry["image_id"], entry["caption"]) for entry in json.loads(results.read_text(encoding="utf-8"))]
        name = references
        known: dict[int | str, list[str]] = {}
        for entry in json.loads(references.read_text(encoding="utf-8"))["annotations"]:
            known.setdefault(entry["image_id"], []).append(entry["caption"])
        for image, caption in [*entries, *((image, c) for image, captions in known.items() for c in captions)]:
            if not isinstance(image, int | str) or not isinstance(caption, str):
                raise TypeError(f"picture {image}, caption {caption!r}")
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}: not in COCO's format ({reason}): results are [{{image_id, caption}}, ...]") from error
    candidates = dict(entries)
    if len(candidates) < len(entries):
        image, times = Counter(image for image, _ in entries).most_common(1)[0]
        raise UserError(f"{results}: {times} captions for picture {image}: give one for each")
    missing = [str(image) for image in known if image not in candidates]
    if missing:
        raise UserError(f"{results}: no caption for {len(missing)} pictures of {references} ({', '.join(missing[:3])})")
    return list(known), [candidates[image] for image in known], list(known.values())


def compare(a: Path, b: Path, references: Path) -> dict[str, Any]:
    """Whether results b are better than results a on the same pictures: prints a table, and returns it."""
    _, ours, known = read_results(a, references)
    _, theirs, _ = read_results(b, references)
    words, other = ([tokenize(caption) for caption in captions] for captions in (ours, theirs))
    known_words = [[tokenize(caption) for caption in captions] for captions in known]
    before, after = score_captions(words, known_words), score_captions(other, known_words)
    print(f"{len(known):,} pictures; differences with 95 % intervals by paired bootstrap")
    print(f"{'':10} {'A':>8} {'B':>8} {'B - A':>9}  {'95 % interval':^19} {'p':>6}")
    table = {}
    for name, found in paired_bootstrap(words, other, known_words).items():
        table[name] = {"a": before[name], "b": after[name], **found._asdict()}
        low, high = found.interval
        print(
            f"{name:10} {before[name]:8.4f} {after[name]:8.4f} {found.difference:+9.4f}  {low:+8.4f} to {high:+8.4f} {found.p_value:6.3f}"
        )
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
    split: Literal["train", "val", "test"] = "test"
    """Which part of the data."""
    results: Path | None = None
    """Captions in COCO's results format, from anybody's model."""
    references: Path | None = None
    """COCO annotations that results are scored against, or the references.json of an evaluation."""
    compare: tuple[Path, Path] | None = None
    """Two files of captions in COCO's results format: is the second better?"""
    java: bool = False
    """Also METEOR and SPICE, where Java and pycocoevalcap are (requirements-full.txt)."""
    instances: Path | None = None
    """COCO's instances_*.json of the pictures, for CHAIR: objects that are named and not there."""
    clip: str | None = None
    """A CLIP by its Hub name or folder, such as openai/clip-vit-base-patch32, for CLIPScore."""
    output_dir: Path = Path("evaluation")
    """Folder for metrics.json, captions.json, per_picture.csv, report.html and samples.png."""
    num_beams: int = 3
    """Beams; 1 is greedy."""
    length_penalty: float = 1.0
    """Above 0, longer captions win more often."""
    max_length: int | None = None
    """Longest caption, in tokens (default: 32, or what the model can hold)."""
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
    more = MoreScores(config.java, config.instances, config.clip)
    if config.compare and config.references:
        differences = compare(*config.compare, config.references)
        write_json(writable_directory(config.output_dir) / "comparison.json", differences)
        return
    if config.results and config.references:
        names, captions, known = read_results(config.results, config.references)
        directory = writable_directory(config.output_dir)
        metrics: dict[str, Any] = score_captions(captions, known) | diversity(captions) | {"pictures": len(captions)}
        title = f"{config.results.name} against {config.references.name}"
        about = {"results": str(config.results), "references": str(config.references)}
        metrics |= write_evaluation(directory, title, metrics, names, captions, known, about, more)
    elif config.model and (config.data_dir or "/" in config.dataset):
        model = ImageCaptionModel.from_pretrained(config.model)
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
        table = load_table(config.dataset, config.data_dir or Path(), config.split, **columns)
        check_overlap(model.trained_on, table, config.allow_overlap)
        device, _ = choose_device(config.device)
        dtype, _ = choose_precision(config.precision, device)
        directory = writable_directory(config.output_dir)
        data = CaptionDataset(table, model.tokenizer, model.config)
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
            int8=config.precision == "int8",
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
