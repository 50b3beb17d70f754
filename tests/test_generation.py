"""Decoding: cached equals uncached, a batch equals one by one, beams equal transformers' beams, sampling its masses."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import pair  # noqa: F401  # a fixture

from config import UserError
from generation import sampling_probabilities
from model import ImageCaptionModel

PICTURES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def uncached_greedy(model: ImageCaptionModel, pixels: torch.Tensor, max_length: int) -> torch.Tensor:
    ids = torch.full((len(pixels), 1), model.config.start_token_id)
    with torch.no_grad():
        for _ in range(max_length):
            ids = torch.cat([ids, model(pixels, ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, 1:]


def until_end(row: torch.Tensor, end: int) -> list[int]:
    tokens = row.tolist()
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_cached_equals_uncached(tiny_model):
    end = tiny_model.config.end_token_id
    expected = uncached_greedy(tiny_model, PICTURES, 20)
    found = tiny_model.generate(PICTURES, max_length=20).sequences
    assert len({tuple(row.tolist()) for row in expected}) > 2  # the pictures must matter for this to say anything
    for row, other in zip(expected, found, strict=True):
        assert until_end(row, end) == until_end(other, end)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_equals_one_by_one(tiny_model, num_beams):
    options = dict(max_length=15, num_beams=num_beams)
    end = tiny_model.config.end_token_id
    together = tiny_model.generate(PICTURES, **({"max_length": 8} | options)).sequences
    for picture, row in zip(PICTURES, together, strict=True):
        alone = tiny_model.generate(picture[None], **options).sequences[0]
        assert until_end(alone, end) == until_end(row, end)


@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize(
    "options", [{}, {"length_penalty": 0.0}, {"length_penalty": 2.0}, {"min_length": 6}, {"early_stopping": True}]
)
def test_beams_equal_transformers(pair, num_beams, options):  # noqa: F811
    theirs, ours = pair
    if num_beams == 1 and set(options) & {"length_penalty", "early_stopping"}:
        pytest.skip("means nothing without beams")
    with torch.no_grad():
        ours.decoder.wte.weight[60] += 0.12  # the end token likely enough that captions end at different lengths
        theirs.decoder.transformer.wte.weight[60] += 0.12
    returned = min(num_beams, 2)
    mine = ours.generate(PICTURES, max_length=12, num_beams=num_beams, num_return_sequences=returned, **options)
    names = {"min_length": "min_new_tokens"}
    reference = theirs.generate(
        PICTURES,
        max_new_tokens=12,
        num_beams=num_beams,
        num_return_sequences=returned,
        decoder_start_token_id=60,
        eos_token_id=60,
        pad_token_id=60,
        **{names.get(k, k): v for k, v in options.items()},
    )[:, 1:]
    assert [until_end(row, 60) for row in mine.sequences] == [until_end(row, 60) for row in reference]


def test_min_length_and_max_length_count_the_end_token(tiny_model):
    end = tiny_model.config.end_token_id
    with torch.no_grad():
        tiny_model.decoder.ln_f.bias += 5 * tiny_model.decoder.wte.weight[end]  # wants to end at once
    assert tiny_model.generate(PICTURES, max_length=9).sequences.shape == (6, 1)
    sequences = tiny_model.generate(PICTURES, min_length=4, max_length=9).sequences
    assert (sequences[:, :4] != end).all() and (sequences[:, 4] == end).all()
    assert tiny_model.generate(PICTURES, min_length=4, max_length=9, num_beams=3).sequences.shape == (6, 5)


def test_sampling_is_repeatable_and_varied(tiny_model):
    def sample(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        options = dict(do_sample=True, num_return_sequences=4, temperature=1.5, generator=generator)
        return tiny_model.generate(PICTURES, max_length=10, **options).sequences

    assert sample(0).shape[0] == 24
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_top_k_of_one_is_greedy(tiny_model):
    greedy = tiny_model.generate(PICTURES, max_length=10).sequences
    assert torch.equal(greedy, tiny_model.generate(PICTURES, max_length=10, do_sample=True, top_k=1).sequences)


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=12, unique=True),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
)
def test_sampling_keeps_the_best_and_their_proportions(logits, temperature, top_k, top_p):
    probabilities = sampling_probabilities(torch.tensor([logits], dtype=torch.float64), temperature, top_k, top_p)[0]
    whole = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1)
    kept = probabilities > 0
    assert probabilities.sum().item() == pytest.approx(1)
    assert whole[kept].min() >= whole[~kept].max() if (~kept).any() else True
    if top_k:
        assert kept.sum() <= top_k
    torch.testing.assert_close(probabilities[kept], whole[kept] / whole[kept].sum())
    allowed = whole.sort(descending=True).values[: top_k or None]
    allowed = allowed / allowed.sum()
    assert kept.sum() == 1 + int((allowed.cumsum(0)[:-1] < top_p - 1e-12).sum())


def test_generate_leaves_the_mode_as_it_was(tiny_model):
    tiny_model.train()
    tiny_model.generate(PICTURES, max_length=2)
    assert tiny_model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 25}, "max_length 25"),
        ({"max_length": 0}, "max_length 0"),
        ({"min_length": 9, "max_length": 8}, "min_length 9"),
        ({"do_sample": True, "num_beams": 2}, "choose one"),
        ({"do_sample": True, "temperature": 0.0}, "temperature > 0"),
        ({"num_return_sequences": 2}, "2 captions a picture"),
    ],
)
def test_options_that_do_not_go_together(tiny_model, options, words):
    with pytest.raises(UserError, match=words):
        tiny_model.generate(PICTURES, **({"max_length": 8} | options))


def test_half_precision_decodes(tiny_model):
    with torch.autocast("cpu", torch.bfloat16):
        sequences = tiny_model.generate(PICTURES, max_length=8, num_beams=3).sequences
    assert sequences.dtype == torch.int64 and len(sequences) == 6


def test_widths_that_differ():
    model = ImageCaptionModel(tiny_config(vision_embed_dim=48, vision_num_heads=3))
    assert model.generate(PICTURES, max_length=3, num_beams=2).sequences.shape[0] == 6
