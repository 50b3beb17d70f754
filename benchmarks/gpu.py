"""benchmark.py gpu: everything that needs a GPU, in a few minutes, each figure next to a predicted one.

Made for a GPU that is available for minutes only. The most important sections come first. Each section runs in a
separate process with a time limit, which frees its memory. The JSON is written after every row, so that nothing that
was measured is lost with the machine. Needs torch and transformers; a section that needs another package is skipped
and names it.
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
    # Predicted after the rows above had been measured:
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
"""Predictions for an H100 with 80 GB and torch 2.11, in the unit of the row, from operations, bytes and numbers of
kernels. Each was written down before its row was measured."""


# Sections: generators of rows, called with the flags and a folder that all sections share


def tests(config: GpuBenchmark, folder: Path) -> Iterator[Row]:
    """Run the tests that need a GPU, only from files that have some: collecting all files would take too long."""
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
    """Time matrix products, copies, the head, and attention by every kernel."""
    yield from rates(config.where, config.tiny)
    yield from attentions(config.where, config.tiny)


def base_model(config: GpuBenchmark, folder: Path, theirs: bool) -> Path:
    """The file of random weights that all loops start from; the first call creates it. theirs: also create its copy in
    transformers' format, in the folder theirs."""
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
    """Time training steps, one loop after another: (whose, pictures, captions, precision, compiled). Consecutive loops
    that differ only in pictures and captions share one learner, so that it is compiled once."""
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
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as pictures_folder:
                running = Running(loop, Path(pictures_folder), file, learner)
                ready = time.perf_counter() - started
                turns = [running.turn(1 if config.tiny else 20) for _ in range(3)]
        except torch.OutOfMemoryError as error:
            yield Row(name, more=f"does not fit ({first_line(error)[:60]})")
            continue
        rate = matmul_rate(config.where, dtypes()[precision], 256 if config.tiny else 8192)
        found = loop.figures(turns, running.first_loss, max(rate, 1.0)) | {"ready": ready}
        line = "{pairs_per_second:,.0f} pairs/s, {utilisation:.1%} of the product's rate, {memory_gb:.1f} GB, waiting for data "
        line += "{data_wait:.1%}, ready after {ready:.0f} s, first loss {first_loss:.4f}"
        yield Row(name, 1e3 * found["seconds_per_pair"] * loop.pairs, "ms", line.format(**found), found)
        learner = running.learner
        del running


def captions(config: GpuBenchmark, folder: Path) -> Iterator[Row]:
    """Time captions by greedy search and by three beams; transformers only at the smallest and the largest batch."""
    smallest, largest = (1, 3) if config.tiny else (1, 512)
    job = GenerateBenchmark(device=config.where, length=4 if config.tiny else 20, rounds=1 if config.tiny else 5)  # type: ignore[arg-type]
    model, theirs = job.models(config.sizes)
    between = (2,) if config.tiny else (8, 64)
    for beams in (1, 3):
        for pictures in (smallest, largest, *between):
            peer = theirs if pictures in (smallest, largest) else None
            with contextlib.redirect_stdout(io.StringIO()):  # the rows say the same
                found = job.compare(model, peer, pictures, beams)
            one = found["bf16" if config.where == "cuda" else "fp32"]
            name = f"{pictures} pictures, {beams} beams"
            equal = f", tokens equal to transformers': {found['equal']}" if "equal" in found else ""
            yield Row(name, 1e3 * one["seconds"], "ms", f"{pictures / one['seconds']:,.0f} captions/s{equal}", found)
            if "ratio" in one:
                yield Row(f"{name}, transformers", 1e3 * one["transformers"], "ms", f"{one['ratio']:.2f} times as long")


def from_jpegs(config: GpuBenchmark, folder: Path) -> Iterator[Row]:
    """Time steps whose JPEGs are decoded at the same time by other processes."""
    import simplejpeg  # noqa: F401  # fails here, with the package's name, where it is not installed

    return steps(config, folder, ("ours", 128, 5, "bf16", False), ("ours", 128, 1, "bf16", False), jpegs=True)


def training(*loops: tuple[Any, ...]) -> Callable[[GpuBenchmark, Path], Iterator[Row]]:
    """A section of training steps: (whose, pictures, captions, precision, compiled)."""
    return lambda config, folder: steps(config, folder, *loops)


def ours(precision: str, compiled: bool) -> list[tuple[Any, ...]]:
    """Our training steps, the most important ones first."""
    return [("ours", n, k, precision, compiled) for n, k in ((128, 5), (128, 1), (256, 5))]


SECTIONS: dict[str, tuple[Callable[[GpuBenchmark, Path], Iterator[Row]], float]] = {
    "tests": (tests, 120),
    "kernels": (kernels, 60),
    "eager": (training(*ours("bf16", False)), 75),
    "compiled": (training(*ours("bf16", True)), 240),  # compiles for each number of captions, 86 s for the first
    "transformers": (training(*(("transformers", n, 1, "bf16", False) for n in (128, 320, 640))), 75),
    "captions": (captions, 90),
    "scst": (training(("self-critical", 128, 5, "bf16", False)), 60),
    "fp16": (training(*ours("fp16", False)[:2], *ours("fp16", True)[:1]), 150),
    "jpegs": (from_jpegs, 60),
    "adapters": (training(("LoRA", 128, 5, "bf16", False), ("QLoRA", 128, 5, "bf16", False)), 75),
}
"""The most important first, with the seconds that each may take."""


def serve(name: str, config: GpuBenchmark, folder: Path, pipe: Connection) -> None:
    """A section's process: send its rows one by one, then None."""
    os.setsid()  # so that its child processes can be killed with it
    # A compiler that is killed leaves half a file, which later programs would load from the user's cache.
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
    """The sections to run, on which device, and for how long."""

    device: str = "auto"
    tiny: bool = False
    sections: tuple[str, ...] = tuple(SECTIONS)
    minutes: float = 8.0
    output: Path = Path("benchmark-gpu.json")

    @classmethod
    def parsed(cls, arguments: list[str]) -> GpuBenchmark:
        """Parse a command line without tyro, which a bare machine lacks."""
        parser = argparse.ArgumentParser("benchmark.py gpu", description=__doc__, allow_abbrev=False)
        parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default=cls.device, help="device to run on")
        parser.add_argument("--tiny", action="store_true", help="a tiny model, to check that every line runs")
        parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=cls.sections, help="default: all")
        parser.add_argument("--minutes", type=float, default=cls.minutes, help="limit for all sections (default: 8)")
        parser.add_argument("--output", type=Path, default=cls.output, help="JSON file to write the figures to")
        parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        flags = vars(parser.parse_args(arguments))
        del flags["debug"]  # run_script reads it from the command line
        return cls(**flags | {"sections": tuple(flags["sections"])})

    @property
    def where(self) -> str:
        """The type of device: cuda or cpu."""
        return choose_device(self.device)[0].type

    @property
    def sizes(self) -> ViTGPT2Config:
        """Sizes of the model."""
        return sizes(self.tiny)

    def run(self) -> dict[str, Any]:
        """Run all sections; print and write each row as it comes."""
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
                started = time.monotonic()
                print(name, flush=True)
                for row in self.rows_of(name, Path(folder), min(self.seconds(name), ends - started)):
                    prediction = predicted.get(row.name, "")
                    print(row.line(prediction), flush=True)
                    found["rows"].append({"section": name, "predicted": prediction} | asdict(row))
                    found["seconds"][name] = time.monotonic() - started
                    write_json(self.output, found)
                print(f"  {name} took {time.monotonic() - started:.0f} s", flush=True)
        return found

    def seconds(self, name: str) -> float:
        """Seconds that a section may take; more on a CPU, which compiles for minutes."""
        return SECTIONS[name][1] * (1 if self.where == "cuda" else 5)

    def rows_of(self, name: str, folder: Path, seconds: float) -> Iterator[Row]:
        """Yield the rows of a section from its process, which is killed when its time is over."""
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
            yield Row("stopped", more=f"after {seconds:.0f} s, its time limit")
        except EOFError:
            yield Row("ended", more="its process ended before it had finished")
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError, AttributeError):  # Windows has no groups of processes
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
