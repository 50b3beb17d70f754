"""ONNX files: the same tokens through onnxruntime and through transformers.js in Node."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_package, tiny_config
from PIL import Image
from processes import finished

from captioning.onnx import quantize, save_onnx, to_file
from config import UserError
from convert import save_transformers
from dataset import decode, prepare_picture
from decoding.cache import DecoderCache
from model import GPT2Decoder, ImageCaptionModel

pytestmark = needs_package("onnxruntime", "onnx")
PICTURES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Session(torch.nn.Module):
    """The files through onnxruntime, with as much of a decoder's face as decoding/search.py's loops look at."""

    def __init__(self, folder: Path, model: ImageCaptionModel, suffix: str = "") -> None:
        from onnxruntime import InferenceSession

        super().__init__()

        def open_file(name: str) -> InferenceSession:
            return InferenceSession(folder / "onnx" / f"{name}{suffix}.onnx")

        self.encoder, self.decoder, self.config = (
            open_file("encoder_model"),
            open_file("decoder_model_merged"),
            model.config,
        )
        self.past_names = [i.name for i in self.decoder.get_inputs()][2:]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.encoder.run(["last_hidden_state"], {"pixel_values": pixels.numpy()})[0])

    def new_cache(self, states: torch.Tensor, rows: int, max_length: int) -> DecoderCache:
        heads = self.config.decoder_num_heads
        empty = torch.zeros(rows, heads, 0, self.config.decoder_embed_dim // heads)
        states = states.repeat_interleave(rows // len(states), 0)
        return OnnxCache([(states,)], [empty for _ in self.past_names])

    def forward(self, tokens: torch.Tensor, cross: list, cache: DecoderCache) -> torch.Tensor:
        feeds = {"input_ids": tokens.numpy(), "encoder_hidden_states": cross[0][0].numpy()}
        feeds |= {name: past.numpy() for name, past in zip(self.past_names, cache.own, strict=True)}
        logits, *present = self.decoder.run(None, feeds)
        cache.own = [torch.from_numpy(part) for part in present]
        return torch.from_numpy(logits)

    next_logits = GPT2Decoder.next_logits

    def head(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class OnnxCache(DecoderCache):
    def reorder(self, rows: torch.Tensor) -> None:
        self.own = [past[rows] for past in self.own]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, scenes_tokenizer) -> tuple[Path, ImageCaptionModel]:
    torch.manual_seed(0)
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), scenes_tokenizer.eos_token_id)
    # Encoder and decoder of different width; 64 wide, as onnxruntime's 8-bit products like it
    model = ImageCaptionModel(tiny_config(vocab_size=len(scenes_tokenizer), decoder_embed_dim=64, **ids)).eval()
    model.tokenizer = scenes_tokenizer
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("onnx") / "model"
    save_onnx(model, folder, int8=True)
    return folder, model


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prefix", [(), (7, 8, 9)])
def test_onnxruntime_gives_the_same_tokens(exported, num_beams, prefix, monkeypatch):
    folder, model = exported
    options = dict(max_length=12, num_beams=num_beams, prefix=prefix)
    expected = model.generate(PICTURES, **options).sequences
    assert len({tuple(row.tolist()) for row in expected}) > 2
    session, twin = Session(folder, model), copy.copy(model)
    twin._modules = {**model._modules, "decoder": session}
    twin.encode = session.encode
    monkeypatch.setattr("decoding.search.fast_copy", lambda model, int8, rows: model)
    assert torch.equal(twin.generate(PICTURES, **options).sequences, expected)


def test_onnxruntime_takes_any_batch(exported):
    """The batch was written into the encoder as the example's, because of a len() of a tensor."""
    folder, model = exported
    session = Session(folder, model)
    with torch.no_grad():
        expected = torch.cat([layer.c_attn(model.encode(PICTURES)) for layer in model.decoder.cross_attentions()], -1)
    for number in (1, 2, 5):
        assert (session.encode(PICTURES[:number]) - expected[:number]).abs().max() < 1e-5


def test_logits_after_any_past(exported):
    """One example tensor for all layers' past had been taken for one input, so that all layers read the first one's."""
    folder, model = exported
    session, ids = Session(folder, model), torch.arange(1, 11).view(2, 5)
    states, pixels = session.encode(PICTURES[:2]), PICTURES[:2]
    with torch.no_grad():
        expected = model(pixels, ids).logits
    for parts in ([5], [1, 1, 1, 1, 1], [2, 3]):
        cache = session.new_cache(states, 2, 5)
        for part in ids.split(parts, 1):
            logits = session(part, cache.cross, cache)
        assert (logits[:, -1] - expected[:, -1]).abs().max() < 1e-4


def test_eight_bits_are_smaller_and_near(exported):
    folder, model = exported
    for name in ("encoder_model", "decoder_model_merged"):
        sizes = [(folder / "onnx" / f"{name}{suffix}.onnx").stat().st_size for suffix in ("", "_quantized")]
        assert sizes[1] < 0.6 * sizes[0]
    near = Session(folder, model, "_quantized").encode(PICTURES)
    exact = Session(folder, model).encode(PICTURES)
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max()


def caption_in_node(folder: Path, dtype: str, pictures: list[Path]) -> list[str]:
    if shutil.which("node") is None or not (ROOT / "tests" / "node_modules" / "@huggingface" / "transformers").exists():
        pytest.skip("needs Node and transformers.js: npm install --prefix tests --ignore-scripts")
    command = ["node", ROOT / "tests" / "caption.mjs", folder, dtype, *pictures]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_js_gives_the_same_captions(exported, tmp_path):
    folder, model = exported
    rng = np.random.default_rng(0)
    pictures = [tmp_path / f"{i}.png" for i in range(3)]
    for path in pictures:  # of the model's own size: whose resampling is the better one is not the question here
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    pixels = torch.stack([prepare_picture(path, model.config) for path in pictures])
    expected = decode(model.tokenizer, model.generate(pixels, max_length=12).sequences)
    assert len(set(expected)) > 1
    assert caption_in_node(folder, "fp32", pictures) == expected
    assert all(caption_in_node(folder, "q8", pictures))


def test_a_missing_package_is_one_line(exported, tmp_path):
    _, model = exported
    model.save_file(tmp_path / "m.safetensors")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n_find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'onnxscript' else _find(name, *rest)\n"
    )
    command = ("convert.py", "onnx", tmp_path / "m.safetensors", tmp_path / "out")
    done = finished(*command, environment={"PYTHONPATH": tmp_path}, code=2)
    assert "requirements/onnx.txt" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_only_folders_of_our_own_are_replaced(exported, tmp_path):
    folder, model = exported
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        save_onnx(model, tmp_path / "theirs")
    shutil.copytree(folder, tmp_path / "ours")
    save_onnx(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "onnx" / "encoder_model.onnx").exists()


def test_weights_and_onnx_files_do_not_replace_each_other(exported, tmp_path):
    """ONNX files written into a folder of to-transformers took the place of its weights."""
    folder, model = exported
    save_transformers(model, tmp_path / "theirs")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        save_onnx(model, tmp_path / "theirs")
    with pytest.raises(UserError, match="onnx"):
        save_transformers(model, folder)
    assert (folder / "onnx" / "encoder_model.onnx").exists() and (tmp_path / "theirs/model.safetensors").exists()


def test_a_folder_of_onnx_files_is_no_model_here(exported):
    with pytest.raises(UserError, match="has ONNX files"):
        ImageCaptionModel.from_pretrained(exported[0])


def test_the_model_stays_as_it_was(exported, tmp_path):
    _, model = exported
    half = copy.deepcopy(model).bfloat16().train()
    save_onnx(half, tmp_path / "half")
    assert half.training and half.decoder.wte.weight.dtype == torch.bfloat16


class Product(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_eight_bits_do_not_overflow_without_vnni(exported, tmp_path):
    """A CPU with AVX2 alone adds two products of 8 bits in 16, which large weights of one sign overflow: logits were wrong
    by 26 %. So weights use 7 bits; the files say so on any machine, and where there is such a CPU its products do."""
    import onnx
    import onnxruntime

    for name in ("encoder_model", "decoder_model_merged"):
        graph = onnx.load(exported[0] / "onnx" / f"{name}_quantized.onnx").graph
        eights = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
        assert len(eights) > 4 and all(abs(weights.astype(int)).max() <= 64 for weights in eights if weights.size > 1)
    layer = Product(0.9 + 0.1 * torch.rand(64, 32))  # all large, all of one sign
    x = torch.rand(3, 64) + 1
    to_file(layer, {"x": (x, {0: torch.export.Dim("rows")})}, ["y"], tmp_path / "layer.onnx")
    quantize(tmp_path / "layer.onnx", tmp_path / "layer8.onnx")
    (y,) = onnxruntime.InferenceSession(tmp_path / "layer8.onnx").run(None, {"x": x.numpy()})
    exact = layer(x).detach().numpy()
    assert abs(y - exact).max() < 0.02 * abs(exact).max()


def test_files_do_not_say_where_they_were_made(exported):
    """Each node carried the stack trace of its export: 62 lines with this machine's paths."""
    folder, _ = exported
    files = list(folder.rglob("*.onnx"))
    assert len(files) >= 2
    for file in files:
        content = file.read_bytes()
        for secret in (str(ROOT), str(Path.home()) + "/", '.py"', "stack_trace", "site-packages", sys.prefix):
            assert secret.encode() not in content, (file.name, secret)
