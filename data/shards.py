"""Read WebDataset shards: tar files in which a picture and its texts are members with nearly the same name.

Only headers and texts are read; the pictures stay in the tar file and are read later by their offset.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from config import UserError
from data.columns import PICTURE_COLUMN, Columns, caption_columns, columns_like, id_columns
from data.kinds import PICTURE_SUFFIXES
from data.reading import clean_all, file_names, id_or_name, reason, split_of
from data.table import LeftOut, Row

SHARD = re.compile(r"[^.].*\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz)", re.IGNORECASE)
TEXTS = ("txt", "caption", "json")

Span = tuple[int, int]  # offset and size of a member's content


def shards_below(root: Path) -> list[Path]:
    """All tar files, also compressed ones, in folders that are not hidden; follows links to folders in root only."""
    paths = (
        path
        for pattern in ("*/*", "**/*")
        for path in root.glob(pattern)
        if SHARD.fullmatch(path.name) and path.is_file()
    )
    found = {path.resolve(): path for path in paths if "/." not in f"/{path.relative_to(root).as_posix()}"}
    return sorted(found.values(), key=lambda path: (len(path.parts), path))


def find_shards(root: Path, columns: Columns) -> list[Path]:
    """All shards below root, if a plain .tar is in root or in a split's folder; tar files only further down may be
    anything."""
    near = [root, *(path for path in root.iterdir() if split_of(path.name))]
    names = [name for folder in near for name in file_names(folder) if SHARD.fullmatch(name)]
    return shards_below(root) if any(name.lower().endswith(".tar") for name in names) else []


def read_shards(root: Path, files: list[Path], columns: Columns) -> Iterator[Row | LeftOut]:
    """Yield the rows of img2dataset's samples (000.jpg, 000.txt, 000.json) and others: see _samples and _owners."""
    plain = [shard for shard in files if shard.suffix.lower() == ".tar"]
    if not plain:
        raise UserError(
            f"no captions found in {files[0]}: it is compressed, and shards are read in place: unpack it to .tar"
        )
    yield from (LeftOut("packed shards, to be unpacked to .tar", str(shard)) for shard in files if shard not in plain)
    captioned, beside = False, "no text"
    for shard in plain:
        name = shard.relative_to(root).as_posix()
        split = split_of(shard.stem, *reversed(name.split("/")[:-1]))
        for sample in _samples(shard, columns.picture):
            if isinstance(sample, LeftOut):
                yield sample
                continue
            key, picture, fields = sample
            there = [column for column in fields if fields[column] and not isinstance(fields[column], dict)]
            usual = [column for column in ("captions", "txt") if column in there][:1]
            chosen = [columns.caption] if columns.caption else usual or caption_columns(there, None) or [""]
            where = f"{shard}: {key}"
            captions = [text for column in chosen for text in clean_all(fields.get(column, []), where)]
            if any(captions):
                captioned = True
                ids = [fields[column] for column in id_columns(fields)]
                yield Row(split, name, id_or_name(ids[0] if ids else None, key), captions, *picture)
            else:
                beside = ", ".join(filter(None, fields)) or beside
                yield from (LeftOut("pictures without a caption", where), *[LeftOut("empty captions")] * len(captions))
    if not captioned:
        raise UserError(
            f"{files[0]}: no picture has a caption, beside the last one is {beside}: name the captions with "
            "--caption-column, or unpack the shards where their captions are in another file"
        )


def pictures_in(shard: Path) -> dict[str, Span]:
    """{name without its suffix: span} of a tar file's pictures, in order; the name has its suffix where another picture has
    the same one. Raises UserError where the file is damaged."""
    pictures: dict[str, Span] = {}
    for key, suffix, span in _members(shard):
        if f".{suffix}" in PICTURE_SUFFIXES:
            pictures[f"{key}.{suffix}" if key in pictures else key] = span
    return pictures


def _samples(shard: Path, wanted: str | None) -> Iterator[tuple[str, Span, dict[str, Any]] | LeftOut]:
    """Yield (key, the picture's span, the fields of its texts) for each picture, and what is skipped. The key is a name
    without its last suffix; of members with the same name the last one counts, as in unpacking."""
    members: dict[str, dict[str, Span]] = defaultdict(dict)  # key -> "picture" or a text's suffix -> span
    repeated: Counter[tuple[str, str]] = Counter()
    for key, suffix, span in _members(shard):
        kind = "picture" if f".{suffix}" in PICTURE_SUFFIXES else suffix
        if kind in ("picture", *TEXTS):
            if kind in members[key]:
                repeated[key, kind] += 1
            members[key][kind] = span
    owners = _owners(members, wanted)
    belonging: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for key, (picture, part) in owners.items():
        belonging[picture] += [(key, part, kind) for kind in TEXTS if kind in members[key]]
    with open(shard, "rb") as file:
        for key, spans in members.items():
            if "picture" in spans:
                short = min([key, *(text.removesuffix(f".{part}") for text, part, _ in belonging[key])], key=len)
                texts = [(part or kind, kind, members[text][kind]) for text, part, kind in belonging[key]]
                yield short, spans["picture"], _fields(file, texts, f"{shard}: {short}")
            elif key not in owners:
                yield from (LeftOut("texts without a picture", f"{shard}: {key}.{kind}") for kind in spans)
    times = {key: max(repeated[key, kind] for kind in members[key]) for key, _ in repeated}
    yield from (LeftOut("repeated keys", f"{shard}: {key}") for key in Counter(times).elements())


def _fields(file: BinaryIO, texts: list[tuple[str, str, Span]], where: str) -> dict[str, Any]:
    """What would be a table's columns: the fields of a sample's JSON, and the lines of its texts under txt, caption or
    the text's part (outputs for 000.outputs.txt); "" holds the lines of all texts."""
    fields: dict[str, Any] = {}
    lines: dict[str, list[str]] = defaultdict(list)
    for name, suffix, (offset, size) in texts:
        file.seek(offset)
        try:
            text = file.read(size).decode("utf-8-sig")
            content = json.loads(text) if suffix == "json" else None
        except (ValueError, RecursionError) as error:
            kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON"
            raise UserError(f"{where}: its {suffix} is not {kind}: write the shard again") from None
        if suffix != "json":
            for column in (name, ""):
                lines[column] += [line for line in text.split("\n") if line.strip()]
        elif isinstance(content, dict):
            fields = content | fields
    return fields | {name: each for name, each in lines.items() if each}


def _members(shard: Path) -> Iterator[tuple[str, str, Span]]:
    """Yield (name without its last suffix, the suffix, span) for each file that is not hidden."""
    spans: dict[str, Span] = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # unused, and it would grow with the shard
                if member.islnk() and member.linkname in spans:  # tar stores linked files only once
                    spans[member.name] = spans[member.linkname]
                elif member.isfile():
                    spans[member.name] = member.offset_data, member.size
                else:
                    continue
                if sum(spans[member.name]) > size:
                    raise EOFError("it ends in the middle")
                if "/." not in f"/{member.name}".replace("/./", "/"):
                    text = member.name.encode("utf-8", "backslashreplace").decode("utf-8")  # for older encodings
                    name, suffix = os.path.splitext(text.removeprefix("/"))
                    yield name, suffix[1:].lower(), spans[member.name]
        with open(shard, "rb") as end:  # tarfile takes a truncated header for the end
            end.seek(tar.offset)
            if end.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise EOFError("it ends in the middle")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{shard}: cut, compressed or not a tar file ({reason(error)}): get it again, not compressed"
        ) from None


def _owners(members: dict[str, dict[str, Span]], wanted: str | None) -> dict[str, tuple[str, str]]:
    """{key of texts: (key of their picture, their part)}. If no picture has a text's key, the text belongs to the one
    whose key differs only in its last word (part): a.jpg and a.caption.txt, a.input.jpg and a.txt or a.outputs.txt."""
    pictures = {key: os.path.splitext(key) for key, spans in members.items() if "picture" in spans}
    texts = {key: os.path.splitext(key) for key, spans in members.items() if spans.keys() - {"picture"}}
    shared = {word for _, word in pictures.values()} & {word for _, word in texts.values()}
    of_several = {base for key, (base, word) in pictures.items() if word and key in texts}

    def cut(key: str) -> tuple[str, str]:
        """Return the key without its part, and the part. A last word that tells samples apart (22.05) is no part."""
        base, word = os.path.splitext(key)
        return (key, "") if word in shared or word[1:].isdecimal() or base in of_several else (base, word[1:])

    near: dict[str, dict[str, str]] = defaultdict(dict)  # key -> part -> picture's key
    for picture in pictures:
        key, part = cut(picture)
        near[key][part] = near[picture][""] = picture
    owners = {}
    for text in texts:
        for key, part in ((text, ""), cut(text)):
            if key in near:
                words = [""] if "" in near[key] else columns_like(near[key], PICTURE_COLUMN, wanted)
                owners[text] = near[key][[*words, *near[key]][0]], part
                break
    return owners
