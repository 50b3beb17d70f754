"""Weights laid out as a CPU's kernels read them fastest, for generation.

Writing a token means reading every weight of the decoder once, so on a CPU the time of a token is its
bytes over the memory's rate; torch's plain layout reaches a fraction of that rate at a caption's few rows. oneDNN reads its
own layout faster, bf16 and int8 are a half and a quarter of the bytes, and the encoder's products gain as well:
EXPERIMENTS.md has how much.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.cache import copied, weights_version
from utils import choose_precision

Precision = Literal["fp32", "bf16", "int8"]
ROWS = 8
"""What oneDNN is told to expect: the layout it chooses for so many also serves thousands, but that for one does not."""
FEW, FEW_WITHOUT_VNNI = 4, 7
"""Rows, up to which rounding them costs more time than it saves, at least on the smaller layers."""
LEAST_GELU = -0.1701
"""Below what any GELU, exact, by tanh or by a sigmoid, gives."""


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU: fp32 or bf16 weights in oneDNN's layout, x and the result of any float type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """weight (out, in) and bias (out,) as nn.Linear has them."""
        super().__init__()
        self.dtype, self.weight = dtype, weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        if torch.backends.mkldnn.is_available():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the layer's own dtype."""
        if not self.weight.is_mkldnn:  # a Mac's torch has no oneDNN
            return F.linear(x.to(self.dtype), self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """The same with 8-bit weights, a scale for each output, and each row of x rounded to 8 bits by its largest number."""

    PLAIN: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    """The product's other arguments: no bias, the result as it is in float32, nothing behind it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, least: float | None = None) -> None:
        """`dtype` is the result's. With `least`, which no x is below, the 8 bits are for what is above it: finer, behind a
        GELU, than for both signs alike."""
        super().__init__()
        self.dtype, self.least = dtype, least
        weight = weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=1e-12) / (largest_weight() or 127)
        rounded = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [ROWS, weight.shape[1]])
        self.scales, self.zeros = scales, torch.zeros(len(scales), dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float()
        if least is not None:  # the 8 bits leave out what a row of `least` would give
            lowest = least * scales * rounded.sum(1)
            self.bias = lowest if self.bias is None else self.bias + lowest
        # What 0, or `least`, becomes, and how many numbers are above it.
        zero, steps = (128, 127.0) if least is None else (0, 255.0)
        self.one, self.zero = torch.tensor(1.0), torch.tensor(zero)
        self.half_up, self.steps = torch.tensor(zero + 0.5), torch.tensor(steps)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        x = x.float()
        if self.least is None:  # -span to span become 1 to 255
            span = x.abs().amax(-1, keepdim=True)  # of a row of zeros 0: whatever its integers are, it scales them to 0
            scale, offset = self.steps / span, self.half_up
        else:  # least to the largest become 0 to 255
            span = x.amax(-1, keepdim=True) - self.least
            scale = self.steps / span
            offset = torch.add(self.half_up, scale, alpha=-self.least)
        # By way of int16, because torch's cast from float to uint8 goes number by number.
        out = self.product((x * scale).add_(offset).to(torch.int16).to(torch.uint8))
        if self.bias is None:
            return out.mul_(span / self.steps).to(self.dtype)
        return torch.addcmul(self.bias, out, span / self.steps, out=out).to(self.dtype)

    def product(self, eights: Tensor) -> Tensor:
        """uint8 (..., in), of which `zero` stands for 0 -> float32 (..., out), without the bias."""
        return torch.ops.onednn.qlinear_pointwise(
            eights, self.one, self.zero, self.weight, self.scales, self.zeros, *self.PLAIN
        )


class Int8Weight(nn.Module):
    """The same with 8-bit weights for a few rows, which stay bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """`dtype` is the result's."""
        super().__init__()
        weight = weight.detach().float()
        self.scales = (weight.abs().amax(1).clamp(min=1e-12) / 127).bfloat16()
        self.weight = (weight / self.scales.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
        self.bias = torch.zeros(len(weight), dtype=dtype) if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        rows = x.to(torch.bfloat16).flatten(0, -2)
        return (torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scales) + self.bias).view(*x.shape[:-1], -1)


@functools.cache
def largest_weight() -> int:
    """The largest whole number that a weight of oneDNN's 8-bit product may be here: 127; 63 where a CPU without VNNI adds two
    products in 16 bits, into which two of larger ones do not fit; 0 where the product is wrong, slow or missing."""
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        return 0  # elsewhere it is a loop, a hundred times as slow
    one, zero, kind = torch.tensor(1.0), torch.tensor(0), Int8Linear.PLAIN
    eights, zeros = torch.full((8, 64), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int32)
    for largest in (127, 63):
        with contextlib.suppress(RuntimeError, AttributeError, NotImplementedError):
            weight = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), largest, dtype=torch.int8), [ROWS, 64])
            out = torch.ops.onednn.qlinear_pointwise(eights, one, zero, weight, torch.ones(64), zeros, *kind)
            if bool((out == 255 * largest * 64).all()):
                return largest
    return 0


@functools.cache
def available(precision: Precision) -> bool:
    """Whether this torch and this CPU have the kernels: tried on a small layer, since these operators are torch's own."""
    try:
        generator = torch.Generator().manual_seed(0)  # not the one that sampling draws from
        x, weight = (torch.randn(rows, 64, generator=generator) for rows in (3, 32))
        exact = x @ weight.T
        layers = [pack(weight, None, precision), pack(weight, None, precision, few=True)]
        return all(bool((layer(x) - exact).abs().max() < 0.1 * exact.abs().max()) for layer in layers)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def few_rows() -> int:
    """How many captions at a time are few for 8-bit weights here."""
    return FEW if largest_weight() == 127 else FEW_WITHOUT_VNNI


def how_int8() -> str:
    """In which way int8 is computed here, and why: a line for people."""
    many = {
        127: "8-bit products",
        63: "products of 8 and 7 bits, as this CPU adds two of them in 16 bits",
        0: "fp32, as this CPU has no 8-bit product",
    }[largest_weight()]
    return f"8-bit weights for up to {few_rows()} captions at a time, for more, and for pictures, {many}"


def pack(
    weight: Tensor,
    bias: Tensor | None,
    precision: Precision,
    few: bool = False,
    dtype: torch.dtype = torch.float32,
    least: float | None = None,
) -> nn.Module:
    """One layer; `few` where it will meet at most FEW rows at a time. An int8 layer gives `dtype`, and meets no number below
    `least`."""
    # The kernel for a few rows reads 16 numbers at a time, behind the end of a row too.
    if precision == "int8" and few and weight.shape[1] % 16 == 0:
        return Int8Weight(weight, bias, dtype)
    if precision == "int8" and largest_weight():
        return Int8Linear(weight, bias, dtype, least)
    return PackedLinear(weight, bias, torch.bfloat16 if precision == "bf16" else torch.float32)


def packed_model(model: Any, precision: Precision, rows: int) -> Any:
    """A copy of the model for generating `rows` captions at a time on a CPU, or the model itself where there is none.

    It is kept until the weights change, and takes as much memory again as they do in its precision; in int8 the decoder's
    layers once more where both a few captions and many are made.
    """
    if model.device.type != "cpu" or model.decoder.wte.weight.dtype != torch.float32 or not available(precision):
        return model
    few = precision == "int8" and rows <= few_rows()
    kind = min(rows, 2) if few else 0  # one row, a few, or many
    made = model.copies.of((precision, weights_version(model)))
    layers = made.setdefault("layers", {})  # which copies may share
    if kind not in made:
        # Packed layers in the place of linear ones; all other tensors are shared.
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                memo[id(module)] = packed_layer(name, module, layers, precision, rows if few else None, model.config)
        # By the faster kernel: rounding activations costs nothing measurable there.
        head = ("head", few and largest_weight() != 127)
        if head not in layers:
            layers[head] = pack(model.decoder.wte.weight, None, precision, head[1])
        memo[id(model.decoder.head)] = layers[head]
        twin = copied(model, memo)
        twin.encoder.pictures_at_a_time = 2  # what goes from layer to layer then stays in the processor's cache
        made[kind] = twin
    return made[kind]


def packed_layer(
    name: str, layer: nn.Linear, made: dict[Any, nn.Module], precision: Precision, few: int | None, config: Any
) -> nn.Module:
    """One layer of a model, kept in `made`; `few` rows at a time, or None for many."""
    tokens_only = name.startswith("decoder.") and not name.endswith("crossattention.c_attn")
    tokens_only = tokens_only and config.bridge != "prefix"  # a prefix meets all layers
    # Attention to a picture is halved, except for a few queries, which are faster in fp32.
    halved = name.endswith(("qkv",) if few else ("qkv", "c_attn", "q_attn"))
    dtype = choose_precision("auto", layer.weight.device)[0] if halved else torch.float32  # if the CPU has fast bf16
    # From two rows on, rounding costs a layer with more outputs than inputs less than VNNI saves.
    wide = largest_weight() == 127 and few != 1 and layer.out_features > layer.in_features
    unrounded = bool(few) and tokens_only and not wide
    key = (name, unrounded, dtype)
    if key not in made:
        behind_gelu = r"\.\d+\.c_proj$" if config.vision_activation == "swiglu" else r"\.(fc2|\d+\.c_proj)$"
        least = LEAST_GELU if re.search(behind_gelu, name) else None
        made[key] = pack(layer.weight, layer.bias, precision, unrounded, dtype, least)
    return made[key]
