"""captioning/controls.py: what a person may ask of captions, through the command line and in shards."""

from __future__ import annotations

import json

import pytest
from test_captioning import caption_of, model, picture, run  # noqa: F401

from captioning.controls import Finish, length_options, read_words
from captioning.pipeline import Caption, Result, caption_batch
from config import UserError
from dataset import prepare_picture


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(4):
        (tmp_path / f"photos/{seed}.png").write_bytes(picture(seed))
    return tmp_path


def captions(folder) -> list[str]:
    lines = (folder / "out.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["caption"] for line in lines]


def test_text_around_captions_and_their_beginning(model, folder):  # noqa: F811
    expected = [caption_of(model, picture(seed), prefix="there are")[0].text for seed in range(4)]
    flags = ("--prefix", "there are", "--prepend", "ohwx style, ", "--append", " (made)")
    run(model, folder, "photos", "--output", "out.jsonl", *flags)
    assert captions(folder) == [f"ohwx style, {text} (made)" for text in expected]
    made_by = json.loads((folder / "out.jsonl").read_text().splitlines()[0])["made_by"]
    assert made_by["prepend"] == "ohwx style, " and made_by["prefix"] == "there are"
    _, error = run(model, folder, "photos", "--output", "out.jsonl", code=2)
    assert "prefix there are" in error, "captions of other settings are not mixed"


def test_words_that_captions_may_have(model, folder):  # noqa: F811
    plain = [caption_of(model, picture(seed))[0].text for seed in range(4)]
    common = max(
        (word for text in plain for word in text.split()), key=lambda word: sum(word in text for text in plain)
    )
    run(model, folder, "photos", "--output", "out.jsonl", "--bad-words", common)
    assert captions(folder) != plain and not any(common in text.split() for text in captions(folder))
    (folder / "words.txt").write_text("# allowed\na\nred\n\ncircle\n")
    run(model, folder, "photos", "--output", "out.jsonl", "--overwrite", "--only-words", "words.txt")
    assert {word for text in captions(folder) for word in text.split()} <= {"a", "red", "circle"}
    with pytest.raises(UserError, match="no words in it"):
        (folder / "words.txt").write_text("# none\n")
        read_words(folder / "words.txt")


@pytest.mark.parametrize("sampling", [(), ("--do-sample", "--top-p", "0.9")])
def test_shorter_and_longer_captions(model, folder, sampling):  # noqa: F811
    lengths = []
    for length in ("short", "long"):
        run(
            model,
            folder,
            "photos",
            "--output",
            "out.jsonl",
            "--overwrite",
            "--length",
            length,
            *sampling,
            "--max-length",
            "20",
        )
        lengths.append(sum(map(len, captions(folder))))
    assert lengths[0] < lengths[1]
    assert length_options("normal", 3, 3, False) == {}


def test_of_many_samples_the_longest_are_kept(model):  # noqa: F811
    pixels = prepare_picture(picture(0), model.config)[None]
    options = {"do_sample": True, "num_return_sequences": 6, "max_length": 8}
    (longest,) = caption_batch(model, pixels, "fp32", keep=2, longest_first=True, **options)
    (shortest,) = caption_batch(model, pixels, "fp32", keep=2, longest_first=False, **options)
    assert len(longest) == len(shortest) == 2
    assert len(longest[0].text) >= len(longest[1].text) and len(shortest[0].text) <= len(shortest[1].text)


def test_no_caption_where_the_model_is_not_sure(model, folder):  # noqa: F811
    scored = [caption_of(model, picture(seed), scores=True)[0] for seed in range(4)]
    order = sorted(caption.score for caption in scored)
    flags = ("--min-confidence", str((order[1] + order[2]) / 2))
    output, _ = run(model, folder, "photos", "--output", "out.jsonl", *flags)
    expected = [caption.text if caption.score >= order[2] else "" for caption in scored]
    assert captions(folder) == expected and "2 of them without a caption" in output
    run(model, folder, "photos", "--output", "out.jsonl", "--overwrite", *flags, "--instead", "I do not know")
    assert captions(folder) == [text or "I do not know" for text in expected]
    run(model, folder, "photos", "--output", "sidecar", *flags)
    assert [(folder / f"photos/{i}.txt").exists() for i in range(4)] == [bool(text) for text in expected]
    output, _ = run(model, folder, "photos", *flags)
    assert output.count("(not sure)") == 2
    for wrong in (("--min-confidence", "2"), ("--instead", "x")):
        assert run(model, folder, "photos", *wrong, code=2)[1].startswith("error: ")


def test_several_captions_keep_their_number():
    finish = Finish(prepend="b ", min_confidence=0.5)
    (result,) = finish([Result("a", [Caption("x", 0.6), Caption("y", 0.4)])])
    assert [caption.text for caption in result.captions] == ["b x", ""]
