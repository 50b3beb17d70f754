"""notebooks/first_hour.ipynb runs from its first cell to its last, with tiny pretrained models and sizes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, needs_package, write_bases

pytestmark = [needs_package("nbclient", "dev"), needs_package("peft", "qlora")]
NOTEBOOK = ROOT / "notebooks" / "first_hour.ipynb"


def read() -> Any:
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=4)


def run(folder: Path, until: str = "", **values: object) -> Any:
    """The notebook after it has run in the folder, to its end or until after a cell, with these values of parameters."""
    from nbclient import NotebookClient

    notebook = read()
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in values.items():
        assert re.search(rf"(?m)^{name} = ", cell.source), name
        cell.source += f"\n{name} = {value!r}"
    if until:
        del notebook.cells[[cell.id for cell in notebook.cells].index(until) + 1 :]
    kernel = {"kernel_name": "python3", "resources": {"metadata": {"path": str(folder)}}}
    return NotebookClient(notebook, timeout=300, **kernel).execute()


def outputs(notebook: Any, name: str, kind: str) -> list[str]:
    """The outputs of one kind of the cell with this id: text, or what a browser shows."""
    (cell,) = [cell for cell in notebook.cells if cell.id == name]
    if kind == "text":
        return ["".join(output.text for output in cell.outputs if output.output_type == "stream")]
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def test_nothing_of_a_run_is_committed():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert len(cells) >= 6 and all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_from_a_folder_to_the_report(tmp_path, scenes_table, scenes_tokenizer, monkeypatch):
    """On a CPU, so the adapters are LoRA's."""
    write_bases(tmp_path, 32, 8, len(scenes_tokenizer), 64)
    scenes_tokenizer.backend_tokenizer.model.save(str(tmp_path / "gpt2"))
    (photos := tmp_path / "photos").mkdir()
    for row in range(60):
        shutil.copy(scenes_table.picture(row), photos / f"{row}.png")
        (photos / f"{row}.txt").write_text("\n".join(scenes_table.captions_of(row)))
    more = ["--init-encoder", str(tmp_path / "vit"), "--init-decoder", str(tmp_path / "gpt2"), "--image-size", "32"]
    more += ["--device", "cpu", "--precision", "fp32", "--max-steps", "4", "--val-pictures", "4", "--num-workers", "0"]
    own = {"CODE": str(ROOT), "INSTALL": False, "PICTURES": "photos", "NEW_PICTURES": ["photos/7.png"], "EPOCHS": 1}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run(tmp_path, MORE=[*more, "--wandb", "off"], **own)

    assert "no GPU" in outputs(done, "gpu", "text")[0]
    assert "fit to train on" in outputs(done, "data", "text")[0] and len(outputs(done, "data", "image/png")) == 1
    assert "LoRA" in outputs(done, "train", "text")[0] and len(outputs(done, "train", "image/png")) == 1
    assert len(outputs(done, "caption", "image/png")) == 1
    (page,) = outputs(done, "report", "text/html")
    assert page.startswith("<iframe") and "CIDEr-D" in page


def test_scenes_are_drawn_where_there_are_no_pictures(tmp_path):
    done = run(tmp_path, "data", CODE=str(ROOT), INSTALL=False, NUM_SCENES=60)
    assert len([*(tmp_path / "first_hour/scenes/train2017").iterdir()]) == 60
    assert len(outputs(done, "data", "image/png")) == 1


def test_an_error_of_a_script_stops_it(tmp_path):
    from nbclient.exceptions import CellExecutionError

    (tmp_path / "empty").mkdir()
    with pytest.raises(CellExecutionError, match=r"dataset.py stopped with exit code 2") as caught:
        run(tmp_path, "data", CODE=str(ROOT), INSTALL=False, PICTURES="empty")
    assert "error: " in str(caught.value)  # the script's line is above it
