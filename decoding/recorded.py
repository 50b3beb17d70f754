"""Decoding on a GPU: the model in half precision, and the work of one token recorded once as a CUDA graph and replayed.

For a few captions a token is some hundreds of kernels, each done before Python can start the next one; a graph starts them
all at once. It needs shapes and addresses that never change, so the cache has its full length from the first token on, a
mask hides what is not written yet, and later pictures are copied over earlier ones. The step itself is the decoder's own,
`static_step`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from decoding.cache import DecoderCache, copied, weights_version


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


class RecordedDecoder(nn.Module):
    """A decoder that reads single tokens by a recorded step; everything else is the original's."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder, self.config = decoder, decoder.config
        self.look, self.head, self.cross_attentions = decoder.look, decoder.head, decoder.cross_attentions
        self.kept: StaticCache | None = None

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """As the original."""
        return self.decoder(*inputs, **options)

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
        cache, device = self.decoder.cache_of(cross, rows, max_length), encoder_hidden_states.device
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
                self.decoder.static_step(cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's threads may go on meanwhile
            cache.logits = self.decoder.static_step(cache)
        cache.graph = graph

    def next_logits(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """As the original; of single tokens they are valid until the next call."""
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
    """A copy of the model with weights of this dtype and a RecordedDecoder. Weights that have changed are copied into the
    one that is kept, whose recorded steps stay good: self-critical training generates at every step."""
    copies, version = model.copies, weights_version(model)
    kept = copies.made.get(dtype)
    if kept is not None and next(kept.parameters()).device == model.device:
        if copies.key != version:
            with torch.no_grad():
                for old, new in zip(kept.parameters(), model.parameters(), strict=True):
                    if old.data_ptr() != new.data_ptr():  # of the same dtype they are shared
                        old.copy_(new)
            copies.key = version
        return kept
    copies.drop()  # before the new one is made: there may be no room for both
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()}
    twin = copied(model, memo)
    twin.decoder = RecordedDecoder(twin.decoder)
    copies.of(version)[dtype] = twin
    return twin
