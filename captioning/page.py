"""Content of the web page: captions as HTML, and the style, scripts and texts in the files beside this one.

app.py serves it. Knows neither gradio nor models. The page is self-contained: no font, script or picture comes from
another server. A word's heat map is a small square of bytes in the word's button, which the script paints over the
picture: dark where attention is low, light where it is high, so that it can be read without colour too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from captioning.pipeline import Caption

HEAT_SIDE = 24
"""Values along each side of a heat map that is sent to the page; the browser interpolates between them."""


def card(name: str, picture: bytes, seen: float, captions: Sequence[Caption]) -> str:
    """HTML of a picture (a JPEG's bytes) with its captions; `seen` is the share of each side that the model sees."""
    source = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    rows = "".join(_row(caption, rank) for rank, caption in enumerate(captions, 1))
    return (
        f'<article class="card" aria-label="{_text(name)}"><figure><div class="picture">'
        f'<img src="{source}" alt="{_text(captions[0].text)}">'
        f'<canvas aria-hidden="true" style="inset:{(1 - seen) / 2:.2%};width:{seen:.2%};height:{seen:.2%}"></canvas></div>'
        f'<figcaption>{_text(name)}</figcaption></figure><div class="said"><ol>{rows}</ol>'
        '<p class="look" role="status">Point at a word, or press Tab and the arrow keys: the picture shows where the '
        "model looked.</p></div></article>"
    )


def _row(caption: Caption, rank: int) -> str:
    words = " ".join(
        _word(text, heat_map(attention), first=number == 0) for number, (text, attention) in enumerate(caption.words)
    )
    return (
        f'<li><p class="words" role="group" aria-label="Caption {rank}: {_text(caption.text)}">{words}</p>'
        f'<p class="sure"><span class="bar" aria-hidden="true"><span style="width:{percent(caption)}%"></span></span>'
        f"{percent(caption)} % sure</p></li>"
    )


def _word(text: str, heat: NDArray[np.uint8], first: bool) -> str:
    label = f"{_text(text)}: looked most at the {place_of(heat)}"
    return (
        f'<button type="button" aria-pressed="false" tabindex="{0 if first else -1}" aria-label="{label}" '
        f'data-heat="{base64.b64encode(heat.tobytes()).decode()}">{_text(text)}</button>'
    )


def percent(caption: Caption) -> int:
    """A caption's confidence, 0 to 100."""
    assert caption.score is not None
    return round(100 * caption.score)


def heat_map(attention: NDArray) -> NDArray[np.uint8]:
    """Attention by patch (rows, columns) -> uint8 (HEAT_SIDE, HEAT_SIDE): 255 at the maximum, 0 up to the median."""
    import torch
    from torch.nn.functional import interpolate

    least, most = np.median(attention), attention.max()
    heat = torch.from_numpy((attention - least) / max(most - least, 1e-12)).float().clamp(0, 1)
    heat = interpolate(heat[None, None], (HEAT_SIDE, HEAT_SIDE), mode="bicubic")[0, 0].clamp(0, 1)
    return (255 * heat).round().to(torch.uint8).numpy()


def place_of(heat: NDArray[np.uint8]) -> str:
    """The ninth of the picture with the highest value, in words such as "top left"."""
    row, column = (int(index) * 3 // HEAT_SIDE for index in np.unravel_index(heat.argmax(), heat.shape))
    return f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "middle"


def results(cards: Iterable[str], errors: Iterable[str] = ()) -> str:
    """HTML of errors, one line each, then cards, and a note on what the percentages mean."""
    shown = "".join(cards)
    note = (
        '<p class="note"><b>% sure</b> is the probability that the model gave to each of its words, on average over the '
        "caption. It says how certain the model was of its wording, not whether the caption is true.</p>"
    )
    return f"{error_lines(errors)}{shown}{note if shown else ''}"


def error_lines(errors: Iterable[str]) -> str:
    """HTML of errors, one line each."""
    return "".join(f'<p class="problem" role="alert">{_text(error)}</p>' for error in errors)


def progress(done: int, total: int, status: str, rows: Iterable[tuple[str, Caption]], errors: Sequence[str]) -> str:
    """HTML of a folder's progress: its newest captions, and errors of pictures that could not be captioned."""
    cells = "".join(
        f"<tr><td>{_text(name)}</td><td>{_text(caption.text)}</td><td>{percent(caption)} %</td></tr>"
        for name, caption in rows
    )
    table = (
        f"<table><thead><tr><th>Picture</th><th>Caption</th><th>Sure</th></tr></thead><tbody>{cells}</tbody></table>"
    )
    return (
        f'<section class="folder"><div class="bar" role="progressbar" aria-label="Pictures done" aria-valuemax="{total}" '
        f'aria-valuenow="{done}"><span style="width:{done / max(1, total):.1%}"></span></div>'
        f"<p>{_text(status)}</p>{table if cells else ''}{error_lines(errors)}</section>"
    )


def working(status: str) -> str:
    """HTML of a status line, while there is nothing else to show."""
    return f'<p class="working">{_text(status)}</p>'


def _text(text: str) -> str:
    """Escape a text for HTML and for gradio's templates."""
    return escape(text).replace("{", "&#123;").replace("$", "&#36;")


def _beside(ending: str) -> str:
    """Read the file beside this one that has the same name and this ending."""
    return Path(__file__).with_suffix(ending).read_text(encoding="utf-8")


HEADER, NO_MODEL = _beside(".header.html"), _beside(".untrained.html")

# Colours by gradio's names, for light and dark themes: both have enough contrast to read.
LIGHT_AND_DARK = {
    "body_text_color_subdued": ("*neutral_600", "*neutral_300"),
    "block_info_text_color": ("*neutral_600", "*neutral_300"),
    "block_title_text_color": ("*neutral_800", "*neutral_100"),
    "block_label_text_color": ("*neutral_700", "*neutral_200"),
    "input_placeholder_color": ("*neutral_500", "*neutral_400"),
    "checkbox_background_color_selected": ("*primary_700", "*primary_600"),
    "button_primary_background_fill": ("*primary_700", "*primary_700"),
    "button_primary_background_fill_hover": ("*primary_800", "*primary_600"),
    "error_border_color": ("#b91c1c", "#f87171"),
}
COLOURS = {name: light for name, (light, _) in LIGHT_AND_DARK.items()} | {"button_primary_text_color": "white"}
COLOURS |= {f"{name}_dark": dark for name, (_, dark) in LIGHT_AND_DARK.items()}

# Uses only gradio's variables for colours, so that it follows gradio's light and dark themes.
STYLE = _beside(".css")

# Script of the results: the words of a caption are one stop of the Tab key; arrow keys go from word to word. A clicked
# word stays selected. New captions are scrolled into view, and announced to screen readers.
WORDS = _beside(".words.js")

# Script of the page: pasted pictures are uploaded as dropped ones are; groups of choices get a name for screen readers
# whenever they appear.
PAGE = _beside(".js")
