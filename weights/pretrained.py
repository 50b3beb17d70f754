"""Read pretrained weights to start from: of a vision transformer, a GPT-2 or another language model.

As in huggingface.py, a folder is loaded completely or an error is raised. Loaded and skipped tensors are reported.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError, ViTGPT2Config
from decoding.foreign import check_ids, load_theirs, refused
from utils import one_line, some
from weights.file import Saved, layer_of
from weights.huggingface import (
    UNUSED,
    WANTED,
    find_folder,
    gpt2_fields,
    pixel_fields,
    read_json,
    read_processor,
    read_tokenizer,
    read_weights,
    special_ids,
    take,
    tensor_names,
    untie,
)
from weights.vision import DINOV2, Family, as_ours, family_named, prefix_of, split_off, vision_fields, vision_names

POSITIONS = ("max_position_embeddings", "max_seq_len")  # names of that limit in configs; some models have none
LANGUAGE_MODEL = ["*.json", "model*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]


@dataclass
class Parts(Saved):
    """A captioner with only its pretrained weights; taken, left: descriptions of the loaded and the skipped tensors."""

    taken: str = ""
    left: str = ""


def read_parts(config: ViTGPT2Config, encoder: str | None, decoder: str | None, layer: int = -1) -> Parts:
    """Read pretrained weights: of a vision transformer, of a GPT-2 or another language model, or of both.

    encoder, decoder: folders or Hub names; None: random weights. layer: the encoder layer whose output is used (1: the
    first, -1: the last). Sizes, heads, colours and vocabulary are those of the weights. image_size is unchanged, and
    position embeddings are interpolated to it; max_length is unchanged unless the weights have fewer positions.
    Cross-attention is always random. Raises UserError as read_transformers does.
    """
    taken: dict[str, Tensor] = {}
    left: list[str] = []
    loaded, tokenizer = [], None
    if encoder is not None:
        theirs, tensors, family, assumed = pretrained_vision(encoder, config, layer, left)
        config = dataclasses.replace(theirs, image_size=config.image_size, resize_size=config.resize_size)
        old, new = (sizes.image_size // sizes.patch_size for sizes in (theirs, config))
        positions = (
            f"positions {old} x {old} -> {new} x {new}" if config.vision_positions == "learned" else "rotary positions"
        )
        loaded.append(f"{encoder}: {some(list(tensors))}, {positions}{assumed}")
        if config.vision_positions == "learned":
            antialias = family is DINOV2 and config.vision_registers > 0  # as in transformers
            tensors["encoder.position_embeddings"] = interpolate(tensors["encoder.position_embeddings"], new, antialias)
        taken |= tensors
    if decoder is not None and is_language_model(decoder):
        config, tensors, tokenizer = pretrained_language_model(decoder, config, left)
        loaded.append(f"{decoder}: {some(list(tensors))}, {config.max_length} positions")
        taken |= tensors
    elif decoder is not None:
        theirs, tensors = pretrained_gpt2(decoder, config, left)
        config = dataclasses.replace(theirs, max_length=min(config.max_length, theirs.max_length))
        loaded.append(f"{decoder}: {some(list(tensors))}, {config.max_length} of {theirs.max_length} positions")
        tensors["decoder.wpe.weight"] = tensors["decoder.wpe.weight"][: config.max_length]
        taken |= tensors
        tokenizer = read_tokenizer(decoder, find_folder(decoder, WANTED), config)
    words = "; ".join(loaded) or "nothing"
    return Parts(config, taken, tokenizer, path=Path(words), partial=True, taken=words, left=some(left))


def pretrained_vision(
    source: str, config: ViTGPT2Config, layer: int, left: list[str]
) -> tuple[ViTGPT2Config, dict[str, Tensor], Family, str]:
    """Read a vision transformer, without any head: its config, tensors, family, and in words what was assumed about its
    preprocessing. Appends the skipped tensors to `left`."""
    folder = find_folder(source, WANTED)
    with one_line(source):
        about, processor = read_json(folder, "config.json"), read_processor(folder)
        family = family_named(source, "", about)
        fields = vision_fields(source, "", about) | pixel_fields(source, processor, family.colours)
        fields |= {"vision_dropout": config.vision_dropout, "resize_size": fields["image_size"]}
        config = dataclasses.replace(config, **fields)
    path, weights = read_weights(source, folder)
    prefix = prefix_of(family.patches, weights)
    left += split_off(weights, prefix, family.unused)
    as_ours(config, prefix, weights)
    tensors = take(path, weights, list(vision_names(config, prefix)))
    assumed = "" if processor else f", no preprocessor_config.json: mean {config.image_mean} assumed"
    number = config.vision_num_layers + 1 + layer if layer < 0 else layer
    if not 0 < number <= config.vision_num_layers:
        raise UserError(
            f"{source}: has {config.vision_num_layers} layers, and no layer {layer}: choose another --encoder-layer"
        )
    if number == config.vision_num_layers:
        return config, tensors, family, assumed
    config = dataclasses.replace(config, vision_num_layers=number, vision_norm_last=False)
    later = [n for n in tensors if (layer_of(n) or 0) >= number or n.startswith("encoder.norm.")]
    left += later
    return config, {name: tensor for name, tensor in tensors.items() if name not in later}, family, assumed


def pretrained_gpt2(source: str, config: ViTGPT2Config, left: list[str]) -> tuple[ViTGPT2Config, dict[str, Tensor]]:
    """Read a GPT-2's config and tensors. Special tokens are unchanged if its vocabulary has the config's size. Appends
    the skipped tensors to `left`."""
    folder = find_folder(source, WANTED)
    about = read_json(folder, "config.json")
    with one_line(source):
        fields = gpt2_fields(source, "", about) | {"dropout": config.dropout}
        if fields["vocab_size"] != config.vocab_size:
            ours = {"bos_token_id": config.start_token_id, "eos_token_id": config.end_token_id}
            fields |= special_ids(source, about, ours if fields["vocab_size"] > config.vocab_size else {})
        config = dataclasses.replace(config, **fields)
    path, weights = read_weights(source, folder)
    prefix = prefix_of("wte.weight", weights)
    untie(path, weights, "lm_head.weight", f"{prefix}wte.weight")
    left += split_off(weights, prefix, UNUSED)
    names = [name for name in tensor_names(config, gpt2=prefix) if name.ours.startswith("decoder.")]
    return config, take(path, weights, [name for name in names if "cross" not in name.ours])


def pretrained_language_model(
    source: str, config: ViTGPT2Config, left: list[str]
) -> tuple[ViTGPT2Config, dict[str, Tensor], Any]:
    """Read a language model's config, tensors by our names and tokenizer, from a folder or a Hub name. Appends the
    skipped tensors to `left`. Raises UserError if it is not usable, or if its captions could not end."""
    if config.bridge != "prefix":
        raise UserError(
            f"{source}: only GPT-2 can have cross-attention, other language models need a prefix: add --bridge prefix"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from decoding.language_model import LanguageModel, few_tokens  # imported late: it loads much of transformers

    folder = find_folder(source, LANGUAGE_MODEL)
    with refused(f"{source}: no usable language model"):
        theirs, unused = load_theirs(AutoModelForCausalLM, folder, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        left += unused
        for path in (*folder.glob("tokenizer.json"), *folder.glob("vocab.json")):
            check_ids(path.read_text(encoding="utf-8-sig"))
        tokenizer = AutoTokenizer.from_pretrained(folder, config=theirs.config, trust_remote_code=False)
        if theirs.config.get_text_config() is not theirs.config:
            raise UserError("it is not only a language model")
        about, (words, width) = theirs.config, theirs.get_input_embeddings().weight.shape
        limits = [getattr(about, name, None) or config.max_length for name in POSITIONS]
        fields: dict[str, Any] = {
            "language_model": json.dumps(about.to_diff_dict() | {"model_type": about.model_type}, sort_keys=True),
            "vocab_size": words,
            "max_length": min(config.max_length, *limits),
            "decoder_embed_dim": width,
            "decoder_num_layers": about.num_hidden_layers,
            "decoder_num_heads": 1,  # not used: the model's own config sets its heads
        }
    end, start, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    if end is None or not tokenizer.is_fast:
        raise UserError(f"{source}: its tokenizer has no end token, or no tokenizer.json")
    if len(tokenizer) > words:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer):,} tokens and its embedding {words:,} rows: give it as many "
            "rows (resize_token_embeddings in transformers) and save it, or name another model"
        )
    fields |= {"end_token_id": end, "start_token_id": end if start is None else start}
    fields["pad_token_id"] = end if pad is None else pad
    config = dataclasses.replace(config, **fields)
    with refused(f"{source}: this language model cannot be used after a picture's prefix"):
        with torch.no_grad():
            expected = theirs(input_ids=few_tokens(words)).logits
        decoder = LanguageModel(config, theirs)
        decoder.prove(expected)
    return config, {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}, tokenizer


def is_language_model(source: str) -> bool:
    """Whether the decoder in a folder or of a Hub name is not GPT-2, so that transformers' code runs it."""
    return read_json(find_folder(source, ["config.json"]), "config.json").get("model_type", "gpt2") != "gpt2"


def interpolate(positions: Tensor, side: int, antialias: bool = False) -> Tensor:
    """Interpolate the position embeddings (1, P, D) of a square grid of P patches bicubically to side x side patches. With
    a class token (1, P + 1, D), its embedding stays unchanged."""
    old = math.isqrt(positions.shape[1])
    if old == side:
        return positions
    first, grid = positions.tensor_split([positions.shape[1] - old * old], 1)
    grid = grid.float().mT.unflatten(-1, (old, old))  # (1, D, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([first, grid.flatten(2).mT.to(positions.dtype)], dim=1)
