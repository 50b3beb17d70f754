"""What decoding keeps: keys and values of what was read, where real tokens are, fast copies of a model's weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from config import ViTGPT2Config

ALIGNED = 64  # a head with a multiple of so many columns is multiplied fast on a GPU
Looked = list[tuple[Tensor, ...]]
"""Layers x the keys and values of the pictures."""


@dataclass
class DecoderCache:
    """What decoding one more token needs of everything before it.

    cross: per layer the picture's keys and values, for cross-attention or of the prefix, each (N, S, H, D/H), computed
    once and shared by a picture's K rows. own: per layer the text's keys and values, (2, N * K, max_length, H, D/H), of
    which the first `length` positions are filled; their dtype is the one that attention to them has.
    """

    cross: Looked
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


class Decoder(Protocol):
    """What decoding asks of a model's decoder."""

    config: ViTGPT2Config

    def look(self, encoder_hidden_states: Tensor) -> Looked:
        """(N, S, D) -> every layer's keys and values of the pictures."""

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> Any:
        """An empty DecoderCache for `rows` (= N * K) captions of at most max_length tokens."""

    def next_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        """float32 logits (rows, V) of what follows the cache and these tokens (rows, T)."""

    def cross_attentions(self) -> Sequence[nn.Module]:
        """Every layer's, with `weights(x, key)`; none of a decoder that reads a prefix."""

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""

    def __call__(self, input_ids: Tensor, cross: Looked) -> Tensor:
        """input_ids (N * K, T) -> the last layer's normalised states (N * K, T, D)."""


def next_logits(decoder: Any, tokens: Tensor, cache: DecoderCache) -> Tensor:
    """What Decoder.next_logits is to give, of a decoder whose forward fills the cache."""
    return decoder.head(decoder(tokens, cache.cross, cache=cache)[:, -1]).float()


class FastCopies:
    """Copies of a model made for generating fast, kept until its weights change. A copy of the model has none of them.

    lock: held while they are in use, as a web server captions from several threads.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.key: Any = None
        """What they were made of: see weights_version."""
        self.made: dict[Any, Any] = {}

    def of(self, key: Any) -> dict[Any, Any]:
        """Those of this key; others are dropped first, as there may be no room for both."""
        if self.key != key:
            self.drop()
            self.key = key
        return self.made

    def drop(self) -> None:
        """Forgets them."""
        self.key, self.made = None, {}

    def __reduce__(self) -> Any:
        return FastCopies, ()


def copied(model: nn.Module, memo: dict[int, Any]) -> Any:
    """A copy of the model, in which the memo has a module's or a tensor's replacement by its id."""
    twin = copy.copy(model)
    twin._modules = {name: copy.deepcopy(module, memo) for name, module in model._modules.items()}
    return twin


_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers do not raise Tensor._version, so their steps are counted.
register_optimizer_step_post_hook(_count_optimizer_step)


def weights_version(model: nn.Module) -> tuple[Any, ...]:
    """Changes whenever the weights may have changed (by anything but their .data, of which torch keeps no count)."""
    return _optimizer_steps, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
