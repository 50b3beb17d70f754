"""Causal language models of many kinds behind our prefix: each is the one that transformers knows, or is refused at once."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import tiny_config, write_language_model
from safetensors.torch import load_file, save_file

from config import UserError
from model import ImageCaptionModel
from training.start import initialise

PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 300, (2, 3, 6), generator=torch.Generator().manual_seed(2))
LENGTHS = torch.tensor([[6, 2, 4], [1, 6, 5]])
WINDOW = {"sliding_window": 4}
HALVES = {"rotary_dim": 4}
TIED = {"tie_word_embeddings": True}
BART = {
    "d_model": 32,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
}
BART |= {"decoder_ffn_dim": 48, "encoder_ffn_dim": 48}

RIGHT = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.4},
    "cohere": {"logit_scale": 0.25} | TIED,
    "cohere2": {"logit_scale": 0.25, "num_hidden_layers": 4} | WINDOW | TIED,
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8} | WINDOW | TIED,
    "phi": {},
    "gptj": HALVES,
    "codegen": HALVES,
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8} | TIED,
    "gemma3_text": {"head_dim": 8} | WINDOW | TIED,
    "olmo2": {},
    "stablelm": {},
    "starcoder2": TIED,
    "phi3": {},
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4} | TIED,
    "gpt_bigcode": TIED,
    "opt": {"word_embed_proj_dim": 16} | TIED,
    "falcon": TIED,
    "biogpt": TIED,
    "xglm": {"pad_token_id": 1} | TIED,
    "smollm3": TIED,
    "nemotron": {},
    "glm": {"head_dim": 8},
    "helium": {"head_dim": 8},
    "bloom": TIED,
    "mpt": TIED,
    "mixtral": {"num_local_experts": 2, "output_router_logits": True},
    "bert": {"is_decoder": True} | TIED,
    "electra": {"is_decoder": True, "embedding_size": 16} | TIED,
}
REFUSED = {
    "bert": ({}, "attend to later ones: try is_decoder"),
    "roberta": ({"pad_token_id": 1}, "attend to later ones: try is_decoder"),
    "electra": ({}, "attend to later ones: try is_decoder"),
    "mamba": ({}, "does not cache keys and values"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "does not cache keys and values"),
    "bart": (BART, "does not cache keys and values"),
    "openai-gpt": ({}, "does not cache keys and values"),
    "roberta as a decoder": ({"pad_token_id": 1, "is_decoder": True}, "token by token differ"),
}


def start(kind: str, folder, tokenizer, **changes) -> tuple[str, ImageCaptionModel]:
    """A folder of such a model, and ours from it, whose pictures matter."""
    source = write_language_model(kind, folder, tokenizer, **changes)
    _, ours = initialise(tiny_config(bridge="prefix", max_length=64), None, source)
    with torch.no_grad():
        ours.enc_to_dec_proj.weight.normal_(std=0.3)
    return source, ours.eval()


def gradients(model: ImageCaptionModel, *inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", RIGHT)
def test_it_is_the_model_that_transformers_knows(kind, tmp_path, scenes_tokenizer):
    """What stands behind the last state was dropped without a word: scales (granite, cohere), caps (gemma2), a head's bias
    (phi, gptj, codegen), a transform (bert, electra). OPT-350m's narrow embeddings and models without a last position
    (bloom, mpt) stopped with an AttributeError or a wrong shape."""
    source, ours = start(kind, tmp_path, scenes_tokenizer, **RIGHT[kind])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        prefix = ours.encode(PICTURES)
        read = torch.cat([prefix.repeat_interleave(3, 0), ours.decoder.wte(IDS.flatten(0, 1))], 1)
        expected = theirs(inputs_embeds=read).logits[:, prefix.shape[1] :]
        mine = ours(PICTURES, IDS).logits.flatten(0, 1)
        cache = ours.decoder.new_cache(prefix, 6, 6)
        cached = [ours.decoder.next_logits(tokens, cache) for tokens in IDS.flatten(0, 1).split(1, 1)]
        nothing = ours.decoder(IDS[:, 0], ours.decoder.look(prefix))[:0, 0]
        assert ours.decoder.head(nothing).shape == (0, ours.config.vocab_size)  # a process's share of a batch may be
    assert expected.std() > 0.1  # or the comparison would say little
    assert (mine - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert (torch.stack(cached, 1) - mine).abs().max() < 1e-5 * max(1, mine.abs().max())
    labels = IDS.roll(-1, -1).masked_fill(torch.arange(6) >= LENGTHS.unsqueeze(-1), -100)
    together, apart = gradients(ours, PICTURES, IDS, LENGTHS, labels), {}
    for k in range(3):
        share = LENGTHS[:, k].sum() / LENGTHS.sum()
        for name, gradient in gradients(ours, PICTURES, IDS[:, k], LENGTHS[:, k], labels[:, k]).items():
            apart[name] = apart.get(name, 0) + share * gradient
    assert {"enc_to_dec_proj.weight"} < together.keys() == apart.keys()
    for name, gradient in together.items():
        assert (gradient - apart[name]).abs().max() < 1e-5 * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(kind, tmp_path, scenes_tokenizer):
    """bert and roberta saw the words they were to predict: the loss fell, and the captions were "AAAA". Models without keys
    and values stopped in the middle of a run."""
    changes, words = REFUSED[kind]
    with pytest.raises(UserError, match=words) as error:
        start(kind.removesuffix(" as a decoder"), tmp_path, scenes_tokenizer, **changes)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["phi", "gemma2", "bert"])
def test_a_file_and_a_copy_have_all_of_it(kind, tmp_path, scenes_tokenizer):
    """A head that reads another model's embeddings would learn nothing of its own; a tensor by two names fits no file."""
    _, ours = start(kind, tmp_path, scenes_tokenizer, **RIGHT[kind])
    ours.save_file(file := tmp_path / "m.safetensors")
    loaded, twin = ImageCaptionModel.from_pretrained(file), copy.deepcopy(ours)
    with torch.no_grad():
        before = ours(PICTURES, IDS).logits
        assert torch.equal(loaded(PICTURES, IDS).logits, before) and torch.equal(twin(PICTURES, IDS).logits, before)
        for parameter in twin.decoder.parameters():
            parameter.mul_(2)
        assert torch.equal(ours(PICTURES, IDS).logits, before)
        states = torch.randn(5, 32)
        assert not torch.equal(twin.decoder.head(states), ours.decoder.head(states))


def test_a_file_from_before_heads_had_their_bias(tmp_path, scenes_tokenizer):
    """Its model learned without one, and would be another with one; without this it did not load at all."""
    _, ours = start("phi", tmp_path, scenes_tokenizer)
    ours.save_file(file := tmp_path / "m.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    weights = load_file(file)
    assert weights.pop("decoder.lm_head.bias").abs().max() > 0
    save_file(weights, file, metadata=about)
    loaded = ImageCaptionModel.from_pretrained(file)
    with torch.no_grad():
        ours.decoder.lm_head.bias.zero_()
        assert torch.equal(loaded(PICTURES, IDS).logits, ours(PICTURES, IDS).logits)


def test_a_file_whose_words_see_the_next_ones(tmp_path, scenes_tokenizer):
    """A model trained before this was looked at: it loads, and captions nonsense."""
    _, ours = start("bert", tmp_path, scenes_tokenizer, **RIGHT["bert"])
    assert '"is_decoder": true' in ours.config.language_model
    ours.config.language_model = ours.config.language_model.replace('"is_decoder": true', '"is_decoder": false')
    ours.save_file(file := tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors: this version .*attend to later ones") as error:
        ImageCaptionModel.from_pretrained(file)
    assert "\n" not in str(error.value)


# Tokens that the tokenizer lacks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 5},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_tokens_without_words_are_never_drawn(tmp_path, scenes_tokenizer, options):
    """Qwen and Phi have more rows than their tokenizers have tokens: captions held ids that nothing can decode, and training
    by rewards learned from them."""
    words = len(scenes_tokenizer)
    _, ours = start("phi", tmp_path, scenes_tokenizer, vocab_size=words + 8)
    assert ours.config.vocab_size == words + 8
    with torch.no_grad():
        ours.decoder.lm_head.bias[words:] += 100  # they would be all that is ever said
    found = ours.generate(PICTURES, max_length=5, return_scores=True, **options)
    assert found.sequences.max() < words and found.log_probs.isfinite().all()


@pytest.mark.parametrize("behind", [4, 0])
def test_gaps_in_a_tokenizer_are_never_drawn(tiny_model, behind):
    """Its ids need not be all that lie below its last one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    size = tiny_model.config.vocab_size
    vocabulary = {f"w{n}": n for n in range(0, size - 5, 2)} | {"<end>": size - 1 - behind}
    tiny_model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "w0")))
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 50}
    tiny_model.config.end_token_id = size - 1 - behind
    found = tiny_model.generate(torch.randn(2, 3, 16, 16), max_length=8, **options).sequences
    assert set(found.flatten().tolist()) <= set(vocabulary.values()) and len(found.unique()) > 10


def test_more_words_than_rows_is_one_line(tmp_path, scenes_tokenizer):
    """An id behind the last row is an IndexError in the middle of a run, on a GPU an assertion without a name."""
    with pytest.raises(UserError, match=r"tokens and its embedding [\d,]+ rows: .*resize_token_embeddings"):
        start("llama", tmp_path, scenes_tokenizer, vocab_size=len(scenes_tokenizer) - 3, pad_token_id=0, bos_token_id=0)
