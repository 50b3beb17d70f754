"""report.html: one evaluation as a web page, in one file that needs no network and runs no script.

Computes no scores, it only shows them. All text from outside is escaped, and only the pictures shown are loaded.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.pictures import decode_pillow
from scoring.metrics import tokenize
from utils import write_text

SHOWN = 12  # captions in each of the three groups
SEED = 0  # of the choice of random captions, and of the order of captions with equal scores
THUMBNAIL = 320  # longer side of a thumbnail, in pixels
LONGEST = 30  # longer captions, in words, share the histogram's last bar
MOST_POINTS = 300  # largest number of points of a curve; of a longer log every second, third, ... is drawn
DOTS = 15  # largest number of dots on a curve
FIRST = 4  # random captions that are not folded: one row on a screen, and not too long on a phone
BINS = 10  # largest number of groups by confidence
BIN = 5  # smallest number of captions in such a group
HALVES = {"What was evaluated", "Lengths", "Most common captions", "Most common words"}  # sections of half width


class Metric(NamedTuple):
    """How the page shows a metric."""

    label: str
    meaning: str = ""
    top: float | None = None  # value at which its bar ends; None for no bar
    digits: int = 4


METRICS = {
    "bleu_1": Metric("BLEU-1", "words that are also in the references", 1),
    "bleu_2": Metric("BLEU-2", "the same for sequences of up to 2 words", 1),
    "bleu_3": Metric("BLEU-3", "sequences of up to 3 words", 1),
    "bleu_4": Metric("BLEU-4", "sequences of up to 4 words", 1),
    "meteor": Metric("METEOR", "words that match, also by stem or synonym", 1),
    "rouge_l": Metric("ROUGE-L", "longest common sequence of words, gaps allowed", 1),
    "cider_d": Metric("CIDEr-D", "similarity to all references, where rare words count most; at most 10", 2),
    "spice": Metric("SPICE", "objects, attributes and relations in common", 1),
    "distinct_1": Metric("Distinct-1", "different words, divided by all words", 1),
    "distinct_2": Metric("Distinct-2", "different word pairs, divided by all words", 1),
    "vocabulary": Metric("Vocabulary", "number of different words", digits=0),
    "unique_captions": Metric("Unique captions", "different captions, divided by all captions", 1),
    "novel_captions": Metric("New captions", "share that is not among the training captions", 1),
    "self_cider": Metric("Self-CIDEr", "how much the captions of one picture differ; 0 where they are equal", 1),
    "mean_length": Metric("Mean length", "words per caption", digits=2),
    "cut_captions": Metric("Cut captions", "share cut off at the length limit; lower is better", 1),
    "loss": Metric("Loss", "nats per reference token; lower is better"),
    "loss_shuffled_pictures": Metric("Loss, pictures swapped", "with wrong pictures; must exceed the loss"),
    "confidence": Metric("Confidence", "geometric mean of the tokens' probabilities", 1),
    "pictures": Metric("Pictures", digits=0),
    "pictures_left_out": Metric("Pictures skipped", "missing or damaged", digits=0),
    "pictures_trained_on": Metric("Pictures trained on", "should be 0", digits=0),
    "chair_s": Metric("CHAIR-s", "share of captions that name an object which is not there; lower is better", 1),
    "chair_i": Metric("CHAIR-i", "share of named objects that are not there; lower is better", 1),
    "clip_score": Metric("CLIPScore", "similarity of caption and picture by CLIP", 2.5),
    "ref_clip_score": Metric("RefCLIPScore", "the same with references", 1),
    "clip_retrieval": Metric("CLIP R@1", "share of captions whose nearest picture is the right one", 1),
    "pac_score": Metric("PAC-S", "similarity of caption and picture, closer to human judgement", 2),
    "ref_pac_score": Metric("RefPAC-S", "the same with references", 1),
    "pac_retrieval": Metric("PAC-S R@1", "share of captions whose nearest picture is the right one", 1),
}


@dataclass(kw_only=True)
class Report:
    """Everything that the page shows about N pictures."""

    title: str  # the page's heading
    facts: dict[str, str]  # what was evaluated and how, in the order shown
    warnings: list[str]  # sentences shown before everything else
    metrics: dict[str, float]  # numbers of all pictures together, in the order shown
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap intervals of some of the metrics
    captions: list[str]  # N captions under test
    references: list[list[str]]  # references of each of the N pictures
    per_picture: dict[str, Sequence[float]]  # N values each; cider_d decides which captions are best and worst
    names: list[str]  # N ids or file names
    load: Callable[[int], Image.Image | None] | None  # picture i of 0 ... N - 1, or None where it is missing
    history: list[dict[str, Any]]  # lines of a run's metrics.jsonl, may be empty

    def __post_init__(self) -> None:
        lists: dict[str, Sequence[Any]] = {"references": self.references, "names": self.names, **self.per_picture}
        for name, values in lists.items():
            if len(values) != len(self.captions):
                raise ValueError(f"{name}: {len(values)} for {len(self.captions)} captions")


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically."""
    sections = {
        "Numbers": _numbers(report),
        "What was evaluated": _facts(report.facts),
        "Lengths": _lengths(report),
        "Training": _curves(report.history),
        "Calibration": _calibration(report),
        **_examples(report),
        "Most common captions": _common_captions(report.captions),
        "Most common words": _common_words(report),
    }
    links, body = [], []
    for number, (heading, content) in enumerate(sections.items()):
        if content:
            links.append(f'<li><a href="#s{number}">{heading}</a></li>')
            about = f'class="{"half" if heading in HALVES else "full"}" aria-labelledby="s{number}"'
            body.append(f'<section {about}><h2 id="s{number}">{heading}</h2>\n{content}</section>\n')
    page = {
        "STYLE": STYLE,
        "TITLE": _escape(report.title),
        "WARNINGS": _warnings(report.warnings),
        "LINKS": "".join(links),
        "BODY": "".join(body),
    }
    write_text(path, "".join(page.get(part, part) for part in PAGE.split("|")))


def _escape(text: object) -> str:
    """Escape text for HTML. What UTF-8 cannot encode (half a character in a file name) becomes "?"."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8").replace("\0", "?"))


def _caption(text: str) -> str:
    """A caption as HTML; it may be in any script, and may be empty."""
    return f'<span dir="auto">{_escape(text)}</span>' if text.strip() else '<span class="quiet">(nothing)</span>'


def _metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(_escape(name.replace("_", " ").capitalize()))


def _table(style: str, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; the first cell of each row is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = [
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>\n' for row in rows
    ]
    return (
        f'<table class="{style}"><caption>{caption}</caption>\n{f"<thead><tr>{top}</tr></thead>" if top else ""}'
        f"<tbody>{''.join(body)}</tbody></table>\n"
    )


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{_escape(text)}</li>" for text in warnings)
    heading = '<h2 id="warnings"><span aria-hidden="true">⚠ </span>Read this first</h2>'
    return f'<section class="warnings" aria-labelledby="warnings">{heading}<ul>{items}</ul></section>' if items else ""


def _numbers(report: Report) -> str:
    rows = []
    for name, value in report.metrics.items():
        metric, interval = _metric(name), report.intervals.get(name, ())
        digits = 0 if isinstance(value, int) else metric.digits
        between = " to ".join(f"{end:,.{digits}f}" for end in interval)
        label = f'{metric.label} <span class="note">{metric.meaning}</span>'
        rows.append((label, f"{value:,.{digits}f}", between, _bar(value, interval, metric.top)))
    about = "Each bar starts at 0, and its frame ends at the number to its right."
    if report.intervals:
        about += " The line in a bar is the 95 % bootstrap interval: how much the value may change with other pictures."
    head = ("Metric", "Value", "95 % interval", '<span class="hidden">Bar</span>')
    return _table("numbers", about, head, rows)


def _bar(value: float, interval: Sequence[float], top: float | None) -> str:
    """The value and its interval as a bar; hidden from screen readers, as the numbers are next to it."""
    if top is None or not all(map(math.isfinite, (value, *interval))):
        return ""
    if max(value, *interval, 0) > top:
        top = 10.0
    width, *ends = (f"{100 * min(max(x / top, 0), 1):.2f}" for x in (value, *interval))
    line = "M{0} 8H{1}M{0} 4V12M{1} 4V12".format(*ends) if ends else ""
    return (
        '<span class="bar" aria-hidden="true"><svg viewBox="0 0 100 16" preserveAspectRatio="none">'
        f'<rect class="fill" y="2" width="{width}" height="12"/><rect class="frame" y="2" width="100" height="12"/>'
        f'<path d="{line}"/></svg>{top:g}</span>'
    )


def _facts(facts: Mapping[str, str]) -> str:
    rows = [(_escape(name[:1].upper() + name[1:]), _escape(value)) for name, value in facts.items()]
    about = "Compare numbers only where all of this is equal, except for the model."
    return _table("facts", about, (), rows) if rows else ""


def _examples(report: Report) -> dict[str, str]:
    """The best and the worst captions, folded, and random ones. A picture can be in two groups, but is loaded once."""
    number, scores = len(report.captions), report.per_picture.get("cider_d")
    generator = np.random.default_rng(SEED)
    random = generator.permutation(number)[:SHOWN].tolist()
    groups = {"Random captions": ("Chosen at random from all captions.", random)}
    if scores is not None:
        shuffled = generator.permutation(number)  # or, of many zeros, the first files would be shown as the worst
        order = shuffled[np.argsort(np.asarray(scores)[shuffled], kind="stable")].tolist()
        best, worst = order[::-1][: min(SHOWN, -(-number // 2))], order[: min(SHOWN, number // 2)]
        groups = {
            "Best captions": ("Highest CIDEr-D; ties in random order.", best),
            "Worst captions": ("Lowest CIDEr-D; ties in random order.", worst),
        } | groups
    cards = {i: _card(report, i) for i in {i for _, chosen in groups.values() for i in chosen}}
    return {
        heading: f"<p>{about}</p>\n{_cards(cards, chosen, FIRST if heading == 'Random captions' else 0)}"
        for heading, (about, chosen) in groups.items()
        if chosen
    }


def _cards(cards: Mapping[int, str], chosen: Sequence[int], first: int) -> str:
    """The first of the chosen cards, with the others folded."""
    visible, others = (
        f'<ol class="cards">{"".join(cards[i] for i in some)}</ol>\n' if some else ""
        for some in (chosen[:first], chosen[first:])
    )
    return visible + (_folded(f"Show {len(chosen) - first}{' more' * bool(first)}", others) if others else "")


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n{content}</details>\n"


def _card(report: Report, i: int) -> str:
    references = "".join(f"<li>{_caption(text)}</li>" for text in report.references[i])
    scores = [
        f'<span class="whole">{_metric(name).label} {values[i]:.2f}</span>'
        for name, values in report.per_picture.items()
        if name not in ("bleu_1", "bleu_2", "bleu_3")
    ]
    return (
        f'<li>{_thumbnail(report, i)}<p class="note">{_escape(report.names[i])}</p>'
        f'<p class="said">{_caption(report.captions[i])}</p><p class="note">{" · ".join(scores)}</p>'
        f"{f'<p>References:</p><ul>{references}</ul>' if references else ''}</li>\n"
    )


def _thumbnail(report: Report, i: int) -> str:
    if report.load is None:
        return ""
    try:
        loaded = report.load(i)
        image = Image.fromarray(decode_pillow(loaded)) if loaded else None
    except Exception:  # Pillow raises many kinds, and one damaged picture must not lose the report of a long evaluation
        image = None
    if image is None:
        return '<p class="picture">No picture</p>'
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    data = base64.b64encode(content.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img class="picture" alt="Picture {_escape(report.names[i])}" {size} src="data:image/jpeg;base64,{data}">'


def _curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Charts over the step, all on the same x axis; those without values are skipped."""
    last = max((line.get("step", 0) for line in history), default=0)
    charts = []
    for title, names in (
        ("Loss (nats per token)", {"loss": "training", "val_loss": "validation"}),
        ("Contrastive loss", {"contrastive_loss": "training"}),
        ("CIDEr-D", {"reward": "training, sampled", "val_cider_d": "validation, greedy"}),
        ("Learning rate", {"learning_rate": "learning rate"}),
    ):
        lines = {}
        for name, label in names.items():
            points = [(line["step"], line[name]) for line in history if "step" in line and finite(line.get(name))]
            if points:  # counted from the end, so that the last point is always drawn
                lines[name, label] = points[:: -max(1, -(-len(points) // MOST_POINTS))][::-1]
        if not lines:
            continue
        most = max(value for points in lines.values() for _, value in points)
        chart = _Chart((0, last), loss_ends(history) if "loss" in names else (0, most), "step")
        spoken = []
        for (name, label), points in lines.items():
            chart.line(name, label, points, dots=name.startswith("val_"))
            ends = dict.fromkeys((points[0], points[-1]))  # only one where there is one point
            spoken.append(f"{label}: {', '.join(f'{value:.3g} at step {step:,}' for step, value in ends)}")
        charts.append(chart.html(title, "; ".join(spoken)))
    return f'<div class="charts">{"".join(charts)}</div>\n' if charts else ""


def loss_ends(history: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The ends of the loss axis. The high losses of the first steps are cut off at the top, and a margin keeps the
    noise of nearly equal losses small."""
    late = max((line.get("step", 0) for line in history), default=0) / 20
    pairs = [(name, line) for line in history for name in ("loss", "val_loss") if finite(line.get(name))]
    values = [line[name] for name, line in pairs if name == "val_loss" or line.get("step", 0) >= late] or [0, 1]
    margin = 0.1 * max(map(abs, values)) or 1
    return max(min(values) - margin, min(*values, 0)), max(values) + margin


def finite(value: object) -> bool:
    """Whether it is a finite number, which can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def _lengths(report: Report) -> str:
    """Histogram of the lengths of captions and references, as shares because there are more references."""
    both = {"captions": report.captions, "references": [*chain.from_iterable(report.references)]}
    words = {name: [len(tokenize(text)) for text in texts] for name, texts in both.items() if texts}
    if not words:
        return ""
    shares = {
        name: 100 * np.bincount(np.minimum(n, LONGEST), minlength=LONGEST + 1) / len(n) for name, n in words.items()
    }
    used = np.flatnonzero(np.sum([*shares.values()], axis=0))
    lengths = range(used[0], used[-1] + 1)
    most = max(share.max() for share in shares.values())
    chart = _Chart((lengths[0] - 0.6, lengths[-1] + 0.6), (0, most), "words in a caption", "%")
    for name, share in shares.items():
        if name == "captions":
            chart.bars(name, [(n, share[n]) for n in lengths])
        else:
            chart.line(name, name, [(n + side, share[n]) for n in lengths for side in (-0.5, 0.5)])
    spoken = "; ".join(f"{name}: {np.mean(n):.1f} words on average, {min(n)} to {max(n)}" for name, n in words.items())
    rows = [(f"{n}{' or more' * (n == LONGEST)}", *(f"{share[n]:.1f}%" for share in shares.values())) for n in lengths]
    table = _table("counts", "Share of each length", ("Words", *map(str.capitalize, words)), rows)
    return chart.html("Share of each length", spoken) + _folded("As a table", table)


def _calibration(report: Report) -> str:
    """Mean CIDEr-D of groups of captions with similar confidence, where there are confidences."""
    pairs = zip(*(report.per_picture.get(name, ()) for name in ("confidence", "cider_d")), strict=False)
    found = np.array(sorted(pair for pair in pairs if all(map(math.isfinite, pair))))  # (captions, 2)
    groups = np.array_split(found, min(BINS, max(1, len(found) // BIN)))
    if len(groups) < 2:
        return ""
    points = [(100 * sure, score) for sure, score in (group.mean(0).tolist() for group in groups)]
    ends = math.floor(points[0][0]), math.ceil(points[-1][0])
    chart = _Chart(ends, (0, max(score for _, score in points)), "confidence (%)")
    chart.line("val_cider_d", "captions", points, dots=True)
    spoken = [f"CIDEr-D {score:.2f} at a confidence of {sure:.0f}%" for sure, score in (points[0], points[-1])]
    if min(found.std(0)) > 0:
        spoken.append(f"correlation over all captions: {np.corrcoef(found.T)[0, 1]:.2f}")
    sides = [(100 * group[0, 0], 100 * group[-1, 0]) for group in groups]
    rows = [
        (f"{low:.1f} to {high:.1f}%", f"{len(group):,}", f"{score:.2f}")
        for (low, high), group, (_, score) in zip(sides, groups, points, strict=True)
    ]
    about = "Captions in groups by confidence. If the line rises, captions with more confidence are better."
    table = _table("counts", about, ("Confidence", "Captions", "CIDEr-D"), rows)
    return f'<div class="charts">{chart.html("CIDEr-D by confidence", "; ".join(spoken))}{table}</div>\n'


class _Chart:
    """An SVG chart with the page's colours. Marks differ in shape, not only in colour."""

    LEFT, RIGHT, TOP, BOTTOM = 56, 366, 10, 204
    FIELD = 'x="54" y="8" width="314" height="198" viewBox="54 8 314 198"'

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, unit: str = "") -> None:
        from matplotlib.ticker import MaxNLocator  # chooses round numbers

        ticks, whole = (MaxNLocator(5, steps=[1, 2, 5, 10], integer=integer) for integer in (False, True))
        self.y_ticks = [t for t in ticks.tick_values(*y) if t >= 0 or y[0] < 0]  # also works where y[0] == y[1]
        self.x_ends, self.y_ends = (x[0], max(x[1], x[0] + 1)), (self.y_ticks[0], self.y_ticks[-1])
        middle = (self.LEFT + self.RIGHT) / 2
        self.marks = [f'<text class="middle" x="{middle}" y="{self.BOTTOM + 33}">{x_label}</text>']
        for t in self.y_ticks:
            self.marks.append(f'<path class="grid" d="M{self.LEFT} {self._y(t):.1f}H{self.RIGHT}"/>')
            self.marks.append(f'<text class="end" x="{self.LEFT - 6}" y="{self._y(t) + 4:.1f}">{t:.6g}{unit}</text>')
        for t in whole.tick_values(*x):
            if x[0] <= t <= x[1]:
                self.marks.append(f'<text class="middle" x="{self._x(t):.1f}" y="{self.BOTTOM + 17}">{t:,.6g}</text>')
        self.keys: list[str] = []

    def _x(self, value: float) -> float:
        low, high = self.x_ends
        return self.LEFT + (value - low) / (high - low) * (self.RIGHT - self.LEFT)

    def _y(self, value: float) -> float:
        low, high = self.y_ends
        return self.BOTTOM - (value - low) / (high - low) * (self.BOTTOM - self.TOP)

    def line(self, style: str, label: str, points: Sequence[tuple[float, float]], dots: bool = False) -> None:
        """Draw a line. With dots, or with a single point, also dots: at the last point and some before it."""
        positions = [(f"{self._x(x):.1f}", f"{self._y(y):.1f}") for x, y in points]
        drawn = f'<polyline class="{style}" points="{" ".join(map(",".join, positions))}"/>'
        self.marks.append(f"<svg {self.FIELD}>{drawn}</svg>")  # cuts off what is above the chart
        dotted = positions[:: -(1 + len(positions) // DOTS)] if dots or len(positions) == 1 else []
        self.marks += [f'<circle class="{style}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in dotted]
        dot = f'<circle class="{style}" cx="14" cy="8" r="3.5"/>' * bool(dotted)
        self._key(label, f'<polyline class="{style}" points="1,8 27,8"/>{dot}')

    def bars(self, label: str, points: Sequence[tuple[float, float]]) -> None:
        """Draw a bar around each x."""
        width = 0.8 * (self._x(1) - self._x(0))
        for x, y in points:
            corner = f'x="{self._x(x) - width / 2:.1f}" y="{self._y(y):.1f}"'
            self.marks.append(f'<rect {corner} width="{width:.1f}" height="{self.BOTTOM - self._y(y):.1f}"/>')
        self._key(label, '<rect x="8" y="2" width="12" height="12"/>')

    def _key(self, label: str, mark: str) -> None:
        self.keys.append(f'<li><svg width="28" height="16" aria-hidden="true">{mark}</svg> {label}</li>')

    def html(self, title: str, spoken: str) -> str:
        """The chart with its title, a legend where it shows two things, and its content in words."""
        key = f"<ul>{''.join(self.keys)}</ul>" if len(self.keys) > 1 else ""
        return (
            f"<figure><figcaption><strong>{title}</strong>{key}</figcaption>"
            f'<svg class="chart" viewBox="0 0 392 240" role="img" aria-label="{title}. {spoken}">'
            f'{"".join(self.marks)}</svg><p class="note">{spoken[0].upper()}{spoken[1:]}.</p></figure>\n'
        )


def _common_captions(captions: Sequence[str]) -> str:
    """Captions that are equal word by word, by the number of pictures."""
    words = [tuple(tokenize(caption)) for caption in captions]
    written = dict(zip(words[::-1], captions[::-1], strict=True))  # the first of equal ones
    rows = [
        (_caption(written[key]), f"{times:,}", f"{times / len(words):.1%}")
        for key, times in Counter(words).most_common(SHOWN)
        if times > 1
    ]
    if not rows:
        return "<p>No two captions are the same.</p>\n" if captions else ""
    return _table("counts", "Captions of more than one picture.", ("Caption", "Pictures", "Share"), rows)


def _common_words(report: Report) -> str:
    both = report.captions, [*chain.from_iterable(report.references)]
    ours, theirs = (Counter(chain.from_iterable(map(tokenize, texts))) for texts in both)
    rows = [
        (_escape(word), f"{times:,}", f"{times / ours.total():.1%}", f"{theirs[word] / max(1, theirs.total()):.1%}")
        for word, times in ours.most_common(2 * SHOWN)
    ]
    about = f"The captions use {len(ours):,} different words, the references {len(theirs):,}."
    return _table("counts", about, ("Word", "Times", "Share", "In references"), rows) if rows else ""


# The page's content security policy is a second protection: even if some text is not escaped, browsers load and run
# nothing.
PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
