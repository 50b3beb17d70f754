"""Weights in and out, against transformers' own classes: logits, bytes, pixels, words; old folders; every error's line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import needs_shared, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file

import convert
from config import UserError, ViTGPT2Config
from convert import load_transformers, save_transformers
from data.pictures import prepare_picture
from dataset import train_tokenizer
from model import ImageCaptionModel
from utils import run_script
from weights import huggingface
from weights.file import gpt2_tokenizer, tokenizer_from_json
from weights.huggingface import rename, tensor_names

CAPTIONS = ["a red circle on a blue square", "two green dogs run over wet grass", "a man in a red hat"] * 3
WIDTHS = pytest.mark.parametrize("width", [32, 48], ids=["same-width", "projected"])
TEXT = "two red dogs on a hat"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 290)


def spread(model):
    """Random weights far enough apart that captions differ and attention is far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif "weight" not in name:
                parameter.normal_(std=0.1)
    return model.eval()


def make_ours(tokenizer, **changes) -> ImageCaptionModel:
    torch.manual_seed(0)
    model = ImageCaptionModel(tiny_config(vocab_size=len(tokenizer), **changes))
    model.tokenizer = tokenizer
    return spread(model)


def make_theirs(folder: Path, tokenizer, width: int = 32) -> transformers.VisionEncoderDecoderModel:
    """A model made, filled and saved by transformers alone, with its processor and tokenizer."""
    torch.manual_seed(1)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=8)
    vit = transformers.ViTConfig(hidden_size=32, **sizes)
    end = tokenizer.eos_token_id
    sizes = dict(n_embd=width, n_layer=2, n_head=4, n_positions=24, vocab_size=len(tokenizer))
    gpt2 = transformers.GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    model = transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)
    )
    spread(model).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A good folder by transformers, to spoil."""
    make_theirs(tmp_path / "theirs", tokenizer)
    return tmp_path / "theirs"


def same_logits(theirs, ours, captions: int = 3) -> None:
    torch.manual_seed(2)
    pixels, ids = torch.randn(2, 3, 16, 16), torch.randint(0, ours.config.vocab_size, (2, captions, 9))
    with torch.no_grad():
        mine = ours(pixels, ids).logits.flatten(0, 1)
        inputs = {"pixel_values": pixels.repeat_interleave(captions, 0), "decoder_input_ids": ids.flatten(0, 1)}
        reference = theirs(**inputs).logits
    assert reference.std() > 0.3  # or the comparison would say little
    assert (mine - reference).abs().max() < 1e-5


def change_json(path: Path, *keys, **changes) -> None:
    """Changes fields of a JSON file, or of the object inside it that the keys lead to; None takes a field away."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys:
        inner = inner[key]
    inner.update(changes)
    for name in [name for name, value in inner.items() if value is None and name in changes]:
        del inner[name]
    path.write_text(json.dumps(content))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# Out


@WIDTHS
def test_what_we_write_transformers_loads_whole(tmp_path, tokenizer, width):
    """A pooler was missing: transformers made one up at random and warned that the model needs training."""
    ours = make_ours(tokenizer, decoder_embed_dim=width)
    save_transformers(ours, tmp_path / "out")
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(theirs, transformers.VisionEncoderDecoderModel) and not any(info.values()), info
    on_disk = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert not any("lm_head" in name for name in on_disk)
    assert ("enc_to_dec_proj.weight" in on_disk) == (width != 32)
    same_logits(theirs.eval(), ours)
    theirs.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == on_disk


def test_transformers_generates_the_same_tokens(tmp_path, tokenizer):
    """Start, end, padding and the number of beams reach its generate; some captions end, some do not."""
    ours = make_ours(tokenizer)
    end = ours.config.end_token_id
    with torch.no_grad():
        ours.decoder.wte.weight[end] += 4 * ours.decoder.ln_f.bias
    save_transformers(ours, tmp_path / "out")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    pixels = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for options, asked in (({"num_beams": 1}, {"num_beams": 1}), ({"num_beams": 3}, {})):
        mine = ours.generate(pixels, max_length=24, **options).sequences
        reference = theirs.generate(pixels, **asked)[:, 1:]
        ended = (mine == end).any(-1).sum()
        assert 3 < ended < 22 and len({tuple(row.tolist()) for row in mine}) > 8
        assert torch.equal(mine, reference[:, : mine.shape[1]]) and (reference[:, mine.shape[1] :] == end).all()


def test_transformers_can_train_it_further(tmp_path, tokenizer):
    """Its loss shifts labels with the start and padding tokens of config.json, not of generation_config.json."""
    ours = make_ours(tokenizer)
    save_transformers(ours, tmp_path / "out")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    pixels, labels = torch.randn(2, 3, 16, 16), torch.randint(0, 200, (2, 6))
    ids = torch.cat([torch.full((2, 1), ours.config.start_token_id), labels[:, :-1]], 1)
    mine = ours(pixels, ids, labels=labels).loss
    torch.testing.assert_close(theirs(pixel_values=pixels, labels=labels).loss, mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_transformers", [False, True], ids=["at-once", "saved-by-transformers-between"])
def test_there_and_back_is_bitwise(tmp_path, tokenizer, by_transformers):
    changes = dict(resize_size=20, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.25, 0.3), dropout=0.2)
    changes |= dict(vision_dropout=0.1, start_token_id=5, pad_token_id=7, decoder_embed_dim=48, decoder_num_heads=4)
    ours = make_ours(tokenizer, **changes)
    ours.trained_on = np.array([3, 1 << 63], np.uint64)
    source = tmp_path / "out"
    save_transformers(ours, source)
    if by_transformers:
        source = tmp_path / "again"
        for kind in (
            transformers.AutoModelForImageTextToText,
            transformers.AutoImageProcessor,
            transformers.AutoTokenizer,
        ):
            kind.from_pretrained(tmp_path / "out").save_pretrained(source)
    back = load_transformers(source)
    assert back.config == ours.config and not back.training
    assert list(back.state_dict()) == list(ours.state_dict())
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]) and tensor.dtype == torch.float32, name
    assert back.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert (back.tokenizer.bos_token_id, back.tokenizer.pad_token_id) == (5, 7)
    if not by_transformers:
        expected = tokenizer_from_json(tokenizer.backend_tokenizer.to_str(), ours.config)
        assert back.tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert back.trained_on.tolist() == ours.trained_on.tolist()


def test_equal_models_give_equal_folders(tmp_path, tokenizer):
    for name in ("a", "b"):
        save_transformers(make_ours(tokenizer), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_its_tokenizer_reads_and_writes_the_same_words(tmp_path, tokenizer):
    """transformers 4 forgot the space before the first word unless tokenizer_config.json asks for it."""
    save_transformers(make_ours(tokenizer), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert theirs.decode([*theirs(TEXT).input_ids, theirs.eos_token_id], skip_special_tokens=True).strip() == TEXT
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == tokenizer.eos_token_id
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert about["add_prefix_space"] is True and about["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_gpt2s_own_tokenizer_goes_along(tmp_path):
    source = needs_shared("gpt2")
    vectors = json.loads((source / "test_vectors.json").read_text())
    ours = ImageCaptionModel(tiny_config(vocab_size=50257))
    ours.tokenizer = gpt2_tokenizer(str(source))
    save_transformers(ours, tmp_path / "out")
    for words in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        load_transformers(tmp_path / "out").tokenizer,
    ):
        assert len(words) == 50257 and words.eos_token_id == 50256
        for vector in vectors:
            assert words(vector["text"]).input_ids == vector["ids"]
            assert words.decode(vector["ids"]) == vector["text"]


@pytest.mark.parametrize("resize_size", [16, 22], ids=["squashed", "cropped"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_its_processor_makes_the_same_pixels(tmp_path, tokenizer, resize_size, mode):
    """A ViT processor never crops in transformers 4: a model with a crop must ask for another."""
    std = (0.2, 0.25, 0.3)
    config = tiny_config(resize_size=resize_size, image_mean=(0.4, 0.5, 0.6), image_std=std, vocab_size=len(tokenizer))
    ours = ImageCaptionModel(config)
    ours.tokenizer = tokenizer
    save_transformers(ours, tmp_path / "out")
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    picture = small.resize((61, 43), Image.Resampling.BICUBIC).convert(mode)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    kind = "ViTImageProcessor" if resize_size == 16 else "DeiTImageProcessor"
    assert type(processor).__name__ == kind
    theirs = processor(picture, return_tensors="pt").pixel_values[0]
    encoder = ours.encoder
    mine = (prepare_picture(picture, config) / 255 - encoder.mean) / encoder.std
    assert theirs.shape == mine.shape == (3, 16, 16) and mine.std() > 0.5
    assert ((theirs - mine).abs() < 2.01 / 255 / encoder.std).all()


def test_no_folder_of_others_is_written_into(tmp_path, tokenizer, folder):
    ours = make_ours(tokenizer)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"theirs: holds other files \(config.json, generation_config.json, model"):
        save_transformers(ours, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    save_transformers(ours, tmp_path / "empty")
    (tmp_path / "empty" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(README.md\)"):
        save_transformers(ours, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file: name another folder"):
        save_transformers(ours, tmp_path / "file")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, tokenizer, monkeypatch):
    ours = make_ours(tokenizer)
    save_transformers(ours, tmp_path / "out")
    with torch.no_grad():
        ours.decoder.ln_f.bias += 1
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_json", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(UserError, match=r"cannot be written .No space left"):
            save_transformers(ours, tmp_path / "out")
        with pytest.raises(UserError, match="cannot be written"):
            save_transformers(ours, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not torch.equal(load_transformers(tmp_path / "out").decoder.ln_f.bias, ours.decoder.ln_f.bias)
    save_transformers(ours, tmp_path / "out")  # over what it wrote itself
    assert torch.equal(load_transformers(tmp_path / "out").decoder.ln_f.bias, ours.decoder.ln_f.bias)


# In


@WIDTHS
def test_what_transformers_writes_we_load_whole(tmp_path, tokenizer, width, capsys):
    theirs = make_theirs(tmp_path / "theirs", tokenizer, width)
    ours = load_transformers(tmp_path / "theirs")
    assert "2 tensors (encoder.pooler.dense.bias, encoder.pooler.dense.weight) skipped" in capsys.readouterr().err
    same_logits(theirs, ours)
    assert ours.config.decoder_num_heads == 4 and ours.config.max_length == 24
    assert ours.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    save_transformers(ours, tmp_path / "back")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first if "pooler" not in name)
    capsys.readouterr()
    load_transformers(tmp_path / "back")
    assert "skipped" not in capsys.readouterr().err  # the pooler of a folder written here never meant anything


@pytest.fixture
def old_folder(folder, tokenizer) -> Path:
    """As transformers 4 wrote them years ago: a pickle with causal masks and the head, ids at the top of the config."""
    weights = load_file(folder / "model.safetensors")
    for n in range(2):
        for attention in ("attn", "crossattention"):
            weights[f"decoder.transformer.h.{n}.{attention}.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
            weights[f"decoder.transformer.h.{n}.{attention}.masked_bias"] = torch.tensor(-1e4)
    weights["decoder.lm_head.weight"] = weights["decoder.transformer.wte.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    words = json.loads((folder / "tokenizer.json").read_text())["model"]
    for path in folder.iterdir():
        if path.suffix != ".bin":
            path.unlink()
    (folder / "vocab.json").write_text(json.dumps(words["vocab"] | {"<|endoftext|>": len(tokenizer) - 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in words["merges"]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "ViTFeatureExtractor",
                "image_mean": [0.5, 0.4, 0.3],
                "image_std": [0.5, 0.6, 0.7],
                "resample": 2,
                "size": 16,
            }
        )
    )
    encoder = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder |= {"intermediate_size": 128, "image_size": 16, "patch_size": 8, "top_k": 50, "architectures": ["ViTModel"]}
    decoder = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_ctx": 24, "n_positions": 24}
    decoder |= {"vocab_size": len(tokenizer), "bos_token_id": 3, "eos_token_id": 3, "use_cache": True}
    end = len(tokenizer) - 1
    top = {"model_type": "vision-encoder-decoder", "encoder": encoder, "decoder": decoder, "pad_token_id": 4}
    top |= {"decoder_start_token_id": end, "eos_token_id": end, "bos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(top))
    return folder


def test_folders_of_transformers_4_load(old_folder, tokenizer, tmp_path, capsys):
    theirs = transformers.VisionEncoderDecoderModel.from_pretrained(
        make_theirs(tmp_path / "new", tokenizer) and tmp_path / "new"
    )
    ours = load_transformers(old_folder, allow_pickle=True)
    said = capsys.readouterr().err
    assert "10 tensors (" in said and ours.config.resample == "bilinear"
    same_logits(theirs.eval(), ours)
    config, end = ours.config, len(tokenizer) - 1
    assert (config.start_token_id, config.end_token_id, config.pad_token_id) == (end, end, 4)
    assert (config.image_mean, config.image_std, config.resize_size) == ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7), 16)
    assert ours.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert ours.tokenizer.decode([*tokenizer(TEXT).input_ids, end], skip_special_tokens=True).strip() == TEXT


def test_pickles_are_refused_unasked(old_folder):
    with pytest.raises(
        UserError, match=r"theirs: no model.safetensors, and a pytorch_model.bin is a pickle.*--allow-pickle"
    ):
        load_transformers(old_folder)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_run_even_when_asked(old_folder, tmp_path):
    for content in (Malicious(tmp_path / "run"), {"encoder.embeddings.cls_token": Malicious(tmp_path / "run")}):
        torch.save(content, old_folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model.bin: cannot be read as tensors") as error:
            load_transformers(old_folder, allow_pickle=True)
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    torch.load(old_folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "run").exists()  # the trap works
    with open(old_folder / "pytorch_model.bin", "wb") as file:
        pickle.dump([1, 2], file, protocol=2)
    with pytest.raises(UserError):
        load_transformers(old_folder, allow_pickle=True)


def test_weights_in_several_files(folder, tokenizer):
    whole = load_file(folder / "model.safetensors")
    expected = load_transformers(folder).state_dict()
    names = sorted(whole)
    files = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: whole[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    found = load_transformers(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (folder / "model-00002-of-00002.safetensors").rename(folder.parent / "stolen.safetensors")
    with pytest.raises(UserError, match=r"index.json: the file model-00002-of-00002.safetensors .* is not beside it"):
        load_transformers(folder)
    index.write_text(index.read_text().replace("model-00002-of-00002", "../stolen"))
    with pytest.raises(UserError, match=r"the file ../stolen.safetensors that it lists is not beside it"):
        load_transformers(folder)


def test_half_precision_weights_load_as_they_are(folder):
    change_weights(folder, lambda weights: weights.update({name: t.half() for name, t in weights.items()}))
    ours = load_transformers(folder)
    stored = load_file(folder / "model.safetensors")["decoder.transformer.wte.weight"]
    assert ours.decoder.wte.weight.dtype == torch.float32 and torch.equal(ours.decoder.wte.weight, stored.float())


@pytest.mark.parametrize(
    ("generation", "top", "decoder", "expected"),
    [
        ({}, {}, {"bos": 1, "eos": 2, "pad": 3}, (1, 2, 3)),
        ({}, {}, {"bos": None, "eos": 2, "pad": None}, (2, 2, 2)),
        ({}, {"decoder_start": 4, "eos": 5, "pad": 6}, {"bos": 1, "eos": 2, "pad": 3}, (4, 5, 6)),
        ({"bos": 9, "eos": [8], "pad": None}, {"decoder_start": 4, "pad": 6}, {"bos": 1, "eos": 2}, (4, 8, 6)),
        ({"decoder_start": 7, "eos": 8, "pad": 9}, {"decoder_start": 4, "eos": 5, "pad": 6}, {}, (7, 8, 9)),
    ],
)
def test_special_tokens_are_found_wherever_they_are(folder, generation, top, decoder, expected):
    """transformers 5 dropped most of them from config.json; a null there must not hide the one further down."""
    config = json.loads((folder / "config.json").read_text())
    full = [{f"{name}_token_id": value for name, value in place.items()} for place in (generation, top, decoder)]
    for name in [name for name in config["decoder"] if name.endswith("token_id")]:
        del config["decoder"][name]
    config = config | full[1] | {"decoder": config["decoder"] | full[2]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(full[0]))
    found = load_transformers(folder).config
    assert (found.start_token_id, found.end_token_id, found.pad_token_id) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": {"height": 16, "width": 16}}, (16, 0.5, 0.5)),
        ({"image_processor_type": "DeiTFeatureExtractor", "size": 20, "crop_size": 16}, (20, 0.5, 0.5)),
        ({"do_center_crop": True, "size": [20, 20], "crop_size": {"height": 16, "width": 16}}, (20, 0.5, 0.5)),
        ({"do_normalize": False}, (16, 0.0, 1.0)),
        ({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}, (16, 0.1, 0.2)),
    ],
)
def test_preprocessing_comes_along(folder, changes, expected):
    change_json(folder / "preprocessor_config.json", **changes)
    config = load_transformers(folder).config
    assert (config.resize_size, config.image_mean[2], config.image_std[0]) == expected
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads((folder / "preprocessor_config.json").read_text())})
    )
    (folder / "preprocessor_config.json").unlink()
    assert load_transformers(folder).config == config


def test_a_byte_order_mark_does_not_spoil_a_config(folder):
    """As some editors leave one."""
    before = load_transformers(folder).config
    (folder / "config.json").write_text("\ufeff" + (folder / "config.json").read_text(), encoding="utf-8")
    assert load_transformers(folder).config == before


SPOILED = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json: cannot be read \(No such file"),
    "text": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "bytes": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json: not JSON"),
    "blip": (lambda f: change_json(f / "config.json", model_type="blip"), "model_type is 'blip'"),
    "our own": (lambda f: change_json(f / "config.json", model_type=None), "model_type is None"),
    "no encoder": (
        lambda f: change_json(f / "config.json", encoder=None),
        r"not as transformers .*KeyError: 'encoder'",
    ),
    "list encoder": (lambda f: change_json(f / "config.json", encoder=[]), "not as transformers writes them"),
    "string": (
        lambda f: change_json(f / "config.json", "encoder", hidden_size="32"),
        "not as transformers writes them .*hidden_size is '32'",
    ),
    "swin": (
        lambda f: change_json(f / "config.json", "encoder", model_type="swin"),
        "encoder.model_type is 'swin'.*'vit'",
    ),
    "deit": (
        lambda f: change_json(f / "config.json", "encoder", model_type="deit"),
        "1 tensors missing: encoder.embeddings.distillation_token",
    ),
    "relu": (lambda f: change_json(f / "config.json", "encoder", hidden_act="relu"), "encoder.hidden_act is 'relu'"),
    "eps": (
        lambda f: change_json(f / "config.json", "encoder", layer_norm_eps="x"),
        "vision_norm_eps is 'x': it must be a number",
    ),
    "no bias": (lambda f: change_json(f / "config.json", "encoder", qkv_bias=False), "encoder.qkv_bias is False"),
    "narrow": (
        lambda f: change_json(f / "config.json", "encoder", intermediate_size=64),
        r"intermediate.dense.weight is \(128, 32\) instead of \(64, 32\)",
    ),
    "oblong": (lambda f: change_json(f / "config.json", "encoder", image_size=[16, 24]), r"image_size is \[16, 24\]"),
    "heads": (lambda f: change_json(f / "config.json", "encoder", num_attention_heads=5), "theirs: vision_num_heads 5"),
    "bert": (lambda f: change_json(f / "config.json", "decoder", model_type="bert"), "decoder.model_type is 'bert'"),
    "gelu": (
        lambda f: change_json(f / "config.json", "decoder", activation_function="gelu"),
        "activation_function is 'gelu'",
    ),
    "decoder eps": (lambda f: change_json(f / "config.json", "decoder", layer_norm_epsilon=1e-6), "epsilon is 1e-06"),
    "scale": (
        lambda f: change_json(f / "config.json", "decoder", scale_attn_by_inverse_layer_idx=True),
        "decoder.scale_attn_by_inverse_layer_idx is True",
    ),
    "inner": (lambda f: change_json(f / "config.json", "decoder", n_inner=96), "decoder.n_inner is 96"),
    "blind": (
        lambda f: change_json(f / "config.json", "decoder", add_cross_attention=False),
        "add_cross_attention is False",
    ),
    "untied": (
        lambda f: change_json(f / "config.json", "decoder", tie_word_embeddings=False),
        "tie_word_embeddings is F",
    ),
    "wider": (
        lambda f: change_json(f / "config.json", "decoder", cross_attention_hidden_size=64),
        "decoder.cross_attention_hidden_size is 64",
    ),
    "ends": (lambda f: change_json(f / "generation_config.json", eos_token_id=[1, 2]), r"eos_token_id is \[1, 2\]"),
    "outside": (
        lambda f: change_json(f / "generation_config.json", eos_token_id=999),
        "theirs: .*outside the vocabulary",
    ),
    "edge": (
        lambda f: change_json(f / "preprocessor_config.json", size={"shortest_edge": 16}),
        "size is {'shortest_edge'",
    ),
    "size": (
        lambda f: change_json(f / "preprocessor_config.json", size=32),
        "pictures of 32 pixels, the encoder takes 16",
    ),
    "crop": (
        lambda f: change_json(f / "preprocessor_config.json", do_center_crop=True, crop_size=8),
        "pictures of 8 pixels",
    ),
    "factor": (lambda f: change_json(f / "preprocessor_config.json", rescale_factor=1), "rescale_factor is 1,"),
    "raw": (
        lambda f: change_json(f / "preprocessor_config.json", do_rescale=False),
        "preprocessor do_rescale is False",
    ),
    "no words": (lambda f: (f / "tokenizer.json").unlink(), "theirs: no tokenizer.json"),
    "bad words": (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), "theirs: .*tokenizer cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0"),
        "model.safetensors: cannot be read as tensors",
    ),
    "missing": (
        lambda f: change_weights(f, lambda w: [w.pop(n) for n in sorted(w) if ".ln_" in n]),
        r"model.safetensors: .*14 tensors missing: \S+h.0.ln_1.bias, \S+h.0.ln_1.weight, \S+h.0.ln_2.bias\)",
    ),
    "extra": (
        lambda f: change_weights(f, lambda w: w.update({f"x{n}": torch.zeros(1) for n in range(4)})),
        r"4 tensors unknown: x0, x1, x2\)",
    ),
    "shape": (
        lambda f: change_weights(f, lambda w: w.update({"encoder.layernorm.bias": torch.zeros(5)})),
        r"encoder.layernorm.bias is \(5,\) instead of \(32,\)",
    ),
    "turned": (  # Conv1D's weights as nn.Linear would keep them
        lambda f: change_weights(
            f, lambda w: w.update({(n := "decoder.transformer.h.1.attn.c_attn.weight"): w[n].mT.contiguous()})
        ),
        r"attn.c_attn.weight is \(96, 32\) instead of \(32, 96\)",
    ),
    "layers": (lambda f: change_json(f / "config.json", "decoder", n_layer=1), "unknown: decoder.transformer.h.1"),
    "head": (
        lambda f: change_weights(
            f, lambda w: w.update({"decoder.lm_head.weight": w["decoder.transformer.wte.weight"] + 1})
        ),
        "decoder.lm_head.weight differs from decoder.transformer.wte.weight",
    ),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_every_fault_is_one_line_that_names_it(folder, fault):
    spoil, words = SPOILED[fault]
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        load_transformers(folder)
    assert "\n" not in str(error.value) and "theirs" in str(error.value)


def test_a_tokenizer_without_the_end_token_is_refused(folder):
    """Captions would have been cut nowhere, and its words printed with their end."""
    change_json(folder / "config.json", "decoder", vocab_size=300)
    wide = torch.randn(300, 32)
    change_weights(folder, lambda weights: weights.update({"decoder.transformer.wte.weight": wide}))
    change_json(folder / "generation_config.json", eos_token_id=299)
    with pytest.raises(UserError, match=r"theirs: its tokenizer has no token \d+, 299"):
        load_transformers(folder)


def test_hub_names(folder, tmp_path, monkeypatch):
    """From the cache, offline: the same files by the Hub client's own ways."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / "models--user--captioner", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    expected = load_transformers(folder)
    found = load_transformers("user/captioner")
    assert found.config == expected.config
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    (repository / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"user/captioner: no model.safetensors"):
        load_transformers("user/captioner")
    for name, words in {
        "user/absent": "not available from the Hugging Face Hub",
        "no folder": "not available from the Hugging Face Hub",
        "./absent": "no such folder",
        "a/b/c": "no such folder",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            load_transformers(name)
        assert "\n" not in str(error.value) and str(error.value).startswith(name)


# Sizes


def test_base_size_has_every_tensor_and_number():
    """ViT-B/16 and GPT-2 small: FACTS says 239,195,904 numbers, 590,592 of them in the pooler."""
    config = ViTGPT2Config(max_length=1024)
    names = list(tensor_names(config))
    with torch.device("meta"):
        ours = ImageCaptionModel(config).state_dict()
        files = huggingface.their_files(config, train_tokenizer(CAPTIONS, 290))["config.json"]
        theirs = transformers.VisionEncoderDecoderModel(transformers.VisionEncoderDecoderConfig(**files))
    assert sorted(name.ours for name in names) == sorted(ours)
    renamed = rename(ours, names)
    assert sum(tensor.numel() for tensor in renamed.values()) == 239_195_904 - 590_592
    assert len(renamed) == 198 + 244 and len(names) == 150 + 244
    expected = {n: p.shape for n, p in theirs.named_parameters() if "lm_head" not in n and "pooler" not in n}
    assert sum(p.numel() for n, p in theirs.named_parameters()) == 239_195_904
    for part in ("decoder.", "encoder."):
        mine = {name: tensor.shape for name, tensor in renamed.items() if name.startswith(part)}
        other = {name: shape for name, shape in expected.items() if name.startswith(part)}
        assert sorted(mine.values()) == sorted(other.values())
        assert part == "encoder." or mine == other  # in memory its encoder has other names than on disk


# The command line


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_script(convert.main)
    return end.value.code or 0


def test_the_commands(tmp_path, tokenizer, monkeypatch, capsys, old_folder):
    ours = make_ours(tokenizer)
    ours.save_file(tmp_path / "ours.safetensors")
    assert command(monkeypatch, "to-transformers", tmp_path / "ours.safetensors", tmp_path / "out") == 0
    for output in ("back.safetensors", "back"):
        assert command(monkeypatch, "from-transformers", tmp_path / "out", tmp_path / output) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"written to {tmp_path / output}"
        loaded = ImageCaptionModel.from_pretrained(tmp_path / output)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), ours.parameters(), strict=True))
        assert loaded.config == ours.config
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    for arguments, words in {
        ("from-transformers", tmp_path / "out", tmp_path / "back"): "already exists",
        ("from-transformers", tmp_path / "absent", tmp_path / "new"): "no such folder",
        ("from-transformers", old_folder, tmp_path / "new"): "--allow-pickle",
        ("to-transformers", tmp_path / "absent.safetensors", tmp_path / "new"): "no such model file",
        ("to-transformers", tmp_path / "ours.safetensors", old_folder): "holds other files",
    }.items():
        assert command(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert command(monkeypatch, "from-transformers", old_folder, tmp_path / "new", "--allow-pickle") == 0
    assert command(monkeypatch, "nonsense") == 2
