"""Pretrained weights to start from: beside the classes of transformers that wrote them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_config, write_bases
from processes import small_config
from safetensors.torch import load_file
from test_convert import CAPTIONS, TEXT, change_json, change_weights, spread

from config import UserError
from dataset import train_tokenizer
from model import ImageCaptionModel
from training.start import initialise, make_model

VIT_SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, image_size=24)
VIT_SIZES |= dict(patch_size=8)


def save_part(model, folder: Path):
    spread(model).save_pretrained(folder)
    about = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": 24, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return model


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
@pytest.mark.parametrize("image_size", [24, 40, 16])
def test_a_pretrained_vit_sees_what_it_saw(tmp_path, kind, image_size, capsys):
    """Its own class and ours give the same states, at its own size and, by interpolation, at another."""
    torch.manual_seed(0)
    theirs = save_part(getattr(transformers, kind)(transformers.ViTConfig(**VIT_SIZES)), tmp_path / "vit")
    config = tiny_config(image_size=image_size, vision_dropout=0.1)
    sizes, model = initialise(config, str(tmp_path / "vit"), None)
    assert (sizes.vision_embed_dim, sizes.vision_num_layers, sizes.vision_num_heads) == (64, 3, 4)
    assert (sizes.image_size, sizes.resize_size, sizes.patch_size) == (image_size, image_size, 8)
    assert (sizes.image_mean, sizes.image_std, sizes.vision_dropout) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.1)
    assert model.config == sizes and sizes.decoder_embed_dim == 32 and hasattr(model, "enc_to_dec_proj")
    pixels = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        mine = model.eval().encoder(pixels)
        base = theirs if kind == "ViTModel" else theirs.vit
        expected = base(pixels, interpolate_pos_encoding=image_size != 24).last_hidden_state
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    taken, left, made = capsys.readouterr().out.splitlines()
    side = image_size // 8
    assert f"loaded      {tmp_path / 'vit'}: 42 tensors (" in taken and f"positions 3 x 3 -> {side} x {side}" in taken
    assert left.startswith("skipped     2 tensors (") and (
        "pooler" in left if kind == "ViTModel" else "classifier" in left
    )
    assert made.startswith("new         46 tensors (")


@pytest.mark.parametrize("kind", ["DeiTModel", "DeiTForImageClassificationWithTeacher"])
def test_a_deit_keeps_its_distillation_token(tmp_path, kind, capsys):
    """It was left out, though all other states look at it. Its position stands between the class token's and the patches'."""
    save_part(getattr(transformers, kind)(transformers.DeiTConfig(**VIT_SIZES)), tmp_path / "deit")
    stored = load_file(tmp_path / "deit" / "model.safetensors")
    prefix = "" if kind == "DeiTModel" else "deit."
    _, model = initialise(tiny_config(image_size=24), str(tmp_path / "deit"), None)
    positions = stored[f"{prefix}embeddings.position_embeddings"]
    assert positions.shape == (1, 11, 64)
    assert torch.equal(model.encoder.position_embeddings, positions[:, [0, *range(2, 11)]])
    token = stored[f"{prefix}embeddings.distillation_token"]
    assert torch.equal(model.encoder.registers, token + positions[:, 1:2])
    left = capsys.readouterr().out.splitlines()[1]
    assert left.startswith(f"skipped     {2 if kind == 'DeiTModel' else 4} tensors")


def silence_cross_attention(model: ImageCaptionModel) -> None:
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.crossattention.c_proj.weight.zero_()


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel"])
@pytest.mark.parametrize(("max_length", "kept"), [(12, 12), (24, 24), (512, 24)])
def test_a_pretrained_gpt2_says_what_it_said(tmp_path, kind, max_length, kept, capsys):
    """With a silent cross-attention our decoder is GPT-2, at every position it has or is left with."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 290)
    end = tokenizer.eos_token_id
    sizes = dict(n_embd=48, n_layer=3, n_head=4, n_positions=24, vocab_size=len(tokenizer))
    about = transformers.GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)
    theirs = spread(getattr(transformers, kind)(about))
    theirs.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    config, model = initialise(tiny_config(max_length=max_length, dropout=0.3), None, str(tmp_path / "gpt2"))
    assert (config.decoder_embed_dim, config.decoder_num_layers, config.decoder_num_heads) == (48, 3, 4)
    assert (config.vocab_size, config.max_length, config.dropout) == (len(tokenizer), kept, 0.3)
    assert config.end_token_id == config.start_token_id == config.pad_token_id == end
    assert model.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    for block in model.decoder.blocks:
        assert block.crossattention.c_attn.weight.std() > 0.01 and (block.ln_cross_attn.weight == 1).all()
    silence_cross_attention(model)
    ids = torch.randint(0, config.vocab_size, (2, kept))
    with torch.no_grad():
        mine = model.eval()(torch.randn(2, 3, 16, 16), ids).logits
        hidden = (theirs if kind == "GPT2Model" else theirs.transformer)(ids).last_hidden_state
        expected = hidden @ theirs.get_input_embeddings().weight.T
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    taken, left, made = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / 'gpt2'}: 40 tensors (" in taken and f"{kept} of 24 positions" in taken
    assert left == "skipped     nothing" and "tensors (" in made


@pytest.mark.parametrize(("more", "said"), [(7, True), (7, False), (-3, True)])
def test_an_embedding_larger_than_its_tokenizer(tmp_path, scenes_dir, scenes_table, scenes_tokenizer, more, said):
    """A GPT-2 of 50,304 rows for 50,257 tokens, as many are trained, was told to leave out a --tokenizer that nobody had
    given. Of fewer rows than tokens it is told what helps."""
    rows, end = len(scenes_tokenizer) + more, scenes_tokenizer.eos_token_id
    bases = write_bases(tmp_path, 48, 8, rows, 64)
    scenes_tokenizer.backend_tokenizer.model.save(bases["decoder"])
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), min(end, rows - 1) if said else None)
    change_json(Path(bases["decoder"]) / "config.json", **ids)
    config = small_config(scenes_dir, max_length=64, init_encoder=bases["encoder"], decoder=bases["decoder"])
    config = dataclasses.replace(config, tokenizer="auto")
    if more < 0:
        words = rf"knows {rows} tokens and tokenizer .* has {rows - more}: put its tokenizer's files beside it"
        with pytest.raises(UserError, match=words):
            make_model(config, scenes_table, None)
        return
    _, model = make_model(config, scenes_table, None)
    assert model.config.vocab_size == rows == len(model.decoder.wte.weight)
    assert model.config.end_token_id == model.config.start_token_id == model.config.pad_token_id == end
    with torch.no_grad():
        model.decoder.wte.weight[end + 1 :] *= 100
    found = model.eval().generate(torch.randn(4, 3, 48, 48), max_length=6, do_sample=True, top_k=0)
    assert found.sequences.max() <= end
    model.save_file(tmp_path / "m.safetensors")
    loaded = ImageCaptionModel.from_pretrained(tmp_path / "m.safetensors")
    assert loaded.config == model.config and len(loaded.tokenizer) == end + 1


def test_both_parts_start_a_captioner(tmp_path, capsys):
    """Old GPT-2 files hold causal masks and a second copy of the embedding; ids of an equal vocabulary are kept."""
    save_part(
        transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**VIT_SIZES, encoder_stride=8)), tmp_path / "vit"
    )
    sizes = dict(n_embd=64, n_layer=1, n_head=4, n_positions=24, vocab_size=50)
    spread(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    ).save_pretrained(tmp_path / "gpt2")
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    wte = load_file(tmp_path / "gpt2" / "model.safetensors")["transformer.wte.weight"]
    change_weights(tmp_path / "gpt2", lambda w: w.update(masks | {"lm_head.weight": wte.clone()}))
    config, model = initialise(tiny_config(image_size=40), str(tmp_path / "vit"), str(tmp_path / "gpt2"))
    assert config.end_token_id == 49 and not hasattr(model, "enc_to_dec_proj")
    assert torch.equal(model.decoder.wte.weight, wte)
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3
        and "skipped     5 tensors" in lines[1]
        and "vit.embeddings.mask_token" in lines[1]
        and "new         8 tensors (" in lines[2]
    )
    assert model(torch.randn(1, 3, 40, 40), torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
    change_weights(tmp_path / "gpt2", lambda w: w.update({"lm_head.weight": wte + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight differs from transformer.wte.weight"):
        initialise(tiny_config(), None, str(tmp_path / "gpt2"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda f: change_json(f / "config.json", model_type="swin"), "model_type is 'swin'.* only 'vit' or 'vit_mae'"),
        (lambda f: change_json(f / "config.json", hidden_act="relu"), "hidden_act is 'relu'"),
        (lambda f: change_json(f / "config.json", image_size=32), r"position_embeddings is \(1, 10, 64\) instead of"),
        (lambda f: change_json(f / "config.json", patch_size=12), r"projection.weight is \(64, 3, 8, 8\) instead of"),
        (
            lambda f: change_weights(f, lambda w: w.pop("embeddings.cls_token")),
            "1 tensors missing: embeddings.cls_token",
        ),
        (lambda f: change_weights(f, lambda w: w.update(x=torch.zeros(1))), "1 tensors unknown: x"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"a pytorch_model.bin is a pickle.* name one with safetensors",
        ),
    ],
)
def test_parts_that_do_not_fit_are_one_line(tmp_path, fault, words):
    save_part(transformers.ViTModel(transformers.ViTConfig(**VIT_SIZES)), tmp_path / "vit")
    fault(tmp_path / "vit")
    with pytest.raises(UserError, match=words) as error:
        initialise(tiny_config(image_size=24), str(tmp_path / "vit"), None)
    assert "\n" not in str(error.value)


def test_a_picture_size_that_the_patches_do_not_fit_is_one_line(tmp_path):
    save_part(transformers.ViTModel(transformers.ViTConfig(**VIT_SIZES)), tmp_path / "vit")
    with pytest.raises(UserError, match="image_size 36 is not divisible by patch_size 8"):
        initialise(tiny_config(image_size=36, patch_size=12), str(tmp_path / "vit"), None)
