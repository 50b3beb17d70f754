"""Captions from a model: greedy, sampling and beam search over the cached decoder. `model.generate` calls `generate`.

A picture is encoded once; its beams or samples are rows that share its keys and values. Options mean what they mean in
transformers' `generate`, except that max_length and min_length count new tokens (its max_new_tokens and
min_new_tokens), the end token included. Imports config; never decodes pictures, never prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import UserError

if TYPE_CHECKING:
    from model import DecoderCache, ImageCaptionModel

NEVER = -1e9  # a score no caption has; finite, so that it can be added to and compared


@dataclass
class Generated:
    """sequences: int64 (N * num_return_sequences, L), no start token, filled up with the end token.

    scores: float (N * num_return_sequences,), beam search only: the sum of log probabilities over length ** penalty.
    """

    sequences: Tensor
    scores: Tensor | None = None


@torch.no_grad()
def generate(
    model: ImageCaptionModel,
    pixel_values: Tensor,
    *,
    max_length: int | None = None,
    min_length: int = 0,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    num_return_sequences: int = 1,
    generator: torch.Generator | None = None,
) -> Generated:
    """Captions for pixel_values (N, 3, S, S), uint8 or normalised float.

    max_length is 32 where nothing is said, or as many positions as the model has. `generator` makes sampling
    repeatable. Raises UserError for options that do not go together.
    """
    if max_length is None:
        max_length = min(32, model.config.max_length)
    if max_length < 1 or max_length > model.config.max_length:
        raise UserError(
            f"max_length {max_length} must be between 1 and the model's {model.config.max_length} positions"
        )
    if min_length > max_length:
        raise UserError(f"min_length {min_length} is larger than max_length {max_length}")
    if do_sample and num_beams > 1:
        raise UserError("do_sample and num_beams > 1 do not go together: choose one")
    if do_sample and (temperature <= 0 or top_k < 0 or not 0 < top_p <= 1):
        raise UserError("sampling needs temperature > 0, top_k >= 0 (0 = all) and 0 < top_p <= 1")
    if num_beams < 1 or num_return_sequences < 1:
        raise UserError("num_beams and num_return_sequences must be at least 1")
    if not do_sample and num_return_sequences > num_beams:
        raise UserError(f"{num_return_sequences} captions a picture need as many beams, or do_sample")
    was_training = model.training
    model.eval()
    try:
        hidden = model.encode(pixel_values)
        if num_beams > 1:
            return beam_search(
                model, hidden, max_length, min_length, num_beams, length_penalty, early_stopping, num_return_sequences
            )
        rows = len(hidden) * num_return_sequences
        cache = model.decoder.new_cache(hidden, rows, max_length)
        end = model.config.end_token_id
        assert end is not None
        sequences = torch.full((rows, max_length), end, device=hidden.device)
        tokens = torch.full((rows,), model.config.start_token_id or 0, device=hidden.device)
        finished = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        for step in range(max_length):
            log_probs = next_log_probs(model, tokens, cache, may_end=step >= min_length)
            if do_sample:
                probabilities = sampling_probabilities(log_probs, temperature, top_k, top_p)
                tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
            else:
                tokens = log_probs.argmax(-1)
            tokens = tokens.masked_fill(finished, end)
            sequences[:, step] = tokens
            finished |= tokens == end
            if finished.all():
                break
        return Generated(sequences[:, : step + 1])
    finally:
        model.train(was_training)


def next_log_probs(model: ImageCaptionModel, tokens: Tensor, cache: DecoderCache, may_end: bool) -> Tensor:
    """float32 log probabilities (rows, V) of what follows the cache and these tokens (rows,).

    Where a caption may not end, the other tokens' are left as they are and not raised to sum to one: so does
    transformers, and beams of it depend on it.
    """
    hidden = model.decoder(tokens.unsqueeze(-1), cache.cross, cache=cache)
    log_probs = model.decoder.head(hidden[:, -1]).float().log_softmax(-1)
    if not may_end:
        log_probs[:, model.config.end_token_id] = float("-inf")
    return log_probs


def sampling_probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (rows, V) -> probabilities: sharpened, then only the top_k best, then the fewest that hold top_p of the rest."""
    logits = logits / temperature
    if top_k:
        worst_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the better tokens
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), float("-inf"))
    return logits.softmax(-1)


def beam_search(
    model: ImageCaptionModel,
    hidden: Tensor,
    max_length: int,
    min_length: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool,
    num_return_sequences: int,
) -> Generated:
    """The best captions of encoder states (N, S, D), best first, found as transformers' beam search finds them.

    Every step keeps the 2 * num_beams best continuations, so that num_beams go on even when all the better ones end.
    A caption that ends scores the sum of its log probabilities over length ** length_penalty. A picture is done when no
    running beam, scored at its present length, can beat the worst of its num_beams ended ones.
    """
    pictures, device, end = len(hidden), hidden.device, model.config.end_token_id
    assert end is not None
    cache = model.decoder.new_cache(hidden, pictures * num_beams, max_length)
    running = torch.full((pictures, num_beams, max_length), end, device=device)
    running_scores = torch.zeros(pictures, num_beams, device=device)
    running_scores[:, 1:] = NEVER  # all beams start alike: only the first may branch
    ended, ended_scores = running.clone(), torch.full_like(running_scores, NEVER)
    has_ended = torch.zeros(pictures, num_beams, dtype=torch.bool, device=device)
    improvable = torch.ones(pictures, 1, dtype=torch.bool, device=device)
    tokens = torch.full((pictures * num_beams,), model.config.start_token_id or 0, device=device)
    first_row = torch.arange(pictures, device=device).unsqueeze(-1) * num_beams
    ranks = torch.arange(2 * num_beams, device=device)

    def choose(x: Tensor, beams: Tensor) -> Tensor:
        """x (N, any, ...) at beams (N, n) -> (N, n, ...)."""
        return x[torch.arange(pictures, device=device).unsqueeze(-1), beams]

    for step in range(max_length):
        log_probs = next_log_probs(model, tokens, cache, may_end=step >= min_length)
        vocab_size = log_probs.shape[-1]
        total = (log_probs.view(pictures, num_beams, vocab_size) + running_scores.unsqueeze(-1)).flatten(1)
        scores, best = total.topk(2 * num_beams)  # (N, 2 * num_beams)
        beams, next_tokens = best // vocab_size, best % vocab_size
        candidates = choose(running, beams)
        candidates[:, :, step] = next_tokens
        ends = (next_tokens == end) | (step + 1 == max_length)

        running_scores, chosen = (scores + ends * NEVER).topk(num_beams)
        running = choose(candidates, chosen)
        tokens = running[:, :, step].flatten()
        rows = (first_row + choose(beams, chosen)).flatten()

        new = ends & (ranks < num_beams)  # the worse half is only there to go on
        closed = ~improvable | (has_ended.all(-1, keepdim=True) & early_stopping)
        new_scores = scores / (step + 1) ** length_penalty + closed * NEVER + ~new * NEVER
        ended_scores, kept = torch.cat([ended_scores, new_scores], 1).topk(num_beams)
        ended = choose(torch.cat([ended, candidates], 1), kept)
        has_ended = choose(torch.cat([has_ended, new], 1), kept)

        worst_ended = ended_scores.min(1, keepdim=True).values.where(has_ended, torch.tensor(NEVER, device=device))
        reachable = running_scores[:, :1] / (step + 1) ** length_penalty
        improvable = improvable & (reachable > worst_ended).any(-1, keepdim=True)
        if not improvable.any() or ends.all() or (early_stopping and has_ended.all()):
            break
        cache.reorder(rows)
    sequences = ended[:, :num_return_sequences].flatten(0, 1)
    longest = int((sequences != end).sum(-1).max()) + 1  # the end token itself, where there is room for it
    return Generated(sequences[:, : min(longest, max_length)], ended_scores[:, :num_return_sequences].flatten())
