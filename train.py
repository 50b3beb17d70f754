"""The training loop: data, plan, schedule, precision, checkpoints, resume, and the finished model with its pictures.

Imports everything but the scripts. `train(config)` is all that main.py calls. Batches and dropout are pure functions of
(seed, step), so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from cache import key_of
from config import TrainConfig, UserError, ViTGPT2Config
from convert import initialise
from dataset import (
    CaptionDataset,
    decode,
    load_tables,
    load_tokenizer,
    make_dataloader,
    micro_batches,
    to_device,
)
from download import download_coco_dataset, download_flickr30k
from evaluate import BadPictures, caption_loss, check_overlap, evaluate_dataset, print_metrics
from model import ImageCaptionModel, choose_attention, use_flash_attention
from model_file import MODEL_FILE
from scenes import draw_scenes, mark, scene_from_dict, score_scenes
from table import CaptionTable
from utils import (
    PRECISIONS,
    MetricLog,
    StopSignal,
    autocast,
    available_memory,
    checkpoints,
    choose_device,
    choose_precision,
    load_checkpoint,
    matmul_rate,
    put_in_place,
    read_log,
    save_checkpoint,
    writable_directory,
    write_json,
)

COCO_PICTURES = 118_287
COCO_DOWNLOAD_GB = 20
LOG_INTERVAL = 10  # steps
PRETRAINED_ENCODER, PRETRAINED_DECODER = "google/vit-base-patch16-224-in21k", "gpt2"
TYPICAL_CAPTION = 14  # tokens, for estimates made before the captions are read
KEPT_SHARE_OF_MEMORY = 0.4  # up to which pictures are kept there


# Data


def find_tables(config: TrainConfig, run: Path) -> dict[str, CaptionTable]:
    """The train, val and test tables, drawn or downloaded where that is what the config means."""
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
    tables = load_tables(dataset, directory or Path(), config.image_column, config.caption_column)
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


# The plan


def step_operations(config: ViTGPT2Config, captions: int, tokens: float) -> float:
    """Floating-point operations of one picture's training step with so many captions of so many tokens.

    Two for every weight and position it meets, forward once and backward twice (Kaplan et al. 2020, arXiv:2001.08361).
    """
    states, vision, width = config.num_patches + 1, config.vision_embed_dim, config.decoder_embed_dim
    encoder = states * config.vision_num_layers * (12 * vision**2 + 2 * states * vision)
    looking = states * config.decoder_num_layers * 2 * vision * width
    words = captions * tokens
    decoder = words * config.decoder_num_layers * (14 * width**2 + 2 * states * width)
    return 3 * 2 * (encoder + looking + decoder + words * width * config.vocab_size)


def estimated_seconds(
    config: TrainConfig, pictures: int, tokens: float, device: torch.device, dtype: torch.dtype
) -> float:
    """Time of the whole run, at 30 % of the rate that a matrix product is measured to have."""
    rate = 0.3 * matmul_rate(device.type, dtype, 4096 if device.type == "cuda" else 512)
    captions = config.captions_per_image
    passes = config.epochs * (5 if captions == 1 else 1)
    seen = config.max_steps * config.batch_size * config.accumulation_steps if config.max_steps else passes * pictures
    return seen * step_operations(config.model, captions, tokens) / max(rate, 1.0)


def estimated_memory(config: TrainConfig, parameters: int, tokens: float) -> float:
    """Bytes on the device: weights, gradients and AdamW's moments in fp32, activations kept for the backward pass."""
    m = config.model
    kept = 2 if config.gradient_checkpointing else 34  # numbers a layer keeps for each position and unit of width
    states = (m.num_patches + 1) * m.vision_num_layers * m.vision_embed_dim
    words = config.captions_per_image * tokens * m.decoder_num_layers * m.decoder_embed_dim * 1.3
    head = config.captions_per_image * tokens * m.vocab_size * 3
    return 16.0 * parameters + config.batch_size * (2 * kept * (states + words) + 4 * head)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if unit < 3600 else 1}f} {name}"
    return f"{seconds / 86400:.1f} days"


# Optimizers


def build_optimizers(model: ImageCaptionModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW over everything; or Muon (Jordan 2024, kellerjordan.github.io/posts/muon) over the layers' matrices and
    AdamW over embeddings, biases and norms. Only the layers' matrices decay.
    """
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".blocks." in name else others).append(parameter)
    rate, betas, fused = config.learning_rate, (0.9, 0.95), next(model.parameters()).device.type in ("cuda", "cpu")
    rest: dict[str, Any] = {"params": others, "weight_decay": 0.0}
    if config.optimizer == "muon":
        return [
            torch.optim.Muon(matrices, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([rest], lr=rate, betas=betas, fused=fused),
        ]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, rest]
    return [torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)]


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to zero at the last step."""
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# Runs on disk


def find_run(config: TrainConfig) -> Path:
    """The folder of this run: the one asked for, an unfinished one of the same settings to go on with, or a new one."""
    if config.resume not in ("auto", "never"):
        run = Path(config.resume)
        if not checkpoints(run):
            raise UserError(f"{run}: no checkpoint to resume from there: name a run's folder, auto or never")
        check_fingerprint(run, config)
        return run
    if config.output_dir is not None:
        if config.resume == "auto" and checkpoints(config.output_dir):
            check_fingerprint(config.output_dir, config)
        return writable_directory(config.output_dir)
    if config.resume == "auto":
        for run in sorted(Path("runs").glob("*-*"), reverse=True):
            about = read_run(run)
            if about.get("fingerprint") == config.fingerprint and not about["finished"] and checkpoints(run):
                return run
    writable_directory(Path("runs"))
    name = f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):  # runs that start in the same second get folders of their own
        run = Path(name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            run.mkdir()
            break
    return run


def read_run(run: Path) -> dict[str, Any]:
    """run.json of a run, empty where there is none."""
    path = run / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def going_on(config: TrainConfig, run: Path) -> bool:
    """Whether the run has checkpoints that it is to go on from."""
    return config.resume != "never" and bool(checkpoints(run))


def write_run(job: Job, finished: bool) -> None:
    """run.json: which run this is, and what it must go on with to reach the same bits."""
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == job.dtype)
    about = {"fingerprint": job.config.fingerprint, "finished": finished, "device": job.device.type}
    about |= {"precision": precision, "tokenizer": job.tokenizer, "data": job.data_key, "config": job.config.to_dict()}
    write_json(job.run / "run.json", about)


def check_fingerprint(run: Path, config: TrainConfig) -> None:
    """Raises UserError when a run was started with other settings."""
    if read_run(run).get("fingerprint") != config.fingerprint:
        raise UserError(
            f"{run} holds a run with other settings: choose another --output-dir, or --resume never to replace it"
        )


# The loop


@dataclass
class Job:
    """A run made ready: its folder, where and how it computes, the model, the data and the number of steps."""

    config: TrainConfig
    run: Path
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

    @property
    def pictures_a_step(self) -> int:
        """Pictures whose gradients make one update."""
        return self.config.batch_size * self.config.accumulation_steps


def train(config: TrainConfig) -> int:
    """A whole run, from data to the finished model and its evaluation. Returns an exit code: 0, or 130/143 when stopped."""
    run = find_run(config)
    device, device_reason = choose_device(config.device)
    began = read_run(run).get("precision") if going_on(config, run) else None
    if began and config.precision == "auto" and device.type == read_run(run)["device"]:
        dtype, precision_reason = choose_precision(began, device)[0], "as this run began"
    else:
        dtype, precision_reason = choose_precision(config.precision, device)
    use_flash_attention(config.flash_attention)
    print(f"device      {device} ({device_reason})\nprecision   {str(dtype)[6:]} ({precision_reason})", flush=True)
    job = prepare(config, run, device, dtype)
    stopped = learn(job)
    if stopped is not None:
        return stopped
    finish(job)
    return 0


def prepare(config: TrainConfig, run: Path, device: torch.device, dtype: torch.dtype) -> Job:
    """The run's data, tokenizer and fresh model."""
    if config.cache_on_gpu and device.type != "cuda":  # said before gigabytes of pictures are decoded for it
        raise UserError(f"cache_on_gpu on the device {device}: it needs a GPU, leave it out")
    began = read_run(run) if going_on(config, run) else {}
    tables = find_tables(config, run)
    keys = {split: table.keys() for split, table in tables.items()}
    data_key = key_of([hashlib.sha256(own.tobytes()).hexdigest() for own in keys.values()])
    if began.get("data", data_key) != data_key:
        raise UserError(
            f"the pictures or captions have changed since {run} began, so it cannot go on: start a new run with --resume "
            "never (or another --output-dir)"
        )
    check_overlap(keys["train"], tables["test"], config.allow_overlap)
    parts = pretrained_parts(config)
    chosen = parts["decoder"] if parts["decoder"] and config.tokenizer == "auto" else None
    name, tokenizer = choose_tokenizer(config, tables["train"], chosen or began.get("tokenizer"))
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
    torch.manual_seed(config.seed)
    if any(parts.values()):
        sizes, model = initialise(sizes, **parts)
        if sizes.vocab_size != len(tokenizer):
            raise UserError(
                f"{parts['decoder']} knows {sizes.vocab_size:,} tokens and tokenizer {name} has {len(tokenizer):,}: leave "
                "--tokenizer out"
            )
    else:
        model = ImageCaptionModel(sizes)
    model.tokenizer, model.trained_on = tokenizer, keys["train"]
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    assert sizes.resize_size is not None
    different = {id(table): (split, table) for split, table in reversed(tables.items())}  # val may serve as test
    pixels = 3 * sizes.resize_size**2 * sum(len(table) for _, table in different.values())
    small = pixels < KEPT_SHARE_OF_MEMORY * available_memory()
    of_table = {
        place: CaptionDataset(
            table,
            tokenizer,
            sizes,
            captions_per_image=config.captions_per_image if split == "train" else 5,
            seed=config.seed,
            augmentation=config.augmentation if split == "train" else None,
            keep="disk" if config.cache or config.cache_on_gpu else "memory" if small else "no",
        )
        for place, (split, table) in different.items()
    }
    datasets = {split: of_table[id(table)] for split, table in tables.items()}
    if config.cache_on_gpu:
        keep_on_gpu(datasets["train"], device)
    bad = BadPictures(run / "bad_samples.csv", tables.values(), config.max_bad_share, going_on(config, run))
    for data in datasets.values():
        bad.add_known(data)
    pictures_a_step = config.batch_size * config.accumulation_steps
    steps_per_epoch = len(make_dataloader(datasets["train"], pictures_a_step))
    return Job(
        config=config,
        run=run,
        device=device,
        dtype=dtype,
        model=model.to(device),
        datasets=datasets,
        steps_per_epoch=steps_per_epoch,
        steps=config.max_steps or config.epochs * steps_per_epoch,
        tokens=len(datasets["train"].tokens.ids) / tables["train"].num_captions + 1,
        bad=bad,
        tokenizer=name,
        data_key=data_key,
    )


def keep_on_gpu(dataset: CaptionDataset, device: torch.device) -> None:
    """Moves the kept pictures there. Raises UserError where there is no room for them."""
    assert dataset.pixels.kept is not None
    needed, free = dataset.pixels.kept.numel(), torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise UserError(
            f"{needed / 2**30:.1f} GiB of pictures do not fit into the GPU's {free / 2**30:.1f} GiB: use --cache instead "
            "of --cache-on-gpu"
        )
    dataset.keep_on(device)


def pretrained_parts(config: TrainConfig) -> dict[str, str | None]:
    """The encoder and the decoder to start from, None for fresh ones."""
    if config.init == "scratch":
        return {"encoder": config.init_encoder, "decoder": config.init_decoder}
    return {"encoder": config.init_encoder or PRETRAINED_ENCODER, "decoder": config.init_decoder or PRETRAINED_DECODER}


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
    config, table = job.config, job.datasets["train"].table
    seconds = estimated_seconds(config, len(table), job.tokens, job.device, job.dtype) * (1 - step / job.steps)
    memory = estimated_memory(config, job.model.num_parameters, job.tokens)
    different = {id(data): data.pixels.kept for data in job.datasets.values()}.values()  # val may serve as test
    kept = sum(pictures.numel() for pictures in different if pictures is not None)
    val, test = len(job.datasets["val"]), len(job.datasets["test"])
    left_out = table.left_out | {"captions cut at the model's max_length": job.datasets["train"].tokens.cut}
    notes = [table.about, *(f"{number:,} {what}" for what, number in left_out.items() if number), *job.bad.notes]
    return (
        f"attention   {choose_attention(job.device.type, job.dtype, config.model.decoder_embed_dim // config.model.decoder_num_heads)[1]}\n"
        f"model       {job.model.num_parameters:,} parameters, vocabulary {job.model.config.vocab_size:,}\n"
        f"data        {table.name}: {len(table):,} pictures, {table.num_captions:,} captions of {job.tokens:.1f} tokens; "
        f"{val:,} pictures to validate, {test:,} to test\n"
        f"            {'; '.join(filter(None, notes))}\n"
        f"steps       {job.steps:,} of {job.pictures_a_step} pictures x {config.captions_per_image} captions, "
        f"{job.steps_per_epoch:,} an epoch{f'; going on at step {step:,}' if step else ''}\n"
        f"estimate    about {duration(seconds)} of training, about {memory / 2**30:.1f} GiB for the model "
        f"and {kept / 2**30:.1f} GiB for pictures kept in memory\n"
        f"output      {job.run}"
    )


def learn(job: Job) -> int | None:
    """Trains from the newest checkpoint, or from the start, to the last step. Returns an exit code when it was stopped."""
    config, run, device, model = job.config, job.run, job.device, job.model
    optimizers = build_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=job.dtype == torch.float16)
    if config.resume == "never":
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    state = load_checkpoint(run, model, optimizers)
    step, losses = state.get("step", 0), [torch.tensor(loss, device=device) for loss in state.get("losses", [])]
    if state.get("scaler") and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    write_run(job, finished=False)
    print(plan(job, step), flush=True)

    train_set = job.datasets["train"]
    at_hand = train_set.pixels.kept is not None and config.augmentation.moves_pixels_only
    loader = make_dataloader(
        train_set,
        job.pictures_a_step,
        first_step=step,
        last_step=job.steps,
        shuffle=True,
        num_workers=0 if at_hand else min(16, os.cpu_count() or 1, config.num_workers),
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    learner = torch.compile(model) if config.compile else model
    model.train()
    log, stop = MetricLog(run / "metrics.jsonl", step), StopSignal()
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file is not a terminal
    bar = tqdm(total=job.steps, initial=step, desc="training", unit="step", smoothing=0.05, mininterval=pause)
    first_step, pictures, since, norm = step, 0, time.perf_counter(), torch.zeros(())
    while True:  # one time more than there are steps, so that the last look, save and stop are no special case
        last, stopping = step == job.steps, stop.received is not None
        if step > first_step:
            looking = time.perf_counter()
            look(job, step, log)
            due = step % (config.checkpoint_interval or job.steps_per_epoch) == 0
            if due or last or stopping:
                check_finite(losses, norm, scaler, step)
                state = {"step": step, "scaler": scaler.state_dict(), "losses": [loss.item() for loss in losses]}
                save_checkpoint(run / "checkpoints" / f"step-{step:08d}", model.save_file, optimizers, state)
                for old in checkpoints(run)[: -config.keep_checkpoints]:
                    shutil.rmtree(old)
            since += time.perf_counter() - looking  # not counted in the speed
        if last or stopping:
            break

        batch = next(batches)
        job.bad.add(train_set, batch["bad"])
        torch.manual_seed((config.seed << 32) + step)  # dropout is a function of the step: resuming needs no RNG state
        targets = batch["lengths"].sum().clamp(min=1)  # none where no picture of the step can be read
        loss = torch.zeros((), device=device)
        for part in micro_batches(batch, config.batch_size):
            share = float(part["lengths"].sum() / targets)  # so that every token of the step weighs the same
            part = to_device(part, device, train_set)
            with autocast(device, job.dtype):
                part_loss = learner(
                    part["pixel_values"],
                    blank_words(part["input_ids"], config.word_dropout, model.config),
                    part["lengths"],
                    part["labels"],
                    part["positions"],
                    label_smoothing=config.label_smoothing,
                ).loss
            scaler.scale(part_loss * share).backward()
            loss += part_loss.detach() * share
        rate = learning_rate_at(step, job.steps, config)
        norm = update(model, optimizers, scaler, rate, config.gradient_clip)
        step += 1
        losses.append(loss)
        pictures += len(batch["rows"])
        bar.update()
        if step % LOG_INTERVAL == 0 or step == job.steps:
            check_finite(losses, norm, scaler, step)
            mean = torch.stack(losses).mean().item()
            speed = pictures / (time.perf_counter() - since)
            pairs = speed * config.captions_per_image
            bar.set_postfix_str(
                f"loss {mean:.3f}, lr {rate:.1e}, {speed:.0f} pictures/s, {pairs:.0f} pairs/s", refresh=False
            )
            epoch = step / job.steps_per_epoch
            log.write(
                step,
                epoch=epoch,
                loss=mean,
                learning_rate=rate,
                gradient_norm=norm.item() if norm.isfinite() else None,
                pictures_per_second=speed,
            )
            losses, pictures, since = [], 0, time.perf_counter()
    bar.close()
    log.close()
    stop.restore()
    if last:
        return None
    if step > first_step:
        print(f"stopped at step {step:,} and saved: the same command goes on from there")
    return stop.exit_code


def update(
    model: ImageCaptionModel,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    learning_rate: float,
    gradient_clip: float,
) -> Tensor:
    """One update with the gradients gathered so far, clipped; they are gone afterwards. Returns their norm."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    # An overflow in one optimizer's gradients spoils the norm, and by clipping the other's: skip both.
    overflow = scaler.is_enabled() and not norm.isfinite()
    for optimizer in optimizers:
        if not overflow:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return norm


def check_finite(losses: list[Tensor], norm: Tensor, scaler: torch.amp.GradScaler, step: int) -> None:
    """Raises UserError when training has left the numbers, before such weights are saved over good ones."""
    if not all(loss.isfinite() for loss in losses) or not (norm.isfinite() or scaler.is_enabled()):
        raise UserError(f"the loss is not finite around step {step}: lower --learning-rate or use --precision fp32")


def look(job: Job, step: int, log: MetricLog) -> None:
    """Where the step asks for it: the validation loss, at an epoch's end, and sample captions, every eval_interval."""
    last = step == job.steps
    if last or step % job.steps_per_epoch == 0:
        loader = make_dataloader(job.datasets["val"], job.config.batch_size)
        val_loss = caption_loss(job.model, loader, job.device, job.dtype)
        log.write(step, epoch=step / job.steps_per_epoch, val_loss=val_loss)
        tqdm.write(f"step {step:,}: validation loss {val_loss:.3f}")
    if last or step % job.config.eval_interval == 0:
        samples = sample_captions(job)
        log.write(step, samples=samples)
        tqdm.write("\n".join(f"  {name}: {caption}" for name, caption in samples.items()))


def blank_words(input_ids: Tensor, share: float, config: ViTGPT2Config) -> Tensor:
    """input_ids with a share of its tokens, never the first, replaced by the padding token."""
    if not share:
        return input_ids
    blank = torch.rand(input_ids.shape, device=input_ids.device) < share
    blank[..., 0] = False
    return input_ids.masked_fill(blank, config.pad_token_id or 0)


def sample_captions(job: Job) -> dict[str, str]:
    """Greedy captions of the same four validation pictures every time, by file name."""
    dataset = job.datasets["val"]
    rows = list(range(0, len(dataset), max(1, len(dataset) // 4)))[:4]
    samples = [dataset[0, row] for row in rows]
    pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None]).to(job.device)
    with autocast(job.device, job.dtype):
        sequences = job.model.generate(pixels, max_length=caption_length(job)).sequences
    captions = decode(job.model.tokenizer, sequences)
    return {Path(dataset.table.name_of(row)).name: caption for row, caption in zip(rows, captions, strict=True)}


def caption_length(job: Job) -> int:
    """The longest caption to write: as asked for, within the model's positions."""
    return min(job.config.caption_length, job.model.config.max_length)


# The end of a run


def finish(job: Job) -> None:
    """Puts the model in place, evaluates it on the test pictures, draws the curves and says where everything is."""
    run, config, test = job.run, job.config, job.datasets["test"]
    newest = checkpoints(run)[-1] / "model.safetensors"
    put_in_place(newest, run / MODEL_FILE)
    previous = put_in_place(newest, Path(MODEL_FILE))
    job.model.eval()
    captioned, metrics = evaluate_dataset(
        job.model, test, job.device, job.dtype, run, bad=job.bad, max_length=caption_length(job)
    )
    if config.dataset == "scenes":
        metrics |= score_drawn_scenes(config.data_dir or run / "scenes", run, captioned.captions)
    write_json(run / "metrics.json", metrics)
    draw_curves(run)
    write_run(job, finished=True)
    print_metrics(metrics)
    if previous:
        print(f"another run's model was kept as {previous}")
    print(
        f"model       {MODEL_FILE}\npictures    {run / 'samples.png'}, {run / 'curves.png'}\nnumbers     {run / 'metrics.json'}"
    )
    if isinstance(test.table.picture(0), Path):
        print(f"try it      python example_usage.py {test.table.name_of(0)}")


def score_drawn_scenes(directory: Path, run: Path, captions: list[str]) -> dict[str, float]:
    """Marks the test scenes' captions, writes scenes_test.json (file, truth, caption, marks), returns the shares."""
    annotations = json.loads((directory / "annotations" / "captions_test2017.json").read_text(encoding="utf-8"))
    truths = [scene_from_dict(image["scene"]) for image in annotations["images"]]
    write_json(
        run / "scenes_test.json",
        [
            {"file": image["file_name"], "truth": image["scene"], "caption": caption, "right": mark(truth, caption)}
            for image, truth, caption in zip(annotations["images"], truths, captions, strict=True)
        ],
    )
    return score_scenes(truths, captions)


def draw_curves(run: Path) -> None:
    """curves.png: the loss of training and validation, and the learning rate, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(run / "metrics.jsonl")
    figure, (losses, rates) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    for axis, name, style, label in (
        (losses, "loss", {"color": "0.6", "linewidth": 1}, "training"),
        (losses, "val_loss", {"color": "black", "marker": "o", "linestyle": "--"}, "validation"),
        (rates, "learning_rate", {"color": "black"}, None),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    losses.set_ylabel("loss (nats a token)")
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    figure.savefig(run / "curves.png", dpi=100)
    pyplot.close(figure)
