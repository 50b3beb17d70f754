"""Search for captions: greedy, sampling, beam search and beam sampling, with a KV cache.

A picture is encoded once; its beams or samples are rows that share its keys and values. Works with any decoder that has
the methods of cache.Decoder. Called by `model.generate`. Never decodes picture files, never prints.
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
from decoding.vocabulary import only_words

PATIENCE = 4  # tokens between two checks, on a GPU, whether all captions have ended: a check makes the CPU wait for it
NEVER = -1e9  # a score that no caption has; finite, so that sums and comparisons work
Logits = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Generated:
    """R = N * num_return_sequences captions of L tokens; captions of one picture are adjacent."""

    sequences: Tensor
    """int64 (R, L): the prefix, if given, and the caption; without start token, padded with the end token."""
    scores: Tensor | None = None
    """float (R,), with beams: the score they are ranked by, sum of log probabilities / length ** length_penalty."""
    token_log_probs: Tensor | None = None
    """float (R, L), with return_scores: the model's log probability of each token given the earlier ones, without
    temperature or penalties; 0 in the prefix and after the end token."""
    lengths: Tensor | None = None
    """int64 (R,), with return_scores: number of tokens that have a log probability, end token included."""
    attention: Tensor | None = None
    """float (R, L, P), with return_attention: attention weight of each token for each patch when the token was chosen,
    averaged over layers and heads. A token's weights sum to less than 1: the others went to the class token."""

    @property
    def log_probs(self) -> Tensor:
        """float (R,): log probability of each caption, end token included. Needs return_scores."""
        assert self.token_log_probs is not None
        return self.token_log_probs.sum(-1)

    @property
    def mean_log_probs(self) -> Tensor:
        """float (R,): log probability per token, to compare captions of different lengths. Needs return_scores."""
        assert self.lengths is not None
        return self.log_probs / self.lengths


@dataclass(frozen=True, kw_only=True)
class Search:
    """Options of the search for captions. Raises UserError for options that contradict each other.

    They mean the same as in transformers' `generate`, except that max_length and min_length count new tokens, the end
    token included (max_new_tokens and min_new_tokens there).
    """

    max_length: int | None = None
    """Longest caption, in tokens (None: LONGEST, or the model's number of positions if that is less)."""
    min_length: int = 0
    """Shortest caption, in tokens."""
    num_beams: int = 1
    """Number of beams; 1: greedy, or sampling."""
    do_sample: bool = False
    """Sample tokens instead of taking the most likely one."""
    temperature: float = 1.0
    """Divide logits by this before sampling."""
    top_k: int = 50
    """Sample among this many most likely tokens (0: all)."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach this sum."""
    length_penalty: float = 1.0
    """Above 0, beams of longer captions get better scores."""
    early_stopping: bool | Literal["never"] = False
    """When to stop a picture's beams: see beam_search."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were already written become less likely."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this many tokens occurs twice (0: no limit)."""
    prefix: str | Sequence[int] = ()
    """The start of every caption: a text such as "a photo of", or token ids."""
    bad_words: Sequence[str | Sequence[int]] = ()
    """Words that no caption contains, each a text or token ids."""
    only_words: Sequence[str] = ()
    """The only words that captions may contain; (): all."""
    num_return_sequences: int = 1
    """Number of captions per picture."""
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
        """The most tokens to write after `prefix` tokens, in `room` positions. Raises UserError if they do not fit."""
        if room < 1:
            raise UserError(
                f"a prefix of {prefix} tokens leaves no room in the model's {room + prefix} positions: shorten it"
            )
        longest = min(LONGEST, room) if self.max_length is None else self.max_length
        if longest < 1 or longest > room:
            after = f" after a prefix of {prefix} tokens" if prefix else ""
            raise UserError(f"max_length {longest} must be between 1 and the model's {room} positions{after}")
        if self.min_length > longest:
            raise UserError(f"min_length {self.min_length} is larger than max_length {longest}")
        return longest

    def rules(
        self,
        prefix: int,
        end: int,
        banned: list[list[int]],
        known: Logits | None = None,
        vocabulary: Logits | None = None,
    ) -> list[Logits]:
        """Functions that change logits before a token is chosen, in transformers' order. known: see known_tokens;
        vocabulary: see vocabulary.only_words."""
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
        if vocabulary:
            rules.append(vocabulary)
        if known:
            rules.append(known)
        if self.do_sample:
            keep = 2 if self.num_beams > 1 else 1  # beams need one token to end with and one to continue with
            rules.append(lambda logits, _: sharpen(logits, self.temperature, self.top_k, self.top_p, keep))
        return rules


@torch.inference_mode(False)  # cached copies must be usable outside inference mode
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
    """Generate captions for pixel_values (N, 3, S, S), uint8 or normalised float; `options` are those of Search.

    generator: makes sampling repeatable. int8: round weights to 8 bits (CPU only); for more captions at a time than
    packed.few_rows, activations are rounded too, so a caption may depend on how many there are. engine: called with the
    model, its fast copy and the number of captions, returns the decoder to use (see captioning/engine.py).
    Raises UserError for options that contradict each other.
    """
    search, end = Search(**options), model.config.end_token_id
    if pixel_values.is_floating_point() and pixel_values.numel():
        check_normalised(float(pixel_values.abs().max()))
    prefix = token_ids(model, "prefix", search.prefix) if len(search.prefix) else []
    max_length = search.steps(model.config.text_positions - len(prefix), len(prefix))
    if search.return_attention and model.config.bridge != "cross_attention":
        raise UserError("return_attention needs cross-attention: a model that reads a prefix has none")
    vocabulary = None
    if search.only_words:
        first = 1 + len(prefix)  # position after the start token and the prefix
        vocabulary = only_words(model, tuple(search.only_words), first, first + max_length)
    banned = token_lists(model, search.bad_words)
    rules = search.rules(len(prefix), end, banned, known_tokens(model), vocabulary)

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
            # A fast copy's layers set their dtypes; autocast would convert shared weights again at every token.
            with contextlib.nullcontext() if fast is model else torch.autocast(model.device.type, enabled=False):
                hidden = fast.encode(pixel_values)
                start = torch.tensor([model.config.start_token_id, *prefix], device=hidden.device)
                find = beam_search if search.num_beams > 1 else token_by_token
                decoder = engine(model, fast, rows) if engine else fast.decoder
                threads = torch.get_num_threads()
                try:
                    found = find(decoder, hidden, start, choose_from, search, max_length, generator)
                finally:
                    if engine:  # it may use its own number of threads
                        torch.set_num_threads(threads)
                if search.return_scores or search.return_attention:
                    read_again(fast.decoder, hidden, found, len(prefix), search)
            return found
        finally:
            model.train(was_training)
            if was_training:  # the next step changes the weights anyway
                model.copies.drop()


def fast_copy(model: Any, int8: bool, rows: int) -> Any:
    """Make a copy of the model for `rows` captions at a time, in autocast's precision: with packed weights on a CPU,
    with recorded steps on a GPU; on other devices return the model. Raises UserError if int8 is not possible."""
    device, fast = model.device.type, model
    if int8 and device != "cpu":
        raise UserError("int8 is for a CPU: use another precision")
    plain = model.adapters is None and not model.config.language_model
    if not plain and not int8:  # while adapters are trained, layers are peft's, and may be in 4 bits
        return model
    halved = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    if device == "cpu" and plain:
        fast = packed_model(model, "int8" if int8 else "bf16" if halved == torch.bfloat16 else "fp32", rows)
    elif device == "cuda":
        fast = recorded_model(model, halved or model.decoder.wte.weight.dtype)
    if int8 and fast is model:
        raise UserError("int8 needs a model in fp32, and a CPU with the kernels for it: use another precision")
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
    """Search greedily or by sampling, for encoder states (N, S, D)."""
    rows = len(hidden) * search.num_return_sequences
    end = decoder.config.end_token_id
    cache = decoder.new_cache(hidden, rows, len(start) + max_length)
    written = torch.full((rows, len(start) + max_length), end, device=hidden.device)
    written[:, : len(start)] = start
    tokens = written[:, : len(start)]
    finished = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
    for position in range(len(start), written.shape[1]):
        logits = choose_from(decoder.next_logits(tokens, cache), written[:, :position])
        chosen = draw(logits.softmax(-1), 1, generator).squeeze(-1) if search.do_sample else logits.argmax(-1)
        chosen = chosen.masked_fill(finished, end)
        written[:, position] = chosen
        tokens = chosen.unsqueeze(-1)
        finished |= chosen == end
        if is_checked(position - len(start), hidden.device) and finished.all():
            break
    return Generated(written[:, 1 : len(start) + longest_of(written[:, len(start) :], end)])


def is_checked(token: int, device: torch.device) -> bool:
    """Whether to check after this token if all captions have ended."""
    return device.type == "cpu" or token % PATIENCE == PATIENCE - 1


def longest_of(written: Tensor, end: int) -> int:
    """Length of the longest caption in `written` (..., L), padded with `end`; with one end token if there is room."""
    return min(int((written != end).sum(-1).max()) + 1, written.shape[-1])


def draw(probabilities: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """Sample `number` different tokens per row, int64 (rows, number), from probabilities (rows, V)."""
    if probabilities.device.type == "cpu":
        return torch.multinomial(probabilities, number, generator=generator)
    # The same distribution (Efraimidis and Spirakis 2006), without waiting for the device as multinomial does.
    return (probabilities / torch.empty_like(probabilities).exponential_(generator=generator)).topk(number).indices


# Rules for the next token: each takes logits or log probabilities (rows, V) and the tokens written so far (rows, T),
# start token and prefix included, and returns logits.


def penalise_repetition(logits: Tensor, written: Tensor, penalty: float) -> Tensor:
    """Make tokens that were already written less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    scores = logits.gather(1, written)
    return logits.scatter(1, written, torch.where(scores < 0, scores * penalty, scores / penalty))


def forbid_ngrams(logits: Tensor, written: Tensor, size: int) -> Tensor:
    """Forbid tokens that would repeat an n-gram of `size` tokens."""
    if written.shape[1] < size:
        return logits
    ngrams = written.unfold(1, size, 1)  # (rows, T - size + 1, size)
    last = written[:, written.shape[1] - size + 1 :]
    repeats = (ngrams[:, :, :-1] == last.unsqueeze(1)).all(-1)
    forbidden = torch.zeros_like(logits).scatter_reduce(1, ngrams[:, :, -1], repeats.to(logits.dtype), "amax")
    return logits.masked_fill(forbidden > 0, float("-inf"))


def forbid_words(logits: Tensor, written: Tensor, words: list[list[int]]) -> Tensor:
    """Forbid tokens that would complete one of these token lists."""
    logits = logits.clone()
    for *before, last in words:
        if len(before) <= written.shape[1]:
            tail = written[:, written.shape[1] - len(before) :]
            logits[(tail == torch.tensor(before, dtype=tail.dtype, device=tail.device)).all(-1), last] = float("-inf")
    return logits


def forbid_end(logits: Tensor, end: int) -> Tensor:
    """Forbid the end token. The other log probabilities are unchanged, so that beam scores equal transformers'."""
    logits = logits.clone()
    logits[:, end] = float("-inf")
    return logits


def known_tokens(model: Any) -> Logits | None:
    """Return a rule that allows only the tokenizer's tokens, if the model's vocabulary is larger; else None. The rule
    cuts off the logits after the last id, which costs no time, and forbids missing ids before it."""
    tokenizer, size = model._tokenizer, model.config.vocab_size  # not model.tokenizer, which may download one
    if tokenizer is None or len(tokenizer) >= size:
        return None
    gaps, last = missing_ids(tokenizer, len(tokenizer), size)
    absent = torch.tensor(gaps, dtype=torch.int64, device=model.device)
    return lambda logits, _: logits[:, :last].index_fill(1, absent, float("-inf")) if gaps else logits[:, :last]


@functools.lru_cache(maxsize=4)
def missing_ids(tokenizer: Any, length: int, size: int) -> tuple[list[int], int]:
    """Ids below `size` that are missing before the tokenizer's last id, and that id + 1. length: only a cache key."""
    ids = set(tokenizer.get_vocab().values())
    return [token for token in range(min(size, max(ids))) if token not in ids], max(ids) + 1


def token_lists(model: Any, words: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Words as token ids: each text both with and without a space before it. Raises UserError."""
    lists = []
    for word in words:
        text = word.strip() if isinstance(word, str) else ""
        for spelling in (text, f" {text}") if text else (word,):
            if (ids := token_ids(model, "bad_words", spelling)) not in lists:
                lists.append(ids)
    return lists


def token_ids(model: Any, option: str, words: str | Sequence[int]) -> list[int]:
    """The token ids of a text, or the given ids. Raises UserError if there are none, or if the model has no such id."""
    size = model.config.vocab_size
    if isinstance(words, str) and words.strip():
        words = model.tokenizer(words).input_ids
    ids = [] if isinstance(words, str) else list(words)
    if not ids:
        raise UserError(f"{option}: {words!r} has no tokens: remove it")
    if wrong := [token for token in ids if not 0 <= token < size]:
        raise UserError(f"{option}: the model has no token {wrong[0]}: use ids from 0 to {size - 1}")
    return ids


def check_normalised(largest: float) -> None:
    """Raise UserError if float pixels seem to be 0 to 255: the largest normalised value is about 3."""
    if not largest < 32:
        raise UserError(f"pixel_values is float and reaches {largest:g}: pass uint8, or normalised numbers")


def sharpen(logits: Tensor, temperature: float, top_k: int, top_p: float, keep: int = 1) -> Tensor:
    """Divide logits by the temperature, then leave only the top_k best, then only the fewest of these whose
    probabilities reach top_p; always at least `keep`."""
    logits = logits / temperature
    if top_k:
        lowest = logits.topk(min(max(top_k, keep), logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        out = probabilities.cumsum(-1) - probabilities >= top_p  # the better tokens already reach top_p
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
    """Find the best captions of encoder states (N, S, D), best first, in the same way as transformers' beam search.

    Every step takes the 2 * num_beams best continuations (or samples them), so that num_beams can continue even if all
    the better ones end. The score of an ended caption is the sum of its log probabilities / length ** length_penalty. A
    picture is done when no running beam, scored at its current length (with early_stopping "never": at the length that
    gives the best score), can beat the worst of its num_beams ended captions; with early_stopping True, as soon as it
    has num_beams ended captions.
    """
    pictures, num_beams, first = len(hidden), search.num_beams, len(start)
    cache = decoder.new_cache(hidden, pictures * num_beams, first + max_length)
    beams = Beams(decoder.config.end_token_id, pictures, search, start, max_length)
    tokens = beams.running[:, :, :first].flatten(0, 1)
    for length in range(1, max_length + 1):  # length of a caption that ends in this step
        log_probs = decoder.next_logits(tokens, cache).log_softmax(-1)
        log_probs = choose_from(log_probs, beams.running[:, :, : first + length - 1].flatten(0, 1))
        total = (log_probs.view(pictures, num_beams, -1) + beams.running_scores.unsqueeze(-1)).flatten(1)
        if search.do_sample:
            best = draw(total.softmax(-1), 2 * num_beams, generator)
            scores, order = total.gather(1, best).sort(descending=True)  # as in transformers since 5.24
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
    """The beams of N pictures: the running ones, and the best ended ones."""

    def __init__(self, end: int, pictures: int, search: Search, start: Tensor, max_length: int) -> None:
        device, number = start.device, search.num_beams
        self.end, self.search, self.first, self.max_length = end, search, len(start), max_length
        self.running = torch.full((pictures, number, self.first + max_length), end, device=device)
        self.running[:, :, : self.first] = start
        self.running_scores = torch.zeros(pictures, number, device=device)
        self.running_scores[:, 1:] = NEVER  # all beams are the same at first: only one may branch
        self.ended, self.ended_scores = self.running.clone(), torch.full_like(self.running_scores, NEVER)
        self.has_ended = torch.zeros(pictures, number, dtype=torch.bool, device=device)
        self.improvable = torch.ones(pictures, 1, dtype=torch.bool, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)
        """Whether all pictures are done: later tokens are ignored."""
        self.pictures = torch.arange(pictures, device=device).unsqueeze(-1)
        self.ranks = torch.arange(2 * number, device=device)

    def choose(self, x: Tensor, beams: Tensor) -> Tensor:
        """Select beams (N, n) of x (N, any, ...) -> (N, n, ...)."""
        return x[self.pictures, beams]

    def step(self, length: int, scores: Tensor, beams: Tensor, tokens: Tensor) -> Tensor | None:
        """Add the 2 * num_beams best continuations: their scores, the beams they continue and their tokens, each
        (N, 2 * num_beams). Returns the cache rows that continue, (N * num_beams,), or None if all pictures are done."""
        number, early, penalty = self.search.num_beams, self.search.early_stopping, self.search.length_penalty
        candidates = self.choose(self.running, beams)
        candidates[:, :, self.first + length - 1] = tokens
        ends = (tokens == self.end) | (length == self.max_length)

        self.running_scores, chosen = (scores + ends * NEVER).topk(number)
        self.running = self.choose(candidates, chosen)

        new = ends & (self.ranks < number)  # the worse half is only there to be continued
        closed = self.done | ~self.improvable | (self.has_ended.all(-1, keepdim=True) & (early is True))
        new_scores = scores / length**penalty + closed * NEVER + ~new * NEVER
        self.ended_scores, best = torch.cat([self.ended_scores, new_scores], 1).topk(number)
        self.ended = self.choose(torch.cat([self.ended, candidates], 1), best)
        self.has_ended = self.choose(torch.cat([self.has_ended, new], 1), best)

        worst_ended = self.ended_scores.min(1, keepdim=True).values.where(self.has_ended, NEVER)
        final_length = self.max_length if early == "never" and penalty > 0 else length
        reachable = self.running_scores[:, :1] / final_length**penalty
        self.improvable = self.improvable & (reachable > worst_ended).any(-1, True)
        self.done = self.done | ~self.improvable.any() | ends.all() | ((early is True) & self.has_ended.all())
        if is_checked(length - 1, scores.device) and self.done:
            return None
        return (self.pictures * number + self.choose(beams, chosen)).flatten()

    def best(self, captions: int) -> Generated:
        """The best `captions` captions per picture, best first."""
        sequences = self.ended[:, :captions].flatten(0, 1)
        longest = longest_of(sequences[:, self.first :], self.end)
        return Generated(sequences[:, 1 : self.first + longest], self.ended_scores[:, :captions].flatten())


# Scores and attention of finished captions


def read_again(decoder: Decoder, hidden: Tensor, found: Generated, prefix: int, search: Search) -> None:
    """Run the decoder on the finished captions, all tokens at once, to fill in token_log_probs and attention."""
    sequences, end = found.sequences, decoder.config.end_token_id
    start = sequences.new_full((len(sequences), 1), decoder.config.start_token_id)
    read = torch.cat([start, sequences[:, :-1]], 1)
    cross = decoder.look(hidden)
    weights: list[Tensor] = []

    def watch(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        weights.append(layer.weights(inputs[0], inputs[1]).mean(2))  # (R, L, S)

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
        is_end = sequences.eq(end).long()
        unscored = is_end.cumsum(1) > is_end  # after the first end token
        unscored[:, :prefix] = True
        found.token_log_probs, found.lengths = each.masked_fill(unscored, 0.0), (~unscored).sum(1)
    if search.return_attention:
        found.attention = torch.stack(weights).mean(0)[:, :, -decoder.config.num_patches :].float()
