"""benchmark.py runs and its figures are what they say; how large they are is for EXPERIMENTS.md."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import ROOT


def run(*arguments: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark.py"), *arguments]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=300)


def test_the_data_benchmark(tmp_path):
    done = run("data", "--pictures", "8", "--rounds", "1", "--captions", "500", "2000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "benchmark-data.json").read_text())
    loader = figures["loader"]
    assert set(loader) == {"transformers", "decoding", "cache"} and min(loader.values()) > 0
    assert [table["captions"] for table in figures["table"]] == [500, 2000]
    assert all(table["seconds"] > 0 and table["process_mb"] > table["added_mb"] for table in figures["table"])
    assert "pictures/s on one core" in done.stdout and {p.name for p in tmp_path.iterdir()} == {"benchmark-data.json"}


def test_unknown_benchmarks_get_one_line(tmp_path):
    done = run("nothing", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == (
        "error: usage: python benchmark.py data|generate (--help after it shows the flags)"
    )
