"""Kernel timings for benchmark.py gpu: the matrix products, copies and attentions of a training step, one by one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import Row, timed
from utils import first_line, matmul_rate

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "FA3": SDPBackend.FLASH_ATTENTION,
}
KERNELS = ("cuDNN", "flash-attn", "flash", "efficient", "math", "torch's choice", "FA3")
"""In this order: cuDNN builds its plan for the first caller, and FlashAttention-3 cannot be switched off again."""


@functools.cache
def activate_flash_3() -> None:
    """Make FlashAttention-3 this process's flash attention from now on. Raises where it is not installed."""
    torch.nn.attention.activate_flash_attention_impl("FA3")


def attend(kernel: str, states: list[Tensor], causal: bool) -> Tensor:
    """Attention by one kernel: query, key and value (B, T, H, D/H) -> (B, T, H, D/H)."""
    if kernel == "flash-attn":
        from flash_attn import flash_attn_func

        mixed: Tensor = flash_attn_func(*states, causal=causal)
        return mixed
    if kernel == "FA3":
        activate_flash_3()
    with sdpa_kernel(BACKENDS[kernel]) if kernel in BACKENDS else contextlib.nullcontext():
        query, key, value = (x.transpose(1, 2) for x in states)
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def attention_row(name: str, kernel: str, sizes: tuple[int, int, int], causal: bool, device: str) -> Row:
    """Run one kernel forward and backward at one shape; return its error against fp32 and its time."""
    (rows, queries, keys), made = sizes, torch.Generator().manual_seed(0)
    states = [torch.randn(rows, length, 12, 64, generator=made).to(device) for length in (queries, keys, keys)]
    slope = torch.randn(rows, queries, 12, 64, generator=made).to(device)

    def both(kernel: str, states: list[Tensor]) -> list[Tensor]:
        mixed = attend(kernel, states, causal)
        return [mixed.detach(), *torch.autograd.grad(mixed, states, slope.to(mixed.dtype))]

    right = both("math", [x.requires_grad_() for x in states])
    halves = [x.detach().bfloat16().requires_grad_() for x in states]
    found: list[Tensor] = []
    first = timed(lambda: found.extend(both(kernel, halves)))
    error = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True))
    seconds = min(timed(lambda: [both(kernel, halves) for _ in range(10)]) / 10 for _ in range(3))
    more = f"{'right' if error < 0.03 else 'WRONG'} (within {error:.2%}), the first {1e3 * first:.0f} ms"
    return Row(name, 1e3 * seconds, "ms", more, {"error": error, "first_ms": 1e3 * first})


def rates(device: str, tiny: bool) -> Iterator[Row]:
    """Time a matrix product and a copy, as reference rates, and the head: with GPT-2's odd vocabulary size, and with a
    multiple of 64."""
    side = 256 if tiny else 8192
    yield Row(f"product of {side}^3", matmul_rate(device, torch.bfloat16, side) / 1e12, "TFLOP/s")
    numbers = torch.zeros(1 << (20 if tiny else 30), dtype=torch.uint8, device=device)
    copied = torch.empty_like(numbers)
    yield Row("copy", 2 * len(numbers) / min(timed(lambda: copied.copy_(numbers)) for _ in range(10)) / 1e12, "TB/s")
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    hidden = torch.randn(160 if tiny else 10240, 768, **options, requires_grad=True)
    for words in (257, 320) if tiny else (50257, 50304):
        weight, slope = (
            torch.randn(words, 768, **options, requires_grad=True),
            torch.ones(len(hidden), words, **options),
        )
        yield Row(f"head of {words}", 1e3 * min(timed(lambda: head(hidden, weight, slope)) for _ in range(5)), "ms")  # noqa: B023


def head(hidden: Tensor, weight: Tensor, slope: Tensor) -> None:
    """Logits (M, V) of hidden (M, D) by weight (V, D), and both gradients from the logits' slope."""
    torch.autograd.grad(F.linear(hidden, weight), (hidden, weight), slope)


def attentions(device: str, tiny: bool) -> Iterator[Row]:
    """Time every kernel at the shapes (rows, queries, keys) of the encoder, the text and the cross-attention."""
    rows = 2 if tiny else 128
    shapes = {"encoder": (rows, 197, 197), "text": (5 * rows, 16, 16), "cross-attention": (rows, 80, 197)}
    for kernel in KERNELS:
        for part, sizes in shapes.items():
            name = f"{kernel}, {part} {' x '.join(map(str, sizes))}"
            try:
                yield attention_row(name, kernel, sizes, part == "text", device)
            except Exception as error:  # torch does not document what it raises for a kernel that is not available
                yield Row(name, more=f"not here ({type(error).__name__}: {first_line(error)[:80]})")
