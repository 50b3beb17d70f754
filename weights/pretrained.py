"""Pretrained weights to start from: a ViT's or a DeiT's, a GPT-2's or another language model's.

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
from weights.file import Saved
from weights.huggingface import (
    WANTED,
    find_folder,
    gpt2_fields,
    looks,
    read_json,
    read_processor,
    read_tokenizer,
    read_weights,
    special_ids,
    split_off,
    take,
    tensor_names,
    untie,
    vit_fields,
)

LANGUAGE_MODEL = ["*.json", "model*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]


@dataclass
class Parts(Saved):
    """A captioner of which only pretrained parts are there, and in words what was taken and left out."""

    taken: str = ""
    left: str = ""


def read_parts(config: ViTGPT2Config, encoder: str | None, decoder: str | None) -> Parts:
    """The weights of a pretrained ViT or DeiT, of a pretrained GPT-2 or another language model, or of both; None: fresh.

    encoder and decoder are folders or Hub names. Sizes, heads, colours and the vocabulary become those of the weights.
    image_size stays, and the position embeddings are interpolated to it; max_length stays where the weights have as
    many. Cross-attention is always fresh. Raises UserError like read_transformers.
    """
    taken: dict[str, Tensor] = {}
    left: list[str] = []
    said, tokenizer = [], None
    if encoder is not None:
        theirs, tensors = pretrained_vit(encoder, config, left)
        config = dataclasses.replace(theirs, image_size=config.image_size, resize_size=config.resize_size)
        old, new = (sizes.image_size // sizes.patch_size for sizes in (theirs, config))
        said.append(f"{encoder}: {some(list(tensors))}, positions {old} x {old} -> {new} x {new}")
        tensors["encoder.position_embeddings"] = interpolate(tensors["encoder.position_embeddings"], new)
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


def pretrained_vit(source: str, config: ViTGPT2Config, left: list[str]) -> tuple[ViTGPT2Config, dict[str, Tensor]]:
    """A ViT's or DeiT's tensors, under whatever head, and their config; adds to left what was left out.

    Of a DeiT that is the distillation token and its position, too.
    """
    folder = find_folder(source, WANTED)
    with one_line(source):
        fields = vit_fields(source, "", read_json(folder, "config.json"), kinds=("vit", "deit"))
        fields |= looks(source, read_processor(folder)) | {"vision_dropout": config.vision_dropout}
        config = dataclasses.replace(config, **(fields | {"resize_size": fields["image_size"]}))
    path, weights = read_weights(source, folder)
    prefix = prefix_of("embeddings.cls_token", weights)
    left += split_off(weights, prefix)
    distillation, positions = f"{prefix}embeddings.distillation_token", f"{prefix}embeddings.position_embeddings"
    if weights.pop(distillation, None) is not None and positions in weights:
        left.append(distillation)
        weights[positions] = torch.cat([weights[positions][:, :1], weights[positions][:, 2:]], dim=1)
    names = [name for name in tensor_names(config, vit=prefix) if name.ours.startswith("encoder.")]
    return config, take(path, weights, names)


def pretrained_gpt2(source: str, config: ViTGPT2Config, left: list[str]) -> tuple[ViTGPT2Config, dict[str, Tensor]]:
    """The same for a GPT-2. Special tokens stay where the vocabulary is as large as the config's."""
    folder = find_folder(source, WANTED)
    about = read_json(folder, "config.json")
    with one_line(source):
        fields = gpt2_fields(source, "", about) | {"dropout": config.dropout}
        if fields["vocab_size"] != config.vocab_size:
            fields |= special_ids(source, about)
        config = dataclasses.replace(config, **fields)
    path, weights = read_weights(source, folder)
    prefix = prefix_of("wte.weight", weights)
    untie(path, weights, "lm_head.weight", f"{prefix}wte.weight")
    left += split_off(weights, prefix)
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

    folder = find_folder(source, LANGUAGE_MODEL)
    with refused(f"{source}: no language model to be had"):
        theirs, unused = load_theirs(AutoModelForCausalLM, folder, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        left += unused
        for path in (*folder.glob("tokenizer.json"), *folder.glob("vocab.json")):
            check_ids(path.read_text(encoding="utf-8-sig"))
        tokenizer = AutoTokenizer.from_pretrained(folder, config=theirs.config, trust_remote_code=False)
        about = theirs.config
        fields: dict[str, Any] = {
            "language_model": json.dumps(about.to_diff_dict() | {"model_type": about.model_type}, sort_keys=True),
            "vocab_size": about.vocab_size,
            "max_length": min(config.max_length, about.max_position_embeddings),
            "decoder_embed_dim": about.hidden_size,
            "decoder_num_layers": about.num_hidden_layers,
            "decoder_num_heads": 1,  # theirs are their own affair
        }
    end, start, pad = tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id
    if end is None or not tokenizer.is_fast:
        raise UserError(f"{source}: its tokenizer has no end token, or no tokenizer.json")
    fields |= {"end_token_id": end, "start_token_id": end if start is None else start}
    fields["pad_token_id"] = end if pad is None else pad
    body = {f"decoder.body.{name}": tensor for name, tensor in theirs.base_model.state_dict().items()}
    if not about.tie_word_embeddings:
        body["decoder.lm_head.weight"] = theirs.get_output_embeddings().weight.detach()
    return dataclasses.replace(config, **fields), body, tokenizer


def is_language_model(source: str) -> bool:
    """Whether a folder or Hub name has a decoder that is not GPT-2, and so not this project's own."""
    return read_json(find_folder(source, ["config.json"]), "config.json").get("model_type", "gpt2") != "gpt2"


def prefix_of(ending: str, weights: dict[str, Tensor]) -> str:
    """What stands before this name in a file: "vit.", "transformer." or nothing."""
    return next((name.removesuffix(ending) for name in weights if name.endswith(ending)), "")


def interpolate(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, P + 1, D) of a square grid, bicubically for side x side patches; the class token's stays."""
    old = math.isqrt(positions.shape[1] - 1)
    if old == side:
        return positions
    grid = positions[:, 1:].float().mT.unflatten(-1, (old, old))  # (1, D, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).mT.to(positions.dtype)], dim=1)
