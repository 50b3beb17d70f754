"""From a table's pictures to the pixels of a batch: kept resized in memory, in a mapped file or on the GPU, then cut
out and augmented.

Whatever keeps them, the pixels are the ones that load_picture gives; what is random about a sample comes from the
generator it is handed.
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
from utils import forget_older, kept_file, key_of, locked, stamps, unfinished_of, whole

Keep = Literal["no", "memory", "disk"]
VERSION = 2  # of the pictures kept on disk: one more when load_picture gives other pixels
BAD = 0  # stands for the checksum of what is no picture; the one picture in 2 ** 32 that has it is decoded every time
ZEROS = bytes(1 << 20)


def in_threads(work: Callable[[int], object], rows: Sequence[int], bar: tqdm[Any], number: int | None = None) -> None:
    """Does the work for every row, moving the bar; in threads, since decoding and hashing let go of Python's lock."""
    pool = ThreadPoolExecutor(number or min(16, os.cpu_count() or 1))
    try:
        for _ in pool.map(work, rows):
            bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, without the pictures that are still to come


class Pixels:
    """The pictures of a table as uint8 (3, size, size), by row."""

    def __init__(
        self, table: CaptionTable, size: int, keep: Keep = "no", progress: bool = True, resample: str = "bicubic"
    ) -> None:
        """Decodes everything now, in threads, to keep it in memory or in a file that later runs and other processes
        share; or nothing, and every picture when it is asked for."""
        self.table, self.size, self.progress, self.resample = table, size, progress, resample
        self.bad: dict[int, str] = {}
        """Rows that turned out not to be pictures, with what is wrong."""
        self.kept: Tensor | None = None
        """All of them, uint8 (N, 3, size, size), where they are kept."""
        self.file = Path()
        """Where, on disk."""
        self.sums: NDArray[np.uint32] | None = None
        """CRC-32 of each, on disk."""
        self.unchecked = np.ones(len(table), bool)
        if keep == "memory":
            self.kept = torch.empty(len(table), 3, size, size, dtype=torch.uint8)
            self._decode_into(self.kept, range(len(table)))
        elif keep == "disk":
            self._map(kept_file("pixels", [str(table.root.absolute()), table.name, table.split, size], self._key()))

    def __getitem__(self, row: int) -> Tensor:
        """One picture. Raises UserError, naming it, where it cannot be decoded."""
        if row in self.bad:
            raise UserError(self.bad[row])
        if self.kept is not None:
            self.check(row)
            return self.kept[row]
        try:
            return self._load(row)
        except UserError as error:
            self.bad[row] = str(error)
            raise

    def check(self, row: int) -> None:
        """Decodes a picture anew that has changed on the disk since it was written there. Looks once at each."""
        if self.sums is None or not self.unchecked[row]:
            return
        assert self.kept is not None
        if zlib.crc32(self.kept[row].numpy().data) != self.sums[row]:
            with contextlib.suppress(OSError):  # another process was first, or Windows, as it is mapped
                self.file.unlink()
                print(f"cache       {self.file} is damaged: deleted; until the next run its pictures are decoded anew")
            self.kept[row] = self._load(row)
        self.unchecked[row] = False

    def check_all(self) -> None:
        """Looks at every picture."""
        label, off = f"checking {self.table.split} pictures", None if self.progress and self.sums is not None else True
        with tqdm(desc=label, total=len(self.table), unit="picture", disable=off) as bar:
            in_threads(self.check, range(len(self.table)), bar)

    def _load(self, row: int) -> Tensor:
        return load_picture(self.table.picture(row), self.size, self.table.name_of(row), self.resample)

    def _decode_into(self, target: Tensor, rows: Sequence[int]) -> None:
        """Fills in these rows, and `bad` with those that cannot be decoded."""
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
        """Changes with the pictures' files, their order and the size."""
        rows = self.table.rows
        if self.table.hub_rows is not None:
            files: Any = {part: data._fingerprint for part, data in self.table.hub_rows.items()}
        else:
            files = stamps([self.table.root / name for name in rows["picture"].unique().to_pylist()])
        return key_of(VERSION, self.size, self.resample, files, rows["picture"].to_pylist(), rows["offset"].to_pylist())

    def _map(self, path: Path) -> None:
        """Maps the file, which is made first where it is not there; other processes of the run wait for that."""
        number = len(self.table)
        needed = number * (3 * self.size**2 + np.dtype(np.uint32).itemsize)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}.lock")):
                if not path.exists() or path.stat().st_size != needed:
                    # By a process that was killed, and by one of an earlier version.
                    for left in [*unfinished_of(path), *path.parent.glob(f"{path.name}.*.part")]:
                        left.unlink()
                    free = shutil.disk_usage(path.parent).free
                    if needed > free:
                        raise UserError(
                            f"no room to keep {needed / 1e9:.1f} GB of pictures in {path.parent} ({free / 1e9:.1f} GB "
                            "are free): leave --cache out, or set VIT_GPT2_CACHE to a folder on another disk"
                        )
                    with whole(path) as unfinished:
                        reserve(unfinished, needed)
                        pictures, sums = self._mapped(unfinished, "r+")
                        self._decode_into(torch.from_numpy(pictures), range(number))
                        sums[:] = [BAD if row in self.bad else zlib.crc32(pictures[row]) for row in range(number)]
                    forget_older(path)
                    print(f"cache       {path} ({needed / 1e9:.1f} GB, may be deleted at any time)")
            # Copy on write: pages are shared with every process, and torch is spared a warning about read-only memory.
            pictures, self.sums = self._mapped(path, "c")
        except OSError as error:
            raise UserError(
                f"pictures cannot be kept in {path.parent} ({error.strerror or error}): leave --cache out, or set "
                "VIT_GPT2_CACHE to another folder"
            ) from None
        self.file, self.kept = path, torch.from_numpy(pictures)
        self.unchecked[:] = True
        self._decode_into(self.kept, np.flatnonzero(self.sums == BAD).tolist())  # what was wrong may have passed

    def _mapped(self, path: Path, mode: Literal["r+", "c"]) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """The file's pictures, (N, 3, size, size), and behind them their checksums, (N,)."""
        content, shape = np.memmap(path, np.uint8, mode), (len(self.table), 3, self.size, self.size)
        return content[: np.prod(shape)].reshape(shape), content[np.prod(shape) :].view(np.uint32)


def reserve(path: Path, size: int) -> None:
    """Takes so much of the disk now, in bytes: where it is full, a process that writes through a map dies of SIGBUS."""
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # not on macOS and Windows, nor on every disk
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            for start in range(0, size, len(ZEROS)):
                file.write(ZEROS[: size - start])


# Cutting out and augmenting


class Augmenter:
    """What happens to a picture on its way into a training batch, drawn from the sample's own generator."""

    def __init__(self, resize_size: int, size: int, augmentation: Augmentation) -> None:
        self.size, self.room, self.chance = size, resize_size - size, augmentation.flip
        self.steps = None if augmentation.moves_pixels_only else self._steps(augmentation)
        self.crops = not augmentation.random_resized_crop

    def _steps(self, augmentation: Augmentation) -> Any:
        from torchvision.transforms import v2  # late: its import takes longer than captioning a picture

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
        """Where to cut out (top, left), and whether to mirror."""
        top, left = rng.integers(0, self.room + 1, 2).tolist() if self.crops and self.room else (0, 0)
        return top, left, bool(self.chance and rng.random() < self.chance)

    def apply(self, picture: Tensor, top: int, left: int, flip: bool, rng: np.random.Generator) -> Tensor:
        """uint8 (3, R, R) -> (3, size, size). torchvision draws from torch's global generator, which is left as it was."""
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
    """Pictures (N, 3, R, R), kept anywhere, -> the batch (B, 3, size, size) of these rows, cut out at (top, left) and
    mirrored where flip says so; the indices (B,) lie on the same device. One gather, however many pictures."""
    steps = torch.arange(size, device=kept.device)
    across = torch.where(flip[:, None], left[:, None] + size - 1 - steps, left[:, None] + steps)
    down = top[:, None] + steps
    channels = torch.arange(kept.shape[1], device=kept.device)
    return kept[rows[:, None, None, None], channels[None, :, None, None], down[:, None, :, None], across[:, None, None]]
