"""What a run will take before it has begun: operations, seconds, bytes; and the rate that its speed is a share of."""

from __future__ import annotations

import torch

from config import TrainConfig, ViTGPT2Config
from utils import matmul_rate

# Dense products in half precision, FLOP/s, as the makers' data sheets give them; the first name that fits counts.
PEAK_RATES = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
    "V100": 125e12,
}


def step_operations(config: ViTGPT2Config, captions: float, tokens: float) -> float:
    """Floating-point operations of one picture's training step with so many captions of so many tokens.

    Two for every weight and position it meets, forward once and backward twice (Kaplan et al. 2020, arXiv:2001.08361).
    """
    states, vision, width = config.num_states, config.vision_embed_dim, config.decoder_embed_dim
    layers = (3 if config.vision_activation == "swiglu" else 2) * config.vision_mlp + 4 * vision
    encoder = states * config.vision_num_layers * (layers * vision + 2 * states * vision)
    words = captions * tokens
    if config.bridge == "cross_attention":
        looking = states * config.decoder_num_layers * 2 * vision * width
        decoder = words * config.decoder_num_layers * (14 * width**2 + 2 * states * width)
    else:
        prefix = config.prefix_positions
        looking = states * vision * width + prefix * config.decoder_num_layers * (12 * width**2 + prefix * width)
        decoder = words * config.decoder_num_layers * (12 * width**2 + 2 * prefix * width)
    return 3 * 2 * (encoder + looking + decoder + words * width * config.vocab_size)


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Floating-point operations a second that model FLOP utilisation (MFU) is a share of, and what that figure is: for
    known cards the maker's for dense products in half precision, else the rate of a matrix product measured here."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for card, rate in PEAK_RATES.items():
            if card in name:
                return rate, f"the {card}'s {rate / 1e12:.0f} TFLOP/s"
    rate = measured_rate(device, dtype)
    return rate, f"{rate / 1e9:,.0f} GFLOP/s of a matrix product measured here"


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product here, measured once a process."""
    return max(matmul_rate(device.type, dtype, 4096 if device.type == "cuda" else 512), 1.0)


def estimated_seconds(
    config: TrainConfig, pictures: int, tokens: float, device: torch.device, dtype: torch.dtype
) -> float:
    """Time of the whole run, at 30 % of the rate that a matrix product is measured to have."""
    captions = config.captions_per_image
    passes = config.epochs * (5 if captions == 1 else 1)
    seen = config.max_steps * config.batch_size * config.accumulation_steps if config.max_steps else passes * pictures
    return seen * step_operations(config.model, captions, tokens) / (0.3 * measured_rate(device, dtype))


def estimated_memory(config: TrainConfig, weights: int, learned: int, tokens: float) -> float:
    """Bytes on the device: so many of weights, for so many numbers that are learned the average, gradients and AdamW's
    moments in fp32, activations kept for the backward pass."""
    m = config.model
    kept = 2 if config.gradient_checkpointing else 34  # numbers a layer keeps for each position and unit of width
    states = m.num_states * m.vision_num_layers * m.vision_embed_dim
    words = config.captions_per_image * tokens * m.decoder_num_layers * m.decoder_embed_dim * 1.3
    head = config.captions_per_image * tokens * m.vocab_size * 3
    numbers = weights + (16.0 if config.ema else 12.0) * learned
    return numbers + config.batch_size * (2 * kept * (states + words) + 4 * head)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if unit < 3600 else 1}f} {name}"
    return f"{seconds / 86400:.1f} days"
