"""Find the model to load, and load it once."""

from __future__ import annotations

import functools
import glob
from pathlib import Path
from typing import TYPE_CHECKING

from config import UserError
from data.kinds import is_picture
from weights.file import MODEL_FILE, weights_hash
from weights.known import KNOWN

if TYPE_CHECKING:
    from model import ImageCaptionModel


def load_model(source: str, device: str, base_dir: Path | None = None, allow_pickle: bool = False) -> ImageCaptionModel:
    """Load a model onto a device; the last one is cached, so that captioning many pictures loads it once. Adapters are
    merged into the models that they name, which are searched for in base_dir first."""
    path = Path(source)
    return _load_model(source, device, base_dir, allow_pickle, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=1)
def _load_model(source: str, device: str, base_dir: Path | None, allow_pickle: bool, written: int) -> ImageCaptionModel:
    from model import ImageCaptionModel

    return ImageCaptionModel.from_pretrained(source, base_dir, allow_pickle).to(device)


def is_url(name: str) -> bool:
    """Whether a name is a URL and not a path."""
    return "://" in name


def is_model(name: str) -> bool:
    """Whether a command-line argument names a model and not a picture."""
    path = Path(name)
    if name.endswith(".safetensors") or (path / "config.json").is_file():
        return True
    picture = path.exists() or is_url(name) or is_picture(path) or glob.has_magic(name)
    return not picture and (name in KNOWN or (name.count("/") == 1 and name[0] not in "./"))


def newest_model() -> str:
    """The newest model file in the current folder or in runs/. Raises UserError where there is none."""
    found = [*Path.cwd().glob("*.safetensors"), *Path("runs").glob(f"*/{MODEL_FILE}")]
    if not found:
        raise UserError("no model here: train one (python main.py --preset demo), or name one with --model")
    return str(max(found, key=lambda path: path.stat().st_mtime))


def weights_sha256(model: ImageCaptionModel) -> str:
    """SHA-256 of the weights in the model's file; for adapters only of these, even if they have been merged."""
    return model.merged["sha256"] if model.merged else weights_hash(model.own_state())
