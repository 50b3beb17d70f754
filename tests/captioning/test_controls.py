"""captioning/controls.py: what a person may ask of captions, through the command line and in shards."""

from __future__ import annotations

import csv
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from test_captioning import caption_of, model, picture  # noqa: F401
from test_shards import lines

import example_usage
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


def run(model, folder, *arguments: str, code: int = 0) -> tuple[str, str]:  # noqa: F811
    """example_usage.py in this process, which saves the seconds of a new one; what it prints, and its errors."""
    words = ["example_usage.py", arguments[0], str(model.path), *arguments[1:]]
    output, errors, found = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [*words, "--precision", "fp32", "--max-length", "8"])
        try:
            found = example_usage.main()
        except UserError as error:
            found = 2
            print(f"error: {error}", file=errors)
    assert found == code, errors.getvalue()
    return output.getvalue(), errors.getvalue()


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
    encode = model.tokenizer.encode
    written = model.generate(prepare_picture(picture(0), model.config)[None], num_beams=3, max_length=8).sequences[0]
    pieces = [(token, model.tokenizer.decode([token]).strip()) for token in written.tolist()]
    word = next(text for token, text in pieces if text and [token] in (encode(text), encode(f" {text}")))
    without = [caption_of(model, picture(seed), bad_words=[word])[0].text for seed in range(4)]
    run(model, folder, "photos", "--output", "out.jsonl", "--bad-words", word)
    assert captions(folder) == without != plain
    (folder / "words.txt").write_text("# allowed\na\nred\n\ncircle\n")
    run(model, folder, "photos", "--output", "out.jsonl", "--overwrite", "--only-words", "words.txt")
    assert {word for text in captions(folder) for word in text.split()} <= {"a", "red", "circle"}
    with pytest.raises(UserError, match="no words in it"):
        (folder / "words.txt").write_text("# none\n")
        read_words(folder / "words.txt")


def test_shorter_and_longer_captions(model, folder):  # noqa: F811
    pixels = torch.stack([prepare_picture(picture(seed), model.config) for seed in range(8)])
    lengths = []
    for length in ("short", "long"):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 0, "max_length": 20} | length_options(length, 1, 1, True)
        lengths.append(sum(len(own[0].text) for own in caption_batch(model, pixels, "fp32", **options)))
    assert lengths[0] < lengths[1]
    assert length_options("normal", 3, 3, False) == {}
    assert length_options("short", 2, 3, False) == {"num_beams": 4, "length_penalty": 0.0, "min_length": 0}
    assert length_options("long", 1, 3, False, max_length=8)["min_length"] == 8
    run(model, folder, "photos", "--output", "out.jsonl", "--length", "long")
    assert len(captions(folder)) == 4


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


@pytest.mark.parametrize("output", ["out.csv", "out.jsonl", "sidecar", "xmp", "tar", "parquet", "shards.jsonl"])
def test_several_captions_in_every_output(model, folder, output):  # noqa: F811
    """With the text around each of them."""
    expected = [
        [f"ohwx, {caption.text}" for caption in caption_of(model, picture(seed), num_return_sequences=2)]
        for seed in range(4)
    ]
    flags = ["--num-captions", "2", "--prepend", "ohwx, "]
    shards = output in ("tar", "parquet", "shards.jsonl")
    flags += ["--output", "out", "--format", output.split(".")[-1]] if shards else ["--output", output]
    run(model, folder, "photos", *flags)
    if shards:
        found = [line["captions"] for each in lines(folder / "out").values() for line in each]
    elif output == "out.csv":
        rows = list(csv.DictReader((folder / output).open()))
        found = [[row["caption_1"], row["caption_2"]] for row in rows]
    elif output == "out.jsonl":
        found = [json.loads(line)["captions"] for line in (folder / output).read_text().splitlines()[1:]]
    elif output == "sidecar":
        found = [(folder / f"photos/{seed}.txt").read_text().splitlines() for seed in range(4)]
    else:
        texts = [(folder / f"photos/{seed}.png.xmp").read_text() for seed in range(4)]
        assert all(text in texts[i] for i, each in enumerate(expected) for text in each)
        found = expected
    assert found == expected
