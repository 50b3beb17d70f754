"""The training loop: forward, backward, update; a look at validation pictures; checkpoints; the finished model.

`train(config)` is all that main.py calls. Batches, dropout and samples are pure functions of (seed, step), so a run
that was stopped anywhere goes on as if it had not been, with any number of processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import TrainConfig, UserError, ViTGPT2Config
from data.scenes import mark, scene_from_dict, score_scenes
from data.tokenizer import decode
from dataset import make_dataloader, micro_batches, to_device
from evaluate import caption_loader, caption_loss, evaluate_dataset
from files import put_in_place, write_json
from model import ImageCaptionModel, use_flash_attention
from scoring.results import MoreScores, print_metrics
from training.checkpoint import (
    checkpoints,
    clean,
    link_all,
    load_checkpoint,
    load_optimizers,
    optimizer_tensors,
    save_checkpoint,
    training_in,
)
from training.distributed import World, join_world, leave_world
from training.estimates import peak_rate, step_operations
from training.job import Job, caption_length, choose_where, find_run, plan, prepare, write_run
from training.optimizers import Average, Updater, learning_rate_at, norm_of
from training.scst import SelfCritic
from training.tracking import Log, SilentLog, draw_curves
from utils import StopSignal, autocast, keep_freed_memory
from weights.file import MODEL_FILE

LOG_INTERVAL = 10  # steps


def train(config: TrainConfig) -> int:
    """A whole run, from data to the finished model and its evaluation. Returns an exit code: 0, or 130/143 when stopped."""
    world = join_world(config.device)
    with contextlib.ExitStack() as stack:
        chosen: Any = None
        if world.main:
            run = find_run(config)
            stack.enter_context(training_in(run))
            chosen = run, choose_where(config, run)
        else:  # what is said is said once
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        run, (device, device_reason, dtype, precision_reason) = world.agree(chosen)
        if device.type == "cpu":
            keep_freed_memory()
        use_flash_attention(config.flash_attention)
        print(f"device      {device} ({device_reason})\nprecision   {str(dtype)[6:]} ({precision_reason})", flush=True)
        if world.size > 1:
            print(f"processes   {world.size}, {world.local_size} on this machine")
        if world.main:
            clean(run)
            job = prepare(config, world, run, device, dtype)
        known = world.agree(job.tokenizer if world.main else None)  # the others find what the first one has made
        if not world.main:
            job = prepare(config, world, run, device, dtype, known)
        try:
            stopped = learn(job)
            if stopped is None:
                finish(job)
        except RuntimeError as error:
            if world.size == 1:
                raise
            if config.debug:
                traceback.print_exc()
            reason = next(iter(str(error).strip().splitlines()), "")
            print(f"error: process {world.rank}: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
            os._exit(1)  # kernels that wait for a process that is gone would keep this one from ending
        leave_world(world)
    return stopped or 0


# One step


@dataclass
class Step:
    """What one step gave, on the device: its mean loss, its gradients' norm; and from this process's share which pictures
    (rows of the table) and how many pairs it learned from, and the sum of the rewards of sampled captions."""

    loss: Tensor
    norm: Tensor
    rows: list[int]
    pairs: int
    rewards: float = 0.0


class Learner:
    """This process's part of every step: forward, backward, update."""

    def __init__(self, job: Job) -> None:
        self.job, self.model, config = job, job.model, job.config
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.dtype == torch.float16)
        self.updater = Updater(job.model, config, self.scaler, job.dtype)
        self.average = Average(job.model, config.ema) if config.ema else None
        self.critic = None
        if config.objective == "scst":
            self.critic = SelfCritic(job.datasets["train"].table, config, caption_length(job))
        self.module: Any = job.model
        if job.world.size > 1:
            ids = [job.device.index or torch.cuda.current_device()] if job.device.type == "cuda" else None
            self.module = DistributedDataParallel(
                job.model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if config.compile:
            self.module = torch.compile(self.module)

    @property
    def judged(self) -> ImageCaptionModel:
        """The model that is evaluated and kept: the average, where there is one."""
        return self.average.model if self.average else self.model

    def step(self, batch: dict[str, Any], step: int, rate: float) -> Step:
        """Learns from a batch, this process's share of the step's, at a learning rate. Every token of the step weighs the
        same, whichever process and part of the batch it is in."""
        job, config, world = self.job, self.job.config, self.job.world
        # Dropout and samples are functions of the step: resuming needs no state of a generator.
        torch.manual_seed(
            int(np.random.SeedSequence((config.seed, step, world.rank)).generate_state(1, np.uint64)[0] >> 1)
        )
        parts = list(micro_batches(batch, -(-config.batch_size // world.size)))
        if self.critic:
            parts = [self.critic.sample(self.model, self.moved(part), job.device, job.dtype) for part in parts]
        words_blanked, smoothing = (0.0, 0.0) if self.critic else (config.word_dropout, config.label_smoothing)
        counts = [int(part["lengths"].sum()) for part in parts]
        (total,) = world.sum(sum(counts))
        loss = torch.zeros((), device=job.device)
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            part = part if self.critic else self.moved(part)
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last or world.size == 1 else self.module.no_sync():
                with autocast(job.device, job.dtype):
                    part_loss = self.module(
                        part["pixel_values"],
                        blank_words(part["input_ids"], words_blanked, self.model.config),
                        part["lengths"],
                        part["labels"],
                        part["positions"],
                        label_smoothing=smoothing,
                        weights=part.get("weights"),
                    ).loss
                share = count / max(total, 1)  # no tokens where no picture of the step can be read
                self.scaler.scale(part_loss * (share * world.size)).backward()  # gradients are averaged over processes
            loss += part_loss.detach() * share
        norm = self.updater.update(loss, rate)
        if self.average:
            self.average.update(self.model, step)
        pairs = sum(int((part["lengths"] > 0).sum()) for part in parts)
        rewards = sum(part["rewards"].sum().item() for part in parts) if self.critic else 0.0
        return Step(loss, norm, batch["rows"], pairs, rewards)

    def moved(self, part: dict[str, Any]) -> dict[str, Any]:
        """The part of a batch on the device."""
        return to_device(part, self.job.device, self.job.datasets["train"])

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Writes a checkpoint; the first process does. `state` is what the loop itself has to remember."""
        job, world = self.job, self.job.world
        if world.main:
            tensors = optimizer_tensors(self.updater.optimizers)
            if self.average:
                tensors |= {f"weights.{name}": tensor.cpu() for name, tensor in self.model.own_state().items()}
            size = sum(tensor.nbytes for tensor in (*tensors.values(), *self.model.own_state().values()))
            scaling = {"scaler": self.scaler.state_dict(), "overflows": self.updater.overflows.item()}
            keep = job.config.keep_checkpoints
            save_checkpoint(
                job.run, state["step"], self.judged.save_file, tensors, state | scaling, size, best=best, keep=keep
            )
        world.wait()

    def load(self) -> dict[str, Any]:
        """Goes back to the newest whole checkpoint; returns the loop's own state, {} where there is none."""
        found = load_checkpoint(self.job.run)
        if found is None:
            return {}
        folder, weights, tensors, state = found
        if self.job.world.main:  # a process that was killed may not have come to it
            link_all(folder, state["best_checkpoint"])
        if self.average:
            self.average.model.load_own_state(weights)
            weights = {name: tensors.pop(f"weights.{name}") for name in weights}
        self.model.load_own_state(weights)
        load_optimizers(tensors, self.updater.optimizers)
        self.updater.overflows.fill_(state["overflows"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return state

    def check(self, steps: list[tuple[int, Step]]) -> None:
        """Raises UserError when one of the latest steps was not finite, and names it; no weights were changed since."""
        job, table = self.job, self.job.datasets["train"].table
        overflows = int(self.updater.overflows.item())
        if overflows >= job.config.overflow_limit:
            raise UserError(
                f"the gradients of {overflows} steps in a row up to {steps[-1][0]} overflowed in fp16, down to a scale of "
                f"{self.scaler.get_scale():g}: use --precision bf16, or lower --learning-rate"
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
                    f"the {what} is not finite at step {number:,}, of the pictures {', '.join(names[:20])}{more}; the "
                    "weights are as they were before it: look at those, lower --learning-rate, or use --precision fp32"
                )


def blank_words(input_ids: Tensor, share: float, config: ViTGPT2Config) -> Tensor:
    """input_ids with a share of its tokens, never the first, replaced by the padding token."""
    if not share:
        return input_ids
    blank = torch.rand(input_ids.shape, device=input_ids.device) < share
    blank[..., 0] = False
    return input_ids.masked_fill(blank, config.pad_token_id or 0)


# The loop


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


def learn(job: Job) -> int | None:
    """Trains from the newest checkpoint, or from the start, to the last step. Returns an exit code when it was stopped."""
    config, run, world = job.config, job.run, job.world
    if config.resume == "never" and world.main:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        (run / "wandb.id").unlink(missing_ok=True)
    world.wait()
    learner = Learner(job)
    state = learner.load()
    step, waited, best = state.get("step", 0), state.get("waited", 0), state.get("best")
    if len(set(world.gather((step, run.is_dir())))) > 1:
        raise UserError(f"{run}: not all processes see the same there: the folder must be on a disk that they share")
    print(plan(job, step), flush=True)
    log: Log | SilentLog = SilentLog()
    if world.main:
        write_run(job, finished=False)
        log = Log(run, step, config)

    train_set, patience = job.datasets["train"], config.patience or sys.maxsize
    at_hand = train_set.pixels.kept is not None and config.augmentation.moves_pixels_only
    loader = make_dataloader(
        train_set,
        job.pictures_a_step,
        first_step=step,
        last_step=job.steps,
        shuffle=True,
        num_workers=0 if at_hand else min(16, max(1, (os.cpu_count() or 1) // world.local_size), config.num_workers),
        pin_memory=job.device.type == "cuda",
        rank=world.rank,
        world_size=world.size,
    )
    batches = iter(loader)
    job.model.train()
    stop, meter = StopSignal(grace=5.0 if world.size > 1 else 0.0), Meter(learner, state)
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds; a log file is not a terminal
    bar = tqdm(
        desc="training",
        total=job.steps,
        initial=step,
        unit="step",
        smoothing=0.05,
        mininterval=pause,
        disable=not world.main,
    )
    first_step, started = step, time.perf_counter() - state.get("seconds", 0.0)
    with bar:  # an error's line begins below it
        while True:  # one time more than there are steps, so that the last look, save and stop are no special case
            stopping = world.sum(stop.received is not None)[0] > 0
            last = step == job.steps or waited >= patience
            # Where a trained model starts from is of interest.
            if step > first_step or (config.init_model and not state):
                looking, better = time.perf_counter(), False
                ended = last or step % job.steps_per_epoch == 0
                score = look(learner, step, ended, log, meter.end_epoch() if ended else None)
                if score is not None:
                    better = not math.isnan(score) and (best is None or score > best)
                    best, waited = (score, 0) if better else (best, waited + 1)
                    last = last or waited >= patience
                if ended or stopping or step % (config.checkpoint_interval or sys.maxsize) == 0:
                    learner.check(meter.steps)
                    state = {"step": step, "best": best, "waited": waited, **meter.state()}
                    learner.save(state | {"seconds": time.perf_counter() - started}, better)
                meter.since += time.perf_counter() - looking  # not counted in the speed
            if last or stopping:
                break

            asked = time.perf_counter()
            batch = next(batches)
            meter.waiting += time.perf_counter() - asked
            if world.sum(len(batch["bad"]))[0]:
                for bad in world.gather(batch["bad"]):
                    if world.main:
                        job.bad.add(train_set.table, bad)
            logging = (step + 1) % LOG_INTERVAL == 0 or step + 1 == job.steps
            if logging:
                meter.before = [parameter.detach().clone() for parameter in learner.updater.parameters]
            rate = learning_rate_at(step, job.steps, config)
            done = learner.step(batch, step, rate)
            step += 1
            meter.add(step, done)
            bar.update()
            if logging or job.device.type == "cpu":  # a GPU would have to be waited for
                learner.check(meter.steps)
            if logging:
                line = meter.line(rate)
                log.write(step, **line)
                said = "loss {loss:.3f}, lr {learning_rate:.1e}, {pictures_per_second:.0f} pictures/s, {pairs_per_second:.0f} pairs/s"
                bar.set_postfix_str(said.format(**line), refresh=False)
    log.close()
    stop.restore()
    if last:
        return None
    if step > first_step:
        print(f"stopped at step {step:,} and saved: the same command goes on from there")
    return stop.exit_code


def look(learner: Learner, step: int, ended: bool, log: Log | SilentLog, train_loss: float | None) -> float | None:
    """Sample captions, every eval_interval; and where an epoch has ended its mean loss, the validation loss and CIDEr-D of
    greedy captions. Returns the score that the best checkpoint has most of, where there is one."""
    job, model, val = learner.job, learner.judged, learner.job.datasets["val"]
    config, world, score = job.config, job.world, None
    if ended:
        own: dict[str, Any] = {"rank": world.rank, "world_size": world.size}
        val_loss = caption_loss(
            model, make_dataloader(val, config.batch_size, **own), job.device, job.dtype, world=world
        )
        values, score = {"val_loss": val_loss} | ({} if train_loss is None else {"train_loss": train_loss}), -val_loss
        if config.val_pictures:
            some = min(len(val), config.val_pictures)
            loader = make_dataloader(val, config.batch_size, last_step=-(-some // config.batch_size), **own)
            options = {"num_beams": 1, "max_length": caption_length(job)}
            captioned = caption_loader(
                model, loader, model.tokenizer, job.device, job.dtype, progress=False, world=world, **options
            )
            if captioned.captions:  # none where all of those pictures are damaged
                score = world.agree(captioned.metrics()["cider_d"] if world.main else 0.0)
                unique = len(set(captioned.captions)) / len(captioned.captions)
                values |= {"val_cider_d": score, "val_unique_captions": unique}
        log.write(step, epoch=step / job.steps_per_epoch, **values)
        epoch, rest = divmod(step, job.steps_per_epoch)
        if model.adapters is not None and epoch and not rest and world.main:  # a few MB: each is kept
            model.save_file(job.run / f"{config.preset}_epoch_{epoch}.safetensors")
        said = f", CIDEr-D {score:.3f}" if "val_cider_d" in values else ""
        said += "" if train_loss is None else f", training loss {train_loss:.3f}"
        tell(world, f"step {step:,}: validation loss {val_loss:.3f}{said}")
    if (step == job.steps or step % config.eval_interval == 0) and world.main:
        samples = sample_captions(job, model)
        log.write(step, samples=samples)
        tell(world, "\n".join(f"  {name}: {caption}" for name, caption in samples.items()))
    if config.objective != "scst" or model is not learner.model:
        model.copies.drop()  # they are stale after the next step
    return score


def tell(world: World, text: str) -> None:
    """Prints above the progress bar, once."""
    if world.main:
        tqdm.write(text)


def sample_captions(job: Job, model: ImageCaptionModel) -> dict[str, str]:
    """Greedy captions of the same four validation pictures every time, by file name."""
    dataset = job.datasets["val"]
    rows = list(range(0, len(dataset), max(1, len(dataset) // 4)))[:4]
    samples = [dataset[0, row] for row in rows]
    pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None]).to(job.device)
    with autocast(job.device, job.dtype):
        sequences = model.generate(pixels, max_length=caption_length(job)).sequences
    captions = decode(model.tokenizer, sequences)
    return {Path(dataset.table.name_of(row)).name: caption for row, caption in zip(rows, captions, strict=True)}


# The end of a run


def finish(job: Job) -> None:
    """Puts the best model in place, evaluates it on the test pictures, draws the curves and says where everything is."""
    run, config, world, test = job.run, job.config, job.world, job.datasets["test"]
    best = run / "checkpoints" / "best" / "model.safetensors"
    model = job.model
    if config.merge:
        model = ImageCaptionModel.from_pretrained(best, config.base_dir).to(job.device)
        model.merged = None  # from here on it is one model
    else:
        model.load_own_state(load_file(best))
    model.eval()
    previous = None
    if world.main:
        if config.merge:
            model.save_file(run / MODEL_FILE)
        else:
            put_in_place(best, run / MODEL_FILE)
        previous = put_in_place(run / MODEL_FILE, Path(MODEL_FILE))
    captioned, metrics = evaluate_dataset(
        model,
        test,
        job.device,
        job.dtype,
        run,
        bad=job.bad,
        more=MoreScores(training_captions=job.datasets["train"].table.captions().to_pylist()),
        world=world,
        max_length=caption_length(job),
    )
    if not world.main:
        return
    if config.dataset == "scenes":
        metrics |= score_drawn_scenes(config.data_dir or run / "scenes", run, captioned.captions)
    write_json(run / "metrics.json", metrics)
    draw_curves(run)
    state = json.loads((checkpoints(run)[-1] / "state.json").read_text(encoding="utf-8"))
    write_run(job, finished=True, steps=state["step"], seconds=round(state["seconds"]))
    print_metrics(metrics)
    if previous:
        print(f"another run's model was kept as {previous}")
    pictures = ", ".join(str(run / name) for name in ("samples.png", "curves.png"))
    print(f"model       {MODEL_FILE}\npictures    {pictures}\nnumbers     {run / 'metrics.json'}")
    if isinstance(test.table.picture(0), Path):
        print(f"try it      python example_usage.py {test.table.name_of(0)}")


def score_drawn_scenes(directory: Path, run: Path, captions: list[str]) -> dict[str, float]:
    """Marks the test scenes' captions, writes scenes_test.json (file, truth, caption, marks), returns the shares."""
    annotations = json.loads((directory / "annotations" / "captions_test2017.json").read_text(encoding="utf-8"))
    truths = [scene_from_dict(image["scene"]) for image in annotations["images"]]
    write_json(
        run / "scenes_test.json",
        [
            {"file": image["file_name"], "truth": image["scene"], "caption": caption, "right": mark(truth, caption)}
            for image, truth, caption in zip(annotations["images"], truths, captions, strict=True)
        ],
    )
    return score_scenes(truths, captions)
