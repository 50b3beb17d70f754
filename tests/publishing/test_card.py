"""The model card: what is known is in it, what is not known is not, and the Hub takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from hub import running_hub
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, parse_eval_result_entries
from PIL import Image

from config import PRESETS, UserError
from evaluate import about_decoding
from model import ImageCaptionModel
from publishing import card
from publishing.card import Facts, read_facts, scrubbed, write_card
from publishing.hub import UploadConfig, check_card, write_model_folder
from training.run import Run
from weights.file import weights_hash

METRICS = {"bleu_4": 0.28764321, "cider_d": 0.9, "bleu_4_low": 0.27, "bleu_4_high": 0.3, "pictures": 12, "split": "val"}
METRICS |= {"decoding": "num_beams 3", "unique_captions": 12, "data": "scenes"}


@pytest.fixture
def model(scenes_tokenizer) -> ImageCaptionModel:
    torch.manual_seed(0)
    made = ImageCaptionModel(tiny_config(vocab_size=len(scenes_tokenizer)))
    made.tokenizer = scenes_tokenizer
    return made.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the example's picture, where the card goes."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "example.png")
    return tmp_path


def make_run(folder: Path, model: ImageCaptionModel, metrics: dict, **settings) -> Path:
    """A run's folder, as train.py leaves it."""
    config = PRESETS["demo"].to_dict() | settings
    about = {"finished": True, "device": "cpu", "precision": "bf16", "config": config}
    captions = [{"image_id": i, "caption": f"caption <b>{i}</b>"} for i in range(12)]
    folder.mkdir()
    files = {
        "run.json": about,
        "metrics.json": metrics | about_decoding(model, {}) | metrics,
        "captions.json": captions,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    lines = [
        {"step": 10, "loss": 2.0, "pictures_per_second": 64.0},
        {"step": 20, "loss": 1.0, "pictures_per_second": 32.0},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    return folder


def of_run(folder: Path, model: ImageCaptionModel, step: int | None = None) -> Facts:
    return read_facts(folder, weights_hash(model.own_state()), step)


def written(folder: Path, model: ImageCaptionModel, run: Facts | None, **options) -> ModelCard:
    write_card(folder, model, run, "ann/shapes", **options)
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def validate(tmp_path, monkeypatch):
    """What a Hub of our own says of a card."""
    with running_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

        def ask(card: ModelCard) -> None:
            card.save(tmp_path / "README.md")
            check_card(HfApi(hub.url), tmp_path, "model")

        yield ask


def test_all_that_is_known(folder, model, validate):
    run = of_run(make_run(folder / "run", model, METRICS, contrastive_weight=0.2), model)
    found = written(folder, model, run)
    validate(found)
    about = found.data
    assert (about.license, about.language, about.pipeline_tag) == ("apache-2.0", "en", "image-to-text")
    assert {(r.metric_name, r.metric_value, r.dataset_split) for r in about.eval_results} == {
        ("BLEU-4", 0.2876, "val"),
        ("CIDEr-D", 0.9, "val"),
    }
    for part in (
        "| BLEU-4 | 0.2876 | 0.2700 to 0.3000 |",
        "num\\_beams 3",
        "drawn scenes",
        "| optimizer | muon |",
        "| contrastive weight | 0.2 |",
        "bf16",
    ):
        assert part in found.text, part
    assert "| schedule |" not in found.text  # the default
    assert "| steps | 20 |" in found.text and "0.5 minutes" in found.text  # 10 x 64 / 64 + 10 x 64 / 32 seconds
    assert "coloured shapes" in found.text and f"{model.num_parameters:,}" in found.text
    for part in ("AutoModelForImageTextToText", "from model import", "convert.py onnx", "bibtex", "## Licence"):
        assert part in found.text, part


def test_what_is_not_known_is_not_there(folder, model, validate):
    found = written(folder, model, None)
    validate(found)
    assert not any(
        getattr(found.data, name) for name in ("language", "eval_results", "base_model", "datasets", "metrics")
    )
    for part in ("## Results", "## Training", "## Samples", "None", "nan", "METEOR", "trained on <"):
        assert part not in found.text, part


def test_metadata_survives_the_hubs_own_classes(folder, model):
    run = of_run(make_run(folder / "run", model, METRICS, init="pretrained", mimetic=True), model)
    found = written(folder, model, run)
    assert "| mimetic |" not in found.text  # it has no effect on a pretrained encoder
    again = ModelCardData(**found.data.to_dict())
    assert again.to_dict() == found.data.to_dict() and again.eval_results == found.data.eval_results
    assert found.data.base_model == ["google/vit-base-patch16-224-in21k", "openai-community/gpt2"]
    assert str(ModelCard(str(found))) == (folder / "README.md").read_text()


def test_a_spoiled_card_is_refused(folder, model, validate):
    """Or the check above would say nothing."""
    found = written(folder, model, None)
    found.data.license = "MY OWN"
    with pytest.raises(ValueError, match="license"):
        validate(found)


def test_metrics_of_other_weights_are_left_out(folder, model):
    path = make_run(folder / "run", model, METRICS | {"weights_sha256": "0" * 64})
    run = of_run(path, model)
    assert not run.metrics and not run.captions and run.samples is None
    assert "0.2876" not in str(written(folder, model, run))


def test_photographs_are_not_shown_unless_asked(tmp_path, model):
    path = make_run(tmp_path / "run", model, METRICS, dataset="flickr8k", data_dir="/home/ann/flickr8k")
    run = of_run(path, model)
    for asked in (False, True):
        folder = tmp_path / str(asked)
        write_model_folder(folder, UploadConfig(repository="ann/dogs", sample_pictures=asked), model, run)
        text = (folder / "README.md").read_text()
        assert (folder / "samples.png").exists() == ("samples.png" in text) == asked
        assert ("- caption &lt;b&gt;0&lt;/b&gt;" in text) != asked
        assert "Flickr8k" in text and "non-commercial" in text and "1605.06083" in text
        for file in filter(Path.is_file, folder.rglob("*")):
            assert b"/home/ann" not in file.read_bytes(), file  # a path of this machine
    assert json.loads((folder / "run.json").read_text())["config"]["data_dir"] == "flickr8k"


def test_a_checkpoints_card_ends_at_its_step(folder, model):
    found = written(folder, model, of_run(make_run(folder / "run", model, {"weights_sha256": "other"}), model, step=10))
    assert "| steps | 10 so far |" in found.text and "0.2 minutes" in found.text


def test_a_benchmark_gets_the_newer_form(folder, model):
    run = of_run(make_run(folder / "run", model, METRICS), model)
    written(folder, model, run, benchmark="bob/captions:test:cider_d")
    import yaml

    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/bob-captions.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("bob/captions", "test", 0.9)
    assert "num" in entry.notes
    with pytest.raises(UserError, match="spice was not measured"):
        write_card(folder, model, run, "ann/shapes", benchmark="bob/captions:test:spice")


def test_data_sets_of_the_hub_and_ones_own(folder, model):
    run = of_run(make_run(folder / "a", model, METRICS, dataset="bob/birds"), model)
    found = written(folder, model, run)
    assert found.data.datasets == ["bob/birds"] and not found.data.language
    run = of_run(
        make_run(folder / "b", model, METRICS, dataset="csv", data_dir="pets", init_encoder="/x/my-vit"), model
    )
    found = written(folder, model, run, language="de")
    assert found.data.language == "de" and found.data.base_model is None and "my-vit" in found.text
    assert found.data.eval_results[0].dataset_name == "scenes"  # which is what the metrics say that they are of


def test_paths_lose_their_folders():
    values = {"a": ["/home/x/y", "C:\\data\\z", "~/w/", "../v", "b c", 1], "output_dir": "runs/x", "resume": "auto"}
    assert scrubbed(values) == {"a": ["y", "z", "w", "v", "b c", 1]}


def test_a_run_is_found_by_the_same_file(folder, model, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "runs").mkdir()
    run = make_run(folder / "runs/one", model, METRICS)
    model.save_file(run / "vit-gpt2-captioning.safetensors")
    model.save_file(folder / "copy.safetensors")
    assert (
        Run.of_model(Path("copy.safetensors")).folder.resolve()
        == run.resolve()
        == Run.of_model(run / "vit-gpt2-captioning.safetensors").folder
    )
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        of_run(run, model)
    model.decoder.ln_f.bias.data += 1
    model.save_file(folder / "copy.safetensors")
    assert Run.of_model(Path("copy.safetensors")) is None


def test_text_of_anybody_is_only_shown():
    assert card.escape("a | b\n<script> *x* [y](z) # `c`") == "a \\| b &lt;script&gt; \\*x\\* \\[y\\](z) \\# \\`c\\`"


def test_names_that_only_this_machine_knows(tmp_path, monkeypatch):
    """Adapters for them would be of use to nobody, and a base model by such a name is another one on the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann/vit").mkdir()
    for name in ("./vit", "/models/vit", "~/vit", "a/b/c", "vit", "model.safetensors", "runs/x.safetensors", "ann/vit"):
        assert card.local(name), name
    for name in ("gpt2", "gpt2-medium", "distilgpt2", "google/vit-base-patch16-224-in21k", "bob/vit"):
        assert not card.local(name), name
