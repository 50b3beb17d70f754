"""Attention, by the fastest kernel at hand: flash_attn's, torch's own, or plain products.

Imports nothing of this project. B rows (or N pictures with K captions each), T tokens, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_flash_wanted = True
_flash_3: str | None = None
_flash: tuple[Callable[..., Tensor] | None, str] | None = None


def use_flash_attention(wanted: bool) -> None:
    """Whether `attention` may call the flash_attn package, which it may until told otherwise; and on a Hopper GPU whether
    torch's own attention may be FlashAttention-3, where this torch has it."""
    global _flash_wanted, _flash_3
    _flash_wanted = wanted
    if wanted and _flash_3 is None and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
            _flash_3 = "FlashAttention-3"
        except Exception as error:  # its kernels are a package of their own
            _flash_3 = ""
            print(f"attention   FlashAttention-3 cannot be activated ({type(error).__name__}): going on without")


def flash_attn_function() -> tuple[Callable[..., Tensor] | None, str]:
    """flash_attn's own function and why, or None and why not; looked for once.

    The function itself is imported: other packages also answer to the name flash_attn without having it.
    """
    global _flash
    if _flash is None:  # a plain global, because torch.compile does not see through functools.cache
        _flash = _find_flash_attn()
    return _flash


def _find_flash_attn() -> tuple[Callable[..., Tensor] | None, str]:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return None, "flash_attn needs an Ampere GPU or newer"
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # a build against another torch fails with anything from ImportError to OSError
        return None, f"flash_attn cannot be imported ({type(error).__name__})"
    return flash_attn_func, "flash_attn is installed"


def choose_attention(
    device_type: str, dtype: torch.dtype, head_size: int = 64
) -> tuple[Callable[..., Tensor] | None, str]:
    """flash_attn's function where it can serve such tensors, else None for torch's; and the reason in words."""
    if device_type == "cpu" and dtype == torch.bfloat16:
        return None, "plain products in bfloat16 (at captions' lengths faster than torch's kernel on a CPU)"
    function = None
    if not _flash_wanted:
        reason = "flash_attn not wanted"
    elif _flash_3 and device_type == "cuda":
        reason = f"its kernel is {_flash_3}"
    elif device_type != "cuda":
        reason = f"device is {device_type}, flash_attn needs cuda"
    elif dtype not in (torch.float16, torch.bfloat16):
        reason = f"{dtype} tensors, flash_attn needs half precision"
    elif head_size % 8 or head_size > 256:
        reason = f"heads of {head_size}, flash_attn needs a multiple of 8 up to 256"
    else:
        function, reason = flash_attn_function()
    return function, f"{'flash_attn' if function else 'torch scaled_dot_product_attention'} ({reason})"


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """softmax(query key^T / sqrt(head size)) value, by the fastest kernel at hand.

    query (B, Tq, H, D/H), key and value (B, Tk, H, D/H), one dtype; `causal` needs Tq = Tk.
    Returns (B, Tq, H, D/H).
    """
    function, _ = choose_attention(query.device.type, query.dtype, query.shape[-1])
    if function is not None:
        return function(query, key, value, causal=causal)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, T, D/H)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # At captions' lengths torch's CPU kernel and its backward take 3 to 6 times as long as these products.
        scores = (query * key.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, H, Tq, Tk)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


def attention_behind(
    query: Tensor, key: Tensor, value: Tensor, before: tuple[Tensor, Tensor], visible: Tensor | None = None
) -> Tensor:
    """What attention to `before` and the own keys and values side by side gives, with nothing repeated or put together:
    a picture's K rows share what stands before them.

    query (N * K, Tq, H, D/H), key and value (N * K, Tk, H, D/H); before: keys and values (N, S, H, D/H), whose dtype it
    has; visible: bool (Tq, Tk), which own keys each query may see (default: all). Returns (N * K, Tq, H, D/H).
    """
    (pictures, states), scale = before[0].shape[:2], query.shape[-1] ** -0.5
    query, key, value = (x.to(before[0].dtype).unflatten(0, (pictures, -1)) for x in (query * scale, key, value))
    own = torch.einsum("nkthd,nkuhd->nkhtu", query, key)
    if visible is not None:
        own = own.masked_fill(~visible, float("-inf"))
    scores = torch.cat([torch.einsum("nkthd,nshd->nkhts", query, before[0]), own], -1)
    shared, own = scores.softmax(-1).to(value.dtype).tensor_split([states], -1)
    mixed = torch.einsum("nkhts,nshd->nkthd", shared, before[1]) + torch.einsum("nkhtu,nkuhd->nkthd", own, value)
    return mixed.flatten(0, 1)


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, T, parts * D) -> `parts` tensors of (B, T, H, D/H)."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(-3)
