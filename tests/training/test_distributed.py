"""Several processes learn what one would, stop together, and end when one of them is gone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import tiny_config
from processes import (
    await_step,
    end,
    ending,
    flags,
    fork,
    forked,
    losses,
    newest,
    ranks_of,
    small_config,
    start,
    together,
)

from config import TrainConfig
from dataset import collate
from model import ImageCaptionModel
from training.checkpoint import checkpoints
from utils import read_log
from weights.file import MODEL_FILE


def every_loss(out: Path) -> list[float]:
    """The loss of each step but those whose line has been written, from the checkpoints made after each."""
    states = [json.loads((path / "state.json").read_text()) for path in checkpoints(out)]
    return [state["losses"][-1] for state in states if state["losses"]]


# 96 pictures: 16 are shared out evenly, 19 leave one picture for an epoch's last batch and no picture for one rank, and
# with an accumulation over 5 batches a whole epoch is one step and the picture that is left another.
@pytest.mark.parametrize(
    ("batch_size", "accumulation"),
    [pytest.param(16, 1, marks=pytest.mark.slow), (19, 1), pytest.param(19, 5, marks=pytest.mark.slow)],
)
def test_two_processes_learn_what_one_does(tmp_path, scenes_dir, batch_size, accumulation):
    """Averages of averages weigh tokens by who happened to get them; a share of no pictures once was a mean over none."""
    changes = {"batch_size": batch_size, "accumulation_steps": accumulation, "max_steps": 20}
    config = small_config(scenes_dir, **changes, checkpoint_interval=1, keep_checkpoints=20)
    for ranks in (1, 2):
        said = forked(config, tmp_path / f"{ranks}", ranks)
        assert ("processes   2, 2 on this machine" in said) == (ranks == 2)
        assert said.count("model       vit") == 1  # the first process alone speaks
        assert "FutureWarning" not in said and "strides do not match" not in said  # of one picture's gradients
    one, two = (every_loss(tmp_path / f"{ranks}/out") for ranks in (1, 2))
    assert len(one) == 18 and two == pytest.approx(one, rel=1e-5)
    assert losses(tmp_path / "2/out") == pytest.approx(losses(tmp_path / "1/out"), rel=1e-5)
    numbers = [json.loads((tmp_path / f"{ranks}/out/metrics.json").read_text()) for ranks in (1, 2)]
    assert numbers[0]["pictures"] == numbers[1]["pictures"] == 12  # each captioned once
    assert numbers[0]["loss"] == pytest.approx(numbers[1]["loss"], rel=1e-4)


def test_one_process_goes_on_where_two_stopped(tmp_path, scenes_dir):
    """A cluster gives back fewer machines than it took: batches that depend on their number are seen twice, or never."""
    config = small_config(scenes_dir, batch_size=19)
    forked(config, tmp_path / "one")
    processes = [fork(config, tmp_path / "two", **environment) for environment in together(2)]
    await_step(10, processes[0], tmp_path / "two/out")
    processes[1].terminate()  # who is told so does not matter
    for process in processes:
        end(process, 143, tmp_path / "two")
    assert 10 <= newest(tmp_path / "two/out")[3]["step"] < 24
    forked(config, tmp_path / "two")
    assert losses(tmp_path / "two/out") == pytest.approx(losses(tmp_path / "one/out"), rel=1e-5)


def test_a_share_of_nothing_is_a_batch_that_teaches_nothing():
    """Every process must call the model as often as the others, or they wait for it for ever."""
    config = tiny_config()
    batch = collate([], config, 5)
    (part,) = batch.micro(4)
    assert part.pixel_values.shape == (1, 3, 16, 16) and part.rows == [] and not part.lengths.any()
    model = ImageCaptionModel(config)
    found = model(*part.inputs, weights=None, contrastive=True)
    (found.loss + found.contrastive_loss).backward()
    assert found.loss == found.contrastive_loss == 0 and all(
        parameter.grad is not None for parameter in model.parameters()
    )
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("reward", ["cider_d", "mix"])
def test_captions_that_the_model_samples_itself(tmp_path, scenes_dir, never_stopped, clip_folder, reward):
    """A rank without a picture has nothing to sample, and no reward that could be averaged. CIDEr-D chooses, and says so."""
    changes = {"objective": "scst", "init_model": str(never_stopped / MODEL_FILE), "learning_rate": 1e-5}
    changes |= {"reward": reward, "pac": str(clip_folder), "reference_weight": 0.1} if reward == "mix" else {}
    config = small_config(scenes_dir, **changes, batch_size=19, max_steps=8, captions_per_image=2)
    said = forked(config, tmp_path, 2)
    assert re.search(r"^chosen      step \d+ by CIDEr-D \d.* of validation pictures; \w", said, re.MULTILINE)
    (line,) = (line for line in read_log(tmp_path / "out/metrics.jsonl") if "reward" in line)
    assert line["reward"] >= 0


# Under torchrun


@pytest.fixture(scope="module")
def config(scenes_dir) -> TrainConfig:
    changes = {"dropout": 0.1, "checkpoint_interval": 4, "max_steps": 40, "val_pictures": 0}
    return small_config(scenes_dir, **changes)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, config) -> Path:
    folder = tmp_path_factory.mktemp("never-stopped")
    forked(config, folder, 2)
    return folder / "out"


def test_both_stop_at_the_same_step(tmp_path, config, never_stopped):
    """A rank that stops a step before the other leaves it waiting, until torchrun kills it in the middle of a save."""
    process = start(flags(config), tmp_path, ranks=2)
    await_step(10, process, tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode and "lost the others" not in said
    assert said.count("and saved: the same command resumes") == 1
    assert 10 <= newest(tmp_path / "out")[3]["step"] < 40
    assert "going on at step" in forked(config, tmp_path, 2)
    assert ending(tmp_path / "out") == ending(never_stopped)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_job_ends_when_one_is_gone(tmp_path, config, never_stopped, rank):
    """A process that waits for one that is gone holds a cluster's machines until somebody looks."""
    longer = dataclasses.replace(config, eval_interval=1)
    process = start(flags(longer), tmp_path, ranks=2)
    await_step(10, process, tmp_path / "out")
    both = ranks_of(process)
    assert len(both) == 2
    os.kill(both[rank], signal.SIGKILL)
    began = time.perf_counter()
    process.communicate(timeout=60)
    seconds = time.perf_counter() - began
    print(f"the job ended {seconds:.1f} s after rank {rank} was killed, with exit code {process.returncode}")
    assert process.returncode and seconds < 10
    assert not any(Path(f"/proc/{number}").exists() for number in both)
    said = forked(config, tmp_path, 2)
    assert "going on at step" in said and ending(tmp_path / "out") == ending(never_stopped)
