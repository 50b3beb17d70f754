"""Caption pictures by name: threads decode pictures while the model captions earlier ones.

    for result in caption_pictures(model, picture_names(["photos/"])):
        print(result.name, result.captions or result.error)

Used by example_usage.py and app.py. Prints only what other files folders hold, and when memory runs out.
"""

from __future__ import annotations

import codecs
import glob
import itertools
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from captioning.engine import find_engine
from captioning.models import is_url
from config import UserError, ViTGPT2Config
from data.fetch import PrivateAddressError, fetch_picture
from data.kinds import files_below, folders_below, in_words, is_picture, left_out
from data.pictures import PictureSource, prepare_picture
from data.reading import clean
from data.tokenizer import decode
from model import ImageCaptionModel
from utils import autocast, choose_precision, first_line

AT_A_TIME = 8  # pictures whose given captions are looked at together: each token has a number for every word there is
# Default batch sizes, in pictures: large enough for the device's full speed, and halved where memory runs out.
BATCH_SIZES = {"cuda": 256, "mps": 64, "cpu": 32}


@dataclass
class Caption:
    """A caption, with its score and words where they were asked for."""

    text: str
    score: float | None = None
    """The model's confidence: the geometric mean of its tokens' probabilities, 0 to 1, so that captions of different
    lengths compare."""
    words: list[tuple[str, np.ndarray]] = field(default_factory=list)
    """Each word, and its attention to each patch: float (rows, columns), whose sum is below 1."""


@dataclass
class Result:
    """A picture's captions, the best first; or the one-line reason why there is none."""

    name: str
    captions: list[Caption] = field(default_factory=list)
    error: str | None = None


Write = Callable[[Sequence[str], Tensor], list[list[Caption]]]

# Names


def picture_names(inputs: Iterable[str]) -> list[str]:
    """Replace folders by the pictures below them, patterns by their matches, and - by the names on standard input (one
    per line, or as find -print0 writes them), in order. Prints kinds and numbers of other files. Raises UserError for
    a folder or a pattern without a picture."""
    names: list[str] = []
    for name in inputs:
        if name == "-":
            if not (listed := _listed(sys.stdin.buffer.read())):
                raise UserError("-: no names on standard input")
            names += picture_names(line for line in listed if line != "-")
        elif is_url(name):
            names.append(name)
        elif os.path.isdir(name):
            names += _pictures(map(str, files_below(name)), f"{name}: no pictures in this folder")
        elif glob.has_magic(name) and not os.path.lexists(name):
            names += _pictures(_matches(name), f"{name}: no picture matches this pattern")
        else:
            names.append(name)
    return names


def _listed(content: bytes) -> list[str]:
    """Split a list into names. Lists from Windows may have a byte order mark, and quotes that are in no file's name."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\0" if b"\0" in content else b"\n")
    names = [os.fsdecode(line.rstrip(b"\r\n")) for line in lines if line.strip()]
    return [name if os.path.lexists(name) else re.sub(r"^\s*([\"'])(.+)\1\s*$", r"\2", name) for name in names]


def _matches(pattern: str) -> list[str]:
    """The files that a pattern matches, sorted. ** is expanded here, because glob follows circular links."""
    before, deep, after = f"{pattern}{'/*' * pattern.endswith('**')}".partition("**/")
    found = [] if deep else glob.glob(pattern)
    for start in (glob.glob(before) if before else ["."]) if deep else []:
        for folder, _ in folders_below(start):
            files = glob.glob(os.path.join(glob.escape(folder), after), recursive=True)
            found += files if before else map(os.path.normpath, files)
    return sorted(file for file in set(found) if not os.path.isdir(file))


def _pictures(files: Iterable[str], none: str) -> list[str]:
    """The pictures among the files. Prints what the others are; raises UserError, with `none`, if none is a picture."""
    inside = list(filter(is_picture, files := list(files)))
    others = in_words(left_out(files))
    if not inside:
        raise UserError(f"{none} ({others})" if others else none)
    print(others, end="\n" * bool(others), file=sys.stderr)
    return inside


def picture_source(name: str, allow_private: bool = False) -> PictureSource:
    """The content of a URL; a path unchanged. Raises UserError where the URL gives no picture."""
    try:
        return fetch_picture(name, allow_private=allow_private) if is_url(name) else name
    except PrivateAddressError as error:
        raise UserError(f"{error} (--allow-private-urls fetches from those too)") from None


# Captions


def caption_batch(
    model: ImageCaptionModel,
    pixels: Tensor,
    precision: str = "auto",
    *,
    scores: bool = False,
    attention: bool = False,
    keep: int | None = None,
    longest_first: bool = False,
    **decoding: Any,
) -> list[list[Caption]]:
    """Caption pixels (N, 3, S, S) from prepare_picture -> N lists of num_return_sequences captions, with scores and the
    words' attention if asked for. With keep, only as many of the longest or shortest ones. `decoding` is passed to
    model.generate."""
    dtype, _ = choose_precision(precision, model.device)
    kind = "int8" if precision == "int8" else "fp32" if dtype == torch.float32 else "half"
    engine = find_engine(kind) if model.device.type == "cpu" else None
    decoding = {"int8": precision == "int8", "engine": engine} | decoding
    with autocast(model.device, dtype):
        found = model.generate(pixels.to(model.device), return_scores=scores, return_attention=attention, **decoding)
    captions = [Caption(clean(text, "caption")) for text in decode(model.tokenizer, found.sequences)]
    if scores:
        for caption, score in zip(captions, found.mean_log_probs.exp().tolist(), strict=True):
            caption.score = score
    if found.attention is not None:
        for caption, tokens, weights in zip(captions, found.sequences.cpu(), found.attention.cpu(), strict=True):
            caption.words = words_seen(model.tokenizer, tokens.tolist(), weights)
    number = len(captions) // len(pixels)
    answers = [captions[start : start + number] for start in range(0, len(captions), number)]
    if keep:
        answers = [sorted(own, key=lambda caption: len(caption.text), reverse=longest_first)[:keep] for own in answers]
    return answers


@torch.no_grad()
def confidences(
    model: ImageCaptionModel, pixels: Tensor, texts: Sequence[Sequence[str]], precision: str = "auto"
) -> list[list[float]]:
    """The model's confidence in captions that are given: pixels (N, 3, S, S) and N lists of captions -> N lists of numbers.
    It is what caption_batch would give a caption that it wrote itself: the geometric mean of the tokens' probabilities,
    the end's among them. A caption longer than the model's text is cut."""
    from dataset import IGNORE, Tokens  # late: it imports the readers of data sets, which captions do not need

    config, number = model.config, max([len(captions) for captions in texts], default=0)
    tokens = Tokens(itertools.chain.from_iterable(texts), model.tokenizer, config.text_positions - 1)
    longest = int(tokens.lengths.max(initial=0)) + 1
    labels = torch.full((len(texts), number, longest), IGNORE)
    rows = ((i, k) for i, captions in enumerate(texts) for k in range(len(captions)))
    for index, (i, k) in enumerate(rows):
        ids = [*tokens[index].tolist(), config.end_token_id]
        labels[i, k, : len(ids)] = torch.tensor(ids)
    start = torch.full_like(labels[..., :1], config.start_token_id)
    inputs = torch.cat([start, labels.masked_fill(labels == IGNORE, config.end_token_id)[..., :-1]], -1)
    found: list[list[float]] = []
    with autocast(model.device, choose_precision(precision, model.device)[0]):
        for some in torch.arange(len(texts)).split(AT_A_TIME) if number else ():
            logits = model(pixels[some].to(model.device), inputs[some].to(model.device)).logits
            targets = labels[some].to(model.device)
            losses = cross_entropy(logits.float().flatten(0, 2), targets.flatten(), reduction="none").view(
                targets.shape
            )
            means = losses.sum(-1) / (targets != IGNORE).sum(-1).clamp(min=1)
            found += means.neg().exp().tolist()
    found = found or [[] for _ in texts]
    return [values[: len(captions)] for values, captions in zip(found, texts, strict=True)]


def words_seen(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], attention: Tensor
) -> list[tuple[str, np.ndarray]]:
    """Tokens (L), their attention (L, P) -> words, each with the mean over its tokens as a square (rows, columns)."""
    special = set(tokenizer.all_special_ids)
    words: list[list[int]] = []
    for index, token in enumerate(tokens):
        if token in special:
            break
        starts = str(tokenizer.convert_ids_to_tokens(token)).startswith("Ġ")  # a space, in byte-level BPE
        if starts or not words:
            words.append([])
        words[-1].append(index)
    side = round(attention.shape[-1] ** 0.5)
    texts = [str(tokenizer.decode([tokens[index] for index in word])).strip() for word in words]
    means = [attention[word].mean(0).reshape(side, side).numpy() for word in words]
    return [(text, mean) for text, mean in zip(texts, means, strict=True) if text]


def caption_pictures(
    model: ImageCaptionModel,
    names: Iterable[str],
    *,
    batch_size: int | None = None,
    source: Callable[[str], PictureSource] = picture_source,
    workers: int | None = None,
    write: Write | None = None,
    **options: Any,
) -> Iterator[Result]:
    """Yield the captions of pictures, in order; errors of pictures that cannot be read come as soon as they are known.

    `source` turns a name into an input of prepare_picture, in a thread. batch_size None is the device's default; where
    memory runs out, this batch and all later ones are halved. `write` turns a batch of names and pixels into captions;
    by default it is caption_batch, with `options`. Raises UserError where not even one picture fits into memory.
    """
    write = write or (lambda names, pixels: caption_batch(model, pixels, **options))
    size = batch_size or BATCH_SIZES[model.device.type]
    ready: list[tuple[str, Tensor]] = []
    for name, picture in prepared(names, model.config, source, 2 * size, workers):
        if isinstance(picture, str):
            yield Result(name, error=picture)
            continue
        ready.append((name, picture))
        if len(ready) >= size:
            size = yield from _captioned(write, ready, size)
            ready = []
    yield from _captioned(write, ready, size)


def prepared(
    names: Iterable[str],
    config: ViTGPT2Config,
    source: Callable[[str], PictureSource] = picture_source,
    ahead: int = 64,
    workers: int | None = None,
) -> Iterator[tuple[str, Tensor | str]]:
    """Yield each picture's pixels, in order, or why it cannot be read. Up to `ahead` are prepared in advance, in
    threads (by default one per core, 16 at most)."""

    def prepare(name: str) -> tuple[str, Tensor | str]:
        try:
            return name, prepare_picture(source(name), config, name)
        except UserError as error:
            return name, str(error)

    pool = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1))  # decoders release Python's global lock
    waiting: deque[Any] = deque()
    try:
        for name in names:
            waiting.append(pool.submit(prepare, name))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _captioned(write: Write, ready: list[tuple[str, Tensor]], size: int) -> Generator[Result, None, int]:
    """Caption all ready pictures, `size` at a time; return the size that fits into memory."""
    while ready:
        names, pixels = zip(*ready[:size], strict=True)
        captions: list[list[Caption]] = []
        try:
            captions = write(names, torch.stack(pixels))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(names) == 1:
                message = f"not enough memory for a single picture ({first_line(error)}): use fewer --num-beams"
                raise UserError(message) from error
        if not captions:  # outside of except, where the error no longer holds memory
            size = len(names) // 2
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            tqdm.write(f"out of memory: continuing with {size} pictures at a time", file=sys.stderr)
            continue
        yield from map(Result, names, captions)
        ready = ready[len(names) :]
    return size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the machine is out of memory. On a CPU only its text says so; the last
    of these texts is oneDNN's."""
    words = ("out of memory", "DefaultCPUAllocator", "could not create a primitive")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
