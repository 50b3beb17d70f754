"""Packed weights: the same captions in fp32, near ones in bf16 and int8, and never stale ones."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ROOT, random_model, tiny_config
from processes import finished

from decoding import packed
from decoding.packed import available, packed_model
from model import ImageCaptionModel, TiedHead

PICTURES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> ImageCaptionModel:
    return random_model(tiny_config(decoder_embed_dim=64, vocab_size=96), std=0.15)


def states(model: ImageCaptionModel, precision, rows=6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the same tokens by the plain decoder and by the packed one."""
    ids = torch.randint(0, 96, (6, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        twin = packed_model(model, precision, rows)
        assert not isinstance(twin.decoder.head, TiedHead) and isinstance(model.decoder.head, TiedHead)
        return model(PICTURES, ids).logits, twin(PICTURES, ids).logits.float()


@pytest.mark.parametrize("rows", [2, 6, 8])
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.04)])
def test_packed_logits_are_near_the_plain_ones(model, precision, close, rows):
    if not available(precision):
        pytest.skip(f"this CPU has no {precision} kernels")
    plain, found = states(model, precision, rows)
    assert (plain - found).abs().max() < close * plain.abs().max()


@pytest.mark.parametrize("rows", [1, 6, 8])
@pytest.mark.parametrize("largest", [63, 0])
def test_int8_of_other_cpus(model, monkeypatch, largest, rows):
    """A laptop without VNNI had no int8 at all, though its weights alone may be read in 8 bits, and its products are right
    for weights of 7."""
    if not available("int8"):
        pytest.skip("this CPU has no int8 kernels")
    monkeypatch.setattr(packed, "largest_weight", lambda: largest)
    plain, found = states(model, "int8", rows)
    assert 0 < (plain - found).abs().max() < 0.06 * plain.abs().max()
    layers = {type(module) for module in packed_model(model, "int8", rows).modules()}
    assert (packed.Int8Linear in layers) == (largest > 0) and (packed.PackedLinear in layers) == (largest == 0)
    assert (packed.Int8Weight in layers) == (rows <= packed.FEW_WITHOUT_VNNI)


JUDGE = """
import torch
from decoding.packed import available, largest_weight, pack
if available("int8"):
    torch.manual_seed(0)
    for name, weight in (("normal", torch.randn(768, 3072)), ("as large as can be", torch.ones(768, 3072))):
        for x in (torch.randn(32, 3072), torch.ones(32, 3072)):
            exact = x @ weight.T
            for few in (False, True):
                off = (pack(weight, None, "int8", few)(x[: 4 if few else 32]).float() - exact[: 4 if few else 32]).norm()
                print(largest_weight(), name, few, float(off / exact[: 4 if few else 32].norm()))
"""


@pytest.mark.skipif(
    "AVX" not in torch.backends.cpu.get_cpu_capability() or not torch.backends.mkldnn.is_available(),
    reason="needs AVX2 and oneDNN",
)
@pytest.mark.parametrize("stops", ["AVX2", "AVX512_CORE", ""])
def test_int8_is_right_on_every_instruction_set(stops):
    """oneDNN's product for AVX2 adds two products in 16 bits: for large weights it was 21 to 92 % off."""
    environment = {"PYTHONPATH": ROOT}
    if stops:
        environment |= {"ONEDNN_MAX_CPU_ISA": stops, "ATEN_CPU_CAPABILITY": stops[:6].lower()}
    out = finished("-c", JUDGE, environment=environment)
    lines = out.stdout.splitlines()
    assert len(lines) == 8 and all(float(line.split()[-1]) < 0.02 for line in lines), out.stdout
    assert all(line.startswith("63 " if stops else ("127 ", "63 ")) for line in lines)


def test_without_onednn_the_fallback_is_torchs(monkeypatch):
    """A Mac's torch has none."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    layer = packed.PackedLinear(weight, bias, torch.float32)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_packed_captions_equal_plain_ones(model, num_beams, monkeypatch):
    options = dict(max_length=12, num_beams=num_beams)
    found = model.generate(PICTURES, **options).sequences
    assert model.copies.made and available("fp32")
    monkeypatch.setattr(packed, "available", lambda precision: False)
    expected = model.generate(PICTURES, **options).sequences
    assert torch.equal(found, expected) and len({tuple(row.tolist()) for row in found}) > 2


def test_packed_weights_follow_the_models(model):
    """Kept weights that outlive an update would caption with yesterday's model."""
    model.generate(PICTURES, max_length=4)
    first = model.copies.made[0]
    model.generate(PICTURES, max_length=9)
    assert model.copies.made[0] is first and set(model.copies.made) == {
        0,
        "layers",
    }  # not packed again for every picture
    with torch.no_grad():
        model.decoder.wte.weight[model.config.end_token_id] += 100 * model.decoder.ln_f.weight.sign()
        model.decoder.ln_f.bias += 1
    assert model.generate(PICTURES, max_length=9).sequences.shape == (6, 1)
    model.load_state_dict(ImageCaptionModel(model.config).state_dict())
    changed = model.generate(PICTURES, max_length=4)
    assert model.copies.made[0] is not first and changed.sequences.shape[1] > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_caption_too(model, dtype):
    """The cache was in fp32 and what came out of it met weights that were not."""
    assert model.to(dtype).generate(PICTURES.to(dtype), max_length=5).sequences.shape == (6, 5)


@pytest.mark.parametrize("width", [36, 40])
def test_int8_takes_any_width(width):
    """torch's kernel for a few rows reads 16 numbers at a time: at other widths it killed the process."""
    if not available("int8"):
        pytest.skip("this CPU has no int8 kernels")
    narrow = ImageCaptionModel(tiny_config(decoder_embed_dim=width)).eval()
    assert narrow.generate(PICTURES[:1], max_length=5, int8=True).sequences.shape[0] == 1


def test_copies_and_threads(model):
    """Packed weights cannot be copied, and two threads with one model took each other's."""
    from concurrent.futures import ThreadPoolExecutor

    expected = [model.generate(part, max_length=9).sequences for part in PICTURES.split(2)]
    twin = copy.deepcopy(model)
    assert not twin.copies.made and torch.equal(twin.generate(PICTURES[:2], max_length=9).sequences, expected[0])
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda part: model.generate(part, max_length=9).sequences, PICTURES.split(2) * 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_the_first_call_draws_what_the_second_draws(model):
    """Whether the kernels are there was tried on numbers from torch's own generator."""
    draws = []
    for _ in range(2):
        available.cache_clear()
        torch.manual_seed(5)
        draws.append(model.generate(PICTURES, max_length=8, do_sample=True).sequences)
    assert torch.equal(*draws)


def test_inference_mode(model):
    with torch.inference_mode():
        inside = model.generate(PICTURES, max_length=5).sequences
        made_inside = copy.deepcopy(model).generate(PICTURES, max_length=5).sequences
    assert torch.equal(inside, model.generate(PICTURES, max_length=5).sequences) and torch.equal(inside, made_inside)


def test_training_keeps_no_packed_weights(model):
    """They take as much memory as the decoder, and the next step makes them wrong."""
    model.train().generate(PICTURES, max_length=3)
    assert not model.copies.made and model.training


def test_int8_rows_do_not_touch_each_other():
    """One scale for the whole batch would make a caption depend on its batch mates."""
    if not available("int8"):
        pytest.skip("this CPU has no int8 kernels")
    torch.manual_seed(0)
    layer = packed.Int8Linear(torch.randn(64, 96), torch.randn(64), torch.float32)
    x = torch.randn(2, 96)
    alone, beside = layer(x[:1]), layer(torch.stack([x[0], 1000 * x[1]]))
    assert torch.equal(alone[0], beside[0])
    assert (layer(torch.zeros(1, 96)) - layer.bias).abs().max() < 0.02


def test_int8_is_finer_behind_a_gelu(model):
    """Rounded for both signs alike, half of the 8 bits were for numbers that no GELU gives."""
    if not available("int8"):
        pytest.skip("this CPU has no int8 kernels")
    twin = packed_model(model, "int8", 6)
    for name in ("encoder.blocks.0.fc2", "decoder.blocks.0.c_proj"):
        exact, layer = model.get_submodule(name), twin.get_submodule(name)
        both_signs = packed.Int8Linear(exact.weight, exact.bias, torch.float32)
        x = 2 * torch.randn(500, exact.in_features, generator=torch.Generator().manual_seed(0))
        x = torch.cat([torch.nn.functional.gelu(x), torch.zeros(1, exact.in_features)])
        with torch.no_grad():
            coarse, fine = ((kind(x) - exact(x)).square().mean().sqrt() for kind in (both_signs, layer))
        assert fine < 0.8 * coarse, name
    assert twin.get_submodule("decoder.blocks.0.attn.c_proj").least is None


@pytest.mark.parametrize("fused", [True, False])
def test_training_in_between_is_noticed(model, fused):
    """Torch counts no version of what a fused optimizer changes, so captions went on coming from the weights before it."""
    before = model.eval().generate(PICTURES, max_length=9).sequences
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=fused)
    sum((p**2).sum() for p in model.parameters()).backward()
    optimizer.step()
    after = model.generate(PICTURES, max_length=9).sequences
    model.copies.drop()
    assert torch.equal(model.generate(PICTURES, max_length=9).sequences, after)
    assert after.shape != before.shape or not torch.equal(after, before)
