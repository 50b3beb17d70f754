"""Turn a table of pictures and captions into batches: tokenize captions, draw samples, group by length, collate.

    python dataset.py check DIR          check whether the data is fit to train on (data/check.py)

A batch is a pure function of (seed, epoch, step): each sample has its own random generator, so the batches are the same
with any number of workers, and in a run that is killed and resumed.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from config import Augmentation, UserError, ViTGPT2Config
from data.download import download_coco_dataset
from data.pictures import crop, load_picture, prepare_picture
from data.pixels import Augmenter, Pixels, cut_out
from data.sources import load_table, load_tables
from data.table import CaptionTable
from data.tokenizer import decode, train_tokenizer
from utils import STOP_SIGNALS, forks
from weights.file import gpt2_tokenizer

__all__ = [
    "Batch",
    "CaptionDataset",
    "decode",
    "download_coco_dataset",
    "load_picture",
    "load_table",
    "load_tables",
    "load_tokenizer",
    "make_dataloader",
    "prepare_picture",
    "train_tokenizer",
]

IGNORE = -100
POSITIONS_MULTIPLE = 64  # M is rounded up to this, so that compiled code sees few shapes
POOL = 50  # batches that are sorted by length together
TEXTS_AT_A_TIME = 10_000  # captions tokenized per call: the tokenizer's objects are large
UNUSED = np.random.default_rng(0)
NOTHING = torch.empty(0, dtype=torch.int64)  # default of the fields that a user's batch may lack
SIDES = re.compile(r"\b(left|right)(?=\b|most\b|hand|side|ward)", re.IGNORECASE)


def load_tokenizer(name: str, captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Load GPT-2's byte-level BPE from a local folder or the Hub; for the name "train", train one on the captions."""
    return train_tokenizer(captions, vocab_size) if name == "train" else gpt2_tokenizer(name)


# Samples


@dataclass
class Sample:
    """One picture and K token lists (without start and end), its row in the table, all its captions.

    pixels: uint8 (3, S, S); or None if the pictures are cached on the GPU: `place` (top, left, mirrored) is then the
    crop to take there. A picture that cannot be decoded is black, without captions to learn, and `bad` says why.
    """

    pixels: Tensor | None
    place: tuple[int, int, bool]
    tokens: list[np.ndarray]
    row: int
    captions: list[str]
    bad: str | None = None


class Tokens:
    """Token ids of many texts, each at most `limit` long, as one flat array that worker processes share."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
        ids: list[np.ndarray] = []
        lengths: list[int] = []
        self.cut = 0
        """Number of texts that were longer."""
        remaining, backend = iter(texts), tokenizer.backend_tokenizer
        as_text, backend.encode_special_tokens = backend.encode_special_tokens, True  # "<|endoftext|>" in a caption too
        while some := list(itertools.islice(remaining, TEXTS_AT_A_TIME)):
            encoded = [e.ids for e in backend.encode_batch_fast(some, add_special_tokens=False)]
            self.cut += sum(len(e) > limit for e in encoded)
            ids += [np.fromiter((i for e in encoded for i in e[:limit]), dtype=np.int32)]
            lengths += [min(len(e), limit) for e in encoded]
        backend.encode_special_tokens = as_text
        self.ids = np.concatenate([np.empty(0, np.int32), *ids])
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __getitem__(self, text: int) -> np.ndarray:
        return self.ids[self.offsets[text] : self.offsets[text + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 (texts,)."""
        return np.diff(self.offsets)


def mirrored(caption: str) -> str:
    """The caption of the mirrored picture: left and right (rightmost, left-hand, ...) are swapped."""

    def swap(match: re.Match[str]) -> str:
        word = match[1]
        other = "right" if word.lower() == "left" else "left"
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return SIDES.sub(swap, caption)


class CaptionDataset(Dataset[Sample]):
    """Samples from a table's rows. Keys are (epoch, row) or (epoch, row, caption)."""

    def __init__(
        self,
        table: CaptionTable,
        tokenizer: PreTrainedTokenizerFast,
        config: ViTGPT2Config,
        *,
        captions_per_image: int = 5,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        keep: Literal["no", "memory", "disk"] = "no",
        progress: bool = True,
    ) -> None:
        """With an augmentation, pictures are cropped at random (if resize_size leaves room) and augmented.

        `keep` says where the decoded pictures are cached: see pixels.Pixels.
        """
        self.table, self.config, self.captions_per_image, self.seed = table, config, captions_per_image, seed
        limit = config.text_positions - 1  # room for the start token of input_ids, or the end token of labels
        texts = table.captions()
        self.tokens = Tokens((text.as_py() for text in texts), tokenizer, limit)
        self.first_caption = np.concatenate([[0], np.cumsum(table.rows["captions"].combine_chunks().value_lengths())])
        self.augmenter = augmentation and Augmenter(config.resize_size, config.image_size, augmentation)
        self.sides: dict[int, int] = {}
        """Number of a caption -> index in mirror_tokens, for those that mirroring changes."""
        if augmentation and augmentation.flip:
            changed = [(n, new) for n, text in enumerate(texts) if (new := mirrored(old := text.as_py())) != old]
            self.sides = {n: index for index, (n, _) in enumerate(changed)}
            self.mirror_tokens = Tokens((text for _, text in changed), tokenizer, limit)
        self.pixels = Pixels(table, config.resize_size, keep, progress, config.resample)
        self.on_gpu: Tensor | None = None
        self.length_multiple = 1
        """T is rounded up to a multiple of this. A GPU takes 0.4 s to plan attention for each new length."""

    def __len__(self) -> int:
        return len(self.table)

    def keep_on(self, device: torch.device) -> None:
        """Move the cached pictures to the device; batches then hold crop positions, and Batch.to crops there. Raises
        UserError if a GPU has no room for them."""
        cached = self.pixels.cached
        assert cached is not None
        if device.type == "cuda" and cached.numel() > (free := torch.cuda.mem_get_info(device)[0]):
            raise UserError(
                f"{cached.numel() / 2**30:.1f} GiB of pictures do not fit into the GPU's {free / 2**30:.1f} GiB: use "
                "--cache instead of --cache-on-gpu"
            )
        self.pixels.check_all()
        self.on_gpu = cached.to(device)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        row = key[1]
        first, last = self.first_caption[row : row + 2].tolist()
        chosen = list(range(first, last)) if len(key) == 2 else [first + key[2]]
        drawn = self.augmenter is not None or len(chosen) > self.captions_per_image
        rng = np.random.default_rng((self.seed, *key)) if drawn else UNUSED  # making one is slow
        margin = (self.pixels.size - self.config.image_size) // 2
        place = self.augmenter.draw(rng) if self.augmenter else (margin, margin, False)
        if len(chosen) > self.captions_per_image:
            chosen = sorted(rng.choice(chosen, self.captions_per_image, replace=False).tolist())
        captions = self.table.captions_of(row)
        size = self.config.image_size
        try:
            if self.on_gpu is not None:
                pixels = None
                if row in self.pixels.bad:
                    raise UserError(self.pixels.bad[row])
            elif self.augmenter:
                pixels = self.augmenter.apply(self.pixels[row], *place, rng)
            else:
                pixels = crop(self.pixels[row], margin, margin, size)
        except UserError as error:
            black = None if self.on_gpu is not None else torch.zeros(3, size, size, dtype=torch.uint8)
            return Sample(black, place, [], row, captions, str(error))
        sides = self.sides if place[2] else {}
        tokens = [self.mirror_tokens[sides[c]] if c in sides else self.tokens[c] for c in chosen]
        return Sample(pixels, place, tokens, row, captions)


# Batches


class Batches:
    """Lists of keys for consecutive batches from a given step on, for a DataLoader's batch_sampler.

    An epoch visits every picture once; with captions_per_image = 1, once for each of its captions. With shuffle, each
    epoch draws a new order, pools of POOL batches are sorted by their longest caption to reduce padding, and then the
    batches are shuffled. Of every batch, process `rank` of `world_size` gets its share.
    """

    def __init__(
        self,
        dataset: CaptionDataset,
        batch_size: int,
        first_step: int,
        last_step: int | None,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """last_step None: the end of the first epoch."""
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.first_step, self.rank, self.world_size = first_step, rank, world_size
        lengths = dataset.tokens.lengths
        if dataset.captions_per_image > 1 and len(lengths):
            lengths = np.maximum.reduceat(lengths, dataset.first_caption[:-1])
        self.lengths = lengths
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self.last_step = self.steps_per_epoch if last_step is None else last_step

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order, int64: indices of pictures, or of captions if captions_per_image is 1."""
        number, size = len(self.lengths), self.batch_size
        if not self.shuffle:
            return np.arange(number)
        rng = np.random.default_rng((self.dataset.seed, epoch))
        order = rng.permutation(number)
        full = order[: number - number % size]
        pools = [full[start : start + POOL * size] for start in range(0, len(full), POOL * size)]
        grouped = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate([full[:0], *grouped]).reshape(-1, size)
        return np.concatenate([rng.permutation(batches).reshape(-1), order[len(full) :]])

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.first_step, self.last_step):
            wanted, index = divmod(step, self.steps_per_epoch)
            if wanted != epoch:
                epoch, order = wanted, self.order(wanted)
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size][self.rank :: self.world_size]
            if self.dataset.captions_per_image > 1:
                yield [(epoch, row) for row in chosen.tolist()]
                continue
            rows = np.searchsorted(self.dataset.first_caption, chosen, side="right") - 1
            within = chosen - self.dataset.first_caption[rows]
            yield [(epoch, *key) for key in zip(rows.tolist(), within.tolist(), strict=True)]


@dataclass(kw_only=True)
class Batch:
    """N pictures with K captions each of at most T tokens."""

    pixel_values: Tensor
    """uint8 (N, 3, S, S); empty if the pictures are cached on the GPU, until `to` crops them by rows and places."""
    places: Tensor = NOTHING
    """int64 (N, 3): the crop to take there: top, left, and whether it is mirrored."""
    input_ids: Tensor = NOTHING
    """int64 (N, K, T), T the longest caption with its start token."""
    labels: Tensor = NOTHING
    """int64 (N, K, T), the same with its end token; IGNORE where there is no target."""
    lengths: Tensor = NOTHING
    """int64 (N, K), 0 where a picture has fewer captions."""
    positions: Tensor = NOTHING
    """int64 (M,): where labels.flatten() has targets, rounded up to a multiple of 64 with N * K * T."""
    rows: list[int]
    """The table's row of each picture."""
    captions: list[list[str]] = field(default_factory=list)
    """All captions of each picture."""
    bad: list[tuple[int, str]] = field(default_factory=list)
    """(row, what is wrong) of pictures that cannot be decoded; they have no captions to learn."""
    weights: Tensor | None = None
    """float (N, K), of sampled captions: the score of each minus its baseline. With references beside the samples all
    captions' tensors are (N, 2 * K, ...), and the references' weights are TrainConfig.reference_weight."""
    rewards: Tensor | None = None
    """float (N, K), of sampled captions: the scores themselves."""

    @classmethod
    def of(cls, batch: Batch | Mapping[str, Any]) -> Batch:
        """Return our loaders' batch unchanged; make one from a user's dictionary with some of the fields."""
        if isinstance(batch, Batch):
            return batch
        return cls(**{each.name: batch[each.name] for each in dataclasses.fields(cls) if each.name in batch})

    def __getitem__(self, name: str) -> Any:
        """The field of this name, for scripts that read a batch as a dictionary."""
        return getattr(self, name)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The model's arguments for a loss, in its order."""
        return self.pixel_values, self.input_ids, self.lengths, self.labels, self.positions

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {n: change(each) for n, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **changed)

    def pin_memory(self) -> Batch:
        """Move the tensors to pinned memory, which a GPU copies from asynchronously; a DataLoader calls this."""
        return self._with_tensors(Tensor.pin_memory)

    def to(self, device: torch.device, dataset: CaptionDataset | None = None) -> Batch:
        """Move the tensors to the device. Pictures that the dataset caches there are cropped there."""
        moved = self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        if not len(self.pixel_values):
            assert dataset is not None and dataset.on_gpu is not None
            rows = torch.tensor(self.rows).to(device, non_blocking=True)
            top, left, flip = moved.places.unbind(1)
            moved.pixel_values = cut_out(dataset.on_gpu, rows, top, left, flip.bool(), dataset.config.image_size)
        return moved

    def micro(self, size: int) -> Iterator[Batch]:
        """Yield pieces of at most `size` pictures each, for gradient accumulation."""
        pictures, captions, length = self.input_ids.shape
        if pictures <= size:
            yield self
            return
        shared = ("positions", "bad")
        by_picture = {name: values for name, values in vars(self).items() if name not in shared and values is not None}
        for start in range(0, pictures, size):
            piece = replace(self, **{name: values[start : start + size] for name, values in by_picture.items()})
            shifted, tokens = self.positions - start * captions * length, piece.input_ids.numel()
            piece.positions = rounded_up(shifted[(shifted >= 0) & (shifted < tokens)], tokens)
            yield piece


def collate(
    samples: Sequence[Sample], config: ViTGPT2Config, captions_per_image: int, length_multiple: int = 1
) -> Batch:
    """Collate samples into a batch. A process's share of the last batch may be empty: no samples give one black picture
    without captions, and no rows."""
    lengths = np.zeros((max(1, len(samples)), captions_per_image), dtype=np.int64)
    for n, sample in enumerate(samples):
        lengths[n, : len(sample.tokens)] = [len(tokens) + 1 for tokens in sample.tokens]
    longest = max(1, lengths.max(initial=0))
    longest = min(longest + -longest % length_multiple, config.text_positions)
    input_ids = np.full((*lengths.shape, longest), config.pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE)
    for n, sample in enumerate(samples):
        for k, tokens in enumerate(sample.tokens):
            input_ids[n, k, 0] = config.start_token_id
            input_ids[n, k, 1 : len(tokens) + 1] = labels[n, k, : len(tokens)] = tokens
            labels[n, k, len(tokens)] = config.end_token_id
    positions = (np.arange(input_ids.shape[2]) < lengths[..., None]).reshape(-1).nonzero()[0]
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    none = torch.zeros(0 if samples else 1, 3, config.image_size, config.image_size, dtype=torch.uint8)
    return Batch(
        pixel_values=torch.stack(pixels) if pixels else none,
        places=torch.tensor([sample.place for sample in samples], dtype=torch.int64).view(-1, 3),
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        lengths=torch.from_numpy(lengths),
        positions=rounded_up(torch.from_numpy(positions), input_ids.size),
        rows=[sample.row for sample in samples],
        captions=[sample.captions for sample in samples],
        bad=[(sample.row, sample.bad) for sample in samples if sample.bad],
    )


def rounded_up(positions: Tensor, nothing: int) -> Tensor:
    """Pad positions (M,) with `nothing` to a multiple of POSITIONS_MULTIPLE."""
    return torch.nn.functional.pad(positions, (0, -len(positions) % POSITIONS_MULTIPLE), value=nothing)


def make_dataloader(
    dataset: CaptionDataset,
    batch_size: int,
    *,
    first_step: int = 0,
    last_step: int | None = None,
    shuffle: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Any]:
    """Load batches from step first_step up to last_step (default: the end of the first epoch), epoch after epoch.

    batch_size counts the pictures of all world_size processes; process `rank` gets its share of each batch.
    """
    batches = Batches(dataset, batch_size, first_step, last_step, shuffle, rank, world_size)
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # keys are tuples, as __getitem__ takes them
        collate_fn=partial(
            collate,
            config=dataset.config,
            captions_per_image=dataset.captions_per_image,
            length_multiple=dataset.length_multiple,
        ),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupts,
        # Forked workers share the table, the tokens and the cached pictures; otherwise each would get a copy.
        multiprocessing_context="fork" if num_workers and forks() else None,
    )


def ignore_interrupts(worker: int) -> None:
    """Ignore stop signals in a worker, which may receive them too: its parent process handles them."""
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def main() -> int:
    """Run the command line."""
    if sys.argv[1:2] != ["check"]:
        raise UserError("usage: python dataset.py check DIR (see python dataset.py check --help)")
    from data.check import main as check

    return check(sys.argv[2:])


if __name__ == "__main__":
    from utils import run_script

    run_script(main)
