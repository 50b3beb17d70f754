"""Captions of given words only: at each token, the tokens that may follow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from config import UserError

AMPLE = 64  # tokens: more than any word has


@dataclass
class Node:
    """A node of a trie of words: the tokens up to here start at least one of them."""

    children: dict[int, Node] = field(default_factory=dict)
    is_word: bool = False
    shortest: int = 0
    """Tokens missing to the nearest word."""
    within: dict[int, list[int]] = field(default_factory=dict)
    """Cache of next_tokens."""

    def add(self, tokens: Sequence[int]) -> None:
        """Add a word."""
        node = self
        for token in tokens:
            node = node.children.setdefault(token, Node())
        node.is_word = True

    def measure(self) -> int:
        """Fill in `shortest`, when all words are there."""
        below = [child.measure() for child in self.children.values()]
        self.shortest = 0 if self.is_word else 1 + min(below, default=0)
        return self.shortest

    def next_tokens(self, room: int) -> list[int]:
        """Tokens after which a word can be completed with at most `room` more."""
        room = min(room, AMPLE)
        if room not in self.within:
            self.within[room] = [token for token, child in self.children.items() if child.shortest <= room]
        return self.within[room]


@functools.lru_cache(maxsize=2)
def tries(tokenizer: Any, words: tuple[str, ...]) -> tuple[Node, Node]:
    """Tries of the words as a caption's first word, with or without a space before it, and as a later word. Raises
    UserError for a word without tokens."""
    first, later = Node(), Node()
    for word in words:
        if not word.strip():
            raise UserError("only_words: a word is empty: remove it")
        spellings = [tokenizer(text, add_special_tokens=False).input_ids for text in (word.strip(), f" {word.strip()}")]
        first.add(spellings[0])
        for node in (first, later):
            node.add(spellings[1])
    first.measure()
    later.measure()
    return first, later


def only_words(model: Any, words: tuple[str, ...], first: int, last: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A rule that changes logits (rows, V) after the written tokens (rows, T), so that captions consist of these words.

    Captions start at position `first`. A caption that is cut at position `last` ends with a complete word.
    """
    begin, later = tries(model.tokenizer, words)
    start, end = later if first > 1 else begin, model.config.end_token_id

    def with_next_word(nodes: list[Node]) -> list[Node]:
        return [*nodes, later] if any(node.is_word for node in nodes) else nodes

    def nodes_after(tokens: Sequence[int]) -> list[Node]:
        """All nodes that these tokens can lead to: a token may continue a word or start the next one."""
        nodes = [start]
        for token in tokens:
            nodes = [node.children[token] for node in with_next_word(nodes) if token in node.children]
        return nodes

    def rule(logits: Tensor, written: Tensor) -> Tensor:
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        room = last - written.shape[1] - 1
        for row, tokens in zip(allowed, written[:, first:].tolist(), strict=True):
            nodes = nodes_after(tokens)
            ids = [token for node in with_next_word(nodes) for token in node.next_tokens(room)]
            if not ids or any(node.is_word for node in nodes):
                ids.append(end)
            row[ids] = True
        logits = logits.masked_fill(~allowed, float("-inf"))
        stuck = logits.isneginf().all(-1, keepdim=True)  # other rules forbid all of these tokens: ignore those rules
        return torch.where(stuck & allowed, 0.0, logits)

    return rule
