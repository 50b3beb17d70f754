"""What a model's file holds besides weights, and where files are found: keys of pictures, shapes, tokenizers.

Imports config and utils; transformers by late imports. model.py and convert.py load and save through it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from config import UserError, ViTGPT2Config
from utils import hub_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_FILE = "vit-gpt2-captioning.safetensors"
METADATA_KEY = "vit_gpt2_captioning"
GPT2_TOKENIZER = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]
MOST_KEYS = 4_000_000  # of the pictures trained on: 43 MB of the 100 that a file's header may have; of more, a sample


def keys_to_text(keys: np.ndarray) -> str:
    """Keys of pictures (uint64), the MOST_KEYS smallest of them, as JSON can hold them."""
    return base64.b64encode(np.sort(keys)[:MOST_KEYS].astype("<u8").tobytes()).decode()


def keys_from_text(text: str) -> np.ndarray:
    """The inverse of keys_to_text."""
    return np.frombuffer(base64.b64decode(text), "<u8")


def find_model_file(source: str | os.PathLike[str]) -> Path:
    """The safetensors file that a path or a Hub name (user/repo) stands for. Raises UserError where there is none."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for wanted in (MODEL_FILE, "config.json"):
            if (path / wanted).is_file():
                return path / wanted
        raise UserError(f"{path}: this folder has no {MODEL_FILE} and no config.json: name a folder with a model")
    name = str(source)
    if path.suffix == ".safetensors" or name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such model file or folder: train one (python main.py) or name one")
    folder = hub_folder(name, [MODEL_FILE, "config.json"])
    for wanted in (MODEL_FILE, "config.json"):
        if (folder / wanted).is_file():
            return folder / wanted
    raise UserError(f"{name}: holds no {MODEL_FILE} and no config.json: name a repository with a model")


def read_model_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the header of a file of ours says (nothing, for other files of weights), and its tensors. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file that can be read ({error}): name another model") from error
    except ValueError as error:
        raise not_ours(path, error) from error
    if not isinstance(about, dict):
        raise not_ours(path, "its metadata is no JSON object")
    return about, weights


def not_ours(path: Path, reason: object) -> UserError:
    """What to raise for a file whose header is none of this project's."""
    return UserError(f"{path}: not a model of this project ({reason}): name another file")


def weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 of tensors by name, as fp32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_shapes(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raises UserError, naming the first three of each kind, unless both have the same names and shapes."""
    wrong = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    faults = {"missing": sorted(set(expected) - set(found)), "unknown": sorted(set(found) - set(expected)), "": wrong}
    parts = [f"{len(names)} tensors {kind}: {', '.join(names[:3])}" for kind, names in faults.items() if names]
    if parts:
        raise UserError(
            f"{path}: the weights do not fit the config ({'; '.join(parts)})".replace("tensors :", "tensors:")
        )


def config_fields_from_shapes(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The config of a file without metadata, read off its tensors; heads are 64 wide, as in ViT and GPT-2.

    Raises KeyError when a tensor of this model is missing.
    """

    def layers(part: str) -> int:
        return 1 + max((int(name.split(".")[2]) for name in weights if name.startswith(f"{part}.blocks.")), default=-1)

    vision_width, _, patch_size, _ = weights["encoder.patch_embedding.weight"].shape
    vocab_size, width = weights["decoder.wte.weight"].shape
    patches = weights["encoder.position_embeddings"].shape[1] - 1
    bridge: dict[str, Any] = {}
    if not any("ln_cross_attn" in name for name in weights):
        bridge["bridge"] = "prefix"
    if "pooling.queries" in weights:
        bridge["prefix_length"] = len(weights["pooling.queries"])
    return bridge | {
        "image_size": patch_size * math.isqrt(patches),
        "patch_size": patch_size,
        "vision_embed_dim": vision_width,
        "vision_num_layers": layers("encoder"),
        "vision_num_heads": max(1, vision_width // 64),
        "vocab_size": vocab_size,
        "max_length": len(weights["decoder.wpe.weight"]),
        "decoder_embed_dim": width,
        "decoder_num_layers": layers("decoder"),
        "decoder_num_heads": max(1, width // 64),
    }


def tokenizer_from_json(text: str, config: ViTGPT2Config) -> PreTrainedTokenizerFast:
    """A tokenizer from the text of its tokenizer.json, its special tokens named after the config's ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"the model's tokenizer cannot be read ({error})") from error
    assert config.start_token_id is not None and config.end_token_id is not None and config.pad_token_id is not None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokenizer.id_to_token(config.start_token_id),
        eos_token=tokenizer.id_to_token(config.end_token_id),
        pad_token=tokenizer.id_to_token(config.pad_token_id),
        model_max_length=config.text_positions,
    )


def gpt2_tokenizer(source: str = "gpt2") -> PreTrainedTokenizerFast:
    """GPT-2's byte-level BPE from a local folder (vocab.json and merges.txt) or the Hub.

    Raises UserError, one line, where neither can be had.
    """
    from transformers import GPT2Tokenizer

    try:
        folder = source if Path(source).is_dir() else hub_folder(source, GPT2_TOKENIZER)
        tokenizer = GPT2Tokenizer.from_pretrained(folder)
        if len(tokenizer) < 257:  # a folder without the files gives an empty one
            raise ValueError("no vocab.json and merges.txt there")
        return tokenizer
    except Exception as error:  # offline, absent, damaged: the Hub client and tokenizers raise many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tokenizer {source!r} cannot be loaded ({reason}): name a folder with vocab.json and merges.txt, "
            "or use --tokenizer train"
        ) from error
