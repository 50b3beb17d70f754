"""The file of adapters (LoRA) on the linear layers of a pretrained model, and how loading merges it. training/adapters.py
puts them on a model that is to learn.

peft and bitsandbytes (requirements/qlora.txt) are imported late. A file of adapters has, for each adapted layer, its two
small matrices, and in full what no pretrained model brings: the projection, the cross-attention. Its metadata name the
pretrained models. Whatever captions meets plain layers; they are rounded to 4 bits first where they were while the
adapters learned.

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
from weights.huggingface import read_captioner
from weights.pretrained import read_parts

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as it is imported, it recommends a package of kernels
INSTALL = "pip install -r requirements/qlora.txt"


def resting_layers(model: nn.Module) -> list[str]:
    """The linear layers that pretrained blocks consist of, whether or not they get an adapter."""
    inside = ("encoder.blocks.", "decoder.blocks.", "decoder.body.")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if name.startswith(inside) and part_of(f"{name}.weight") != "new"]


def adapted_layers(path: Path) -> list[str]:
    """The layers that a file has adapters for."""
    return [name.removesuffix(".lora_A") for name in read_model_file(path).tensors if name.endswith(".lora_A")]


def why_not_4_bits(device: torch.device) -> str:
    """Why layers cannot be kept in 4 bits there; nothing where they can: one is tried."""
    try:
        x = torch.ones(2, 64, device=device, requires_grad=True)
        four_bit_layer(nn.Linear(64, 64), device)(x).sum().backward()
    except Exception as error:  # of a build for another card or none: anything from ImportError to RuntimeError
        return first_line(error)
    return ""


def four_bit_layer(layer: nn.Linear, device: torch.device) -> nn.Module:
    """The layer with its weight in NF4, whose scales are quantized once more; it computes in bf16."""
    import bitsandbytes

    class FourBitLinear(bitsandbytes.nn.Linear4bit):
        def train(self, mode: bool = True) -> FourBitLinear:
            """Nothing: in evaluation a CPU's kernel would lay the weight out anew, with which training cannot go on."""
            return self

    out, into = layer.weight.shape
    four = FourBitLinear(into, out, layer.bias is not None, torch.bfloat16, quant_type="nf4", device="meta")
    weight = layer.weight.detach()
    four.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=four)
    four.bias = layer.bias
    return four.to(device)


# From a file


def base_of(saved: Saved, base_dir: Path | None) -> Saved:
    """The pretrained weights that a file of adapters is for. Raises UserError where they cannot be had."""
    about, path = saved.adapters if isinstance(saved.adapters, dict) else {}, saved.path
    kinds = {"bases": dict, "key": str, "scale": float | int, "quantized": bool}
    wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    wrong += [] if wrong or math.isfinite(about["scale"]) else ["scale"]
    parts = [] if wrong else ["model"] if "model" in about["bases"] else ["encoder", "decoder"]
    names = {part: about["bases"].get(part) for part in parts}
    wrong += [part for part, name in names.items() if not (isinstance(name, str) and name and name.isprintable())]
    if (saved.config.prefix_length or 0) != len(saved.tensors.get("pooling.queries", ())):  # made fresh in the base
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
            f"{path}: adapters for {' and '.join(bases.values())}: {error}; --base-dir names a folder that has them, and "
            "python convert.py merge makes one whole model"
        ) from error


def other_weights(saved: Saved, bases: dict[str, str]) -> UserError:
    """What to raise where the weights are not those that the adapters learned on."""
    said = " and ".join(bases.values())
    return UserError(
        f"{saved.path}: its adapters learned on other weights than those of {said}: name theirs by --base-dir"
    )


def merge_adapters(model: nn.Module, base: nn.Module, saved: Saved, base_dir: Path | None) -> dict[str, Any]:
    """Gives a fresh model the base's weights with a file's adapters merged in: plain layers in fp32. Returns what the file
    says of them, its path and its hash.

    Raises UserError where the base is not what they learned on, or where they do not fit.
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
            raise UserError(f"{path}: its adapters learned on weights in 4 bits ({reason}): {INSTALL}")
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
    """Changes with the pretrained weights, of whose tensors it reads the beginnings."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        # Positions may be interpolated, to other last bits on another machine.
        if part_of(name) != "new" and name != "encoder.position_embeddings":
            hashed.update(f"{name} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def find_base(name: str, base_dir: Path | None) -> str:
    """The name, or the folder or file of that name, with or without its user, in base_dir."""
    places = [base_dir / name, base_dir / Path(name).name] if base_dir else []
    return next((str(place) for place in places if place.exists()), name)


def round_to_4_bits(weight: Tensor, bias: Tensor | None) -> None:
    """What a layer's weight (out, in) and bias become when it is kept in 4 bits, in place."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight.copy_(dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)))
    if bias is not None:
        bias.copy_(bias.bfloat16())  # which it is added in
