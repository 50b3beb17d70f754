"""Pictures that are small to send and long to decode, one kind a function of the bytes it may have.

PYTHONPATH=. python tests/data/hostile.py 19      # how long each of 19 MiB takes, and how much memory
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

KINDS: dict[str, Callable[[int], bytes]] = {}
SIDE = 8900  # 79 million pixels


def kind(name: str) -> Callable[[Callable[[int], bytes]], Callable[[int], bytes]]:
    def keep(make: Callable[[int], bytes]) -> Callable[[int], bytes]:
        KINDS[name] = make
        return make

    return keep


def encoded(form: str, image: Image.Image | None = None, **options) -> bytes:
    file = io.BytesIO()
    (image or Image.effect_noise((64, 64), 60).convert("RGB")).save(file, form, **options)
    return file.getvalue()


def filled(before: bytes, piece: bytes, after: bytes, size: int) -> bytes:
    """The piece as often as there is room for."""
    return before + piece * max(1, (size - len(before) - len(after)) // len(piece)) + after


# JPEG


def segment(marker: int, content: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content


def scans(side: int, number: int, arithmetic: bool = False) -> bytes:
    """A grey progressive JPEG, one scan for its brightness, then the others: runs of blocks in which nothing changes."""
    blocks = (side // 8) ** 2
    runs, rest = divmod(blocks, 32767)
    # Tables of one code each: "0" is a brightness that stays as it is, or a run of 2^14 and more blocks without a bit.
    tables = segment(0xC4, b"\0" + b"\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10" + b"\1" + bytes(15) + b"\xe0")
    head = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    head += segment(0xCA if arithmetic else 0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0") + tables
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    bits = ("0" + "1" * 14) * (runs + bool(rest))
    bits += "1" * (-len(bits) % 8)
    content = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    more = segment(0xDA, b"\1\1\0\1\x3f\0") + content
    return head + (first if not arithmetic else segment(0xDA, b"\1\1\0\0\0\0")) + more * number + b"\xff\xd9"


JPEG = encoded("JPEG")
CMYK = encoded("JPEG", Image.effect_noise((64, 64), 60).convert("L").convert("CMYK"))


@kind("JPEG, 1,500 scans")
def repeated_scans(size: int) -> bytes:
    return scans(min(SIDE // 8 * 8, int(size**0.5) * 8), 1500)


@kind("JPEG, scans in arithmetic code")
def arithmetic_scans(size: int) -> bytes:
    return scans(SIDE // 8 * 8, min(1000, max(10, size // 30)), arithmetic=True)


@kind("JPEG, filled with FF")
def filling(size: int) -> bytes:
    return filled(b"\xff\xd8", b"\xff", CMYK[2:], size)


@kind("JPEG, zeros")
def zeros(size: int) -> bytes:
    return filled(b"\xff\xd8\xff", b"\0", b"", size)


@kind("JPEG, FF 00")
def stuffed(size: int) -> bytes:
    return filled(b"\xff\xd8", b"\xff\0", CMYK[2:], size)


@kind("JPEG, empty APP1")
def empty_app1(size: int) -> bytes:
    return filled(b"\xff\xd8", segment(0xE1, b""), JPEG[2:], size)


@kind("JPEG, empty comments")
def comments(size: int) -> bytes:
    return filled(b"\xff\xd8", segment(0xFE, b""), CMYK[2:], size)


@kind("JPEG, restarts in the header")
def restarts(size: int) -> bytes:
    return filled(b"\xff\xd8", b"\xff\xd0", CMYK[2:], size)


@kind("JPEG, 1,200 bytes of Exif again and again")
def exif_segments(size: int) -> bytes:
    return filled(b"\xff\xd8", segment(0xE1, b"Exif\0\0" + bytes(1200)), CMYK[2:], size)


def overlapping(size: int, entries: int) -> bytes:
    """TIFF's tags, each of which says that all of the file is its value."""
    tags = [struct.pack("<HHII", 40000 + i % 20000, 7, size - 8, 8) for i in range(min(entries, 65000))]
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)).ljust(size, b"\0")


@kind("JPEG, Exif's tags overlap")
def exif_tags(size: int) -> bytes:
    tags = overlapping(min(size, 2 << 20), 65000)
    parts = [segment(0xE1, b"Exif\0\0" + tags[at : at + 65000]) for at in range(0, len(tags), 65000)]
    return JPEG[:2] + b"".join(parts) + JPEG[2:]


@kind("JPEG, MPF segments")
def mpf(size: int) -> bytes:
    return filled(b"\xff\xd8", segment(0xE2, b"MPF\0" + overlapping(60, 1)), CMYK[2:], size)


@kind("JPEG, empty tables")
def tables(size: int) -> bytes:
    return filled(JPEG[:2], segment(0xDB, b""), JPEG[2:], size)


@kind("JPEG, 79 megapixels of nothing")
def grey_jpeg(size: int) -> bytes:
    return scans(SIDE // 8 * 8, 1)


# PNG


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


PNG = encoded("PNG")
BEFORE, AFTER = PNG[:33], PNG[33:]


@kind("PNG, unknown chunks")
def unknown(size: int) -> bytes:
    return filled(BEFORE, chunk(b"ABCD", b""), AFTER, size)


@kind("PNG, unknown chunks beside")
def beside(size: int) -> bytes:
    return filled(BEFORE, chunk(b"abCd", b""), AFTER, size)


@kind("PNG, texts")
def texts(size: int) -> bytes:
    return filled(BEFORE, chunk(b"tEXt", b"a\0b"), AFTER, size)


@kind("PNG, XMP again and again")
def xmps(size: int) -> bytes:
    return filled(BEFORE, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0"), AFTER, size)


@kind("PNG, empty IDAT")
def idat(size: int) -> bytes:
    return filled(BEFORE, chunk(b"IDAT", b""), AFTER, size)


@kind("PNG, empty IDAT behind")
def idat_behind(size: int) -> bytes:
    return filled(PNG[:-12], chunk(b"IDAT", b""), PNG[-12:], size)


@kind("PNG, palettes")
def palettes(size: int) -> bytes:
    return filled(BEFORE, chunk(b"PLTE", b"abc"), AFTER, size)


@kind("PNG, frames")
def frames(size: int) -> bytes:
    start = BEFORE + chunk(b"acTL", struct.pack(">II", 1 << 20, 0)) + AFTER[:-12]
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 1, 1, 1, 0, 0, 1, 1, 0, 0))
    return filled(start, frame + chunk(b"fdAT", b"\0\0\0\2" + zlib.compress(bytes(4))), AFTER[-12:], size)


@kind("PNG, 79 megapixels of nothing")
def empty_png(size: int) -> bytes:
    packed = zlib.compress(bytes((SIDE * 3 + 1) * SIDE), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    return PNG[:8] + head + chunk(b"IDAT", packed) + PNG[-12:]


@kind("PNG, more pixels packed than there are")
def too_many(size: int) -> bytes:
    stream = zlib.compressobj(9)
    packed = b"".join(stream.compress(bytes(1 << 20)) for _ in range(size // 1100))
    return BEFORE + chunk(b"IDAT", packed + stream.flush()) + PNG[-12:]


# GIF

GIF = encoded("GIF")
GIF_HEAD = GIF[: 13 + 3 * 256]


@kind("GIF, a comment in blocks of 1 byte")
def comment_blocks(size: int) -> bytes:
    return filled(GIF_HEAD + b"!\xfe", b"\1a", b"\0" + GIF[len(GIF_HEAD) :], size)


@kind("GIF, comments of 255 bytes")
def comment_long(size: int) -> bytes:
    return filled(GIF_HEAD + b"!\xfe", b"\xff" + b"a" * 255, b"\0" + GIF[len(GIF_HEAD) :], size)


@kind("GIF, extensions")
def extensions(size: int) -> bytes:
    return filled(GIF_HEAD, b"!\xfe\1a\0", GIF[len(GIF_HEAD) :], size)


@kind("GIF, frames")
def gif_frames(size: int) -> bytes:
    return filled(GIF[:-1], b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0", b";", size)


@kind("GIF, pixels in blocks of 1 byte")
def gif_pixels(size: int) -> bytes:
    start = b"GIF89a" + struct.pack("<HHBBB", 8000, 8000, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 8000, 8000, 0)
    return filled(start + b"\x08", b"\1\0", b"\0;", size)


# TIFF


def tiff(entries: list[tuple[int, int, int, int]], content: bytes, big: bool = False) -> bytes:
    """(tag, type, count, value or place) of values, and what stands from byte 8 (of a BigTIFF 16) on."""
    at = (16 if big else 8) + len(content)
    packed = b"".join(struct.pack("<HHQQ" if big else "<HHII", *entry) for entry in sorted(entries))
    if big:
        return (
            b"II+\0\x08\0\0\0" + struct.pack("<Q", at) + content + struct.pack("<Q", len(entries)) + packed + bytes(8)
        )
    return b"II*\0" + struct.pack("<I", at) + content + struct.pack("<H", len(entries)) + packed + bytes(4)


def plain(
    width: int, height: int, *more: tuple[int, int, int, int], packed: int = 1
) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, packed), (262, 3, 1, 1), *more]


@kind("TIFF, tags that overlap")
def tiff_tags(size: int) -> bytes:
    return overlapping(size, 65000)


@kind("BigTIFF, tags")
def big_tags(size: int) -> bytes:
    return tiff([(40000 + i % 20000, 4, 1, 1) for i in range(size // 20)], b"", big=True)


@kind("TIFF, strips")
def strips(size: int) -> bytes:
    number = size // 8
    numbers = struct.pack("<I", 8) * number + struct.pack("<I", 1) * number
    return tiff(plain(1, 1, (273, 4, number, 8), (278, 4, 1, 1), (279, 4, number, 8 + 4 * number)), numbers)


@kind("TIFF, strips that overlap")
def strips_overlap(size: int) -> bytes:
    number = 80_000
    packed = zlib.compress(bytes(10)).ljust(size - 8 * number, b"\0")
    numbers = struct.pack("<I", 8) * number + struct.pack("<I", len(packed)) * number
    at = 8 + len(packed)
    tags = plain(10, number, (273, 4, number, at), (278, 4, 1, 1), (279, 4, number, at + 4 * number), packed=8)
    return tiff(tags, packed + numbers)


@kind("TIFF, raw strips that overlap")
def raw_overlap(size: int) -> bytes:
    number, width = 80_000, 900
    numbers = struct.pack("<I", 8) * number + struct.pack("<I", size) * number
    at = 8 + size
    return tiff(
        plain(width, number, (273, 4, number, at), (278, 4, 1, 1), (279, 4, number, at + 4 * number)),
        bytes(size) + numbers,
    )


@kind("TIFF, tiles")
def tiles(size: int) -> bytes:
    number = size // 8
    numbers = struct.pack("<I", 8) * number + struct.pack("<I", 1) * number
    place = (324, 4, number, 8), (325, 4, number, 8 + 4 * number)
    return tiff(plain(16, 16, (322, 3, 1, 16), (323, 3, 1, 16), *place), numbers)


@kind("TIFF, bits of a sample")
def samples(size: int) -> bytes:
    number = size // 2
    tags = [entry for entry in plain(1, 1, (273, 4, 1, 8), (279, 4, 1, 1)) if entry[0] != 258]
    return tiff([*tags, (258, 3, number, 8)], struct.pack("<H", 8) * number)


@kind("TIFF, a JPEG of scans")
def tiff_jpeg(size: int) -> bytes:
    side = SIDE // 8 * 8
    content = scans(side, 1500)
    return tiff(plain(side, side, (273, 4, 1, 8), (278, 4, 1, side), (279, 4, 1, len(content)), packed=7), content)


@kind("TIFF, pages")
def pages(size: int) -> bytes:
    page = encoded("TIFF", Image.new("L", (1, 1)))
    parts, at = [b"II*\0\x08\0\0\0"], 8
    for _ in range(size // 30):
        parts.append(struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 1) + struct.pack("<I", at + 18))
        at += 18
    return b"".join(parts)[:size] if size < 100 else page[:8] + b"".join(parts)[8:]


# BMP, ICO, and the formats that Pillow decodes in Python


def bmp(width: int, height: int, content: bytes, four: bool = False) -> bytes:
    about = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 4 if four else 8, 2 if four else 1, len(content), 0, 0, 256, 0
    )
    about += bytes(64 if four else 1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(about) + len(content), 0, 0, 14 + len(about)) + about + content


@kind("BMP, runs of 1")
def runs_of_one(size: int) -> bytes:
    return filled(bmp(4000, size // 4000, b""), b"\1\0", b"", size)


@kind("BMP, ends of lines")
def line_ends(size: int) -> bytes:
    return filled(bmp(64, 64, b""), b"\0\0", b"", size)


@kind("BMP, one line of 79 megapixels")
def long_line(size: int) -> bytes:
    return bmp(SIDE * SIDE, 1, b"\1\0\0\0" + b"\0\0" * 100)


@kind("BMP, runs of half bytes")
def half_bytes(size: int) -> bytes:
    return filled(bmp(SIDE, SIDE, b"", four=True), b"\xff\x11" * 34 + b"\xe6\x11\0\0", b"", min(size, 70 * SIDE + 2000))


@kind("ICO, entries")
def entries(size: int) -> bytes:
    return struct.pack("<HHH", 0, 1, 65535) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 8, 10, 22) * 65535


@kind("ICO, a PNG of chunks")
def icon_of_chunks(size: int) -> bytes:
    content = unknown(size - 22)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 64, 64, 0, 0, 1, 8, len(content), 22) + content


@kind("PPM, a long comment")
def long_comment(size: int) -> bytes:
    return filled(b"P5 #", b"a", b"\n1 1 255 a", size)


@kind("PPM, white space")
def white_space(size: int) -> bytes:
    return filled(b"P5", b" ", b"1 1 255 a", size)


@kind("PPM, numbers as text")
def plain_numbers(size: int) -> bytes:
    return filled(b"P2 4000 %d 255\n" % (size // 8000), b"0 ", b"", size)


@kind("PPM, comments among numbers")
def plain_comments(size: int) -> bytes:
    return filled(b"P2 2000 2000 255\n", b"#\n", b"", size)


@kind("PPM, whose white is 254")
def odd_white(size: int) -> bytes:
    return filled(b"P5 4000 %d 254\n" % (size // 4000), b"\0", b"", size)


@kind("QOI")
def qoi(size: int) -> bytes:
    return filled(b"qoif" + struct.pack(">IIBB", 4000, size // 4000, 3, 0), b"\x40", b"", size)


@kind("TGA")
def tga(size: int) -> bytes:
    return filled(struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, SIDE, SIDE, 24, 0), b"\xff\0\0\0", b"", size)


@kind("PCX")
def pcx(size: int) -> bytes:
    head = struct.pack("<BBBBHHHH", 10, 5, 1, 8, 0, 0, SIDE - 1, SIDE - 1).ljust(65, b"\0") + struct.pack(
        "<BH", 1, SIDE
    )
    return filled(head.ljust(128, b"\0"), b"\xc1\0", b"", size)


@kind("SGI")
def sgi(size: int) -> bytes:
    head = struct.pack(">HBBHHHH", 474, 1, 1, 3, SIDE, SIDE, 3).ljust(512, b"\0")
    run = b"\x7f\0" * 70 + b"\x0a\0\0"
    number = SIDE * 3
    return head + struct.pack(">I", 512 + 8 * number) * number + struct.pack(">I", len(run)) * number + run


# WebP, JPEG 2000, AVIF


@kind("WebP, frames")
def webp_frames(size: int) -> bytes:
    still = encoded("WEBP", Image.new("RGB", (2, 2)), lossless=True)[12:]
    frame = bytes(6) + struct.pack("<I", 1)[:3] * 2 + bytes(4) + still
    start = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + struct.pack("<I", 63)[:3] * 2
    start += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    content = filled(b"WEBP" + start, b"ANMF" + struct.pack("<I", len(frame)) + frame, b"", size)
    return b"RIFF" + struct.pack("<I", len(content)) + content


@kind("WebP, empty chunks")
def webp_chunks(size: int) -> bytes:
    still = encoded("WEBP", lossless=True)[12:]
    start = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + struct.pack("<I", 63)[:3] * 2
    content = filled(b"WEBP" + start, b"ABCD" + bytes(4), still, size)
    return b"RIFF" + struct.pack("<I", len(content)) + content


@kind("WebP, 79 megapixels of nothing")
def empty_webp(size: int) -> bytes:
    return encoded("WEBP", Image.new("RGB", (SIDE, SIDE)), lossless=True, method=0)


def box(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content) + 8) + name + content


JP2 = encoded("JPEG2000")


@kind("JPEG 2000, boxes")
def jp2_boxes(size: int) -> bytes:
    start = JP2.index(b"jp2h") - 4
    return filled(JP2[:start], box(b"free"), JP2[start:], size)


@kind("JPEG 2000, boxes inside")
def jp2_inside(size: int) -> bytes:
    start = JP2.index(b"jp2h") - 4
    length = int.from_bytes(JP2[start : start + 4], "big")
    inside = filled(b"", box(b"free"), JP2[start + 8 : start + length], size)
    return JP2[:start] + box(b"jp2h", inside) + JP2[start + length :]


def stream(
    side: int, tile: int, levels: int = 0, block: int = 4, precinct: int | None = None, layers: int = 1
) -> bytes:
    """A J2K of nothing: its tiles, one after the other, are empty or absent."""
    sizes = struct.pack(">HIIIIIIIIH", 0, side, side, 0, 0, tile, tile, 0, 0, 1) + b"\7\1\1"
    precincts = b"" if precinct is None else bytes([precinct * 17]) * (levels + 1)
    style = bytes([precinct is not None, 0]) + struct.pack(">H", layers) + b"\0"
    style += bytes([levels, block - 2, block - 2, 0, 1]) + precincts
    quantised = b"\x40" + b"\x40" * (3 * levels + 1)
    head = b"\xff\x4f" + segment(0x51, sizes) + segment(0x52, style) + segment(0x5C, quantised)
    number = min(65535, (-(-side // tile)) ** 2)
    return (
        head
        + b"".join(segment(0x90, struct.pack(">HIBB", i, 15, 0, 1)) + b"\xff\x93" + b"\0" for i in range(number))
        + b"\xff\xd9"
    )


@kind("JPEG 2000, tiles")
def jp2_tiles(size: int) -> bytes:
    return stream(SIDE, 35)


@kind("JPEG 2000, blocks of 4 pixels")
def jp2_blocks(size: int) -> bytes:
    return stream(SIDE, SIDE, block=2)


@kind("JPEG 2000, precincts of 1 pixel")
def jp2_precincts(size: int) -> bytes:
    return stream(4000, 4000, precinct=0)


@kind("JPEG 2000, layers")
def jp2_layers(size: int) -> bytes:
    return stream(SIDE, 280, levels=5, layers=65535)


AVIF = encoded("AVIF")


@kind("AVIF, boxes")
def avif_boxes(size: int) -> bytes:
    start = AVIF.index(b"meta") - 4
    return filled(AVIF[:start], box(b"free"), AVIF[start:], size)


@kind("AVIF, 79 megapixels of nothing")
def empty_avif(size: int) -> bytes:
    return encoded("AVIF", Image.new("L", (SIDE, SIDE)), speed=10)


@kind("zeros behind every magic")
def behind_magic(size: int) -> bytes:
    return b"\0\0\2\0".ljust(size, b"\0")


CODE = """
import sys, time; from pathlib import Path
from data.pictures import load_picture
from PIL import Image; Image.init()
import numpy, io
for form in ("JPEG", "PNG"):
    file = io.BytesIO(); Image.new("RGB", (300, 300)).save(file, form); load_picture(file.getvalue(), 224)
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before, start = peak(), time.perf_counter()
try: said = str(tuple(load_picture(sys.argv[1], 224).shape))
except BaseException as error: said = f"{type(error).__name__}: {error}"[-110:]
print(f"{time.perf_counter() - start:7.2f} s {peak() - before:7.0f} MiB  {said}")
"""


def main() -> None:
    size, wanted = int(float(sys.argv[1]) * (1 << 20)), sys.argv[2:]
    path = Path(tempfile.mkdtemp()) / "picture"
    for name, make in KINDS.items():
        if wanted and not any(word in name for word in wanted):
            continue
        path.write_bytes(make(size))
        start = time.monotonic()
        try:
            done = subprocess.run([sys.executable, "-c", CODE, path], capture_output=True, text=True, timeout=60)
            said = done.stdout.strip() or f"exit code {done.returncode} after {time.monotonic() - start:.0f} s"
        except subprocess.TimeoutExpired:
            said = "  > 60 s"
        print(f"{name:42} {path.stat().st_size / (1 << 20):6.2f} MiB {said}", flush=True)


if __name__ == "__main__":
    main()
