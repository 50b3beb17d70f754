"""Captions by the million: one shard in, one complete file out.

    work = Work("M.safetensors", Path("out"), "parquet")
    for done in run(work, find_shards(["shards/*.tar"])):
        print(done)

A shard is a WebDataset tar, a Parquet file, or a part of a list of pictures. Its output depends only on the shard, the model
and the settings. It is written atomically, and a shard whose output exists is skipped. So any engine can run the shards, in
any order, and run them again after a crash: this process, the processes of torchrun, or Ray.
"""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captioning.controls import Finish
from captioning.models import is_model, load_model, weights_sha256
from config import UserError
from data.kinds import files_below
from data.reading import MADE_BY
from data.shards import pictures_in
from utils import atomic, choose_device, clear_left, hub_folder, in_one_line, json_of, writable_directory, write_json

if TYPE_CHECKING:  # modules that import torch are imported late, so that --help does not wait for it
    from captioning.pipeline import Result
    from model import ImageCaptionModel

Format = Literal["tar", "parquet", "jsonl"]
ROWS = 64  # rows of a Parquet file read at a time
ABOUT = "made_by.json"  # in the output folder: the model and the settings
Reader = tuple[Iterator[str], Callable[[str], Any]]  # keys, and a function from a key to its picture


@dataclass(frozen=True)
class Shard:
    """Pictures that are captioned into one file: those of a tar or Parquet file (path), or a list."""

    name: str
    path: str = ""
    pictures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """The result of a shard."""

    name: str
    captioned: int = 0
    failed: int = 0
    seconds: float = 0.0
    was_there: bool = False
    error: str | None = None
    """Why the shard could not be read."""


@dataclass(frozen=True)
class Work:
    """The model, the settings and the output folder: everything that is the same for all shards."""

    model: str
    output: Path
    format: Format = "parquet"
    device: str = "auto"
    precision: str = "auto"
    base_dir: Path | None = None
    batch_size: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    """Options of caption_batch, and through it of model.generate."""
    finish: Finish = field(default_factory=Finish)
    allow_pickle: bool = False

    def path(self, shard: Shard) -> Path:
        """Path of the shard's output."""
        return self.output / f"{shard.name}.{self.format}"

    def made_by(self, model: ImageCaptionModel) -> dict[str, Any]:
        """The model's hash and the settings, as they are written into each output."""
        settings = {"precision": self.precision, **self.finish.recorded(self.decoding)}
        return {"model": self.model, "weights": weights_sha256(model)[:16], **settings}

    def load(self) -> ImageCaptionModel:
        """Load the model onto this process's device. Raises UserError if the output folder has captions of another model or
        of other settings."""
        device = str(choose_device(self.device)[0])
        device = f"{device}:{rank('LOCAL_')[0]}" if device == "cuda" else device
        model = load_model(self.model, device, self.base_dir, self.allow_pickle)
        made_by, path = self.made_by(model), self.output / ABOUT
        before = json_of(path.read_text(encoding="utf-8")) if path.exists() else made_by
        if other := [name for name in before | made_by if name != "model" and before.get(name) != made_by.get(name)]:
            settings = in_one_line(", ".join(f"{name} {before.get(name, 'unset')}" for name in other))
            raise UserError(f"{self.output}: has captions made with {settings}: choose another --output")
        write_json(path, made_by)
        return model

    def run(self, shard: Shard, model: ImageCaptionModel) -> Done:
        """Caption a shard with the model from load, unless its output exists. A shard that cannot be read is an error in
        the result."""
        from captioning.pipeline import caption_pictures

        target, start = self.path(shard), time.monotonic()
        clear_left(target)
        if target.exists():
            return Done(shard.name, was_there=True)
        counts = {"captioned": 0, "failed": 0}

        def counted(results: Iterator[Result]) -> Iterator[Result]:
            for result in results:
                counts["failed" if result.error else "captioned"] += 1
                yield result

        try:
            made_by = json_of((self.output / ABOUT).read_text(encoding="utf-8"))  # hashing the model takes seconds
            keys, source = open_shard(shard)
            options = {"precision": self.precision, "scores": True, **self.decoding}
            results = self.finish(caption_pictures(model, keys, batch_size=self.batch_size, source=source, **options))
            with atomic(target) as unfinished:
                WRITERS[self.format](unfinished, shard, counted(results), made_by)
        except UserError as error:  # the other shards are still captioned
            return Done(shard.name, error=str(error))
        return Done(shard.name, counts["captioned"], counts["failed"], time.monotonic() - start)


def run(work: Work, shards: Sequence[Shard], engine: str = "local", address: str | None = None) -> Iterator[Done]:
    """Caption shards, and yield the result of each when it is done. Under torchrun each process takes every n-th shard; with
    engine "ray" the actors of a Ray cluster take them (address: the cluster's; by default one is started here)."""
    writable_directory(work.output, "choose another --output")
    if engine == "ray":
        from captioning.cluster import run_on_ray

        yield from run_on_ray(work, shards, address)
        return
    number, processes = rank()
    model = work.load()
    for shard in shards[number::processes]:
        yield work.run(shard, model)


def rank(kind: Literal["", "LOCAL_"] = "") -> tuple[int, int]:
    """This process's number and the number of processes, from torchrun's environment."""
    return int(os.environ.get(f"{kind}RANK", 0)), int(os.environ.get(f"{kind}WORLD_SIZE", 1))


# Reading


def find_shards(inputs: Sequence[str], shard_size: int = 1000) -> list[Shard]:
    """Find the shards: each tar or Parquet file is one, also in a folder or a data set on the Hub (user/name); pictures are
    split into parts of shard_size. Raises UserError if there are none, or if two have the same name."""
    from captioning.pipeline import picture_names

    found = {name: _packed(name) for name in inputs}
    files = [file for packed in found.values() for file in packed]
    others = [name for name, packed in found.items() if not packed]
    shards = [Shard(Path(file).name.rsplit(".", 1)[0], path=file) for file in files]
    pictures = picture_names(others) if others else []
    parts = range(0, len(pictures), shard_size)
    shards += [Shard(f"pictures-{i:05}", pictures=tuple(pictures[at : at + shard_size])) for i, at in enumerate(parts)]
    names = [shard.name for shard in shards]
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"two shards are called {repeated[0]}: use a different --output for each folder")
    if not shards:
        raise UserError("no shards: name .tar or .parquet files, or folders of pictures")
    return shards


def _packed(name: str) -> list[str]:
    """The tar and Parquet files that an input names: itself, a pattern's matches, the files below a folder or of a data set
    on the Hub. [] if it names pictures."""
    files = [name]
    if os.path.isdir(name):
        files = list(map(str, files_below(name)))
    elif glob.has_magic(name) and not os.path.lexists(name):
        files = sorted(glob.glob(name, recursive=True))
    elif "/" in name and is_model(name) and not name.endswith(".safetensors"):  # it has the form of a name on the Hub
        files = sorted(map(str, files_below(hub_folder(name, ["*.tar", "*.parquet"], "dataset"))))
    return [file for file in files if file.lower().endswith((".tar", ".parquet"))]


def open_shard(shard: Shard) -> Reader:
    """Return the keys of a shard's pictures in order, and a function that reads the picture of a key."""
    if shard.pictures:
        from captioning.pipeline import picture_source

        return iter(shard.pictures), picture_source
    return _open_tar(shard.path) if shard.path.lower().endswith(".tar") else _open_parquet(shard.path)


def _open_tar(path: str) -> Reader:
    places = pictures_in(Path(path))

    def read(key: str) -> bytes:
        offset, size = places[key]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return iter(places), read


def _open_parquet(path: str) -> Reader:
    """Read the first column of pictures: bytes, or {bytes, path} as in Hugging Face's data sets. Keeps a few rows in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        kinds = {column.name: column.type for column in file.schema_arrow}
    except (OSError, pa.ArrowException) as error:
        raise UserError(in_one_line(f"{path}: not readable as Parquet ({error}): get it again")) from error
    columns = [name for name, kind in kinds.items() if pa.types.is_struct(kind) or pa.types.is_binary(kind)]
    if not columns:
        raise UserError(f"{path}: no column of pictures among {', '.join(kinds)}: it needs one of bytes")
    held: dict[str, bytes] = {}

    def keys() -> Iterator[str]:
        number = 0
        for batch in file.iter_batches(ROWS, columns=columns[:1]):
            for value in batch.column(0).to_pylist():
                key = f"{number:08}"
                held[key] = (value or {}).get("bytes") or b"" if isinstance(value, dict) or value is None else value
                number += 1
                yield key

    return keys(), held.pop


# Writing


def record(result: Result) -> dict[str, Any]:
    """A picture's record: caption and score (lists, if there are several captions), or the error."""
    texts = [caption.text for caption in result.captions]
    scores = [round(caption.score or 0.0, 4) for caption in result.captions]
    if result.error:
        return {"key": result.name, "caption": None, "score": None, "error": in_one_line(result.error)}
    if len(texts) == 1:
        return {"key": result.name, "caption": texts[0], "score": scores[0], "error": None}
    return {"key": result.name, "captions": texts, "scores": scores, "error": None}


def _write_jsonl(path: Path, shard: Shard, results: Iterator[Result], made_by: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({MADE_BY: made_by}) + "\n")
        for result in results:
            line = {name: value for name, value in record(result).items() if value is not None}
            file.write(json.dumps(line | {"weights": made_by["weights"]}, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, shard: Shard, results: Iterator[Result], made_by: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    several = made_by.get("num_return_sequences", 1) > 1
    text, score = (pa.list_(pa.string()), pa.list_(pa.float64())) if several else (pa.string(), pa.float64())
    ending, repeated = "s" if several else "", pa.dictionary(pa.int32(), pa.string())
    columns = {"key": pa.string(), f"caption{ending}": text, f"score{ending}": score, "error": pa.string()}
    schema = pa.schema(columns | {"weights": repeated, "settings": repeated}, {"made_by": json.dumps(made_by)})
    about = {"weights": made_by["weights"], "settings": json.dumps(made_by)}
    rows = [record(result) | about for result in results]
    values = [pa.array([row.get(name) for row in rows], schema.field(name).type) for name in schema.names]
    pq.write_table(pa.Table.from_arrays(values, schema=schema), path)


def _write_tar(path: Path, shard: Shard, results: Iterator[Result], made_by: dict[str, Any]) -> None:
    """Copy the shard's members, and add key.caption and key.captioned.json (scores and settings) after each picture."""
    found = {result.name: record(result) for result in results}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))

        for key, name, content in _members(shard):
            if name.endswith(".caption") and name.removesuffix(".caption") in found:  # replaced
                continue
            add(name, content)
            if key in found:
                line, base = found[key], os.path.splitext(name)[0]
                texts = line.get("captions") or [line.get("caption")]
                if line["error"] is None:
                    add(f"{base}.caption", "".join(f"{text}\n" for text in texts).encode())
                add(f"{base}.captioned.json", json.dumps(line | made_by, ensure_ascii=False).encode())


def _members(shard: Shard) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key of the picture or "", name, content) of each file for the output."""
    if shard.path.lower().endswith(".tar"):
        keys = {offset: key for key, (offset, _) in pictures_in(Path(shard.path)).items()}
        with tarfile.open(shard.path, "r:") as tar:
            for member in tar:
                if member.isfile() and (file := tar.extractfile(member)):
                    yield keys.get(member.offset_data, ""), member.name.removeprefix("/"), file.read()
        return
    listed, source = open_shard(shard)
    for i, key in enumerate(listed):
        content = source(key)
        if isinstance(content, str):
            name = f"{i:08}{Path(content).suffix.lower()}"
            yield key, name, Path(content).read_bytes()
        else:
            yield key, f"{key}.{_suffix(content)}", content


def _suffix(content: bytes) -> str:
    return "png" if content.startswith(b"\x89PNG") else "webp" if content[8:12] == b"WEBP" else "jpg"


WRITERS: dict[str, Callable[[Path, Shard, Iterator[Result], dict[str, Any]], None]] = {
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
    "tar": _write_tar,
}
