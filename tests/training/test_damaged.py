"""Runs whose files are damaged, missing or made up: nothing is built on them, nothing begins anew over them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from processes import await_step, end, ending, finished, flags, fork, forked, newest, run, small_config, start
from test_checkpoint import STATE, save_step, sign

import train as training
from config import UserError
from training.checkpoint import checkpoints, final_checkpoint, newest_complete, put_aside
from training.run import Run
from utils import file_hash, read_log, write_json
from weights.file import MODEL_FILE


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def config(scenes_dir):
    """Four epochs of six steps."""
    return small_config(scenes_dir, learning_rate=0.5, val_pictures=0, keep_checkpoints=2)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, config) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    forked(config, folder)
    return folder


@pytest.fixture
def again(tmp_path, whole_run) -> Path:
    shutil.copytree(whole_run, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "output.txt").unlink()
    return tmp_path


# Checkpoints


def manifest_without(name):
    def change(folder):
        path = folder / "manifest.json"
        about = json.loads(path.read_text())
        del about[name]
        write_json(path, about)

    return change


def manifest_outside(folder):
    path = folder / "manifest.json"
    write_json(path, json.loads(path.read_text()) | {"../../run.json": {"bytes": 0, "sha256": ""}})


def state_with(**changes):
    def change(folder):
        state = json.loads((folder / "state.json").read_text()) | changes
        write_json(folder / "state.json", {name: value for name, value in state.items() if value != "none"})
        sign(folder)

    return change


DAMAGE = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "deep manifest": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "list for a manifest": lambda folder: write_json(folder / "manifest.json", ["model.safetensors"]),
    "weights not named": manifest_without("model.safetensors"),
    "state not named": manifest_without("state.json"),
    "name outside": manifest_outside,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "flipped moments": lambda folder: flip(folder / "optimizer.safetensors"),
    "no step": state_with(step="none"),
    "step of another": state_with(step=7),
    "step as text": state_with(step="2"),
    "no moments' overflows": state_with(overflows="none"),
    "losses as text": state_with(losses="many"),
    "best elsewhere": state_with(best_checkpoint="../../elsewhere"),
    "best is a number": state_with(best_checkpoint=5),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage):
    """What a manifest does not name was not looked at, and a state that could not be used ended in a traceback."""
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    damage(tmp_path / "checkpoints/step-00000002")
    assert newest_complete(tmp_path).name == "step-00000001"
    assert "step-00000002 is damaged (" in capsys.readouterr().out
    damage(tmp_path / "checkpoints/step-00000001")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        newest_complete(tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_begins_on_damaged_weights(again, config, ranks):
    """With all checkpoints damaged it said "going back", began at step 0 on the damaged weights, and ended with code 0."""
    for folder in checkpoints(again / "out"):
        flip(folder / "model.safetensors", 0.9)
    before = {path: file_hash(path) for path in again.rglob("*") if path.is_file()}
    said = run(flags(config), again, ranks, code=2 if ranks == 1 else 1)
    assert "error: out: no checkpoint can be read: restore one, or start again with --resume never" in said
    assert said.count("error:") == 1 or ranks == 2  # torchrun adds its own
    assert before == {path: file_hash(path) for path in before}


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"fingerprint": 1}', "tokenizer", "precision"])
def test_no_run_begins_over_checkpoints_of_unknown_settings(tmp_path, config, content):
    """An unreadable run.json counted as none: the run was another one, silently."""
    save_step(tmp_path, 1)
    about = {"fingerprint": config.fingerprint, "tokenizer": "train", "precision": "fp32", "data": "", "device": "cpu"}
    write_json(tmp_path / "run.json", about)
    assert Run(tmp_path).check(config)
    if content is None:
        (tmp_path / "run.json").unlink()
    elif content in about:
        write_json(tmp_path / "run.json", about | {content: 5})
    else:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run.json is lost or damaged"):
        Run(tmp_path).check(config)


def test_an_unreadable_run_beside_others_is_said(tmp_path, config, monkeypatch, capsys):
    """Without --output-dir it was passed over without a word."""
    monkeypatch.chdir(tmp_path)
    save_step(Path("runs/demo-20260101-000000"), 1) if Path("runs/demo-20260101-000000").mkdir(
        parents=True
    ) is None else 0
    import dataclasses

    found = Run.find(dataclasses.replace(config, output_dir=None))
    assert found.folder.name != "demo-20260101-000000"
    assert "demo-20260101-000000 is not resumed: its run.json is lost or damaged" in capsys.readouterr().out


# The best one


def test_a_lost_best_checkpoint_is_replaced_and_said(again, config):
    """One flipped bit in it went into the published model; without its folder all ended in a FileNotFoundError after the
    whole training."""
    best, last = checkpoints(again / "out")
    state_with(best_checkpoint=best.name)(last)
    assert final_checkpoint(again / "out")[:2] == (best, "")
    flip(best / "model.safetensors")
    said = forked(config, again, code=1)
    assert f"the best checkpoint is lost, so the model is the newest, {last.name}" in said
    assert (
        file_hash(again / "out" / MODEL_FILE) == file_hash(last / "model.safetensors") == file_hash(again / MODEL_FILE)
    )
    for name in ("run.json", "metrics.json"):
        assert "is damaged (model.safetensors" in json.loads((again / "out" / name).read_text())["lost"]
    shutil.rmtree(best)
    assert final_checkpoint(again / "out")[0] == last


@pytest.mark.parametrize("damage", ["gone", "dangling", "outside", "folder"])
def test_links_are_for_people(again, config, whole_run, damage):
    """A link that is gone, leads nowhere or elsewhere, or is a folder since the run was copied, decides nothing."""
    for name in ("best", "latest"):
        link = again / "out/checkpoints" / name
        link.unlink()
        if damage == "folder":
            link.mkdir()
            (link / "file").touch()
        elif damage != "gone":
            link.symlink_to("nowhere" if damage == "dangling" else "/tmp")
    forked(config, again)
    assert ending(again / "out") == ending(whole_run / "out")
    assert (again / "out/checkpoints/latest").resolve().name == "step-00000024"


def test_a_damaged_end_is_made_anew(again, config, whole_run):
    """Of a finished run that is started again, the model's files are compared with the best checkpoint's."""
    flip(again / "out" / MODEL_FILE)
    flip(again / MODEL_FILE)
    assert forked(config, again).count("was renamed to") == 2
    assert ending(again / "out") == ending(whole_run / "out")
    assert file_hash(again / MODEL_FILE) == file_hash(again / "out" / MODEL_FILE)


@pytest.mark.parametrize("name", [MODEL_FILE, "checkpoints/step-00000024/model.safetensors", "."])
def test_a_start_that_is_damaged_is_refused(again, config, name):
    """--init-model took whatever a run's file had become."""
    import dataclasses

    flip(again / "out" / (MODEL_FILE if name == "." else name))
    own = dataclasses.replace(config, init_model=f"out/{name}", output_dir=Path("other"))
    assert "is damaged (" in forked(own, again, code=2)


# Folders that cannot be written


@pytest.mark.parametrize("kind", ["read-only", "gone", "taken"])
def test_a_working_folder_is_tried_before_the_first_step(tmp_path, config, kind):
    """All steps ran, then came a PermissionError, at every start anew."""
    import dataclasses

    own, cwd = dataclasses.replace(config, output_dir=tmp_path / "out"), tmp_path / "here"
    cwd.mkdir()
    if kind == "taken":
        (cwd / MODEL_FILE).mkdir()
    elif kind == "read-only":
        cwd = Path("/proc")  # where root cannot write either
    command = f'cd {cwd} && {"rmdir ../here &&" if kind == "gone" else ""} exec "$@"'
    done = finished("main.py", *flags(own), shell=command, code=2)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot write there" in done.stderr or "has the finished model's name" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_put_here_is_not_lost(again, config, whole_run):
    """The last copy's failure was the run's: no numbers, and no word of where the model is."""
    flip(again / MODEL_FILE)
    (again / MODEL_FILE.replace(".s", ".previous.s")).mkdir()  # in the way of what stands there
    (again / "out/metrics.json").unlink()
    said = forked(config, again, code=1)
    assert f"{MODEL_FILE} cannot be written here (" in said and f"the model is out/{MODEL_FILE}" in said
    assert json.loads((again / "out/metrics.json").read_text())["bleu_4"] >= 0
    assert not json.loads((again / "out/run.json").read_text())["finished"]
    (again / MODEL_FILE.replace(".s", ".previous.s")).rmdir()
    forked(config, again)
    assert ending(again / "out") == ending(whole_run / "out")
    assert file_hash(again / MODEL_FILE) == file_hash(again / "out" / MODEL_FILE)


# Signals, workers, the clock, --resume never


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves(tmp_path, scenes_dir, ignored):
    """SIGHUP, which comes twice when a terminal is closed, ended a run at once; under nohup it is still nothing."""
    config = small_config(scenes_dir, max_steps=100_000 if not ignored else 400, checkpoint_interval=10**6)
    process = start(
        flags(config),
        tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    await_step(10, process, tmp_path / "out")
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    if ignored:
        await_step(
            max(line["step"] for line in read_log(tmp_path / "out/metrics.jsonl")) + 20, process, tmp_path / "out"
        )
        process.kill()
        process.communicate()
    else:
        assert "and saved" in process.communicate(timeout=60)[0] and process.returncode == 143


def test_a_killed_worker_changes_nothing(tmp_path, scenes_dir):
    """What decodes pictures is what the system kills when memory runs out: the run ended with it. torch raised wherever the
    training was at that moment, in the middle of an update too."""
    import dataclasses

    from config import Augmentation

    changes = {"max_steps": 60, "num_workers": 2, "augmentation": Augmentation(color_jitter=0.1)}
    config = dataclasses.replace(small_config(scenes_dir), **changes)
    forked(config, tmp_path / "quiet")
    process = fork(config, tmp_path / "killed")
    await_step(10, process, tmp_path / "killed/out")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    said = end(process, 0, tmp_path / "killed")
    assert "a process that prepares pictures was killed" in said and "continuing with 1" in said
    assert ending(tmp_path / "killed/out") == ending(tmp_path / "quiet/out")


def test_the_clock_asks_for_checkpoints(tmp_path, config, whole_run, monkeypatch):
    """Of a run whose epochs are long nothing was kept for hours. Neither weights nor fingerprint know of the clock."""
    import dataclasses
    import itertools

    own = dataclasses.replace(config, checkpoint_minutes=1.0, keep_checkpoints=20)
    assert own.fingerprint == config.fingerprint
    seconds, saved = itertools.count(), []  # one at each look
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "clock", lambda: 15.0 * next(seconds))
    old = training.Learner.save
    monkeypatch.setattr(
        training.Learner,
        "save",
        lambda self, state, best: saved.append((state["step"], best)) or old(self, state, best),
    )
    monkeypatch.setattr(training.tqdm, "write", lambda *a, **k: None)
    training.train(own)
    steps = [step for step, _ in saved]
    assert (
        len(steps) > 6 and {6, 12, 18, 24} < set(steps) and max(b - a for a, b in itertools.pairwise([0, *steps])) <= 4
    )
    assert not any(best for step, best in saved if step % 6)
    assert file_hash(Path("out") / MODEL_FILE) == file_hash(whole_run / "out" / MODEL_FILE)
    saved.clear()
    training.train(dataclasses.replace(own, checkpoint_minutes=0.0, output_dir=Path("off")))
    assert [step for step, _ in saved] == [6, 12, 18, 24]


def test_resume_never_puts_the_old_ones_aside(tmp_path, again, config):
    """They were deleted: a slip of the keys cost days."""
    import dataclasses

    before = [path.name for path in checkpoints(again / "out")]
    said = forked(dataclasses.replace(config, resume="never", max_steps=6), again)
    aside = again / "out/checkpoints.previous"
    assert "the earlier run's checkpoints" in said and sorted(path.name for path in aside.glob("step-*")) == before
    assert json.loads((aside / "run.json").read_text())["fingerprint"] == config.fingerprint
    assert newest(again / "out")[3]["step"] == 6
    assert put_aside(again / "out") == aside  # one generation
    assert [path.name for path in aside.glob("step-*")] == ["step-00000006"]
    assert put_aside(again / "out") is None and aside.is_dir()  # nothing new: the old ones stay
    assert not [*(again / "out").glob(".*unfinished")]
    assert STATE
