"""Pictures of every kind, damaged ones and bombs among them; the expected pixels are worked out here with numpy."""

from __future__ import annotations

import colorsys
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, tiny_config
from PIL import Image
from processes import finished

from config import UserError
from data import pictures
from data.pictures import FORMATS, MAX_PIXELS, load_picture, open_picture, prepare_picture

CATS = SHARED / "cats" / "000000039769.png"
S = 32
ACROSS, DOWN = np.meshgrid(np.linspace(0, 1, S), np.linspace(0, 1, S))
SMOOTH = np.stack([ACROSS * 255, DOWN * 255, (1 - ACROSS) * 200], 2).round().astype(np.uint8)  # (S, S, 3)
GREY = SMOOTH[..., 0]
ALPHA = SMOOTH[..., 1]
LABELS = (np.arange(S * S).reshape(S, S) % 7).astype(np.uint8)
PALETTE = np.random.default_rng(0).integers(0, 256, (7, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return colours * share + 255 * (1 - share)


def furthest(source, expected: np.ndarray) -> float:
    """Greatest distance from expected (S, S, 3) or (S, S); at its own size a picture is not resized."""
    expected = np.broadcast_to(expected if expected.ndim == 3 else expected[..., None], (S, S, 3))
    pixels = load_picture(source, S)
    assert pixels.shape == (3, S, S) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    return float(np.abs(pixels.permute(1, 2, 0).numpy() - expected.astype(np.float64)).max())


def png(width: int, height: int, depth: int, colour: int, rows: bytes | None = None, *chunks: bytes) -> bytes:
    """A PNG by hand; without rows a black one, compressed bit by bit so that it never stands in memory."""
    channels = {0: 1, 2: 3}[colour]
    if rows is None:
        stream, row = zlib.compressobj(1), bytes(1 + (width * depth * channels + 7) // 8)
        packed = b"".join(stream.compress(row * 100) for _ in range(height // 100)) + stream.flush()
    else:
        packed = zlib.compress(rows)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [header, *chunks, b"IDAT" + packed, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def filtered(samples: np.ndarray) -> bytes:
    """(H, W[, C]) uint16 as PNG rows, each after a zero that says it is not filtered."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)


# Kinds of pictures


def test_lossless_files_of_every_kind():
    rgb, grey = Image.fromarray(SMOOTH), Image.fromarray(GREY)
    bits = Image.fromarray(((LABELS > 3) * 255).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
    labels = Image.fromarray(LABELS)
    labels.putpalette(PALETTE.tobytes())
    clear = bytes([0, 80, 255, 255, 160, 255, 255])
    rgba = Image.fromarray(np.dstack([SMOOTH, ALPHA]))
    la = Image.merge("LA", [grey, Image.fromarray(ALPHA)])
    coloured = PALETTE[LABELS]
    keyed = np.where((LABELS == 2)[..., None], 255, coloured)
    cases: dict[str, tuple[bytes, np.ndarray]] = {
        "grey PNG": (encoded(grey, "PNG"), GREY),
        "1-bit PNG": (encoded(bits, "PNG"), (LABELS > 3) * 255),
        "1-bit TIFF, fax": (encoded(bits, "TIFF", compression="group4"), (LABELS > 3) * 255),
        "palette PNG": (encoded(labels, "PNG"), coloured),
        "palette PNG, part clear": (
            encoded(labels, "PNG", transparency=clear),
            on_white(coloured, np.frombuffer(clear, np.uint8)[LABELS]),
        ),
        "palette GIF": (encoded(labels, "GIF"), coloured),
        "palette GIF, one colour clear": (encoded(labels, "GIF", transparency=2), keyed),
        "RGBA PNG": (encoded(rgba, "PNG"), on_white(SMOOTH, ALPHA)),
        "RGBA WEBP": (encoded(rgba, "WEBP", lossless=True, exact=True), on_white(SMOOTH, ALPHA)),
        "LA PNG": (encoded(la, "PNG"), on_white(SMOOTH[..., :1], ALPHA)),
        "RGB PNG, one colour clear": (
            encoded(Image.fromarray(coloured), "PNG", transparency=tuple(PALETTE[2].tolist())),
            keyed,
        ),
        "CMYK TIFF": (
            encoded(Image.merge("CMYK", [*rgb.split(), Image.fromarray(ALPHA)]), "TIFF", compression="tiff_lzw"),
            (255.0 - SMOOTH) * (255.0 - ALPHA[..., None]) / 255,
        ),
    }
    for kind in ("PNG", "WEBP", "TIFF", "BMP", "JPEG2000", "ICO", "PPM", "QOI", "SGI", "PCX", "TGA"):
        options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [(S, S)]}}.get(kind, {})
        cases[f"RGB {kind}"] = encoded(rgb, kind, **options), SMOOTH
    for name, (data, expected) in cases.items():
        assert furthest(data, expected) <= 2, name


def test_more_than_eight_bits_are_scaled_not_clipped():
    """Pillow's own conversion makes 16-bit pictures almost white."""
    wide = (ACROSS * 60000).round().astype(np.uint16)
    expected = wide / 257
    key = int(wide[0, 9])
    colour = np.stack([wide, wide[::-1], wide.T], 2)
    assert furthest(Image.fromarray(wide), expected) <= 1
    assert furthest(encoded(Image.fromarray(wide), "PNG"), expected) <= 1
    assert furthest(encoded(Image.fromarray(wide), "TIFF", compression="tiff_deflate"), expected) <= 1
    assert furthest(encoded(Image.fromarray(wide.astype(">u2")), "TIFF"), expected) <= 1
    assert furthest(b"P5 32 32 65535\n" + wide.astype(">u2").tobytes(), expected) <= 1
    assert furthest(encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"), expected) <= 1
    assert furthest(encoded(Image.fromarray(wide.astype(np.int32) * 1000), "TIFF"), ACROSS * 255) <= 1
    assert furthest(png(S, S, 16, 2, filtered(colour)), colour / 257) <= 1
    keyed = png(S, S, 16, 0, filtered(wide), b"tRNS" + struct.pack(">H", key))
    assert furthest(keyed, np.where(wide == key, 255, expected)) <= 1


def test_floats_find_their_white():
    for white, top in ((1, 1.0), (255, 200.0), (65535, 60000.0), (1e6, 1e6)):
        values = (ACROSS * top).astype(np.float32)
        expected = values / white * 255
        values[3, 5], expected[3, 5] = np.nan, 0
        values[4, 5], expected[4, 5] = -top, 0
        values[5, 5], expected[5, 5] = np.inf, 255
        assert furthest(encoded(Image.fromarray(values), "TIFF"), expected) <= 1, white


def test_colour_spaces():
    first, second, third = (SMOOTH[..., i].astype(np.float64) for i in range(3))
    bands = list(Image.fromarray(SMOOTH).split())

    red = first + 1.402 * (third - 128)
    blue = first + 1.772 * (second - 128)
    green = first - 0.344136 * (second - 128) - 0.714136 * (third - 128)
    assert furthest(Image.merge("YCbCr", bands), np.stack([red, green, blue], 2).clip(0, 255)) <= 2

    hsv = [[colorsys.hsv_to_rgb(*(value / 255)) for value in row] for row in SMOOTH]
    assert furthest(Image.merge("HSV", bands), np.array(hsv) * 255) <= 2

    lightness = np.full((S, S), 70.0)
    a, b = (ACROSS - 0.5) * 30, (DOWN - 0.5) * 30
    y = (lightness + 16) / 116
    xyz = np.stack([y + a / 500, y, y - b / 200], 2)
    xyz = np.where(xyz > 6 / 29, xyz**3, 3 * (6 / 29) ** 2 * (xyz - 4 / 29)) * [0.9642, 1.0, 0.8249]  # D50
    to_srgb = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.033454],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (xyz @ np.array(to_srgb).T).clip(0, 1)
    srgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear) * 255
    stored = [lightness * 2.55, a + 128, b + 128]
    lab = Image.merge("LAB", [Image.fromarray(np.round(band).astype(np.uint8)) for band in stored])
    assert furthest(lab, srgb) <= 3  # a and b are whole numbers here
    assert furthest(encoded(lab, "TIFF"), srgb) <= 3


def test_rare_modes_of_pillow():
    """La has no conversion to RGB in Pillow; PA's transparency was once ignored."""
    alpha, grey = Image.fromarray(ALPHA), Image.fromarray(GREY)
    expected = on_white(SMOOTH, ALPHA)
    rgba = Image.merge("RGBA", [*Image.fromarray(SMOOTH).split(), alpha])
    assert furthest(rgba, expected) <= 2
    assert furthest(rgba.convert("RGBa"), expected) <= 2
    assert furthest(Image.merge("LA", [grey, alpha]).convert("La"), on_white(SMOOTH[..., :1], ALPHA)) <= 2
    labels = Image.fromarray(LABELS)
    labels.putpalette(PALETTE.tobytes())
    both = labels.convert("PA")
    both.putalpha(alpha)
    assert both.mode == "PA" and furthest(both, on_white(PALETTE[LABELS], ALPHA)) <= 2
    labels.putpalette(np.hstack([PALETTE, np.full((7, 1), 51, np.uint8)]).tobytes(), "RGBA")
    assert furthest(labels, PALETTE[LABELS] * 0.2 + 255 * 0.8) <= 2


def test_lossy_files():
    rgb = Image.fromarray(SMOOTH)
    cmyk = np.dstack([SMOOTH, ALPHA // 2])
    in_print = (255.0 - SMOOTH) * (255.0 - cmyk[..., 3:]) / 255
    fine = {"quality": 100, "subsampling": 0}
    assert furthest(encoded(rgb, "JPEG", **fine), SMOOTH) <= 4
    assert furthest(encoded(rgb, "JPEG", **fine, progressive=True), SMOOTH) <= 4
    odd = encoded(rgb, "JPEG", **fine)
    scan = odd.index(b"\xff\xda")
    assert furthest(odd[:scan] + bytes(2) + odd[scan:], SMOOTH) <= 4  # which the fast decoder refuses
    assert furthest(encoded(Image.fromarray(GREY), "JPEG", quality=100), GREY) <= 4
    assert furthest(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", **fine), in_print) <= 4
    assert furthest(encoded(rgb, "WEBP", quality=100), SMOOTH) <= 12  # colours at half the resolution
    assert furthest(encoded(rgb, "AVIF", quality=100, subsampling="4:4:4"), SMOOTH) <= 4


def test_animations_give_their_first_frame():
    red, blue = (Image.new("RGB", (S, S), colour) for colour in ("red", "blue"))
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("AVIF", {})):
        data = encoded(red, kind, save_all=True, append_images=[blue], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert furthest(data, np.array(red)) <= 3, kind


# Size and orientation


def bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Keys' cubic (a = -1/2), widened by the reduction, along the first axis of pixels."""
    scale = len(pixels) / size
    width = max(scale, 1.0)
    at = np.abs((np.arange(len(pixels)) + 0.5)[None] - ((np.arange(size) + 0.5) * scale)[:, None]) / width
    near, far = 1.5 * at**3 - 2.5 * at**2 + 1, -0.5 * at**3 + 2.5 * at**2 - 4 * at + 2
    weights = np.where(at < 1, near, np.where(at < 2, far, 0.0))
    return np.einsum("sh,h...->s...", weights / weights.sum(1, keepdims=True), pixels)


def test_squashed_to_a_square_by_an_antialiased_cubic():
    rng = np.random.default_rng(1)
    for height, width in ((61, 37), (20, 90), (9, 11)):
        picture = rng.integers(60, 196, (height, width, 3), dtype=np.uint8)  # no overshoot to clip
        expected = bicubic(bicubic(picture.astype(np.float64), 24).swapaxes(0, 1), 24).swapaxes(0, 1)
        pixels = load_picture(encoded(Image.fromarray(picture), "PNG"), 24).permute(1, 2, 0).numpy()
        assert np.abs(pixels - expected).max() <= 2


def test_a_jpeg_decoded_at_a_smaller_scale_looks_the_same():
    """A JPEG comes out of its decoder at eighths of its size; too small a one, or one a pixel off, shows here."""
    across, down = np.meshgrid(np.linspace(0, 1, 517), np.linspace(0, 1, 389))
    picture = np.stack([across, down, 1 - across * down], 2) * 255
    expected = bicubic(bicubic(picture, 48).swapaxes(0, 1), 48).swapaxes(0, 1)
    data = encoded(Image.fromarray(picture.round().astype(np.uint8)), "JPEG", quality=98)
    assert pictures.decode(data, 48).shape == (49, 65, 3)
    assert np.abs(load_picture(data, 48).permute(1, 2, 0).numpy() - expected).max() <= 5


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The picture as a camera with this EXIF orientation stores it."""
    turned = {5: upright.swapaxes(0, 1), 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}
    turned |= {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]}
    return np.ascontiguousarray({**turned, 7: upright.swapaxes(0, 1)[::-1, ::-1]}[orientation])


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_gives_the_same_pixels(orientation):
    """Turning the small square instead of the picture would round differently."""
    upright = np.random.default_rng(2).integers(0, 256, (41, 26, 3), dtype=np.uint8)
    expected = load_picture(Image.fromarray(upright), 16)
    image = Image.fromarray(stored(upright, orientation))
    for kind, options in (
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ):
        data = encoded(image, kind, exif=exif(orientation), **options)
        assert torch.equal(load_picture(data, 16), expected), kind
        assert torch.equal(load_picture(Image.open(io.BytesIO(data)), 16), expected), kind
    upright = np.kron(SMOOTH, np.ones((3, 2, 1), np.uint8))
    expected = load_picture(Image.fromarray(upright), 16).int()
    data = encoded(Image.fromarray(stored(upright, orientation)), "JPEG", quality=98, exif=exif(orientation))
    assert (load_picture(data, 16).int() - expected).abs().max() <= 6
    cmyk = Image.fromarray(stored(upright, orientation)).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=98, exif=exif(orientation))
    assert (load_picture(data, 16).int() - expected).abs().max() <= 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest undoes the filters that pictures.py sets
def test_orientation_is_found_where_cameras_hide_it():
    """Behind other segments, in XMP alone, or in a tag that is damaged, which must not lose the picture."""
    image = Image.fromarray(SMOOTH)
    plain, turned = encoded(image, "JPEG", quality=98), encoded(image, "JPEG", quality=98, exif=exif(3))
    expected = load_picture(plain, S)
    half_turned = load_picture(turned, S)
    assert torch.equal(half_turned, expected.flip(1, 2))

    def segment(marker: int, content: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content

    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="3"/>')
    profile = segment(0xE2, b"ICC_PROFILE\0\x01\x01" + b"\xff\xda" * 500)
    assert torch.equal(load_picture(turned[:2] + profile + turned[2:], S), half_turned)
    assert torch.equal(load_picture(plain[:2] + profile + xmp + plain[2:], S), half_turned)
    for pad in (b"", b" "):  # behind a fill byte, and looking like a scan where a careless walk would land
        long = segment(0xE1, xmp[4:] + pad + b"\xff\xda" * 29000)
        assert torch.equal(load_picture(plain[:2] + b"\xff" + long + plain[2:], S), half_turned)
    for damaged in (b"", b"\xff" * 40, b"MM\0\x2a\xff\xff\xff\xff", b"II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0"):
        assert torch.equal(load_picture(plain[:2] + segment(0xE1, b"Exif\0\0" + damaged) + plain[2:], S), expected)
    tags = b"eXIf" + exif(3).tobytes().removeprefix(b"Exif\0\0")
    late = struct.pack(">I", len(tags) - 4) + tags + struct.pack(">I", zlib.crc32(tags))
    png_file = encoded(image, "PNG")
    assert furthest(png_file[:-12] + late + png_file[-12:], SMOOTH[::-1, ::-1]) == 0  # behind the pixels
    text = b"tEXtRaw profile type exif\0\n\n\nno hexadecimal"
    assert furthest(png(S, S, 8, 0, bytes(S * (S + 1)), text), np.zeros((S, S))) == 0
    for nonsense in (0, 9, 65535):
        assert torch.equal(load_picture(encoded(image, "JPEG", quality=98, exif=exif(nonsense)), S), expected)
        assert furthest(encoded(image, "PNG", exif=exif(nonsense)), SMOOTH) == 0


def test_sources_agree_and_are_left_alone(tmp_path):
    image = Image.fromarray(SMOOTH)
    for kind in ("PNG", "JPEG", "TIFF"):
        data = encoded(image, kind)
        (tmp_path / "p").write_bytes(data)  # what a file is called does not matter
        opened = Image.open(tmp_path / "p")
        for source in (tmp_path / "p", str(tmp_path / "p"), opened):
            assert (load_picture(source, 20).int() - load_picture(data, 20).int()).abs().max() <= 4
        assert opened.size == (S, S) and opened.getpixel((3, 3)) is not None


def test_prepare_picture_cuts_out_the_middle():
    config = tiny_config(resize_size=20)
    assert torch.equal(
        prepare_picture(Image.fromarray(SMOOTH), config), load_picture(Image.fromarray(SMOOTH), 20)[:, 2:18, 2:18]
    )


# Errors


def failure(source, **options) -> str:
    with pytest.raises(UserError) as error:
        load_picture(source, 16, **options)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)
    return str(error.value)


def test_unreadable_files_are_named_in_one_line(tmp_path):
    noise = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(noise[:900])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / "bomb.png").write_bytes(png(20000, 20000, 1, 0, b""))
    (tmp_path / "folder.jpg").mkdir()
    for name in ("cut.jpg", "text.png", "empty.gif", "bomb.png", "folder.jpg"):
        assert failure(tmp_path / name).startswith(f"{tmp_path / name}: not a picture that can be read (")
    assert "empty" in failure(tmp_path / "empty.gif") and "irectory" in failure(tmp_path / "folder.jpg")
    for name in ("absent.jpg", "no/where.jpg"):
        assert failure(tmp_path / name) == f"{tmp_path / name}: no such file"
    assert "directory" in failure(tmp_path / "text.png" / "x.png")  # a file where a folder should be
    assert failure("nul\0.png").startswith("nul\\x00.png: not a picture")
    assert failure("two\nlines.png") == "two\\nlines.png: no such file"
    failure("lone \udcff surrogate.png").encode()
    assert failure("x" * 5000).endswith("(file name too long)")  # the system's own text repeats the name


def test_bytes_and_images_are_called_by_their_name():
    assert failure(b"hello").startswith("picture: not a picture")
    assert failure(b"hello", name="row 7 of x.parquet").startswith("row 7 of x.parquet: not a picture")
    assert "empty" in failure(b"", name="y")
    broken = Image.open(io.BytesIO(encoded(Image.effect_noise((64, 64), 50), "PNG")[:900]))
    assert failure(broken, name="z").startswith("z: not a picture")


@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "p.png").write_bytes(encoded(Image.fromarray(SMOOTH), "PNG"))
    (tmp_path / "p.png").chmod(0)
    assert "permission denied" in failure(tmp_path / "p.png")


def test_running_out_of_memory_is_no_crash(monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory\nlong story")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(pictures, "interpolate", fail)
        assert "memory" in failure(Image.fromarray(SMOOTH), name="p")


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python code on its own, so that a crash is only its own, with the tests importable."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/data")])
    return finished("-W", "always", "-c", code, *arguments, environment={"PYTHONPATH": paths}, code=None)


def test_no_warning_is_printed():
    """Pillow warns of pictures of half its limit, and of what it finds odd about tags and animations."""
    done = in_a_process("import test_pictures; test_pictures.provoke_warnings()")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def provoke_warnings() -> None:
    Image.MAX_IMAGE_PIXELS = S * S - 1
    jpeg = encoded(Image.fromarray(SMOOTH), "JPEG")
    load_picture(jpeg[:2] + b"\xff\xe1\0\x0eExif\0\0MM\0\x2a\0\0" + jpeg[2:], S)  # tags that are cut off
    load_picture(png(S, S, 8, 0, bytes(S * (S + 1)), b"acTL" + bytes(8)), S)  # an animation without frames


# Undamaged pictures that Pillow refuses


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    """A PNG's chunk; its checksum is wrong in the bits of `wrong`."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


def with_chunks(data: bytes, before: bytes, after: bytes = b"") -> bytes:
    """A PNG with chunks before its pixels and after them."""
    start = data.index(b"IDAT") - 4
    return data[:start] + before + data[start:-12] + after + data[-12:]


NOISE = np.random.default_rng(0).bytes(1 << 20)
MUCH = zlib.compress(NOISE * 3, 1)
XMP = b"XML:com.adobe.xmp\0"
BESIDE = {
    "a large profile": chunk(b"iCCP", b"p\0\0" + MUCH),
    "a large zTXt": chunk(b"zTXt", b"k\0\0" + MUCH),
    "a large iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + MUCH),
    "a large XMP": chunk(b"iTXt", XMP + b"\1\0\0\0" + MUCH),
    "many texts": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 20))) * 70,
    **{f"a wrong checksum of {kind.decode()}": chunk(kind, b"ab\0\0cdefgh", 1) for kind in (b"tEXt", b"gAMA", b"prVt")},
    "a wrong checksum of eXIf": chunk(b"eXIf", b"MM\0*", 1 << 31),
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_png_is_not_judged_by_what_is_beside_its_pixels(kind, place):
    """Pillow refuses a picture for its profile, its texts and their checksums, where every viewer shows it."""
    small = encoded(Image.fromarray(SMOOTH), "PNG")
    data = with_chunks(small, BESIDE[kind]) if place == "before" else with_chunks(small, b"", BESIDE[kind])
    assert torch.equal(load_picture(data, S), load_picture(small, S))
    open_picture(io.BytesIO(data)).close()  # which is how an address's answer is judged


def test_texts_of_a_png_are_not_unpacked_without_a_limit():
    """A few kilobytes may hold gigabytes; only a text that may say the orientation is unpacked at all."""
    small, bomb = encoded(Image.fromarray(SMOOTH), "PNG"), zlib.compress(bytes(1 << 28))
    tracemalloc.start()
    load_picture(with_chunks(small, chunk(b"zTXt", b"k\0\0" + bomb) + chunk(b"iCCP", b"p\0\0" + bomb)), S)
    assert "MAX_TEXT_CHUNK" in failure(with_chunks(small, chunk(b"iTXt", XMP + b"\1\0\0\0" + bomb)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


def test_a_png_whose_pixels_are_damaged_is_still_refused():
    """A chunk of colours or transparency with a wrong checksum, or under a name that one flipped bit has made, would give
    a picture of other colours. Of pixels Pillow never looked at the checksum, and some bits gave others in silence."""
    palette = Image.fromarray(LABELS)
    palette.putpalette(PALETTE.tobytes())
    data = encoded(palette, "PNG", transparency=bytes([0, 80, 255, 255, 160, 255, 255]))
    for kind in (b"IHDR", b"PLTE", b"tRNS"):
        at = data.index(kind)
        size = struct.unpack(">I", data[at - 4 : at])[0]
        for place in (at + 4, at + 4 + size, *range(at, at + 4)):
            for bit in (1, 32):
                broken = bytearray(data)
                broken[place] ^= bit
                failure(bytes(broken))
    for place in range(data.index(b"IDAT") + 4, len(data) - 12):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        failure(bytes(broken))
    for missing in range(1, 17):  # but a file that was cut behind its pixels has them all
        assert torch.equal(load_picture(data[:-missing], S), load_picture(data, S))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0, "optimize": True}]
)
def test_a_jpeg_that_lacks_only_its_last_two_bytes(mode, options):
    """All of its pixels are there. One byte less, and some of them may be made up; a progressive file that was cut between
    two scans decodes without a warning, and blurred."""
    noise = np.random.default_rng(1).integers(0, 256, (10, 13, 3), dtype=np.uint8)
    photo = Image.fromarray(np.kron(noise, np.ones((9, 9, 1), np.uint8))).convert(mode)
    data = encoded(photo, "JPEG", **options, exif=exif(6))
    for missing in (1, 2):
        assert torch.equal(load_picture(data[:-missing], 24), load_picture(data, 24))
        assert torch.equal(load_picture(data[:-missing], 224), load_picture(data, 224))
    for missing in (3, 4, 7, 20, 100, 500):
        failure(data[:-missing])
    for scan in re.finditer(rb"\xff(?=[\xc4\xda])", data[700:]):
        failure(data[: 700 + scan.start()])


def test_heic_from_telephones():
    """Turned by the file's own transformation; the EXIF that says the same again is not to turn it once more."""
    pytest.importorskip("pillow_heif", reason="needs requirements/heic.txt")
    photo = Image.fromarray(np.kron(SMOOTH, np.ones((2, 2, 1), np.uint8)))
    for stored in range(1, 9):
        heic = load_picture(encoded(photo, "HEIF", quality=-1, chroma=444, exif=exif(stored).tobytes()), 64).int()
        assert (heic - load_picture(encoded(photo, "PNG", exif=exif(stored)), 64).int()).abs().max() <= 2


def test_without_pillow_heif_a_heic_says_what_to_do(monkeypatch):
    """It was called damaged, whatever its name."""
    monkeypatch.setattr(pictures, "FORMATS", [kind for kind in FORMATS if kind != "HEIF"])
    for brand in (b"heic", b"heix", b"mif1"):
        data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(100)
        assert failure(data, name="p") == "p: not a picture that can be read (HEIC (pip install pillow-heif))"
    assert "pip" not in failure(b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100))
    load_picture(encoded(Image.fromarray(SMOOTH), "AVIF"), S)


# Bombs


def grey_jpeg(side: int) -> bytes:
    """Grey all over: every block is two bits for the brightness, unchanged, and four that end it."""
    small = encoded(Image.new("L", (8, 8), 128), "JPEG")
    size = small.index(b"\xff\xc0") + 5
    start = small.index(b"\xff\xda") + 10
    blocks = (side // 8) ** 2
    scan = b"\x28\xa2\x8a" * (blocks // 4 + 1)
    return small[:size] + struct.pack(">HH", side, side) + small[size + 4 : start] + scan + b"\xff\xd9"


def bombs() -> dict[str, bytes]:
    """Small files of 81 to 400 million pixels; some whose outer header lies about it."""
    large = png(9000, 9000, 8, 0)
    webp = encoded(Image.new("RGB", (64, 64), "red"), "WEBP", lossless=True)
    assert webp[12:16] == b"VP8L"
    frame = b"\x21\xf9\x04\x08\0\0\0\0\x2c\0\0\0\0" + struct.pack("<HH", 9000, 9000) + b"\0\x08\0\x3b"
    jp2 = bytearray(encoded(Image.new("RGB", (64, 64), "red"), "JPEG2000"))
    jp2_liar = bytearray(jp2)
    siz = jp2.index(b"\xff\x51")
    for header in (jp2, jp2_liar):
        header[siz + 6 : siz + 14] = header[siz + 22 : siz + 30] = struct.pack(">II", 20000, 20000)
    ihdr = jp2.index(b"ihdr")
    jp2[ihdr + 4 : ihdr + 12] = struct.pack(">II", 20000, 20000)
    avif = bytearray(encoded(Image.new("RGB", (64, 64), "red"), "AVIF"))
    ispe = avif.index(b"ispe")
    avif[ispe + 8 : ispe + 16] = struct.pack(">II", 12000, 12000)
    stream = zlib.compressobj(1)
    strip = b"".join(stream.compress(bytes(900_000)) for _ in range(90)) + stream.flush()
    tags = (
        (256, 9000),
        (257, 9000),
        (258, 8),
        (259, 8),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 9000),
        (279, len(strip)),
    )
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags)
    run = (b"\xff\0" * 35 + b"\x4b\0" + b"\0\0") * 9000
    bmp = struct.pack("<IiiHHIIiiII", 40, 9000, 9000, 1, 8, 1, len(run), 0, 0, 256, 0) + bytes(1024)
    return {
        "PNG": large,
        "PNG of 400 million": png(20000, 20000, 1, 0),
        "ICO, says 16 x 16": struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 8, len(large), 22) + large,
        "GIF": b"GIF89a" + struct.pack("<HHBBB", 9000, 9000, 0, 0, 0) + frame,
        "GIF, says 1 x 1": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame,
        "WEBP": webp[:21] + struct.pack("<I", 8999 | 8999 << 14) + webp[25:],
        "WEBP of 268 million": webp[:21] + struct.pack("<I", 16382 | 16382 << 14) + webp[25:],
        "TIFF": b"II\x2a\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + bytes(4),
        "BMP": b"BM" + struct.pack("<IHHI", 14 + len(bmp) + len(run), 0, 0, 14 + len(bmp)) + bmp + run,
        "JPEG": grey_jpeg(9000),
        "JPEG of 400 million": grey_jpeg(20000),
        "JPEG2000": bytes(jp2),
        "JPEG2000, says 64 x 64": bytes(jp2_liar),
        "AVIF": bytes(avif),
        "PPM": b"P5 20000 20000 255\n" + bytes(1000),
        "QOI": b"qoif" + struct.pack(">IIBB", 9000, 9000, 3, 0) + b"\xfd" * 1_306_452,
        "TGA": struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 9000, 9000, 24, 0) + b"\xff\0\0\0" * 632_813,
    }


def peak_memory() -> float:
    """MB this process has held at most; getrusage would count its parent's as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def set_off_bombs(directory: str) -> None:
    small = Image.fromarray(SMOOTH)
    for kind in FORMATS:  # what Pillow needs to import is not the bomb's
        load_picture(encoded(small, kind), 224)
    growth, before = {}, peak_memory()
    for path in sorted(Path(directory).iterdir()):
        try:
            load_picture(path, 224)
            message = "decoded"
        except UserError as error:
            message = str(error)
        growth[path.name] = peak_memory() - before, message
        before = peak_memory()
    print(json.dumps(growth))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_bombs_are_turned_away_before_they_take_memory(tmp_path):
    """Opening an icon or a GIF decodes or allocates it, so a check after opening comes too late."""
    files = bombs()
    for name, data in files.items():
        assert len(data) < 5_000_000
        (tmp_path / name).write_bytes(data)
    done = in_a_process("import sys, test_pictures; test_pictures.set_off_bombs(sys.argv[1])", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    growth = json.loads(done.stdout)
    assert growth.keys() == files.keys()
    for name, (_, message) in growth.items():
        assert f"{tmp_path / name}: not a picture that can be read (" in message
        assert "pixels" in message or name == "JPEG2000, says 64 x 64", message
    assert sum(megabytes for megabytes, _ in growth.values()) < 50, growth


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_lets_large_photographs_pass():
    assert 60_000_000 <= MAX_PIXELS < 81_000_000
    assert load_picture(png(7000, 7000, 1, 0), 16).max() == 0


# Damage


def seeds() -> dict[str, bytes]:
    """One or two files of every format."""
    rng = np.random.default_rng(3)
    noisy = Image.fromarray(
        (np.kron(SMOOTH, np.ones((2, 3, 1))) * 0.8 + rng.integers(0, 50, (64, 96, 3))).astype(np.uint8)
    )
    palette = noisy.quantize(16)
    files = {kind: encoded(noisy, kind) for kind in FORMATS}
    files["JPEG, progressive"] = encoded(noisy, "JPEG", progressive=True, exif=exif(6))
    files["JPEG, CMYK"] = encoded(noisy.convert("CMYK"), "JPEG")
    files["PNG, palette"] = encoded(palette, "PNG", transparency=3, exif=exif(8))
    files["WEBP, animated"] = encoded(noisy, "WEBP", save_all=True, append_images=[palette.convert("RGB")])
    files["GIF, animated"] = encoded(noisy, "GIF", save_all=True, append_images=[noisy.rotate(90)], disposal=2)
    for compression in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits"):
        files[f"TIFF, {compression}"] = encoded(noisy, "TIFF", compression=compression, exif=exif(5))
    files["BMP, palette"] = encoded(palette, "BMP")
    return files


def mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, the end cut off, a piece removed, doubled or swapped for another file's, or a number overwritten."""
    out = bytearray(data)
    start = int(rng.integers(len(out)))
    length = int(rng.integers(1, 200))
    match int(rng.integers(6)):
        case 0:
            for at in rng.integers(0, len(out), int(rng.integers(1, 12))):
                out[at] ^= 1 << int(rng.integers(8))
        case 1:
            del out[start:]
        case 2:
            del out[start : start + length]
        case 3:
            out[start:start] = out[start : start + length]
        case 4:
            at = int(rng.integers(len(other)))
            out[start : start + length] = other[at : at + length]
        case 5:
            width = int(rng.choice([1, 2, 4]))
            at = int(rng.integers(min(len(out) - 4, 120)))
            values = [bytes(width), b"\xff" * width, rng.bytes(width), b"\x7f" + b"\xff" * (width - 1)]
            out[at : at + width] = values[int(rng.integers(4))]
    if out[12:16] == b"IHDR" and len(out) > 33 and rng.random() < 0.5:
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))  # or its checksum ends the story every time
    return bytes(out)


def damage(count: int) -> None:
    """Loads damaged pictures and prints what became of them."""
    rng = np.random.default_rng(4)
    files = seeds()
    names = list(files)
    faults: list[str] = []
    decoded, slowest = 0, (0.0, "")
    for number in range(count):
        kind = names[number % len(names)]
        data = mutate(files[kind], files[names[int(rng.integers(len(names)))]], rng)
        name = f"{kind} {number}"
        print(name, file=sys.stderr)  # the last line tells what crashed
        begun = time.perf_counter()
        try:
            pixels = load_picture(data, 24, name)
            decoded += 1
            if pixels.shape != (3, 24, 24) or pixels.dtype != torch.uint8:
                faults.append(f"{name}: {pixels.shape}")
        except UserError as error:
            if not str(error).startswith(f"{name}: not a picture that can be read (") or "\n" in str(error):
                faults.append(f"{name}: {error}")
            if "checksum of its pixels" not in str(error) and pillow_reads(data):
                faults.append(f"{name}: Pillow can read it")
        slowest = max(slowest, (time.perf_counter() - begun, name))
    print(json.dumps({"decoded": decoded, "faults": faults, "slowest": slowest}))


def pillow_reads(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return False
            image.load()
            return True
    except Exception:
        return False


def check_damaged(count: int) -> None:
    assert len(FORMATS) >= 12
    done = in_a_process("import sys, test_pictures; test_pictures.damage(int(sys.argv[1]))", count)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert not result["faults"]
    assert result["slowest"][0] < 2, result["slowest"]
    assert count * 0.1 < result["decoded"] < count * 0.9  # damage that shows, not rubble


def test_damaged_pictures():
    check_damaged(1000)


@pytest.mark.slow
def test_many_damaged_pictures():
    check_damaged(20000)


THREADS = """
import os, sys, threading
from config import ViTGPT2Config
from data.pictures import prepare_picture

def prepare():
    before = len(os.listdir("/proc/self/task"))
    for size in map(int, sys.argv[2:]):
        prepare_picture(sys.argv[1], ViTGPT2Config(image_size=size, patch_size=16))
    print(len(os.listdir("/proc/self/task")) - before)

thread = threading.Thread(target=prepare)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux")
def test_a_picture_is_prepared_in_one_thread(tmp_path):
    """torch's copies of pictures started a second one, which waits for work by spinning: folders were captioned at 59 % of
    the model's speed. Also where the picture has the model's size, as then a resize was a copy."""
    Image.effect_noise((256, 256), 50).convert("RGB").save(tmp_path / "photo.jpg")
    environment = dict.fromkeys(name for name in os.environ if name.startswith("OMP_"))
    command = ("-c", THREADS, tmp_path / "photo.jpg", "256", "224", "512")
    done = finished(*command, cwd=ROOT, environment=environment)
    assert done.stdout == "0\n", done.stdout + done.stderr
