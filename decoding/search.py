"""Captions from a model: greedy, sampling, beam search and beam sampling over the cached decoder. `model.generate` calls
`generate`.

A picture is encoded once; its beams or samples are rows that share its keys and values. Options mean what they mean in
transformers' `generate`, except that max_length and min_length count new tokens (its max_new_tokens and
min_new_tokens), the end token included. Imports config; packed and graphs by late imports. Never decodes pictures, never
prints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from config import UserError

if TYPE_CHECKING:
    from model import CrossAttention, GPT2Decoder, ImageCaptionModel

NEVER = -1e9  # a score no caption has; finite, so that it can be added to and compared
Logits = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Generated:
    """R = N * num_return_sequences captions of L tokens, those of one picture side by side."""

    sequences: Tensor
    """int64 (R, L): the prefix, if one was given, and the caption; no start token, filled up with the end token."""
    scores: Tensor | None = None
    """float (R,), of beams: what they were ranked by, the sum of log probabilities over length ** length_penalty."""
    token_log_probs: Tensor | None = None
    """float (R, L), with return_scores: each token's log probability after the ones before it, as the model itself has
    it (no temperature, no penalty); 0 for the prefix and behind the end."""
    lengths: Tensor | None = None
    """int64 (R,), with return_scores: how many tokens have one, the end token among them."""
    attention: Tensor | None = None
    """float (R, L, P), with return_attention: how much each token looked at each patch when it was chosen, averaged over
    layers and heads. A token's sum is below 1: the rest went to the class token."""

    @property
    def log_probs(self) -> Tensor:
        """float (R,): the log probability of each caption, its end token included. Needs return_scores."""
        assert self.token_log_probs is not None
        return self.token_log_probs.sum(-1)

    @property
    def mean_log_probs(self) -> Tensor:
        """float (R,): the same over the number of tokens, so that captions of different lengths compare."""
        assert self.lengths is not None
        return self.log_probs / self.lengths


@torch.inference_mode(False)  # what is kept for the next call must be of use outside it
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
    early_stopping: bool | Literal["never"] = False,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    prefix: str | Sequence[int] = (),
    bad_words: Sequence[str | Sequence[int]] = (),
    num_return_sequences: int = 1,
    return_scores: bool = False,
    return_attention: bool = False,
    generator: torch.Generator | None = None,
    int8: bool = False,
) -> Generated:
    """Captions for pixel_values (N, 3, S, S), uint8 or normalised float.

    max_length is 32 where nothing is said, or as many positions as the model has. Every caption goes on from `prefix`
    ("a photo of", or token ids) and holds none of bad_words (words, or token ids each). `generator` makes sampling
    repeatable. int8 rounds weights to 8 bits, on a CPU; for more than four captions at a time it rounds what they are
    multiplied with as well, so that a caption may depend on how many there are. Raises UserError for options that do
    not go together.
    """
    prefix = model.tokenizer(prefix).input_ids if isinstance(prefix, str) else list(prefix)
    room = model.config.text_positions - len(prefix)
    max_length = min(32, room) if max_length is None else max_length
    if max_length < 1 or max_length > room:
        behind = f" behind a prefix of {len(prefix)} tokens" if prefix else ""
        raise UserError(f"max_length {max_length} must be between 1 and the model's {room} positions{behind}")
    if min_length > max_length:
        raise UserError(f"min_length {min_length} is larger than max_length {max_length}")
    if do_sample and (temperature <= 0 or top_k < 0 or not 0 < top_p <= 1):
        raise UserError("sampling needs temperature > 0, top_k >= 0 (0 = all) and 0 < top_p <= 1")
    if num_beams < 1 or num_return_sequences < 1:
        raise UserError("num_beams and num_return_sequences must be at least 1")
    if num_return_sequences > num_beams and (num_beams > 1 or not do_sample):
        raise UserError(f"{num_return_sequences} captions a picture need as many beams, or do_sample without beams")
    if repetition_penalty <= 0 or no_repeat_ngram_size < 0:
        raise UserError("repetition_penalty must be above 0 and no_repeat_ngram_size at least 0")
    if return_attention and model.config.bridge != "cross_attention":
        raise UserError("return_attention needs cross-attention: a model that reads a prefix has none")
    end = model.config.end_token_id
    assert end is not None
    rules: list[Logits] = []  # in transformers' order
    if repetition_penalty != 1:
        rules.append(lambda logits, written: penalise_repetition(logits, written, repetition_penalty))
    if no_repeat_ngram_size:
        rules.append(lambda logits, written: forbid_ngrams(logits, written, no_repeat_ngram_size))
    if banned := [word for word in token_lists(model, bad_words) if word != [end]]:
        rules.append(lambda logits, written: forbid_words(logits, written, banned))
    if min_length:
        first_end = 1 + len(prefix) + min_length
        rules.append(lambda logits, written: forbid_end(logits, end) if written.shape[1] < first_end else logits)
    if do_sample:
        keep = 2 if num_beams > 1 else 1  # beams need one to end and one to go on
        rules.append(lambda logits, written: sharpen(logits, temperature, top_k, top_p, keep))

    def choose_from(logits: Tensor, written: Tensor) -> Tensor:
        for rule in rules:
            logits = rule(logits, written)
        return logits

    with model.generating:
        was_training = model.training
        model.eval()
        try:
            fast = fast_twin(model, int8, len(pixel_values) * max(num_beams, num_return_sequences))
            # A twin's layers know their own types; autocast would turn what they share into half precision at every token.
            with contextlib.nullcontext() if fast is model else torch.autocast(model.device.type, enabled=False):
                hidden = fast.encode(pixel_values)
                start = torch.tensor([model.config.start_token_id or 0, *prefix], device=hidden.device)
                if num_beams > 1:
                    found = beam_search(
                        fast.decoder,
                        hidden,
                        start,
                        choose_from,
                        max_length,
                        num_beams,
                        length_penalty,
                        early_stopping,
                        num_return_sequences,
                        do_sample,
                        generator,
                    )
                else:
                    rows = len(hidden) * num_return_sequences
                    found = token_by_token(
                        fast.decoder, hidden, start, choose_from, max_length, rows, do_sample, generator
                    )
                if return_scores or return_attention:
                    look_again(fast.decoder, hidden, found, len(prefix), return_scores, return_attention)
            return found
        finally:
            model.train(was_training)
            if was_training:  # the next step changes the weights anyway
                model.packed = None


def fast_twin(model: ImageCaptionModel, int8: bool, rows: int) -> ImageCaptionModel:
    """A twin of the model made for so many captions at a time, in the precision that autocast is set to: on a CPU with
    packed weights, on a GPU with recorded steps; elsewhere the model itself."""
    device, twin = model.device.type, model
    if int8 and device != "cpu":
        raise UserError("int8 is for a CPU: use another precision")
    plain = model.adapters is None and not model.config.language_model
    if not plain and not int8:  # while adapters learn, layers are peft's, and perhaps in 4 bits
        return model
    halved = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    if device == "cpu" and plain:
        from decoding.packed import packed_model

        twin = packed_model(model, "int8" if int8 else "bf16" if halved == torch.bfloat16 else "fp32", rows)
    elif device == "cuda":
        from decoding.recorded import graphed_model

        twin = graphed_model(model, halved or model.decoder.wte.weight.dtype)
    if int8 and twin is model:
        raise UserError("int8 needs a model in fp32 on a CPU that has the kernels: use another precision")
    return twin


def token_by_token(
    decoder: GPT2Decoder,
    hidden: Tensor,
    start: Tensor,
    choose_from: Logits,
    max_length: int,
    rows: int,
    do_sample: bool,
    generator: torch.Generator | None,
) -> Generated:
    """The most likely next token every time, or one drawn; `rows` captions of the encoder states (N, S, D)."""
    end = decoder.config.end_token_id
    assert end is not None
    cache = decoder.new_cache(hidden, rows, len(start) + max_length)
    written = torch.full((rows, len(start) + max_length), end, device=hidden.device)
    written[:, : len(start)] = start
    tokens = written[:, : len(start)]
    finished = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
    for place in range(len(start), written.shape[1]):
        logits = choose_from(decoder.next_logits(tokens, cache), written[:, :place])
        if do_sample:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        else:
            chosen = logits.argmax(-1)
        chosen = chosen.masked_fill(finished, end)
        written[:, place] = chosen
        tokens = chosen.unsqueeze(-1)
        finished |= chosen == end
        if finished.all():
            break
    return Generated(written[:, 1 : place + 1])


# What may follow: each takes logits or log probabilities (rows, V) and what is written so far (rows, T), the start token
# and the prefix included, and gives logits back.


def penalise_repetition(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Tokens already written become less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    seen = logits.gather(1, written)
    return logits.scatter(1, written, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid_ngrams(logits: Tensor, written: Tensor, size: int) -> Tensor:
    """Nothing that would complete `size` tokens which already stand together."""
    if written.shape[1] < size:
        return logits
    ngrams = written.unfold(1, size, 1)  # (rows, T - size + 1, size)
    last = written[:, written.shape[1] - size + 1 :]
    repeats = (ngrams[:, :, :-1] == last.unsqueeze(1)).all(-1)
    forbidden = torch.zeros_like(logits).scatter_reduce(1, ngrams[:, :, -1], repeats.to(logits.dtype), "amax")
    return logits.masked_fill(forbidden > 0, float("-inf"))


def forbid_words(logits: Tensor, written: Tensor, words: list[list[int]]) -> Tensor:
    """Nothing that would complete one of these token lists."""
    logits = logits.clone()
    for *before, last in words:
        if len(before) <= written.shape[1]:
            tail = written[:, written.shape[1] - len(before) :]
            logits[(tail == torch.tensor(before, dtype=tail.dtype, device=tail.device)).all(-1), last] = float("-inf")
    return logits


def forbid_end(logits: Tensor, end: int) -> Tensor:
    """No end token. The others' log probabilities stay as they are: beams are to add up as transformers' do."""
    logits = logits.clone()
    logits[:, end] = float("-inf")
    return logits


def token_lists(model: ImageCaptionModel, words: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Words as token ids: a text both as a caption's first word and behind a space."""
    lists = []
    for word in words:
        if isinstance(word, str):
            spellings = (model.tokenizer(f"{space}{word.strip()}").input_ids for space in ("", " "))
            lists += [ids for ids in spellings if ids and ids not in lists]
        else:
            lists.append(list(word))
    return lists


def sharpen(logits: Tensor, temperature: float, top_k: int, top_p: float, keep: int = 1) -> Tensor:
    """Divided by the temperature; then only the top_k best are left, then the fewest that hold top_p of the rest; at least
    `keep` in any case."""
    logits = logits / temperature
    if top_k:
        worst_kept = logits.topk(min(max(top_k, keep), logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst_kept, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        out = probabilities.cumsum(-1) - probabilities >= top_p  # the better tokens hold enough
        out[:, :keep] = False
        logits = logits.masked_fill(out.gather(-1, order.argsort(-1)), float("-inf"))
    return logits


# Beams


def beam_search(
    decoder: GPT2Decoder,
    hidden: Tensor,
    start: Tensor,
    choose_from: Logits,
    max_length: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
    num_return_sequences: int,
    do_sample: bool,
    generator: torch.Generator | None,
) -> Generated:
    """The best captions of encoder states (N, S, D), best first, found as transformers' beam search finds them.

    Every step keeps the 2 * num_beams best continuations (or draws them), so that num_beams go on even when all the
    better ones end. A caption that ends scores the sum of its log probabilities over length ** length_penalty. A picture
    is done when no running beam, scored at its present length (with "never": at the best it may reach), can beat the
    worst of its num_beams ended ones; with early_stopping, as soon as there are so many.
    """
    pictures, device, end = len(hidden), hidden.device, decoder.config.end_token_id
    assert end is not None
    first = len(start)
    cache = decoder.new_cache(hidden, pictures * num_beams, first + max_length)
    running = torch.full((pictures, num_beams, first + max_length), end, device=device)
    running[:, :, :first] = start
    running_scores = torch.zeros(pictures, num_beams, device=device)
    running_scores[:, 1:] = NEVER  # all beams start alike: only the first may branch
    ended, ended_scores = running.clone(), torch.full_like(running_scores, NEVER)
    has_ended = torch.zeros(pictures, num_beams, dtype=torch.bool, device=device)
    improvable = torch.ones(pictures, 1, dtype=torch.bool, device=device)
    tokens = running[:, :, :first].flatten(0, 1)
    first_row = torch.arange(pictures, device=device).unsqueeze(-1) * num_beams
    ranks = torch.arange(2 * num_beams, device=device)

    def choose(x: Tensor, beams: Tensor) -> Tensor:
        """x (N, any, ...) at beams (N, n) -> (N, n, ...)."""
        return x[torch.arange(pictures, device=device).unsqueeze(-1), beams]

    for length in range(1, max_length + 1):  # of a caption that ends with this step's token
        place = first + length - 1
        log_probs = decoder.next_logits(tokens, cache).log_softmax(-1)
        log_probs = choose_from(log_probs, running[:, :, :place].flatten(0, 1))
        vocab_size = log_probs.shape[-1]
        total = (log_probs.view(pictures, num_beams, vocab_size) + running_scores.unsqueeze(-1)).flatten(1)
        if do_sample:
            best = torch.multinomial(total.softmax(-1), 2 * num_beams, generator=generator)
            scores, order = total.gather(1, best).sort(descending=True)  # as transformers does since 5.24
            best = best.gather(1, order)
        else:
            scores, best = total.topk(2 * num_beams)  # (N, 2 * num_beams)
        beams, next_tokens = best // vocab_size, best % vocab_size
        candidates = choose(running, beams)
        candidates[:, :, place] = next_tokens
        ends = (next_tokens == end) | (length == max_length)

        running_scores, chosen = (scores + ends * NEVER).topk(num_beams)
        running = choose(candidates, chosen)
        tokens = running[:, :, place].flatten().unsqueeze(-1)
        rows = (first_row + choose(beams, chosen)).flatten()

        new = ends & (ranks < num_beams)  # the worse half is only there to go on
        closed = ~improvable | (has_ended.all(-1, keepdim=True) & (early_stopping is True))
        new_scores = scores / length**length_penalty + closed * NEVER + ~new * NEVER
        ended_scores, kept = torch.cat([ended_scores, new_scores], 1).topk(num_beams)
        ended = choose(torch.cat([ended, candidates], 1), kept)
        has_ended = choose(torch.cat([has_ended, new], 1), kept)

        worst_ended = ended_scores.min(1, keepdim=True).values.where(has_ended, torch.tensor(NEVER, device=device))
        final_length = max_length if early_stopping == "never" and length_penalty > 0 else length
        improvable = improvable & (running_scores[:, :1] / final_length**length_penalty > worst_ended).any(-1, True)
        if not improvable.any() or ends.all() or (early_stopping is True and has_ended.all()):
            break
        cache.reorder(rows)
    sequences = ended[:, :num_return_sequences].flatten(0, 1)
    longest = int((sequences[:, first:] != end).sum(-1).max()) + 1  # the end token itself, where there is room for it
    return Generated(
        sequences[:, 1 : first + min(longest, max_length)], ended_scores[:, :num_return_sequences].flatten()
    )


# What a finished caption can tell


def look_again(
    decoder: GPT2Decoder, hidden: Tensor, found: Generated, prefix: int, scores: bool, attention: bool
) -> None:
    """Reads the finished captions once more, all tokens at a time, and fills in token_log_probs and attention."""
    sequences, end = found.sequences, decoder.config.end_token_id
    read = torch.cat(
        [sequences.new_full((len(sequences), 1), decoder.config.start_token_id or 0), sequences[:, :-1]], 1
    )
    cross = decoder.look(hidden)
    looks: list[Tensor] = []

    def watch(layer: CrossAttention, inputs: tuple[Tensor, ...]) -> None:
        looks.append(layer.weights(inputs[0], inputs[1]).mean(2))  # (R, L, S)

    layers = decoder.cross_attentions() if attention else []
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        states = decoder(read, cross)
    finally:
        for hook in hooks:
            hook.remove()
    if scores:
        each = torch.stack([decoder.head(row).float().log_softmax(-1) for row in states.unbind(1)], 1)
        each = each.gather(-1, sequences.unsqueeze(-1)).squeeze(-1)
        is_end = sequences.eq(end or 0).long()
        behind = is_end.cumsum(1) > is_end  # after the first end token
        behind[:, :prefix] = True
        found.token_log_probs, found.lengths = each.masked_fill(behind, 0.0), (~behind).sum(1)
    if attention:
        found.attention = torch.stack(looks).mean(0)[:, :, 1:].float()
