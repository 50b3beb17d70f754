"""Convert models: to and from transformers' folders, to ONNX, and adapters into one merged model.

python convert.py to-transformers vit-gpt2-captioning.safetensors my-captioner
python convert.py from-transformers user/captioner vit-gpt2-captioning.safetensors
python convert.py onnx vit-gpt2-captioning.safetensors my-captioner-onnx
python convert.py merge img2gpt_epoch_1.safetensors merged.safetensors     adapters into their base models
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from safetensors import SafetensorError

from config import UserError
from flags import parse_flags
from utils import first_line, run_script

if TYPE_CHECKING:  # imported late, because it imports torch, for which --help would have to wait
    from model import ImageCaptionModel

Source = str | os.PathLike[str]  # a folder, or user/name on the Hugging Face Hub


def load_transformers(source: Source, allow_pickle: bool = False) -> ImageCaptionModel:
    """Load a model, in eval mode, from a folder or a Hub repository that transformers wrote: see read_transformers."""
    from model import ImageCaptionModel
    from weights.huggingface import read_transformers

    return ImageCaptionModel.from_saved(read_transformers(source, allow_pickle)).eval()


def save_transformers(model: ImageCaptionModel, directory: Source) -> None:
    """Write a folder that transformers can load: see write_transformers."""
    from weights.huggingface import write_transformers

    write_transformers(model.saved(), directory)


@dataclass(kw_only=True)
class ToTransformers:
    """Write a folder that transformers can load without this project."""

    model: Annotated[str, tyro.conf.Positional]
    """The model: a file, a folder or a Hub name."""
    directory: Annotated[Path, tyro.conf.Positional]
    """The folder to write: new, empty, or written by this command before."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> Path:
        """Convert the model; return the folder."""
        from model import ImageCaptionModel

        save_transformers(ImageCaptionModel.from_pretrained(self.model), self.directory)
        return self.directory


@dataclass(kw_only=True)
class FromTransformers:
    """Convert a folder or a Hub repository that transformers wrote."""

    source: Annotated[str, tyro.conf.Positional]
    """The folder, or user/name on the Hugging Face Hub."""
    output: Annotated[Path, tyro.conf.Positional]
    """The .safetensors file or folder to write; it must not exist yet."""
    allow_pickle: bool = False
    """Also read a pytorch_model.bin, which is a pickle, from a source you trust; only its tensors are read."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> Path:
        """Convert the model; return the file or folder."""
        if self.output.exists():
            raise UserError(f"{self.output}: already exists: name another file or folder")
        model = load_transformers(self.source, self.allow_pickle)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            (model.save_file if self.output.suffix == ".safetensors" else model.save_pretrained)(self.output)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.output}: cannot be written ({first_line(error)}): name another path") from error
        return self.output


@dataclass(kw_only=True)
class Onnx:
    """Write a folder with ONNX files, for onnxruntime and transformers.js."""

    model: Annotated[str, tyro.conf.Positional]
    """The model: a file, a folder or a Hub name."""
    directory: Annotated[Path, tyro.conf.Positional]
    """The folder to write: new, empty, or written by this script before."""
    int8: bool = False
    """Also write files with 8-bit weights, a quarter of the size."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> Path:
        """Convert the model; return the folder."""
        from captioning.onnx import save_onnx
        from model import ImageCaptionModel

        save_onnx(ImageCaptionModel.from_pretrained(self.model), self.directory, self.int8)
        return self.directory


@dataclass(kw_only=True)
class Merge:
    """Merge a file of adapters and its base models into one full model."""

    adapters: Annotated[str, tyro.conf.Positional]
    """The file of adapters, or a folder or a Hub name with one."""
    output: Annotated[Path, tyro.conf.Positional]
    """The .safetensors file to write."""
    base_dir: Path | None = None
    """Folder in which to look for the base models first."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> Path:
        """Merge the adapters; return the file."""
        from model import ImageCaptionModel

        ImageCaptionModel.from_pretrained(self.adapters, self.base_dir).save_file(self.output)
        return self.output


def main() -> None:
    """Run the command line."""
    commands: Any = ToTransformers | FromTransformers | Onnx | Merge
    print(f"written to {parse_flags(commands, __doc__).run()}")


if __name__ == "__main__":
    run_script(main)
