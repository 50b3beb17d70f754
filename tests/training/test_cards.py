"""main.py --plan: what a run takes on cards that people have, without data."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import transformers
from conftest import ROOT

import main
from config import PRESETS, SIGLIP2, TrainConfig, UserError, ViTGPT2Config
from training import cards
from training.cards import plan_for_cards
from weights.vision import vision_fields


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plans_of_all_presets_are_printed_and_documented(preset, monkeypatch, capsys, tmp_path):
    """In an empty folder, without data and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", "--preset", preset, "--plan"])
    assert main.main() == 0 and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert [line.split("  ")[0].split(",")[0] for line in said.splitlines()] == (
        ["preset", "start", "model", "data", "steps", "H100", "RTX 4090"]
    )
    if preset.startswith("coco-siglip2"):
        assert said in (ROOT / "docs/training.md").read_text()


def test_the_siglip2_presets_have_the_sizes_of_the_weights():
    """Of google/siglip2-base-patch16-384 and gpt2: the plan is calculated from the preset's sizes, the run has the weights'."""
    about = json.loads(transformers.SiglipVisionConfig(image_size=384).to_json_string(use_diff=False))
    assert dataclasses.replace(SIGLIP2, **vision_fields("siglip2", "", about)) == SIGLIP2
    gpt2 = transformers.GPT2Config()
    ours = ViTGPT2Config()
    assert (ours.vocab_size, ours.decoder_embed_dim, ours.decoder_num_layers) == (
        gpt2.vocab_size,
        gpt2.n_embd,
        gpt2.n_layer,
    )


def test_a_small_card_gets_smaller_batches_and_then_checkpointing(monkeypatch):
    """As many pictures a step in all, so that the recipe stays what it is."""
    monkeypatch.setattr(cards, "CARDS", {"H100": 80e9, "T4": 16e9, "L4": 5.6e9, "A10G": 1e9})
    *_, large, small, smaller, least = plan_for_cards(PRESETS["coco-siglip2"]).splitlines()
    assert large.endswith("GB, as it is") and "--gradient-checkpointing" not in small
    for line in (small, smaller):
        flags = line.split(", with ")[1].split()
        assert int(flags[1]) * int(flags[3]) == 128
    assert flags[4:] == ["--gradient-checkpointing"]
    assert least.endswith("even for one picture at a time")


def test_adapters_and_frozen_parts_learn_less():
    def learned(**changes: object) -> int:
        line = plan_for_cards(dataclasses.replace(PRESETS["img2gpt"], **changes)).splitlines()[2]
        return int(line.split("parameters, ")[1].split()[0].replace(",", ""))

    assert learned() < learned(lora_rank=64) < learned(qlora=False, freeze=("encoder",)) < learned(qlora=False)
    # 12 + 12 layers of 768, adapters of 16 x (768 + 2304); the projection and its norm
    assert learned() == 24 * 16 * (768 + 2304) + 768 * 768 + 768


def test_data_of_unknown_size_is_one_line(tmp_path):
    for config in (TrainConfig(dataset="csv"), TrainConfig(data_dir=tmp_path)):
        with pytest.raises(UserError, match="plan does not know how many pictures your data has"):
            plan_for_cards(config)
    with pytest.raises(UserError, match="plan does not know the sizes of decoder HuggingFaceTB/SmolLM2-135M"):
        plan_for_cards(dataclasses.replace(PRESETS["img2gpt"], decoder="HuggingFaceTB/SmolLM2-135M"))
    with pytest.raises(UserError, match="plan does not know how many"):  # 6,000 pictures, it said
        plan_for_cards(main.for_any_layout(dataclasses.replace(PRESETS["flickr8k"], data_dir=tmp_path)))


def test_references_beside_samples_cost_memory():
    """They are learned in the same pass, and were left out of the estimate."""
    rewards = PRESETS["coco-siglip2-scst"]
    plans = [plan_for_cards(dataclasses.replace(rewards, reference_weight=weight)) for weight in (0.0, 0.1)]
    assert "GB, as it is" in plans[0] and "GB, as it is" not in plans[1]


def test_coco_2017_does_not_replace_karpathys_split(tmp_path):
    """Its training pictures include nearly all of Karpathy's test pictures: the score would be too good, and nobody told."""
    for name in ("train2017", "val2017", "annotations"):
        (tmp_path / name).mkdir()
    (tmp_path / "annotations/captions_train2017.json").write_text("{}")
    config = dataclasses.replace(PRESETS["coco-siglip2"], data_dir=tmp_path)
    with pytest.raises(UserError, match=r"dataset_coco\.json"):
        main.for_any_layout(config)
