"""What a run is made of before its first step: its folder, where it computes, its data, its tokenizer, its model; and the
plan of it that is printed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from config import FEW, PRETRAINED, TrainConfig, UserError, ViTGPT2Config
from data.download import download_coco_dataset, download_flickr30k
from data.scenes import draw_scenes
from data.skipped import BadPictures, check_overlap
from data.table import FLOOR, CaptionTable
from dataset import CaptionDataset, load_tables, load_tokenizer, make_dataloader
from model import ImageCaptionModel, choose_attention
from scoring.tokens import tokenizer_for
from training.adapters import adapt, check_adapters
from training.checkpoint import newest_whole
from training.distributed import World
from training.estimates import duration, estimated_memory, estimated_seconds
from training.optimizers import freeze
from training.run import Run, check_model
from utils import available_memory, choose_device, choose_precision, dtypes, key_of, some, write_json
from weights.adapters import adapted_layers, find_base
from weights.pretrained import is_language_model, read_parts

COCO_PICTURES = 118_287
COCO_DOWNLOAD_GB = 20
TYPICAL_CAPTION = 14  # tokens, for estimates made before the captions are read
LENGTH_MULTIPLE = 4  # of T on a GPU
KEPT_SHARE_OF_MEMORY = 0.4  # up to which pictures are kept there


def write_run(job: Job, finished: bool, **more: Any) -> None:
    """run.json: which run this is, what it must go on with to reach the same bits, and `more` to know of it."""
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
    """The train, val and test tables, drawn or downloaded where that is what the config means. `floor`: see load_tables."""
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
        raise UserError(f"dataset {dataset} needs --data-dir: the folder that it lies in")
    tables = load_tables(dataset, directory or Path(), config.image_column, config.caption_column, floor)
    if lacking := [part for part in ("train", "val") if part not in tables]:
        raise UserError(
            f"{directory or dataset} has no {' and no '.join(lacking)} part, only {', '.join(tables)}: add it"
        )
    return tables


def ask_before_download(config: TrainConfig) -> None:
    """Stops before COCO's 20 GB on a machine that would need days to train on them, unless --yes."""
    device, _ = choose_device(config.device)
    if device.type == "cuda" or config.yes:
        return
    dtype, _ = choose_precision(config.precision, device)
    days = estimated_seconds(config, COCO_PICTURES, TYPICAL_CAPTION, device, dtype) / 86400
    raise UserError(
        f"./coco_data is not there; COCO 2017 is a download of {COCO_DOWNLOAD_GB} GB and training on it would take about "
        f"{days:.0f} days on this {device.type}: add --yes to go on, --data-dir for data you have, or try --preset demo"
    )


@dataclass(frozen=True)
class Chosen:
    """What a run's first process has chosen for all of them."""

    run: Run
    device: torch.device
    dtype: torch.dtype
    device_reason: str = ""
    precision_reason: str = ""
    checkpoint: Path | None = None
    """Which one the run goes on from."""
    began: dict[str, Any] = dataclasses.field(default_factory=dict)
    """run.json as it is there; empty for a run that begins."""
    tokenizer: str | None = None
    """See Job.tokenizer; None: it is still to be chosen."""


@dataclass
class Job:
    """A run made ready: its folder, where and how it computes, the model, the data and the number of steps."""

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
    """What the tokenizer was loaded by: see TrainConfig.tokenizer."""
    data_key: str
    """Changes with the pictures and captions."""
    checkpoint: Path | None = None
    """Which one it goes on from."""

    @property
    def pictures_a_step(self) -> int:
        """Pictures whose gradients make one update."""
        return self.config.batch_size * self.config.accumulation_steps

    @property
    def loss_chooses(self) -> bool:
        """Whether the best model is the one with the lowest validation loss, as CIDEr-D of so few pictures, or of none, is
        chance. Not in self-critical training, which raises the loss."""
        return min(len(self.datasets["val"]), self.config.val_pictures) < FEW and self.config.objective != "scst"

    @cached_property
    def words(self) -> str:
        """Name of the tokenizer of CIDEr-D, by the first thousand captions."""
        return tokenizer_for(self.datasets["train"].table.captions()[:1000].to_pylist())

    @property
    def caption_length(self) -> int:
        """The longest caption to write: as asked for, within the model's positions."""
        return min(self.config.caption_length, self.model.config.text_positions)


def choose_where(config: TrainConfig, run: Run) -> Chosen:
    """Device and precision with their reasons; a run that goes on keeps the precision that `auto` once chose."""
    device, device_reason = choose_device(config.device)
    checkpoint = None if config.resume == "never" else newest_whole(run.folder)
    began = run.about if checkpoint else {}
    if config.precision == "auto" and began.get("device") == device.type and "precision" in began:
        dtype, precision_reason = choose_precision(began["precision"], device)[0], "as this run began"
    else:
        dtype, precision_reason = choose_precision(config.precision, device)
    return Chosen(run, device, dtype, device_reason, precision_reason, checkpoint, began)


def prepare(config: TrainConfig, world: World, chosen: Chosen) -> Job:
    """The run's data, tokenizer and fresh model."""
    run, device = chosen.run, chosen.device
    if config.cache_on_gpu and device.type != "cuda":  # said before gigabytes of pictures are decoded for it
        raise UserError(f"cache_on_gpu on the device {device}: it needs a GPU, leave it out")
    if config.adapts:  # before anything is downloaded for it
        check_adapters(config, device)
    began = chosen.began
    for floor in (FLOOR, 0):  # a run of an earlier version goes on with its own parts
        tables = find_tables(config, run.folder, floor)
        keys = {split: table.keys() for split, table in tables.items()}
        data_key = key_of([hashlib.sha256(own.tobytes()).hexdigest() for own in keys.values()])
        if began.get("data", data_key) == data_key:
            break
    else:
        raise UserError(
            f"the pictures or captions have changed since {run.folder} began, so it cannot go on: start a new run with --resume "
            "never (or another --output-dir)"
        )
    name, model = start_model(config, chosen, tables, keys["train"])
    datasets = make_datasets(config, world, tables, model)
    if device.type == "cuda":
        for own in datasets.values():
            own.length_multiple = LENGTH_MULTIPLE
    if config.cache_on_gpu:
        datasets["train"].keep_on(device)
    bad = BadPictures(
        run.folder / "bad_samples.csv", tables.values(), config.max_bad_share, bool(began) or not world.main
    )
    if world.main:
        for data in datasets.values():
            bad.add_known(data.table, data.pixels.bad)
            if len(data.pixels.bad) == len(data.table):  # or evaluation would say so, after the training
                where = f"{data.table.root}: no picture of the {data.table.split} part can be read"
                raise UserError(f"{where}: see {bad.path}, and mend them")
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
    """The model before the run's next step, with what is frozen and what has adapters, and its tokenizer's name. `keys`
    are those of the training pictures."""
    run, began = chosen.run, chosen.began
    # What a run began from may have changed meanwhile. A file of adapters is loaded as the plain model that they make of
    # their base.
    if chosen.checkpoint and not config.adapts:
        name = began.get("tokenizer", config.tokenizer)
        model = ImageCaptionModel.from_pretrained(chosen.checkpoint / "model.safetensors")
    else:
        name, model = make_model(config, tables["train"], chosen.tokenizer or began.get("tokenizer"))
    model.trained_on = np.union1d(model.trained_on, keys)
    check_overlap(model.trained_on, tables["test"], config.allow_overlap)
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    freeze(model, config.freeze)
    if config.shard and not model.config.language_model:
        raise UserError("shard is for a --decoder of another kind than GPT-2: leave it out")
    if config.adapts:
        bases: dict[str, str | None] = {"model": config.init_model} if config.init_model else pretrained_parts(config)
        if chosen.checkpoint:  # perhaps begun by a version that chose other layers
            begun = adapted_layers(chosen.checkpoint / "model.safetensors")
            config = dataclasses.replace(config, lora_targets="|".join(map(re.escape, begun)))
        print(f"adapters    {adapt(model, config, bases, chosen.device)}")
        if began.get("adapters", model.adapters) != model.adapters:
            raise UserError(
                f"the pretrained models are not those that {run.folder} began on, or not in 4 bits as there: bring those back, or "
                "start a new run with --resume never"
            )
    return name, model


def make_datasets(
    config: TrainConfig, world: World, tables: dict[str, CaptionTable], model: ImageCaptionModel
) -> dict[str, CaptionDataset]:
    """The train, val and test data; one for two of them where they are the same pictures."""
    sizes = model.config
    assert sizes.resize_size is not None
    different = {id(table): (split, table) for split, table in reversed(tables.items())}  # val may serve as test
    pixels = 3 * sizes.resize_size**2 * sum(len(table) for _, table in different.values())
    small = pixels < KEPT_SHARE_OF_MEMORY * available_memory() / world.local_size
    augmentation = config.augmentation
    if config.objective == "scst":  # rewards come from the references as they are
        augmentation = dataclasses.replace(augmentation, flip=0.0)
    of_table = {
        place: CaptionDataset(
            table,
            model.tokenizer,
            sizes,
            captions_per_image=config.captions_per_image if split == "train" else 5,
            seed=config.seed,
            augmentation=augmentation if split == "train" else None,
            keep="disk" if config.cache or config.cache_on_gpu else "memory" if small else "no",
            progress=world.main,
        )
        for place, (split, table) in different.items()
    }
    return {split: of_table[id(table)] for split, table in tables.items()}


def make_model(config: TrainConfig, table: CaptionTable, chosen: str | None) -> tuple[str, ImageCaptionModel]:
    """The model to start from, with its tokenizer, and the name that this can be had by again."""
    torch.manual_seed(config.seed)
    if config.init_model:
        base = find_base(config.init_model, config.base_dir)
        check_model(Path(base))
        whole = ImageCaptionModel.from_pretrained(base, config.base_dir)
        whole.merged = None  # they will not stay what they are
        # Not what the model is, but how it is trained.
        trained = {f: getattr(config.model, f) for f in ("dropout", "vision_dropout", "vision_drop_path")}
        model = ImageCaptionModel(dataclasses.replace(whole.config, **trained))
        model.load_state_dict(whole.state_dict())
        model.tokenizer, model.trained_on = whole.tokenizer, whole.trained_on
        print(f"start       {config.init_model}, with its sizes and its tokenizer")
        return config.init_model, model
    parts = {part: name and find_base(name, config.base_dir) for part, name in pretrained_parts(config).items()}
    if parts["decoder"] and is_language_model(parts["decoder"]):  # whose tokenizer comes with it
        _, model = initialise(config.model, **parts, layer=config.encoder_layer)
        add_prompt(model, config.prompt)
        return parts["decoder"], model
    if parts["decoder"] and config.tokenizer == "auto":
        chosen = parts["decoder"]
    name, tokenizer = choose_tokenizer(config, table, chosen)
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(f"tokenizer {config.tokenizer} has no end token: choose another --tokenizer")
    sizes = dataclasses.replace(
        config.model,
        vocab_size=len(tokenizer),
        end_token_id=end,
        start_token_id=end if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    if any(parts.values()):
        own = sizes
        sizes, model = initialise(own, **parts, layer=config.encoder_layer)
        if sizes.vocab_size < len(tokenizer):
            what = "leave --tokenizer out" if config.tokenizer != "auto" else "put its own tokenizer's files beside it"
            raise UserError(
                f"{parts['decoder']} knows {sizes.vocab_size:,} tokens and tokenizer {name} has {len(tokenizer):,}: {what}"
            )
        for special in ("end_token_id", "start_token_id", "pad_token_id"):  # the decoder may name others
            setattr(model.config, special, getattr(own, special))
    else:
        model = ImageCaptionModel(sizes)
    model.tokenizer = tokenizer
    add_prompt(model, config.prompt)
    return name, model


def initialise(
    config: ViTGPT2Config, encoder: str | None, decoder: str | None, layer: int = -1
) -> tuple[ViTGPT2Config, ImageCaptionModel]:
    """A model with pretrained parts (see weights.pretrained.read_parts) and fresh ones, and its config. Prints what was
    taken, left out and made new."""
    parts = read_parts(config, encoder, decoder, layer)
    model = ImageCaptionModel.from_saved(parts)
    made = [name for name in model.state_dict() if name not in parts.tensors]
    print(f"taken       {parts.taken}\nleft out    {parts.left}\nmade new    {some(made)}")
    return model.config, model


def add_prompt(model: ImageCaptionModel, prompt: str) -> None:
    """Has the decoder read this before every caption. Raises UserError where there is no prefix, or no room."""
    if prompt:
        ids = tuple(model.tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids)
        dataclasses.replace(model.config, prompt_ids=ids)  # checks it
        model.config.prompt_ids = ids  # of the parts' config too, which is the same one


def pretrained_parts(config: TrainConfig) -> dict[str, str | None]:
    """The encoder and the decoder to start from, None for fresh ones."""
    decoder = config.decoder or config.init_decoder
    if config.init == "scratch":
        return {"encoder": config.init_encoder, "decoder": decoder}
    return {"encoder": config.init_encoder or PRETRAINED["encoder"], "decoder": decoder or PRETRAINED["decoder"]}


def choose_tokenizer(
    config: TrainConfig, table: CaptionTable, began: str | None
) -> tuple[str, PreTrainedTokenizerFast]:
    """The tokenizer and its name, which for "auto" is what the run began with, or gpt2 where that can be had."""
    name = (began or "gpt2") if config.tokenizer == "auto" else config.tokenizer
    texts = (text.as_py() for text in table.captions())
    try:
        return name, load_tokenizer(name, texts, config.model.vocab_size)
    except UserError as error:
        if config.tokenizer != "auto" or began:
            raise
        print(f"tokenizer   trained on the captions, as GPT-2's cannot be had ({error})")
    return "train", load_tokenizer("train", texts, config.model.vocab_size)


def plan(job: Job, step: int) -> str:
    """What is about to happen: sizes, steps, estimates."""
    config, table, sizes, world = job.config, job.datasets["train"].table, job.model.config, job.world.size
    own = dataclasses.replace(config, model=sizes, batch_size=-(-config.batch_size // world))  # this process's share
    seconds = estimated_seconds(own, len(table) // world, job.tokens, job.device, job.dtype) * (1 - step / job.steps)
    weights = sum(parameter.nbytes for parameter in job.model.parameters())
    learned = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    shards = world if config.shard else 1
    memory = estimated_memory(own, weights // shards, learned // shards, job.tokens)
    different = {id(data): data.pixels.kept for data in job.datasets.values()}.values()  # val may serve as test
    kept = sum(pictures.numel() for pictures in different if pictures is not None)
    val, test = len(job.datasets["val"]), len(job.datasets["test"])
    same = job.datasets["test"].table.split == "val"
    tested = "which serve as test too, as there is no test part" if same else f"{test:,} to test"
    left = ", ".join(f"{number:,} {what}" for what, number in table.left_out.items())
    cut = f"{n:,} captions cut at the model's max_length" if (n := job.datasets["train"].tokens.cut) else ""
    notes = [table.about, left and f"left out: {left}", cut, *job.bad.notes]
    if (few := min(val, test)) < FEW:
        chosen = ", so the validation loss chooses the best model" if job.loss_chooses else ""
        notes.append(f"numbers rest on {few:,} pictures, mostly chance below {FEW}{chosen}")
    return (
        f"attention   {choose_attention(job.device.type, job.dtype, sizes.decoder_embed_dim // sizes.decoder_num_heads)[1]}\n"
        f"model       {job.model.num_parameters:,} parameters, vocabulary {job.model.config.vocab_size:,}\n"
        f"data        {table.name}: {len(table):,} pictures, {table.num_captions:,} captions of {job.tokens:.1f} tokens; "
        f"{val:,} pictures to validate, {tested}\n"
        f"            {'; '.join(filter(None, notes))}\n"
        f"steps       {job.steps:,} of {job.pictures_a_step} pictures x {config.captions_per_image} captions, "
        f"{job.steps_per_epoch:,} an epoch{f'; going on at step {step:,}' if step else ''}\n"
        f"estimate    about {duration(seconds)} of training, about {memory / 2**30:.1f} GiB for the model "
        f"and {kept / 2**30:.1f} GiB for pictures kept in memory\n"
        f"output      {job.run.folder}"
    )
