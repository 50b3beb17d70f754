"""What the web page looks like: its style, its script, and captions as HTML.

app.py serves it. Knows neither gradio nor models. Everything is in the page itself: no font, script or picture comes
from elsewhere. A word's heat map is a small square of bytes beside the word, which the script paints over the picture:
dark where the model did not look, light where it did, so that it reads without colour too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

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


def progress(done: int, total: int, said: str, rows: Sequence[tuple[str, Caption]], errors: Sequence[str]) -> str:
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
        f"<p>{_text(said)}</p>{table if rows else ''}{error_lines(errors)}</section>"
    )


def working(said: str) -> str:
    """A line while there is nothing else to see."""
    return f'<p class="working">{_text(said)}</p>'


def _text(text: str) -> str:
    """Escaped, and with nothing that gradio's templates would take for theirs."""
    return escape(text).replace("{", "&#123;").replace("$", "&#36;")


HEADER = """
<header class="top"><h1>Captions for pictures</h1>
<p>Drop pictures and see what the model says of them, and where it looked.</p></header>
"""
NO_MODEL = """
<p>There is no model here yet. The demo trains one in minutes: it draws scenes of coloured shapes and learns to describe
them. In a terminal the command is</p><p><code>python main.py --preset demo</code></p><p>and this button runs it.</p>
"""

# Names of gradio's theme; light and dark alike have enough contrast to read.
COLOURS = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "block_title_text_color": "*neutral_800",
    "block_title_text_color_dark": "*neutral_100",
    "block_label_text_color": "*neutral_700",
    "block_label_text_color_dark": "*neutral_200",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "checkbox_background_color_selected": "*primary_700",
    "checkbox_background_color_selected_dark": "*primary_600",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_hover_dark": "*primary_600",
    "button_primary_text_color": "white",
    "error_border_color": "#b91c1c",
    "error_border_color_dark": "#f87171",
}

# Only gradio's own variables for colours, so that dark and light are its theme's.
STYLE = """
.gradio-container { max-width: 62rem !important; margin: 0 auto !important; padding: 0 !important }
.gradio-container .main.app { padding: 1rem }
.gradio-container *:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 2px }
.html-container { padding: 0 !important }
header.top { margin: 1rem 0 .25rem }
header.top h1 { font-size: 1.75rem; font-weight: 650; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em }
header.top p, .note, .working, figcaption, .sure { color: var(--body-text-color-subdued); margin: 0 }
.note, figcaption, .sure { font-size: .9rem }
#untrained { padding: 1.25rem; border: 1px solid var(--border-color-primary); border-radius: .75rem;
  background: var(--block-background-fill) }
#untrained p { margin: 0 0 .6rem }
footer .divider { display: none }
.tab-container button { font-size: 1rem }
.tab-container button.selected { color: var(--body-text-color); font-weight: 600 }
#pictures, #folder { border-width: 2px }
#settings fieldset .wrap { gap: .4rem; flex-wrap: wrap }
#settings fieldset label { padding: .35rem .6rem; gap: 0 }
#settings fieldset > div:not(.wrap) { font-size: .9rem }
#address .submit-button { align-self: stretch; height: auto; margin: 0 0 0 .5rem; padding: 0 .9rem; border-radius: .3rem }
.card { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 1.25rem; margin: 0 0 1.25rem;
  padding: 1rem; border: 1px solid var(--border-color-primary); border-radius: .75rem;
  background: var(--block-background-fill) }
.card figure { margin: 0 }
.picture { position: relative; overflow: hidden; border-radius: .5rem; line-height: 0 }
.picture img { width: 100%; height: auto; margin: 0 }
.picture canvas { position: absolute; opacity: 0; transition: opacity .15s; box-shadow: 0 0 0 99rem rgba(8, 10, 30, .8) }
.picture.lit canvas { opacity: 1 }
.card figcaption { margin-top: .4rem; overflow-wrap: anywhere }
.card ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem }
.card li { margin: 0; padding: 0 }
.words { margin: 0 0 .1rem; font-size: 1.05rem; line-height: 1.7rem }
li:first-child .words { font-size: 1.35rem; line-height: 2rem }
.words button { font: inherit; color: inherit; background: none; border: 0; padding: 0 .15em; margin: 0 -.1em;
  min-height: 1.5rem; border-radius: .3em; cursor: pointer; text-decoration: underline dotted 1px;
  text-underline-offset: .3em; text-decoration-color: var(--neutral-400) }
.words button:hover, .words button.lit { background: var(--primary-700); color: white; text-decoration: none }
.sure { display: flex; align-items: center; gap: .5rem }
.bar { width: 6rem; height: .45rem; border-radius: 1rem; overflow: hidden; background: var(--border-color-primary) }
.bar span { display: block; height: 100%; background: var(--primary-600) }
.look { margin: 1rem 0 0; padding-top: .7rem; border-top: 1px solid var(--border-color-primary); min-height: 3.6rem;
  font-size: .95rem }
.problem { margin: 0 0 .75rem; padding: .6rem .9rem; border-left: 4px solid var(--error-border-color); font-size: 1rem;
  background: var(--error-background-fill); color: var(--body-text-color); border-radius: .3rem; overflow-wrap: anywhere }
.folder .bar { width: 100% }
.folder p { margin: .5rem 0 }
#results .folder :is(table, thead, tbody, tr) { border: 0 }
.folder table { width: 100%; border-collapse: collapse; font-size: .95rem; margin: .5rem 0 1rem; table-layout: fixed }
.folder th, .folder td { text-align: left; vertical-align: top; padding: .35rem .5rem; overflow-wrap: anywhere;
  border: 0; border-bottom: 1px solid var(--border-color-primary) }
.folder th:first-child { width: 30% }
.folder th:last-child { width: 4.2rem }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
@media (max-width: 40rem) {
  .card { grid-template-columns: minmax(0, 1fr); gap: .75rem; padding: .75rem }
  .look { min-height: 0 }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important } }
"""

# Of the results: the words of a caption are one stop of the Tab key; arrow keys go from word to word. What was clicked
# stays. New captions are brought into view, and told to screen readers.
WORDS = """
const LOW = [8, 10, 30, 204], HIGH = [255, 236, 150, 64];  // colour and opacity where the model did not look, and did
const idle = new WeakMap();
function show(word) {
  const card = word.closest('.card'), canvas = card.querySelector('canvas'), look = card.querySelector('.look');
  const heat = Uint8Array.from(atob(word.dataset.heat), (c) => c.charCodeAt(0)), side = Math.sqrt(heat.length);
  const picture = new ImageData(side, side);
  heat.forEach((h, i) => {  // a blend of the two as they would be seen: over any picture, more heat is more light
    const high = h / 255 * HIGH[3], low = (1 - h / 255) * LOW[3], opacity = low + high;
    picture.data.set([0, 1, 2].map((k) => (low * LOW[k] + high * HIGH[k]) / opacity).concat(opacity), 4 * i);
  });
  canvas.width = canvas.height = side;
  canvas.getContext('2d').putImageData(picture, 0, 0);
  card.querySelectorAll('.words .lit').forEach((other) => other.classList.remove('lit'));
  word.classList.add('lit');
  canvas.parentElement.classList.add('lit');
  if (!idle.has(card)) idle.set(card, look.textContent);
  look.textContent = `“${word.textContent}”${word.ariaLabel.slice(word.textContent.length)}.`;
}
function rest(card) {  // back to the word that was clicked, or to the bare picture
  const kept = card.querySelector('[aria-pressed=true]');
  if (kept) return show(kept);
  card.querySelectorAll('.lit').forEach((lit) => lit.classList.remove('lit'));
  if (idle.has(card)) card.querySelector('.look').textContent = idle.get(card);
}
const wordOf = (event) => event.target.closest?.('.words button');
for (const kind of ['mouseover', 'focusin'])
  element.addEventListener(kind, (event) => wordOf(event) && show(wordOf(event)));
for (const kind of ['mouseout', 'focusout'])
  element.addEventListener(kind, (event) => wordOf(event) && rest(wordOf(event).closest('.card')));
element.addEventListener('click', (event) => {
  const word = wordOf(event);
  if (!word) return;
  const kept = word.getAttribute('aria-pressed') === 'true';
  word.closest('.card').querySelectorAll('[aria-pressed=true]').forEach((w) => w.setAttribute('aria-pressed', false));
  word.setAttribute('aria-pressed', !kept);
  kept ? rest(word.closest('.card')) : show(word);
});
element.addEventListener('keydown', (event) => {
  const word = wordOf(event);
  if (!word) return;
  const words = [...word.parentElement.querySelectorAll('button')], at = words.indexOf(word);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: words.length - 1 }[event.key];
  if (event.key === 'Escape') {
    word.setAttribute('aria-pressed', false);
    word.blur();
  }
  if (!words[to]) return;
  event.preventDefault();
  word.tabIndex = -1;
  words[to].tabIndex = 0;
  words[to].focus();
});
const told = document.body.appendChild(document.createElement('p'));
told.className = 'unseen';
told.setAttribute('role', 'status');
watch('value', () => {
  const cards = [...element.querySelectorAll('.card')];
  told.textContent = cards.map((card) => `${card.ariaLabel}: ${card.querySelector('img').alt}`).join('. ');
  cards[0]?.scrollIntoView({ block: 'nearest' });
});
"""

# Of the page: what is pasted goes where dropped pictures go, and groups of choices have names, whenever they appear.
PAGE = """
const name = () => document.querySelectorAll('fieldset:not([aria-label])').forEach((group) =>
  group.setAttribute('aria-label', group.querySelector('[data-testid=block-info]').textContent.trim()));
new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
name();
document.addEventListener('paste', (event) => {
  const input = document.querySelector('#pictures input[type=file]');
  if (!input || !event.clipboardData?.files.length) return;
  input.files = event.clipboardData.files;
  input.dispatchEvent(new Event('change', { bubbles: true }));
  event.preventDefault();
});
"""
