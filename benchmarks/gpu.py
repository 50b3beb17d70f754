"""benchmark.py gpu: all that only a GPU can show, in a few minutes, each figure beside the one that was predicted.

For a GPU that is lent for minutes: what matters most comes first; every section is a process of its own, with a time limit
and a memory that it gives back; and the JSON is written at every row, so that a machine that is lost keeps what it has
measured. Needs torch and transformers; a section that needs more says so and is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.captions import GenerateBenchmark
from benchmarks.kernels import attentions, rates
from benchmarks.timing import Row, about_machine, sizes
from benchmarks.training import Loop, Running, start_process
from config import UserError, ViTGPT2Config
from dataset import load_tokenizer
from model import ImageCaptionModel
from utils import ROOT, choose_device, dtypes, first_line, matmul_rate, write_json
from weights.huggingface import write_transformers

PREDICTED = {
    "copy": "2.9",
    "head of 50257": "10 to 15",
    "head of 50304": "4 to 5",
    "ours 128 x 5 bf16": "90 to 105",
    "ours 128 x 1 bf16": "60 to 65",
    "ours 128 x 5 bf16 compiled": "58 to 62",
    "ours 128 x 1 bf16 compiled": "45 to 48",
    "transformers 640 x 1 bf16": "76 GB",
    "1 pictures, 1 beams": "14 to 18",
    "1 pictures, 3 beams": "22 to 26",
    "product of 8192^3": "500 to 600",
    # after the rows above had been measured, and before these were
    "ours 256 x 5 bf16": "215 to 240",
    "ours 256 x 5 bf16 compiled": "160 to 170",
    "ours 128 x 5 fp16": "120 to 130",
    "ours 128 x 1 fp16": "110 to 118",
    "ours 128 x 5 fp16 compiled": "84 to 90",
    "self-critical 128 x 5 bf16": "220 to 260",
    "ours 128 x 5 bf16 from JPEGs": "124 to 135",
    "ours 128 x 1 bf16 from JPEGs": "114 to 125",
    "LoRA 128 x 5 bf16": "95 to 115",
    "QLoRA 128 x 5 bf16": "110 to 135",
    "8 pictures, 1 beams": "22 to 25",
    "64 pictures, 1 beams": "27 to 32",
    "8 pictures, 3 beams": "30 to 34",
    "64 pictures, 3 beams": "40 to 48",
}
"""Of an H100 with 80 GB and torch 2.11, in the unit of the row, from operations, bytes and numbers of kernels: written
down before the row was measured."""


# Sections: generators of rows, given the flags and a folder that all of them share


def tests(config: GpuBenchmark, folder: Path) -> Iterator[Row]:
    """The tests that need a GPU, from the files that have some: collecting the others would take longer."""
    files = [
        str(path)
        for path in sorted(ROOT.glob("tests/**/test_*.py"))
        if re.search(r"def test\w*on_the_gpu", path.read_text(encoding="utf-8"))
    ]
    options = ["-n", "0", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-k", "on_the_gpu"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    outcomes: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line):
                outcomes.append(found[2])
                yield Row(found[1].rpartition("::")[2], more=found[2].lower(), figures={"test": found[1]})
            else:
                print(f"    {line}", end="", flush=True)
    passed = outcomes.count("PASSED")
    more = f"{outcomes.count('SKIPPED')} skipped, {len(outcomes)} in all, exit code {process.returncode}"
    yield Row("tests passed", passed, "tests", more)


def kernels(config: GpuBenchmark, folder: Path) -> Iterator[Row]:
    """What products, copies and the head cost, and attention by every kernel."""
    yield from rates(config.where, config.tiny)
    yield from attentions(config.where, config.tiny)


def base_model(config: GpuBenchmark, folder: Path, theirs: bool) -> Path:
    """The file of random weights that all loops start from, made by the first; and transformers' folder beside it."""
    path = folder / "model.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model = ImageCaptionModel(config.sizes)
        model.tokenizer = load_tokenizer("train", ["a picture"], 300)
        model.save_file(path)
    if theirs and not (folder / "theirs").exists():
        write_transformers(ImageCaptionModel.from_pretrained(path).saved(), folder / "theirs")
    return path


def steps(config: GpuBenchmark, folder: Path, *loops: tuple[Any, ...], **more: Any) -> Iterator[Row]:
    """Training steps one kind after another: (whose, pictures, captions, precision, compiled). Loops that differ in
    pictures and captions alone share what learns, so that it is compiled once."""
    file = base_model(config, folder, theirs=any(whose == "transformers" for whose, *_ in loops))
    learner, kind = None, None
    for whose, pictures, captions, precision, compiled in loops:
        pictures = pictures if not config.tiny else max(2, pictures // 64)
        loop = Loop(
            whose, pictures, captions, precision, config.where, 5 if config.tiny else 16, compiled, config.sizes, **more
        )
        if kind != (whose, precision, compiled):
            learner, kind = None, (whose, precision, compiled)
        gc.collect()
        if config.where == "cuda":
            torch.cuda.empty_cache()
        source = f"{' compiled' if compiled else ''}{' from JPEGs' if loop.jpegs else ''}"
        name = f"{whose} {pictures} x {captions} {precision}{source}"
        began = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as own:
                running = Running(loop, Path(own), file, learner)
                ready = time.perf_counter() - began
                turns = [running.turn(1 if config.tiny else 20) for _ in range(3)]
        except torch.OutOfMemoryError as error:
            yield Row(name, more=f"does not fit ({first_line(error)[:60]})")
            continue
        rate = matmul_rate(config.where, dtypes()[precision], 256 if config.tiny else 8192)
        found = loop.figures(turns, running.first_loss, max(rate, 1.0)) | {"ready": ready}
        said = "{pairs_per_second:,.0f} pairs/s, {utilisation:.1%} of the product's rate, {memory_gb:.1f} GB, waiting for data "
        said += "{data_wait:.1%}, ready after {ready:.0f} s, first loss {first_loss:.4f}"
        yield Row(name, 1e3 * found["seconds_per_pair"] * loop.pairs, "ms", said.format(**found), found)
        learner = running.learner
        del running


def captions(config: GpuBenchmark, folder: Path) -> Iterator[Row]:
    """Captions by greedy search and three beams, transformers beside the smallest and the largest batch."""
    smallest, largest = (1, 3) if config.tiny else (1, 512)
    job = GenerateBenchmark(device=config.where, length=4 if config.tiny else 20, rounds=1 if config.tiny else 5)  # type: ignore[arg-type]
    model, theirs = job.models(config.sizes)
    between = (2,) if config.tiny else (8, 64)
    for beams in (1, 3):
        for pictures in (smallest, largest, *between):
            peer = theirs if pictures in (smallest, largest) else None
            with contextlib.redirect_stdout(io.StringIO()):  # rows say it
                found = job.compare(model, peer, pictures, beams)
            own = found["bf16" if config.where == "cuda" else "fp32"]
            name = f"{pictures} pictures, {beams} beams"
            equal = f", tokens equal to transformers': {found['equal']}" if "equal" in found else ""
            yield Row(name, 1e3 * own["seconds"], "ms", f"{pictures / own['seconds']:,.0f} captions/s{equal}", found)
            if "ratio" in own:
                yield Row(f"{name}, transformers", 1e3 * own["transformers"], "ms", f"{own['ratio']:.2f} times as long")


def from_jpegs(config: GpuBenchmark, folder: Path) -> Iterator[Row]:
    """A step whose pictures are decoded beside it."""
    import simplejpeg  # noqa: F401  # named, where it is lacking

    return steps(config, folder, ("ours", 128, 5, "bf16", False), ("ours", 128, 1, "bf16", False), jpegs=True)


def training(*loops: tuple[Any, ...]) -> Callable[[GpuBenchmark, Path], Iterator[Row]]:
    """A section of training steps: (whose, pictures, captions, precision, compiled)."""
    return lambda config, folder: steps(config, folder, *loops)


def ours(precision: str, compiled: bool) -> list[tuple[Any, ...]]:
    """Our steps, the ones that matter most first."""
    return [("ours", n, k, precision, compiled) for n, k in ((128, 5), (128, 1), (256, 5))]


SECTIONS: dict[str, tuple[Callable[[GpuBenchmark, Path], Iterator[Row]], float]] = {
    "tests": (tests, 120),
    "kernels": (kernels, 60),
    "eager": (training(*ours("bf16", False)), 75),
    "compiled": (training(*ours("bf16", True)), 240),  # each number of captions is compiled for, 86 s the first
    "transformers": (training(*(("transformers", n, 1, "bf16", False) for n in (128, 320, 640))), 75),
    "captions": (captions, 90),
    "scst": (training(("self-critical", 128, 5, "bf16", False)), 60),
    "fp16": (training(*ours("fp16", False)[:2], *ours("fp16", True)[:1]), 150),
    "jpegs": (from_jpegs, 60),
    "adapters": (training(("LoRA", 128, 5, "bf16", False), ("QLoRA", 128, 5, "bf16", False)), 75),
}
"""In the order of their worth, with the seconds that each may take."""


def serve(name: str, config: GpuBenchmark, folder: Path, pipe: Connection) -> None:
    """A section's process: its rows one by one, then None."""
    os.setsid()  # what it starts is ended with it
    # A compiler that is ended leaves half a file, which the next one to look into the user's own cache would load.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)
    try:
        for row in SECTIONS[name][0](config, folder):
            pipe.send(row)
    except UserError as error:
        pipe.send(Row("skipped", more=str(error)))
    except ImportError as error:
        pipe.send(Row("skipped", more=f"needs {error.name or error}"))
    except Exception as error:
        traceback.print_exc()
        pipe.send(Row("failed", more=f"{type(error).__name__}: {first_line(error)}"))
    pipe.send(None)


@dataclass(kw_only=True)
class GpuBenchmark:
    """The sections that are to run, where, and how long."""

    device: str = "auto"
    tiny: bool = False
    sections: tuple[str, ...] = tuple(SECTIONS)
    minutes: float = 8.0
    output: Path = Path("benchmark-gpu.json")

    @classmethod
    def parsed(cls, arguments: list[str]) -> GpuBenchmark:
        """From a command line, without tyro, which a bare machine lacks."""
        parser = argparse.ArgumentParser("benchmark.py gpu", description=__doc__, allow_abbrev=False)
        parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default=cls.device, help="where to run")
        parser.add_argument("--tiny", action="store_true", help="a tiny model and small batches: does every line run?")
        parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=cls.sections, help="default: all")
        parser.add_argument("--minutes", type=float, default=cls.minutes, help="for all sections (default: 8)")
        parser.add_argument("--output", type=Path, default=cls.output, help="where the figures are written to")
        parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        flags = vars(parser.parse_args(arguments))
        del flags["debug"]  # run_script's
        return cls(**flags | {"sections": tuple(flags["sections"])})

    @property
    def where(self) -> str:
        """The kind of device."""
        return choose_device(self.device)[0].type

    @property
    def sizes(self) -> ViTGPT2Config:
        """Of the model."""
        return sizes(self.tiny)

    def run(self) -> dict[str, Any]:
        """The rows of all sections, printed and written as they come."""
        quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        for name, value in ({"HF_HUB_OFFLINE": "1"} | quiet).items():
            os.environ.setdefault(name, value)
        found: dict[str, Any] = about_machine() | {"rows": [], "seconds": {}}
        print(", ".join(f"{name} {value}" for name, value in found.items() if value), flush=True)
        print(f"  {'':48} {'measured':>9} {'':8} {'predicted':>13}")
        predicted = {} if self.tiny else PREDICTED
        ends = time.monotonic() + 60 * self.minutes
        with tempfile.TemporaryDirectory() as folder:
            for name in self.sections:
                began = time.monotonic()
                print(name, flush=True)
                for row in self.rows_of(name, Path(folder), min(self.seconds(name), ends - began)):
                    beside = predicted.get(row.name, "")
                    print(row.line(beside), flush=True)
                    found["rows"].append({"section": name, "predicted": beside} | asdict(row))
                    found["seconds"][name] = time.monotonic() - began
                    write_json(self.output, found)
                print(f"  {name} took {time.monotonic() - began:.0f} s", flush=True)
        return found

    def seconds(self, name: str) -> float:
        """That a section may take: a CPU compiles for minutes."""
        return SECTIONS[name][1] * (1 if self.where == "cuda" else 5)

    def rows_of(self, name: str, folder: Path, seconds: float) -> Iterator[Row]:
        """The rows of a section, whose process ends with it or with its time."""
        if seconds <= 0:
            yield Row("skipped", more="no time is left")
            return
        process, pipe = start_process(serve, name, self, folder)
        ends = time.monotonic() + seconds
        try:
            while pipe.poll(max(0.0, ends - time.monotonic())):
                if (row := pipe.recv()) is None:
                    process.join(5)
                    return
                yield row
            yield Row("stopped", more=f"after {seconds:.0f} s, which is all that it has")
        except EOFError:
            yield Row("ended", more="its process ended before it was done")
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
