"""Prepare a run before its first step: folder, device, data, model; and print its plan."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from config import FEW, TrainConfig, UserError
from data.download import download_coco_dataset, download_flickr30k
from data.scenes import draw_scenes
from data.skipped import BadPictures, check_overlap
from data.table import FLOOR, CaptionTable
from dataset import CaptionDataset, load_tables, make_dataloader
from model import ImageCaptionModel, choose_attention
from scoring.tokens import tokenizer_for
from training.adapters import adapt, check_adapters
from training.checkpoint import newest_complete
from training.distributed import World
from training.estimates import duration, estimated_caption_seconds, estimated_memory, estimated_seconds
from training.optimizers import freeze
from training.run import Run
from training.start import make_model, pretrained_parts
from utils import available_memory, choose_device, choose_precision, counted, dtypes, key_of, write_json
from weights.adapters import adapted_layers

COCO_PICTURES = 118_287
COCO_DOWNLOAD_GB = 20
TYPICAL_CAPTION = 14  # tokens, for estimates made before the captions are read
LENGTH_MULTIPLE = 4  # on a GPU, T is rounded up to a multiple of this
DAY = 86400  # seconds
KEPT_SHARE_OF_MEMORY = 0.4  # pictures that fit into this share are cached there


def write_run(job: Job, finished: bool, **more: Any) -> None:
    """Write run.json: what identifies the run, what it needs to resume with the same bits, and `more`."""
    precision = next(name for name, dtype in dtypes().items() if dtype == job.dtype)
    about = {"fingerprint": job.config.fingerprint, "finished": finished, "device": job.device.type, **more}
    cuda = job.device.type == "cuda"
    hardware = torch.cuda.get_device_name(job.device) if cuda else f"{os.cpu_count()} CPU cores"
    about["hardware"] = f"{f'{job.world.size} x ' if cuda else ''}{hardware}, torch {torch.__version__}"
    about |= {"precision": precision, "tokenizer": job.tokenizer, "data": job.data_key, "config": job.config.to_dict()}
    about |= {"adapters": job.model.adapters} if job.config.adapts else {}
    write_json(job.run.folder / "run.json", about)


# Data


def find_tables(config: TrainConfig, run: Path, floor: int = FLOOR) -> dict[str, CaptionTable]:
    """The train, val and test tables; they are drawn or downloaded if the config says so. `floor`: see load_tables."""
    dataset, directory = config.dataset, config.data_dir
    if dataset == "scenes":
        dataset, directory = "coco", directory or run / "scenes"
        draw_scenes(directory, {"train": config.num_scenes, "val": 500, "test": 500}, config.seed)
    elif directory is None and dataset in ("auto", "coco"):
        directory = Path("coco_data")
        if not all((directory / part).is_dir() for part in ("annotations", "train2017", "val2017")):
            ask_before_download(config)
            download_coco_dataset(directory)
    elif directory is None and dataset == "flickr30k":
        directory = download_flickr30k()
    elif directory is None and "/" not in dataset:
        raise UserError(f"dataset {dataset} needs --data-dir: its folder")
    tables = load_tables(dataset, directory or Path(), config.image_column, config.caption_column, floor)
    if lacking := [split for split in ("train", "val") if split not in tables]:
        raise UserError(
            f"{directory or dataset} has no {' and no '.join(lacking)} split, only {', '.join(tables)}: add it"
        )
    return tables


def ask_before_download(config: TrainConfig) -> None:
    """Raise UserError before COCO's 20 GB download if there is no GPU and no --yes: training would take days."""
    device, _ = choose_device(config.device)
    if device.type == "cuda" or config.yes:
        return
    dtype, _ = choose_precision(config.precision, device)
    days = estimated_seconds(config, COCO_PICTURES, TYPICAL_CAPTION, device, dtype) / 86400
    raise UserError(
        f"./coco_data is not there; COCO 2017 is a download of {COCO_DOWNLOAD_GB} GB and training on it would take about "
        f"{days:.0f} days on this {device.type}: add --yes to download it, --data-dir for your data, or try --preset demo"
    )


@dataclass(frozen=True)
class Chosen:
    """The first process's choices, which all processes of a run use."""

    run: Run
    device: torch.device
    dtype: torch.dtype
    device_reason: str = ""
    precision_reason: str = ""
    checkpoint: Path | None = None
    """The checkpoint to resume from; None for a new run."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The content of run.json; empty for a new run."""
    tokenizer: str | None = None
    """See Job.tokenizer; None: not chosen yet."""


@dataclass
class Job:
    """A prepared run: folder, device, precision, model, data and number of steps."""

    config: TrainConfig
    world: World
    run: Run
    device: torch.device
    dtype: torch.dtype
    model: ImageCaptionModel
    datasets: dict[str, CaptionDataset]
    steps_per_epoch: int
    steps: int
    tokens: float
    """Mean length of a training caption with its end token."""
    bad: BadPictures
    tokenizer: str
    """The name that the tokenizer is loaded by: see TrainConfig.tokenizer."""
    data_key: str
    """A hash of the pictures and captions."""
    checkpoint: Path | None = None
    """The checkpoint to resume from; None for a new run."""

    @property
    def pictures_a_step(self) -> int:
        """Pictures per update."""
        return self.config.batch_size * self.config.accumulation_steps

    @property
    def loss_chooses(self) -> bool:
        """Whether the lowest validation loss chooses the best model, as CIDEr-D of few pictures is mostly noise. Not in
        self-critical training, which raises the loss."""
        return min(len(self.datasets["val"]), self.config.val_pictures) < FEW and self.config.objective != "scst"

    @cached_property
    def words(self) -> str:
        """Name of the tokenizer for CIDEr-D, chosen by the first thousand training captions."""
        return tokenizer_for(self.datasets["train"].table.captions()[:1000].to_pylist())

    @property
    def caption_length(self) -> int:
        """Longest caption to generate, in tokens: the config's, limited by the model's positions."""
        return min(self.config.caption_length, self.model.config.text_positions)


def choose_where(config: TrainConfig, run: Run) -> Chosen:
    """Device and precision with their reasons. A resumed run keeps the precision that `auto` chose at its start."""
    device, device_reason = choose_device(config.device)
    checkpoint = None if config.resume == "never" else newest_complete(run.folder)
    about = run.about if checkpoint else {}
    if config.precision == "auto" and about.get("device") == device.type and "precision" in about:
        dtype, precision_reason = choose_precision(about["precision"], device)[0], "chosen when this run started"
    else:
        dtype, precision_reason = choose_precision(config.precision, device)
    return Chosen(run, device, dtype, device_reason, precision_reason, checkpoint, about)


def prepare(config: TrainConfig, world: World, chosen: Chosen) -> Job:
    """Load the data and build the tokenizer and the model of a run."""
    run, device = chosen.run, chosen.device
    if config.cache_on_gpu and device.type != "cuda":  # fail before gigabytes of pictures are decoded
        raise UserError(f"cache_on_gpu on the device {device}: it needs a GPU, leave it out")
    if config.adapts:  # before anything is downloaded for it
        check_adapters(config, device)
    about = chosen.about
    for floor in (FLOOR, 0):  # a resumed run of an earlier version keeps its splits, which had no floor
        tables = find_tables(config, run.folder, floor)
        keys = {split: table.keys() for split, table in tables.items()}
        data_key = key_of([hashlib.sha256(of_split.tobytes()).hexdigest() for of_split in keys.values()])
        if about.get("data", data_key) == data_key:
            break
    else:
        raise UserError(
            f"the pictures or captions have changed since {run.folder} started, so it cannot be resumed: start a new run "
            "with --resume never (or another --output-dir)"
        )
    name, model = start_model(config, chosen, tables, keys["train"])
    datasets = make_datasets(config, world, tables, model)
    if device.type == "cuda":
        for data in datasets.values():
            data.length_multiple = LENGTH_MULTIPLE
    if config.cache_on_gpu:
        datasets["train"].keep_on(device)
    bad = BadPictures(
        run.folder / "bad_samples.csv", tables.values(), config.max_bad_share, bool(about) or not world.main
    )
    if world.main:
        for data in datasets.values():
            bad.add_known(data.table, data.pixels.bad)
            if len(data.pixels.bad) == len(data.table):  # else evaluation would fail, after the training
                where = f"{data.table.root}: no picture of the {data.table.split} split can be read"
                raise UserError(f"{where}: see {bad.path}, and fix them")
    pictures_a_step = config.batch_size * config.accumulation_steps
    steps_per_epoch = len(make_dataloader(datasets["train"], pictures_a_step))
    return Job(
        config=config,
        world=world,
        run=run,
        device=device,
        dtype=chosen.dtype,
        model=model.to(device),
        datasets=datasets,
        steps_per_epoch=steps_per_epoch,
        steps=config.max_steps or config.epochs * steps_per_epoch,
        tokens=len(datasets["train"].tokens.ids) / tables["train"].num_captions + 1,
        bad=bad,
        tokenizer=name,
        data_key=data_key,
        checkpoint=chosen.checkpoint,
    )


def start_model(
    config: TrainConfig, chosen: Chosen, tables: dict[str, CaptionTable], keys: np.ndarray
) -> tuple[str, ImageCaptionModel]:
    """The tokenizer's name, and the model before the run's next step, with frozen weights and adapters set up. `keys`:
    the keys of the training pictures."""
    run, about = chosen.run, chosen.about
    # The pretrained weights that a run started from may have changed, so the checkpoint's model is loaded. Not with
    # adapters: their file would load as one merged model.
    if chosen.checkpoint and not config.adapts:
        name = about.get("tokenizer", config.tokenizer)
        model = ImageCaptionModel.from_pretrained(chosen.checkpoint / "model.safetensors")
    else:
        name, model = make_model(config, tables["train"], chosen.tokenizer or about.get("tokenizer"))
    model.trained_on = np.union1d(model.trained_on, keys)
    check_overlap(model.trained_on, tables["test"], config.allow_overlap)
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    freeze(model, config.freeze)
    if config.shard and not model.config.language_model:
        raise UserError("shard needs a --decoder that is not GPT-2: leave it out")
    if config.adapts:
        bases: dict[str, str | None] = {"model": config.init_model} if config.init_model else pretrained_parts(config)
        if chosen.checkpoint:  # an earlier version may have adapted other layers by default
            adapted = adapted_layers(chosen.checkpoint / "model.safetensors")
            config = dataclasses.replace(config, lora_targets="|".join(map(re.escape, adapted)))
        print(f"adapters    {adapt(model, config, bases, chosen.device)}")
        if about.get("adapters", model.adapters) != model.adapters:
            raise UserError(
                f"the pretrained models are not those that {run.folder} started with, or not in 4 bits as there: restore "
                "those, or start a new run with --resume never"
            )
    return name, model


def make_datasets(
    config: TrainConfig, world: World, tables: dict[str, CaptionTable], model: ImageCaptionModel
) -> dict[str, CaptionDataset]:
    """The train, val and test data sets. Splits with the same table share one data set."""
    sizes = model.config
    different = {id(table): (split, table) for split, table in reversed(tables.items())}  # val may serve as test
    pixels = 3 * sizes.resize_size**2 * sum(len(table) for _, table in different.values())
    small = pixels < KEPT_SHARE_OF_MEMORY * available_memory() / world.local_size
    augmentation = config.augmentation
    if config.objective == "scst":  # the references for the rewards are not flipped
        augmentation = dataclasses.replace(augmentation, flip=0.0)
    of_table = {
        table_id: CaptionDataset(
            table,
            model.tokenizer,
            sizes,
            captions_per_image=config.captions_per_image if split == "train" else 5,
            seed=config.seed,
            augmentation=augmentation if split == "train" else None,
            keep="disk" if config.cache or config.cache_on_gpu else "memory" if small else "no",
            progress=world.main,
        )
        for table_id, (split, table) in different.items()
    }
    return {split: of_table[id(table)] for split, table in tables.items()}


class Estimate(NamedTuple):
    """What a process of the run needs."""

    seconds: float
    """Of training, from the current step on."""
    captions: float
    """Seconds of captions for val and test."""
    memory: float
    """Bytes, without the cached pictures."""


def estimate(job: Job, step: int) -> Estimate:
    """Estimate the rest of a run. Raises UserError where a CPU's memory is too small: the system would kill the process."""
    config, world = job.config, job.world.size
    share = dataclasses.replace(config, model=job.model.config, batch_size=-(-config.batch_size // world))
    train, val, test = (len(job.datasets[split]) // world for split in ("train", "val", "test"))
    seconds = estimated_seconds(share, train, job.tokens, job.device, job.dtype) * (1 - step / job.steps)
    captions = estimated_caption_seconds(share, val, test, job.tokens, job.device, job.dtype)
    weights = sum(parameter.nbytes for parameter in job.model.parameters())
    learned = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    shards = world if config.shard else 1
    memory = estimated_memory(share, weights // shards, learned // shards, job.tokens)
    free = available_memory() / job.world.local_size
    if job.device.type == "cpu" and memory > free and not config.yes:
        raise UserError(
            f"the run needs about {memory / 2**30:.1f} GiB of memory, and there are {free / 2**30:.1f}: use a smaller "
            "--batch-size with as many more --accumulation-steps, or a smaller model (--preset flickr8k); --yes tries it"
        )
    return Estimate(seconds, captions, memory)


def plan(job: Job, step: int) -> str:
    """The text that is printed before training: sizes, steps, estimates."""
    config, table, sizes = job.config, job.datasets["train"].table, job.model.config
    expected = estimate(job, step)
    different = {id(data): data.pixels.cached for data in job.datasets.values()}.values()  # val may serve as test
    cached = sum(pictures.numel() for pictures in different if pictures is not None)
    val, test = len(job.datasets["val"]), len(job.datasets["test"])
    same = job.datasets["test"].table.split == "val"
    tested = "also used as test, as there is no test split" if same else f"{test:,} to test"
    left = ", ".join(counted(number, what) for what, number in table.left_out.items())
    cut = f"{counted(n, 'captions')} cut at the model's max_length" if (n := job.datasets["train"].tokens.cut) else ""
    notes = [table.about, left and f"skipped: {left}", cut, *job.bad.notes]
    if (few := min(val, test)) < FEW:
        chosen = ", so the validation loss chooses the best model" if job.loss_chooses else ""
        notes.append(f"scores are measured on {counted(few, 'pictures')}: below {FEW} they are mostly noise{chosen}")
    if job.device.type == "cpu" and expected.seconds > DAY and config.preset != "flickr8k":
        notes.append("too slow? --preset flickr8k trains a small model in less than an hour on two cores")
    return (
        f"attention   {choose_attention(job.device.type, job.dtype, sizes.decoder_embed_dim // sizes.decoder_num_heads)[1]}\n"
        f"model       {job.model.num_parameters:,} parameters, vocabulary {job.model.config.vocab_size:,}\n"
        f"data        {table.name}: {counted(len(table), 'pictures')}, {counted(table.num_captions, 'captions')} of {job.tokens:.1f} tokens; "
        f"{counted(val, 'pictures')} to validate, {tested}\n"
        f"            {'; '.join(filter(None, notes))}\n"
        f"steps       {job.steps:,} of {job.pictures_a_step} pictures x {config.captions_per_image} captions, "
        f"{job.steps_per_epoch:,} an epoch{f'; going on at step {step:,}' if step else ''}\n"
        f"estimate    about {duration(expected.seconds)} of training and {duration(expected.captions)} of captions for val "
        f"and test; about {expected.memory / 2**30:.1f} GiB for the model and {cached / 2**30:.1f} GiB for pictures cached in memory\n"
        f"output      {job.run.folder}"
    )
