"""What changes weights: optimizers by part of the model, the schedule, one update, the weights' running average.

Learning rates of parts and layers are factors of the one that the schedule gives.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from config import TrainConfig, UserError
from model import ImageCaptionModel
from training.sharding import whole
from weights.file import layer_of, part_of

MOMENTUM = 0.95  # Muon's


def depth_below_top(name: str, layers: dict[str, int]) -> int:
    """How many layers lie between a parameter and its part's output: 0 for the last norm, most for embeddings."""
    part, layer = name.split(".")[0], layer_of(name)
    if part_of(name) == "new":
        return 0
    if layer is not None:
        return layers[part] - layer
    return 0 if name.split(".")[-2] in ("norm", "ln_f", "lm_head") else layers[part] + 1


def freeze(model: ImageCaptionModel, parts: tuple[str, ...]) -> None:
    """Leaves these parts of the model as they are. Raises UserError where nothing would be left to learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze {' '.join(parts)}: nothing is left to learn")


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made nearly orthogonal before it is applied (Jordan 2024,
    kellerjordan.github.io/posts/muon), in steps of the size that AdamW's have (Liu et al. 2025, arXiv:2502.16982).

    torch.optim.Muon computes in bf16 whatever the weights are, which most CPUs emulate, 10 to 70 times slower than fp32;
    and one matrix after the other, where matrices of one shape can be multiplied together.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        """params: matrices, or groups of them; dtype: of the products."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        # torch's protocol for optimizers that ask the device itself whether to step: `found_inf` is 1 where not.
        self._step_supports_amp_scaling = self.param_groups[0]["params"][0].device.type == "cuda"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of the matrices that have a gradient; no closure is called."""
        stop = getattr(self, "found_inf", None)
        for group in self.param_groups:
            learned = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not learned:
                continue
            for parameter in learned:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in learned]
            momenta = [self.state[parameter]["momentum_buffer"] for parameter in learned]
            moved = torch._foreach_lerp(momenta, gradients, 1 - MOMENTUM)
            updates = torch._foreach_lerp(gradients, moved, MOMENTUM)  # Nesterov's
            decay = group["lr"] * group["weight_decay"]
            if stop is not None:
                moved = tuple(torch.where(stop > 0, old, new) for old, new in zip(momenta, moved, strict=True))
                decay = decay * (1 - stop)
            torch._foreach_copy_(momenta, moved)
            torch._foreach_mul_(learned, 1 - decay)
            for shape in dict.fromkeys(update.shape for update in updates):
                same = [number for number, update in enumerate(updates) if update.shape == shape]
                made = orthogonalized(torch.stack([updates[number] for number in same]), self.dtype)
                made = made if stop is None else made.masked_fill(stop > 0, 0)
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_([learned[number] for number in same], list(made.to(momenta[0].dtype)), alpha=-rate)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """matrices (N, rows, columns) -> the same shape in `dtype`, their singular values brought close to 1 by five steps of
    Jordan's quintic Newton-Schulz iteration, a x + (b xx' + c (xx')²) x."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What Muon multiplies in, beside a model in `dtype`: bf16 where the device has it and the model is in half precision
    or on a GPU, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def build_optimizers(
    model: ImageCaptionModel, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW over everything; or Muon over the layers' matrices and AdamW over embeddings, biases and norms. Only the
    layers' matrices decay. `dtype` is the run's precision.

    A group's `share` is its factor of the schedule's learning rate: its part's, times layer_decay for every layer above.
    """
    rates = {"encoder": config.encoder_learning_rate, "decoder": config.decoder_learning_rate, "new": None}
    layers = {"encoder": model.config.vision_num_layers, "decoder": model.config.decoder_num_layers}
    groups: dict[tuple[bool, float], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = (rates[part_of(name)] or config.learning_rate) / config.learning_rate
            share *= config.layer_decay ** depth_below_top(name, layers)
            groups[parameter.ndim == 2 and layer_of(name) is not None, share].append(parameter)
    described: dict[bool, list[dict[str, Any]]] = {
        inside: [
            {"params": parameters, "share": share, "weight_decay": config.weight_decay if inside else 0.0}
            for (is_inside, share), parameters in groups.items()
            if is_inside == inside
        ]
        for inside in (True, False)
    }
    rate, betas, fused = config.learning_rate, (0.9, 0.95), model.device.type in ("cuda", "cpu")
    if config.optimizer == "adamw":
        return [torch.optim.AdamW([*described[True], *described[False]], lr=rate, betas=betas, fused=fused)]
    made: list[torch.optim.Optimizer] = []
    if described[True]:
        made.append(Muon(described[True], lr=rate, dtype=product_dtype(model.device, dtype)))
    if described[False]:
        made.append(torch.optim.AdamW(described[False], lr=rate, betas=betas, fused=fused))
    return made


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to zero at the last step."""
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all of them together, a scalar on their device."""
    return whole(nn.utils.get_total_norm(list(tensors)))


class Updater:
    """Turns gathered gradients into an update, unless they or the loss are not finite.

    The decision is taken on the device, so that a GPU need not be waited for: after a step that is not finite no later
    one changes weights either, whenever somebody comes to look at `broken`. In fp16 an overflow is part of the search for
    a scale: that step alone is skipped, and `overflows` counts how many in a row were.
    """

    def __init__(
        self,
        model: ImageCaptionModel,
        config: TrainConfig,
        scaler: torch.amp.GradScaler,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype` is the run's precision."""
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizers = build_optimizers(model, config, dtype)
        self.scaler, self.clip = scaler, config.gradient_clip
        self.broken = torch.zeros((), device=model.device)
        """1 once a loss or a gradient was not finite."""
        self.overflows = torch.zeros((), device=model.device)
        # The fused optimizers ask the device itself whether to step; the others have to be asked from here.
        self.asks_device = all(getattr(o, "_step_supports_amp_scaling", False) for o in self.optimizers)

    def update(self, loss: Tensor, learning_rate: float) -> Tensor:
        """One update with the gradients gathered so far, clipped; they are gone afterwards. Returns their norm."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["share"]
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        bad = 1 - (norm.isfinite() & loss.isfinite()).float()
        if self.scaler.is_enabled():
            self.overflows = (self.overflows + 1) * bad
        else:
            self.broken = torch.maximum(self.broken, bad)
        stop = bad if self.scaler.is_enabled() else self.broken
        # All or none: what overflowed in one optimizer's gradients has spoilt the norm, and by clipping the other's. So they
        # are not stepped by the scaler, which asks after each one's own.
        for optimizer in self.optimizers:
            if self.asks_device:
                optimizer.grad_scale, optimizer.found_inf = None, stop  # type: ignore[attr-defined]
                optimizer.step()
            elif not stop:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm


class Average:
    """The weights' exponential moving average (EMA), a model of its own that is evaluated and saved.

    The average of the first steps reaches back less far, min(decay, (1 + step) / (10 + step)), so that it forgets the
    random weights it began with.
    """

    def __init__(self, model: ImageCaptionModel, decay: float) -> None:
        self.decay = decay
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}  # deepcopy takes these for copied
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: ImageCaptionModel, step: int) -> None:
        """Takes the weights after this step in."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        averages, learned = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(averages, learned, weight)
