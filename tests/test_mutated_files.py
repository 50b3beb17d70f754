"""Model files, results and tables with anything changed in their structure: a right answer, or one line that can be shown.

The slow tests try for MUTATION_MINUTES each (in the environment; half a minute unless told).
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import resource
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from mutations import many
from PIL import Image
from safetensors.torch import load_file

from config import UserError
from data.sources import load_tables
from dataset import train_tokenizer
from model import ImageCaptionModel
from scoring.matching import matched
from utils import printable

FEW = 40
ODD = [
    None,
    True,
    2.5,
    float("nan"),
    1e308,
    -1,
    0,
    10**9,
    10**40,
    "",
    "12",
    "\x1b[31m\u202e",
    "\ud800",
    "\0",
    [],
    {},
    [[]],
    {"a": {}},
]
OTHERS = [
    *ODD,
    "F32",
    "I64",
    "BOOL",
    "F8_E5M2",
    "../x",
    [0, 4],
    [0, 2**63],
    [-1, 1],
    [1.5, 2],
    [2**40, 2**40],
    {"$": 1},
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where there is anything in nested lists and dictionaries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in list(inside)[:400] for place in places(below, (*path, key)))]


def mutate(draw: st.DataObject, value: Any) -> Any:
    """One to three places get another value, are taken out, copied to another name, or nested."""
    value = copy.deepcopy(value)
    for _ in range(draw.draw(st.integers(1, 3))):
        found = places(value)
        *above, last = found[draw.draw(st.integers(1, len(found) - 1))] if len(found) > 1 else (None,)
        if last is None:
            return copy.deepcopy(draw.draw(st.sampled_from(OTHERS)))
        holder = value
        for key in above:
            holder = holder[key]
        how = draw.draw(st.sampled_from(["put", "put", "drop", "again", "nest", "swap"]))
        other = copy.deepcopy(draw.draw(st.sampled_from(OTHERS)))
        if how == "drop":
            del holder[last]
        elif how == "again" and isinstance(holder, dict):
            holder[f"{last}\u202e"] = copy.deepcopy(holder[last])
        elif how == "again":
            holder.append(copy.deepcopy(holder[last]))
        elif how == "nest":
            holder[last] = [holder[last]]
        elif how == "swap":
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            there = keys[draw.draw(st.integers(0, len(keys) - 1))]
            holder[last], holder[there] = holder[there], holder[last]
        else:
            holder[last] = other
    return value


def damage(draw: st.DataObject, text: bytes) -> bytes:
    """Bytes cut out, put in, or copied."""
    start = draw.draw(st.integers(0, len(text)))
    end = min(len(text), start + draw.draw(st.integers(0, 40)))
    new = draw.draw(
        st.sampled_from(
            [b"", b"\0", b"\xff\xfe", b'"', b"\n", b"[" * 100_000, b",", b"\r", text[start:end] * 2, b"{}", b"9" * 5000]
        )
    )
    return text[:start] + new + text[end:]


def each(number: int | None, look: Callable[[st.DataObject], str]) -> Counter[str]:
    """What became of so many, or of as many as the minutes allow; memory stays where it was."""
    seen: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @given(st.data())
    def one(draw: st.DataObject) -> None:
        try:
            seen.update([look(draw)])
        except UserError as error:
            assert printable(str(error)).isprintable() and str(error)
            seen.update(["refused"])

    many(one, number)
    print(dict(seen))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000  # kilobytes
    return seen


# Model files


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, scenes_table) -> Path:
    words = train_tokenizer(scenes_table.captions().to_pylist(), 270)
    vision = {"vision_registers": 1, "vision_norm_eps": 1e-6, "vision_activation": "quick_gelu", "vision_mlp_dim": 64}
    vision |= {
        "vision_layer_scale": True,
        "vision_positions": "rotary",
        "vision_norm_first": True,
    }  # to be mutated, too
    model = random_model(tiny_config(vocab_size=len(words), vision_num_layers=1, decoder_num_layers=1, **vision))
    model.tokenizer = words
    model.save_file(path := tmp_path_factory.mktemp("model") / "m.safetensors")
    return path


def model_files(number: int | None, source: Path, path: Path) -> Counter[str]:
    """The header, the metadata in it, and the bytes of both."""
    content = source.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, weights = json.loads(content[8 : 8 + size]), content[8 + size :]
    about = json.loads(header["__metadata__"]["vit_gpt2_captioning"])
    small = {name: part for name, part in about.items() if name != "tokenizer"}
    known = {name: tensor.float() for name, tensor in load_file(source).items()}

    def look(draw: st.DataObject) -> str:
        how, other, length = (
            draw.draw(st.sampled_from(["header", "metadata", "tokenizer", "bytes", "size"])),
            dict(header),
            None,
        )
        if how == "header":
            other = mutate(draw, header)
        elif how in ("metadata", "tokenizer"):
            changed = (
                mutate(draw, small) if how == "metadata" else small | {"tokenizer": mutate(draw, about["tokenizer"])}
            )
            other["__metadata__"] = {"vit_gpt2_captioning": json.dumps(changed)}
        text = json.dumps(other).encode("utf-8", "surrogatepass")
        text = damage(draw, text) if how == "bytes" else text
        if how == "size":
            length = draw.draw(st.sampled_from([0, 1, len(text) - 1, len(text) + 1, 2**40, 2**64 - 1]))
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + weights)
        model = ImageCaptionModel.from_pretrained(path)
        # The config may have other dropout, colours, ids or heads; the weights are those of the file.
        state = model.state_dict()
        assert state.keys() == known.keys() and all(torch.isfinite(tensor).all() for tensor in state.values())
        return "read"

    return each(number, look)


def test_some_model_files(model_file, tmp_path):
    assert model_files(FEW, model_file, tmp_path / "x.safetensors").total() >= FEW


@pytest.mark.slow
def test_many_model_files(model_file, tmp_path):
    assert model_files(None, model_file, tmp_path / "x.safetensors")["read"]


# Results and references


def results_files(number: int | None, folder: Path) -> Counter[str]:
    """What is scored is what stands in both files; all else is an error."""
    references = {
        "images": [{"id": n} for n in range(6)],
        "annotations": [{"id": n, "image_id": n // 2, "caption": f"a dog {n}"} for n in range(12)],
    }
    results = [{"image_id": n, "caption": f"a dog runs {n}"} for n in range(6)]
    ours, theirs = folder / "results.json", folder / "references.json"

    def look(draw: st.DataObject) -> str:
        own, known = copy.deepcopy(results), copy.deepcopy(references)
        side = draw.draw(st.sampled_from(["results", "references", "both", "bytes"]))
        own = mutate(draw, own) if side in ("results", "both") else own
        known = mutate(draw, known) if side in ("references", "both") else known
        form = draw.draw(st.sampled_from(["json", "lines"])) if isinstance(own, list) else "json"
        text = json.dumps(own) if form == "json" else "\n".join(map(json.dumps, own))
        ours.write_bytes(damage(draw, text.encode()) if side == "bytes" else text.encode())
        theirs.write_text(json.dumps(known))
        names, captions, refs, facts, _ = matched(ours, theirs)
        assert len(names) == len(captions) == len(refs) == len(set(names)) and all(refs) and "subset" not in facts
        if side != "bytes" and isinstance(own, list) and own and all(isinstance(e, dict) for e in own):
            kept = [e["caption"] for e in own if isinstance(e.get("caption"), str)]
            assert set(captions) == set(kept)
        if side == "results":
            assert sorted(text for own in refs for text in own) == sorted(
                a["caption"] for a in references["annotations"]
            )
        return "read"

    return each(number, look)


def test_references_without_captions(tmp_path):
    """An IndexError, where the results had a picture."""
    (tmp_path / "r.json").write_text('[{"image_id": 1, "caption": "a"}]')
    (tmp_path / "k.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="it holds no captions"):
        matched(tmp_path / "r.json", tmp_path / "k.json")


def test_some_results(tmp_path):
    assert results_files(5 * FEW, tmp_path)["refused"]


@pytest.mark.slow
def test_many_results(tmp_path):
    assert results_files(None, tmp_path)["read"]


# Tables


def as_csv(rows: list[dict], delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows(
        [
            list(rows[0]),
            *([str(value) for value in row.values()] if isinstance(row, dict) else [str(row)] for row in rows),
        ]
    )
    return text.getvalue().encode("utf-8", "replace")


def as_parquet(content: Any, rows: list[dict]) -> bytes:
    """Of rows that no table can hold, the unchanged ones."""
    file = io.BytesIO()
    for tried in (content, rows):
        with contextlib.suppress(pa.ArrowException, TypeError, AttributeError, OverflowError, UnicodeError):
            pq.write_table(pa.Table.from_pylist(tried), file)
            break
    return file.getvalue()


def tables(number: int | None, folder: Path) -> Counter[str]:
    """Six pictures with two captions each, in six forms. A table's captions are among those that the file has."""
    folder.mkdir()
    for n in range(6):
        Image.fromarray(np.full((16, 16, 3), 40 * n, np.uint8)).save(folder / f"p{n}.png")
    rows = [{"file_name": f"p{n // 2}.png", "caption": f"mark{n}z dog"} for n in range(12)]
    karpathy = {
        "dataset": "coco",
        "images": [
            {
                "filename": f"p{n}.png",
                "filepath": "",
                "cocoid": n,
                "split": "train",
                "sentids": [n],
                "sentences": [{"raw": f"mark{n}z dog", "tokens": ["dog"]}],
            }
            for n in range(6)
        ],
    }

    def look(draw: st.DataObject) -> str:
        form = draw.draw(st.sampled_from(["csv", "tsv", "jsonl", "json", "karpathy.json", "parquet"]))
        content = mutate(draw, karpathy if form == "karpathy.json" else rows)
        if form in ("csv", "tsv"):
            whole = isinstance(content, list) and content and isinstance(content[0], dict)
            data = as_csv(content if whole else rows, "," if form == "csv" else "\t")
        elif form == "parquet":
            data = as_parquet(content, rows)
        elif form == "jsonl" and isinstance(content, list):
            data = "\n".join(map(json.dumps, content)).encode()
        else:
            data = json.dumps(content).encode()
        data = damage(draw, data) if draw.draw(st.integers(0, 2)) == 0 else data
        for old in folder.glob("captions*"):
            old.unlink()
        (folder / f"captions.{form.rpartition('.')[2]}").write_bytes(data)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            found = load_tables("auto", folder)
        assert found and said.getvalue().replace("\n", "").isprintable()
        return "read"

    return each(number, look)


def test_some_tables(tmp_path):
    assert tables(2 * FEW, tmp_path / "data")["refused"]


@pytest.mark.slow
def test_many_tables(tmp_path):
    assert tables(None, tmp_path / "data")["read"]
