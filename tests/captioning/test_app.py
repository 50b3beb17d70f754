"""The web page in a real Chromium, its endpoint through gradio's client, and many clients at once."""

from __future__ import annotations

import base64
import csv
import functools
import http.server
import itertools
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_package, needs_shared, tiny_config
from PIL import Image
from processes import finished, flags, free_port, launch, small_config

import app
from captioning import service
from captioning.controls import Finish
from captioning.engine import in_words
from captioning.page import HEAT_SIDE, card, heat_map, model_line, place_of, progress, results, table
from captioning.pipeline import Caption, caption_batch
from config import UserError
from data.fetch import fetch_picture
from dataset import CaptionDataset, collate, prepare_picture
from example_usage import caption_image
from model import ImageCaptionModel
from weights.file import MODEL_FILE

if TYPE_CHECKING:
    from gradio_client import Client

pytestmark = [needs_package("gradio", "app"), needs_package("playwright", "dev")]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEGABYTES = 1
WORD = ".words button"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, scenes_table, scenes_tokenizer) -> str:
    """A model that has learned the captions of twelve scenes, and sees the middle of a picture."""
    torch.manual_seed(0)
    config = tiny_config(image_size=32, resize_size=40, max_length=40, vocab_size=len(scenes_tokenizer))
    model = ImageCaptionModel(config)
    model.tokenizer = scenes_tokenizer
    data = CaptionDataset(scenes_table, scenes_tokenizer, model.config)
    batch = collate([data[0, row] for row in range(12)], model.config, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(batch.pixel_values, batch.input_ids, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8
    path = tmp_path_factory.mktemp("model") / MODEL_FILE
    model.eval().save_file(path)
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, scenes_table) -> list[str]:
    """The twelve scenes, as PNG and JPEG."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [str(folder / f"picture {row}.{('png', 'jpg')[row % 2]}") for row in range(12)]
    for row, path in enumerate(paths):
        Image.open(scenes_table.picture(row)).save(path, quality=95)
    return paths


def connect(address: str) -> Client:
    """A client. Without ssl_verify=False it would read the certificates of the world, 0.1 s of work, at every request."""
    from gradio_client import Client

    return Client(address, verbose=False, ssl_verify=False, httpx_kwargs={"timeout": 300})


def handle_file(path: str) -> dict[str, object]:
    """A file as a client sends it."""
    import gradio_client

    return gradio_client.handle_file(path)


class Server:
    """The page at work in this process."""

    def __init__(self, model: str | None, most_bytes: int = MEGABYTES << 20, key: str | None = None) -> None:
        self.captioner, self.training = service.Captioner("cpu", "fp32"), service.Training()
        if model is not None:
            self.captioner.load(model)
        self.page = app.build(self.captioner, most_bytes, self.training)
        chat = {"captioner": self.captioner, "model": "tiny", "key": key}
        self.address = app.launch(self.page, "127.0.0.1", free_port(), most_bytes, chat=chat)


@pytest.fixture(scope="module")
def server(model_file, tmp_path_factory):
    previous = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    server = Server(model_file)
    yield server
    server.page.close(verbose=False)
    del os.environ["GRADIO_TEMP_DIR"]
    if previous:
        os.environ["GRADIO_TEMP_DIR"] = previous


@pytest.fixture(scope="module")
def client(server) -> Client:
    return connect(server.address)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """A function that opens the page; nothing may be asked of any other host, nor a script fail, while a test runs."""
    contexts, foreign, failures = [], [], []

    def open_page(address: str = server.address, width: int = 1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: request.url.startswith(("http", "ws")) and asked(request.url, address))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#pictures .mouse, #untrained button", state="attached")  # its script has run
        return page

    def asked(url: str, address: str) -> None:
        if not url.startswith(address):
            foreign.append(url)

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign and not failures


def drop(page, *paths: str, into: str = "#pictures") -> None:
    """As if the files had been chosen."""
    page.set_input_files(f"{into} input[type=file]", [str(path) for path in paths])


def settings_of(page) -> None:
    """Open the settings."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Short").wait_for()


def expected(server: Server, path: str, **options) -> list[str]:
    """One picture's captions without the page, the batches and the server."""
    model = server.captioner.model
    (captions,) = caption_batch(model, prepare_picture(path, model.config)[None], "fp32", **options)
    return [caption.text for caption in captions]


def captions_in(page) -> list[str]:
    return [" ".join(words.split()) for words in page.locator(".words").all_inner_texts()]


# In the browser


def test_dropped_pictures_have_captions_and_confidence(open_page, server, pictures):
    page = open_page()
    drop(page, *pictures[:3])
    page.locator(".card").nth(2).wait_for()
    assert captions_in(page) == [
        " ".join(caption.split())
        for path in pictures[:3]
        for caption in expected(server, path, num_beams=3, num_return_sequences=3)
    ]
    sure = [int(text.split(" %")[0]) for text in page.locator(".sure").all_inner_texts()]
    assert len(sure) == 9 and all(0 <= number <= 100 for number in sure)
    assert "not whether the caption is true" in page.locator("#results .note").last.inner_text()
    assert [Path(path).name for path in pictures[:3]] == page.locator("figcaption").all_inner_texts()
    # Once more, with other settings; what was dropped is still known.
    settings_of(page)
    page.get_by_label("Short").check()
    page.locator("fieldset", has_text="Captions").get_by_label("1", exact=True).check()
    page.get_by_role("button", name="Caption again").click()
    page.wait_for_function("document.querySelectorAll('.words').length == 3")
    options = service.decoding_options("short", "safe", 1)
    short = [server.captioner.submit(path, path, options).result()[0].text for path in pictures[:3]]
    assert captions_in(page) == [" ".join(caption.split()) for caption in short]


def test_the_heat_map_shows_where_a_word_looked_in_grey_as_well(open_page, server, pictures):
    page = open_page()
    drop(page, pictures[1])
    word = page.locator(WORD).nth(2)
    word.wait_for()
    picture, canvas = page.locator(".picture"), page.locator(".picture canvas")
    assert canvas.evaluate("c => getComputedStyle(c).opacity") == "0"
    word.hover()
    page.wait_for_function("getComputedStyle(document.querySelector('.picture canvas')).opacity == 1")
    heat = np.frombuffer(base64.b64decode(word.get_attribute("data-heat")), np.uint8)
    options = service.decoding_options("normal", "safe", 3, attention=True)
    truth = server.captioner.submit(pictures[1], "", options).result()[0].words[2]
    assert (heat == heat_map(truth[1]).ravel()).all() and heat.max() == 255 and heat.min() == 0
    painted = canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    red, green, blue, opacity = np.array(painted, float).reshape(-1, 4)[np.argsort(heat, kind="stable")].T
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    for below in (0, 128, 255):  # black, grey, white: lighter where it looked more, whatever the picture
        seen = light * opacity / 255 + below * (1 - opacity / 255)
        assert (np.maximum.accumulate(seen) - seen < 4).all() and seen[-1] > seen[0] + 40
    said = page.locator(".look").inner_text()
    assert said == f"“{truth[0]}”: looked most at the {place_of(heat_map(truth[1]))}."
    assert word.get_attribute("aria-label") == said.replace("“", "").replace("”", "").rstrip(".")
    # The model sees the middle 32 of 40: the map lies over that part and no other.
    outer, inner = picture.bounding_box(), canvas.bounding_box()
    assert inner["width"] / outer["width"] == pytest.approx(0.8, abs=0.01)
    assert (inner["y"] - outer["y"]) / outer["height"] == pytest.approx(0.1, abs=0.01)
    # Away from the word the picture is bare again; a clicked word stays until it is clicked again.
    page.mouse.move(0, 0)
    page.wait_for_function("getComputedStyle(document.querySelector('.picture canvas')).opacity == 0")
    word.click()
    page.locator(WORD).nth(4).hover()
    page.mouse.move(0, 0)
    assert page.locator(".look").inner_text() == said and word.get_attribute("aria-pressed") == "true"
    word.click()
    page.mouse.move(0, 0)
    word.evaluate("w => w.blur()")
    assert page.locator(".look").inner_text() == ""


def test_everything_works_by_keyboard(open_page, pictures):
    page = open_page()
    page.on("filechooser", lambda chooser: chooser.set_files(pictures[0]))

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab never comes to {selector}")

    tab_to("#pictures button")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator(".card").wait_for()
    tab_to(WORD)
    first = page.locator(WORD).first
    assert first.get_attribute("class") == "lit"
    page.keyboard.press("ArrowRight")
    second = page.locator(WORD).nth(1)
    assert second.evaluate("w => w == document.activeElement") and second.get_attribute("class") == "lit"
    assert page.locator(".look").inner_text().startswith(f"“{second.inner_text()}”")
    page.keyboard.press("Enter")
    assert second.get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert second.get_attribute("aria-pressed") == "false" and not page.locator(".picture.lit").count()
    page.keyboard.press("Shift+Tab")
    tab_to(WORD)  # the whole caption is one stop
    assert page.evaluate("document.activeElement.closest('li') == document.querySelector('.words').closest('li')")
    tab_to("[role=tab][aria-selected=false]")
    page.keyboard.press("Enter")
    page.locator("#folder").wait_for()


def test_a_pasted_picture(open_page, server, pictures):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    content = base64.b64encode(Path(pictures[0]).read_bytes()).decode()
    page.evaluate(
        """async (content) => {
            const blob = await (await fetch('data:image/png;base64,' + content)).blob();
            await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
        }""",
        content,
    )
    page.locator("h1").click()
    page.keyboard.press("Control+v")
    page.locator(".card").wait_for()
    wanted = expected(server, pictures[0], num_beams=3, num_return_sequences=3)
    assert captions_in(page) == [" ".join(caption.split()) for caption in wanted]


@pytest.fixture
def web(pictures):
    """An address on this machine that has the pictures."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(Path(pictures[0]).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


def test_the_address_of_a_picture(open_page, client, web, monkeypatch):
    """Private addresses are refused; with the refusal switched off, which only this test can, the way is the same."""
    from gradio_client.exceptions import AppError

    page = open_page()
    url = f"{web}/picture%200.png"
    page.get_by_label("Or the address of a picture").fill(url)
    page.get_by_role("button", name="Caption it").click()
    page.locator(".problem").wait_for()
    (line,) = page.locator(".problem").all_inner_texts()
    assert line == f"{url}: leads to an address that is not public: save the picture, and give the file instead"
    with pytest.raises(AppError, match="not public"):
        client.predict(picture=None, url=url, api_name="/caption")
    monkeypatch.setattr("data.fetch.fetch_picture", functools.partial(fetch_picture, allow_private=True))
    page.get_by_label("Or the address of a picture").press("Enter")
    page.locator(".card").wait_for()
    (found,) = client.predict(picture=None, url=url, api_name="/caption")
    assert captions_in(page)[0] == " ".join(found["caption"].split())


def test_an_address_without_a_scheme(client, pictures, web, monkeypatch):
    """As browsers' address bars show them; what is not a host name stays as it is."""
    for given, wanted in {
        " www.example.com/cat.jpg\n": "https://www.example.com/cat.jpg",
        "example.co.uk:8080/a?b=c": "https://example.co.uk:8080/a?b=c",
        "http://example.com/x": "http://example.com/x",
        "file:///etc/passwd": "file:///etc/passwd",
        "pictures/cat.jpg": "pictures/cat.jpg",
        "../a.b/c.jpg": "../a.b/c.jpg",
        "/etc/hosts.allow/": "/etc/hosts.allow/",
    }.items():
        assert service.full_url(given) == wanted
    asked = []
    monkeypatch.setattr(
        "data.fetch.fetch_picture",
        lambda url, max_bytes: asked.append(url) or Path(pictures[0]).read_bytes(),
    )
    assert client.predict(picture=None, url="www.example.com/cat.jpg", api_name="/caption")[0]["caption"]
    assert asked == ["https://www.example.com/cat.jpg"]


def test_a_path_is_not_an_address(client, pictures):
    """What stands in the address field is never opened as a file of the server's."""
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="only http and https"):
        client.predict(picture=None, url=pictures[0], api_name="/caption")


def test_what_cannot_be_captioned_is_one_line(open_page, pictures, tmp_path):
    """Also of a name that would be script, or a template of gradio's, if it were not escaped."""
    page = open_page()
    hostile = tmp_path / "${document.title=1}{{7*7}}<img src=x onerror='document.title=2'>.jpg"
    hostile.write_text("no picture")
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(Path(pictures[1]).read_bytes()[:700])
    drop(page, hostile, pictures[0], damaged)
    page.locator(".card").wait_for()
    lines = page.locator(".problem").all_inner_texts()
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert "{{7*7}}" in lines[0] and "not a picture that can be read" in lines[0]
    assert lines[1].startswith("damaged.jpg: not a picture that can be read")
    assert page.title() == "Captions for pictures" and page.locator(".problem img").count() == 0
    large = tmp_path / "large.jpg"
    large.write_bytes(Path(pictures[1]).read_bytes() + bytes(MEGABYTES << 20))
    drop(page, large)
    toast = page.get_by_text(re.compile("exceed.*large.jpg"))
    toast.wait_for()
    assert "\n" not in toast.inner_text()
    assert page.locator(".card").count() == 1  # what was there is there still


def folder_of(page, folder: Path) -> str:
    """Caption a folder, and return its CSV."""
    page.get_by_role("tab", name="Folder").click()
    drop(page, folder, into="#folder")
    page.get_by_text("pictures captioned").wait_for(timeout=120_000)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download captions.csv").click()
    assert download.value.suggested_filename == "captions.csv"
    return Path(download.value.path()).read_text(encoding="utf-8")


@pytest.fixture
def holiday(pictures, tmp_path) -> Path:
    """A folder in whose folders pictures have equal names, beside what is no picture."""
    folder = tmp_path / "holiday"
    for number, name in enumerate(("b.jpg", "a.jpg", "more/z.jpg", "more/a.jpg", "More/deep/a.jpg", "a.b/c.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[2 * number + 1], folder / name)
    (folder / "damaged.png").write_bytes(Path(pictures[0]).read_bytes()[:200])
    for name in ("notes.txt", "notes.pdf", "raw.CR2", "README"):
        (folder / name).write_text("no picture")
    return folder


def test_a_folder_becomes_the_table_that_the_command_line_writes(open_page, model_file, holiday):
    """With the folders of each name, in the same order."""
    page = open_page()
    content = folder_of(page, holiday)
    assert "6 of 7 pictures captioned" in page.locator(".folder").inner_text()
    assert "skipped: 1 without a suffix, 1 .cr2, 1 .pdf" in page.locator(".folder").inner_text()
    assert "All 6 rows of captions.csv" in page.locator(".folder").inner_text()
    (line,) = page.locator(".problem").all_inner_texts()
    assert line.startswith("holiday/damaged.png: not a picture")
    command = ("holiday", model_file, "--precision", "fp32", "--output", "captions.csv", "--scores")
    finished("example_usage.py", *command, cwd=holiday.parent, code=1)  # as one is damaged
    assert content == (holiday.parent / "captions.csv").read_text(encoding="utf-8")
    assert [line.split(",")[0] for line in content.splitlines()[:3]] == ["file_name", "holiday/a.jpg", "holiday/b.jpg"]


def test_dropped_folders(open_page, holiday):
    """Dropped in either tab, or beside the fields; a browser gives no files of a folder, only a way to read it."""
    page = open_page()

    def drop_at(selector: str, *paths: Path) -> None:
        page.locator(selector).scroll_into_view_if_needed()
        box = page.locator(selector).bounding_box()
        at = {"x": box["x"] + 20, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": data})

    session = page.context.new_cdp_session(page)
    drop_at("h1", holiday / "a.jpg")
    page.locator(".card").wait_for()
    assert page.locator("figcaption").all_inner_texts() == ["a.jpg"]
    drop_at("#pictures", holiday)
    page.locator(".card").nth(5).wait_for()
    assert "holiday/more/a.jpg" in page.locator("figcaption").all_inner_texts()
    page.get_by_role("tab", name="Folder").click()
    assert not page.locator("#results").is_visible()
    drop_at("#folder", holiday)
    page.get_by_text("6 of 7 pictures captioned").wait_for()
    assert "holiday/More/deep/a.jpg" in page.locator(".folder table").inner_text()


def test_a_large_folder(open_page, pictures, tmp_path):
    """The table shows how many of how many rows; the CSV has all of them, by name."""
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(230):
        (folder / f"{number:03}.jpg").hardlink_to(pictures[1])
    page = open_page(width=390)
    content = folder_of(page, folder)
    assert [line.split(",")[0] for line in content.splitlines()[1:]] == [f"large/{n:03}.jpg" for n in range(230)]
    assert "200 of 230 rows are shown; all are in captions.csv" in page.locator(".folder").inner_text()
    assert page.locator(".folder tbody tr").count() == 200
    box = page.locator(".folder .scroll")
    assert box.bounding_box()["height"] < 500 and box.evaluate("e => e.scrollHeight > 2 * e.clientHeight")


def test_pictures_without_folders_in_their_names(server, pictures, tmp_path):
    """Equal names cannot be told apart: the page says so."""
    sources = [service.Source("a.png", path=pictures[0]), service.Source("a.png", path=pictures[2])]
    *_, end = service.caption_folder(server.captioner, sources, service.Settings(), tmp_path / "out.csv")
    assert "a.png: several pictures have this name" in end


def test_text_around_captions_and_captions_left_out(open_page, client, server, pictures, tmp_path):
    """On cards, in the CSV and at the endpoint. The level is chosen so that only some captions are below it."""
    ranked = [server.captioner.submit(path, path, service.Settings(captions=3).options()).result() for path in pictures]
    path, captions = max(
        zip(pictures, ranked, strict=True), key=lambda pair: (pair[1][0].score or 0) - (pair[1][2].score or 0)
    )
    level = round(50 * ((captions[0].score or 0) + (captions[2].score or 0)))
    kept = [caption.text for caption in captions if (caption.score or 0) >= level / 100]
    assert 0 < len(kept) < 3
    page = open_page()
    settings_of(page)
    assert page.get_by_role("group", name="Captions").is_visible()
    page.get_by_label("Put before").fill("<b>sks</b>, ")
    page.get_by_label("Put after").fill(" {{1}}")
    page.get_by_label("Leave out below").fill(str(level))
    page.get_by_label("Leave out below").press("Tab")  # else a busy page may not know it yet
    drop(page, path)
    page.locator(".card").wait_for()
    wanted = [f"<b>sks</b>, {' '.join(text.split())} {{{{1}}}}" for text in kept]
    assert captions_in(page) == wanted
    assert page.locator(".card img").get_attribute("alt") == f"<b>sks</b>, {kept[0]} {{{{1}}}}"
    page.get_by_label("Leave out below").fill("100")
    page.get_by_role("button", name="Caption again").click()
    page.wait_for_function("document.querySelector('.words').textContent == 'not sure'")
    assert not page.locator(".card .copy").count() and "% sure" in page.locator(".card").inner_text()
    best = sorted(captions[0].score or 0 for captions in ranked)
    gap, below = max((above - below, below) for below, above in itertools.pairwise(best))
    enough = below + gap / 2
    page.get_by_label("Leave out below").fill(str(100 * enough))
    page.get_by_label("Leave out below").press("Tab")
    folder = tmp_path / "some"
    folder.mkdir()
    for source in pictures:
        shutil.copy(source, folder)
    rows = list(csv.DictReader(folder_of(page, folder).splitlines()))
    assert not page.get_by_role("group", name="Captions").is_visible()  # a CSV has one for each picture
    left_out = [row for row in rows if float(row["score"]) < enough]
    assert 0 < len(left_out) < len(rows) == len(pictures)
    for row in rows:
        assert (row["caption"] == "") if row in left_out else row["caption"].startswith("<b>sks</b>, ")
    assert page.locator(".folder td", has_text="not sure").count() == len(left_out)
    options = {"captions": 3, "beams": 3, "prepend": "x ", "append": " y", "min_confidence": level / 100}
    found = client.predict(picture=handle_file(path), **options, api_name="/caption")
    assert [each["caption"] for each in found] == [f"x {text} y" for text in kept] + [""] * (3 - len(kept))


@pytest.mark.parametrize("secure", [True, False])
def test_a_caption_is_copied(open_page, pictures, secure):
    """Also where the page comes without https from another machine, and browsers hide their clipboard from scripts."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate("navigator.clipboard.writeText('something else')")
    if not secure:
        page.evaluate("navigator.clipboard.writeText = undefined")
    drop(page, pictures[0])
    button = page.get_by_role("button", name="Copy caption 2")
    button.click()
    page.get_by_role("button", name="Copied caption 2").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == button.get_attribute("data-text")
    assert button.get_attribute("data-text").split() == captions_in(page)[1].split()
    page.get_by_role("button", name="Copy caption 2").wait_for()


def test_the_first_screen(open_page, server, pictures):
    """Which model answers; the settings are closed; on a telephone the caption is on the screen, and words are for touch."""
    page = open_page(width=390, has_touch=True, is_mobile=True)
    parameters = f"{server.captioner.model.num_parameters:,}"
    assert (
        page.locator(".model").inner_text()
        == f"Model: {MODEL_FILE.removesuffix('.safetensors')} · {parameters} parameters"
    )
    assert page.locator("#pictures").inner_text().strip() == "Choose pictures"
    assert not page.get_by_label("Short").is_visible()
    drop(page, *pictures[:2])
    page.locator(".card").nth(1).wait_for()
    page.wait_for_function("document.querySelector('.words').getBoundingClientRect().bottom < innerHeight")
    text = page.locator("#results").inner_text()
    assert text.count("Tap a word: the picture shows where the model looked.") == 1 and "arrow keys" not in text
    page = open_page()
    drop(page, *pictures[:2])
    page.locator(".card").nth(1).wait_for()
    text = page.locator("#results").inner_text()
    assert text.count("arrow keys") == 1 and "Tap" not in text


# While captions are made, gradio makes the earlier ones paler.
CLEAR = """() => ['.card', '.folder'].flatMap((s) => [...document.querySelectorAll(s)]).every((e) => {
  for (; e; e = e.parentElement) if (getComputedStyle(e).opacity < 1) return false;
  return true;
})"""
AXE = ROOT / "tests" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: npm install --prefix tests --ignore-scripts")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(open_page, pictures, holiday, scheme, width):
    page = open_page(width=width, color_scheme=scheme)
    page.evaluate(AXE.read_text(encoding="utf-8"))

    def check() -> None:
        page.wait_for_function(CLEAR)
        found = page.evaluate("async () => (await axe.run()).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])")
        assert found == []

    check()
    drop(page, *pictures[:2], holiday / "damaged.png")
    page.locator(".card").nth(1).wait_for()
    check()
    settings_of(page)
    check()
    folder_of(page, holiday)
    check()


def test_folder_progress(server, pictures, tmp_path):
    """What is yielded on the way: how many of how many, how fast, how long yet."""
    sources = [service.Source(f"{number:03}.png", path=pictures[0]) for number in range(150)]
    said = list(service.caption_folder(server.captioner, sources, service.Settings(), tmp_path / "out.csv"))
    end = said[-1]
    assert (
        len(said) > 1
        and "150 of 150 pictures captioned" in end
        and (tmp_path / "out.csv").read_text().count("\n") == 151
    )
    for html in said[:-1]:
        done, total = map(int, re.search(r"(\d+) of (\d+) · [\d.]+ pictures/s · \d+ s left", html).groups())
        assert 0 < done < total == 150 and f'aria-valuenow="{done}"' in html
        newest = [int(name) for name in re.findall(r"<td>(\d+)\.png", html)]
        assert newest == sorted(newest, reverse=True) and len(newest) <= 8


UNNAMED = """() => [...document.querySelectorAll('button, input, textarea, select, img, [role=tab], fieldset')]
  .filter((e) => e.checkVisibility())
  .filter((e) => !(e.ariaLabel || e.alt || e.title || e.textContent.trim() || e.labels?.[0]?.textContent.trim()))
  .map((e) => e.outerHTML.slice(0, 200))"""
# WCAG's contrast of visible texts with what is behind them; large ones need 3, others 4.5.
FAINT = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const faint = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, style = getComputedStyle(e);
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest('script, style, .unseen, .hide')) continue;
    let behind = e, ground = [0, 0, 0, 0];
    while (behind && (ground[3] ?? 1) < 1) { ground = parse(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
    const [a, b] = [light(parse(style.color)), light(ground)].sort((x, y) => y - x), contrast = (a + .05) / (b + .05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    if (contrast < (large ? 3 : 4.5)) faint.push([contrast.toFixed(2), walk.currentNode.data.trim(), style.color, ground + '']);
  }
  return faint;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_labels_and_contrast(open_page, pictures, tmp_path, scheme):
    """At 390 px nothing is wider than the screen, in any state; every control has a name; all text can be read."""
    page = open_page(width=390, color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) > 600) == (scheme == "light")

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for block in page.locator("#results *, header *, .tabs *").all():
            if block.is_visible() and (box := block.bounding_box()):
                assert box["x"] + box["width"] <= 390.5 or block.evaluate("e => !!e.closest('canvas, .wrap')")
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate(FAINT) == []

    check()
    (tmp_path / f"{'long' * 40}.jpg").write_text("no picture")
    drop(page, pictures[3], tmp_path / f"{'long' * 40}.jpg")
    page.locator(".card").wait_for()
    check()
    page.locator(WORD).first.click()
    check()
    page.get_by_role("tab", name="Folder").click()
    check()
    drop(page, Path(pictures[0]).parent, into="#folder")
    page.get_by_role("button", name="Download captions.csv").wait_for()
    check()


def test_nothing_moves_where_that_is_not_wanted(open_page, pictures):
    for motion, seconds in (("reduce", "0s"), ("no-preference", "0.15s")):
        page = open_page(reduced_motion=motion)
        drop(page, pictures[0])
        page.locator(".card").wait_for()
        assert page.locator("canvas").evaluate("c => getComputedStyle(c).transitionDuration") == seconds


def test_the_pages_of_gradio_are_offline_too(open_page):
    """The description of the API, which the footer links to."""
    page = open_page()
    page.get_by_role("button", name="Use via API").click()
    page.get_by_text("/caption").first.wait_for()
    page.wait_for_timeout(1000)


def test_without_a_model_the_page_trains_the_demo(browser, open_page, scenes_dir, pictures, tmp_path, monkeypatch):
    """By the very main.py, of a run small enough for a test, in the folder where the server was started."""
    from gradio_client.exceptions import AppError

    monkeypatch.chdir(tmp_path)
    run = flags(small_config(scenes_dir, max_steps=6))
    monkeypatch.setattr(service, "DEMO", [sys.executable, str(ROOT / "main.py"), *run, "--no-upload"])
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    bare = Server(None)
    try:
        with pytest.raises(AppError, match="no model here yet"):
            connect(bare.address).predict(handle_file(pictures[0]), api_name="/caption")
        page = open_page(bare.address)
        assert not page.locator("#pictures").is_visible()
        assert "python main.py --preset demo" in page.locator("#untrained").inner_text()
        page.get_by_role("button", name="Train the demo").click()
        page.locator(".working").wait_for()
        page.locator("#pictures").wait_for(timeout=120_000)
        drop(page, pictures[0])
        page.locator(".card").wait_for()
        assert (tmp_path / MODEL_FILE).is_file() and not bare.training.running
        other = open_page(bare.address)  # whoever comes later finds the model
        other.locator("#pictures").wait_for()
        monkeypatch.setattr(service, "DEMO", [sys.executable, str(ROOT / "main.py"), "--preset", "demmo"])
        bare.captioner.model = None
        page.reload()
        page.get_by_role("button", name="Train the demo").click()
        page.locator(".problem").wait_for()
        assert "preset 'demmo' is unknown" in page.locator(".problem").inner_text()
    finally:
        bare.training.stop()
        bare.page.close(verbose=False)


# Through gradio's client


def test_the_endpoint_gives_what_the_command_line_gives(client, model_file, pictures):
    done = finished("example_usage.py", *pictures[:4], model_file, "--precision", "fp32")
    said = [line.split("\t")[1] for line in done.stdout.splitlines()]
    found = [client.predict(handle_file(path), api_name="/caption") for path in pictures[:4]]
    assert [each[0]["caption"] for each in found] == said and len(set(said)) > 1
    for path in pictures[:4]:
        (greedy,) = client.predict(picture=handle_file(path), beams=1, api_name="/caption")
        assert greedy["caption"] == caption_image(path, model_file, "cpu", do_sample=False, precision="fp32")
        assert 0 < greedy["confidence"] < 1
    three = client.predict(handle_file(pictures[0]), captions=3, api_name="/caption")
    assert len({each["caption"] for each in three}) == 3 and three[0] == found[0][0]
    creative = client.predict(
        handle_file(pictures[0]), style="creative", length="short", captions=2, api_name="/caption"
    )
    assert len(creative) == 2 and creative[0]["confidence"] >= creative[1]["confidence"]


def test_what_the_endpoint_refuses_is_one_line(client, server, web, pictures, tmp_path):
    import httpx
    from gradio_client.exceptions import AppError

    def refused(*arguments, **named) -> str:
        with pytest.raises((AppError, ValueError)) as error:
            client.predict(*arguments, api_name="/caption", **named)
        return str(error.value)

    (tmp_path / "no.png").write_text("no picture")
    assert refused(handle_file(str(tmp_path / "no.png"))).startswith("no.png: not a picture that can be read")
    assert (
        refused(None)
        == refused(handle_file(pictures[0]), url="https://example.org")
        == "give either a picture or a url"
    )
    for options in ({"captions": 0}, {"captions": 6}, {"beams": 11}, {"style": "wild"}, {"length": "endless"}):
        assert "\n" not in refused(handle_file(pictures[0]), **options)
    # gradio itself would fetch an address that comes as a file, however large, and a path has to be of a file sent here.
    assert refused(handle_file(f"{web}/picture%200.png")) == "picture must be a file: give a URL as url"
    for path in (model_path := str(ROOT / "README.md"), "/etc/passwd"):
        payload = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
        answer = httpx.post(
            f"{server.address}gradio_api/call/caption", json={"data": [payload, "", "normal", "safe", 1, 3]}
        )
        stream = httpx.get(f"{server.address}gradio_api/call/caption/{answer.json()['event_id']}", timeout=30)
        assert "event: error" in stream.text and "root:" not in stream.text
    assert httpx.get(f"{server.address}gradio_api/file={model_path}").status_code == 403
    large = httpx.post(f"{server.address}gradio_api/upload", files={"files": ("a.jpg", bytes((MEGABYTES << 20) + 1))})
    assert large.status_code == 413


def test_many_clients_at_once_get_what_one_alone_gets(server, pictures, monkeypatch):
    """32 clients, with settings of two kinds: no error, every caption the same, and the model asked for many at a time."""
    alone = {(path, beams): expected(server, path, num_beams=beams)[0] for path in pictures for beams in (1, 3)}
    sizes = []
    caption = server.captioner._caption
    monkeypatch.setattr(server.captioner, "_caption", lambda group: sizes.append(len(group)) or caption(group))

    def one_client(number: int) -> list[tuple[str, str]]:
        client = connect(server.address)
        beams = 1 + 2 * (number % 2)
        mine = [pictures[(number + step) % len(pictures)] for step in range(3)]
        start.wait()
        answers = [client.predict(handle_file(path), beams=beams, api_name="/caption") for path in mine]
        return [(alone[path, beams], found[0]["caption"]) for path, found in zip(mine, answers, strict=True)]

    start = threading.Barrier(32)
    with ThreadPoolExecutor(32) as clients:
        answers = [pair for pairs in clients.map(one_client, range(32)) for pair in pairs]
    assert len(answers) == 96 and all(wanted == found for wanted, found in answers)
    assert sum(sizes) == 96 and max(sizes) > 4


@pytest.mark.slow
def test_two_minutes_of_32_clients(model_file, pictures, tmp_path, capsys):
    """No error, every caption as it is alone, and the server's memory flat; prints captions/s beside one client's.

    With FLICKR8K_MODEL, a model's file, the clients send pictures of Flickr8k.
    """
    if source := os.environ.get("FLICKR8K_MODEL"):
        model_file = source
        pictures = sorted(map(str, (needs_shared("flickr8k") / "Images").glob("*.jpg")))[::100]
    model = ImageCaptionModel.from_pretrained(model_file)
    pixels = torch.stack([prepare_picture(path, model.config) for path in pictures])
    alone = [caption_batch(model, one[None], "fp32", num_beams=3)[0][0].text for one in pixels]
    port = free_port()
    command = ("app.py", "--model", model_file, "--port", port, "--precision", "fp32")
    with launch(*command, environment={"GRADIO_TEMP_DIR": tmp_path}, stderr=None) as server:
        assert server.stdout.readline().startswith("model") and server.stdout.readline().startswith("page")

        def megabytes() -> float:
            resident = Path(f"/proc/{server.pid}/status").read_text().split("VmRSS:")[1]
            return int(resident.split()[0]) / 1024

        def one_client(number: int, client: Client, until: float) -> int:
            done = 0
            while time.monotonic() < until:
                place = (number + done) % len(pictures)
                (found,) = client.predict(handle_file(pictures[place]), api_name="/caption")
                assert found["caption"] == alone[place]
                done += 1
            return done

        def rate(clients: int, seconds: float) -> float:
            every = [connect(f"http://127.0.0.1:{port}") for _ in range(clients)]
            started = time.monotonic()
            with ThreadPoolExecutor(clients) as pool:
                done = sum(pool.map(one_client, range(clients), every, [started + seconds] * clients))
            return done / (time.monotonic() - started)

        try:
            one = rate(1, 20)
            rate(32, 20)  # what 32 clients need for the first time
            before = megabytes()
            many = rate(32, 120)
            after = megabytes()
        finally:
            server.send_signal(signal.SIGINT)
    with capsys.disabled():
        print(f"\n{many:.1f} captions/s for 32 clients, {one:.1f} for one; {before:.0f} MiB before, {after:.0f} after")
    assert after < before + 50


# Without a browser or a server


def test_company_changes_no_caption(server, pictures):
    """All pictures at once, and each alone: the same captions, confidences and heat maps."""
    options = service.decoding_options("long", "safe", 3, attention=True)
    together = [server.captioner.submit(path, path, options) for path in pictures]
    for path, captions in zip(pictures, together, strict=True):
        (alone,) = server.captioner._caption(
            [service.Request(prepare_picture(path, server.captioner.model.config), options, None)]
        )
        assert [caption.text for caption in alone] == [caption.text for caption in captions.result()]
        for one, other in zip(alone, captions.result(), strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-4)
            for (word, seen), (same, also) in zip(one.words, other.words, strict=True):
                assert word == same and np.abs(seen - also).max() < 1e-5


def test_a_failure_reaches_who_asked_and_nobody_else(server, pictures):
    wrong = service.decoding_options("normal", "safe", 1) | {"max_length": 1000}
    right = service.decoding_options("normal", "safe", 1)
    asked = [server.captioner.submit(pictures[0], "", options) for options in (right, wrong, right)]
    with pytest.raises(UserError, match="max_length 1000"):
        asked[1].result()
    assert asked[0].result()[0] == asked[2].result()[0]


def test_longer_and_shorter_and_bolder(server, pictures):
    """Each setting does what it says, over all pictures."""
    torch.manual_seed(0)

    def found(length: service.Length, style: service.Style) -> list[Caption]:
        options = service.decoding_options(length, style, 3)
        waiting = [server.captioner.submit(path, path, options) for path in pictures]
        return [caption for captions in waiting for caption in captions.result()]

    def words(length: service.Length, style: service.Style) -> float:
        return float(np.mean([len(caption.text.split()) for caption in found(length, style)]))

    for style in ("safe", *service.SAMPLED):
        assert words("short", style) < words("normal", style) < words("long", style), style
    # Of three beams the first, as what is drawn is mostly that one too: the mean of all three was below it by rounding.
    scores = {style: [caption.score for caption in found("normal", style)] for style in ("safe", *service.SAMPLED)}
    safe, varied, creative = np.mean(scores["safe"][::3]), np.mean(scores["varied"]), np.mean(scores["creative"])
    assert safe > varied > creative


def test_places_in_words():
    for row, column, name in ((0, 0, "top left"), (1, 1, "middle"), (2, 1, "bottom"), (1, 2, "right")):
        heat = np.zeros((HEAT_SIDE, HEAT_SIDE), np.uint8)
        heat[4 + 8 * row, 4 + 8 * column] = 255
        assert place_of(heat) == name


def test_nothing_in_a_card_is_markup():
    hostile = "<script>${1}{{2}}\"'"
    finish = Finish(prepend=hostile, append=hostile)
    caption = Caption(hostile, 0.5, [(hostile, np.eye(4))])
    html = results([card(hostile, b"", 1.0, [caption], finish)], [hostile])
    html += table(hostile, [(hostile, caption)], 1, [hostile]) + progress(1, 2, hostile, [(hostile, caption)])
    html += model_line(hostile, 1)
    assert "<script" not in html and "${" not in html and "{{" not in html and "\"'" not in html


def test_the_command_line(model_file, pictures, tmp_path):
    """It says where it is, answers there and nowhere else, and ends when told to."""
    port = free_port()
    command = ("app.py", "--port", port, "--precision", "fp32")
    shutil.copy(model_file, tmp_path / MODEL_FILE)  # the newest model here
    environment = {"GRADIO_TEMP_DIR": tmp_path / "gradio"}
    with launch(*command, cwd=tmp_path, environment=environment, stderr=None) as process:
        said = process.stdout.readline()
        assert said.startswith(f"model       {tmp_path / MODEL_FILE}, on cpu in float32; tokens by {in_words('fp32')}")
        assert process.stdout.readline().split()[1] == f"http://127.0.0.1:{port}/"
        found = connect(f"http://127.0.0.1:{port}").predict(handle_file(pictures[0]), api_name="/caption")
        assert found[0]["caption"] == caption_image(
            pictures[0], model_file, "cpu", do_sample=False, num_beams=3, precision="fp32"
        )
        # A second one stops before it reads its model, which is not even there.
        second = finished(*command, "--model", tmp_path / "absent.safetensors", code=2)
        assert second.stderr.count("\n") == 1
        assert f"port {port} of 127.0.0.1 is in use" in second.stderr and "choose another --port" in second.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


@pytest.mark.parametrize(
    ("flags", "why"),
    [(("--port", 70000), "--port 70000"), (("--host", "192.0.2.1"), "cannot listen at 192.0.2.1, port 7860")],
)
def test_where_nothing_can_listen(flags, why, tmp_path):
    """192.0.2.1 is no machine's address."""
    done = finished("app.py", *flags, "--model", tmp_path / "absent.safetensors", code=2)
    assert done.stderr.count("\n") == 1 and why in done.stderr and "absent" not in done.stderr


def test_a_missing_gradio_is_one_line(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError")
    done = finished("app.py", environment={"PYTHONPATH": tmp_path}, code=2)
    assert done.stderr.count("\n") == 1
    assert "pip install -r requirements/app.txt" in done.stderr
