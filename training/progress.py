"""A run's progress, and the measurements of its latest steps."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.estimates import peak_rate, step_operations
from training.learner import Learner, Step
from training.optimizers import norm_of


@dataclass
class Progress:
    """How far a run is, and when it ends."""

    steps: int
    """Number of steps of the run."""
    patience: int | None
    """The run ends after this many scores in a row without a new best one; None: never."""
    step: int = 0
    best: float | None = None
    waited: int = 0
    """Scores since the best one."""

    @property
    def last(self) -> bool:
        """Whether the last step is done."""
        return self.step == self.steps or self.waited >= (self.patience or sys.maxsize)

    def judge(self, score: float) -> bool:
        """Record a score. Returns whether it is the best so far."""
        better = not math.isnan(score) and (self.best is None or score > self.best)
        self.best, self.waited = (score, 0) if better else (self.best, self.waited + 1)
        return better


def what_chose(lines: list[dict[str, Any]], best: str) -> str:
    """Describe the score that chose the best checkpoint (a name), from a run's log: its CIDEr-D with the 95 % interval,
    and how many other checkpoints lie within it. Empty if there are no others."""
    scored = {f"step-{line['step']:08d}": line for line in lines if "val_cider_d_low" in line}
    if best not in scored or len(scored) < 2:
        return ""
    line = scored.pop(best)
    score, low, high = (line[f"val_cider_d{end}"] for end in ("", "_low", "_high"))
    alike = sum(other["val_cider_d"] >= low for other in scored.values())
    others = f"{alike} of the other {len(scored)} scores in this interval" if alike else "no other is within"
    return f"step {line['step']:,} by CIDEr-D {score:.3f} ({low:.3f} to {high:.3f}) of validation pictures; {others}"


class Meter:
    """Measures the steps since the last line of the log."""

    def __init__(self, learner: Learner, state: dict[str, Any]) -> None:
        """`state`: what an earlier process saved about steps that no log line covers yet."""
        job = learner.job
        self.learner, self.world, self.device = learner, job.world, job.device
        mine = state if job.world.main else {}
        self.losses = [torch.tensor(loss, dtype=torch.float64) for loss in mine.get("losses", [])]
        self.losses += [torch.zeros(())] * (len(state.get("losses", [])) - len(self.losses))
        self.rewards, self.samples = mine.get("rewards", (0.0, 0))
        total, self.epoch_steps = state.get("epoch", (0.0, 0))
        self.epoch_loss = torch.tensor(total if job.world.main else 0.0, device=job.device)
        self.peak, _ = peak_rate(job.device, job.dtype)
        self.steps: list[tuple[int, Step]] = []
        self.since, self.waiting = time.perf_counter(), 0.0
        self.before: list[Tensor] = []

    def add(self, step: int, done: Step) -> None:
        """Add a finished step."""
        self.losses.append(done.loss)
        self.epoch_loss, self.epoch_steps = self.epoch_loss + done.loss, self.epoch_steps + 1
        self.steps.append((step, done))
        self.rewards, self.samples = self.rewards + done.rewards, self.samples + done.samples

    def remember(self) -> None:
        """Copy the weights before a step, so that the next line can give the norm of its update."""
        self.before = [parameter.detach().clone() for parameter in self.learner.updater.parameters]

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves about steps that no log line covers yet, over all processes."""
        losses = self.world.sum(*(loss.item() for loss in self.losses))
        return {"losses": losses, "rewards": self.world.sum(self.rewards, self.samples), "epoch": self.known_epoch()}

    def known_epoch(self) -> tuple[float, int]:
        """The sum of the epoch's losses over all processes, and the number of steps."""
        return self.world.sum(self.epoch_loss.item())[0], self.epoch_steps

    def end_epoch(self) -> float | None:
        """The mean loss of the epoch that ends now, None before the first step. Resets the sums."""
        total, steps = self.known_epoch()
        self.epoch_loss, self.epoch_steps = torch.zeros_like(self.epoch_loss), 0
        return total / steps if steps else None

    def line(self, rate: float) -> dict[str, Any]:
        """The next line of the log. Resets the measurements."""
        job, world, state = self.learner.job, self.world, self.state()
        done, parameters = self.steps[-1][1], self.learner.updater.parameters
        counts = ((len(step.rows), step.pairs) for _, step in self.steps)
        pictures, pairs = world.sum(*(sum(column) for column in zip(*counts, strict=True)))
        seconds = time.perf_counter() - self.since
        operations = pictures * step_operations(job.model.config, pairs / max(pictures, 1), job.tokens)
        torch._foreach_sub_(self.before, [parameter.detach() for parameter in parameters])
        values = {
            "epoch": self.steps[-1][0] / job.steps_per_epoch,
            "loss": sum(state["losses"]) / len(state["losses"]),
            "learning_rate": rate,
            "gradient_norm": done.norm.item() if done.norm.isfinite() else None,
            "parameter_norm": norm_of(p.detach() for p in parameters).item(),
            "update_norm": norm_of(self.before).item(),
            "pictures_per_second": pictures / seconds,
            "pairs_per_second": pairs / seconds,
            "mfu": operations / seconds / self.peak / world.size,
            "data_wait": self.waiting / seconds,
        }
        if done.contrast is not None:
            values["contrastive_loss"] = done.contrast.item()
        if self.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.learner.scaler.is_enabled():
            values |= {
                "loss_scale": self.learner.scaler.get_scale(),
                "overflows": self.learner.updater.overflows.item(),
            }
        if self.learner.critic:
            rewards, samples = state["rewards"]
            values["reward"] = rewards / max(samples, 1)
        self.losses, self.steps, self.before = [], [], []
        self.since, self.waiting, self.rewards, self.samples = time.perf_counter(), 0.0, 0.0, 0
        return values
