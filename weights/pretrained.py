"""Pretrained weights to start from: a vision transformer's, a GPT-2's or another language model's.

Takes everything or nothing, as huggingface.py does, and says what was taken and left out.
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
    looks,
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

POSITIONS = ("max_position_embeddings", "max_seq_len")  # what configs call them; some models have no end of them
LANGUAGE_MODEL = ["*.json", "model*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]


@dataclass
class Parts(Saved):
    """A captioner of which only pretrained parts are there, and in words what was taken and left out."""

    taken: str = ""
    left: str = ""


def read_parts(config: ViTGPT2Config, encoder: str | None, decoder: str | None, layer: int = -1) -> Parts:
    """The weights of a pretrained vision transformer, of a pretrained GPT-2 or another language model, or of both; None:
    fresh. Of the encoder the states behind this layer are read: 1 is the first, -1 the last.

    encoder and decoder are folders or Hub names. Sizes, heads, colours and the vocabulary become those of the weights.
    image_size stays, and the position embeddings are interpolated to it; max_length stays where the weights have as
    many. Cross-attention is always fresh. Raises UserError like read_transformers.
    """
    taken: dict[str, Tensor] = {}
    left: list[str] = []
    said, tokenizer = [], None
    if encoder is not None:
        theirs, tensors, family, assumed = pretrained_vision(encoder, config, layer, left)
        config = dataclasses.replace(theirs, image_size=config.image_size, resize_size=config.resize_size)
        old, new = (sizes.image_size // sizes.patch_size for sizes in (theirs, config))
        where = (
            f"positions {old} x {old} -> {new} x {new}" if config.vision_positions == "learned" else "rotary positions"
        )
        said.append(f"{encoder}: {some(list(tensors))}, {where}{assumed}")
        if config.vision_positions == "learned":
            antialias = family is DINOV2 and config.vision_registers > 0  # as transformers does it
            tensors["encoder.position_embeddings"] = interpolate(tensors["encoder.position_embeddings"], new, antialias)
        taken |= tensors
    if decoder is not None and is_language_model(decoder):
        config, tensors, tokenizer = pretrained_language_model(decoder, config, left)
        said.append(f"{decoder}: {some(list(tensors))}, {config.max_length} positions")
        taken |= tensors
    elif decoder is not None:
        theirs, tensors = pretrained_gpt2(decoder, config, left)
        config = dataclasses.replace(theirs, max_length=min(config.max_length, theirs.max_length))
        said.append(f"{decoder}: {some(list(tensors))}, {config.max_length} of {theirs.max_length} positions")
        tensors["decoder.wpe.weight"] = tensors["decoder.wpe.weight"][: config.max_length]
        taken |= tensors
        tokenizer = read_tokenizer(decoder, find_folder(decoder, WANTED), config)
    words = "; ".join(said) or "nothing"
    return Parts(config, taken, tokenizer, path=Path(words), partial=True, taken=words, left=some(left))


def pretrained_vision(
    source: str, config: ViTGPT2Config, layer: int, left: list[str]
) -> tuple[ViTGPT2Config, dict[str, Tensor], Family, str]:
    """A vision transformer's config, tensors, under whatever head, family, and what was assumed of its pictures in words;
    adds to left what was left out."""
    folder = find_folder(source, WANTED)
    with one_line(source):
        about, processor = read_json(folder, "config.json"), read_processor(folder)
        family = family_named(source, "", about)
        fields = vision_fields(source, "", about) | looks(source, processor, family.colours)
        fields |= {"vision_dropout": config.vision_dropout, "resize_size": fields["image_size"]}
        config = dataclasses.replace(config, **fields)
    path, weights = read_weights(source, folder)
    prefix = prefix_of(family.patches, weights)
    left += split_off(weights, prefix, family.unused)
    as_ours(config, prefix, weights)
    tensors = take(path, weights, list(vision_names(config, prefix)))
    assumed = "" if processor else f", no preprocessor_config.json: mean {config.image_mean} assumed"
    kept = config.vision_num_layers + 1 + layer if layer < 0 else layer
    if not 0 < kept <= config.vision_num_layers:
        raise UserError(
            f"{source}: has {config.vision_num_layers} layers, and {layer} is none of them: another --encoder-layer"
        )
    if kept == config.vision_num_layers:
        return config, tensors, family, assumed
    config = dataclasses.replace(config, vision_num_layers=kept, vision_norm_last=False)
    behind = [n for n in tensors if (layer_of(n) or 0) >= kept or n.startswith("encoder.norm.")]
    left += behind
    return config, {name: tensor for name, tensor in tensors.items() if name not in behind}, family, assumed


def pretrained_gpt2(source: str, config: ViTGPT2Config, left: list[str]) -> tuple[ViTGPT2Config, dict[str, Tensor]]:
    """The same for a GPT-2. Special tokens stay where the vocabulary is as large as the config's."""
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
    """The sizes, the tensors by our names and the tokenizer of a folder or a Hub name; adds to left what was left out.
    Raises UserError where it has none that fit, or where its captions could not end."""
    if config.bridge != "prefix":
        raise UserError(
            f"{source}: only GPT-2 takes cross-attention, other language models a prefix: add --bridge prefix"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from decoding.language_model import LanguageModel, few_tokens  # late: it imports much of transformers

    folder = find_folder(source, LANGUAGE_MODEL)
    with refused(f"{source}: no language model to be had"):
        theirs, unused = load_theirs(AutoModelForCausalLM, folder, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        left += unused
        for path in (*folder.glob("tokenizer.json"), *folder.glob("vocab.json")):
            check_ids(path.read_text(encoding="utf-8-sig"))
        tokenizer = AutoTokenizer.from_pretrained(folder, config=theirs.config, trust_remote_code=False)
        if theirs.config.get_text_config() is not theirs.config:
            raise UserError("it is more than a language model")
        about, (words, width) = theirs.config, theirs.get_input_embeddings().weight.shape
        places = [getattr(about, name, None) or config.max_length for name in POSITIONS]
        fields: dict[str, Any] = {
            "language_model": json.dumps(about.to_diff_dict() | {"model_type": about.model_type}, sort_keys=True),
            "vocab_size": words,
            "max_length": min(config.max_length, *places),
            "decoder_embed_dim": width,
            "decoder_num_layers": about.num_hidden_layers,
            "decoder_num_heads": 1,  # theirs are their own affair
        }
    end, start, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    if end is None or not tokenizer.is_fast:
        raise UserError(f"{source}: its tokenizer has no end token, or no tokenizer.json")
    if len(tokenizer) > words:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer):,} tokens and its embedding {words:,} rows: give it as many "
            "(resize_token_embeddings in transformers) and save it, or name another"
        )
    fields |= {"end_token_id": end, "start_token_id": end if start is None else start}
    fields["pad_token_id"] = end if pad is None else pad
    config = dataclasses.replace(config, **fields)
    with refused(f"{source}: this language model cannot read behind a picture"):
        with torch.no_grad():
            expected = theirs(input_ids=few_tokens(words)).logits
        decoder = LanguageModel(config, theirs)
        decoder.prove(expected)
    return config, {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}, tokenizer


def is_language_model(source: str) -> bool:
    """Whether a folder or Hub name has a decoder that is not GPT-2, and so not this project's own."""
    return read_json(find_folder(source, ["config.json"]), "config.json").get("model_type", "gpt2") != "gpt2"


def interpolate(positions: Tensor, side: int, antialias: bool = False) -> Tensor:
    """Position embeddings (1, P or P + 1, D) of a square grid, bicubically for side x side patches; a class token's stays."""
    old = math.isqrt(positions.shape[1])
    if old == side:
        return positions
    first, grid = positions.tensor_split([positions.shape[1] - old * old], 1)
    grid = grid.float().mT.unflatten(-1, (old, old))  # (1, D, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([first, grid.flatten(2).mT.to(positions.dtype)], dim=1)
