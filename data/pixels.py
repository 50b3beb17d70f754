"""Pixels for batches: pictures resized, cached in memory, in a mapped file or on the GPU, then cropped and augmented.

Wherever they are cached, the pixels are those of load_picture. All randomness of a sample comes from the generator it
is given.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from config import Augmentation, UserError
from data.pictures import crop, load_picture
from data.table import CaptionTable
from utils import atomic, cache_file, delete_older, key_of, locked, stamps, unfinished_of

Keep = Literal["no", "memory", "disk"]
VERSION = 2  # of the pictures cached on disk: increase it when load_picture gives other pixels
BAD = 0  # checksum of a row that is not a picture; a picture that has it (1 in 2 ** 32) is decoded every time
ZEROS = bytes(1 << 20)


def in_threads(work: Callable[[int], object], rows: Sequence[int], bar: tqdm[Any], number: int | None = None) -> None:
    """Do the work for every row and move the bar; in threads, since decoding and hashing release the GIL."""
    pool = ThreadPoolExecutor(number or min(16, os.cpu_count() or 1))
    try:
        for _ in pool.map(work, rows):
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, skip the rows that have not started


class Pixels:
    """The pictures of a table as uint8 (3, size, size), by row."""

    def __init__(
        self, table: CaptionTable, size: int, keep: Keep = "no", progress: bool = True, resample: str = "bicubic"
    ) -> None:
        """keep="no": decode each picture on request. keep="memory" or "disk": decode all pictures now, in threads, and
        cache them in memory, or in a file shared with other processes and later runs. size: side in pixels."""
        self.table, self.size, self.progress, self.resample = table, size, progress, resample
        self.bad: dict[int, str] = {}
        """Row -> what is wrong, for rows that cannot be decoded."""
        self.cached: Tensor | None = None
        """All pictures, uint8 (N, 3, size, size), if they are cached."""
        self.file = Path()
        """The cache file, if they are cached on disk."""
        self.sums: NDArray[np.uint32] | None = None
        """CRC-32 of each picture in the cache file."""
        self.unchecked = np.ones(len(table), bool)
        if keep == "memory":
            self.cached = torch.empty(len(table), 3, size, size, dtype=torch.uint8)
            self._decode_into(self.cached, range(len(table)))
        elif keep == "disk":
            self._map(cache_file("pixels", [str(table.root.absolute()), table.name, table.split, size], self._key()))

    def __getitem__(self, row: int) -> Tensor:
        """One picture. Raises UserError, which names it, if it cannot be decoded."""
        if row in self.bad:
            raise UserError(self.bad[row])
        if self.cached is not None:
            self.check(row)
            return self.cached[row]
        try:
            return self._load(row)
        except UserError as error:
            self.bad[row] = str(error)
            raise

    def check(self, row: int) -> None:
        """Decode a picture again if its cached bytes have changed on disk. Checks each picture once."""
        if self.sums is None or not self.unchecked[row]:
            return
        assert self.cached is not None
        if zlib.crc32(self.cached[row].numpy().data) != self.sums[row]:
            with contextlib.suppress(OSError):  # another process was first, or Windows refuses: it is mapped
                self.file.unlink()
                print(f"cache       {self.file} is damaged and deleted: this run decodes its damaged pictures again")
            self.cached[row] = self._load(row)
        self.unchecked[row] = False

    def check_all(self) -> None:
        """Check every picture."""
        label, off = f"checking {self.table.split} pictures", None if self.progress and self.sums is not None else True
        with tqdm(desc=label, total=len(self.table), unit="picture", disable=off) as bar:
            in_threads(self.check, range(len(self.table)), bar)

    def _load(self, row: int) -> Tensor:
        return load_picture(self.table.picture(row), self.size, self.table.name_of(row), self.resample)

    def _decode_into(self, target: Tensor, rows: Sequence[int]) -> None:
        """Fill in these rows; those that cannot be decoded go into `bad`."""
        if not rows:
            return

        def decode(row: int) -> None:
            try:
                target[row] = self._load(row)
                self.bad.pop(row, None)
                self.unchecked[row] = False
            except UserError as error:
                self.bad[row] = str(error)
                target[row] = 0

        label, off = f"reading {self.table.split} pictures", None if self.progress else True
        with tqdm(desc=label, total=len(rows), unit="picture", disable=off) as bar:
            in_threads(decode, rows, bar)

    def _key(self) -> str:
        """The cache key: changes with the pictures' files, their order and the size."""
        rows = self.table.rows
        if self.table.hub_rows is not None:
            files: Any = {part: data._fingerprint for part, data in self.table.hub_rows.items()}
        else:
            files = stamps([self.table.root / name for name in rows["picture"].unique().to_pylist()])
        return key_of(VERSION, self.size, self.resample, files, rows["picture"].to_pylist(), rows["offset"].to_pylist())

    def _map(self, path: Path) -> None:
        """Map the cache file, and write it first if it is missing; other processes of the run wait for that."""
        number = len(self.table)
        needed = number * (3 * self.size**2 + np.dtype(np.uint32).itemsize)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}.lock")):
                if not path.exists() or path.stat().st_size != needed:
                    # Left by a killed process, or by one of an earlier version.
                    for left in [*unfinished_of(path), *path.parent.glob(f"{path.name}.*.part")]:
                        with contextlib.suppress(OSError):  # on Windows another process may be writing it
                            left.unlink()
                    free = shutil.disk_usage(path.parent).free
                    if needed > free:
                        raise UserError(
                            f"no room to cache {needed / 1e9:.1f} GB of pictures in {path.parent} ({free / 1e9:.1f} GB "
                            "are free): run without --cache, or set VIT_GPT2_CACHE to a folder on another disk"
                        )
                    with atomic(path) as unfinished:
                        self._fill(unfinished, needed)
                    delete_older(path)
                    print(f"cache       {path} ({needed / 1e9:.1f} GB, may be deleted at any time)")
            # Copy on write: pages are shared with every process, and torch is spared a warning about read-only memory.
            pictures, self.sums = self._mapped(path, "c")
        except OSError as error:
            raise UserError(
                f"pictures cannot be cached in {path.parent} ({error.strerror or error}): run without --cache, or set "
                "VIT_GPT2_CACHE to another folder"
            ) from None
        self.file, self.cached = path, torch.from_numpy(pictures)
        self.unchecked[:] = True
        self._decode_into(self.cached, np.flatnonzero(self.sums == BAD).tolist())  # the error may have been temporary

    def _fill(self, path: Path, size: int) -> None:
        """Write the cache file. At the end it is no longer mapped: Windows renames no mapped file."""
        reserve(path, size)
        pictures, sums = self._mapped(path, "r+")
        self._decode_into(torch.from_numpy(pictures), range(len(self.table)))
        sums[:] = [BAD if row in self.bad else zlib.crc32(pictures[row]) for row in range(len(self.table))]

    def _mapped(self, path: Path, mode: Literal["r+", "c"]) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The file's pictures, (N, 3, size, size), and the checksums after them, (N,)."""
        content, shape = np.memmap(path, np.uint8, mode), (len(self.table), 3, self.size, self.size)
        return content[: np.prod(shape)].reshape(shape), content[np.prod(shape) :].view(np.uint32)


def reserve(path: Path, size: int) -> None:
    """Allocate `size` bytes of disk now: on a full disk, a process that writes through a map dies of SIGBUS."""
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # not on macOS and Windows, nor on every disk
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            for start in range(0, size, len(ZEROS)):
                file.write(ZEROS[: size - start])


# Cropping and augmentation


class Augmenter:
    """Crop and augment a picture for training, with draws from the sample's generator."""

    def __init__(self, resize_size: int, size: int, augmentation: Augmentation) -> None:
        self.size, self.room, self.chance = size, resize_size - size, augmentation.flip
        self.steps = None if augmentation.moves_pixels_only else self._steps(augmentation)
        self.crops = not augmentation.random_resized_crop

    def _steps(self, augmentation: Augmentation) -> Any:
        from torchvision.transforms import v2  # imported here: that takes longer than captioning a picture

        steps: list[Any] = []
        if augmentation.random_resized_crop:
            scale = (augmentation.random_resized_crop, 1.0)
            bicubic = v2.InterpolationMode.BICUBIC
            steps.append(v2.RandomResizedCrop(self.size, scale, interpolation=bicubic, antialias=True))
        if strength := augmentation.color_jitter:
            steps.append(v2.ColorJitter(strength, strength, strength))
        if augmentation.rand_augment:
            steps.append(v2.RandAugment(magnitude=augmentation.rand_augment))
        return v2.Compose(steps)

    def draw(self, rng: np.random.Generator) -> tuple[int, int, bool]:
        """Draw where to crop (top, left), and whether to mirror."""
        top, left = rng.integers(0, self.room + 1, 2).tolist() if self.crops and self.room else (0, 0)
        return top, left, bool(self.chance and rng.random() < self.chance)

    def apply(self, picture: Tensor, top: int, left: int, flip: bool, rng: np.random.Generator) -> Tensor:
        """uint8 (3, R, R) -> (3, size, size). torchvision uses torch's global generator, whose state is restored."""
        if self.crops:
            picture = crop(picture, top, left, self.size)
        if flip:
            picture = picture.flip(-1)
        if self.steps is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(1 << 62)))
                picture = self.steps(picture)
        return picture


def cut_out(kept: Tensor, rows: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crop a batch (B, 3, size, size) from cached pictures (N, 3, R, R), on any device: these rows, at (top, left),
    mirrored where flip is true. The indices (B,) are on the same device. One gather for any number of pictures."""
    steps = torch.arange(size, device=kept.device)
    across = torch.where(flip[:, None], left[:, None] + size - 1 - steps, left[:, None] + steps)
    down = top[:, None] + steps
    channels = torch.arange(kept.shape[1], device=kept.device)
    return kept[rows[:, None, None, None], channels[None, :, None, None], down[:, None, :, None], across[:, None, None]]
