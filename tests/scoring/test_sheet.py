"""sheet.py: texts of any length and script are read below the pictures, or a word says what is lacking."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING

import pytest
import torch

from scoring.sheet import COLUMNS, FONT, Letters, contact_sheet, draw_sheet

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

PICTURE = torch.zeros(3, 8, 8, dtype=torch.uint8)
LONG = "a long reference with many words, all of which a reader wants to see below the picture"
SCRIPTS = [
    "एक कुत्ता दौड़ता है",
    "一只狗在草地上",
    "كلب يجري",
    "a dog 🐕🐕 👩\u200d🍳 runs",
    "x" * 500,
    "",
    "half \ud83d",
    "$$ \\x",
]


@pytest.fixture
def one_font(monkeypatch):
    """A machine with no font but matplotlib's own."""
    from matplotlib.font_manager import fontManager

    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if font.name == FONT])


def texts(figure: Figure) -> list[list[str]]:
    """Caption and references of each picture."""
    return [[text.get_text() for text in axis.texts] for axis in figure.axes]


def canvas(figure: Figure) -> FigureCanvasAgg:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return FigureCanvasAgg(figure)


def drawn(*arguments) -> Figure:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_sheet(*arguments)
        canvas(figure).draw()
    return figure


def test_references_are_wrapped():
    """They ended in the middle."""
    (_, below), (_, other) = texts(drawn([PICTURE] * 2, ["a dog"] * 2, [[LONG, "b", "not shown"], []]))
    lines = below.split("\n")
    assert len(lines) == 4 and lines[3] == "· b" and other == ""
    assert " ".join(" ".join(lines[:3]).split()) == f"· {LONG}"


def test_rows_are_as_high_as_their_texts():
    captions, references = ["a dog"] * 6, [["b"]] * 5 + [[LONG * 9] * 2]
    captions[1] = LONG * 9
    figure = drawn([PICTURE] * 6, captions, references)
    assert len({round(axis.get_position().y0, 6) for axis in figure.axes}) == 2
    renderer = canvas(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for axis in figure.axes for text in axis.texts]
    below = [axis.get_window_extent(renderer) for axis in figure.axes[COLUMNS:]]
    assert not any(box.overlaps(picture) for box in boxes for picture in below)
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[i + 1 :])
    assert min(box.y0 for box in boxes) > 0 and max(box.x1 for box in boxes) <= figure.bbox.x1


def test_a_word_stands_for_letters_that_no_font_has(one_font, tmp_path, recwarn, capfd, caplog):
    """They were rows of boxes, with a warning for each."""
    contact_sheet(tmp_path / "s.png", [PICTURE] * 8, SCRIPTS, [[text] for text in SCRIPTS])
    assert not recwarn.list and not caplog.records and capfd.readouterr() == ("", "")
    captions = [caption for caption, _ in texts(drawn([PICTURE] * 8, SCRIPTS, [[]] * 8))]
    assert captions[:2] == ["[no font: DEVANAGARI]", "[no font: CJK]"] and captions[2] == SCRIPTS[2]
    assert captions[3] == "a dog [no font: emoji] runs"  # one word for all that stand side by side
    assert captions[5] == "(nothing)" and captions[6] == "half \\ud83d"


def test_a_font_that_has_the_letters_is_taken(monkeypatch):
    """The first is gone, and the one of boxes for everything does not count."""
    from matplotlib.font_manager import fontManager

    font = {font.name: font for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)}
    gone = dataclasses.replace(font[FONT], name="A Sans", fname="/gone.ttf")
    boxes = [font for font in fontManager.ttflist if font.name.startswith("Last Resort")]
    monkeypatch.setattr(fontManager, "ttflist", [*boxes, gone, font["STIXGeneral"], font[FONT]])
    letters = Letters(["a ᶁ 狗"], "normal")
    assert letters.families == [FONT, "STIXGeneral"] and letters.missing == {"狗"}
