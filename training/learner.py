"""The training step (forward, backward, update), and saving and loading its state."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import UserError, ViTGPT2Config
from dataset import Batch
from model import ImageCaptionModel, flash_attn_function
from training.checkpoint import link_all, load_checkpoint, load_optimizers, optimizer_tensors, save_checkpoint
from training.job import Job
from training.optimizers import Average, Updater
from training.scst import SelfCritic
from training.sharding import collected, empty, fill, load_weights, shard
from utils import autocast

LONG_RUN = 2000  # steps: compiling takes a minute or two, and saves an H100 40 ms of each step at base size


@dataclass
class Step:
    """Results of one step: on the device, the mean loss of the captions and the gradients' norm. Of this process's share:
    the pictures (rows of the table), the number of picture-caption pairs, the number of sampled captions and the sum of
    their rewards, and the contrastive loss of its last micro-batch, on the device."""

    loss: Tensor
    norm: Tensor
    rows: list[int]
    pairs: int
    samples: int = 0
    rewards: float = 0.0
    contrast: Tensor | None = None


class Learner:
    """Runs this process's share of every step: forward, backward, update."""

    def __init__(self, job: Job) -> None:
        self.job, self.model, config = job, job.model, job.config
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.dtype == torch.float16)
        self.average = Average(job.model, config.ema) if config.ema else None
        self.sharded = config.shard and job.world.size > 1
        if self.sharded:  # job.model stays the plain model for validation
            self.model = shard(job.model)
            if self.average:
                self.average.model = shard(self.average.model)
        self.updater = Updater(self.model, config, self.scaler, job.dtype)
        self.best: str | None = None  # name of the best checkpoint
        self.critic = None
        if config.objective == "scst":
            self.critic = SelfCritic(job.datasets["train"].table, config, job.caption_length, job.device, job.words)
        self.module: Any = self.model
        if job.world.size > 1 and not self.sharded:
            ids = [job.device.index or torch.cuda.current_device()] if job.device.type == "cuda" else None
            options: dict[str, Any] = {"device_ids": ids, "gradient_as_bucket_view": True}
            known = inspect.signature(DistributedDataParallel).parameters  # buffers never change
            options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
            self.module = DistributedDataParallel(job.model, **options)
        self.eager, self.full_size = self.module, config.batch_size // job.world.size
        if compiles(job):
            flash_attn_function()  # import it here: the compiler cannot trace the import
            self.module = torch.compile(self.module, fullgraph=True)
            if job.world.main:
                print("compile     the first step is compiled: a minute or two on a GPU (--no-compile turns this off)")

    @property
    def judged(self) -> ImageCaptionModel:
        """The model to validate and save: the average if there is one. With a sharded model a plain one, see gather."""
        return self.average.model if self.average and not self.sharded else self.job.model

    def gather(self) -> None:
        """Copy all weights of a sharded model into the plain `judged` model; all processes must call it."""
        if self.sharded:
            fill(self.job.model, self.average.model if self.average else self.model)

    def release(self) -> None:
        """Free the weights that gather copied."""
        if self.sharded:
            empty(self.job.model)

    def step(self, batch: Batch, step: int, rate: float) -> Step:
        """Train on this process's share of a step's batch, at learning rate `rate`. Every token has the same weight, in
        all processes and micro-batches; only the contrastive loss depends on how many pictures are together in one."""
        job, config, world = self.job, self.job.config, self.job.world
        # Dropout and samples depend on seed, step and process alone: resuming needs no generator's state.
        torch.manual_seed(
            int(np.random.SeedSequence((config.seed, step, world.rank)).generate_state(1, np.uint64)[0] >> 1)
        )
        parts = list(batch.micro(-(-config.batch_size // world.size)))
        if self.critic:
            parts = [self.critic.sample(self.model, self.moved(part), job.device, job.dtype) for part in parts]
        words_blanked, smoothing = (0.0, 0.0) if self.critic else (config.word_dropout, config.label_smoothing)
        counts = [int(part.lengths.sum()) for part in parts]
        (total,) = world.sum(sum(counts))
        loss, contrast = torch.zeros((), device=job.device), None
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            part = part if self.critic else self.moved(part)
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last or world.size == 1 or self.sharded else self.module.no_sync():
                with autocast(job.device, job.dtype):
                    part_loss, part_contrast = self.losses(part, words_blanked, smoothing)
                learned = part_loss
                if part_contrast is not None:
                    learned = learned + config.contrastive_weight * part_contrast
                    contrast = part_contrast.detach()
                share = count / max(total, 1)  # no tokens if none of the step's pictures can be read
                self.scaler.scale(learned * (share * world.size)).backward()  # gradients are averaged over processes
            loss += part_loss.detach() * share
        norm = self.updater.update(loss, rate)
        if self.average:
            self.average.update(self.model, step)
        pairs = sum(int((part.lengths > 0).sum()) for part in parts)
        scores = [part.rewards for part in parts if part.rewards is not None]
        samples, rewards = sum(each.numel() for each in scores), sum(each.sum().item() for each in scores)
        return Step(loss, norm, batch.rows, pairs, samples, rewards, contrast)

    def losses(self, part: Batch, words_blanked: float, smoothing: float) -> tuple[Tensor, Tensor | None]:
        """The mean loss of a micro-batch, a scalar on the device, and the contrastive one if it has a weight."""
        input_ids, module = blank_words(part.input_ids, words_blanked, self.model.config), self.module
        if module is not self.eager:
            if len(input_ids) < self.full_size:  # compiling again for an epoch's smaller last batch is not worth it
                module = self.eager
            for tensor, axis in ((input_ids, 2), (part.labels, 2), (part.positions, 0)):
                torch._dynamo.maybe_mark_dynamic(tensor, axis)  # else a second length would compile again
        pixels, _, *about = part.inputs
        contrastive = self.job.config.contrastive_weight > 0 and self.critic is None
        options = {"label_smoothing": smoothing, "weights": part.weights, "contrastive": contrastive}
        found = module(pixels, input_ids, *about, **options)
        return found.loss, found.contrastive_loss

    def moved(self, part: Batch) -> Batch:
        """The micro-batch moved to the device."""
        return part.to(self.job.device, self.job.datasets["train"])

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Save a checkpoint, by the first process; all must call it. `state` is the training loop's state."""
        job, world = self.job, self.job.world
        self.best = f"step-{state['step']:08d}" if best else self.best
        if world.main or self.sharded:
            tensors = optimizer_tensors(self.updater.optimizers)
            if self.average:
                tensors |= {f"weights.{name}": collected(tensor) for name, tensor in self.model.own_state().items()}
        if world.main:
            size = sum(tensor.nbytes for tensor in (*tensors.values(), *self.judged.own_state().values()))
            scaling = {"scaler": self.scaler.state_dict(), "overflows": self.updater.overflows.item()}
            keep = job.config.keep_checkpoints
            save_checkpoint(
                job.run.folder,
                state["step"],
                self.judged.save_file,
                tensors,
                state | scaling,
                size,
                best=self.best,
                keep=keep,
            )
        world.wait()

    def load(self) -> dict[str, Any]:
        """Load the checkpoint to resume from. Returns the training loop's state; {} for a new run."""
        folder = self.job.checkpoint
        if folder is None:
            return {}
        weights, tensors, state = load_checkpoint(folder)
        self.best = state["best_checkpoint"]
        if self.job.world.main:  # the links are missing if the process was killed before it made them
            link_all(folder, self.best)
        if self.average:
            load_weights(self.average.model, weights)
            weights = {name: tensors.pop(f"weights.{name}") for name in weights}
        load_weights(self.model, weights)
        load_optimizers(tensors, self.updater.optimizers)
        self.updater.overflows.fill_(state["overflows"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return state

    def check(self, steps: list[tuple[int, Step]]) -> None:
        """Raise UserError that names the step if one of the latest was not finite. No step since changed the weights."""
        job, table = self.job, self.job.datasets["train"].table
        overflows = int(self.updater.overflows.item())
        if overflows >= job.config.overflow_limit:
            raise UserError(
                f"the gradients of {overflows} steps in a row, up to step {steps[-1][0]}, overflowed in fp16 (loss scale "
                f"{self.scaler.get_scale():g}): use --precision bf16, or lower --learning-rate"
            )
        if not self.updater.broken.item():
            return
        for number, step in steps:
            if not (step.loss.isfinite() and step.norm.isfinite()):
                rows = [row for some in job.world.gather(step.rows) for row in some]
                names = [str(table.id_of(row)) for row in rows]
                more = f" and {len(names) - 20} more" if len(names) > 20 else ""
                what = "gradient" if step.loss.isfinite() else "loss"
                raise UserError(
                    f"the {what} is not finite at step {number:,}, of the pictures {', '.join(names[:20])}{more}; the step "
                    "has not changed the weights: check the pictures, lower --learning-rate, or use --precision fp32"
                )


def compiles(job: Job) -> bool:
    """Whether the step is compiled. By default: on a GPU, in a long run, without adapters, shards or another language
    model."""
    if job.config.compile is None:
        ours = not job.config.adapts and not job.config.shard and not job.model.config.language_model
        compiler = importlib.util.find_spec("triton") is not None  # torch brings it on Linux, not on Windows
        return job.device.type == "cuda" and compiler and ours and job.steps >= LONG_RUN
    return job.config.compile


def blank_words(input_ids: Tensor, share: float, config: ViTGPT2Config) -> Tensor:
    """Replace a share of the tokens, never the first, by the padding token: input_ids (N, K, T) -> the same shape."""
    if not share:
        return input_ids
    blank = torch.rand(input_ids.shape, device=input_ids.device) < share
    blank[..., 0] = False
    return input_ids.masked_fill(blank, config.pad_token_id)
