"""Numbers reach whoever wants them, and nothing about Weights & Biases stops a run, asks a question or tells a secret."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import flags, forked, small_config, start

from config import TrainConfig
from training.progress import what_chose
from training.tracking import MARKERS, curves, draw_curves
from utils import read_log, write_text

CANARY = "canary" + "0" * 34  # as long as a real key


@pytest.fixture(scope="module")
def config(scenes_dir) -> TrainConfig:
    return small_config(scenes_dir, max_steps=12, wandb="auto")


def environment(folder: Path, key: str = CANARY, server: str = "http://127.0.0.1:9") -> dict[str, str]:
    """Without the .netrc and settings of whoever runs the tests; the server's port is closed by default."""
    own = {"HOME": str(folder), "WANDB_API_KEY": key, "WANDB_BASE_URL": server}
    return own | {f"WANDB_{name}_DIR": str(folder / "wandb") for name in ("CONFIG", "CACHE", "DATA")}


def line_of(said: str) -> str:
    """The one line about it."""
    (line,) = (line for line in said.splitlines() if "wandb" in line.lower())
    return line


def check_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"canary" in path.read_bytes()]


def test_without_a_key_it_is_off(tmp_path, config):
    """A question for a key that nobody is there to answer once held a job until its time was over."""
    said = forked(config, tmp_path, **environment(tmp_path, key=""))
    assert line_of(said).startswith("wandb       off (no key: run `wandb login`")
    assert not [*tmp_path.glob("out/wandb*")]


def test_a_server_that_is_away_takes_no_run_along(tmp_path, config):
    """As users start it, at a terminal, where wandb would ask."""
    keyboard, terminal = os.openpty()
    process = start(flags(config), tmp_path, environment=environment(tmp_path), stdin=terminal)
    said, _ = process.communicate(timeout=120)  # not the client's minutes of patience
    os.close(keyboard)
    os.close(terminal)
    assert process.returncode == 0, said
    assert line_of(said).startswith("wandb       offline (127.0.0.1 is not available (")
    assert [*tmp_path.glob("out/wandb/offline-run-*/run-*.wandb")]
    check_secret(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [0, 1, 2])
def test_a_server_that_never_answers_takes_no_run_along(tmp_path, config, answers):
    """It accepts connections, so only patience can tell that it is away; or it falls silent after its first answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:

        def answer() -> None:
            for _ in range(answers):
                connection, _ = server.accept()
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        began = time.perf_counter()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = start(flags(config), tmp_path, environment=environment(tmp_path, server=url))
        said, _ = process.communicate(timeout=150)
        seconds = time.perf_counter() - began
    assert process.returncode == 0, said
    print(f"{seconds:.0f} s: {line_of(said)}")
    assert line_of(said).startswith("wandb       offline (")
    assert [*tmp_path.glob("out/wandb/offline-run-*/run-*.wandb")]
    assert seconds < 75
    check_secret(tmp_path)


def test_offline_when_asked(tmp_path, config):
    """It needs no key, and what a later `wandb sync` is to send holds numbers, samples and the config."""
    offline = dataclasses.replace(config, wandb="offline")
    said = forked(offline, tmp_path, **environment(tmp_path, key=""))
    assert line_of(said) == "wandb       offline (requested)"
    (path,) = tmp_path.glob("out/wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert all(name in content for name in (b"val_cider_d", b"learning_rate", b"samples", b"captions_per_image"))
    assert (tmp_path / "out/wandb.id").read_text() in path.name


def test_the_log_is_written_in_any_case(tmp_path, config):
    """metrics.jsonl is what a run can be judged by when everything else is away."""
    forked(dataclasses.replace(config, wandb="off"), tmp_path)
    lines = read_log(tmp_path / "out/metrics.jsonl")
    (first, last) = (line for line in lines if "loss" in line)
    assert first["step"] == 10 and last["step"] == 12
    names = "epoch learning_rate gradient_norm parameter_norm update_norm pictures_per_second pairs_per_second mfu data_wait"
    assert all(first[name] > 0 for name in names.split())
    assert first["pairs_per_second"] == pytest.approx(5 * first["pictures_per_second"]) and first["data_wait"] < 1
    scored = [line for line in lines if line.get("val_loss", 0) > 0 and line["val_cider_d"] >= 0]
    assert [line["step"] for line in scored] == [6, 12]
    assert all(line["val_cider_d_low"] <= line["val_cider_d"] <= line["val_cider_d_high"] for line in scored)
    assert all(len(line["samples"]) == 4 for line in lines if "samples" in line)
    assert Image.open(tmp_path / "out/curves.png").size == (800, 800)
    about = json.loads((tmp_path / "out/run.json").read_text())
    assert about["finished"] and about["steps"] == 12 and 0 <= about["seconds"] < 60


def test_the_choice_of_the_best_says_how_sure_it_is():
    """Validation CIDEr-D chooses the best checkpoint, and nothing said whether it can tell it from the others."""
    scores = {6: 0.30, 12: 0.38, 18: 0.40, 24: 0.36}
    lines = [{"step": 6, "loss": 3.0}]
    lines += [
        {"step": step, "val_cider_d": x, "val_cider_d_low": x - 0.03, "val_cider_d_high": x + 0.03}
        for step, x in scores.items()
    ]
    said = "by CIDEr-D 0.400 (0.370 to 0.430) of validation pictures"
    assert what_chose(lines, "step-00000018") == f"step 18 {said}; 1 of the other 3 scores in this interval"
    assert what_chose(lines[:2] + lines[3:4], "step-00000018") == f"step 18 {said}; no other is within"
    assert what_chose(lines[:2], "step-00000006") == what_chose([], "best") == what_chose(lines, "step-00000099") == ""


@pytest.mark.parametrize(("scores", "height"), [([0.1, 0.4], 800), ([], 600)])
def test_curves_show_the_score_by_which_the_best_was_chosen(tmp_path, scores, height):
    """A run without validation pictures has no such curve, and its picture no empty field for one."""
    lines = [{"step": step, "loss": 5 - step / 10, "learning_rate": 1e-3} for step in (10, 20)]
    lines += [{"step": 20, "val_loss": 3.5, "samples": {"a.png": "a dog"}}]
    lines += [{"step": step, "val_cider_d": score} for step, score in enumerate(scores)]
    write_text(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(tmp_path)
    picture = Image.open(tmp_path / "curves.png").convert("L")
    assert picture.size == (800, height)
    assert min(picture.get_flattened_data()) < 64


@pytest.mark.parametrize("number", [1, 3, 100])
def test_curves_of_few_and_of_many_validations(number):
    """A hundred were a chain of black dots; a single one had an axis from 0.062 to 0.068."""
    lines = [{"step": step, "loss": 0.3 + 9 / step, "learning_rate": 1e-3} for step in range(10, 2001, 10)]
    lines += [{"step": 2000 * (i + 1) // number, "val_loss": 0.4, "val_cider_d": 0.065} for i in range(number)]
    losses, scores, _ = curves(lines).axes
    for axis, name in ((losses, "validation"), (scores, "validation, greedy")):
        (line,) = (line for line in axis.lines if line.get_label() == name)
        start, every = line.get_markevery()
        marked = np.arange(number)[start::every]
        assert min(number, MARKERS // 2) <= len(marked) <= MARKERS and marked[-1] == number - 1
    assert scores.get_ylim()[0] == 0 and losses.get_ylim()[1] < 1
    assert scores.get_xlim()[0] <= 0 and 2000 < scores.get_xlim()[1] < 2100


def test_curves_differ_without_colours():
    lines = [{"step": s, "loss": 1.0, "val_loss": 1.1} for s in range(1, 9)]
    training, validation = curves(lines).axes[0].lines
    red, green, blue = np.array([0.2126, 0.7152, 0.0722])  # how light the eye takes them for

    def lightness(line):
        r, g, b = (int(line.get_color()[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return red * r**2.2 + green * g**2.2 + blue * b**2.2

    assert lightness(training) > 2 * lightness(validation)
    assert training.get_linestyle() != validation.get_linestyle() and training.get_marker() != validation.get_marker()


@pytest.mark.parametrize(
    "lines", [[], [{"step": 0, "loss": 2.0}], [{"step": 1, "loss": float("nan"), "learning_rate": 0.0}]]
)
def test_curves_of_hardly_anything(lines):
    """Without a warning, and a single point is seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = curves(lines)
        FigureCanvasAgg(figure).draw()
    assert all(line.get_marker() == "o" for axis in figure.axes for line in axis.lines)
