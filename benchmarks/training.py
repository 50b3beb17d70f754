"""benchmark.py train and race: a training step next to transformers', and scores after equal training time.

Every loop runs in a separate process. On a CPU the loops take turns. On a GPU, whose memory would not hold them all,
each starts when the one before it has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.captions import PRECISIONS
from benchmarks.timing import sizes
from config import PRESETS, TrainConfig, UserError, ViTGPT2Config
from data.skipped import BadPictures
from data.table import make_table
from dataset import Batch, CaptionDataset, load_tokenizer, make_dataloader
from evaluate import caption_batches, caption_loss
from model import ImageCaptionModel, choose_attention, use_flash_attention
from training.adapters import adapt, check_adapters
from training.distributed import ALONE
from training.estimates import peak_rate, step_operations
from training.job import Chosen, Job, prepare
from training.learner import Learner, blank_words
from training.optimizers import Muon, learning_rate_at, product_dtype
from training.run import Run
from utils import autocast, choose_device, choose_precision, first_line, keep_freed_memory
from weights.huggingface import read_transformers, write_transformers

RATE = 1e-5
Precision = Literal["fp32", "fp16", "bf16"]


# A training step


@dataclass(frozen=True)
class Loop:
    """One way to train: whose loop, pictures per step, captions per picture, precision."""

    whose: Literal["ours", "self-critical", "LoRA", "QLoRA", "transformers"]
    pictures: int
    captions: int
    precision: Precision
    device: str
    tokens: int
    compile: bool
    model: ViTGPT2Config
    jpegs: bool = False
    """Decode photographs of COCO's size at every step in worker processes, instead of using pictures on the device."""

    @property
    def pairs(self) -> int:
        """(picture, caption) pairs per step."""
        return self.pictures * self.captions

    def operations(self) -> float:
        """Floating-point operations per step. transformers encodes a picture again for each caption; frozen weights
        need no gradients, which are a third of the work."""
        if self.whose == "transformers":
            return self.pairs * step_operations(self.model, 1, self.tokens)
        share = 2 / 3 if self.whose in ("LoRA", "QLoRA") else 1
        return share * self.pictures * step_operations(self.model, self.captions, self.tokens)

    def data(self, folder: Path) -> CaptionDataset:
        """Pictures of noise with captions of exactly `tokens` tokens: as JPEGs, or cached on the GPU or in memory."""
        rng = np.random.default_rng(0)
        paths = [folder / f"{n}.{'jpg' if self.jpegs else 'png'}" for n in range(4 * self.pictures)]
        for path in paths:
            noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            (noise.resize((640, 480)) if self.jpegs else noise).save(path)
        keep: Any = "no" if self.jpegs else "memory"
        table = make_table((path, n, ["a picture"] * self.captions) for n, path in enumerate(paths))
        tokenizer, config = load_tokenizer("train", ["a picture"], 300), self.model
        data = CaptionDataset(table, tokenizer, config, captions_per_image=self.captions, keep=keep, progress=False)
        length, number = self.tokens - 1, table.num_captions  # the start or end token takes one more position
        data.tokens.ids = rng.integers(0, config.vocab_size - 1, number * length, dtype=np.int32)
        data.tokens.offsets = np.arange(number + 1, dtype=np.int64) * length
        if self.device == "cuda" and not self.jpegs:
            data.keep_on(torch.device(self.device))
        return data

    def steps(self, data: CaptionDataset, step: Callable[[Any, int], torch.Tensor]) -> Iterator[tuple[float, float]]:
        """Make steps without end. Yields the loss, but 0 after the first step (not read back from the device), and
        the seconds spent waiting for data."""
        workers = min(16, os.cpu_count() or 1) if self.jpegs else 0
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": self.device == "cuda"}
        loader = make_dataloader(data, self.pictures, last_step=1 << 30, shuffle=True, **options)
        asked, first = time.perf_counter(), True
        for number, batch in enumerate(loader):
            waited = time.perf_counter() - asked
            loss = step(batch, number)
            yield loss.item() if first else 0.0, waited
            first, asked = False, time.perf_counter()

    def ours(self, learner: Learner, data: CaptionDataset) -> Any:
        """Our training step, by a learner that an earlier loop may have used."""
        config = dataclasses.replace(learner.job.config, batch_size=self.pictures)
        learner.job = dataclasses.replace(learner.job, config=config, datasets={"train": data})
        return lambda batch, step: learner.step(batch, step, RATE).loss

    def learner(self, folder: Path, model_file: Path, data: CaptionDataset) -> Learner:
        """A learner with a new model from the file, prepared as training does it."""
        device, dtype = torch.device(self.device), PRECISIONS[self.precision]
        model = ImageCaptionModel.from_pretrained(model_file)
        if device.type == "cpu":
            keep_freed_memory()
        use_flash_attention(True)
        choose_attention(device.type, dtype)  # choose once, before anything is compiled
        config = TrainConfig(
            batch_size=self.pictures,
            captions_per_image=self.captions,
            model=model.config,
            compile=self.compile,
            init_model=str(model_file),
            objective="scst" if self.whose == "self-critical" else "cross_entropy",
            caption_length=self.tokens,
            lora=self.whose == "LoRA",
            qlora=self.whose == "QLoRA",
        )
        if config.adapts:
            check_adapters(config, device)
            print(f"  {self.whose}: {adapt(model, config, {'model': config.init_model}, device)}", flush=True)
        model.to(device).train()
        job = Job(
            config=config,
            world=ALONE,
            run=Run(folder),
            device=device,
            dtype=dtype,
            model=model,
            datasets={"train": data},
            steps_per_epoch=4,
            steps=1 << 30,
            tokens=self.tokens,
            bad=BadPictures(folder / "bad.csv", [data.table]),
            tokenizer="train",
            data_key="",
        )
        return Learner(job)

    def theirs(self, model_file: Path, data: CaptionDataset) -> Any:
        """A plain training step of transformers' model, with one copy of the picture per caption."""
        device, dtype = torch.device(self.device), PRECISIONS[self.precision]
        model = load_peer(model_file.parent / "theirs", data.config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        def step(batch: Batch, number: int) -> torch.Tensor:
            batch = batch.to(device, data)
            pixels = batch.pixel_values.repeat_interleave(self.captions, 0)
            labels = batch.labels.flatten(0, 1)
            with autocast(device, dtype):
                loss: torch.Tensor = model(pixel_values=(pixels / 255 - 0.5) / 0.5, labels=labels).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def figures(self, turns: list[Turn], first_loss: float, rate: float) -> dict[str, Any]:
        """Medians over turns. utilisation is the share of rate, in floating-point operations per second."""
        spent, waited, memory = (float(np.median(values)) for values in zip(*turns, strict=True))
        return {
            **asdict(self),
            "pairs": self.pairs,
            "seconds_per_pair": spent / self.pairs,
            "pairs_per_second": self.pairs / spent,
            "images_per_second": self.pictures / spent,
            "utilisation": self.operations() / spent / rate,
            "memory_gb": memory / 1e9,
            "data_wait": waited,
            "first_loss": first_loss,
        }


def load_peer(folder: Path, sizes: ViTGPT2Config) -> Any:
    """Load transformers' model from a folder in its format, ready to be trained on captions with labels."""
    from transformers import VisionEncoderDecoderModel

    model: Any = VisionEncoderDecoderModel.from_pretrained(folder).train()
    model.config.decoder_start_token_id, model.config.pad_token_id = sizes.start_token_id, sizes.pad_token_id
    return model


def start_process(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> tuple[Any, Connection]:
    """Start a process by spawning (not forking); return it and a pipe, whose other end is target's last argument."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=until_parent_ends, args=(target, *arguments, end), daemon=daemon)
    process.start()
    end.close()
    return process, pipe


def until_parent_ends(target: Callable[..., None], *arguments: Any) -> None:
    """A process: run target, and exit as soon as the parent process is gone, also if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    target(*arguments)


def receive(pipe: Connection, name: str) -> Any:
    """Receive a loop's answer. Raises NoRoomError where it ran out of memory, UserError where its process ended."""
    try:
        answer = pipe.recv()
    except EOFError:
        raise UserError(f"{name}: its process ended before it had finished") from None
    if isinstance(answer, NoRoomError):
        raise answer
    return answer


def each_in_a_process(
    jobs: dict[Any, tuple[Any, ...]], target: Callable[..., None], at_a_time: int
) -> Iterator[tuple[Any, Any]]:
    """Run target(*arguments, pipe) for every key in a process, so many at a time; yield (key, its answer) as they end. Where
    one fails the others are ended."""
    waiting, running = dict(jobs), dict[Any, tuple[Any, Connection]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                key = next(iter(waiting))
                running[key] = start_process(target, *waiting.pop(key))
            ready = multiprocessing.connection.wait([pipe for _, pipe in running.values()])
            for key in [key for key, (_, pipe) in running.items() if pipe in ready]:
                process, pipe = running.pop(key)
                answer = receive(pipe, str(key))
                process.join()
                yield key, answer
    finally:
        for process, _ in running.values():
            process.terminate()


class NoRoomError(UserError):
    """A loop's step does not fit into the GPU's memory."""


class Turn(NamedTuple):
    """Seconds per step, the share of them spent waiting for data, and the peak memory so far, in bytes."""

    seconds: float
    waited: float
    memory: int


class Running:
    """A loop that has made its first steps, in which kernels are chosen and compiled."""

    def __init__(self, loop: Loop, folder: Path, model_file: Path, learner: Learner | None = None) -> None:
        torch.manual_seed(0)
        if loop.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        data = loop.data(folder)
        self.loop, self.learner = loop, learner
        if loop.whose == "transformers":
            step = loop.theirs(model_file, data)
        else:
            self.learner = learner or loop.learner(folder, model_file, data)
            step = loop.ours(self.learner, data)
        self.steps = loop.steps(data, step)
        self.first_loss, _ = next(self.steps)
        for _ in range(2):
            next(self.steps)

    def turn(self, steps: int) -> Turn:
        """Make that many more steps and time them."""
        settle = torch.cuda.synchronize if self.loop.device == "cuda" else int
        settle()
        start = time.perf_counter()
        waited = sum(next(self.steps)[1] for _ in range(steps))
        settle()
        seconds = time.perf_counter() - start
        return Turn(seconds / steps, waited / seconds, most_memory(self.loop.device))


def serve(loop: Loop, model_file: Path, steps: int, pipe: Connection) -> None:
    """A loop's process. Sends the first step's loss, then a Turn of that many steps for every True it receives; ends at
    False."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            running = Running(loop, Path(folder), model_file)
            pipe.send(running.first_loss)
            while pipe.recv():
                pipe.send(running.turn(steps))
        except torch.OutOfMemoryError as error:
            pipe.send(NoRoomError(first_line(error)))


def most_memory(device: str) -> int:
    """This process's peak memory in bytes, on the GPU where it uses one."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return 0


@dataclass(kw_only=True)
class TrainBenchmark:
    """Time training steps from the same weights (by default of base size) by our loop, and by a plain loop with
    transformers' model: in turn on a CPU, one loop after another on a GPU. The plain loop runs with as many pairs as
    ours has pictures, and with as many as ours has pairs. It is skipped for prefix models, which transformers lacks."""

    batch_size: int | None = None
    """Pictures in our step (default: 4 on a CPU, 128 on a GPU)."""
    captions: tuple[int, ...] = ()
    """Captions per picture in our step (default: 5 on a CPU, 5 and 1 on a GPU)."""
    tokens: int = 16
    """Tokens per caption."""
    precisions: tuple[Precision, ...] = ()
    """Precisions of matrix products (default: fp32 and bf16 on a CPU, bf16 on a GPU)."""
    transformers: bool = True
    """Also time transformers' steps."""
    scst: bool = False
    """Also time a step of self-critical training, with samples of the same length."""
    adapters: bool = False
    """Also time a step that trains adapters: LoRA, and QLoRA."""
    compile: bool = False
    """Compile our step."""
    steps: int | None = None
    """Steps per turn (default: 3 on a CPU, 20 on a GPU)."""
    rounds: int = 3
    """Turns; figures are medians over them."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on."""
    output: Path = Path("benchmark-train.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""
    model: ViTGPT2Config = field(default_factory=sizes)
    """Sizes of the model."""

    def run(self) -> dict[str, Any]:
        """Return the figures of each loop, and ratios."""
        device, about = choose_device(self.device)
        cuda = device.type == "cuda"
        pictures = self.batch_size or (128 if cuda else 4)
        print(f"{device} ({about}), torch {torch.__version__}, {torch.get_num_threads()} threads")
        figures: dict[str, Any] = {"device": about, "loops": [], "ratios": {}}
        torch.manual_seed(0)
        start = ImageCaptionModel(self.model)
        start.tokenizer = load_tokenizer("train", ["a picture"], 300)
        seconds: dict[tuple[str, str, int], float] = {}
        with tempfile.TemporaryDirectory() as folder:
            model_file = Path(folder) / "model.safetensors"
            start.save_file(model_file)
            peer = self.transformers and self.model.bridge == "cross_attention"
            if peer:
                write_transformers(start.saved(), model_file.parent / "theirs")
            del start
            for precision in self.precisions or (("bf16",) if cuda else ("fp32", "bf16")):
                settings: Any = dict(precision=precision, device=device.type, tokens=self.tokens, model=self.model)
                wanted = self.captions or ((5, 1) if cuda else (5,))
                ours = [Loop("ours", pictures, captions, compile=self.compile, **settings) for captions in wanted]
                sizes = dict.fromkeys((pictures, *(loop.pairs for loop in ours)))
                theirs = [Loop("transformers", size, 1, compile=False, **settings) for size in sizes if peer]
                others: list[Any] = ["self-critical"] * (self.scst and ours[0].captions > 1)
                others += ["LoRA", "QLoRA"] * self.adapters
                ours += [dataclasses.replace(ours[0], whose=whose) for whose in others]
                peak, peak_name = peak_rate(device, PRECISIONS[precision])
                print(f"{precision}, {self.tokens} tokens; utilisation is the share of {peak_name}", flush=True)
                loops = [*ours, *theirs]
                for together in [[loop] for loop in loops] if cuda else [loops]:
                    for found in self.turns(together, model_file, peak):
                        figures["loops"].append(found)
                        seconds[found["whose"], precision, found["pairs"]] = found["seconds_per_pair"]
        for (whose, kind, pairs), spent in seconds.items():
            if whose not in ("ours", "transformers"):
                figures["ratios"][f"{whose}, {pairs} pairs {kind}"] = ratio = spent / seconds["ours", kind, pairs]
                print(f"{whose}, {pairs} pairs {kind}: a picture costs {ratio:.2f} times as much as with ours")
            for (other, their_kind, their_pairs), theirs_spent in seconds.items():
                if (whose, other) == ("ours", "transformers") and their_kind in (kind, "fp32"):
                    name = f"{pairs} pairs {kind} against {their_pairs} pairs {their_kind}"
                    figures["ratios"][name] = theirs_spent / spent
                    print(f"ours, {name}: a pair costs 1/{theirs_spent / spent:.2f}")
        return figures

    def turns(self, loops: list[Loop], model_file: Path, peak: float) -> list[dict[str, Any]]:
        """Run loops in turn, each in a separate process; return the figures of those that fit into memory."""
        steps = self.steps or (20 if loops[0].device == "cuda" else 3)
        running: list[tuple[Loop, Any, Connection, float]] = []
        for loop in loops:  # start them one after the other
            process, pipe = start_process(serve, loop, model_file, steps, daemon=True)
            try:
                running.append((loop, process, pipe, receive(pipe, loop.whose)))
            except NoRoomError as error:
                process.join()
                print(
                    f"  {loop.whose:12} {loop.pictures:4} pictures x {loop.captions}: does not fit ({error})",
                    flush=True,
                )
        answers: list[list[Turn]] = [[] for _ in running]
        for _ in range(self.rounds):
            for (loop, _, pipe, _), answer in zip(running, answers, strict=True):
                pipe.send(True)
                answer.append(receive(pipe, loop.whose))
        for _, process, pipe, _ in running:
            pipe.send(False)
            process.join()
        found = [loop.figures(turns, loss, peak) for (loop, *_, loss), turns in zip(running, answers, strict=True)]
        for figures in found:
            print(
                "  {whose:12} {pictures:4} pictures x {captions}: {seconds_per_pair:9.5f} s/pair {pairs_per_second:9.2f} pairs/s "
                "{images_per_second:9.2f} images/s, utilisation {utilisation:5.1%}, {memory_gb:5.1f} GB, waiting for data "
                "{data_wait:.1%}, first loss {first_loss:.4f}".format(**figures),
                flush=True,
            )
        return found


# Five captions per step, one, and transformers, in equal time

RACERS = {"five captions a step": 5, "one caption a step": 1, "transformers": 1}


def race(racer: str, config: TrainConfig, seconds: float, folder: Path, pipe: Connection) -> None:
    """A racer's process: train for that many seconds of CPU time, which the learning rate's schedule follows, then
    caption the validation pictures and send the figures."""
    torch.set_num_threads(1)
    keep_freed_memory()
    device, dtype = torch.device("cpu"), PRECISIONS[config.precision]
    job = prepare(config, ALONE, Chosen(Run(folder), device, dtype))
    learner, steps, pairs = Learner(job), 0, 0
    train_set, model = job.datasets["train"], job.model.train()
    step = learner.step
    if racer == "transformers":
        step, model = transformers_step(job, folder)
    batches = iter(make_dataloader(train_set, job.pictures_a_step, last_step=1 << 30, shuffle=True))
    started, share = time.process_time(), 0.0
    while share < 1:
        batch = next(batches)
        step(batch, steps, learning_rate_at(int(share * 10_000), 10_000, dataclasses.replace(config, warmup_steps=500)))
        steps, pairs = steps + 1, pairs + int((batch.lengths > 0).sum())
        share = (time.process_time() - started) / seconds
    if racer == "transformers":
        model.save_pretrained(folder / "trained")
        job.model.tokenizer.save_pretrained(folder / "trained")
        job.model.load_state_dict(read_transformers(folder / "trained").tensors)
    loader = make_dataloader(job.datasets["val"], 64)
    captioned = caption_batches(job.model, loader, job.model.tokenizer, device, dtype, progress=False)
    metrics = captioned.metrics()
    names = ("bleu_4", "cider_d", "unique_captions")
    loss = caption_loss(job.model, loader, device, dtype)
    epochs = pairs / train_set.table.num_captions
    pipe.send({"steps": steps, "pairs": pairs, "epochs": epochs, "val_loss": loss} | {n: metrics[n] for n in names})


def transformers_step(job: Job, folder: Path) -> tuple[Any, Any]:
    """The same training recipe with transformers' model from the same weights: a step like Learner's, and the model."""
    config, sizes = job.config, job.model.config
    write_transformers(job.model.saved(), folder / "theirs")
    model = load_peer(folder / "theirs", sizes)
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.(layers?|h)\.\d", n)]
    known = {id(p) for p in inside}
    others = [p for p in model.parameters() if id(p) not in known]
    optimizers = [
        Muon(
            inside,
            config.learning_rate,
            config.weight_decay,
            product_dtype(job.device, job.dtype),
            config.cautious_decay,
        ),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]

    def step(batch: Batch, number: int, rate: float) -> None:
        torch.manual_seed(number)
        ids = blank_words(batch.input_ids.flatten(0, 1), config.word_dropout, sizes)
        with autocast(job.device, job.dtype):
            pixels = (batch.pixel_values / 255 - 0.5) / 0.5
            model(pixel_values=pixels, decoder_input_ids=ids, labels=batch.labels.flatten(0, 1)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, model


@dataclass(kw_only=True)
class RaceBenchmark:
    """Train the flickr8k preset, without its contrastive loss, in equal time from the same weights: with five captions per
    picture and step, with one, and with one by transformers' model. Then score their captions of the validation pictures,
    by three beams."""

    data_dir: Path
    """Folder of Flickr8k."""
    core_minutes: float = 40.0
    """Training time of each, in minutes of one CPU core."""
    at_a_time: int = 1
    """How many to train at the same time, each on one core."""
    output: Path = Path("benchmark-race.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Return each racer's steps, pairs trained on, and scores."""
        found: dict[str, Any] = {}
        chosen, reason = choose_precision("auto", torch.device("cpu"))
        precision: Any = next(name for name, dtype in PRECISIONS.items() if dtype == chosen)
        print(f"{self.core_minutes:g} minutes of a core each, in {precision} ({reason})")
        with tempfile.TemporaryDirectory() as folder:
            jobs: dict[Any, tuple[Any, ...]] = {}
            for racer, captions in RACERS.items():
                changes: dict[str, Any] = {"data_dir": self.data_dir, "captions_per_image": captions}
                changes |= {"contrastive_weight": 0.0}  # transformers' model has no such loss
                config = dataclasses.replace(PRESETS["flickr8k"], precision=precision, **changes)
                (run_folder := Path(folder) / str(len(jobs))).mkdir()
                jobs[racer] = (racer, config, 60 * self.core_minutes, run_folder)
            for racer, figures in each_in_a_process(jobs, race, self.at_a_time):
                found[racer] = figures
                line = "{steps:,} steps, {pairs:,} pairs ({epochs:.1f} epochs), validation loss {val_loss:.3f}, BLEU-4 {bleu_4:.4f}, CIDEr-D {cider_d:.4f}, different captions {unique_captions:.1%}"
                print(f"  {racer:20} {line.format(**figures)}", flush=True)
        return {"core_minutes": self.core_minutes, "race": found}
