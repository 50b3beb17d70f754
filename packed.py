"""Weights laid out as a CPU's kernels read them fastest, for generation.

Imports config and model. Writing a token means reading every weight of the decoder once, so on a CPU the time of a token
is its bytes over the memory's rate; torch's plain layout reaches a fraction of that rate at a caption's few rows. oneDNN
reads its own layout faster, and bf16 and int8 are a half and a quarter of the bytes: EXPERIMENTS.md has what that gives.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model import GPT2Decoder, ImageCaptionModel

Precision = Literal["fp32", "bf16", "int8"]


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU: fp32 or bf16 weights in oneDNN's layout, x and the result of any float type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int) -> None:
        """weight (out, in) and bias (out,) as nn.Linear has them; `rows` is how many x will have."""
        super().__init__()
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the layer's own dtype."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """The same with 8-bit weights, a scale for each output, and each row of x rounded to 8 bits by its largest number."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        weight = weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        rounded = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [rows, weight.shape[1]])
        self.scales, self.zeros = scales, torch.zeros(len(scales), dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float()
        self.one, self.middle = torch.tensor(1.0), torch.tensor(128)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> bf16 (..., out)."""
        rows = x.float().flatten(0, -2)
        largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-12)
        eights = (rows * (127 / largest) + 128.5).to(torch.uint8)  # 128 is zero
        out = torch.ops.onednn.qlinear_pointwise(
            eights,
            self.one,
            self.middle,
            self.weight,
            self.scales,
            self.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        out *= largest / 127
        if self.bias is not None:
            out += self.bias
        return out.to(torch.bfloat16).unflatten(0, x.shape[:-1])


class PackedDecoder(GPT2Decoder):
    """A decoder whose linear layers, the head's too, are packed; everything else is the original's."""

    packed_head: nn.Module

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return self.packed_head(hidden)


@functools.cache
def available(precision: Precision) -> bool:
    """Whether this torch and this CPU have the kernels: tried on a small layer, since these operators are torch's own."""
    try:
        x, weight = torch.randn(3, 64), torch.randn(32, 64)
        exact = x @ weight.T
        return bool((pack(weight, None, precision, 3)(x) - exact).abs().max() < 0.1 * exact.abs().max())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack(weight: Tensor, bias: Tensor | None, precision: Precision, rows: int) -> nn.Module:
    """One layer."""
    if precision == "int8":
        return Int8Linear(weight, bias, rows)
    return PackedLinear(weight, bias, torch.float32 if precision == "fp32" else torch.bfloat16, rows)


def packed_decoder(model: ImageCaptionModel, precision: Precision, rows: int) -> GPT2Decoder:
    """A twin of the model's decoder for generating `rows` captions at a time on a CPU, or the decoder itself where that
    cannot be had. It is kept until the weights change, and takes as much memory again as they do in its precision."""
    decoder = model.decoder
    if model.device.type != "cpu" or decoder.wte.weight.dtype != torch.float32 or not available(precision):
        return decoder
    weights = [decoder.wte.weight, *(p for block in decoder.blocks for p in block.parameters())]
    key = (precision, rows, tuple((weight.data_ptr(), weight._version) for weight in weights))
    if model.packed is None or model.packed[0] != key:
        model.packed = None  # before the new one is made: there may be no room for both
        # deepcopy takes what the memo has for a module in its place: packed layers, and the tensors that are shared.
        memo: dict[int, Any] = {id(p): p for p in decoder.parameters()}
        for module in decoder.modules():
            if isinstance(module, nn.Linear):
                memo[id(module)] = pack(module.weight, module.bias, precision, rows)
        twin = copy.deepcopy(decoder, memo)
        twin.__class__ = PackedDecoder
        twin.packed_head = pack(decoder.wte.weight, None, precision, rows)
        model.packed = (key, twin)
    return model.packed[1]
