"""Decoding on a GPU: the model in half precision, the step of one token recorded once as a CUDA graph and replayed.

With few captions, a token takes hundreds of kernels, and each ends before Python can start the next. A graph starts
them all at once. It needs shapes and addresses that never change: so the cache has its full length from the first token
on, a mask hides positions that are not written yet, and new pictures are copied over earlier ones. The step is the
decoder's `static_step`. For few pictures the encoder is recorded too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.cache import ALIGNED, DecoderCache, copied, weights_version

FEW = 16  # pictures: with more, an H100 needs at least as long for the kernels as Python for starting them
SHAPES = 2  # number of recorded shapes: training by rewards alternates between samples and greedy captions


def record(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record the work as a CUDA graph; return it and the tensor that holds its result after each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first runs choose kernels and allocate memory, which must not be recorded
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a data loader's threads may use CUDA meanwhile
        result = work()
    return graph, result


class RecordedEncoder:
    """A model's `encode`, recorded for few pictures at a time; its result is valid until the next call."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode
        self.cached: tuple[Tensor, torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S) -> (N, P + 1, D)."""
        if len(pixel_values) > FEW or pixel_values.device.type != "cuda":
            return self.encode(pixel_values)
        recorded = self.cached
        if recorded is None or (recorded[0].shape, recorded[0].dtype) != (pixel_values.shape, pixel_values.dtype):
            self.cached = None
            pixels = pixel_values.clone()
            with torch.cuda.device(pixels.device):
                self.cached = recorded = (pixels, *record(lambda: self.encode(pixels)))
        pixels, graph, hidden = recorded
        pixels.copy_(pixel_values)
        graph.replay()
        return hidden


@dataclass
class StaticCache(DecoderCache):
    """A KV cache with the other tensors that a recorded step reads and writes."""

    tokens: Tensor = field(kw_only=True)
    """int64 (rows, 1): the tokens to read."""
    place: Tensor = field(kw_only=True)
    """int64 (1,): their position."""
    logits: Tensor | None = None
    """float32 (rows, V): the step's result."""
    graph: torch.cuda.CUDAGraph | None = None
    """The recorded step; None on a CPU."""


class RecordedDecoder(nn.Module):
    """A decoder that reads single tokens with a recorded step; the rest is done by the original decoder."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder, self.config = decoder, decoder.config
        self.look, self.head, self.cross_attentions = decoder.look, decoder.head, decoder.cross_attentions
        self.cached: dict[Any, StaticCache] = {}
        """The caches by shape, the last used one at the end."""

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Call the original decoder."""
        return self.decoder(*inputs, **options)

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> StaticCache:
        """Return the earlier cache of the same shapes, filled again; or make a new one and record its step."""
        cross = self.look(encoder_hidden_states)
        max_length = -(-max_length // 8) * 8  # attention copies a mask whose length is not a multiple of 8
        shape = (rows, max_length, cross[0][0].shape)
        if cached := self.cached.pop(shape, None):
            for old, new in zip(cached.cross, cross, strict=True):
                for part, now in zip(old, new, strict=True):
                    part.copy_(now)
            for states in cached.own:  # the mask hides earlier numbers, but not a NaN
                states.zero_()
            cached.length = 0
            self.cached[shape] = cached
            return cached
        while len(self.cached) >= SHAPES:
            self.cached.pop(next(iter(self.cached)))  # before the new one is made, as memory may not hold both
        cache, device = self.decoder.cache_of(cross, rows, max_length), encoder_hidden_states.device
        tokens, place = (torch.zeros(number, dtype=torch.int64, device=device) for number in ((rows, 1), (1,)))
        fresh = StaticCache(cache.cross, cache.own, tokens=tokens, place=place)
        if device.type == "cuda":
            with torch.cuda.device(device):  # recording writes to position 0, which the first token overwrites
                fresh.graph, fresh.logits = record(lambda: self.decoder.static_step(fresh))
        self.cached[shape] = fresh
        return fresh

    def next_logits(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """As in the original decoder; logits of single tokens are valid until the next call."""
        if not isinstance(cache, StaticCache) or tokens.shape[1] > 1:
            return self.decoder.next_logits(tokens, cache)
        cache.tokens.copy_(tokens)
        cache.place.fill_(cache.length)
        if cache.graph is None:
            cache.logits = self.decoder.static_step(cache)
        else:
            cache.graph.replay()
        cache.length += 1
        assert cache.logits is not None
        return cache.logits


def recorded_model(model: Any, dtype: torch.dtype) -> Any:
    """Make a copy of the model with weights of this dtype and a RecordedDecoder, and cache it.

    If weights have changed, they are copied into the cached copy, whose recorded steps stay valid: self-critical
    training generates at every step."""
    copies, version = model.copies, weights_version(model)
    cached = copies.made.get(dtype)
    if cached is not None and next(cached.parameters()).device == model.device:
        if copies.key != version:
            with torch.no_grad():
                for old, new in zip(cached.parameters(), model.parameters(), strict=True):
                    if old.data_ptr() != new.data_ptr():  # weights of the same dtype are shared
                        old[: len(new)].copy_(new)
            copies.key = version
        return cached
    copies.drop()  # before the new one is made, as memory may not hold both
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    words = model.decoder.wte.weight
    halved = {id(p): p.detach().to(dtype) for p in model.parameters()}
    halved[id(words)] = F.pad(halved[id(words)], (0, 0, 0, -len(words) % ALIGNED))
    memo |= {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in halved.items()}
    fast = copied(model, memo)
    fast.decoder = RecordedDecoder(fast.decoder)
    if not model.config.prompt_ids:  # a prompt's ids are copied from the host, which cannot be recorded
        fast.encode = RecordedEncoder(fast.encode)
    copies.of(version)[dtype] = fast
    return fast
