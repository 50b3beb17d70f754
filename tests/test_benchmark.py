"""benchmark.py runs and its figures are what they say; how large they are is for EXPERIMENTS.md."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_config

import benchmark
from config import UserError


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


def test_the_caption_benchmark(monkeypatch, scenes_tokenizer, capsys):
    """On a tiny model, because the base one takes minutes."""
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), scenes_tokenizer.eos_token_id)
    config = tiny_config(vocab_size=len(scenes_tokenizer), vision_embed_dim=64, decoder_embed_dim=64, **ids)
    monkeypatch.setattr(benchmark, "ViTGPT2Config", lambda: config)
    monkeypatch.setattr(benchmark, "load_tokenizer", lambda *_: scenes_tokenizer)
    job = benchmark.GenerateBenchmark(batch_sizes=(1, 2), num_beams=(1, 2), length=5, rounds=2, device="cpu")
    figures = job.run()["generate"]
    assert [(f["pictures"], f["beams"]) for f in figures] == [(1, 1), (1, 2), (2, 1)]
    for figure in figures:
        assert figure["equal"] and all(figure[name]["ratio"] > 0 for name in ("fp32", "bf16", "int8"))
    assert "captions/s" in capsys.readouterr().out


def test_the_metrics_benchmark(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is of requirements-full.txt")
    sizes = ("--pictures", "40", "--rewarded", "6", "--samples", "4", "--rounds", "1")
    done = run("metrics", *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "benchmark-metrics.json").read_text())
    for name in ("scores", "reward"):
        assert figures[name]["difference"] < 1e-9 and figures[name]["ratio"] > 0
    assert "reward of 24 captions" in done.stdout


def test_the_metrics_benchmark_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-full\.txt"):
        benchmark.MetricsBenchmark().run()


def test_the_metrics_benchmark_names_a_batch_that_is_too_large(tmp_path):
    done = run("metrics", "--pictures", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith("their product must be from 1 to pictures, 3")


def test_unknown_benchmarks_get_one_line(tmp_path):
    done = run("nothing", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == (
        "error: usage: python benchmark.py data|generate|metrics (--help after it shows the flags)"
    )
