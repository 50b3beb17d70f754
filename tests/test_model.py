"""The model against transformers' own, its loss, its packing, its attention paths, its files."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model, tiny_config
from safetensors.torch import load_file, save_file

import model as attention_module
from config import UserError, ViTGPT2Config
from model import ImageCaptionModel, attention, choose_attention
from weights.file import METADATA_KEY
from weights.huggingface import UNUSED, take, tensor_names
from weights.vision import VIT, split_off


@pytest.fixture(params=[32, 48], ids=["same-width", "projected"])
def pair(request, tmp_path):
    """A tiny random VisionEncoderDecoderModel and ours with its weights."""
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    torch.manual_seed(0)
    config = tiny_config(decoder_embed_dim=request.param, vocab_size=61)
    vit = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=8
    )
    gpt2 = GPT2Config(
        n_embd=request.param,
        n_layer=2,
        n_head=2,
        n_positions=24,
        vocab_size=61,
        add_cross_attention=True,
        bos_token_id=60,
        eos_token_id=60,
        initializer_range=0.2,
    )
    theirs = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ln" not in name and "norm" not in name:
                parameter.normal_(std=0.15)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ImageCaptionModel(config).eval()
    path = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(path)
    split_off(weights, "", f"{UNUSED}|{VIT.unused}")
    ours.load_state_dict(take(path, weights, list(tensor_names(config))))
    return theirs, ours


@pytest.mark.parametrize("captions", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_equal_transformers(pair, captions, padded):
    theirs, ours = pair
    pixels = torch.randn(3, 3, 16, 16)
    ids = torch.randint(0, 61, (3, captions, 9))
    lengths = torch.randint(3, 10, (3, captions)) if padded else torch.full((3, captions), 9)
    real = torch.arange(9) < lengths.unsqueeze(-1)
    with torch.no_grad():
        mine = ours(pixels, ids if captions > 1 else ids[:, 0], lengths if captions > 1 else lengths[:, 0]).logits
        reference = theirs(
            pixel_values=pixels.repeat_interleave(captions, 0),
            decoder_input_ids=ids.flatten(0, 1),
            decoder_attention_mask=real.flatten(0, 1).long(),
        ).logits.view(3, captions, 9, -1)
    difference = (mine.view(reference.shape) - reference)[real]
    assert reference[real].std() > 0.3  # or the comparison would say little
    assert difference.abs().max() < 1e-5


def test_loss_is_the_mean_over_real_targets(pair):
    """The loss, on packed positions, equals transformers' cross-entropy on unpacked logits; empty captions count nothing."""
    theirs, ours = pair
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(0, 61, (2, 3, 8))
    lengths = torch.tensor([[8, 3, 0], [5, 1, 7]])
    labels = torch.randint(0, 61, ids.shape).masked_fill(torch.arange(8) >= lengths.unsqueeze(-1), -100)
    with torch.no_grad():
        output = ours(pixels, ids, lengths, labels)
        logits = theirs(pixel_values=pixels.repeat_interleave(3, 0), decoder_input_ids=ids.flatten(0, 1)).logits
    assert output.logits is None
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_rounded_positions_change_nothing(tiny_model):
    """Entries that only round M up must not reach the loss or any gradient."""
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(0, 50, (2, 2, 6))
    lengths = torch.tensor([[6, 2], [4, 6]])
    labels = ids.roll(-1, -1).masked_fill(torch.arange(6) >= lengths.unsqueeze(-1), -100)
    positions = (labels != -100).flatten().nonzero().squeeze(-1)
    rounded = torch.cat([positions, torch.full((7,), ids.numel())])
    gradients = []
    for where in (None, positions, rounded):
        tiny_model.zero_grad()
        loss = tiny_model(pixels, ids, lengths, labels, where).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in tiny_model.parameters())])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_labels_without_targets_in_the_middle_are_still_read(tiny_model):
    """A token whose label is -100 but which stands before real targets must stay visible to them."""
    pixels, ids = torch.randn(1, 3, 16, 16), torch.randint(0, 50, (1, 6))
    labels = torch.tensor([[-100, -100, -100, 7, 8, -100]])
    logits = tiny_model(pixels, ids).logits
    expected = F.cross_entropy(logits[0, 3:5], torch.tensor([7, 8]))
    assert tiny_model(pixels, ids, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_no_target_at_all_gives_zero_not_nan(tiny_model):
    ids = torch.randint(0, 50, (2, 4))
    loss = tiny_model(torch.randn(2, 3, 16, 16), ids, labels=torch.full_like(ids, -100)).loss
    assert loss.item() == 0


@pytest.mark.parametrize(
    "changes", [{}, {"bridge": "prefix", "prefix_length": 3, "prompt_ids": (5, 6)}], ids=["cross-attention", "prompt"]
)
def test_the_contrastive_loss_caption_by_caption(changes):
    """Each caption finds its picture among the batch's, each picture its captions. An empty caption and a picture without
    captions count nothing, and the prompt is no part of a picture."""
    model = random_model(tiny_config(**changes))
    pixels, labels, end = torch.randn(4, 3, 16, 16), torch.randint(0, 48, (4, 2, 5)), model.config.end_token_id
    labels[0, 1], labels[3], labels[1, 0, 2:] = -100, -100, torch.tensor([end, -100, -100])
    found = model(pixels, labels.clamp(min=0), labels=labels, contrastive=True)
    assert found.loss.item() == model(pixels, labels.clamp(min=0), labels=labels).loss.item()
    states = model.encode(pixels)[:3, : -2 if changes else None]
    texts = [(row, text[(text >= 0) & (text != end)]) for row in range(3) for text in labels[row]]
    embedded = torch.stack([model.decoder.wte(text).mean(0) for _, text in texts if len(text)])
    rows = torch.tensor([row for row, text in texts if len(text)])
    scores = F.normalize(embedded, dim=-1) @ F.normalize(states.mean(1), dim=-1).T / 0.07  # (captions, pictures)
    find_caption = -scores.log_softmax(0)[torch.arange(5), rows].mean()
    expected = (F.cross_entropy(scores, rows) + find_caption) / 2
    assert found.contrastive_loss.item() == pytest.approx(expected.item(), abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(pixels, labels.clamp(min=0), labels=labels, contrastive=True).contrastive_loss
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected.item(), rel=0.05)
    gradients = [
        torch.autograd.grad(loss, [model.encoder.patch_embedding.weight, model.decoder.wte.weight])
        for loss in (found.contrastive_loss, expected)
    ]
    for ours, by_hand in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-3, atol=1e-5)
    nothing = model(
        pixels, labels.clamp(min=0), labels=torch.full_like(labels, -100), contrastive=True
    ).contrastive_loss
    nothing.backward()
    assert nothing.item() == 0 and not model.encoder.patch_embedding.weight.grad.any()


def test_default_size_is_exact():
    with torch.device("meta"):
        model = ImageCaptionModel(vocab_size=50257)
    assert model.num_parameters == 238_212_096
    assert model.config.end_token_id == model.config.start_token_id == model.config.pad_token_id == 50256


def test_uint8_pictures_are_normalised_inside(tiny_model):
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ids = torch.randint(0, 50, (2, 4))
    by_hand = (pixels.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(tiny_model(pixels, ids).logits, tiny_model(by_hand, ids).logits)


def test_gradient_checkpointing_changes_nothing(tiny_model):
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(0, 50, (2, 5))
    gradients = []
    for on in (False, True):
        tiny_model.zero_grad()
        tiny_model.set_gradient_checkpointing(on)
        tiny_model(pixels, ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in tiny_model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# Attention


def reference_attention(query, key, value, causal):
    scores = torch.einsum("bthd,bshd->bhts", query.double(), key.double()) / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "keys", "causal"), [(7, 7, True), (7, 7, False), (6, 11, False), (1, 9, False)])
def test_attention_paths_agree(dtype, length, keys, causal):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, t, 3, 8).to(dtype) for t in (length, keys, keys))
    result = attention(query, key, value, causal=causal)
    assert result.shape == query.shape and result.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        result.double(), reference_attention(query, key, value, causal), rtol=tolerance, atol=tolerance
    )


class FakeCuda(torch.Tensor):
    """A CPU tensor that says it is on CUDA, so that the flash_attn path can be walked without a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.fixture
def flash_calls(monkeypatch):
    """A stand-in for the flash_attn package that records its calls and computes with torch."""
    calls = []

    def flash_attn_func(query, key, value, causal=False):
        calls.append((tuple(query.shape), tuple(key.shape), query.dtype, causal))
        plain = [t.as_subclass(torch.Tensor).transpose(1, 2) for t in (query, key, value)]
        return F.scaled_dot_product_attention(*plain, is_causal=causal).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention_module, "_flash", None)
    return calls


def test_flash_attention_gets_its_own_layout_and_mask(flash_calls):
    query, key, value = (torch.randn(2, t, 4, 16).half() for t in (5, 9, 9))
    result = attention(*(t.as_subclass(FakeCuda) for t in (query, key, value)))
    assert flash_calls == [((2, 5, 4, 16), (2, 9, 4, 16), torch.float16, False)]
    expected = reference_attention(query, key, value, False)
    torch.testing.assert_close(result.as_subclass(torch.Tensor).double(), expected, rtol=1e-2, atol=1e-2)
    attention(*(t.as_subclass(FakeCuda) for t in (query, query, query)), causal=True)
    assert flash_calls[-1] == ((2, 5, 4, 16), (2, 5, 4, 16), torch.float16, True)


def test_flash_attention_is_left_alone_where_it_cannot_serve(flash_calls):
    query = torch.randn(1, 4, 2, 8)
    attention(query, query, query, causal=True)  # CPU
    attention(*(query.as_subclass(FakeCuda),) * 3)  # float32
    attention_module.use_flash_attention(False)
    try:
        function, reason = choose_attention("cuda", torch.float16)
    finally:
        attention_module.use_flash_attention(True)
    assert flash_calls == [] and function is None and "turned off" in reason
    function, reason = choose_attention("cuda", torch.float16, head_size=20)
    assert function is None and "heads of 20" in reason


def test_flash_attention_is_probed_by_importing_the_function(monkeypatch):
    """Another package answers to the name flash_attn without having the function; find_spec alone was fooled by it."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setattr(attention_module, "_flash", None)
    function, reason = choose_attention("cuda", torch.bfloat16)
    assert function is None and "cannot be imported" in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_on_the_gpu(dtype):
    """flash_attn itself where it is installed, torch's kernels otherwise."""
    query, key, value = (torch.randn(2, t, 4, 64, device="cuda", dtype=dtype) for t in (7, 50, 50))
    expected = reference_attention(query, key, value, False)
    torch.testing.assert_close(attention(query, key, value).double(), expected, rtol=2e-2, atol=2e-2)


# Files


def test_seed_snippets_for_one_file(tmp_path):
    config = tiny_config()
    first, second = ImageCaptionModel(config), ImageCaptionModel(config)
    save_file(first.state_dict(), tmp_path / "m.safetensors")  # refuses tensors that share memory
    second.load_state_dict(load_file(tmp_path / "m.safetensors"))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_file_is_the_model(tmp_path, scenes_tokenizer):
    config = tiny_config(vocab_size=len(scenes_tokenizer), resize_size=20, decoder_num_heads=4)
    model = ImageCaptionModel(config)
    model.tokenizer = scenes_tokenizer
    for name in ("a.safetensors", "b.safetensors"):
        model.save_file(tmp_path / name)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    model.save_pretrained(tmp_path / "folder")
    for source in (tmp_path / "a.safetensors", tmp_path / "folder"):
        loaded = ImageCaptionModel.from_pretrained(source)
        assert loaded.config == config and not loaded.training
        text = "two small red circles at the top"
        assert loaded.tokenizer(text).input_ids == scenes_tokenizer(text).input_ids
        assert loaded.tokenizer.eos_token_id == config.end_token_id
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
            assert torch.equal(a, b)
    assert not list(tmp_path.glob(".*"))


def test_a_file_without_metadata_is_loaded_by_its_shapes(tmp_path):
    config = tiny_config(vision_embed_dim=64, vision_num_heads=1, decoder_embed_dim=128, decoder_num_heads=2)
    model = ImageCaptionModel(config)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    assert ImageCaptionModel.from_pretrained(tmp_path / "plain.safetensors").config == dataclasses.replace(
        config, dropout=0.1
    )


def test_bad_model_files_get_one_line(tmp_path):
    torch.manual_seed(0)
    model = ImageCaptionModel(tiny_config())
    weights = model.state_dict()
    (tmp_path / "text.safetensors").write_text("not a model")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    metadata = {METADATA_KEY: json.dumps({"config": model.config.to_dict()})}
    (tmp_path / "list.safetensors").write_bytes(b"")
    save_file(weights, tmp_path / "list.safetensors", metadata={METADATA_KEY: "[]"})
    less = {k: v for k, v in weights.items() if "ln_f" not in k}
    save_file(less, tmp_path / "missing.safetensors", metadata=metadata)
    save_file(weights | {"x": torch.zeros(1)}, tmp_path / "extra.safetensors", metadata=metadata)
    wrong = weights | {"decoder.ln_f.weight": torch.zeros(5)}
    save_file(wrong, tmp_path / "shape.safetensors", metadata=metadata)
    for name, words in {
        "text": "not a readable safetensors file",
        "foreign": "not a model of this project",
        "list": "not a model of this project",
        "missing": "2 tensors missing: decoder.ln_f.bias, decoder.ln_f.weight",
        "extra": "1 tensors unknown: x",
        "shape": r"decoder.ln_f.weight is \(5,\) instead of \(32,\)",
        "absent": "no such model file",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            ImageCaptionModel.from_pretrained(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 30}, "image_size 30 is not divisible by patch_size 8"),
        ({"decoder_num_heads": 5}, "decoder_num_heads 5 does not divide decoder_embed_dim 32"),
        ({"vision_num_heads": 3}, "vision_num_heads 3 does not divide vision_embed_dim 32"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"resize_size": 8}, "resize_size 8 is smaller"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"end_token_id": 50}, "outside the vocabulary"),
    ],
)
def test_configs_that_cannot_be_are_refused_in_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_config(**changes)


def test_what_follows_from_other_fields_is_always_a_number():
    """By their types they could be absent, so that `or 0` stood for a token in a dozen places; old files may say null."""
    absent = dict.fromkeys(("resize_size", "end_token_id", "start_token_id", "pad_token_id"))
    assert all(typing.get_type_hints(ViTGPT2Config)[name] is int for name in absent)
    for config in (tiny_config(), tiny_config(**absent), ViTGPT2Config.from_dict(tiny_config().to_dict() | absent)):
        assert [getattr(config, name) for name in absent] == [16, 49, 49, 49]
