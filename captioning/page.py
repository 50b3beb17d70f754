"""What the web page looks like: captions as HTML, and the style, the scripts and the texts in the files beside this one.

app.py serves it. Knows neither gradio nor models. Everything is in the page itself: no font, script or picture comes
from elsewhere. A word's heat map is a small square of bytes beside the word, which the script paints over the picture:
dark where the model did not look, light where it did, so that it reads without colour too.
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
"""Numbers along each side of a heat map that is sent to the page; the browser smooths between them."""


def card(name: str, picture: bytes, seen: float, captions: Sequence[Caption]) -> str:
    """A picture (a JPEG's bytes) with its captions; `seen` is the share of each side that the model gets to see."""
    source = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    rows = "".join(_row(caption, place) for place, caption in enumerate(captions, 1))
    return (
        f'<article class="card" aria-label="{_text(name)}"><figure><div class="picture">'
        f'<img src="{source}" alt="{_text(captions[0].text)}">'
        f'<canvas aria-hidden="true" style="inset:{(1 - seen) / 2:.2%};width:{seen:.2%};height:{seen:.2%}"></canvas></div>'
        f'<figcaption>{_text(name)}</figcaption></figure><div class="said"><ol>{rows}</ol>'
        '<p class="look" role="status">Point at a word, or press Tab and the arrow keys: the picture shows where the '
        "model looked.</p></div></article>"
    )


def _row(caption: Caption, place: int) -> str:
    words = " ".join(
        _word(text, heat_map(seen), first=number == 0) for number, (text, seen) in enumerate(caption.words)
    )
    return (
        f'<li><p class="words" role="group" aria-label="Caption {place}: {_text(caption.text)}">{words}</p>'
        f'<p class="sure"><span class="bar" aria-hidden="true"><span style="width:{percent(caption)}%"></span></span>'
        f"{percent(caption)} % sure</p></li>"
    )


def _word(text: str, heat: NDArray[np.uint8], first: bool) -> str:
    said = f"{_text(text)}: looked most at the {place_of(heat)}"
    return (
        f'<button type="button" aria-pressed="false" tabindex="{0 if first else -1}" aria-label="{said}" '
        f'data-heat="{base64.b64encode(heat.tobytes()).decode()}">{_text(text)}</button>'
    )


def percent(caption: Caption) -> int:
    """A caption's confidence."""
    assert caption.score is not None
    return round(100 * caption.score)


def heat_map(seen: NDArray) -> NDArray[np.uint8]:
    """How much the model looked at each patch (rows, columns) -> (HEAT_SIDE, HEAT_SIDE), 255 where most, and 0 where it
    looked no more than at the half of the patches that it looked at least."""
    import torch
    from torch.nn.functional import interpolate

    least, most = np.median(seen), seen.max()
    heat = torch.from_numpy((seen - least) / max(most - least, 1e-12)).float().clamp(0, 1)
    heat = interpolate(heat[None, None], (HEAT_SIDE, HEAT_SIDE), mode="bicubic")[0, 0].clamp(0, 1)
    return (255 * heat).round().to(torch.uint8).numpy()


def place_of(heat: NDArray[np.uint8]) -> str:
    """In which ninth of the picture its lightest place is, in words."""
    row, column = (int(place) * 3 // HEAT_SIDE for place in np.unravel_index(heat.argmax(), heat.shape))
    return f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "middle"


def results(cards: Iterable[str], errors: Iterable[str] = ()) -> str:
    """Cards, below what went wrong, one line each; and what the numbers mean."""
    shown = "".join(cards)
    note = (
        '<p class="note"><b>% sure</b> is the probability that the model gave to each of its words, on average over the '
        "caption. It says how certain the model was of its wording, not whether the caption is true.</p>"
    )
    return f"{error_lines(errors)}{shown}{note if shown else ''}"


def error_lines(errors: Iterable[str]) -> str:
    """One line each."""
    return "".join(f'<p class="problem" role="alert">{_text(error)}</p>' for error in errors)


def progress(done: int, total: int, said: str, rows: Iterable[tuple[str, Caption]], errors: Sequence[str]) -> str:
    """How far a folder is, its newest captions, and the pictures that could not be captioned."""
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
        f"<p>{_text(said)}</p>{table if cells else ''}{error_lines(errors)}</section>"
    )


def working(said: str) -> str:
    """A line while there is nothing else to see."""
    return f'<p class="working">{_text(said)}</p>'


def _text(text: str) -> str:
    """Escaped, and with nothing that gradio's templates would take for theirs."""
    return escape(text).replace("{", "&#123;").replace("$", "&#36;")


def _beside(ending: str) -> str:
    """The text of the file beside this one that has its name and this ending."""
    return Path(__file__).with_suffix(ending).read_text(encoding="utf-8")


HEADER, NO_MODEL = _beside(".header.html"), _beside(".untrained.html")

# By gradio's names, light and dark: both have enough contrast to read.
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

# Only gradio's own variables for colours, so that dark and light are its theme's.
STYLE = _beside(".css")

# Of the results: the words of a caption are one stop of the Tab key; arrow keys go from word to word. What was clicked
# stays. New captions are brought into view, and told to screen readers.
WORDS = _beside(".words.js")

# Of the page: what is pasted goes where dropped pictures go, and groups of choices have names, whenever they appear.
PAGE = _beside(".js")
