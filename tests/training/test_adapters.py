"""LoRA and 4-bit weights on our own modules: what learns, what a file of it holds, and that loading gives the same model."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import needs_package, tiny_config, write_bases, write_language_model
from processes import ending, fork, forked, losses, small_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
from config import PRESETS, TrainConfig, UserError
from dataset import decode, prepare_picture
from example_usage import caption_image
from model import ImageCaptionModel
from publishing.hub import UploadConfig, publish
from train import train
from training.adapters import adapt, check_adapters
from training.checkpoint import checkpoints
from training.optimizers import Average, Updater, freeze
from training.start import initialise, pretrained_parts
from utils import file_hash, read_log
from weights import adapters
from weights.adapters import find_base
from weights.file import METADATA_KEY, MODEL_FILE

pytestmark = needs_package("peft", "qlora")
CPU = torch.device("cpu")
PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 61, (4, 2, 7), generator=torch.Generator().manual_seed(2))
# In quotes it is asked when such a test begins: bitsandbytes takes a while to import.
FOUR_BITS = pytest.param(
    {"qlora": True}, marks=pytest.mark.skipif("bool(adapters.why_not_4_bits(CPU))", reason="no NF4")
)
KINDS = pytest.mark.parametrize("kind", [{"lora": True}, FOUR_BITS], ids=["lora", "qlora"])
BRIDGES = pytest.mark.parametrize("bridge", ["prefix", "cross_attention"])


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
def test_a_file_of_adapters_loads_as_the_model_that_learned(bases, bridge, kind, tmp_path, monkeypatch):
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
    monkeypatch.setattr(
        sys, "argv", ["convert.py", "merge", *(str(tmp_path / f"{name}.safetensors") for name in ("a", "whole"))]
    )
    convert.main()
    merged = ImageCaptionModel.from_pretrained(tmp_path / "whole.safetensors")
    with torch.no_grad():
        assert torch.equal(merged(PICTURES, IDS).logits, theirs)


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
    monkeypatch.setattr("training.adapters.fingerprint", lambda model: "")
    with torch.device("meta"):
        model = ImageCaptionModel(bridge="prefix")
        said = adapt(model, TrainConfig(init="pretrained", lora=True), {}, CPU)
    learned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert learned == 24 * 16 * (768 + 3 * 768) + 768 * 768 + 768
    assert learned / model.num_parameters < 0.02 and f"{learned:,} of {model.num_parameters:,}" in said


@pytest.mark.skipif("bool(adapters.why_not_4_bits(CPU))", reason="no NF4 here")
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
    assert pretrained_parts(recipe) == {"encoder": "google/vit-base-patch16-224-in21k", "decoder": "gpt2"}
    assert recipe.model.bridge == "prefix" and recipe.model.prefix_positions == 197


def test_what_cannot_be_is_refused_in_one_line(bases, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="adapt a pretrained model"):
        TrainConfig(lora=True)
    with pytest.raises(UserError, match="merge has no effect"):
        TrainConfig(merge=True)
    with pytest.raises(UserError, match="is not a regular expression"):
        TrainConfig(lora_targets="(")
    with pytest.raises(UserError, match="init_model has its own prompt"):
        TrainConfig(init_model="x", prompt="a photo of")
    for changes in ({"lora_targets": "nothing"}, {"lora_targets": "encoder.*", "freeze": ("encoder",)}):
        with pytest.raises(UserError, match="matches no pretrained linear layer"):
            adapted(bases, "prefix", settings(lora=True, **changes))
    model = adapted(bases, "prefix", settings(lora=True))
    with pytest.raises(UserError, match="int8"):
        model.generate(PICTURES, int8=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft.*pip install -r requirements/qlora\.txt"):
        check_adapters(settings(lora=True), CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"peft.*pip install -r requirements/qlora\.txt"):
        train(settings(qlora=True, output_dir=tmp_path / "out", dataset="flickr30k"))  # and nothing is downloaded first


@KINDS
def test_targets_and_frozen_parts(bases, kind):
    """All of them, .*, once meant embeddings, norms and cross-attention too, which learn in full or not at all; and with
    --freeze encoder its adapters learned all the same."""
    model = adapted(bases, "cross_attention", settings(lora_targets=".*", freeze=("encoder",), **kind))
    layers = {name.split(".lora_")[0] for name in model.own_state() if ".lora_" in name}
    parts = ("attn.c_attn", "attn.c_proj", "c_fc", "c_proj")
    assert layers == {f"decoder.blocks.{n}.{part}" for n in (0, 1) for part in parts}
    new = {name for name in model.state_dict() if "cross" in name}
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in learned if ".lora_" not in name} == new


FUSED = {"gpt_neox": 4, "phi3": 4, "falcon": 4, "gpt_bigcode": 4, "codegen": 4, "llama": 7}  # linear layers a layer


@pytest.mark.parametrize("kind", FUSED)
def test_every_layer_of_a_language_model_gets_one(bases, tmp_path, scenes_tokenizer, kind):
    """Targets were looked for by the names of queries, keys and values: where one layer makes all three no decoder learned,
    and the run said nothing."""
    decoder = write_language_model(kind, tmp_path, scenes_tokenizer, **({"rotary_dim": 4} if kind == "codegen" else {}))
    parts = {"encoder": bases["encoder"], "decoder": decoder}
    _, model = initialise(tiny_config(bridge="prefix", max_length=64), **parts)
    old = "|".join((r"encoder\.blocks\.\d+\.qkv", r"decoder\.body\..*\.[qkv]_proj"))  # the default of before
    if kind != "llama":
        with pytest.raises(UserError, match=r"matches no layer of the decoder: change or freeze that"):
            adapt(model, settings(lora=True, lora_targets=old), parts, CPU)
    said = adapt(model, settings(lora=True), parts, CPU)
    assert f"on 2 layers of the encoder and {2 * FUSED[kind]} layers of the decoder, " in said
    adapted_there = {name.split(".lora_")[0] for name in model.own_state() if ".lora_" in name}
    assert len(adapted_there) == 2 + 2 * FUSED[kind] and not any("head" in name for name in adapted_there)
    loss = model.train()(PICTURES, IDS, labels=IDS.roll(-1, -1)).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if "decoder" in name and "lora_B" in name:
            assert parameter.grad.abs().max() > 0, name
            with torch.no_grad():
                parameter.normal_(std=0.1)
    model.save_file(tmp_path / "a.safetensors")
    loaded = ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors")
    with torch.no_grad():
        mine, theirs = model.eval()(PICTURES, IDS).logits, loaded(PICTURES, IDS).logits
    assert (mine - theirs).abs().max() < 1e-5 * mine.abs().max()


def test_a_run_keeps_the_layers_that_it_began_with(bases, tmp_path, scenes_tokenizer):
    """A run begun when queries, keys and values were the default goes on: its checkpoint has nothing for other layers."""
    parts = {"encoder": bases["encoder"], "decoder": write_language_model("llama", tmp_path, scenes_tokenizer)}
    old = r"encoder\.blocks\.\d+\.qkv|decoder\.blocks\.\d+\.attn\.c_attn|decoder\.body\..*\.[qkv]_proj"
    assert settings(lora=True).fingerprint == settings(lora=True, lora_targets=old).fingerprint
    models = [initialise(tiny_config(bridge="prefix", max_length=64), **parts)[1] for _ in range(2)]
    adapt(models[0], settings(lora=True, lora_targets=old), parts, CPU)
    models[0].save_file(tmp_path / "model.safetensors")
    begun = adapters.adapted_layers(tmp_path / "model.safetensors")
    said = adapt(models[1], settings(lora=True, lora_targets="|".join(map(re.escape, begun))), parts, CPU)
    assert len(begun) == 2 + 2 * 3 and "2 layers of the encoder and 6 layers of the decoder" in said
    models[1].load_own_state(models[0].own_state())


def test_without_4_bits_a_cpu_learns_in_ordinary_precision(bases, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    _, model = initialise(tiny_config(bridge="prefix", vocab_size=61, max_length=32), **bases)
    said = adapt(model, settings(qlora=True), bases, CPU)
    assert "not in 4 bits" in said and "\n" not in said and not model.adapters["quantized"]
    assert type(model.decoder.blocks[0].c_fc) is torch.nn.Linear


def test_bases_are_found_by_name_and_known_again(bases, tmp_path):
    """Adapters on another GPT-2 of the same size would load without a word and write nonsense."""
    model = adapted(bases, "prefix", settings(lora=True))
    model.adapters["bases"] = {"encoder": "someone/vit", "decoder": "gpt2"}
    model.save_file(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: adapters for someone/vit and gpt2.*--base-dir"):
        ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors")
    for name in ("vit", "gpt2"):
        shutil.copytree(bases["encoder" if name == "vit" else "decoder"], tmp_path / "bases" / name)
    assert find_base("someone/vit", tmp_path / "bases") == str(tmp_path / "bases" / "vit")
    ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors", tmp_path / "bases")
    path = tmp_path / "bases" / "gpt2" / "model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="trained on other weights"):
        ImageCaptionModel.from_pretrained(tmp_path / "a.safetensors", tmp_path / "bases")


# Runs


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, scenes_tokenizer):
    """Pretrained parts by name, and the settings of a run of 8 steps, 6 an epoch, on them."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_bases(folder, 48, 8, len(scenes_tokenizer), 64)
    scenes_tokenizer.backend_tokenizer.model.save(str(folder / "gpt2"))
    return {"init_encoder": "someone/vit", "init_decoder": "someone/gpt2", "base_dir": folder}


def run_config(scenes_dir, pretrained, **changes) -> TrainConfig:
    config = small_config(scenes_dir, bridge="prefix", prefix_length=6, max_length=64, max_steps=8, **pretrained)
    fields = {"tokenizer": "auto", "qlora": True, "ema": 0.9, "val_pictures": 4, "num_workers": 0}
    return dataclasses.replace(config, **(fields | changes))


@pytest.mark.parametrize("merge", [False, True])
def test_a_whole_run(scenes_dir, pretrained, tmp_path, monkeypatch, merge):
    """From folders of pretrained parts to a finished model: epochs' files, checkpoints, evaluation, a run that goes on."""
    monkeypatch.chdir(tmp_path)
    config, bases = run_config(scenes_dir, pretrained, merge=merge), pretrained["base_dir"]
    assert train(config) == 0
    assert (tmp_path / "out" / "demo_epoch_1.safetensors").is_file()
    whole = ImageCaptionModel.from_pretrained(tmp_path / MODEL_FILE, bases)
    small = (tmp_path / MODEL_FILE).stat().st_size < (bases / "gpt2/model.safetensors").stat().st_size
    assert whole.config.bridge == "prefix" and small == (not merge)
    picture = next((scenes_dir / "val2017").iterdir())
    options = {"do_sample": False, "device": "cpu", "max_length": 8}
    said = caption_image(picture, MODEL_FILE, base_dir=None if merge else bases, **options)
    sequences = whole.generate(prepare_picture(picture, whole.config)[None], max_length=8).sequences
    assert said == decode(whole.tokenizer, sequences)[0]
    publish(UploadConfig(repository="user/name", model_path=MODEL_FILE, base_dir=bases, run=Path("out"), dry_run=True))
    card = (tmp_path / "upload/user/name/README.md").read_text()
    assert (
        ("merges the adapters" in card) != merge and "- someone/vit\n- someone/gpt2\n" in card and "| CIDEr-D |" in card
    )
    lines = read_log(tmp_path / "out" / "metrics.jsonl")
    means = [line["train_loss"] for line in lines if "train_loss" in line]
    assert len(means) == 2 and all(0 < mean < 20 for mean in means)
    assert train(dataclasses.replace(config, resume="out", output_dir=None)) == 0  # it has finished, and says so again


@pytest.mark.slow
@BRIDGES
def test_a_killed_run_goes_on_to_the_same_bits(scenes_dir, pretrained, tmp_path, bridge):
    """A checkpoint has the adapters alone: the weights under them must come again as they were, rounded alike, and the
    running average beside the weights that learn."""
    config = run_config(scenes_dir, pretrained, max_steps=30, checkpoint_interval=2, output_dir=None)
    if bridge == "cross_attention":
        sizes = dataclasses.replace(config.model, bridge=bridge, prefix_length=None)
        config = dataclasses.replace(config, model=sizes)
    assert config.resume == "auto"
    forked(config, tmp_path / "whole")
    process, runs = fork(config, tmp_path / "killed"), tmp_path / "killed/runs"
    while process.is_alive() and not any(map(checkpoints, runs.glob("*"))):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / MODEL_FILE).exists()
    assert "going on at step" in forked(config, tmp_path / "killed")
    (whole,), (killed,) = (list((tmp_path / name / "runs").iterdir()) for name in ("whole", "killed"))
    assert ending(killed) == ending(whole)
    epochs = [f"demo_epoch_{n}.safetensors" for n in range(1, 6)]
    assert sorted(path.name for path in killed.glob("*_epoch_*")) == epochs
    assert all(file_hash(killed / name) == file_hash(whole / name) for name in epochs)


@pytest.mark.parametrize("kind", [{"lora": True}, pytest.param({"qlora": True}, marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(scenes_dir, pretrained, tmp_path, kind):
    """Frozen weights have no gradients to exchange, and those in 4 bits are bytes: either once stopped such runs."""
    config = dataclasses.replace(run_config(scenes_dir, pretrained, max_steps=20, lora_dropout=0.0), **kind)
    for ranks in (1, 2):
        said = forked(config, tmp_path / f"{ranks}", ranks)
        assert said.count("adapters    LoRA") == 1
    one, two = (tmp_path / f"{ranks}/out" for ranks in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-2 if "qlora" in kind else 1e-4)
    assert load_file(two / MODEL_FILE).keys() == load_file(one / MODEL_FILE).keys()


def test_a_run_does_not_go_on_upon_other_weights(scenes_dir, pretrained, tmp_path):
    """Whoever updates a pretrained model in place would go on with adapters that learned on another, without a word."""
    shutil.copytree(pretrained["base_dir"], tmp_path / "bases")
    config = run_config(scenes_dir, pretrained | {"base_dir": tmp_path / "bases"}, max_steps=2)
    forked(config, tmp_path)
    path = tmp_path / "bases/gpt2/model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    said = forked(config, tmp_path, code=2)
    assert "error: the pretrained models are not those that out started with" in said.splitlines()[-1]


def test_adapters_for_a_captioner(scenes_dir, tmp_path, monkeypatch):
    """--init-model with --lora. The finished adapters once took the place of the very model that they are for."""
    monkeypatch.chdir(tmp_path)
    assert train(small_config(scenes_dir, max_steps=2, val_pictures=0)) == 0
    fields = {"max_steps": 4, "val_pictures": 0, "output_dir": Path("adapted"), "lora": True}
    config = small_config(scenes_dir, init_model=MODEL_FILE, **fields)
    with pytest.raises(UserError, match="give it another name first"):
        train(config)
    Path(MODEL_FILE).rename("base.safetensors")
    assert train(dataclasses.replace(config, init_model="base.safetensors")) == 0
    assert ImageCaptionModel.from_pretrained(MODEL_FILE).config.bridge == "cross_attention"
    with pytest.raises(UserError, match=r"adapters for base.safetensors, which nobody else has: make a merged model"):
        publish(UploadConfig(repository="user/name", model_path=MODEL_FILE, dry_run=True))
    Path(MODEL_FILE).replace("base.safetensors")
    with pytest.raises(UserError, match="trained on other weights than those of base"):
        ImageCaptionModel.from_pretrained("base.safetensors")
