"""captioning/shards.py: one shard in, one complete file out, by any engine."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SHARED, random_model
from hub import running_hub
from processes import surroundings
from test_captioning import caption_of, model, picture  # noqa: F401

from captioning.shards import Done, Work, find_shards, run
from config import PRESETS, UserError
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
        if path.suffix == ".json" or path.name.startswith("."):  # a killed process's
            continue
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
    path = tmp_path / "out/00000.jsonl"
    first = path.read_bytes()
    assert list(run(work, inputs)) == [Done("00000", was_there=True)]
    path.unlink()
    list(run(work, inputs))
    assert path.read_bytes() == first


def test_captions_of_other_settings_are_not_mixed(model, shards, tmp_path):  # noqa: F811
    """A shard whose file was there was skipped, whatever had written it."""
    inputs = find_shards([str(shards / "00000.tar")])
    list(run(work_of(model, tmp_path / "out"), inputs))
    with pytest.raises(UserError, match="made with num_beams 3: choose another --output"):
        list(run(work_of(model, tmp_path / "out", decoding={"num_beams": 1}), inputs))


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00001.parquet", "made_by.json"]
    with pytest.raises(UserError, match="two shards are called 00001"):
        find_shards([f"{shards}/00001.tar", f"{shards}/../in/00001.tar"])
    with pytest.raises(UserError, match="no shards"):
        find_shards([])


def test_shards_in_a_folder_and_by_a_pattern(shards, monkeypatch):
    """A pattern with the folders from the root on, in quotes, found nothing."""
    monkeypatch.chdir(shards.parent)
    files = [f"{shards}/0000{i}.tar" for i in range(2)]
    for name in (str(shards), f"{shards}/*.tar", f"{shards.parent}/**/*.tar"):
        assert [shard.path for shard in find_shards([name])] == files
    assert [shard.path for shard in find_shards(["in/*.tar"])] == ["in/00000.tar", "in/00001.tar"]


def test_a_data_set_on_the_hub(model, tmp_path):  # noqa: F811
    """Its Parquet files are the shards."""
    table = pa.table({"image": [{"bytes": picture(i), "path": None} for i in range(3)]})
    pq.write_table(table, tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    with running_hub(tmp_path / "hub") as hub:
        hub.add("datasets/ann/photos", {"data/train-00000-of-00001.parquet": content, "README.md": b"photos"})
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": None}
        said = command(tmp_path, "ann/photos", model.path, "--output", "out", "--format", "jsonl", **environment)
        assert not hub.lines("README")
    assert "3 pictures captioned" in said
    assert [line["key"] for line in lines(tmp_path / "out")["train-00000-of-00001"]] == [f"{i:08}" for i in range(3)]


def test_a_task_of_an_array_takes_every_nth_shard(model, shards, tmp_path):  # noqa: F811
    """As docs/scale.md has it for Slurm: two variables, and no torchrun."""
    flags = ("in/*.tar", model.path, "--format", "jsonl", "--output", "out", "--precision", "fp32")
    command(tmp_path, *flags, code=1, RANK=1, WORLD_SIZE=2)
    assert list(lines(tmp_path / "out")) == ["00001"]
    command(tmp_path, *flags, code=1, RANK=0, WORLD_SIZE=2)
    assert list(lines(tmp_path / "out")) == ["00000", "00001"]


def command(folder: Path, *arguments: Any, ranks: int = 1, code: int = 0, **changes: Any) -> str:
    start = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *start, str(ROOT / "example_usage.py"), *map(str, arguments)]
    process = subprocess.run(
        words, cwd=folder, env=surroundings(ENVIRONMENT | changes), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == code, process.stderr
    return process.stdout + process.stderr


FLICKR = SHARED / "flickr8k" / "Images"
PART = 400  # pictures in a shard


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory, scenes_tokenizer) -> Path:
    """8,000 photographs in 20 shards, and a model of the preset's size with random weights."""
    folder = tmp_path_factory.mktemp("flickr8k")
    photos = sorted(FLICKR.iterdir())[: 20 * PART]
    for i in range(0, len(photos), PART):
        write_tar(folder / f"in/{i // PART:05}.tar", {path.name: path.read_bytes() for path in photos[i : i + PART]})
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), scenes_tokenizer.eos_token_id)
    sizes = dataclasses.replace(PRESETS["flickr8k"].model, vocab_size=len(scenes_tokenizer), **ids)
    made = random_model(sizes, std=0.1)
    made.tokenizer = scenes_tokenizer
    made.save_file(folder / "m.safetensors")
    return folder


def killed(process: subprocess.Popen[str], output: Path, shards: int, victim: Callable[[], int]) -> int:
    """Kills a worker with -9 as soon as so many shards are there; returns how many are when everything has ended."""
    while len(list(output.glob("*.jsonl"))) < shards:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(victim(), signal.SIGKILL)
    process.communicate(timeout=600)
    return len(list(output.glob("*.jsonl")))


def newest(words: str) -> int:
    """The newest process whose command line has these words."""
    return int(subprocess.run(["pgrep", "-n", "-f", "--", words], capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.is_dir(), reason="needs Flickr8k's pictures")
def test_8000_photographs_by_every_engine_with_a_worker_killed(flickr8k):
    """The same captions and scores, nothing captioned twice beyond the shards in work, at the model's own speed."""
    pytest.importorskip("ray", reason="ray is of requirements/ray.txt")
    from ray.cluster_utils import Cluster

    flags = [
        "in/*.tar",
        "m.safetensors",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--num-beams",
        "1",
        "--format",
        "jsonl",
    ]
    script = str(ROOT / "example_usage.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    engines: dict[str, tuple[list[str], list[str], str]] = {
        "one": ([sys.executable], [], script),
        "torchrun": (torchrun, [], f"-u {script}"),
        "ray": ([sys.executable], ["--engine", "ray", "--address", cluster.address], "^ray::Map"),
    }
    results = {}
    try:
        for name, (start, more, words) in engines.items():
            command, output = [*start, script, *flags, "--output", name, *more], flickr8k / name
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(command, cwd=flickr8k, env=environment, **pipes)

            def victim(process: Any = process, words: str = words, name: str = name) -> int:
                return process.pid if name == "one" else newest(words)

            there = killed(process, output, 4, victim)
            start_time = time.monotonic()
            again = subprocess.run(command, cwd=flickr8k, env=environment, **pipes, timeout=1200).stdout
            counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) pictures captioned", again)]
            assert sum(counts) == PART * (20 - there), again
            results[name] = lines(output)
            seconds = time.monotonic() - start_time
            print(f"{name}: {there} shards when it had ended, then {sum(counts):,} pictures in {seconds:.0f} s")
    finally:
        cluster.shutdown()
    assert results["one"] == results["torchrun"] == results["ray"] and len(results["one"]) == 20


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.is_dir(), reason="needs Flickr8k's pictures")
def test_the_speed_is_the_models_own_and_memory_does_not_grow(flickr8k):
    """8,000 photographs through shards beside the same model on pictures that are ready; 1,000, 10,000 and 100,000 stand-ins."""
    own = f"""
import resource, time, torch
from pathlib import Path
from captioning.models import load_model
from captioning.pipeline import caption_batch, prepared
from captioning.shards import Work, find_shards, open_shard, run
torch.set_num_threads(1)
model = load_model("m.safetensors", "cpu")
keys, source = open_shard(find_shards(["in/*.tar"])[0])
pixels = torch.stack([picture for _, picture in prepared(keys, model.config, source)])
options = {{"num_beams": 1, "scores": True}}
caption_batch(model, pixels[:32], "fp32", **options)
start = time.perf_counter()
for _ in range(4):
    for batch in pixels.split(32):
        caption_batch(model, batch, "fp32", **options)
rate = 4 * len(pixels) / (time.perf_counter() - start)
work = Work("m.safetensors", Path("speed"), "jsonl", "cpu", "fp32", decoding={{"num_beams": 1}})
start, number = time.perf_counter(), 0
for done in run(work, find_shards(["in/*.tar"])):
    number += done.captioned
ours = number / (time.perf_counter() - start)
print(f"the model alone {{rate:.1f}} pictures/s, shards {{ours:.1f}}: {{ours / rate:.3f}}", flush=True)
pictures = sorted(Path("in").glob("*.tar"))
for copies in (1000, 10_000, 100_000):
    for old in Path("growth").glob("*"):
        old.unlink()
    shards = find_shards([str(pictures[0])])
    work = Work("m.safetensors", Path("growth"), "jsonl", "cpu", "fp32", decoding={{"num_beams": 1, "max_length": 2}})
    for i in range(copies // {PART}):
        for done in run(work, [type(shards[0])(f"{{i:05}}", path=str(pictures[i % 20]))]):
            pass
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{{copies:,}} pictures: {{kilobytes // 1024:,}} MiB at most", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    said = subprocess.run([sys.executable, "-c", own], cwd=flickr8k, env=environment, capture_output=True, text=True)
    print(said.stdout)
    assert said.returncode == 0, said.stderr
    most = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) MiB", said.stdout)]
    assert most[-1] < most[0] + 100
    assert float(re.findall(r": (\d\.\d+)", said.stdout)[0]) >= 0.95


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
