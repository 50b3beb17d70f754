"""Which part of the house may stand on which: imports go down, never up and never to a neighbour."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

ROWS = """
config
utils
data decoding
weights scoring
model dataset
training captioning
evaluate
example_usage app
train
publishing
main upload_to_hf auto_upload convert benchmarks
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
