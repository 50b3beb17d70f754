"""Copies of a model with weights in the memory layout that a CPU's kernels read fastest, for generation.

Each token reads every weight of the decoder once, so on a CPU the time per token is the weights' bytes divided by the
memory bandwidth. With few rows, torch's layout reaches only a fraction of it. oneDNN's layout is faster, bf16 and int8
need a half and a quarter of the bytes, and the encoder gains too: EXPERIMENTS.md has the numbers.
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
"""Number of rows for which oneDNN chooses the layout: that for 8 rows is also good for thousands, that for 1 is not."""
FEW, FEW_WITHOUT_VNNI = 4, 7
"""Up to so many rows, rounding activations costs more time than it saves, at least in the smaller layers."""
LEAST_GELU = -0.1701
"""A lower bound of every GELU: exact, by tanh or by a sigmoid."""


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU: fp32 or bf16 weights in oneDNN's layout, x of any float dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """weight (out, in) and bias (out,), as in nn.Linear."""
        super().__init__()
        self.dtype, self.weight = dtype, weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        if torch.backends.mkldnn.is_available():
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the layer's dtype."""
        if not self.weight.is_mkldnn:  # torch for Mac has no oneDNN
            return F.linear(x.to(self.dtype), self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, one scale per output; each row of x is rounded to 8 bits by its maximum."""

    PLAIN: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
    """The other arguments of the product: no bias, an unscaled float32 result, no operation after it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, least: float | None = None) -> None:
        """dtype: of the result. least: a lower bound of x; the 8 bits then cover the range above it, which after a GELU
        is more precise than a range that is symmetric around 0."""
        super().__init__()
        self.dtype, self.least = dtype, least
        weight = weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=1e-12) / (largest_weight() or 127)
        rounded = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [ROWS, weight.shape[1]])
        self.scales, self.zeros = scales, torch.zeros(len(scales), dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float()
        if least is not None:  # the 8 bits count from `least`, so the bias adds the product of a row of `least`
            lowest = least * scales * rounded.sum(1)
            self.bias = lowest if self.bias is None else self.bias + lowest
        # The 8-bit value of 0 (or of `least`), and the number of steps above it.
        zero, steps = (128, 127.0) if least is None else (0, 255.0)
        self.one, self.zero = torch.tensor(1.0), torch.tensor(zero)
        self.half_up, self.steps = torch.tensor(zero + 0.5), torch.tensor(steps)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        x = x.float()
        if self.least is None:  # -span to span becomes 1 to 255
            span = x.abs().amax(-1, keepdim=True)  # 0 for a row of zeros: it scales whatever integers they become to 0
            scale, offset = self.steps / span, self.half_up
        else:  # `least` to the maximum becomes 0 to 255
            span = x.amax(-1, keepdim=True) - self.least
            scale = self.steps / span
            offset = torch.add(self.half_up, scale, alpha=-self.least)
        # Through int16, because torch's cast from float to uint8 is not vectorised.
        out = self.product((x * scale).add_(offset).to(torch.int16).to(torch.uint8))
        if self.bias is None:
            return out.mul_(span / self.steps).to(self.dtype)
        return torch.addcmul(self.bias, out, span / self.steps, out=out).to(self.dtype)

    def product(self, eights: Tensor) -> Tensor:
        """uint8 (..., in), in which `zero` means 0 -> float32 (..., out), without the bias."""
        return torch.ops.onednn.qlinear_pointwise(
            eights, self.one, self.zero, self.weight, self.scales, self.zeros, *self.PLAIN
        )


class Int8Weight(nn.Module):
    """A linear layer with 8-bit weights for few rows; x is bf16 and not rounded to 8 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """dtype: of the result."""
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
    """The largest 8-bit weight that oneDNN multiplies correctly on this CPU: 127; 63 on a CPU without VNNI, which adds
    two products in 16 bits and overflows with larger ones; 0 if the product is wrong, slow or missing."""
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        return 0  # without AVX it is a simple loop, a hundred times as slow
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
    """Whether this torch and this CPU have the kernels: tried on a small layer, as torch does not document them."""
    try:
        generator = torch.Generator().manual_seed(0)  # separate, so that sampling is not affected
        x, weight = (torch.randn(rows, 64, generator=generator) for rows in (3, 32))
        exact = x @ weight.T
        layers = [pack(weight, None, precision), pack(weight, None, precision, few=True)]
        return all(bool((layer(x) - exact).abs().max() < 0.1 * exact.abs().max()) for layer in layers)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def few_rows() -> int:
    """Up to how many captions at a time the int8 kernel for few rows is used on this CPU."""
    return FEW if largest_weight() == 127 else FEW_WITHOUT_VNNI


def how_int8() -> str:
    """How int8 is computed on this CPU and why, as one line to print."""
    many = {
        127: "8-bit products",
        63: "products of 8 and 7 bits, because this CPU adds two of them in 16 bits",
        0: "fp32, because this CPU has no 8-bit product",
    }[largest_weight()]
    return f"8-bit weights for up to {few_rows()} captions at a time; for more, and for pictures, {many}"


def pack(
    weight: Tensor,
    bias: Tensor | None,
    precision: Precision,
    few: bool = False,
    dtype: torch.dtype = torch.float32,
    least: float | None = None,
) -> nn.Module:
    """Make one layer. few: for at most FEW rows at a time. dtype and least, for int8: dtype of the result, and a lower
    bound of the inputs."""
    # The kernel for few rows reads 16 numbers at a time, even past the end of a row.
    if precision == "int8" and few and weight.shape[1] % 16 == 0:
        return Int8Weight(weight, bias, dtype)
    if precision == "int8" and largest_weight():
        return Int8Linear(weight, bias, dtype, least)
    return PackedLinear(weight, bias, torch.bfloat16 if precision == "bf16" else torch.float32)


def packed_model(model: Any, precision: Precision, rows: int) -> Any:
    """Make a copy of the model for generating `rows` captions at a time on a CPU; return the model if none is possible.

    The copy is cached until the weights change. It needs memory for all weights in its precision; in int8 for the
    decoder's layers twice, if both few and many captions are generated.
    """
    if model.device.type != "cpu" or model.decoder.wte.weight.dtype != torch.float32 or not available(precision):
        return model
    few = precision == "int8" and rows <= few_rows()
    kind = min(rows, 2) if few else 0  # one row, a few, or many
    made = model.copies.of((precision, weights_version(model)))
    layers = made.setdefault("layers", {})  # copies share them
    if kind not in made:
        # Packed layers replace linear ones; all other tensors are shared with the model.
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                memo[id(module)] = packed_layer(name, module, layers, precision, rows if few else None, model.config)
        # The head always uses the faster kernel: rounding its activations takes no measurable time.
        head = ("head", few and largest_weight() != 127)
        if head not in layers:
            layers[head] = pack(model.decoder.wte.weight, None, precision, head[1])
        memo[id(model.decoder.head)] = layers[head]
        fast = copied(model, memo)
        fast.encoder.pictures_at_a_time = 2  # then activations stay in the processor's cache between layers
        made[kind] = fast
    return made[kind]


def packed_layer(
    name: str, layer: nn.Linear, made: dict[Any, nn.Module], precision: Precision, few: int | None, config: Any
) -> nn.Module:
    """Make one layer of a model, cached in `made`. few: the number of rows at a time, or None for many."""
    tokens_only = name.startswith("decoder.") and not name.endswith("crossattention.c_attn")
    tokens_only = tokens_only and config.bridge != "prefix"  # a prefix, with its many rows, runs through all layers
    # Attention over a picture is in bf16, except for few queries, which are faster in fp32.
    halved = name.endswith(("qkv",) if few else ("qkv", "c_attn", "q_attn"))
    dtype = choose_precision("auto", layer.weight.device)[0] if halved else torch.float32  # if the CPU has fast bf16
    # For two or more rows, in a layer with more outputs than inputs, rounding costs less time than VNNI saves.
    wide = largest_weight() == 127 and few != 1 and layer.out_features > layer.in_features
    unrounded = bool(few) and tokens_only and not wide
    key = (name, unrounded, dtype)
    if key not in made:
        after_gelu = r"\.\d+\.c_proj$" if config.vision_activation == "swiglu" else r"\.(fc2|\d+\.c_proj)$"
        least = LEAST_GELU if re.search(after_gelu, name) else None
        made[key] = pack(layer.weight, layer.bias, precision, unrounded, dtype, least)
    return made[key]
