"""Captions for many pictures: example_usage.py as people run it, killed and run again, and what it is made of."""

from __future__ import annotations

import csv
import fcntl
import functools
import http.server
import io
import itertools
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config
from PIL import Image
from processes import SECONDS, finished, launch

import example_usage
from captioning import pipeline as captioning
from captioning.outputs import CaptionFile, open_output
from captioning.pipeline import Caption, caption_batch, caption_pictures, picture_names, prepared, words_seen
from captioning.xmp import with_caption
from config import UserError
from data.layouts import pictures_below
from data.sources import load_table
from dataset import prepare_picture
from model import ImageCaptionModel
from utils import in_one_line


@pytest.fixture(scope="module")
def model(scenes_tokenizer, tmp_path_factory) -> ImageCaptionModel:
    """Random weights, spread wide enough that pictures have captions of their own; `path` is its file."""
    torch.manual_seed(0)
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), scenes_tokenizer.eos_token_id)
    made = ImageCaptionModel(tiny_config(vocab_size=len(scenes_tokenizer), **ids))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    made.tokenizer = scenes_tokenizer
    made.path = tmp_path_factory.mktemp("model") / "model.safetensors"
    made.save_file(made.path)
    return made.eval()


def picture(seed: int) -> bytes:
    """The file of a small picture, another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((50, 40)).save(file, "PNG")
    return file.getvalue()


def start(model: ImageCaptionModel, cwd: Path, *arguments: str | Path, **options) -> subprocess.Popen:
    """example_usage.py with this model, in fp32, so that captions do not depend on the batch."""
    inputs = list(itertools.takewhile(lambda argument: not str(argument).startswith("--"), arguments))
    command = [*inputs, model.path, *arguments[len(inputs) :], "--precision", "fp32", "--max-length", "8"]
    return launch("example_usage.py", *command, cwd=cwd, stdin=subprocess.PIPE, **options)


def run(model: ImageCaptionModel, cwd: Path, *arguments: str | Path, code: int = 0, stdin: str = "") -> tuple[str, str]:
    """The same to its end; standard output and standard error."""
    process = start(model, cwd, *arguments)
    output, error = process.communicate(stdin, timeout=SECONDS)
    assert process.returncode == code, output + error
    return output, error


def caption_of(model: ImageCaptionModel, content: bytes | Path, **decoding) -> list[Caption]:
    """What the tool should say of a picture."""
    pixels = prepare_picture(content, model.config)[None]
    return caption_batch(model, pixels, "fp32", **{"num_beams": 3, "max_length": 8} | decoding)[0]


def test_the_pictures_of_these_tests_have_captions_of_their_own(model):
    """Or the tests below could not tell whether a caption has been given to the right picture."""
    assert len({caption_of(model, picture(seed))[0].text for seed in range(12)}) > 6


ODD_NAMES = ["a.png", 'comma, "quotes".png', "Käse 猫.jpeg", "line\nbreak.png", " spaces .PNG", "[1].png", "=1+1.png"]


def test_a_folder_with_odd_names_into_a_csv(model, tmp_path):
    """Everything below the folder, in order, with the captions of this picture and not of the next; damaged ones named;
    and the file is one that can be trained on."""
    photos = tmp_path / "photos"
    (photos / "deep" / "er").mkdir(parents=True)
    contents = {photos / name: picture(seed) for seed, name in enumerate(ODD_NAMES)}
    contents[photos / "deep/er/b.png"] = picture(50)
    for path, content in contents.items():
        path.write_bytes(content)
    (photos / "notes.txt").write_text("no picture")
    (photos / "._a.png").write_text("what a Mac leaves")
    (photos / "cut.png").write_bytes(picture(0)[:70])
    (photos / "deep" / "web page.jpg").write_text("<!DOCTYPE html>")
    flags = ["--output", "captions.csv", "--num-captions", "2", "--scores", "--batch-size", "3", "--beams", "4"]
    output, error = run(model, tmp_path, "photos", *flags, code=1)
    assert "captions.csv: 8 pictures captioned" in output and "2 could not be read" in output
    assert sorted(line.split(": ")[1] for line in error.splitlines()) == ["photos/cut.png", "photos/deep/web page.jpg"]
    with open(tmp_path / "captions.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file_name", "caption_1", "caption_2", "score_1", "score_2"]
    names = [in_one_line(str(path.relative_to(tmp_path))) for path in sorted(contents)]
    assert (
        sorted(row[0] for row in rows) == sorted(names)
        and len((tmp_path / "captions.csv").read_bytes().split(b"\n")) == 10
    )
    for path, content in contents.items():
        row = next(row for row in rows if row[0] == in_one_line(str(path.relative_to(tmp_path))))
        expected = caption_of(model, content, num_beams=4, num_return_sequences=2, scores=True)
        assert row[1:3] == [caption.text for caption in expected]
        assert list(map(float, row[3:])) == pytest.approx([caption.score for caption in expected], abs=1e-4)
        assert 0 < expected[0].score < 1
    (photos / "line\nbreak.png").rename(photos / "line\\nbreak.png")  # the name that stands in the file
    tables = [load_table("csv", tmp_path / "captions.csv", split) for split in ("train", "val", "test")]
    assert sum(map(len, tables)) == 8 and not any(table.missing for table in tables)


def test_names_on_standard_input_into_json_lines(model, tmp_path):
    for seed, name in enumerate(["b.png", "a.png", "c.png"]):
        (tmp_path / name).write_bytes(picture(seed))
    listed = "b.png\r\n\nabsent.png\na.png\n"
    _, error = run(model, tmp_path, "-", "--output", "out/captions.jsonl", "--scores", code=1, stdin=listed)
    assert error == "error: absent.png: no such file\n"
    made_by, *records = map(json.loads, (tmp_path / "out/captions.jsonl").read_text().splitlines())
    assert list(made_by) == ["made_by"]
    assert [record["file_name"] for record in records] == ["b.png", "a.png"]
    expected = caption_of(model, picture(0), scores=True)[0]
    assert records[0] == {
        "file_name": "b.png",
        "caption": expected.text,
        "score": pytest.approx(expected.score, abs=1e-4),
    }
    _, error = run(model, tmp_path, "-", code=2)
    assert error == "error: -: no names on standard input\n"


def test_sidecars(model, tmp_path):
    """A text beside each picture, which is a layout that can be trained on; texts that are there are a person's own."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        (photos / f"{seed}.png").write_bytes(picture(seed))
    (photos / "1.txt").write_text("my own words\n")
    output, _ = run(model, tmp_path, "photos", "--output", "sidecar", "--num-captions", "2")
    assert "2 pictures captioned" in output and "1 were there" in output
    assert (photos / "1.txt").read_text() == "my own words\n"
    expected = caption_of(model, picture(2), num_return_sequences=2)
    assert (photos / "2.txt").read_text().splitlines() == [caption.text for caption in expected]
    assert {path.name for path in photos.iterdir()} == {f"{n}.{kind}" for n in range(3) for kind in ("png", "txt")}
    assert len(load_table("sidecar", photos, "train")) == 1


def test_xmp_files(model, tmp_path):
    """Where photo programs look. A description that is there is a person's own, and what else a file holds stays."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        (photos / f"{seed}.png").write_bytes(picture(seed))
    xmp = [photos / f"{seed}.png.xmp" for seed in range(3)]
    xmp[1].write_text(with_caption(xmp[1], "my own words"))
    xmp[2].write_text(
        with_caption(xmp[2], "").replace("<rdf:Description ", '<rdf:Description xmlns:r="x:" r:rating="4" ')
    )
    before = xmp[1].read_bytes()
    output, _ = run(model, tmp_path, "photos", "--output", "xmp", "--num-captions", "2")
    assert "2 pictures captioned" in output and "1 were there" in output
    assert xmp[1].read_bytes() == before and 'r:rating="4"' in xmp[2].read_text()
    text = "\n".join(caption.text for caption in caption_of(model, picture(2), num_return_sequences=2))
    assert xmp[2].read_text().count(f">{text}</rdf:li>") == 2
    output, _ = run(model, tmp_path, "photos", "--output", "xmp")
    assert "0 pictures captioned" in output and "3 were there" in output
    output, _ = run(model, tmp_path, "photos", "--output", "xmp", "--overwrite")
    assert "3 pictures captioned" in output and "my own words" not in xmp[1].read_text()
    assert len(list(photos.iterdir())) == 6


TEXTS = {  # beside a.png -> whether that is what a reader takes for its captions
    "a.caption": True,
    "a.png.txt": True,
    "a.png.caption": True,
    "a.TXT": True,
    "a.Caption": True,
    "b.txt": False,
    "a.text": False,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("words", ["my own words\n", "\ufeff \n\n"])
def test_whatever_a_reader_takes_for_a_text_is_there(name, words, tmp_path):
    """Only a.txt counted as there: one was written beside a person's a.caption, and read instead of it from then on. An
    empty text is no caption, and does not hide the one that is written."""
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_text(words)
    output = open_output("sidecar", [path := str(tmp_path / "a.png")])
    assert output.begin({}) == 0
    there = TEXTS[name] and words != "\ufeff \n\n"
    assert output.missing([path]) == ([] if there else [path])
    if not there:
        output.add(path, [Caption("a dog")])
    ((_, (text, *_)),) = pictures_below(tmp_path)
    assert text.read_text() == ("my own words\n" if there else "a dog\n")
    output = open_output("sidecar", [path])
    assert output.begin({}, overwrite=True) == 1 and output.missing([path]) == [path]
    output.add(path, [Caption("a cat")])
    ((_, (text, *_)),) = pictures_below(tmp_path)
    assert text.read_text() == "a cat\n"
    assert (tmp_path / name).read_text() == (words if text.name != name else "a cat\n")


@pytest.mark.parametrize("stopped_after", range(4))
def test_pictures_that_share_a_name_have_texts_of_their_own(stopped_after, tmp_path):
    """One pair x.jpg, x.png refused a whole folder. Wherever it is stopped, the same command does the rest; and a picture
    that is captioned alone does not give its text to its neighbour."""
    names = [str(tmp_path / name) for name in ("x.jpg", "x.png", "x.png.webp")]
    for name in names:
        Path(name).touch()
    for most in (stopped_after, 3):
        output = open_output("sidecar", names)
        for name in output.missing(names)[:most]:
            output.add(name, [Caption(f"of {Path(name).name}")])
    read = {picture.name: texts[0].read_text() for picture, texts in pictures_below(tmp_path)}
    assert read == {name: f"of {name}\n" for name in ("x.jpg", "x.png", "x.png.webp")}
    assert {path.name for path in tmp_path.glob("*.txt")} == {"x.txt", "x.png.txt", "x.png.webp.txt"}


def test_overwriting_says_how_much(model, tmp_path, monkeypatch, capsys):
    """Texts of people are replaced only when asked, and never unsaid; those of pictures that are not named stay."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for seed in range(3):
        Path(f"photos/{seed}.png").write_bytes(picture(seed))
    Path("photos/1.caption").write_text("my own words\n")
    for flags, said in (
        ((), "2 pictures captioned"),
        (("--overwrite",), "replacing the captions of 3 pictures"),
    ):
        monkeypatch.setattr(sys, "argv", ["example_usage.py", "photos", str(model.path), "--output", "sidecar", *flags])
        assert example_usage.main() == 0 and said in capsys.readouterr().out
        assert (Path("photos/1.caption").read_text() == "my own words\n") == (flags == ())
    assert not Path("photos/1.txt").exists() and len(list(Path("photos").iterdir())) == 6
    assert open_output("sidecar", ["photos/0.png"]).begin({}, overwrite=True) == 1


def test_scores_samples_and_several_captions_on_standard_output(model, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "b\n.png").write_bytes(picture(1))
    output, _ = run(model, tmp_path, "a.png", "--scores", "--num-beams", "1")
    expected = caption_of(model, picture(0), num_beams=1, scores=True)[0]
    assert output == f"{expected.text}\t{expected.score:.4f}\n"
    output, _ = run(
        model, tmp_path, "*.png", "--num-captions", "2", "--do-sample", "--temperature", "1.5", "--top-k", "0"
    )
    assert [line.split("\t")[0] for line in output.splitlines()] == ["a.png"] * 2 + ["b\\n.png"] * 2


def test_a_heat_map(model, tmp_path):
    """One panel for the picture and one for each word, bright where the model looked."""
    Image.new("RGB", (90, 60), "white").save(tmp_path / "a.png")
    output, _ = run(model, tmp_path, "a.png", "--heatmap", "map.png")
    with Image.open(tmp_path / "map.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    assert output.strip() and min(pixels.shape[:2]) > 150
    assert (
        pixels.max(-1) - pixels.min(-1)
    ).max() == 0  # a white picture's figure is grey throughout: no colour is needed
    assert ((pixels > 30) & (pixels < 230)).mean() > 0.02


REFUSED = [
    ("a.png --output file/captions.csv", "file/captions.csv: cannot be written"),
    ("a.png --output notes.csv", "exists, but its columns are not file_name, caption"),
    ("a.png --output captions.xlsx", "must be a .csv file, a .jsonl file, or the word sidecar or xmp"),
    ("a.png --output sidecar --scores", "cannot hold scores"),
    ("a.png --overwrite", "overwrite has no effect without --output"),
    ("http://x/a.png --output sidecar", "no folder for a text beside it"),
    ("http://x/a.png --output xmp", "no folder for an XMP file beside it"),
    ("a.png --output xmp --scores", "output xmp cannot hold scores"),
    ("a.png --num-captions 0", "num_captions is 0"),
    ("a.png --batch-size 0", "batch_size is 0"),
    ("empty", "empty: no pictures in this folder"),
    ("*.tiff", "*.tiff: no picture matches this pattern"),
    ("a.png a.jpg --heatmap map.png", "of a single picture, and there are 2"),
    ("a.png --heatmap absent/map.png", "absent/map.png: the heat map cannot be written (No such file or directory)"),
    ("a.png --heatmap map.docx", "map.docx: the heat map cannot be written (Format 'docx' is not supported"),
    ("a.png --num-captions 3 --beams 2", "3 captions a picture need as many beams"),
    ("a.png --max-length 99", "max_length 99 must be between 1 and"),
]


@pytest.mark.parametrize("line, said", REFUSED)
def test_what_cannot_be_done_is_said_in_one_line(line, said, model, tmp_path, monkeypatch):
    """And what is there stays as it is."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("empty").mkdir()
    Path("notes.csv").write_text("picture,price\na.png,3\n")
    for name in ("a.png", "a.jpg"):
        Path(name).write_bytes(picture(0))
    model.save_file("model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    inputs = list(itertools.takewhile(lambda word: not word.startswith("--"), line.split()))
    flags = line.split()[len(inputs) :]
    monkeypatch.setattr(sys, "argv", ["example_usage.py", *inputs, "model.safetensors", *flags])
    with pytest.raises(UserError) as caught:
        example_usage.main()
    assert said in str(caught.value) and str(caught.value).isprintable()
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--output captions.xlsx", r"must be a \.csv file, a \.jsonl file"),
        ("--heatmap map.xyz", r"map\.xyz: the heat map cannot be written \(Format 'xyz' is not supported"),
        ("--heatmap absent/map.png", "No such file or directory"),
    ],
)
def test_a_wrong_output_is_said_before_a_model_is_loaded(flags, said, tmp_path, monkeypatch):
    """Which takes seconds, or a download. It once was said after; of a heat map, after the caption was made too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example_usage.py", "a.png", "absent.safetensors", *flags.split()])
    with pytest.raises(UserError, match=said):
        example_usage.main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "a.png b.png M --output x.jsonl",
        "a.png b.png --output x.jsonl M",
        "a.png --output x.jsonl b.png M",
        "--output x.jsonl --scores a.png --device cpu b.png M",
        "--model M a.png b.png --output x.jsonl",
        "a.png --output x.jsonl b.png --model M",
        "- --output x.jsonl --model M",
        "--output x.jsonl - M",
    ],
)
def test_the_model_stands_where_people_put_it(line, model, tmp_path, monkeypatch):
    """Behind an option it was refused as an unknown one."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["a.png", "b.png"]):
        Path(name).write_bytes(picture(seed))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\nb.png\n")))
    words = [str(model.path) if word == "M" else word for word in line.split()]
    monkeypatch.setattr(sys, "argv", ["example_usage.py", *words])
    assert example_usage.main() == 0
    made_by, *records = map(json.loads, Path("x.jsonl").read_text().splitlines())
    assert made_by["made_by"]["model"] == str(model.path)
    assert [record["file_name"] for record in records] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "line, flag", [("a.png --ouput x.csv M", "--ouput"), ("a.png --output x.csv M --no-such", "--no-such")]
)
def test_what_is_no_option_is_still_refused(line, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example_usage.py", *line.split()])
    with pytest.raises(SystemExit) as ended:
        example_usage.main()
    assert ended.value.code == 2 and flag in capsys.readouterr().err


def test_what_a_console_cannot_show_is_replaced(model, tmp_path):
    """The first name that Windows' code page lacks ended everything, with the exit code of a damaged picture."""
    for seed, name in enumerate(["a.png", "é🐶.png", "猫.png", "z.png"]):
        (tmp_path / name).write_bytes(picture(seed))
    arguments = ["a.png", "é🐶.png", "猫.png", "z.png", str(model.path), "--batch-size", "1", "--num-beams", "1"]
    encoded = {"environment": {"PYTHONIOENCODING": "cp1252"}, "text": False}
    done = finished("example_usage.py", *arguments, cwd=tmp_path, **encoded)
    names = [line.split(b"\t")[0] for line in done.stdout.splitlines()]
    assert names == [b"a.png", b"\xe9?.png", b"?.png", b"z.png"], done.stderr


# Stopped and run again


class Pictures(http.server.BaseHTTPRequestHandler):
    """/N is the picture of seed N; one of /wait is not sent until that is set."""

    wait: threading.Event
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/8":
            self.wait.wait(60)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture(int(self.path[1:])))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = type("Handler", (Pictures,), {"wait": threading.Event(), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        made.handler = handler
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        handler.wait.set()
        made.shutdown()


@pytest.mark.parametrize("kind, number", [("csv", signal.SIGKILL), ("jsonl", signal.SIGINT)])
def test_what_was_stopped_goes_on(kind, number, model, tmp_path, server):
    """Killed or interrupted in the middle, the same command does only what is missing, and the file is whole."""
    addresses = [f"http://127.0.0.1:{server.server_port}/{seed}" for seed in range(12)]
    arguments = [*addresses, "--output", f"captions.{kind}", "--allow-private-urls", "--batch-size", "4"]
    process, path = start(model, tmp_path, *arguments), tmp_path / f"captions.{kind}"
    lines = 1 + 8
    while not path.exists() or path.read_bytes().count(b"\n") < lines:  # it waits for the picture after these
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    server.handler.wait.set()
    output, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert error == f"stopped: 8 more captioned in captions.{kind}; run the same command to resume\n"
    before = path.read_bytes()
    assert before.count(b"\n") == lines and before.endswith(b"\n")
    server.handler.asked.clear()
    output, _ = run(model, tmp_path, *arguments)
    assert "4 pictures captioned" in output and "8 were there" in output
    assert sorted(server.handler.asked) == ["/10", "/11", "/8", "/9"]
    assert path.read_bytes().startswith(before)
    written = path.read_text().splitlines()[1:]
    rows = list(csv.reader(written)) if kind == "csv" else [list(json.loads(line).values()) for line in written]
    expected = [[name, caption_of(model, picture(seed))[0].text] for seed, name in enumerate(addresses)]
    assert rows == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_remembers_what_wrote_it(kind, model, tmp_path, monkeypatch, capsys):
    """Another model with the same --output was told that all pictures "were there"."""
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        Path(f"{seed}.png").write_bytes(picture(seed))
    other = ImageCaptionModel.from_pretrained(model.path)
    torch.nn.init.normal_(other.decoder.wte.weight)
    other.save_file("other.safetensors")
    path = Path(f"captions.{kind}")

    def run_with(source: str | Path, *flags: str) -> str:
        given = ["example_usage.py", "*.png", str(source), "--output", str(path), "--precision", "fp32", *flags]
        monkeypatch.setattr(sys, "argv", given)
        assert example_usage.main() == 0
        return capsys.readouterr().out

    run_with(model.path)
    ours = path.read_bytes()
    first = (
        json.loads(ours.splitlines()[0])["made_by"] if kind == "jsonl" else json.loads(Path(f"{path}.json").read_text())
    )
    assert first["model"] == str(model.path) and (first["num_beams"], first["precision"]) == (3, "fp32")
    with pytest.raises(UserError) as caught:
        run_with("other.safetensors")
    assert f"has captions of 3 pictures, made with model {model.path}, weights {first['weights']}: choose" in str(
        caught.value
    )
    for flags, said in (("--num-beams", "1"), "num_beams 3"), (("--do-sample",), "num_beams 3, do_sample unset"):
        with pytest.raises(UserError, match=f"made with {said}"):
            run_with(model.path, *flags)
    Path("3.png").write_bytes(picture(3))
    model.save_file("renamed.safetensors")  # the same weights, in another place
    assert "1 picture captioned" in run_with("renamed.safetensors") and path.read_bytes().startswith(ours)
    table = load_table("csv", path, "train")
    assert sum(len(load_table("csv", path, split)) for split in ("train", "val", "test")) == 4 and not table.missing
    assert f"{path}: replacing the captions of 4 pictures" in run_with("other.safetensors", "--overwrite")
    assert "4 were there" in run_with("other.safetensors") and ours.splitlines()[2] not in path.read_bytes()


def test_a_csv_that_excel_has_saved_goes_on(tmp_path):
    """With a byte order mark and its own line ends it was taken for somebody else's."""
    path = tmp_path / "captions.csv"
    path.write_bytes("\ufefffile_name,caption\r\nKäse.png,a dog\r\n".encode())
    output = CaptionFile(path)
    output.begin({"model": "a"})
    assert output.missing(["Käse.png", "b.png"]) == ["b.png"]


STOPPED = """
import os, signal, sys
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass  # as some packages do among their imports
raise AttributeError("half imported")
"""


@pytest.mark.parametrize(
    ("script", "package"),
    [("example_usage.py", name) for name in ("tqdm", "tyro", "numpy", "transformers")]
    + [("evaluate.py", "tqdm"), ("evaluate.py", "transformers"), ("main.py", "tyro"), ("main.py", "pyarrow")],
)
def test_ctrl_c_while_packages_are_imported(script, package, model, tmp_path):
    """A traceback, or an error about a package that had swallowed it, and another exit code than later."""
    (tmp_path / f"{package}.py").write_text(STOPPED)
    arguments = {"example_usage.py": ("a.png", model.path), "evaluate.py": (model.path,), "main.py": ()}[script]
    command, environment = (script, *arguments), {"PYTHONPATH": tmp_path}
    done = finished(*command, cwd=tmp_path, environment=environment, code=130)
    assert (done.stdout, done.stderr) == ("", "stopped\n")


def test_addresses_inside_are_fetched_only_when_asked(model, tmp_path, server):
    address = f"http://127.0.0.1:{server.server_port}/1"
    _, error = run(model, tmp_path, address, code=1)
    assert "not public" in error and "--allow-private-urls" in error and not server.handler.asked
    output, _ = run(model, tmp_path, address, "--allow-private-urls")
    assert output.strip() == caption_of(model, picture(1))[0].text


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_line_cut_anywhere_is_mended(kind, number, tmp_path):
    """Whatever a crash has left of the file, what is whole is kept, and the rest is done again."""
    path, again = tmp_path / f"whole.{kind}", tmp_path / f"again.{kind}"
    names = ["a.png", 'b, "c"\n.png', "Käse 猫.png"]
    captions = [Caption("a dog", 0.5), Caption('two, "cats" 猫', 0.25)][:number]
    output, made_by = CaptionFile(path, number, scores=True), {"model": "a", "num_beams": 3}
    output.begin(made_by)
    for name in names:
        output.add(name, captions)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        again.write_bytes(whole[:cut])
        mended = CaptionFile(again, number, scores=True)
        mended.begin(made_by)
        kept = max(0, whole[:cut].count(b"\n") - 1)
        assert mended.missing(names) == names[kept:]
        for name in names[kept:]:
            mended.add(name, captions)
        assert again.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        "file_name,caption,score\na,b,1\n",
        "name,caption\n",
        "file_name,caption\na,b,c\n",
        "holiday",
        "\xff\n",
        '"a\n',
        "\n",
    ],
)
def test_a_file_of_somebody_else_is_not_touched(content, tmp_path):
    for kind in ("csv", "jsonl"):
        path = tmp_path / f"captions.{kind}"
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match="exists, but its columns are not file_name, caption"):
            open_output(str(path), [])
        assert path.read_bytes() == content.encode("latin-1")


def test_a_full_disk_stops_in_one_line(model, tmp_path):
    """The file stays whole, and the same command goes on when there is room again."""
    for seed in range(16):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed))
    arguments = ["*.png", "--output", "captions.csv", "--batch-size", "2"]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (250, 250))
    process = start(model, tmp_path, *arguments, preexec_fn=limit)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    resume = "fix that, and run the same command to resume"
    assert error == f"error: captions.csv: cannot be written (File too large): {resume}\n"
    there = max(0, (tmp_path / "captions.csv").read_bytes().count(b"\n") - 1)
    assert 0 < there < 16 and f"{16 - there} pictures captioned" in run(model, tmp_path, *arguments)[0]
    assert (tmp_path / "captions.csv").read_bytes().count(b"\n") == 17


def test_the_progress_bar(model, tmp_path):
    """Pictures a second and the time left; bad pictures are named above it."""
    for seed in range(20):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed) if seed else b"")
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # or there would be no room for a bar
    command = ("example_usage.py", ".", model.path, "--output", "captions.jsonl")
    finished(*command, cwd=tmp_path, stderr=theirs, environment={"TQDM_DISABLE": None}, code=1)
    os.close(theirs)
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "error: 0.png: not a picture" in said
    assert "| 20/20 [00:" in said and "pictures/s]" in said and "00:00<?" in said


# The stream


def test_pictures_are_decoded_while_the_model_captions(model, monkeypatch):
    """The model waits for none: while it writes the first captions, the next batches' pictures are being read."""
    read, later = [], threading.Event()

    def source(name: str) -> bytes:
        read.append(name)
        if name == "8":
            later.set()
        return picture(int(name))

    def caption_slowly(model, pixels, **options):
        assert later.wait(30)
        return caption_batch(model, pixels, **options)

    monkeypatch.setattr(captioning, "caption_batch", caption_slowly)
    results = caption_pictures(model, map(str, range(12)), batch_size=4, source=source, workers=2, precision="fp32")
    assert [result.name for result in results] == [str(number) for number in range(12)]
    assert sorted(map(int, read)) == list(range(12))


def test_no_more_is_read_in_advance_than_said(model):
    """A list of millions of pictures does not end up in memory, and nothing is read after the reader has left."""
    read = []

    def source(name: str) -> bytes:
        read.append(name)
        return picture(0)

    stream = prepared(map(str, itertools.count()), model.config, source, ahead=8, workers=2)
    for _ in range(5):
        next(stream)
    assert len(read) <= 5 + 8
    stream.close()
    time.sleep(0.05)
    number = len(read)
    assert number <= 5 + 8 + 2


class Limited(ImageCaptionModel):
    """A model on a device whose memory suffices for three pictures."""

    sizes: list[int]
    error: Exception

    def generate(self, pixel_values, **options):
        self.sizes.append(len(pixel_values))
        if len(pixel_values) > 3:
            raise self.error
        return super().generate(pixel_values, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        MemoryError(),
    ],
)
def test_a_batch_is_halved_until_memory_suffices(error, model, monkeypatch, capsys):
    limited = model.__class__.from_pretrained(model.path)
    limited.__class__ = Limited
    limited.sizes, limited.error = [], error
    names = [str(seed) for seed in range(23)]
    options = {"precision": "fp32", "num_beams": 3, "max_length": 8}
    results = list(caption_pictures(limited, names, batch_size=10, source=lambda n: picture(int(n)), **options))
    assert [result.name for result in results] == names
    assert limited.sizes == [10, 5, 2, 2, 2, 2, 2, *[2] * 6, 1]
    assert capsys.readouterr().err.splitlines() == [
        f"out of memory: continuing with {n} pictures at a time" for n in (5, 2)
    ]
    for seed in (0, 9, 22):
        assert results[seed].captions[0].text == caption_of(model, picture(seed))[0].text
    monkeypatch.setattr(Limited, "generate", lambda *arguments, **options: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=r"not enough memory for a single picture \("):
        list(caption_pictures(limited, names, source=lambda n: picture(0)))
    limited.generate = lambda *arguments, **options: (_ for _ in ()).throw(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        list(caption_pictures(limited, names, source=lambda n: picture(0)))


LITTLE_MEMORY = """
import resource, sys, numpy, torch
from PIL import Image
from captioning.pipeline import caption_pictures
from config import ViTGPT2Config
from model import ImageCaptionModel

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(vision_embed_dim=32, vision_num_layers=1, vision_num_heads=2, vocab_size=300, max_length=8)
model = ImageCaptionModel(ViTGPT2Config(image_size=448, decoder_embed_dim=32, decoder_num_layers=1, decoder_num_heads=2, **sizes))
model.tokenizer = __import__("dataset").train_tokenizer(["a dog"] * 9, 300)
source = lambda name: Image.fromarray(numpy.full((8, 8, 3), int(name), numpy.uint8))
options = dict(source=source, precision="fp32", num_beams=1, workers=1)
list(caption_pictures(model.eval(), ["1", "2", "3"], batch_size=2, **options))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), -1))
results = list(caption_pictures(model, map(str, range(160)), batch_size=160, **options))
assert [r.name for r in results] == list(map(str, range(160))) and all(r.captions for r in results), results[0]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of the address space")
def test_a_cpus_memory_that_does_not_suffice(tmp_path):
    """torch's real error, in a process that may not have more memory."""
    done = finished("-c", LITTLE_MEMORY, cwd=ROOT)
    assert "out of memory: continuing with 80 pictures at a time" in done.stderr


def test_words_and_where_they_looked(model):
    """Put together, the words are the caption; each has a map of the patches, and little is left for the class token."""
    pixels = torch.stack([prepare_picture(picture(seed), model.config) for seed in range(4)])
    found = caption_batch(model, pixels, "fp32", attention=True, num_beams=3, num_return_sequences=2)
    assert [len(captions) for captions in found] == [2] * 4
    for caption in itertools.chain(*found):
        assert " ".join(word for word, _ in caption.words).split() == caption.text.split()
        for _, looks in caption.words:
            assert looks.shape == (2, 2) and (looks >= 0).all() and 0 < looks.sum() <= 1 + 1e-5
    raw = model.generate(pixels, num_beams=3, return_attention=True)
    end = (raw.sequences[0] != model.config.end_token_id).sum()
    (word,) = words_seen(model.tokenizer, raw.sequences[0, :1].tolist(), raw.attention[0, :1])
    assert np.allclose(word[1], raw.attention[0, 0].reshape(2, 2)) and end > 0


def test_captions_are_one_line_of_text(model, monkeypatch):
    """A stranger's model must not be able to add lines to a file, or to colour the terminal."""
    monkeypatch.setattr(captioning, "decode", lambda *_: ["a\ndog\u2028 on\r \x1b[31mit "])
    assert caption_of(model, picture(0))[0].text == "a dog on [31mit"


def test_names(tmp_path, monkeypatch):
    """Folders, patterns and a list on standard input, where a file's own name comes before a pattern's meaning."""
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.JPG", "b/.hidden/3.png", "b/text.txt", "a[1].png", "a1.png", "c.png", "c.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    listed = b"b\r\nc.*\n\nhttp://x/y\n-\n" + os.fsencode("\udcff.png") + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    below = ["b/1.JPG", "b/2.png"]
    assert picture_names(["b", "a[1].png", "absent.png"]) == [*below, "a[1].png", "absent.png"]
    assert picture_names(["a*.png", "**/*.png"]) == ["a1.png", "a[1].png", "a1.png", "a[1].png", "b/2.png", "c.png"]
    assert picture_names(["-"]) == [*below, "c.png", "http://x/y", "\udcff.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa b.png\r\n'c'.png\r\n",
        b'\xef\xbb\xbf"a b.png"\r\n"\'c\'.png"\r\n',
        b"'a b.png' \n'c'.png",
        '"a b.png"\r\n"\'c\'.png"\r\n'.encode("utf-16"),
        b"a b.png\0'c'.png\0",
    ],
)
def test_lists_of_other_programs(content, tmp_path, monkeypatch):
    """A byte order mark, quotes and Windows' line ends became part of the names. Quotes that a name has stay."""
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "'c'.png"):
        Path(name).touch()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert picture_names(["-"]) == ["a b.png", "'c'.png"]
