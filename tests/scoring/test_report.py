"""report.py: the page holds everything it is given, harms nobody, and fits a telephone and a screen."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scoring.metrics import score_captions
from scoring.report import BINS, DOTS, FIRST, METRICS, SHOWN, Report, loss_ends, write_report

EVIL = "<script>alert('x')</script> & \"</title></style><img src=http://example.org/x.png onerror=alert(1)>"
VOID = {"meta", "img", "br", "link", "input", "hr"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Elements, their attributes and the text of a page; fails where a tag is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        assert text.startswith("<!DOCTYPE html>")
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self) -> str:
        return " ".join(" ".join(self.text).replace("\xa0", " ").split())


def picture(i: int) -> Image.Image:
    return Image.new("RGB", (60 + i % 3, 40), (i % 256, 100, 200))


def report(number: int = 100, **changes) -> Report:
    captions = [f"a {('red', 'blue', 'green')[i % 3]} dog number {i % 40} on the grass" for i in range(number)]
    references = [
        [f"the {('red', 'blue')[i % 2]} dog {i} runs on grass", f"dog number {i % 40}"] for i in range(number)
    ]
    per_picture = score_captions(captions, references, per_picture=True) if number else {}
    fields = dict(
        title="A model on the test part",
        facts={"model": "model.safetensors", "model hash": "0123456789abcdef" * 4, "decoding": "3 beams"},
        warnings=["The model ignores the picture."],
        metrics=(score_captions(captions, references) if number else {})
        | {"unique_captions": 0.4, "loss": 2.5, "pictures": number, "some_new_metric": 0.125},
        intervals={"cider_d": (0.6011, 0.7022)},
        captions=captions,
        references=references,
        per_picture={name: per_picture[name] for name in ("cider_d", "rouge_l") if name in per_picture},
        names=[f"picture{i}.jpg" for i in range(number)],
        load=picture,
        history=[{"step": s, "loss": 9 / s, "learning_rate": 1e-3 / s} for s in range(1, 2000)]
        + [{"step": 1000, "val_loss": 0.5, "val_cider_d": 0.25}, {"step": 2000, "samples": {"a": "b"}}],
    )
    return Report(**(fields | changes))


def written(directory: Path, **changes) -> str:
    write_report(directory / "report.html", report(**changes))
    assert [path.name for path in directory.iterdir()] == ["report.html"]
    return (directory / "report.html").read_text(encoding="utf-8")


def test_everything_given_is_on_the_page(tmp_path):
    some = report()
    page = Page(written(tmp_path))
    said = page.said()
    for name, value in some.metrics.items():
        label = METRICS[name].label if name in METRICS else "Some new metric"
        digits = 0 if isinstance(value, int) else METRICS[name].digits if name in METRICS else 4
        assert re.search(rf"{label} .*?{re.escape(f'{value:,.{digits}f}')}", said), name
    for text in (some.title, *some.facts.values(), *some.warnings, "0.6011 to 0.7022", "Times", "Pictures"):
        assert text in said
    order = [said.index(text) for text in (some.title, some.warnings[0], "0.6011", "0123456789abcdef")]
    assert order == sorted(order)  # what warns stands before what it warns of
    headings = ("Training", "Best captions", "Worst captions", "Random captions", "Lengths", "Most common words")
    assert all(heading in said for heading in headings)


def test_the_best_and_the_worst_are_those_of_cider_d(tmp_path):
    scores = np.random.default_rng(3).permutation(100) / 10
    html = written(tmp_path, per_picture={"cider_d": scores})
    shown = {}
    for heading in ("Best", "Worst", "Random"):
        section = html.split(f">{heading} captions</h2>")[1].split("</section>")[0]
        assert section.count("<li><img") == SHOWN
        shown[heading] = [int(i) for i in re.findall(r'alt="Picture picture(\d+)\.jpg"', section)]
    order = np.argsort(scores).tolist()
    assert shown["Best"] == order[::-1][:SHOWN] and shown["Worst"] == order[:SHOWN]
    assert html == written(tmp_path, per_picture={"cider_d": scores})  # chance, but the same chance


def test_the_best_and_the_worst_are_folded(tmp_path):
    """Thirty-six cards made a page of 25,000 pixels on a telephone."""
    html = written(tmp_path)
    unfolded = re.sub("<details>.*?</details>", "", html, flags=re.S)
    assert html.count('class="said"') == 3 * SHOWN and unfolded.count('class="said"') == FIRST
    few = written(tmp_path, number=2)
    assert few.count("<details>") == 3 and few.split(">Random captions<")[1].count('class="said"') == 2


@pytest.mark.parametrize("number", [1, 3, 100])
def test_few_and_many_validations(tmp_path, number):
    """A single one was a line of one point, a hundred a chain of dots; and the log's name for CIDEr-D was not known."""
    steps = [10 * (i + 1) for i in range(number)]
    page = Page(written(tmp_path, history=[{"step": s, "val_loss": 2 + 1 / s, "val_cider_d": 0.5} for s in steps]))
    for name in ("val_loss", "val_cider_d"):
        dots = [dot for dot in page.all("circle") if dot["class"] == name and dot["cx"] != "14"]  # but the key's
        assert min(number, DOTS // 2) <= len(dots) <= DOTS
        lines = [line["points"].split() for line in page.all("polyline") if line["class"] == name]
        assert len(lines[0]) == number and "{cx},{cy}".format(**dots[0]) == lines[0][-1]
    assert page.said().count(f"at step {steps[-1]:,}") == 2


def test_the_axis_of_losses_shows_what_matters():
    """The first steps of training had most of it; and of equal losses it showed the noise alone."""
    training = [{"step": s, "loss": 0.2 + 100 / s**2} for s in range(1, 1001)]
    low, high = loss_ends([*training, {"step": 1000, "val_loss": 0.4}])
    assert 0 < low < 0.2 and 0.4 < high < 0.5
    low, high = loss_ends([{"step": 5, "val_loss": 0.062}, {"step": 9, "val_loss": 0.068}])
    assert high - low > 0.2 * 0.068 and low >= 0
    for history in ([], [{"step": 0, "loss": float("nan")}], [{"step": 0, "loss": 0.0}], [{"step": 3, "loss": -2.0}]):
        low, high = loss_ends(history)
        assert low < high


def test_calibration(tmp_path):
    """CIDEr-D by confidence, where there are both of enough captions."""
    sure = np.linspace(0.2, 0.9, 100)[::-1]
    scores = {"cider_d": 10 * sure, "confidence": sure}
    html = written(tmp_path, per_picture=scores)
    page = Page(html)
    assert "20.0 to 26.4% 10 2.32" in page.said() and "correlation over all captions: 1.00" in page.said()
    assert (
        "Calibration" in page.said()
        and html.split(">Calibration</h2>")[1].split("</figure>")[0].count("<circle") == BINS
    )
    constant = {"cider_d": np.array([np.nan, *[0.5] * 29]), "confidence": np.full(30, 0.5)}
    said = Page(written(tmp_path, number=30, per_picture=constant)).said()
    assert "Calibration" in said and "correlation" not in said and "nan to" not in said
    for number, given in ((1, {n: s[:1] for n, s in scores.items()}), (100, {"cider_d": sure}), (100, {})):
        assert "Calibration" not in Page(written(tmp_path, number=number, per_picture=given)).said()


def test_text_from_outside_is_only_text(tmp_path):
    number = 30
    texts = dict(captions=[EVIL] * number, references=[[EVIL]] * number, names=[EVIL] * number, title=EVIL)
    html = written(tmp_path, number=number, facts={EVIL: EVIL}, warnings=[EVIL], metrics={EVIL: 1.0}, **texts)
    page = Page(html)
    assert not {"script", "iframe", "object", "link"} & {tag for tag, _ in page.elements}
    assert len(page.all("title")) == len(page.all("style")) == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.said().count(EVIL) >= number
    some = page.all("img")
    assert some and all(attributes["alt"] == f"Picture {EVIL}" for attributes in some)


def test_nothing_is_fetched(tmp_path):
    html = written(tmp_path)
    page = Page(html)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name) or ""
            assert not value or value.startswith("data:" if tag == "img" else "#"), (tag, name, value[:80])
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html


def test_a_page_for_every_reader(tmp_path):
    """Headings in order, a name for every picture, chart and table, links that lead somewhere."""
    page = Page(written(tmp_path))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and not page.all("h3")
    names = {attributes.get("id") for _, attributes in page.elements}
    assert all(attributes["href"][1:] in names for attributes in page.all("a"))
    assert all(attributes["aria-labelledby"] in names for attributes in page.all("section"))
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    shown = [attributes for attributes in page.all("svg") if attributes.get("role")]
    assert len(shown) == 4 and all(attributes["aria-label"] for attributes in shown)
    assert page.text.count("⚠ ") == 1


def test_only_the_pictures_shown_are_loaded_once_each(tmp_path):
    loaded = []
    written(tmp_path, number=5000, load=lambda i: loaded.append(i) or picture(i))
    assert len(loaded) == len(set(loaded)) <= 3 * SHOWN


def test_pictures_are_small_upright_jpegs(tmp_path):
    tall = Image.new("RGB", (2000, 1000), "red")
    tall.getexif()[0x0112] = 6  # lies on its side
    page = Page(written(tmp_path, number=1, load=lambda i: tall))
    (attributes, *_) = page.all("img")
    image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))))
    assert image.format == "JPEG" and image.size == (160, 320)


def broken(i: int) -> Image.Image:
    raise OSError("damaged")


@pytest.mark.parametrize("load", [None, broken, lambda i: None])
def test_without_pictures_or_history(tmp_path, load):
    html = written(tmp_path, load=load, history=[], intervals={}, warnings=[])
    page = Page(html)
    assert not page.all("img") and "Training" not in html and "Read this first" not in html
    assert ("No picture" in page.said()) == (load is not None)
    assert html.count('class="said"') == 3 * SHOWN


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_few_captions(tmp_path, number):
    page = Page(written(tmp_path, number=number, history=[{"step": 5, "loss": 1.0}]))
    assert ("Best captions" in page.said()) == (number > 0)
    assert ("Worst captions" in page.said()) == (number > 1)


def test_odd_captions(tmp_path):
    """Empty, endless, of another script, half a character (a lone surrogate, which UTF-8 cannot hold), no number."""
    captions = ["", " ", "x" * 5000, "كلب يجري", "half \ud83d", "nul \0", "a | b", "a | b"]
    references = [[] for _ in captions]
    scores = {"cider_d": np.array([np.nan, *range(7)])}
    metrics = {"bleu_1": float("nan"), "cider_d": 7.5}
    intervals = {"cider_d": (7.0, float("inf"))}
    odd = dict(captions=captions, references=references, per_picture=scores, metrics=metrics, intervals=intervals)
    history = [{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": None}, {"x": 1}]
    said = Page(written(tmp_path, number=len(captions), history=history, **odd)).said()
    assert "(nothing)" in said and "half ?" in said and "كلب يجري" in said and "7.5000" in said
    assert "Captions of more than one picture" in said


def test_lists_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="names: 1 for 100 captions"):
        report(names=["one"])


def test_a_failure_leaves_the_old_page(tmp_path):
    old = written(tmp_path)
    with pytest.raises(AttributeError):
        written(tmp_path, facts=None)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old


def chromium(directory: Path, page: Path, *flags: str) -> str:
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--hide-scrollbars"]
    command += [f"--user-data-dir={directory / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser(tmp_path):
    """No page is wider than its window, and something is drawn, long names and captions without spaces included."""
    long = "w" * 300
    texts = dict(captions=[long] * 30, names=[long] * 30, references=[[long, "a dog"]] * 30)
    pages = {"usual": report(), "long": report(number=30, title=long, facts={long: long}, warnings=[long], **texts)}
    frames = ""
    for name, some in pages.items():
        write_report(tmp_path / f"{name}.html", some)
        for width in (320, 390, 768, 1200):
            frames += f'<iframe src="{name}.html" title="{name}" style="border: 0; width: {width}px"></iframe>\n'
    measure = (
        "onload = () => document.body.innerHTML = [...document.querySelectorAll('iframe')].map(f =>"
        "[f.title, f.clientWidth, f.contentDocument.documentElement.scrollWidth].join(' ')).join(';')"
    )
    harness = tmp_path / "harness.html"
    harness.write_text(f"<!DOCTYPE html><html><body>{frames}<script>{measure}</script></body></html>")
    dumped = chromium(tmp_path, harness, "--allow-file-access-from-files", "--dump-dom")
    found = re.search("<body>(.*)</body>", dumped, re.S)
    assert found, dumped
    sizes = [line.split() for line in found.group(1).split(";")]
    assert len(sizes) == 8
    assert [size for size in sizes if int(size[2]) > int(size[1])] == []

    for width in (390, 1200):
        shot = tmp_path / f"{width}.png"
        chromium(tmp_path, tmp_path / "usual.html", f"--window-size={width},3000", f"--screenshot={shot}")
        pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
        assert pixels.shape == (3000, width)
        assert (pixels[:, :8].std(axis=0) < 1).all() and (pixels[:, -8:].std(axis=0) < 1).all()  # margins are empty
        assert pixels[:1000].std() > 10
