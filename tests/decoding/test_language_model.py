"""Llama and Qwen behind our prefix: tiny random folders, as transformers writes them, learn and caption like GPT-2."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import tiny_config, write_bases, write_language_model
from processes import small_config

from config import UserError
from model import ImageCaptionModel
from training.start import initialise
from weights.file import MODEL_FILE

PICTURES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
KINDS = ["llama", "qwen2"]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory, scenes_tokenizer):
    from transformers import AutoModelForCausalLM

    source = write_language_model(request.param, tmp_path_factory.mktemp(request.param), scenes_tokenizer)
    _, ours = initialise(tiny_config(bridge="prefix", max_length=64), None, source)
    with torch.no_grad():
        ours.enc_to_dec_proj.weight.normal_(std=0.3)
    ours.config.prompt_ids = (7, 9)
    return AutoModelForCausalLM.from_pretrained(source).eval(), ours.eval()


def embedded(ours, ids, pictures=PICTURES):
    return torch.cat([ours.encode(pictures), ours.decoder.wte(ids)], 1)


@torch.no_grad()
def test_logits_equal_transformers(pair):
    """The picture and the prompt go through the layers once; their cache, repeated for five captions, must fit each."""
    theirs, ours = pair
    ids = torch.randint(0, 300, (4, 5, 6))
    reference = theirs(inputs_embeds=embedded(ours, ids.flatten(0, 1), PICTURES.repeat_interleave(5, 0))).logits
    mine = ours(PICTURES, ids).logits.flatten(0, 1)
    assert ours.config.prefix_positions == 7 and reference.std() > 0.3
    assert (mine - reference[:, 7:]).abs().max() < 1e-5


CONTROLS = [  # no repetition_penalty: ours counts the start token too, as transformers does where it is in input_ids
    {},
    {"num_beams": 3},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 3, "bad_words": [[n] for n in range(100)], "min_length": 6},
]


@pytest.mark.parametrize("options", CONTROLS, ids=str)
def test_captions_equal_transformers(pair, options, scenes_tokenizer):
    theirs, ours = pair
    end = scenes_tokenizer.eos_token_id
    found = ours.generate(PICTURES, max_length=8, return_scores=True, **options)
    names = {"min_length": "min_new_tokens", "bad_words": "bad_words_ids"}
    reference = theirs.generate(
        inputs_embeds=embedded(ours, torch.full((4, 1), end)),
        attention_mask=torch.ones(4, 8, dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=end,
        **{names.get(name, name): value for name, value in options.items()},
    )
    assert torch.equal(found.sequences, reference[:, : found.sequences.shape[1]])
    assert len({tuple(row.tolist()) for row in reference}) > 1 and found.log_probs.max() < 0


def test_it_learns_and_is_saved(pair, tmp_path):
    """Gradients reach the projection through the shared cache; the file has no tensor twice and names no folder."""
    _, ours = pair
    optimizer = torch.optim.AdamW(ours.enc_to_dec_proj.parameters(), lr=0.02)
    ids, losses = torch.randint(0, 300, (4, 3, 6)), []
    for _ in range(6):
        loss = ours(PICTURES, ids, torch.tensor([[6, 2, 4]] * 4), ids.roll(-1, -1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    ours.save_file(tmp_path / "m.safetensors")
    loaded = ImageCaptionModel.from_pretrained(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(PICTURES, ids).logits, ours(PICTURES, ids).logits)
    assert loaded.tokenizer("a red circle").input_ids == ours.tokenizer("a red circle").input_ids


def test_cross_attention_is_gpt2s_alone(tmp_path, scenes_tokenizer):
    source = write_language_model("llama", tmp_path, scenes_tokenizer)
    with pytest.raises(UserError, match="add --bridge prefix"):
        initialise(tiny_config(), None, source)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_a_whole_run(scenes_dir, scenes_tokenizer, tmp_path, monkeypatch, kind):
    """--decoder with --qlora and --prompt, to the finished file of adapters and back; GPT-2 is this project's own there too."""
    pytest.importorskip("peft", reason="needs requirements/qlora.txt")
    from train import train

    bases = write_bases(tmp_path / "bases", 48, 8, len(scenes_tokenizer), 64)
    if kind == "gpt2":
        scenes_tokenizer.backend_tokenizer.model.save(bases["decoder"])
    else:
        write_language_model(kind, tmp_path / "bases" / kind, scenes_tokenizer)
    monkeypatch.chdir(tmp_path)
    names = {"init_encoder": bases["encoder"], "decoder": f"someone/{kind}", "base_dir": tmp_path / "bases"}
    config = small_config(scenes_dir, bridge="prefix", prefix_length=6, max_length=64, max_steps=4, **names)
    config = dataclasses.replace(
        config, tokenizer="auto", qlora=True, prompt="a photo of", val_pictures=2, num_workers=0
    )
    assert train(config) == 0
    model = ImageCaptionModel.from_pretrained(tmp_path / MODEL_FILE, tmp_path / "bases")
    assert model.config.prompt_ids == tuple(model.tokenizer("a photo of").input_ids) != ()
    assert (model.config.language_model is None) == (kind == "gpt2")
    assert model.generate(torch.zeros(1, 3, 48, 48), max_length=5).sequences.shape[0] == 1
