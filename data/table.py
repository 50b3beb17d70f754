"""The table of pictures and captions, in Arrow memory: no Python object per caption.

data/sources.py fills it. A large table is mapped from a file, so that worker processes share it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from config import UserError
from utils import counted, in_one_line

SPLITS = ("train", "val", "test")
SET_ASIDE, SET_ASIDE_AT_MOST = 0.05, 1000  # share and largest number of pictures for a split that the source lacks
FLOOR, LARGEST_SHARE = 50, 6  # but at least this many pictures, or one in six of a small data set
BATCH = 20_000  # rows packed at a time
CHECKSUM = 4  # bytes at the end of a cached table


class Row(NamedTuple):
    """One picture as a reader yields it, its captions cleaned ("" for an empty one)."""

    split: str
    """train, val or test; "" if the source does not say."""
    picture: str
    """Path below the table's root; the shard's path if the picture is inside a tar file."""
    id: int | str
    captions: list[str]
    offset: int = -1
    """Offset of the picture's bytes in its shard, or row in a Hugging Face data set; -1: the file is the picture."""
    size: int = -1
    """Bytes of the picture in its shard."""
    domain: str = ""
    """The benchmark's domain (nocaps: in-domain, near-domain, out-domain); "" for none."""


class LeftOut(NamedTuple):
    """What a reader yields in place of a row that it skips."""

    what: str
    """What is skipped, in the plural, for counting."""
    first: str = ""
    """Which one; messages name the first of its kind."""


@dataclass(frozen=True)
class CaptionTable:
    """Pictures, numbered from 0, each with an id and at least one caption (white space collapsed)."""

    rows: pa.Table
    """Columns picture (string), id (int64 or string), captions (list of strings), offset and size (int64), domain
    (string)."""
    root: Path
    """The folder that the pictures' paths are relative to."""
    name: str
    """The layout it was read from, or the data set's name on the Hub."""
    split: str
    """train, val or test. If a source has no test split, val serves as test, and this is val."""
    about: str = ""
    """How the data was recognised, and where its splits come from."""
    left_out: dict[str, int] = field(default_factory=dict)
    """What was skipped in the source, over all splits: {what: how many}."""
    missing: tuple[str, ...] = ()
    """Pictures of this split that are named but do not exist, and so are not in the table."""
    hub_rows: Any = None
    """{split: rows of the picture column}, if the pictures are in a Hugging Face data set."""

    def __len__(self) -> int:
        """The number of pictures."""
        return int(self.rows.num_rows)

    @property
    def num_captions(self) -> int:
        """The number of captions of all pictures."""
        return int(pc.sum(pc.list_value_length(self.rows["captions"])).as_py() or 0)

    def id_of(self, row: int) -> int | str:
        """The picture's id: COCO's number, or the source's id, or its file name."""
        return self.rows["id"][row].as_py()  # type: ignore[no-any-return]

    def domains_of(self, rows: Sequence[int]) -> list[str]:
        """The domain of each row's picture; [] if one of them has none."""
        domains: list[str] = self.rows["domain"].take(rows).to_pylist()
        return domains if all(domains) else []

    def captions_of(self, row: int) -> list[str]:
        """All captions of one picture."""
        return self.rows["captions"][row].as_py()  # type: ignore[no-any-return]

    def captions(self) -> pa.ChunkedArray:
        """All captions of all pictures, in order."""
        return pc.list_flatten(self.rows["captions"])

    def name_of(self, row: int) -> str:
        """The picture's name in messages: its path, or the path of the larger file that holds it, and its id."""
        picture, offset = str(self.root / self.rows["picture"][row].as_py()), self.rows["offset"][row].as_py()
        return picture if offset < 0 else f"{picture}: {self.id_of(row)}"

    def picture(self, row: int) -> Path | bytes:
        """The picture's path, or its bytes if it is inside a larger file. Raises UserError if those cannot be read."""
        picture, offset = self.rows["picture"][row].as_py(), self.rows["offset"][row].as_py()
        if self.hub_rows is not None:
            value = self.hub_rows[picture][offset]["picture"]
            if value is None or value["bytes"] is value["path"] is None:
                raise UserError(f"{self.name_of(row)}: there is no picture")
            return Path(value["path"]) if value["bytes"] is None else value["bytes"]
        if offset < 0:
            return self.root / str(picture)
        try:
            with open(self.root / picture, "rb") as shard:
                shard.seek(offset)
                return shard.read(self.rows["size"][row].as_py())
        except OSError as error:
            raise UserError(f"{self.name_of(row)}: cannot be read ({error.strerror})") from None

    def head(self, n: int) -> CaptionTable:
        """The first n pictures (all of them if there are fewer). Raises UserError for n < 1."""
        if n < 1:
            raise UserError(f"the first {n} pictures were asked for: ask for at least 1")
        return dataclasses.replace(self, rows=self.rows.slice(0, n))

    def keys(self) -> np.ndarray:
        """A 64-bit key for each picture, uint64 (rows,), to find the same picture in another table.

        COCO's pictures have the same key in 2014, 2017 and Karpathy's split, and so have the photographs that Flickr8k
        and Flickr30k share. Elsewhere, also in users' files in COCO's format, the key is a hash of the id and the
        captions, since two data sets may both have a picture 1.
        """
        return np.fromiter((_hash(self._key(row)) for row in range(len(self))), np.uint64, len(self))

    def _key(self, row: int) -> str:
        picture, number = str(self.rows["picture"][row].as_py()).rpartition("/")[2], self.id_of(row)
        if self.name in ("flickr8k", "flickr30k") and (photo := re.fullmatch(r"(\d+)(_[0-9a-f]+)?\.jpg", picture)):
            return f"flickr:{photo[1]}"
        cocos = self.name == "coco" and isinstance(number, int)
        if cocos and re.fullmatch(rf"(COCO_\w+_)?{number:012d}\.jpg", picture):
            return f"coco:{number}"
        return "\n".join([str(number), *self.captions_of(row)])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def make_table(
    rows: Iterable[tuple[Path, int | str, list[str]]], name: str = "made", split: str = "train"
) -> CaptionTable:
    """Make a table from (path, id, captions) in memory."""
    packed, left_out = pack(Row("", str(path.absolute()), i, captions) for path, i, captions in rows)
    return CaptionTable(packed.drop_columns("split"), Path("/"), name, split, left_out=left_out)


def uncaptioned(pictures: Iterable[str], root: Path, name: str = "pictures") -> CaptionTable:
    """Make a table of pictures below root that have no captions yet."""
    rows = [Row("train", picture, picture, []) for picture in pictures]
    return CaptionTable(_batch(rows).drop_columns("split"), root, name, "train")


def pack(rows: Iterable[Row | LeftOut]) -> tuple[pa.Table, dict[str, int]]:
    """Pack rows into an Arrow table. Also counts what is skipped: empty captions, pictures with no other caption, and
    what a reader skips."""
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}

    def with_captions() -> Iterator[Row]:
        for row in rows:
            if isinstance(row, LeftOut):
                left_out[row.what] += 1
                first.setdefault(row.what, f" (the first: {in_one_line(row.first)})" if row.first else "")
                continue
            captions = [caption for caption in row.captions if caption]
            left_out["empty captions"] += len(row.captions) - len(captions)
            left_out["pictures without a caption"] += not captions
            if captions:
                yield row._replace(captions=captions)

    full, batches = with_captions(), []
    while batch := list(itertools.islice(full, BATCH)):
        batches.append(_batch(batch))
    batches = batches or [_batch([])]
    if len({batch.schema for batch in batches}) > 1:  # some ids are numbers, some names: store all as names
        column = Row._fields.index("id")
        batches = [batch.set_column(column, "id", pc.cast(batch["id"], pa.string())) for batch in batches]
    return pa.concat_tables(batches).combine_chunks(), {
        what + first.get(what, ""): n for what, n in left_out.items() if n
    }


def _batch(rows: list[Row]) -> pa.Table:
    """Pack rows. Ids are stored as numbers if all of these rows' ids are."""
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(Row._fields)}
    numbers = all(type(i) is int and abs(i) < 1 << 63 for i in columns["id"])
    columns["id"] = columns["id"] if numbers else list(map(str, columns["id"]))
    types = (pa.string(), pa.string(), pa.int64() if numbers else pa.string(), pa.list_(pa.string()))
    return pa.table(
        columns, pa.schema(list(zip(Row._fields, (*types, pa.int64(), pa.int64(), pa.string()), strict=True)))
    )


def split_up(packed: pa.Table, floor: int = FLOOR) -> tuple[pa.Table, str]:
    """Fill in every row's split and sort by SPLITS. Returns the rows, and a text about what was set aside.

    If no row has a split, 5 % of the pictures (at most 1,000; at least 50, or one in six of a small data set) are set
    aside for val and as many for test; if some rows have one but none is val, only val is taken from train this way.
    The choice depends on the pictures' ids alone. Pictures that share a text stay together and count as one.
    """
    codes = pc.fill_null(pc.index_in(packed["split"], pa.array(SPLITS)), -1).to_numpy().copy()
    named = set(codes.tolist()) - {-1}
    codes[codes < 0] = 0
    pool = np.flatnonzero(codes == 0)
    wanted = [] if 1 in named or not len(pool) else [1] if named else [1, 2]
    same = _sharing_a_text(packed, pool) if wanted else pool
    if wanted and (groups := len(np.unique(same))) <= len(wanted):
        raise UserError(
            f"{counted(groups, 'pictures')} with captions: too few to train on and to validate with: have at least "
            f"{len(wanted) + 1}"
        )
    about = ""
    if wanted:
        number = min(SET_ASIDE_AT_MOST, max(1, int(SET_ASIDE * groups), min(floor, groups // LARGEST_SHARE)))
        ids = packed["id"].to_pylist()
        drawn = np.array([_hash(str(ids[row])) for row in pool], np.uint64)  # no float64, in which some would be equal
        least = np.full(len(pool), np.iinfo(np.uint64).max)
        np.minimum.at(least, same, drawn)
        order = np.lexsort((same, least[same]))
        rank = np.cumsum(np.diff(same[order], prepend=-1) != 0) - 1  # of each group, its rows side by side
        for index, code in enumerate(wanted):
            codes[pool[order[rank // number == index]]] = code
        about = f"{counted(number, 'pictures')} each set aside for {' and '.join(SPLITS[code] for code in wanted)}"
        about += ", those of one text counted as one" if groups < len(pool) else ""
    column = pa.array(SPLITS).take(pa.array(codes))
    packed = packed.set_column(packed.schema.get_field_index("split"), "split", column)
    return packed.take(np.argsort(codes, kind="stable")).combine_chunks(), about


def _sharing_a_text(packed: pa.Table, pool: np.ndarray) -> np.ndarray:
    """For each row of the pool, the index of the first row with the same captions and the same picture name except for
    its suffix (a.jpg and a.png beside one a.txt); for nearly all rows, their own index."""
    rows = packed.select(["picture", "captions", "offset"]).take(pool)
    stems = pc.replace_substring_regex(rows["picture"], r"\.[^./]*$", "").to_pylist()
    inside = pc.greater_equal(rows["offset"], 0).to_pylist()  # inside a shard, whose name many rows have
    times = Counter(stems)
    first: dict[tuple[str, ...], int] = {}
    same = np.arange(len(pool))
    for row, (stem, in_shard) in enumerate(zip(stems, inside, strict=True)):
        if times[stem] > 1 and not in_shard:
            same[row] = first.setdefault((stem, *rows["captions"][row].as_py()), row)
    return same


def write_table(packed: pa.Table, path: Path, about: dict[str, Any]) -> None:
    """Write packed rows to an Arrow file, with metadata about them."""
    packed = packed.replace_schema_metadata({"about": json.dumps(about)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, packed.schema) as writer:
        writer.write_table(packed)
    checksum = zlib.crc32(pa.memory_map(str(path)).read_buffer())
    with path.open("ab") as file:
        file.write(checksum.to_bytes(CHECKSUM))


def read_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read write_table's file; the rows stay on disk and are mapped. Raises OSError, pa.ArrowException, and ValueError
    if the file has changed since it was written."""
    content = pa.memory_map(str(path)).read_buffer()
    content, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
    if zlib.crc32(content) != int.from_bytes(checksum):
        raise ValueError("its checksum is wrong")
    packed = pa.ipc.open_file(content).read_all()
    return packed.replace_schema_metadata(None), json.loads((packed.schema.metadata or {})[b"about"])
