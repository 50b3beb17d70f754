"""How far a run is, and what its latest steps were like."""

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
    """All that it is to make."""
    patience: int | None
    """It ends after so many scores in a row that are not better than the best; None: not for that."""
    step: int = 0
    best: float | None = None
    waited: int = 0
    """Scores since the best one."""

    @property
    def last(self) -> bool:
        """Whether no step is left to make."""
        return self.step == self.steps or self.waited >= (self.patience or sys.maxsize)

    def judge(self, score: float) -> bool:
        """Takes a score in, and says whether it is the best so far."""
        better = not math.isnan(score) and (self.best is None or score > self.best)
        self.best, self.waited = (score, 0) if better else (self.best, self.waited + 1)
        return better


def what_chose(lines: list[dict[str, Any]], best: str) -> str:
    """What the scores in a run's log say for its best checkpoint, by name: its own with the 95 % interval, and how many others
    lie within; nothing without others."""
    scored = {f"step-{line['step']:08d}": line for line in lines if "val_cider_d_low" in line}
    if best not in scored or len(scored) < 2:
        return ""
    own = scored.pop(best)
    score, low, high = (own[f"val_cider_d{end}"] for end in ("", "_low", "_high"))
    alike = sum(line["val_cider_d"] >= low for line in scored.values())
    others = f"{alike} of the other {len(scored)} cannot be told apart from it" if alike else "no other is within"
    return f"step {own['step']:,} by CIDEr-D {score:.3f} ({low:.3f} to {high:.3f}) of validation pictures; {others}"


class Meter:
    """What the steps since the last line of the log were like."""

    def __init__(self, learner: Learner, state: dict[str, Any]) -> None:
        """`state` is what an earlier process has saved of steps without a line."""
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
        """Takes a step in."""
        self.losses.append(done.loss)
        self.epoch_loss, self.epoch_steps = self.epoch_loss + done.loss, self.epoch_steps + 1
        self.steps.append((step, done))
        self.rewards, self.samples = self.rewards + done.rewards, self.samples + done.pairs

    def remember(self) -> None:
        """Keeps the weights as they are before the step whose update the next line tells of."""
        self.before = [parameter.detach().clone() for parameter in self.learner.updater.parameters]

    def state(self) -> dict[str, Any]:
        """What is to be saved of steps without a line, over all processes."""
        losses = self.world.sum(*(loss.item() for loss in self.losses))
        return {"losses": losses, "rewards": self.world.sum(self.rewards, self.samples), "epoch": self.known_epoch()}

    def known_epoch(self) -> tuple[float, int]:
        """The sum of the epoch's losses, over all processes, and how many there are."""
        return self.world.sum(self.epoch_loss.item())[0], self.epoch_steps

    def end_epoch(self) -> float | None:
        """The mean loss of the epoch that ends here, None before the first step; counting starts anew."""
        total, steps = self.known_epoch()
        self.epoch_loss, self.epoch_steps = torch.zeros_like(self.epoch_loss), 0
        return total / steps if steps else None

    def line(self, rate: float) -> dict[str, Any]:
        """The log's next line; counting starts anew behind it."""
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
