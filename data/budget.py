"""Limit the cost of a picture: count its work before doing it, so that no small file keeps a CPU busy for minutes.

Pillow reads what precedes the pixels in small pieces, in Python. In every format the time grows with the number of
pieces; Counted counts them. What decoders in C repeat, a JPEG's scans, is counted beforehand. So are the tags of TIFF
and Exif, each of which may claim the complete file as its value.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_PIXELS = 80_000_000
MAX_SIDE = 1 << 20  # pixels: the resize stores weights for each of them
MAX_BYTES = 512 << 20  # MAX_PIXELS uncompressed pixels with 16 bits per colour take 458 MiB
MAX_READS = 30_000  # pieces read before the pixels; a page scanned in 10,000 strips needs ten
MAX_BESIDE = 1 << 20  # bytes of a compressed BMP besides its pixels
MAX_GIF_READS = 8000  # two for every 255 bytes of a comment, and Pillow copies the comment each time
MAX_CHUNKS = 1 << 17  # of a PNG: 80 million pixels in IDATs of 8 KiB need about 30,000
MAX_SEGMENTS = 4096  # before a JPEG's first scan: the largest colour profile needs 255
MAX_EXIF = 64  # of these segments
MAX_SCANS = 500  # cameras write 1, web pictures have 10
MAX_SCANNED = 64 * MAX_PIXELS  # pixels of all scans: each scan visits every pixel, even if it has only a few bytes
MAX_BLOCKS = 1 << 20  # of a JPEG 2000: 80 million pixels of 3 colours in blocks of 32 x 32 need 240,000
MAX_HEAD = 4 << 20  # bytes before a JPEG 2000's pixels; they may hold a colour profile
MAX_TAGS = 1 << 16
MAX_STRIPS = 1 << 18  # or tiles: 80 million pixels in three planes, in lines of 1,000, need 240,000
MAX_TAG_BYTES = 64 << 20  # beyond the file's own size

SEGMENT = re.compile(rb"\xff([^\x00\x01\xc8\xd0-\xd8\xf0-\xfd\xff])")  # no stuffed or fill byte, no lone marker
TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # by TIFF's types
STRIPS = (258, 273, 279, 324, 325, 338, 339)  # tags with a number per strip, tile or sample, each a Python object


class OverBudget(Exception):  # noqa: N818
    """A picture would cost too much; the text says what was counted. Not one of the errors that Pillow catches."""


class Counted(io.BytesIO):
    """A file's content that may be read in at most `reads` pieces."""

    def __init__(self, data: bytes, reads: int = MAX_READS) -> None:
        super().__init__(data)
        self.reads, self.most = 0, reads

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like any file. Raises OverBudget after too many reads."""
        self.reads += 1
        if self.reads > self.most:
            raise OverBudget(f"more than {self.most:,} pieces")
        return super().read(size)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for others: a pipe makes us wait, and a device has no end."""
    wait_not = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait_not))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return file


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a picture file. Raises OSError, or OverBudget, before reading anything, for a file that is too large."""
    with open_file(path) as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def check_size(number: int) -> None:
    """Raise OverBudget for more bytes than a picture may have."""
    if number > MAX_BYTES:
        raise OverBudget(f"larger than {MAX_BYTES >> 20} MiB")


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, content) of each of a JPEG's segments, up to its end."""
    at = 2
    while (found := SEGMENT.search(data, at)) and found[1] != b"\xd9":
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        yield found[1][0], data[found.end() + 2 : at]


def check_jpeg(data: bytes) -> None:
    """Raise OverBudget for a JPEG with too many scans or segments, or with Exif that costs too much."""
    exif: list[bytes] = []
    pixels = 0
    for number, (marker, content) in enumerate(segments(data)):
        if number > MAX_SEGMENTS or len(exif) > MAX_EXIF:
            raise OverBudget(
                f"more than {MAX_EXIF} segments of Exif" if exif else f"more than {MAX_SEGMENTS:,} segments"
            )
        if marker == 0xDA:
            break
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            exif.append(content[6:])
        # A Huffman scan that is not progressive (C0, C1) has bits for every block, so the file's size limits its cost.
        if marker in (0xC2, 0xC6, 0xC9, 0xCA, 0xCD, 0xCE):
            pixels = int.from_bytes(content[1:3], "big") * int.from_bytes(content[3:5], "big")
    check_tags(b"".join(exif))
    if pixels:
        scans = sum(marker == 0xDA for marker, _ in itertools.islice(segments(data), 1 << 20))
        if scans > min(MAX_SCANS, MAX_SCANNED // pixels):
            raise OverBudget(f"{scans:,} scans of {pixels:,} pixels")


def check_tags(data: bytes) -> None:
    """Raise OverBudget for a TIFF or an Exif whose first directory claims more data than the file can hold.

    Truncated or damaged data is left to the decoder.
    """
    order, big = {b"II": "<", b"MM": ">"}.get(data[:2], ""), b"+" in data[2:4]
    pointer, counter, entry = ("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")
    total = 0
    with contextlib.suppress(struct.error):
        (start,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
        (number,) = struct.unpack_from(order + counter, data, start)
        tags = memoryview(data)[start + struct.calcsize("=" + counter) :]
        width = struct.calcsize("=" + entry)
        number = min(number, len(tags) // width) if order else 0
        if number > MAX_TAGS:
            raise OverBudget(f"{number:,} tags")
        for tag, kind, count, _ in struct.iter_unpack(order + entry, tags[: number * width]):
            size = count * TAG_BYTES.get(kind, 0)
            if size > len(data):
                break  # Pillow stops here too
            total += size
            if total > len(data) + MAX_TAG_BYTES or (tag in STRIPS and count > MAX_STRIPS):
                raise OverBudget(f"{count:,} strips" if tag in STRIPS else "its tags overlap")


def check_jpeg2000(data: bytes) -> None:
    """Raise OverBudget for a JPEG 2000 with too many tiles, layers or blocks: a decoder stores a record for each."""
    heads = (int.from_bytes(data[max(0, at.start() - 4) : at.start()], "big") for at in re.finditer(b"jp2h", data))
    if any(MAX_HEAD < size < len(data) for size in heads):
        raise OverBudget(f"a header of more than {MAX_HEAD >> 20} MiB")
    with contextlib.suppress(struct.error, ZeroDivisionError, IndexError):
        start = data.find(b"\xff\x4f\xff\x51")
        right, bottom, left, top, width, height, _, _, colours = struct.unpack_from(">8IH", data, start + 8)
        pixels = (right - left) * (bottom - top) * colours
        tiles = -(-(right - left) // width) * -(-(bottom - top) // height)
        blocks, layers = 64 * tiles, 1  # a tile costs as much as 64 blocks
        for marker, content in itertools.islice(segments(data[start:]), MAX_SEGMENTS):
            if marker == 0x90:  # the first tile
                break
            if marker == 0x52:
                layers = int.from_bytes(content[2:4], "big")
            if marker in (0x52, 0x53):
                levels, across, down, _, _, *precincts = content[5 if marker == 0x52 else 2 + (colours > 256) :]
                packets = tiles * colours * (levels + 1)
                packets += pixels >> min((each // 16 + each % 16 for each in precincts), default=30)
                blocks += (pixels >> across + down + 4) + packets + (packets * layers >> 4)
        if blocks > MAX_BLOCKS:
            raise OverBudget(f"{blocks:,} blocks of JPEG 2000")


def why_missing(path: Path) -> str:
    """Why there is no picture at the path."""
    return "not a regular file" if path.exists() else "no such file"
