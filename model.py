"""The model: a vision transformer (ViT) whose patches a GPT-2 decoder reads, through cross-attention or as a prefix.

Bottom up: attention by the fastest kernel at hand, the encoder, the decoder, the captioner with its loss, load and save.
What its files look like is in weights/, how captions are searched for in decoding/. Nothing here trains, decodes pictures
or picks a device.

Dimensions: N pictures, K captions of each, T tokens of a caption, S encoder states of a picture (class token,
registers, patches), H heads, D width, V vocabulary, M real positions (the ones with a target).

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
from weights.huggingface import read_captioner
from weights.remote import write_remote_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from decoding.recorded import StaticCache

# Attention: flash_attn's kernel, torch's own, or plain products. B rows (or N pictures with K captions each).

_flash_wanted = True
_flash_3: str | None = None
_flash: tuple[Callable[..., Tensor] | None, str] | None = None


def use_flash_attention(wanted: bool) -> None:
    """Whether `attention` may call the flash_attn package, which it may until told otherwise; and on a Hopper GPU whether
    torch's own attention may be FlashAttention-3, where this torch has it."""
    global _flash_wanted, _flash_3
    _flash_wanted = wanted
    if wanted and _flash_3 is None and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
            _flash_3 = "FlashAttention-3"
        except Exception as error:  # its kernels are a package of their own
            _flash_3 = ""
            print(f"attention   FlashAttention-3 cannot be activated ({type(error).__name__}): going on without")


def flash_attn_function() -> tuple[Callable[..., Tensor] | None, str]:
    """flash_attn's own function and why, or None and why not; looked for once.

    The function itself is imported: other packages also answer to the name flash_attn without having it.
    """
    global _flash
    if _flash is None:  # a plain global, because torch.compile does not see through functools.cache
        _flash = _find_flash_attn()
    return _flash


def _find_flash_attn() -> tuple[Callable[..., Tensor] | None, str]:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return None, "flash_attn needs an Ampere GPU or newer"
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # a build against another torch fails with anything from ImportError to OSError
        return None, f"flash_attn cannot be imported ({type(error).__name__})"
    return flash_attn_func, "flash_attn is installed"


def choose_attention(
    device_type: str, dtype: torch.dtype, head_size: int = 64
) -> tuple[Callable[..., Tensor] | None, str]:
    """flash_attn's function where it can serve such tensors, else None for torch's; and the reason in words."""
    if device_type == "cpu" and dtype == torch.bfloat16:
        return None, "plain products in bfloat16 (at captions' lengths faster than torch's kernel on a CPU)"
    function = None
    if not _flash_wanted:
        reason = "flash_attn not wanted"
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
    """softmax(query key^T / sqrt(head size)) value, by the fastest kernel at hand.

    query (B, Tq, H, D/H), key and value (B, Tk, H, D/H), one dtype; `causal` needs Tq = Tk.
    Returns (B, Tq, H, D/H).
    """
    function, _ = choose_attention(query.device.type, query.dtype, query.shape[-1])
    if function is not None:
        return function(query, key, value, causal=causal)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, T, D/H)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # At captions' lengths torch's CPU kernel and its backward take 3 to 6 times as long as these products.
        scores = (query * key.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, H, Tq, Tk)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def attention_behind(
    query: Tensor, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor], visible: Tensor | None = None
) -> Tensor:
    """What attention to `before` and the own keys and values side by side gives, with nothing repeated or put together:
    a picture's K rows share what stands before them.

    query (N * K, Tq, H, D/H), key and value (N * K, Tk, H, D/H); before: keys and values (N, S, H, D/H), whose dtype it
    has; visible: bool (Tq, Tk), which own keys each query may see (default: all). Returns (N * K, Tq, H, D/H).
    """
    (pictures, states), scale = before[0].shape[:2], query.shape[-1] ** -0.5
    query, key, value = (x.to(before[0].dtype).unflatten(0, (pictures, -1)) for x in (query * scale, key, value))
    own = torch.einsum("nkthd,nkuhd->nkhtu", query, key)
    if visible is not None:
        own = own.masked_fill(~visible, float("-inf"))
    scores = torch.cat([torch.einsum("nkthd,nshd->nkhts", query, before[0]), own], -1)
    shared, own = scores.softmax(-1).to(value.dtype).tensor_split([states], -1)
    mixed = torch.einsum("nkhts,nshd->nkthd", shared, before[1]) + torch.einsum("nkhtu,nkuhd->nkthd", own, value)
    return mixed.flatten(0, 1)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, T, parts * D) -> `parts` tensors of (B, T, H, D/H)."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)


# The encoder


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swiglu": lambda x: swiglu(*x.chunk(2, -1)),
}


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """Two halves of a layer's outputs, multiplied behind a SiLU of the first."""
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
        """x (N, S, D) -> (N, S, D); turns (2, P, D/H) as rotary_turns gives them."""
        query, key, value = split_heads(self.qkv(self.norm_before(x)), 3, self.num_heads)
        if turns is not None:
            query, key = rotate(query, turns), rotate(key, turns)
        x = x + self.branch(self.proj(attention(query, key, value).flatten(2)), "scale_before")
        hidden = ACTIVATIONS[self.activation](self.fc1(self.norm_after(x)))
        return x + self.branch(self.fc2(hidden), "scale_after")

    def branch(self, x: Tensor, scale: str = "") -> Tensor:
        """A branch's end, (N, S, D): dropout, its factors, and in training some pictures go without (Huang et al. 2016,
        arXiv:1603.09382)."""
        x = F.dropout(x, self.dropout, self.training)
        if hasattr(self, scale):
            x = x * getattr(self, scale)
        if not (self.training and self.drop_path):
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.drop_path)


def rotary_turns(side: int, size: int) -> Tensor:
    """Cosines and sines (2, side * side, size) by which DINOv3 (arXiv:2508.10104) turns heads of this size: the angles
    follow from a patch's middle, from -1 to 1 in both directions, at size / 4 wavelengths up to 100 times the shortest."""
    middles = (torch.arange(side) + 0.5) / side * 2 - 1
    places = torch.cartesian_prod(middles, middles)  # (side * side, 2), rows first
    angles = (2 * math.pi * places.unsqueeze(-1) * 100.0 ** -torch.arange(0, 1, 4 / size)).flatten(1).tile(2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Heads (N, S, H, D/H), the last P of their S states turned."""
    cos, sin = turns.unsqueeze(2).to(x.dtype)
    first, patches = x[:, : -len(cos)], x[:, -len(cos) :]
    one, other = patches.chunk(2, -1)
    return torch.cat([first, patches * cos + torch.cat([-other, one], -1) * sin], 1)


class VisionTransformer(nn.Module):
    """A vision transformer without pooler: uint8 or normalised pictures in, a state for class token, registers and each
    patch out. ViT, DeiT, MAE, MSN, CLIP, SigLIP, DINOv2 and DINOv3 differ in the config's fields alone."""

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
        # Not saved: they follow from the config.
        self.register_buffer("mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)
        self.turns: Tensor | None
        turns = None
        if config.vision_positions == "rotary":
            turns = rotary_turns(config.image_size // patch, width // config.vision_num_heads)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S), uint8 (normalised here) or float (taken as normalised) -> (N, states, D)."""
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}: expected (N, 3, {size}, {size})")
        if not (pixel_values.dtype == torch.uint8 or pixel_values.is_floating_point()):
            raise ValueError(f"pixel_values is {pixel_values.dtype}: expected uint8, or a float of normalised numbers")
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
        """Patches (N, P, D) with their positions, behind class token and registers: (N, states, D)."""
        config, number = self.config, x.shape[0]  # len(x) is a constant of an exported graph
        before = []
        if config.vision_class_token:
            # Along a new axis: else the gradient of a batch of one picture is a slice, whose strides DDP warns of.
            before = [self.class_token[0].expand(number, -1, -1)]
        x = torch.cat([*before, x], dim=1)
        if config.vision_positions == "learned":
            x = x + self.position_embeddings
        if not config.vision_registers:
            return x
        registers = self.registers[0].expand(number, -1, -1)
        return torch.cat([x[:, :1], registers.to(x.dtype), x[:, 1:]], dim=1)


def run_block(block: Callable[..., Any], *inputs: Any, save_memory: bool) -> Any:
    """block(*inputs); with save_memory its activations are computed again in the backward pass instead of kept."""
    if save_memory and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# The decoder


class SelfAttention(nn.Module):
    """Causal self-attention of one decoder layer, with GPT-2's names."""

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
        """x (N * K, T, D), or (M, D) with a packing; `past` positions of this layer's cache are filled -> like x.

        before: keys and values (N, S, H, D/H) of the prefix that a picture's K rows share.
        """
        projected = self.c_attn(x)
        query, key, value = split_heads(packing.unpack(projected) if packing else projected, 3, self.num_heads)
        length = query.shape[1]
        if states is not None:
            states[0, :, past : past + length] = key
            states[1, :, past : past + length] = value
            if past:  # a query may see every key before it; more than one at a time would need a shifted mask
                assert length == 1
                key, value = states[:, :, : past + 1].unbind()
                query = query.to(key.dtype)
        if before is None:
            mixed = attention(query, key, value, causal=not past)  # length > 1 would be a symbol to a compiler
        else:
            visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() if length > 1 else None
            mixed = attention_behind(query, key, value, before, visible)
        mixed = mixed.flatten(2).to(projected.dtype)
        return self.c_proj(packing.pack(mixed) if packing else mixed)


class CrossAttention(nn.Module):
    """The text's look at the picture in one decoder layer, with transformers' names for GPT-2's cross-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_attn = nn.Linear(width, width)
        self.c_attn = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(width, width)

    def keys_and_values(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """(N, S, D) -> keys and values, each (N, S, H, D/H)."""
        return split_heads(self.c_attn(encoder_hidden_states), 2, self.num_heads)

    def weights(self, x: Tensor, key: Tensor) -> Tensor:
        """How much each token looks at each state: x (N * K, T, D), key (N, S, H, D/H) -> (N * K, T, H, S)."""
        query = self.q_attn(x).unflatten(-1, (self.num_heads, -1)).unflatten(0, (len(key), -1))
        scores = torch.einsum("nkthd,nshd->nkths", query.float(), key.float()) * key.shape[-1] ** -0.5
        return scores.softmax(-1).flatten(0, 1)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, packing: Packing | None) -> Tensor:
        """x as above, key and value (N, S, H, D/H): a picture's K rows are folded into one, nothing is expanded."""
        query = self.q_attn(x)
        query = packing.unpack(query) if packing else query
        rows_and_length = query.shape[:2]
        query = query.reshape(len(key), -1, *key.shape[2:])  # (N, K * T, H, D/H)
        mixed = attention(query, key, value).reshape(*rows_and_length, -1)
        return self.c_proj(packing.pack(mixed) if packing else mixed)


class DecoderBlock(nn.Module):
    """One GPT-2 layer: self-attention, cross-attention unless the picture is a prefix, MLP (tanh GELU), each pre-norm."""

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
        """x (N * K, T, D), or (M, D) with a packing; the picture's key and value (N, S, H, D/H) -> like x."""
        before = (key, value) if self.prefixed else None
        x = x + F.dropout(self.attn(self.ln_1(x), packing, states, past, before), self.dropout, self.training)
        if not self.prefixed:
            seen = self.crossattention(self.ln_cross_attn(x), key, value, packing)
            x = x + F.dropout(seen, self.dropout, self.training)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The last branch: (..., D) -> (..., D)."""
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.c_proj(hidden), self.dropout, self.training)

    def read_prefix(self, x: Tensor, last: bool) -> tuple[Tensor, ...]:
        """The prefix (N, S, D) -> this layer's keys and values of it, (N, S, H, D/H) each, and what the next layer reads,
        (N, S, D); behind the last layer there is none."""
        query, key, value = split_heads(self.attn.c_attn(self.ln_1(x)), 3, self.attn.num_heads)
        if last:
            return key, value
        mixed = self.attn.c_proj(attention(query, key, value, causal=True).flatten(2))
        return key, value, self.feed_forward(x + F.dropout(mixed, self.dropout, self.training))


class TiedHead(nn.Module):
    """Logits by the token embeddings, which are stored once: this module has no weights of its own."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # past nn.Module, which would store it as a part

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V).

        A GPU multiplies rows that are aligned: 50,304 columns take an H100 a sixth of the time that 50,257 do.
        """
        embedding: Any = self.embedding
        weight = embedding.weight  # of a copy made for decoding it has these rows already
        if weight.device.type == "cuda" and len(weight) % ALIGNED:
            weight = F.pad(weight, (0, 0, 0, -len(weight) % ALIGNED))
        return F.linear(hidden, weight)[..., : embedding.num_embeddings]


class GPT2Decoder(nn.Module):
    """GPT-2, with cross-attention in every layer or a prefix."""

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
        """Every layer's keys and values of the pictures: (N, S, D) -> layers x ((N, S, H, D/H), (N, S, H, D/H)).

        A prefix is read through the layers for them. No word stands before it, so it is the same for all captions.
        """
        if self.config.bridge == "cross_attention":
            return [layer.keys_and_values(encoder_hidden_states) for layer in self.cross_attentions()]
        x = encoder_hidden_states + self.wpe.weight[: encoder_hidden_states.shape[1]]
        read: Looked = []
        rest = [F.dropout(x, self.config.dropout, self.training)]
        for index, block in enumerate(self.blocks):
            assert isinstance(block, DecoderBlock)
            last = index == len(self.blocks) - 1
            key, value, *rest = run_block(block.read_prefix, *rest, last, save_memory=self.gradient_checkpointing)
            read.append((key, value))
        return read

    def cross_attentions(self) -> list[CrossAttention]:
        """Every layer's; none of a decoder that reads a prefix."""
        blocks = [block for block in self.blocks if isinstance(block, DecoderBlock) and not block.prefixed]
        return [block.crossattention for block in blocks]

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> DecoderCache:
        """An empty cache for `rows` (= N * K) captions of at most max_length tokens."""
        return self.cache_of(self.look(encoder_hidden_states), rows, max_length)

    def cache_of(self, looked: Looked, rows: int, max_length: int) -> DecoderCache:
        """The same for pictures that have been looked at.

        In memory heads stand before positions, as products need them: laid out once here, not at every token.
        """
        key = looked[0][0]
        heads, size = key.shape[2:]
        # A CPU's attention to few keys is fastest in fp32.
        dtype = torch.float32 if key.device.type == "cpu" else key.dtype
        seen = key.dtype if self.config.bridge == "cross_attention" else dtype
        cross = [
            tuple(part.to(seen).transpose(1, 2).contiguous().transpose(1, 2) for part in layer) for layer in looked
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

        The cache, if there is one, grows by T.
        """
        past, length, first = (cache.length if cache else 0), input_ids.shape[1], self.config.prefix_positions
        if past + length > self.config.text_positions:
            behind = f" behind a picture's {first}" if first else ""
            raise ValueError(
                f"a caption of {past + length} tokens does not fit into {self.config.max_length} positions{behind}"
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
        """The cache's tokens (rows, 1) at its place -> float32 logits (rows, V), in the same shapes at every place.

        At a few rows its time is the number of its kernels, so the mask is made once for all layers.
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
    """Fewer states for a picture: learned queries, each of which looks at all of them."""

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
    """What a forward pass gives: logits (..., T, V) without labels; the scalar loss, and no logits, with them."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class ImageCaptionModel(nn.Module):
    """Pictures and the captions so far in, next-token logits or a loss out."""

    def __init__(self, config: ViTGPT2Config | None = None, **fields: Any) -> None:
        """A config, or its fields as keywords: ImageCaptionModel(vocab_size=50257)."""
        super().__init__()
        self.config = config or ViTGPT2Config(**fields)
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self.copies = FastCopies()
        self.adapters: dict[str, Any] | None = None
        """What training/adapters.py has put on the model, for a file that holds those alone (see own_state)."""
        self.merged: dict[str, Any] | None = None
        """Of a model that was loaded from a file of adapters: what it says of them, its path and their sha256."""
        self.trained_on = np.empty(0, np.uint64)
        """Keys of the pictures it has learned from (CaptionTable.keys), so that nobody is scored on them unawares."""
        self.encoder = VisionTransformer(self.config)
        if self.config.language_model:
            from decoding.language_model import LanguageModel  # late: it imports much of transformers

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
        """Random weights with GPT-2's spread: 0.02 at width 768, as 1/sqrt(fan in) at others, so that narrow models learn as fast.

        The last layer of every residual branch is divided by sqrt(number of branches), as GPT-2 does.
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
        """Where the weights are."""
        return self.decoder.wte.weight.device

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has; of weights in 4 bits, how many they stand for."""
        packed = ((parameter, getattr(parameter, "quant_state", None)) for parameter in self.parameters())
        return sum(math.prod(state.shape) if state else parameter.numel() for parameter, state in packed)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that came with the weights; for weights that came without one, GPT-2's."""
        if self._tokenizer is None:
            self._tokenizer = gpt2_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        """Trade a second forward pass for the memory of the activations."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def encode(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S) -> the states that the decoder looks at, (N, states, decoder width), or as many as they
        are pooled to."""
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
    ) -> CaptionOutput:
        """Next-token logits, or with labels the mean loss over real targets.

        pixel_values: uint8 (N, 3, S, S), normalised inside; or float, taken as normalised.
        input_ids: int64 (N, T) or (N, K, T), filled up on the right; the first token is the start token.
        lengths: int64 (N,) or (N, K), real tokens of each caption. Attention is causal, so what fills up a row on its
            right never reaches a real position; lengths only say which labels count.
        labels: like input_ids, aligned with them (nothing is shifted here), -100 where there is no target.
        positions: int64 (M,), where the targets are in labels.flatten() (the collate knows it without asking the
            device); entries of N * K * T stand for nothing and only round M up.
        weights: float (N,) or (N, K), what each caption's targets are multiplied by (default: 1).
        """
        captions = 1 if input_ids.ndim == 2 else input_ids.shape[1]
        if input_ids.ndim not in (2, 3) or len(input_ids) != len(pixel_values):
            expected = f"({len(pixel_values)}, T) or ({len(pixel_values)}, K, T)"
            raise ValueError(f"input_ids is {tuple(input_ids.shape)}: expected {expected}")
        cross = self.decoder.look(self.encode(pixel_values))
        rows = input_ids.reshape(len(pixel_values) * captions, -1)  # (N * K, T)
        if labels is None:
            return CaptionOutput(logits=self.decoder.head(self.decoder(rows, cross)).view(*input_ids.shape, -1))
        if lengths is not None:
            padding = torch.arange(labels.shape[-1], device=labels.device) >= lengths.unsqueeze(-1)
            labels = labels.masked_fill(padding, -100)
        # A token without a target is still read by the tokens behind it, so rows are packed by length, not by label.
        if positions is None:
            behind = (labels != -100).flip(-1).cumsum(-1).flip(-1)  # targets at or behind each position
            positions = behind.flatten().nonzero().squeeze(-1)
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
        return CaptionOutput(loss=losses / (targets != -100).sum().clamp(min=1))

    def generate(self, pixel_values: Tensor, **options: Any) -> Generated:
        """Captions for pictures: see decoding.search.generate, whose options these are."""
        return generate(self, pixel_values, **options)

    # Load and save

    def own_state(self) -> dict[str, Tensor]:
        """What a file of the model holds: its weights, or of a model with adapters these and what no pretrained part
        brings."""
        if self.adapters is None:
            return self.state_dict()
        return {
            name.replace(".default.weight", ""): tensor
            for name, tensor in self.state_dict().items()
            if ".lora_" in name or part_of(name) == "new"
        }

    def load_own_state(self, weights: dict[str, Tensor]) -> None:
        """The inverse of own_state."""
        if self.adapters is None:
            self.load_state_dict(weights)
            return
        own = self.own_state()
        check_shapes(Path("adapters"), own, weights)
        for name, tensor in own.items():
            tensor.copy_(weights[name])

    def saved(self) -> Saved:
        """The model as its files hold it."""
        return Saved(self.config, self.own_state(), self._tokenizer, self.trained_on, self.adapters)

    def save_file(self, path: str | os.PathLike[str]) -> None:
        """Writes own_state, config, preprocessing and tokenizer into one safetensors file, all of it or nothing."""
        write_model_file(self.saved(), Path(path))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes a folder with the model as one file, config.json and the tokenizer's files; beside a model with a prefix
        and a tokenizer also code, by which transformers loads it."""
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
    def from_pretrained(cls, source: str | os.PathLike[str], base_dir: Path | None = None) -> ImageCaptionModel:
        """The model in a file, in a folder that save_pretrained or transformers wrote, or in a Hub repository of either
        kind; in eval mode. Adapters are merged into the models they were made for, which are looked for in base_dir first.

        Raises UserError where there is no model, or where the file's tensors do not fit its config.
        """
        return cls.from_saved(read_captioner(source), base_dir).eval()

    @classmethod
    def from_saved(cls, saved: Saved, base_dir: Path | None = None) -> ImageCaptionModel:
        """The model that a record describes, adapters merged. Raises UserError where its tensors do not fit."""
        check_finite(saved.path, saved.tensors)
        base = None if saved.adapters is None else cls.from_saved(base_of(saved, base_dir), base_dir)
        if not saved.partial:  # what is to be fresh the user has asked for
            known = [*saved.tensors.values(), *(base.parameters() if base else ())]
            with refused(f"{saved.path}: the weights do not fit the config"), no_larger(t.shape for t in known):
                cls(saved.config)
        model = cls(saved.config)
        if base:
            model.merged = merge_adapters(model, base, saved, base_dir)
        else:
            own = model.state_dict()
            tensors = own | saved.tensors if saved.partial else saved.tensors
            if (bias := "decoder.lm_head.bias") in own:  # once it was left out of the model, which learned without
                tensors = {bias: torch.zeros_like(own[bias])} | tensors
            check_shapes(saved.path, own, tensors)
            model.load_state_dict(tensors)
        if saved.config.language_model and not saved.partial:  # of parts it is done where they are read
            with refused(f"{saved.path}: its language model is not what this transformers makes of it"):
                model.decoder.prove()
        model.trained_on, model._tokenizer = saved.trained_on, saved.tokenizer
        return model
