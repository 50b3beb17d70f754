"""Folders as people have them, in every layout, undamaged and damaged: what is there is read, or left out and counted.

Every caption carries a mark of its own, such as u3c1z for the second of picture 3. A mark that stands in the files must be
in a table, or its picture must be counted as missing, or its text as left out. A folder that cannot be read is a
UserError in one line.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import random
import re
import shutil
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import small_config

from config import UserError
from data import check
from data.kinds import PICTURE_SUFFIXES
from data.sources import load_tables
from train import train
from utils import run_script

MARK = re.compile(rb"u\d+c\d+z|u\0(?:\d\0)+c\0(?:\d\0)+z\0")  # the latter in UTF-16
HERE = "@HERE@"  # in captions' files: where the folder is


# Pictures


@functools.cache
def picture_bytes(kind: str, seed: int) -> bytes:
    """16 x 16 pixels, sound or not."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    content = io.BytesIO()
    wide = pixels[..., 0].astype(np.uint16) * 257
    Image.fromarray(wide if kind == "16 bits" else pixels).save(content, "JPEG" if "JPEG" in kind else "PNG")
    data = content.getvalue()
    if kind == "JPEG without its end":
        return data[:-2]
    return {"cut JPEG": data[: len(data) // 2], "empty": b"", "text": b"<html>404 Not Found</html>"}.get(kind, data)


SOUND = ["PNG", "JPEG"]
KINDS = [
    *SOUND,
    *SOUND,
    *SOUND,
    "16 bits",
    "JPEG without its end",
    "cut JPEG",
    "empty",
    "text",
    "link",
    "circle",
    "gone",
    "folder",
]
STEMS = [
    "p{}", "p{}", "p{}", "a b {}", " p{}", "it's \"{}\"", "caf\u00e9{}", "cafe\u0301{}", "\u72ac{}", "new\nline{}", ".p{}", "P{}",
    "back\\slash{}", "22.05.{}", "{}.input", "p{}#1", "100%20{}", "p;{},|", "-{}", "x" * 200 + "{}", "p\U0001f415{}", "\x1b[31m{}",
]  # fmt: skip
SUFFIXES = [".jpg", ".jpg", ".jpg", ".png", ".JPG", ".jpeg", ".webp", ".heic", ".cr2", ""]
AS_WRITTEN: list[Callable[[str], str]] = [
    *3 * [lambda name: name],
    lambda name: unicodedata.normalize("NFC", name),
    lambda name: unicodedata.normalize("NFD", name),
    str.upper,
    lambda name: f"./{name}",
    lambda name: name.rpartition(".")[0],
    lambda name: f"imgs\\{name}",
    lambda name: f"C:\\data\\{name}",
    lambda name: f"/elsewhere/{name}",
    lambda name: f"{HERE}/{name}",
    lambda name: f"https://example.org/{name}?size=16",
]  # fmt: skip
# What the marks are put into; of the lists both of them.
CAPTIONS = [
    *4 * ["a dog runs {}"], "", "  ", "{}", "ein Hund l\u00e4uft {} \u00fcber die Stra\u00dfe", "\u72ac\u304c\u8d70\u308b {}", "nul \x00 bell \x07 {}",
    "<|endoftext|>{}<|endoftext|>", "<p>{} &amp; b</p>", "'it' \"is\" {}", "a, b; c | d \t {}", "word " * 300 + "{}", "nan", "None",
    "a\u2028b \x85 {}", "\U0001f415 {}", "\ufeff{}", "[{}", "%27s+{}+dog", "#1 {}", '["{} a", "{} b"]', "['{} a', \"{} b\"]", "['{} a'\n '{} b']",
]  # fmt: skip
ENCODINGS = [*4 * ["utf-8"], "utf-8-sig", "utf-16", "utf-16-le", "latin-1"]


@dataclass
class Picture:
    number: int
    name: str
    written: str
    """What files of captions call it."""
    kind: str
    captions: list[str]
    """As written, with their marks; "" and white space are captions where a layout has a place for them."""


@st.composite
def pictures(draw: st.DrawFn) -> list[Picture]:
    """4 to 8; in some folders the names are odd, in some what is written of them, the files or the captions."""
    odd = {what: draw(st.integers(0, 2)) == 0 for what in ("names", "suffixes", "kinds", "captions", "written")}
    as_written = draw(st.sampled_from(AS_WRITTEN if odd["written"] else AS_WRITTEN[:1]))
    made = []
    for number in range(draw(st.integers(4, 8))):
        captions = [
            text.replace("{}", f"u{number}c{place}z", 1).replace("{}", f"u{number}c{place}0z")
            for place, text in enumerate(
                draw(
                    st.lists(
                        st.sampled_from(CAPTIONS if odd["captions"] else CAPTIONS[:1]),
                        min_size=draw(st.sampled_from([1, 1, 0])) if odd["captions"] else 1,
                        max_size=3,
                    )
                )
            )
        ]
        name = draw(st.sampled_from(STEMS if odd["names"] else STEMS[:1])).format(number)
        name = draw(st.sampled_from(["", "", "", "train/", "val/", "Some Folder/"])) + name if odd["names"] else name
        name += draw(st.sampled_from(SUFFIXES if odd["suffixes"] else SUFFIXES[:1]))
        kind = draw(st.sampled_from(KINDS if odd["kinds"] else SOUND))
        made.append(Picture(number, name, as_written(name), kind, captions))
    return made


# Layouts: files of captions for pictures that lie in a folder; {path: content}


@dataclass
class Data:
    """A folder before it is written to disk."""

    files: dict[str, bytes]
    pictures: list[Picture]
    folder: str = ""
    """Where the pictures lie."""
    entries: int | None = None
    """Pictures that the files tell of."""
    texts: int | None = None
    """Captions that they tell, the empty ones too."""
    in_shards: bool = False


def encoded(draw: st.DrawFn, text: str) -> bytes:
    text = text.replace("\n", draw(st.sampled_from(["\n", "\n", "\r\n"])))
    return text.encode(draw(st.sampled_from(ENCODINGS)), "ignore")


def as_json(draw: st.DrawFn, content: Any) -> str:
    text = json.dumps(content, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    return text.replace("u0c0z", "u0c0z \\ud83d") if draw(st.integers(0, 9)) == 0 else text  # half a character


def counted(made: list[Picture], bare: bool = False) -> dict[str, Any]:
    """What files tell that name a picture with each caption; bare: that name those without a caption, too."""
    told = [picture for picture in made if picture.captions or bare]
    return {"entries": len(told), "texts": sum(number_of(picture.captions) for picture in told)}


def lines_of(made: list[Picture]) -> list[tuple[str, str]]:
    return [(picture.written, caption) for picture in made for caption in picture.captions]


def csv_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    name, delimiter = draw(
        st.sampled_from([("captions.csv", ","), ("data.csv", ";"), ("data.tsv", "\t"), ("metadata.csv", ",")])
    )
    rows = [
        draw(st.sampled_from([("image", "caption"), ("file_name", "text"), ("Image_Name", "sentence")])),
        *lines_of(made),
    ]
    split = draw(st.sampled_from([None, None, ["train", "val", "test"], ["train", "validation"]]))
    if split:
        part = {picture.written: split[picture.number % len(split)] for picture in made}
        rows = [(*row, "split" if i == 0 else part[row[0]]) for i, row in enumerate(rows)]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    said = f"sep={delimiter}\n" if draw(st.integers(0, 9)) == 0 else ""
    return Data(
        {name: encoded(draw, said + text.getvalue())}, made, draw(st.sampled_from(["", "images/"])), **counted(made)
    )


def jsonl_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    name = draw(
        st.sampled_from(
            ["captions.jsonl", "captions.json", "captions.ndjson", "metadata.jsonl", "train/metadata.jsonl"]
        )
    )
    ways: list[Callable[[Picture], Any]] = [
        lambda picture: [{"image": picture.written, "caption": caption} for caption in picture.captions],
        lambda picture: [{"file_name": picture.written, "captions": picture.captions}],
        lambda picture: [{"id": picture.number, "image": picture.written, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]} for caption in picture.captions],
    ]  # fmt: skip
    lines = [line for picture in made for line in draw(st.sampled_from(ways[:1] + ways))(picture)]
    lines = lines if len({tuple(line) for line in lines}) == 1 else [line for p in made for line in ways[0](p)]
    whole = draw(st.integers(0, 3)) == 0 and name == "captions.json"
    text = as_json(draw, lines) if whole else "\n".join(as_json_line(draw, line) for line in lines)
    return Data({name: encoded(draw, text)}, made, "train/" if name.startswith("train/") else "")


def number_of(texts: list[str]) -> int:
    """Captions that these are, the items of lists each."""
    return sum(max(1, len(MARK.findall(text.encode()))) if text.startswith(("['", '["')) else 1 for text in texts)


def as_json_line(draw: st.DrawFn, content: Any) -> str:
    return json.dumps(content, ensure_ascii=draw(st.booleans()))


def json_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    content = as_json(draw, {p.written: p.captions for p in made})
    return Data({"captions.json": encoded(draw, content)}, made, **counted(made, True))


def parquet_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    content = io.BytesIO()
    table = pa.table({"image": [p.written for p in made], "caption": [p.captions for p in made]})
    # So that marks stand in it once, as they are.
    pq.write_table(table, content, compression="none", use_dictionary=False, write_statistics=False)
    name = draw(st.sampled_from(["metadata.parquet", "captions.parquet"]))
    return Data({name: content.getvalue()}, made, **counted(made, True))


def coco_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    usual = ("annotations/captions_train2017.json", "train2017/")
    name, folder = draw(st.sampled_from([usual, ("captions.json", "images/"), ("annotations/train.json", "train/")]))
    ids: Callable[[int], Any] = draw(st.sampled_from([int, str, "{:012d}".format]))
    images = [{"id": ids(p.number), "file_name": p.written} for p in made]
    annotations = [
        {"id": 10 * p.number + i, "image_id": ids(p.number), "caption": c}
        for p in made
        for i, c in enumerate(p.captions)
    ]
    for each in annotations:
        if draw(st.integers(0, 9)) == 0:
            draw(st.sampled_from([lambda each: each.pop("id"), lambda each: each.update(is_rejected=True)]))(each)
    texts = sum(1 if "is_rejected" in each else number_of([each["caption"]]) for each in annotations)
    return Data(
        {name: encoded(draw, as_json(draw, {"images": images, "annotations": annotations}))},
        made,
        folder,
        len(made),
        texts,
    )


def karpathy_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    parts = draw(st.sampled_from([["train"], ["train", "val", "test"], ["train", "restval", "val"]]))
    images = [
        {"filename": p.written, "split": parts[p.number % len(parts)], "sentences": [{"raw": c} for c in p.captions]}
        for p in made
    ]
    return Data(
        {"dataset_flickr8k.json": encoded(draw, as_json(draw, {"images": images}))},
        made,
        "Images/",
        entries=len(made),
        texts=sum(len(p.captions) for p in made),
    )


def flickr_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    rows = [(p.written, i, c) for p in made for i, c in enumerate(p.captions)]
    kind = draw(st.sampled_from(["captions.txt", "results.csv", "Flickr8k.token.txt", "results_20130124.token"]))
    if kind == "captions.txt":
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([("image", "caption"), *lines_of(made)])
        files = {kind: encoded(draw, text.getvalue())}
        if draw(st.booleans()):
            for part, own in (("train", made[:1]), ("dev", made[1:2]), ("test", made[2:])):
                files[f"Flickr_8k.{part}Images.txt"] = encoded(draw, "\n".join(p.written for p in own))
        return Data(files, made, "Images/", **counted(made))
    if kind == "results.csv":
        lines = ["image_name| comment_number| comment", *(f"{name}| {i}| {c}" for name, i, c in rows)]
        place, folder = f"flickr30k_images/{kind}", "flickr30k_images/flickr30k_images/"
        return Data({place: encoded(draw, "\n".join(lines))}, made, folder, **counted(made))
    text = encoded(draw, "\n".join(f"{name}#{i}\t{c}" for name, i, c in rows))
    folder = draw(st.sampled_from(["Flicker8k_Dataset/", "flickr30k-images/", ""]))
    return Data({kind: text}, made, folder, **counted(made))


def sidecar_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    files = {}
    for picture in made:
        stem = os.path.splitext(picture.name)[0]
        kind = draw(st.sampled_from([*4 * [".txt"], ".caption", ".TXT"]))
        name = (picture.name if draw(st.integers(0, 5)) == 0 else stem) + kind
        files[name] = encoded(draw, "\n".join(picture.captions))
        if draw(st.integers(0, 9)) == 0:
            files[stem + ".caption"] = b"another u%dc9z" % picture.number
    return Data(files, made)


def shards_layout(draw: st.DrawFn, made: list[Picture]) -> Data:
    members = []
    for picture in made:
        if hidden(picture.name):
            continue  # and not looked for
        stem, suffix = os.path.splitext(picture.name)
        way = draw(st.sampled_from(["txt", "txt", "caption", "json", "prompt", "parts"]))
        content = "\n".join(picture.captions)
        if way in ("json", "prompt"):
            content = json.dumps({"caption" if way == "json" else way: picture.captions, "width": 16})
            way = "json"
        pixels = picture_bytes(picture.kind, picture.number)
        members.append((stem + (".input" if way == "parts" else "") + suffix, pixels))
        text = encoded(draw, content) if draw(st.integers(0, 9)) == 0 else content.encode()
        members.append((stem + (".caption.txt" if way == "parts" else f".{way}"), text))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2])) if members else 0):
        place = draw(st.integers(0, len(members) - 1))
        what = draw(st.sampled_from(["hide", "remove", "repeat", "shuffle"]))
        if what == "hide":
            folder, _, name = members[place][0].rpartition("/")
            members.append((f"{folder}/._{name}".removeprefix("/"), b"\0\5\x16\7Mac OS X"))
        elif what == "remove" and len(members) > 1:
            members.pop(place)
        elif what == "repeat":
            members.append(members[place])
        elif what == "shuffle":
            random.Random(place).shuffle(members)
    kept: dict[str, bytes] = {}
    number, entries = draw(st.integers(1, 2)), 0
    where = draw(st.sampled_from(["", "", "train/", "a/b/"]))
    for shard in range(number):
        own = members[shard * len(members) // number : (shard + 1) * len(members) // number]
        kept[f"{where}{shard:05d}.tar"] = tar_of(own)
        entries += sum(not hidden(name) and Path(name).suffix.lower() in PICTURE_SUFFIXES for name in dict(own))
    if draw(st.integers(0, 9)) == 0:
        kept["more.tar.gz"] = b"\x1f\x8b packed"
    return Data(kept, made, entries=entries, in_shards=True)


def hidden(name: str) -> bool:
    return "/." in f"/{name}"


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return content.getvalue()


Layout = Callable[[st.DrawFn, list[Picture]], Data]
LAYOUTS: list[Layout] = [
    csv_layout, jsonl_layout, json_layout, parquet_layout, coco_layout, karpathy_layout, flickr_layout, sidecar_layout, shards_layout,
]  # fmt: skip


# Damage


def cut(draw: st.DrawFn, content: bytes) -> bytes:
    return content[: draw(st.integers(0, len(content)))]


def flip(draw: st.DrawFn, content: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        flipped = bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in content[place : place + 1])
        content = content[:place] + flipped + content[place + 1 :]
    return content


def of_lines(draw: st.DrawFn, content: bytes) -> bytes:
    lines = content.split(b"\n")
    place = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(["again", "gone", "elsewhere"]))
    line = lines.pop(place)
    lines[place:place] = {"again": [line, line], "gone": []}.get(how, [])
    return b"\n".join([*lines, line] if how == "elsewhere" else lines)


def after(draw: st.DrawFn, content: bytes) -> bytes:
    return content + draw(st.sampled_from([b"\n\n\n", b"\0" * 600, b"\xff\xfe", b"garbage", b'\n{"image": 3}']))


@st.composite
def folders(draw: st.DrawFn, layout: Layout) -> tuple[Data, bool]:
    """A folder, and whether what people wrote is undamaged."""
    data, damaged = layout(draw, draw(pictures())), draw(st.booleans())
    if damaged:
        name = draw(st.sampled_from(sorted(data.files)))
        lines = [] if name.endswith((".parquet", ".tar")) else [of_lines, of_lines]
        damage = draw(st.sampled_from([cut, flip, flip, after, None, *lines]))
        if damage:
            data.files[name] = damage(draw, data.files[name])
        elif len(data.files) > 1:
            del data.files[name]
    return data, not damaged


def write(data: Data, root: Path) -> None:
    for name, content in data.files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if name.endswith(".parquet") else content.replace(HERE.encode(), str(root).encode()))
    for picture in data.pictures if not data.in_shards else []:
        path = root / (data.folder + picture.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if picture.kind == "folder":
            path.mkdir(exist_ok=True)
        elif picture.kind in ("link", "circle"):
            target = root / ".elsewhere"
            target.write_bytes(picture_bytes("PNG", picture.number))
            path.symlink_to(path if picture.kind == "circle" else target)
        elif picture.kind != "gone":
            path.write_bytes(picture_bytes(picture.kind, picture.number))


# What must hold


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """Hugging Face's datasets, which read damaged Parquet files, keep what they find here, and show no bars."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def marks(content: bytes) -> Counter[str]:
    """How often each mark stands there, in UTF-16 too."""
    return Counter(mark.replace(b"\0", b"").decode() for mark in MARK.findall(content))


def raised(error: Exception) -> int:
    raise error


def report_of(root: Path) -> check.Report | UserError:
    """What the check says; nothing else is raised, and an error is printed as one line."""
    try:
        report = check.check_tables(load_tables("auto", root), num_workers=1, progress=False)
    except UserError as error:
        with contextlib.redirect_stderr(io.StringIO()) as output, pytest.raises(SystemExit, match="2"):
            run_script(partial(raised, error))
        said = output.getvalue()
        assert said.startswith("error: ") and said.removesuffix("\n").isprintable() and len(said) < 2500, said
        return error
    with contextlib.redirect_stdout(io.StringIO()) as output:
        check.print_report(report)
    json.dumps(report.figures).encode()
    "".join(str(bad) for bad in report.bad).encode()
    assert output.getvalue().replace("\n", "").isprintable(), output.getvalue()
    return report


REASONS = [
    "empty captions", "pictures without a caption", "rejected captions", "conversations without a picture", "repeated keys",
    "texts of pictures that have another", "texts without a picture", "pictures in none of the lists",
]  # fmt: skip


def visible(root: Path) -> set[str]:
    """The pictures below root, by their names, without those that are hidden."""
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    seen = (path for path in files if path.suffix.lower() in PICTURE_SUFFIXES)
    return {str(path) for path in seen if not hidden(path.relative_to(root).as_posix())}


def accounted(data: Data, report: check.Report, whole: bool) -> None:
    """Read and left out, by reason, are what is there."""
    figures, tables = report.figures, list(report.tables.values())
    pictures, captions, missing = (
        sum(part[what] for part in figures["parts"].values()) for what in ("pictures", "captions", "missing")
    )
    said = {what.partition(" (the first: ")[0]: number for what, number in figures["left_out"].items()}
    left_out = Counter({what: number for what, number in said.items() if what in REASONS})
    read = marks("\n".join(text for table in tables for text in table.captions().to_pylist()).encode())
    written = marks(b"\n".join(content for name, content in data.files.items() if not hidden(name)))
    lost = {mark.split("c")[0] for mark, times in written.items() if read[mark] < times}
    reasons = missing + left_out.total()
    if whole:
        reasons -= left_out["empty captions"] + left_out["pictures without a caption"]  # which had no mark
    else:
        reasons += missing  # where a line break is gone, the next line goes with the picture
    assert len(lost) <= reasons, (lost, figures)
    named = {os.path.normpath(t.root / name) for t in tables for name in (*t.rows["picture"].to_pylist(), *t.missing)}
    assert figures["unused"]["pictures"] == len(visible(tables[0].root) - named)
    if whole and data.entries is not None:
        assert pictures + missing + left_out["pictures without a caption"] == data.entries, figures
    if whole and data.texts is not None:
        told = captions + left_out["empty captions"] + left_out["rejected captions"]
        assert told <= data.texts if missing else told == data.texts, (told, data.texts, figures)


def each_folder(layout: Layout, examples: int, look: Callable[[Data, bool], None]) -> None:
    """Calls look with folders of the layout: the same ones every time, whatever the machine's speed."""
    quiet = list(HealthCheck)
    steady = settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=quiet
    )
    steady(given(folders(layout))(lambda drawn: look(*drawn)))()


def checked(data: Data, whole: bool, root: Path) -> check.Report | UserError:
    """The folder, written anew, must be read whole or refused."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    write(data, root)
    report = report_of(root)
    if isinstance(report, check.Report):
        accounted(data, report, whole)
    return report


def check_folders(layout: Layout, examples: int, root: Path) -> Counter[str]:
    """How many folders were read and how many refused."""
    seen: Counter[str] = Counter()

    def look(data: Data, whole: bool) -> None:
        report = checked(data, whole, root)
        seen.update(["read" if isinstance(report, check.Report) else "refused"])

    each_folder(layout, examples, look)
    return seen


def test_some_folders_are_read_whole_or_refused_in_one_line(tmp_path, no_cache):
    seen = sum((check_folders(layout, 3, tmp_path / "data") for layout in LAYOUTS), Counter())
    assert seen.total() >= 25 and seen["read"] >= 9, seen


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_thousand_folders_are_read_whole_or_refused_in_one_line(layout, tmp_path, no_cache):
    """225 of each of nine layouts."""
    seen = check_folders(layout, 225, tmp_path / "data")
    print(layout.__name__, dict(seen))
    assert seen.total() >= 225 and seen["read"] >= 75, seen


@pytest.mark.slow
def test_forty_folders_are_trained_on_for_a_step(tmp_path, monkeypatch, no_cache):
    """The pictures that a run leaves out are those that the check has named; what the check cannot read is refused alike."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    seen: Counter[str] = Counter()
    sizes = {"image_size": 16, "resize_size": 16, "patch_size": 8}
    more = {"dataset": "auto", "tokenizer": "train", "max_bad_share": 0.99, "num_workers": 0, "val_pictures": 2}
    config = small_config(root, max_steps=1, batch_size=4, **more, **sizes)

    def look(data: Data, whole: bool) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        report = checked(data, whole, root)
        if isinstance(report, UserError):
            with pytest.raises(UserError, match=re.escape(str(report))):
                train(config)
            seen.update(["refused"])
            return
        assert check.main([str(root)]) in (0, 1)
        if any(part["undecodable"] == part["pictures"] for part in report.figures["parts"].values()):
            with pytest.raises(UserError, match=r"no picture of the .* split can be read"):
                train(config)
            return
        assert train(config) == 0
        seen.update(["trained"])
        bad = tmp_path / "out/bad_samples.csv"
        lines = list(csv.reader(io.StringIO(bad.read_text("utf-8"), newline=""))) if bad.exists() else []
        assert {tuple(line[:2]) for line in lines[1:]} == {each[:2] for each in report.bad}

    for layout in LAYOUTS:
        each_folder(layout, 10, look)
    print(dict(seen))
    assert seen["trained"] >= 40, seen
