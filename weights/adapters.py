"""Files of adapters (LoRA) for the linear layers of pretrained models, and merging them when such a file is loaded.
training/adapters.py adds adapters to a model for training.

A file of adapters has two small matrices for each adapted layer, and all weights of the layers that no pretrained model
provides (projection, cross-attention). Its metadata name the base models. A merged model has ordinary layers; if the
base weights were in 4 bits during training, they are rounded to 4 bits before merging. peft and bitsandbytes
(requirements/qlora.txt) are imported late.

References: LoRA, Hu et al. 2021 (arXiv:2106.09685); QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import UserError
from utils import first_line
from weights.file import Saved, check_shapes, part_of, read_model_file, weights_hash
from weights.known import read_captioner
from weights.pretrained import read_parts

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else its import recommends a package of kernels
INSTALL = "pip install -r requirements/qlora.txt"


def resting_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers in pretrained blocks, with or without an adapter."""
    inside = ("encoder.blocks.", "decoder.blocks.", "decoder.body.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if name.startswith(inside) and part_of(f"{name}.weight") != "new"]


def adapted_layers(path: Path) -> list[str]:
    """Names of the layers for which a file has adapters."""
    return [name.removesuffix(".lora_A") for name in read_model_file(path).tensors if name.endswith(".lora_A")]


def why_not_4_bits(device: torch.device) -> str:
    """Why layers cannot be in 4 bits on this device; empty if they can. Tries one layer."""
    try:
        x = torch.ones(2, 64, device=device, requires_grad=True)
        four_bit_layer(nn.Linear(64, 64), device)(x).sum().backward()
    except Exception as error:  # a build for another GPU, or no build, raises anything from ImportError to RuntimeError
        return first_line(error)
    return ""


def four_bit_layer(layer: nn.Linear, device: torch.device) -> nn.Module:
    """Copy a layer with its weight in NF4, whose scales are quantized too; it computes in bf16."""
    import bitsandbytes

    class FourBitLinear(bitsandbytes.nn.Linear4bit):
        def train(self, mode: bool = True) -> FourBitLinear:
            """Do nothing: in eval mode the CPU kernel would change the weight's layout, which training cannot use."""
            return self

    out, into = layer.weight.shape
    four = FourBitLinear(into, out, layer.bias is not None, torch.bfloat16, quant_type="nf4", device="meta")
    weight = layer.weight.detach()
    four.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=four)
    four.bias = layer.bias
    return four.to(device)


# Read from a file


def base_of(saved: Saved, base_dir: Path | None) -> Saved:
    """Read the base weights of a file of adapters. Raises UserError if they are not available."""
    about, path = saved.adapters if isinstance(saved.adapters, dict) else {}, saved.path
    kinds = {"bases": dict, "key": str, "scale": float | int, "quantized": bool}
    wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    wrong += [] if wrong or math.isfinite(about["scale"]) else ["scale"]
    parts = [] if wrong else ["model"] if "model" in about["bases"] else ["encoder", "decoder"]
    names = {part: about["bases"].get(part) for part in parts}
    wrong += [part for part, name in names.items() if not (isinstance(name, str) and name and name.isprintable())]
    if (saved.config.prefix_length or 0) != len(saved.tensors.get("pooling.queries", ())):  # the base's is random
        wrong.append("prefix_length")
    if wrong:
        raise UserError(f"{path}: not adapters of this project ({wrong[0]}): name another file")
    bases = {part: find_base(name, base_dir) for part, name in names.items()}
    if any(Path(base).resolve() == path.resolve() for base in bases.values()):
        raise other_weights(saved, bases)
    try:
        if "model" in bases:
            return read_captioner(bases["model"])
        return read_parts(saved.config, bases["encoder"], bases["decoder"], saved.config.vision_num_layers)
    except UserError as error:
        raise UserError(
            f"{path}: adapters for {' and '.join(bases.values())}: {error}; set --base-dir to a folder with them, or "
            "make one full model with python convert.py merge"
        ) from error


def other_weights(saved: Saved, bases: dict[str, str]) -> UserError:
    """The error for base weights other than those the adapters were trained on."""
    names = " and ".join(bases.values())
    return UserError(
        f"{saved.path}: its adapters were trained on other weights than those of {names}: name theirs with --base-dir"
    )


def merge_adapters(model: nn.Module, base: nn.Module, saved: Saved, base_dir: Path | None) -> dict[str, Any]:
    """Load the base's weights into the model and merge a file's adapters into them, in fp32. Returns the adapters'
    metadata with the file's path and the hash of its weights.

    Raises UserError if the base is not the one the adapters were trained on, or if they do not fit.
    """
    path, about, weights = saved.path, saved.adapters or {}, saved.tensors
    if fingerprint(base) != about["key"]:
        raise other_weights(saved, {part: find_base(n, base_dir) for part, n in about["bases"].items() if n})
    pretrained = {name: tensor for name, tensor in base.state_dict().items() if part_of(name) != "new"}
    check_shapes(path, {name: t for name, t in model.state_dict().items() if part_of(name) != "new"}, pretrained)
    model.load_state_dict(pretrained, strict=False)
    state = model.state_dict()
    if about["quantized"]:
        if reason := why_not_4_bits(torch.device("cpu")):
            raise UserError(f"{path}: its adapters were trained on weights in 4 bits ({reason}): {INSTALL}")
        for name in resting_layers(model):
            round_to_4_bits(state[f"{name}.weight"], state.get(f"{name}.bias"))
    new = {name: tensor for name, tensor in state.items() if part_of(name) == "new"}
    targets = [name for name in resting_layers(model) if f"{name}.lora_A" in weights]
    expected = dict(new)
    for name in targets:
        rank = len(weights[f"{name}.lora_A"])
        out, into = state[f"{name}.weight"].shape
        expected |= {f"{name}.lora_A": torch.empty(rank, into), f"{name}.lora_B": torch.empty(out, rank)}
    check_shapes(path, expected, weights)
    for name, tensor in new.items():
        tensor.copy_(weights[name])
    for name in targets:
        state[f"{name}.weight"] += about["scale"] * weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
    return about | {"file": path, "sha256": weights_hash(weights)}


def fingerprint(model: nn.Module) -> str:
    """A hash of the pretrained weights, from the first 64 values of each tensor."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        # Positions may be interpolated, and then the last bits differ between machines.
        if part_of(name) != "new" and name != "encoder.position_embeddings":
            hashed.update(f"{name} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def find_base(name: str, base_dir: Path | None) -> str:
    """Find a base model in base_dir, with or without its user's name; else return the name unchanged."""
    paths = [base_dir / name, base_dir / Path(name).name] if base_dir else []
    return next((str(path) for path in paths if path.exists()), name)


def round_to_4_bits(weight: Tensor, bias: Tensor | None) -> None:
    """Round a layer's weight (out, in) and bias in place, to the values they have in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight.copy_(dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)))
    if bias is not None:
        bias.copy_(bias.bfloat16())  # because a 4-bit layer adds it in bf16
