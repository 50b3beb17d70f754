"""The state of decoding: the KV cache, the positions of real tokens, and fast copies of a model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from config import ViTGPT2Config

ALIGNED = 64  # a GPU multiplies an LM head fast if its number of columns is a multiple of this
Looked = list[tuple[Tensor, ...]]
"""The keys and values of the pictures, one tuple per layer."""


@dataclass
class DecoderCache:
    """The KV cache.

    cross: per layer the picture's keys and values, for cross-attention or of the prefix, each (N, S, H, D/H), computed
    once and shared by a picture's K rows. own: per layer the text's keys and values, (2, N * K, max_length, H, D/H), of
    which the first `length` positions are filled; attention over them is computed in their dtype.
    """

    cross: Looked
    own: list[Tensor]
    length: int = 0

    def reorder(self, rows: Tensor) -> None:
        """Make row i continue the text of row rows[i] (int64, (N * K,)). `cross` is unchanged."""
        for states in self.own:
            filled = states[:, :, : self.length]
            filled.copy_(filled.index_select(1, rows))


@dataclass
class Packing:
    """The positions of the real tokens in (rows, T) captions, so that linear layers compute nothing else.

    positions: int64 (M,), indices into rows * T. Entries equal to rows * T are padding that rounds M up.
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


class Decoder(Protocol):
    """The methods of a decoder that decoding uses."""

    config: ViTGPT2Config

    def look(self, encoder_hidden_states: Tensor) -> Looked:
        """Compute every layer's keys and values of the pictures from (N, S, D)."""

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> Any:
        """Make an empty DecoderCache for `rows` (= N * K) captions of at most max_length tokens."""

    def next_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """float32 logits (rows, V) of the token that follows the cached ones and these (rows, T)."""

    def cross_attentions(self) -> Sequence[nn.Module]:
        """The cross-attention of every layer, with `weights(x, key)`; empty for a decoder that reads a prefix."""

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""

    def __call__(self, input_ids: Tensor, cross: Looked) -> Tensor:
        """input_ids (N * K, T) -> the last layer's normalised states (N * K, T, D)."""


def next_logits(decoder: Any, tokens: Tensor, cache: DecoderCache) -> Tensor:
    """Decoder.next_logits for a decoder whose forward fills the cache."""
    return decoder.head(decoder(tokens, cache.cross, cache=cache)[:, -1]).float()


class FastCopies:
    """Cached copies of a model for fast generation, used until its weights change. They are not copied with the model.

    lock: held while they are in use, because a web server captions from several threads.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.key: Any = None
        """The version of the weights they were made from (see weights_version)."""
        self.made: dict[Any, Any] = {}

    def of(self, key: Any) -> dict[Any, Any]:
        """Return the copies for this key; others are dropped first, as memory may not hold both."""
        if self.key != key:
            self.drop()
            self.key = key
        return self.made

    def drop(self) -> None:
        """Delete all copies."""
        self.key, self.made = None, {}

    def __reduce__(self) -> Any:
        return FastCopies, ()


def copied(model: nn.Module, memo: dict[int, Any]) -> Any:
    """Copy the model; `memo` maps the id of a module or a tensor to its replacement, as in copy.deepcopy."""
    fast = copy.copy(model)
    fast._modules = {name: copy.deepcopy(module, memo) for name, module in model._modules.items()}
    return fast


_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers do not raise Tensor._version, so their steps are counted.
register_optimizer_step_post_hook(_count_optimizer_step)


def weights_version(model: nn.Module) -> tuple[Any, ...]:
    """A key that changes whenever the weights may have changed (except through .data, which torch does not count)."""
    return _optimizer_steps, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
