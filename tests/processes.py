"""Scripts of this project as processes, and training runs that tests can stop, kill and compare.

`launch` starts a script as users do, `finished` waits for its end. `start` and `run` do so with main.py, under torchrun
where there is more than one rank. `fork` calls train.train in a child of a server that has imported everything already: a
run of a few dozen steps takes a second or two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_config

from config import PRESETS, TrainConfig, ViTGPT2Config
from training.checkpoint import load_checkpoint, newest_complete
from utils import file_hash, read_log, run_script
from weights.file import MODEL_FILE

ROOT = Path(__file__).resolve().parents[1]
# What children of the server do not have to import. It starts with the first of them, and has no sys.path of pytest's.
PRELOADED = ["train", "processes", "matplotlib.pyplot", "torch._dynamo"]
SECONDS = 900
"""After which a script that should have ended by itself hangs."""
IN_ORDER = {"PYTHONUNBUFFERED": "1"}
"""For standard output and standard error in one stream."""


def surroundings(changes: Mapping[str, object] | None = None) -> dict[str, str]:
    """The environment of a script: this process's, no progress bars, and the changes; None takes a variable away."""
    own = os.environ | {"TQDM_DISABLE": "1"} | (changes or {})
    return {name: str(value) for name, value in own.items() if value is not None}


def _options(
    command: tuple[object, ...], environment: Mapping[str, object] | None, shell: str, more: dict[str, Any]
) -> dict[str, Any]:
    first, *rest = map(str, command)
    words = [sys.executable, first if first.startswith("-") else str(ROOT / first), *rest]
    line = ["bash", "-c", shell, "bash", *words] if shell else words
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return pipes | more | {"args": line, "env": surroundings(environment)}


def launch(
    *command: object, environment: Mapping[str, object] | None = None, shell: str = "", **more: Any
) -> subprocess.Popen[str]:
    """A script of this project and its arguments as a process; or `-c`, `-m`, `-I` and what else Python takes.

    environment: changes, see surroundings. shell: a line of bash in which "$@" stands for the command. more: for Popen.
    """
    return subprocess.Popen(**_options(command, environment, shell, more))


def finished(
    *command: object,
    code: int | None = 0,
    environment: Mapping[str, object] | None = None,
    shell: str = "",
    **more: Any,
) -> subprocess.CompletedProcess[str]:
    """The same, at its end, which must be with this exit code (None: with any)."""
    done = subprocess.run(**_options(command, environment, shell, more), timeout=SECONDS)
    assert code in (None, done.returncode), f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def small_config(scenes: Path, **changes: Any) -> TrainConfig:
    """A run of 24 steps, 6 an epoch, on the pictures of the fixture scenes_dir."""
    demo = PRESETS["demo"].model
    sizes: dict[str, Any] = {name: getattr(demo, name) for name in ("image_size", "vocab_size", "max_length")}
    sizes |= {"decoder_num_layers": 1}
    sizes |= {name: changes.pop(name) for name in list(changes) if name in ViTGPT2Config.__dataclass_fields__}
    fields: dict[str, Any] = {"dataset": "coco", "data_dir": scenes, "output_dir": Path("out"), "batch_size": 16}
    fields |= {"max_steps": 24, "device": "cpu", "precision": "fp32", "optimizer": "adamw", "wandb": "off"}
    fields |= {"val_pictures": 1000}
    return dataclasses.replace(PRESETS["demo"], model=tiny_config(**sizes), **(fields | changes))


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


def training_line(arguments: list[str], ranks: int) -> list[str]:
    """main.py with these arguments; torchrun's where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(ROOT / "main.py")]
    return [*(torchrun if ranks > 1 else ["main.py"]), *arguments]


def start(
    arguments: list[str], cwd: Path, ranks: int = 1, environment: dict[str, str] | None = None, **more: Any
) -> subprocess.Popen[str]:
    """main.py with these arguments, what it prints in one stream and at once."""
    own = IN_ORDER | (environment or {})
    return launch(*training_line(arguments, ranks), cwd=cwd, environment=own, **{"stderr": subprocess.STDOUT} | more)


def run(arguments: list[str], cwd: Path, ranks: int = 1, code: int = 0) -> str:
    """Runs main.py to its end, which must be with this exit code; returns what it printed."""
    more: dict[str, Any] = {"environment": IN_ORDER, "stderr": subprocess.STDOUT}
    return finished(*training_line(arguments, ranks), code=code, cwd=cwd, **more).stdout


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


PORTS = itertools.count(20_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


def free_port() -> int:
    """A port for a server. It is below those that the system gives to connections, each of pytest's workers has a thousand:
    one that the system had named as free was taken by a connection before the ranks met there."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("unreachable")


def together(ranks: int) -> Iterator[dict[str, str]]:
    """What torchrun would put into the ranks' environments."""
    port = str(free_port())
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
    folder = newest_complete(run)
    assert folder is not None
    return folder, *load_checkpoint(folder)
