"""Captions from a model: greedy, sampling, beam search and beam sampling over the cached decoder. `model.generate` calls
`generate`.

A picture is encoded once; its beams or samples are rows that share its keys and values. Works on anything that has a
decoder's few methods (cache.Decoder). Never decodes pictures, never prints.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from config import LONGEST, UserError
from decoding.cache import Decoder
from decoding.packed import packed_model
from decoding.recorded import recorded_model

PATIENCE = 4  # tokens after which a GPU is asked again whether all captions have ended: asking makes it wait
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


@dataclass(frozen=True, kw_only=True)
class Search:
    """How captions are searched for. Raises UserError for options that do not go together.

    They mean what they mean in transformers' `generate`, except that max_length and min_length count new tokens (its
    max_new_tokens and min_new_tokens), the end token included.
    """

    max_length: int | None = None
    """Longest caption, in tokens (None: LONGEST, or as many positions as the model has)."""
    min_length: int = 0
    """Shortest caption, in tokens."""
    num_beams: int = 1
    """Beams; 1 is greedy, or sampling."""
    do_sample: bool = False
    """Draw tokens instead of taking the likeliest."""
    temperature: float = 1.0
    """What logits are divided by before drawing."""
    top_k: int = 50
    """Draw among so many best tokens (0: all)."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this much probability."""
    length_penalty: float = 1.0
    """Above 0, longer captions win more often among beams."""
    early_stopping: bool | Literal["never"] = False
    """When a picture's beams are done: see beam_search."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already written become less likely."""
    no_repeat_ngram_size: int = 0
    """No so many tokens stand together twice (0: no rule)."""
    prefix: str | Sequence[int] = ()
    """What every caption goes on from: "a photo of", or token ids."""
    bad_words: Sequence[str | Sequence[int]] = ()
    """Words, or token ids each, that no caption holds."""
    num_return_sequences: int = 1
    """Captions of each picture."""
    return_scores: bool = False
    """Fill in token_log_probs and lengths."""
    return_attention: bool = False
    """Fill in attention."""

    def __post_init__(self) -> None:
        if self.do_sample and (self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1):
            raise UserError("sampling needs temperature > 0, top_k >= 0 (0 = all) and 0 < top_p <= 1")
        if self.num_beams < 1 or self.num_return_sequences < 1:
            raise UserError("num_beams and num_return_sequences must be at least 1")
        if self.num_return_sequences > self.num_beams and (self.num_beams > 1 or not self.do_sample):
            more = f"{self.num_return_sequences} captions a picture"
            raise UserError(f"{more} need as many beams, or do_sample without beams")
        if self.repetition_penalty <= 0 or self.no_repeat_ngram_size < 0:
            raise UserError("repetition_penalty must be above 0 and no_repeat_ngram_size at least 0")

    def steps(self, room: int, prefix: int) -> int:
        """The most tokens to write behind `prefix` tokens, in `room` positions. Raises UserError where they do not fit."""
        if room < 1:
            raise UserError(
                f"a prefix of {prefix} tokens leaves no room in the model's {room + prefix} positions: shorten it"
            )
        longest = min(LONGEST, room) if self.max_length is None else self.max_length
        if longest < 1 or longest > room:
            behind = f" behind a prefix of {prefix} tokens" if prefix else ""
            raise UserError(f"max_length {longest} must be between 1 and the model's {room} positions{behind}")
        if self.min_length > longest:
            raise UserError(f"min_length {self.min_length} is larger than max_length {longest}")
        return longest

    def rules(self, prefix: int, end: int, banned: list[list[int]], known: Logits | None = None) -> list[Logits]:
        """What changes logits before a token is chosen, in transformers' order. `known`: see known_tokens."""
        rules: list[Logits] = []
        if self.repetition_penalty != 1:
            rules.append(lambda logits, written: penalise_repetition(logits, written, self.repetition_penalty))
        if self.no_repeat_ngram_size:
            rules.append(lambda logits, written: forbid_ngrams(logits, written, self.no_repeat_ngram_size))
        if banned := [word for word in banned if word != [end]]:
            rules.append(lambda logits, written: forbid_words(logits, written, banned))
        if self.min_length:
            first_end = 1 + prefix + self.min_length
            rules.append(lambda logits, written: forbid_end(logits, end) if written.shape[1] < first_end else logits)
        if known:
            rules.append(known)
        if self.do_sample:
            keep = 2 if self.num_beams > 1 else 1  # beams need one to end and one to go on
            rules.append(lambda logits, _: sharpen(logits, self.temperature, self.top_k, self.top_p, keep))
        return rules


@torch.inference_mode(False)  # what is kept for the next call must be of use outside it
@torch.no_grad()
def generate(
    model: Any,
    pixel_values: Tensor,
    *,
    generator: torch.Generator | None = None,
    int8: bool = False,
    engine: Callable[[Any, Any, int], Any] | None = None,
    **options: Any,
) -> Generated:
    """Captions for pixel_values (N, 3, S, S), uint8 or normalised float; `options` are Search's.

    `generator` makes sampling repeatable. int8 rounds weights to 8 bits, on a CPU; for more than four captions at a time
    it rounds what they are multiplied with as well, so that a caption may depend on how many there are. `engine` makes of
    the model, its fast copy and the number of captions the decoder that is asked for tokens (see captioning/engine.py).
    Raises UserError for options that do not go together.
    """
    search, end = Search(**options), model.config.end_token_id
    if pixel_values.is_floating_point() and pixel_values.numel():
        check_normalised(float(pixel_values.abs().max()))
    prefix = token_ids(model, "prefix", search.prefix) if len(search.prefix) else []
    max_length = search.steps(model.config.text_positions - len(prefix), len(prefix))
    if search.return_attention and model.config.bridge != "cross_attention":
        raise UserError("return_attention needs cross-attention: a model that reads a prefix has none")
    rules = search.rules(len(prefix), end, token_lists(model, search.bad_words), known_tokens(model))

    def choose_from(logits: Tensor, written: Tensor) -> Tensor:
        for rule in rules:
            logits = rule(logits, written)
        return logits

    with model.copies.lock:
        was_training = model.training
        model.eval()
        try:
            rows = len(pixel_values) * max(search.num_beams, search.num_return_sequences)
            fast = fast_copy(model, int8, rows)
            # A copy's layers know their own types; autocast would turn what they share into half precision at every token.
            with contextlib.nullcontext() if fast is model else torch.autocast(model.device.type, enabled=False):
                hidden = fast.encode(pixel_values)
                start = torch.tensor([model.config.start_token_id or 0, *prefix], device=hidden.device)
                find = beam_search if search.num_beams > 1 else token_by_token
                decoder = engine(model, fast, rows) if engine else fast.decoder
                threads = torch.get_num_threads()
                try:
                    found = find(decoder, hidden, start, choose_from, search, max_length, generator)
                finally:
                    if engine:  # which may have threads of its own
                        torch.set_num_threads(threads)
                if search.return_scores or search.return_attention:
                    look_again(fast.decoder, hidden, found, len(prefix), search)
            return found
        finally:
            model.train(was_training)
            if was_training:  # the next step changes the weights anyway
                model.copies.drop()


def fast_copy(model: Any, int8: bool, rows: int) -> Any:
    """A copy of the model made for so many captions at a time, in the precision that autocast is set to: on a CPU with
    packed weights, on a GPU with recorded steps; elsewhere the model itself."""
    device, fast = model.device.type, model
    if int8 and device != "cpu":
        raise UserError("int8 is for a CPU: use another precision")
    plain = model.adapters is None and not model.config.language_model
    if not plain and not int8:  # while adapters learn, layers are peft's, and perhaps in 4 bits
        return model
    halved = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    if device == "cpu" and plain:
        fast = packed_model(model, "int8" if int8 else "bf16" if halved == torch.bfloat16 else "fp32", rows)
    elif device == "cuda":
        fast = recorded_model(model, halved or model.decoder.wte.weight.dtype)
    if int8 and fast is model:
        raise UserError("int8 needs a model in fp32 on a CPU that has the kernels: use another precision")
    return fast


def token_by_token(
    decoder: Decoder,
    hidden: Tensor,
    start: Tensor,
    choose_from: Logits,
    search: Search,
    max_length: int,
    generator: torch.Generator | None,
) -> Generated:
    """The most likely next token every time, or one drawn, for the encoder states (N, S, D)."""
    rows = len(hidden) * search.num_return_sequences
    end = decoder.config.end_token_id
    assert end is not None
    cache = decoder.new_cache(hidden, rows, len(start) + max_length)
    written = torch.full((rows, len(start) + max_length), end, device=hidden.device)
    written[:, : len(start)] = start
    tokens = written[:, : len(start)]
    finished = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
    for place in range(len(start), written.shape[1]):
        logits = choose_from(decoder.next_logits(tokens, cache), written[:, :place])
        chosen = draw(logits.softmax(-1), 1, generator).squeeze(-1) if search.do_sample else logits.argmax(-1)
        chosen = chosen.masked_fill(finished, end)
        written[:, place] = chosen
        tokens = chosen.unsqueeze(-1)
        finished |= chosen == end
        if is_asked(place - len(start), hidden.device) and finished.all():
            break
    return Generated(written[:, 1 : len(start) + longest_of(written[:, len(start) :], end)])


def is_asked(token: int, device: torch.device) -> bool:
    """Whether to look after this token if all captions have ended."""
    return device.type == "cpu" or token % PATIENCE == PATIENCE - 1


def longest_of(written: Tensor, end: int) -> int:
    """Tokens of the longest caption, its end token included where there is room: written (..., L), filled up with it."""
    return min(int((written != end).sum(-1).max()) + 1, written.shape[-1])


def draw(probabilities: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """(rows, V) -> as many different tokens a row, int64 (rows, number), each as likely as its probability says."""
    if probabilities.device.type == "cpu":
        return torch.multinomial(probabilities, number, generator=generator)
    # The same by a race (Efraimidis and Spirakis 2006), which need not wait for the device as multinomial does.
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).topk(number).indices


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


def known_tokens(model: Any) -> Logits | None:
    """Leaves only what the tokenizer has words for, where the model's vocabulary is larger: cuts off the rows behind its last
    id, which costs nothing, and forbids the gaps before it."""
    tokenizer, size = model._tokenizer, model.config.vocab_size  # not model.tokenizer, which may fetch one
    if tokenizer is None or len(tokenizer) >= size:
        return None
    gaps, last = missing_ids(tokenizer, len(tokenizer), size)
    absent = torch.tensor(gaps, dtype=torch.int64, device=model.device)
    return lambda logits, _: logits[:, :last].index_fill(1, absent, float("-inf")) if gaps else logits[:, :last]


@functools.lru_cache(maxsize=4)
def missing_ids(tokenizer: Any, length: int, size: int) -> tuple[list[int], int]:
    """Ids below `size` that a tokenizer of this length has no token for before its last one, and the first behind that."""
    ids = set(tokenizer.get_vocab().values())
    return [token for token in range(min(size, max(ids))) if token not in ids], max(ids) + 1


def token_lists(model: Any, words: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Words as token ids: a text both as a caption's first word and behind a space. Raises UserError."""
    lists = []
    for word in words:
        text = word.strip() if isinstance(word, str) else ""
        for spelling in (text, f" {text}") if text else (word,):
            if (ids := token_ids(model, "bad_words", spelling)) not in lists:
                lists.append(ids)
    return lists


def token_ids(model: Any, option: str, words: str | Sequence[int]) -> list[int]:
    """Ids of a text, or those given. Raises UserError where there are none, or where the model has none such."""
    size = model.config.vocab_size
    if isinstance(words, str) and words.strip():
        words = model.tokenizer(words).input_ids
    ids = [] if isinstance(words, str) else list(words)
    if not ids:
        raise UserError(f"{option}: {words!r} holds no token: leave it out")
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise UserError(f"{option}: the model has no token {wrong[0]}: its ids are 0 to {size - 1}")
    return ids


def check_normalised(largest: float) -> None:
    """Refuses float pixels that are still 0 to 255, by the largest: normalised ones stay within about 3."""
    if not largest < 32:
        raise UserError(f"pixel_values is float and reaches {largest:g}: pass uint8, or normalised numbers")


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
    decoder: Decoder,
    hidden: Tensor,
    start: Tensor,
    choose_from: Logits,
    search: Search,
    max_length: int,
    generator: torch.Generator | None,
) -> Generated:
    """The best captions of encoder states (N, S, D), best first, found as transformers' beam search finds them.

    Every step keeps the 2 * num_beams best continuations (or draws them), so that num_beams go on even when all the
    better ones end. A caption that ends scores the sum of its log probabilities over length ** length_penalty. A picture
    is done when no running beam, scored at its present length (with "never": at the best it may reach), can beat the
    worst of its num_beams ended ones; with early_stopping, as soon as there are so many.
    """
    pictures, num_beams, first = len(hidden), search.num_beams, len(start)
    cache = decoder.new_cache(hidden, pictures * num_beams, first + max_length)
    beams = Beams(decoder.config.end_token_id or 0, pictures, search, start, max_length)
    tokens = beams.running[:, :, :first].flatten(0, 1)
    for length in range(1, max_length + 1):  # of a caption that ends with this step's token
        log_probs = decoder.next_logits(tokens, cache).log_softmax(-1)
        log_probs = choose_from(log_probs, beams.running[:, :, : first + length - 1].flatten(0, 1))
        total = (log_probs.view(pictures, num_beams, -1) + beams.running_scores.unsqueeze(-1)).flatten(1)
        if search.do_sample:
            best = draw(total.softmax(-1), 2 * num_beams, generator)
            scores, order = total.gather(1, best).sort(descending=True)  # as transformers does since 5.24
            best = best.gather(1, order)
        else:
            scores, best = total.topk(2 * num_beams)  # (N, 2 * num_beams)
        rows = beams.step(length, scores, best // log_probs.shape[-1], best % log_probs.shape[-1])
        if rows is None:
            break
        tokens = beams.running[:, :, first + length - 1].flatten().unsqueeze(-1)
        cache.reorder(rows)
    return beams.best(search.num_return_sequences)


class Beams:
    """The beams of N pictures: those that run, and the best that have ended."""

    def __init__(self, end: int, pictures: int, search: Search, start: Tensor, max_length: int) -> None:
        device, number = start.device, search.num_beams
        self.end, self.search, self.first, self.max_length = end, search, len(start), max_length
        self.running = torch.full((pictures, number, self.first + max_length), end, device=device)
        self.running[:, :, : self.first] = start
        self.running_scores = torch.zeros(pictures, number, device=device)
        self.running_scores[:, 1:] = NEVER  # all beams start alike: only the first may branch
        self.ended, self.ended_scores = self.running.clone(), torch.full_like(self.running_scores, NEVER)
        self.has_ended = torch.zeros(pictures, number, dtype=torch.bool, device=device)
        self.improvable = torch.ones(pictures, 1, dtype=torch.bool, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)
        """All pictures are: nothing that comes later counts."""
        self.pictures = torch.arange(pictures, device=device).unsqueeze(-1)
        self.ranks = torch.arange(2 * number, device=device)

    def choose(self, x: Tensor, beams: Tensor) -> Tensor:
        """x (N, any, ...) at beams (N, n) -> (N, n, ...)."""
        return x[self.pictures, beams]

    def step(self, length: int, scores: Tensor, beams: Tensor, tokens: Tensor) -> Tensor | None:
        """Takes in the 2 * num_beams best continuations, each (N, 2 * num_beams): their scores, the beams they go on from
        and their tokens. Returns the cache's rows that go on, (N * num_beams,), or None when all pictures are done."""
        number, early, penalty = self.search.num_beams, self.search.early_stopping, self.search.length_penalty
        candidates = self.choose(self.running, beams)
        candidates[:, :, self.first + length - 1] = tokens
        ends = (tokens == self.end) | (length == self.max_length)

        self.running_scores, chosen = (scores + ends * NEVER).topk(number)
        self.running = self.choose(candidates, chosen)

        new = ends & (self.ranks < number)  # the worse half is only there to go on
        closed = self.done | ~self.improvable | (self.has_ended.all(-1, keepdim=True) & (early is True))
        new_scores = scores / length**penalty + closed * NEVER + ~new * NEVER
        self.ended_scores, kept = torch.cat([self.ended_scores, new_scores], 1).topk(number)
        self.ended = self.choose(torch.cat([self.ended, candidates], 1), kept)
        self.has_ended = self.choose(torch.cat([self.has_ended, new], 1), kept)

        worst_ended = self.ended_scores.min(1, keepdim=True).values.where(self.has_ended, NEVER)
        final_length = self.max_length if early == "never" and penalty > 0 else length
        reachable = self.running_scores[:, :1] / final_length**penalty
        self.improvable = self.improvable & (reachable > worst_ended).any(-1, True)
        self.done = self.done | ~self.improvable.any() | ends.all() | ((early is True) & self.has_ended.all())
        if is_asked(length - 1, scores.device) and self.done:
            return None
        return (self.pictures * number + self.choose(beams, chosen)).flatten()

    def best(self, captions: int) -> Generated:
        """So many of each picture, the best first."""
        sequences = self.ended[:, :captions].flatten(0, 1)
        longest = longest_of(sequences[:, self.first :], self.end)
        return Generated(sequences[:, 1 : self.first + longest], self.ended_scores[:, :captions].flatten())


# What a finished caption can tell


def look_again(decoder: Decoder, hidden: Tensor, found: Generated, prefix: int, search: Search) -> None:
    """Reads the finished captions once more, all tokens at a time, and fills in token_log_probs and attention."""
    sequences, end = found.sequences, decoder.config.end_token_id
    read = torch.cat(
        [sequences.new_full((len(sequences), 1), decoder.config.start_token_id or 0), sequences[:, :-1]], 1
    )
    cross = decoder.look(hidden)
    looks: list[Tensor] = []

    def watch(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        looks.append(layer.weights(inputs[0], inputs[1]).mean(2))  # (R, L, S)

    layers = decoder.cross_attentions() if search.return_attention else []
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        states = decoder(read, cross)
    finally:
        for hook in hooks:
            hook.remove()
    if search.return_scores:
        steps = zip(states.unbind(1), sequences.unsqueeze(-1).unbind(1), strict=True)  # (R, D), (R, 1) of each token
        each = torch.cat([decoder.head(row).float().log_softmax(-1).gather(-1, token) for row, token in steps], 1)
        is_end = sequences.eq(end or 0).long()
        behind = is_end.cumsum(1) > is_end  # after the first end token
        behind[:, :prefix] = True
        found.token_log_probs, found.lengths = each.masked_fill(behind, 0.0), (~behind).sum(1)
    if search.return_attention:
        found.attention = torch.stack(looks).mean(0)[:, :, -decoder.config.num_patches :].float()
