"""Which files count as pictures by their names, what is said of the others, and links that lead round in circles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from processes import finished

from captioning.pipeline import picture_names
from config import UserError
from data import kinds
from data.kinds import files_below, in_words, left_out
from data.sources import load_tables


def draw(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 9 % 256, 80, 40)).save(path, "PNG")


def test_kinds_are_counted_whatever_their_case():
    files = ["a.CR2", "b.cr2", "c.jpg", "d.JPG", "e.txt", "f.pdf", "LICENSE", "g.csv"]
    assert left_out(files) == {".cr2": 2, "without a suffix": 1, ".pdf": 1}
    assert in_words(left_out(files)) == "skipped: 2 .cr2, 1 without a suffix, 1 .pdf" and in_words({}) == ""


def test_linked_folders_are_followed_once(tmp_path):
    """They were not mentioned at all; followed by a pattern, they led round in circles forty times. Names of before stay:
    what is no link comes first."""
    draw(tmp_path / "data/b/x.png", tmp_path / "elsewhere/deep/y.png")
    links = {"data/b/up": "..", "data/a": "b", "data/c": "../elsewhere", "elsewhere/back": "../data", "data/gone": "no"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    names = ["data/b/x.png", "data/c/deep/y.png"]
    assert [str(path.relative_to(tmp_path)) for path in files_below(tmp_path / "data")] == ["data/gone", *names]
    full = [str(tmp_path / name) for name in names]
    for pattern in ("data", "data/**/*.png", "data/**", "d*/**/*.png"):
        assert picture_names([str(tmp_path / pattern)]) == full, pattern


def test_captioning_says_what_a_folder_holds_besides(tmp_path, capsys):
    draw(tmp_path / "a.png")
    for name in ("b.cr2", "c.pdf", "a.txt", ".hidden.pdf"):
        (tmp_path / name).touch()
    for source in (tmp_path, tmp_path / "*"):
        assert picture_names([str(source)]) == [str(tmp_path / "a.png")]
        assert capsys.readouterr().err == "skipped: 1 .cr2, 1 .pdf\n"
    assert picture_names([str(tmp_path / "*.png")]) and capsys.readouterr().err == ""
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"no pictures in this folder \(skipped: 1 .cr2, 1 .pdf\)$"):
        picture_names([str(tmp_path)])


WITHOUT = "import sys; sys.modules['pillow_heif'] = None; import runpy; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_without_pillow_heif_heic_is_left_out_and_said(tmp_path):
    """A folder's HEIC were neither read nor mentioned."""
    folder = tmp_path / "data"
    draw(*(folder / f"{number}.png" for number in range(3)))
    for name in ("x.HEIC", "y.heic", "z.cr2"):
        (folder / name).write_bytes(b"anything")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"this is {path.stem}")
    command = ("-c", WITHOUT, ROOT / "dataset.py", "check", "data")
    done = finished(*command, cwd=tmp_path, environment={"PYTHONPATH": ROOT})
    assert "skipped     2 .heic (pip install pillow-heif)\nskipped     1 .cr2\n" in done.stdout
    figures = json.loads((tmp_path / "check/check.json").read_text())
    texts = {"texts without a picture (the first: x.txt)": 3}
    assert figures["left_out"] == texts | {".heic (pip install pillow-heif)": 2, ".cr2": 1}


def test_a_folder_of_nothing_else_is_not_called_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "PICTURE_SUFFIXES", (".png",))  # as without pillow-heif
    for name in ("x.HEIC", "y.heic", "y.txt", "z.cr2"):
        (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=r"no captions found .* \(skipped: 2 .heic \(pip install pillow-heif\), 1 .cr2\)"
    ):
        load_tables("auto", tmp_path)
