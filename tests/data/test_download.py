"""download.py: COCO's download against a bad network, bad archives and power cuts; Flickr30k's through kagglehub."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import socket
import stat
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm  # type: ignore[import-untyped]

from config import UserError
from data import download
from data.download import Archive, download_coco_dataset, download_flickr30k
from data.sources import load_table


def error_of(call: Callable[[], Any]) -> str:
    """The message of the UserError that call raises, which is one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message and "\r" not in message
    return message


class Server:
    """Serves `files` on loopback. Each GET of a file uses up one of its `cuts`: the fraction at which to hang up."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[float]] = {}
        self.codes: dict[str, list[int]] = {}
        self.ranges = True
        self.asked: list[tuple[str, str]] = []  # (file name, Range) of each GET
        self.sent = 0  # bytes of files
        self.answer: Callable[[], tuple[int, dict[str, str], bytes]] | None = None  # to every GET
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
                if server.answer:
                    code, headers, body = server.answer()
                    self.send_response(code)
                    for header, value in headers.items():
                        self.send_header(header, value)
                    self.end_headers()
                    self.wfile.write(body)
                    self.close_connection = True
                    return None
                content = server.files[name]
                size = len(content)
                start = int(wanted[len("bytes=") : -1]) if wanted and server.ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(size - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.end_headers()
                cuts = server.cuts.get(name)
                piece = content[start : int(size * cuts.pop(0)) if cuts else size]
                server.sent += len(piece)
                self.wfile.write(piece)
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def captions(part: str) -> bytes:
    """A COCO captions file with pictures 1.jpg and 2.jpg, whose captions are the part's name."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)],
        "annotations": [{"id": i, "image_id": i, "caption": part} for i in (1, 2)],
    }
    return json.dumps(content).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with a COCO of four pictures, which download takes for the real one."""
    server = Server()
    server.files["annotations_trainval2017.zip"] = zip_of(
        {f"annotations/captions_{part}2017.json": captions(part) for part in ("train", "val")}
    )
    for part, size in (("val", 1_000), ("train", 200_000)):
        pictures = {f"{part}2017/{i}.jpg": random.Random(i).randbytes(size) for i in (1, 2)}
        server.files[f"{part}2017.zip"] = zip_of({f"{part}2017/": b"", **pictures})
    use(monkeypatch, server, [dataclasses.replace(archive, count=2) for archive in download.ARCHIVES])
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(download, "CHUNK", 10_000)
    monkeypatch.setattr(os, "sync", lambda: None)  # the real one would wait for every program on this machine
    monkeypatch.setenv("COCO_MIRROR", f"http://127.0.0.1:{server.http.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.http.shutdown()
    server.http.server_close()


def use(monkeypatch: pytest.MonkeyPatch, server: Server, archives: list[Archive]) -> None:
    """Make download expect what the server has."""
    real = []
    for archive in archives:
        content = server.files[archive.name]
        with zipfile.ZipFile(io.BytesIO(content)) as zipped:
            unpacked_size = sum(member.file_size for member in zipped.infolist())
        sha256 = hashlib.sha256(content).hexdigest()
        real.append(dataclasses.replace(archive, size=len(content), sha256=sha256, unpacked_size=unpacked_size))
    monkeypatch.setattr(download, "ARCHIVES", tuple(real))


def offer(monkeypatch: pytest.MonkeyPatch, server: Server, content: bytes) -> None:
    """Make content the train2017.zip that the server has and download expects."""
    server.files["train2017.zip"] = content
    use(monkeypatch, server, list(download.ARCHIVES))


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
    assert sum(archive.size for archive in download.ARCHIVES) == 20_405_354_669
    assert all(re.fullmatch("[0-9a-f]{64}", archive.sha256) for archive in download.ARCHIVES)
    assert all(archive.unpacked_size > archive.size for archive in download.ARCHIVES)


def test_download_survives_cuts(server: Server, tmp_path: Path) -> None:
    """Cut at 10, 50 and 90 %, each time taken up where it stopped; then nothing is fetched again."""
    size = len(server.files["train2017.zip"])
    server.cuts["train2017.zip"] = [0.1, 0.5, 0.9]
    root = tmp_path / "deep/coco_data"
    assert download_coco_dataset(str(root)) == root
    ranges = [wanted for name, wanted in server.asked if name == "train2017.zip"]
    assert ranges == ["", *(f"bytes={int(size * cut)}-" for cut in (0.1, 0.5, 0.9))]
    assert below(root) == WHOLE
    table = load_table("auto", root, "train")
    assert [table.captions_of(row) for row in range(len(table))] == [["train"], ["train"]]
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


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_download_goes_on_where_it_was_cut(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, seed: int
) -> None:
    """30 of 30: around each share, with archives of any size and sometimes cut twice. Bytes fetched once stay: a
    download that starts anew, or that loses the chunk in hand, serves more than 105 % or asks for another range."""
    dice = random.Random(f"{share} {seed}")
    content = zip_of({f"train2017/{i}.jpg": dice.randbytes(dice.randrange(100_000, 300_000)) for i in (1, 2)})
    offer(monkeypatch, server, content)
    monkeypatch.setattr(download, "ARCHIVES", download.ARCHIVES[-1:])
    cuts = [share * dice.uniform(0.9, 1.1)]
    if seed % 3 == 0:
        cuts.append(dice.uniform(cuts[0], 1))
    server.cuts["train2017.zip"] = list(cuts)
    download_coco_dataset(tmp_path)
    assert [wanted for _, wanted in server.asked] == ["", *(f"bytes={int(len(content) * cut)}-" for cut in cuts)]
    assert server.sent < 1.05 * len(content)
    assert hashlib.sha256((tmp_path / "train2017.zip").read_bytes()).hexdigest() == download.ARCHIVES[0].sha256
    assert below(tmp_path) == [".download.lock", "train2017", "train2017.zip"]


def test_download_retries_a_busy_server_and_gives_up_on_a_dead_one(server: Server, tmp_path: Path) -> None:
    server.codes["val2017.zip"] = [503, 429]
    server.cuts["train2017.zip"] = [0.5] * 20
    message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert "stopped at 50% (the connection was cut): run the same command again" in message
    assert len([name for name, _ in server.asked if name == "train2017.zip"]) == 1 + download.ATTEMPTS
    assert (tmp_path / "coco/train2017.zip.part").exists() and (tmp_path / "coco/val2017").is_dir()
    server.codes["train2017.zip"] = [404]
    message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert "answer 404 Not Found" in message and "--preset demo" in message


PAGE = b"<html>Please sign in</html>"

# What a server may answer that is asked for the rest of an archive: status, headers and body, of the archive and where
# the rest begins; and what is said of it.
ODD_ANSWERS: dict[str, tuple[Callable[[bytes, int], tuple[int, dict[str, str], bytes]], str]] = {
    "page": (lambda all_, at: (200, {"Content-Type": "text/html"}, PAGE), "sends other bytes than those in"),
    "page with its length": (lambda all_, at: (200, {"Content-Length": "27"}, PAGE), "offers 27 bytes where"),
    "page as long": (lambda all_, at: (200, {}, PAGE.ljust(len(all_))), "sends other bytes than those in"),
    "empty": (lambda all_, at: (200, {}, b""), "stopped at 90% (the connection was cut)"),
    "empty with its length": (lambda all_, at: (200, {"Content-Length": "0"}, b""), "offers 0 bytes where"),
    "no content": (lambda all_, at: (204, {}, b""), "answers 204 No Content"),
    "reset": (lambda all_, at: (205, {}, b""), "answers 205 Reset Content"),
    "multiple": (lambda all_, at: (207, {}, PAGE), "answers 207 Multi-Status"),
    "packed": (lambda all_, at: (200, {"Content-Encoding": "gzip"}, gzip.compress(all_)), "compressed as gzip"),
    "packed rest": (
        lambda all_, at: (206, span(all_, at) | {"Content-Encoding": "gzip"}, gzip.compress(all_[at:])),
        "compressed as gzip",
    ),
    "packed unsaid": (lambda all_, at: (200, {}, gzip.compress(all_)), "sends other bytes than those in"),
    "other archive": (lambda all_, at: (200, {}, zip_of({"x": bytes(len(all_))})), "sends other bytes than those in"),
    "from the start": (lambda all_, at: (206, span(all_, 0), all_), "offers bytes 0-"),
    "from elsewhere": (lambda all_, at: (206, span(all_, at + 1), all_[at + 1 :]), "were asked for"),
    "other size": (lambda all_, at: (206, span(all_ + b"x", at), all_[at:]), "were asked for"),
    "no place": (lambda all_, at: (206, {}, all_[at:]), "bytes from an unknown position"),
    "many places": (
        lambda all_, at: (206, {"Content-Type": "multipart/byteranges; boundary=x"}, b"--x\r\n" + all_[at:]),
        "bytes from an unknown position",
    ),
    "not to be had": (lambda all_, at: (416, {}, b""), "answer 416"),
    "sign in": (lambda all_, at: (401, {}, PAGE), "answer 401"),
    "wrong rest": (
        lambda all_, at: (206, span(all_, at), bytes(len(all_) - at)),
        "now deleted, except the first 90%",
    ),
}


def span(content: bytes, start: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_what_is_there_outlives_any_answer(server: Server, tmp_path: Path, odd: str) -> None:
    """A sign-in page, an empty answer or one from another place once replaced the 90 % of an archive that were there:
    17 GB of COCO. They stay to the byte, and the next honest answer is asked for the rest alone."""
    content = server.files["train2017.zip"]
    there = content[: len(content) * 9 // 10]
    server.cuts["train2017.zip"] = [0.9, *[0.9] * download.ATTEMPTS]
    assert "stopped at 90%" in error_of(lambda: download_coco_dataset(tmp_path))
    part = tmp_path / "train2017.zip.part"
    assert part.read_bytes() == there
    answer, said = ODD_ANSWERS[odd]
    server.answer = lambda: answer(content, len(there))
    assert said in error_of(lambda: download_coco_dataset(tmp_path))
    assert part.read_bytes() == there
    server.answer, server.sent = None, 0
    download_coco_dataset(tmp_path)
    assert server.asked[-1] == ("train2017.zip", f"bytes={len(there)}-") and server.sent == len(content) - len(there)
    assert below(tmp_path) == WHOLE


@pytest.mark.parametrize(
    "odd", ["page", "page with its length", "packed", "packed unsaid", "no content", "from elsewhere"]
)
def test_a_first_answer_that_is_no_archive(server: Server, tmp_path: Path, odd: str) -> None:
    """It stayed as the archive's first bytes, for every later attempt to go on from."""
    server.cuts.clear()
    content = server.files["annotations_trainval2017.zip"]
    server.answer = lambda: ODD_ANSWERS[odd][0](content, 0)
    error_of(lambda: download_coco_dataset(tmp_path))
    server.answer = None
    download_coco_dataset(tmp_path)
    assert below(tmp_path) == WHOLE


def test_a_rest_in_pieces(server: Server, tmp_path: Path) -> None:
    """A server may send less than was asked for, and not know how much there is in all."""
    content = server.files["train2017.zip"]

    def piece() -> tuple[int, dict[str, str], bytes]:
        start = int(server.asked[-1][1][len("bytes=") : -1] or 0)
        body = content[start : start + len(content) // 3]
        return 206 if start else 200, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/*"}, body

    server.cuts["train2017.zip"] = [0.1] * (1 + download.ATTEMPTS)
    error_of(lambda: download_coco_dataset(tmp_path))
    server.answer = piece
    download_coco_dataset(tmp_path)
    assert (tmp_path / "train2017.zip").read_bytes() == content


def test_interrupted_download_goes_on(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C leaves the .part file, and the next call asks for the rest only."""
    fetch_rest = download._fetch_rest

    class Interrupting(tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.n > 100_000:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            download, "_fetch_rest", lambda url, part, size, _: fetch_rest(url, part, size, Interrupting(total=size))
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
    server.files["train2017.zip"] = b"PK" + bytes(len(server.files["train2017.zip"]) - 2)
    message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert "SHA-256 differs" in message
    assert below(tmp_path / "coco") == [name for name in WHOLE if not name.startswith("train2017")]
    server.files["train2017.zip"] = b"<html>Please sign in</html>"
    assert "offers 27 bytes" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    (tmp_path / "coco/train2017.zip").write_bytes(b"mine")
    assert "is not COCO's archive" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert (tmp_path / "coco/train2017.zip").read_bytes() == b"mine"
    assert not (tmp_path / "coco/train2017").exists()


@pytest.mark.parametrize(
    "member",
    [
        "../x",
        "/x",
        "//host/x",
        "train2017/../../x",
        "train2017/..",
        "other/x",
        "x",
        "C:/x",
        "C:\\x",
        "\\x",
        "..\\x",
        "train2017\\..\\..\\x",
        "train2017/..\\..\\x",
    ],
)
def test_members_that_lead_outside(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    offer(monkeypatch, server, zip_of({"train2017/1.jpg": b"1", "train2017/2.jpg": b"2", member: b"bad"}))
    assert f"member {member!r} lies outside train2017/" in refused(tmp_path, monkeypatch)


def test_damaged_member(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(server.files["train2017.zip"])
    content[1_000] ^= 1  # inside the first picture: the zip's own checksum notices
    offer(monkeypatch, server, bytes(content))
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
    needed = sum(archive.size + archive.unpacked_size for archive in download.ARCHIVES)
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
    monkeypatch.setattr(download, "CONTACT_SECONDS", 0.3)
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


# Nothing half-finished is taken for whole


def test_names_come_after_the_disk_has_the_content(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut just after a rename used to leave the final name on an empty archive or on empty pictures."""
    events: list[Any] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def spy_fsync(fd: int) -> None:
        events.append(("fsync", os.fstat(fd).st_ino))
        fsync(fd)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append(("replace", self.stat().st_ino))
        return replace(self, target)

    def spy_rename(self: Path, target: Path) -> Path:
        events.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "sync", lambda: events.append(("sync", len(list(tmp_path.glob("coco/.*.unpacking/*/*"))))))
    monkeypatch.setattr(Path, "replace", spy_replace)
    monkeypatch.setattr(Path, "rename", spy_rename)
    download_coco_dataset(tmp_path / "coco")
    assert [kind for kind, _ in events] == ["fsync", "replace", "sync", "rename"] * 3
    assert all(events[i][1] == events[i + 1][1] for i in (0, 4, 8))  # of the very file that is renamed
    assert all(events[i][1] == 2 for i in (2, 6, 10))  # when all its files were written


def test_annotations_of_one_part_are_not_whole(server: Server, tmp_path: Path) -> None:
    """captions_val2017.json and a captions_test2017.json that somebody drew were counted as train and val."""
    folder = tmp_path / "coco/annotations"
    folder.mkdir(parents=True)
    for part in ("val", "test"):
        (folder / f"captions_{part}2017.json").write_bytes(captions(part))
    assert "holds only 1 of COCO 2017's 2 files" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    (folder / "captions_train2017.json").write_bytes(captions("train"))
    download_coco_dataset(tmp_path / "coco")


@pytest.mark.parametrize("members", [{"train2017/1.jpg": b"1"}, {"train2017": b"a file"}, {}])
def test_archive_that_lacks_pictures(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]
) -> None:
    """The message used to name the hidden folder, which was gone by then."""
    offer(monkeypatch, server, zip_of(members))
    message = error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert message.startswith(f"{tmp_path / 'coco/train2017.zip'} holds only ") and ".unpacking" not in message
    assert below(tmp_path / "coco") == [name for name in WHOLE if name != "train2017"]


def test_leftovers_that_cannot_be_removed(server: Server, tmp_path: Path) -> None:
    """A link in the hidden folder's place would be unpacked through, and what lay behind it taken for COCO's."""
    (tmp_path / "elsewhere/train2017").mkdir(parents=True)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/.train2017.unpacking").symlink_to(tmp_path / "elsewhere")
    assert "cannot be put into" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
    assert below(tmp_path / "elsewhere/train2017") == [] and not (tmp_path / "coco/train2017").exists()


def test_download_that_another_one_finished(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the lock another download may end; its folders are not to be fetched again."""

    @contextlib.contextmanager
    def late(lock: Path, busy: str) -> Iterator[None]:
        for archive in download.ARCHIVES:
            with zipfile.ZipFile(io.BytesIO(server.files[archive.name])) as zipped:
                zipped.extractall(lock.parent)
        yield

    monkeypatch.setattr(download, "locked", late)
    download_coco_dataset(tmp_path / "coco")
    assert server.asked == []


# Archives that COCO would not ship


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message about the offered train2017.zip, which is refused before a single member is written."""

    def write(*_: Any) -> None:
        raise AssertionError("a member was unpacked")

    monkeypatch.setattr(download, "ARCHIVES", download.ARCHIVES[-1:])
    monkeypatch.setattr(zipfile.ZipFile, "extract", write)
    message = error_of(lambda: download_coco_dataset(tmp_path / "outer/coco"))
    assert message.startswith(str(tmp_path / "outer/coco/train2017.zip")) and message.endswith(": nothing was unpacked")
    assert below(tmp_path / "outer") == ["coco"]
    assert below(tmp_path / "outer/coco") == [".download.lock", "train2017.zip"]
    return message


def declaring(size: int, crc: int | None = None) -> bytes:
    """A zip whose first picture holds a million bytes and declares size of them (and that checksum)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("train2017/1.jpg", bytes(1_000_000))
        zipped.writestr("train2017/2.jpg", b"2")
        member = zipped.getinfo("train2017/1.jpg")
        member.file_size = size  # goes into the directory, which is written at the end
        member.CRC = member.CRC if crc is None else crc
    return buffer.getvalue()


def test_zip_bomb(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte more than the archive may unpack to fills no disk, and that many bytes are still taken."""
    offer(monkeypatch, server, declaring(1_000_000))
    download_coco_dataset(tmp_path / "whole")
    train = download.ARCHIVES[-1]
    assert train.unpacked_size == 1_000_001
    monkeypatch.setattr(download, "ARCHIVES", (dataclasses.replace(train, unpacked_size=1_000_000),))
    assert "it unpacks to 1000001 bytes where 1000000 are expected at most" in refused(tmp_path, monkeypatch)


def test_too_many_members(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty members fill a disk's directory without declaring a byte."""
    monkeypatch.setattr(download, "OTHER_MEMBERS", 1)
    names = [f"train2017/{i}.jpg" for i in range(4)]
    offer(monkeypatch, server, zip_of(dict.fromkeys(names, b"")))
    assert "4 members where 3 are expected at most" in refused(tmp_path, monkeypatch)


@pytest.mark.parametrize("crc", [None, zlib.crc32(bytes(100))])
def test_members_never_yield_more_than_they_declare(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crc: int | None
) -> None:
    """The sum of the declared sizes guards the disk only as long as Python's zipfile keeps to them."""
    liar = declaring(100, crc)
    written = []
    with zipfile.ZipFile(io.BytesIO(liar)) as zipped, contextlib.suppress(zipfile.BadZipFile):
        zipped.extract("train2017/1.jpg", tmp_path)
    assert (tmp_path / "train2017/1.jpg").stat().st_size <= 100

    rmtree = shutil.rmtree

    def measured(folder: Path, **options: Any) -> None:
        written.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        rmtree(folder, **options)

    offer(monkeypatch, server, liar)
    monkeypatch.setattr(download, "ARCHIVES", download.ARCHIVES[-1:])
    monkeypatch.setattr(shutil, "rmtree", measured)
    if crc is None:
        assert "cannot be unpacked (Bad CRC-32" in error_of(lambda: download_coco_dataset(tmp_path / "coco"))
        assert not (tmp_path / "coco/train2017").exists()
        assert max(written) <= 100
    else:
        download_coco_dataset(tmp_path / "coco")
        assert (tmp_path / "coco/train2017/1.jpg").read_bytes() == bytes(100)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    buffer = io.BytesIO(zip_of({"train2017/1.jpg": b"1", "train2017/2.jpg": b"2"}))
    with zipfile.ZipFile(buffer, "a") as zipped:
        member = zipfile.ZipInfo("train2017/3.jpg")
        member.external_attr = (kind | 0o777) << 16
        zipped.writestr(member, "/etc/passwd")
    offer(monkeypatch, server, buffer.getvalue())
    assert "member 'train2017/3.jpg' is a link or a device" in refused(tmp_path, monkeypatch)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_zipfile_unpacks_without_bound(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int
) -> None:
    """For bzip2 and LZMA zipfile holds all that one read expands to: a gigabyte from a few kilobytes."""
    buffer = io.BytesIO(zip_of({"train2017/1.jpg": b"1"}))
    with zipfile.ZipFile(buffer, "a") as zipped:
        zipped.writestr("train2017/2.jpg", b"2", method)
    offer(monkeypatch, server, buffer.getvalue())
    assert f"compressed by method {method} " in refused(tmp_path, monkeypatch)


# Flickr30k, with the real kagglehub


class Kaggle(http.server.BaseHTTPRequestHandler):
    """Answers every question with `code` and `content`, of which `lost` bytes at the end never arrive."""

    code, content, lost = 200, b"", 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.code)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) - self.lost])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def kaggle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """kagglehub's folder for Flickr30k's versions, in an empty cache, with a Kaggle on this machine and no login."""
    pytest.importorskip("kagglehub")
    kaggle_env = pytest.importorskip("kagglesdk.kaggle_env")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kaggle) as answering:
        threading.Thread(target=answering.serve_forever, args=(0.02,), daemon=True).start()
        for name in [name for name in os.environ if name.startswith(("KAGGLE", "TBE_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
        monkeypatch.setenv("no_proxy", "*")
        here = f"http://127.0.0.1:{answering.server_port}"
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, here)
        yield tmp_path / "cache/datasets/hsankesara/flickr-image-dataset"
        answering.shutdown()


@pytest.fixture
def kaggle_away(kaggle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same without a network."""
    kaggle_env = pytest.importorskip("kagglesdk.kaggle_env")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, nowhere)
    return kaggle


def test_flickr30k_without_kagglehub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert error_of(download_flickr30k) == (
        "Flickr30k comes through kagglehub: pip install -r requirements/data.txt, or download "
        "hsankesara/flickr-image-dataset yourself and name its folder with --data-dir"
    )


def test_flickr30k_from_the_cache(kaggle_away: Path) -> None:
    """A handle without a version would ask the server even for what is there."""
    (kaggle_away / "versions/1").mkdir(parents=True)
    (kaggle_away / "1.complete").touch()
    assert download_flickr30k() == kaggle_away / "versions/1"


def test_flickr30k_half_unpacked(kaggle_away: Path) -> None:
    """A cache folder without kagglehub's mark is one that was cut; nor may no network take long or print a page."""
    (kaggle_away / "versions/1").mkdir(parents=True)
    start = time.monotonic()
    message = error_of(download_flickr30k)
    assert time.monotonic() - start < 5
    assert "Connection refused): check the network and try again, or download " in message and len(message) < 300
    assert message.endswith("name its folder with --data-dir")


def test_flickr30k_is_fetched_once(kaggle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kaggle, "content", zip_of({"Images/1.jpg": b"1"}))
    folder = download_flickr30k()
    assert (folder / "Images/1.jpg").read_bytes() == b"1"
    monkeypatch.setattr(Kaggle, "code", 500)
    assert download_flickr30k() == folder


@pytest.mark.parametrize(
    ("code", "content", "lost", "part"),
    [
        (401, b"", 0, "log in (python -c 'import kagglehub; kagglehub.login()'), or download"),
        (403, b"", 0, "log in (python -c 'import kagglehub; kagglehub.login()'), or download"),
        (404, b"", 0, "404 Client Error"),
        (503, b"", 0, "503 Server Error"),
        (200, b"<html>Please sign in</html>", 0, "Unsupported archive type"),
        (200, zip_of({"Images/1.jpg": bytes(1000)}), 500, "IncompleteRead"),
    ],
)
def test_flickr30k_cannot_be_had(
    kaggle: Path, monkeypatch: pytest.MonkeyPatch, code: int, content: bytes, lost: int, part: str
) -> None:
    """One line with what to do, and nothing in the cache that a later run would take for whole."""
    for name, value in (("code", code), ("content", content), ("lost", lost)):
        monkeypatch.setattr(Kaggle, name, value)
    for _ in range(2):
        message = error_of(download_flickr30k)
        assert part in message and message.endswith("name its folder with --data-dir") and len(message) < 500
