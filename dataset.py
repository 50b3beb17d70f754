"""From a table of pictures and captions to batches: pictures decoded, captions tokenized, samples drawn and collated.

Imports config, model (for GPT-2's tokenizer) and sources. What a batch holds is a pure function of (seed, epoch, step): every sample draws from a
generator of its own, so any number of workers, and a run that is killed and resumed, see the same batches. Pixels for
training and for captioning come through one function, `load_picture`.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from config import UserError, ViTGPT2Config
from model import gpt2_tokenizer
from sources import CaptionTable, download_coco_dataset, load_table

__all__ = [
    "CaptionDataset",
    "download_coco_dataset",
    "load_picture",
    "load_table",
    "make_dataloader",
    "prepare_picture",
]

END_OF_TEXT = "<|endoftext|>"
IGNORE = -100
POSITIONS_MULTIPLE = 64  # M is rounded up to this, so that compiled code sees few shapes
CACHE_SHARE_OF_MEMORY = 0.4
MAX_PIXELS = 80_000_000  # Pillow warns a little above, and gives up at twice that


# Pictures


def load_picture(source: str | os.PathLike[str] | bytes | Image.Image, size: int) -> Tensor:
    """A picture as uint8 (3, size, size), squashed to a square as ViT's own preprocessing does.

    Takes a path, a file's bytes or a Pillow image. Turned upright by its EXIF; transparency is laid on white; 16-bit
    pictures are scaled to 8. Raises UserError, naming the file, for what cannot be decoded.
    """
    name = "picture" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        image = source
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        if image.width * image.height > MAX_PIXELS:  # known before anything is decoded: a small file can be a bomb
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image = to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files, SyntaxError among them
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{name}: not a picture that can be read ({reason})") from error
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return transforms.resize(pixels, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: 16-bit scaled instead of clipped, transparency on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def prepare_picture(source: str | os.PathLike[str] | bytes | Image.Image, config: ViTGPT2Config) -> Tensor:
    """What the model sees of a picture outside training: resized, its middle cut out, uint8 (3, S, S)."""
    assert config.resize_size is not None
    margin = (config.resize_size - config.image_size) // 2
    return crop(load_picture(source, config.resize_size), margin, margin, config.image_size)


def crop(pixels: Tensor, top: int, left: int, size: int) -> Tensor:
    """(3, R, R) -> (3, size, size)."""
    return pixels[:, top : top + size, left : left + size]


# Tokenizers


def load_tokenizer(name: str, captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """GPT-2's byte-level BPE: trained on these captions for the name "train", else a local folder or a Hub name."""
    return train_tokenizer(captions, vocab_size) if name == "train" else gpt2_tokenizer(name)


def train_tokenizer(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most vocab_size entries (at least 257: the bytes and the end token, which is the last).

    Unlike GPT-2's it puts a space before the first word, so that a word is one token wherever it stands.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small to train a tokenizer: it needs at least 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def decode(tokenizer: PreTrainedTokenizerFast, sequences: Tensor) -> list[str]:
    """Token ids (N, L) -> N captions, without special tokens and outer spaces."""
    return [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]


# Samples and batches


@dataclass
class Sample:
    """One picture, uint8 (3, S, S), K token lists (without start and end), its row in the table, all its captions."""

    pixels: Tensor
    tokens: list[np.ndarray]
    row: int
    captions: list[str]


class CaptionDataset(Dataset[Sample]):
    """Rows of a table as samples. Keys are (epoch, row) or (epoch, row, caption)."""

    def __init__(
        self,
        table: CaptionTable,
        tokenizer: PreTrainedTokenizerFast,
        config: ViTGPT2Config,
        *,
        captions_per_image: int = 5,
        seed: int = 0,
        augment: bool = False,
        random_flip: bool = False,
        cache: bool = True,
        progress: bool = True,
    ) -> None:
        """With `augment`, pictures are cropped at random (where resize_size leaves room) and, with random_flip, mirrored.

        `cache` keeps all decoded pictures in memory when they fit into 40 % of it.
        """
        self.table, self.config, self.captions_per_image, self.seed = table, config, captions_per_image, seed
        self.augment, self.random_flip = augment, random_flip
        texts = [text for captions in table.captions for text in captions]
        limit = config.max_length - 1  # room for the start token, or seen from the labels, for the end token
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        # One flat array instead of a list of lists: workers share it without copying.
        lengths = np.array([min(len(e.ids), limit) for e in encoded], dtype=np.int64)
        self.offsets = np.concatenate([[0], lengths.cumsum()])
        self.tokens = np.concatenate(
            [np.array(e.ids[:limit], dtype=np.int32) for e in encoded] or [np.empty(0, np.int32)]
        )
        self.first_caption = np.concatenate([[0], np.cumsum([len(c) for c in table.captions], dtype=np.int64)])
        self.cache = self._fill_cache(progress) if cache and self._cache_fits() else None

    def __len__(self) -> int:
        return len(self.table)

    def _cache_fits(self) -> bool:
        assert self.config.resize_size is not None
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
        return len(self.table) * 3 * self.config.resize_size**2 < CACHE_SHARE_OF_MEMORY * memory

    def _fill_cache(self, progress: bool) -> Tensor:
        size = self.config.resize_size
        assert size is not None
        cache = torch.empty(len(self.table), 3, size, size, dtype=torch.uint8)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            loaded = pool.map(lambda path: load_picture(path, size), self.table.paths)
            label = f"reading {self.table.split} pictures"
            for row, pixels in enumerate(tqdm(loaded, label, len(self.table), unit="picture", disable=not progress)):
                cache[row] = pixels
        return cache

    def caption_tokens(self, caption: int) -> np.ndarray:
        """Token ids of caption number `caption` of the whole table, int32."""
        return self.tokens[self.offsets[caption] : self.offsets[caption + 1]]

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        epoch, row = key[:2]
        rng = np.random.default_rng((self.seed, epoch, row))
        size = self.config.image_size
        assert self.config.resize_size is not None
        pixels = load_picture(self.table.paths[row], self.config.resize_size) if self.cache is None else self.cache[row]
        room = self.config.resize_size - size
        top, left = rng.integers(0, room + 1, 2) if self.augment else (room // 2, room // 2)
        pixels = crop(pixels, int(top), int(left), size)
        if self.augment and self.random_flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        first, last = self.first_caption[row : row + 2]
        chosen = np.arange(first, last) if len(key) == 2 else np.array([first + key[2]])
        if len(chosen) > self.captions_per_image:
            chosen = np.sort(rng.choice(chosen, self.captions_per_image, replace=False))
        return Sample(pixels, [self.caption_tokens(c) for c in chosen], row, self.table.captions[row])

    def epoch_keys(self, epoch: int, shuffle: bool = True) -> list[tuple[int, ...]]:
        """Every picture once; with captions_per_image = 1, once for each of its captions."""
        if self.captions_per_image == 1:
            keys: list[tuple[int, ...]] = [
                (epoch, row, c) for row, captions in enumerate(self.table.captions) for c in range(len(captions))
            ]
        else:
            keys = [(epoch, row) for row in range(len(self.table))]
        if not shuffle:
            return keys
        order = np.random.default_rng((self.seed, epoch)).permutation(len(keys))
        return [keys[index] for index in order]


class Batches:
    """The lists of keys of consecutive batches from a given step on, for a DataLoader's batch_sampler."""

    def __init__(
        self, dataset: CaptionDataset, batch_size: int, first_step: int, last_step: int, shuffle: bool
    ) -> None:
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.first_step, self.last_step = first_step, last_step
        self.steps_per_epoch = -(-len(dataset.epoch_keys(0, shuffle=False)) // batch_size)

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        epoch, keys = -1, []
        for step in range(self.first_step, self.last_step):
            wanted, place = divmod(step, self.steps_per_epoch)
            if wanted != epoch:
                epoch, keys = wanted, self.dataset.epoch_keys(wanted, self.shuffle)
            yield keys[place * self.batch_size : (place + 1) * self.batch_size]


def collate(samples: Sequence[Sample], config: ViTGPT2Config, captions_per_image: int) -> dict[str, Any]:
    """Samples -> a batch.

    pixel_values uint8 (N, 3, S, S); input_ids and labels int64 (N, K, T), T the longest caption with its start (or
    end) token; lengths int64 (N, K), 0 for an empty place; positions int64 (M,): where labels.flatten() has targets,
    rounded up to a multiple of 64 with N * K * T; rows: the table's row of each picture; captions: all its captions.
    """
    assert config.start_token_id is not None and config.end_token_id is not None and config.pad_token_id is not None
    lengths = np.zeros((len(samples), captions_per_image), dtype=np.int64)
    for n, sample in enumerate(samples):
        lengths[n, : len(sample.tokens)] = [len(tokens) + 1 for tokens in sample.tokens]
    input_ids = np.full((*lengths.shape, max(1, lengths.max())), config.pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE)
    for n, sample in enumerate(samples):
        for k, tokens in enumerate(sample.tokens):
            input_ids[n, k, 0] = config.start_token_id
            input_ids[n, k, 1 : len(tokens) + 1] = labels[n, k, : len(tokens)] = tokens
            labels[n, k, len(tokens)] = config.end_token_id
    positions = (np.arange(input_ids.shape[2]) < lengths[..., None]).reshape(-1).nonzero()[0]
    return {
        "pixel_values": torch.stack([sample.pixels for sample in samples]),
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "lengths": torch.from_numpy(lengths),
        "positions": rounded_up(torch.from_numpy(positions), input_ids.size),
        "rows": [sample.row for sample in samples],
        "captions": [sample.captions for sample in samples],
    }


def rounded_up(positions: Tensor, nothing: int) -> Tensor:
    """positions (M,) filled up with `nothing` to a multiple of POSITIONS_MULTIPLE."""
    return torch.nn.functional.pad(positions, (0, -len(positions) % POSITIONS_MULTIPLE), value=nothing)


@dataclass
class Collate:
    """`collate` with its settings, as an object that worker processes can be sent."""

    config: ViTGPT2Config
    captions_per_image: int

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return collate(samples, self.config, self.captions_per_image)


def make_dataloader(
    dataset: CaptionDataset,
    batch_size: int,
    *,
    first_step: int = 0,
    last_step: int | None = None,
    shuffle: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Batches from step first_step up to last_step (default: the end of the first epoch), epoch after epoch."""
    batches = Batches(dataset, batch_size, first_step, first_step, shuffle)
    batches.last_step = batches.steps_per_epoch if last_step is None else last_step
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # keys are tuples, as __getitem__ takes them
        collate_fn=Collate(dataset.config, dataset.captions_per_image),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupts,
    )


def micro_batches(batch: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """A batch in parts of at most `size` pictures each, for gradients that are added up."""
    pictures, captions, length = batch["input_ids"].shape
    if pictures <= size:
        yield batch
        return
    for start in range(0, pictures, size):
        part = {name: values[start : start + size] for name, values in batch.items() if name != "positions"}
        shifted = batch["positions"] - start * captions * length
        tokens = part["input_ids"].numel()
        part["positions"] = rounded_up(shifted[(shifted >= 0) & (shifted < tokens)], tokens)
        yield part


def ignore_interrupts(worker: int) -> None:
    """Leaves Ctrl-C, which reaches the workers too, to the process that they work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device; what is not a tensor stays."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
