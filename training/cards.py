"""The plan of a run on GPUs that people have, calculated without data: main.py --plan."""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import nn

from config import PRESETS, TrainConfig, UserError
from model import ImageCaptionModel
from training.estimates import PEAK_RATES, USED, duration, estimated_memory, run_operations
from training.job import COCO_PICTURES, TYPICAL_CAPTION
from training.optimizers import freeze
from training.start import pretrained_parts
from weights.file import part_of

CARDS = {"H100": 80e9, "RTX 4090": 24e9}  # bytes of memory; the name is also PEAK_RATES'
PICTURES = {"auto": COCO_PICTURES, "coco": COCO_PICTURES, "karpathy": 113_287, "flickr30k": 29_783, "flickr8k": 6_000}
"""Training pictures of known data sets, with five captions each."""
FEWEST = 8  # pictures at a time: below, a GPU is not busy
ROOM = 0.9  # share of the memory that a plan may fill


def plan_for_cards(config: TrainConfig) -> str:
    """Steps, hours and memory of a run on each of CARDS, as text. Raises UserError for data and models whose sizes are not
    known before they are read."""
    pictures = config.num_scenes if config.dataset == "scenes" else PICTURES.get(config.dataset)
    if pictures is None or (config.data_dir and config.dataset == "auto"):
        raise UserError(
            "plan does not know how many pictures your data has: leave --data-dir out, or name one of "
            f"{', '.join(PICTURES)} or scenes with --dataset; a run prints its plan before the first step"
        )
    for name in ("init_encoder", "init_decoder", "decoder", "init_model"):
        if getattr(config, name) not in (None, getattr(PRESETS[config.preset], name)):
            raise UserError(f"plan does not know the sizes of {name} {getattr(config, name)}: leave it out")
    with torch.device("meta"):
        model = ImageCaptionModel(config.model)
    weights, learned = model.num_parameters, learned_parameters(model, config)
    parts = [name for name in (config.init_model, *pretrained_parts(config).values()) if name]
    a_step = config.batch_size * config.accumulation_steps
    an_epoch = -(-pictures * (1 if config.captions_per_image > 1 else 5) // a_step)
    steps = config.max_steps or config.epochs * an_epoch
    operations, sizes = run_operations(config, pictures, TYPICAL_CAPTION), config.model
    lines = [
        f"preset      {config.preset}; calculated, nothing is read",
        f"start       {' and '.join(parts) or 'random weights'}",
        f"model       {weights:,} parameters, {learned:,} of them learned; pictures of {sizes.image_size} x "
        f"{sizes.image_size} pixels, {sizes.num_states} states",
        f"data        {config.dataset}: {pictures:,} pictures, captions of about {TYPICAL_CAPTION} tokens",
        f"steps       {steps:,} of {a_step} pictures x {config.captions_per_image} captions, {an_epoch:,} an epoch",
    ]
    for card, memory in CARDS.items():
        needed, checkpointing, flags = fitted(config, weights, learned, memory)
        name = f"{card}, {memory / 1e9:.0f} GB"
        if needed > ROOM * memory:
            lines.append(f"{name:18}too small: {needed / 1e9:.0f} GB even for one picture at a time")
            continue
        seconds = operations * (4 / 3 if checkpointing else 1) / (USED * PEAK_RATES[card])
        lines.append(
            f"{name:18}about {duration(seconds)} and {needed / 1e9:.0f} GB, {f'with {flags}' if flags else 'as it is'}"
        )
    return "\n".join(lines)


def learned_parameters(model: ImageCaptionModel, config: TrainConfig) -> int:
    """How many parameters a run trains, with frozen parts left out and adapters counted."""
    if not config.adapts:
        freeze(model, config.freeze)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapted = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(config.lora_targets, name)
    ]
    new = sum(p.numel() for name, p in model.named_parameters() if part_of(name) == "new")
    return new + sum(config.lora_rank * (layer.in_features + layer.out_features) for layer in adapted)


def fitted(config: TrainConfig, weights: int, learned: int, memory: float) -> tuple[float, bool, str]:
    """The bytes of the largest batch that fits into the card, whether it needs gradient checkpointing, and the flags for it,
    with as many pictures a step. If nothing fits, the bytes of the smallest."""
    a_step, own = config.batch_size * config.accumulation_steps, config.gradient_checkpointing
    sizes = [size for size in range(config.batch_size, 0, -1) if a_step % size == 0]
    tries = [(size, own) for size in sizes if size >= min(FEWEST, config.batch_size)] + [(size, True) for size in sizes]
    for size, checkpointing in tries:
        share = dataclasses.replace(config, batch_size=size, gradient_checkpointing=checkpointing)
        needed = estimated_memory(share, 4 * weights, learned, TYPICAL_CAPTION)
        if needed <= ROOM * memory:
            break
    flags = [f"--batch-size {size} --accumulation-steps {a_step // size}"] * (size != config.batch_size)
    return needed, checkpointing, " ".join(flags + ["--gradient-checkpointing"] * (checkpointing and not own))
