"""Decoding: cached equals uncached, a batch equals one by one, beams equal transformers' beams, sampling its masses."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import tiny_config
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model import pair  # noqa: F401  # a fixture

from config import UserError
from decoding.search import sharpen
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


def enders(models) -> tuple:
    """Ours and theirs with an end token likely enough that captions end at different lengths."""
    theirs, ours = models
    with torch.no_grad():
        ours.decoder.wte.weight[60] += 0.12
        theirs.decoder.transformer.wte.weight[60] += 0.12
    return theirs, ours


def both(models, options: dict, prefix: tuple[int, ...] = (), returned: int = 1) -> tuple[list, list]:
    """Captions of the same options by ours and by transformers, each from the same global seed."""
    theirs, ours = models
    torch.manual_seed(5)
    mine = ours.generate(PICTURES, max_length=12, prefix=prefix, num_return_sequences=returned, **options).sequences
    names = {"min_length": "min_new_tokens", "bad_words": "bad_words_ids"}
    torch.manual_seed(5)
    reference = theirs.generate(
        PICTURES,
        max_new_tokens=12,
        decoder_input_ids=torch.tensor([[60, *prefix]]).expand(6, -1),
        decoder_start_token_id=60,
        eos_token_id=60,
        pad_token_id=60,
        num_return_sequences=returned,
        **{names.get(k, k): v for k, v in options.items()},
    )[:, 1:]
    return [until_end(row, 60) for row in mine], [until_end(row, 60) for row in reference]


@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_penalty": 0.0},
        {"length_penalty": 2.0},
        {"length_penalty": -1.0},
        {"min_length": 6},
        {"early_stopping": True},
        {"early_stopping": "never"},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2, "min_length": 8},
        {"bad_words": [[3], [7, 8], [60], [11]]},
        {"bad_words": [[n] for n in range(30)], "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", [(), (5, 9)])
def test_captions_equal_transformers(pair, num_beams, options, prefix):  # noqa: F811
    if num_beams == 1 and set(options) & {"length_penalty", "early_stopping"}:
        pytest.skip("means nothing without beams")
    mine, reference = both(enders(pair), options | {"num_beams": num_beams}, prefix, min(num_beams, 2))
    assert mine == reference
    assert all(caption[: len(prefix)] == list(prefix) for caption in mine)
    assert len({tuple(caption) for caption in mine}) > 1


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0.5, "repetition_penalty": 1.3}], ids=str
)
def test_draws_equal_transformers(pair, num_beams, options):  # noqa: F811
    """Sampling and beam sampling: from equal seeds the same tokens, since masses and their order are the same."""
    if num_beams > 1 and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("transformers before 5.24 leaves beams in the order of drawing")
    options = options | {"do_sample": True, "num_beams": num_beams}
    mine, reference = both(enders(pair), options, returned=3)
    assert mine == reference


def test_banned_words_and_a_prefix_as_text(scenes_tokenizer):
    torch.manual_seed(0)
    model = ImageCaptionModel(tiny_config(vocab_size=len(scenes_tokenizer)))
    model.tokenizer = scenes_tokenizer
    options = dict(prefix="a picture of", do_sample=True, top_k=0, num_return_sequences=20, max_length=12)
    free = scenes_tokenizer.batch_decode(model.generate(PICTURES, **options).sequences)
    tame = scenes_tokenizer.batch_decode(model.generate(PICTURES, **options, bad_words=["red", "left of"]).sequences)
    assert all(text.strip().startswith("a picture of") for text in free + tame)
    assert any(" red" in text for text in free) and not any(" red" in text or "left of" in text for text in tame)


def test_scores_are_the_models_own(pair):  # noqa: F811
    """Whatever was penalised or sharpened on the way: the log probability of each token, and nothing behind the end."""
    _, ours = enders(pair)
    options = dict(max_length=12, prefix=(5, 9), num_return_sequences=2, return_scores=True)
    for found in (
        ours.generate(PICTURES, num_beams=3, repetition_penalty=1.3, **options),
        ours.generate(PICTURES, do_sample=True, temperature=0.5, **options),
    ):
        assert found.token_log_probs.shape == found.sequences.shape
        for row, sequence in enumerate(found.sequences):
            caption = until_end(sequence, 60)
            ends = caption + [60] * (len(caption) < len(sequence))
            ids = torch.tensor([[60, *ends[:-1]]])
            log_probs = ours(PICTURES[row // 2][None], ids).logits[0].log_softmax(-1)
            each = log_probs[range(len(ends)), ends]
            torch.testing.assert_close(found.token_log_probs[row, 2 : len(ends)], each[2:], rtol=1e-4, atol=1e-4)
            assert (found.token_log_probs[row, len(ends) :] == 0).all() and found.lengths[row] == len(ends) - 2
            assert found.log_probs[row].item() == pytest.approx(each[2:].sum().item(), rel=1e-4)
            assert found.mean_log_probs[row].item() == pytest.approx(each[2:].mean().item(), rel=1e-4)
    plain = ours.generate(PICTURES, num_beams=3, max_length=12, return_scores=True)
    torch.testing.assert_close(plain.scores, plain.mean_log_probs, rtol=1e-4, atol=1e-4)


def test_attention_is_where_the_words_looked(pair):  # noqa: F811
    theirs, ours = pair
    found = ours.generate(PICTURES, max_length=6, num_beams=2, return_attention=True)
    assert found.attention.shape == (*found.sequences.shape, ours.config.num_patches)
    theirs.set_attn_implementation("eager")
    ids = torch.cat([torch.full((6, 1), 60), found.sequences[:, :-1]], 1)
    reference = theirs(pixel_values=PICTURES, decoder_input_ids=ids, output_attentions=True).cross_attentions
    reference = torch.stack(reference).mean((0, 2))[:, :, 1:]
    torch.testing.assert_close(found.attention, reference, rtol=1e-4, atol=1e-5)


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
@example(logits=[5.0, -2.0], temperature=0.25, top_k=0, top_p=1.0)
def test_sampling_keeps_the_best_and_their_proportions(logits, temperature, top_k, top_p):
    sharpened = sharpen(torch.tensor([logits], dtype=torch.float64), temperature, top_k, top_p)
    probabilities = sharpened.softmax(-1)[0]
    whole = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1)
    kept = probabilities > 0
    assert probabilities.sum().item() == pytest.approx(1)
    assert whole[kept].min() >= whole[~kept].max() if (~kept).any() else True
    if top_k:
        assert kept.sum() <= top_k
    torch.testing.assert_close(probabilities[kept], whole[kept] / whole[kept].sum())
    allowed = whole.sort(descending=True).values[: top_k or None]
    allowed = allowed / allowed.sum()
    # Rounding decides where the better ones hold just top_p: two logits far apart failed here once with top_p = 1.
    before = allowed.cumsum(0)[:-1]
    fewest, most = (1 + int((before < top_p + slack).sum()) for slack in (-1e-9, 1e-9))
    assert fewest <= kept.sum() <= most


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws against the masses that top_k, top_p and temperature leave."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
    masses = sharpen(logits, 0.8, 5, 0.95).softmax(-1)[0]
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(masses, 20_000, replacement=True, generator=generator).bincount(minlength=6)
    kept = masses > 0
    assert kept.tolist() == [True, True, True, True, False, False] and (draws[~kept] == 0).all()
    expected = 20_000 * masses[kept]
    assert ((draws[kept] - expected) ** 2 / expected).sum() < 16.3  # 0.1 % of honest draws exceed it (3 degrees)


def test_captions_do_not_depend_on_their_batch_mates(tiny_model):
    options = dict(max_length=10, do_sample=True, num_return_sequences=2)
    options |= dict(repetition_penalty=1.2, no_repeat_ngram_size=2, top_k=1)
    together = tiny_model.generate(PICTURES, **options).sequences
    for n, picture in enumerate(PICTURES):
        alone = tiny_model.generate(picture[None], **options).sequences
        for row, other in zip(alone, together[2 * n : 2 * n + 2], strict=True):
            assert until_end(row, 49) == until_end(other, 49)


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
        ({"prefix": [1] * 20, "max_length": 5}, "after a prefix of 20 tokens"),
        ({"prefix": [1] * 30}, "prefix of 30 tokens leaves no room in the model's 24 positions: shorten it"),
        ({"prefix": [-1]}, "prefix: the model has no token -1: use ids from 0 to"),
        ({"bad_words": [[7], []]}, r"bad_words: \[\] has no tokens: remove it"),
        ({"bad_words": [" "]}, "bad_words: ' ' has no tokens"),
        ({"bad_words": [[3, 99_999]]}, "bad_words: the model has no token 99999"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"num_beams": 2, "num_return_sequences": 3, "do_sample": True}, "3 captions a picture"),
        ({"do_sample": True, "temperature": 0.0}, "temperature > 0"),
        ({"num_return_sequences": 2}, "2 captions a picture"),
    ],
)
def test_options_that_do_not_go_together(tiny_model, options, words):
    """A prefix longer than the model, a word of no token and ids that the model lacks ended in a line of torch's."""
    with pytest.raises(UserError, match=words):
        tiny_model.generate(PICTURES, **({"max_length": 8} | options))


@pytest.mark.parametrize("most", [255.0, float("nan")])
def test_float_pixels_that_are_not_normalised_are_refused(tiny_model, most):
    """Floats of 0 to 255 were taken for normalised numbers, and captioned as noise."""
    pixels = torch.rand(2, 3, 16, 16)
    tiny_model.generate(pixels, max_length=2)
    pixels[0, 0, 0, 0] = most
    with pytest.raises(UserError, match=r"pixel_values is float and reaches .*: pass uint8, or normalised numbers"):
        tiny_model.generate(pixels, max_length=2)


def test_half_precision_decodes(tiny_model):
    with torch.autocast("cpu", torch.bfloat16):
        sequences = tiny_model.generate(PICTURES, max_length=8, num_beams=3).sequences
    assert sequences.dtype == torch.int64 and len(sequences) == 6


def test_widths_that_differ():
    model = ImageCaptionModel(tiny_config(vision_embed_dim=48, vision_num_heads=3))
    assert model.generate(PICTURES, max_length=3, num_beams=2).sequences.shape[0] == 6
