"""Decoding on a GPU: the model in half precision, and the work of one token recorded once as a CUDA graph and replayed.

Imports attention and model. For a few captions a token is some hundreds of kernels, each done before Python can start the
next one; a graph starts them all at once. It needs shapes and addresses that never change, so the cache has its full length
from the first token on, a mask hides what is not written yet, and later pictures are copied over earlier ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attention_behind
from model import DecoderBlock, DecoderCache, GPT2Decoder, ImageCaptionModel


@dataclass
class StaticCache(DecoderCache):
    """A cache with what a recorded step reads and writes besides."""

    tokens: Tensor = field(kw_only=True)
    """int64 (rows, 1): the tokens to read."""
    place: Tensor = field(kw_only=True)
    """int64 (1,): the position they stand at."""
    logits: Tensor | None = None
    """float32 (rows, V): what the step gives."""
    graph: torch.cuda.CUDAGraph | None = None
    """The recorded step; on a CPU there is none."""


class StaticDecoder(GPT2Decoder):
    """A decoder that reads single tokens by a recorded step; everything else is the original's."""

    kept: StaticCache | None

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> StaticCache:
        """The kept cache, filled anew, where the shapes are the same; otherwise another one, its step recorded."""
        cross = self.look(encoder_hidden_states)
        max_length = -(-max_length // 8) * 8  # attention copies masks that are not a multiple of 8 long
        kept = self.kept
        if kept and kept.own[0].shape[1:3] == (rows, max_length) and kept.cross[0][0].shape == cross[0][0].shape:
            for old, new in zip(kept.cross, cross, strict=True):
                for part, now in zip(old, new, strict=True):
                    part.copy_(now)
            for states in kept.own:  # a mask hides numbers that stood here before, but not a NaN
                states.zero_()
            kept.length = 0
            return kept
        self.kept = None  # before the new one is made: there may be no room for both
        cache, device = self.cache_of(cross, rows, max_length), encoder_hidden_states.device
        tokens, place = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((rows, 1), (1,)))
        fresh = StaticCache(cache.cross, cache.own, tokens=tokens, place=place)
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.record(fresh)
        self.kept = fresh
        return fresh

    def record(self, cache: StaticCache) -> None:
        """Records a step on the cache; what it writes at position 0 meanwhile is written over by the first token."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels choose and allocate on their first runs, which must not be recorded
            for _ in range(3):
                self.step(cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's threads may go on meanwhile
            cache.logits = self.step(cache)
        cache.graph = graph

    def next_logits(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """As the original; of single tokens they are valid until the next call."""
        if not isinstance(cache, StaticCache) or tokens.shape[1] > 1:
            return super().next_logits(tokens, cache)
        cache.tokens.copy_(tokens)
        cache.place.fill_(cache.length)
        if cache.graph is None:
            cache.logits = self.step(cache)
        else:
            cache.graph.replay()
        cache.length += 1
        assert cache.logits is not None
        return cache.logits

    def step(self, cache: StaticCache) -> Tensor:
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


def graphed_model(model: ImageCaptionModel, dtype: torch.dtype) -> ImageCaptionModel:
    """A twin of the model with weights of this dtype and a StaticDecoder. Weights that have changed are copied into the one
    that is kept, whose recorded steps stay good: self-critical training generates at every step."""
    key = (dtype, model.version())
    kept = model.packed[1] if model.packed and model.packed[0][0] == dtype else None
    if kept is not None and model.packed[0] != key and kept.device == model.device:
        with torch.no_grad():
            for old, new in zip(kept.parameters(), model.parameters(), strict=True):
                if old.data_ptr() != new.data_ptr():  # of the same dtype they are shared
                    old.copy_(new)
        model.packed = (key, kept)
    elif kept is None or model.packed[0] != key:
        model.packed = None  # before the new one is made: there may be no room for both
        memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
        memo |= {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()}
        twin = copy.copy(model)
        twin._modules = {name: copy.deepcopy(module, memo) for name, module in model._modules.items()}
        twin.decoder.__class__ = StaticDecoder
        twin.decoder.kept = None  # type: ignore[assignment]
        model.packed = (key, twin)
    return model.packed[1]
