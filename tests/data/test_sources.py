"""sources.py, table.py and the cache in utils.py: every layout read into the same table, every error in one line, tables kept."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import json
import os
import pwd
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

import utils
from config import UserError
from data import layouts, sources, table
from data.sources import LAYOUTS, load_table, load_tables, recognise
from data.table import CaptionTable, Row, make_table, pack, split_up
from utils import counted


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where kept tables go: a folder of this test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VIT_GPT2_CACHE", str(folder))
    return folder


def error_of(call: Callable[[], Any]) -> str:
    """The message of the UserError that call raises, which is one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1 and len(message) < 1200
    return message


def fill(root: Path, files: dict[str, str | bytes]) -> Path:
    """Writes files with their folders; pictures may be empty, since sources.py never opens one."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return root


def pictures(*names: str) -> dict[str, str | bytes]:
    """Empty files to fill a folder with."""
    return dict.fromkeys(names, b"")


def coco_json(images: Iterable[tuple[Any, Any]], annotations: Iterable[tuple[Any, Any, Any]]) -> str:
    """COCO's captions file of (id, file_name) and (id, image_id, caption)."""
    content = {
        "images": [{"id": image_id, "file_name": name} for image_id, name in images],
        "annotations": [{"id": i, "image_id": image_id, "caption": caption} for i, image_id, caption in annotations],
    }
    return json.dumps(content)


def karpathy_json(*images: dict[str, Any]) -> str:
    """Karpathy's file; what an image does not say is usual."""
    usual = {"split": "train", "sentences": [{"raw": "a caption"}]}
    return json.dumps({"dataset": "made", "images": [usual | image for image in images]})


def ids(part: CaptionTable) -> list[int | str]:
    return [part.id_of(row) for row in range(len(part))]


def captions(part: CaptionTable) -> list[list[str]]:
    return [part.captions_of(row) for row in range(len(part))]


def names(part: CaptionTable) -> list[str]:
    """The pictures' paths below the root."""
    return part.rows["picture"].to_pylist()


def picture_bytes(part: CaptionTable, row: int) -> bytes:
    picture = part.picture(row)
    return picture if isinstance(picture, bytes) else picture.read_bytes()


CSV_OF_FIVE = "file_name,caption\n" + "".join(f"{i}.jpg,caption {i}\n" for i in range(5))
FIVE = pictures(*(f"{i}.jpg" for i in range(5)))


# The real data at hand


@pytest.mark.parametrize(
    ("split", "listed", "number"), [("train", "train", 6000), ("val", "dev", 1000), ("test",) * 2 + (1000,)]
)
def test_flickr8k_has_its_official_parts(split: str, listed: str, number: int) -> None:
    root = needs_shared("flickr8k")
    part = load_table("auto", root, split)
    assert (len(part), part.num_captions, part.name, part.split) == (number, 5 * number, "flickr8k", split)
    official = (root / f"Flickr_8k.{listed}Images.txt").read_text().split()
    assert ids(part) == official
    assert names(part) == [f"Images/{name}" for name in official] and not part.missing
    assert load_table("flickr8k", root.parent, split).rows["id"] == part.rows["id"]  # one level down


def test_flickr8k_as_kaggle_ships_it_is_split_the_same_way_always(tmp_path: Path) -> None:
    """Without split lists the parts follow from the names of the pictures, whatever the order of the lines."""
    root = needs_shared("flickr8k")
    (tmp_path / "Images").symlink_to(root / "Images")
    lines = (root / "captions.txt").read_text().splitlines()
    drawn = []
    for kept in (lines, lines[:1] + lines[:0:-1]):
        fill(tmp_path, {"captions.txt": "\n".join(kept)})
        parts = load_tables("auto", tmp_path)
        assert {split: len(part) for split, part in parts.items()} == {"train": 7283, "val": 404, "test": 404}
        assert "404 pictures each set aside for val and test" in parts["train"].about
        drawn.append({split: set(ids(part)) for split, part in parts.items()})
    assert drawn[0] == drawn[1]
    assert not drawn[0]["train"] & drawn[0]["val"] and not drawn[0]["val"] & drawn[0]["test"]


def test_tiny_coco() -> None:
    parts = load_tables("auto", needs_shared("tiny_coco"))
    assert {split: (len(part), part.num_captions) for split, part in parts.items()} == dict.fromkeys(
        ("train", "val", "test"), (50, 250)
    )
    assert (parts["train"].id_of(0), parts["train"].picture(0).name) == (391895, "000000391895.jpg")
    assert not set(ids(parts["train"])) & set(ids(parts["val"]))
    assert parts["test"].split == "val"  # and says so
    assert parts["train"].left_out == {} and parts["train"].about.startswith("recognised as COCO")


# One data set in every layout


class Picture(NamedTuple):
    id: int
    path: Path
    captions: list[str]


Parts = dict[str, list[Picture]]


@pytest.fixture(scope="module")
def coco_parts() -> Parts:
    """tiny_coco's pictures as a person has them who knows nothing of sources.py."""
    root = needs_shared("tiny_coco")
    parts: Parts = {}
    for split in ("train", "val"):
        content = json.loads((root / f"annotations/captions_{split}2017.json").read_text())
        own: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in sorted(content["annotations"], key=lambda a: a["id"]):
            own[annotation["image_id"]].append(annotation["caption"])
        paths = {image["id"]: root / f"{split}2017" / image["file_name"] for image in content["images"]}
        parts[split] = [Picture(i, paths[i], texts) for i, texts in own.items()]
    return parts


def link(folder: Path, listed: list[Picture]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for picture in listed:
        (folder / picture.path.name).symlink_to(picture.path)


def in_two_folders(root: Path, parts: Parts) -> Iterator[tuple[Path, list[Picture]]]:
    for folder, split in (("train", "train"), ("validation", "val")):
        link(root / folder, parts[split])
        yield root / folder, parts[split]


def write_imagefolder_jsonl(root: Path, parts: Parts) -> None:
    for folder, listed in in_two_folders(root, parts):
        lines = [json.dumps({"file_name": p.path.name, "image_id": p.id, "captions": p.captions}) for p in listed]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_imagefolder_csv(root: Path, parts: Parts) -> None:
    for folder, listed in in_two_folders(root, parts):
        with open(folder / "metadata.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "image_id", "text"])
            rows.writerows([p.path.name, p.id, caption] for p in listed for caption in p.captions)


def write_one_table(root: Path, parts: Parts, name: str, header: list[str], delimiter: str) -> None:
    with open(root / name, "w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(header)
        for split, listed in parts.items():
            link(root / "images", listed)
            rows.writerows([p.path.name, split, p.id, caption] for p in listed for caption in p.captions)


def write_csv(root: Path, parts: Parts) -> None:
    write_one_table(root, parts, "all.csv", ["filename", "split", "image_id", "caption"], ",")


def write_tsv(root: Path, parts: Parts) -> dict[str, str]:
    write_one_table(root, parts, "all.tsv", ["bild", "split", "id", "satz"], "\t")
    return {"image_column": "bild", "caption_column": "satz"}


def records(root: Path, parts: Parts, **words: str) -> list[dict[str, Any]]:
    made = []
    for split, listed in parts.items():
        link(root / "pictures", listed)
        word = words.get(split, split)
        made += [
            {"image": f"pictures/{p.path.name}", "split": word, "id": p.id, "captions": p.captions} for p in listed
        ]
    return made


def write_json(root: Path, parts: Parts) -> None:
    (root / "anything.json").write_text(json.dumps(records(root, parts, val="dev")))


def write_parquet(root: Path, parts: Parts) -> None:
    pq.write_table(pa.Table.from_pylist(records(root, parts, val="Validation")), root / "all.parquet")


def write_webdataset(root: Path, parts: Parts) -> None:
    """As webdataset's own writer makes shards, two for each part."""
    wds = pytest.importorskip("webdataset")
    for split, listed in parts.items():
        for shard, some in enumerate((listed[:20], listed[20:])):
            with wds.TarWriter(str(root / f"made-{split}-{shard:06d}.tar")) as writer:
                for p in some:
                    about = {"image_id": p.id, "captions": p.captions}
                    writer.write({"__key__": p.path.stem, "jpg": p.path.read_bytes(), "json": about})


def write_img2dataset(root: Path, parts: Parts) -> None:
    """img2dataset's members and fields, in folders of parts, written by tarfile with a folder as a member."""
    for split, listed in parts.items():
        (root / split).mkdir()
        with tarfile.open(root / split / "00000.tar", "w") as tar:
            tar.add(root / split, "part", recursive=False)
            for number, p in enumerate(listed):
                about = {"caption": p.captions[0], "url": "x", "key": f"{number:09d}", "status": "success", "id": p.id}
                text = "\n".join(" ".join(caption.split()) for caption in p.captions)
                members = {"jpg": p.path.read_bytes(), "txt": text.encode(), "json": json.dumps(about).encode()}
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"part/{number:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def hub_dataset(parts: Parts) -> Any:
    datasets = pytest.importorskip("datasets")
    made = {}
    for split, listed in parts.items():
        columns = {
            "image": [str(p.path) for p in listed],
            "image_id": [p.id for p in listed],
            "captions": [p.captions for p in listed],
        }
        name = {"train": "train", "val": "validation"}[split]
        made[name] = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return datasets.DatasetDict(made)


def write_saved_dataset(root: Path, parts: Parts) -> None:
    hub_dataset(parts).save_to_disk(root)


def write_hub_parquet(root: Path, parts: Parts, folder: str = "data") -> None:
    (root / folder).mkdir(exist_ok=True)
    for split, data in hub_dataset(parts).items():
        data.to_parquet(root / folder / f"{split}-00000-of-00001.parquet")


def write_hub_parquet_at_the_top(root: Path, parts: Parts) -> None:
    """Once taken for a table of names, since its columns are called image and captions."""
    write_hub_parquet(root, parts, ".")


def karpathy_images(parts: Parts) -> list[dict[str, Any]]:
    return [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{p.path.name}",
            "cocoid": p.id,
            "split": "val" if split == "val" else "restval" if number % 2 else "train",
            "sentences": [{"raw": caption} for caption in p.captions],
        }
        for split, listed in parts.items()
        for number, p in enumerate(listed)
    ]


def write_karpathy(root: Path, parts: Parts, folder: str = "") -> None:
    fill(root, {"dataset_coco.json": karpathy_json(*karpathy_images(parts))})
    for split, listed in parts.items():
        link(root / folder / f"{split}2017", listed)


def write_karpathy_in_images(root: Path, parts: Parts) -> None:
    write_karpathy(root, parts, "images")


@pytest.fixture
def hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hugging Face's datasets unpacks, where it is installed, goes to a folder of the test's."""
    with contextlib.suppress(ImportError):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.mark.parametrize(
    ("name", "writer"),
    [
        ("imagefolder", write_imagefolder_jsonl),
        ("imagefolder", write_imagefolder_csv),
        ("csv", write_csv),
        ("csv", write_tsv),
        ("csv", write_json),
        ("csv", write_parquet),
        ("webdataset", write_webdataset),
        ("webdataset", write_img2dataset),
        ("huggingface", write_saved_dataset),
        ("huggingface", write_hub_parquet),
        ("huggingface", write_hub_parquet_at_the_top),
        ("coco", write_karpathy),
        ("coco", write_karpathy_in_images),
    ],
    ids=lambda value: value.__name__.removeprefix("write_") if callable(value) else "",
)
def test_every_layout_gives_cocos_table(
    name: str, writer: Callable[..., Any], tmp_path: Path, coco_parts: Parts, hub_cache: None
) -> None:
    """The same ids, captions and bytes of pictures in the same order; and again from the table kept on disk."""
    wanted = load_tables("coco", needs_shared("tiny_coco"))
    columns = writer(tmp_path, coco_parts) or {}
    for _ in range(2):
        found = load_tables("auto", tmp_path, **columns)
        assert list(found) == ["train", "val", "test"]
        for split, part in found.items():
            assert part.name == (str(tmp_path) if name == "huggingface" else name)
            assert part.about.startswith("Hugging Face" if name == "huggingface" else "recognised as ")
            assert (part.split, part.missing, part.left_out) == (wanted[split].split, (), {})
            assert ids(part) == ids(wanted[split])
            assert captions(part) == captions(wanted[split])
            for row in range(len(part)):
                assert picture_bytes(part, row) == picture_bytes(wanted[split], row)
                assert part.name_of(row)


def test_texts_beside_pictures_give_cocos_table_under_names(tmp_path: Path, coco_parts: Parts) -> None:
    for folder, listed in in_two_folders(tmp_path, coco_parts):
        for p in listed:
            lines = "\r\n\r\n".join(" ".join(caption.split()) for caption in p.captions)
            (folder / f"{p.path.stem}.txt").write_bytes(lines.encode())
    wanted = load_tables("coco", needs_shared("tiny_coco"))
    for split, part in load_tables("auto", tmp_path).items():
        numbers = [int(Path(str(name)).stem) for name in ids(part)]
        assert numbers == sorted(ids(wanted[split]))
        own = dict(zip(ids(wanted[split]), captions(wanted[split]), strict=True))
        assert captions(part) == [own[number] for number in numbers]
        where = {number: row for row, number in enumerate(ids(wanted[split]))}
        assert all(picture_bytes(part, row) == picture_bytes(wanted[split], where[n]) for row, n in enumerate(numbers))


def test_sidecar_names(tmp_path: Path) -> None:
    """Nested folders, .caption, name.jpg.txt and upper-case suffixes count; hidden folders do not, and texts alone
    are counted: where a picture had another name, its captions were gone without a word."""
    texts: dict[str, str | bytes] = {
        "a/x.txt": "one\ntwo",
        "b/x.caption": "three",
        "c.JPG.txt": "four",
        "README.txt": "no",
    }
    hidden = pictures(".thumbs/x.jpg") | {".thumbs/x.txt": "hidden"}
    fill(tmp_path, texts | hidden | pictures("a/x.jpg", "b/x.WEBP", "c.JPG", "alone.png"))
    parts = load_tables("auto", tmp_path)
    found = {name: own for split in parts for name, own in zip(ids(parts[split]), captions(parts[split]), strict=True)}
    assert found == {"a/x.jpg": ["one", "two"], "b/x.WEBP": ["three"], "c.JPG": ["four"]}
    alone = {"texts without a picture (the first: README.txt)": 1}
    assert parts["train"].left_out == alone | {"pictures without a caption": 1}


def test_a_sentence_counts_and_not_its_tags(tmp_path: Path) -> None:
    """Beside a .caption a .txt often holds tags: these were trained on, and the sentence was never mentioned."""
    texts = {f"{n}.{kind}": f"{kind} {n}" for n in range(4) for kind in ("caption", "txt")}
    fill(tmp_path, texts | pictures("0.jpg", "1.jpg", "2.jpg", "3.jpg") | {"3.caption": " \n"})
    for wanted, kinds, first in (None, ["caption"] * 3, "0.txt"), ("txt", ["txt"] * 3, "0.caption"):
        parts = load_tables("auto", tmp_path, caption_column=wanted)
        found = {
            name: own for split in parts for name, own in zip(ids(parts[split]), captions(parts[split]), strict=True)
        }
        assert found == {f"{n}.jpg": [f"{kind} {n}"] for n, kind in enumerate([*kinds, "txt"])}
        assert parts["train"].left_out == {f"texts of pictures that have another (the first: {first})": 3}


def test_pictures_that_share_a_name(tmp_path: Path) -> None:
    """x.png's own text is x.png.txt where there is an x.jpg; the one that both share counts for whoever has no other."""
    texts: dict[str, str | bytes] = {"x.txt": "both", "x.png.txt": "one", "y.txt": "first", "y.jpg.txt": "second"}
    fill(tmp_path, texts | pictures("x.jpg", "x.png", "x.webp", "y.jpg"))
    found = {picture.name: texts[0].name for picture, texts in layouts.pictures_below(tmp_path)}
    assert found == {"x.jpg": "x.txt", "x.png": "x.png.txt", "x.webp": "x.txt", "y.jpg": "y.txt"}


def test_json_lines_that_say_what_wrote_them(tmp_path: Path) -> None:
    """The line that captioning writes first is no picture."""
    lines = [{"made_by": {"model": "a"}}, *({"file_name": f"{n}.jpg", "caption": f"number {n}"} for n in range(3))]
    for name in ("captions.jsonl", "metadata.jsonl"):
        root = fill(
            tmp_path / name[:4], {name: "\n".join(map(json.dumps, lines))} | pictures("0.jpg", "1.jpg", "2.jpg")
        )
        parts = load_tables("auto", root)
        assert sorted(caption for part in parts.values() for own in captions(part) for caption in own) == [
            "number 0", "number 1", "number 2"
        ]  # fmt: skip


# COCO's layout


def test_coco_order_and_white_space(tmp_path: Path) -> None:
    """Pictures as the file lists them, captions by annotation id, and no caption may hold a line break: official
    tools would shift every later caption."""
    annotations = [(9, 2, "late"), (4, 2, " two\u2028 \x0b words\r\n"), (5, 7, " \t"), (6, 1, "one \ud800")]
    text = coco_json([(2, "b.jpg"), (7, "c.jpg"), (1, "a.jpg")], annotations)
    fill(tmp_path, {"annotations/captions_train2017.json": text} | pictures("train2017/a.jpg", "train2017/b.jpg"))
    val = {"annotations/captions_val2017.json": coco_json([(3, "d.jpg")], [(1, 3, "val")])}
    fill(tmp_path, val | pictures("val2017/d.jpg"))
    part = load_table("coco", tmp_path, "train")
    assert part.picture(0) == tmp_path / "train2017/b.jpg"
    assert ids(part) == [2, 1]
    assert captions(part) == [["two words", "late"], ["one ?"]]
    assert part.captions().to_pylist() == ["two words", "late", "one ?"]
    assert part.left_out == {"empty captions": 1, "pictures without a caption": 1}


def write_coco(root: Path, part: str, picture: str, caption: str, image_id: int = 1) -> Path:
    """One picture in COCO's layout; returns its captions file."""
    source = f"annotations/captions_{part}.json"
    fill(root, {source: coco_json([(image_id, picture)], [(1, image_id, caption)])} | pictures(f"{part}/{picture}"))
    return root / source


def test_coco_test_is_val_unless_drawn(tmp_path: Path) -> None:
    write_coco(tmp_path, "val2017", "a.jpg", "val")
    assert load_table("coco", tmp_path, "test").split == "val"
    source = write_coco(tmp_path, "test2017", "b.jpg", "test", 2)
    (tmp_path / "test2017").rename(tmp_path / "away")  # annotations without a folder of pictures count for nothing
    assert load_table("coco", tmp_path, "test").split == "val"
    (tmp_path / "away").rename(tmp_path / "test2017")
    part = load_table("coco", tmp_path, "test")
    assert (part.split, ids(part), captions(part)) == ("test", [2], [["test"]])
    source.unlink()
    assert captions(load_table("coco", tmp_path, "test")) == [["val"]]
    message = error_of(lambda: load_table("coco", tmp_path, "train"))
    assert message == f"{tmp_path} has no train split, only val and test: choose another, or add it"


def test_coco_takes_the_newest_year_and_pictures_in_images(tmp_path: Path) -> None:
    write_coco(tmp_path, "val2014", "a.jpg", "old")
    write_coco(tmp_path, "val2017", "a.jpg", "new")
    assert captions(load_table("auto", tmp_path, "val")) == [["new"]]
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images/val2017")
    assert load_table("auto", tmp_path, "val").picture(0) == tmp_path / "images/val2017/a.jpg"


def test_val_alone_can_be_measured(tmp_path: Path) -> None:
    """Many people fetch val2017.zip and the annotations only; train's 118,287 absent pictures once stopped them."""
    write_coco(tmp_path, "val2017", "a.jpg", "val")
    write_coco(tmp_path, "train2017", "b.jpg", "train", 2)
    (tmp_path / "train2017/b.jpg").unlink()
    assert captions(load_table("coco", tmp_path, "val")) == captions(load_table("coco", tmp_path, "test")) == [["val"]]
    for call in (lambda: load_table("coco", tmp_path, "train"), lambda: load_tables("coco", tmp_path)):
        message = error_of(call)
        assert "none of the 1 train pictures is there" in message and "train2017/b.jpg" in message


def test_one_listing_finds_missing_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = coco_json([(i, f"{i}.jpg") for i in range(20)], [(i, i, "text") for i in range(20)])
    there = pictures(*(f"val2017/{i}.jpg" for i in range(20) if i not in (3, 5, 8, 13)))
    fill(tmp_path, {"annotations/captions_val2017.json": text} | there)
    (tmp_path / "val2017/3.jpg").mkdir()  # a folder is no picture
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    part = load_table("coco", tmp_path, "val")
    assert [Path(path).name for path in listed].count(
        "val2017"
    ) <= 3  # by the reader, for what is missing, for its like
    assert part.missing == tuple(f"val2017/{i}.jpg" for i in (3, 5, 8, 13))
    assert len(part) == 16 and ids(part)[:4] == [0, 1, 2, 4]


def test_all_pictures_missing_is_an_error_whatever_their_names(tmp_path: Path) -> None:
    """Names that no file system can have are missing pictures, and a line break in one stays out of the message."""
    impossible = ["a\nb.jpg", "a\0/b.jpg", "a\0.jpg", "."]
    text = coco_json(enumerate(impossible), [(i, i, "text") for i in range(4)])
    fill(tmp_path, {"annotations/captions_val2017.json": text})
    message = error_of(lambda: load_table("coco", tmp_path, "val"))
    assert "none of the 4 val pictures is there" in message and "a\\nb.jpg" in message and "put them there" in message


def test_a_stray_name_in_another_encoding_is_no_matter(tmp_path: Path) -> None:
    """A picture from an old archive, named in Latin-1, once stopped the whole folder with a UnicodeEncodeError."""
    fill(tmp_path, FIVE | {"captions.csv": CSV_OF_FIVE})
    stray = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        with open(stray, "wb"):
            pass
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert sum(len(part) for part in load_tables("auto", tmp_path).values()) == 5
    (tmp_path / "captions.csv").unlink()
    fill(tmp_path, {"0.txt": "text"})
    message = error_of(lambda: load_tables("auto", tmp_path))
    assert str(tmp_path) in message and "rename the picture" in message


# Karpathy's splits


def test_karpathy_prefers_2014s_folders_and_takes_2017s_by_number(tmp_path: Path) -> None:
    images = [
        {"filepath": "train2014", "filename": "COCO_train2014_000000000001.jpg", "cocoid": 1},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000002.jpg", "cocoid": 2, "split": "restval"},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000003.jpg", "cocoid": 3, "split": "val"},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000004.jpg", "cocoid": 4, "split": "test"},
    ]
    new = pictures(*(f"train2017/{i:012d}.jpg" for i in (1, 2, 4)), "val2017/000000000003.jpg")
    fill(tmp_path, new | {"dataset_coco.json": karpathy_json(*images)})
    parts = load_tables("auto", tmp_path)
    assert {split: ids(part) for split, part in parts.items()} == {"train": [1, 2], "val": [3], "test": [4]}
    assert names(parts["train"]) == ["train2017/000000000001.jpg", "train2017/000000000002.jpg"]
    assert names(parts["val"]) == ["val2017/000000000003.jpg"]
    keys = parts["train"].keys()
    fill(
        tmp_path, pictures("images/train2014/COCO_train2014_000000000001.jpg", "val2014/COCO_val2014_000000000002.jpg")
    )
    part = load_table("karpathy", tmp_path, "train")
    assert names(part) == ["images/train2014/COCO_train2014_000000000001.jpg", "val2014/COCO_val2014_000000000002.jpg"]
    assert (part.keys() == keys).all()


def test_karpathys_keys_are_cocos(tmp_path: Path, coco_parts: Parts) -> None:
    write_karpathy(tmp_path, coco_parts)
    for split, part in load_tables("auto", tmp_path).items():
        keys = part.keys()
        assert keys.dtype == np.uint64 and len(set(keys.tolist())) == 50
        assert (keys == load_table("coco", needs_shared("tiny_coco"), split).keys()).all()


@pytest.mark.parametrize("folder", layouts.FLICKR_FOLDERS.split())
@pytest.mark.parametrize("family", ["flickr8k", "flickr30k"])
def test_karpathys_flickr_wherever_the_pictures_are(tmp_path: Path, family: str, folder: str) -> None:
    """Even where the first picture of all is missing, which once had them all looked for in the wrong folder."""
    images = [{"filename": f"{i}.jpg", "split": split} for i, split in enumerate(("train", "train", "val", "test"))]
    there = pictures(*(f"{folder}/{i}.jpg" for i in (1, 2, 3)))
    fill(tmp_path, there | {f"dataset_{family}.json": karpathy_json(*images)})
    parts = load_tables("auto", tmp_path)
    assert {split: names(part) for split, part in parts.items()} == {
        "train": [f"{folder}/1.jpg"],
        "val": [f"{folder}/2.jpg"],
        "test": [f"{folder}/3.jpg"],
    }
    assert parts["train"].missing == (f"{folder}/0.jpg",) and parts["train"].name == family


def test_flickr30k_and_flickr8k_share_keys(tmp_path: Path) -> None:
    """The same photograph is 1000268201_693b08cb0e.jpg in one and 1000268201.jpg in the other."""
    short, long = [f"{n}.jpg" for n in (1, 2, 3, 4)], [f"{n}_abc.jpg" for n in (2, 3, 4, 5)]
    lines = "".join(f"{name}| 0| text\n" for name in short)
    fill(tmp_path / "30", {"results.csv": f"image_name| comment_number| comment\n{lines}"} | pictures(*short))
    fill(tmp_path / "8", {"captions.txt": "image,caption\n" + "".join(f"{name},other\n" for name in long)})
    fill(tmp_path / "8/Images", pictures(*long))
    keys = []
    for folder in ("30", "8"):
        parts = load_tables("auto", tmp_path / folder)
        keys.append(
            {
                int(str(i).split("_")[0].split(".")[0]): k
                for p in parts.values()
                for i, k in zip(ids(p), p.keys(), strict=True)
            }
        )
    assert all(keys[0][n] == keys[1][n] for n in (2, 3, 4))
    assert len({*keys[0].values(), *keys[1].values()}) == 5


def test_keys_of_files_in_cocos_form_tell_data_sets_apart(tmp_path: Path) -> None:
    """Many tools write COCO's form and count from 1: the same number is no sign of the same picture there."""
    keys = []
    names = ("shop.jpg", "000001.jpg", "000000000001.jpg", "COCO_val2014_000000000001.jpg")
    for number, picture in enumerate(names):
        write_coco(tmp_path / str(number), "val2017", picture, f"caption {number}")
        keys.append(int(load_table("coco", tmp_path / str(number), "val").keys()[0]))
    assert len(set(keys[:3])) == 3 and keys[2] == keys[3]


def test_keys_of_files_in_flickr8ks_form_tell_pictures_apart(tmp_path: Path) -> None:
    """All cameras' IMG_0001.jpg once had the one key flickr:IMG."""
    (tmp_path / "Images").mkdir()
    names = [f"IMG_{n:04}.jpg" for n in range(30)]
    for name in names:
        (tmp_path / "Images" / name).touch()
    lines = ["image,caption", *(f"{name},a caption of {name}" for name in names)]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    keys = np.concatenate([part.keys() for part in load_tables("auto", tmp_path).values()])
    assert len(set(keys.tolist())) == 30


def test_a_caption_id_is_no_picture_id(tmp_path: Path) -> None:
    """COCO's annotations by way of pandas have both columns, and the first one won."""
    (tmp_path / "a.csv").write_text("id,image_id,file_name,caption\n905,1,1.jpg,x\n910,2,2.jpg,y\n920,3,3.jpg,z\n")
    for n in (1, 2, 3):
        (tmp_path / f"{n}.jpg").touch()
    tables = load_tables("auto", tmp_path)
    assert sorted(t.id_of(0) for t in tables.values()) == [1, 2, 3]


def test_kept_tables_notice_pictures_that_come_later(tmp_path: Path, keeps_all: None) -> None:
    """Karpathy's file first read with val2017 still to be downloaded: its pictures stayed missing for ever."""
    images = [
        {"cocoid": n, "filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"caption {n}"}]}
        for n, split in ((1, "train"), (2, "train"), (3, "val"), (4, "test"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    (tmp_path / "train2017").mkdir()
    for n in (1, 3, 4):
        (tmp_path / f"train2017/{n:012}.jpg").touch()
    assert load_tables("auto", tmp_path)["train"].missing == ("train2017/000000000002.jpg",)
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017/000000000002.jpg").touch()
    assert load_tables("auto", tmp_path)["train"].missing == ()


def test_keys_elsewhere_tell_folders_apart() -> None:
    """Two folders may both have a 1.jpg; a caption more or less makes it another picture too."""
    made = [[(Path("/1.jpg"), "1.jpg", own)] for own in (["a"], ["b"], ["a", "b"], ["a"])]
    keys = [int(make_table(rows).keys()[0]) for rows in made]
    assert keys[0] == keys[3] and len(set(keys)) == 3


# Flickr30k and Flickr8k


FLICKR30K = (
    "image_name| comment_number| comment\r\n"
    "2199200615.jpg| 0| A dog | runs .\r\n"
    "2199200615.jpg| 4   A dog runs across the grass .\r\n"
    '1.jpg| 0| He says " hello\u2028there " .\r\n'
    "2.jpg| 0| two\r\n\r\n"
)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("flickr30k_images/results.csv", "flickr30k_images/flickr30k_images/"),
        ("results.csv", "flickr30k_images/"),
        ("flickr30k_images/results.csv", "flickr30k_images/"),
        ("results.csv", ""),
    ],
)
def test_flickr30k_as_kaggle_ships_it(tmp_path: Path, source: str, folder: str) -> None:
    """A row without its second bar, bars and quotes and U+2028 in captions, Windows' line ends; a picture missing."""
    fill(tmp_path, {source: FLICKR30K} | pictures(f"{folder}1.jpg", f"{folder}2.jpg"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "split_up", lambda rows, floor: (rows.set_column(0, "split", pa.array(["train"] * 3)), ""))
        part = load_table("auto", tmp_path, "train")
    assert part.name == "flickr30k" and part.missing == (f"{folder}2199200615.jpg",)
    assert ids(part) == ["1.jpg", "2.jpg"]
    assert captions(part) == [['He says " hello there " .'], ["two"]]
    fill(tmp_path, pictures(f"{folder}2199200615.jpg"))
    whole = {i: own for p in load_tables("auto", tmp_path).values() for i, own in zip(ids(p), captions(p), strict=True)}
    assert whole["2199200615.jpg"] == ["A dog | runs .", "A dog runs across the grass ."]


def flickr8k(root: Path, text: str, **lists: str) -> Path:
    """Flickr8k's layout with pictures a.jpg, b.jpg and c.jpg; returns captions.txt."""
    files: dict[str, str | bytes] = {f"Flickr_8k.{part}Images.txt": names for part, names in lists.items()}
    fill(root, files | {"captions.txt": text} | pictures(*(f"Images/{name}.jpg" for name in "abc")))
    return root / "captions.txt"


def test_flickr8k_quotes_order_and_nesting(tmp_path: Path) -> None:
    text = '\ufeffimage,caption\nb.jpg,"He says ""go"" , twice ."\na.jpg, one\u00a0 two \nb.jpg,second\n\nc.jpg,"  "\n'
    flickr8k(tmp_path / "flickr8k", text, train="b.jpg\r\n a.jpg\n\nc.jpg\n", dev="a.jpg\n")
    assert recognise(tmp_path)[0] == recognise(tmp_path / "flickr8k")[0] == "flickr8k"
    part = load_table("auto", tmp_path, "train")
    assert ids(part) == ["b.jpg", "a.jpg"]
    assert captions(part) == [['He says "go" , twice .', "second"], ["one two"]]
    assert part.picture(0) == tmp_path / "flickr8k/Images/b.jpg"
    assert part.left_out == {"empty captions": 1, "pictures without a caption": 1}
    assert ids(load_table("auto", tmp_path, "val")) == ids(load_table("auto", tmp_path, "test")) == ["a.jpg"]


# Tables of named columns


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "captions.json", "captions.tsv"])
def test_line_ends_and_byte_order_marks(tmp_path: Path, name: str, mark: str, ending: str) -> None:
    lines = [json.dumps({"file_name": f"{i}.jpg", "caption": f"caption {i}"}) for i in range(5)]
    text = {
        ".csv": CSV_OF_FIVE,
        ".tsv": CSV_OF_FIVE.replace(",", "\t"),
        ".jsonl": "\n".join(lines),
        ".json": f"[{', '.join(lines)}]\n",
    }[Path(name).suffix]
    fill(tmp_path, FIVE | {name: mark + text.replace("\n", ending)})
    parts = load_tables("auto", tmp_path)
    found = {i: own for part in parts.values() for i, own in zip(ids(part), captions(part), strict=True)}
    assert found == {f"{i}.jpg": [f"caption {i}"] for i in range(5)}


@pytest.mark.parametrize(
    ("header", "row", "wanted"),
    [
        ("image,caption_1,caption_2", "{0},one,two", ["one", "two"]),
        ("image,title,Caption", "{0},not this,one", ["one"]),
        ("id,filepath,text", "7{0},{0},one", ["one"]),
        ("caption;img", 'one;"{0}"', ["one"]),
    ],
)
def test_columns_by_their_usual_names(tmp_path: Path, header: str, row: str, wanted: list[str]) -> None:
    """All of caption_1 ... caption_5 are captions; the title beside them is not."""
    lines = [header, *(row.format(f"{i}.jpg") for i in range(5))]
    fill(tmp_path, FIVE | {"any.csv": "\n".join(lines)})
    for part in load_tables("auto", tmp_path).values():
        assert captions(part) == [wanted] * len(part)


def test_pictures_beside_above_or_in_images(tmp_path: Path) -> None:
    """Where the table is in annotations/, too; and where the first picture is missing."""
    text = "image,caption\n" + "".join(f"{i}.jpg,caption {i}\n" for i in range(40))
    for number, (source, folder) in enumerate([("c.csv", "images/"), ("annotations/c.csv", "images/"), ("c.csv", "")]):
        root = tmp_path / str(number)
        fill(root, {source: text} | pictures(*(f"{folder}{i}.jpg" for i in range(1, 40))))
        parts = load_tables("auto", root / source)
        found = [part.picture(row) for part in parts.values() for row in range(len(part))]
        assert {path.resolve() for path in found} == {root / f"{folder}{i}.jpg" for i in range(1, 40)}
        assert sum(len(part.missing) for part in parts.values()) == 1


def test_parts_from_file_names_and_folders(tmp_path: Path) -> None:
    fill(tmp_path / "files", FIVE | {"my_train.csv": CSV_OF_FIVE, "my_valid.csv": "file_name,caption\n4.jpg,x\n"})
    parts = load_tables("auto", tmp_path / "files")
    assert (len(parts["train"]), len(parts["val"])) == (5, 1)
    folders = [f"{folder}/{i}.jpg" for folder in ("training", "dev", "test") for i in range(2)]
    fill(tmp_path / "folders", pictures(*folders) | {"c.csv": "path,text\n" + "".join(f"{n},x\n" for n in folders)})
    parts = load_tables("auto", tmp_path / "folders")
    assert {split: ids(part) for split, part in parts.items()} == {
        "train": folders[:2],
        "val": folders[2:4],
        "test": folders[4:],
    }


@pytest.mark.parametrize("layout", ["jsonl", "coco", "karpathy", "webdataset"])
def test_captions_that_are_cleaned_or_left_out(tmp_path: Path, layout: str) -> None:
    """null and blanks are left out and counted, numbers become digits, NUL and other controls go."""
    given_ = [None, 7, 2.5, " \t\n", "", "a\0b\x1b", " two  words\u2028"]
    wanted, numbers = ["7", "2.5", "ab", "two words"], range(3)
    if layout == "jsonl":
        lines = [json.dumps({"file_name": f"{i}.jpg", "captions": given_}) for i in numbers]
        fill(tmp_path, FIVE | {"metadata.jsonl": "\n".join(lines)})
    elif layout == "coco":
        annotations = [(9 * i + n, i, caption) for i in numbers for n, caption in enumerate(given_)]
        text = coco_json([(i, f"{i}.jpg") for i in numbers], annotations)
        fill(
            tmp_path, {"annotations/captions_train2017.json": text} | pictures(*(f"train2017/{i}.jpg" for i in numbers))
        )
    elif layout == "karpathy":
        images = [{"filename": f"{i}.jpg", "sentences": [{"raw": caption} for caption in given_]} for i in numbers]
        fill(tmp_path, FIVE | {"dataset_flickr8k.json": karpathy_json(*images)})
    else:
        write_tar(
            tmp_path / "0.tar",
            {f"{i}{s}": c for i in numbers for s, c in ((".jpg", ""), (".json", json.dumps({"captions": given_})))},
        )
    parts = load_tables("auto", tmp_path)
    assert all(own == wanted for part in parts.values() for own in captions(part))
    assert parts["train"].left_out == {"empty captions": 9}


# WebDataset's shards


def write_tar(path: Path, members: dict[str, str | bytes] | list[tuple[str, str | bytes]]) -> Path:
    """A plain tar file; returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for name, text in members.items() if isinstance(members, dict) else members:
            add(tar, name, text)
    return path


def add(tar: tarfile.TarFile, name: str, text: str | bytes) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


SAMPLES: dict[str, str | bytes] = {
    f"{i:03d}.{suffix}": content * 600 for i in range(5) for suffix, content in (("jpg", b"x"), ("txt", b"a b "))
}


def test_shards_of_odd_samples(tmp_path: Path) -> None:
    """Samples without a picture or a text, ids that are null, keys that repeat in another shard. A text without a picture
    was counted as a picture without a caption."""
    shard = {
        "a.jpg": b"A",
        "a.txt": "one",
        "a.json": '{"id": null}',
        "b.txt": "no picture",
        "c.jpg": b"C",
        "d.png": b"D",
    }
    write_tar(tmp_path / "0.tar", shard | {"d.json": '{"id": "0042", "caption": "four"}', "d.cls": "3"})
    write_tar(tmp_path / "1.tar", {"x/a.webp": b"E", "x/a.caption": "five", "./a.JPEG": b"F", "./a.txt": "\ufeffsix"})
    parts = load_tables("auto", tmp_path)
    found = {
        (part.id_of(row), *part.captions_of(row), part.picture(row))
        for part in parts.values()
        for row in range(len(part))
    }
    assert found == {("a", "one", b"A"), ("42", "four", b"D"), ("x/a", "five", b"E"), ("./a", "six", b"F")}
    assert parts["train"].left_out == {
        f"pictures without a caption (the first: {tmp_path}/0.tar: c)": 1,
        f"texts without a picture (the first: {tmp_path}/0.tar: b.txt)": 1,
    }
    (tmp_path / "1.tar").unlink()
    rest = [
        (part, row)
        for part in parts.values()
        for row in range(len(part))
        if part.rows["picture"][row].as_py() == "1.tar"
    ]
    message = error_of(lambda: rest[0][0].picture(rest[0][1]))
    assert message.startswith(f"{tmp_path / '1.tar'}: ") and "cannot be read" in message


Members = list[tuple[str, str | bytes]]


def sample(key: str, text: str, picture: str = ".jpg", ending: str = ".txt") -> Members:
    """A picture whose content says which one it is, and its text."""
    return [(key + picture, f"<{text}>"), (key + ending, text)]


MANY = [member for i in range(4) for member in sample(f"{i:03d}", f"plain {i}")]
FOUR = {f"{i:03d}": f"plain {i}" for i in range(4)}

# case: (members, {id: caption}, {what is left out: how many})
SHARDS: dict[str, tuple[Members, dict[str, str], dict[str, int]]] = {
    "a dot in each key": (
        [m for i in range(4) for m in sample(f"{i}.05", f"c{i}")],
        {f"{i}.05": f"c{i}" for i in range(4)},
        {},
    ),
    "a dot in some keys": ([*MANY, *sample("001.v2", "second")], FOUR | {"001.v2": "second"}, {}),
    "named parts": (
        [m for i in range(4) for m in sample(f"s{i}", f"c{i}", ".input.jpg", ".caption.txt")],
        {f"s{i}": f"c{i}" for i in range(4)},
        {},
    ),
    "a named text only": (
        [m for i in range(4) for m in sample(f"d/s{i}.1", f"c{i}", ".jpg", ".outputs.txt")],
        {f"d/s{i}.1": f"c{i}" for i in range(4)},
        {},
    ),
    "a named text, and keys with dots": (
        [m for i in range(4) for m in sample(f"img{i}.v2", f"c{i}", ".jpg", ".caption.txt")],
        {f"img{i}.v2": f"c{i}" for i in range(4)},
        {},
    ),
    "a named picture only": (
        [m for i in range(4) for m in sample(f"s{i}", f"c{i}", ".left.jpg")],
        {f"s{i}": f"c{i}" for i in range(4)},
        {},
    ),
    "a text that repeats the picture's suffix": ([*MANY, *sample("9", "c", ".jpg", ".jpg.txt")], FOUR | {"9": "c"}, {}),
    "of two named pictures the image": (
        [*MANY, ("9.depth.png", "D"), *sample("9", "c", ".image.jpg")],
        FOUR | {"9": "c"},
        {"pictures without a caption (the first: 0.tar: 9.depth)": 1},
    ),
    "of two named texts the caption": (
        [*MANY, ("9.ocr.txt", "STOP"), *sample("9", "c", ".jpg", ".caption.txt")],
        FOUR | {"9": "c"},
        {},
    ),
    "pictures first": (MANY[::2] + MANY[1::2], FOUR, {}),
    "texts first, in another order": (MANY[1::2] + MANY[-2::-2], FOUR, {}),
    "a Mac's ._ members": (
        [m for member in MANY for m in ((f"._{member[0]}", "Mac OS X"), member)],
        FOUR,
        {},
    ),
    "hidden folders": (
        [*MANY, *sample(".trash/9", "c"), *sample("__MACOSX/._9", "c"), *sample("./9", "d")],
        FOUR | {"./9": "d"},
        {},
    ),
    "names in an older encoding": ([*MANY, *sample("caf\udce9", "c")], FOUR | {r"caf\udce9": "c"}, {}),
    "a field that is no text": (
        [*MANY, *sample("9", '{"text": {"en": "x"}}', ".jpg", ".json")],
        FOUR,
        {"pictures without a caption (the first: 0.tar: 9)": 1},
    ),
    "a key twice": (
        [*MANY, *sample("001", "again"), *sample("9", "c")],
        FOUR | {"001": "again", "9": "c"},
        {"repeated keys (the first: 0.tar: 001)": 1},
    ),
    "a jpg and a png of one key": (
        [*MANY, ("002.png", "<plain 2>")],
        FOUR,
        {"repeated keys (the first: 0.tar: 002)": 1},
    ),
    "partners are missing": (
        [*MANY, ("x.05.jpg", "X"), ("y.jpg", "Y"), ("z.07.txt", "z"), ("x.06.txt", "not x.05's")],
        FOUR,
        {
            "pictures without a caption (the first: 0.tar: x.05)": 2,
            "texts without a picture (the first: 0.tar: z.07.txt)": 2,
        },
    ),
    "partners are missing beside keys with words": (
        [*MANY, *sample("x.a", "xa"), ("x.b.jpg", "B"), ("x.c.txt", "not b's"), *sample("x.d", "xd")],
        FOUR | {"x.a": "xa", "x.d": "xd"},
        {
            "pictures without a caption (the first: 0.tar: x.b)": 1,
            "texts without a picture (the first: 0.tar: x.c.txt)": 1,
        },
    ),
    "texts of nothing": (
        [*MANY, *sample("8", " \n"), *sample("9", '{"caption": ["", null]}', ".jpg", ".json")],
        FOUR,
        {"pictures without a caption (the first: 0.tar: 8)": 2, "empty captions": 2},
    ),
} | {
    f"JSON with {json.dumps(content)[:20]}": (
        [m for i in range(4) for m in sample(f"{i}", json.dumps(content).replace("%", str(i)), ".jpg", ".json")],
        {f"{i}": f"c{i}" for i in range(4)},
        {},
    )
    for content in (
        {"text": "c%"},
        {"prompt": "c%", "seed": 3},
        {"url": "u", "caption": None, "description": "c%"},
        {"caption_1": "c%", "title": "t"},
    )
}


@pytest.mark.parametrize("case", SHARDS)
def test_what_makes_a_sample(tmp_path: Path, case: str) -> None:
    """Keys ended at their first dot, members had to stand side by side, and of the JSON only caption and captions counted:
    other shards lost all of their samples or, without a word, some. A wrong partner would be worse."""
    members, wanted, left_out = SHARDS[case]
    write_tar(tmp_path / "0.tar", members)
    parts = load_tables("auto", tmp_path)
    found = {
        part.id_of(row): (*part.captions_of(row), part.picture(row))
        for part in parts.values()
        for row in range(len(part))
    }
    texts = {key: text if "JSON" not in case else None for key, text in wanted.items()}
    assert {key: own[0] for key, own in found.items()} == wanted
    assert all(own[1:] == (f"<{texts[key]}>".encode(),) for key, own in found.items() if texts[key])
    assert parts["train"].left_out == {what.replace("0.tar", f"{tmp_path}/0.tar"): n for what, n in left_out.items()}


def test_a_hard_link_is_the_member_that_it_stands_for(tmp_path: Path) -> None:
    """Equal files that are linked, as tools that save room link them, lost their samples."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in MANY:
            add(tar, name, content)
        add(tar, "9.txt", "same caption")
        for name, target in (("9.jpg", "000.jpg"), ("8.jpg", "001.jpg"), ("8.txt", "9.txt")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
    parts = load_tables("auto", tmp_path)
    found = {
        part.id_of(row): (part.captions_of(row), part.picture(row))
        for part in parts.values()
        for row in range(len(part))
    }
    assert len(found) == 6 and found["8"] == (["same caption"], b"<plain 1>") and not parts["train"].left_out


@pytest.mark.parametrize(
    ("wanted", "caption"),
    [("alt", "from alt"), ("text", "from text"), ("txt", "plain"), ("outputs", "part"), (None, "plain")],
)
def test_the_caption_column_of_shards(tmp_path: Path, wanted: str | None, caption: str) -> None:
    """--caption-column was not looked at in shards. It names a field of the JSON, a suffix, or a part."""
    about = json.dumps({"alt": "from alt", "text": "from text"})
    endings = {".jpg": "x", ".txt": "plain", ".json": about, ".outputs.txt": "part"}
    write_tar(tmp_path / "0.tar", [(f"{i}{ending}", text) for i in range(4) for ending, text in endings.items()])
    parts = load_tables("auto", tmp_path, caption_column=wanted)
    assert {text for part in parts.values() for text in part.captions().to_pylist()} == {caption}
    message = error_of(lambda: load_tables("auto", tmp_path, caption_column="legend"))
    assert all(word in message for word in ("0.tar: no picture", "alt, text, txt, outputs", "--caption-column"))


def test_shards_in_any_folder(tmp_path: Path) -> None:
    """Those that were neither in the folder itself nor in a part's were not found, or left out without a word; the hidden
    files that a Mac puts beside them were taken for shards."""
    write_tar(tmp_path / "deep/cc/train/0.TAR", MANY)
    write_tar(tmp_path / "deep/cc/val-shards/0.tar", sample("9", "c"))
    write_tar(tmp_path / "deep/.old/0.tar", sample("8", "c"))
    fill(tmp_path, {"deep/cc/._0.tar": "Mac OS X"})
    (tmp_path / "deep/cc/loop").symlink_to(tmp_path / "deep")
    assert {split: len(part) for split, part in load_tables("auto", tmp_path).items()} == {
        "train": 4,
        "val": 1,
        "test": 1,
    }
    write_tar(tmp_path / "1.tar", sample("7", "near"))
    assert {split: len(part) for split, part in load_tables("auto", tmp_path).items()} == {
        "train": 5,
        "val": 1,
        "test": 1,
    }
    (tmp_path / "1.tar").unlink()
    fill(tmp_path, FIVE | {"captions.csv": CSV_OF_FIVE})
    assert recognise(tmp_path)[0] == "csv"  # what lies deep beside a person's own pictures may be a copy of anything
    (tmp_path / "captions.csv").unlink()
    assert error_of(lambda: load_tables("auto", tmp_path)).startswith(
        f"no captions found in {tmp_path} beside 5 pictures"
    )
    assert load_table("webdataset", tmp_path, "train").captions_of(0) == ["plain 0"]


@pytest.mark.parametrize("name", ["1.tar.gz", "1.TGZ", "1.tar.zst"])
def test_packed_shards_are_named(tmp_path: Path, name: str) -> None:
    """They were passed over. Nothing in the middle of one can be read without all that stands before it."""
    fill(tmp_path, {name: gzip.compress(b"x")})
    for path in (tmp_path, tmp_path / name):
        assert error_of(lambda path=path: load_tables("auto", path)) == (
            f"no captions found in {tmp_path / name}: it is compressed, and shards are read in place: unpack it to .tar"
        )
    write_tar(tmp_path / "0.tar", MANY)
    left_out = {f"packed shards, to be unpacked to .tar (the first: {tmp_path / name})": 1}
    assert load_tables("auto", tmp_path)["train"].left_out == left_out
    assert load_tables("auto", tmp_path / "0.tar")["train"].left_out == {}


def test_a_shard_of_pictures_alone(tmp_path: Path) -> None:
    """The advice was to get the file anew, which would be the same."""
    write_tar(tmp_path / "0.tar", MANY[::2])
    message = error_of(lambda: load_tables("auto", tmp_path))
    assert message.startswith(f"{tmp_path / '0.tar'}: no picture has a caption, beside the last one is no text")


@pytest.mark.parametrize("length", [0, 100, 512, 512 + 300, 1024 + 512, 2 * 512 + 100, 512 * 13 + 17, 512 * 20])
def test_a_cut_shard(tmp_path: Path, length: int) -> None:
    """At every kind of place: tarfile takes a cut header, or an end between two members, for the end of the file."""
    path = write_tar(tmp_path / "0.tar", SAMPLES)
    content = path.read_bytes()
    assert length < content.rindex(b"b ") and content[512 * 20 :].strip(b"\0")
    path.write_bytes(content[:length])
    message = error_of(lambda: load_tables("auto", tmp_path))
    assert message.startswith(str(path)) and "get it again" in message


def test_damaged_shards(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", SAMPLES)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "get it again, not compressed" in error_of(lambda: load_tables("auto", tmp_path))
    for text, part in (("{", "not JSON"), (b"\xff", "not UTF-8"), ('{"captions": [[1]]}', "not text")):
        write_tar(path, SAMPLES | {"003.json": text})
        write_tar(path, {"003.jpg": b"", "003.json": text})
        message = error_of(lambda: load_tables("auto", tmp_path))
        assert message.startswith(f"{path}: 003") and part in message


# Bad input


COCO_VAL = "annotations/captions_val2017.json"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"images": [\n{"id": 1,', ":2: not JSON"),
        ('{"images": [\ud800'.encode("utf-8", "surrogatepass"), ":1: not UTF-8"),
        ("{}".encode("utf-16"), "no list 'images'"),
        ("[" * 100_000, "not readable as JSON"),
        ("9" * 5_000, "not readable as JSON"),
        ("", ":1: not JSON"),
        ("[]", "no list 'images'"),
        ('{"images": []}', "no list 'images' and 'annotations'"),
        (coco_json([], []), "no picture has a caption"),
        (coco_json([(4, "a.jpg")], [(1, 4, None)]), "no picture has a caption"),
        ('{"images": [3], "annotations": []}', "images[0]: 'id'"),
        (coco_json([(True, "a.jpg")], []), "images[0]: 'id'"),
        ('{"images": [{"id": 4}], "annotations": []}', "image 4: no picture is named"),
        (coco_json([(4, 5)], []), "image 4: no picture is named"),
        (coco_json([(4, "\ud800.jpg")], []), "image 4: '\\ud800.jpg' is not valid"),
        (coco_json([(4, "a"), (4, "b")], []), "image 4 occurs twice"),
        ('{"images": [], "annotations": [{}]}', "annotations[0]: 'image_id'"),
        (coco_json([(4, "a")], [(8, 99, "text")]), "annotation 8: its image 99 is not among the 1 'images'"),
        (coco_json([(4, "a")], [(8, None, "text")]), "annotation 8: 'image_id'"),
        (coco_json([(4, "a")], [(8, 4, [["text"]])]), "annotation 8: the caption is"),
        (coco_json([(4, "a")], [(8, 4, True)]), "annotation 8: the caption is 'True' and not text"),
    ],
)
def test_damaged_coco_files(tmp_path: Path, content: str | bytes, part: str) -> None:
    fill(tmp_path, {COCO_VAL: content})
    message = error_of(lambda: load_table("coco", tmp_path, "val"))
    assert message.startswith(str(tmp_path / COCO_VAL)) and part in message
    assert re.search(r"fix|get (it|the file) again|this is another kind|leave|remove|rename", message)


@pytest.mark.parametrize("image_id", [2**70, "x1", "007", "a(b["])
def test_coco_ids_of_any_kind(tmp_path: Path, image_id: Any) -> None:
    """A number beyond 64 bits once ended in an OverflowError, and a bracket in an id in one of re's."""
    fill(tmp_path, {COCO_VAL: coco_json([(image_id, "a.jpg")], [(1, image_id, "x")])} | pictures("val2017/a.jpg"))
    part = load_table("coco", tmp_path, "val")
    assert ids(part) == [str(image_id)] and len(part.keys()) == 1


OUTSIDE = ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "..\\a.jpg", "C:\\a.jpg", "C:a.jpg", "\\\\host\\a.jpg"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    "layout", ["coco", "karpathy", "karpathy filepath", "flickr30k", "flickr8k", "list", "csv", "jsonl"]
)
def test_names_that_lead_outside(tmp_path: Path, layout: str, name: str) -> None:
    root = tmp_path / "data"
    fill(tmp_path, pictures("a.jpg"))  # what a name that is followed would find
    line = json.dumps({"file_name": name, "caption": "text"})
    source, files = {
        "coco": (COCO_VAL, {COCO_VAL: coco_json([(1, name)], [(1, 1, "text")])}),
        "karpathy": ("dataset_flickr8k.json", {"dataset_flickr8k.json": karpathy_json({"filename": name})}),
        "karpathy filepath": (
            "dataset_coco.json",
            {"dataset_coco.json": karpathy_json({"filename": "a.jpg", "cocoid": 1, "filepath": name})},
        ),
        "flickr30k": ("results.csv", {"results.csv": f"image_name| comment_number| comment\n{name}| 0| text\n"}),
        "flickr8k": ("captions.txt", {"captions.txt": f"image,caption\n{name},text\n"}),
        "list": (
            "Flickr_8k.trainImages.txt",
            {"captions.txt": "image,caption\na.jpg,text\n", "Flickr_8k.trainImages.txt": f"{name}\n"},
        ),
        "csv": ("c.csv", {"c.csv": f"image,caption\n{name},text\n"}),
        "jsonl": ("metadata.jsonl", {"metadata.jsonl": line}),
    }[layout]
    message = error_of(lambda: load_tables("auto", fill(root, files)))
    assert message.startswith(f"{root / source}:") and f"{name!r} leads out" in message and "relative name" in message


@pytest.mark.parametrize(
    ("text", "lists", "part"),
    [
        ("", {}, ": no picture has a caption"),
        ("image_name| comment\na.jpg| x\n", {}, ":1: the header is 'image_name| comment'"),
        ("image,caption\na.jpg,x\na.jpg,one, two\n", {}, ":3: 3 columns where 2 are expected"),
        ("image,caption\na.jpg\n", {}, ":2: 1 columns"),
        ('image,caption\na.jpg,x\na.jpg,"x\nb.jpg,y\nc.jpg,z\n', {}, ":3: not CSV"),
        ('image,caption\na.jpg,"x"y\n', {}, ":2: not CSV"),
        ("image,caption\nc.jpg,x\n", {"train": "a.jpg\n"}, ": no line for 1 ('a.jpg') of the 1 pictures"),
        ("image,caption\n,x\n", {}, ":2: no picture is named"),
        ("image,image\na.jpg,x\n", {}, ":1: the column 'image' occurs twice"),
    ],
)
def test_damaged_flickr8k_captions(tmp_path: Path, text: str, lists: dict[str, str], part: str) -> None:
    """A quote that is never closed is reported where it opens, and not at the last line of the file."""
    source = flickr8k(tmp_path, text, **lists)
    assert error_of(lambda: load_tables("flickr8k", tmp_path)).startswith(f"{source}{part}")


def test_flickr8ks_lists(tmp_path: Path) -> None:
    text = "image,caption\na.jpg,x\nb.jpg,y\nc.jpg,z\n"
    flickr8k(tmp_path, text, test="a.jpg\nb.jpg\na.jpg\n")
    assert "testImages.txt: listed more than once: 1 ('a.jpg')" in error_of(lambda: load_tables("auto", tmp_path))
    flickr8k(tmp_path, text, train="a.jpg\nb.jpg\n", test="c.jpg")  # no list of val: one is drawn from train's
    parts = load_tables("auto", tmp_path)
    assert {split: len(part) for split, part in parts.items()} == {"train": 1, "val": 1, "test": 1}
    assert ids(parts["test"]) == ["c.jpg"] and "1 picture each set aside for val" in parts["val"].about


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("c.csv", "file_name,caption\n0.jpg,one, two\n", ":2: 3 columns where 2 are expected ('file_name,caption')"),
        ("c.csv", 'file_name,caption\n0.jpg,"one\n1.jpg,two\n', ":2: not CSV"),
        ("c.csv", "file_name,caption,split\n0.jpg,x,holdout\n", ":2: split 'holdout' is none of train, training"),
        ("c.csv", "file_name,caption,split\n0.jpg,x,\n0.jpg,x,test\n", ":3: '0.jpg' is in 'no split' above"),
        ("c.csv", "file_name,caption,caption\n0.jpg,x,x\n", ":1: the column 'caption' occurs twice"),
        ("c.csv", b"file_name,caption\n0.jpg,caf\xe9\n", ":2: not UTF-8"),
        ("c.csv", "file_name,caption\n", ": no picture has a caption"),
        ("c.jsonl", '{"image": "0.jpg", "text": "x"}\n{"image": \n', ":2: not JSON"),
        ("c.jsonl", '{"image": "0.jpg", "text": "x"}\n[1]\n', ":2: not an object"),
        ("c.jsonl", '{"image": "0.jpg", "text": {"raw": "x"}}', ":1: the caption is"),
        ("c.jsonl", '{"image": {"bytes": ""}, "text": "x"}', ":1: no picture is named"),
        ("c.jsonl", '{"image": "0.jpg", "text": "x"}\n{"text": "x"}', ":2: no picture is named"),
        ("c.json", '[{"image": "0.jpg", "text": "x"}, 7]', ": not a list of objects"),
        ("c.json", '[{"image": "0.jpg", "text": "x"},\n', ":2: not JSON"),
        ("c.json", '[{"image": "0.jpg", "text": "x", "split": 3}]', ": [0]: split 3 is none of"),
        ("metadata.csv", "name,words\n0.jpg,x\n", ": no column for the pictures among 'name', 'words'"),
        ("metadata.csv", "image,words\n0.jpg,x\n", ": no column for the captions among 'image', 'words'"),
        ("metadata.parquet", b"PAR1 and no more", ": not readable as Parquet"),
        ("dataset_coco.json", "{}", ": no list 'images'"),
        ("dataset_coco.json", karpathy_json({"filename": "0.jpg", "split": "x"}), ": images[0]: split 'x' is none of"),
        ("dataset_coco.json", karpathy_json({"filename": 7}), ": images[0]: 'filename'"),
        ("dataset_coco.json", karpathy_json({"filename": "0.jpg", "cocoid": "7"}), ": images[0]: 'cocoid'"),
        ("dataset_coco.json", karpathy_json({"filename": "0.jpg", "sentences": "x"}), ": images[0]: 'sentences'"),
        ("dataset_coco.json", karpathy_json({"filename": "0.jpg"})[:-9], ":1: not JSON"),
        ("results.csv", "image,caption\n", ":1: the header is not 'image_name|"),
        ("results.csv", "image_name| comment_number| comment\n0.jpg| text\n", ":2: not 'name| number| caption'"),
        ("0.txt", b"caf\xe9", ":1: not UTF-8"),
    ],
)
def test_damaged_tables(tmp_path: Path, name: str, content: str | bytes, part: str) -> None:
    fill(tmp_path, FIVE | {name: content})
    message = error_of(lambda: load_tables("auto", tmp_path))
    assert message.startswith(f"{tmp_path / name}{part}")
    assert re.search(r"fix|again|rename|write|put|name it|save|another kind|one split", message[len(str(tmp_path)) :])


def test_damaged_parquet_is_named_and_in_nobodys_way(tmp_path: Path) -> None:
    """Arrow raises OSError for some damage: the file was not named, and beside texts it kept them from being read."""
    content = io.BytesIO()
    rows = [{"image": f"{i}.jpg", "text": f"xyz{i}"} for i in range(5)]
    pq.write_table(
        pa.Table.from_pylist(rows), content, compression="none", use_dictionary=False, write_statistics=False
    )
    whole = content.getvalue()
    root = fill(tmp_path / "table", FIVE | {"c.parquet": whole.replace(b"xyz3", b"xy\xff3")})
    assert error_of(lambda: load_tables("csv", root)).startswith(f"{root / 'c.parquet'}: not readable as Parquet")
    page = whole[:4] + b"\xff" * 40 + whole[44:]
    fill(root, {"c.parquet": page})
    assert error_of(lambda: load_tables("csv", root)).startswith(f"{root / 'c.parquet'}: not readable as Parquet")
    end = whole.rindex(b"schema")
    texts = {name.replace(".jpg", ".txt"): "text" for name in FIVE}
    root = fill(tmp_path / "texts", FIVE | texts | {"c.parquet": whole[: end - 20] + b"\xff" * 20 + whole[end:]})
    assert sum(map(len, load_tables("auto", root).values())) == 5


def test_parquet_says_the_row(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.jpg", "text": "x", "split": "?" if i == 3 else "train"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), fill(tmp_path, FIVE) / "c.parquet")
    assert error_of(lambda: load_tables("auto", tmp_path)).startswith(f"{tmp_path / 'c.parquet'}: row 3: split '?'")


@pytest.mark.parametrize(
    "files",
    [("a.csv", "b.csv"), ("train_a.csv", "train_b.csv"), ("metadata.csv", "metadata.jsonl"), ("c.csv", "c.json")],
)
def test_several_candidates(tmp_path: Path, files: tuple[str, str]) -> None:
    line = '{"file_name": "0.jpg", "caption": "x"}'
    content = {".csv": CSV_OF_FIVE, ".jsonl": line, ".json": f"[{line}]"}
    fill(tmp_path, FIVE | {name: content[Path(name).suffix] for name in files})
    message = error_of(lambda: load_tables("auto", tmp_path))
    assert message.startswith(f"{tmp_path} holds 2 (") and all(repr(name) in message for name in files)
    assert "name one of the files with --data-dir" in message
    assert sum(len(part) for part in load_tables("auto", tmp_path / files[0]).values()) == 5


def test_two_of_karpathys_files(tmp_path: Path) -> None:
    text = karpathy_json(*({"filename": f"{i}.jpg"} for i in range(5)))
    fill(tmp_path, FIVE | {"dataset_flickr8k.json": text, "dataset_flickr30k.json": text})
    assert "holds 2 (" in error_of(lambda: load_tables("auto", tmp_path))
    assert load_table("auto", tmp_path / "dataset_flickr30k.json", "val").name == "flickr30k"


# What is where


def test_folders_that_are_not_data(tmp_path: Path) -> None:
    for name in ("auto", "coco", "flickr8k"):
        message = error_of(functools.partial(load_table, name, tmp_path / "nowhere", "train"))
        assert message.startswith(f"no such folder: {tmp_path / 'nowhere'}: name one ") and "--preset demo" in message
    message = error_of(lambda: load_tables("auto", tmp_path))
    assert message.startswith(f"no captions found in {tmp_path}: looked for ")
    assert all(f"({name})" in message for name in LAYOUTS)
    fill(tmp_path, pictures("a.jpg", "b/c.PNG", "notes.md"))
    assert f"no captions found in {tmp_path} beside 2 pictures" in error_of(lambda: load_tables("auto", tmp_path))
    for name, layout in LAYOUTS.items():
        message = error_of(functools.partial(load_tables, name, tmp_path))
        assert message.startswith(f"{tmp_path} is not in the layout {name}: expected {layout.shape}")
        assert message.endswith(f", which is in {layout.source}" if layout.source else layout.shape)


def test_wrong_words(tmp_path: Path) -> None:
    message = error_of(lambda: load_tables("coconut", tmp_path))
    assert message.startswith("dataset 'coconut' is unknown: use auto, coco, karpathy, ") and "on the Hub" in message
    assert "use train, val or test" in error_of(lambda: load_table("coco", tmp_path, "dev"))
    fill(tmp_path, FIVE | {"c.csv": CSV_OF_FIVE})
    message = error_of(lambda: load_tables("csv", tmp_path / "c.csv", caption_column="words"))
    assert "no column for the captions among 'file_name', 'caption': name it with --caption-column" in message
    message = error_of(lambda: load_tables("csv", tmp_path / "c.csv", image_column="Bild"))
    assert "no column for the pictures among 'file_name', 'caption': name it with --image-column" in message


def test_the_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = error_of(lambda: load_tables("somebody/data", "ignored"))
    assert message.startswith("somebody/data is read with") and "pip install -r requirements/data.txt" in message


def test_the_hub_without_a_network(hub_cache: None) -> None:
    pytest.importorskip("datasets")
    message = error_of(lambda: load_tables("nobody/no-such-data-set", "ignored"))
    assert message.startswith("nobody/no-such-data-set: the data set cannot be loaded (")
    assert message.endswith("check its name and the network")


def test_a_hub_data_set_without_captions(tmp_path: Path, hub_cache: None) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"label": [1, 2], "text": ["a", "b"]}).save_to_disk(tmp_path)
    message = error_of(lambda: load_tables("auto", tmp_path))
    assert message == f"{tmp_path}: no column for the pictures among label, text: name it with --image-column"


@pytest.mark.parametrize(("split", "enough"), [("", 3), ("train", 2)])
def test_too_few_pictures_to_split(tmp_path: Path, split: str, enough: int) -> None:
    for number in (enough - 1, enough):
        rows = "".join(f"{i}.jpg,x,{split}\n" for i in range(number))
        fill(tmp_path, FIVE | {"c.csv": f"image,text,split\n{rows}"})
        if number == enough:
            assert min(len(part) for part in load_tables("auto", tmp_path).values()) == 1
        else:
            message = error_of(lambda: load_tables("auto", tmp_path))
            assert (
                message.startswith(f"{tmp_path / 'c.csv'}: {counted(number, 'pictures')}")
                and f"at least {enough}" in message
            )


def test_what_is_tried_first(tmp_path: Path) -> None:
    fill(tmp_path, FIVE | {"0.txt": "x"})
    assert recognise(tmp_path)[0] == "sidecar"
    for name, file in (
        ("csv", "c.csv"),
        ("webdataset", "0.tar"),
        ("imagefolder", "metadata.csv"),
        ("flickr8k", "captions.txt"),
        ("flickr30k", "results.csv"),
        ("karpathy", "dataset_coco.json"),
        ("coco", COCO_VAL),
    ):
        fill(tmp_path, {file: CSV_OF_FIVE})
        assert recognise(tmp_path)[0] == name
        assert recognise(tmp_path, dataset="sidecar")[0] == "sidecar"


# --data-dir FILE


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco", "train2017", "a.jpg", "train")
    source = write_coco(tmp_path / "coco", "val2017", "b.jpg", "val", 2)
    parts = load_tables("auto", source)
    assert {split: ids(part) for split, part in parts.items()} == {"train": [1], "val": [2], "test": [2]}

    fill(
        tmp_path / "two", FIVE | {"a.csv": CSV_OF_FIVE, "b.csv": "image,text\n0.jpg,other\n1.jpg,other\n2.jpg,other\n"}
    )
    parts = load_tables("auto", tmp_path / "two/b.csv")
    assert {caption for part in parts.values() for caption in part.captions().to_pylist()} == {"other"}

    write_tar(tmp_path / "two/0.tar", SAMPLES)
    write_tar(tmp_path / "two/1.tar", SAMPLES)
    assert {len(part) for part in load_tables("auto", tmp_path / "two/0.tar").values()} == {3, 1}
    assert {len(part) for part in load_tables("webdataset", tmp_path / "two").values()} == {8, 1}

    text = flickr8k(tmp_path / "8", "image,caption\na.jpg,x\nb.jpg,x\nc.jpg,x\n", train="a.jpg", dev="b.jpg")
    assert ids(load_table("auto", text, "train")) == ["a.jpg"]  # the lists beside it count

    fill(tmp_path / "k", {"dataset_flickr8k.json": karpathy_json(*({"filename": f"{i}.jpg"} for i in range(3)))} | FIVE)
    fill(tmp_path / "k", {"c.csv": CSV_OF_FIVE})
    assert load_table("auto", tmp_path / "k/dataset_flickr8k.json", "train").name == "flickr8k"
    assert load_table("auto", tmp_path / "k/c.csv", "train").name == "csv"

    fill(tmp_path / "30", {"flickr30k_images/results.csv": FLICKR30K})
    fill(tmp_path / "30/flickr30k_images", pictures(*(f"flickr30k_images/{i}.jpg" for i in (1, 2, 2199200615))))
    assert load_table("auto", tmp_path / "30/flickr30k_images/results.csv", "val").name == "flickr30k"


def test_a_file_that_is_none_of_them(tmp_path: Path) -> None:
    fill(tmp_path, {"notes.md": "x", "c.tar.gz": b"\x1f\x8b"})
    for name in ("notes.md", "c.tar.gz"):
        path = tmp_path / name
        assert error_of(lambda path=path: load_tables("auto", path)).startswith(f"no captions found in {path}")


# The table kept on disk


class ReadAgainError(Exception):
    """Raised by a reader that should not have been called."""


def no_reading(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def read(*_: Any) -> Any:
        raise ReadAgainError

    monkeypatch.setitem(LAYOUTS, name, dataclasses.replace(LAYOUTS[name], read=read))


@pytest.fixture
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WORTH_KEEPING", 0)


def csv_folder(root: Path, word: str = "caption") -> Path:
    return fill(root, FIVE | {"c.csv": CSV_OF_FIVE.replace("caption ", f"{word} ")})


def test_a_large_table_is_kept_and_a_small_one_is_not(
    tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = csv_folder(tmp_path)
    size = (root / "c.csv").stat().st_size
    monkeypatch.setattr(sources, "WORTH_KEEPING", size + 1)
    load_tables("auto", root)
    assert list(cache_folder.iterdir()) == []
    monkeypatch.setattr(sources, "WORTH_KEEPING", size)
    first = load_tables("auto", root)
    assert len(list(cache_folder.iterdir())) == 1
    no_reading(monkeypatch, "csv")
    again = load_tables("auto", root)
    assert again == first and again["train"].about == first["train"].about and "set aside" in again["train"].about


def test_left_out_and_missing_survive_keeping(tmp_path: Path, keeps_all: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is looked for each time: a picture that comes back is in the table again."""
    root = fill(tmp_path, FIVE | {"c.csv": CSV_OF_FIVE + "0.jpg,  \n"})
    first = load_tables("auto", root)
    gone = first["train"].picture(0)
    assert isinstance(gone, Path) and first["train"].left_out == {"empty captions": 1}
    gone.rename(root / "away")
    again = load_tables("auto", root)
    assert again["train"].missing == (gone.name,) and again["train"].left_out == {"empty captions": 1}
    (root / "away").rename(gone)
    no_reading(monkeypatch, "csv")
    assert load_tables("auto", root) == first


def test_an_edited_file_is_read_anew_and_the_older_table_deleted(
    tmp_path: Path, cache_folder: Path, keeps_all: None
) -> None:
    root = csv_folder(tmp_path / "one")
    other = csv_folder(tmp_path / "other")
    load_tables("auto", root), load_tables("auto", other)
    before = {path.name for path in cache_folder.iterdir()}
    csv_folder(root, "CAPTION")  # as many bytes
    os.utime(root / "c.csv", ns=(1, 1))
    assert load_table("auto", root, "val").captions_of(0)[0].startswith("CAPTION")
    after = {path.name for path in cache_folder.iterdir()}
    assert len(before) == len(after) == 2 and len(before & after) == 1  # the other folder's is left alone


def test_columns_are_part_of_what_is_kept(tmp_path: Path, keeps_all: None) -> None:
    rows = "".join(f"{i}.jpg,one,eins\n" for i in range(5))
    root = fill(tmp_path, FIVE | {"c.csv": f"image,caption,satz\n{rows}"})
    assert load_table("auto", root, "val").captions_of(0) == ["one"]
    assert load_table("auto", root, "val", caption_column="satz").captions_of(0) == ["eins"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-8],
        lambda content: b"\0" * len(content),
        lambda content: content.replace(b"about", b"abbut"),
        lambda content: content.replace(b"caption 1", b"captain 1"),  # a table of other captions
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    ],
    ids=["empty", "start", "half", "end", "zeros", "metadata", "caption", "checksum"],
)
def test_a_damaged_kept_table_is_made_anew(
    tmp_path: Path,
    cache_folder: Path,
    keeps_all: None,
    damage: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = csv_folder(tmp_path)
    first = load_tables("auto", root)
    (kept,) = cache_folder.iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # the old content stays mapped
    assert damage(whole) != whole
    kept.write_bytes(damage(whole))
    assert load_tables("auto", root) == first
    assert kept.read_bytes() == whole
    no_reading(monkeypatch, "csv")
    assert load_tables("auto", root) == first


def test_an_unwritable_cache_stops_nothing(tmp_path: Path, keeps_all: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load_tables("auto", csv_folder(tmp_path))
    monkeypatch.setenv("VIT_GPT2_CACHE", str(tmp_path / "c.csv/below a file"))
    assert load_tables("auto", tmp_path) == wanted

    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "refused")

    monkeypatch.setattr(table, "read_table", refused)
    assert load_tables("auto", tmp_path) == wanted


def test_no_room_for_a_kept_table(
    tmp_path: Path, cache_folder: Path, keeps_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a table stays nowhere."""

    def full(packed: pa.Table, path: Path, about: dict[str, Any]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table, "write_table", full)
    assert len(load_tables("auto", csv_folder(tmp_path))["train"]) == 3
    assert list(cache_folder.iterdir()) == []


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have no home at all, which once ended in a RuntimeError."""
    monkeypatch.delenv("VIT_GPT2_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert utils.cache_dir() == tmp_path / "vit-gpt2-captioning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert utils.cache_dir() == tmp_path / ".cache/vit-gpt2-captioning"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["nobody"])
    assert utils.cache_dir().is_absolute()


def test_a_kept_table_follows_pictures_that_move(tmp_path: Path, keeps_all: None) -> None:
    """The first try found no picture and kept a table that looked for them in the wrong folder for ever after."""
    text = karpathy_json(*({"filename": f"{i}.jpg"} for i in range(5)))
    root = fill(tmp_path, {"dataset_flickr8k.json": text})
    assert "none of the 4 train pictures" in error_of(lambda: load_tables("auto", root))
    fill(root / "Images", FIVE)
    assert names(load_table("auto", root, "val"))[0].startswith("Images/")
    (root / "Images").rename(root / "flickr30k-images")
    assert names(load_table("auto", root, "val"))[0].startswith("flickr30k-images/")


def test_a_kept_table_is_mapped_and_not_read(tmp_path: Path) -> None:
    """A table of millions takes no memory of its own, and worker processes share it: what changes in the file changes
    in the table."""
    packed, _ = pack(Row("train", f"{i}.jpg", i, [f"caption {i}"]) for i in range(5))
    path = tmp_path / "kept"
    table.write_table(packed, path, {"any": "thing"})
    mapped, about = table.read_table(path)
    assert about == {"any": "thing"} and mapped == packed
    with open(path, "r+b") as file:
        file.seek(path.read_bytes().index(b"caption 3"))
        file.write(b"CAPTION 3")
    part = CaptionTable(mapped.slice(2), tmp_path, "csv", "train").head(2)
    assert captions(part) == [["caption 2"], ["CAPTION 3"]]


# The packed table itself


def test_table_counts_and_cuts(tmp_path: Path) -> None:
    part = make_table([(tmp_path / "a", 1, ["x"]), (tmp_path / "b", 2, ["y", "", "z"])], "made here", "val")
    assert (len(part), part.num_captions, part.name, part.split) == (2, 3, "made here", "val")
    assert part.left_out == {"empty captions": 1}
    assert (part.picture(1), part.name_of(1), part.id_of(1)) == (tmp_path / "b", str(tmp_path / "b"), 2)
    assert captions(part.head(1)) == [["x"]] and part.head(9) == part
    for n in (0, -1):
        assert error_of(functools.partial(part.head, n)).endswith("ask for at least 1")


def test_more_rows_than_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids may be numbers in one batch and names in the next: then they are names all over."""
    numbers = [Row("train", f"{i}.jpg", i, [f"caption {i}"]) for i in range(2 * table.BATCH + 1)]
    packed, _ = pack(numbers)
    assert packed["id"].to_pylist() == list(range(2 * table.BATCH + 1)) and packed["id"].type == pa.int64()
    packed, _ = pack([*numbers[: table.BATCH], numbers[7]._replace(id="seven"), numbers[8]])
    assert packed["id"].to_pylist() == [*map(str, range(table.BATCH)), "seven", "8"]
    assert packed.schema == pack([numbers[0]._replace(id="x")])[0].schema
    assert pack([])[0].num_rows == 0


def row_lists() -> st.SearchStrategy[list[Row]]:
    """Rows with ids that differ as text, of numbers and names mixed, some without a caption."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    captions_ = st.lists(text, max_size=3)
    split = st.sampled_from(["", *table.SPLITS])
    row = st.builds(Row, split, text, st.integers() | text, captions_, st.just(-1), st.just(-1))
    return st.lists(row, max_size=30, unique_by=lambda made: str(made.id))


@given(rows=row_lists(), batch=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_caption_once(rows: list[Row], batch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "BATCH", batch)
        packed, left_out = pack(rows)
    wanted = [(str(row.id), row.picture, list(filter(None, row.captions))) for row in rows if any(row.captions)]
    columns = (packed[name].to_pylist() for name in ("id", "picture", "captions"))
    assert [(str(i), *rest) for i, *rest in zip(*columns, strict=True)] == [(i, p, own) for i, p, own in wanted]
    empty = sum(caption == "" for row in rows for caption in row.captions)
    assert left_out.get("empty captions", 0) == empty
    assert left_out.get("pictures without a caption", 0) == len(rows) - len(wanted)


@given(rows=row_lists(), order=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_parts_are_whole_apart_and_independent_of_order(rows: list[Row], order: Any) -> None:
    rows = [row._replace(captions=[*row.captions, "one"]) for row in rows]
    shuffled = list(rows)
    order.shuffle(shuffled)
    parts = []
    for listed in (rows, shuffled):
        packed, _ = pack(listed)
        said = Counter(row.split for row in listed)
        needed = 0 if said["val"] else 1 if said["train"] + said["val"] + said["test"] else 2
        pool = said[""] + said["train"]
        if pool and needed >= pool:
            assert "too few" in error_of(lambda packed=packed: split_up(packed))
            return
        settled, about = split_up(packed)
        where = dict(zip(map(str, settled["id"].to_pylist()), settled["split"].to_pylist(), strict=True))
        assert sorted(where) == sorted(str(row.id) for row in listed)
        assert settled["split"].to_pylist() == sorted(where.values(), key=table.SPLITS.index)
        assert all(where[str(row.id)] == row.split for row in listed if row.split in ("val", "test"))
        assert bool(about) == bool(pool and needed) and (not pool or set(where.values()) >= {"train", "val"})
        parts.append(where)
    assert parts[0] == parts[1]


@pytest.mark.parametrize(
    ("number", "aside"),
    [(3, 1), (11, 1), (12, 2), (60, 10), (100, 16), (300, 50), (1000, 50), (1020, 51), (20_000, 1000), (50_000, 1000)],
)
def test_how_many_are_set_aside(number: int, aside: int) -> None:
    """Of 60 pictures 3 once chose the model, by chance."""
    settled, about = split_up(pack(Row("", f"{i}", i, ["x"]) for i in range(number))[0])
    counts = Counter(settled["split"].to_pylist())
    assert counts == {"train": number - 2 * aside, "val": aside, "test": aside}
    assert about == f"{counted(aside, 'pictures')} each set aside for val and test"
