"""The core as it has to work on Windows and macOS: processes are spawned, and the system refuses links, and to replace or
delete a file in use. This imitates Windows on Linux (tests/windows/sitecustomize.py); it is not Windows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import IN_ORDER, ending, finished, launch, stop_after, training_line
from tiny import tiny_flags

from training.checkpoint import checkpoints
from weights.file import MODEL_FILE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="imitates Windows on Linux")

AS_ON_WINDOWS = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "windows"), str(ROOT)]),
    "PYTHONIOENCODING": "cp1252",  # of a pipe there
    "OMP_NUM_THREADS": "1",
}


def test_it_is_refused_what_windows_refuses(tmp_path):
    """Or the test below would prove nothing."""
    wanted = {
        "import fcntl": "ModuleNotFoundError",
        "import os; os.symlink('file', 'link')": "PermissionError",
        "import os; os.open('.', os.O_RDONLY)": "PermissionError",
        "import os; os.fsync(os.open('file', os.O_RDONLY))": "OSError",
        "import os; file = open('file'); os.replace('other', 'file')": "PermissionError",
        "import numpy, pathlib; file = numpy.memmap('file'); pathlib.Path('file').unlink()": "PermissionError",
        "import numpy, shutil; file = numpy.memmap('file'); shutil.rmtree('.')": "PermissionError",
        "import multiprocessing; print(1 / (multiprocessing.get_start_method() != 'spawn'))": "ZeroDivisionError",
    }
    for number, (code, error) in enumerate(wanted.items()):
        (folder := tmp_path / str(number)).mkdir()
        for name in ("file", "other"):
            (folder / name).write_text("content")
        done = finished("-c", code, code=1, environment=AS_ON_WINDOWS, cwd=folder)
        assert done.stderr.splitlines()[-1].startswith(error), (code, done.stderr)


def test_train_resume_caption_and_evaluate(tmp_path, scenes_dir):
    """With two workers that prepare pictures and the cache on disk. The interrupted run ends in the same model as an
    uninterrupted one of Linux, whose workers are forked."""
    command = f"--preset demo --dataset coco --data-dir {scenes_dir} --output-dir out --max-steps 48 --batch-size 4"
    command += " --checkpoint-interval 12 --device cpu --precision fp32 --optimizer adamw --wandb off"
    command += " --num-workers 2 --color-jitter 0.1 --cache"
    flags = [*command.split(), *tiny_flags()]
    linux, windows = tmp_path / "linux", tmp_path / "windows"
    for folder in (linux, windows):
        folder.mkdir()
    finished(*training_line(flags, 1), cwd=linux, environment={"OMP_NUM_THREADS": "1"})  # as below, for the same bits
    more = {"cwd": windows, "encoding": "cp1252"}
    own = AS_ON_WINDOWS | {"VIT_GPT2_CACHE": str(tmp_path / "cache")}
    process = launch(*training_line(flags, 1), environment=own | IN_ORDER, stderr=subprocess.STDOUT, **more)
    assert stop_after(10, process, windows / "out", signal.SIGINT) == 130
    assert 10 <= int(checkpoints(windows / "out")[-1].name.removeprefix("step-")) < 48
    finished(*training_line(flags, 1), environment=own, **more)
    assert ending(windows / "out") == ending(linux / "out")
    kept, wanted = ([path.name for path in checkpoints(folder / "out")] for folder in (windows, linux))
    assert kept == wanted  # also the one that the run was resumed from is deleted
    assert not (windows / "out/checkpoints/latest").exists() and (linux / "out/checkpoints/latest").is_symlink()
    assert not [*windows.rglob("*.unfinished")]

    picture = str(next((scenes_dir / "val2017").iterdir()))
    finished("example_usage.py", picture, MODEL_FILE, "--output", "captions.csv", environment=own, **more)
    assert len((windows / "captions.csv").read_text().splitlines()) == 2
    finished("evaluate.py", MODEL_FILE, "--data-dir", scenes_dir, "--output-dir", "scores", environment=own, **more)
    assert (windows / "scores/report.html").is_file()
