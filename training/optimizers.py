"""Optimizers, learning rates, the update of the weights, and their running average.

The learning rate of a parameter is the schedule's, times a factor for its layer and for encoder or decoder.
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
from training.sharding import full_tensor
from weights.file import layer_of, part_of

MOMENTUM = 0.95  # Muon's


def depth_below_top(name: str, layers: dict[str, int]) -> int:
    """Number of layers between a parameter and the output of its encoder or decoder: 0 for the last norm, most for
    embeddings."""
    part, layer = name.split(".")[0], layer_of(name)
    if part_of(name) == "new":
        return 0
    if layer is not None:
        return layers[part] - layer
    return 0 if name.split(".")[-2] in ("norm", "ln_f", "lm_head") else layers[part] + 1


def freeze(model: ImageCaptionModel, parts: tuple[str, ...]) -> None:
    """Freeze these of encoder, decoder and new. Raises UserError if nothing would be left to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze {' '.join(parts)}: nothing is left to train: freeze less")


class Muon(torch.optim.Optimizer):
    """Momentum SGD that makes each matrix's update nearly orthogonal (Jordan 2024, kellerjordan.github.io/posts/muon),
    with updates as large as AdamW's (Liu et al. 2025, arXiv:2502.16982).

    torch.optim.Muon always computes in bf16, which most CPUs emulate, 10 to 70 times slower than fp32. And it handles
    matrices one by one; here, those of the same shape are multiplied together.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        cautious: bool = False,
    ) -> None:
        """params: matrices, or groups of them; dtype: of the products; cautious: see TrainConfig.cautious_decay."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype, self.cautious = dtype, cautious
        # torch's protocol for optimizers that read on the device whether to skip the step: where `found_inf` is 1.
        self._step_supports_amp_scaling = self.param_groups[0]["params"][0].device.type == "cuda"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient. The closure is not called."""
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
            if not self.cautious:
                torch._foreach_mul_(learned, 1 - decay)
            for shape in dict.fromkeys(update.shape for update in updates):
                same = [number for number, update in enumerate(updates) if update.shape == shape]
                made = orthogonalized(torch.stack([updates[number] for number in same]), self.dtype)
                made = made if stop is None else made.masked_fill(stop > 0, 0)
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                weights, made = [learned[number] for number in same], made.to(momenta[0].dtype)
                if self.cautious:  # the update makes the weight smaller: decay it too
                    for weight, update in zip(weights, made, strict=True):
                        weight.mul_(1 - decay * (weight * update > 0))
                torch._foreach_add_(weights, list(made), alpha=-rate)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values close to 1: matrices (N, rows, columns) -> the same shape in `dtype`. Five steps of
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
    """The dtype of Muon's products for a run in `dtype`: on a GPU bf16 if supported, on other devices bf16 for a run in
    bf16, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def build_optimizers(
    model: ImageCaptionModel, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the layers' matrices, and AdamW for embeddings, biases and norms. Weight
    decay is for the layers' matrices only. `dtype` is the run's precision.

    A group's `share` is its factor of the schedule's learning rate: that of encoder or decoder, times layer_decay for
    every layer above.
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
        product = product_dtype(model.device, dtype)
        made.append(Muon(described[True], lr=rate, dtype=product, cautious=config.cautious_decay))
    if described[False]:
        made.append(torch.optim.AdamW(described[False], lr=rate, betas=betas, fused=fused))
    return made


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then down to zero at the end of the run, as the schedule says."""
    warmup = min(config.warmup_steps, steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "linear":
        return config.learning_rate * (steps - step) / max(1, steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together, a scalar on their device."""
    return full_tensor(nn.utils.get_total_norm(list(tensors)))


class Updater:
    """Updates the weights with the accumulated gradients, unless these or the loss are not finite.

    The device decides, so that nothing waits for a GPU: after a step that is not finite, no later step changes the
    weights, no matter when `broken` is read. In fp16 overflows are normal in the search for a loss scale: only that
    step is skipped, and `overflows` counts the skipped steps in a row.
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
        """1 after a loss or a gradient that was not finite."""
        self.overflows = torch.zeros((), device=model.device)
        # Fused optimizers read on the device whether to step; for the others the decision is read here.
        self.asks_device = all(getattr(o, "_step_supports_amp_scaling", False) for o in self.optimizers)

    def update(self, loss: Tensor, learning_rate: float) -> Tensor:
        """Clip the accumulated gradients, update the weights, and drop the gradients. Returns the gradients' norm."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["share"]
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        bad = 1 - (norm.isfinite() & loss.isfinite()).float()
        if self.scaler.is_enabled():
            self.overflows = (self.overflows + 1) * bad
        else:
            self.broken = torch.maximum(self.broken, bad)
        stop = bad if self.scaler.is_enabled() else self.broken
        # All optimizers step or none: an overflow in one's gradients spoils the norm, and clipping by it the gradients
        # of all. So scaler.step is not used: it checks each optimizer separately.
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
    """A second model with the exponential moving average (EMA) of the weights, which is validated and saved.

    In the first steps the decay is smaller, min(decay, (1 + step) / (10 + step)), so that the average forgets the
    random initial weights.
    """

    def __init__(self, model: ImageCaptionModel, decay: float) -> None:
        self.decay = decay
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}  # deepcopy does not copy these
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: ImageCaptionModel, step: int) -> None:
        """Add the weights after this step to the average."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        averages, learned = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        torch._foreach_lerp_(averages, learned, weight)
