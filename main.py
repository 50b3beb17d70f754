#!/usr/bin/env python
"""Train a captioner: python main.py [--preset demo|flickr8k|coco|...] [any field of TrainConfig as a flag]."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

from config import FILLED_IN, PRESETS, Basics, TrainConfig, UserError
from flags import parse_flags
from utils import exit_on_interrupt, raise_on_interrupt, run_script, writable_directory

# Defaults for you to edit. A preset's values and flags override them.
BATCH_SIZE = 128
EPOCHS = 10
DEVICE: Literal["auto", "cuda", "mps", "cpu"] = "auto"
# Flags that --help shows. Those that only programs set are not even in --help-all.
COMMON = [field.name for field in dataclasses.fields(Basics)]
INTERNAL = ("language_model", "prompt_ids", "start_token_id", "end_token_id", "pad_token_id")
# Short names for a switch with three values: by default the device decides.
SWITCHES = {"--compile": "--compile=True", "--no-compile": "--compile=False"}


def parse_arguments(arguments: list[str] | None = None) -> TrainConfig:
    """The preset's config with the flags' values. Raises UserError for an unknown preset or invalid values."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="coco")
    preset = first.parse_known_args(arguments)[0].preset
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    defaults = PRESETS[preset]
    if preset == "coco":
        defaults = dataclasses.replace(defaults, batch_size=BATCH_SIZE, epochs=EPOCHS)
    model = copy.copy(defaults.model)  # fields that follow from others must follow from the flags' values
    if model.resize_size == model.image_size:
        model.resize_size = FILLED_IN
    model.end_token_id = model.start_token_id = model.pad_token_id = FILLED_IN
    defaults = dataclasses.replace(defaults, device=DEVICE, model=model)
    given = sys.argv[1:] if arguments is None else arguments
    return parse_in_groups(defaults, [SWITCHES.get(argument, argument) for argument in given])


def parse_in_groups(defaults: TrainConfig, arguments: list[str] | None) -> TrainConfig:
    """The defaults with the flags' values; --help shows the flags in config.py's groups."""
    from tyro.conf import OmitArgPrefixes

    groups: dict[str, Any] = {}
    for kind in reversed(TrainConfig.__bases__):
        groups[kind.__name__.lower()] = kind(**{f.name: getattr(defaults, f.name) for f in dataclasses.fields(kind)})
    groups |= {"augmentation": defaults.augmentation, "model": defaults.model}
    described = [(name, type(group), dataclasses.field()) for name, group in groups.items()]
    kinds: type[Any] = dataclasses.make_dataclass("Flags", described, kw_only=True)
    with warnings.catch_warnings():  # tyro's, of defaults that are None until they are filled in
        warnings.filterwarnings("ignore", "The field .* is annotated with type")
        default, names = kinds(**groups), (OmitArgPrefixes,)
        flags = parse_flags(kinds, __doc__, arguments, COMMON, INTERNAL, default=default, config=names)
    values: dict[str, Any] = {}
    for name, group in vars(flags).items():
        values |= {name: group} if name in ("augmentation", "model") else vars(group)
    return TrainConfig(**values)


def for_any_layout(config: TrainConfig) -> TrainConfig:
    """The config; its dataset is auto where the data is the user's, and not in the layout of the preset's data. COCO 2017
    does not replace Karpathy's split of it: it trains on nearly all of that split's test pictures."""
    from data.layouts import LAYOUTS
    from data.sources import recognise

    if config.data_dir and config.dataset == PRESETS[config.preset].dataset and config.dataset in LAYOUTS:
        try:
            recognise(config.data_dir.expanduser(), dataset=config.dataset)
        except UserError:
            if config.dataset == "karpathy" and any(config.data_dir.expanduser().glob("annotations/captions_*.json")):
                raise
            return dataclasses.replace(config, dataset="auto")
    return config


def main() -> int:
    """Parse the command line, train, and on a terminal ask whether to publish. Heavy imports come after --help."""
    config = for_any_layout(parse_arguments())
    if config.plan:
        from training.cards import plan_for_cards

        print(plan_for_cards(config))
        return 0
    writable_directory(Path(), "the finished model is saved there, so start the command in another folder")
    from train import train

    raise_on_interrupt()
    code = train(config)
    if code == 0 and not config.no_upload and int(os.environ.get("RANK", "0")) == 0:
        from publishing.hub import offer_upload

        offer_upload()
    return code


if __name__ == "__main__":
    exit_on_interrupt()  # until everything is imported
    run_script(main, without_reader=True)
