"""benchmark.py ruler: what a change of the training recipe gains, measured with small runs and several seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.captions import PRECISIONS
from benchmarks.training import each_in_a_process
from config import NUM_BEAMS, TrainConfig, UserError
from data.layouts import FLICKR8K_LISTS
from dataset import make_dataloader
from evaluate import caption_batches, caption_loss
from main import parse_arguments
from model import ImageCaptionModel
from training.checkpoint import newest_complete
from training.distributed import ALONE
from training.job import Chosen, prepare
from training.run import Run
from utils import choose_precision, keep_freed_memory, write_json

RULER = (
    "--preset flickr8k --batch-size 8 --vision-embed-dim 128 --vision-num-layers 4 --vision-num-heads 2 "
    "--decoder-embed-dim 128 --decoder-num-layers 3 --decoder-num-heads 2 --vocab-size 2048"
)
"""The flickr8k preset with a quarter of its parameters, pictures and batch, so with as many steps and epochs: few steps
reward speed alone, and do not punish what learns by heart. Rulers of fewer steps chose three times the learning rate, which
made the preset itself worse (EXPERIMENTS.md)."""
LIST = FLICKR8K_LISTS["train"]
SHARE = 4  # every fourth training picture
SCORES = ("cider_d", "val_loss", "unique_captions")
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond, the last one is a little too large.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10)


def ruler_config(flags: str, seed: int, data_dir: Path, precision: Any) -> TrainConfig:
    """The ruler's run with these flags of main.py (without dashes)."""
    given = [f"--{flag}" for flag in shlex.split(flags)]
    config = parse_arguments([*shlex.split(RULER), *given, "--seed", str(seed)])
    quiet: dict[str, Any] = {"val_pictures": 0, "eval_interval": 1 << 30, "keep_checkpoints": 1, "wandb": "off"}
    return dataclasses.replace(config, data_dir=data_dir, precision=precision, resume="never", **quiet)


def quarter_of(data_dir: Path, folder: Path) -> Path:
    """A folder with the data of Flickr8k (links), but only every fourth picture to train on."""
    data_dir = data_dir.expanduser().absolute()
    try:
        names = sorted((data_dir / LIST).read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(
            f"{data_dir / LIST}: {error.strerror}: the ruler needs the official lists of Flickr8k"
        ) from None
    folder.mkdir()
    for path in data_dir.iterdir():
        if path.name != LIST:
            (folder / path.name).symlink_to(path)
    (folder / LIST).write_text("\n".join(names[::SHARE]), encoding="utf-8")
    return folder


def measure(config: TrainConfig, threads: int, folder: Path, pipe: Connection) -> None:
    """A process: train, caption the validation pictures by three beams, send the scores. Test is never looked at."""
    from train import learn

    torch.set_num_threads(threads)
    keep_freed_memory()
    device, dtype = torch.device("cpu"), PRECISIONS[config.precision]
    with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        job = prepare(config, ALONE, Chosen(Run(folder), device, dtype))
        if learn(job) is not None:
            return  # stopped: half a training has no score
        newest = newest_complete(folder)
        assert newest is not None
        model = ImageCaptionModel.from_pretrained(newest / "model.safetensors")
        loader = make_dataloader(job.datasets["val"], 64)
        by_beams, greedy = (
            caption_batches(model, loader, model.tokenizer, device, dtype, False, num_beams=beams).metrics()
            for beams in (NUM_BEAMS, 1)
        )
        metrics = by_beams | {"val_loss": caption_loss(model, loader, device, dtype)}
    seconds = sum(os.times()[:4])  # of CPU time, with the workers'
    found = {name: metrics[name] for name in SCORES} | {"steps": job.steps, "core_minutes": seconds / 60}
    pipe.send(found | {f"greedy_{name}": greedy[name] for name in ("cider_d", "unique_captions")})


@dataclass(kw_only=True)
class RulerBenchmark:
    """Train the small recipe with each choice and each seed on Flickr8k, and compare the choices with the first one on the
    validation pictures (three beams). Results are kept in the output file, so more choices and seeds can be added."""

    data_dir: Path
    """Folder of Flickr8k."""
    choices: tuple[str, ...] = ("",)
    """Flags of main.py without dashes: ema=0.999 "weight-decay=0.5 dropout=0.2"; "" is the recipe as it is."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each choice."""
    at_a_time: int = 1
    """How many to train at the same time, each on its share of the cores."""
    output: Path = Path("benchmark-ruler.json")
    """JSON file of all runs so far."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Return the ruler, its precision, and every run's scores: {choice: {seed: scores}}."""
        chosen, _ = choose_precision("auto", torch.device("cpu"))  # once for all: it is measured
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == chosen)
        recipe = ruler_config("", 0, Path(), precision).fingerprint  # the preset may change; code may too, unseen
        about: dict[str, Any] = {"ruler": RULER, "recipe": recipe, "precision": precision}
        runs: dict[str, dict[str, Any]] = {}
        if self.output.is_file():
            known = json.loads(self.output.read_text(encoding="utf-8"))
            if {name: known.get(name) for name in about} != about:
                raise UserError(
                    f"{self.output} has runs of another ruler, preset, precision or version: choose another --output"
                )
            runs = known["runs"]
        wanted = dict.fromkeys((choice, seed) for choice in self.choices for seed in self.seeds)
        waiting = [(c, s) for c, s in wanted if str(s) not in runs.get(c, {})]
        threads = max(1, (os.cpu_count() or 1) // self.at_a_time)
        with tempfile.TemporaryDirectory() as folder:
            data = quarter_of(self.data_dir, Path(folder) / "data") if waiting else self.data_dir
            jobs: dict[Any, tuple[Any, ...]] = {}
            for choice, seed in waiting:
                (run_folder := Path(folder) / str(len(jobs))).mkdir()
                jobs[choice, seed] = (ruler_config(choice, seed, data, precision), threads, run_folder)
            for (choice, seed), found in each_in_a_process(jobs, measure, self.at_a_time):
                runs.setdefault(choice, {})[str(seed)] = found
                write_json(self.output, about | {"runs": runs})
                line = "CIDEr-D {cider_d:.4f}, validation loss {val_loss:.4f}, different captions {unique_captions:.1%} (greedy {greedy_cider_d:.4f}, {greedy_unique_captions:.1%}), {core_minutes:.1f} minutes of a core"
                print(f"  {choice or 'the recipe'}, seed {seed}: {line.format(**found)}", flush=True)
        print_table(runs, self.choices[0])
        return about | {"runs": runs}


def print_table(runs: dict[str, dict[str, Any]], base: str) -> None:
    """Print each choice's mean over its seeds, and its difference from the choice `base` with a 95 % interval."""
    tables = {
        choice: np.array([[each[n] for n in SCORES] for each in seeds.values()]) for choice, seeds in runs.items()
    }
    first = tables[base]
    freedom = sum(len(table) - 1 for table in tables.values())
    # The seeds' spread is taken to be the same for all choices: three seeds alone would say little about it.
    squares = sum(((table - table.mean(0)) ** 2).sum(0) for table in tables.values())
    spread = np.sqrt(squares / freedom) if freedom else np.full(len(SCORES), np.inf)
    student = STUDENT[min(max(freedom, 1), len(STUDENT)) - 1]
    if not freedom:
        print("one seed of each choice says nothing about chance: add --seeds 0 1 2")
    print(f"spread of the seeds (standard deviation, {freedom} degrees of freedom): {line_of(spread, '{:.4f}')}")
    width = max(10, *map(len, tables))
    print(f"{'choice':{width}} seeds  {'   '.join(f'{name:>26}' for name in SCORES)}  minutes of a core")
    for choice, table in tables.items():
        half = student * spread * math.sqrt(1 / len(table) + 1 / len(first))
        cells = [
            f"{mean:.4f} ({gain:+.4f} ± {error:.4f})" if choice != base else f"{mean:.4f}"
            for mean, gain, error in zip(table.mean(0), table.mean(0) - first.mean(0), half, strict=True)
        ]
        minutes = np.mean([each["core_minutes"] for each in runs[choice].values()])
        print(
            f"{choice or 'the recipe':{width}} {len(table):5}  {'   '.join(f'{c:>26}' for c in cells)}  {minutes:.1f}"
        )


def line_of(values: np.ndarray, form: str) -> str:
    """Names and values of the scores, in one line."""
    return ", ".join(f"{name} {form.format(value)}" for name, value in zip(SCORES, values, strict=True))
