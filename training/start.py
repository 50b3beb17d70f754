"""The model before its first step: pretrained parts, new weights, tokenizer, prompt."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from config import PRETRAINED, TrainConfig, UserError, ViTGPT2Config
from data.table import CaptionTable
from dataset import load_tokenizer
from model import EncoderBlock, ImageCaptionModel, VisionTransformer
from training.run import check_model
from utils import some
from weights.adapters import find_base
from weights.pretrained import is_language_model, read_parts


def make_model(config: TrainConfig, table: CaptionTable, chosen: str | None) -> tuple[str, ImageCaptionModel]:
    """The tokenizer's name, by which it can be loaded again, and the model to start from, with its tokenizer."""
    torch.manual_seed(config.seed)
    name, model = read_or_make(config, table, chosen)
    if config.mimetic:
        new = not (config.init_model or pretrained_parts(config)["encoder"])
        done = "the new encoder gets attention and positions like a trained one"
        print(f"mimetic     {done if new else 'no effect: the encoder is pretrained'}")
        if new:
            start_as_trained(model.encoder)
    return name, model


def read_or_make(config: TrainConfig, table: CaptionTable, chosen: str | None) -> tuple[str, ImageCaptionModel]:
    """See make_model: with pretrained weights, and random ones for all others."""
    if config.init_model:
        base = find_base(config.init_model, config.base_dir)
        check_model(Path(base))
        full = ImageCaptionModel.from_pretrained(base, config.base_dir)
        full.merged = None  # training changes the merged weights
        # Dropout belongs to this training, not to the loaded model.
        trained = {f: getattr(config.model, f) for f in ("dropout", "vision_dropout", "vision_drop_path")}
        model = ImageCaptionModel(dataclasses.replace(full.config, **trained))
        model.load_state_dict(full.state_dict())
        model.tokenizer, model.trained_on = full.tokenizer, full.trained_on
        print(f"start       {config.init_model}, with its sizes and its tokenizer")
        return config.init_model, model
    parts = {part: name and find_base(name, config.base_dir) for part, name in pretrained_parts(config).items()}
    if parts["decoder"] and is_language_model(parts["decoder"]):  # it brings its tokenizer
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
        wanted = sizes
        sizes, model = initialise(wanted, **parts, layer=config.encoder_layer)
        if sizes.vocab_size < len(tokenizer):
            what = "leave --tokenizer out" if config.tokenizer != "auto" else "put its tokenizer's files beside it"
            raise UserError(
                f"{parts['decoder']} knows {sizes.vocab_size:,} tokens and tokenizer {name} has {len(tokenizer):,}: {what}"
            )
        for special in ("end_token_id", "start_token_id", "pad_token_id"):  # the decoder's may differ
            setattr(model.config, special, getattr(wanted, special))
    else:
        model = ImageCaptionModel(sizes)
    model.tokenizer = tokenizer
    add_prompt(model, config.prompt)
    return name, model


def initialise(
    config: ViTGPT2Config, encoder: str | None, decoder: str | None, layer: int = -1
) -> tuple[ViTGPT2Config, ImageCaptionModel]:
    """The config and the model with pretrained weights (see weights.pretrained.read_parts) and new ones. Prints what is
    loaded, skipped and new."""
    parts = read_parts(config, encoder, decoder, layer)
    model = ImageCaptionModel.from_saved(parts)
    made = [name for name in model.state_dict() if name not in parts.tensors]
    print(f"loaded      {parts.taken}\nskipped     {parts.left}\nnew         {some(made)}")
    return model.config, model


@torch.no_grad()
def start_as_trained(encoder: VisionTransformer) -> None:
    """Give a new encoder attention and positions that resemble those of trained ones (Trockman & Kolter 2023,
    arXiv:2305.09828, with its numbers for a small ViT). The product of a head's queries and keys is 0.7 (Z + I), cut to
    rank D / H, so that a patch attends to patches like itself; the product of values and projection is 0.4 (Z - I). Z is
    Gaussian noise of variance 1 / D. Learned positions are 2-D sines (as in MAE, arXiv:2111.06377), so that neighbours
    are alike."""
    config = encoder.config
    width, heads, side = config.vision_embed_dim, config.vision_num_heads, config.image_size // config.patch_size
    size = width // heads

    def halves(number: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
        """Two tensors (number, D, D) whose product is the target; r columns of one by r rows of the other are its best
        approximation of rank r."""
        target = noise * torch.randn(number, width, width) / math.sqrt(width) + identity * torch.eye(width)
        left, values, right = torch.linalg.svd(target)
        return left * values.sqrt().unsqueeze(-2), values.sqrt().unsqueeze(-1) * right

    for block in encoder.blocks:
        assert isinstance(block, EncoderBlock)
        query, key, value = block.qkv.weight.view(3, width, width)
        left, right = halves(heads, 0.7, 0.7)
        query.copy_(left[:, :, :size].mT.flatten(0, 1))
        key.copy_(right[:, :size].flatten(0, 1))
        left, right = halves(1, 0.4, -0.4)
        block.proj.weight.copy_(left[0])
        value.copy_(right[0])
    if config.vision_positions == "learned":
        rates = 1e4 ** -(torch.arange(-(-width // 4)) * 4 / width)
        angles = torch.arange(side).unsqueeze(-1) * rates  # (side, D / 4 rounded up)
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        sines = torch.cat(
            [waves.repeat_interleave(side, 0), waves.repeat(side, 1)], -1
        )  # (side * side, >= D), rows first
        encoder.position_embeddings[0, -side * side :] = sines[:, :width]


def add_prompt(model: ImageCaptionModel, prompt: str) -> None:
    """Set the prompt that the decoder reads before every caption. Raises UserError without prefix or room."""
    if prompt:
        ids = tuple(model.tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids)
        dataclasses.replace(model.config, prompt_ids=ids)  # checks them
        model.config.prompt_ids = ids  # encoder and decoder share this config


def pretrained_parts(config: TrainConfig) -> dict[str, str | None]:
    """The names of the pretrained encoder and decoder; None: start from random weights."""
    decoder = config.decoder or config.init_decoder
    if config.init == "scratch":
        return {"encoder": config.init_encoder, "decoder": decoder}
    return {"encoder": config.init_encoder or PRETRAINED["encoder"], "decoder": decoder or PRETRAINED["decoder"]}


def choose_tokenizer(
    config: TrainConfig, table: CaptionTable, resumed: str | None
) -> tuple[str, PreTrainedTokenizerFast]:
    """The tokenizer's name and the tokenizer. "auto": the one that the run started with, else gpt2 if available, else a
    new one trained on the captions."""
    name = (resumed or "gpt2") if config.tokenizer == "auto" else config.tokenizer
    texts = (text.as_py() for text in table.captions())
    try:
        return name, load_tokenizer(name, texts, config.model.vocab_size)
    except UserError as error:
        if config.tokenizer != "auto" or resumed:
            raise
        print(f"tokenizer   trained on the captions, as GPT-2's is not available ({error})")
    return "train", load_tokenizer("train", texts, config.model.vocab_size)
