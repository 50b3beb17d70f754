"""Download published data sets: COCO 2017 from its server, Flickr30k through Kaggle's library.

Never opens a picture, never unpacks a member of an archive outside its folder, and writes only below the folder given
to download_coco_dataset, or into kagglehub's cache.
"""

from __future__ import annotations

import fnmatch
import hashlib
import http.client
import os
import re
import shutil
import stat
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from config import UserError
from data.reading import file_names, reason, stays_inside
from utils import check_tokens, locked, sync


@dataclass(frozen=True)
class Archive:
    """One zip file of COCO 2017 and the folder it unpacks to, complete when `count` of its files match `pattern`."""

    path: str  # below the server's address
    size: int  # bytes
    sha256: str
    folder: str
    pattern: str
    count: int
    unpacked_size: int  # bytes, rounded up; an archive that declares more is not unpacked

    @property
    def name(self) -> str:
        """The file's name, without the folders of its address."""
        return self.path.rpartition("/")[2]


COCO_SERVER = "http://images.cocodataset.org"  # has no https; the SHA-256 proves that the content is right
ARCHIVES = (
    Archive(
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        # The pattern matches train and val only: a user's captions_test2017.json must not count as one of them.
        *("annotations", "captions_*a*2017.json", 2, 900_000_000),
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
FLICKR30K = "hsankesara/flickr-image-dataset"
CONTACT_SECONDS = 8.0  # until a server that does not answer counts as unreachable
STALL_SECONDS = 30.0  # without data until a download is resumed over a new connection
ATTEMPTS = 5  # in a row without a new byte
PAUSE_SECONDS = 1.0  # before the first retry; doubles with each
CHUNK = 1 << 18
ZIP = b"PK"  # the first bytes of a zip archive
LOOK = "open it in a browser (a sign-in page?), or set COCO_MIRROR to another server"
OTHER_MEMBERS = 100  # members an archive may hold besides the counted ones: folders, the other annotations


def download_coco_dataset(directory: str | Path = "./coco_data") -> Path:
    """Download COCO 2017 (20.4 GB) into directory, unpack it there (another 21 GB), and return the directory.

    An incomplete file is never taken for a complete one: archives grow as *.part and are renamed after size and SHA-256
    agree; they are unpacked into a hidden folder that is renamed when complete. Complete files are not downloaded
    again, and an interrupted download (Ctrl-C included) is resumed. The archives stay; they may be deleted once their
    folders exist. COCO_MIRROR in the environment replaces http://images.cocodataset.org.
    Raises UserError, in one line, for no network, no disk space, wrong content and incomplete folders.
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
        if to_fetch and (why := _out_of_reach(f"{server}/{to_fetch[0].path}")):
            raise UserError(_cannot(f"{server} is out of reach ({why})", root))
        root.mkdir(parents=True, exist_ok=True)
        # Two downloads into one folder would write into each other's .part files.
        with locked(root / ".download.lock", f"another download into {root} is running: wait for it to end"):
            for archive in wanted:
                if not _is_unpacked(archive, root):  # another download may have finished it meanwhile
                    _fetch(archive, f"{server}/{archive.path}", root)
                    _unpack(archive, root)
    except OSError as error:
        raise UserError(f"COCO cannot be put into {root}: {reason(error)}") from None
    return root


def download_flickr30k() -> Path:
    """Return the folder of Kaggle's Flickr30k, downloaded into kagglehub's cache unless it is there.

    KAGGLEHUB_CACHE in the environment sets the cache's folder. Raises UserError, in one line, if kagglehub is not
    installed, Kaggle is unreachable or requires a login, or the download is damaged.
    """
    by_hand = f"download {FLICKR30K} yourself and name its folder with --data-dir"
    try:
        import kagglehub
    except ImportError:
        raise UserError(
            f"Flickr30k comes through kagglehub: pip install -r requirements/data.txt, or {by_hand}"
        ) from None
    try:
        check_tokens("kaggle")
        # With a version, kagglehub contacts the server only for what the cache lacks; without one, every time.
        return Path(kagglehub.dataset_download(f"{FLICKR30K}/versions/1"))
    except Exception as error:  # kagglehub's own errors have no common base class
        hint = "check the network and try again"
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            hint = "log in (python -c 'import kagglehub; kagglehub.login()')"
        why = reason(_root_cause(error))
        raise UserError(f"Flickr30k cannot be fetched from Kaggle ({why}): {hint}, or {by_hand}") from error


def _root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain: "connection refused", not a page about pools and retries."""
    while earlier := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = earlier
    return error


def _count(archive: Archive, root: Path) -> int:
    """Count the archive's files below root."""
    return len(fnmatch.filter(file_names(root / archive.folder), archive.pattern))


def _is_unpacked(archive: Archive, root: Path) -> bool:
    """Whether the folder is there and complete. Raises UserError if it is incomplete: it may be the user's."""
    folder = root / archive.folder
    if not folder.exists() or (folder.is_dir() and not os.listdir(folder)):
        return False
    if (count := _count(archive, root)) >= archive.count:
        return True
    raise UserError(
        f"{folder} holds only {count} of COCO 2017's {archive.count} files {archive.pattern}: move it away, or "
        "download into another folder"
    )


def _check_room(wanted: Iterable[Archive], root: Path) -> None:
    """Raise UserError unless all that is still to be downloaded and unpacked fits on the disk."""
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
    """Why the server does not answer, or None. Runs in a thread: resolving a name and trying all its addresses may take
    longer than the timeout."""
    why: list[str | None] = [f"no answer in {CONTACT_SECONDS:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONTACT_SECONDS).close()
            why[0] = None
        except urllib.error.HTTPError as answer:  # even a refusal is an answer; the download reports it
            answer.close()
            why[0] = None
        except (OSError, http.client.HTTPException, ValueError) as error:
            why[0] = reason(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONTACT_SECONDS)
    return why[0]


def _cannot(what: str, root: Path) -> str:
    return (
        f"{what}: put COCO 2017 from elsewhere at {root} as annotations/, train2017/ and val2017/, set COCO_MIRROR to "
        "a server that has it, or try --preset demo"
    )


def _fetch(archive: Archive, url: str, root: Path) -> None:
    """Download root/archive.name, with the right size and SHA-256, unless it is there."""
    target, part = root / archive.name, root / f"{archive.name}.part"
    if target.exists():
        if _size(target) != archive.size or _sha256(target) != archive.sha256:
            raise UserError(
                f"{target} is not COCO's archive (size or SHA-256 differs): delete it, and run again to download it"
            )
        return
    if _size(part) > archive.size:
        os.truncate(part, archive.size)
    failures, best = 0, (before := _size(part))
    with _bar(archive.size, archive.name) as bar:
        while best < archive.size:
            why = "the connection was cut"
            try:
                _fetch_rest(url, part, archive.size, bar)
            except urllib.error.HTTPError as answer:
                answer.close()
                why = f"answer {answer.code} {answer.reason}"
                if answer.code < 500 and answer.code not in (408, 429):
                    raise UserError(_cannot(f"{url} is not available ({why})", root)) from None
            except (OSError, http.client.HTTPException) as error:
                why = reason(error)
            failures = 0 if _size(part) > best else failures + 1
            best = max(best, _size(part))
            if failures == ATTEMPTS:
                raise UserError(
                    f"the download of {url} stopped at {_size(part) / archive.size:.0%} ({why}): run the same "
                    "command again to resume from there"
                )
            if best < archive.size:
                time.sleep(PAUSE_SECONDS * 2**failures)
    if _sha256(part) != archive.sha256:
        os.truncate(part, before)
        left = f", except the first {before / archive.size:.0%} (delete {part} if this happens again)"
        if before in (0, archive.size):
            part.unlink()
            left = ""
        raise UserError(
            f"{url} sent something else than COCO's archive (SHA-256 differs), now deleted{left}: run it again"
        )
    sync(part)  # a power cut must not leave the new name on a file that never reached the disk
    part.replace(target)


def _fetch_rest(url: str, part: Path, size: int, bar: tqdm) -> None:
    """Append the missing bytes to part, or fewer if the server closes the connection; never more than size in all.

    Bytes already there are never thrown away: if the server sends everything again (it supports no ranges), they are
    compared. Raises UserError for an answer that cannot be from the archive, before a byte of it is written.
    """
    done = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=STALL_SECONDS) as answer:
        start = done if answer.status == 206 else 0
        if why := _not_the_rest(answer, start, size):
            raise UserError(f"{url} {why}: {LOOK}")
        bar.n = bar.initial = done
        bar.refresh()
        with open(part, "ab") as file, open(part, "rb") as there:
            while chunk := answer.read(min(CHUNK, size - start)):
                old = there.read(min(len(chunk), done - start)) if start < done else b""
                if not chunk.startswith(old):
                    raise UserError(
                        f"{url} sends other bytes than those in {part}, which is unchanged: {LOOK}, or delete it"
                    )
                if start == 0 and not chunk.startswith(ZIP[: len(chunk)]):
                    raise UserError(f"{url} sends no zip archive: {LOOK}")
                start += len(chunk)
                file.write(chunk[len(old) :])
                bar.update(len(chunk) - len(old))


def _not_the_rest(answer: http.client.HTTPResponse, start: int, size: int) -> str:
    """Why an answer cannot be the bytes from `start` on of an archive of `size` bytes; "" if it can."""
    headers = answer.headers
    if answer.status not in (200, 206):
        return f"answers {answer.status} {answer.reason}"
    if (packed := headers.get("Content-Encoding", "identity")) != "identity":  # the only one asked for
        return f"offers something compressed as {packed}"
    length = headers.get("Content-Length", "")
    if answer.status == 200:
        return (
            f"offers {length} bytes where COCO's archive has {size}" if length.isdigit() and int(length) != size else ""
        )
    span = headers.get("Content-Range", "")
    of = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", span)
    if not of or int(of[1]) != start or of[3] not in ("*", str(size)):
        return f"offers {span or 'bytes from an unknown position'} where bytes {start}-{size - 1}/{size} were asked for"
    return ""


def _unpack(archive: Archive, root: Path) -> None:
    """Unpack root/archive.name to root/archive.folder, which appears complete or not at all."""
    source, target, staging = root / archive.name, root / archive.folder, root / f".{archive.folder}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)  # from a killed attempt
    staging.mkdir()  # fails if something could not be removed (a link, say), so that no old file slips in
    try:
        with zipfile.ZipFile(source) as zipped:
            if odd := _oddity(archive, zipped.infolist()):
                raise UserError(f"{source}: {odd}: nothing was unpacked")
            for member in tqdm(zipped.infolist(), desc=f"unpack {archive.name}", unit="file", mininterval=1.0):
                zipped.extract(member, staging)
        if (count := _count(archive, staging)) < archive.count:
            raise UserError(
                f"{source} holds only {count} of COCO 2017's {archive.count} files {archive.folder}/{archive.pattern}: "
                "nothing was unpacked"
            )
        # A power cut must not leave the new name on files whose content never reached the disk. One sync writes only
        # what has to be written anyway; an fsync of each of 118,287 files would wait for the disk as many times.
        if hasattr(os, "sync"):  # not on Windows
            os.sync()
        if target.exists():
            target.rmdir()  # an empty one, or _is_unpacked would have raised before
        (staging / archive.folder).rename(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{source} cannot be unpacked ({reason(error)}): delete it, and run again to download it"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _oddity(archive: Archive, members: Sequence[zipfile.ZipInfo]) -> str | None:
    """Why these members cannot be COCO's, or None. Declared sizes are enough: zipfile writes no more than those."""
    if len(members) > (most := archive.count + OTHER_MEMBERS):
        return f"{len(members)} members where {most} are expected at most"
    if (size := sum(member.file_size for member in members)) > archive.unpacked_size:
        return f"it unpacks to {size} bytes where {archive.unpacked_size} are expected at most"
    for member in members:
        if not stays_inside(member.filename) or member.filename.split("/")[0] != archive.folder:
            return f"member {member.filename!r} lies outside {archive.folder}/"
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: made on Windows
            return f"member {member.filename!r} is a link or a device"
        # zipfile limits the memory of one read for these two only.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return f"member {member.filename!r} is compressed by method {member.compress_type} (not stored or deflated)"
    return None


def _size(path: Path) -> int:
    """Size in bytes; 0 if there is no such file."""
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
