"""Training runs as processes of their own, which tests can stop, kill and compare.

`start` runs main.py as users do, under torchrun where there is more than one rank. `fork` calls train.train in a child of a
server that has imported everything already: a run of a few dozen steps takes a second or two.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from config import PRESETS, TrainConfig, ViTGPT2Config
from training.checkpoint import load_checkpoint, newest_whole
from utils import file_hash, read_log, run_script
from weights.file import MODEL_FILE

ROOT = Path(__file__).resolve().parents[1]
# What children of the server do not have to import. It starts with the first of them, and has no sys.path of pytest's.
PRELOADED = ["train", "processes", "matplotlib.pyplot", "torch._dynamo"]


def small_config(scenes: Path, **changes: Any) -> TrainConfig:
    """A run of 24 steps, 6 an epoch, on the pictures of the fixture scenes_dir."""
    model = dataclasses.replace(
        PRESETS["demo"].model,
        vision_embed_dim=32,
        vision_num_layers=2,
        vision_num_heads=2,
        decoder_embed_dim=32,
        decoder_num_layers=1,
        decoder_num_heads=2,
        **{name: changes.pop(name) for name in list(changes) if name in ViTGPT2Config.__dataclass_fields__},
    )
    fields: dict[str, Any] = {"dataset": "coco", "data_dir": scenes, "output_dir": Path("out"), "batch_size": 16}
    fields |= {"max_steps": 24, "device": "cpu", "precision": "fp32", "optimizer": "adamw", "wandb": "off"}
    fields |= {"val_pictures": 1000}
    return dataclasses.replace(PRESETS["demo"], model=model, **(fields | changes))


def flags(config: TrainConfig) -> list[str]:
    """The command line of main.py that means the config."""
    given: list[str] = []
    default, own = PRESETS[config.preset], config
    for these, others in ((own, default), (own.model, default.model)):
        for field in dataclasses.fields(these):
            value = getattr(these, field.name)
            if field.name in ("model", "augmentation") or value == getattr(others, field.name):
                continue
            name = field.name.replace("_", "-")
            given += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return ["--preset", config.preset, *given]


def start(
    arguments: list[str], cwd: Path, ranks: int = 1, environment: dict[str, str] | None = None, **more: Any
) -> subprocess.Popen[str]:
    """main.py with these arguments; torchrun's where there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | more
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "main.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"} | (environment or {}),
        text=True,
        **options,
    )


def run(arguments: list[str], cwd: Path, ranks: int = 1, code: int = 0) -> str:
    """Runs main.py to its end, which must be with this exit code; returns what it printed."""
    process = start(arguments, cwd, ranks)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def await_step(step: int, process: subprocess.Popen[str] | BaseProcess, out: Path) -> None:
    """Returns when the log of a run has come to this step."""
    while not any(line["step"] >= step for line in read_log(out / "metrics.jsonl")):
        if isinstance(process, subprocess.Popen):
            assert process.poll() is None, process.communicate()[0]
        else:
            assert process.is_alive()
        time.sleep(0.01)


def stop_after(step: int, process: subprocess.Popen[str], out: Path, number: int) -> int:
    """Sends a signal after a step; returns the exit code."""
    await_step(step, process, out)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The ids of the processes that torchrun has started, in the order of their ranks."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = dict(e.split("=", 1) for e in (path / "environ").read_text().split("\0") if "=" in e)
        except (OSError, UnicodeDecodeError):  # gone meanwhile
            continue
        if parent == process.pid and "RANK" in environment:
            found[int(environment["RANK"])] = int(path.name)
    return [found[rank] for rank in sorted(found)]


def _train(config: TrainConfig, folder: Path, environment: dict[str, str]) -> None:
    from train import train

    os.chdir(folder)
    os.environ.update(environment)
    output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    run_script(lambda: train(config))


def fork(config: TrainConfig, folder: Path, **environment: str) -> BaseProcess:
    """train.train(config) in a process that works in `folder`, and prints into its output.txt."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = context.Process(target=_train, args=(config, folder, {"TQDM_DISABLE": "1"} | environment))
    process.start()
    return process


def end(process: BaseProcess, code: int = 0, folder: Path | None = None) -> str:
    """Waits for the end of a forked run, which must be with this exit code; returns what was printed into the folder."""
    process.join(120)
    said = (folder / "output.txt").read_text() if folder else ""
    assert process.exitcode == code, (process.exitcode, said)
    return said


def forked(config: TrainConfig, folder: Path, ranks: int = 1, code: int = 0, **environment: str) -> str:
    """A forked run, whole, of one or several ranks; returns what it printed."""
    for process in [fork(config, folder, **environment | rank) for rank in together(ranks)]:
        end(process, code, folder)
    return (folder / "output.txt").read_text()


def together(ranks: int) -> Iterator[dict[str, str]]:
    """What torchrun would put into the ranks' environments."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    for rank in map(str, range(ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        yield own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def curve(out: Path) -> list[tuple[int, str, str]]:
    """The steps and losses, in hex, of a run's log, and its scores on validation pictures."""
    lines, names = read_log(out / "metrics.jsonl"), ("loss", "val_loss", "val_cider_d")
    return [(line["step"], name, float(line[name]).hex()) for line in lines for name in names if name in line]


def losses(out: Path) -> list[float]:
    """The losses of a run's log."""
    return [line["loss"] for line in read_log(out / "metrics.jsonl") if "loss" in line]


def ending(out: Path) -> tuple[str, list[tuple[int, str, str]]]:
    """What two runs must have in common to be the same: the weights' hash, and the curve."""
    return file_hash(out / MODEL_FILE), curve(out)


def newest(run: Path) -> tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The newest whole checkpoint of a run: its folder, weights, tensors and state."""
    folder = newest_whole(run)
    assert folder is not None
    return folder, *load_checkpoint(folder)
