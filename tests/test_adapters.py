"""LoRA and 4-bit weights on our own modules: what learns, what a file of it holds, and that loading gives the same model."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from conftest import tiny_config
from processes import small_config
from safetensors import safe_open
from safetensors.torch import load_file

import adapters
from adapters import adapt, find_base
from config import PRESETS, TrainConfig, UserError
from convert import initialise
from dataset import decode, prepare_picture
from example_usage import caption_image
from model import ImageCaptionModel
from model_file import METADATA_KEY, MODEL_FILE
from optimizers import Average, Updater, freeze
from utils import read_log

pytest.importorskip("peft", reason="needs requirements-qlora.txt")
CPU = torch.device("cpu")
PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 61, (4, 2, 7), generator=torch.Generator().manual_seed(2))
FOUR_BITS = pytest.param({"qlora": True}, marks=pytest.mark.skipif(bool(adapters.why_not_4_bits(CPU)), reason="no NF4"))
KINDS = pytest.mark.parametrize("kind", [{"lora": True}, FOUR_BITS], ids=["lora", "qlora"])
BRIDGES = pytest.mark.parametrize("bridge", ["prefix", "cross_attention"])


def write_bases(folder, image_size=16, patch_size=8, vocab_size=61, positions=32) -> dict[str, str]:
    """A tiny random ViT and GPT-2 as transformers writes them."""
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=image_size,
        patch_size=patch_size,
    )
    end = vocab_size - 1
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=positions, vocab_size=vocab_size)
    gpt2.bos_token_id = gpt2.eos_token_id = end
    for name, model in (("vit", ViTModel(vit)), ("gpt2", GPT2LMHeadModel(gpt2))):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "ln" not in key and "norm" not in key:
                    parameter.normal_(std=0.15)
        model.save_pretrained(folder / name)
    return {"encoder": str(folder / "vit"), "decoder": str(folder / "gpt2")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    return write_bases(tmp_path_factory.mktemp("bases"))


def settings(**changes) -> TrainConfig:
    return TrainConfig(init="pretrained", lora_rank=4, lora_dropout=0.0, **changes)


def adapted(bases, bridge, config, **fields) -> ImageCaptionModel:
    torch.manual_seed(3)
    _, model = initialise(tiny_config(bridge=bridge, vocab_size=61, max_length=32, **fields), **bases)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross" in name or "enc_to_dec" in name:
                parameter.normal_(std=0.2)
    freeze(model, config.freeze)
    adapt(model, config, bases, CPU)
    return model


def learn(model: ImageCaptionModel, config: TrainConfig, steps: int = 3) -> list[float]:
    """A few updates; between them captions are written and logits looked at, as in the middle of training."""
    updater = Updater(
        model, dataclasses.replace(config, learning_rate=0.02), torch.amp.GradScaler("cpu", enabled=False)
    )
    losses = []
    for _ in range(steps):
        loss = model.train()(PICTURES, IDS, labels=IDS.roll(-1, -1)).loss
        loss.backward()
        updater.update(loss.detach(), 0.02)
        losses.append(loss.item())
        model.eval().generate(PICTURES, max_length=3, num_beams=2)
        with torch.no_grad():
            model(PICTURES, IDS)
    return losses


@KINDS
@BRIDGES
def test_only_adapters_and_what_is_new_learn(bases, bridge, kind):
    """A frozen weight that moves makes the saved adapters useless; evaluation in between once broke 4-bit training."""
    model = adapted(bases, bridge, settings(**kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = learn(model, settings(**kind))
    assert losses[-1] < losses[0]
    own = model.own_state()
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(before[name].float(), tensor.float())
        rounded = kind == {"qlora": True} and name.endswith("bias")  # bitsandbytes does so
        assert moved == (name.replace(".default.weight", "") in own) or rounded, name
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.replace(".default.weight", "") for name in learned} == own.keys()
    layers = {name.split(".lora_")[0] for name in own if ".lora_" in name}
    wanted = {f"encoder.blocks.{n}.qkv" for n in (0, 1)} | {f"decoder.blocks.{n}.attn.c_attn" for n in (0, 1)}
    assert layers == wanted
    assert any("cross" in name for name in own) == (bridge == "cross_attention")


@KINDS
@BRIDGES
def test_a_file_of_adapters_loads_as_the_model_that_learned(bases, bridge, kind, tmp_path):
    """Merged into other weights than those the adapters learned on (unrounded ones, say) a model captions worse unnoticed."""
    model = adapted(bases, bridge, settings(**kind))
    learn(model, settings(**kind))
    model.save_file(tmp_path / "a.safetensors")
    file = load_file(tmp_path / "a.safetensors")
    assert file.keys() == model.own_state().keys() and not any("base_layer" in name for name in file)
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        about = json.loads(opened.metadata()[METADATA_KEY])["adapters"]
    assert about["bases"] == bases and about["quantized"] == ("qlora" in kind)
    loaded = ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors")
    assert type(loaded.decoder.blocks[0].attn.c_attn) is torch.nn.Linear and loaded.adapters is None
    with torch.no_grad():
        mine, theirs = model(PICTURES, IDS).logits, loaded(PICTURES, IDS).logits
    assert mine.std() > 0.3
    # Layers in 4 bits compute in bf16.
    assert (mine - theirs).abs().max() < (1e-5 if "lora" in kind else 0.02 * mine.abs().max())
    loaded.save_file(tmp_path / "whole.safetensors")
    whole = ImageCaptionModel.from_pretrained(tmp_path / "whole.safetensors")
    with torch.no_grad():
        assert torch.equal(whole(PICTURES, IDS).logits, theirs)


@KINDS
def test_going_on_from_a_checkpoint(bases, kind):
    """Checkpoints hold what learns alone; the weights' average does so too."""
    config = settings(**kind)
    model, other = (adapted(bases, "prefix", config) for _ in range(2))
    average = Average(model, 0.5)
    learn(model, config)
    other.load_own_state({name: tensor.clone() for name, tensor in model.own_state().items()})
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(PICTURES, IDS).logits, model.eval()(PICTURES, IDS).logits)
    average.update(model, 100)
    assert average.model.own_state().keys() == model.own_state().keys()
    weight, mean = (m.own_state()["enc_to_dec_proj.weight"] for m in (model, average.model))
    assert not torch.equal(weight, mean)
    with pytest.raises(UserError, match="tensors missing"):
        other.load_own_state({})


def test_under_two_percent_learn_at_base_size(monkeypatch):
    """Rank 16 on every q, k, v of encoder and decoder, and the projection, of ViT-B/16 and GPT-2; nothing is computed."""
    monkeypatch.setattr(adapters, "fingerprint", lambda model: "")
    with torch.device("meta"):
        model = ImageCaptionModel(bridge="prefix")
        said = adapt(model, TrainConfig(init="pretrained", lora=True), {}, CPU)
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert learned == 24 * 16 * (768 + 3 * 768) + 768 * 768 + 768
    assert learned / model.num_parameters < 0.02 and f"{learned:,} of {model.num_parameters:,}" in said


@pytest.mark.skipif(bool(adapters.why_not_4_bits(CPU)), reason="no NF4 here")
def test_weights_in_4_bits_are_counted_unpacked(bases):
    model = adapted(bases, "prefix", settings(qlora=True))
    plain = adapted(bases, "prefix", settings(lora=True))
    assert model.num_parameters == plain.num_parameters
    size = {kind: sum(p.nbytes for p in m.decoder.blocks.parameters()) for kind, m in (("4", model), ("32", plain))}
    assert size["4"] < 0.4 * size["32"]  # at this width norms and biases weigh


def test_the_preset_is_the_recipe():
    """The numbers of the second system; --preset img2gpt alone must mean them."""
    recipe = PRESETS["img2gpt"]
    assert (recipe.dataset, recipe.batch_size, recipe.epochs, recipe.qlora) == ("flickr30k", 16, 3, True)
    assert (recipe.init_encoder, recipe.init_decoder) == ("google/vit-base-patch16-224-in21k", "gpt2")
    assert recipe.model.bridge == "prefix" and recipe.model.prefix_positions == 197


def test_what_cannot_be_is_refused_in_one_line(bases, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="adapt a pretrained model"):
        TrainConfig(lora=True)
    with pytest.raises(UserError, match="merge has no effect"):
        TrainConfig(merge=True)
    with pytest.raises(UserError, match="fits no linear layer"):
        adapted(bases, "prefix", settings(lora=True, lora_targets="nothing"))
    with pytest.raises(UserError, match=r"crossattention.*learned in full"):
        adapted(bases, "cross_attention", settings(lora=True, lora_targets=r".*c_attn"))
    model = adapted(bases, "prefix", settings(lora=True))
    with pytest.raises(UserError, match="int8"):
        model.generate(PICTURES, int8=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"requirements-qlora\.txt"):
        adapted(bases, "prefix", settings(lora=True))


def test_without_4_bits_a_cpu_learns_in_ordinary_precision(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    _, model = initialise(tiny_config(bridge="prefix", vocab_size=61, max_length=32), **bases)
    said = adapt(model, settings(qlora=True), bases, CPU)
    assert "not in 4 bits" in said and "\n" not in said and not model.adapters["quantized"]
    assert type(model.decoder.blocks[0].c_fc) is torch.nn.Linear


def test_bases_are_found_by_name_and_known_again(bases, tmp_path):
    """Adapters on another GPT-2 of the same size would load without a word and write nonsense."""
    import shutil

    model = adapted(bases, "prefix", settings(lora=True))
    model.adapters["bases"] = {"encoder": "someone/vit", "decoder": "gpt2"}
    model.save_file(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: adapters for gpt2 and someone/vit.*--base-dir"):
        ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors")
    for name in ("vit", "gpt2"):
        shutil.copytree(bases["encoder" if name == "vit" else "decoder"], tmp_path / "bases" / name)
    assert find_base("someone/vit", tmp_path / "bases") == str(tmp_path / "bases" / "vit")
    ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors", tmp_path / "bases")
    from safetensors.torch import save_file

    path = tmp_path / "bases" / "gpt2" / "model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="learned on other weights"):
        ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors", tmp_path / "bases")


@pytest.mark.parametrize("merge", [False, True])
def test_a_whole_run(scenes_dir, scenes_tokenizer, tmp_path, monkeypatch, merge):
    """From folders of pretrained parts to a finished model: epochs' files, checkpoints, evaluation, a run that goes on."""
    from train import train

    size = len(scenes_tokenizer)
    bases = write_bases(tmp_path / "bases", 48, 8, size, 64)
    scenes_tokenizer.backend_tokenizer.model.save(str(tmp_path / "bases" / "gpt2"))
    monkeypatch.chdir(tmp_path)
    names = {"init_encoder": "someone/vit", "init_decoder": "someone/gpt2", "base_dir": tmp_path / "bases"}
    config = small_config(scenes_dir, bridge="prefix", prefix_length=6, max_length=64, max_steps=8, **names)
    config = dataclasses.replace(
        config, tokenizer="auto", qlora=True, ema=0.9, merge=merge, val_pictures=4, num_workers=0
    )
    assert train(config) == 0
    assert (tmp_path / "out" / "demo_epoch_1.safetensors").is_file()
    whole = ImageCaptionModel.from_pretrained(tmp_path / MODEL_FILE, tmp_path / "bases")
    small = (tmp_path / MODEL_FILE).stat().st_size < (tmp_path / "bases/gpt2/model.safetensors").stat().st_size
    assert whole.config.bridge == "prefix" and bases and small == (not merge)
    picture = next((scenes_dir / "val2017").iterdir())
    options = {"do_sample": False, "device": "cpu", "max_length": 8}
    said = caption_image(picture, MODEL_FILE, base_dir=None if merge else tmp_path / "bases", **options)
    assert (
        said
        == decode(
            whole.tokenizer, whole.generate(prepare_picture(picture, whole.config)[None], max_length=8).sequences
        )[0]
    )
    lines = read_log(tmp_path / "out" / "metrics.jsonl")
    means = [line["train_loss"] for line in lines if "train_loss" in line]
    assert len(means) == 2 and all(0 < mean < 20 for mean in means)
    assert train(dataclasses.replace(config, resume="out", output_dir=None)) == 0  # it has finished, and says so again
