"""Turn a picture file into the square tensor the model sees: one function for training, captioning and scoring.

Every usual format of photographs comes out as RGB, upright, on white; everything else is one UserError that names the
file. Never trusts a header: sizes are checked before pixels are decoded, and a picture counts as readable only after
its pixels have been read. Never runs an external program.
"""

from __future__ import annotations

import contextlib
import io
import operator
import os
import re
import warnings
import zlib
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from config import UserError, ViTGPT2Config
from data import budget
from data.budget import MAX_BESIDE, MAX_CHUNKS, MAX_GIF_READS, MAX_PIXELS, MAX_READS, MAX_SIDE, Counted, OverBudget
from data.kinds import HEIC
from utils import first_line, in_one_line

PictureSource = str | os.PathLike[str] | bytes | Image.Image  # bytes are a file's content

# Tried in this order; TGA has no signature and must be last. PPM includes its family, JPEG includes MPO.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "ICO", "PPM", "QOI", "SGI", "PCX", "TGA"]
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    FORMATS.append("HEIF")

JPEG_END = b"\xff\xd9"
PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"IEND")  # chunks needed for decoding
PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # starts of texts that may hold it
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # bytes that one may decompress to; all together 64 MiB

# Opening an icon, an animation or a WebP file already allocates its pixels, so Pillow must know the limit too. Pillow
# refuses more than twice its setting and warns below that. This and its other warnings (about unknown tags and the
# like, printed in the middle of an epoch) say nothing that an error or a decoded picture does not say.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", module=r"PIL\.")


def load_picture(source: PictureSource, size: int, name: str | None = None, resample: str = "bicubic") -> Tensor:
    """Load a picture as uint8 (3, size, size), squashed to a square as ViT's preprocessing does.

    Takes a path, a file's bytes or a Pillow image; messages call it `name` (default: its path, or "picture"). Of an
    animation the first frame is used. A JPEG is decoded at the smallest scale, in eighths, that is not smaller than the
    square; resample is bicubic or bilinear. Raises UserError, in one line that names the file, if it cannot be read.
    """
    if name is None:
        name = "picture" if isinstance(source, bytes | Image.Image) else str(source)
    try:
        pixels = torch.from_numpy(decode(source, size)).permute(2, 0, 1)  # channels last: the fast kernel
        # Not torch's contiguous(), nor its resize to the same size, which copies too: such a copy starts threads that
        # then wait for work by spinning, on the model's cores.
        if pixels.shape[1:] != (size, size):
            pixels = interpolate(pixels.unsqueeze(0), (size, size), mode=resample, antialias=True)[0]
        return torch.from_numpy(np.ascontiguousarray(pixels.numpy()))
    except FileNotFoundError:
        raise UserError(in_one_line(f"{name}: no such file")) from None
    except Exception as error:  # Pillow raises a dozen kinds for damaged files, SyntaxError among them
        raise UserError(in_one_line(f"{name}: not a picture that can be read ({reason(error)})")) from error


def prepare_picture(source: PictureSource, config: ViTGPT2Config, name: str | None = None) -> Tensor:
    """Load a picture for validation or captioning: resized and centre-cropped, uint8 (3, S, S)."""
    margin = (config.resize_size - config.image_size) // 2
    return crop(load_picture(source, config.resize_size, name, config.resample), margin, margin, config.image_size)


def crop(pixels: Tensor, top: int, left: int, size: int) -> Tensor:
    """Crop (3, R, R) to (3, size, size)."""
    return pixels[:, top : top + size, left : left + size]


def decode(source: PictureSource, size: int) -> NDArray[np.uint8]:
    """Decode to uint8 (H, W, 3), upright; H and W are the picture's or, for a JPEG, smaller but at least `size`."""
    if isinstance(source, Image.Image):
        return decode_pillow(source)
    data = source if isinstance(source, bytes) else budget.read_file(source)
    budget.check_size(len(data))
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"\xff\xd8\xff"):
        budget.check_jpeg(data)
        pixels = decode_jpeg(data, size)
        if pixels is None and not data.endswith(JPEG_END) and lacks_only_its_end(data):
            data += JPEG_END
            pixels = decode_jpeg(data, size)
        if pixels is not None:
            return pixels
    return decode_pillow(open_picture(io.BytesIO(data)))


def open_picture(file: BinaryIO) -> Image.Image:
    """Open a picture and read its header, but no pixels. Raises Pillow's errors, and OverBudget."""
    data, reads = file.read(), MAX_READS
    if "HEIF" not in FORMATS and re.match(rb"....ftyp(he|mif1|msf1)(?!.*avi[fs])", data[:32], re.DOTALL):
        raise ValueError(f"HEIC{HEIC['.heic']}")
    if data.startswith(b"\xff\xd8\xff"):
        budget.check_jpeg(data)
    if data.startswith((b"II", b"MM")):
        budget.check_tags(data)
    if data.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")):
        budget.check_jpeg2000(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big") > MAX_PIXELS:
            raise Image.DecompressionBombError  # before all of it is read
        data, reads = lean_png(io.BytesIO(data)), 4 * MAX_CHUNKS
    if data.startswith(b"GIF8"):
        reads = MAX_GIF_READS
    counted = Counted(data, reads)
    image = Image.open(counted, formats=FORMATS)
    codec, pixels = image.tile[0][0] if image.tile else "", image.width * image.height
    if codec == "bmp_rle" and len(data) > 4 * pixels + 8 * image.height + MAX_BESIDE:
        raise OverBudget(f"{len(data):,} bytes for {pixels:,} pixels")
    if codec in ("bmp_rle", "qoi", "ppm"):  # these read byte by byte: counting would make them twice as slow
        image.fp = io.BytesIO(data)
    counted.most += 2 * pixels  # strips and tiles are read one by one
    return image


def decode_jpeg(data: bytes, size: int) -> NDArray[np.uint8] | None:
    """Decode an intact JPEG in grey or colour the fast way; None for all others, which are left to Pillow."""
    import simplejpeg  # imported here: a machine that decodes no JPEG may lack it

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS or colours in ("CMYK", "YCCK"):
            return None
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size)
    except ValueError:  # also for a mere warning of libjpeg
        return None
    return upright(pixels, orientation(data)) if has_app1(data) else pixels


def lacks_only_its_end(data: bytes) -> bool:
    """Whether a JPEG, in any colours, has all of its pixels and lacks only the two bytes after them."""
    import simplejpeg

    lacking = {(-1, -1)}  # (component, coefficient): a file cut between two scans is blurred, without a warning
    for marker, body in budget.segments(data):
        if marker in (0xC0, 0xC1, 0xC2):  # Huffman codes: a missing bit does not go unnoticed
            lacking = {(component, index) for component in body[6::3] for index in range(64)}
        elif marker == 0xDA and len(body) > 5 and not body[-1] & 15:  # a scan that brings the last bit
            lacking -= {(component, index) for component in body[1:-3:2] for index in range(body[-3], body[-2] + 1)}
    with contextlib.suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if not lacking and height * width <= MAX_PIXELS:
            simplejpeg.decode_jpeg(data + JPEG_END, "CMYK" if colours in ("CMYK", "YCCK") else "RGB")
            return True
    return False


def has_app1(data: bytes) -> bool:
    """Whether a JPEG may have an APP1 segment, which holds EXIF and XMP: 100 times cheaper than parsing with Pillow."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xE1, 0xFF):
        if data[at + 1] == 0xDA:  # the pixels start
            return False
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return True  # or an unusual layout, which Pillow has to read


def lean_png(file: BinaryIO) -> bytes:
    """Reduce a PNG to its pixels and orientation, without profiles, texts and all else: Pillow refuses a picture if one
    of these is large or has a wrong checksum. Raises ValueError for a wrong checksum of pixels, which Pillow never
    checks, and OverBudget for too many chunks."""
    parts, number = [file.read(8)], 0
    while kind := (head := file.read(8))[4:]:
        if (number := number + 1) > MAX_CHUNKS:
            raise OverBudget(f"more than {MAX_CHUNKS:,} chunks")
        length = int.from_bytes(head[:4], "big")
        content = file.read(length + 4)
        right = zlib.crc32(content[:length], zlib.crc32(kind)) == int.from_bytes(content[length:], "big")
        if kind == b"IDAT" and len(content) == length + 4 and not right:
            raise ValueError("the checksum of its pixels is wrong")
        # A name one letter away from a pixel chunk's may be that chunk, damaged: Pillow decides.
        pixels = not kind[:1].islower() or any(sum(map(operator.ne, kind, each)) < 2 for each in PNG_PIXELS)
        turns = kind == b"eXIf" or content.startswith(PNG_ORIENTATION)
        if pixels or (turns and right):
            parts += [head, content]
        if kind == b"IEND":
            break
    return b"".join(parts)


def decode_pillow(image: Image.Image) -> NDArray[np.uint8]:
    """Decode a Pillow image, loaded or not, to uint8 (H, W, 3), upright."""
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    if max(image.size) > MAX_SIDE:
        raise OverBudget(f"more than {MAX_SIDE:,} pixels a side")
    image.load()  # before the orientation: a PNG's may follow its pixels, and loading turns a TIFF
    return upright(to_rgb(image), orientation(image))


def orientation(source: bytes | Image.Image) -> int:
    """EXIF's number for a picture's orientation, 1 to 8; 1 if the EXIF is damaged, so that the picture is not lost."""
    try:
        image = Image.open(Counted(source), formats=("JPEG",)) if isinstance(source, bytes) else source
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return value if value in range(1, 9) else 1


def upright(pixels: NDArray[np.uint8], stored: int) -> NDArray[np.uint8]:
    """Undo an EXIF orientation. The result is contiguous, so that the resize rounds equally for all eight."""
    if stored == 1:
        return pixels
    if stored >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if stored in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if stored in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a loaded Pillow image of any mode to uint8 (H, W, 3), with white behind transparency."""
    if image.mode[0] in "IF":
        grey = wide_to_bytes(np.asarray(image), image.mode, image.info.get("transparency"))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "La":
        image = image.convert("LA")  # Pillow converts La to nothing else
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def wide_to_bytes(values: NDArray, mode: str, transparent: object = None) -> NDArray[np.uint8]:
    """Convert grey of more than 8 bits to 8 bits. Pillow's conversion clips, and makes most pictures white.

    For integers white is 65535, or 4095 if no value is brighter: cameras and scanners store 12 bits in 16-bit files,
    and such a picture would be black. Floats have no convention: white is the first of 1, 255 and 65535 that no value
    exceeds. In a picture of either kind with values above 65535, the brightest value is white. Negative values and NaN
    are black; values equal to `transparent` (a PNG's key) are white.
    """
    wide = values.astype(np.float32)
    brightest = float(wide.max(where=np.isfinite(wide), initial=0.0))
    white = next(
        (w for w in ((1.0, 255.0, 65535.0) if mode == "F" else (4095.0, 65535.0)) if brightest <= w), brightest
    )
    grey = np.nan_to_num(wide * (255 / white)).round().clip(0, 255).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def reason(error: Exception) -> str:
    """Why a picture could not be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):  # its text shows a buffer's address
        return "damaged, or none of the formats " + ", ".join(FORMATS)
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return first_line(error)
