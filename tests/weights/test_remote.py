"""The code that travels with a prefix model: loaded by transformers where nothing of this project is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import tiny_config

from config import ViTGPT2Config
from model import ImageCaptionModel
from weights.remote import remote_code

PICTURES = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
STRANGER = """
import json, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
pictures = [Image.fromarray(torch.tensor(p, dtype=torch.uint8).permute(1, 2, 0).numpy()) for p in json.load(open(sys.argv[2]))]
pixels = processor(pictures, return_tensors="pt").pixel_values
ids = model.generate(pixels, max_new_tokens=7, num_beams=3)
model.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True).eval()
with torch.no_grad():
    same = torch.equal(model(pixels, ids).logits, again(pixels, ids).logits)
raw = torch.zeros(1, 3, model.captioner.config.image_size, model.captioner.config.image_size, dtype=torch.uint8)
json.dump({
    "pixels": pixels.tolist(), "ids": ids.tolist(), "same": same, "raw": model.captioner.encode(raw).tolist(),
    "prefixed": model.generate(pixels, max_new_tokens=3, prefix="a red")[:, :2].tolist(),
    "words": tokenizer.batch_decode(ids, skip_special_tokens=True), "modules": sorted(sys.modules)}, open("found.json", "w"))
"""


DINOV3 = {
    "vision_positions": "rotary",
    "vision_layer_scale": True,
    "vision_registers": 2,
    "vision_activation": "swiglu",
}


@pytest.mark.parametrize(("prefix_length", "vision"), [(None, {}), (3, {}), (None, DINOV3)])
def test_a_stranger_loads_it(tmp_path, scenes_tokenizer, prefix_length, vision):
    """A module that says `from config import ...` is refused by transformers, but not inside our own folder."""
    torch.manual_seed(0)
    fields = dict(
        bridge="prefix", prefix_length=prefix_length, vocab_size=len(scenes_tokenizer), max_length=40, **vision
    )
    model = ImageCaptionModel(tiny_config(image_size=16, resize_size=20, image_mean=(0.4, 0.5, 0.6), **fields)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.tokenizer = scenes_tokenizer
    model.save_pretrained(tmp_path / "model")
    assert ImageCaptionModel.from_pretrained(tmp_path / "model").config == model.config  # the same folder is ours too
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures.json").write_text(json.dumps(PICTURES.tolist()))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "model"), str(tmp_path / "pictures.json")],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "empty" / "found.json").read_text())
    with torch.no_grad():
        expected = model.generate(torch.tensor(found["pixels"]), max_length=7, num_beams=3).sequences
        raw = model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert found["ids"] == expected.tolist() and len({tuple(row) for row in found["ids"]}) > 1
    assert found["same"] and found["words"] == scenes_tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert found["prefixed"] == [scenes_tokenizer("a red").input_ids] * 3
    torch.testing.assert_close(torch.tensor(found["raw"]), raw)  # the colours' mean and spread are in no file
    assert not {"config", "model", "generation", "packed"} & set(found["modules"])


def test_the_module_stands_by_itself(tmp_path):
    """Every name that it uses is in it, and pictures are captioned with it alone."""
    code = remote_code()
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F4,F63,F7,F811", "-"],
        input=code,
        text=True,
        capture_output=True,
    )
    assert ruff.returncode == 0 or "No module named ruff" in ruff.stderr, ruff.stdout
    assert not any(f"import {name}" in code for name in ("packed_model", "merge_adapters", "recorded_model"))
    assert "from model" not in code and ViTGPT2Config.__name__ in code
