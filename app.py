"""The web page: python app.py [--model X] [--port N]. Drop pictures on it, paste them or give an address, and read captions.

Every caption comes with how sure the model was and, for each word, where in the picture it looked; a folder of pictures
becomes a CSV. Programs reach the same model at the endpoint /caption, by gradio's client. What many clients ask for at the
same time is captioned together. Nothing is loaded from elsewhere, and nothing is sent elsewhere. page.py has what the page
looks like.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from captioning.models import load_model, newest_model
from captioning.page import COLOURS, HEADER, NO_MODEL, PAGE, STYLE, WORDS, card, progress, results, working
from captioning.pipeline import Caption, caption_batch
from config import UserError
from data import pictures
from data.fetch import fetch_picture
from data.layouts import PICTURE_SUFFIXES
from dataset import prepare_picture
from model import ImageCaptionModel
from utils import ROOT, StopSignal, choose_device, choose_precision, parse_flags, run_script

if TYPE_CHECKING:
    import gradio as gr

MOST_AT_ONCE = 16  # pictures that are captioned together
MOST_SHOWN = 24  # pictures at a time in the page, each with its heat maps; folders have no limit
PREVIEW = 720  # pixels of the longer side of a picture in the page
DEMO = [sys.executable, str(ROOT / "main.py"), "--preset", "demo", "--no-upload"]
DECODING = threading.Semaphore(4)  # pictures decoded at a time: a large one takes a quarter of a GiB

Length = Literal["short", "normal", "long"]
Style = Literal["safe", "varied", "creative"]
SAMPLED: dict[Style, dict[str, float]] = {
    "varied": {"temperature": 0.7, "top_p": 0.9},
    "creative": {"temperature": 1.1, "top_p": 0.95},
}


@dataclass(kw_only=True)
class AppConfig:
    """A web page that captions pictures, at http://127.0.0.1:7860 unless told otherwise."""

    model: str | None = None
    """A .safetensors file, a folder or user/name (default: the newest model here; with none, the page offers a demo)."""
    host: str = "127.0.0.1"
    """Where to listen: 127.0.0.1 is for this machine alone, 0.0.0.0 for whoever can reach it."""
    port: int = 7860
    """Where to listen."""
    max_megabytes: int = 20
    """Largest file of a picture that is taken, in MiB."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to run."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of matrix products; auto: fp32 on a GPU, where half precision would let pictures that are captioned together touch
    each other's captions, and elsewhere bf16 where it is measured to be faster."""
    debug: bool = False
    """Show tracebacks of errors."""


# The model


@dataclass(eq=False)
class Request:
    """A picture, uint8 (3, S, S), that waits for its captions."""

    pixels: Tensor
    options: dict[str, Any]
    captions: Future[list[Caption]]


class Captioner:
    """A model that many may ask at the same time: whatever waits when it is free, and has the same options, it captions
    together. No caption depends on what else is captioned: every picture has rows of its own, and none is padded."""

    def __init__(self, device: str, precision: str) -> None:
        self.device = choose_device(device)[0]
        self.precision = "fp32" if precision == "auto" and self.device.type == "cuda" else precision
        self.model: ImageCaptionModel | None = None
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def load(self, source: str) -> None:
        """Takes this model from now on."""
        self.model = load_model(source, str(self.device))

    def submit(self, picture: str | bytes, name: str, options: dict[str, Any]) -> Future[list[Caption]]:
        """The captions, the best first, that a picture will have. Raises UserError where it cannot be read."""
        if self.model is None:
            raise UserError("there is no model here yet: python main.py --preset demo trains one")
        with DECODING:
            request = Request(prepare_picture(picture, self.model.config, name), options, Future())
        with self.changed:
            self.waiting.append(request)
            self.changed.notify()
        return request.captions

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                options = self.waiting[0].options
                together = [request for request in self.waiting if request.options == options][:MOST_AT_ONCE]
                for request in together:
                    self.waiting.remove(request)
            try:
                for request, captions in zip(together, self._caption(together), strict=True):
                    request.captions.set_result(captions)
            except Exception as error:  # whoever asked is to hear of it, and the next are to be served
                for request in together:
                    if not request.captions.done():
                        request.captions.set_exception(error)

    def _caption(self, requests: list[Request]) -> list[list[Caption]]:
        assert self.model is not None
        options = requests[0].options.copy()
        keep, longest_first = options.pop("keep"), options.pop("longest_first")
        pixels = torch.stack([request.pixels for request in requests])
        answers = caption_batch(self.model, pixels, self.precision, scores=True, **options)
        if longest_first is not None:
            for captions in answers:
                captions.sort(key=lambda caption: len(caption.text), reverse=longest_first)
        answers = [captions[:keep] for captions in answers]
        if "do_sample" in options:  # beams come in order
            for captions in answers:
                captions.sort(key=lambda caption: caption.score or 0, reverse=True)
        return answers


def decoding_options(
    length: Length, style: Style, captions: int, beams: int = 3, attention: bool = False
) -> dict[str, Any]:
    """What Captioner.submit is to be told. Safe captions are searched with beams (1: the likeliest word every time);
    longer or shorter ones are the best of more beams by another length_penalty. Others are drawn, and longer or shorter
    ones are the longest or shortest of three times as many."""
    options: dict[str, Any] = {"attention": attention, "keep": captions, "longest_first": None}
    if style == "safe":
        penalty = {"short": 0.0, "normal": 1.0, "long": 2.0}[length]
        return options | {
            "num_beams": max(beams, captions * (1 if length == "normal" else 2)),
            "num_return_sequences": captions,
            "length_penalty": penalty,
            "min_length": 12 if length == "long" else 0,
        }
    if length != "normal":
        options["longest_first"] = length == "long"
    return options | {
        "do_sample": True,
        "num_return_sequences": captions * (1 if length == "normal" else 3),
        **SAMPLED[style],
    }


# What the page asks for


@dataclass(frozen=True)
class Source:
    """Where a picture is: a file that was sent here, or an address. Which of them is never guessed."""

    name: str
    path: str | None = None
    url: str | None = None

    def read(self, most_bytes: int) -> bytes:
        """The file's content. Raises UserError."""
        if self.url is not None:
            return fetch_picture(self.url, max_bytes=most_bytes)
        try:
            return Path(self.path or "").read_bytes()
        except OSError:
            raise UserError(f"{self.name}: no longer here: send it again") from None


def preview(content: bytes) -> bytes:
    """A JPEG of a picture that prepare_picture has read, small enough to stand in the page."""
    with DECODING:
        image = Image.fromarray(pictures.decode(content, PREVIEW))
    image.thumbnail((PREVIEW, PREVIEW))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def show(captioner: Captioner, sources: Sequence[Source], options: dict[str, Any], most_bytes: int) -> str:
    """Cards of pictures with their captions, in order; what could not be captioned has a line."""
    waiting, cards, errors = [], [], []
    for source in sources[:MOST_SHOWN]:
        try:
            content = source.read(most_bytes)
            waiting.append((source.name, content, captioner.submit(content, source.name, options)))
        except UserError as error:
            errors.append(str(error))
    if len(sources) > MOST_SHOWN:
        errors.append(f"{MOST_SHOWN} of {len(sources)} pictures are shown: the Folder tab takes any number")
    for name, content, captions in waiting:
        config = captioner.model.config  # type: ignore[union-attr]
        try:
            cards.append(card(name, preview(content), config.image_size / (config.resize_size or 1), captions.result()))
        except UserError as error:
            errors.append(str(error))
    return results(cards, errors)


def caption_folder(
    captioner: Captioner, sources: Sequence[Source], options: dict[str, Any], table: Path
) -> Iterator[str]:
    """Writes a CSV of file, caption and confidence, and yields how far it is, as HTML."""
    wanted = [
        s for s in sources if Path(s.name).suffix.lower() in PICTURE_SUFFIXES and not Path(s.name).name.startswith(".")
    ]
    done: list[tuple[str, Caption]] = []
    errors: list[str] = []
    waiting: deque[tuple[str, Future[list[Caption]]]] = deque()
    started = said = time.monotonic()
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "confidence"])
        for source in [*wanted, None]:
            if source is not None:
                try:
                    waiting.append((source.name, captioner.submit(str(source.path), source.name, options)))
                except UserError as error:
                    errors.append(str(error))
            while waiting and (source is None or len(waiting) > 2 * MOST_AT_ONCE):
                name, captions = waiting.popleft()
                done.append((name, captions.result()[0]))
                writer.writerow([name, done[-1][1].text, f"{done[-1][1].score:.4f}"])
                if time.monotonic() - said > 0.3:
                    said = time.monotonic()
                    rate = len(done) / (said - started)
                    left = (len(wanted) - len(done) - len(errors)) / rate
                    text = f"{len(done) + len(errors):,} of {len(wanted):,} · {rate:.1f} pictures/s · {left:.0f} s left"
                    yield progress(len(done) + len(errors), len(wanted), text, done[:-9:-1], errors)
    rest = len(sources) - len(wanted)
    text = f"{len(done):,} of {len(wanted):,} pictures captioned in {time.monotonic() - started:.1f} s"
    text += f"; {rest} other file{'s' if rest > 1 else ''} left out" if rest else ""
    yield progress(1, 1, text, done[:-9:-1], errors)


class Training:
    """The demo, trained by a process of its own."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.line = "starting"
        self.lock = threading.Lock()

    def start(self) -> None:
        """Starts it, unless it runs already."""
        with self.lock:
            if self.running:
                return
            pipes: dict[str, Any] = {
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.STDOUT,
            }
            self.process = subprocess.Popen(DEMO, text=True, encoding="utf-8", errors="replace", **pipes)
            threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:  # a progress bar's carriage returns end lines too
            self.line = line.strip() or self.line

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Has it save what it has, and end."""
        if self.running and self.process is not None:
            self.process.terminate()
            self.process.wait()


# The page


def gradio() -> Any:
    """The library, told not to call home, and to count no events. Raises UserError where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # or it works out percentiles of the last 10,000 at every request
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(sys.maxsize)
    try:
        import gradio
    except ImportError:
        raise UserError("the web page is made with gradio: pip install -r requirements-app.txt") from None
    return gradio


def build(captioner: Captioner, most_bytes: int, training: Training) -> gr.Blocks:
    """The page and its endpoint /caption."""
    gr = gradio()

    def upload(**options: Any) -> Any:
        """A place for files. gradio's own would also fetch addresses, without a limit, and leave an empty file for each
        that is sent. (A subclass would have gradio write an app.pyi beside this file.)"""
        field = gr.File(**options)
        move = field.async_move_resource_to_block_cache

        async def refuse_addresses(path: Any) -> Any:
            if "://" in str(path):
                raise gr.Error("an address goes into url, a file into picture", print_exception=False)
            return await move(path)

        def as_sources(sent: Any) -> list[Source]:
            files = [] if sent is None else [sent] if field.file_count == "single" else sent.root
            return [Source(file.orig_name or Path(file.path).name, path=file.path) for file in files]

        field.async_move_resource_to_block_cache, field.preprocess = refuse_addresses, as_sources
        return field

    def show_files(files: list[Source], length: Length, style: Style, number: int) -> tuple[Any, ...]:
        """Dropped pictures; the place for them is empty again afterwards."""
        return None, *show_sources(files, length, style, number)

    def show_url(url: str, length: Length, style: Style, number: int) -> tuple[Any, ...]:
        """A picture's address."""
        return show_sources([Source(url.strip(), url=url.strip())] if url.strip() else [], length, style, number)

    def show_sources(sources: list[Source], length: Length, style: Style, number: int) -> tuple[Any, ...]:
        """The results, what they are of, and the buttons: captions again, but no table."""
        html = show(captioner, sources, decoding_options(length, style, number, attention=True), most_bytes)
        return html, sources, gr.update(visible=bool(sources)), gr.update(visible=False)

    def show_folder(files: list[Source], length: Length, style: Style) -> Iterator[tuple[Any, ...]]:
        """Progress, and at the end the table."""
        path = Path(tempfile.mkdtemp(dir=table.GRADIO_CACHE)) / "captions.csv"  # gradio deletes it in time
        for html in caption_folder(captioner, files, decoding_options(length, style, 1), path):
            yield None, html, [], gr.update(visible=False), gr.update(visible=False)
        yield None, html, [], gr.update(visible=False), gr.update(value=str(path), visible=True)

    def caption(
        picture: list[Source], url: str, length: Length, style: Style, captions: float, beams: float
    ) -> list[dict[str, Any]]:
        """Captions of one picture, a file or an address, the best first: [{"caption": ..., "confidence": 0 to 1}, ...]."""
        try:
            if bool(picture) == bool(url):
                raise UserError("give either a picture or a url")
            source = Source(url, url=url) if url else picture[0]
            options = decoding_options(length, style, int(captions), int(beams))
            found = captioner.submit(source.read(most_bytes), source.name, options).result()
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return [{"caption": each.text, "confidence": round(each.score or 0, 4)} for each in found]

    def train() -> Iterator[tuple[str, Any, Any]]:
        training.start()
        while training.running:
            yield working(training.line), gr.skip(), gr.skip()
            time.sleep(0.5)
        if training.process is not None and training.process.returncode == 0:
            captioner.load(newest_model())
            yield "", gr.update(visible=False), gr.update(visible=True)
        else:
            yield results([], [training.line]), gr.skip(), gr.skip()

    ready = captioner.model is not None
    with gr.Blocks(title="Captions for pictures", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(HEADER)
        with gr.Column(visible=not ready, elem_id="untrained") as untrained:
            gr.HTML(NO_MODEL)
            start = gr.Button("Train the demo", variant="primary")
            trained = gr.HTML()
        with gr.Column(visible=ready) as main:
            with gr.Tabs():
                with gr.Tab("Pictures"):
                    files = upload(
                        label="Drop or paste pictures", file_count="multiple", elem_id="pictures", height=150
                    )
                    url = gr.Textbox(
                        label="Or the address of a picture",
                        placeholder="https://",
                        submit_btn="Caption it",
                        elem_id="address",
                    )
                with gr.Tab("Folder"):
                    folder = upload(
                        label="Choose or drop a folder", file_count="directory", elem_id="folder", height=150
                    )
            with gr.Row(elem_id="settings"):
                length = gr.Radio(
                    [("Short", "short"), ("Normal", "normal"), ("Long", "long")],
                    value="normal",
                    label="Length",
                    info="how much a caption tells",
                )
                style = gr.Radio(
                    [("Safe", "safe"), ("Varied", "varied"), ("Creative", "creative")],
                    value="safe",
                    label="Style",
                    info="creative surprises more, and errs more",
                )
                number = gr.Radio([1, 3, 5], value=3, label="Captions", info="of each picture")
            again = gr.Button("Caption again with these settings", visible=False)
            shown = gr.HTML(js_on_load=WORDS, elem_id="results")
            table = gr.DownloadButton("Download captions.csv", visible=False)
        sources = gr.State([])
        picture = upload(label="picture", file_count="single", visible=False)
        address = gr.Textbox("", label="url", visible=False)
        captions = gr.Number(1, label="captions", minimum=1, maximum=5, precision=0, visible=False)
        beams = gr.Number(3, label="beams", minimum=1, maximum=10, precision=0, visible=False)
        answer = gr.JSON(label="captions", visible=False)
        ask = gr.Button(visible=False)

        settings = [length, style, number]
        page_only: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
        seen = [shown, sources, again, table]
        files.upload(show_files, [files, *settings], [files, *seen], **page_only)
        url.submit(show_url, [url, *settings], seen, **page_only)
        again.click(show_sources, [sources, *settings], seen, **page_only)
        folder.upload(show_folder, [folder, length, style], [folder, *seen], show_progress="hidden", **page_only)
        start.click(train, None, [trained, untrained, main], show_progress="hidden", **page_only)
        ask.click(
            caption,
            [picture, address, length, style, captions, beams],
            answer,
            api_name="caption",
            concurrency_limit=None,
        )
        if not ready:  # whoever comes after the training is to find it done
            page.load(
                lambda: [gr.update(visible=(captioner.model is None) == shown) for shown in (True, False)],
                None,
                [untrained, main],
                show_progress="hidden",
                **page_only,
            )
    return page


def launch(page: gr.Blocks, host: str, port: int, most_bytes: int) -> str:
    """Serves the page until page.close() and returns its address. Raises UserError where it cannot listen there."""
    gr = gradio()
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    theme.set(**COLOURS)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=most_bytes,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            show_error=True,
            run_history=False,
            enable_monitoring=False,
            footer_links=["api"],
            theme=theme,
            css=STYLE,
            js=PAGE,
        )
    except OSError as error:
        raise UserError(f"cannot listen at {host} port {port} ({error}): choose another --port or --host") from error
    return str(address)


def main() -> int:
    """The command line: serves until it is stopped."""
    config = parse_flags(AppConfig, __doc__)
    gradio()
    captioner, training = Captioner(config.device, config.precision), Training()
    source = config.model
    if source is None:
        try:
            source = newest_model()
        except UserError:
            print("no model here: the page offers to train the demo")
    if source is not None:
        captioner.load(source)
        precision = str(choose_precision(captioner.precision, captioner.device)[0])[6:]
        print(f"model       {source}, on {captioner.device} in {precision}")
    stop = StopSignal()
    page = build(captioner, config.max_megabytes << 20, training)
    print(
        f"page        {launch(page, config.host, config.port, config.max_megabytes << 20)} (Ctrl-C stops it)",
        flush=True,
    )
    try:
        while stop.received is None:
            time.sleep(0.2)
    finally:
        training.stop()
        page.close(verbose=False)
    return stop.exit_code


if __name__ == "__main__":
    run_script(main)
