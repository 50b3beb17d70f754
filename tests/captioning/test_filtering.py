"""captioning/filtering.py: which pictures and captions of a data set are good enough to train on."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_package, random_model, write_language_model
from PIL import Image
from test_captioning import model  # noqa: F401
from tiny import tiny_config

import example_usage
from captioning.pipeline import caption_batch, confidences
from config import UserError
from data.copies import MAX_DIFFERENCE, MAX_DISTANCE, Known, View
from data.sources import load_tables
from data.tokenizer import decode
from dataset import prepare_picture
from model import ImageCaptionModel
from training.start import initialise


def photo(seed: int, quality: int = 95) -> bytes:
    """Soft spots of colour: no two seeds look alike; another quality is a near copy."""
    spots = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(spots).resize((96, 96), Image.Resampling.BICUBIC).save(content, "JPEG", quality=quality)
    return content.getvalue()


PICTURES: dict[str, list[tuple[bytes, list[str]]]] = {
    "train": [
        (photo(0), ["a dog runs over the green grass", "a dog runs over the green grass", "dog"]),
        (photo(1), ["two men sit on a bench in the park", "deux hommes sont assis sur un banc"]),
        (photo(1, 80), ["the men of the picture above once more"]),
        (photo(2), ["short one"]),
        (photo(100), ["a test picture that is in train too"]),
        (b"no picture", ["a picture that cannot be read at all"]),
        (photo(3), [f"a caption of {' '.join(['very'] * 30)} many words"]),
        (photo(4), ["a girl in a red dress holds a balloon"]),
    ],
    "val": [(photo(50), ["ok"]), (photo(51), ["the second picture of val"])],
    "test": [(photo(100), ["a picture of the test"]), (photo(100), ["its copy stays, as it is counted in scores"])],
}


@pytest.fixture
def data(tmp_path) -> Path:
    """COCO's layout."""
    numbers = count(1)
    for split, pictures in PICTURES.items():
        (folder := tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        about: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
        for i, (content, captions) in enumerate(pictures):
            (folder / f"{i}.jpg").write_bytes(content)
            about["images"].append({"id": (number := next(numbers)), "file_name": f"{i}.jpg"})
            about["annotations"] += [{"id": next(numbers), "image_id": number, "caption": c} for c in captions]
        (tmp_path / f"annotations/captions_{split}2017.json").write_text(json.dumps(about))
    return tmp_path


def run(*arguments: object, code: int = 0) -> str:
    """example_usage.py in this process; what it prints, and its errors."""
    output, found = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(output):
        patch.setattr(sys, "argv", ["example_usage.py", *map(str, arguments)])
        try:
            found = example_usage.main()
        except UserError as error:
            found = 2
            print(f"error: {error}")
    assert found == code, output.getvalue()
    return output.getvalue()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


@needs_package("imagehash", "data")
@needs_package("py3langid", "data")
def test_what_is_left_out_and_what_is_trained_on(data):
    before = load_tables("auto", data)
    limits = ("--min-words", "3", "--max-words", "20", "--language", "en")
    said = run(data, "--filter", data / "good.jsonl", *limits)
    assert load_tables("auto", data)["train"].about == before["train"].about, "the list is used only if it is named"
    after = load_tables("auto", data / "good.jsonl")
    assert {name: len(table) for name, table in after.items()} == {"train": 3, "val": 2, "test": 2}
    kept = {record["image"]: record["captions"] for record in records(data / "good.jsonl")}
    assert kept["train2017/0.jpg"] == ["a dog runs over the green grass"]
    assert kept["train2017/1.jpg"] == ["two men sit on a bench in the park"]
    assert kept["val2017/0.jpg"] == ["ok"], "val and test are measured with, and stay as they are"
    left = records(data / "good.left_out.jsonl")
    assert Counter(entry["reason"] for entry in left) == {
        "repeats another caption of the picture": 1,
        "fewer than 3 words": 2,
        "more than 20 words": 1,
        "not in the language en": 1,
        "near copy of another train picture": 1,
        "copy of a test picture": 1,
        "cannot be read": 1,
        "no caption left": 2,
    }
    assert {"image": "train2017/2.jpg", "reason": left[0]["reason"], "detail": "train2017/1.jpg"} == left[0]
    assert "2 pictures: no caption left" in said and "kept        3 pictures, 3 captions, 0 of them" in said
    for picture in (record["image"] for record in records(data / "good.jsonl")):
        assert (data / picture).is_file()
    said = run(data, "--filter", data / "good.jsonl", "--copies", "keep")
    assert "copy" not in said and "kept        7 pictures" in said


def test_captions_of_a_model_beside_the_persons(data, model):  # noqa: F811
    """Both are filtered by the model's confidence; other limits use what the first run has written."""
    flags = ("--keep", "both", "--precision", "fp32", "--max-length", "8", "--num-beams", "1", "--copies", "keep")
    run(data, model.path, "--filter", data / "good.jsonl", *flags)
    scores = {record["file_name"]: record for record in records(data / "good.scores.jsonl")}
    kept = {record["image"]: record["captions"] for record in records(data / "good.jsonl")}
    table = load_tables("auto", data)["train"]
    row = next(row for row in range(len(table)) if table.name_of(row).endswith("train2017/1.jpg"))
    pixels = prepare_picture(table.picture(row), model.config)[None]
    theirs = caption_batch(model, pixels, "fp32", num_beams=1, max_length=8, scores=True)[0][0]
    one = scores["train2017/1.jpg"]
    assert one["captions"] == [*PICTURES["train"][1][1], theirs.text] == kept["train2017/1.jpg"]
    assert one["scores"][2] == pytest.approx(theirs.score, abs=1e-4)
    each = sorted(value for name, record in scores.items() for value in record["scores"])
    least = each[len(each) // 2]
    written = (data / "good.scores.jsonl").read_bytes()
    said = run(data, model.path, "--filter", data / "good.jsonl", *flags, "--min-confidence", f"{least:.4f}")
    assert (data / "good.scores.jsonl").read_bytes() == written, "no picture was looked at again"
    kept = {record["image"]: record["captions"] for record in records(data / "good.jsonl")}
    for name, record in scores.items():
        pairs = zip(record["captions"], record["scores"], strict=True)
        good = list(dict.fromkeys(text for text, value in pairs if value >= least))
        assert kept.get(name, []) == good
    assert f"confidence below {least:g}" in said
    error = run(data, model.path, "--filter", data / "good.jsonl", *flags, "--prefix", "a", code=2)
    assert "choose another --filter" in error


def test_a_stopped_run_goes_on(data, model):  # noqa: F811
    flags = ("--keep", "model", "--precision", "fp32", "--max-length", "8", "--num-beams", "1", "--copies", "keep")
    run(data, model.path, "--filter", data / "good.jsonl", *flags)
    first = (data / "good.scores.jsonl").read_text()
    expected = (data / "good.jsonl").read_bytes()
    (data / "good.scores.jsonl").write_text(first[: len(first) // 2])
    (data / "good.jsonl").unlink()
    run(data, model.path, "--filter", data / "good.jsonl", *flags)
    assert (data / "good.scores.jsonl").read_text() == first and (data / "good.jsonl").read_bytes() == expected


def test_pictures_without_captions_get_a_models(data, model):  # noqa: F811
    """A folder of photographs becomes a data set; the training sets val and test aside."""
    (data / "photos/deep").mkdir(parents=True)
    for seed in range(6):
        (data / f"photos/deep/{seed}.jpg").write_bytes(photo(seed))
    (data / "photos/copy.jpg").write_bytes(photo(2))
    flags = ("--precision", "fp32", "--max-length", "8", "--num-beams", "1", "--prepend", "ohwx, ")
    out = data / "photos/good.jsonl"
    said = run(data / "photos", model.path, "--filter", out, "--keep", "model", *flags)
    assert "1 picture: copy of another train picture" in said and "6 captions, 6 of them by the model" in said
    assert all(record["captions"][0].startswith("ohwx, ") and "split" not in record for record in records(out))
    assert set(load_tables("auto", out)) == {"train", "val", "test"}
    error = run(data / "photos", model.path, "--filter", out, "--keep", "own", code=2)
    assert error.startswith("error: ")


def test_captions_that_do_not_fit_by_clip(data, clip_folder):
    flags = ("--clip", clip_folder, "--copies", "keep")
    run(data, "--filter", data / "good.jsonl", *flags, "--min-clip-score", "0.3")
    left = [entry for entry in records(data / "good.left_out.jsonl") if "CLIPScore" in entry["reason"]]
    kept = [record for record in records(data / "good.jsonl") if record["split"] == "train"]
    captions = sum(len(record["captions"]) for record in kept)
    from scoring.clip import clip_scores

    pairs = [(data / record["image"], text) for record in kept for text in record["captions"]]
    pairs += [(data / entry["image"], entry["caption"]) for entry in left]
    scores = clip_scores([text for _, text in pairs], [path for path, _ in pairs], model=clip_folder, progress=False)
    each = scores.per_picture["clip_score"]
    assert (each[:captions] >= 0.3).all() and (each[captions:] < 0.3).all() and 0 < captions < len(pairs)


def captioner(kind: str, tokenizer, folder: Path) -> ImageCaptionModel:
    """Random weights, which end captions early."""
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), tokenizer.eos_token_id)
    bridge = {"bridge": "cross_attention"} if kind == "cross_attention" else {"bridge": "prefix", "prefix_length": 3}
    config = tiny_config(vocab_size=len(tokenizer), max_length=64, **ids, **bridge)
    if kind == "llama":
        made = initialise(config, None, write_language_model("llama", folder, tokenizer))[1].eval()
    else:
        made = random_model(config)
        with torch.no_grad():
            end = made.decoder.wte.weight[made.config.end_token_id]
            made.decoder.ln_f.bias += 7 * end / end.square().sum()  # 7 is added to the end token's logit
    made.tokenizer = tokenizer
    return made


@pytest.mark.parametrize("kind", ["cross_attention", "prefix", "llama"])
def test_the_confidence_in_a_caption_is_the_one_it_is_written_with(kind, scenes_tokenizer, tmp_path):
    """Of both bridges and of another language model; beside captions of other lengths, and pictures without a caption."""
    writer = captioner(kind, scenes_tokenizer, tmp_path)
    end, encode = writer.config.end_token_id, scenes_tokenizer.encode
    pixels = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = [["a red circle", "a"], [], ["two small squares above a large blue triangle"], *[["a"]] * 9]
    found = confidences(writer, pixels, texts, "fp32")
    assert list(map(len, found)) == list(map(len, texts))
    for i, captions in enumerate(texts):
        for text, value in zip(captions, found[i], strict=True):
            tokens = [end, *encode(text), end]
            with torch.no_grad():
                logits = writer(pixels[i : i + 1], torch.tensor([tokens[:-1]])).logits
            each = logits.log_softmax(-1)[0].gather(-1, torch.tensor(tokens[1:])[:, None])
            assert value == pytest.approx(each.mean().exp().item(), rel=1e-4)
    assert confidences(writer, pixels[:2], [[], []], "fp32") == [[], []]
    if kind == "llama":
        return  # it does not end captions
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 20, "max_length": 12, "return_scores": True}
    written = writer.generate(pixels, **options)
    values = written.mean_log_probs.exp().tolist()
    compared = 0
    for number, (tokens, value) in enumerate(zip(written.sequences.tolist(), values, strict=True)):
        text = decode(scenes_tokenizer, torch.tensor([tokens]))[0]
        if end in tokens and encode(text) == tokens[: tokens.index(end)] != []:
            picture = pixels[number // 20][None]
            assert confidences(writer, picture, [[text]], "fp32")[0][0] == pytest.approx(value, rel=1e-3)
            compared += 1
    assert compared >= 5


def test_what_cannot_be_filtered_is_a_line(data, tmp_path, model):  # noqa: F811
    (data / "mine.jsonl").write_text('{"image": "train2017/0.jpg", "caption": "by hand"}\n')
    below = data / "train2017/good.jsonl"
    for arguments, words in [
        ((data, "--filter", data / "mine.jsonl"), "is no list of an earlier --filter"),
        ((data, "--filter", data / "good.csv"), "name a .jsonl file"),
        ((data, "--filter", data / "none/good.jsonl"), "no such folder"),
        ((data, "--filter", below), "stands above its pictures"),
        ((data, "--filter", data / "good.jsonl", "--output", "x.csv"), "goes with none of --output"),
        ((data, "--filter", data / "good.jsonl", "--language", "klingon"), "is not known: use one of"),
        ((data, "--filter", data / "good.jsonl", "--min-words", "9", "--max-words", "3"), "no caption has both"),
        ((data, "--filter", data / "good.jsonl", "--min-words", "90"), "ask for less"),
        ((data, data, "--filter", data / "good.jsonl"), "takes one data set"),
        ((data, "--min-words", "3"), "is an option of --filter"),
    ]:
        said = run(*arguments, code=2)
        assert words in said and said.count("\n") == 1, said
    assert not below.exists() and not (data / "good.jsonl").exists()
    assert "by hand" in (data / "mine.jsonl").read_text()


def test_near_copies_are_found_as_by_comparing_all():
    """A part of the hash in common is no more than a faster way to look."""
    rng = np.random.default_rng(0)
    view = View(400)
    base = rng.integers(0, 1 << 63, 40, dtype=np.uint64)
    for row in range(400):
        flips = rng.integers(0, 64, rng.integers(0, 7)).astype(np.uint64)
        view.phash[row] = base[row % 40] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=np.uint64(0))
        view.cells[row] = rng.integers(0, MAX_DIFFERENCE + 6)
    view.hashed[:] = True
    view.sha256 = [str(row).encode() for row in range(400)]
    known, found = Known(view), 0
    for row in range(400):
        distance = np.bitwise_count(view.phash[:row] ^ view.phash[row]).astype(int)
        colour = np.abs(view.cells[:row] - view.cells[row]).max(1, initial=0)
        close = np.flatnonzero((distance <= MAX_DISTANCE) & (colour <= MAX_DIFFERENCE))
        copy = known.find(view, row)
        assert (copy is None) == (not len(close))
        if copy:
            found += 1
            assert copy == (close[distance[close].argmin()], distance[close].min())
        known.add(row)
    assert 100 < found < 400
