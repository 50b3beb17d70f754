"""Readers: one for each way people keep pictures with captions. What each finds and reads is listed in LAYOUTS.

A reader is a function that finds the files of captions in a folder, and one that yields rows from them. None opens a
picture or follows a name out of the folder; each says, in one line with the file and the line or id, what is damaged.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import math
import os
import re
import tarfile
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from config import UserError
from data.table import Row

SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pcx .pgm .png .ppm .qoi .tga .tif .tiff .webp"
PICTURE_SUFFIXES = tuple(SUFFIXES.split())
WORDS = {"train": "train training restval", "val": "val valid validation dev", "test": "test testing"}
SPLIT_WORDS = {word: split for split, words in WORDS.items() for word in words.split()}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
PICTURE_COLUMN = re.compile(r"(image|img|picture|photo|file)([ _-]?(name|file|path))?|path|filepath", re.IGNORECASE)
CAPTION_WORDS = ("caption", "text", "sentence", "comment", "description", "title")  # the first that is there counts
CAPTION_COLUMN = re.compile(rf"(image[ _-])?({'|'.join(CAPTION_WORDS)})s?[ _-]?\d*", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # what is not white space
ID_COLUMN = re.compile(r"(image|img|coco)?[ _-]?id", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """Names of columns, where a person says them; None: recognised by their usual names."""

    picture: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Layout:
    """One way to keep pictures with captions."""

    shape: str  # what lies in the folder, in words
    find: Callable[[Path, Columns], list[Path]]  # the files that hold the captions; none where it is another layout
    read: Callable[[Path, list[Path], Columns], Iterable[Row]]  # their rows, with pictures' paths below the folder


# What readers share


def clean(caption: Any, where: str) -> str:
    """A caption as text in one line: white space collapsed, control characters and lone surrogates out, numbers as
    digits, "" for null. Raises UserError, which begins with `where`, for anything else."""
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        return ""
    if not isinstance(caption, str | int | float) or isinstance(caption, bool):
        raise UserError(f"{where}: the caption is {str(caption)[:40]!r} and not text: mend it or leave it out")
    text = str(caption).encode("utf-8", "replace").decode("utf-8")
    return " ".join(CONTROL.sub("", text).split())


def clean_all(value: Any, where: str) -> list[str]:
    """A caption, or a list of them, cleaned."""
    return [clean(caption, where) for caption in (value if isinstance(value, list) else [value])]


def stays_inside(name: str) -> bool:
    """Whether a relative name, read as POSIX's or as Windows', stays below the folder it is joined to."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] != "" and ":" not in parts[0] and ".." not in parts


def _checked(name: Any, where: str) -> str:
    """A picture's name from a file of captions. Raises UserError unless it is a path that stays in the folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: no picture is named: mend it or leave it out")
    if not is_text(name):
        raise UserError(f"{where}: {name!r} is no name in UTF-8: rename the picture")
    if not stays_inside(name):
        raise UserError(f"{where}: {name!r} leads out of the data folder: use a relative name without ..")
    return name


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8, as one from an old archive in another encoding cannot."""
    return name.encode("utf-8", "replace").decode("utf-8") == name


def id_or_name(value: Any, name: str) -> int | str:
    """A picture's id from a column or field: a number where it is one, the picture's name where there is none."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, str | int) and value != "" else name


def split_word(value: Any, where: str) -> str:
    """The part that a column names, "" for none. Raises UserError for a word that means none of the three."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    if split := SPLIT_WORDS.get(str(value).strip().lower()):
        return split
    raise UserError(f"{where}: split {value!r} is none of {', '.join(SPLIT_WORDS)}: mend it or leave it empty")


def file_names(folder: Path) -> set[str]:
    """The names of the files in folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file system can have
        return set()


def reason(error: BaseException) -> str:
    """An exception's text in one line."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__


def _some(names: Iterable[Any]) -> str:
    """How many, and the first three."""
    listed = list(names)
    return f"{len(listed):,} ({', '.join(map(repr, listed[:3]))}{', ...' if len(listed) > 3 else ''})"


def split_of(*names: str) -> str:
    """train, val or test where one of the names holds such a word, else ""."""
    words = (word for name in names for word in re.split(r"[^a-z]+", name.lower()))
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _places(root: Path) -> list[Path]:
    """The folder, and those in it that are called after a part."""
    return [root, *sorted(path for path in root.iterdir() if path.is_dir() and split_of(path.name))]


def _files(root: Path, *names: str) -> list[Path]:
    """Those of the names that are files in the folder."""
    return [path for name in names if (path := root / name).is_file()]


def _read_text(path: Path) -> str:
    """A whole text file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}: put it there, or name another folder") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: save the file as UTF-8, or get it anew") from None


def _json(text: str, source: Path, line: int | None = None) -> Any:
    """JSON's content; `line` is where in the source the text stands, when it is one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source}:{line or error.lineno}"
        raise UserError(f"{where}: not JSON ({error.msg}): cut or damaged, mend it or get it anew") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{source}: not readable as JSON ({reason(error)}): get it anew") from None


def _field(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {key!r} is missing or of the wrong type: mend the file or get it anew")
    return value


def _lists(content: Any, source: Path, *keys: str) -> list[Any]:
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        names = " and ".join(map(repr, keys))
        raise UserError(f"{source}: no list {names} in it: this is another kind of file")
    return [content[key] for key in keys]


def _first_folder(root: Path, folders: Iterable[str], names: Iterable[str]) -> str:
    """The first of the folders below root that has one of the first hundred names, as a prefix; "" where none has."""
    some = [name for name in itertools.islice(names, 100) if stays_inside(name)]
    found = (folder for folder in folders if any((root / folder / name).is_file() for name in some))
    return next((f"{folder}/" for folder in found), "")


# COCO


def _coco_parts(root: Path) -> dict[str, Path]:
    """{split: annotations}, the newest year's where there are several. COCO's own test captions are not public: a test
    part counts where somebody made one with its pictures, as the demo does."""
    parts = {}
    for path in sorted(root.glob("annotations/captions_*.json")):
        match = re.fullmatch(r"(train|val|test)\d*", part := path.stem.removeprefix("captions_"))
        if match and (match[1] != "test" or (root / part).is_dir()):
            parts[match[1]] = path
    return parts


def _read_coco(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Pictures in the order of the file's "images", each one's captions in the order of their ids."""
    for split, source in _coco_parts(root).items():
        part = source.stem.removeprefix("captions_")
        folder = part if (root / part).is_dir() else f"images/{part}" if (root / "images" / part).is_dir() else part
        images, annotations = _lists(_json(_read_text(source), source), source, "images", "annotations")
        names: dict[int | str, str] = {}
        for i, image in enumerate(images):
            image_id = _field(image, "id", (int, str), f"{source}: images[{i}]")
            if image_id in names:
                raise UserError(f"{source}: image {image_id!r} is there twice: leave one of them out")
            names[image_id] = _checked(image.get("file_name"), f"{source}: image {image_id!r}")
        captions: dict[int | str, list[tuple[int, str]]] = {image_id: [] for image_id in names}
        for i, annotation in enumerate(annotations):
            number = _field(annotation, "id", int, f"{source}: annotations[{i}]")
            where = f"{source}: annotation {number}"
            image_id = _field(annotation, "image_id", (int, str), where)
            if image_id not in captions:
                raise UserError(
                    f"{where}: its image {image_id!r} is not among the {len(names):,} 'images': the file is cut, get it "
                    "anew or leave the annotation out"
                )
            captions[image_id].append((number, clean(annotation.get("caption"), where)))
        del images, annotations
        for image_id, own in captions.items():
            yield Row(split, f"{folder}/{names[image_id]}", image_id, [caption for _, caption in sorted(own)])


# Karpathy's splits

FLICKR_FOLDERS = "Images images flickr30k_images/flickr30k_images flickr30k_images flickr30k-images Flicker8k_Dataset"


def _read_karpathy(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Karpathy & Fei-Fei (2015, arXiv:1412.2306). COCO's pictures are looked for in the 2014 folders and, by their
    number, in the 2017 folders; their id is that number, the others' is the file name."""
    if len(files) > 1:
        raise UserError(f"{root} holds {_some(path.name for path in files)}: name one of the files with --data-dir")
    source = files[0]
    (images,) = _lists(_json(_read_text(source), source), source, "images")
    listed = functools.cache(lambda folder: file_names(root / folder))
    named = (image.get("filename") for image in images if isinstance(image, dict))
    flickr = _first_folder(root, FLICKR_FOLDERS.split(), (name for name in named if isinstance(name, str)))
    for i, image in enumerate(images):
        where = f"{source}: images[{i}]"
        name = _checked(_field(image, "filename", str, where), where)
        split = split_word(_field(image, "split", str, where), where)
        captions = [clean(s.get("raw"), where) for s in _field(image, "sentences", list, where) if isinstance(s, dict)]
        if "cocoid" in image:
            number = _field(image, "cocoid", int, where)
            old, new = _checked(image.get("filepath", "val2014"), where), f"{number:012d}.jpg"
            places = [(base + old, name) for base in ("", "images/")]
            places += [(base + year, new) for base in ("", "images/") for year in ("val2017", "train2017")]
            folder, file = next((place for place in places if place[1] in listed(place[0])), ("train2017", new))
            yield Row(split, f"{folder}/{file}", number, captions)
        else:
            yield Row(split, flickr + name, name, captions)


# Flickr30k and Flickr8k


FLICKR30K_PLACES = [f"{place}/results.csv" for place in (".", "flickr30k_images", "flickr30k_images/flickr30k_images")]


def _read_flickr30k(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Kaggle's results.csv: image_name| comment_number| comment, with a row in it whose second bar is missing."""
    source = files[0]
    lines = _read_text(source).split("\n")  # and not at U+2028 or another break inside a caption
    if [word.strip() for word in lines[0].split("|")] != ["image_name", "comment_number", "comment"]:
        raise UserError(
            f"{source}:1: the header is not 'image_name| comment_number| comment': get Kaggle's Flickr30k anew, or "
            "read another table with --dataset csv"
        )
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        name, _, rest = line.partition("|")
        match = re.fullmatch(r"\s*\d+\s*(?:\||\s)(.*)", rest)
        if not match and line.strip():
            raise UserError(f"{source}:{number}: not 'name| number| caption': mend the line or get the file anew")
        if match:
            own = captions.setdefault(_checked(name.strip(), f"{source}:{number}"), [])
            own.append(clean(match[1], f"{source}:{number}"))
    base = source.parent.relative_to(root)
    folder = _first_folder(root, (f"{base}/flickr30k_images", f"{base}", f"{base}/images"), captions)
    for name, own in captions.items():
        yield Row("", (folder or "flickr30k_images/").removeprefix("./") + name, name, own)


FLICKR8K_LISTS = {split: f"Flickr_8k.{split.replace('val', 'dev')}Images.txt" for split in ("train", "val", "test")}


def _find_flickr8k(root: Path, columns: Columns) -> list[Path]:
    captions = _files(root, "captions.txt", "flickr8k/captions.txt")[:1]
    return captions and [*captions, *_files(captions[0].parent, *FLICKR8K_LISTS.values())]


def _read_flickr8k(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Kaggle's captions.txt. With the authors' split lists, pictures in the order of the lists and none besides."""
    source = files[0]
    captions: dict[str, list[str]] = {}
    for where, record in _csv_records(source, ","):
        if list(record) != ["image", "caption"]:
            raise UserError(
                f"{source}:1: the header is {','.join(record)!r} where 'image,caption' is expected: mend it or get the "
                "file anew"
            )
        captions.setdefault(_checked(record["image"], where), []).append(clean(record["caption"], where))
    folder = f"{source.parent.relative_to(root)}/Images/".removeprefix("./")
    if len(files) == 1:
        yield from (Row("", folder + name, name, own) for name, own in captions.items())
    for split, list_name in FLICKR8K_LISTS.items():
        listed = source.with_name(list_name)
        if listed not in files:
            continue
        lines = _read_text(listed).splitlines()
        names = [_checked(line.strip(), f"{listed}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
        if repeated := [name for name, times in Counter(names).items() if times > 1]:
            raise UserError(f"{listed}: listed more than once: {_some(repeated)}: list each picture once")
        # The end of a cut CSV file looks like any other, so a picture that captions.txt does not know is an error.
        if unknown := [name for name in names if name not in captions]:
            raise UserError(
                f"{source}: no line for {_some(unknown)} of the {len(names):,} pictures in {list_name}: the file is cut "
                "or another data set's, get it anew"
            )
        yield from (Row(split, folder + name, name, captions[name]) for name in names)


# Tables of named columns: CSV, TSV, JSON lines, a JSON list, Parquet; also as Hugging Face's imagefolder


def _csv_records(source: Path, delimiter: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, {column: text}) for each line; the delimiter is the header's most frequent where it is not given."""
    text = _read_text(source)
    header_line = text.partition("\n")[0]
    delimiter = delimiter or max("\t,;|" if source.suffix == ".tsv" else ",\t;|", key=header_line.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1  # where a record begins; an unbalanced quote is noticed at the end of the file
    try:
        header = [column.strip() for column in next(rows, [])]
        if repeated := [column for column, times in Counter(header).items() if times > 1]:
            raise UserError(f"{source}:1: the column {repeated[0]!r} is there twice: rename one")
        line = rows.line_num + 1
        for row in rows:
            where, line = f"{source}:{line}", rows.line_num + 1
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} columns where {len(header)} are expected ({delimiter.join(header)!r}): put a "
                    f"caption with {delimiter!r} in it in double quotes"
                )
            yield where, {column: value.strip() for column, value in zip(header, row, strict=True)}
    except csv.Error as error:
        raise UserError(f"{source}:{line}: not CSV ({error}): mend the line or get the file anew") from None


def _records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) for each record of a file of named columns, by its suffix."""
    if source.suffix in (".csv", ".tsv"):
        yield from _csv_records(source)
    elif source.suffix == ".parquet":
        import pyarrow.parquet as pq  # late: it is large, and few need it

        number = 0
        try:
            for batch in pq.ParquetFile(source).iter_batches():
                rows = enumerate(batch.to_pylist(), start=number)
                yield from ((f"{source}: row {i}", record) for i, record in rows)
                number += batch.num_rows
        except pa.ArrowException as error:
            raise UserError(f"{source}: not readable as Parquet ({reason(error)}): get it anew") from None
    elif source.suffix == ".jsonl":
        for number, line in enumerate(_read_text(source).split("\n"), start=1):
            if line.strip():
                record = _json(line, source, number)
                if not isinstance(record, dict):
                    raise UserError(f"{source}:{number}: not an object with named fields: write {{...}} on every line")
                yield f"{source}:{number}", record
    else:
        content = _json(_read_text(source), source)
        if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
            raise UserError(f"{source}: not a list of objects: write [{{...}}, ...]")
        yield from ((f"{source}: [{i}]", record) for i, record in enumerate(content))


def columns_like(names: Iterable[str], pattern: re.Pattern[str], wanted: str | None) -> list[str]:
    """The column that was asked for, or those with a usual name."""
    return [name for name in names if (name == wanted if wanted else pattern.fullmatch(name))]


def id_columns(names: Iterable[str]) -> list[str]:
    """Columns of a picture's number, the best first: beside an image_id, a plain id is the caption's."""
    return sorted(columns_like(names, ID_COLUMN, None), key=lambda name: name.lower() == "id")


def caption_columns(names: Iterable[str], wanted: str | None) -> list[str]:
    """The captions' column, or several, as in caption_1 ... caption_5; a title beside captions is none of them."""
    usual = columns_like(names, CAPTION_COLUMN, wanted)
    words = [CAPTION_COLUMN.fullmatch(name) for name in usual]
    ranks = [CAPTION_WORDS.index(word[2].lower()) if word else 0 for word in words]
    return [name for name, rank in zip(usual, ranks, strict=True) if rank == min(ranks)]


def _has_columns(source: Path, columns: Columns) -> bool:
    """Whether a file's first record has a picture's and a caption's column; of a long JSON list only that is read."""
    try:  # a byte that is not UTF-8 does not matter here: the reader will say which line it is on
        if source.suffix == ".json":
            with open(source, encoding="utf-8-sig", errors="replace") as file:
                start = file.read(1 << 16).lstrip()
            first = json.JSONDecoder().raw_decode(start[1:].lstrip())[0] if start.startswith("[") else None
        elif source.suffix == ".parquet":
            import pyarrow.parquet as pq

            schema = pq.read_schema(source)  # where pictures are inside, Hugging Face's datasets reads it
            first = [column.name for column in schema if not pa.types.is_struct(column.type)]
        else:
            with open(source, encoding="utf-8-sig", errors="replace") as file:
                start = file.readline(1 << 16)
            first = json.loads(start) if source.suffix == ".jsonl" else re.split(r"[,\t;|]", start.replace('"', ""))
    except (ValueError, RecursionError, pa.ArrowException):
        return False
    if not isinstance(first, dict | list):
        return False
    names = [str(name).strip() for name in first]
    return bool(columns_like(names, PICTURE_COLUMN, columns.picture) and caption_columns(names, columns.caption))


def _find_columns(root: Path, columns: Columns) -> list[Path]:
    names = sorted(name for name in file_names(root) if Path(name).suffix in TABLE_SUFFIXES)
    return [root / name for name in names if _has_columns(root / name, columns)]


IMAGEFOLDER_FILES = [f"metadata.{suffix}" for suffix in ("jsonl", "csv", "parquet")]


def _read_columns(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Lines of one picture (several captions on lines of their own) are joined, in the order of its first one."""
    if len({split_of(path.stem, path.parent.name) for path in files}) < len(files):
        raise UserError(f"{root} holds {_some(path.name for path in files)}: name one of the files with --data-dir")
    for source in files:
        base = source.parent.relative_to(root)
        found: dict[str, tuple[str, int | str, list[str]]] = {}
        pictures: list[str] = []
        for where, record in _records(source):
            if not found:
                pictures = columns_like(record, PICTURE_COLUMN, columns.picture)
                captions = caption_columns(record, columns.caption)
                if not pictures or not captions:
                    raise UserError(
                        f"{source}: no column for the {'captions' if pictures else 'pictures'} among "
                        f"{', '.join(map(repr, record))}: name it with --{'caption' if pictures else 'image'}-column"
                    )
                ids = id_columns(record)
            name = _checked(record.get(pictures[0]), where)
            texts = [text for column in captions for text in clean_all(record.get(column), where)]
            split = split_word(record.get("split"), where)
            known = found.setdefault(name, (split, id_or_name(record.get(ids[0]) if ids else None, name), []))
            if split != known[0]:
                raise UserError(f"{where}: {name!r} is in {known[0] or 'no part'!r} above: one picture, one part")
            known[2].extend(texts)
        folders = [(near / inside).as_posix() for near in (base, Path()) for inside in (".", "images", "Images")]
        folder = _first_folder(root, folders, found) or f"{base.as_posix()}/"
        of_file = split_of(source.stem if len(files) > 1 else "", source.parent.name if base != Path() else "")
        for name, (split, number, texts) in found.items():
            split = split or of_file or SPLIT_WORDS.get(name.split("/")[0].lower(), "")
            yield Row(split, (folder + name).removeprefix("./"), number, texts)


# A person's own folder: name.jpg with name.txt beside it


def pictures_below(root: Path) -> Iterator[tuple[Path, Path | None]]:
    """Every picture below root, hidden ones left out, with its text or None."""
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        texts = {file.stem: file for file in files if file.name.lower().endswith((".txt", ".caption"))}
        for file in files:
            if file.suffix.lower() in PICTURE_SUFFIXES:
                yield file, texts.get(file.stem) or texts.get(file.name)


def _read_sidecars(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Every line of the text that is not empty is a caption. A folder train/, val/ or test/ says the part."""
    for picture, text in pictures_below(root):
        name = picture.relative_to(root).as_posix()
        if not is_text(name):
            raise UserError(f"{root}: {name!r} is no name in UTF-8: rename the picture")
        lines = [] if text is None else _read_text(text).split("\n")
        captions = [clean(line, str(text)) for line in lines if line.strip()]
        yield Row(SPLIT_WORDS.get(name.split("/")[0].lower(), ""), name, name, captions)


# WebDataset shards


def _read_shards(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """img2dataset's layout: members 000.jpg, 000.txt, 000.json one after the other make a sample. Only headers and
    captions are read; the pictures stay where they are and are found again by their offset."""
    for shard in files:
        name = shard.relative_to(root).as_posix()
        split = split_of(shard.stem, shard.parent.name if shard.parent != root else "")
        try:
            with tarfile.open(shard, "r:") as tar:
                for key, members in itertools.groupby(filter(tarfile.TarInfo.isfile, tar), lambda m: _key(m)[0]):
                    sample: dict[str, Any] = {"key": key}
                    for member in members:
                        suffix = _key(member)[1]
                        if f".{suffix}" in PICTURE_SUFFIXES:
                            sample["picture"] = member.offset_data, member.size
                        elif suffix in ("txt", "caption", "json"):
                            content = tar.extractfile(member)
                            assert content is not None
                            sample[suffix] = content.read()
                        tar.members = []  # type: ignore[attr-defined]  # or a long shard's list grows for nothing
                    yield _shard_row(sample, split, name, shard)
                with open(shard, "rb") as end:  # tarfile takes a cut header for the end
                    end.seek(tar.offset)
                    if end.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                        raise EOFError("it ends in the middle")
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{shard}: cut, packed or no tar file ({reason(error)}): get it anew, unpacked") from None


def _key(member: tarfile.TarInfo) -> tuple[str, str]:
    """What a sample's members share, and the ending by which they differ."""
    folder, _, file = member.name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}".removeprefix("/"), suffix.lower()


def _shard_row(sample: dict[str, Any], split: str, name: str, shard: Path) -> Row:
    where = f"{shard}: {sample['key']}"
    try:
        texts = {kind: sample[kind].decode("utf-8-sig") for kind in ("txt", "caption", "json") if kind in sample}
    except UnicodeDecodeError:
        raise UserError(f"{where}: its text is not UTF-8: write the shard anew") from None
    about = _json(texts["json"], Path(where), 1) if "json" in texts else {}
    about = about if isinstance(about, dict) else {}
    lines = texts.get("txt", texts.get("caption", "")).split("\n")
    captions = about.get("captions") or [line for line in lines if line.strip()] or about.get("caption")
    number = id_or_name(next((about[key] for key in id_columns(about)), None), sample["key"])
    captions = captions if "picture" in sample else None
    if "picture" in sample and sample["picture"][0] + sample["picture"][1] > shard.stat().st_size:
        raise UserError(f"{where}: the shard ends before its picture does: it is cut, get it anew")
    return Row(split, name, number, clean_all(captions or [], where), *sample.get("picture", (-1, -1)))


LAYOUTS = {
    "coco": Layout(
        "COCO: annotations/captions_{train,val}2017.json, train2017/, val2017/",
        lambda root, _: list(_coco_parts(root).values()),
        _read_coco,
    ),
    "karpathy": Layout(
        "Karpathy's split: dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json",
        lambda root, _: _files(root, *(f"dataset_{name}.json" for name in ("coco", "flickr30k", "flickr8k"))),
        _read_karpathy,
    ),
    "flickr30k": Layout(
        "Flickr30k: flickr30k_images/results.csv", lambda root, _: _files(root, *FLICKR30K_PLACES)[:1], _read_flickr30k
    ),
    "flickr8k": Layout("Flickr8k: captions.txt, Images/", _find_flickr8k, _read_flickr8k),
    "imagefolder": Layout(
        "imagefolder: metadata.jsonl, .csv or .parquet",
        lambda root, _: [file for place in _places(root) for file in _files(place, *IMAGEFOLDER_FILES)],
        _read_columns,
    ),
    "webdataset": Layout(
        "WebDataset: *.tar", lambda root, _: [s for p in _places(root) for s in sorted(p.glob("*.tar"))], _read_shards
    ),
    "csv": Layout("a CSV, TSV or JSON file with a picture's and a caption's column", _find_columns, _read_columns),
    "sidecar": Layout(
        "name.txt beside each name.jpg",
        lambda root, _: [text for _, text in pictures_below(root) if text],
        _read_sidecars,
    ),
}
