"""Recognise the layout of a data set of pictures with captions, and read it into one table per split.

The packed table of a large data set is cached on disk: later runs map it instead of reading the data.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from config import UserError
from data import kinds, table
from data.columns import (
    LINES,
    PICTURE_COLUMN,
    TABLE_SUFFIXES,
    Columns,
    caption_columns,
    columns_like,
    columns_of,
    id_columns,
    unnamed,
)
from data.layouts import LAYOUTS, pictures_below
from data.reading import Names, clean_all, file_names, id_or_name, is_text, reason, split_of, split_word, unusable
from data.shards import shards_below
from data.table import FLOOR, SPLITS, CaptionTable, LeftOut, Row
from utils import ask_hub, atomic, cache_file, delete_older, key_of, stamps

VERSION = 3  # of the tables cached on disk: increase it when a reader or the columns change
USUAL = Columns()
BESIDE_PICTURES = ("annotations", "Flickr8k_text")  # folders of captions whose pictures are in folders beside them
WORTH_KEEPING = 8 << 20  # bytes of captions files from which on the packed table is cached


def load_tables(
    dataset: str,
    data_dir: str | Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    floor: int = FLOOR,
) -> dict[str, CaptionTable]:
    """Load all splits of a data set as {"train": ..., "val": ..., "test": ...}, without splits that have no pictures.

    `dataset` is a layout of LAYOUTS, "auto" to recognise it, or a name on the Hugging Face Hub (user/name; data_dir is
    then ignored). `data_dir` is the folder, or the one file in it that holds the captions. A split that the source does
    not have is made by table.split_up (floor=0: with the sizes of earlier versions); if there is val and no test, val
    serves as test. Raises UserError, in one line with the file and the line or id, for anything damaged.
    """
    tables = _load(dataset, data_dir, Columns(image_column, caption_column), floor)
    return {split: _with_pictures(each) for split, each in tables.items()}


def load_table(
    dataset: str, data_dir: str | Path, split: str, floor: int = FLOOR, **columns: str | None
) -> CaptionTable:
    """Load one split; the pictures of the others may be missing. Raises UserError if the source lacks the split."""
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown: use train, val or test")
    tables = _load(dataset, data_dir, Columns(columns.get("image_column"), columns.get("caption_column")), floor)
    if split not in tables:
        raise UserError(f"{data_dir} has no {split} split, only {' and '.join(tables)}: choose another, or add it")
    return _with_pictures(tables[split])


def _with_pictures(one: CaptionTable) -> CaptionTable:
    """Return the table unchanged. Raises UserError if all of its pictures are missing."""
    if not len(one):
        first, unpack = one.missing[0], unusable(sorted(file_names(one.root)))
        raise UserError(
            f"{one.root}: none of the {len(one.missing):,} {one.split} pictures is there ({str(one.root / first)!r}, "
            f"...){Names(one.root).nearest(first)}: {unpack or 'put them there, or name the folder that holds them'}"
        )
    return one


def _load(dataset: str, data_dir: str | Path, columns: Columns, floor: int) -> dict[str, CaptionTable]:
    if dataset not in ("auto", *LAYOUTS) and "/" not in dataset:
        raise UserError(f"dataset {dataset!r} is unknown: use auto, {', '.join(LAYOUTS)}, or user/name on the Hub")
    if "/" in dataset:
        if Path(dataset).exists():
            raise UserError(f"{dataset} is a local folder, not a name on the Hub: give it with --data-dir")
        return _read_hub(dataset, columns, floor)
    path = Path(data_dir).expanduser()
    try:
        name, root, files = recognise(path, columns, dataset)
        if name == "huggingface":
            return _read_hub(str(path), columns, floor)
        packed, about = _packed(name, root, files, columns, floor)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if name == "sidecar":  # any file there may be meant as a picture
        about["left_out"] |= kinds.left_out(kinds.files_below(root))
    how = f"{'recognised as ' if dataset == 'auto' else ''}{LAYOUTS[name].shape}"
    if dataset == "auto" and name == "coco" and LAYOUTS["karpathy"].find(root, columns):
        how += " (Karpathy's split is here too: --dataset karpathy)"
    family = files[0].stem.removeprefix("dataset_") if name == "karpathy" else name
    return _parts(packed, about, root, family, how)


def recognise(path: Path, columns: Columns = USUAL, dataset: str = "auto") -> tuple[str, Path, list[Path]]:
    """Find the layout's name, its folder and its captions files; `dataset` allows one layout only.

    Raises UserError, which says what was looked for, if nothing fits.
    """
    only = path if path.is_file() else None
    root = path if only is None else path.parent.parent if path.parent.name in BESIDE_PICTURES else path.parent
    if not root.is_dir():
        raise UserError(
            f"no such folder: {path}: name one with --data-dir (a folder of pictures with name.txt beside each "
            "name.jpg will do, or COCO 2017, Flickr8k, Flickr30k, ...), or try --preset demo"
        )
    for kind in ("find", "like"):
        for name, layout in LAYOUTS.items():
            files = getattr(layout, kind)(root, columns) if dataset in ("auto", name) else []
            if only is None and files:
                return name, root, files
            if only and only in files:
                return name, root, _with_related(only, files, name)
    suffix = only.suffix.lower() if only else ""
    if dataset in ("auto", "csv") and only and suffix != ".parquet" and suffix in (*TABLE_SUFFIXES, *LINES):
        return "csv", root, [only]
    if dataset == "auto" and (_is_saved_dataset(root) if only is None else suffix == ".parquet"):
        return "huggingface", root, []
    files = shards_below(root) if dataset in ("auto", "webdataset") else []
    if only in files:
        return "webdataset", root, [only]
    if files and only is None and (dataset == "webdataset" or not any(pictures_below(root))):
        return "webdataset", root, files
    hint = _hint(root, only, columns)
    if dataset == "auto":
        wanted = "; ".join(f"{layout.shape} ({name})" for name, layout in LAYOUTS.items())
        files = list(kinds.files_below(root))
        pictures, others = sum(map(kinds.is_picture, files)), kinds.in_words(kinds.left_out(files))
        beside = f" beside {pictures:,} pictures without captions" if pictures else ""
        beside += f" ({others})" if others else ""
        raise UserError(f"no captions found in {path}{beside}: {hint or f'looked for {wanted}; or try --preset demo'}")
    layout = LAYOUTS[dataset]
    get = f", which is in {layout.source}" if layout.source else ""
    raise UserError(f"{path} is not in the layout {dataset}: expected {layout.shape}{get}{hint and f' ({hint})'}")


def _with_related(only: Path, files: list[Path], name: str) -> list[Path]:
    """The given file, with those that belong to it: COCO's other splits, Flickr8k's lists."""
    split = split_of(only.stem) if name == "coco" else ""
    of_other_splits = [file for file in files if split and split_of(file.stem) not in ("", split)]
    return files if name == "flickr8k" else [only, *of_other_splits]


def _hint(root: Path, only: Path | None, columns: Columns) -> str:
    """Say what the user can do with the files there; "" if nothing is known."""
    paths = [only] if only else [root / name for name in sorted(file_names(root))]
    named = ((path.name, columns_of(path)) for path in paths if path.suffix.lower() in (*TABLE_SUFFIXES, *LINES))
    hints = (f"{name}: {unnamed(found, columns)}" for name, found in named if found)
    return "; ".join(filter(None, [*itertools.islice(hints, 3), unusable([path.name for path in paths])]))


def _packed(name: str, root: Path, files: list[Path], columns: Columns, floor: int) -> tuple[pa.Table, dict[str, Any]]:
    """The packed rows, from the cache if they are in it, and {"parts": a text, "left_out": ...}.

    Where a reader finds pictures depends on the folders, so the cache is also renewed if a folder has changed.
    """
    stamped = stamps(files)
    if floor != FLOOR or (name != "webdataset" and sum(size for _, size, _ in stamped) < WORTH_KEEPING):
        return _settled(LAYOUTS[name].read(root, files, columns), files[0], floor)
    folders = stamps([path for pattern in ("*/", "*/*/") for path in sorted(root.glob(pattern))])
    key = key_of(VERSION, dataclasses.astuple(columns), stamped, folders)
    cached = cache_file("table", [name, str(root.absolute())], key)
    try:
        return table.read_table(cached)
    except (OSError, pa.ArrowException, KeyError, ValueError):
        pass  # not there yet, or damaged: written below
    rows, about = _settled(LAYOUTS[name].read(root, files, columns), files[0], floor)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic(cached) as unfinished:
            table.write_table(rows, unfinished, about)
        delete_older(cached)
        return table.read_table(cached)
    except OSError:
        return rows, about  # no disk space, or no writable home: the next run reads the data again


def _settled(rows: Iterable[Row | LeftOut], source: Path | str, floor: int) -> tuple[pa.Table, dict[str, Any]]:
    """Pack the rows and split them; also return {"parts": a text, "left_out": ...}."""
    packed, left_out = table.pack(rows)
    if not packed.num_rows:
        raise UserError(f"{source}: no picture has a caption: get the file again")
    try:
        packed, parts = table.split_up(packed, floor)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return packed, {"parts": parts, "left_out": left_out}


def _parts(
    rows: pa.Table, about: dict[str, Any], root: Path, name: str, how: str, hub: Any = None
) -> dict[str, CaptionTable]:
    """Make one table per split from rows in the order of SPLITS, without pictures that are not there."""
    there, matched = None, ""
    if hub is None:
        rows, there, matched = _found(rows, root)
    how = "; ".join(filter(None, [how, about["parts"], matched]))
    tables = {}
    start = 0
    for split in SPLITS:
        number = pc.sum(pc.equal(rows["split"], split)).as_py() or 0
        of_split = rows.slice(start, number).drop_columns("split")
        missing: tuple[str, ...] = ()
        if number and there is not None:
            found = there.slice(start, number)
            missing = tuple(of_split["picture"].filter(pc.invert(found)).to_pylist())
            of_split = of_split.filter(found) if missing else of_split
        start += number
        if number:
            tables[split] = CaptionTable(of_split, root, name, split, how, about["left_out"], missing, hub)
    if "val" in tables and "test" not in tables:
        tables["test"] = tables["val"]
    return tables


def _found(rows: pa.Table, root: Path) -> tuple[pa.Table, pa.ChunkedArray, str]:
    """Correct names whose pictures exist in another spelling. Returns the rows, which of their pictures exist, and a
    text about the corrections. A picture that another row names, or that two names match, is given to neither."""
    there = _there(rows["picture"], root)
    if pc.all(there).as_py() is not False:
        return rows, there, ""
    missing, names = rows["picture"].filter(pc.invert(there)).to_pylist(), Names(root)
    meant = {name: match for name in missing if (match := names.match(name))}
    times = Counter(meant.values())
    times.update(rows["picture"].filter(pc.is_in(rows["picture"], pa.array(set(times), pa.string()))).to_pylist())
    meant = {name: match for name, match in meant.items() if times[match] == 1}
    if not meant:
        return rows, there, ""
    pictures = pa.chunked_array([[meant.get(name, name) for name in rows["picture"].to_pylist()]], pa.string())
    rows = rows.set_column(rows.schema.get_field_index("picture"), "picture", pictures)
    first, match = next(iter(meant.items()))
    what = f"{len(meant):,} pictures are there under another case, Unicode form or suffix ({match!r} for {first!r})"
    return rows, _there(pictures, root), what


def _there(pictures: pa.ChunkedArray, root: Path) -> pa.ChunkedArray:
    """Which of the files exist: lists each folder once, since checking each of 100,000 files is slow."""
    folders = pc.unique(pc.replace_substring_regex(pictures, r"[^/]*$", "")).to_pylist()
    names = [folder + name for folder in folders for name in file_names(root / folder)]
    return pc.is_in(pictures, pa.array(filter(is_text, names), pa.string()))


# Hugging Face's datasets


def _is_saved_dataset(root: Path) -> bool:
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or any(name.endswith(".parquet") for name in file_names(root) | file_names(root / "data"))


def _holds_pictures(name: str, kind: Any) -> bool:
    """Whether a column holds pictures, declared as such or as they are stored: {bytes, path}, or bytes."""
    if getattr(kind, "dtype", "").endswith("binary"):
        return bool(PICTURE_COLUMN.fullmatch(name))
    return type(kind).__name__ == "Image" or (isinstance(kind, dict) and set(kind) == {"bytes", "path"})


def _read_hub(source: str, columns: Columns, floor: int) -> dict[str, CaptionTable]:
    """Read a data set by its name on the Hub, or from a folder written by save_to_disk or with Parquet files."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source} is read with Hugging Face's datasets: pip install -r requirements/data.txt"
        ) from None
    refusal = None
    try:
        if any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(source)
        elif source.endswith(".parquet"):
            found = datasets.load_dataset("parquet", data_files=source)
        else:
            refusal = ask_hub(source, "dataset")
            # Without a network, use what an earlier run downloaded, at once: the library's retries take minutes.
            datasets.config.HF_HUB_OFFLINE = refusal is not None
            found = datasets.load_dataset(source)
    except Exception as error:  # the library raises dozens of kinds
        raise UserError(
            f"{source}: the data set cannot be loaded ({reason(refusal or error)[:200]}): check its name and the network"
        ) from None
    parts = found if isinstance(found, dict) else {"train": found}
    features = next(iter(parts.values())).features
    pictures = [n for n, kind in features.items() if n == columns.picture or _holds_pictures(n, kind)]
    captions = caption_columns((n for n in features if n not in pictures), columns.caption)
    if not pictures or not captions:
        raise UserError(
            f"{source}: no column for the {'captions' if pictures else 'pictures'} among {', '.join(features)}: name it "
            f"with --{'caption' if pictures else 'image'}-column"
        )
    ids = id_columns(features) or columns_like(features, re.compile("filename|file_name"), None)

    def rows() -> Iterator[Row]:
        for part, data in parts.items():
            texts = data.select_columns([*captions, *ids[:1], *(["split"] if "split" in features else [])])
            for number, record in enumerate(texts):
                where = f"{source}[{part}][{number}]"
                cleaned = [text for name in captions for text in clean_all(record[name], where)]
                split = split_word(record.get("split"), where) or (split_of(part) if len(parts) > 1 else "")
                yield Row(split, part, id_or_name(record[ids[0]] if ids else None, f"{part}-{number}"), cleaned, number)

    packed, about = _settled(rows(), source, floor)
    picture = {part: data.select_columns(pictures[:1]) for part, data in parts.items()}
    raw = {part: data.cast_column(pictures[0], datasets.Image(decode=False)) for part, data in picture.items()}
    hub = {part: data.rename_column(pictures[0], "picture") for part, data in raw.items()}
    return _parts(packed, about, Path(source), source, "Hugging Face data set", hub)
