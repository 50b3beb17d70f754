"""Read tables with named columns: CSV, TSV, JSON lines, JSON, Parquet; also as Hugging Face's imagefolder.

Where the suffix leaves a file's format open, its content decides. Column names decide which columns hold the pictures
and the captions.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from config import UserError
from data import reading
from data.budget import open_file
from data.kinds import is_picture
from data.reading import MADE_BY, SPLIT_WORDS, Names, clean_all, parse_json, read_text, split_of
from data.table import LeftOut, Row

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
LINES = (".jsonl", ".ndjson", ".jsonlines")
PICTURE_COLUMN = re.compile(r"(image|img|picture|photo|file)([ _-]?(name|file|path))?|path|filepath", re.IGNORECASE)
# In order of preference.
CAPTION_WORDS = [
    "caption",
    "text",
    "sentence",
    "comment",
    "description",
    "title",
    "raw",
    "prompt",
    "conversation",
    "message",
]
CAPTION_COLUMN = re.compile(rf"(image[ _-])?({'|'.join(CAPTION_WORDS)})s?[ _-]?(str|\d*)", re.IGNORECASE)
ID_COLUMN = re.compile(r"(image|img|coco)?[ _-]?id", re.IGNORECASE)
START = 1 << 16  # bytes read to recognise a table


@dataclass(frozen=True)
class Columns:
    """Names of columns that the user gave; None: recognised by their usual names."""

    picture: str | None = None
    caption: str | None = None


# Records


def _csv_shape(source: Path, text: str) -> tuple[str, str]:
    """The text from its header on, and its delimiter: from Excel's line `sep=;`, or the header's most frequent one."""
    if given := re.match(r'"?sep=(.)"?\n', text, re.IGNORECASE):
        return text[given.end() :], given[1]
    header = text.partition("\n")[0]
    return text, max("\t,;|" if source.suffix.lower() == ".tsv" else ",\t;|", key=header.count)


def csv_records(source: Path, delimiter: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", {column: text}) for each record; the delimiter is detected if it is not given."""
    content = read_text(source)
    text, found = _csv_shape(source, content)
    delimiter, above = delimiter or found, content.count("\n") - text.count("\n")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1 + above  # where a record starts; an unbalanced quote is noticed at the end of the file
    try:
        header = [column.strip() for column in next(rows, [])]
        if repeated := [column for column, times in Counter(header).items() if times > 1]:
            raise UserError(f"{source}:{line}: the column {repeated[0]!r} occurs twice: rename one")
        line = rows.line_num + 1 + above
        for row in rows:
            where, line = f"{source}:{line}", rows.line_num + 1 + above
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} columns where {len(header)} are expected ({delimiter.join(header)!r}): put a "
                    f"caption with {delimiter!r} in it in double quotes"
                )
            yield where, {column: value.strip() for column, value in zip(header, row, strict=True)}
    except csv.Error as error:
        raise UserError(f"{source}:{line}: not CSV ({error}): fix the line or get the file again") from None


def _line_records(source: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = parse_json(line, source, number)
            if not isinstance(record, dict):
                raise UserError(f"{source}:{number}: not an object with named fields: write {{...}} on every line")
            if number > 1 or list(record) != [MADE_BY]:
                yield f"{source}:{number}", record


def _parquet_records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq  # imported here: it is large, and rarely needed

    number = 0
    try:
        for batch in pq.ParquetFile(source).iter_batches():
            rows = enumerate(batch.to_pylist(), start=number)
            yield from ((f"{source}: row {i}", record) for i, record in rows)
            number += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not readable as Parquet ({reading.reason(error)}): get it again") from None


def _json_records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records from a list of objects, an object that holds one such list, {picture: its captions}, or JSON lines."""
    text = read_text(source)
    first, _, others = text.strip().partition("\n")
    if first.startswith("{") and first.endswith("}") and others:
        yield from _line_records(source, text)
        return
    content = parse_json(text, source)
    if isinstance(content, dict):
        lists = [each for each in content.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        if any(map(is_picture, content)):
            content = [
                {"image": name, **(about if isinstance(about, dict) else {"captions": about})}
                for name, about in content.items()
            ]
        elif len(lists) == 1:
            content = lists[0]
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise UserError(f"{source}: not a list of objects: write [{{...}}, ...]")
    yield from ((f"{source}: [{i}]", record) for i, record in enumerate(content))


def _records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (position in the file, record) for each record of a table."""
    suffix = source.suffix.lower()
    if suffix == ".json":
        return _json_records(source)
    if suffix in LINES:
        return _line_records(source, read_text(source))
    return _parquet_records(source) if suffix == ".parquet" else csv_records(source)


# Columns


def columns_like(names: Iterable[str], pattern: re.Pattern[str], wanted: str | None) -> list[str]:
    """The wanted column, or else those with a usual name."""
    return [name for name in names if (name == wanted if wanted else pattern.fullmatch(name))]


def id_columns(names: Iterable[str]) -> list[str]:
    """Columns with a picture's id, the best first: beside an image_id, a plain id is the caption's."""
    return sorted(columns_like(names, ID_COLUMN, None), key=lambda name: name.lower() == "id")


def caption_columns(names: Iterable[str], wanted: str | None) -> list[str]:
    """The caption column, or several, as in caption_1 ... caption_5; a title beside captions is not one of them."""
    usual = columns_like(names, CAPTION_COLUMN, wanted)
    words = [CAPTION_COLUMN.fullmatch(name) for name in usual]
    ranks = [CAPTION_WORDS.index(word[2].lower()) if word else 0 for word in words]
    return [name for name, rank in zip(usual, ranks, strict=True) if rank == min(ranks)]


def columns_of(source: Path) -> list[str]:
    """Names of a table's columns; [] if the file is not a table. Of a long list only the first record is read.

    Columns that hold the pictures themselves are omitted: Hugging Face's datasets reads them.
    """
    try:
        if source.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            inside = (pa.types.is_struct, pa.types.is_binary, pa.types.is_large_binary)
            return [column.name for column in pq.read_schema(source) if not any(kind(column.type) for kind in inside)]
        with open_file(source) as file:
            start = file.read(START)  # bytes that are not text do not matter here: the reader reports them
        text = start.decode(reading.encoding_of(start), errors="replace").replace("\r\n", "\n").replace("\r", "\n")
        if source.suffix.lower() in (".csv", ".tsv"):
            text, delimiter = _csv_shape(source, text)
            header = text.partition("\n")[0].replace('"', "")
            return [
                name.strip() for name in re.split(r"[,\t;|]" if delimiter in ",\t;|" else re.escape(delimiter), header)
            ]
        if source.suffix.lower() in LINES or text.lstrip().startswith("["):
            text = text.split("\n", 1)[1] if text.startswith(f'{{"{MADE_BY}": ') else text
            first: Any = json.JSONDecoder().raw_decode(text.lstrip().removeprefix("[").lstrip())[0]
        else:
            first = next(_records(source))[1]
        return [str(name).strip() for name in first] if isinstance(first, dict) else []
    except (ValueError, RecursionError, pa.ArrowException, UserError, StopIteration):
        return []
    except OSError as error:
        if error.errno is None:  # Arrow raises it for damaged files
            return []
        raise


def unnamed(names: Iterable[str], columns: Columns) -> str:
    """Say how to name a table's columns if they have other names, or none; "" if they have usual names."""
    pictures = columns_like(names, PICTURE_COLUMN, columns.picture)
    captions = caption_columns(names, columns.caption)
    if pictures and captions:
        return ""
    shown = ", ".join(map(repr, list(names)[:12]))[:400]
    if any(map(is_picture, names)):
        return f"its first line is {shown}: put the names of the columns above it, such as image,caption"
    also = "" if pictures or captions else ", and the captions' with --caption-column"
    return (
        f"no column for the {'captions' if pictures else 'pictures'} among {shown}: name it with "
        f"--{'caption' if pictures else 'image'}-column{also}"
    )


def find_columns(root: Path, columns: Columns, usual: bool = True) -> list[Path]:
    """Tables with a picture and a caption column: those with usual suffixes and forms, or (usual=False) the others."""
    names = sorted(name for name in reading.file_names(root) if Path(name).suffix.lower() in (*TABLE_SUFFIXES, *LINES))
    files = (root / name for name in names)
    return [
        path
        for path in files
        if _is_usual(path) == usual and not unnamed(columns_of(path), columns) and not is_filtered(path)
    ]


def is_filtered(path: Path) -> bool:
    """Whether a file is a list of a data set's good captions (captioning/filtering.py): beside the data, it is used only
    if it is named."""
    with open_file(path) as file:
        return file.read(START).startswith(f'{{"{MADE_BY}": {{"filter": '.encode())


def _is_usual(path: Path) -> bool:
    if path.suffix != ".json":
        return path.suffix in TABLE_SUFFIXES
    with open_file(path) as file:
        return file.read(START).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


# Rows

FOLDERS = (".", "images", "Images", "train_images", "test_images")  # the last two are TextCaps'
IMAGEFOLDER_FILES = [f"metadata.{suffix}" for suffix in ("jsonl", "csv", "parquet")]


def read_columns(root: Path, files: list[Path], columns: Columns) -> Iterator[Row | LeftOut]:
    """Yield a row per picture. Lines of the same picture, one per caption, are joined, in the order of the first."""
    reading.one_of_each(root, files, (split_of(path.stem, path.parent.name) for path in files))
    known_names = Names(root)
    for source in files:
        base = source.parent.relative_to(root)
        found: dict[str, tuple[str, int | str, list[str]]] = {}
        pictures: list[str] = []
        for where, record in _records(source):
            if not found:
                if why := unnamed(record, columns):
                    raise UserError(f"{source}: {why}")
                pictures = columns_like(record, PICTURE_COLUMN, columns.picture)
                captions, ids = caption_columns(record, columns.caption), id_columns(record)
            elif pictures[0] not in record and "conversations" in record:  # some of LLaVA's have no picture
                yield LeftOut("conversations without a picture", where.rpartition("/")[2])
                continue
            name = known_names.checked(record.get(pictures[0]), where)
            texts = [text for column in captions for text in clean_all(record.get(column), where)]
            split = reading.split_word(record.get("split"), where)
            known = found.setdefault(name, (split, reading.id_or_name(record.get(ids[0]) if ids else None, name), []))
            if split != known[0]:
                raise UserError(f"{where}: {name!r} is in {known[0] or 'no split'!r} above: put it in one split only")
            known[2].extend(texts)
        folders = [(near / inside).as_posix() for near in (base, Path()) for inside in FOLDERS]
        folder = known_names.first_folder(folders, found) or f"{base.as_posix()}/"
        of_file = split_of(source.stem if len(files) > 1 else "", source.parent.name if base != Path() else "")
        for name, (split, number, texts) in found.items():
            split = split or of_file or SPLIT_WORDS.get(name.split("/")[0].lower(), "")
            yield Row(split, (folder + name).removeprefix("./"), number, texts)
