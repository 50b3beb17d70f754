"""Recorded steps: on a CPU the same static shapes without a graph, on a GPU the graph itself."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config

from decoding import search
from decoding.recorded import StaticCache, recorded_model
from model import GPT2Decoder

PICTURES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def latest(model) -> StaticCache:
    """The cache used last."""
    return list(model.copies.made[torch.float32].decoder.cached.values())[-1]


@pytest.fixture
def static(monkeypatch):
    """generate by static shapes on a CPU too."""
    monkeypatch.setattr("decoding.search.fast_copy", lambda model, int8, rows: recorded_model(model, torch.float32))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prefix", [(), (7, 8)])
def test_static_shapes_give_the_same_tokens(tiny_model, num_beams, prefix, request):
    options = dict(max_length=12, num_beams=num_beams, prefix=prefix, return_scores=True)
    expected = [tiny_model.generate(part, **options) for part in PICTURES.split(3)]
    request.getfixturevalue("static")
    found, caches = [], set()
    for part in PICTURES.split(3):  # the second goes through the cache of the first
        found.append(tiny_model.generate(part, **options))
        caches.add(id(latest(tiny_model)))
    assert len(caches) == 1 and isinstance(latest(tiny_model), StaticCache)
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours.sequences, plain.sequences)
        assert torch.allclose(ours.token_log_probs, plain.token_log_probs, atol=1e-4)
    assert len({tuple(row.tolist()) for part in found for row in part.sequences}) > 3


def test_two_shapes_stay_recorded(tiny_model, static):
    """Training by rewards draws several captions of a picture and takes the greedy one besides: each was recorded anew at
    every step."""
    caches = []
    for _ in range(2):
        for options in ({"do_sample": True, "num_return_sequences": 2}, {}):
            tiny_model.generate(PICTURES, max_length=8, **options)
            caches.append(latest(tiny_model))
    assert caches[0] is caches[2] and caches[1] is caches[3] and caches[0] is not caches[1]
    tiny_model.generate(PICTURES[:2], max_length=8)
    assert len(tiny_model.copies.made[torch.float32].decoder.cached) == 2, "they take memory"


def test_the_copys_head_is_aligned(tiny_model):
    """50,257 columns took an H100 six times as long as 50,304, in training too."""
    twin = recorded_model(tiny_model, torch.bfloat16)
    vocabulary, hidden = tiny_model.config.vocab_size, torch.randn(3, 32).bfloat16()
    assert len(twin.decoder.decoder.wte.weight) % 64 == 0 and vocabulary % 64
    logits = twin.decoder.head(hidden)
    assert logits.shape == (3, vocabulary)
    torch.testing.assert_close(logits, hidden @ tiny_model.decoder.wte.weight.bfloat16().T)


def test_a_broken_picture_spoils_no_later_one(tiny_model, static, monkeypatch):
    """What stood in the kept cache was behind the mask, but a weight of 0 times NaN is NaN."""
    monkeypatch.setattr(search, "check_normalised", lambda largest: None)  # which refuses such a picture
    expected = tiny_model.generate(PICTURES[:1], max_length=8).sequences
    tiny_model.generate(torch.full_like(PICTURES[:1], torch.nan), max_length=8)
    assert torch.equal(tiny_model.generate(PICTURES[:1], max_length=8).sequences, expected)


def test_a_failed_recording_is_not_kept(tiny_model, static, monkeypatch):
    tiny_model.generate(PICTURES[:1], max_length=4)
    monkeypatch.setattr(GPT2Decoder, "static_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_model.generate(PICTURES[:2], max_length=4)
    monkeypatch.undo()
    assert tiny_model.generate(PICTURES[:2], max_length=4).sequences.shape == (2, 4)


def test_other_shapes_get_another_cache(tiny_model, static):
    """Lengths are rounded up to a multiple of 8, as attention would copy another mask in every layer."""
    for pictures, length in ((PICTURES, 5), (PICTURES[:2], 7), (PICTURES[:2], 9)):
        rows = tiny_model.generate(pictures, max_length=length).sequences
        kept = latest(tiny_model)
        assert kept.own[0].shape[1] == len(pictures) == len(rows) and kept.own[0].shape[2] == (8 if length < 8 else 16)


def test_half_precision_leaves_the_model_alone(tiny_model):
    twin = recorded_model(tiny_model, torch.bfloat16)
    assert (
        twin.decoder.decoder.wte.weight.dtype == torch.bfloat16 and tiny_model.decoder.wte.weight.dtype == torch.float32
    )
    assert twin.encoder.mean.dtype == torch.float32  # pixels are normalised before they are halved
    assert recorded_model(tiny_model, torch.bfloat16) is twin
    with torch.no_grad():
        tiny_model.decoder.ln_f.bias += 1
    assert recorded_model(tiny_model, torch.bfloat16) is twin, "recorded steps stay good for weights that have changed"
    assert torch.equal(twin.decoder.decoder.ln_f.bias, tiny_model.decoder.ln_f.bias.bfloat16())


def test_a_step_in_half_precision(tiny_model):
    """What a GPU does: on a CPU the text's keys and values are fp32 unless they are made to be halves."""
    decoder = recorded_model(tiny_model, torch.bfloat16).decoder
    states = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        cache, plain = decoder.new_cache(states, 6, 9), decoder.decoder.new_cache(states, 6, 9)
        cache.own = [own.bfloat16() for own in cache.own]
        for tokens in torch.randint(0, 30, (6, 9), generator=torch.Generator().manual_seed(3)).split(1, 1):
            found, expected = decoder.next_logits(tokens, cache), decoder.decoder.next_logits(tokens, plain)
            assert found.dtype == torch.float32 and (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_recorded_steps_on_the_gpu_give_the_same_tokens(num_beams):
    model = random_model(tiny_config(decoder_embed_dim=64), std=0.2)
    options = dict(max_length=12, num_beams=num_beams)
    expected = [model.generate(part, **options).sequences for part in PICTURES.split(3)]
    model.cuda()
    for part, rows in zip(PICTURES.split(3), expected, strict=True):
        assert torch.equal(model.generate(part.cuda(), **options).sequences.cpu(), rows)
    assert latest(model).graph is not None
