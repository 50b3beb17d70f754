"""Pictures that are made to cost much are turned away by counting; honest ones of many pieces are read as ever.

Nothing here is timed. tests/data/hostile.py makes the pictures, and measures them when it is run as a script.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hostile import GIF, JP2, JPEG, KINDS, PNG, chunk, encoded, scans, segment
from hypothesis import given
from hypothesis import strategies as st
from mutations import many
from PIL import Image

from config import UserError
from data import budget, check
from data.pictures import load_picture, open_picture
from data.sources import load_tables

# What is refused, and by what is counted; the others are read, or are damaged.
REFUSED = {
    "JPEG, 1,500 scans": "1,501 scans of ",
    "JPEG, scans in arithmetic code": "1,001 scans of ",
    "JPEG, zeros": "more than 30,000 pieces",
    "JPEG, FF 00": "more than 30,000 pieces",
    "JPEG, filled with FF": "more than 30,000 pieces",
    "JPEG, restarts in the header": "more than 30,000 pieces",
    "JPEG, empty APP1": "more than 4,096 segments",
    "JPEG, empty comments": "more than 4,096 segments",
    "JPEG, MPF segments": "more than 4,096 segments",
    "JPEG, empty tables": "more than 4,096 segments",
    "JPEG, 1,200 bytes of Exif again and again": "more than 64 segments of Exif",
    "JPEG, Exif's tags overlap": "its tags overlap",
    "PNG, unknown chunks": "more than 1,000 chunks",
    "PNG, unknown chunks beside": "more than 1,000 chunks",
    "PNG, texts": "more than 1,000 chunks",
    "PNG, XMP again and again": "more than 1,000 chunks",
    "PNG, empty IDAT": "more than 1,000 chunks",
    "PNG, empty IDAT behind": "more than 1,000 chunks",
    "PNG, palettes": "more than 1,000 chunks",
    "GIF, a comment in blocks of 1 byte": "pieces",
    "GIF, comments of 255 bytes": "more than 8,000 pieces",
    "GIF, extensions": "pieces",
    "ICO, a PNG of chunks": "pieces",
    "ICO, entries": "pieces",
    "PPM, a long comment": "pieces",
    "PPM, white space": "pieces",
    "BMP, ends of lines": " bytes for 4,096 pixels",
    "JPEG 2000, boxes": "pieces",
    "TIFF, tags that overlap": "its tags overlap",
    "BigTIFF, tags": " tags",
    "JPEG 2000, tiles": "blocks of JPEG 2000",
    "JPEG 2000, blocks of 4 pixels": "blocks of JPEG 2000",
    "JPEG 2000, precincts of 1 pixel": "blocks of JPEG 2000",
    "JPEG 2000, layers": "blocks of JPEG 2000",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_take_long_is_counted_and_refused(name, monkeypatch):
    """86 KiB of scans took 24 seconds, and 19 MiB of most other kinds between 2 and 60, or gigabytes of memory."""
    monkeypatch.setattr("data.pictures.MAX_CHUNKS", 1000)  # a hundred times as many take a second
    size = 1 << 17 if name.startswith("PNG") else 1 << 21
    if REFUSED[name].endswith("pieces") and name.startswith("JPEG,"):
        data = encoded("JPEG", Image.new("CMYK", (8, 8)))  # those in grey and colour never meet Pillow's slow reader
        data = b"\xff\xd8" + KINDS[name](size)[2 : size // 2] + data[2:]
    else:
        data = KINDS[name](size)
    with pytest.raises(UserError, match=f"^p: not a picture that can be read .*{re.escape(REFUSED[name])}"):
        load_picture(data, 224, "p")
    with pytest.raises(Exception, match=re.escape(REFUSED[name])):  # which is how an address's answer is judged
        open_picture(io.BytesIO(data)).load()


def test_1500_scans_are_said():
    assert "(1,500 scans of 640,000 pixels)" in failure(scans(800, 1499))
    load_picture(scans(800, 90), 224)  # and as many as some programs write are read
    hidden = scans(64, 900)  # a lone marker has no length: what looks like one must not hide the scans
    at = hidden.index(b"\xff\xda")
    assert "901 scans" in failure(hidden[:at] + b"\xff\x01\xff\xf0" + hidden[at:])


def failure(source) -> str:
    with pytest.raises(UserError) as error:
        load_picture(source, 16, "p")
    assert str(error.value).isprintable()
    return str(error.value)


# What is honest


def test_honest_pictures_of_many_pieces_are_read():
    noise = Image.effect_noise((2000, 1500), 60).convert("RGB")
    rows = b"".join(b"\0" + np.asarray(noise)[row, :500].tobytes() for row in range(300))
    packed, head = zlib.compress(rows), chunk(b"IHDR", struct.pack(">IIBBBBB", 500, 300, 8, 2, 0, 0, 0))
    pieces = [chunk(b"IDAT", packed[at : at + 5]) for at in range(0, len(packed), 5)]
    assert len(pieces) > 40_000
    split = PNG[:8] + head + b"".join(pieces) + PNG[-12:]
    png = PNG[:8] + head + chunk(b"IDAT", packed) + PNG[-12:]
    assert torch.equal(load_picture(split, 64), load_picture(png, 64))
    for jpeg in (encoded("JPEG", noise, progressive=True), encoded("JPEG", noise.convert("CMYK"), progressive=True)):
        profile = b"".join(
            segment(0xE2, b"ICC_PROFILE\0" + bytes([number, 255]) + bytes(60_000)) for number in range(1, 256)
        )
        exif = segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(60_000)) * 3
        assert torch.equal(load_picture(jpeg[:2] + profile + exif + jpeg[2:], 64), load_picture(jpeg, 64))
    mpo = encoded("MPO", noise, save_all=True, append_images=[noise, noise])
    assert torch.equal(load_picture(mpo, 64), load_picture(encoded("JPEG", noise), 64))
    tall = Image.effect_noise((8, 20_000), 60)
    for options in ({}, {"compression": "tiff_lzw"}):
        scanned = encoded("TIFF", tall, tiffinfo={278: 1}, **options)
        assert torch.equal(load_picture(scanned, 64), load_picture(tall, 64))
    for options in ({}, {"tile_size": (64, 64), "quality_layers": [20, 10, 5]}, {"codeblock_size": (16, 16)}):
        load_picture(encoded("JPEG2000", noise, **options), 64)
    for form in ("QOI", "BMP", "PPM", "GIF", "TGA", "SGI", "PCX", "WEBP", "AVIF"):
        load_picture(encoded(form, noise.resize((300, 200))), 64)


# What is no file


def test_a_hole_is_not_read_and_a_pipe_not_waited_for(tmp_path):
    """A file of a JPEG's magic and 3 GB of nothing took 3.7 GB of memory, and a pipe in a folder stopped everything."""
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(3 << 30)
    assert failure(tmp_path / "hole.jpg") == "p: not a picture that can be read (larger than 512 MiB)"
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", "/dev/null"):
        assert failure(path) == "p: not a picture that can be read (not a regular file)"


@pytest.mark.parametrize(
    "name", ["c.txt", "captions.csv", "captions.jsonl", "x.json", "t.parquet", "000.tar", "results.csv"]
)
def test_pipes_among_data_are_named_and_stop_nobody(tmp_path, name):
    """Each was opened, and waited for."""
    for each in "abcefghijklm":
        (tmp_path / f"{each}.png").write_bytes(PNG)
        (tmp_path / f"{each}.txt").write_text(f"picture {each}")
    (tmp_path / "d.txt").write_text("a pipe")
    os.mkfifo(tmp_path / "d.png")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    done: list[object] = []

    def look() -> None:
        try:
            report = check.check_tables(load_tables("auto", tmp_path), progress=False)
            done.append([(bad.picture, bad.reason) for bad in report.bad])
        except UserError as error:
            done.append(str(error))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(60)
    if name == "c.txt":
        assert re.search("c.png|c.txt", str(done)), done
    else:
        assert done == [[(str(tmp_path / "d.png"), "not a regular file")]]


def test_a_picture_over_the_budget_is_one_bad_picture(tmp_path):
    """Counted and named; the others go on."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "captions.csv").write_text("image,caption\n" + "".join(f"{each}.jpg,a cat {each}\n" for each in "abcdefgh"))
    for each in "abcdefgh":
        (data / f"{each}.jpg").write_bytes(scans(800, 1499) if each == "b" else JPEG)
    assert check.main([str(data), "--output-dir", str(out)]) == 1
    (found,) = out.glob("bad*.csv")
    assert [row[1:] for row in list(csv.reader(found.open()))[1:]] == [
        [str(data / "b.jpg"), "not a picture that can be read (1,500 scans of 640,000 pixels)"]
    ]


# Mutated pictures: the parts of a file doubled, dropped, moved, lengthened, and their numbers changed


def parts_of(data: bytes) -> list[bytes]:
    """The parts that a format is made of, whose join is the file."""
    if data.startswith(b"\xff\xd8"):
        return re.findall(rb"\xff[^\x00\xff\xd0-\xd7](?:(?!\xff[^\x00\xff\xd0-\xd7]).)*", data, re.DOTALL)
    if data.startswith(b"\x89PNG"):
        parts, at = [data[:8]], 8
        while at < len(data):
            size = 12 + int.from_bytes(data[at : at + 4], "big")
            parts.append(data[at : at + size])
            at += size
        return parts
    if data.startswith((b"II", b"MM")):
        start = int.from_bytes(data[4:8], "little")
        number = int.from_bytes(data[start : start + 2], "little")
        ends = [0, 4, 8, start, start + 2, *(start + 2 + 12 * each for each in range(1, number + 1)), len(data)]
        ends = sorted(set(ends))
    elif data.startswith(b"RIFF") or data[4:8] in (b"ftyp", b"jP  "):
        ends = [
            0,
            *(at.start() for at in re.finditer(rb"(?:.{4}[a-z]{4}|[A-Z8LX ]{4}.{4})", data, re.DOTALL)),
            len(data),
        ]
    else:
        ends = [0, *(at.start() for at in re.finditer(rb"[!,\x00\xff\n]", data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def right_sums(part: bytes) -> bytes:
    """A PNG's chunk with the length and the checksum that its content has."""
    return struct.pack(">I", len(part) - 12) + part[4:-4] + struct.pack(">I", zlib.crc32(part[4:-4]))


SMALL = [
    encoded("JPEG", progressive=True, exif=Image.Exif()),
    JPEG,
    encoded("MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))]),
    PNG,
    encoded("PNG", save_all=True, append_images=[Image.new("RGB", (64, 64))]),
    GIF,
    encoded("TIFF"),
    encoded("TIFF", compression="tiff_lzw"),
    encoded("TIFF", compression="jpeg"),
    encoded("BMP", Image.effect_noise((16, 16), 50)),
    encoded("ICO"),
    JP2,
    encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64))]),
    encoded("AVIF"),
    *(encoded(form, Image.effect_noise((16, 16), 50).convert("RGB")) for form in ("PPM", "QOI", "SGI", "PCX", "TGA")),
]
NUMBERS = [
    b"\0",
    b"\1",
    b"\x7f",
    b"\xff",
    b"\xff\xff",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\1\0\0",
]


@st.composite
def mutated(draw) -> bytes:
    data = draw(st.sampled_from(SMALL))
    parts, is_png = parts_of(data), data.startswith(b"\x89PNG")
    for _ in range(draw(st.integers(1, 4))):
        at, to = draw(st.integers(0, len(parts) - 1)), draw(st.integers(0, len(parts) - 1))
        part, what = (
            parts[at],
            draw(st.sampled_from(["double", "drop", "move", "longer", "number", "number", "number"])),
        )
        if what == "double":
            parts[to:to] = [part] * draw(st.sampled_from([1, 2, 70, 600, 5000]))
        elif what == "drop" and len(parts) > 1:
            del parts[at]
        elif what == "move":
            parts[at], parts[to] = parts[to], parts[at]
        elif part:
            place = draw(st.integers(0, len(part) - 1))
            number = draw(st.sampled_from(NUMBERS) | st.binary(min_size=1, max_size=4))
            end = place if what == "longer" else place + len(number)
            parts[at] = part[:place] + number * (draw(st.integers(1, 300)) if what == "longer" else 1) + part[end:]
            if is_png and len(parts[at]) >= 12 and draw(st.booleans()):
                parts[at] = right_sums(parts[at])
    return b"".join(parts)[: 1 << 20]


def check_mutated(number: int | None, monkeypatch) -> dict[str, int]:
    """How many were read and refused; whatever happens, no more is read than the budget allows."""
    seen = {"read": 0, "refused": 0, "pieces": 0}
    made: list[budget.Counted] = []

    class Kept(budget.Counted):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr("data.pictures.Counted", Kept)

    @given(mutated())
    def look(data: bytes) -> None:
        made.clear()
        try:
            pixels = load_picture(data, 32, "p")
            assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
            seen["read"] += 1
        except UserError as error:
            assert str(error).startswith("p: not a picture") and str(error).isprintable() and len(str(error)) < 500
            seen["refused"] += 1
        for file in made:
            assert file.reads <= file.most + 1
            seen["pieces"] = max(seen["pieces"], file.reads)

    many(look, number)
    return seen


@pytest.mark.filterwarnings("ignore")  # pytest undoes the filters that pictures.py sets
def test_mutated_pictures_are_read_or_refused_in_one_line(monkeypatch):
    seen = check_mutated(250, monkeypatch)
    assert min(seen["read"], seen["refused"]) > 30, seen


@pytest.mark.slow
def test_many_mutated_pictures_are_read_or_refused_in_one_line(monkeypatch):
    seen = check_mutated(None, monkeypatch)
    print(seen)
    assert min(seen["read"], seen["refused"]) > 1000, seen
