"""What scripts write beside what they are for: nothing printed ends a run, and no name leads out of a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from processes import ending, finished, flags, forked, small_config

from config import UserError
from utils import Printed, locked, read_log
from weights.file import MODEL_FILE

HOWEVER = {
    "reader left": "| true; exit ${PIPESTATUS[0]}",
    "full disk": ">/dev/full",
    "no output": ">&-",
    "no errors": "2>&-",
    "nothing at all": ">&- 2>&- <&-",
    "full, both": ">/dev/full 2>/dev/full",
}
FEW = ["reader left", "nothing at all"]


def shell(cwd: Path, arguments: list[str], redirected: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script's command line, its streams as said, on a console that knows ASCII only."""
    own = {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"} | environment
    return finished(*arguments, cwd=cwd, environment=own, shell=f'"$@" {redirected}', code=None)


@pytest.fixture(scope="module")
def config(scenes_dir):
    return small_config(scenes_dir, max_steps=10, val_pictures=0)


@pytest.fixture(scope="module")
def printed(tmp_path_factory, config) -> Path:
    folder = tmp_path_factory.mktemp("printed")
    forked(config, folder)
    return folder


@pytest.mark.parametrize("how", [h if h in FEW else pytest.param(h, marks=pytest.mark.slow) for h in HOWEVER])
def test_nothing_printed_ends_a_run(tmp_path, config, printed, how):
    """`| head`, a lost connection, a full disk behind `> log` ended a training before its checkpoint, at every start anew."""
    done = shell(tmp_path, [str(ROOT / "main.py"), *flags(config)], HOWEVER[how])
    assert done.returncode == 0, done.stderr
    assert ending(tmp_path / "out") == ending(printed / "out")
    said = [line["not_printed"] for line in read_log(tmp_path / "out/metrics.jsonl") if "not_printed" in line]
    assert bool(said) == (how in ("reader left", "full disk", "full, both"))
    assert ("nothing more can be printed" in done.stderr) == (how in ("reader left", "full disk"))


@pytest.mark.parametrize("how", [h if h in FEW[:1] else pytest.param(h, marks=pytest.mark.slow) for h in HOWEVER])
def test_what_is_only_printed_ends_without_a_reader(tmp_path, printed, scenes_dir, how):
    """Captions that nobody gets are not made; that is code 1, and never a traceback."""
    pictures = [str(scenes_dir / "val2017" / f"{n:012d}.png") for n in range(4)]
    arguments = [str(ROOT / "example_usage.py"), *pictures, str(printed / MODEL_FILE)]
    done = shell(tmp_path, arguments, HOWEVER[how], PYTHONUNBUFFERED="1")
    assert done.returncode == (1 if how in ("reader left", "full disk", "full, both") else 0), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWEVER)
@pytest.mark.parametrize("script", ["evaluate", "dataset"])
def test_reports_are_written_whoever_reads(tmp_path, printed, scenes_dir, script, how):
    """What stands in files is there although what was printed is lost; that is said by the exit code alone."""
    arguments = {
        "evaluate": [str(printed / MODEL_FILE), "--data-dir", str(scenes_dir), "--output-dir", "there"],
        "dataset": ["check", str(scenes_dir), "--output-dir", "there"],
    }[script]
    done = shell(tmp_path, [str(ROOT / f"{script}.py"), *arguments], HOWEVER[how])
    assert (tmp_path / "there" / {"evaluate": "metrics.json", "dataset": "check.json"}[script]).is_file()
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and done.returncode in (0, 1)


def test_a_slow_reader_is_waited_for():
    """A pipe that somebody has made non-blocking raised BlockingIOError as soon as it was full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    reader = subprocess.Popen(["bash", "-c", "sleep 0.2; wc -c"], stdin=reading, stdout=subprocess.PIPE, text=True)
    os.close(reading)
    with Printed(writing, "w") as raw:
        assert raw.write(b"x" * 300_000) == 300_000
    assert int(reader.communicate()[0]) == 300_000


# Links

WATCHED = """
import os, runpy, sys
def seen(event, details):
    if event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        found.write(os.path.abspath(os.fsdecode(details[0])) + "\\n")
    elif event in ("os.rename", "os.symlink", "os.link"):
        found.write(os.path.abspath(os.fsdecode(details[1])) + "\\n")
found = os.fdopen(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w", 1)
sys.addaudithook(lambda event, details: seen(event, details) if not isinstance(details[:1] and details[0], int) else None)
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def watched(cwd: Path, script: str, arguments: list[str], log: Path) -> set[Path]:
    """Runs a script; the names, relative to where it ran, that it has opened to write, renamed to, or linked."""
    cwd.mkdir(exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    finished("-c", WATCHED, log, ROOT / f"{script}.py", *arguments, cwd=cwd, environment=environment)
    names = {Path(line) for line in log.read_text().splitlines()}
    return {name.relative_to(cwd) for name in names if name.is_relative_to(cwd)}


@pytest.mark.parametrize("script", ["main", "evaluate", "csv", "sidecar"])
def test_no_planted_link_leads_out_of_a_folder(tmp_path, config, printed, scenes_dir, script):
    """A link `.cat.txt.unfinished` in a folder that others may write to had a script write where they wanted. Links stand at
    all names that a first run has written, the temporary ones too, one leading to a file and one to nothing."""
    kind, arguments = script, flags(config)
    if script == "evaluate":
        arguments = [str(printed / MODEL_FILE), "--data-dir", str(scenes_dir), "--output-dir", "there"]
    elif script != "main":
        kind, arguments = "example_usage", ["photos", str(printed / MODEL_FILE)]
        arguments += ["--output", "sidecar" if script == "sidecar" else "captions.csv", "--batch-size", "2"]
    for folder in ("first", "file", "nothing"):
        (tmp_path / folder / "photos").mkdir(parents=True)
        for n in range(3):
            shutil.copy(scenes_dir / "val2017" / f"{n:012d}.png", tmp_path / folder / "photos")
    names = watched(tmp_path / "first", kind, arguments, tmp_path / "log")
    names |= {path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file()}
    folders = {
        path.relative_to(tmp_path / "first")
        for path in (tmp_path / "first").rglob("*")
        if path.is_dir() and not path.is_symlink()
    }
    pictures = {name for name in names if name.parts[:1] == ("photos",) and name.suffix == ".png"}
    names -= folders | pictures | {Path(), Path("out/.lock")}  # a run does not begin with a link there: see below
    names = {name for name in names if not name.parent.name.startswith("step-")}  # a damaged checkpoint stops a run
    assert any("unfinished" in name.name for name in names)
    if script == "csv":  # the file that a person has named is refused: the link may be theirs
        names -= {Path("captions.csv")}
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in ("file", "nothing"):
        for number, name in enumerate(sorted(names)):
            place = tmp_path / folder / name
            if any((tmp_path / folder / parent).is_symlink() for parent in name.parents) or place.is_dir():
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if folder == "file":
                (outside / f"{number}").write_text("")
            place.symlink_to(outside / (f"{number}" if folder == "file" else f"absent-{number}"))
        before = {path.name: path.read_bytes() for path in outside.iterdir()}
        watched(tmp_path / folder, kind, arguments, tmp_path / f"log-{folder}")
        assert before == {path.name: path.read_bytes() for path in outside.iterdir()}


def test_a_lock_and_a_table_of_captions_follow_no_link(tmp_path, printed, scenes_dir):
    """Opening them emptied, or created, what the link led to."""
    from captioning.outputs import open_output

    for name in (".lock", "captions.csv"):
        (tmp_path / name).symlink_to(tmp_path / "outside")
        with pytest.raises(UserError, match="is a link"):
            if name == ".lock":
                with locked(tmp_path / name):
                    pass
            else:
                open_output(str(tmp_path / name), [])
    assert not (tmp_path / "outside").exists()
