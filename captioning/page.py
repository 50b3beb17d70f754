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
    from captioning.controls import Finish
    from captioning.pipeline import Caption

HEAT_SIDE = 24
"""Values along each side of a heat map that is sent to the page; the browser interpolates between them."""


MOST_ROWS = 200
"""Rows of a folder's table that are shown at the end."""
NOT_SURE = "not sure"


def card(name: str, picture: bytes, seen: float, captions: Sequence[Caption], finish: Finish) -> str:
    """HTML of a picture (a JPEG's bytes) with its captions; `seen` is the share of each side that the model sees. "not
    sure" stands where all captions are left out."""
    source = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    kept = [caption for caption in captions if not finish.leaves_out(caption)]
    rows = "".join(_row(caption, rank, finish) for rank, caption in enumerate(kept, 1)) or (
        f'<li><p class="words">{NOT_SURE}</p>{_sure(captions[0])}</li>'
    )
    alt = finish.caption(kept[0]).text if kept else NOT_SURE
    return (
        f'<article class="card" aria-label="{_text(name)}"><figure><div class="picture">'
        f'<img src="{source}" alt="{_text(alt)}">'
        f'<canvas aria-hidden="true" style="inset:{(1 - seen) / 2:.2%};width:{seen:.2%};height:{seen:.2%}"></canvas></div>'
        f'<figcaption>{_text(name)}</figcaption></figure><div class="said"><ol>{rows}</ol>'
        '<p class="look" role="status"></p></div></article>'
    )


def _row(caption: Caption, rank: int, finish: Finish) -> str:
    words = " ".join(
        _word(text, heat_map(attention), first=number == 0) for number, (text, attention) in enumerate(caption.words)
    )
    text = _text(finish.caption(caption).text)
    around = [f"<span>{_text(each)}</span>" if each else "" for each in (finish.prepend, finish.append)]
    copy = f'<button type="button" class="copy" data-text="{text}">Copy<span class="unseen"> caption {rank}</span></button>'
    return (
        f'<li><p class="words" role="group" aria-label="Caption {rank}: {text}">{words.join(around)}</p>'
        f"{_sure(caption, copy)}</li>"
    )


def _sure(caption: Caption, beside: str = "") -> str:
    return (
        f'<div class="sure"><span class="bar" aria-hidden="true"><span style="width:{percent(caption)}%"></span></span>'
        f"{percent(caption)} % sure{beside}</div>"
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
    """HTML of errors, one line each, then how to see where the model looked, cards, and what the percentages mean."""
    shown = "".join(cards)
    if not shown:
        return error_lines(errors)
    hint = (
        '<p class="note"><span class="mouse">Point at a word, or press Tab and the arrow keys:</span>'
        '<span class="touch">Tap a word:</span> the picture shows where the model looked.</p>'
    )
    note = (
        '<p class="note"><b>% sure</b> is the probability that the model gave to each of its words, on average over the '
        "caption. It says how certain the model was of its wording, not whether the caption is true.</p>"
    )
    return f"{error_lines(errors)}{hint}{shown}{note}"


def error_lines(errors: Iterable[str]) -> str:
    """HTML of errors, one line each."""
    return "".join(f'<p class="problem" role="alert">{_text(error)}</p>' for error in errors)


def progress(done: int, total: int, status: str, rows: Iterable[tuple[str, Caption]]) -> str:
    """HTML of a folder's progress, with its newest captions."""
    return (
        f'<section class="folder"><div class="bar" role="progressbar" aria-label="Pictures done" aria-valuemax="{total}" '
        f'aria-valuenow="{done}"><span style="width:{done / max(1, total):.1%}"></span></div>'
        f'<p>{_text(status)}</p><p class="note">The newest rows:</p>{_rows(rows)}</section>'
    )


def table(status: str, rows: Sequence[tuple[str, Caption]], total: int, errors: Sequence[str]) -> str:
    """HTML of a folder's result: its first rows in a box that scrolls, and the errors."""
    shown = f"{len(rows):,} of {total:,} rows are shown; all are in captions.csv"
    shown = shown if len(rows) < total else f"All {total:,} rows of captions.csv"
    box = (
        f'<p class="note">{shown}</p><div class="scroll" tabindex="0" role="region" aria-label="Captions">'
        f"{_rows(rows)}</div>"
    )
    lines = error_lines(errors)
    if len(errors) > 5:
        lines = f'<div class="scroll" tabindex="0" role="region" aria-label="Errors">{lines}</div>'
    return f'<section class="folder"><p role="status">{_text(status)}</p>{box if rows else ""}{lines}</section>'


def _rows(rows: Iterable[tuple[str, Caption]]) -> str:
    cells = "".join(
        f"<tr><td>{_text(name).replace('/', '/<wbr>')}</td><td>{_text(caption.text) or NOT_SURE}</td><td>{percent(caption)} %</td></tr>"
        for name, caption in rows
    )
    return f"<table><thead><tr><th>Picture</th><th>Caption</th><th>Sure</th></tr></thead><tbody>{cells}</tbody></table>"


def model_line(name: str, parameters: int) -> str:
    """HTML that says which model answers, and how large it is."""
    millions = parameters / 1e6
    size = f"{millions / 1e3:.1f} billion" if millions >= 1e3 else f"{millions:.{0 if millions >= 100 else 1}f} million"
    size = size if millions >= 0.1 else f"{parameters:,}"
    return f'<p class="model">Model: <b>{_text(name)}</b> · {size} parameters</p>'


def working(status: str) -> str:
    """HTML of a status line, while there is nothing else to show."""
    return f'<p class="working">{_text(status)}</p>'


def _text(text: str) -> str:
    """Escape a text for HTML and for gradio's templates."""
    return escape(text).replace("{", "&#123;").replace("$", "&#36;")


def _beside(ending: str) -> str:
    """Read the file beside this one that has the same name and this ending."""
    return Path(__file__).with_suffix(ending).read_text(encoding="utf-8")


FOLDER = '<p class="note">Every picture in the folder gets a caption. You get a CSV file of them.</p>'
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

# Script of a folder's table: it is scrolled into view when work on it begins and ends.
TABLE = """let there = '';
watch('value', () => {
  const now = element.querySelector('.scroll') ? 'end' : 'work';
  if (now !== there) element.scrollIntoView({ block: 'nearest' });
  there = now;
});"""

# Script of the page: pasted pictures are uploaded as dropped ones are; files of a folder keep their paths; fields have plain
# words, and groups of choices a name for screen readers, whenever they appear.
PAGE = _beside(".js")
