"""The README's first command to its end, and its model beside transformers: minutes long, so all of it is marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_scripts import script

from convert import save_transformers
from data.scenes import parse_caption, scene_from_dict
from dataset import prepare_picture
from decoding.packed import available
from model import ImageCaptionModel
from weights.file import MODEL_FILE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a demo's run."""
    folder = tmp_path_factory.mktemp("demo")
    script(folder, "main.py", "--preset", "demo")
    (run,) = (folder / "runs").iterdir()
    return run


def test_scenes_never_seen_are_captioned_right(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["scene_accuracy"] >= 0.9 and metrics["scene_accuracy_one_group"] >= 0.95
    assert metrics["loss_shuffled_pictures"] > metrics["loss"] + 1
    entries = json.loads((run / "scenes_test.json").read_text())
    right = next(entry for entry in entries if entry["right"]["all"])
    caption = script(run.parents[1], "example_usage.py", run / "scenes/test2017" / right["file"])
    truth = scene_from_dict(right["truth"])
    assert parse_caption(caption) in (truth, truth.inverse)


def test_captions_equal_those_of_transformers(run, tmp_path):
    """Random weights caption all pictures alike, so a trained model has to show it: 200 of 200, in every setting."""
    from transformers import AutoModelForImageTextToText

    ours = ImageCaptionModel.from_pretrained(run / MODEL_FILE)
    save_transformers(ours, tmp_path / "theirs")
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs").eval()
    paths = sorted((run / "scenes/test2017").iterdir())[:200]
    pixels = torch.stack([prepare_picture(path, ours.config) for path in paths])
    normal = (pixels / 255 - ours.encoder.mean) / ours.encoder.std
    end = ours.config.end_token_id

    def until_end(rows: torch.Tensor) -> list[list[int]]:
        return [row[: row.index(end) + 1] if end in row else row for row in rows.tolist()]

    with torch.no_grad():
        ids = ours.generate(pixels, max_length=16).sequences
        logits = theirs(pixel_values=normal, decoder_input_ids=ids).logits
        assert (ours(pixels, ids).logits - logits).abs().max() < 1e-4
    for options in (
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 5},
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "repetition_penalty": 1.3},
        {"num_beams": 1, "repetition_penalty": 1.3},
        {"num_beams": 3, "min_length": 14},
    ):
        found = until_end(ours.generate(pixels, max_length=32, **options).sequences)
        names = {"min_length": "min_new_tokens"}
        options = {names.get(name, name): value for name, value in options.items()}
        expected = until_end(theirs.generate(normal, max_new_tokens=32, **options)[:, 1:])
        equal = sum(a == b for a, b in zip(found, expected, strict=True))
        print(options, equal, "equal;", len(set(map(tuple, found))), "different")
        assert equal == len(paths) == 200 and len(set(map(tuple, found))) > 50


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_fewer_bits_cost_less_than_a_hundredth(run, precision):
    if not available(precision):
        pytest.skip(f"this CPU has no {precision} kernels")
    options = ["--data-dir", run / "scenes", "--precision"]
    scores = {}
    for name in ("fp32", precision):
        script(run.parents[1], "evaluate.py", run / MODEL_FILE, *options, name, "--output-dir", name)
        scores[name] = json.loads((run.parents[1] / name / "metrics.json").read_text())["cider_d"]
    print(scores)
    assert scores[precision] > 0.99 * scores["fp32"]
