"""The model: a vision transformer (ViT) whose patches a GPT-2 decoder reads, through cross-attention or as a prefix.

Bottom up: the encoder, the decoder with its cache, the captioner with its loss, load and save. Imports attention,
config and model_file; generation is reached by a late import. Nothing here trains, decodes pictures or picks a device.

Dimensions: N pictures, K captions of each, T tokens of a caption, S encoder states of a picture (class token +
patches), H heads, D width, V vocabulary, M real positions (the ones with a target).

References: ViT, Dosovitskiy et al. 2021 (arXiv:2010.11929); GPT-2, Radford et al. 2019; cross-attention as in
Vaswani et al. 2017 (arXiv:1706.03762), placed where transformers' GPT2Model places it; the prefix as in ClipCap, Mokady
et al. 2021 (arXiv:2111.09734), fed as transformers' GPT-2 is with inputs_embeds.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from attention import attention, attention_behind, split_heads
from config import ViTGPT2Config
from weights.file import (
    METADATA_KEY,
    MODEL_FILE,
    check_shapes,
    config_fields_from_shapes,
    find_model_file,
    gpt2_tokenizer,
    keys_from_text,
    keys_to_text,
    not_ours,
    read_model_file,
    tokenizer_from_json,
    weights_hash,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# The encoder


class EncoderBlock(nn.Module):
    """One pre-norm ViT layer: self-attention, then an MLP with exact GELU."""

    def __init__(self, config: ViTGPT2Config, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        width = config.vision_embed_dim
        self.num_heads, self.dropout = config.vision_num_heads, config.vision_dropout
        self.norm_before = nn.LayerNorm(width, eps=1e-12)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_after = nn.LayerNorm(width, eps=1e-12)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, S, D) -> (N, S, D)."""
        query, key, value = split_heads(self.qkv(self.norm_before(x)), 3, self.num_heads)
        x = x + self.branch(self.proj(attention(query, key, value).flatten(2)))
        return x + self.branch(self.fc2(F.gelu(self.fc1(self.norm_after(x)))))

    def branch(self, x: Tensor) -> Tensor:
        """A branch's end, (N, S, D): dropout, and in training some pictures go without (Huang et al. 2016,
        arXiv:1603.09382)."""
        x = F.dropout(x, self.dropout, self.training)
        if not (self.training and self.drop_path):
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.drop_path)


class VisionTransformer(nn.Module):
    """ViT without pooler: uint8 or normalised pictures in, one state for the class token and each patch out."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTGPT2Config) -> None:
        super().__init__()
        self.config = config
        width, patch = config.vision_embed_dim, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches + 1, width))
        layers = config.vision_num_layers
        skipped = [config.vision_drop_path * index / max(1, layers - 1) for index in range(layers)]
        self.blocks = nn.ModuleList(EncoderBlock(config, share) for share in skipped)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.gradient_checkpointing = False
        # Not saved: they follow from the config.
        self.register_buffer("mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S), uint8 (normalised here) or float (taken as normalised) -> (N, P + 1, D)."""
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}: expected (N, 3, {size}, {size})")
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values / 255 - self.mean) / self.std
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.position_embeddings
        for block in self.blocks:
            x = run_block(block, x, save_memory=self.gradient_checkpointing)
        return self.norm(x)


def run_block(block: Callable[..., Any], *inputs: Any, save_memory: bool) -> Any:
    """block(*inputs); with save_memory its activations are computed again in the backward pass instead of kept."""
    if save_memory and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# The decoder


@dataclass
class DecoderCache:
    """What decoding one more token needs of everything before it.

    cross: per layer the picture's keys and values, for cross-attention or of the prefix, each (N, S, H, D/H), computed
    once and shared by a picture's K rows. own: per layer the text's keys and values, (2, N * K, max_length, H, D/H), of
    which the first `length` positions are filled; their dtype is the one that attention to them has.
    """

    cross: list[tuple[Tensor, ...]]
    own: list[Tensor]
    length: int = 0

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row rows[i] (int64, (N * K,)) had written. The picture's part stays as it is."""
        for states in self.own:
            filled = states[:, :, : self.length]
            filled.copy_(filled.index_select(1, rows))


@dataclass
class Packing:
    """Where the real tokens of (rows, T) captions are, so that only they meet the linear layers.

    positions: int64 (M,), indices into rows * T. Entries equal to rows * T stand for nothing: they round M up.
    """

    positions: Tensor
    rows: int
    length: int

    def pack(self, x: Tensor) -> Tensor:
        """(rows, T, ...) -> (M, ...)."""
        return x.flatten(0, 1).index_select(0, self.positions.clamp(max=self.rows * self.length - 1))

    def unpack(self, x: Tensor) -> Tensor:
        """(M, ...) -> (rows, T, ...), zero where there is no token."""
        grid = x.new_zeros(self.rows * self.length + 1, *x.shape[1:]).index_copy(0, self.positions, x)
        return grid[:-1].unflatten(0, (self.rows, self.length))


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


class GPT2Decoder(nn.Module):
    """GPT-2, with cross-attention in every layer or a prefix; its head is its token embedding (tied, stored once)."""

    def __init__(self, config: ViTGPT2Config) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_embed_dim
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.max_length, width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_num_layers))
        self.ln_f = nn.LayerNorm(width, eps=1e-5)
        self.gradient_checkpointing = False

    def look(self, encoder_hidden_states: Tensor) -> list[tuple[Tensor, ...]]:
        """Every layer's keys and values of the pictures: (N, S, D) -> layers x ((N, S, H, D/H), (N, S, H, D/H)).

        A prefix is read through the layers for them. No word stands before it, so it is the same for all captions.
        """
        if self.config.bridge == "cross_attention":
            return [layer.keys_and_values(encoder_hidden_states) for layer in self.cross_attentions()]
        x = encoder_hidden_states + self.wpe.weight[: encoder_hidden_states.shape[1]]
        read: list[tuple[Tensor, ...]] = []
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

    def cache_of(self, looked: list[tuple[Tensor, ...]], rows: int, max_length: int) -> DecoderCache:
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
        cross: list[tuple[Tensor, ...]],
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

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return F.linear(hidden, self.wte.weight)

    def next_logits(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """float32 logits (rows, V) of what follows the cache and these tokens (rows, T)."""
        return self.head(self(tokens, cache.cross, cache=cache)[:, -1]).float()


# The captioner


_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Of what fused optimizers change, torch counts no version.
register_optimizer_step_post_hook(_count_optimizer_step)


def part_of(name: str) -> str:
    """Where a parameter belongs: encoder, decoder, or new (what joins them, which no pretrained part brings)."""
    if "crossattention." in name or "ln_cross_attn." in name or name.startswith(("enc_to_dec_proj.", "pooling.")):
        return "new"
    return name.split(".")[0]


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
        self.packed: Any = None
        """What packed.py or graphs.py keeps of the weights for generation."""
        self.generating = threading.RLock()
        """Held while that is in use: a web server captions from several threads."""
        self.adapters: dict[str, Any] | None = None
        """What adapters.py has put on the model, for a file that holds those alone (see own_state)."""
        self.merged: dict[str, Any] | None = None
        """Of a model that was loaded from a file of adapters: what it says of them, its path and their sha256."""
        self.trained_on = np.empty(0, np.uint64)
        """Keys of the pictures it has learned from (CaptionTable.keys), so that nobody is scored on them unawares."""
        self.encoder = VisionTransformer(self.config)
        if self.config.language_model:
            from decoding.language_model import LanguageModel

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
                nn.init.constant_(parameter, 1.0 if "norm" in name or "ln_" in name else 0.0)
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                continue
            width = config.vision_embed_dim if name.startswith("encoder") else config.decoder_embed_dim
            std = 0.02 * math.sqrt(768 / width)
            if name.endswith(("proj.weight", "fc2.weight")):
                std /= math.sqrt(branches.get(name.split(".")[0], 1))
            nn.init.normal_(parameter, std=std)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle for another process, leaves behind what generation keeps."""
        return {name: value for name, value in self.__dict__.items() if name not in ("packed", "generating")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed, self.generating = None, threading.RLock()

    def version(self) -> tuple[Any, ...]:
        """Another one when the weights are, or may be: an optimizer has made a step."""
        return _optimizer_steps, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters())

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
        """pixel_values (N, 3, S, S) -> the states that the decoder looks at, (N, P + 1, decoder width), or as many as they
        are pooled to."""
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

    def generate(self, pixel_values: Tensor, **options: Any) -> Any:
        """Captions for pictures: see generation.generate, which this calls."""
        from decoding.search import generate

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

    def save_file(self, path: str | os.PathLike[str]) -> None:
        """Writes own_state, config, preprocessing and tokenizer into one safetensors file, all of it or nothing."""
        about: dict[str, Any] = {"config": self.config.to_dict()}
        if self._tokenizer is not None:
            about["tokenizer"] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        if self.adapters is not None:
            about["adapters"] = self.adapters
        if len(self.trained_on):
            about["trained_on"] = keys_to_text(self.trained_on)
        # One entry, because safetensors writes several in an order that changes from call to call.
        metadata = {METADATA_KEY: json.dumps(about, sort_keys=True)}
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.unfinished")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.own_state().items()}
        try:
            save_file(weights, unfinished, metadata=metadata)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes a folder with the model as one file, config.json and the tokenizer's files; beside a model with a prefix
        and a tokenizer also code, by which transformers loads it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.save_file(directory / MODEL_FILE)
        ours = self._tokenizer is not None and self.adapters is None and not self.config.language_model
        if self.config.bridge == "prefix" and ours:
            from weights.remote import write_remote_code

            write_remote_code(self, directory)
            return
        (directory / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], base_dir: Path | None = None) -> ImageCaptionModel:
        """The model in a file, in a folder that save_pretrained or transformers wrote, or in a Hub repository of either
        kind; in eval mode. Adapters are merged into the models they were made for, which are looked for in base_dir first.

        Raises UserError where there is no model, or where the file's tensors do not fit its config.
        """
        path = find_model_file(source)
        if path.name == "config.json":  # no file of ours there: perhaps transformers wrote it
            from convert import load_transformers

            return load_transformers(source)
        about, weights = read_model_file(path)
        try:
            config = ViTGPT2Config.from_dict(about.get("config") or config_fields_from_shapes(weights))
            trained_on = keys_from_text(about.get("trained_on", ""))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise not_ours(path, error) from error
        if "adapters" in about:
            from weights.adapters import adapted_model

            model = adapted_model(path, config, about["adapters"], weights, base_dir)
            model.merged = about["adapters"] | {"file": path, "sha256": weights_hash(weights)}
        else:
            model = cls(config)
            check_shapes(path, model.state_dict(), weights)
            model.load_state_dict(weights)
        model.trained_on = trained_on
        if "tokenizer" in about:
            model.tokenizer = tokenizer_from_json(json.dumps(about["tokenizer"]), config)
        return model.eval()
