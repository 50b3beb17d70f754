"""The picture as a prefix: logits and tokens against transformers' GPT-2 fed with inputs_embeds, and what K captions share."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file

from captioning.onnx import save_onnx
from config import TrainConfig, UserError
from convert import save_transformers
from decoding.packed import available
from decoding.recorded import recorded_model
from model import ImageCaptionModel
from training.estimates import step_operations
from training.optimizers import build_optimizers
from weights.file import part_of
from weights.huggingface import rename, tensor_names

PICTURES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
END = 60


def spread(model: torch.nn.Module) -> None:
    """Weights wide enough that pictures and words matter."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)


@pytest.fixture(params=[None, 3], ids=["all-states", "pooled"])
def pair(request):
    """Our prefix model and transformers' GPT-2 with its decoder's weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = tiny_config(bridge="prefix", prefix_length=request.param, vocab_size=61, max_length=32)
    ours = ImageCaptionModel(config).eval()
    spread(ours)
    with torch.no_grad():
        ours.decoder.wte.weight[END] += 0.12  # likely enough that captions end at different lengths
    theirs = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=61, bos_token_id=END, eos_token_id=END)
    ).eval()
    names = [name for name in tensor_names(config, gpt2="transformer.") if name.ours.startswith("decoder.")]
    weights = rename(ours.state_dict(), names)
    missing, unknown = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unknown
    return theirs, ours


def embedded(models, ids: torch.Tensor, pictures: torch.Tensor = PICTURES) -> torch.Tensor:
    """(N, T) ids behind the prefixes of N pictures, as transformers' inputs_embeds (N, S + T, D)."""
    _, ours = models
    return torch.cat([ours.encode(pictures), ours.decoder.wte(ids)], 1)


@pytest.mark.parametrize("captions", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_logits_equal_transformers(pair, captions, padded):
    """A prefix with the wrong positions, or one that a caption's words can reach, would differ."""
    theirs, ours = pair
    ids = torch.randint(0, 61, (6, captions, 9))
    lengths = torch.randint(3, 10, (6, captions)) if padded else torch.full((6, captions), 9)
    real = torch.arange(9) < lengths.unsqueeze(-1)
    mine = ours(PICTURES, ids if captions > 1 else ids[:, 0]).logits.view(6, captions, 9, -1)
    repeated = PICTURES.repeat_interleave(captions, 0)
    mask = torch.cat([torch.ones(6 * captions, ours.config.prefix_positions), real.flatten(0, 1)], 1).long()
    reference = theirs(inputs_embeds=embedded(pair, ids.flatten(0, 1), repeated), attention_mask=mask).logits
    reference = reference[:, ours.config.prefix_positions :].view(6, captions, 9, -1)
    assert reference[real].std() > 0.3  # or the comparison would say little
    assert (mine - reference)[real].abs().max() < 1e-5
    labels = ids.masked_fill(~real, -100)
    loss = torch.nn.functional.cross_entropy(reference.flatten(0, 2), labels.flatten(), ignore_index=-100)
    assert ours(PICTURES, ids, lengths, labels).loss.item() == pytest.approx(loss.item(), abs=1e-5)


def gradients(model: ImageCaptionModel, *inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_shared_prefix_learns_what_separate_passes_learn(pair):
    """The prefix is read once for five captions: its gradient must be the sum of theirs, to every part of the model."""
    _, ours = pair
    ids, lengths = torch.randint(0, 61, (6, 5, 9)), torch.randint(1, 10, (6, 5))
    labels = ids.roll(-1, -1).masked_fill(torch.arange(9) >= lengths.unsqueeze(-1), -100)
    together = gradients(ours, PICTURES, ids, lengths, labels)
    apart: dict[str, torch.Tensor] = {}
    for k in range(5):
        share = lengths[:, k].sum() / lengths.sum()
        for name, gradient in gradients(ours, PICTURES, ids[:, k], lengths[:, k], labels[:, k]).items():
            apart[name] = apart.get(name, 0) + share * gradient
    for name, gradient in together.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, apart[name], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(pair):
    _, ours = pair
    ids = torch.randint(0, 61, (6, 2, 5))
    plain = gradients(ours, PICTURES, ids, None, ids)
    ours.set_gradient_checkpointing()
    for name, gradient in gradients(ours, PICTURES, ids, None, ids).items():
        torch.testing.assert_close(gradient, plain[name])


# Decoding


def until_end(row: torch.Tensor) -> list[int]:
    tokens = row.tolist()
    return tokens[: tokens.index(END)] if END in tokens else tokens


OPTIONS = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 2, "early_stopping": True, "min_length": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_captions_equal_transformers(pair, options):
    """Greedy and beams: the prefix's keys and values, computed once, serve every row of the cache."""
    theirs, ours = pair
    mine = ours.generate(PICTURES, max_length=12, **options).sequences
    start = torch.full((6, 1), END)
    names = {"min_length": "min_new_tokens"}
    reference = theirs.generate(
        inputs_embeds=embedded(pair, start),
        attention_mask=torch.ones(6, ours.config.prefix_positions + 1, dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=END,
        **{names.get(name, name): value for name, value in options.items()},
    )
    assert [until_end(row) for row in mine] == [until_end(row) for row in reference]
    assert len({tuple(row.tolist()) for row in mine}) > 2


def test_cached_equals_uncached_and_scores_are_the_models(pair):
    """A prefix of words behind the picture's prefix, samples, and the log probabilities of what was written."""
    _, ours = pair
    options = dict(max_length=8, prefix=[4, 5], do_sample=True, num_return_sequences=3, return_scores=True)
    torch.manual_seed(3)
    found = ours.generate(PICTURES, **options)
    read = torch.cat([torch.full((18, 1), END), found.sequences[:, :-1]], 1)
    with torch.no_grad():
        logits = ours(PICTURES, read.view(6, 3, -1)).logits.flatten(0, 1)
    expected = logits.log_softmax(-1).gather(-1, found.sequences.unsqueeze(-1)).squeeze(-1)
    written = found.token_log_probs != 0
    torch.testing.assert_close(found.token_log_probs[written], expected[written], rtol=1e-4, atol=1e-5)
    assert written.any() and not written[:, :2].any()
    assert torch.equal(found.sequences[:, :2], torch.tensor([[4, 5]]).expand(18, -1))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_static_shapes_give_the_same_tokens(pair, num_beams, monkeypatch):
    """The recorded step, without a graph: a second batch goes through the first one's cache."""
    _, ours = pair
    expected = [ours.generate(part, max_length=9, num_beams=num_beams).sequences for part in PICTURES.split(3)]
    monkeypatch.setattr("decoding.search.fast_copy", lambda model, int8, rows: recorded_model(model, torch.float32))
    for part, rows in zip(PICTURES.split(3), expected, strict=True):
        assert torch.equal(ours.generate(part, max_length=9, num_beams=num_beams).sequences, rows)
    assert ours.copies.made[torch.float32].decoder.cached is not None


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_packed_weights_serve_a_prefix(pair, bf16, int8):
    """bf16 keys met an fp32 cache; and a kernel for a few rows would have read the whole prefix."""
    if not available("int8" if int8 else "bf16"):
        pytest.skip("this CPU has no such kernels")
    _, ours = pair
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        found = ours.generate(PICTURES[:2], max_length=6, num_beams=2, int8=int8, return_scores=True)
    ids = torch.cat([torch.full((2, 1), END), found.sequences[:, :-1]], 1)
    with torch.no_grad():
        exact = ours(PICTURES[:2], ids).logits.log_softmax(-1).gather(-1, found.sequences.unsqueeze(-1)).squeeze(-1)
    assert (exact - found.token_log_probs)[found.token_log_probs != 0].abs().max() < 0.3


# Files, parts, limits


def test_files_and_parts(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path / "folder")
    save_file(ours.state_dict(), tmp_path / "plain.safetensors")
    assert ImageCaptionModel.from_pretrained(tmp_path / "folder").config == ours.config
    read = ImageCaptionModel.from_pretrained(tmp_path / "plain.safetensors")
    assert (read.config.bridge, read.config.prefix_length) == ("prefix", ours.config.prefix_length)
    assert read.state_dict().keys() == load_file(tmp_path / "plain.safetensors").keys()
    new = {name.split(".")[0] for name, _ in ours.named_parameters() if part_of(name) == "new"}
    assert new == {"enc_to_dec_proj"} | ({"pooling"} if ours.config.prefix_length else set())
    assert build_optimizers(ours, TrainConfig()) and step_operations(ours.config, 5, 12.0) > 0


def test_a_cross_attention_model_has_not_changed():
    """The prefix must not cost the models that exist a tensor or a position."""
    config = tiny_config()
    assert config.text_positions == config.max_length
    assert not any(name.startswith(("pooling", "enc_to_dec")) for name in ImageCaptionModel(config).state_dict())


def test_what_does_not_fit_is_refused_in_one_line(pair, tmp_path):
    _, ours = pair
    for changes, words in (
        ({"bridge": "prefix", "max_length": 6}, "no room for a caption after the picture's 5 positions"),
        ({"prefix_length": 4}, "needs bridge prefix"),
        ({"bridge": "adapter"}, "use cross_attention or prefix"),
    ):
        with pytest.raises(UserError, match=words):
            tiny_config(**changes)
    room = ours.config.text_positions
    assert ours.generate(PICTURES[:1], max_length=room, min_length=room).sequences.shape == (1, room)
    for refused, words in (
        (lambda: ours.generate(PICTURES, max_length=room + 1), f"the model's {room} positions"),
        (lambda: ours.generate(PICTURES, return_attention=True), "needs cross-attention"),
        (lambda: ours(PICTURES, torch.zeros(6, room + 1, dtype=torch.long)), "after a picture's"),
        (lambda: save_transformers(ours, tmp_path / "t"), "no prefix"),
        (lambda: save_onnx(ours, tmp_path / "o"), "reads a prefix"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    assert dataclasses.replace(ours.config, bridge="cross_attention", prefix_length=None).text_positions == 32
