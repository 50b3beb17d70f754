"""Small things that many tests need: tiny models, a tiny drawn data set, a tokenizer of its captions."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
if "PYTEST_XDIST_WORKER" in os.environ:  # or the workers' threads fight for the cores: five times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VIT_GPT2_CACHE"] = tempfile.mkdtemp(prefix="vit-gpt2-tests-")

import torch

from config import ViTGPT2Config
from dataset import train_tokenizer
from model import ImageCaptionModel
from scenes import draw_scenes
from sources import load_table

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def tiny_config(**changes) -> ViTGPT2Config:
    fields = dict(
        image_size=16,
        patch_size=8,
        vision_embed_dim=32,
        vision_num_layers=2,
        vision_num_heads=2,
        vocab_size=50,
        max_length=24,
        decoder_embed_dim=32,
        decoder_num_layers=2,
        decoder_num_heads=2,
        dropout=0.0,
    )
    return ViTGPT2Config(**(fields | changes))


@pytest.fixture
def tiny_model() -> ImageCaptionModel:
    torch.manual_seed(0)
    model = ImageCaptionModel(tiny_config())
    for parameter in model.parameters():  # spread wide enough that attention is far from uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    draw_scenes(directory, {"train": 96, "val": 12, "test": 12}, seed=1)
    return directory


@pytest.fixture(scope="session")
def scenes_table(scenes_dir):
    return load_table("coco", scenes_dir, "train")


@pytest.fixture(scope="session")
def scenes_tokenizer(scenes_table):
    return train_tokenizer(scenes_table.captions().to_pylist(), 400)


def needs_shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the shared data set {name}")
    return path
