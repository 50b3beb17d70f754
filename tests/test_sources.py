"""sources.py: every layout read into a table, every error in one line, and COCO's download against a bad network."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm  # type: ignore[import-untyped]

import sources
from config import UserError
from sources import Archive, CaptionTable, download_coco_dataset, load_table, recognise

SHARED = Path(__file__).parents[2] / "shared/data"


def error_of(call: Callable[[], Any]) -> str:
    """The message of the UserError that call raises, which is one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and "\r" not in message
    return message


def write_coco(root: Path, part: str, images: list[tuple[Any, str]], annotations: list[tuple[Any, Any, str]]) -> Path:
    """COCO's layout for one part; returns its captions file. Pictures are empty files: sources never opens them."""
    content = {
        "images": [{"id": image_id, "file_name": name} for image_id, name in images],
        "annotations": [{"id": i, "image_id": image_id, "caption": caption} for i, image_id, caption in annotations],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / f"{part}2017").mkdir(exist_ok=True)
    for _, name in images:
        (root / f"{part}2017" / name).touch()
    source = root / f"annotations/captions_{part}2017.json"
    source.write_text(json.dumps(content), encoding="utf-8")
    return source


def write_flickr8k(root: Path, captions: str, **lists: str) -> Path:
    """Flickr8k's layout with pictures a.jpg, b.jpg and c.jpg; returns captions.txt."""
    (root / "Images").mkdir(parents=True, exist_ok=True)
    for name in "abc":
        (root / f"Images/{name}.jpg").touch()
    for part, text in lists.items():
        (root / f"Flickr_8k.{part}Images.txt").write_text(text)
    (root / "captions.txt").write_text(captions, encoding="utf-8")
    return root / "captions.txt"


# The real data at hand


@pytest.mark.parametrize(("split", "pictures"), [("train", 6000), ("val", 1000), ("test", 1000)])
def test_flickr8k_has_its_official_splits(split: Any, pictures: int) -> None:
    if not (SHARED / "flickr8k").is_dir():
        pytest.skip(f"no Flickr8k at {SHARED / 'flickr8k'}")
    table = load_table("auto", SHARED / "flickr8k", split)
    assert (len(table), table.num_captions, table.name, table.split) == (pictures, 5 * pictures, "flickr8k", split)
    official = {"train": "train", "val": "dev", "test": "test"}[split]
    listed = (SHARED / f"flickr8k/Flickr_8k.{official}Images.txt").read_text().split()
    assert table.ids == listed and [path.name for path in table.paths] == listed
    assert load_table("flickr8k", SHARED, split) == table  # one level down


def test_tiny_coco() -> None:
    if not (SHARED / "tiny_coco").is_dir():
        pytest.skip(f"no tiny_coco at {SHARED / 'tiny_coco'}")
    train = load_table("auto", SHARED / "tiny_coco", "train")
    val = load_table("coco", SHARED / "tiny_coco", "val")
    assert (len(train), len(val), train.num_captions, val.num_captions) == (50, 50, 250, 250)
    assert (train.ids[0], train.paths[0].name) == (391895, "000000391895.jpg")
    assert not set(train.ids) & set(val.ids)
    assert load_table("coco", SHARED / "tiny_coco", "test") == val  # and says that it is val


# The table


def test_table_counts_and_cuts() -> None:
    table = CaptionTable([Path("a"), Path("b")], [1, 2], [["x"], ["y", "z"]], "coco", "val")
    assert (len(table), table.num_captions) == (2, 3)
    assert table.head(1) == CaptionTable([Path("a")], [1], [["x"]], "coco", "val")
    assert table.head(9) == table
    assert "at least 1" in error_of(lambda: table.head(0))


# COCO's layout


def test_coco_order_and_white_space(tmp_path: Path) -> None:
    """Pictures as the file lists them, captions by annotation id, and no caption may hold a line break: official
    tools would shift every later caption."""
    annotations = [
        (9, 2, "late"),
        (4, 2, " two\u2028 \x0b words\r\n"),
        (5, 7, " \t"),
        (6, 1, "one \ud800"),
        (7, 99, "no one's"),
    ]
    write_coco(tmp_path, "train", [(2, "b.jpg"), (7, "c.jpg"), (1, "a.jpg")], annotations)
    table = load_table("coco", tmp_path, "train")
    assert table.paths == [tmp_path / "train2017/b.jpg", tmp_path / "train2017/a.jpg"]
    assert table.ids == [2, 1]
    assert table.captions == [["two words", "late"], ["one ?"]]


def test_coco_test_is_val_unless_drawn(tmp_path: Path) -> None:
    write_coco(tmp_path, "val", [(1, "a.jpg")], [(1, 1, "val")])
    assert load_table("coco", tmp_path, "test").split == "val"
    source = write_coco(tmp_path, "test", [(2, "b.jpg")], [(1, 2, "test")])
    table = load_table("coco", tmp_path, "test")
    assert (table.split, table.ids, table.captions) == ("test", [2], [["test"]])
    source.unlink()
    assert load_table("coco", tmp_path, "test").captions == [["val"]]


def test_one_listing_finds_missing_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [(i, f"{i}.jpg") for i in range(20)]
    write_coco(tmp_path, "val", images, [(i, i, "text") for i in range(20)])
    for i in (3, 5, 8, 13):
        (tmp_path / f"val2017/{i}.jpg").unlink()
    (tmp_path / "val2017/3.jpg").mkdir()  # a folder is no picture
    listed: list[Any] = []
    scandir = os.scandir

    def counted(path: Any) -> Any:
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    message = error_of(lambda: load_table("coco", tmp_path, "val"))
    assert len(listed) == 1
    assert "4 (" in message and "of the 20" in message and "13.jpg" not in message
    assert all(f"{i}.jpg'" in message for i in (3, 5, 8))


def test_coco_byte_order_mark_is_read(tmp_path: Path) -> None:
    source = write_coco(tmp_path, "val", [(1, "a.jpg")], [(1, 1, "text")])
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert len(load_table("coco", tmp_path, "val")) == 1


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "..\\a.jpg", "C:\\a.jpg", ""])
def test_names_that_lead_outside(tmp_path: Path, name: str) -> None:
    source = write_coco(tmp_path, "val", [], [(1, 1, "text")])
    source.write_text(json.dumps({"images": [{"id": 1, "file_name": name}], "annotations": []}))
    message = error_of(lambda: load_table("coco", tmp_path, "val"))
    assert message.startswith(f"{source}:1: ") and repr(name) in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"images": [\n{"id": 1,', ":2: not JSON"),
        ('{"images": [\ud800'.encode("utf-8", "surrogatepass"), ":1: not UTF-8"),
        ("{}".encode("utf-16"), ":1: not UTF-8"),
        ("[" * 100_000, "not readable as JSON"),
        ("9" * 5_000, "not readable as JSON"),
        ("[]", "not a COCO captions file"),
        ('{"images": []}', "no lists"),
        ('{"images": [], "annotations": []}', "no picture has a caption"),
        ('{"images": [3], "annotations": []}', "images[0]: 'id'"),
        ('{"images": [{"id": true}], "annotations": []}', "images[0]: 'id'"),
        ('{"images": [{"id": 4}], "annotations": []}', "image 4: 'file_name'"),
        (
            '{"images": [{"id": 4, "file_name": "a"}, {"id": 4, "file_name": "b"}], "annotations": []}',
            "image 4 is there",
        ),
        ('{"images": [], "annotations": [{}]}', "annotations[0]: 'id'"),
        ('{"images": [], "annotations": [{"id": 8, "image_id": 1, "bbox": []}]}', "annotation 8: 'caption'"),
    ],
)
def test_damaged_coco_files(tmp_path: Path, content: str | bytes, part: str) -> None:
    source = write_coco(tmp_path, "val", [], [])
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = error_of(lambda: load_table("coco", tmp_path, "val"))
    assert message.startswith(str(source)) and part in message and len(message) < 600


def test_impossible_file_names_are_missing_pictures(tmp_path: Path) -> None:
    source = write_coco(tmp_path, "val", [], [])
    images = [{"id": i, "file_name": name} for i, name in enumerate(["a\0/b.jpg", "\ud800/b.jpg", "a\0.jpg", "."])]
    captions = [{"id": i, "image_id": i, "caption": "text"} for i in range(4)]
    source.write_text(json.dumps({"images": images, "annotations": captions}))
    assert "4 (" in error_of(lambda: load_table("coco", tmp_path, "val"))


# Flickr8k's layout


def test_flickr8k_quotes_order_and_nesting(tmp_path: Path) -> None:
    captions = (
        '\ufeffimage,caption\nb.jpg,"He says ""go"" , twice ."\na.jpg, one\u00a0 two \nb.jpg,second\n\nc.jpg,"  "\n'
    )
    write_flickr8k(tmp_path / "flickr8k", captions, train="b.jpg\r\n a.jpg\n\nc.jpg\n", dev="a.jpg\n", test="")
    assert recognise(tmp_path) == recognise(tmp_path / "flickr8k") == "flickr8k"
    table = load_table("auto", tmp_path, "train")
    assert table.ids == ["b.jpg", "a.jpg"]
    assert table.captions == [['He says "go" , twice .', "second"], ["one two"]]
    assert table.paths[0] == tmp_path / "flickr8k/Images/b.jpg"
    assert load_table("auto", tmp_path, "val").ids == ["a.jpg"]
    assert "no picture has a caption" in error_of(lambda: load_table("auto", tmp_path, "test"))


@pytest.mark.parametrize(
    ("captions", "part"),
    [
        ("", ":1: the header is ''"),
        ("image_name| comment\na.jpg| x\n", ":1: the header is 'image_name| comment'"),
        ("image,caption\na.jpg,x\na.jpg,one, two\n", ":3: 3 columns"),
        ("image,caption\na.jpg\n", ":2: 1 columns"),
        ('image,caption\na.jpg,"x\n', ":2: not CSV"),
        ('image,caption\na.jpg,"x"y\n', ":2: not CSV"),
        ("image,caption\n../a.jpg,x\n", ":2: '../a.jpg' leads out"),
        ("image,caption\nc.jpg,x\n", "no line for 1 ('a.jpg')"),
    ],
)
def test_damaged_flickr8k_captions(tmp_path: Path, captions: str, part: str) -> None:
    source = write_flickr8k(tmp_path, captions, train="a.jpg\n")
    message = error_of(lambda: load_table("flickr8k", tmp_path, "train"))
    assert message.startswith(str(source)) and part in message


def test_flickr8k_lists(tmp_path: Path) -> None:
    write_flickr8k(tmp_path, "image,caption\na.jpg,x\n", train="a.jpg\n../x.jpg\n", test="a.jpg\na.jpg\n")
    message = error_of(lambda: load_table("flickr8k", tmp_path, "val"))
    assert "Flickr_8k.devImages.txt: Kaggle ships no split lists: put " in message
    assert "trainImages.txt:2: '../x.jpg' leads out" in error_of(lambda: load_table("flickr8k", tmp_path, "train"))
    assert "listed more than once: 1 ('a.jpg')" in error_of(lambda: load_table("flickr8k", tmp_path, "test"))


# What is where


def test_folders_that_are_not_data(tmp_path: Path) -> None:
    for name in ("auto", "coco", "flickr8k"):
        message = error_of(functools.partial(load_table, name, tmp_path / "nowhere", "train"))
        assert message.startswith(f"no such folder: {tmp_path / 'nowhere'}: put ") and "--preset demo" in message
    message = error_of(lambda: recognise(tmp_path))
    assert "annotations/captions_{train,val}2017.json" in message and "captions.txt" in message
    assert error_of(lambda: load_table("coco", tmp_path, "val")).startswith("no such file: ")
    assert error_of(lambda: load_table("flickr8k", tmp_path, "val")).startswith("no such file: ")
    (tmp_path / "captions.txt").mkdir()
    assert "cannot be read" in error_of(lambda: load_table("flickr8k", tmp_path, "val"))
    wrong: Any = "dev"
    assert "use train, val or test" in error_of(lambda: load_table("coco", tmp_path, wrong))
    assert "use auto, coco or flickr8k" in error_of(lambda: load_table(wrong, tmp_path, "val"))


def test_coco_comes_first(tmp_path: Path) -> None:
    write_flickr8k(tmp_path, "image,caption\na.jpg,x\n", train="a.jpg")
    assert recognise(tmp_path) == "flickr8k"
    write_coco(tmp_path, "val", [(1, "a.jpg")], [(1, 1, "text")])
    assert recognise(tmp_path) == "coco"


# The download, against a server on this machine


class Server:
    """Serves `files` on loopback. Each GET of a file uses up one of its `cuts`: the fraction at which to hang up."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[float]] = {}
        self.codes: dict[str, list[int]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str]] = []  # (file name, Range) of each GET
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_error(405)

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                wanted = self.headers.get("Range", "")
                server.asked.append((name, wanted))
                if codes := server.codes.get(name):
                    return self.send_error(codes.pop(0))
                content = server.files[name]
                size = len(content)
                start = int(wanted[len("bytes=") : -1]) if wanted and server.ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(size - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.end_headers()
                cuts = server.cuts.get(name)
                self.wfile.write(content[start : int(size * cuts.pop(0)) if cuts else size])
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def archive_of(path: str, content: bytes, folder: str, pattern: str, count: int) -> Archive:
    return Archive(path, len(content), hashlib.sha256(content).hexdigest(), folder, pattern, count, 1000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server with a COCO of four pictures, which sources takes for the real one."""
    annotations = {}
    for part in ("train", "val"):
        source = write_coco(tmp_path / "made", part, [(1, "1.jpg"), (2, "2.jpg")], [(1, 1, part), (2, 2, part)])
        annotations[f"annotations/{source.name}"] = source.read_bytes()
    server = Server()
    server.files["annotations_trainval2017.zip"] = zip_of(annotations)
    for part, size in (("val", 1_000), ("train", 200_000)):
        pictures = {f"{part}2017/{i}.jpg": os.urandom(size) for i in (1, 2)}
        server.files[f"{part}2017.zip"] = zip_of({f"{part}2017/": b"", **pictures})
    archives = [
        archive_of("annotations/annotations_trainval2017.zip", b"", "annotations", "captions_*2017.json", 2),
        archive_of("zips/val2017.zip", b"", "val2017", "*.jpg", 2),
        archive_of("zips/train2017.zip", b"", "train2017", "*.jpg", 2),
    ]
    use(monkeypatch, server, archives)
    monkeypatch.setattr(sources, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(sources, "CHUNK", 10_000)
    monkeypatch.setenv("COCO_MIRROR", f"http://127.0.0.1:{server.http.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.http.shutdown()
    server.http.server_close()


def use(monkeypatch: pytest.MonkeyPatch, server: Server, archives: list[Archive]) -> None:
    """Make sources expect what the server has."""
    real = [
        dataclasses.replace(
            archive,
            size=len(server.files[archive.name]),
            sha256=hashlib.sha256(server.files[archive.name]).hexdigest(),
        )
        for archive in archives
    ]
    monkeypatch.setattr(sources, "ARCHIVES", tuple(real))


def below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


WHOLE = [
    ".download.lock",
    "annotations",
    "annotations_trainval2017.zip",
    "train2017",
    "train2017.zip",
    "val2017",
    "val2017.zip",
]


def test_archives_are_the_published_ones() -> None:
    assert sum(archive.size for archive in sources.ARCHIVES) == 20_405_354_669
    assert all(re.fullmatch("[0-9a-f]{64}", archive.sha256) for archive in sources.ARCHIVES)
    assert all(archive.unpacked_size > archive.size for archive in sources.ARCHIVES)


def test_download_survives_cuts(server: Server, tmp_path: Path) -> None:
    """Cut at 10, 50 and 90 %, each time taken up where it stopped; then nothing is fetched again."""
    size = len(server.files["train2017.zip"])
    server.cuts["train2017.zip"] = [0.1, 0.5, 0.9]
    root = tmp_path / "deep/coco_data"
    assert download_coco_dataset(str(root)) == root
    ranges = [wanted for name, wanted in server.asked if name == "train2017.zip"]
    assert ranges == ["", *(f"bytes={int(size * cut)}-" for cut in (0.1, 0.5, 0.9))]
    assert below(root) == WHOLE
    assert load_table("auto", root, "train").captions == [["train"], ["train"]]
    assert len((root / "train2017/2.jpg").read_bytes()) == 200_000

    server.asked.clear()
    (root / "val2017.zip").unlink()
    assert download_coco_dataset(root) == root
    assert server.asked == []


def test_download_from_a_server_without_ranges(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts["train2017.zip"] = [0.5]
    download_coco_dataset(tmp_path / "coco")
    assert below(tmp_path / "coco") == WHOLE


def test_download_retries_a_busy_server_and_gives_up_on_a_dead_one(server: Server, tmp_path: Path) -> None:
    server.codes["val2017.zip"] = [503, 429]
    server.cuts["train2017.zip"] = [0.5] * 20
    message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert "stopped at 50% (the connection was cut): run the same command again" in message
    assert len([name for name, _ in server.asked if name == "train2017.zip"]) == 1 + sources.ATTEMPTS
    assert (tmp_path / "coco/train2017.zip.part").exists() and (tmp_path / "coco/val2017").is_dir()
    server.codes["train2017.zip"] = [404]
    message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert "answer 404 Not Found" in message and "--preset demo" in message


def test_interrupted_download_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves the .part file, and the next call asks for the rest only."""
    fetch_rest = sources._fetch_rest

    class Interrupting(tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.n > 100_000:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            sources, "_fetch_rest", lambda url, part, size, _: fetch_rest(url, part, size, Interrupting(total=size))
        )
        with pytest.raises(KeyboardInterrupt):
            download_coco_dataset(tmp_path / "coco")
    there = (tmp_path / "coco/train2017.zip.part").stat().st_size
    assert 100_000 < there < 120_000 and not (tmp_path / "coco/train2017").exists()
    server.asked.clear()
    download_coco_dataset(tmp_path / "coco")
    assert server.asked == [("train2017.zip", f"bytes={there}-")]
    assert below(tmp_path / "coco") == WHOLE


def test_wrong_content_never_comes_into_place(server: Server, tmp_path: Path) -> None:
    server.files["train2017.zip"] = bytes(len(server.files["train2017.zip"]))
    message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert "SHA-256 differs" in message
    assert below(tmp_path / "coco") == [name for name in WHOLE if not name.startswith("train2017")]
    server.files["train2017.zip"] = b"<html>Please sign in</html>"
    assert "offers 27 bytes" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    (tmp_path / "coco/train2017.zip").write_bytes(b"mine")
    assert "is not COCO's archive" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert (tmp_path / "coco/train2017.zip").read_bytes() == b"mine"
    assert not (tmp_path / "coco/train2017").exists()


@pytest.mark.parametrize("member", ["../x", "/x", "train2017/../../x", "other/x", "train2017\\..\\..\\x"])
def test_members_that_lead_outside(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    server.files["train2017.zip"] = zip_of({"train2017/1.jpg": b"1", "train2017/2.jpg": b"2", member: b"bad"})
    use(monkeypatch, server, list(sources.ARCHIVES))
    message = error_of(lambda: download_coco_dataset(tmp_path / "outer/coco"))
    assert repr(member) in message and "nothing was unpacked" in message
    assert below(tmp_path / "outer") == ["coco"]
    assert below(tmp_path / "outer/coco") == [name for name in WHOLE if name != "train2017"]


def test_damaged_member(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(server.files["train2017.zip"])
    content[1_000] ^= 1  # inside the first picture: the zip's own checksum notices
    server.files["train2017.zip"] = bytes(content)
    use(monkeypatch, server, list(sources.ARCHIVES))
    assert "cannot be unpacked" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert below(tmp_path / "coco") == [name for name in WHOLE if name != "train2017"]


def test_killed_unpacking_is_not_taken_for_whole(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = zipfile.ZipFile.extract

    def stop_at_second(self: zipfile.ZipFile, member: Any, path: Any) -> str:
        if member.filename == "train2017/2.jpg":
            raise KeyboardInterrupt
        return extract(self, member, path)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            download_coco_dataset(tmp_path / "coco")
    assert below(tmp_path / "coco") == [name for name in WHOLE if name != "train2017"]
    left = tmp_path / "coco/.train2017.unpacking/train2017"  # as a kill without warning leaves it
    left.mkdir(parents=True)
    (left / "3.jpg").touch()
    (tmp_path / "coco/train2017").mkdir()
    server.asked.clear()
    monkeypatch.setenv("COCO_MIRROR", "http://127.0.0.1:1")  # all archives are there: no network is needed
    download_coco_dataset(tmp_path / "coco")
    assert below(tmp_path / "coco") == WHOLE and below(tmp_path / "coco/train2017") == ["1.jpg", "2.jpg"]


def test_part_of_a_folder_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / "coco/train2017/1.jpg").write_bytes(b"mine")
    assert "holds only 1 of COCO 2017's 2 files *.jpg" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert below(tmp_path / "coco") == ["train2017"] and server.asked == []


def test_no_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(archive.size + archive.unpacked_size for archive in sources.ARCHIVES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert "not enough room" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert not (tmp_path / "coco").exists() and server.asked == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    download_coco_dataset(tmp_path / "coco")


def test_two_downloads_at_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    with open(tmp_path / "coco/.download.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another download" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    download_coco_dataset(tmp_path / "coco")


def test_network_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, or a server that never answers: one line within seconds that says what to do, and no empty folder."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(sources, "CONTACT_SECONDS", 0.3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):
            monkeypatch.setenv("COCO_MIRROR", f"http://127.0.0.1:{port}")
            start = time.monotonic()
            message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
            assert time.monotonic() - start < 5
            assert "out of reach" in message and str(tmp_path / "coco") in message and "--preset demo" in message
            assert not (tmp_path / "coco").exists()
    monkeypatch.setenv("COCO_MIRROR", "file:///mnt/coco")
    assert "must start with http" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))


def test_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be put into" in error_of(lambda: download_coco_dataset(tmp_path / "file/coco"))
