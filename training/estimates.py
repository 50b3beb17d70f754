"""Estimates of a run before it starts: operations, seconds, bytes; and the peak rate for model FLOP utilisation."""

from __future__ import annotations

import torch

from config import NUM_BEAMS, TrainConfig, ViTGPT2Config
from utils import matmul_rate

# FLOP/s of dense products in half precision, from the makers' data sheets; the first name that matches is used.
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


USED = 0.3  # share of a device's rate that training reaches: 0.29 measured on an H100 (EXPERIMENTS.md)
SAMPLING = 1.9  # a self-critical step's time, as a multiple of a step's: 214 and 112 ms there


def step_operations(config: ViTGPT2Config, captions: float, tokens: float) -> float:
    """Floating-point operations of a training step per picture, with this many captions of this many tokens.

    A multiplication and an addition for every weight at every position, once forward and twice backward (Kaplan et al.
    2020, arXiv:2001.08361).
    """
    states, vision, width = config.num_states, config.vision_embed_dim, config.decoder_embed_dim
    layers = (3 if config.vision_activation == "swiglu" else 2) * config.vision_mlp + 4 * vision
    encoder = states * config.vision_num_layers * (layers * vision + 2 * states * vision)
    words = captions * tokens
    if config.bridge == "cross_attention":
        picture = states * config.decoder_num_layers * 2 * vision * width
        decoder = words * config.decoder_num_layers * (14 * width**2 + 2 * states * width)
    else:
        prefix = config.prefix_positions
        picture = states * vision * width + prefix * config.decoder_num_layers * (12 * width**2 + prefix * width)
        decoder = words * config.decoder_num_layers * (12 * width**2 + 2 * prefix * width)
    return 3 * 2 * (encoder + picture + decoder + words * width * config.vocab_size)


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak rate (FLOP/s) for model FLOP utilisation (MFU), and its source: for known cards the maker's number for
    dense products in half precision, else the measured rate of a matrix product."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for card, rate in PEAK_RATES.items():
            if card in name:
                return rate, f"the {card}'s {rate / 1e12:.0f} TFLOP/s"
    rate = measured_rate(device, dtype)
    return rate, f"{rate / 1e9:,.0f} GFLOP/s of a matrix product measured here"


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product, measured once per process."""
    return max(matmul_rate(device.type, dtype, 4096 if device.type == "cuda" else 512), 1.0)


def run_operations(config: TrainConfig, pictures: int, tokens: float) -> float:
    """Floating-point operations of the complete run, those that self-critical training samples with included."""
    passes = config.epochs * (5 if config.captions_per_image == 1 else 1)
    used = config.max_steps * config.batch_size * config.accumulation_steps if config.max_steps else passes * pictures
    operations = used * step_operations(config.model, config.learned_captions, tokens)
    return operations * (SAMPLING if config.objective == "scst" else 1)


def estimated_seconds(
    config: TrainConfig, pictures: int, tokens: float, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of the complete run, at a usual share of the measured rate of a matrix product."""
    return run_operations(config, pictures, tokens) / (USED * measured_rate(device, dtype))


def estimated_caption_seconds(
    config: TrainConfig, val: int, test: int, tokens: float, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of the captions of val pictures after every epoch and of the test pictures at the end, at the same rate: the
    greedy search and three beams both reach about 30 % of it on a CPU."""
    sizes = config.model
    greedy = config.epochs * min(config.val_pictures, val) * step_operations(sizes, 1, tokens)
    searched = test * step_operations(sizes, NUM_BEAMS, tokens)
    return (greedy + searched) / 3 / (USED * measured_rate(device, dtype))  # a third: the forward pass alone


def estimated_memory(config: TrainConfig, weights: int, learned: int, tokens: float) -> float:
    """Bytes on the device: `weights` bytes of weights; for `learned` trained parameters the average, gradients and
    AdamW's moments, in fp32; and the activations stored for the backward pass."""
    m = config.model
    stored = 2 if config.gradient_checkpointing else 34  # numbers a layer stores per position and unit of width
    states = m.num_states * m.vision_num_layers * m.vision_embed_dim
    words = config.learned_captions * tokens * m.decoder_num_layers * m.decoder_embed_dim * 1.3
    head = config.learned_captions * tokens * m.vocab_size * 3
    numbers = weights + (16.0 if config.ema else 12.0) * learned
    return numbers + config.batch_size * (2 * stored * (states + words) + 4 * head)


def duration(seconds: float) -> str:
    """Seconds as text: 45 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if unit < 3600 else 1}f} {name}"
    return f"{seconds / 86400:.1f} days"
