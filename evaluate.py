#!/usr/bin/env python
"""Score a model, or a file of captions, against references: metrics, captions, a report, a contact sheet.

    python evaluate.py MODEL --data-dir flickr8k
    python evaluate.py MODEL --data-dir flickr8k --split test
    python evaluate.py --results captions.json --references captions_val2014.json
    python evaluate.py --compare a/captions.json b/captions.json --references a/references.json

Choose models and settings on the val split, which is the default. Use the test split once, for the final number.
By default captions are generated with 3 beams and without sampling.
"""

from __future__ import annotations

from utils import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # until everything is imported

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from captioning.models import weights_sha256 as weights_sha256
from config import LONGEST, Captioning, UserError, default_decoding
from data.skipped import BadPictures, check_overlap, pictures_seen
from data.table import FLOOR, CaptionTable
from data.tokenizer import decode
from dataset import Batch, CaptionDataset, load_picture, load_table, make_dataloader
from decoding.packed import how_int8
from flags import parse_flags
from model import ImageCaptionModel
from scoring import calibration as calibrating
from scoring.matching import matched
from scoring.metrics import CiderD
from scoring.results import Captioned, MoreScores, about_results, compare, print_metrics, write_evaluation
from scoring.sheet import contact_sheet
from training.distributed import ALONE, World
from utils import (
    autocast,
    choose_device,
    choose_precision,
    dated_folder,
    raise_on_interrupt,
    run_script,
    writable_directory,
    write_json,
)

with contextlib.suppress(ImportError):  # only the command line needs it; a training machine may lack it
    import tyro

SEED = 0  # of sampling
COLUMNS = ("rows", "captions", "references", "cut", "several", "confidences")  # of Captioned


def caption_batches(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    world: World = ALONE,
    **decoding: Any,
) -> Captioned:
    """Caption every picture of the loader. `decoding` goes to model.generate; the default without sampling is 3 beams.

    Samples are the same every time. With num_return_sequences the result also has all captions of each picture, with
    return_scores the confidence of the first one. With a world, the loader has this process's share of the pictures,
    and every process gets the captions of all, in the table's order.
    """
    decoding = default_decoding(decoding)
    if decoding.get("do_sample"):
        decoding = {"generator": torch.Generator(device).manual_seed(SEED)} | decoding
    number = decoding.get("num_return_sequences", 1)
    result = Captioned([], [], [], [])
    was_training = model.training
    model.eval()  # once for all batches: in training mode generate keeps no packed copies between batches
    for batch in map(Batch.of, tqdm(dataloader, "captioning", unit="batch", disable=not progress)):
        with autocast(device, dtype):
            found = model.generate(batch.pixel_values.to(device), **decoding)
        sequences = found.sequences.cpu()
        bad = {row for row, _ in batch.bad}
        good = [index for index, row in enumerate(batch.rows) if row not in bad]
        texts = decode(tokenizer, sequences)
        captions = [texts[number * index : number * (index + 1)] for index in good]
        result.rows += [batch.rows[index] for index in good]
        result.captions += [each[0] for each in captions]
        result.several += captions if number > 1 else []
        result.references += [batch.captions[index] for index in good]
        result.cut += sequences[::number][good].ne(model.config.end_token_id).all(-1).tolist()
        if decoding.get("return_scores"):
            result.confidences += found.mean_log_probs.exp()[::number].cpu()[good].tolist()
    model.train(was_training)
    return result if world.size == 1 else gathered(world.gather(result))


def gathered(shares: list[Captioned]) -> Captioned:
    """Join the captions of several processes, in the table's order."""
    names = [name for name in COLUMNS if any(getattr(share, name) for share in shares)]
    columns = [[getattr(share, name) for name in names] for share in shares]
    entries = sorted((entry for share in columns for entry in zip(*share, strict=True)), key=lambda entry: entry[0])
    together: Any = zip(names, map(list, zip(*entries, strict=True)), strict=True)
    return Captioned(**dict(together)) if entries else shares[0]


def evaluate_captions(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device | str,
    **decoding: Any,
) -> dict[str, float]:
    """All metrics of a model on a loader, as fractions (CIDEr-D on its own scale of 0 to 10)."""
    device = torch.device(device)
    dtype, _ = choose_precision("auto", device)
    return caption_batches(model.to(device), dataloader, tokenizer, device, dtype, **decoding).metrics()


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
    world: World = ALONE,
) -> float:
    """Mean negative log likelihood per reference token, in nats.

    With a world, the loader has this process's share, and the mean is over all shares.
    With shuffle_pictures each picture gets its neighbour's captions. This must raise the loss, unless the model ignores
    pictures.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    other = None
    for batch in map(Batch.of, dataloader):
        batch = batch.to(device)
        pixels, *texts = batch.inputs
        if shuffle_pictures:  # a batch of one takes the last picture of the batch before it
            pixels, other = pixels.roll(1, 0) if len(pixels) > 1 or other is None else other, pixels[-1:]
        tokens = int(batch.lengths.sum())
        with autocast(device, dtype):
            output = model(pixels, *texts)
        total, count = total + output.loss.item() * tokens, count + tokens
    model.train(was_training)
    loss, tokens_of_all = world.sum(total, count)
    return loss / max(1.0, tokens_of_all)


def sample_sheet(path: Path, captioned: Captioned, table: CaptionTable) -> None:
    """Write a contact sheet of up to 12 pictures, evenly spread over the set, whatever their scores."""
    number = len(captioned.captions)
    chosen = range(0, number, max(1, number // 12))[:12]
    contact_sheet(
        path,
        [load_picture(table.picture(captioned.rows[i]), 256) for i in chosen],
        [captioned.captions[i] for i in chosen],
        [captioned.references[i] for i in chosen],
    )


def evaluate_dataset(
    model: ImageCaptionModel,
    dataset: CaptionDataset,
    device: torch.device,
    dtype: torch.dtype,
    directory: Path,
    batch_size: int = 64,
    bad: BadPictures | None = None,
    more: MoreScores | None = None,
    world: World = ALONE,
    **decoding: Any,
) -> tuple[Captioned, dict[str, Any]]:
    """Caption and score a data set; write the files of write_evaluation, and samples.png, to the folder.

    The processes of a world share the captioning. The first one scores and writes; the others get no metrics.

    The metrics also include the loss, with the right pictures and with shuffled ones. Missing or damaged pictures are
    skipped, counted, and listed in the folder's bad_samples.csv.
    """
    table, more = dataset.table, more or MoreScores()
    bad = bad or BadPictures(directory / "bad_samples.csv", [dataset.table])
    loader = make_dataloader(dataset, batch_size, **world.share)
    asked = {"return_scores": True} | decoding
    captioned = caption_batches(model, loader, model.tokenizer, device, dtype, world.main, world, **asked)
    loss, shuffled = (caption_loss(model, loader, device, dtype, shuffle, world) for shuffle in (False, True))
    if not world.main:
        return captioned, {}
    captioned.frequencies, captioned.tokenizer = more.frequencies, more.tokenizer
    captioned.domains = table.domains_of(captioned.rows)
    bad.add_known(dataset.table, dataset.pixels.bad)
    if not captioned.captions:
        raise UserError(f"{table.root}: no picture of the {table.split} split can be read")
    rows, computed = captioned.rows, str(dtype).removeprefix("torch.")
    metrics = write_evaluation(
        directory,
        f"{table.split} pictures of {table.root.name}",
        captioned,
        [table.id_of(row) for row in rows],
        {
            "loss": loss,
            "loss_shuffled_pictures": shuffled,
            "pictures_left_out": len(table) + len(table.missing) - len(rows),
            "pictures_trained_on": len(pictures_seen(model.trained_on, table)),
        },
        {
            "data": table.root.name,
            "split": table.split,
            **about_decoding(model, decoding),
            "precision": f"int8, the loss in {computed}" if decoding.get("int8") else computed,
        },
        more,
        lambda i: table.picture(rows[i]),
    )
    sample_sheet(directory / "samples.png", captioned, table)
    return captioned, metrics


def about_decoding(model: ImageCaptionModel, decoding: dict[str, Any]) -> dict[str, str]:
    """The weights and decoding options that generated captions."""
    options = {"max_length": min(LONGEST, model.config.text_positions)} | default_decoding(decoding)
    if options.get("do_sample"):
        options["seed"] = SEED
    text = ", ".join(f"{name} {value}" for name, value in options.items() if value is not False)
    return {"weights_sha256": weights_sha256(model), "decoding": text}


@dataclass(kw_only=True)
class Scored:
    """Options: what to score, against what, and by which metrics."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """The model: a file, a folder, a Hub name, or vit-gpt2 or distilvit."""
    data_dir: Path | None = None
    """Folder of the data."""
    dataset: str = "auto"
    """Layout of the data; auto detects it from the folder. Or user/name on the Hugging Face Hub."""
    image_column: str | None = None
    """Column of the pictures, if a table has an unusual name for it."""
    caption_column: str | None = None
    """Column of the captions, if a table has an unusual name for it; txt to read name.txt instead of name.caption."""
    max_bad_share: float = 0.01
    """Largest allowed share of missing or damaged pictures, 0 to 1; they are skipped and counted."""
    allow_overlap: bool = False
    """Score the model even if it was trained on some of the pictures."""
    split: Literal["train", "val", "test"] = "val"
    """Split of the data to score; use test once, for the final number, after all choices are made."""
    results: Path | None = None
    """Captions of any model, in COCO's results format."""
    references: Path | None = None
    """COCO annotations to score results against, or the references.json of an evaluation."""
    subset: bool = False
    """Accept results that have captions for only some of the references' pictures; every table notes it."""
    compare: tuple[Path, Path] | None = None
    """Two files of captions in COCO's results format, to test whether the second is better."""
    document_frequencies: Path | None = None
    """An .npz file of metrics.CiderD(...).save, whose frequencies CIDEr-D uses instead of those of the references."""
    tokenizer: Literal["ptb", "characters", "icu"] = "ptb"
    """How to split captions into words: ptb, as in all published numbers; in scripts without spaces (Chinese, Japanese,
    Thai, Lao, Khmer, Burmese) also characters, or icu for the words of its dictionaries (requirements/full.txt)."""
    meteor: bool = False
    """Also compute METEOR 1.5, with pycocoevalcap's data (requirements/full.txt)."""
    java: bool = False
    """Also compute METEOR, and SPICE if Java is installed."""
    instances: Path | None = None
    """COCO's instances_*.json of the pictures, to compute CHAIR: objects that are named but not in the picture."""
    clip: str | None = None
    """Hub name or folder of a CLIP, such as openai/clip-vit-base-patch32, to compute CLIPScore."""
    pac: str | None = None
    """Folder of PAC-S's weights in transformers' CLIP format (safetensors), to compute PAC-S."""
    calibrate: float | None = None
    """Precision that captions should have, 0 to 1: find the confidence for --min-confidence, and draw calibration.png. A
    caption is right if its CIDEr-D (with --clip, its CLIPScore) reaches --right."""
    min_confidence: float | None = None
    """Print the precision and coverage of captions with at least this confidence."""
    right: float = 0.5
    """Score from which a caption is right, for --calibrate and --min-confidence."""
    output_dir: Path | None = None
    """Folder for metrics.json, captions.json, per_picture.csv, report.html and samples.png; an earlier evaluation there is
    replaced (default: a new one, evaluation/<model>-<date>-<time>)."""
    batch_size: int = 64
    """Pictures per batch."""

    @functools.cached_property
    def folder(self) -> Path:
        """The folder to write to."""
        scored = "comparison" if self.compare else self.results or self.model or ""
        return (
            writable_directory(self.output_dir) if self.output_dir else dated_folder(f"evaluation/{Path(scored).stem}")
        )


@dataclass(kw_only=True)
class EvaluateConfig(Captioning, Scored):  # dataclass takes the last one's fields first
    """Score a model on a data set, or a file of captions against references."""

    num_captions: int = 1
    """Captions per picture: the first is scored, and self-CIDEr measures how much they differ."""
    do_sample: bool = False
    """Sample each token from its probabilities, with a fixed seed."""


# Flags that --help shows.
COMMON = ["model", "data_dir", "split", "results", "references", "compare", "num_beams", "clip", "java", "output_dir"]
COMMON += ["num_captions", "device", "precision"]


def main() -> None:
    """Run the evaluation that the command line describes."""
    raise_on_interrupt()
    config = parse_flags(EvaluateConfig, __doc__, common=COMMON)
    frequencies = CiderD.load(config.document_frequencies) if config.document_frequencies else None
    if frequencies and config.tokenizer != "ptb":
        raise UserError(f"--document-frequencies needs --tokenizer ptb, not {config.tokenizer}: remove one of them")
    if config.compare and config.references:
        differences = compare(*config.compare, config.references, frequencies, config.subset, config.tokenizer)
        write_json(config.folder / "comparison.json", differences)
        print(f"written to {config.folder / 'comparison.json'}")
        return
    more = MoreScores(
        config.meteor, config.java, config.instances, config.clip, config.pac, frequencies, config.tokenizer
    )
    if config.results and config.references:
        metrics = score_results(config, config.results, config.references, more)
    elif config.model and (config.data_dir or "/" in config.dataset):
        metrics = score_model(config, config.model, more)
    else:
        raise UserError("name a model and --data-dir, or --results (or --compare) and --references (see --help)")
    lines, calibrated = calibration(config)
    write_json(config.folder / "metrics.json", metrics | calibrated)
    print_metrics(metrics)
    print("".join(lines), end="")
    print(f"report      {config.folder / 'report.html'}\nwritten to  {config.folder}")


def calibration(config: EvaluateConfig) -> tuple[list[str], dict[str, Any]]:
    """The lines to print about precision and coverage, and the numbers for metrics.json."""
    if config.calibrate is None and config.min_confidence is None:
        return [], {}
    score, lines, numbers = "clip_score" if config.clip else "cider_d", [], dict[str, Any]()
    scores = *calibrating.read_scores(config.folder, score), config.right
    if config.calibrate is not None:
        points = calibrating.curve(*scores)
        chosen = calibrating.threshold_for(points, config.calibrate)
        calibrating.draw(config.folder / "calibration.png", points, chosen, config.right, score)
        lines.append(f"calibrated  {calibrating.in_words(chosen, config.right, score)}\n")
        numbers["calibrated"] = chosen._asdict()
    if config.min_confidence is not None:
        found = calibrating.at(*scores, config.min_confidence)
        lines.append(f"at          {calibrating.in_words(found, config.right, score)}\n")
        numbers["at_min_confidence"] = found._asdict()
    return lines, numbers


def score_results(config: EvaluateConfig, results: Path, references: Path, more: MoreScores) -> dict[str, Any]:
    """Score a file of captions; write the files of write_evaluation."""
    names, captions, known, facts, domains = matched(results, references, config.subset)
    title = f"{results.name} against {references.name}"
    about = {"results": str(results), "references": str(references), **facts}
    captioned = Captioned([], captions, known, [], [], more.frequencies, more.tokenizer, domains)
    directory = config.folder
    return write_evaluation(directory, title, captioned, names, {}, about | about_results(results), more)


def earlier_parts(model: ImageCaptionModel, load: Callable[..., CaptionTable]) -> bool:
    """Whether a model was trained by an earlier version, which took fewer pictures for val from small data sets."""
    with contextlib.suppress(UserError):  # no such split, or no pictures in it
        now, before = (pictures_seen(model.trained_on, load("val", floor=floor)) for floor in (FLOOR, 0))
        return bool(now) and not before
    return False


def score_model(config: EvaluateConfig, source: str, more: MoreScores) -> dict[str, Any]:
    """Score a model on a split of a data set; write the files of evaluate_dataset."""
    model = ImageCaptionModel.from_pretrained(source, config.base_dir, config.allow_pickle)
    columns: Any = {"image_column": config.image_column, "caption_column": config.caption_column}
    load: Any = functools.partial(load_table, config.dataset, config.data_dir or Path(), **columns)
    table = load(config.split)
    if pictures_seen(model.trained_on, table) and earlier_parts(model, load):
        load = functools.partial(load, floor=0)
        table = load(config.split)
    check_overlap(model.trained_on, table, config.allow_overlap)
    if table.split == "test":
        print("the test split is for the final number: choose models and settings on val")
    if table.split != "train":
        with contextlib.suppress(UserError):  # no such split, or no pictures in it: then novelty is skipped
            trained = load("train")
            more = dataclasses.replace(more, training_captions=trained.captions().to_pylist())
    device, _ = choose_device(config.device)
    dtype, _ = choose_precision(config.precision, device)
    if config.precision == "int8":
        print(f"int8        {how_int8()}")
    directory = config.folder
    return evaluate_dataset(
        model.to(device),
        CaptionDataset(table, model.tokenizer, model.config),
        device,
        dtype,
        directory,
        config.batch_size,
        BadPictures(directory / "bad_samples.csv", [table], config.max_bad_share),
        more,
        **config.options(int8=config.precision == "int8"),
    )[1]


if __name__ == "__main__":
    run_script(main)
