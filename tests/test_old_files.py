"""What users have on disk from before the files of this project moved into folders: it loads, resumes and goes on.

The files in tests/fixtures were written by the code from before (fixtures/make.py says which, and how); they are never
written anew. Each test works on a copy, by the commands that people type, and imports no module that moves.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.make import MODEL, kept_names
from safetensors.torch import load_file, save_file

import evaluate
import example_usage
import main
import upload_to_hf
from dataset import CaptionDataset, load_tables
from model import ImageCaptionModel
from utils import read_log

OLD = Path(__file__).with_name("fixtures")
EXPECTED = json.loads((OLD / "expected.json").read_text())
NAME = "coco-20260101-000000"
SCRIPTS = {f"{module.__name__}.py": module for module in (main, evaluate, example_usage, upload_to_hf)}


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """A command as it is typed in tmp_path, where the old photographs lie; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    shutil.copytree(OLD / "photos", "photos")

    def run(command: str) -> str:
        name, *flags = command.split()
        monkeypatch.setattr(sys, "argv", [name, *flags])
        capsys.readouterr()
        assert not SCRIPTS[name].main()
        return capsys.readouterr().out

    return run


def logits(model: ImageCaptionModel) -> list[float]:
    """Those that expected.json has, of no picture in particular."""
    S = model.config.image_size
    pixels, ids = torch.linspace(-1, 1, 3 * S * S).view(1, 3, S, S), torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        return model(pixels, ids).logits[0, :, :8].flatten().tolist()


def like(name: str, far: float = 1e-3) -> Any:
    """What the old code's logits were, but for rounding."""
    return pytest.approx(EXPECTED[name]["logits"], rel=far, abs=far)


def old_model(folder: Path) -> Path:
    """The model of the finished run, where its run had put it."""
    return Path(shutil.copy(OLD / "whole/runs" / NAME / MODEL, folder))


def close(found: dict[str, Any], before: dict[str, Any]) -> None:
    """All that was said before is said still: numbers but for rounding, and words to the letter."""
    for name, value in before.items():
        assert found[name] == (pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value), name


# Runs


@pytest.mark.filterwarnings("ignore:Glyph")  # of captions by adapters that have hardly learned
@pytest.mark.parametrize("kind", ["half_way", "adapters"])
def test_a_run_stopped_half_way_goes_on(script, tmp_path, kind):
    """Days of training. The same command must find the run, by its fingerprint, and go on with its weights, moments and
    order of pictures; adapters also need their bases to be known again. A field more in TrainConfig loses every run."""
    if kind == "adapters":
        pytest.importorskip("peft", reason="needs requirements/qlora.txt")
    shutil.copytree(OLD / kind, tmp_path, symlinks=True, dirs_exist_ok=True)
    run = tmp_path / "runs" / NAME
    state = json.loads((run / "checkpoints/latest/state.json").read_text())
    said = script(EXPECTED[kind]["command"])
    assert f"going on at step {state['step']}" in said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [NAME]
    lines = [line for line in read_log(run / "metrics.jsonl") if "loss" in line]
    wanted = [float.fromhex(loss) for loss in EXPECTED[kind]["losses"]]
    assert [line["step"] for line in lines] == list(range(10, 10 * len(wanted) + 1, 10))
    assert [line["loss"] for line in lines] == pytest.approx(wanted, rel=1e-3)
    assert json.loads((run / "run.json").read_text())["finished"]
    assert {"metrics.json", "captions.json", "samples.png", "curves.png", MODEL} <= set(os.listdir(run))
    assert (tmp_path / MODEL).read_bytes() == (run / MODEL).read_bytes()
    ended = ImageCaptionModel.from_pretrained(MODEL, tmp_path / "bases")
    assert logits(ended) == like("whole" if kind == "half_way" else kind, 0.02)


def test_what_a_cache_keeps_is_used_again(script, tmp_path, monkeypatch):
    """Decoding all pictures of a large data set takes hours; files of another name would also stay there for ever, beside
    the new ones. Where the pictures have changed the old ones must go, and so must the table of an older reader, which
    did not find all samples of a shard."""
    photos, cache = tmp_path / "shards", tmp_path / "cache"
    monkeypatch.setenv("VIT_GPT2_CACHE", str(cache))
    shutil.copytree(OLD / "shards", photos)
    cache.mkdir()
    for name, had in kept_names(photos, OLD / "cache/table").items():
        shutil.copy(OLD / "cache" / name, cache / had)

    def kept() -> dict[str, tuple[int, bytes]]:
        files = [path for path in cache.iterdir() if path.suffix != ".lock"]
        return {path.name: (path.stat().st_ino, path.read_bytes()) for path in files}

    def pixels(files: dict[str, Any]) -> dict[str, Any]:
        return {name: content for name, content in files.items() if name.startswith("pixels")}

    before = kept()
    assert "cache  " not in script(EXPECTED["cache"]["command"])  # which it says where it makes one
    assert pixels(kept()) == pixels(before) and len(kept()) == len(before)
    (table,) = kept().keys() - before.keys()
    assert table.startswith("table-") and "cache  " not in script(EXPECTED["cache"]["command"])
    (photos / "photos.tar").touch()
    model = ImageCaptionModel.from_pretrained(MODEL)
    for table in load_tables("auto", "shards").values():
        CaptionDataset(table, model.tokenizer, model.config, keep="disk", progress=False)
    assert len(kept()) == len(before) and not kept().keys() & before.keys()


# Models


def test_a_finished_model_captions_as_it_did(script, tmp_path):
    """The one file that is mailed around, with and without its metadata (as save_file writes it)."""
    model = ImageCaptionModel.from_pretrained(old_model(tmp_path))
    assert logits(model) == like("whole") and len(model.trained_on) == 22
    save_file(load_file(MODEL), "plain.safetensors")
    plain = ImageCaptionModel.from_pretrained("plain.safetensors")
    assert logits(plain) == like("whole") and plain.config == model.config
    said = script(EXPECTED["captions"]["command"])
    assert said.splitlines() == EXPECTED["captions"]["csv"].replace(",", "\t").splitlines()[1:]


def test_a_model_of_an_older_version_loads(script):
    """Its config lacks what came later (resample, vision_drop_path, prefix_length, language_model, prompt_ids), and must
    mean the same model without it."""
    model = ImageCaptionModel.from_pretrained(OLD / "older" / MODEL)
    assert logits(model) == like("older") and model.tokenizer.eos_token_id == model.config.end_token_id
    assert (model.config.resize_size, model.config.bridge, model.config.prompt_ids) == (48, "cross_attention", ())
    assert len(script(f"example_usage.py photos {OLD / 'older' / MODEL} --device cpu").splitlines()) == 24


def test_adapters_find_their_bases(script, tmp_path):
    """A few kB that are nothing without the models they name, which are known again by a fingerprint."""
    assert logits(ImageCaptionModel.from_pretrained(OLD / "adapters" / MODEL, OLD / "adapters/bases")) == like(
        "adapters"
    )
    shutil.copy(OLD / "adapters" / MODEL, tmp_path / "adapters.safetensors")
    bases = OLD / "adapters/bases"
    said = script(f"example_usage.py photos adapters.safetensors --device cpu --base-dir {bases}")
    assert len(said.splitlines()) == 24


# Captions and evaluations


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_captions_begun_are_gone_on_with(script, tmp_path, suffix):
    """A folder of a million pictures: what is there stays as it is, half a line is cut off, and only what is missing is
    done."""
    old_model(tmp_path)
    shutil.copy(OLD / f"captions/captions.{suffix}", tmp_path)
    file = tmp_path / f"captions.{suffix}"
    there = file.read_text().count("\n") - (suffix == "csv")
    said = script(f"{EXPECTED['captions']['command']} --output captions.{suffix}")
    assert f"{24 - there} pictures captioned" in said and f"{there} were there, 0 could not be read" in said
    assert file.read_text() == EXPECTED["captions"][suffix]


def test_an_old_evaluation_can_be_scored_compared_and_made_again(script, tmp_path):
    """Whoever compares with last year's captions needs the same numbers from the same files, and to be told that the same
    weights wrote them."""
    old_model(tmp_path)
    shutil.copytree(OLD / "whole/evaluation", "evaluation")
    old = {path.parent.name: json.loads(path.read_text()) for path in (OLD / "whole/evaluation").rglob("metrics.json")}
    results, references = "evaluation/beams/captions.json", "evaluation/beams/references.json"
    script(f"evaluate.py --results {results} --references {references} --output-dir again")
    close(json.loads(Path("again/metrics.json").read_text()), old["evaluation"])
    script(
        f"evaluate.py --compare evaluation/greedy/captions.json {results} --references {references} --output-dir again"
    )
    found, before = (json.loads(Path(name, "comparison.json").read_text()) for name in ("again", "evaluation"))
    assert found.keys() >= before.keys() and (found["a"], found["b"]) == (before["a"], before["b"])
    for name, values in before.items():
        if isinstance(values, dict) and name not in ("a", "b"):
            assert found[name]["interval"] == pytest.approx(values["interval"], rel=1e-3, abs=1e-3)
            close(found[name], {key: value for key, value in values.items() if key not in ("interval", "p_value")})
            assert found[name]["p_value"] is None  # so few pictures have none today
    script(f"{EXPECTED['whole']['evaluate']} --num-beams 1 --output-dir evaluation/greedy")
    close(json.loads(Path("evaluation/greedy/metrics.json").read_text()), old["greedy"])
    for name in ("captions.json", "references.json"):
        assert Path("evaluation/greedy", name).read_bytes() == (OLD / "whole/evaluation/greedy" / name).read_bytes()


# What was published


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "none"])
def test_a_published_folder_loads_and_is_replaced(script, tmp_path, manifest):
    """It holds the modules of then, flat. One that stays beside today's code shadows it, and whoever loads the model gets
    half of each version; versions before the manifest did not write down which files were theirs."""
    old_model(tmp_path)
    shutil.copytree(OLD / "whole/runs", "runs")
    folder = tmp_path / "upload/user/name"
    shutil.copytree(OLD / "whole/published", folder)
    files = folder / "published_files.json"
    names = {*json.loads(files.read_text()), "gone.py" if manifest else "captioning.py"}  # later code has less
    for name in names:
        if name.endswith(".py"):
            (folder / name).write_text("raise SystemExit('old code')\n")
    if manifest:
        files.write_text(json.dumps(sorted(names)))
    else:
        files.unlink()
    assert logits(ImageCaptionModel.from_pretrained(folder)) == like("whole")
    script(EXPECTED["whole"]["publish"])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {files.name}
    assert there == set(json.loads(files.read_text())) and {"config.py", "model.py"} <= there
    assert {name for name in there if not name.endswith(".py")} == {name for name in names if not name.endswith(".py")}
    assert not [path for path in folder.rglob("*.py") if "old code" in path.read_text()]
    assert logits(ImageCaptionModel.from_pretrained(folder)) == like("whole")
    for name in ("run.json", "metrics.json", "preprocessor_config.json", "tokenizer.json", "vit_gpt2_captioning.json"):
        assert json.loads((folder / name).read_text()) == json.loads((OLD / "whole/published" / name).read_text()), name
