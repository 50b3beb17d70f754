"""A Space of the Hugging Face Hub: the web page of app.py with a published model, for anybody to try.

Imports config and files. publish.py calls it, puts the project's code beside what it writes, and uploads the folder.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from config import UserError
from files import write_text

HERE = Path(__file__).resolve().parent
START = "serve.py"
SPACE_FILES = [START, "requirements.txt"]  # beside its README.md and the code


def write_space(folder: Path, repository: str, license: str, adapters: dict[str, Any] | None) -> None:
    """README.md, whose head is the Space's configuration, what starts the page, and its packages.

    Raises UserError where gradio is missing, whose version here is the one that the Space will have.
    """
    from huggingface_hub import SpaceCardData

    try:
        version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("a Space is made with gradio: pip install -r requirements-app.txt") from None
    title = repository.split("/")[1]
    about = SpaceCardData(
        title=title,
        emoji="🖼️",
        colorFrom="green",
        colorTo="gray",
        sdk="gradio",
        sdk_version=version,
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file=START,
        models=[repository],
        license=license,
        short_description="Captions for pictures",
    )
    text = f"Drop a picture on this page and read what [{repository}](https://huggingface.co/{repository}) says of it. Where "
    text += "that model is private, the Space needs a secret HF_TOKEN (Settings) that may read it."
    write_text(folder / "README.md", f"---\n{about.to_yaml()}\n---\n\n# {title}\n\n{text}\n")
    start = f'"""The web page, with the model {repository}."""\n\nimport sys\n\nfrom app import main\n\n'
    start += f'sys.argv[1:] = ["--model", "{repository}", "--host", "0.0.0.0"]\nsys.exit(main())\n'
    write_text(folder / START, start)
    needed = ["requirements.txt", *(["requirements-qlora.txt"] if adapters and adapters["quantized"] else [])]
    write_text(folder / "requirements.txt", "".join((HERE / name).read_text(encoding="utf-8") for name in needed))
