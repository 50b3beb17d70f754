"""Publish a model and its card on the Hugging Face Hub. Anybody can load it, in most cases with transformers alone.

    hf auth login
    python upload_to_hf.py user/name --model-path vit-gpt2-captioning.safetensors
    python upload_to_hf.py user/name --dry-run      writes the folder and sends nothing

The token comes from `hf auth login` or from HF_TOKEN. If run again, it sends only what has changed.
"""

from __future__ import annotations

import sys

from captioning.models import newest_model
from config import UserError
from flags import parse_flags
from publishing.config import UploadConfig
from utils import run_script


def main() -> None:
    """Run the command line; without arguments print its usage."""
    if not sys.argv[1:]:
        try:
            model = newest_model()
        except UserError:
            model = "vit-gpt2-captioning.safetensors"
        print(f"usage: python upload_to_hf.py user/name --model-path {model}\n       (--help shows every flag)")
        return
    config = parse_flags(UploadConfig, __doc__)
    from publishing.hub import publish  # imported late, so that --help does not wait for torch

    publish(config)


if __name__ == "__main__":
    run_script(main)
