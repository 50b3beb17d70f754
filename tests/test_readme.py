"""The README keeps its word: its flags exist, its files exist, its commands run in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.S | re.M) if not language]
LINES = [line.split("  #")[0].strip() for block in SHELL for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ")] + re.findall(r"`(python [^`]+)`", TEXT)


def test_every_flag_and_file_it_names_exists():
    assert len(COMMANDS) >= 8
    sources = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "config.py",
            "evaluate.py",
            "check.py",
            "benchmark.py",
            "benchmark_training.py",
            "convert.py",
            "publish.py",
            "auto_upload.py",
            "example_usage.py",
            "app.py",
        )
    }
    fields = set(re.findall(r"^    (\w+): ", "".join(sources.values()), re.M))
    fields |= {"help", "no_build_isolation", "ignore_scripts", "prefix"}  # tyro's own, pip's and npm's
    fields |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}  # torchrun's
    fields |= {"nodes", "ntasks_per_node", "signal"}  # srun's
    for flag in set(re.findall(r"(?<=[\s`])--([a-z][a-z0-9-]*[a-z0-9])", TEXT)):
        assert flag.replace("-", "_") in fields, flag
    for name in set(re.findall(r"`(\w+\.(?:py|md))`", TEXT)) | set(re.findall(r"python (\w+\.py)", TEXT)):
        assert (ROOT / name).is_file(), name


def test_every_dependency_has_its_reason():
    requirements = "".join(
        (ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-dev", "-data", "-onnx", "-full", "-app")
    )
    section = TEXT.split("## Dependencies")[1].split("## ")[0]
    for name in re.findall(r"^([\w-]+)>=", requirements, re.M):
        assert name in section, name


def test_ci_runs_the_test_command_as_it_stands_here():
    command = next(command for command in COMMANDS if "requirements-dev.txt" in command)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def clean_copy(directory: Path) -> Path:
    """The files that git knows, in an empty folder."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    return directory


@pytest.mark.slow
def test_the_first_command_on_a_bare_machine(tmp_path):
    """Install and demo from an empty folder, as the README has it, then the example."""
    copy = clean_copy(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "TQDM"))}
    command = next(command for command in COMMANDS if "requirements.txt" in command)
    subprocess.run(["bash", "-c", command], cwd=copy, env=environment, check=True, timeout=3000)
    (run,) = (copy / "runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["scene_accuracy"] >= 0.9
    example = subprocess.run(
        [".venv/bin/python", "example_usage.py"], cwd=copy, env=environment, check=True, text=True, capture_output=True
    )
    assert "a drawn scene" in example.stdout
