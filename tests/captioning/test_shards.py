"""captioning/shards.py: one shard in, one complete file out, by any engine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from test_captioning import caption_of, model, picture  # noqa: F401

from captioning.shards import Done, Work, find_shards, run
from config import UserError
from data.sources import load_table

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two tars of three pictures, one damaged picture, and somebody's texts."""
    for i in range(2):
        members = {}
        for j in range(3):
            members[f"{i}{j}.png"] = picture(3 * i + j)
            members[f"{i}{j}.txt"] = b"a person's words\n"
        write_tar(tmp_path / f"in/{i:05}.tar", members | {f"{i}9.jpg": b"damaged", "notes.md": b"kept"})
    return tmp_path / "in"


def work_of(model: Any, output: Path, kind: Any = "parquet", **changes: Any) -> Work:  # noqa: F811
    """Its captions are those of caption_of."""
    decoding = {"num_beams": 3, "max_length": 8} | changes.pop("decoding", {})
    return Work(str(model.path), output, kind, "cpu", "fp32", decoding=decoding, **changes)


def lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{shard: its records} whatever the format."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            found[path.stem] = pq.read_table(path).to_pylist()
        elif path.suffix == ".jsonl":
            found[path.stem] = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        else:
            with tarfile.open(path) as tar:
                members = [m for m in tar if m.name.endswith(".captioned.json")]
                found[path.stem] = [json.load(tar.extractfile(m)) for m in members]  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_each_picture_has_its_caption_or_its_error(model, shards, tmp_path, kind):  # noqa: F811
    found = list(
        run(work_of(model, tmp_path / "out", kind), find_shards([f"{shards}/00000.tar", f"{shards}/00001.tar"]))
    )
    assert [(done.captioned, done.failed, done.error) for done in found] == [(3, 1, None)] * 2
    both = lines(tmp_path / "out")
    assert sorted(both) == ["00000", "00001"]
    for i in range(2):
        of_key = {line["key"]: line for line in both[f"{i:05}"]}
        assert sorted(of_key) == [f"{i}0", f"{i}1", f"{i}2", f"{i}9"]
        for j in range(3):
            expected = caption_of(model, picture(3 * i + j), scores=True)[0]
            assert of_key[f"{i}{j}"]["caption"] == expected.text
            assert of_key[f"{i}{j}"]["score"] == pytest.approx(expected.score, abs=1e-4)
            assert len(of_key[f"{i}{j}"]["weights"]) == 16
        assert f"{i}9" in of_key[f"{i}9"]["error"]


def test_a_tar_can_be_trained_on_and_keeps_the_rest(model, shards, tmp_path):  # noqa: F811
    list(run(work_of(model, tmp_path / "out", "tar"), find_shards([str(shards / "00000.tar")])))
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        names = tar.getnames()
    assert names[:4] == ["00.png", "00.caption", "00.captioned.json", "00.txt"] and "notes.md" in names
    table = load_table("webdataset", tmp_path / "out", "train", caption_column="caption")
    expected = {caption_of(model, picture(j))[0].text for j in range(3)}
    assert set(table.captions().to_pylist()) <= expected
    again = tmp_path / "again"
    list(run(work_of(model, again, "tar"), find_shards([str(tmp_path / "out/00000.tar")])))
    with tarfile.open(again / "00000.tar") as tar:
        assert sorted(set(tar.getnames())) == sorted(names)


def test_what_is_there_is_not_captioned_again(model, shards, tmp_path):  # noqa: F811
    """A function of the shard, the model and the settings: the same bytes each time, and all or nothing of them."""
    work, inputs = work_of(model, tmp_path / "out", "jsonl", batch_size=2), find_shards([str(shards / "00000.tar")])
    list(run(work, inputs))
    (path,) = (tmp_path / "out").iterdir()
    first = path.read_bytes()
    assert list(run(work, inputs)) == [Done("00000", was_there=True)]
    path.unlink()
    list(run(work, inputs))
    assert path.read_bytes() == first


def test_parquet_and_lists_of_pictures(model, tmp_path):  # noqa: F811
    pixels = [{"bytes": picture(i), "path": None} for i in range(3)]
    pq.write_table(pa.table({"id": [7, 8, 9], "image": pixels}), tmp_path / "a.parquet")
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / f"photos/{i}.png").write_bytes(picture(i))
    found = find_shards([str(tmp_path / "a.parquet"), str(tmp_path / "photos")], shard_size=2)
    assert [shard.name for shard in found] == ["a", "pictures-00000", "pictures-00001"]
    list(run(work_of(model, tmp_path / "out", "tar", decoding={"num_return_sequences": 2}), found))
    texts = [line["captions"] for own in lines(tmp_path / "out").values() for line in own]
    expected = [[c.text for c in caption_of(model, picture(i), num_return_sequences=2)] for i in range(3)]
    assert texts == expected + expected


def test_a_shard_that_cannot_be_read_does_not_stop_the_others(model, shards, tmp_path):  # noqa: F811
    (shards / "00000.tar").write_bytes(b"not a tar" * 999)
    found = list(run(work_of(model, tmp_path / "out"), find_shards([f"{shards}/00000.tar", f"{shards}/00001.tar"])))
    assert "00000.tar" in (found[0].error or "") and found[1].captioned == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00001.parquet"]
    with pytest.raises(UserError, match="two shards are called 00001"):
        find_shards([f"{shards}/00001.tar", f"{shards}/../in/00001.tar"])
    with pytest.raises(UserError, match="no shards"):
        find_shards([])


def command(folder: Path, *arguments: Any, ranks: int = 1, code: int = 0) -> str:
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *start, str(ROOT / "example_usage.py"), *map(str, arguments)]
    process = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert process.returncode == code, process.stderr
    return process.stdout + process.stderr


@pytest.mark.slow
def test_engines_agree(model, shards, tmp_path):  # noqa: F811
    """One process, two under torchrun, and Ray's actors: the same captions and scores."""
    flags = ("in/*.tar", model.path, "--device", "cpu", "--precision", "fp32", "--format", "jsonl")
    said = command(tmp_path, *flags, "--output", "one", code=1)
    assert "one: 6 pictures captioned" in said and "2 failed" in said
    command(tmp_path, *flags, "--output", "two", ranks=2, code=1)
    pytest.importorskip("ray", reason="ray is of requirements/ray.txt")
    command(tmp_path, *flags, "--output", "ray", "--engine", "ray", code=1)
    assert lines(tmp_path / "one") == lines(tmp_path / "two") == lines(tmp_path / "ray")
