"""Convert configs and tensor names of transformers' vision transformers to ours, and back.

Each kind of vision transformer is one entry of FAMILIES. Every name and shape is checked when weights are loaded; what
this model cannot represent is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import UserError, ViTGPT2Config

Source = str | os.PathLike[str]  # a folder, or user/name on the Hugging Face Hub


class Name(NamedTuple):
    """Name and shape of a tensor, here and in transformers."""

    ours: str
    theirs: tuple[str, ...]  # several if ours is their concatenation
    shape: tuple[int, ...]  # ours
    transposed: bool = False  # in transformers it is (in, out), as in GPT-2's Conv1D
    flat: tuple[int, ...] | None = None  # the shape in transformers if that differs otherwise


@dataclass(frozen=True, eq=False)
class Family:
    """How transformers names and configures one kind of vision transformer."""

    kinds: tuple[str, ...]
    """Values of model_type; the first one is used for writing."""
    fixed: dict[str, Any]
    """Our config fields that are the same for the whole family."""
    layers: str
    """The prefix before a layer's number."""
    stem: dict[str, str]
    """Our names of the modules and tensors outside the layers -> transformers' names."""
    layer: dict[str, tuple[str, ...]]
    """Our names of a layer's modules -> transformers' names."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """transformers' defaults that differ from those of ViT (DEFAULTS)."""
    settings: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings that change what the weights compute, with the values that this model supports, the default first."""
    unused: str = "$^"
    """Pattern of the tensors on which captions do not depend."""
    colours: tuple[tuple[float, ...], tuple[float, ...]] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """Mean and standard deviation if the folder has no preprocessor config."""

    @property
    def patches(self) -> str:
        """transformers' name of the patch embedding's weight, with which the prefix of all names is found."""
        return f"{self.stem['patch_embedding']}.weight"


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PLAIN: dict[str, Any] = {
    "vision_norm_first": False,
    "vision_norm_last": True,
    "vision_class_token": True,
    "vision_registers": 0,
}
PLAIN |= {"vision_layer_scale": False, "vision_positions": "learned", "vision_patch_bias": True}
DEFAULTS: dict[str, Any] = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12}
DEFAULTS |= {"num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
DEFAULTS |= {"hidden_dropout_prob": 0.0, "num_register_tokens": 0, "use_swiglu_ffn": False, "use_gated_mlp": False}
EMBEDDINGS = {"patch_embedding": "embeddings.patch_embeddings.projection", "class_token": "embeddings.cls_token"}
EMBEDDINGS |= {"position_embeddings": "embeddings.position_embeddings", "norm": "layernorm"}
QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
CLIP_STEM = {"patch_embedding": "embeddings.patch_embedding"}
CLIP_STEM |= {"position_embeddings": "embeddings.position_embedding.weight"}
CLIP_LAYER: dict[str, tuple[str, ...]] = {
    "norm_before": ("layer_norm1",),
    "qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
    "proj": ("self_attn.out_proj",),
    "norm_after": ("layer_norm2",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
DINO_LAYER: dict[str, tuple[str, ...]] = {"norm_before": ("norm1",), "norm_after": ("norm2",)}
DINO_LAYER |= {"scale_before": ("layer_scale1.lambda1",), "scale_after": ("layer_scale2.lambda1",)}

VIT = Family(
    ("vit", "vit_mae", "vit_msn"),
    PLAIN,
    "encoder.layer.",
    EMBEDDINGS,
    {
        "norm_before": ("layernorm_before",),
        "qkv": QKV,
        "proj": ("attention.output.dense",),
        "norm_after": ("layernorm_after",),
        "fc1": ("intermediate.dense",),
        "fc2": ("output.dense",),
    },
    settings={"qkv_bias": (True,)},
    unused=r"(^|\.)(pooler\..*|embeddings\.mask_token)$",
)
DEIT = Family(
    ("deit",),
    PLAIN | {"vision_registers": 1},
    VIT.layers,
    EMBEDDINGS | {"registers": "embeddings.distillation_token"},
    VIT.layer,
    {"num_register_tokens": 1},
    settings=VIT.settings,
    unused=VIT.unused,
)
CLIP = Family(
    ("clip_vision_model", "clip"),
    PLAIN | {"vision_norm_first": True, "vision_norm_last": False, "vision_patch_bias": False},
    "encoder.layers.",
    CLIP_STEM | {"class_token": "embeddings.class_embedding", "norm_first": "pre_layrnorm"},
    CLIP_LAYER,
    {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    unused=r"(^|\.)(post_layernorm\..*|embeddings\.position_ids)$",
    colours=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
)
SIGLIP = Family(
    ("siglip_vision_model", "siglip"),
    PLAIN | {"vision_class_token": False},
    "encoder.layers.",
    CLIP_STEM | {"norm": "post_layernorm"},
    CLIP_LAYER,
    {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    unused=r"(^|\.)(head\..*|embeddings\.position_ids)$",
)
DINOV2 = Family(
    ("dinov2", "dinov2_with_registers"),
    {name: value for name, value in PLAIN.items() if name != "vision_registers"} | {"vision_layer_scale": True},
    "encoder.layer.",
    EMBEDDINGS | {"registers": "embeddings.register_tokens"},
    DINO_LAYER | {"qkv": QKV, "proj": ("attention.output.dense",), "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)},
    {"layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4},
    {"qkv_bias": (True,)},
    r"(^|\.)embeddings\.mask_token$",
    IMAGENET,
)
DINOV3 = Family(
    ("dinov3_vit",),
    {**DINOV2.fixed, "vision_positions": "rotary"},
    "layer.",
    {
        "patch_embedding": "embeddings.patch_embeddings",
        "class_token": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "norm": "norm",
    },
    DINO_LAYER
    | {
        "qkv": tuple(f"attention.{name}_proj" for name in "qkv"),
        "proj": ("attention.o_proj",),
        "fc1": ("mlp.up_proj",),
        "fc2": ("mlp.down_proj",),
    },
    {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5},
    {"rope_theta": (100.0,), "proj_bias": (True,), "mlp_bias": (True,)},
    DINOV2.unused,
    IMAGENET,
)
FAMILIES = (VIT, DEIT, CLIP, SIGLIP, DINOV2, DINOV3)
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}


def require(source: Source, part: str, about: dict[str, Any], settings: dict[str, tuple[Any, ...]]) -> None:
    """Raise UserError for the first setting whose value is not a known one."""
    for name, known in settings.items():
        if (value := about.get(name, known[0])) not in known:
            words = " or ".join(map(repr, known))
            raise UserError(f"{source}: {part}{name} is {value!r}, which this model cannot represent: only {words}")


def square(source: Source, name: str, size: Any) -> int:
    """The side of a square that is given as a number, as a pair, or as height and width. Raises UserError."""
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else size
    sides = sides if isinstance(sides, list) else [sides]
    if not all(isinstance(side, int) and side == sides[0] for side in sides):
        raise UserError(f"{source}: {name} is {size}, which this model cannot represent: only squares")
    return int(sides[0])


def family_named(source: Source, part: str, about: dict[str, Any]) -> Family:
    """The family of a config's model_type. Raises UserError for another."""
    known = {kind: family for family in FAMILIES for kind in family.kinds}
    if "pretrained_cfg" in about:
        raise UserError(f"{source}: a model of timm: name one that transformers wrote")
    require(source, part, {"model_type": "vit"} | about, {"model_type": tuple(known)})
    return known[about.get("model_type", "vit")]


def family_of(config: ViTGPT2Config) -> Family:
    """The family that can represent such an encoder. Raises UserError if there is none."""
    for family in FAMILIES if config.vision_activation != "swiglu" else (DINOV2, DINOV3):
        if all(getattr(config, name) == value for name, value in family.fixed.items()):
            return family
    raise UserError("transformers has no vision transformer with such settings: this model cannot be converted")


def vision_fields(source: Source, part: str, about: dict[str, Any]) -> dict[str, Any]:
    """Our config fields from the config of a vision transformer, or from the vision config in a CLIP's or SigLIP's.
    Raises UserError for what cannot be represented."""
    family = family_named(source, part, about)
    registers = {"num_register_tokens": 4} if about.get("model_type") == "dinov2_with_registers" else {}
    about = DEFAULTS | family.defaults | registers | about.get("vision_config", about)
    require(source, part, about, {"num_channels": (3,), "apply_layernorm": (True,)} | family.settings)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens"):
        if not isinstance(about[name], int):
            raise TypeError(f"{name} is {about[name]!r}")
    width = about["hidden_size"]
    sides = ("image_size", "patch_size")
    fields: dict[str, Any] = {name: square(source, f"{part}{name}", about[name]) for name in sides}
    fields["image_size"] -= fields["image_size"] % fields["patch_size"]  # pixels after the last full patch are unused
    fields |= family.fixed | {"vision_embed_dim": width, "vision_num_layers": about["num_hidden_layers"]}
    fields |= {"vision_num_heads": about["num_attention_heads"], "vision_norm_eps": about["layer_norm_eps"]}
    fields |= {"vision_dropout": about["hidden_dropout_prob"], "vision_registers": about["num_register_tokens"]}
    gated = (family is DINOV2 and about["use_swiglu_ffn"]) or (family is DINOV3 and about["use_gated_mlp"])
    if not (gated and family is DINOV2):  # whose SwiGLU ignores hidden_act
        require(source, part, about, {"hidden_act": ("silu",) if gated else tuple(ACTIVATIONS)})
    fields["vision_activation"] = "swiglu" if gated else ACTIVATIONS[about["hidden_act"]]
    inside = about["intermediate_size"]
    if family is DINOV2:
        inside = dinov2_mlp(width, about["mlp_ratio"], gated)
    return fields | {"vision_mlp_dim": None if inside == 4 * width else inside}


def dinov2_mlp(width: int, ratio: int, gated: bool) -> int:
    """Inner width of a DINOv2's MLP; with SwiGLU two thirds of the usual one, rounded up to a multiple of 8."""
    inside = int(width * ratio)
    return (int(inside * 2 / 3) + 7) // 8 * 8 if gated else inside


def their_fields(config: ViTGPT2Config) -> dict[str, Any]:
    """The encoder's part of transformers' config.json: the inverse of vision_fields."""
    family, gated = family_of(config), config.vision_activation == "swiglu"
    about: dict[str, Any] = {
        "model_type": family.kinds[1 if family is DINOV2 and config.vision_registers else 0],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.vision_embed_dim,
        "num_hidden_layers": config.vision_num_layers,
        "num_attention_heads": config.vision_num_heads,
        "num_channels": 3,
        "hidden_act": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}.get(config.vision_activation),
        "layer_norm_eps": config.vision_norm_eps,
        "hidden_dropout_prob": config.vision_dropout,
    }
    if family is DINOV2:
        ratios = [r for r in range(1, 33) if dinov2_mlp(config.vision_embed_dim, r, gated) == config.vision_mlp]
        if not ratios:
            raise UserError(
                f"transformers' DINOv2 has no MLP of width {config.vision_mlp}: this model cannot be converted"
            )
        about |= {"hidden_act": about["hidden_act"] or "gelu", "mlp_ratio": ratios[0], "use_swiglu_ffn": gated}
        return about | ({"num_register_tokens": config.vision_registers} if config.vision_registers else {})
    about["intermediate_size"] = config.vision_mlp
    if family is DINOV3:
        about |= {"num_register_tokens": config.vision_registers, "use_gated_mlp": gated, "key_bias": True}
        return about | ({"hidden_act": "silu"} if gated else {})
    if family is SIGLIP:
        return about | {"vision_use_head": False}
    return about if family is CLIP else about | {"qkv_bias": True, "attention_probs_dropout_prob": 0.0}


def vision_names(config: ViTGPT2Config, before: str) -> Iterator[Name]:
    """The names of every tensor of the encoder; `before` is the prefix of transformers' names."""
    family, width, patch, inside = family_of(config), config.vision_embed_dim, config.patch_size, config.vision_mlp
    positions = config.num_patches + config.vision_class_token
    gated, flat = config.vision_activation == "swiglu", family in (CLIP, SIGLIP)
    tensors: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
        "class_token": ((1, 1, width), (width,) if flat else None),
        "registers": ((1, config.vision_registers, width), None),
        "position_embeddings": ((1, positions, width), (positions, width) if flat else None),
    }
    there = {"registers": config.vision_registers, "position_embeddings": config.vision_positions == "learned"}
    modules: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = []
    for ours, theirs in family.stem.items():
        if ours not in tensors:
            shape: tuple[int, ...] = (width, 3, patch, patch) if ours == "patch_embedding" else (width,)
            modules.append((f"encoder.{ours}", (f"{before}{theirs}",), shape))
        elif there.get(ours, True):
            yield Name(f"encoder.{ours}", (f"{before}{theirs}",), tensors[ours][0], flat=tensors[ours][1])
    wide = inside * (2 if gated else 1)
    shapes = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (wide, width), "fc2": (width, inside)}
    layer = dict(family.layer)
    if gated:
        gated_names = {DINOV2: (("mlp.weights_in",), ("mlp.weights_out",))}
        layer["fc1"], layer["fc2"] = gated_names.get(family, (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)))
    for number in range(config.vision_num_layers):
        for ours, several in layer.items():
            names = tuple(f"{before}{family.layers}{number}.{name}" for name in several)
            if ours.startswith("scale_"):
                yield Name(f"encoder.blocks.{number}.{ours}", names, (width,))
            else:
                modules.append((f"encoder.blocks.{number}.{ours}", names, shapes.get(ours, (width,))))
    for ours, names, shape in modules:
        yield Name(f"{ours}.weight", tuple(f"{name}.weight" for name in names), shape)
        if ours != "encoder.patch_embedding" or config.vision_patch_bias:
            yield Name(f"{ours}.bias", tuple(f"{name}.bias" for name in names), shape[:1])


def as_ours(config: ViTGPT2Config, before: str, weights: dict[str, Tensor]) -> None:
    """Convert, in place, tensors that need more than another name. DeiT: the distillation token's position is added to
    the token. DINOv3: a missing bias of the keys becomes zeros, and an empty tensor of registers is removed."""
    family, names = family_of(config), [name for name in vision_names(config, before) if name.ours.endswith("qkv.bias")]
    for theirs in [theirs for name in names for theirs in name.theirs] if family is DINOV3 else []:
        if (weight := weights.get(theirs.replace(".bias", ".weight"))) is not None:
            weights.setdefault(theirs, weight.new_zeros(len(weight)))
    token, positions = (f"{before}{family.stem.get(name)}" for name in ("registers", "position_embeddings"))
    if not config.vision_registers and token in weights and not weights[token].numel():
        del weights[token]
    if family is DEIT and token in weights and weights.get(positions, torch.empty(0)).shape[1:2] > (1,):
        first, second, others = weights[positions].tensor_split([1, 2], 1)
        weights[token], weights[positions] = weights[token] + second, torch.cat([first, others], 1)


def as_theirs(config: ViTGPT2Config, before: str, weights: dict[str, Tensor]) -> None:
    """Undo as_ours, in place. Also add unused tensors that transformers expects in a file: without them it warns that
    the model needs training."""
    family, width = family_of(config), config.vision_embed_dim
    pooler: dict[str, tuple[int, ...]] = {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}
    shapes: dict[Family, dict[str, tuple[int, ...]]] = {
        VIT: pooler,
        DEIT: pooler,
        CLIP: {"post_layernorm.weight": (width,), "post_layernorm.bias": (width,)},
        DINOV2: {"embeddings.mask_token": (1, width)},
        DINOV3: {"embeddings.mask_token": (1, 1, width)},
    }
    if not config.vision_registers:
        shapes[DINOV3]["embeddings.register_tokens"] = (1, 0, width)
    like = weights[f"{before}{family.patches}"]
    weights |= {f"{before}{name}": like.new_zeros(shape) for name, shape in shapes.get(family, {}).items()}
    if family is DEIT:
        first, others = weights[f"{before}embeddings.position_embeddings"].tensor_split([1], 1)
        placed = torch.cat([first, torch.zeros_like(first), others], 1)
        weights[f"{before}embeddings.position_embeddings"] = placed


def prefix_of(ending: str, weights: dict[str, Tensor]) -> str:
    """The prefix of this name in a file: "vit.", "transformer." or nothing."""
    return next((name.removesuffix(ending) for name in weights if name.endswith(ending)), "")


def split_off(weights: dict[str, Tensor], prefix: str, unused: str) -> list[str]:
    """Remove tensors that are unused or do not start with the prefix; return their names."""
    found = [name for name in weights if re.search(unused, name) or not name.startswith(prefix)]
    for name in found:
        del weights[name]
    return found
