"""evaluate's contract, the loss with shuffled pictures, results files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_shared, tiny_config

import model_file
from config import UserError
from dataset import CaptionDataset, make_dataloader
from evaluate import (
    BadPictures,
    caption_loss,
    contact_sheet,
    evaluate,
    evaluate_captions,
    evaluate_dataset,
    read_results,
    warnings_about,
)
from metrics import score_captions
from model import ImageCaptionModel

CPU = torch.device("cpu")


@pytest.fixture
def model_and_loader(scenes_table, scenes_tokenizer):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(scenes_tokenizer), resize_size=16)
    model = ImageCaptionModel(config)
    model.tokenizer = scenes_tokenizer
    return model, make_dataloader(CaptionDataset(scenes_table.head(20), scenes_tokenizer, config), 8)


def test_evaluate_is_bleu_4_as_a_float(model_and_loader):
    model, loader = model_and_loader
    bleu = evaluate(model, loader, model.tokenizer, "cpu")
    assert isinstance(bleu, float) and 0 <= bleu <= 1
    metrics = evaluate_captions(model, loader, model.tokenizer, "cpu")
    assert metrics["bleu_4"] == bleu
    assert {"bleu_1", "rouge_l", "cider_d", "unique_captions", "cut_captions"} <= set(metrics)


def test_a_model_that_repeats_a_reference_scores_one(model_and_loader, monkeypatch):
    """The whole chain, from tokens to score: a model that writes each picture's first reference has BLEU 1."""
    model, loader = model_and_loader
    firsts = iter([list(batch["labels"][:, 0]) for batch in loader])

    def copy_first(pixels, **options):
        rows = torch.stack(next(firsts))
        return type("Generated", (), {"sequences": rows.masked_fill(rows == -100, model.config.end_token_id)})

    monkeypatch.setattr(model, "generate", copy_first)
    assert evaluate(model, loader, model.tokenizer, "cpu") == pytest.approx(1)


def test_caption_loss_is_the_mean_over_tokens_whatever_the_batches(model_and_loader):
    model, loader = model_and_loader
    other = make_dataloader(loader.dataset, 5)
    first, second = (caption_loss(model, each, CPU, torch.float32) for each in (loader, other))
    assert first == pytest.approx(second, rel=1e-5)
    assert caption_loss(model, loader, CPU, torch.float32, shuffle_pictures=True) != first


def test_a_batch_of_one_is_shuffled_too(model_and_loader):
    """Rolling a batch of one picture by one gave each picture its own captions, and no difference in the loss."""
    model, loader = model_and_loader
    one_by_one = make_dataloader(loader.dataset, 1)
    right, shuffled = (caption_loss(model, one_by_one, CPU, torch.float32, shuffle) for shuffle in (False, True))
    assert shuffled != right


def test_captions_with_dollars_can_be_drawn(tmp_path):
    """Matplotlib took what stands between two $ for a formula, and failed on most captions that have them."""
    contact_sheet(
        tmp_path / "s.png", [torch.zeros(3, 8, 8, dtype=torch.uint8)], ["pays $1 # 2 for $3"], [["$$", "\\x"]]
    )
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_results_files(tmp_path):
    references = {"annotations": [{"image_id": i, "caption": f"a dog number {i} runs"} for i in (1, 2, 2)]}
    (tmp_path / "refs.json").write_text(json.dumps(references))
    good = [{"image_id": 2, "caption": "b"}, {"image_id": 1, "caption": "a"}]
    (tmp_path / "good.json").write_text(json.dumps(good))
    names, candidates, known = read_results(tmp_path / "good.json", tmp_path / "refs.json")
    assert names == [1, 2] and candidates == ["a", "b"] and list(map(len, known)) == [1, 2]
    for content, words in {
        json.dumps(good[:1]): r"no caption for 1 pictures .* \(1\)",
        json.dumps(good + good[:1]): "2 captions for picture 2",
        json.dumps([{"image_id": 1}]): "not in COCO's format",
        json.dumps([{"image_id": 1, "caption": None}, {"image_id": 2, "caption": "b"}]): "not in COCO's format",
        json.dumps([{"image_id": [1], "caption": "a"}]): "not in COCO's format",
        "{": "not in COCO's format",
    }.items():
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=words) as error:
            read_results(tmp_path / "bad.json", tmp_path / "refs.json")
        assert "\n" not in str(error.value)


def test_the_official_example_scores_as_published():
    folder = needs_shared("coco_eval")
    files = (folder / "captions_val2014_fakecap_results.json", folder / "captions_val2014_fakecap_refs.json")
    scores = score_captions(*read_results(*files)[1:])
    assert scores["cider_d"] == pytest.approx(0.599791, abs=1e-3)
    assert scores["bleu_4"] == pytest.approx(0.190829, abs=5e-4)


def run_evaluate(folder, *arguments) -> str:
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_results_file_gets_numbers_intervals_and_a_report(tmp_path):
    folder = needs_shared("coco_eval")
    references = folder / "captions_val2014_fakecap_refs.json"
    output = run_evaluate(
        tmp_path, "--results", folder / "captions_val2014_fakecap_results.json", "--references", references
    )
    found = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert found["cider_d"] == pytest.approx(0.599791, abs=1e-3) and found["cider_d_low"] < found["cider_d"]
    assert found["cider_d"] < found["cider_d_high"] and found["tokenizer"].startswith("PTB")
    assert "METEOR and SPICE" in found["left_out"] and "0.5998   (" in output
    assert "CIDEr-D" in (tmp_path / "evaluation/report.html").read_text()
    with open(tmp_path / "evaluation/per_picture.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1000
    assert np.mean([float(row["cider_d"]) for row in rows]) == pytest.approx(found["cider_d"], abs=1e-5)
    # What it wrote serves as input again: the same captions are no better than themselves.
    ours = tmp_path / "evaluation/captions.json"
    output = run_evaluate(tmp_path, "--compare", ours, ours, "--references", tmp_path / "evaluation/references.json")
    compared = json.loads((tmp_path / "evaluation/comparison.json").read_text())
    assert compared["cider_d"]["difference"] == 0 and compared["cider_d"]["p_value"] == 1
    assert compared["cider_d"]["a"] == pytest.approx(found["cider_d"]) and "cider_d" in output


def test_what_to_know_before_numbers_are_believed():
    """Models that ignore the picture or never end were praised for their BLEU."""
    good = {"pictures": 100, "unique_captions": 80.0, "loss": 2.0, "loss_shuffled_pictures": 2.4, "cut_captions": 0.0}
    assert warnings_about(good) == [] and warnings_about({"pictures": 100, "unique_captions": 80.0}) == []
    for change, word in (
        ({"loss_shuffled_pictures": 2.001}, "ignores the picture"),
        ({"unique_captions": 1.0}, "same caption"),
        ({"cut_captions": 0.5}, "never ended"),
        ({"pictures_trained_on": 96}, "trained on"),
    ):
        (warning,) = warnings_about(good | change)
        assert word in warning


def test_a_model_on_a_data_set(model_and_loader, tmp_path):
    model, loader = model_and_loader
    model.trained_on = loader.dataset.table.keys()[:3]
    captioned, metrics = evaluate_dataset(model, loader.dataset, CPU, torch.float32, tmp_path, max_length=6)
    assert metrics["pictures"] == len(captioned.captions) == 20 and metrics["pictures_trained_on"] == 3
    assert len(metrics["weights_sha256"]) == 64 and metrics["decoding"] == "num_beams 3, max_length 6"
    page = (tmp_path / "report.html").read_text()
    assert "were trained on" in page and "data:image/jpeg;base64," in page and metrics["weights_sha256"] in page
    with torch.no_grad():
        model.decoder.ln_f.bias += 1
    again = evaluate_dataset(model, loader.dataset, CPU, torch.float32, tmp_path, max_length=6)[1]
    assert again["weights_sha256"] != metrics["weights_sha256"]


def test_bad_pictures_are_remembered_when_a_run_goes_on(tmp_path, scenes_table):
    """A run that was stopped began to count, and to write its file, anew."""
    table = scenes_table.head(20)
    bad = BadPictures(tmp_path / "bad.csv", [table], most=0.1)
    bad._add(table, [("a.png", "cut, twice"), ("b.png", "empty")])
    again = BadPictures(tmp_path / "bad.csv", [table], most=0.1, go_on=True)
    assert again.found == bad.found
    with pytest.raises(UserError, match="3 of 20 pictures"):
        again._add(table, [("c.png", "empty")])
    assert (tmp_path / "bad.csv").read_text().count("\n") == 4
    BadPictures(tmp_path / "bad.csv", [table])
    assert not (tmp_path / "bad.csv").exists()  # a new run does not point at an old one's pictures


def test_a_model_of_many_pictures_keeps_a_sample_of_their_keys(tmp_path, scenes_tokenizer, monkeypatch):
    """A file's header holds 100 MB; ten million keys did not fit, and the first checkpoint failed."""
    monkeypatch.setattr(model_file, "MOST_KEYS", 10)
    model = ImageCaptionModel(tiny_config())
    model.trained_on = np.arange(100, dtype=np.uint64) << np.uint64(40)
    model.save_file(tmp_path / "m.safetensors")
    assert ImageCaptionModel.from_pretrained(tmp_path / "m.safetensors").trained_on.tolist() == [
        n << 40 for n in range(10)
    ]
