"""Command-line options of upload_to_hf.py and auto_upload.py, apart from the code that needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from config import UserError
from publishing.space import gradio_version
from utils import first_line


@dataclass(kw_only=True)
class UploadConfig:
    """Publish a model on the Hugging Face Hub. The token comes from HF_TOKEN or from `hf auth login`."""

    repository: Annotated[str, tyro.conf.Positional]
    """user/name; created if it does not exist."""
    model_path: str | None = None
    """The model: a file, a folder or a Hub name (default: the newest file here)."""
    base_dir: Path | None = None
    """Folder to search for the pretrained models that a file of adapters names, before the Hub."""
    run: Path | None = None
    """Folder of the run that trained it, for the model card (default: the one in runs/ that has the same file)."""
    private: bool = False
    """Create a private repository, which only its owner sees."""
    revision: str | None = None
    """Upload to this branch instead of main."""
    pr: bool = False
    """Open a pull request instead of changing the repository."""
    onnx: bool = False
    """Add ONNX files for browsers (requirements/onnx.txt)."""
    space: bool = False
    """Also create a Gradio Space of the same name: the web page with this model, for anybody to try."""
    dry_run: bool = False
    """Write the folder upload/user/name (and upload/spaces/user/name) and stop: nothing is sent."""
    force: bool = False
    """Upload into a repository with files that this project did not write; files with the same names are replaced."""
    license: str = "apache-2.0"
    """Licence of the weights, as the Hub names it."""
    language: str | None = None
    """Language of the captions, such as en (default: known for the usual data sets)."""
    sample_pictures: bool = False
    """Show the run's photographs in the card; only if they may be redistributed. Drawn scenes are always shown."""
    benchmark: str | None = None
    """A benchmark of the Hub on which the run was tested, user/dataset:task:metric, for its leaderboard."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise UserError(f"repository {self.repository!r} is no valid Hub name: {first_line(error)}") from error
        if self.repository.count("/") != 1:
            raise UserError(f"repository {self.repository!r} must have two parts: user/name")
        if self.pr and self.revision:
            raise UserError("pr and revision exclude each other: pull requests are opened against main")
        if self.space and (self.pr or self.revision):
            raise UserError("space shows the model of the repository's main branch: leave out revision and pr")
        if self.space:
            gradio_version()  # before anything is sent
        if self.benchmark and (self.benchmark.count(":") != 2 or self.benchmark.split(":")[0].count("/") != 1):
            raise UserError(f"benchmark {self.benchmark!r}: it must be user/dataset:task:metric")
