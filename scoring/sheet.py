"""samples.png: pictures in a grid, each with its caption and references, in any script that an installed font has."""

from __future__ import annotations

import contextlib
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from utils import atomic, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, SIDE, GAP = 4, 2.8, 0.3  # columns of the grid; a picture's side and the space around it, in inches
CAPTION, REFERENCE = 9.5, 8.0  # font sizes, in points
LINE, TALL = 1.35, 1.05  # height of a line and of "lp" (matplotlib's unit of line spacing), relative to the font size
REFERENCES = 2  # shown per picture
FONT = "DejaVu Sans"  # installed with matplotlib


def contact_sheet(
    path: Path, pictures: Sequence[Tensor], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Write pictures (uint8 (3, S, S)) in a grid, each with its caption and, in grey, two references, to a PNG file."""
    with atomic(path) as unfinished:
        draw_sheet(pictures, captions, references).savefig(unfinished, format="png", dpi=90)


def draw_sheet(pictures: Sequence[Tensor], captions: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """Draw the figure; each row is as high as its longest texts need."""
    from matplotlib.figure import Figure

    few = [list(known[:REFERENCES]) for known in references]
    bold = min((Letters(captions, weight) for weight in ("bold", "normal")), key=lambda letters: len(letters.missing))
    plain = Letters((text for known in few for text in known), "normal")
    titles = [bold.lines(caption, 32, 6) for caption in captions]
    others = [[line for text in known for line in plain.lines(text, 46, 4, "· ")] for known in few]
    below = [LINE * (CAPTION * len(a) + REFERENCE * len(b)) / 72 for a, b in zip(titles, others, strict=True)]
    starts = range(0, len(pictures), COLUMNS)
    heights = [SIDE + GAP + max(below[start : start + COLUMNS]) for start in starts]
    width, height = min(COLUMNS, len(pictures)) * (SIDE + GAP) + GAP, sum(heights) + GAP
    figure = Figure(figsize=(width, height))
    for i, picture in enumerate(pictures):
        left, top = GAP + (SIDE + GAP) * (i % COLUMNS), height - GAP - sum(heights[: i // COLUMNS])
        axis = figure.add_axes((left / width, (top - SIDE) / height, SIDE / width, SIDE / height))
        axis.axis("off")
        axis.imshow(picture.permute(1, 2, 0).numpy())
        for letters, lines, size, color, above in (
            (bold, titles[i], CAPTION, "black", 0.0),
            (plain, others[i], REFERENCE, "0.35", LINE * CAPTION * len(titles[i])),
        ):
            how: dict[str, Any] = {"family": letters.families, "weight": letters.weight, "size": size, "color": color}
            how |= {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "linespacing": LINE / TALL}
            axis.annotate("\n".join(lines), (0, 0), (0, -5 - above), parse_math=False, **how)  # "$" starts no formula
    return figure


class Letters:
    """The fonts that the given texts need, and the letters that no installed font has."""

    def __init__(self, texts: Iterable[str], weight: str) -> None:
        from matplotlib.font_manager import fontManager, get_font, weight_dict

        self.weight, self.families = weight, [FONT]
        self.missing = {letter for text in texts for letter in shown(text)}
        files = {  # of exactly this weight, or matplotlib warns; it takes the first font of a name, hence reversed
            font.name: font.fname
            for font in reversed(fontManager.ttflist)
            if font.weight in (weight, weight_dict[weight])
            and (font.style, font.stretch) == ("normal", "normal")
            and not font.name.startswith("Last Resort")  # it draws every letter as a box
        }
        for name in sorted(files, key=lambda name: (name != FONT, "Sans" not in name, name)):
            with contextlib.suppress(OSError, RuntimeError):  # a listed font may be deleted or damaged
                known = get_font(files[name]).get_charmap()
                if found := {letter for letter in self.missing if ord(letter) in known}:
                    self.families += [name] * (name != FONT)
                    self.missing -= found
            if not self.missing:
                break

    def lines(self, text: str, width: int, most: int, mark: str = "") -> list[str]:
        """Wrap a text into lines of at most `width` letters, where a wide letter (such as Chinese) counts as two."""
        text = self.readable(shown(text))
        room = len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
        width, indent = width * len(text) // room if room else width, " " * len(mark)
        cut: dict[str, Any] = {"max_lines": most, "placeholder": " …"}
        return textwrap.wrap(text, width, initial_indent=mark, subsequent_indent=indent, **cut) or [f"{mark}(nothing)"]

    def readable(self, text: str) -> str:
        """Replace each run of letters that no font has by one note, as they would be drawn as boxes."""
        if not self.missing:
            return text
        one = f"[{''.join(map(re.escape, sorted(self.missing)))}]"
        side_by_side = rf"{one}(?:[\s\u200c\u200d\ufe0f]*{one})*"
        return re.sub(side_by_side, lambda found: f"[no font: {script(found[0][0])}]", text)


def script(letter: str) -> str:
    """The name of a letter's script, such as DEVANAGARI or CJK, or emoji."""
    return "emoji" if unicodedata.category(letter) == "So" else unicodedata.name(letter, "unknown").split()[0]
