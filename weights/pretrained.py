"""Pretrained weights to start from: a ViT's or a DeiT's, a GPT-2's or another language model's.

Imports config, convert and model; language_model by a late import. Takes everything or nothing, as convert.py does, and
prints what was taken, left out and made new.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ViTGPT2Config
from convert import (
    WANTED,
    find_folder,
    gpt2_fields,
    looks,
    one_line,
    read_json,
    read_processor,
    read_tokenizer,
    read_weights,
    some,
    special_ids,
    split_off,
    take,
    tensor_names,
    untie,
    vit_fields,
)
from model import ImageCaptionModel


def initialise(
    config: ViTGPT2Config, encoder: str | None, decoder: str | None
) -> tuple[ViTGPT2Config, ImageCaptionModel]:
    """A model with the weights of a pretrained ViT or DeiT, of a pretrained GPT-2, or of both; None: fresh ones.

    encoder and decoder are folders or Hub names. Sizes, heads, colours and the vocabulary become those of the weights.
    image_size stays, and the position embeddings are interpolated to it; max_length stays where the weights have as
    many. Cross-attention is always fresh. Prints what was taken, left out and made new. Raises UserError like
    load_transformers.
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
        from decoding.language_model import pretrained_language_model

        config, tensors, tokenizer = pretrained_language_model(decoder, config)
        said.append(f"{decoder}: {some(list(tensors))}, {config.max_length} positions")
        taken |= tensors
    elif decoder is not None:
        theirs, tensors = pretrained_gpt2(decoder, config, left)
        config = dataclasses.replace(theirs, max_length=min(config.max_length, theirs.max_length))
        said.append(f"{decoder}: {some(list(tensors))}, {config.max_length} of {theirs.max_length} positions")
        tensors["decoder.wpe.weight"] = tensors["decoder.wpe.weight"][: config.max_length]
        taken |= tensors
        tokenizer = read_tokenizer(decoder, find_folder(decoder, WANTED), config)
    model = ImageCaptionModel(config)
    if tokenizer is not None:
        model.tokenizer = tokenizer
    fresh = model.state_dict()
    model.load_state_dict(fresh | taken)  # strict about names and shapes
    made = [name for name in fresh if name not in taken]
    assert len(made) + len(taken) == len(fresh)
    print(f"taken       {'; '.join(said) or 'nothing'}\nleft out    {some(left)}\nmade new    {some(made)}")
    return config, model


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
    return config, take(path, weights, names, config)


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
    return config, take(path, weights, [name for name in names if "cross" not in name.ours], config)


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
