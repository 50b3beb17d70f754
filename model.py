"""The model: a vision transformer (ViT) whose patches a GPT-2 decoder reads, through cross-attention or as a prefix.

From the bottom up: attention, encoder, decoder, and the captioner with its loss, load and save. The file formats are in
weights/, the search for captions is in decoding/. Nothing here trains, decodes picture files or chooses a device.

Dimensions: N pictures, K captions per picture, T tokens per caption, S encoder states per picture (class token,
registers, patches), H heads, D width, V vocabulary, M real positions (those that have a target).

References: ViT, Dosovitskiy et al. 2021 (arXiv:2010.11929); GPT-2, Radford et al. 2019; cross-attention as in
Vaswani et al. 2017 (arXiv:1706.03762), placed where transformers' GPT2Model places it; the prefix as in ClipCap, Mokady
et al. 2021 (arXiv:2111.09734), fed as transformers' GPT-2 is with inputs_embeds.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ViTGPT2Config
from decoding.cache import ALIGNED, DecoderCache, FastCopies, Looked, Packing, next_logits
from decoding.foreign import no_larger, refused
from decoding.search import Generated, generate
from utils import write_json
from weights.adapters import base_of, merge_adapters
from weights.file import MODEL_FILE, Saved, check_finite, check_shapes, gpt2_tokenizer, part_of, write_model_file
from weights.known import read_captioner
from weights.remote import write_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from decoding.recorded import StaticCache

# Attention by flash_attn, by torch's kernel, or by matrix products. B rows (or N pictures with K captions each).

_flash_wanted = True
_flash_3: str | None = None
_flash: tuple[Callable[..., Tensor] | None, str] | None = None


def use_flash_attention(wanted: bool) -> None:
    """Allow or forbid the flash_attn package in `attention` (allowed by default). If allowed on a Hopper GPU, also
    activate FlashAttention-3 for torch's attention, if this torch has it."""
    global _flash_wanted, _flash_3
    _flash_wanted = wanted
    if wanted and _flash_3 is None and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
            _flash_3 = "FlashAttention-3"
        except Exception as error:  # its kernels are a separate package
            _flash_3 = ""
            print(f"attention   FlashAttention-3 cannot be activated ({type(error).__name__}): continuing without it")


def flash_attn_function() -> tuple[Callable[..., Tensor] | None, str]:
    """Return flash_attn's function, or None, and the reason in words. The import is tried only once.

    It imports the function, not only the package: other packages also call themselves flash_attn but do not have it.
    """
    global _flash
    if _flash is None:  # a global, because torch.compile cannot trace functools.cache
        _flash = _find_flash_attn()
    return _flash


def _find_flash_attn() -> tuple[Callable[..., Tensor] | None, str]:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return None, "flash_attn needs an Ampere GPU or newer"
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # a package built for another torch raises anything from ImportError to OSError
        return None, f"flash_attn cannot be imported ({type(error).__name__})"
    return flash_attn_func, "flash_attn is installed"


def choose_attention(
    device_type: str, dtype: torch.dtype, head_size: int = 64
) -> tuple[Callable[..., Tensor] | None, str]:
    """Return flash_attn's function if it supports such tensors, else None for torch's; and the reason in words."""
    if device_type == "cpu" and dtype == torch.bfloat16:
        return None, "matrix products in bfloat16 (for short captions faster than torch's kernel on a CPU)"
    function = None
    if not _flash_wanted:
        reason = "flash_attn is turned off"
    elif _flash_3 and device_type == "cuda":
        reason = f"its kernel is {_flash_3}"
    elif device_type != "cuda":
        reason = f"device is {device_type}, flash_attn needs cuda"
    elif dtype not in (torch.float16, torch.bfloat16):
        reason = f"{dtype} tensors, flash_attn needs half precision"
    elif head_size % 8 or head_size > 256:
        reason = f"heads of {head_size}, flash_attn needs a multiple of 8 up to 256"
    else:
        function, reason = flash_attn_function()
    return function, f"{'flash_attn' if function else 'torch scaled_dot_product_attention'} ({reason})"


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Compute softmax(query key^T / sqrt(head size)) value with the fastest kernel available.

    query (B, Tq, H, D/H), key and value (B, Tk, H, D/H), one dtype; `causal` needs Tq = Tk.
    Returns (B, Tq, H, D/H).
    """
    function, _ = choose_attention(query.device.type, query.dtype, query.shape[-1])
    if function is not None:
        return function(query, key, value, causal=causal)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, T, D/H)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # For sequences as short as captions, torch's CPU kernel takes 3 to 6 times as long, forward and backward.
        scores = (query * key.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, H, Tq, Tk)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def attention_behind(
    query: Tensor, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor], visible: Tensor | None = None
) -> Tensor:
    """Attend over the prefix's and the text's keys without concatenating them; a picture's K rows share the prefix.

    query (N * K, Tq, H, D/H), key and value of the text (N * K, Tk, H, D/H); before: keys and values of the prefix
    (N, S, H, D/H), whose dtype the result has; visible: bool (Tq, Tk), the text's keys that each query may attend to
    (default: all). Returns (N * K, Tq, H, D/H).
    """
    (pictures, states), scale = before[0].shape[:2], query.shape[-1] ** -0.5
    query, key, value = (x.to(before[0].dtype).unflatten(0, (pictures, -1)) for x in (query * scale, key, value))
    text = torch.einsum("nkthd,nkuhd->nkhtu", query, key)
    if visible is not None:
        text = text.masked_fill(~visible, float("-inf"))
    scores = torch.cat([torch.einsum("nkthd,nshd->nkhts", query, before[0]), text], -1)
    prefix, text = scores.softmax(-1).to(value.dtype).tensor_split([states], -1)
    mixed = torch.einsum("nkhts,nshd->nkthd", prefix, before[1]) + torch.einsum("nkhtu,nkuhd->nkthd", text, value)
    return mixed.flatten(0, 1)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """Split (B, T, parts * D) into `parts` tensors of (B, T, H, D/H)."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


# The encoder


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu": lambda x: swiglu(*x.chunk(2, -1)),
}


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Multiply one half of a layer's outputs by the SiLU of the other."""
    return F.silu(gate) * value


class EncoderBlock(nn.Module):
    """One pre-norm layer of a vision transformer: self-attention, then an MLP."""

    def __init__(self, config: ViTGPT2Config, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        width, inside, eps = config.vision_embed_dim, config.vision_mlp, config.vision_norm_eps
        self.num_heads, self.dropout = config.vision_num_heads, config.vision_dropout
        self.activation = config.vision_activation
        self.norm_before = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_after = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, inside * (2 if self.activation == "swiglu" else 1))
        self.fc2 = nn.Linear(inside, width)
        if config.vision_layer_scale:
            self.scale_before, self.scale_after = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        """x (N, S, D) -> (N, S, D); turns (2, P, D/H) from rotary_turns."""
        query, key, value = split_heads(self.qkv(self.norm_before(x)), 3, self.num_heads)
        if turns is not None:
            query, key = rotate(query, turns), rotate(key, turns)
        x = x + self.branch(self.proj(attention(query, key, value).flatten(2)), "scale_before")
        hidden = ACTIVATIONS[self.activation](self.fc1(self.norm_after(x)))
        return x + self.branch(self.fc2(hidden), "scale_after")

    def branch(self, x: Tensor, scale: str = "") -> Tensor:
        """Finish a residual branch (N, S, D): dropout, layer scale, and in training drop path, which skips the branch
        for random pictures (Huang et al. 2016, arXiv:1603.09382)."""
        x = F.dropout(x, self.dropout, self.training)
        if hasattr(self, scale):
            x = x * getattr(self, scale)
        if not (self.training and self.drop_path):
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.drop_path)


def rotary_turns(side: int, size: int) -> Tensor:
    """Cosines and sines (2, side * side, size) of DINOv3's rotary positions (arXiv:2508.10104), for heads of this size.

    The angles depend on a patch's centre, from -1 to 1 in both directions, at size / 4 wavelengths, up to 100 times the
    shortest one."""
    middles = (torch.arange(side) + 0.5) / side * 2 - 1
    places = torch.cartesian_prod(middles, middles)  # (side * side, 2), rows first
    angles = (2 * math.pi * places.unsqueeze(-1) * 100.0 ** -torch.arange(0, 1, 4 / size)).flatten(1).tile(2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the last P of the S states of heads (N, S, H, D/H)."""
    cos, sin = turns.unsqueeze(2).to(x.dtype)
    first, patches = x[:, : -len(cos)], x[:, -len(cos) :]
    one, other = patches.chunk(2, -1)
    return torch.cat([first, patches * cos + torch.cat([-other, one], -1) * sin], 1)


class VisionTransformer(nn.Module):
    """A vision transformer without pooler: takes uint8 or normalised pictures, returns a state for the class token,
    each register and each patch. ViT, DeiT, MAE, MSN, CLIP, SigLIP, DINOv2 and DINOv3 differ only in config fields."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTGPT2Config) -> None:
        super().__init__()
        self.config = config
        width, patch, eps = config.vision_embed_dim, config.patch_size, config.vision_norm_eps
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=config.vision_patch_bias)
        if config.vision_class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.vision_registers:
            self.registers = nn.Parameter(torch.zeros(1, config.vision_registers, width))
        if config.vision_positions == "learned":
            placed = config.num_patches + config.vision_class_token
            self.position_embeddings = nn.Parameter(torch.zeros(1, placed, width))
        if config.vision_norm_first:
            self.norm_first = nn.LayerNorm(width, eps=eps)
        layers = config.vision_num_layers
        skipped = [config.vision_drop_path * index / max(1, layers - 1) for index in range(layers)]
        self.blocks = nn.ModuleList(EncoderBlock(config, share) for share in skipped)
        if config.vision_norm_last:
            self.norm = nn.LayerNorm(width, eps=eps)
        self.gradient_checkpointing = False
        self.pictures_at_a_time: int | None = None
        # Not saved, because they follow from the config.
        self.register_buffer("mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)
        self.turns: Tensor | None
        turns = None
        if config.vision_positions == "rotary":
            turns = rotary_turns(config.image_size // patch, width // config.vision_num_heads)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S), uint8 (normalised here) or float (already normalised) -> (N, states, D)."""
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}: expected (N, 3, {size}, {size})")
        if not (pixel_values.dtype == torch.uint8 or pixel_values.is_floating_point()):
            raise ValueError(f"pixel_values is {pixel_values.dtype}: expected uint8, or normalised floats")
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values / 255 - self.mean) / self.std
        x = self.embed(
            self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        )
        if self.config.vision_norm_first:
            x = self.norm_first(x)
        for block in self.blocks:
            x = run_block(block, x, self.turns, save_memory=self.gradient_checkpointing)
        return self.norm(x) if self.config.vision_norm_last else x

    def embed(self, x: Tensor) -> Tensor:
        """Add positions to the patches (N, P, D) and put class token and registers before them: (N, states, D)."""
        config, number = self.config, x.shape[0]  # len(x) would become a constant in an exported graph
        before = []
        if config.vision_class_token:
            # Expand along a new axis: else one picture's gradient is a slice, and DDP warns of its strides.
            before = [self.class_token[0].expand(number, -1, -1)]
        x = torch.cat([*before, x], dim=1)
        if config.vision_positions == "learned":
            x = x + self.position_embeddings
        if not config.vision_registers:
            return x
        registers = self.registers[0].expand(number, -1, -1)
        return torch.cat([x[:, :1], registers.to(x.dtype), x[:, 1:]], dim=1)


def run_block(block: Callable[..., Any], *inputs: Any, save_memory: bool) -> Any:
    """Call block(*inputs); with save_memory, activations are not stored, the backward pass computes them again."""
    if save_memory and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# The decoder


class SelfAttention(nn.Module):
    """Causal self-attention of one decoder layer; modules are named as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        packing: Packing | None,
        states: Tensor | None,
        past: int,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (N * K, T, D), or (M, D) with a packing -> like x.

        states: this layer's cache, of which `past` positions are filled. before: keys and values (N, S, H, D/H) of the
        prefix, which a picture's K rows share.
        """
        projected = self.c_attn(x)
        query, key, value = split_heads(packing.unpack(projected) if packing else projected, 3, self.num_heads)
        length = query.shape[1]
        if states is not None:
            states[0, :, past : past + length] = key
            states[1, :, past : past + length] = value
            if past:  # one query attends to all keys before it; several at once would need a shifted mask
                assert length == 1
                key, value = states[:, :, : past + 1].unbind()
                query = query.to(key.dtype)
        if before is None:
            mixed = attention(query, key, value, causal=not past)  # `length > 1` would be symbolic in torch.compile
        else:
            visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() if length > 1 else None
            mixed = attention_behind(query, key, value, before, visible)
        mixed = mixed.flatten(2).to(projected.dtype)
        return self.c_proj(packing.pack(mixed) if packing else mixed)


class CrossAttention(nn.Module):
    """Attention from text to picture in one decoder layer; modules are named as in transformers' GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_attn = nn.Linear(width, width)
        self.c_attn = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(width, width)

    def keys_and_values(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Compute keys and values, each (N, S, H, D/H), of encoder states (N, S, D)."""
        return split_heads(self.c_attn(encoder_hidden_states), 2, self.num_heads)

    def weights(self, x: Tensor, key: Tensor) -> Tensor:
        """Attention weight of each token for each state: x (N * K, T, D), key (N, S, H, D/H) -> (N * K, T, H, S)."""
        query = self.q_attn(x).unflatten(-1, (self.num_heads, -1)).unflatten(0, (len(key), -1))
        scores = torch.einsum("nkthd,nshd->nkths", query.float(), key.float()) * key.shape[-1] ** -0.5
        return scores.softmax(-1).flatten(0, 1)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, packing: Packing | None) -> Tensor:
        """x (N * K, T, D), or (M, D) with a packing -> like x; key and value (N, S, H, D/H).

        A picture's K rows are folded into one, so keys and values are not expanded."""
        query = self.q_attn(x)
        query = packing.unpack(query) if packing else query
        rows_and_length = query.shape[:2]
        query = query.reshape(len(key), -1, *key.shape[2:])  # (N, K * T, H, D/H)
        mixed = attention(query, key, value).reshape(*rows_and_length, -1)
        return self.c_proj(packing.pack(mixed) if packing else mixed)


class DecoderBlock(nn.Module):
    """One pre-norm GPT-2 layer: self-attention, cross-attention (not if the picture is a prefix), MLP (tanh GELU)."""

    def __init__(self, config: ViTGPT2Config) -> None:
        super().__init__()
        width, heads = config.decoder_embed_dim, config.decoder_num_heads
        self.dropout = config.dropout
        self.ln_1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = SelfAttention(width, heads)
        self.prefixed = config.bridge == "prefix"
        if not self.prefixed:
            self.ln_cross_attn = nn.LayerNorm(width, eps=1e-5)
            self.crossattention = CrossAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-5)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing | None = None,
        states: Tensor | None = None,
        past: int = 0,
    ) -> Tensor:
        """x (N * K, T, D), or (M, D) with a packing -> like x; key and value of the picture (N, S, H, D/H)."""
        before = (key, value) if self.prefixed else None
        x = x + F.dropout(self.attn(self.ln_1(x), packing, states, past, before), self.dropout, self.training)
        if not self.prefixed:
            mixed = self.crossattention(self.ln_cross_attn(x), key, value, packing)
            x = x + F.dropout(mixed, self.dropout, self.training)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Add the MLP branch: (..., D) -> (..., D)."""
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.c_proj(hidden), self.dropout, self.training)

    def read_prefix(self, x: Tensor, last: bool) -> tuple[Tensor, ...]:
        """Compute the prefix's keys and values in this layer, each (N, S, H, D/H), and the input of the next layer,
        (N, S, D), from x (N, S, D). The last layer returns only keys and values."""
        query, key, value = split_heads(self.attn.c_attn(self.ln_1(x)), 3, self.attn.num_heads)
        if last:
            return key, value
        mixed = self.attn.c_proj(attention(query, key, value, causal=True).flatten(2))
        return key, value, self.feed_forward(x + F.dropout(mixed, self.dropout, self.training))


class TiedHead(nn.Module):
    """The LM head: logits from the token embeddings. It shares their weight and has none itself."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # nn.Module would register it as a submodule and save it twice

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V).

        On a GPU the vocabulary is padded to a multiple of ALIGNED: an H100 multiplies 50,304 columns in a sixth of the
        time that 50,257 take.
        """
        embedding: Any = self.embedding
        weight = embedding.weight  # in a copy made for decoding it is padded already
        if weight.device.type == "cuda" and len(weight) % ALIGNED:
            weight = F.pad(weight, (0, 0, 0, -len(weight) % ALIGNED))
        return F.linear(hidden, weight)[..., : embedding.num_embeddings]


class GPT2Decoder(nn.Module):
    """GPT-2 with cross-attention in every layer, or with a prefix."""

    def __init__(self, config: ViTGPT2Config) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_embed_dim
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.max_length, width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_num_layers))
        self.ln_f = nn.LayerNorm(width, eps=1e-5)
        self.head = TiedHead(self.wte)
        self.gradient_checkpointing = False

    def look(self, encoder_hidden_states: Tensor) -> Looked:
        """Compute each layer's keys and values of the pictures: (N, S, D) -> layers x ((N, S, H, D/H), (N, S, H, D/H)).

        A prefix runs through the layers for that. No token precedes it, so its states are the same for all captions.
        """
        if self.config.bridge == "cross_attention":
            return [layer.keys_and_values(encoder_hidden_states) for layer in self.cross_attentions()]
        x = encoder_hidden_states + self.wpe.weight[: encoder_hidden_states.shape[1]]
        read: Looked = []
        hidden = [F.dropout(x, self.config.dropout, self.training)]
        for index, block in enumerate(self.blocks):
            assert isinstance(block, DecoderBlock)
            last = index == len(self.blocks) - 1
            key, value, *hidden = run_block(block.read_prefix, *hidden, last, save_memory=self.gradient_checkpointing)
            read.append((key, value))
        return read

    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attention of every layer; empty for a decoder that reads a prefix."""
        blocks = [block for block in self.blocks if isinstance(block, DecoderBlock) and not block.prefixed]
        return [block.crossattention for block in blocks]

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> DecoderCache:
        """Make an empty cache for `rows` (= N * K) captions of at most max_length tokens."""
        return self.cache_of(self.look(encoder_hidden_states), rows, max_length)

    def cache_of(self, looked: Looked, rows: int, max_length: int) -> DecoderCache:
        """Make an empty cache from the keys and values that `look` returned.

        In memory, heads come before positions, as matrix products need it: arranged once here, not at every token.
        """
        key = looked[0][0]
        heads, size = key.shape[2:]
        # On a CPU, attention over few keys is fastest in fp32.
        dtype = torch.float32 if key.device.type == "cpu" else key.dtype
        picture = key.dtype if self.config.bridge == "cross_attention" else dtype
        cross = [
            tuple(part.to(picture).transpose(1, 2).contiguous().transpose(1, 2) for part in layer) for layer in looked
        ]
        own = [key.new_zeros(2, rows, heads, max_length, size, dtype=dtype).transpose(2, 3) for _ in self.blocks]
        return DecoderCache(cross, own)

    def forward(
        self,
        input_ids: Tensor,
        cross: Looked,
        packing: Packing | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """input_ids (N * K, T) -> the last layer's normalised states (N * K, T, D), or (M, D) with a packing.

        A given cache grows by T. Raises ValueError if the positions do not suffice.
        """
        past, length, first = (cache.length if cache else 0), input_ids.shape[1], self.config.prefix_positions
        if past + length > self.config.text_positions:
            after = f" after a picture's {first}" if first else ""
            raise ValueError(
                f"a caption of {past + length} tokens does not fit into {self.config.max_length} positions{after}"
            )
        positions = torch.arange(first + past, first + past + length, device=input_ids.device).expand_as(input_ids)
        if packing:
            input_ids, positions = packing.pack(input_ids), packing.pack(positions)
        x = F.dropout(self.wte(input_ids) + self.wpe(positions), self.config.dropout, self.training)
        for index, block in enumerate(self.blocks):
            states = cache.own[index] if cache else None
            x = run_block(block, x, *cross[index], packing, states, past, save_memory=self.gradient_checkpointing)
        if cache:
            cache.length += length
        return self.ln_f(x)

    next_logits = next_logits

    def static_step(self, cache: StaticCache) -> Tensor:
        """Read the cache's tokens (rows, 1) at its position -> float32 logits (rows, V). Shapes are the same at every
        position, so that the step can be recorded.

        With few rows the time depends on the number of kernels, so the mask is made once for all layers.
        """
        x = self.wte(cache.tokens) + self.wpe(cache.place + self.config.prefix_positions)
        written = torch.arange(cache.own[0].shape[2], device=x.device) <= cache.place  # (L,)
        mask = torch.zeros_like(written, dtype=cache.own[0].dtype).masked_fill(~written, float("-inf"))
        for block, (key, value), states in zip(self.blocks, cache.cross, cache.own, strict=True):
            assert isinstance(block, DecoderBlock)
            projected = block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
            query, new = projected[:, :, 0], projected[:, :, 1:]
            states.index_copy_(2, cache.place, new.movedim(2, 0).to(states.dtype))
            if block.prefixed:
                mixed = attention_behind(query, states[0], states[1], (key, value), written[None])
                x = x + block.attn.c_proj(mixed.flatten(2).to(x.dtype))
            else:
                keys, values = states.transpose(2, 3).unbind()  # (rows, H, L, D/H)
                query = query.transpose(1, 2).to(keys.dtype)
                mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[None, None, None])
                x = x + block.attn.c_proj(mixed.transpose(1, 2).flatten(2).to(x.dtype))
                x = x + block.crossattention(block.ln_cross_attn(x), key, value, None)
            x = block.feed_forward(x)
        return self.head(self.ln_f(x)[:, 0]).float()


# The captioner


class AttentionPooling(nn.Module):
    """Reduce a picture's states to fewer: learned queries that attend to all of them."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(length, width))
        self.crossattention = CrossAttention(width, heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, P + 1, D) -> (N, length, D)."""
        queries = self.queries.expand(len(hidden), -1, -1)
        return self.crossattention(queries, *self.crossattention.keys_and_values(hidden), None)


@dataclass
class CaptionOutput:
    """Result of a forward pass: logits (..., T, V) without labels; with labels the scalar loss and no logits. The scalar
    contrastive loss if it was asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    contrastive_loss: Tensor | None = None


class ImageCaptionModel(nn.Module):
    """The captioner: takes pictures and the captions so far, returns next-token logits or a loss."""

    def __init__(self, config: ViTGPT2Config | None = None, **fields: Any) -> None:
        """Takes a config, or its fields as keywords: ImageCaptionModel(vocab_size=50257)."""
        super().__init__()
        self.config = config or ViTGPT2Config(**fields)
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self.copies = FastCopies()
        self.adapters: dict[str, Any] | None = None
        """Metadata of the adapters that training/adapters.py added; then only they are saved (see own_state)."""
        self.merged: dict[str, Any] | None = None
        """If loaded from a file of adapters: their metadata, the file's path and its weights' SHA-256."""
        self.trained_on = np.empty(0, np.uint64)
        """Keys of the pictures it was trained on (CaptionTable.keys), so that they can be excluded from scoring."""
        self.encoder = VisionTransformer(self.config)
        if self.config.language_model:
            from decoding.language_model import LanguageModel  # imported late: it loads much of transformers

            self.decoder: Any = LanguageModel(self.config)
        else:
            self.decoder = GPT2Decoder(self.config)
        vision, width, prefix = self.config.vision_embed_dim, self.config.decoder_embed_dim, self.config.prefix_length
        if prefix:
            self.pooling = AttentionPooling(vision, self.config.vision_num_heads, prefix)
        if self.config.bridge == "prefix" or vision != width:
            self.enc_to_dec_proj = nn.Linear(vision, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set random weights as GPT-2 does: standard deviation 0.02 at width 768, and scaled by sqrt(768 / width) at
        others, so that narrow models learn as fast.

        In the last layer of every residual branch it is divided by sqrt(number of branches), as in GPT-2.
        """
        config = self.config
        decoder_branches = 3 if config.bridge == "cross_attention" else 2
        branches = {"encoder": 2 * config.vision_num_layers, "decoder": decoder_branches * config.decoder_num_layers}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:  # biases and norms
                nn.init.constant_(parameter, 1.0 if re.search("norm|ln_|scale_", name) else 0.0)
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            width = config.vision_embed_dim if name.startswith("encoder") else config.decoder_embed_dim
            std = 0.02 * math.sqrt(768 / width)
            if name.endswith(("proj.weight", "fc2.weight")):
                std /= math.sqrt(branches.get(name.split(".")[0], 1))
            nn.init.normal_(parameter, std=std)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.decoder.wte.weight.device

    @property
    def num_parameters(self) -> int:
        """The number of parameters; a 4-bit weight counts as many as it has before packing."""
        packed = ((parameter, getattr(parameter, "quant_state", None)) for parameter in self.parameters())
        return sum(math.prod(state.shape) if state else parameter.numel() for parameter, state in packed)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer saved with the weights, or GPT-2's if there is none."""
        if self._tokenizer is None:
            self._tokenizer = gpt2_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        """Compute activations again in the backward pass instead of storing them: less memory, more time."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def encode(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S) -> the states that the decoder reads, (N, states, decoder width): pooled if the
        model has a pooling, and followed by the prompt's embeddings if it has a prompt."""
        at_a_time = self.encoder.pictures_at_a_time
        if at_a_time and len(pixel_values) > at_a_time:
            return torch.cat([self.encode(part) for part in pixel_values.split(at_a_time)])
        hidden = self.encoder(pixel_values)
        hidden = self.pooling(hidden) if hasattr(self, "pooling") else hidden
        hidden = self.enc_to_dec_proj(hidden) if hasattr(self, "enc_to_dec_proj") else hidden
        if not self.config.prompt_ids:
            return hidden
        prompt = self.decoder.wte(torch.tensor(self.config.prompt_ids, device=hidden.device)).to(hidden.dtype)
        return torch.cat([hidden, prompt.expand(len(hidden), -1, -1)], 1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
        contrastive: bool = False,
    ) -> CaptionOutput:
        """Compute next-token logits, or with labels the mean loss over real targets.

        pixel_values: uint8 (N, 3, S, S), normalised here; or float, already normalised.
        input_ids: int64 (N, T) or (N, K, T), padded on the right; the first token is the start token.
        lengths: int64 (N,) or (N, K), number of real tokens per caption. Attention is causal, so padding on the right
            never affects a real position; lengths only decide which labels count.
        labels: like input_ids and aligned with them (nothing is shifted here), -100 where there is no target.
        positions: int64 (M,), indices of the targets in labels.flatten() (the collate function knows them, so the
            device need not compute them); entries equal to N * K * T are padding that rounds M up.
        weights: float (N,) or (N, K), factor for the loss of each caption's targets (default: 1).
        contrastive: with labels, also compute contrastive_loss.
        """
        captions = 1 if input_ids.ndim == 2 else input_ids.shape[1]
        if input_ids.ndim not in (2, 3) or len(input_ids) != len(pixel_values):
            expected = f"({len(pixel_values)}, T) or ({len(pixel_values)}, K, T)"
            raise ValueError(f"input_ids is {tuple(input_ids.shape)}: expected {expected}")
        states = self.encode(pixel_values)
        cross = self.decoder.look(states)
        rows = input_ids.reshape(len(pixel_values) * captions, -1)  # (N * K, T)
        if labels is None:
            return CaptionOutput(logits=self.decoder.head(self.decoder(rows, cross)).view(*input_ids.shape, -1))
        if lengths is not None:
            padding = torch.arange(labels.shape[-1], device=labels.device) >= lengths.unsqueeze(-1)
            labels = labels.masked_fill(padding, -100)
        # Later tokens attend to a token without a target too, so rows are packed by length, not by label.
        if positions is None:
            remaining = (labels != -100).flip(-1).cumsum(-1).flip(-1)  # number of targets from each position on
            positions = remaining.flatten().nonzero().squeeze(-1)
        hidden = self.decoder(rows, cross, Packing(positions, *rows.shape))  # (M, D)
        targets = F.pad(labels.flatten(), (0, 1), value=-100)[positions]
        losses = F.cross_entropy(
            self.decoder.head(hidden).float(),
            targets,
            ignore_index=-100,
            reduction="sum" if weights is None else "none",
            label_smoothing=label_smoothing,
        )
        if weights is not None:
            losses = (losses * F.pad(weights.flatten(), (0, 1))[positions // rows.shape[1]]).sum()
        contrast = self.contrastive_loss(states, labels) if contrastive else None
        return CaptionOutput(losses / (targets != -100).sum().clamp(min=1), contrastive_loss=contrast)

    def contrastive_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """The contrastive loss (InfoNCE, the mean of both directions) of pictures and captions, a simpler form of CoCa's (Yu
        et al. 2022, arXiv:2205.01917), without weights of its own: a picture is the mean of its states (N, S, D), a caption
        the mean of its tokens' embeddings; labels (N, K, T) or (N, T). Cosine similarities are divided by CLIP's initial
        temperature, 0.07. As a picture's K captions compete too, the loss does not reach 0. Returns a scalar."""
        labels = labels.view(len(states), -1, labels.shape[-1])
        words = (labels != -100) & (labels != self.config.end_token_id)
        real = words.any(-1)  # (N, K)
        with torch.autocast(states.device.type, enabled=False):  # in bf16, scores would be rounded to 0.06
            pictures = states[:, : states.shape[1] - len(self.config.prompt_ids)].float().mean(1)
            captions = (self.decoder.wte(labels.clamp(min=0)).float() * words.unsqueeze(-1)).sum(2)
            scores = torch.einsum("nd,mkd->nmk", F.normalize(pictures, dim=-1), F.normalize(captions, dim=-1)) / 0.07
        # Pictures and captions that cannot be read do not compete. Not -inf, which would make gradients NaN.
        scores = scores.masked_fill(~(real.any(-1)[:, None, None] & real), -1e4)
        chances = scores.log_softmax(0) + scores.flatten(1).log_softmax(1).view_as(scores)
        own = chances.diagonal(dim1=0, dim2=1).T  # (N, K)
        return -own.masked_fill(~real, 0).sum() / (2 * real.sum().clamp(min=1))

    def generate(self, pixel_values: Tensor, **options: Any) -> Generated:
        """Generate captions for pictures; the options are those of decoding.search.generate."""
        return generate(self, pixel_values, **options)

    # Load and save

    def own_state(self) -> dict[str, Tensor]:
        """The tensors to save: all weights; or, for a model with adapters, the adapters and the layers that no
        pretrained model provides."""
        if self.adapters is None:
            return self.state_dict()
        return {
            name.replace(".default.weight", ""): tensor
            for name, tensor in self.state_dict().items()
            if ".lora_" in name or part_of(name) == "new"
        }

    def load_own_state(self, weights: dict[str, Tensor]) -> None:
        """Load what own_state returned."""
        if self.adapters is None:
            self.load_state_dict(weights)
            return
        state = self.own_state()
        check_shapes(Path("adapters"), state, weights)
        for name, tensor in state.items():
            tensor.copy_(weights[name])

    def saved(self) -> Saved:
        """The record of the model that is written to files."""
        return Saved(self.config, self.own_state(), self._tokenizer, self.trained_on, self.adapters)

    def save_file(self, path: str | os.PathLike[str]) -> None:
        """Write own_state, config, preprocessing and tokenizer to one safetensors file, atomically."""
        write_model_file(self.saved(), Path(path))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write a folder with the model file, config.json and the tokenizer's files; for a model with a prefix and a
        tokenizer also the code with which transformers loads it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.save_file(directory / MODEL_FILE)
        ours = self._tokenizer is not None and self.adapters is None and not self.config.language_model
        if self.config.bridge == "prefix" and ours:
            write_remote_code(self.saved(), directory)
            return
        write_json(directory / "config.json", self.config.to_dict())
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(directory)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], base_dir: Path | None = None, allow_pickle: bool = False
    ) -> ImageCaptionModel:
        """Load a model, in eval mode, from a file, from a folder that save_pretrained or transformers wrote, from a Hub
        repository of either kind, or by a short name such as vit-gpt2. Adapters are merged into their base models,
        which are searched in base_dir first. allow_pickle: also read the tensors of a pickle of transformers.

        Raises UserError if there is no model, or if the file's tensors do not fit its config.
        """
        return cls.from_saved(read_captioner(source, allow_pickle), base_dir).eval()

    @classmethod
    def from_saved(cls, saved: Saved, base_dir: Path | None = None) -> ImageCaptionModel:
        """Build the model of a record, with adapters merged. Raises UserError if its tensors do not fit."""
        check_finite(saved.path, saved.tensors)
        base = None if saved.adapters is None else cls.from_saved(base_of(saved, base_dir), base_dir)
        if not saved.partial:  # else the user asked for new random tensors, so the file may be smaller than the config
            known = [*saved.tensors.values(), *(base.parameters() if base else ())]
            with refused(f"{saved.path}: the weights do not fit the config"), no_larger(t.shape for t in known):
                cls(saved.config)
        model = cls(saved.config)
        if base:
            model.merged = merge_adapters(model, base, saved, base_dir)
        else:
            state = model.state_dict()
            tensors = state | saved.tensors if saved.partial else saved.tensors
            if (bias := "decoder.lm_head.bias") in state:  # older files lack it: those models were trained without
                tensors = {bias: torch.zeros_like(state[bias])} | tensors
            check_shapes(saved.path, state, tensors)
            model.load_state_dict(tensors)
        if saved.config.language_model and not saved.partial:  # pretrained parts are checked when they are read
            with refused(f"{saved.path}: this version of transformers does not reproduce its language model"):
                model.decoder.prove()
        model.trained_on, model._tokenizer = saved.trained_on, saved.tokenizer
        return model
