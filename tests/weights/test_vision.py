"""The vision transformers of others, beside the classes of transformers that wrote them; all the rest of this project works
with each."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, random_model, tiny_config
from safetensors import safe_open
from safetensors.torch import save_file
from test_convert import change_json, change_weights, spread

from captioning.onnx import PictureEncoder, to_file
from config import TrainConfig, UserError, ViTGPT2Config
from decoding.packed import available, packed_model
from model import ImageCaptionModel
from training.adapters import adapt
from training.estimates import estimated_memory, step_operations
from training.start import initialise
from weights.file import read_model_file
from weights.huggingface import rename, tensor_names, write_transformers
from weights.pretrained import read_parts
from weights.vision import vision_fields

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
MLP = SIZES | {"intermediate_size": 128}
THEIRS = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=96)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**MLP)),
    "mae": lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**MLP, mask_ratio=0.0)),
    "msn": lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**MLP)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**MLP)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "dinov2 with SwiGLU": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    "dinov2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**MLP, num_register_tokens=3)),
    "dinov3 with SwiGLU": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SIZES, intermediate_size=104, use_gated_mlp=True, hidden_act="silu")
    ),
}
EXPORTED = ("clip", "siglip", "dinov2 with registers", "dinov3 with SwiGLU")
"""Those whose graphs together have every part; the others' are slow tests."""
EACH = pytest.mark.parametrize("kind", THEIRS)


@pytest.fixture(scope="module", params=THEIRS)
def theirs(request, tmp_path_factory):
    """A model of transformers, its name and the folder that it was saved to."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    model = spread(THEIRS[request.param]()).eval()
    model.save_pretrained(folder)
    return request.param, model, folder


def started(folder, **changes) -> ImageCaptionModel:
    """A captioner whose encoder is the folder's."""
    _, model = initialise(tiny_config(image_size=32, **changes), str(folder), None)
    return model


@pytest.mark.parametrize("size", [32, 48, 24])
def test_its_states_are_the_librarys(theirs, size):
    """At its own size, and at others by the interpolation that transformers has for the family."""
    kind, model, folder = theirs
    _, ours = initialise(tiny_config(image_size=size), str(folder), None)
    options = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    if kind == "mae":  # which shuffles, even where it masks nothing
        options["noise"] = torch.arange((size // 8) ** 2).float().expand(2, -1)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found, known = ours.eval().encoder(pixels), model(pixel_values=pixels, **options).last_hidden_state
    assert found.shape == known.shape == (2, ours.config.num_states, 32)
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)


def test_a_captioner_with_it_is_trained_saved_and_published(theirs, scenes_tokenizer, tmp_path):
    """A step lowers the loss; the file, transformers' folder and its own code give the same logits."""
    _, _, folder = theirs
    model = started(folder, vocab_size=len(scenes_tokenizer))
    model.tokenizer = scenes_tokenizer
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(0, 50, (2, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        losses.append(model(pixels, ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    with torch.no_grad():
        known = model.eval()(pixels, ids).logits
        model.save_file(tmp_path / "m.safetensors")
        assert torch.equal(ImageCaptionModel.from_pretrained(tmp_path / "m.safetensors")(pixels, ids).logits, known)
        write_transformers(model.saved(), tmp_path / "theirs")
        peer, about = transformers.VisionEncoderDecoderModel.from_pretrained(
            tmp_path / "theirs", output_loading_info=True
        )
        assert not any(about.values()), about
        found = peer.eval()(pixel_values=pixels, decoder_input_ids=ids).logits
        torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)
        back = ImageCaptionModel.from_pretrained(tmp_path / "theirs")
        assert back.config == model.config and torch.allclose(back(pixels, ids).logits, known, atol=1e-6)


def test_everything_else_works_with_it(theirs):
    """Layers packed for a CPU, gradient checkpointing, heat maps, adapters."""
    _, _, folder = theirs
    model = started(folder).eval()
    pixels = torch.randn(2, 3, 32, 32)
    plain = model(pixels, torch.zeros(2, 3, dtype=torch.long), labels=torch.ones(2, 3, dtype=torch.long)).loss
    model.train().set_gradient_checkpointing()
    again = model(pixels, torch.zeros(2, 3, dtype=torch.long), labels=torch.ones(2, 3, dtype=torch.long)).loss
    assert torch.allclose(plain, again, atol=1e-6)
    model.eval().set_gradient_checkpointing(False)
    found = model.generate(pixels, max_length=5, min_length=5, return_attention=True)
    assert found.attention.shape == (2, 5, 16)
    if available("int8"):
        with torch.no_grad():
            states, rounded = model.encoder(pixels), packed_model(model, "int8", 8).encoder(pixels)
        assert 0 < (rounded - states).norm() < 0.03 * states.norm()
    recipe = TrainConfig(lora=True, init="pretrained", model=model.config, optimizer="adamw")
    said = adapt(model, recipe, {"encoder": str(folder), "decoder": None}, torch.device("cpu"))
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert "LoRA" in said and any(re.match(r"encoder\.blocks\.1\..+\.lora_A", name) for name in learned)


@pytest.mark.parametrize(
    "kind", [kind if kind in EXPORTED else pytest.param(kind, marks=pytest.mark.slow) for kind in THEIRS]
)
def test_its_graph_gives_its_states(kind, tmp_path):
    """onnxruntime on the exported encoder."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    spread(THEIRS[kind]()).save_pretrained(tmp_path / "theirs")
    model = started(tmp_path / "theirs").eval()
    encoder, pixels = PictureEncoder(model).eval(), torch.randn(3, 3, 32, 32)
    batch = torch.export.Dim("batch_size")
    path = tmp_path / "encoder.onnx"
    to_file(encoder, {"pixel_values": (pixels[:2], {0: batch})}, ["last_hidden_state"], path)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, encoder(pixels).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [-2, 1])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_earlier_layers_states(kind, layer, tmp_path):
    """CLIP's readers take the last layer but one."""
    model = spread(THEIRS[kind]()).eval()
    model.save_pretrained(tmp_path)
    _, ours = initialise(tiny_config(image_size=32), str(tmp_path), None, layer)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        known = model(pixels, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(ours.eval().encoder(pixels), known, rtol=1e-5, atol=1e-5)
    assert (ours.config.vision_num_layers, ours.config.vision_norm_last) == (1, False)
    for wrong in (0, 3, -3):
        with pytest.raises(UserError, match=f"has 2 layers, and no layer {wrong}"):
            initialise(tiny_config(image_size=32), str(tmp_path), None, wrong)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_of_two_towers_the_pictures_is_taken(kind, tmp_path, capsys):
    """The folders that people name hold a text tower too, and their config the vision part inside; a Hub's older files call
    its tensors vision_model."""
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    about = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=MLP)
    both = spread(getattr(transformers, f"{kind}Model")(about).eval())
    both.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        known = both.vision_model(pixels).last_hidden_state
        assert torch.allclose(started(tmp_path).eval().encoder(pixels), known, atol=1e-5)
    said = capsys.readouterr().out
    assert "text_model" in said and f"mean ({0.5 if kind == 'Siglip' else 0.48145466}" in said


DINOV3_BASE = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_register_tokens=4)
REAL = {  # by the library's own defaults, but for one layer instead of twelve
    "ViT-B/16": ("ViT", {}),
    "CLIP-B/16": ("CLIPVision", {"patch_size": 16}),
    "SigLIP2-B/16-384": ("SiglipVision", {"image_size": 384}),
    "DINOv2-B/14": ("Dinov2", {"image_size": 518, "patch_size": 14}),
    "DINOv3-B/16": ("DINOv3ViT", DINOV3_BASE),
}


@pytest.mark.parametrize("name", REAL)
def test_at_its_real_size_no_key_is_left_over(name, tmp_path):
    """The names and shapes on disk, where transformers 5 has others in memory."""
    kind, sizes = REAL[name]
    about = getattr(transformers, f"{kind}Config")(**sizes, num_hidden_layers=1)
    getattr(transformers, f"{kind}Model")(about).save_pretrained(tmp_path)
    sizes = {"image_size": about.image_size, "patch_size": about.patch_size}
    config = ViTGPT2Config(**sizes, decoder_num_layers=1, vocab_size=300, max_length=8)
    parts = read_parts(config, str(tmp_path), None)
    assert parts.config.num_states == (
        576 if "SigLIP" in name else parts.config.num_patches + parts.config.vision_registers + 1
    )
    with torch.device("meta"):
        ours = ImageCaptionModel(parts.config).encoder.state_dict()
    assert {f"encoder.{name}": tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in parts.tensors.items()
    }
    assert all(
        re.search(r"pooler|head\.|mask_token|post_layernorm", left) for left in re.findall(r"[\w.]+\.\w+", parts.left)
    )


def test_the_public_captioners_at_their_real_size(tmp_path):
    """ViT-B/16 with GPT-2, the form of the public ones: no key left over."""
    decoder = transformers.GPT2Config(add_cross_attention=True, is_decoder=True, n_layer=1)
    encoder = transformers.ViTConfig(num_hidden_layers=1)
    about = transformers.AutoConfig.for_model(
        "vision-encoder-decoder", encoder=encoder.to_dict(), decoder=decoder.to_dict()
    )
    transformers.VisionEncoderDecoderModel(about).save_pretrained(tmp_path)
    names = tensor_names(ViTGPT2Config(max_length=1024, vision_num_layers=1, decoder_num_layers=1))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    blank = {name: torch.empty(name.shape, device="meta") for name in names}
    expected = {name: tuple(t.shape) for name, t in rename({n.ours: t for n, t in blank.items()}, list(blank)).items()}
    left = {name for name in stored if name not in expected}
    assert left <= {"decoder.lm_head.weight", "encoder.pooler.dense.bias", "encoder.pooler.dense.weight"}
    assert {name: stored[name] for name in expected} == expected


LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
SO400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
DOCUMENTED = {
    "google/vit-base-patch16-224-in21k": ("ViT", {}),
    "facebook/deit-base-distilled-patch16-224": ("DeiT", {}),
    "facebook/vit-mae-base, facebook/vit-msn-base": ("ViTMSN", {}),
    "openai/clip-vit-base-patch16": ("CLIPVision", {"patch_size": 16}),
    "openai/clip-vit-large-patch14-336": ("CLIPVision", LARGE | {"patch_size": 14, "image_size": 336}),
    "google/siglip2-base-patch16-384": ("SiglipVision", {"image_size": 384}),
    "google/siglip2-so400m-patch14-384": ("SiglipVision", SO400M | {"patch_size": 14, "image_size": 384}),
    "facebook/dinov2-base": ("Dinov2", {"patch_size": 14}),
    "facebook/dinov2-with-registers-base": ("Dinov2WithRegisters", {"patch_size": 14, "num_register_tokens": 4}),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": ("DINOv3ViT", DINOV3_BASE),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documented_costs_are_calculated_ones(name):
    """With the sizes that the repositories have; nothing of them is loaded."""
    kind, sizes = DOCUMENTED[name]
    about = json.loads(getattr(transformers, f"{kind}Config")(**sizes).to_json_string(use_diff=False))
    config = ViTGPT2Config(**vision_fields(name, "", about))
    with torch.device("meta"):
        model = ImageCaptionModel(config)
    all_of_it, encoder = (sum(p.numel() for p in part.parameters()) for part in (model, model.encoder))
    recipe = TrainConfig(batch_size=128, captions_per_image=5, model=config)
    memory = estimated_memory(recipe, 4 * all_of_it, all_of_it, tokens=12) / 1e9
    row = f"| {name} | {config.image_size} | {encoder / 1e6:.0f} M | {step_operations(config, 0, 0) / 3e9:.0f} G | {memory:.0f} GB |"
    assert row in (ROOT / "docs/training.md").read_text()


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("clip", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("dinov3", {"rope_theta": 10000.0}, "rope_theta is 10000.0"),
        ("dinov3", {"use_gated_mlp": True}, r"hidden_act is 'gelu'.* only 'silu'"),
        ("dinov2", {"qkv_bias": False}, "qkv_bias is False"),
        ("siglip", {"model_type": "siglip2"}, "model_type is 'siglip2'"),
        ("siglip", {"num_hidden_layers": "x"}, "num_hidden_layers is 'x'"),
        ("clip", {"vision_config": 3}, "its JSON files are not as transformers writes them"),
    ],
)
def test_what_cannot_be_represented_is_one_line(kind, change, words, tmp_path):
    spread(THEIRS[kind]()).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **change)
    with pytest.raises(UserError, match=words):
        started(tmp_path)


def pointer(folder) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def adapters_alone(folder) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def trainers(folder) -> None:
    (folder / "checkpoint-500").mkdir()
    (folder / "model.safetensors").rename(folder / "checkpoint-500/model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (pointer, "model.safetensors: a Git LFS pointer, not the file itself: run git lfs pull"),
        (adapters_alone, "it has only adapters, as peft writes them: merge them"),
        (trainers, "a trainer's folder, with weights only in its checkpoints: name .*checkpoint-500"),
        (
            lambda f: change_json(f / "config.json", pretrained_cfg={}),
            "a model of timm: name one that transformers wrote",
        ),
    ],
)
def test_folders_that_people_take_for_a_models(change, words, tmp_path):
    """Each had a message about tensors, pickles or JSON that helped nobody."""
    spread(THEIRS["vit"]()).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words):
        started(tmp_path)


@pytest.mark.parametrize("before", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_training_puts_before_names_is_no_part_of_them(before, tmp_path, scenes_tokenizer):
    """Saved from a compiled or a distributed module, a model's names had this before them, and nothing fitted: in all three
    loaders, of parts, of captioners, and of this project's own files."""

    def renamed(folder):
        change_weights(folder, lambda w: [w.update({f"{before}{name}": w.pop(name)}) for name in list(w)])

    spread(THEIRS["vit"]()).save_pretrained(tmp_path / "part")
    known = started(tmp_path / "part").eval()
    renamed(tmp_path / "part")
    assert torch.equal(started(tmp_path / "part").encoder.norm.weight, known.encoder.norm.weight)
    model = random_model(tiny_config(vocab_size=len(scenes_tokenizer)))
    model.tokenizer = scenes_tokenizer
    write_transformers(model.saved(), tmp_path / "whole")
    renamed(tmp_path / "whole")
    (tmp_path / "own").mkdir()
    save_file({f"{before}{n}": t for n, t in model.state_dict().items()}, tmp_path / "own/model.safetensors")
    back = ImageCaptionModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(back.decoder.wte.weight, model.decoder.wte.weight)
    assert set(read_model_file(tmp_path / "own/model.safetensors").tensors) == set(model.state_dict())


def test_a_mixture_stays_in_its_own_file(tmp_path, scenes_tokenizer):
    """Registers in a CLIP: this model can, transformers has none."""
    model = random_model(tiny_config(vision_registers=2, vision_norm_first=True, vocab_size=len(scenes_tokenizer)))
    model.tokenizer = scenes_tokenizer
    model.save_file(tmp_path / "m.safetensors")
    assert ImageCaptionModel.from_pretrained(tmp_path / "m.safetensors").config == model.config
    with pytest.raises(UserError, match="cannot be converted"):
        write_transformers(model.saved(), tmp_path / "theirs")


def test_a_plain_vits_config_is_what_it_was():
    """Fields that came later are not written at their defaults: older files, and runs begun before, stay what they are."""
    assert not [name for name in ViTGPT2Config().to_dict() if name in ("vision_registers", "vision_activation")]
    assert ViTGPT2Config.from_dict(ViTGPT2Config(vision_registers=4).to_dict()).vision_registers == 4
