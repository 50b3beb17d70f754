"""Decoding on a GPU: the model in half precision, and the work of one token recorded once as a CUDA graph and replayed.

For a few captions a token is some hundreds of kernels, each done before Python can start the next one; a graph starts them
all at once. It needs shapes and addresses that never change, so the cache has its full length from the first token on, a
mask hides what is not written yet, and later pictures are copied over earlier ones. The step itself is the decoder's own,
`static_step`. Of a few pictures the encoder is recorded too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.cache import ALIGNED, DecoderCache, copied, weights_version

FEW = 16  # pictures: an H100 is done with the kernels of more of them no sooner than Python starts them
SHAPES = 2  # recorded at a time: training by rewards goes to and fro between samples and greedy captions


def record(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The work as a graph, and where its result stands after each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels choose and allocate on their first runs, which must not be recorded
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's threads may go on meanwhile
        result = work()
    return graph, result


class RecordedEncoder:
    """A model's `encode` for a few pictures at a time; what it gives is valid until the next call."""

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self.encode = encode
        self.kept: tuple[Tensor, torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (N, 3, S, S) -> (N, P + 1, D)."""
        if len(pixel_values) > FEW or pixel_values.device.type != "cuda":
            return self.encode(pixel_values)
        kept = self.kept
        if kept is None or (kept[0].shape, kept[0].dtype) != (pixel_values.shape, pixel_values.dtype):
            self.kept = None
            pixels = pixel_values.clone()
            with torch.cuda.device(pixels.device):
                self.kept = kept = (pixels, *record(lambda: self.encode(pixels)))
        pixels, graph, hidden = kept
        pixels.copy_(pixel_values)
        graph.replay()
        return hidden


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
        self.kept: dict[Any, StaticCache] = {}
        """By shape, the one used last at the end."""

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """As the original."""
        return self.decoder(*inputs, **options)

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> StaticCache:
        """The kept cache, filled anew, where the shapes are the same; otherwise another one, its step recorded."""
        cross = self.look(encoder_hidden_states)
        max_length = -(-max_length // 8) * 8  # attention copies masks that are not a multiple of 8 long
        shape = (rows, max_length, cross[0][0].shape)
        if kept := self.kept.pop(shape, None):
            for old, new in zip(kept.cross, cross, strict=True):
                for part, now in zip(old, new, strict=True):
                    part.copy_(now)
            for states in kept.own:  # a mask hides numbers that stood here before, but not a NaN
                states.zero_()
            kept.length = 0
            self.kept[shape] = kept
            return kept
        while len(self.kept) >= SHAPES:
            self.kept.pop(next(iter(self.kept)))  # before the new one is made: there may be no room for both
        cache, device = self.decoder.cache_of(cross, rows, max_length), encoder_hidden_states.device
        tokens, place = (torch.zeros(number, dtype=torch.int64, device=device) for number in ((rows, 1), (1,)))
        fresh = StaticCache(cache.cross, cache.own, tokens=tokens, place=place)
        if device.type == "cuda":
            with torch.cuda.device(device):  # what it writes at position 0 is written over by the first token
                fresh.graph, fresh.logits = record(lambda: self.decoder.static_step(fresh))
        self.kept[shape] = fresh
        return fresh

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
                        old[: len(new)].copy_(new)
            copies.key = version
        return kept
    copies.drop()  # before the new one is made: there may be no room for both
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    words = model.decoder.wte.weight
    halved = {id(p): p.detach().to(dtype) for p in model.parameters()}
    halved[id(words)] = F.pad(halved[id(words)], (0, 0, 0, -len(words) % ALIGNED))
    memo |= {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in halved.items()}
    twin = copied(model, memo)
    twin.decoder = RecordedDecoder(twin.decoder)
    if not model.config.prompt_ids:  # a prompt is fetched from the host
        twin.encode = RecordedEncoder(twin.encode)
    copies.of(version)[dtype] = twin
    return twin
