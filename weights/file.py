"""Find, read and write files of a captioner: config, tensors, tokenizer, and the pictures it was trained on.

It builds no model: it uses only the tensors' names and shapes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import UserError, ViTGPT2Config
from decoding.foreign import check_ids, refused
from utils import atomic, clear_left, first_line, hub_folder, json_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

MODEL_FILE = "vit-gpt2-captioning.safetensors"
METADATA_KEY = "vit_gpt2_captioning"
GPT2_TOKENIZER = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]
MOST_KEYS = 4_000_000  # pictures trained on: 43 of the 100 MB that a file's header may have; of more, a sample


@dataclass
class Saved:
    """The record of a captioner that is read from and written to files."""

    config: ViTGPT2Config
    tensors: dict[str, Tensor]
    """By this project's names; for adapters, only them and the layers that no pretrained model provides."""
    tokenizer: PreTrainedTokenizerFast | None = None
    trained_on: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Keys of the pictures it was trained on (CaptionTable.keys)."""
    adapters: dict[str, Any] | None = None
    """For adapters: their base models, and how they were made."""
    path: Path = Path()
    """The path to show in messages."""
    partial: bool = False
    """Whether missing tensors get random values."""


def part_of(name: str) -> str:
    """Where a parameter belongs: encoder, decoder, or new (what joins them, which no pretrained model provides)."""
    if "crossattention." in name or "ln_cross_attn." in name or name.startswith(("enc_to_dec_proj.", "pooling.")):
        return "new"
    return name.split(".")[0]


def layer_of(name: str) -> int | None:
    """The number of a parameter's layer: "encoder.blocks.3.fc1.bias" -> 3; None if it is in no layer."""
    return next((int(word) for word in name.split(".") if word.isdigit()), None)


def keys_to_text(keys: np.ndarray) -> str:
    """Encode keys of pictures (uint64) as text for JSON; at most the MOST_KEYS smallest."""
    return base64.b64encode(np.sort(keys)[:MOST_KEYS].astype("<u8").tobytes()).decode()


def keys_from_text(text: str) -> np.ndarray:
    """Decode the text of keys_to_text."""
    return np.frombuffer(base64.b64decode(text), "<u8")


def find_model_file(source: str | os.PathLike[str]) -> Path:
    """Find the model file or config.json of a path or a Hub name (user/repo). Raises UserError if there is none."""
    path, name = Path(source), str(source)
    if path.is_file():
        return path
    local = path.is_dir()
    if not local and (path.suffix == ".safetensors" or name.count("/") != 1 or name.startswith((".", "/"))):
        raise UserError(f"{name}: no such model file or folder: train one (python main.py) or name one")
    folder = path if local else hub_folder(name, [MODEL_FILE, "config.json"])
    for wanted in (MODEL_FILE, "config.json"):
        if (folder / wanted).is_file():
            return folder / wanted
    found, kind = (f"{path}: this folder has", "folder") if local else (f"{name}: this repository has", "repository")
    raise UserError(f"{found} no {MODEL_FILE} and no config.json: name a {kind} with a model")


def read_model_file(path: Path) -> Saved:
    """Read a model file of this project, or a safetensors file with the weights of such a model. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = plain_names({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  # not a dict
            about = json_of((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError) as error:
        fault = lfs_advice(path) or f"not a readable safetensors file ({first_line(error)}): name another model"
        raise UserError(f"{path}: {fault}") from error
    except ValueError as error:
        raise not_ours(path, first_line(error)) from error
    if not isinstance(about, dict):
        raise not_ours(path, "its metadata is not a JSON object")
    try:
        config = ViTGPT2Config.from_dict(about.get("config") or config_fields_from_shapes(tensors))
        trained_on = keys_from_text(about.get("trained_on", ""))
        tokenizer = tokenizer_from_json(json.dumps(about["tokenizer"]), config) if "tokenizer" in about else None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise not_ours(path, first_line(error)) from error
    return Saved(config, tensors, tokenizer, trained_on, about.get("adapters"), path)


def plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that torch.compile and DistributedDataParallel add to every name."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in tensors.items()}


def lfs_advice(path: Path) -> str:
    """Advice if the file is only a Git LFS pointer, as in a clone made without Git LFS; else an empty text."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the file itself: run git lfs pull to download it"
    return ""


def write_model_file(saved: Saved, path: Path) -> None:
    """Write one safetensors file, atomically. Equal models give equal files."""
    about: dict[str, Any] = {"config": saved.config.to_dict()}
    if saved.tokenizer is not None:
        about["tokenizer"] = json.loads(saved.tokenizer.backend_tokenizer.to_str())
    if saved.adapters is not None:
        about["adapters"] = saved.adapters
    if len(saved.trained_on):
        about["trained_on"] = keys_to_text(saved.trained_on)
    # Only one entry, because safetensors writes several in an order that changes from call to call.
    metadata = {METADATA_KEY: json.dumps(about, sort_keys=True)}
    write_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in saved.tensors.items()}, path, metadata)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, all of it or nothing, with the permissions of any other file."""
    from safetensors.torch import save_file

    clear_left(path)
    with atomic(path) as unfinished:
        permissions = unfinished.stat().st_mode
        save_file(tensors, unfinished, metadata=metadata)
        unfinished.chmod(permissions)  # since safetensors 0.8 nobody else may read what it writes


def not_ours(path: Path, reason: object) -> UserError:
    """The error for a file whose header is not from this project."""
    return UserError(f"{path}: not a model of this project ({reason}): name another file")


def weights_hash(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the names and the fp32 values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_shapes(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise UserError unless both have the same names and shapes; it names the first three faults of each kind."""
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


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for the first tensor with NaN or infinity in fp32: with it, every caption would be "!"."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            ends = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()  # there is no aminmax in fp8
            if not all(map(math.isfinite, (end.float().item() for end in ends))):
                raise UserError(
                    f"{path}: {name} contains NaN or infinity: damaged, or its training failed; name another model"
                )


def config_fields_from_shapes(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Config fields of a file without metadata, from its tensors' shapes; heads are 64 wide, as in ViT and GPT-2.

    Raises KeyError if a tensor of such a model is missing.
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
    """Make a tokenizer from the text of a tokenizer.json, with the special tokens that the config's ids name."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    with refused("the model's tokenizer cannot be read"):
        check_ids(text)
        tokenizer = Tokenizer.from_str(text)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=tokenizer.id_to_token(config.start_token_id),
            eos_token=tokenizer.id_to_token(config.end_token_id),
            pad_token=tokenizer.id_to_token(config.pad_token_id),
            model_max_length=config.text_positions,
        )


def gpt2_tokenizer(source: str = "gpt2") -> PreTrainedTokenizerFast:
    """Load GPT-2's byte-level BPE from a local folder (vocab.json and merges.txt) or the Hub.

    Raises UserError, one line, if neither is available.
    """
    from transformers import GPT2Tokenizer

    try:
        folder = source if Path(source).is_dir() else hub_folder(source, GPT2_TOKENIZER)
        if (vocabulary := Path(folder) / "vocab.json").is_file():
            check_ids(vocabulary.read_text(encoding="utf-8-sig"))
        tokenizer = GPT2Tokenizer.from_pretrained(folder)
        if len(tokenizer) < 257:  # without the files, transformers makes an empty one
            raise ValueError("no vocab.json and merges.txt there")
        return tokenizer
    except Exception as error:  # offline, missing, damaged: the Hub client and tokenizers raise many kinds of errors
        reason = first_line(error)
        raise UserError(
            f"tokenizer {source!r} cannot be loaded ({reason}): name a folder with vocab.json and merges.txt, "
            "or use --tokenizer train"
        ) from error
