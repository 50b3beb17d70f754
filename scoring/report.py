"""report.html: one evaluation on one page for people, in one file that needs no network and runs no script.

Never scores anything: it shows what it is given. All text from outside is escaped, and of the pictures only those shown
are loaded.
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
SEED = 0  # of the random captions, and of the order among captions of one score
THUMBNAIL = 320  # longer side of a thumbnail, in pixels
LONGEST = 30  # captions of more words share the histogram's last bar
MOST_POINTS = 300  # points of a curve; of a longer log every second, third, ... is drawn
DOTS = 15  # of a curve at most
FIRST = 4  # random captions that are not folded: a row on a screen, and not too long on a telephone
BINS = 10  # of the captions by confidence, of BIN captions at least
BIN = 5
HALVES = {"What was evaluated", "Lengths", "Most common captions", "Most common words"}  # two of them in a row


class Metric(NamedTuple):
    """How people read a metric."""

    label: str
    meaning: str = ""
    top: float | None = None  # where its bar ends; no bar without
    digits: int = 4


METRICS = {
    "bleu_1": Metric("BLEU-1", "words that references have too", 1),
    "bleu_2": Metric("BLEU-2", "the same for runs of up to 2 words", 1),
    "bleu_3": Metric("BLEU-3", "runs of up to 3 words", 1),
    "bleu_4": Metric("BLEU-4", "runs of up to 4 words", 1),
    "meteor": Metric("METEOR", "words matched by stem and synonym too", 1),
    "rouge_l": Metric("ROUGE-L", "longest run of words in common, gaps allowed", 1),
    "cider_d": Metric("CIDEr-D", "likeness to all references, where rare words count most; at most 10", 2),
    "spice": Metric("SPICE", "objects, attributes and relations in common", 1),
    "distinct_1": Metric("Distinct-1", "different words, over all words", 1),
    "distinct_2": Metric("Distinct-2", "different word pairs, over all words", 1),
    "vocabulary": Metric("Vocabulary", "how many words differ", digits=0),
    "unique_captions": Metric("Unique captions", "different captions, over all captions", 1),
    "novel_captions": Metric("New captions", "share that is not among the training captions", 1),
    "self_cider": Metric("Self-CIDEr", "how much the captions of one picture differ; 0 where they are equal", 1),
    "mean_length": Metric("Mean length", "words a caption", digits=2),
    "cut_captions": Metric("Cut captions", "share that never ended; lower is better", 1),
    "loss": Metric("Loss", "nats a reference token; lower is better"),
    "loss_shuffled_pictures": Metric("Loss, pictures swapped", "with each other's pictures; must exceed the loss"),
    "confidence": Metric("Confidence", "geometric mean of the tokens' probabilities", 1),
    "pictures": Metric("Pictures", digits=0),
    "pictures_left_out": Metric("Pictures left out", "missing or damaged", digits=0),
    "pictures_trained_on": Metric("Pictures trained on", "should be none", digits=0),
    "chair_s": Metric("CHAIR-s", "share of captions that name an object which is not there; lower is better", 1),
    "chair_i": Metric("CHAIR-i", "share of named objects that are not there; lower is better", 1),
    "clip_score": Metric("CLIPScore", "likeness of caption and picture by CLIP", 2.5),
    "ref_clip_score": Metric("RefCLIPScore", "the same with references", 1),
    "clip_retrieval": Metric("CLIP R@1", "share of captions whose own picture is nearest to them", 1),
    "pac_score": Metric("PAC-S", "likeness of caption and picture, as people judge it", 2),
    "ref_pac_score": Metric("RefPAC-S", "the same with references", 1),
    "pac_retrieval": Metric("PAC-S R@1", "share of captions whose own picture is nearest to them", 1),
}


@dataclass(kw_only=True)
class Report:
    """All that the page says of N pictures."""

    title: str  # the page's heading
    facts: dict[str, str]  # what was evaluated and how, in the order shown
    warnings: list[str]  # sentences that stand before everything else
    metrics: dict[str, float]  # numbers of the whole set, in the order shown
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap intervals of some of the metrics
    captions: list[str]  # N captions under test
    references: list[list[str]]  # what people wrote for each of the N pictures
    per_picture: dict[str, Sequence[float]]  # N values each; cider_d says which captions are best and worst
    names: list[str]  # N ids or file names
    load: Callable[[int], Image.Image | None] | None  # the picture of a number 0 ... N - 1, or None where there is none
    history: list[dict[str, Any]]  # lines of a run's metrics.jsonl, or none

    def __post_init__(self) -> None:
        lists: dict[str, Sequence[Any]] = {"references": self.references, "names": self.names, **self.per_picture}
        for name, values in lists.items():
            if len(values) != len(self.captions):
                raise ValueError(f"{name}: {len(values)} for {len(self.captions)} captions")


def write_report(path: Path, report: Report) -> None:
    """Writes the page, all of it or nothing."""
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
    """Text for any place in the page. What UTF-8 cannot hold (half a character in a file's name) becomes "?"."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8").replace("\0", "?"))


def _said(text: str) -> str:
    """A caption, which may be in any script, and may be nothing at all."""
    return f'<span dir="auto">{_escape(text)}</span>' if text.strip() else '<span class="quiet">(nothing)</span>'


def _metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(_escape(name.replace("_", " ").capitalize()))


def _table(style: str, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells; the first of each row is its header."""
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
        about += " The line in a bar is the 95 % bootstrap interval: how far other pictures might have moved the value."
    head = ("Metric", "Value", "95 % interval", '<span class="hidden">Bar</span>')
    return _table("numbers", about, head, rows)


def _bar(value: float, interval: Sequence[float], top: float | None) -> str:
    """The value and its interval as a picture, for the eye only: the numbers stand beside it."""
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
    about = "Only numbers that share all of this, the model aside, can be compared."
    return _table("facts", about, (), rows) if rows else ""


def _examples(report: Report) -> dict[str, str]:
    """The best and the worst captions, folded, and random ones. A picture may be in two groups, but is loaded once."""
    number, scores = len(report.captions), report.per_picture.get("cider_d")
    generator = np.random.default_rng(SEED)
    random = generator.permutation(number)[:SHOWN].tolist()
    groups = {"Random captions": ("Chosen by chance among all.", random)}
    if scores is not None:
        shuffled = generator.permutation(number)  # or the first files would be the worst among many zeros
        order = shuffled[np.argsort(np.asarray(scores)[shuffled], kind="stable")].tolist()
        best, worst = order[::-1][: min(SHOWN, -(-number // 2))], order[: min(SHOWN, number // 2)]
        groups = {
            "Best captions": ("Highest CIDEr-D; of equal ones by chance.", best),
            "Worst captions": ("Lowest CIDEr-D; of equal ones by chance.", worst),
        } | groups
    cards = {i: _card(report, i) for i in {i for _, chosen in groups.values() for i in chosen}}
    return {
        heading: f"<p>{about}</p>\n{_cards(cards, chosen, FIRST if heading == 'Random captions' else 0)}"
        for heading, (about, chosen) in groups.items()
        if chosen
    }


def _cards(cards: Mapping[int, str], chosen: Sequence[int], first: int) -> str:
    """The first of the chosen cards, and the others folded."""
    seen, others = (
        f'<ol class="cards">{"".join(cards[i] for i in some)}</ol>\n' if some else ""
        for some in (chosen[:first], chosen[first:])
    )
    return seen + (_folded(f"Show {len(chosen) - first}{' more' * bool(first)}", others) if others else "")


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n{content}</details>\n"


def _card(report: Report, i: int) -> str:
    references = "".join(f"<li>{_said(text)}</li>" for text in report.references[i])
    scores = [
        f'<span class="whole">{_metric(name).label} {values[i]:.2f}</span>'
        for name, values in report.per_picture.items()
        if name not in ("bleu_1", "bleu_2", "bleu_3")
    ]
    return (
        f'<li>{_thumbnail(report, i)}<p class="note">{_escape(report.names[i])}</p>'
        f'<p class="said">{_said(report.captions[i])}</p><p class="note">{" · ".join(scores)}</p>'
        f"{f'<p>People wrote:</p><ul>{references}</ul>' if references else ''}</li>\n"
    )


def _thumbnail(report: Report, i: int) -> str:
    if report.load is None:
        return ""
    try:
        loaded = report.load(i)
        image = Image.fromarray(decode_pillow(loaded)) if loaded else None
    except Exception:  # Pillow raises a dozen kinds, and one bad picture must not cost a long evaluation its report
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
    """Charts against the step, all on one scale; those without a value are left out."""
    last = max((line.get("step", 0) for line in history), default=0)
    charts = []
    for title, names in (
        ("Loss (nats a token)", {"loss": "training", "val_loss": "validation"}),
        ("CIDEr-D", {"reward": "training, sampled", "val_cider_d": "validation, greedy"}),
        ("Learning rate", {"learning_rate": "learning rate"}),
    ):
        lines = {}
        for name, label in names.items():
            points = [(line["step"], line[name]) for line in history if "step" in line and finite(line.get(name))]
            if points:  # counted from the end, for the last one has to be seen
                lines[name, label] = points[:: -max(1, -(-len(points) // MOST_POINTS))][::-1]
        if not lines:
            continue
        most = max(value for points in lines.values() for _, value in points)
        chart = _Chart((0, last), loss_ends(history) if "loss" in names else (0, most), "step")
        spoken = []
        for (name, label), points in lines.items():
            chart.line(name, label, points, dots=name.startswith("val_"))
            ends = dict.fromkeys((points[0], points[-1]))  # one where there is one point
            spoken.append(f"{label}: {', '.join(f'{value:.3g} at step {step:,}' for step, value in ends)}")
        charts.append(chart.html(title, "; ".join(spoken)))
    return f'<div class="charts">{"".join(charts)}</div>\n' if charts else ""


def loss_ends(history: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Where the axis of the losses begins and ends: the first steps of training leave it at the top, and equal losses
    do not fill it with their noise."""
    late = max((line.get("step", 0) for line in history), default=0) / 20
    pairs = [(name, line) for line in history for name in ("loss", "val_loss") if finite(line.get(name))]
    values = [line[name] for name, line in pairs if name == "val_loss" or line.get("step", 0) >= late] or [0, 1]
    margin = 0.1 * max(map(abs, values)) or 1
    return max(min(values) - margin, min(*values, 0)), max(values) + margin


def finite(value: object) -> bool:
    """Whether it is a number, and one that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def _lengths(report: Report) -> str:
    """Histogram of the captions' lengths beside the references', as shares, for there are more references."""
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
    """Mean CIDEr-D of groups of captions of about one confidence, where there are confidences."""
    pairs = zip(*(report.per_picture.get(name, ()) for name in ("confidence", "cider_d")), strict=False)
    found = np.array(sorted(pair for pair in pairs if all(map(math.isfinite, pair))))  # (captions, 2)
    groups = np.array_split(found, min(BINS, max(1, len(found) // BIN)))
    if len(groups) < 2:
        return ""
    points = [(100 * sure, score) for sure, score in (group.mean(0).tolist() for group in groups)]
    ends = math.floor(points[0][0]), math.ceil(points[-1][0])
    chart = _Chart(ends, (0, max(score for _, score in points)), "confidence (%)")
    chart.line("val_cider_d", "captions", points, dots=True)
    said = [f"CIDEr-D {score:.2f} at a confidence of {sure:.0f}%" for sure, score in (points[0], points[-1])]
    if min(found.std(0)) > 0:
        said.append(f"correlation over all captions: {np.corrcoef(found.T)[0, 1]:.2f}")
    sides = [(100 * group[0, 0], 100 * group[-1, 0]) for group in groups]
    rows = [
        (f"{low:.1f} to {high:.1f}%", f"{len(group):,}", f"{score:.2f}")
        for (low, high), group, (_, score) in zip(sides, groups, points, strict=True)
    ]
    about = "Captions in groups by confidence. A line that rises: where the model is surer, it is better."
    table = _table("counts", about, ("Confidence", "Captions", "CIDEr-D"), rows)
    return f'<div class="charts">{chart.html("CIDEr-D by confidence", "; ".join(said))}{table}</div>\n'


class _Chart:
    """A chart in SVG, which takes its colours from the page. Marks differ in shape, not in colour alone."""

    LEFT, RIGHT, TOP, BOTTOM = 56, 366, 10, 204
    FIELD = 'x="54" y="8" width="314" height="198" viewBox="54 8 314 198"'

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str, unit: str = "") -> None:
        from matplotlib.ticker import MaxNLocator  # chooses round numbers

        ticks, whole = (MaxNLocator(5, steps=[1, 2, 5, 10], integer=integer) for integer in (False, True))
        self.y_ticks = [t for t in ticks.tick_values(*y) if t >= 0 or y[0] < 0]  # equal values have ticks around them
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
        """A line, where asked for with dots: at the last point and others, or at the only one."""
        places = [(f"{self._x(x):.1f}", f"{self._y(y):.1f}") for x, y in points]
        drawn = f'<polyline class="{style}" points="{" ".join(map(",".join, places))}"/>'
        self.marks.append(f"<svg {self.FIELD}>{drawn}</svg>")  # cuts off what is above the field
        dotted = places[:: -(1 + len(places) // DOTS)] if dots or len(places) == 1 else []
        self.marks += [f'<circle class="{style}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in dotted]
        dot = f'<circle class="{style}" cx="14" cy="8" r="3.5"/>' * bool(dotted)
        self._key(label, f'<polyline class="{style}" points="1,8 27,8"/>{dot}')

    def bars(self, label: str, points: Sequence[tuple[float, float]]) -> None:
        """A bar around each x."""
        width = 0.8 * (self._x(1) - self._x(0))
        for x, y in points:
            place = f'x="{self._x(x) - width / 2:.1f}" y="{self._y(y):.1f}"'
            self.marks.append(f'<rect {place} width="{width:.1f}" height="{self.BOTTOM - self._y(y):.1f}"/>')
        self._key(label, '<rect x="8" y="2" width="12" height="12"/>')

    def _key(self, label: str, mark: str) -> None:
        self.keys.append(f'<li><svg width="28" height="16" aria-hidden="true">{mark}</svg> {label}</li>')

    def html(self, title: str, spoken: str) -> str:
        """The chart with its title, its key where it shows two things, and what it shows in words."""
        key = f"<ul>{''.join(self.keys)}</ul>" if len(self.keys) > 1 else ""
        return (
            f"<figure><figcaption><strong>{title}</strong>{key}</figcaption>"
            f'<svg class="chart" viewBox="0 0 392 240" role="img" aria-label="{title}. {spoken}">'
            f'{"".join(self.marks)}</svg><p class="note">{spoken[0].upper()}{spoken[1:]}.</p></figure>\n'
        )


def _common_captions(captions: Sequence[str]) -> str:
    """Captions that are equal as words, by how often they were given."""
    words = [tuple(tokenize(caption)) for caption in captions]
    written = dict(zip(words[::-1], captions[::-1], strict=True))  # the first of equal ones
    rows = [
        (_said(written[key]), f"{times:,}", f"{times / len(words):.1%}")
        for key, times in Counter(words).most_common(SHOWN)
        if times > 1
    ]
    if not rows:
        return "<p>No two captions are the same.</p>\n" if captions else ""
    return _table("counts", "Captions given to more than one picture.", ("Caption", "Pictures", "Share"), rows)


def _common_words(report: Report) -> str:
    both = report.captions, [*chain.from_iterable(report.references)]
    ours, theirs = (Counter(chain.from_iterable(map(tokenize, texts))) for texts in both)
    rows = [
        (_escape(word), f"{times:,}", f"{times / ours.total():.1%}", f"{theirs[word] / max(1, theirs.total()):.1%}")
        for word, times in ours.most_common(2 * SHOWN)
    ]
    about = f"The captions use {len(ours):,} different words, the references {len(theirs):,}."
    return _table("counts", about, ("Word", "Times", "Share", "In references"), rows) if rows else ""


# The page's policy is a second lock: should a text ever get past the escaping, browsers still run and fetch nothing.
PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
