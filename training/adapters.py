"""LoRA adapters for training a pretrained model: its linear layers are frozen, in 4 bits if wanted.

peft and bitsandbytes (requirements/qlora.txt) are imported late. weights/adapters.py has their files and the papers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import TrainConfig, UserError
from weights.adapters import INSTALL, find_base, fingerprint, four_bit_layer, resting_layers, why_not_4_bits
from weights.file import MODEL_FILE, part_of


def check_adapters(config: TrainConfig, device: torch.device) -> None:
    """Raise UserError if a package is missing, or if the run's result would overwrite the model that it adapts."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"adapters need peft ({error}): {INSTALL}") from error
    if config.qlora and device.type == "cuda" and (reason := why_not_4_bits(device)):
        raise UserError(f"qlora needs bitsandbytes ({reason}): {INSTALL}, or use --lora")
    base = Path(find_base(config.init_model or "", config.base_dir))
    if config.init_model and base.resolve() == Path(MODEL_FILE).resolve():
        raise UserError(f"{base} would be overwritten by the run's adapters, which need it: give it another name first")


def adapt(model: Any, config: TrainConfig, bases: dict[str, str | None], device: torch.device) -> str:
    """Add new adapters to the model in place. Only they and the new layers (cross-attention, projection) are trained.
    Returns a printable summary.

    bases: the names of the pretrained encoder and decoder, or of the full model. What config freezes gets no adapters.
    Raises UserError if lora_targets matches no layer, or names the encoder or decoder and matches none of its layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = resting_layers(model)
    targets = [n for n in layers if re.fullmatch(config.lora_targets, n) and part_of(n) not in config.freeze]
    if not targets:
        raise UserError(f"lora_targets {config.lora_targets!r} matches no pretrained linear layer that is not frozen")
    number = {part: sum(part_of(n) == part for n in targets) for part in ("encoder", "decoder")}
    for part in number:
        if not number[part] and part in config.lora_targets and part not in config.freeze:
            raise UserError(
                f"lora_targets {config.lora_targets!r} matches no layer of the {part}: change or freeze that"
            )
    key = fingerprint(model)
    full = {name for name, parameter in model.named_parameters() if part_of(name) == "new" and parameter.requires_grad}
    reason = why_not_4_bits(device) if config.qlora else ""
    quantized = config.qlora and not reason
    if quantized:
        for name in layers:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, four_bit_layer(layer, device))
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft reads it
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft declares int, but any factor works
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name in full)
        if ".lora_" in name:  # on 4-bit layers peft makes them bf16, which is too coarse for training
            parameter.data = parameter.data.float()
    scale = config.lora_alpha / config.lora_rank
    model.adapters = {"bases": bases, "key": key, "scale": scale, "quantized": quantized}
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    how = "frozen layers in 4 bits" if quantized else "frozen weights unchanged"
    how += f" and not in 4 bits ({reason})" if reason else ""
    share = f"{learned:,} of {model.num_parameters:,} parameters are trained ({learned / model.num_parameters:.2%})"
    where = " and ".join(f"{count} layers of the {part}" for part, count in number.items() if count)
    return f"LoRA of rank {config.lora_rank} on {where}, {how}: {share}"
