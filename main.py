"""Trains a captioner: python main.py [--preset coco|demo|flickr8k|img2gpt] [any field of TrainConfig as a flag].

The command line is the config; --help shows every field with its sentence.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
from typing import Literal

from config import PRESETS, TrainConfig, UserError
from utils import parse_flags, run_script

# The defaults that people edit. A preset's own values, and flags, go before them.
BATCH_SIZE = 128
EPOCHS = 10
DEVICE: Literal["auto", "cuda", "mps", "cpu"] = "auto"


def parse_arguments(arguments: list[str] | None = None) -> TrainConfig:
    """The preset's config with the flags' values. Raises UserError for an unknown preset or values that do not fit."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="coco")
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    defaults = PRESETS[preset]
    if preset == "coco":
        defaults = dataclasses.replace(defaults, batch_size=BATCH_SIZE, epochs=EPOCHS)
    model = copy.copy(defaults.model)  # what follows from other fields must follow from the flags' values
    if model.resize_size == model.image_size:
        model.resize_size = None
    model.end_token_id = model.start_token_id = model.pad_token_id = None
    defaults = dataclasses.replace(defaults, device=DEVICE, model=model)
    from tyro.conf import OmitArgPrefixes

    return parse_flags(TrainConfig, __doc__, arguments, default=defaults, config=(OmitArgPrefixes,))


def main() -> int:
    """Parses the command line, trains, and on a terminal asks whether to publish; heavy imports come after --help."""
    config = parse_arguments()
    from train import train

    code = train(config)
    if code == 0 and not config.no_upload and int(os.environ.get("RANK", "0")) == 0:
        from publish import offer_upload

        offer_upload()
    return code


if __name__ == "__main__":
    run_script(main)
