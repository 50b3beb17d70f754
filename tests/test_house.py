"""Which part of the house may stand on which: imports go down, never up and never to a neighbour. What every file of its
kind must keep to: papers, tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

ROWS = """
config
utils
flags
data decoding
weights scoring
model dataset
training captioning
evaluate
example_usage app
train
publishing
main upload_to_hf auto_upload convert
benchmarks
benchmark
"""
ROW = {part: number for number, row in enumerate(ROWS.split("\n")) for part in row.split()}
FILES = [path for part in ROW for path in (*ROOT.glob(f"{part}.py"), *ROOT.glob(f"{part}/*.py"))]


def test_every_file_has_its_place():
    assert {path.name for path in ROOT.glob("*.py")} == {f"{part}.py" for part in ROW if not (ROOT / part).is_dir()}
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {part for part in ROW if (ROOT / part).is_dir()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    """Late imports count. Ten files once imported each other in a circle, some of them late, so that none could be read
    without the others."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for other in (name.split(".")[0] for name in names):
            assert other == part or other not in ROW or ROW[other] < ROW[part], f"line {node.lineno} imports {other}"


def test_contributors_are_shown_around():
    """The order of imports as this file has it, and a line for every script and wing."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```{ROWS}```" in text
    for part in ROW:
        assert f"`{part}/`" in text if (ROOT / part).is_dir() else f"`{part}.py`" in text, part


def test_a_release_has_one_version_and_date():
    """The changelog's newest version is the one to cite, and what comes next has its place above it."""
    titles = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    dates = [title.split(" - ")[1] for title in titles[1:]]
    assert titles[0] == "Unreleased" and dates == sorted(dates, reverse=True)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f"{cited['version']} - {cited['date-released']}" == titles[1]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys() and cited["license"] == "Apache-2.0"


def test_what_scripts_write_is_ignored_and_no_folder_of_this_house():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {"runs/", "/check/", "/evaluation/", "/upload/"} <= set(ignored)
    assert not {part for part in ROW if {f"{part}/", f"/{part}/"} & set(ignored)}


HEAVY = """
bitsandbytes datasets gradio gradio_client kagglehub matplotlib nltk onnx onnxruntime onnxscript pandas peft playwright
pycocoevalcap scipy wandb webdataset
"""


def loaded(path: Path) -> Iterator[str]:
    """The packages that come with importing a file; its functions' own imports come later, or never."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "from transformers" if node.module == "transformers" else (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            yield ast.literal_eval(node.args[0]).split(".")[0]


def test_test_files_load_nothing_heavy():
    """Every worker imports every test file, whichever tests it is given: gradio, playwright and onnxruntime came with each,
    and many models of transformers. `import transformers` is light, and loads a class when it is asked for."""
    files = [path for path in (ROOT / "tests").glob("**/test_*.py") if "node_modules" not in path.parts]
    heavy = {path.name: found for path in files if (found := {*HEAVY.split(), "from transformers"} & set(loaded(path)))}
    assert len(files) > 40 and not heavy
