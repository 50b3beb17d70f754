"""Every way people keep pictures with captions, read into one table; and the download of COCO 2017.

May import config only (besides the standard library and tqdm). It never opens a picture, never follows a name in
an annotation file or an archive out of its folder, and writes only below the folder given to download_coco_dataset.

Layouts, below the data folder (Flickr8k also one level down, in flickr8k/):
    coco       annotations/captions_{train,val}2017.json, train2017/, val2017/       as cocodataset.org ships them
    flickr8k   captions.txt, Images/                                                 as Kaggle ships them, beside
               Flickr_8k.{train,dev,test}Images.txt                                  the authors' split lists
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fnmatch
import hashlib
import http.client
import io
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm  # type: ignore[import-untyped]

from config import UserError


@dataclass(frozen=True)
class CaptionTable:
    """Pictures and their captions: row i is paths[i], ids[i], captions[i] (at least one, white space collapsed)."""

    paths: list[Path]
    ids: list[int | str]
    captions: list[list[str]]
    name: str
    split: str

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.paths)

    @property
    def num_captions(self) -> int:
        """The captions of all pictures together."""
        return sum(map(len, self.captions))

    def head(self, n: int) -> CaptionTable:
        """The first n pictures (all of them where there are fewer). Raises UserError for n < 1."""
        if n < 1:
            raise UserError(f"the first {n} pictures were asked for: ask for at least 1")
        return dataclasses.replace(self, paths=self.paths[:n], ids=self.ids[:n], captions=self.captions[:n])


def load_table(
    dataset: Literal["auto", "coco", "flickr8k"], data_dir: Path, split: Literal["train", "val", "test"]
) -> CaptionTable:
    """Read one split of the data set below data_dir; "auto" recognises which it is.

    COCO's test captions are not public. Its "test" is therefore annotations/captions_test2017.json with test2017/
    where somebody made both (the demo does), and val2017 otherwise; the table's split then says "val".
    Pictures without a caption are left out. Raises UserError, in one line, for anything missing or damaged.
    """
    if dataset not in ("auto", "coco", "flickr8k"):
        raise UserError(f"dataset {dataset!r} is unknown: use auto, coco or flickr8k")
    if split not in ("train", "val", "test"):
        raise UserError(f"split {split!r} is unknown: use train, val or test")
    try:
        root = _existing_folder(data_dir)
        found = recognise(root) if dataset == "auto" else dataset
        return _load_coco(root, split) if found == "coco" else _load_flickr8k(_flickr8k_root(root), split)
    except OSError as error:
        raise UserError(f"{data_dir} cannot be read: {_reason(error)}") from None


def recognise(data_dir: Path) -> str:
    """The data set in data_dir: "coco" (also where both are) or "flickr8k". Raises UserError where neither is."""
    root = _existing_folder(data_dir)
    if any((root / f"annotations/captions_{part}2017.json").is_file() for part in ("train", "val")):
        return "coco"
    if (_flickr8k_root(root) / "captions.txt").is_file():
        return "flickr8k"
    raise UserError(
        f"no known data set in {root}: looked for annotations/captions_{{train,val}}2017.json (COCO 2017) and "
        "captions.txt or flickr8k/captions.txt (Flickr8k): name the folder that holds one, or try --preset demo"
    )


def _load_coco(root: Path, split: str) -> CaptionTable:
    """Pictures in the order of the file's "images", each one's captions in the order of their ids."""
    if split == "test" and not all(
        (root / part).exists() for part in ("annotations/captions_test2017.json", "test2017")
    ):
        split = "val"
    source, folder = root / f"annotations/captions_{split}2017.json", root / f"{split}2017"
    text = _read_text(source, f"put COCO 2017 into {root} as annotations/, train2017/ and val2017/")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{error.lineno}: not JSON ({error.msg}): cut or damaged, get it anew") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{source}: not readable as JSON ({_reason(error)}): get it anew") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise UserError(f"{source}: no lists 'images' and 'annotations': this is not a COCO captions file")

    paths: dict[int | str, Path] = {}
    for i, image in enumerate(content["images"]):
        image_id = _field(image, "id", (int, str), f"{source}: images[{i}]")
        name = _checked_name(_field(image, "file_name", str, f"{source}: image {image_id!r}"), source, image_id)
        if image_id in paths:
            raise UserError(f"{source}: image {image_id!r} is there twice: leave one of them out")
        paths[image_id] = folder / name

    captions: dict[int | str, list[tuple[int, str]]] = {image_id: [] for image_id in paths}
    for i, annotation in enumerate(content["annotations"]):
        annotation_id = _field(annotation, "id", int, f"{source}: annotations[{i}]")
        image_id = _field(annotation, "image_id", (int, str), f"{source}: annotation {annotation_id}")
        caption = _clean(_field(annotation, "caption", str, f"{source}: annotation {annotation_id}"))
        # A cut-down file often keeps captions of pictures that it no longer lists.
        if caption and image_id in captions:
            captions[image_id].append((annotation_id, caption))

    rows = [(paths[i], i, [caption for _, caption in sorted(found)]) for i, found in captions.items() if found]
    return _table(rows, "coco", split, source)


def _load_flickr8k(root: Path, split: str) -> CaptionTable:
    """Pictures in the order of the official list, captions in the order of captions.txt; ids are the file names."""
    source = root / "captions.txt"
    captions = _read_flickr8k_captions(source)
    part = {"train": "trainImages", "val": "devImages", "test": "testImages"}[split]
    split_list = root / f"Flickr_8k.{part}.txt"
    hint = f"Kaggle ships no split lists: put the authors' Flickr_8k.{{train,dev,test}}Images.txt into {root}"
    names: list[str] = []
    for number, line in enumerate(_read_text(split_list, hint).split("\n"), start=1):
        if name := line.strip():
            names.append(_checked_name(name, split_list, number))
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{split_list}: listed more than once: {_some(repeated)}: list each picture once")
    # The end of a cut CSV file looks like any other, so a picture that captions.txt does not know is an error.
    if unknown := [name for name in names if name not in captions]:
        raise UserError(
            f"{source}: no line for {_some(unknown)} of the {len(names)} pictures in {split_list.name}: "
            "the file is cut or another data set's, get it anew"
        )
    rows = [(root / "Images" / name, name, captions[name]) for name in names if captions[name]]
    return _table(rows, "flickr8k", split, source)


def _read_flickr8k_captions(source: Path) -> dict[str, list[str]]:
    """captions.txt as {file name: captions}."""
    rows = csv.reader(io.StringIO(_read_text(source, "put Flickr8k there as captions.txt and Images/")), strict=True)
    captions: dict[str, list[str]] = {}
    try:
        header = [column.strip() for column in next(rows, [])]
        if header != ["image", "caption"]:
            raise UserError(f"{source}:1: the header is {','.join(header)!r} where 'image,caption' is expected")
        for row in filter(None, rows):
            if len(row) != 2:
                raise UserError(
                    f"{source}:{rows.line_num}: {len(row)} columns where 2 are expected (image,caption): put a caption "
                    "with a comma in double quotes"
                )
            of_picture = captions.setdefault(_checked_name(row[0].strip(), source, rows.line_num), [])
            if caption := _clean(row[1]):
                of_picture.append(caption)
    except csv.Error as error:
        raise UserError(f"{source}:{rows.line_num}: not CSV ({error}): mend the line or get the file anew") from None
    return captions


def _table(rows: Sequence[tuple[Path, int | str, list[str]]], name: str, split: str, source: Path) -> CaptionTable:
    """The table, once every picture is known to exist: one listing of each folder, for a stat per file is slow."""
    if not rows:
        raise UserError(f"{source}: no picture has a caption: get the file anew")
    paths, ids, captions = (list(column) for column in zip(*rows, strict=True))
    listings = {folder: _files(folder) for folder in {path.parent for path in paths}}
    if missing := [str(path) for path in paths if path.name not in listings[path.parent]]:
        raise UserError(
            f"{source}: {_some(missing)} of the {len(paths)} pictures that it names are missing: put them there, "
            "or leave them out of the file"
        )
    return CaptionTable(paths, ids, captions, name, split)


def _files(folder: Path) -> set[str]:
    """The names of the files in folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file system can have
        return set()


def _flickr8k_root(root: Path) -> Path:
    nested = root / "flickr8k"
    return nested if nested.is_dir() and not (root / "captions.txt").exists() else root


def _existing_folder(data_dir: Path) -> Path:
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"no such folder: {folder}: put COCO 2017 there (annotations/, train2017/, val2017/) or Flickr8k "
            "(captions.txt, Images/), name another folder with --data-dir, or try --preset demo"
        )
    return folder


def _read_text(path: Path, hint: str) -> str:
    """A whole text file, with or without a byte order mark; the hint says what to do where there is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}: {hint}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: save the file as UTF-8, or get it anew") from None


def _field(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {key!r} is missing or of the wrong type: this is not a COCO captions file")
    return value


def _clean(caption: str) -> str:
    """White space collapsed; JSON's lone surrogates replaced, since no tokenizer can encode them."""
    return " ".join(caption.encode("utf-8", "replace").decode("utf-8").split())


def _stays_inside(name: str) -> bool:
    """Whether a relative name, read as POSIX's or as Windows', stays below the folder it is joined to."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] != "" and ":" not in parts[0] and ".." not in parts


def _checked_name(name: str, source: Path, place: int | str) -> str:
    if not _stays_inside(name):
        raise UserError(f"{source}:{place}: {name!r} leads out of the data folder: use a relative name without ..")
    return name


def _some(names: list[str]) -> str:
    """How many, and the first three."""
    return f"{len(names)} ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''})"


def _reason(error: BaseException) -> str:
    """An exception's text in one line."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__


@dataclass(frozen=True)
class Archive:
    """One zip file of COCO 2017 and the folder it unpacks to, whole when `count` of its files match `pattern`."""

    path: str  # below the server's address
    size: int  # bytes
    sha256: str
    folder: str
    pattern: str
    count: int
    unpacked_size: int  # bytes, rounded up

    @property
    def name(self) -> str:
        """The file's name, without the folders of its address."""
        return self.path.rpartition("/")[2]


COCO_SERVER = "http://images.cocodataset.org"  # has no https; the SHA-256 vouches for what arrives
ARCHIVES = (
    Archive(
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        *("annotations", "captions_*2017.json", 2, 900_000_000),
    ),
    Archive(
        "zips/val2017.zip",
        815_585_330,
        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        *("val2017", "*.jpg", 5_000, 850_000_000),
    ),
    Archive(
        "zips/train2017.zip",
        19_336_861_798,
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        *("train2017", "*.jpg", 118_287, 20_000_000_000),
    ),
)
CONTACT_SECONDS = 8.0  # until a server that says nothing counts as out of reach
STALL_SECONDS = 30.0  # until a download that has gone quiet is taken up anew
ATTEMPTS = 5  # in a row without a new byte
PAUSE_SECONDS = 1.0  # before the first repetition; doubles with each
CHUNK = 1 << 18


def download_coco_dataset(directory: str | Path = "./coco_data") -> Path:
    """Fetch COCO 2017 (20.4 GB) into directory, unpack it there (another 21 GB), and return the directory.

    Nothing half-finished is ever taken for whole: archives grow as *.part and get their name after size and SHA-256
    agree; they are unpacked into a hidden folder that is renamed when complete. What is already whole is not
    fetched again, and what was cut (Ctrl-C included) goes on where it stopped. The archives stay; once their folders
    stand beside them they may be deleted. COCO_MIRROR in the environment replaces http://images.cocodataset.org.
    Raises UserError, in one line, for no network, no room, wrong content and folders that are only partly there.
    """
    root = Path(directory).expanduser()
    server = (os.environ.get("COCO_MIRROR") or COCO_SERVER).rstrip("/")
    if not server.startswith(("http://", "https://")):
        raise UserError(f"COCO_MIRROR is {server!r}: it must start with http:// or https://")
    try:
        wanted = [archive for archive in ARCHIVES if not _is_unpacked(archive, root)]
        if not wanted:
            return root
        _check_room(wanted, root)
        to_fetch = [archive for archive in wanted if not (root / archive.name).exists()]
        if to_fetch and (reason := _out_of_reach(f"{server}/{to_fetch[0].path}")):
            raise UserError(_cannot(f"{server} is out of reach ({reason})", root))
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root):
            for archive in wanted:
                _fetch(archive, f"{server}/{archive.path}", root)
                _unpack(archive, root)
    except OSError as error:
        raise UserError(f"COCO cannot be put into {root}: {_reason(error)}") from None
    return root


def _is_unpacked(archive: Archive, root: Path) -> bool:
    """Whether the folder is there and whole. Raises UserError where it holds only part: it is not ours to touch."""
    folder = root / archive.folder
    if not folder.exists() or (folder.is_dir() and not os.listdir(folder)):
        return False
    if (count := len(fnmatch.filter(_files(folder), archive.pattern))) >= archive.count:
        return True
    raise UserError(
        f"{folder} holds only {count} of COCO 2017's {archive.count} files {archive.pattern}: move it away, or "
        "download into another folder"
    )


def _check_room(wanted: Iterable[Archive], root: Path) -> None:
    """Raises UserError unless what is still to fetch and all that is still to unpack will fit on the disk."""
    needed = 0
    for archive in wanted:
        there = max(_size(root / archive.name), _size(root / f"{archive.name}.part"))
        needed += archive.unpacked_size + max(0, archive.size - there)
    free = shutil.disk_usage(next(folder for folder in (root, *root.absolute().parents) if folder.exists())).free
    if needed > free:
        raise UserError(
            f"not enough room for COCO in {root}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: "
            "make room, or name another folder"
        )


def _out_of_reach(url: str) -> str | None:
    """Why the server does not answer, or None. In a thread, as a name's look-up and its list of addresses heed no
    timeout as a whole."""
    reason: list[str | None] = [f"no answer in {CONTACT_SECONDS:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONTACT_SECONDS).close()
            reason[0] = None
        except urllib.error.HTTPError as answer:  # even a refusal is an answer; the download will name it
            answer.close()
            reason[0] = None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason[0] = _reason(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONTACT_SECONDS)
    return reason[0]


def _cannot(what: str, root: Path) -> str:
    return (
        f"{what}: put COCO 2017 from elsewhere at {root} as annotations/, train2017/ and val2017/, set COCO_MIRROR to "
        "a server that has it, or try --preset demo"
    )


@contextlib.contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Two downloads into one folder would write into each other's .part files. (Windows has no such guard.)"""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(root / ".download.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another download into {root} is running: wait for it to end") from None
        yield


def _fetch(archive: Archive, url: str, root: Path) -> None:
    """Make root/archive.name exist with the right size and SHA-256."""
    target, part = root / archive.name, root / f"{archive.name}.part"
    if target.exists():
        if _size(target) != archive.size or _sha256(target) != archive.sha256:
            raise UserError(f"{target} is not COCO's archive (size or SHA-256 differs): move it away and run again")
        return
    if _size(part) > archive.size:
        part.unlink()
    failures, best = 0, _size(part)
    with _bar(archive.size, archive.name) as bar:
        while best < archive.size:
            reason = "the connection was cut"
            try:
                _fetch_rest(url, part, archive.size, bar)
            except urllib.error.HTTPError as answer:
                answer.close()
                reason = f"answer {answer.code} {answer.reason}"
                if answer.code < 500 and answer.code not in (408, 429):
                    raise UserError(_cannot(f"{url} cannot be had ({reason})", root)) from None
            except (OSError, http.client.HTTPException) as error:
                reason = _reason(error)
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
            if failures == ATTEMPTS:
                raise UserError(
                    f"the download of {url} stopped at {_size(part) / archive.size:.0%} ({reason}): run the same "
                    "command again to go on from there"
                )
            if best < archive.size:
                time.sleep(PAUSE_SECONDS * 2**failures)
    if _sha256(part) != archive.sha256:
        part.unlink()
        raise UserError(f"{url} sent something else than COCO's archive (SHA-256 differs), now deleted: run it again")
    part.replace(target)


def _fetch_rest(url: str, part: Path, size: int, bar: tqdm) -> None:
    """Append to part what it lacks, or less where the server hangs up early; never more than size bytes in all."""
    done = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=STALL_SECONDS) as answer:
        if answer.status != 206:
            done = 0  # the server knows no ranges and sends everything
        length = answer.headers.get("Content-Length", "")
        if length.isdigit() and done + int(length) != size:
            raise UserError(
                f"{url} offers {done + int(length)} bytes where COCO's archive has {size}: look at it in a browser (a "
                "sign-in page?), or set COCO_MIRROR to another server"
            )
        bar.n = bar.initial = done
        bar.refresh()
        with open(part, "ab" if done else "wb") as file:
            while chunk := answer.read(min(CHUNK, size - done)):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))


def _unpack(archive: Archive, root: Path) -> None:
    """Unpack root/archive.name to root/archive.folder, which appears in one piece or not at all."""
    source, target, staging = root / archive.name, root / archive.folder, root / f".{archive.folder}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)  # of an attempt that was killed
    try:
        with zipfile.ZipFile(source) as zipped:
            for name in zipped.namelist():
                if not _stays_inside(name) or name.split("/")[0] != archive.folder:
                    raise UserError(f"{source}: member {name!r} lies outside {archive.folder}/: nothing was unpacked")
            for member in tqdm(zipped.infolist(), desc=f"unpack {archive.name}", unit="file", mininterval=1.0):
                zipped.extract(member, staging)
        if not _is_unpacked(archive, staging):
            raise UserError(f"{source} holds no {archive.folder}/: nothing was unpacked")
        if target.exists():
            target.rmdir()  # an empty one, or _is_unpacked would have raised before
        (staging / archive.folder).rename(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{source} cannot be unpacked ({_reason(error)}): move it away and run again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _size(path: Path) -> int:
    """In bytes; 0 where there is no such file."""
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, _bar(_size(path), f"check {path.name}") as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _bar(total: int, text: str) -> tqdm:
    return tqdm(total=total, desc=text, unit="B", unit_scale=True, mininterval=1.0)
