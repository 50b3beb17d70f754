"""The training loop: steps, validation, checkpoints, and at the end the finished model.

main.py calls `train(config)`. Batches are pure functions of (seed, step), dropout and samples of (seed, step, process), so
a run can stop at any step and resume as if it had not stopped. Another number of processes sees the same batches, with
other dropout and samples, and its contrastive loss compares other pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import TrainConfig, UserError
from data.scenes import mark, scene_from_dict, score_scenes
from data.tokenizer import decode
from dataset import make_dataloader
from evaluate import caption_batches, caption_loss, evaluate_dataset
from model import ImageCaptionModel, use_flash_attention
from scoring.results import MoreScores, print_metrics
from training.checkpoint import clean, final_checkpoint, put_aside, training_in
from training.distributed import join_world, leave_world
from training.job import Job, choose_where, plan, prepare, write_run
from training.learner import Learner
from training.optimizers import learning_rate_at
from training.progress import Meter, Progress, what_chose
from training.run import Run
from training.tracking import Log, SilentLog, draw_curves
from utils import (
    Printed,
    StopSignal,
    autocast,
    file_hash,
    first_line,
    keep_freed_memory,
    named,
    put_in_place,
    read_log,
    shown,
    write_json,
)
from weights.file import MODEL_FILE

LOG_INTERVAL = 10  # steps
clock = time.monotonic  # of --checkpoint-minutes


def train(config: TrainConfig) -> int:
    """Train a model, from the data to the finished model and its evaluation. Returns an exit code: 0; 1 if the best
    model was lost, or the finished one could not be copied here; 130 or 143 when stopped."""
    world = join_world(config.device)
    with contextlib.ExitStack() as stack:
        chosen: Any = None
        if world.main:
            if Path(MODEL_FILE).is_dir():
                raise UserError(f"{MODEL_FILE}: a folder has the finished model's name: rename or move it")
            run = Run.find(config)
            stack.enter_context(training_in(run.folder))
            chosen = choose_where(config, run)
        else:  # only the first process prints
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w", errors="replace")))
            )
        chosen = world.agree(chosen)
        if chosen.device.type == "cpu":
            keep_freed_memory()
        use_flash_attention(config.flash_attention)
        print(f"device      {chosen.device} ({chosen.device_reason})")
        print(f"precision   {str(chosen.dtype)[6:]} ({chosen.precision_reason})", flush=True)
        if world.size > 1:
            print(f"processes   {world.size}, {world.local_size} on this machine")
        elif config.shard:
            print("shard       has no effect with one process")
        if world.main:
            clean(run.folder)
            job = prepare(config, world, chosen)
            chosen = dataclasses.replace(chosen, tokenizer=job.tokenizer)
        chosen = world.agree(chosen)  # the other processes read the files that the first one has made
        if not world.main:
            job = prepare(config, world, chosen)
        try:
            code = learn(job)
            if code is None:
                code = finish(job)
        except RuntimeError as error:
            if world.size == 1:
                raise
            if config.debug:
                traceback.print_exc()
            print(f"error: process {world.rank}: {named(error)}", file=sys.stderr, flush=True)
            os._exit(1)  # GPU kernels that wait for an ended process would keep this one from ending
        leave_world(world)
    return code


# The loop


class Training:
    """A training run, from its newest checkpoint or from the start."""

    def __init__(self, job: Job) -> None:
        config, world = job.config, job.world
        self.job, self.learner = job, Learner(job)
        state = self.learner.load()
        known = {name: value for name, value in state.items() if name in ("step", "best", "waited")}
        self.progress = Progress(job.steps, config.patience, **known)
        step = self.first_step = self.progress.step
        if len(set(world.gather((step, job.run.folder.is_dir())))) > 1:
            raise UserError(
                f"{job.run.folder}: the processes find different files there: put the folder on a disk that they share"
            )
        print(plan(job, step), flush=True)
        if world.main:
            write_run(job, finished=False)
        self.log = Log(job.run.folder, step, config) if world.main else SilentLog()
        self.validate_first = bool(config.init_model) and not state  # for the scores that a trained model starts with
        self.workers = workers_of(job)
        self.batches = self.batches_from(step)
        self.saved = clock()
        self.stop = StopSignal(grace=5.0 if world.size > 1 else 0.0)
        self.meter = Meter(self.learner, state)
        self.started = time.perf_counter() - state.get("seconds", 0.0)
        self.bar = tqdm(
            desc="training",
            total=job.steps,
            initial=step,
            unit="step",
            smoothing=0.05,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # seconds; a log file is not a terminal
            disable=not world.main,
        )

    def run(self) -> int | None:
        """Train to the last step. Returns an exit code when stopped, else None."""
        world, progress, stop = self.job.world, self.progress, self.stop
        self.learner.model.train()
        with self.bar:  # so that an error is printed below it
            while True:  # once more than there are steps, so that the last validation, save and stop need no extra code
                late = 0 < self.job.config.checkpoint_minutes * 60 <= clock() - self.saved
                stopping, due = (n > 0 for n in world.sum(stop.received is not None, world.main and late))
                if progress.step > self.first_step or self.validate_first:
                    self.between_steps(stopping, due)
                if progress.last or stopping:
                    break
                self.advance()
        self.log.close()
        stop.restore()
        if progress.last:
            return None
        if progress.step > self.first_step:
            print(f"stopped at step {progress.step:,} and saved: the same command resumes from there")
        return stop.exit_code

    def advance(self) -> None:
        """Train one step, and write a log line every LOG_INTERVAL steps."""
        job, learner, meter, step = self.job, self.learner, self.meter, self.progress.step
        asked = time.perf_counter()
        batch = self.next_batch()
        meter.waiting += time.perf_counter() - asked
        if job.world.sum(len(batch.bad))[0]:
            for bad in job.world.gather(batch.bad):
                if job.world.main:
                    job.bad.add(job.datasets["train"].table, bad)
        logging = (step + 1) % LOG_INTERVAL == 0 or step + 1 == job.steps
        if logging:
            meter.remember()
        rate = learning_rate_at(step, job.steps, job.config)
        meter.add(step + 1, learner.step(batch, step, rate))
        self.progress.step += 1
        self.bar.update()
        if logging or job.device.type == "cpu":  # checking a GPU means waiting for it
            learner.check(meter.steps)
        if logging:
            line = meter.line(rate) | ({"not_printed": Printed.lost} if Printed.lost else {})
            self.log.write(step + 1, **line)
            text = "loss {loss:.3f}, lr {learning_rate:.1e}, {pictures_per_second:.0f} pictures/s, {pairs_per_second:.0f} pairs/s"
            self.bar.set_postfix_str(text.format(**line), refresh=False)

    def batches_from(self, step: int) -> Any:
        """An iterator over the batches of this step and all later ones."""
        batches = iter(training_batches(self.job, step, self.workers))
        if hasattr(signal, "SIGCHLD"):  # torch's handler raises when a worker dies, even in the middle of an update
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return batches

    def next_batch(self) -> Any:
        """The next step's batch. If a worker was killed (the system does that when memory runs out), continue with half
        as many workers."""
        while True:
            try:
                return next(self.batches)
            except (RuntimeError, OSError, EOFError) as error:
                if not self.workers or not connection.wait([worker.sentinel for worker in self.batches._workers], 1):
                    raise  # no worker has ended
                self.workers //= 2
                message = (
                    f"a process that prepares pictures was killed ({first_line(error)}): continuing with {self.workers}"
                )
                tqdm.write(f"{message}; if memory is short, --num-workers {self.workers} avoids this")
                self.batches = self.batches_from(self.progress.step)

    def between_steps(self, stopping: bool, due: bool = False) -> None:
        """Do what is due between two steps: validation, sample captions, a checkpoint. Not counted in the speed."""
        job, config, step, started = self.job, self.job.config, self.progress.step, time.perf_counter()
        better, ended = False, self.progress.last or step % job.steps_per_epoch == 0
        sampling = step == job.steps or step % config.eval_interval == 0
        saving = ended or stopping or due or step % (config.checkpoint_interval or sys.maxsize) == 0
        if not (sampling or saving):
            return
        self.learner.gather()
        if ended:
            better = self.progress.judge(self.validate())
        if sampling and job.world.main:
            samples = sample_captions(job, self.learner.judged)
            self.log.write(step, samples=samples)
            lines = [f"  {shown(name)}: {shown(caption)}" for name, caption in samples.items()]
            tqdm.write("\n".join(lines))  # above the bar
        if config.objective != "scst" or self.learner.judged is not self.learner.model:
            self.learner.judged.copies.drop()  # the fast copies are stale after the next step
        if saving:
            self.save(better)
        if not self.progress.last:  # at the end the weights are still needed
            self.learner.release()
        self.meter.since += time.perf_counter() - started

    def validate(self) -> float:
        """Validate after an epoch, log the scores, and return the one that chooses the best checkpoint: CIDEr-D, or
        minus the loss (see Job.loss_chooses). A resumed run keeps its kind of score: CIDEr-D is never negative."""
        job, step, model, train_loss = self.job, self.progress.step, self.learner.judged, self.meter.end_epoch()
        loader = make_dataloader(job.datasets["val"], job.config.batch_size, **job.world.share)
        values = {"val_loss": caption_loss(model, loader, job.device, job.dtype, world=job.world)}
        values |= {} if train_loss is None else {"train_loss": train_loss}
        values |= validate_captions(job, model)
        self.log.write(step, epoch=step / job.steps_per_epoch, **values)
        epoch, remainder = divmod(step, job.steps_per_epoch)
        if model.adapters is not None and epoch and not remainder and job.world.main:  # a few MB each: save all
            model.save_file(job.run.folder / f"{job.config.preset}_epoch_{epoch}.safetensors")
        line = f"step {step:,}: validation loss {values['val_loss']:.3f}"
        line += f", CIDEr-D {values['val_cider_d']:.3f}" if "val_cider_d" in values else ""
        tqdm.write(line + ("" if train_loss is None else f", training loss {train_loss:.3f}"))
        by_loss = job.loss_chooses and (self.progress.best is None or self.progress.best < 0)
        return -values["val_loss"] if by_loss else values.get("val_cider_d", -values["val_loss"])

    def save(self, better: bool) -> None:
        """Save a checkpoint. Raises UserError when one of the latest steps was not finite."""
        self.saved = clock()
        self.learner.check(self.meter.steps)
        progress = self.progress
        state = {"step": progress.step, "best": progress.best, "waited": progress.waited, **self.meter.state()}
        self.learner.save(state | {"seconds": time.perf_counter() - self.started}, better)


def learn(job: Job) -> int | None:
    """Train from the newest checkpoint, or from the start, to the last step. Returns an exit code when stopped."""
    if job.config.resume == "never" and job.world.main:
        if aside := put_aside(job.run.folder):
            print(f"moved       {aside}: the earlier run's checkpoints, until the next --resume never")
        (job.run.folder / "wandb.id").unlink(missing_ok=True)
    job.world.wait()
    return Training(job).run()


def workers_of(job: Job) -> int:
    """The number of worker processes that prepare this process's training pictures; 0 if no preparation is needed."""
    config, pixels = job.config, job.datasets["train"].pixels
    at_hand = pixels.cached is not None and config.augmentation.moves_pixels_only
    cores = max(1, (os.cpu_count() or 1) // job.world.local_size)
    return 0 if at_hand else min(16, cores, config.num_workers)


def training_batches(job: Job, first_step: int, workers: int = 0) -> DataLoader[Any]:
    """This process's share of the batches of `first_step` and all later steps."""
    return make_dataloader(
        job.datasets["train"],
        job.pictures_a_step,
        first_step=first_step,
        last_step=job.steps,
        shuffle=True,
        num_workers=workers,
        pin_memory=job.device.type == "cuda",
        **job.world.share,
    )


def validate_captions(job: Job, model: ImageCaptionModel) -> dict[str, float]:
    """CIDEr-D of greedy captions of some validation pictures, its 95 % interval, and the share of different captions.
    Empty if val_pictures is 0, or if none of the pictures can be read."""
    val, config, world = job.datasets["val"], job.config, job.world
    if not config.val_pictures:
        return {}
    batches = -(-min(len(val), config.val_pictures) // config.batch_size)
    loader = make_dataloader(val, config.batch_size, last_step=batches, **world.share)
    greedy = {"num_beams": 1, "max_length": job.caption_length}
    captioned = caption_batches(model, loader, model.tokenizer, job.device, job.dtype, False, world, **greedy)
    if not captioned.captions:
        return {}
    captioned.tokenizer = job.words
    found: dict[str, float] = {}
    if world.main:
        low, high = captioned.statistics.intervals()["cider_d"]
        found = {"val_cider_d": captioned.metrics()["cider_d"], "val_cider_d_low": low, "val_cider_d_high": high}
    return world.agree(found) | {"val_unique_captions": len(set(captioned.captions)) / len(captioned.captions)}


def sample_captions(job: Job, model: ImageCaptionModel) -> dict[str, str]:
    """Greedy captions of four validation pictures, always the same ones, by file name."""
    dataset = job.datasets["val"]
    rows = list(range(0, len(dataset), max(1, len(dataset) // 4)))[:4]
    samples = [dataset[0, row] for row in rows]
    pixels = torch.stack([sample.pixels for sample in samples if sample.pixels is not None]).to(job.device)
    with autocast(job.device, job.dtype):
        sequences = model.generate(pixels, max_length=job.caption_length).sequences
    captions = decode(model.tokenizer, sequences)
    return {Path(dataset.table.name_of(row)).name: caption for row, caption in zip(rows, captions, strict=True)}


# The end of a run


def finish(job: Job) -> int:
    """Save the best model, evaluate it on the test pictures, draw the curves, and print where all the files are.
    Returns 1 if the best model was lost, or the model could not be copied here; else 0."""
    run, config, test = job.run.folder, job.config, job.datasets["test"]
    checkpoint, lost, state = job.world.agree(final_checkpoint(run) if job.world.main else (run, "", {}))
    model = finished_model(job, checkpoint / "model.safetensors")
    failed = put_here(run / MODEL_FILE) if job.world.main else ""
    captioned, metrics = evaluate_dataset(
        model,
        test,
        job.device,
        job.dtype,
        run,
        bad=job.bad,
        more=MoreScores(tokenizer=job.words, training_captions=job.datasets["train"].table.captions().to_pylist()),
        world=job.world,
        max_length=job.caption_length,
    )
    if not job.world.main:
        return 0
    if config.dataset == "scenes":
        metrics |= score_drawn_scenes(config.data_dir or run / "scenes", run, captioned.captions)
    known: dict[str, Any] = {"checkpoint": checkpoint.name} | ({"lost": lost} if lost else {})
    write_json(run / "metrics.json", metrics | (known if lost else {}))
    draw_curves(run)
    known |= {"steps": state["step"], "seconds": round(state["seconds"]), "model_sha256": file_hash(run / MODEL_FILE)}
    write_run(job, finished=not failed, **known)
    print_metrics(metrics)
    if chosen := "" if lost or job.loss_chooses else what_chose(read_log(run / "metrics.jsonl"), checkpoint.name):
        print(f"chosen      {chosen}")
    pictures = ", ".join(str(run / name) for name in ("samples.png", "curves.png"))
    print(f"model       {run / MODEL_FILE if failed else MODEL_FILE}\nreport      {run / 'report.html'}")
    print(f"pictures    {pictures}\nnumbers     {run / 'metrics.json'}")
    if isinstance(test.table.picture(0), Path):
        print(f"try it      python example_usage.py {shown(test.table.name_of(0))}")
    for error in filter(None, (lost, failed)):
        print(f"error: {error}", file=sys.stderr)
    return 1 if lost or failed else 0


def put_here(model: Path) -> str:
    """Copy the finished model to the folder where the command was started. Returns an error message, or ""."""
    try:
        if previous := put_in_place(model, Path(MODEL_FILE)):
            print(f"a different model in this folder was renamed to {previous}")
        return ""
    except OSError as error:
        return (
            f"{MODEL_FILE} cannot be written here ({error.strerror}): the model is {model}; the same command copies it"
        )


def finished_model(job: Job, file: Path) -> ImageCaptionModel:
    """Load the model of a checkpoint's file, and save it in the run's folder too."""
    model, path = job.model, job.run.folder / MODEL_FILE
    if job.config.merge:
        model = ImageCaptionModel.from_pretrained(file, job.config.base_dir).to(job.device)
        model.merged = None  # so that it is saved as one full model
    else:
        model.load_own_state(load_file(file))
    model.eval()
    if job.world.main and job.config.merge:
        model.save_file(path)
    elif job.world.main and (previous := put_in_place(file, path)):
        print(f"a different model in the run's folder was renamed to {previous}")
    return model


def score_drawn_scenes(directory: Path, run: Path, captions: list[str]) -> dict[str, float]:
    """Check the test scenes' captions, write scenes_test.json (file, truth, caption, right), and return the shares of
    right ones."""
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
