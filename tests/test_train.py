"""The loop's promises: captions that end, pictures that matter, optimizers, schedule, resuming to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config

import train as train_module
from config import PRESETS, TrainConfig, UserError
from dataset import CaptionDataset, collate, decode
from model import ImageCaptionModel
from table import make_table
from train import blank_words, build_optimizers, duration, learning_rate_at
from utils import checkpoints, file_hash, load_checkpoint, read_log


def test_it_learns_to_stop(scenes_table, scenes_tokenizer):
    """GPT-2's end token is also its padding; masking targets by token id once made models that never stop."""
    texts = [["a dog"], ["two dogs run on the green grass"], ["three men"], ["a red circle left of a small blue cross"]]
    table = make_table((scenes_table.picture(n), n, own) for n, own in enumerate(texts))
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=len(scenes_tokenizer), max_length=48, vision_embed_dim=64, decoder_embed_dim=64, image_size=48
    )
    model = ImageCaptionModel(config).train()
    batch = collate(
        [CaptionDataset(table, scenes_tokenizer, config, captions_per_image=1)[0, n] for n in range(4)], config, 1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(
            batch["pixel_values"], batch["input_ids"], batch["lengths"], batch["labels"], batch["positions"]
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sequences = model.generate(batch["pixel_values"], max_length=48).sequences
    assert decode(scenes_tokenizer, sequences) == [text for (text,) in texts]
    for row, tokens in zip(sequences.tolist(), batch["lengths"].flatten().tolist(), strict=True):
        assert row.index(config.end_token_id) == tokens - 1


def test_the_schedule_warms_up_and_falls_to_zero():
    config = TrainConfig(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_at(step, 200, config) for step in range(201)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 == max(rates)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[200] == pytest.approx(0)
    assert learning_rate_at(0, 5, config) == 1.0  # a very short run does not spend itself warming up


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_layer_matrices_decay(kind):
    model = ImageCaptionModel(tiny_config())
    config = TrainConfig(optimizer=kind, weight_decay=0.3)
    groups = [group for optimizer in build_optimizers(model, config) for group in optimizer.param_groups]
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decaying}
    assert "decoder.blocks.0.attn.c_attn.weight" in names and "encoder.blocks.1.fc1.weight" in names
    assert not any("bias" in name or "norm" in name or "wte" in name or "wpe" in name for name in names)


def test_blank_words_spare_the_start_token():
    config = tiny_config()
    ids = torch.ones(4, 5, 20, dtype=torch.int64)
    blanked = blank_words(ids, 0.5, config)
    assert (blanked[..., 0] == 1).all()
    assert 0.3 < (blanked[..., 1:] == config.pad_token_id).float().mean() < 0.7
    assert blank_words(ids, 0.0, config) is ids


def test_estimates_are_of_the_right_size():
    """One pair of base size costs 38 GFLOP when five captions share a picture, 135 one by one (DESIGN.md's figures)."""
    base = TrainConfig().model
    assert train_module.step_operations(base, 5, 16) / 5 == pytest.approx(38e9, rel=0.1)
    assert train_module.step_operations(base, 1, 16) == pytest.approx(135e9, rel=0.1)
    assert [duration(s) for s in (30, 600, 7200, 864000)] == ["30 s", "10 min", "2.0 h", "10.0 days"]


# Whole runs, as processes

SMALL = [
    *("--preset", "demo", "--num-scenes", "160", "--batch-size", "16", "--max-steps", "24"),
    *("--vision-embed-dim", "32", "--vision-num-layers", "1", "--decoder-embed-dim", "32", "--decoder-num-layers", "1"),
    *("--dropout", "0.1", "--word-dropout", "0.1", "--checkpoint-interval", "4"),
    # Two runs are compared to the bit: on a busy machine `auto` measured bf16 as faster for one and not for the other.
    *("--precision", "bf16"),
]


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(arguments: list[str], cwd: Path) -> str:
    process = start(arguments, cwd)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def stop_after(step: int, process: subprocess.Popen[str], output_dir: Path, number: int) -> int:
    while not any(line["step"] >= step for line in read_log(output_dir / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run([*SMALL, "--output-dir", "out"], directory)
    return directory / "out"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, whole_run, number, code):
    arguments = [*SMALL, "--output-dir", "out", "--data-dir", "scenes"]
    # The data folder is no part of what is learned here, but it is of the settings: both calls name it.
    assert stop_after(10, start(arguments, tmp_path), tmp_path / "out", number) == code
    assert not (tmp_path / "out" / "metrics.json").exists()
    output = run(arguments, tmp_path)
    assert "going on at step" in output
    name = "vit-gpt2-captioning.safetensors"
    assert file_hash(tmp_path / "out" / name) == file_hash(whole_run / name)
    curves = [
        [(line["step"], line["loss"]) for line in read_log(out / "metrics.jsonl") if "loss" in line]
        for out in (tmp_path / "out", whole_run)
    ]
    assert [step for step, _ in curves[0]] == [10, 20, 24]
    assert curves[0][-1] == curves[1][-1]


def test_checkpoints_are_few_and_whole(whole_run):
    assert [path.name for path in checkpoints(whole_run)] == ["step-00000020", "step-00000024"]
    for path in checkpoints(whole_run):
        assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert json.loads((whole_run / "run.json").read_text())["finished"]


def test_runs_find_their_own_continuation(tmp_path, monkeypatch, whole_run):
    """auto goes on with an unfinished run of the same settings only; another's folder is refused, not overwritten."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(PRESETS["demo"], max_steps=5)
    other = dataclasses.replace(config, learning_rate=1e-3)
    unfinished = Path("runs/demo-20200101-000000")
    (unfinished / "checkpoints/step-00000003").mkdir(parents=True)
    (unfinished / "checkpoints/step-00000003/state.json").write_text("{}")
    (unfinished / "run.json").write_text(json.dumps({"fingerprint": config.fingerprint, "finished": False}))
    assert train_module.find_run(config) == unfinished
    assert train_module.find_run(other) != unfinished
    assert train_module.find_run(dataclasses.replace(config, resume="never")) != unfinished
    with pytest.raises(UserError, match="other settings"):
        train_module.find_run(dataclasses.replace(other, output_dir=unfinished))
    with pytest.raises(UserError, match="no checkpoint"):
        train_module.find_run(dataclasses.replace(config, resume="nowhere"))


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {train_module.find_run(dataclasses.replace(PRESETS["demo"], seed=seed)) for seed in range(4)}
    assert len(folders) == 4


def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole_run, capsys):
    shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/step-00000024/optimizer.safetensors").write_bytes(b"cut")
    model = ImageCaptionModel.from_pretrained(whole_run / "checkpoints/step-00000020/model.safetensors")
    fresh = ImageCaptionModel(model.config)
    state = load_checkpoint(tmp_path, fresh, build_optimizers(fresh, PRESETS["demo"]))
    assert state["step"] == 20 and "step-00000024 is damaged" in capsys.readouterr().out
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def own_photos(folder, scenes_table, number: int, damaged: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for row in range(number):
        picture = scenes_table.picture(row).read_bytes()
        (folder / f"{row}.png").write_bytes(picture[:50] if row < damaged else picture)
        (folder / f"{row}.txt").write_text("\n".join(scenes_table.captions_of(row)))


OWN = [
    "--preset",
    "demo",
    "--dataset",
    "auto",
    "--data-dir",
    "photos",
    "--vision-num-layers",
    "1",
    "--precision",
    "fp32",
]


def test_a_step_without_a_readable_picture_changes_nothing(tmp_path, scenes_table):
    """Its mean over no tokens was 0 / 0, and the run ended with advice about its learning rate."""
    own_photos(tmp_path / "photos", scenes_table, 20, damaged=4)
    run([*OWN, "--batch-size", "1", "--max-bad-share", "0.5", "--max-steps", "18", "--output-dir", "out"], tmp_path)
    assert all(line["loss"] > 0 for line in read_log(tmp_path / "out/metrics.jsonl") if "loss" in line)


def test_a_run_goes_on_only_with_the_data_it_began_with(tmp_path, scenes_table):
    """A tokenizer trained anew on other captions gave old embeddings new words, and nobody noticed."""
    own_photos(tmp_path / "photos", scenes_table, 20)
    flags = [*OWN, "--batch-size", "4", "--epochs", "400", "--checkpoint-interval", "2"]
    process = start([*flags, "--output-dir", "out"], tmp_path)
    while not checkpoints(tmp_path / "out"):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    own_photos(tmp_path / "photos", scenes_table, 24)
    process = start([*flags, "--output-dir", "out"], tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "have changed since out began" in output and "--resume never" in output


def test_a_run_that_left_the_numbers_stops_and_saves_nothing(tmp_path):
    """Weights that were not finite once pushed the good checkpoints out."""
    process = start([*SMALL, "--output-dir", "out", "--learning-rate", "1e30", "--checkpoint-interval", "2"], tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "the loss is not finite" in output
    for path in checkpoints(tmp_path / "out"):
        for tensor in ImageCaptionModel.from_pretrained(path / "model.safetensors").parameters():
            assert tensor.isfinite().all()


def test_an_overflow_skips_both_optimizers(monkeypatch):
    """Clipping by a norm that is not finite once carried one optimizer's NaN into the other's weights."""
    model = ImageCaptionModel(tiny_config())
    optimizers = build_optimizers(model, TrainConfig(optimizer="muon"))
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(sum(p.sum() for p in model.parameters())).backward()
    model.decoder.blocks[0].c_fc.weight.grad[0, 0] = float("nan")
    scale = scaler.get_scale()
    train_module.update(model, optimizers, scaler, 1e-3, 1.0)
    assert scaler.get_scale() < scale
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)
    scaler.scale(sum((p**2).sum() for p in model.parameters())).backward()
    train_module.update(model, optimizers, scaler, 1e-3, 1.0)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_the_gpu(tmp_path, precision):
    output = run([*SMALL, "--device", "cuda", "--precision", precision], tmp_path)
    assert {"fp16": "float16", "bf16": "bfloat16"}[precision] in output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pictures_kept_on_the_gpu_give_the_same_run(tmp_path):
    flags = [*SMALL, "--device", "cuda", "--precision", "fp32", "--flip", "0.5"]
    run([*flags, "--output-dir", "plain"], tmp_path)
    run([*flags, "--output-dir", "kept", "--cache-on-gpu"], tmp_path)
    losses = [
        [line["loss"] for line in read_log(tmp_path / n / "metrics.jsonl") if "loss" in line] for n in ("plain", "kept")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the GPU's own sums are not the same to the bit
