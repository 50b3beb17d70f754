"""benchmark.py runs and its figures are what they say; how large they are is for EXPERIMENTS.md."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model, tiny_config
from processes import finished, surroundings
from tiny import tiny_flags

from benchmarks import captions
from benchmarks import training as loops
from benchmarks.captions import FolderBenchmark, GenerateBenchmark, PrecisionBenchmark
from benchmarks.golden import golden_run
from benchmarks.gpu import SECTIONS, GpuBenchmark
from benchmarks.machine import training_rows
from benchmarks.metrics import MetricsBenchmark
from benchmarks.ruler import print_table, quarter_of
from benchmarks.training import Loop, Running, TrainBenchmark
from captioning.pipeline import caption_pictures
from config import UserError
from dataset import load_table, load_tokenizer
from decoding.packed import available
from model import ImageCaptionModel


def run(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return finished("benchmark.py", *arguments, cwd=cwd, code=None)


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
    monkeypatch.setattr(captions, "ViTGPT2Config", lambda: config)
    monkeypatch.setattr(captions, "load_tokenizer", lambda *_: scenes_tokenizer)
    job = GenerateBenchmark(batch_sizes=(1, 2), num_beams=(1, 2), length=5, rounds=2, device="cpu")
    figures = job.run()["generate"]
    assert [(f["pictures"], f["beams"]) for f in figures] == [(1, 1), (1, 2), (2, 1)]
    for figure in figures:
        assert figure["equal"] and all(figure[name]["ratio"] > 0 for name in captions.packed_precisions())
    assert "captions/s" in capsys.readouterr().out


def test_the_machine_benchmark(tmp_path):
    done = run("machine", "--tiny", "--no-train", "--rounds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmark-machine.json").read_text())
    rates = found["rates"]
    assert found["about"]["processor"] and min(rates.values()) > 1e8 and list(rates)[-1] == "memory"
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    names = ["", "---", "1 picture, greedy", "1 picture, 3 beams", "8 pictures, greedy"]
    assert [row.split("|")[1].strip() for row in rows] == names
    assert all(row.count("|") == len(rates) + 2 for row in rows)
    assert all(0 < row["fp32"]["floor"] < row["fp32"]["seconds"] for row in found["generate"])


def test_the_floor_of_a_caption(monkeypatch):
    """By hand, for base size: a picture's 35 GFLOP, cross-attention's keys and values among them, and a token's 124 million
    weights with the head."""
    monkeypatch.setattr(captions, "product_rate", lambda precision: 100e9)
    monkeypatch.setattr(captions, "memory_rate", lambda: 20e9)
    weights = 12 * 14 * 768**2 + 50257 * 768
    picture = 2 * 197 * 12 * (12 * 768**2 + 2 * 197 * 768 + 2 * 768**2)
    base = captions.sizes()
    assert captions.floor(base, 1, 1, 20, "fp32") == pytest.approx(picture / 100e9 + 20 * weights * 4 / 20e9)
    assert captions.floor(base, 8, 3, 20, "int8") == pytest.approx(8 * picture / 100e9 + 20 * 48 * weights / 100e9)


def test_the_folder_benchmark(scenes_dir, scenes_tokenizer, tmp_path, capsys):
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), scenes_tokenizer.eos_token_id)
    model = ImageCaptionModel(tiny_config(vocab_size=len(scenes_tokenizer), **ids))
    model.tokenizer = scenes_tokenizer
    model.save_file(tmp_path / "model.safetensors")
    job = {"model": str(tmp_path / "model.safetensors"), "folder": scenes_dir / "train2017", "device": "cpu"}
    figures = FolderBenchmark(**job, pictures=20, batch_size=8, rounds=1).run()["folder"]
    assert figures["pictures"] == 20 and figures["share"] == figures["folder"] / min(
        figures["decoding"], figures["model"]
    )
    assert "of the speed of its slower part (20 pictures, 8 at a time, cpu)" in capsys.readouterr().out
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.png").touch()
    with pytest.raises(UserError, match="no picture can be read"):
        FolderBenchmark(**job | {"folder": tmp_path / "damaged"}).run()


def test_the_precision_benchmark(scenes_dir, scenes_tokenizer, tmp_path, capsys):
    """The references are what the model says in fp32 and greedily, so that there it has nearly every point."""
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), scenes_tokenizer.eos_token_id)
    config = tiny_config(vocab_size=len(scenes_tokenizer), vision_embed_dim=64, decoder_embed_dim=64, **ids)
    model = random_model(config)
    model.tokenizer = scenes_tokenizer
    model.save_file(tmp_path / "model.safetensors")
    pictures = sorted((scenes_dir / "val2017").iterdir())
    said = caption_pictures(model, map(str, pictures), precision="fp32", num_beams=1)
    images = [
        {
            "filename": path.name,
            "split": "val" if number % 2 else "test",
            "sentences": [{"raw": result.captions[0].text}],
        }
        for number, (path, result) in enumerate(zip(pictures, said, strict=True))
    ]
    for path in pictures:
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    job = {"model": str(tmp_path / "model.safetensors"), "data_dir": tmp_path, "device": "cpu"}
    figures = PrecisionBenchmark(**job, num_beams=(1, 3)).run()["precision"]
    assert figures["pictures"] == 12
    assert figures["fp32"][0] > 8 > figures["fp32"][1]  # 10, but for captions of fewer than four words
    out = capsys.readouterr().out
    for name in filter(available, ("bf16", "int8")):
        share, (low, high) = figures[f"{name}_cost"]["share"], figures[f"{name}_cost"]["interval"]
        assert share == pytest.approx(1 - np.mean(figures[name]) / np.mean(figures["fp32"]))
        assert low <= share <= high and f"{name} costs {share:.2%} of CIDEr-D" in out
    for image in images:
        image["split"] = "val"  # which serves as test, too, but not twice
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    assert PrecisionBenchmark(**job, num_beams=(1,)).run()["precision"]["pictures"] == 12
    model.trained_on = load_table("auto", tmp_path, "val").keys()[:3]
    model.save_file(job["model"])
    with pytest.raises(UserError, match=r"3 of the 12 val pictures .* trained on"):
        PrecisionBenchmark(**job).run()
    for image in images:
        image["sentences"] = [{"raw": "nothing of the kind"}]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match="no caption shares a word with its references"):
        PrecisionBenchmark(**job, num_beams=(1,), allow_overlap=True).run()
    with pytest.raises(UserError, match="need an entry each"):
        PrecisionBenchmark(**job, splits=())


def test_the_metrics_benchmark(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is of requirements/full.txt")
    sizes = ("--pictures", "40", "--rewarded", "6", "--samples", "4", "--rounds", "1")
    done = run("metrics", *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "benchmark-metrics.json").read_text())
    for name in ("scores", "reward"):
        assert figures[name]["difference"] < 1e-9 and figures[name]["ratio"] > 0
    assert "reward of 24 captions" in done.stdout


def test_the_metrics_benchmark_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/full\.txt"):
        MetricsBenchmark().run()


def test_the_metrics_benchmark_names_a_batch_that_is_too_large(tmp_path):
    done = run("metrics", "--pictures", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith("their product must be from 1 to pictures, 3")


def test_unknown_benchmarks_get_one_line(tmp_path):
    done = run("nothing", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == (
        "error: usage: python benchmark.py data|machine|generate|folder|precision|metrics|train|race|ruler|golden|gpu|plan (add --help for its flags)"
    )


TINY = tiny_flags("model.", vocab_size=300, max_length=16, end_token_id=299, start_token_id=299, pad_token_id=299)


@pytest.mark.slow
def test_the_training_benchmark(tmp_path):
    """Both loops begin at the same loss: they learn the same pairs from the same weights."""
    done = run(
        "train", "--steps", "1", "--rounds", "1", "--batch-size", "2", "--tokens", "5", "--scst", *TINY, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "benchmark-train.json").read_text())
    first = [(loop["whose"], loop["pairs"]) for loop in figures["loops"][:4]]
    assert first == [("ours", 10), ("self-critical", 10), ("transformers", 2), ("transformers", 10)]
    for loop in figures["loops"]:
        assert loop["seconds_per_pair"] > 0 and 0 <= loop["data_wait"] < 1
        assert loop["whose"] == "self-critical" or loop["first_loss"] == pytest.approx(5.7, abs=0.3)
    assert "ours, 10 pairs bf16 against 2 pairs fp32: a pair costs 1/" in done.stdout
    assert "self-critical, 10 pairs bf16: a picture costs" in done.stdout
    rows = training_rows(figures, ["fp32", "bf16", "int8"])  # of the machine's table
    assert [row.split("|")[1].strip() for row in rows] == [
        f"a pair in training, transformers' steps of {n} pairs" for n in (2, 10)
    ]
    assert all(f"{figures['loops'][0]['seconds_per_pair']:.3f} s, " in row.split("|")[3] for row in rows)


@pytest.mark.slow
def test_the_training_benchmark_of_adapters(tmp_path):
    """Adapters begin as nothing, so the first loss is the whole model's (of weights in 4 bits, nearly)."""
    pytest.importorskip("peft", reason="peft is of requirements/qlora.txt")
    flags = ("--steps", "1", "--rounds", "1", "--batch-size", "2", "--tokens", "5", "--precisions", "bf16")
    more = ("--no-transformers", "--adapters", "--model.bridge", "prefix", "--model.prefix-length", "4")
    done = run("train", *flags, *more, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loops = json.loads((tmp_path / "benchmark-train.json").read_text())["loops"]
    assert [loop["whose"] for loop in loops] == ["ours", "LoRA", "QLoRA"]
    assert loops[1]["first_loss"] == loops[0]["first_loss"] == pytest.approx(loops[2]["first_loss"], abs=0.05)
    assert "QLoRA, 10 pairs bf16: a picture costs" in done.stdout and "parameters are trained" in done.stdout


def test_the_rulers_table(capsys):
    """Means, differences from the first choice, and Student's interval with the spread of all choices' seeds."""
    losses = {"ema=0.9": [2.9, 2.92], "": [3.0, 3.02, 3.04], "schedule=linear": [2.95]}  # as they ended
    print_table(
        {
            choice: {
                str(seed): {"cider_d": 0.2, "val_loss": loss, "unique_captions": 0.5, "core_minutes": 2.0}
                for seed, loss in enumerate(values)
            }
            for choice, values in losses.items()
        },
        base="",
    )
    spread, second, first, third = (line for line in capsys.readouterr().out.splitlines() if "seeds  " not in line)
    # squares: 0.0008 and 0.0002, three degrees of freedom, t = 3.18; times sqrt(1/2 + 1/3) and sqrt(1 + 1/3)
    assert "3 degrees of freedom" in spread and "val_loss 0.0183" in spread
    assert "3.0200  " in first and "2.9100 (-0.1100 ± 0.0530)" in second and "2.9500 (-0.0700 ± 0.0670)" in third
    print_table({"": {"0": {"cider_d": 0.2, "val_loss": 3.0, "unique_captions": 0.5, "core_minutes": 2.0}}}, "")
    assert "one seed of each choice says nothing about chance" in capsys.readouterr().out


@pytest.fixture
def flickr8k(tmp_path, scenes_dir) -> Path:
    """A Flickr8k of drawn scenes: eight to train on, four to validate, two to test."""
    pictures = sorted((scenes_dir / "train2017").iterdir())[:14]
    (tmp_path / "flickr8k/Images").mkdir(parents=True)
    for picture in pictures:
        shutil.copy(picture, tmp_path / "flickr8k/Images")
    lines = [f"{picture.name},{word} {picture.stem}" for picture in pictures for word in ("a drawing of", "shapes of")]
    (tmp_path / "flickr8k/captions.txt").write_text("\n".join(["image,caption", *lines]))
    for split, part in (("train", pictures[:8]), ("dev", pictures[8:12]), ("test", pictures[12:])):
        names = "\n".join(picture.name for picture in part)
        (tmp_path / f"flickr8k/Flickr_8k.{split}Images.txt").write_text(names)
    return tmp_path / "flickr8k"


def test_the_ruler_trains_on_a_quarter(flickr8k, tmp_path):
    """With all pictures the small model did not learn them by heart, and the ruler chose what made the preset worse."""
    tables = {
        split: load_table("flickr8k", quarter_of(flickr8k, tmp_path / split), split) for split in ("train", "val")
    }
    assert [len(table) for table in tables.values()] == [2, 4]
    (flickr8k / "Flickr_8k.trainImages.txt").unlink()
    with pytest.raises(UserError, match="the ruler needs the official lists of Flickr8k"):
        quarter_of(flickr8k, tmp_path / "again")


@pytest.mark.slow
def test_the_ruler_adds_choices_to_what_it_has_measured(tmp_path, flickr8k):
    tiny = "max-steps=2 vision-embed-dim=32 decoder-embed-dim=32 image-size=32 resize-size=32 vocab-size=300"
    command = ("ruler", "--data-dir", str(flickr8k), "--output", "ruler.json", "--choices", tiny)
    assert "nope" in run(*command, "nope=1", cwd=tmp_path).stderr and not (tmp_path / "ruler.json").exists()
    assert run(*command, "--seeds", "0", "1", cwd=tmp_path).returncode == 0
    done = run(*command, f"{tiny} learning-rate=1e-3", "--seeds", "0", "1", "--at-a-time", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "ruler.json").read_text())["runs"]
    assert [len(seeds) for seeds in runs.values()] == [2, 2] and done.stdout.count("CIDEr-D") == 2
    first, second = runs.values()
    assert first["0"]["val_loss"] != second["0"]["val_loss"] and first["0"]["steps"] == 2
    known = json.loads((tmp_path / "ruler.json").read_text())
    for changed in ({"ruler": "another"}, {"recipe": "of an older preset"}):
        (tmp_path / "ruler.json").write_text(json.dumps(known | changed))
        assert "has runs of another ruler, preset" in run(*command, cwd=tmp_path).stderr


def test_training_is_what_it_was(tmp_path):
    """Losses of 100 steps, against a committed file: a refactor once changed what was learned, and nobody noticed."""
    for optimizer, hexes in json.loads((ROOT / "tests/golden_losses.json").read_text()).items():
        losses, _ = golden_run(ROOT, tmp_path, optimizer)
        assert losses == pytest.approx([float.fromhex(loss) for loss in hexes], rel=1e-3), optimizer


@pytest.mark.slow
def test_two_versions_are_compared_to_the_bit(tmp_path):
    """The tool that says whether a refactor changed training, captions or what is published: it must see one that did, and
    pass one that did not."""
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copytree(ROOT, repository, ignore=shutil.ignore_patterns(".*", "tests", "runs"), dirs_exist_ok=True)
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "before"]):
        subprocess.run([*git, *command], cwd=repository, check=True)
    command = (repository / "benchmark.py", "golden")
    done = finished(*command, cwd=repository)
    assert done.stdout.count("the same to the bit") == 2, done.stderr
    assert "differs" not in done.stdout
    files = set(re.findall(r"the same  (\S+)", done.stdout))
    assert {f"{run}/{name}.json" for run in ("golden", "sampled") for name in ("captions", "metrics")} < files
    assert {"greedy.jsonl", *(f"upload/user/name/{name}" for name in ("README.md", "model.safetensors"))} < files
    assert not any(name.endswith(".py") for name in files)
    path = repository / "training/optimizers.py"
    path.write_text(path.read_text().replace("(0.9, 0.95)", "(0.9, 0.951)"))
    done = finished(*command, cwd=repository, code=2)
    assert "   differs\n" in done.stdout and "not the same to the bit" in done.stderr
    different = set(re.findall(r"differs   (\S+)", done.stdout))
    assert {"greedy.jsonl", "golden/metrics.json", "upload/user/name/model.safetensors"} < different
    assert "upload/user/name/config.json" not in different


BARE = "import sys\nfor name in ('tyro', 'simplejpeg', 'bitsandbytes', 'peft', 'wandb', 'nltk'): sys.modules[name] = None\n"


def gpu_benchmark(folder, *flags: str, **environment: str) -> tuple[str, dict[str, list[dict]]]:
    """What `benchmark.py gpu` prints on a CPU and with tiny sizes, and its rows by section."""
    done = finished("benchmark.py", "gpu", "--device", "cpu", "--tiny", *flags, cwd=folder, environment=environment)
    rows: dict[str, list[dict]] = {}
    for row in json.loads((folder / "benchmark-gpu.json").read_text())["rows"]:
        rows.setdefault(row["section"], []).append(row)
    return done.stdout, rows


def test_the_gpu_benchmark_on_a_bare_machine(tmp_path):
    """It is for machines that are lent for minutes and have torch and transformers alone."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    said, rows = gpu_benchmark(tmp_path, "--sections", "kernels", "jpegs", "adapters", PYTHONPATH=path)
    values = {row["name"]: row["value"] for row in rows["kernels"]}
    assert values["product of 256^3"] > 0 and values["math, text 10 x 16 x 16"] > 0 and "WRONG" not in said
    assert values["cuDNN, encoder 2 x 197 x 197"] is None and "not here (" in said
    assert [row["more"] for row in rows["jpegs"]] == ["needs simplejpeg"]
    assert "adapters need peft" in rows["adapters"][0]["more"] and rows["adapters"][0]["name"] == "skipped"


def test_the_gpu_benchmark_ends_sections_and_itself(tmp_path):
    """A section that hangs or dies must leave the others their time, and a machine's last minute is used up at most."""
    job = GpuBenchmark(device="cpu", tiny=True, sections=("captions", "scst"), minutes=0.02, output=tmp_path / "a.json")
    assert [(row["section"], row["name"]) for row in job.run()["rows"]] == [
        ("captions", "stopped"),
        ("scst", "skipped"),
    ]
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 2
    with pytest.raises(SystemExit):
        GpuBenchmark.parsed(["--sections", "nothing"])
    assert GpuBenchmark.parsed(["--sections", "scst", "--minutes", "4"]) == GpuBenchmark(
        sections=("scst",), minutes=4.0
    )


@pytest.mark.slow
def test_every_line_of_the_gpu_benchmark_runs(tmp_path):
    """Nobody can mend it in the minutes for which there is a GPU."""
    pytest.importorskip("peft", reason="peft is of requirements/qlora.txt")
    said, rows = gpu_benchmark(tmp_path, "--minutes", "30")
    assert list(rows) == list(SECTIONS)
    assert not {row["name"] for some in rows.values() for row in some} & {"failed", "skipped", "stopped", "ended"}, said
    assert rows["tests"][-1]["more"].endswith("exit code 0")
    for name in ("eager", "compiled", "fp16", "transformers", "scst", "jpegs", "adapters"):
        assert all(row["value"] > 0 and row["figures"]["pairs_per_second"] > 0 for row in rows[name])
    first = [row["figures"]["first_loss"] for name in ("eager", "compiled", "fp16") for row in rows[name][:1]]
    assert first == pytest.approx([first[0]] * 3, abs=0.01)
    equal = [row["figures"]["equal"] for row in rows["captions"] if "equal" in row["figures"]]
    assert len(equal) == 4 and all(equal)


def test_a_loop_that_does_not_fit_is_a_line(monkeypatch, tmp_path, capsys):
    """transformers' step with as many pictures as ours has captions needs more memory than a GPU has; it once took all
    figures with it."""
    sizes = tiny_config(vocab_size=300)
    model = ImageCaptionModel(sizes)
    model.tokenizer = load_tokenizer("train", ["a picture"], 300)
    model.save_file(tmp_path / "model.safetensors")
    loop = Loop("ours", 2, 2, "fp32", "cpu", 5, False, sizes)

    def start(target, *arguments, daemon):
        pipe, end = multiprocessing.Pipe()
        monkeypatch.setattr(loops, "Running", no_room if arguments[0].pictures == 3 else Running)
        thread = threading.Thread(target=target, args=(*arguments, end))
        thread.start()
        pipe.poll(60)
        return thread, pipe

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate more")

    monkeypatch.setattr(loops, "start_process", start)
    job = TrainBenchmark(steps=1, rounds=1)
    found = job.turns([loop, dataclasses.replace(loop, pictures=3)], tmp_path / "model.safetensors", 1e9)
    assert [figures["pictures"] for figures in found] == [2]
    assert "3 pictures x 2: does not fit (CUDA out of memory.)" in capsys.readouterr().out


def test_no_process_outlives_a_benchmark_that_is_killed(tmp_path):
    """A ruler that was stopped by SIGTERM left its trainings behind, on all cores."""
    (tmp_path / "waits.py").write_text(
        "import time\ndef wait(pipe):\n    print('started', flush=True)\n    time.sleep(600)\n"
    )
    code = "from waits import wait\nfrom benchmarks.training import start_process\nstart_process(wait)[0].join()\n"
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    benchmark = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=surroundings({"PYTHONPATH": paths})
    )
    assert benchmark.stdout is not None and benchmark.stdout.readline() == "started\n"
    benchmark.terminate()
    assert benchmark.communicate(timeout=60)[0] == ""  # its end: no process writes there any more
