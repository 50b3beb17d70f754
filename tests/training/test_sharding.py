"""A language model whose weights are spread over the processes learns what it would in one, and stays one file."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import write_bases, write_language_model
from processes import await_step, flags, forked, newest, ranks_of, small_config, start
from safetensors.torch import load_file

from config import TrainConfig, UserError
from training.checkpoint import checkpoints
from utils import read_log
from weights.file import MODEL_FILE

NUMBERS = ("loss", "val_loss", "val_cider_d", "gradient_norm", "parameter_norm", "update_norm")


@pytest.fixture(scope="module")
def config(scenes_dir, scenes_tokenizer, tmp_path_factory) -> TrainConfig:
    """A Llama of two layers; 19 pictures a step leave one for an epoch's last, and none for one of two processes."""
    folder = tmp_path_factory.mktemp("bases")
    encoder = write_bases(folder, 48, 8, len(scenes_tokenizer), 64)["encoder"]
    decoder = write_language_model("llama", folder / "llama", scenes_tokenizer)
    own = small_config(scenes_dir, bridge="prefix", prefix_length=6, max_length=64, batch_size=19, max_steps=8)
    changes = {"init_encoder": encoder, "decoder": decoder, "shard": True, "val_pictures": 12, "num_workers": 0}
    return dataclasses.replace(own, tokenizer="auto", checkpoint_interval=1, keep_checkpoints=40, **changes)


def assert_same(one: Path, other: Path) -> None:
    """Equal to rounding: every loss, the log, the finished file."""
    for read in (every_loss, log):
        assert read(other) == pytest.approx(read(one), rel=1e-5)
    mine, theirs = (load_file(out / MODEL_FILE) for out in (one, other))
    assert mine.keys() == theirs.keys()
    # Of what has no gradient but rounding, as the keys' biases, Adam makes steps too.
    difference = sum((mine[name] - theirs[name]).square().sum() for name in mine).sqrt()
    assert difference < 1e-5 * sum(tensor.square().sum() for tensor in mine.values()).sqrt()


def every_loss(out: Path) -> list[float]:
    states = [json.loads((path / "state.json").read_text()) for path in checkpoints(out)]
    return [state["losses"][-1] for state in states if state["losses"]]


def log(out: Path) -> list[float]:
    return [line[name] for line in read_log(out / "metrics.jsonl") for name in NUMBERS if name in line]


VARIANTS = {
    "plain": {},
    "more": {"accumulation_steps": 2, "ema": 0.9, "gradient_checkpointing": True},
    "lora": {"lora": True, "lora_dropout": 0.0, "ema": 0.9},
    "frozen": {"freeze": ("decoder",)},
}


@pytest.mark.parametrize(
    "variant", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in list(VARIANTS)[1:])]
)
def test_two_processes_learn_what_one_does(tmp_path, config, variant):
    """A picture's prefix goes through a layer before its captions do: two passes, and in the last layer FSDP sees the
    backward of one only."""
    config = dataclasses.replace(config, **VARIANTS[variant])
    for ranks in (1, 2):
        said = forked(config, tmp_path / f"{ranks}", ranks)
        assert ("has no effect with one process" in said) == (ranks == 1)
        assert not [line for line in said.splitlines() if "Warning" in line and "Glyph" not in line]
    assert len(every_loss(tmp_path / "2/out")) == 7
    assert_same(tmp_path / "1/out", tmp_path / "2/out")


def test_two_go_on_where_one_was_and_one_where_two_were(tmp_path, config):
    """A checkpoint says nothing of shards."""
    forked(config, tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / "2", symlinks=True)
    for ranks, step in ((2, 3), (1, 5)):
        for path in checkpoints(tmp_path / "2/out"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        assert f"going on at step {step}" in forked(config, tmp_path / "2", ranks)
    assert_same(tmp_path / "1/out", tmp_path / "2/out")


@pytest.mark.slow
def test_four_processes_of_which_one_is_killed(tmp_path, config):
    config = dataclasses.replace(config, max_steps=24)
    forked(config, tmp_path / "1")
    (tmp_path / "4").mkdir()
    process = start(flags(config), tmp_path / "4", ranks=4)
    await_step(10, process, tmp_path / "4/out")
    os.kill(ranks_of(process)[2], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode and 9 <= newest(tmp_path / "4/out")[3]["step"] < 24
    assert "going on at step" in forked(config, tmp_path / "4")
    assert_same(tmp_path / "1/out", tmp_path / "4/out")


UNFIT = [{"qlora": True}, {"compile": True}, {"optimizer": "muon"}, {"objective": "scst", "init_model": "x"}]


@pytest.mark.parametrize("unfit", UNFIT, ids=lambda changes: next(iter(changes)))
def test_what_does_not_go_together(config, unfit):
    started = {} if "init_model" in unfit else {"init_encoder": "a", "decoder": "b"}
    with pytest.raises(UserError, match="shard needs adamw and cross_entropy, without qlora and compile: leave it out"):
        TrainConfig(shard=True, **started, **unfit)


def test_only_another_language_model_is_sharded(tmp_path, scenes_dir):
    config = small_config(scenes_dir, shard=True, max_steps=1)
    assert "error: shard needs a --decoder that is not GPT-2: leave it out" in forked(config, tmp_path, code=2)
