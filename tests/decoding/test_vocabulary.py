"""decoding/vocabulary.py: captions of given words only, whatever the search."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config, write_language_model

from config import UserError
from data.tokenizer import decode
from training.start import initialise

WORDS = ("a", "small", "red", "circle", "there are", "squares", "greenish")


@pytest.fixture(params=["cross_attention", "prefix", "llama"])
def captioner(request, scenes_tokenizer, tmp_path):
    if request.param == "llama":  # --decoder
        source = write_language_model("llama", tmp_path, scenes_tokenizer)
        model = initialise(tiny_config(bridge="prefix", max_length=40), None, source)[1].eval()
        model.tokenizer = scenes_tokenizer
        return model
    end = scenes_tokenizer.eos_token_id
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), end)
    config = tiny_config(vocab_size=len(scenes_tokenizer) + 3, bridge=request.param, max_length=40, **ids)
    model = random_model(config)
    model.tokenizer = scenes_tokenizer
    return model


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 3, 16, 16), generator=torch.manual_seed(0), dtype=torch.uint8)


def consists_of(text: str, words: tuple[str, ...]) -> bool:
    """Whether a text is some of the words, separated by spaces."""
    text = text.strip()
    return not text or any(
        text == word or (text.startswith(f"{word} ") and consists_of(text[len(word) :], words)) for word in words
    )


SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 4},
    "beams that sample": {"num_beams": 3, "do_sample": True},
    "long": {"min_length": 8},
    "repetition": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("length", [3, 12])
def test_captions_have_these_words_alone(captioner, pixels, search, length):
    """Also where they are cut: no half a word at the end. A word of several tokens may be cut into by another one's first."""
    options = SEARCHES[search] | {"max_length": length}
    if options.get("min_length", 0) > length:
        options["min_length"] = 2
    torch.manual_seed(1)
    found = decode(captioner.tokenizer, captioner.generate(pixels, only_words=WORDS, **options).sequences)
    assert all(consists_of(text, WORDS) for text in found), found
    assert any(text.strip() for text in found)
    free = decode(captioner.tokenizer, captioner.generate(pixels, **options).sequences)
    assert not all(consists_of(text, WORDS) for text in free), "or the rule has nothing to do"


def test_the_likeliest_of_the_words_are_written(captioner, pixels):
    """With every word of the tokenizer allowed nothing changes; what a picture gets does not depend on its batch."""
    model = captioner
    free = model.generate(pixels, max_length=12).sequences
    text = decode(model.tokenizer, free)[0]
    words = tuple(text.split())
    if words and model.tokenizer(text).input_ids == free[0, : len(model.tokenizer(text).input_ids)].tolist():
        same = model.generate(pixels[:1], max_length=12, only_words=words).sequences
        assert decode(model.tokenizer, same)[0].split()[:1] == [words[0]]
    together = model.generate(pixels, max_length=12, only_words=WORDS).sequences
    alone = torch.cat(
        [
            torch.nn.functional.pad(one, (0, together.shape[1] - one.shape[1]), value=model.config.end_token_id)
            for one in (model.generate(pixels[i : i + 1], max_length=12, only_words=WORDS).sequences for i in range(3))
        ]
    )
    assert torch.equal(together, alone)


def test_behind_a_prefix_the_words_begin_anew(captioner, pixels):
    found = captioner.generate(pixels, prefix="there are two", only_words=WORDS, max_length=8).sequences
    for text in decode(captioner.tokenizer, found):
        assert text.startswith("there are two") and consists_of(text.removeprefix("there are two"), WORDS)


def test_an_empty_word_is_refused(captioner, pixels):
    with pytest.raises(UserError, match="only_words: a word is empty"):
        captioner.generate(pixels, only_words=("a", " "))
