"""A model, or a file of captions, against references: numbers, captions, a report, a contact sheet.

    python evaluate.py MODEL --data-dir flickr8k
    python evaluate.py MODEL --data-dir flickr8k --split test
    python evaluate.py --results captions.json --references captions_val2014.json
    python evaluate.py --compare a/captions.json b/captions.json --references a/references.json

Models and settings are chosen on the val part, which is the default; the test part is for the number at the end.
Decodes with 3 beams and no sampling unless told.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from config import LONGEST, Captioning, UserError, default_decoding
from data.skipped import BadPictures, check_overlap, pictures_seen
from data.table import FLOOR, CaptionTable
from data.tokenizer import decode
from dataset import Batch, CaptionDataset, load_picture, load_table, make_dataloader
from decoding.packed import how_int8
from model import ImageCaptionModel
from scoring.matching import matched
from scoring.metrics import CiderD
from scoring.results import Captioned, MoreScores, about_results, compare, print_metrics, write_evaluation
from scoring.sheet import contact_sheet
from training.distributed import ALONE, World
from utils import (
    autocast,
    choose_device,
    choose_precision,
    parse_flags,
    run_script,
    writable_directory,
    write_json,
)
from weights.file import weights_hash

with contextlib.suppress(ImportError):  # only the command line needs it, and a host for training may lack it
    import tyro

SEED = 0  # of sampling
COLUMNS = ("rows", "captions", "references", "cut", "several", "confidences")  # of Captioned


def caption_loader(
    model: ImageCaptionModel,
    dataloader: DataLoader[Any],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    world: World = ALONE,
    **decoding: Any,
) -> Captioned:
    """Captions every picture of the loader; `decoding` goes to model.generate, with 3 beams unless it samples.

    Samples are the same every time. With num_return_sequences all captions of a picture are kept beside the first, with
    return_scores the confidence in the first. With a world the loader has this process's share, and every process gets the
    captions of all, in the table's order.
    """
    decoding = default_decoding(decoding)
    if decoding.get("do_sample"):
        decoding = {"generator": torch.Generator(device).manual_seed(SEED)} | decoding
    number = decoding.get("num_return_sequences", 1)
    result = Captioned([], [], [], [])
    was_training = model.training
    model.eval()  # for all of them: in training mode generate keeps nothing from batch to batch
    for batch in map(Batch.of, tqdm(dataloader, "captioning", unit="batch", disable=not progress)):
        with autocast(device, dtype):
            found = model.generate(batch.pixel_values.to(device), **decoding)
        sequences = found.sequences.cpu()
        bad = {row for row, _ in batch.bad}
        good = [place for place, row in enumerate(batch.rows) if row not in bad]
        texts = decode(tokenizer, sequences)
        captions = [texts[number * place : number * (place + 1)] for place in good]
        result.rows += [batch.rows[place] for place in good]
        result.captions += [own[0] for own in captions]
        result.several += captions if number > 1 else []
        result.references += [batch.captions[place] for place in good]
        result.cut += sequences[::number][good].ne(model.config.end_token_id or 0).all(-1).tolist()
        if decoding.get("return_scores"):
            result.confidences += found.mean_log_probs.exp()[::number].cpu()[good].tolist()
    model.train(was_training)
    return result if world.size == 1 else gathered(world.gather(result))


def gathered(shares: list[Captioned]) -> Captioned:
    """Several processes' captions as one, in the table's order."""
    names = [name for name in COLUMNS if any(getattr(share, name) for share in shares)]
    columns = [[getattr(share, name) for name in names] for share in shares]
    entries = sorted((entry for own in columns for entry in zip(*own, strict=True)), key=lambda entry: entry[0])
    together: Any = zip(names, map(list, zip(*entries, strict=True)), strict=True)
    return Captioned(**dict(together)) if entries else shares[0]


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
    world: World = ALONE,
) -> float:
    """Mean negative log likelihood of a reference token, in nats.

    With a world the loader has this process's share, and the mean is that of all.
    With shuffle_pictures each picture gets its neighbour's captions: a model that looks at pictures must lose by it.
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
    """A contact sheet of a dozen pictures spread over the set: good and bad as they fall."""
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
    """Captions and scores a data set; writes what write_evaluation does, and samples.png, into the folder.

    The processes of a world share the work, and its first one scores and writes; the others get no metrics.

    The metrics hold, besides the caption metrics, the loss with the right pictures and with each other's. Pictures that
    are missing or damaged are left out, counted, and named in the folder's bad_samples.csv.
    """
    table, more = dataset.table, more or MoreScores()
    bad = bad or BadPictures(directory / "bad_samples.csv", [dataset.table])
    loader = make_dataloader(dataset, batch_size, **world.share)
    asked = {"return_scores": True} | decoding
    captioned = caption_loader(model, loader, model.tokenizer, device, dtype, world.main, world, **asked)
    loss, shuffled = (caption_loss(model, loader, device, dtype, shuffle, world) for shuffle in (False, True))
    if not world.main:
        return captioned, {}
    captioned.frequencies, captioned.tokenizer = more.frequencies, more.tokenizer
    captioned.domains = table.domains_of(captioned.rows)
    bad.add_known(dataset.table, dataset.pixels.bad)
    if not captioned.captions:
        raise UserError(f"{table.root}: no picture of the {table.split} part can be read")
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


def weights_sha256(model: ImageCaptionModel) -> str:
    """Of the weights in the model's file: of adapters these alone, also where they have been merged."""
    return model.merged["sha256"] if model.merged else weights_hash(model.own_state())


def about_decoding(model: ImageCaptionModel, decoding: dict[str, Any]) -> dict[str, str]:
    """Which weights wrote captions, and how."""
    options = {"max_length": min(LONGEST, model.config.text_positions)} | default_decoding(decoding)
    if options.get("do_sample"):
        options["seed"] = SEED
    said = ", ".join(f"{name} {value}" for name, value in options.items() if value is not False)
    return {"weights_sha256": weights_sha256(model), "decoding": said}


@dataclass(kw_only=True)
class Scored:
    """What is scored, against what, and by which metrics."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """The model: a file, a folder or a Hub name."""
    data_dir: Path | None = None
    """Folder of the data."""
    dataset: str = "auto"
    """Layout of the data, recognised from the folder with auto; or user/name on the Hugging Face Hub."""
    image_column: str | None = None
    """Column of the pictures, where a table's has no usual name."""
    caption_column: str | None = None
    """Column of the captions, where a table's has no usual name; txt, where name.txt is to count and not name.caption."""
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
    subset: bool = False
    """Score results that have captions for a part of the references only; every table says so."""
    compare: tuple[Path, Path] | None = None
    """Two files of captions in COCO's results format: is the second better?"""
    document_frequencies: Path | None = None
    """A .npz of metrics.CiderD(...).save: CIDEr-D with its frequencies, not those of the pictures evaluated."""
    tokenizer: Literal["ptb", "characters", "icu"] = "ptb"
    """What a word is: ptb, as in all published numbers; in scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer,
    Burmese) also each character, or the words of ICU's dictionaries (requirements/full.txt)."""
    meteor: bool = False
    """Also METEOR 1.5, by pycocoevalcap's data (requirements/full.txt)."""
    java: bool = False
    """Also METEOR, and SPICE where Java is."""
    instances: Path | None = None
    """COCO's instances_*.json of the pictures, for CHAIR: objects that are named and not there."""
    clip: str | None = None
    """A CLIP by its Hub name or folder, such as openai/clip-vit-base-patch32, for CLIPScore."""
    pac: str | None = None
    """The same for PAC-S: a folder with weights of PAC-S as transformers has CLIP's, in safetensors."""
    output_dir: Path = Path("evaluation")
    """Folder for metrics.json, captions.json, per_picture.csv, report.html and samples.png."""
    batch_size: int = 64
    """Pictures decoded at a time."""


@dataclass(kw_only=True)
class EvaluateConfig(Captioning, Scored):  # dataclass takes the last one's fields first
    """Score a model on a data set, or a file of captions against references."""

    num_captions: int = 1
    """Captions of each picture: the first is scored, and self-CIDEr says how much they differ."""
    do_sample: bool = False
    """Draw each token by its probability, the same way every time."""


def main() -> None:
    """The command line."""
    config = parse_flags(EvaluateConfig, __doc__)
    frequencies = CiderD.load(config.document_frequencies) if config.document_frequencies else None
    if frequencies and config.tokenizer != "ptb":
        raise UserError(f"document frequencies are of PTB's words, not of {config.tokenizer}: leave one of them out")
    if config.compare and config.references:
        differences = compare(*config.compare, config.references, frequencies, config.subset, config.tokenizer)
        write_json(writable_directory(config.output_dir) / "comparison.json", differences)
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
    write_json(config.output_dir / "metrics.json", metrics)
    print_metrics(metrics)
    print(f"written to {config.output_dir}")


def score_results(config: EvaluateConfig, results: Path, references: Path, more: MoreScores) -> dict[str, Any]:
    """Scores a file of captions; writes what write_evaluation does."""
    names, captions, known, facts, domains = matched(results, references, config.subset)
    title = f"{results.name} against {references.name}"
    about = {"results": str(results), "references": str(references), **facts}
    captioned = Captioned([], captions, known, [], [], more.frequencies, more.tokenizer, domains)
    directory = writable_directory(config.output_dir)
    return write_evaluation(directory, title, captioned, names, {}, about | about_results(results), more)


def earlier_parts(model: ImageCaptionModel, load: Callable[..., CaptionTable]) -> bool:
    """Whether a model was trained by an earlier version, which set fewer of a few pictures aside to validate."""
    with contextlib.suppress(UserError):  # no such part, or none of its pictures
        now, before = (pictures_seen(model.trained_on, load("val", floor=floor)) for floor in (FLOOR, 0))
        return bool(now) and not before
    return False


def score_model(config: EvaluateConfig, source: str, more: MoreScores) -> dict[str, Any]:
    """Scores a model on a part of a data set; writes what evaluate_dataset does."""
    model = ImageCaptionModel.from_pretrained(source, config.base_dir)
    columns: Any = {"image_column": config.image_column, "caption_column": config.caption_column}
    load: Any = partial(load_table, config.dataset, config.data_dir or Path(), **columns)
    table = load(config.split)
    if pictures_seen(model.trained_on, table) and earlier_parts(model, load):
        load = partial(load, floor=0)
        table = load(config.split)
    check_overlap(model.trained_on, table, config.allow_overlap)
    if table.split == "test":
        print("the test part is for the number at the end: choose models and settings on val")
    if table.split != "train":
        with contextlib.suppress(UserError):  # no such part, or none of its pictures: then it is left out
            trained = load("train")
            more = dataclasses.replace(more, training_captions=trained.captions().to_pylist())
    device, _ = choose_device(config.device)
    dtype, _ = choose_precision(config.precision, device)
    if config.precision == "int8":
        print(f"int8        {how_int8()}")
    directory = writable_directory(config.output_dir)
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
