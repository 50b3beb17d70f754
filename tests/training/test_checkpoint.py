"""What cannot be lost: runs and saves killed anywhere, full disks, flipped bytes, signals, and who may write where."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from processes import await_step, end, ending, flags, fork, forked, newest, run, small_config, start, stop_after

from config import TrainConfig, UserError
from model import ImageCaptionModel
from training.checkpoint import (
    checkpoints,
    clean,
    link_all,
    load_optimizers,
    newest_complete,
    optimizer_tensors,
    save_checkpoint,
    training_in,
)
from utils import file_hash, read_log, write_json
from weights.file import MODEL_FILE


def several(few: int, many: int) -> pytest.MarkDecorator:
    """A few in every test run, many before a release."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.slow)])


# What a run's loop remembers, beside its step.
STATE = {"best": None, "waited": 0, "losses": [], "rewards": [0.0, 0], "epoch": [0.0, 0], "seconds": 1.0}
STATE |= {"scaler": {}, "overflows": 0.0}


def sign(folder: Path) -> None:
    """A manifest for a checkpoint as it is now."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    about = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files}
    write_json(folder / "manifest.json", about)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir()}


# Killed anywhere


@pytest.fixture(scope="module")
def config(scenes_dir) -> TrainConfig:
    changes = {"max_steps": 36, "checkpoint_interval": 3, "ema": 0.9, "word_dropout": 0.1, "dropout": 0.1}
    return small_config(scenes_dir, **changes)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, config) -> Path:
    folder = tmp_path_factory.mktemp("never-killed")
    forked(config, folder)
    return folder


@several(3, 50)
def test_a_run_killed_anywhere_goes_on_to_the_same_bits(tmp_path, config, never_killed, number):
    """Kill -9 at random moments, most of them behind the first checkpoint: a run resumed to other bits has lost what it
    was."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    began = time.perf_counter()
    forked(config, tmp_path / "again")
    seconds = time.perf_counter() - began
    assert ending(tmp_path / "again/out") == ending(never_killed / "out")
    learning = newest(tmp_path / "again/out")[3]["seconds"]
    moments, resumed = random.Random(seed), 0
    for index in range(number):
        folder = tmp_path / f"{index}"
        process = fork(config, folder)
        while index % 5 and process.is_alive() and not checkpoints(folder / "out"):
            time.sleep(0.001)
        process.join(moments.uniform(0, learning if index % 5 else seconds))
        process.kill()
        process.join()
        said = forked(config, folder)
        resumed += "going on at step" in said
        assert ending(folder / "out") == ending(never_killed / "out"), f"seed {seed}, run {index}: {said}"
        assert not [*folder.rglob("*.unfinished")]
    print(f"{number} of {number} ended in the same bits, {resumed} of them from a checkpoint")


def _save_forever(run: Path) -> None:
    """Checkpoints whose weights, moments and state all are their step's number, every third the best one."""
    torch.set_num_threads(1)
    clean(run)
    found = newest_complete(run) and newest(run)
    model = ImageCaptionModel(tiny_config(vision_embed_dim=128, decoder_embed_dim=128))
    for step in itertools.count(found[3]["step"] + 1 if found else 1):
        for parameter in model.parameters():
            parameter.data.fill_(step)
        tensors = {f"0.{i}.exp_avg": p.data for i, p in enumerate(model.parameters())}
        best = f"step-{step // 3 * 3:08d}" if step > 2 else None
        save_checkpoint(run, step, model.save_file, tensors, STATE | {"step": step}, 0, best=best, keep=2)


@several(5, 100)
def test_a_save_killed_anywhere_leaves_a_state_to_load(tmp_path, capsys, number):
    """Half a checkpoint that is taken for a whole one ends a run for good; so does the deletion of the last whole one."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    moments, step, unfinished = random.Random(seed), 0, 0
    for _ in range(number):
        process = context.Process(target=_save_forever, args=(tmp_path,))
        process.start()
        while not (there := checkpoints(tmp_path)) or there[-1].name <= f"step-{step:08d}":
            assert process.is_alive()
            time.sleep(0.001)
        process.join(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        unfinished += bool([*tmp_path.glob("checkpoints/.*")])
        clean(tmp_path)
        assert all(path.name.startswith("step-") or path.is_symlink() for path in (tmp_path / "checkpoints").iterdir())
        folder, weights, tensors, state = newest(tmp_path)
        assert state["step"] > step and folder == checkpoints(tmp_path)[-1]  # the newest is whole
        step = state["step"]
        assert all((tensor == step).all() for tensor in (*weights.values(), *tensors.values()))
        for name in ("latest", "best"):
            link = tmp_path / "checkpoints" / name
            assert not link.is_symlink() or (link / "manifest.json").is_file()
    assert "damaged" not in capsys.readouterr().out
    print(f"{number} of {number} left a whole checkpoint, {unfinished} of them beside a half-written one")


def test_a_link_that_a_killed_process_did_not_come_to_is_made_up_for(tmp_path, config, never_killed):
    """Killed between a checkpoint's renaming and its link, a run ended with another model, or none to put in place."""
    shutil.copytree(never_killed / "out", tmp_path / "out", symlinks=True)
    for name in ("latest", "best"):
        (tmp_path / "out/checkpoints" / name).unlink()
    forked(config, tmp_path)
    assert ending(tmp_path / "out") == ending(never_killed / "out")
    assert (tmp_path / "out/checkpoints/latest").resolve().name == "step-00000036"


# Damage


def test_a_flipped_byte_is_seen_and_passed_over(tmp_path, config, never_killed):
    """One flipped byte in the weights is a model that captions a little worse, and nobody knows why."""
    shutil.copytree(never_killed / "out", tmp_path / "out", symlinks=True)
    path = tmp_path / "out/checkpoints/step-00000036/model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = forked(config, tmp_path)
    (line,) = (line for line in said.splitlines() if "damaged" in line)
    assert "step-00000036 is damaged (model.safetensors has changed since it was written)" in line
    assert "going on at step 33" in said
    assert ending(tmp_path / "out") == ending(never_killed / "out")
    assert newest(tmp_path / "out")[3]["step"] == 36  # whole again


def save_step(run: Path, step: int, best: bool = False, keep: int = 2, size: int = 0) -> None:
    model = ImageCaptionModel(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    tensors = optimizer_tensors([optimizer])
    link = run / "checkpoints/best"
    name = f"step-{step:08d}" if best else os.readlink(link) if link.is_symlink() else None
    save_checkpoint(run, step, model.save_file, tensors, STATE | {"step": step}, size, best=name, keep=keep)
    load_optimizers(tensors, [optimizer])


def test_the_newest_and_the_best_are_kept(tmp_path):
    """keep_checkpoints once counted the best one in; a best one that is deleted is the run's result."""
    kept = []
    for step in range(1, 7):
        save_step(tmp_path, step, best=step in (1, 4))
        links = [(tmp_path / "checkpoints" / name).resolve().name[-1] for name in ("latest", "best")]
        kept.append(("".join(path.name[-1] for path in checkpoints(tmp_path)), *links))
    assert kept == [
        ("1", "1", "1"),
        ("12", "2", "1"),
        ("123", "3", "1"),
        ("34", "4", "4"),
        ("45", "5", "4"),
        ("456", "6", "4"),
    ]


def test_what_is_kept_is_whole(tmp_path, capsys):
    """Behind a damaged newer checkpoint the one just written counted as old, and was deleted: nothing whole was left."""
    for step in (2, 7):
        save_step(tmp_path, step)
    (tmp_path / "checkpoints/step-00000007/state.json").write_text("{")
    assert newest(tmp_path)[3]["step"] == 2
    save_step(tmp_path, 4, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004"]
    assert capsys.readouterr().out.count("damaged") == 1


# Full disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Takes all but `leave` bytes."""
    path = disk / "filler"
    path.write_bytes(b"x" * (shutil.disk_usage(disk).free - leave))
    return path


def test_a_full_disk_costs_no_checkpoint(tmp_path, small_disk, config, never_killed):
    """A checkpoint cut by a full disk, in the place of the one before it, would be all that is left of days."""
    out = small_disk / "out"
    config = dataclasses.replace(config, output_dir=out)
    process = fork(config, tmp_path)
    await_step(10, process, out)
    process.terminate()
    end(process, 143)
    before = hashes(there := checkpoints(out)[-1])
    filler = fill(small_disk, leave=500_000)
    said = run(flags(config), tmp_path, code=2)
    (line,) = (line for line in said.splitlines() if line.startswith("error:"))
    needed, free = re.search(r"needs ([\d,]+) bytes and ([\d,]+) are free", line).groups()
    assert int(needed.replace(",", "")) > 500_000 >= int(free.replace(",", ""))
    assert checkpoints(out)[-1] == there and hashes(there) == before
    filler.unlink()
    assert "going on at step" in forked(config, tmp_path)
    assert ending(out) == ending(never_killed / "out")


def test_a_disk_that_fills_up_meanwhile_costs_no_checkpoint(small_disk):
    """The check before the first byte cannot know what others write at the same time."""
    save_step(small_disk, 1)
    before = hashes(small_disk / "checkpoints/step-00000001")
    filler = fill(small_disk, leave=1_100_000)  # more than what the check asks for beside the tensors
    (small_disk / "other").write_bytes(b"x" * 900_000)
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes and [\d,]+ are free"):
        save_step(small_disk, 2)
    (small_disk / "other").unlink()
    model = ImageCaptionModel(tiny_config())
    too_large = {"moments": torch.ones(600_000)}
    with pytest.raises(UserError, match=r"cannot be written \(.*needs [\d,]+ bytes and [\d,]+ are free"):
        save_checkpoint(small_disk, 2, model.save_file, too_large, {"step": 2}, 0, best=None, keep=2)
    assert [path.name for path in checkpoints(small_disk)] == ["step-00000001"]
    assert hashes(small_disk / "checkpoints/step-00000001") == before
    assert not [*small_disk.glob("checkpoints/.*")]
    filler.unlink()
    save_step(small_disk, 2)


# Signals


def test_sigusr1_saves_what_slurm_is_about_to_end(tmp_path, config, never_killed):
    """Slurm sends it some time before a job's end; unhandled it ends the process at once, with what it had not saved."""
    process = fork(config, tmp_path)
    await_step(10, process, tmp_path / "out")
    os.kill(process.pid, signal.SIGUSR1)
    said = end(process, 143, tmp_path)
    stopped = int(re.search(r"stopped at step (\d+) and saved", said)[1])
    assert newest(tmp_path / "out")[3]["step"] == stopped >= 10
    assert f"going on at step {stopped}" in forked(config, tmp_path)
    assert ending(tmp_path / "out") == ending(never_killed / "out")


def test_a_second_signal_ends_it_at_once(tmp_path, config, never_killed):
    """Who sends it twice cannot wait for a save; what was saved before must be there."""
    process = fork(config, tmp_path)
    await_step(10, process, tmp_path / "out")
    for number in (signal.SIGSTOP, signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT):  # two at the same time
        os.kill(process.pid, number)
    said = end(process, 143, tmp_path)
    assert "and saved" not in said
    clean(tmp_path / "out")
    assert newest(tmp_path / "out")[3]["step"] >= 9
    forked(config, tmp_path)
    assert ending(tmp_path / "out") == ending(never_killed / "out")


# One process a folder


def test_two_processes_do_not_train_in_one_folder(tmp_path, config):
    """Two that write the same checkpoints leave one that neither of them made."""
    (tmp_path / "out").mkdir()
    with training_in(tmp_path / "out"):
        said = forked(config, tmp_path, code=2)
    (line,) = said.splitlines()
    assert line.startswith("error: out: another process is training there") and "--output-dir" in line


def test_a_run_that_is_under_way_is_not_gone_on_with(tmp_path, scenes_dir):
    """The same command in a second terminal took the newest unfinished run, which the first one was still making."""
    config = small_config(scenes_dir, output_dir=None, max_steps=100_000, checkpoint_interval=3, val_pictures=0)
    first = fork(config, tmp_path)
    while not [*tmp_path.glob("runs/*/checkpoints/latest")]:
        assert first.is_alive()
        time.sleep(0.01)
    second = fork(config, tmp_path)
    while len([*tmp_path.glob("runs/*/checkpoints/latest")]) < 2:
        assert first.is_alive() and second.is_alive()
        time.sleep(0.01)
    for process in (first, second):
        process.kill()
        process.join()


# What a run remembers


def test_patience_outlasts_a_restart(tmp_path, scenes_dir):
    """A count of epochs without a better one that begins anew with every restart never comes to its end."""
    changes = {"learning_rate": 1e-30, "val_pictures": 0, "patience": 3, "checkpoint_interval": 1, "max_steps": 600}
    config = small_config(scenes_dir, **changes)  # 6 steps an epoch; no epoch is better than the first
    process = fork(config, tmp_path)
    await_step(12, process, tmp_path / "out")
    process.terminate()
    end(process, 143)
    state = newest(tmp_path / "out")[3]
    assert 12 <= state["step"] < 24 and state["waited"] == state["step"] // 6 - 1
    forked(config, tmp_path)
    about, last = json.loads((tmp_path / "out/run.json").read_text()), newest(tmp_path / "out")[3]
    assert about["finished"] and about["steps"] == last["step"] == 24 and last["waited"] == 3
    assert (tmp_path / "out/checkpoints/best").resolve().name == "step-00000006"
    assert last["seconds"] > state["seconds"] and about["seconds"] == round(last["seconds"])
    assert [line["step"] for line in read_log(tmp_path / "out/metrics.jsonl") if "val_loss" in line] == [6, 12, 18, 24]


def test_of_few_pictures_the_loss_chooses(tmp_path, scenes_dir):
    """A chance CIDEr-D of 0.15 on three pictures kept a model that wrote "A A with a a a". A run that began by CIDEr-D, as
    versions before did with few pictures too, goes on by it: no loss would ever look better than its best score."""
    config = small_config(scenes_dir, max_steps=600)  # 6 steps an epoch, 12 pictures to validate
    process = fork(config, tmp_path)
    await_step(12, process, tmp_path / "out")
    process.terminate()
    said = end(process, 143, tmp_path)
    assert (
        "scores are measured on 12 pictures: below 200 they are mostly noise, so the validation loss chooses the best model"
        in said
    )
    folder, _, _, state = newest(tmp_path / "out")
    losses = [line["val_loss"] for line in read_log(tmp_path / "out/metrics.jsonl") if "val_loss" in line]
    assert len(losses) >= 2 and state["best"] == -min(losses)
    write_json(folder / "state.json", state | {"best": 9.0})
    sign(folder)
    process = fork(config, tmp_path)
    await_step(state["step"] + 12, process, tmp_path / "out")
    process.terminate()
    end(process, 143, tmp_path)
    assert newest(tmp_path / "out")[3]["best"] == 9.0


def test_the_average_is_what_is_saved(tmp_path, scenes_dir):
    """Saved without the weights it is the average of, a run goes on from smoothed weights; saved without the average,
    the model that was judged is not the one that is kept."""
    config = small_config(scenes_dir, ema=0.5, max_steps=6, checkpoint_interval=1, keep_checkpoints=10)
    forked(config, tmp_path)
    loaded = []
    for path in checkpoints(tmp_path / "out"):
        shutil.copytree(path, tmp_path / path.name / "checkpoints" / path.name)
        loaded.append(newest(tmp_path / path.name))
    assert [folder.name[-1] for folder, *_ in loaded] == list("123456")
    for (_, before, _, _), (_, after, tensors, state) in itertools.pairwise(loaded):
        decay = min(0.5, state["step"] / (9 + state["step"]))
        for name, average in after.items():
            expected = decay * before[name] + (1 - decay) * tensors[f"weights.{name}"]
            assert torch.allclose(average, expected, atol=1e-6)
    assert any(not torch.equal(after[name], tensors[f"weights.{name}"]) for name in after)


def test_a_signal_to_all_of_its_processes_saves_too(tmp_path, scenes_dir):
    """torchrun and Slurm signal a loader's workers as well: those died of it, and the run of that, without a checkpoint.
    Killed ones left workers that held the folder's lock for some seconds: the same command began from the start."""
    config = small_config(scenes_dir, max_steps=400, checkpoint_interval=50, num_workers=2)
    arguments = [*flags(config), "--color-jitter", "0.1"]
    process = start(arguments, tmp_path, start_new_session=True)
    await_step(10, process, tmp_path / "out")
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "and saved" in output, output
    process = start(arguments, tmp_path)
    await_step(30, process, tmp_path / "out")
    process.kill()
    process.wait()
    process = start(arguments, tmp_path)
    assert any("going on at step" in line for line in iter(process.stdout.readline, "output"))
    process.kill()
    process.communicate()


def test_a_run_goes_on_from_its_own_model(tmp_path, scenes_dir, never_killed):
    """The file that --init-model names is replaced by every run that ends beside it: another tokenizer came with it."""
    (tmp_path / "start.safetensors").write_bytes((never_killed / MODEL_FILE).read_bytes())
    config = small_config(scenes_dir, init_model="start.safetensors", checkpoint_interval=4)
    process = start(flags(config), tmp_path)
    assert stop_after(10, process, tmp_path / "out", signal.SIGTERM) == 143
    (tmp_path / "start.safetensors").unlink()
    assert "going on at step" in run(flags(config), tmp_path)


def test_going_back_before_there_was_a_best_one(tmp_path):
    """`best` became a link to itself, and no checkpoint could be written any more."""
    save_step(tmp_path, 1)
    save_step(tmp_path, 2, best=True)
    (tmp_path / "checkpoints/step-00000002/model.safetensors").write_bytes(b"damaged")
    folder, _, _, state = newest(tmp_path)
    assert folder.name == "step-00000001" and state["best_checkpoint"] is None
    link_all(folder, state["best_checkpoint"])
    save_step(tmp_path, 3)
    assert newest(tmp_path)[0].name == "step-00000003"
