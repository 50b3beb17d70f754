"""Whether a pretrained encoder is worth something: a SigLIP that has matched drawn scenes with their captions, against
random weights of the same form, at equal steps. Minutes long."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_config
from processes import run

from data.scenes import draw_scenes
from dataset import CaptionDataset, load_table, train_tokenizer
from utils import read_log

STEPS, CAPTIONING_STEPS, SEEDS = 600, 100, (0, 1, 2)
VISION = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
VISION |= dict(image_size=48, patch_size=8)


def siglip(words: int) -> transformers.SiglipModel:
    torch.manual_seed(0)
    text = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=words)
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text | {"max_position_embeddings": 48}, vision_config=VISION)
    )
    with torch.no_grad():  # as the paper begins; transformers' own zeros learn nothing in so few steps
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    return model


def save(model: transformers.SiglipModel, folder: Path) -> None:
    model.save_pretrained(folder)
    about = {"size": 48, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))


def match(model: transformers.SiglipModel, data: CaptionDataset, tokenizer) -> float:
    """Trains it to tell which of a batch's captions belongs to which of its pictures (Zhai et al. 2023,
    arXiv:2303.15343). The share of the last batch's pictures whose own caption is the nearest."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS)
    pixels = torch.stack([data.pixels[row] for row in range(len(data))]) / 127.5 - 1
    found = torch.zeros(())
    for _ in range(STEPS):
        rows = torch.randperm(len(pixels))[:64]
        captions = [data.table.captions_of(int(row)) for row in rows]
        words = tokenizer([each[int(torch.randint(len(each), ()))] for each in captions])["input_ids"]
        ids = torch.full((64, max(map(len, words)) + 1), tokenizer.pad_token_id)
        for place, one in enumerate(words):
            ids[place, : len(one)] = torch.tensor(one)
        ids[:, -1] = tokenizer.eos_token_id  # where SigLIP's text tower is read
        given = model(input_ids=ids, pixel_values=pixels[rows], return_loss=True)
        given.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found = (given.logits_per_image.argmax(1) == torch.arange(64)).float().mean()
    return float(found)


@pytest.mark.slow
def test_a_siglip_that_has_seen_scenes_beats_random_weights(tmp_path, capsys):
    """On scenes never seen by either, in three runs of three."""
    draw_scenes(tmp_path / "matched", {"train": 3000, "val": 1, "test": 1}, seed=7)
    draw_scenes(tmp_path / "scenes", {"train": 3000, "val": 300, "test": 1}, seed=0)
    table = load_table("coco", tmp_path / "matched", "train")
    tokenizer = train_tokenizer(table.captions().to_pylist(), 512)
    model = siglip(len(tokenizer))
    save(model, tmp_path / "random")
    config = tiny_config(image_size=48, vocab_size=len(tokenizer))
    nearest = match(model, CaptionDataset(table, tokenizer, config, progress=False), tokenizer)
    save(model, tmp_path / "siglip")
    found: dict[str, list[dict]] = {"random": [], "siglip": []}
    for seed in SEEDS:
        for start in found:
            out = tmp_path / f"{start}-{seed}"
            arguments = (
                f"--preset demo --dataset coco --data-dir {tmp_path / 'scenes'} --init-encoder {tmp_path / start}"
            )
            arguments += f" --val-pictures 300 --max-steps {CAPTIONING_STEPS} --eval-interval 1000 --seed {seed}"
            arguments += f" --output-dir {out} --device cpu --precision fp32 --optimizer adamw --learning-rate 1e-3 --wandb off --no-upload"
            run(arguments.split(), tmp_path)
            found[start].append([line for line in read_log(out / "metrics.jsonl") if "val_loss" in line][-1])
    with capsys.disabled():
        print(f"\nafter {STEPS} steps {nearest:.0%} of a batch's 64 pictures are nearest to their own captions")
        for start, lines in found.items():
            losses, scores = ([f"{line[name]:.3f}" for line in lines] for name in ("val_loss", "val_cider_d"))
            print(f"{start:8} validation loss {' '.join(losses)}, CIDEr-D {' '.join(scores)}")
    for random, pretrained in zip(found["random"], found["siglip"], strict=True):
        assert pretrained["val_loss"] < random["val_loss"]
