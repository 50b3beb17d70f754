"""Write a Space of the Hugging Face Hub: the web page of app.py with a published model, for anybody to try.

publishing/hub.py adds the project's code to the files written here, and uploads the folder. Its errors are read in the
Space's log, so it is started by run_script, as the scripts are.
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
    names = os.environ.get("SPACE_HOST", "localhost").split(",")  # host names of the Hub's requests
    sys.argv[1:] = ["--model", "{repository}", "--host", "0.0.0.0", "--allowed-hosts", *names]
    run_script(main)
'''
SPACE_FILES = [START, "requirements.txt"]  # beside its README.md and the code


def gradio_version() -> str:
    """The installed version, which the Space will have too. Raises UserError where gradio is not installed."""
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("a Space needs gradio: pip install -r requirements/app.txt") from None


def write_space(folder: Path, repository: str, adapters: dict[str, Any] | None) -> None:
    """Write README.md with the Space's configuration, the script that starts the page, and requirements.txt. Raises
    UserError where gradio is not installed."""
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
        license="apache-2.0",  # of the code: the Space holds nothing else
        short_description="Captions for pictures",
    )
    text = f"Drop a picture on this page to get a caption by [{repository}](https://huggingface.co/{repository}). If "
    text += "that model is private, the Space needs a secret HF_TOKEN (Settings) that may read it."
    write_text(folder / "README.md", f"---\n{about.to_yaml()}\n---\n\n# {title}\n\n{text}\n")
    write_text(folder / START, START_TEXT.format(repository=repository))
    needed = ["requirements.txt", *(["requirements/qlora.txt"] if adapters and adapters["quantized"] else [])]
    lines = [line for name in needed for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    # Only the packages of the lists, and not wandb: a Space does not train.
    packages = [line for line in lines if not line.startswith(("#", "-r", "wandb"))]
    write_text(folder / "requirements.txt", "\n".join(packages) + "\n")
