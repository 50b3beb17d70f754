"""Tokens by onnxruntime: the same captions as torch's in fp32, near ones in 8 bits, when it pays, and never stale ones."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import needs_package, random_model, tiny_config

from captioning import engine
from captioning.engine import CALLS, MOST_ROWS, Graph, find_engine, in_words, make_session
from captioning.pipeline import caption_batch
from decoding.search import fast_copy
from model import ImageCaptionModel

pytestmark = [needs_package("onnx", "onnx"), needs_package("onnxruntime", "onnx")]

PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def made(width: int = 64, **more) -> ImageCaptionModel:
    return random_model(tiny_config(decoder_embed_dim=width, vocab_size=96, **more), std=0.15)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2, "prefix": [5, 9, 7]},
    {"do_sample": True, "num_return_sequences": 3}, {"repetition_penalty": 1.5, "return_scores": True}])  # fmt: skip
@pytest.mark.parametrize("width", [64, 40])
def test_the_same_captions_as_torchs(options, width):
    """By every search, of several pictures and rows, that change their places among the beams."""
    model, found = made(width), []
    for now in (None, find_engine("fp32", after=0)):
        random = torch.Generator().manual_seed(3) if options.get("do_sample") else None
        found.append(model.generate(PICTURES, max_length=12, engine=now, generator=random, **options))
    assert model.copies.made["onnxruntime"] is not None
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert len({tuple(row.tolist()) for row in found[0].sequences}) > 2


def test_its_logits_are_torchs_and_in_8_bits_near_them():
    model, threads = made(), torch.get_num_threads()
    tokens = torch.randint(0, 96, (8, 3), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = model.encode(PICTURES)
        plain = model.decoder.next_logits(tokens, model.decoder.new_cache(hidden, 8, 5))
        for precision, close in (("fp32", 1e-5), ("int8", 0.04)):
            fast = fast_copy(model, False, 8)
            decoder = find_engine(precision, after=0)(model, fast, 8)
            off = (decoder.next_logits(tokens, decoder.new_cache(hidden, 8, 5)) - plain).abs().max()
            assert off < close * plain.abs().max() and (precision == "fp32" or off > 0)
            model.copies.drop()
            torch.set_num_threads(threads)


def product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x times a weight in 8 bits."""
    graph = Graph(int8=True)
    graph.product("x", weight, "y")
    graph.inputs, graph.outputs = {"x": ["R", weight.shape[1]]}, ["y"]
    return torch.from_numpy(make_session(graph).run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("shape", [(768, 3072), (96, 40), (50, 200)])
def test_8_bits_are_right_for_any_weights(shape):
    """Products that saturate 16 bits were 21 to 92 % off: the largest weights against the largest numbers."""
    torch.manual_seed(0)
    x = torch.randn(8, shape[1])
    for weight in (torch.randn(shape), torch.ones(shape), torch.randn(shape).sign()):
        for given in (x, torch.ones_like(x), x.sign()):
            exact = given @ weight.T
            assert (product(weight, given) - exact).norm() < 0.02 * exact.norm()


def test_rows_in_8_bits_do_not_touch_each_other():
    """One scale for all rows would make a caption depend on its batch mates."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 256), torch.randn(2, 256)
    beside = product(weight, torch.stack([x[0], 1000 * x[1]]))[0]
    assert torch.allclose(product(weight, x[:1])[0], beside, rtol=1e-5, atol=1e-5)


def test_it_is_made_when_it_pays_and_forgotten_with_the_weights(monkeypatch, scenes_tokenizer):
    """A second's work for the one caption that somebody wants would make it slower."""
    model, sessions = made(), []
    model.tokenizer = scenes_tokenizer
    monkeypatch.setattr(engine, "make_session", lambda graph: sessions.append(graph) or make_session(graph))
    pixels = (PICTURES * 20 + 128).clamp(0, 255).to(torch.uint8)
    monkeypatch.setattr("captioning.pipeline.decode", lambda tokenizer, tokens: [str(row) for row in tokens.tolist()])
    many = pixels[:1].expand(MOST_ROWS + 1, -1, -1, -1)
    expected = caption_batch(model, pixels, "fp32", max_length=6)
    for _ in range(CALLS - 1):
        caption_batch(model, pixels, "fp32", max_length=6)
    caption_batch(model, many, "fp32", max_length=6)
    assert not sessions
    assert caption_batch(model, pixels, "fp32", max_length=6) == expected and len(sessions) == 1
    caption_batch(model, pixels, "fp32", max_length=6)
    assert len(sessions) == 1 and "onnxruntime" in model.copies.made
    with torch.no_grad():
        model.decoder.wte.weight.mul_(1.5)
    caption_batch(model, pixels, "fp32", max_length=6)
    assert len(sessions) == 1 and "onnxruntime" not in model.copies.made


def test_without_it_torch_goes_on(monkeypatch, capsys):
    """No packages, another precision, or a version that cannot run the graph."""
    model, threads = made(), torch.get_num_threads()
    assert (
        find_engine("half") is None and in_words("half") == "torch" and "onnxruntime for up to 16" in in_words("int8")
    )
    expected = model.generate(PICTURES, max_length=6).sequences
    monkeypatch.setattr(engine, "make_session", lambda graph: 1 / 0)
    for _ in range(2):
        found = model.generate(PICTURES, max_length=6, engine=find_engine("fp32", after=0)).sequences
        assert torch.equal(found, expected)
    assert capsys.readouterr().err == "onnxruntime cannot be used, continuing with torch (division by zero)\n"
    assert torch.get_num_threads() == threads
    find_engine.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert find_engine("int8") is None and "pip install -r requirements/onnx.txt" in in_words("int8")
    find_engine.cache_clear()


def test_threads_are_given_back():
    """Torch's wait by spinning, so that it has one while onnxruntime computes."""
    model, threads = made(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model.generate(PICTURES, max_length=6, engine=find_engine("fp32", after=0))
        assert torch.get_num_threads() == 2 and model.copies.made["onnxruntime"] is not None
    finally:
        torch.set_num_threads(threads)
