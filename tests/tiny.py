"""The sizes of a model that tests can afford, in a file of its own: scripts that tests start have no conftest."""

from __future__ import annotations

from typing import Any

from config import ViTGPT2Config

SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "vision_embed_dim": 32,
    "vision_num_layers": 2,
    "vision_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_num_layers": 2,
    "decoder_num_heads": 2,
}


def tiny_config(**changes: Any) -> ViTGPT2Config:
    return ViTGPT2Config(**{"vocab_size": 50, "max_length": 24, "dropout": 0.0} | SIZES | changes)


def tiny_flags(prefix: str = "", **changes: Any) -> list[str]:
    """The sizes on a command line, with one layer each; vocabulary and length are the script's own."""
    sizes = SIZES | {"vision_num_layers": 1, "decoder_num_layers": 1} | changes
    return [word for name, size in sizes.items() for word in (f"--{prefix}{name.replace('_', '-')}", str(size))]
