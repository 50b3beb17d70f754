"""Captions for pictures, from the command line or from Python.

    python example_usage.py photo.jpg vit-gpt2-captioning.safetensors
    python example_usage.py photos/ https://example.org/cat.jpg user/model
    python example_usage.py                     a drawn scene with the newest local model

    from example_usage import caption_image
    caption_image(image_path="photo.jpg", model_source="vit-gpt2-captioning.safetensors")

The last argument is the model when it ends in .safetensors, is a folder with config.json, or is user/name and no path
here; without one the newest local model is used. Decodes with 3 beams unless told otherwise; caption_image samples.
"""

from __future__ import annotations

import functools
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import UserError
from dataset import decode, prepare_picture
from model import ImageCaptionModel
from model_file import MODEL_FILE
from scenes import draw, make_scene
from utils import autocast, choose_device, choose_precision, parse_flags, run_script

PICTURE_SUFFIXES = set(Image.registered_extensions())
URL_SECONDS = 15
URL_BYTES = 50 << 20


def load_model(source: str, device: str, base_dir: Path | None = None) -> ImageCaptionModel:
    """The model on its device; the last one is kept, so that captioning many pictures loads it once. Adapters are merged
    into the models they name, which are looked for in base_dir first."""
    path = Path(source)
    return _load_model(source, device, base_dir, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=1)
def _load_model(source: str, device: str, base_dir: Path | None, written: int) -> ImageCaptionModel:
    return ImageCaptionModel.from_pretrained(source, base_dir).to(device)


def caption_pixels(model: ImageCaptionModel, pixels: Tensor, precision: str = "auto", **options: Any) -> list[str]:
    """Captions of pictures (N, 3, S, S) as prepare_picture gives them; options go to model.generate."""
    dtype, _ = choose_precision(precision, model.device)
    options.setdefault("int8", precision == "int8")
    with autocast(model.device, dtype):
        return decode(model.tokenizer, model.generate(pixels.to(model.device), **options).sequences)


def caption_image(
    image_path: str | Path,
    model_source: str | Path = MODEL_FILE,
    device: str = "cuda",
    max_length: int = 32,
    temperature: float = 1.0,
    do_sample: bool = True,
    top_k: int = 50,
    top_p: float = 0.95,
    base_dir: Path | None = None,
    **options: Any,
) -> str:
    """One caption for a picture (a path or a URL), by a model (a file, a folder or a Hub name user/repo).

    Samples by default; do_sample=False is greedy, or a beam search with num_beams=3. Where there is no GPU the device
    "cuda" means the best there is. Raises UserError for a picture or a model that cannot be read.
    """
    if device == "cuda" and not torch.cuda.is_available():
        device = "auto"
    model = load_model(str(model_source), str(choose_device(device)[0]), base_dir)
    pixels = prepare_picture(fetch(str(image_path)), model.config).unsqueeze(0)
    options |= {"max_length": max_length, "do_sample": do_sample}
    if do_sample:
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return caption_pixels(model, pixels, **options)[0]


def fetch(name: str) -> str | bytes:
    """A URL's bytes, at most 50 MiB; any other name as it is. Raises UserError where the URL gives nothing."""
    if "://" not in name:
        return name
    if not name.startswith(("http://", "https://")):
        raise UserError(f"{name}: only http and https addresses can be fetched")
    request = urllib.request.Request(name, headers={"User-Agent": "vit-gpt2-captioning"})
    try:
        with urllib.request.urlopen(request, timeout=URL_SECONDS) as response:
            content: bytes = response.read(URL_BYTES + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{name}: cannot be fetched ({error})") from error
    if len(content) > URL_BYTES:
        raise UserError(f"{name}: larger than {URL_BYTES >> 20} MiB")
    return content


def is_model(name: str) -> bool:
    """Whether a command-line argument names a model and not a picture."""
    path = Path(name)
    if name.endswith(".safetensors") or (path / "config.json").is_file():
        return True
    picture = path.exists() or "://" in name or path.suffix.lower() in PICTURE_SUFFIXES
    return not picture and name.count("/") == 1 and name[0] not in "./"


def newest_model() -> str:
    """The model file here or in runs/ that was written last. Raises UserError where there is none."""
    found = [*Path.cwd().glob("*.safetensors"), *Path("runs").glob(f"*/{MODEL_FILE}")]
    if not found:
        raise UserError("no model here: train one (python main.py --preset demo) or name one as the last argument")
    return str(max(found, key=lambda path: path.stat().st_mtime))


def picture_names(names: list[str]) -> Iterator[str]:
    """The names, with folders replaced by the pictures in them, in order."""
    for name in names:
        if not Path(name).is_dir():
            yield name
            continue
        inside = sorted(str(path) for path in Path(name).rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        if not inside:
            raise UserError(f"{name}: no pictures in this folder")
        yield from inside


@dataclass(kw_only=True)
class CaptionConfig:
    """Caption pictures: paths, folders or URLs, and the model last."""

    inputs: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """Pictures, folders, URLs; then the model (a .safetensors file, a folder or user/name)."""
    num_beams: int = 3
    """Beams; 1 is greedy."""
    do_sample: bool = False
    """Sample instead of searching with beams."""
    temperature: float = 1.0
    """Above 1 bolder, below 1 safer samples."""
    top_k: int = 50
    """Sample among this many best words only (0: all)."""
    top_p: float = 0.95
    """Sample among the fewest words that hold this much probability."""
    length_penalty: float = 1.0
    """Above 0, longer captions win more often in beam search."""
    max_length: int | None = None
    """Longest caption, in tokens (default: 32, or what the model can hold)."""
    batch_size: int = 16
    """Pictures captioned at a time."""
    base_dir: Path | None = None
    """Folder in which the pretrained models that a file of adapters names are looked for before the Hub is asked."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to run."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    """Of matrix products; auto: bf16 where it is measured to be faster. int8: on a CPU, for large models."""
    debug: bool = False
    """Show tracebacks of errors."""


def main() -> int:
    """The command line. Returns 1 when some of the pictures could not be captioned."""
    config = parse_flags(CaptionConfig, __doc__)
    inputs = list(config.inputs)
    source = inputs.pop() if inputs and is_model(inputs[-1]) else newest_model()
    model = load_model(source, str(choose_device(config.device)[0]), config.base_dir)
    if config.do_sample:
        options: dict[str, Any] = {"do_sample": True, "temperature": config.temperature}
        options |= {"top_k": config.top_k, "top_p": config.top_p}
    else:
        options = {"num_beams": config.num_beams, "length_penalty": config.length_penalty}
    options |= {"max_length": config.max_length}
    if not inputs:
        scene, _, rng = make_scene(0, "example", 0)
        print(f"a drawn scene ({scene.captions(rng)[0]}), captioned by {source}:")
        print(
            caption_pixels(model, prepare_picture(draw(scene, rng), model.config)[None], config.precision, **options)[0]
        )
        return 0

    names = list(picture_names(inputs))
    failed = 0
    bar = tqdm(total=len(names), unit="picture", disable=len(names) <= config.batch_size)
    for start in range(0, len(names), config.batch_size):
        readable, pixels = [], []
        for name in names[start : start + config.batch_size]:
            try:
                pixels.append(prepare_picture(fetch(name), model.config))
                readable.append(name)
            except UserError as error:
                message = str(error) if name in str(error) else f"{name}: {error}"
                tqdm.write(f"error: {message}", file=sys.stderr)
                failed += 1
        captions = caption_pixels(model, torch.stack(pixels), config.precision, **options) if pixels else []
        for name, caption in zip(readable, captions, strict=True):
            tqdm.write(caption if len(names) == 1 else f"{name}\t{caption}", file=sys.stdout)
        bar.update(len(readable))
    bar.close()
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
