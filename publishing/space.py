"""A Space of the Hugging Face Hub: the web page of app.py with a published model, for anybody to try.

publishing/hub.py puts the project's code beside what is written here, and uploads the folder. The Space's log is where
its errors are read, so it starts as the scripts do.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from config import UserError
from utils import ROOT, write_text

START = "serve.py"
START_TEXT = '''"""The web page, with the model {repository}."""

import os
import sys

from app import main
from utils import run_script

if __name__ == "__main__":  # the processes that decode pictures import this file too
    names = os.environ.get("SPACE_HOST", "localhost").split(",")  # by which the Hub passes on what is asked
    sys.argv[1:] = ["--model", "{repository}", "--host", "0.0.0.0", "--allowed-hosts", *names]
    run_script(main)
'''
SPACE_FILES = [START, "requirements.txt"]  # beside its README.md and the code


def gradio_version() -> str:
    """The version here, which is the one that the Space will have. Raises UserError where there is none."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("a Space is made with gradio: pip install -r requirements/app.txt") from None


def write_space(folder: Path, repository: str, adapters: dict[str, Any] | None) -> None:
    """README.md, whose head is the Space's configuration, what starts the page, and its packages. Raises UserError."""
    from huggingface_hub import SpaceCardData

    title = repository.split("/")[1]
    about = SpaceCardData(
        title=title,
        emoji="🖼️",
        colorFrom="green",
        colorTo="gray",
        sdk="gradio",
        sdk_version=gradio_version(),
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file=START,
        models=[repository],
        license="apache-2.0",  # of the code, which is all that is there
        short_description="Captions for pictures",
    )
    text = f"Drop a picture on this page and read what [{repository}](https://huggingface.co/{repository}) says of it. Where "
    text += "that model is private, the Space needs a secret HF_TOKEN (Settings) that may read it."
    write_text(folder / "README.md", f"---\n{about.to_yaml()}\n---\n\n# {title}\n\n{text}\n")
    write_text(folder / START, START_TEXT.format(repository=repository))
    needed = ["requirements.txt", *(["requirements/qlora.txt"] if adapters and adapters["quantized"] else [])]
    lines = [line for name in needed for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    # Of the lists themselves only the packages; and a Space does not train.
    packages = [line for line in lines if not line.startswith(("#", "-r", "wandb"))]
    write_text(folder / "requirements.txt", "\n".join(packages) + "\n")
