"""What answers the web page and its endpoint: a model that many ask at the same time, and the demo's training.

    captioner = Captioner("auto", "auto")
    captioner.load("vit-gpt2-captioning.safetensors")
    captioner.submit("cat.jpg", "cat.jpg", decoding_options("normal", "safe", captions=3)).result()

app.py makes the page. Nothing here knows gradio. What needs torch is imported late, for app.py --help.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captioning import decoder
from captioning.decoder import BusyError
from captioning.models import load_model
from captioning.page import card, progress, results
from config import NUM_BEAMS, UserError
from data.kinds import in_words, is_picture, left_out
from utils import ROOT, choose_device, in_one_line, named

if TYPE_CHECKING:
    from torch import Tensor

    from captioning.pipeline import Caption
    from model import ImageCaptionModel

MOST_AT_ONCE = 16  # pictures that are captioned together
MOST_WAITING = 400  # pictures that wait for their captions; the next are told so
MOST_SHOWN = 24  # pictures at a time in the page, each with its heat maps; folders have no limit
MOST_ERRORS = 100  # lines of what could not be captioned in a folder; the others are counted
DEMO = [sys.executable, str(ROOT / "main.py"), "--preset", "demo", "--no-upload"]

Length = Literal["short", "normal", "long"]
Style = Literal["safe", "varied", "creative"]
SAMPLED: dict[Style, dict[str, float]] = {
    "varied": {"temperature": 0.7, "top_p": 0.9},
    "creative": {"temperature": 1.1, "top_p": 0.95},
}


@dataclass(eq=False)
class Request:
    """A picture, uint8 (3, S, S), that waits for its captions."""

    pixels: Tensor
    options: dict[str, Any]
    captions: Future[list[Caption]]
    group: str = ""
    """Equal for requests that are captioned together."""


class Captioner:
    """A model that many may ask at the same time: whatever waits when it is free, and has the same options, it captions
    together. No caption depends on what else is captioned: every picture has rows of its own, and none is padded."""

    def __init__(self, device: str, precision: str) -> None:
        self.device = choose_device(device)[0]
        self.precision = "fp32" if precision == "auto" and self.device.type == "cuda" else precision
        self.model: ImageCaptionModel | None = None
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()
        decoder.shared()  # its processes start, and will be ready when pictures come
        threading.Thread(target=self._work, daemon=True).start()

    def load(self, source: str) -> None:
        """Takes this model from now on."""
        self.model = load_model(source, str(self.device))

    def submit(self, picture: str | bytes, name: str, options: dict[str, Any]) -> Future[list[Caption]]:
        """The captions, the best first, that a picture will have. Raises UserError where it cannot be read."""
        group = repr(sorted(options.items()))
        if self.model is None:
            raise UserError("there is no model here yet: python main.py --preset demo trains one")
        self._room()
        request = Request(decoder.shared().prepare(picture, self.model.config, name), options, Future(), group)
        with self.changed:
            self._room()
            self.waiting.append(request)
            self.changed.notify()
        return request.captions

    def _room(self) -> None:
        if len(self.waiting) >= MOST_WAITING:
            raise BusyError(f"busy: {MOST_WAITING} pictures are waiting already: try again in a moment")

    def _work(self) -> None:
        while True:
            together = self._next()
            if not together:
                continue
            try:
                for request, captions in zip(together, self._caption(together), strict=True):
                    request.captions.set_result(captions)
            except (
                BaseException
            ) as error:  # a tokenizer's panic too: who asked is to hear of it, the next are to be served
                if not isinstance(error, UserError):
                    error = UserError(in_one_line(f"captioning failed ({named(error)})"))
                for request in together:
                    if not request.captions.done():
                        request.captions.set_exception(error)

    def _next(self) -> list[Request]:
        """What is captioned together next; whoever has left is passed over."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            group = self.waiting[0].group
            together = [request for request in self.waiting if request.group == group][:MOST_AT_ONCE]
            for request in together:
                self.waiting.remove(request)
        return [request for request in together if request.captions.set_running_or_notify_cancel()]

    def _caption(self, requests: list[Request]) -> list[list[Caption]]:
        import torch

        from captioning.pipeline import caption_batch

        assert self.model is not None
        options = requests[0].options.copy()
        keep, longest_first = options.pop("keep"), options.pop("longest_first")
        pixels = torch.stack([request.pixels for request in requests])
        answers = caption_batch(self.model, pixels, self.precision, scores=True, **options)
        for captions in answers:
            if longest_first is not None:
                captions.sort(key=lambda caption: len(caption.text), reverse=longest_first)
            del captions[keep:]
            if "do_sample" in options:  # beams come in order
                captions.sort(key=lambda caption: caption.score or 0, reverse=True)
        return answers


def decoding_options(
    length: Length, style: Style, captions: int, beams: int = NUM_BEAMS, attention: bool = False
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
        from data.fetch import fetch_picture

        if self.url is not None:
            return fetch_picture(self.url, max_bytes=most_bytes)
        try:
            return Path(self.path or "").read_bytes()
        except OSError:
            raise UserError(f"{self.name}: no longer here: send it again") from None


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
            shown = decoder.shared().preview(content, name)
            cards.append(card(name, shown, config.image_size / (config.resize_size or 1), captions.result()))
        except UserError as error:
            errors.append(str(error))
    return results(cards, errors)


def caption_folder(
    captioner: Captioner, sources: Sequence[Source], options: dict[str, Any], table: Path
) -> Iterator[str]:
    """Writes a CSV of file, caption and confidence, and yields how far it is, as HTML. Holds the newest lines alone."""
    shown = [source for source in sources if not Path(source.name).name.startswith(".")]
    wanted = [source for source in shown if is_picture(source.name)]
    done, failed = 0, 0
    newest: deque[tuple[str, Caption]] = deque(maxlen=8)
    errors: list[str] = []
    waiting: deque[tuple[str, Future[list[Caption]]]] = deque()
    started = said = time.monotonic()
    try:
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "caption", "confidence"])
            for source in [*wanted, None]:
                if source is not None:
                    waiting.append((source.name, _patiently(captioner, source, options)))
                while waiting and (source is None or len(waiting) > 2 * MOST_AT_ONCE):
                    name, captions = waiting.popleft()
                    try:
                        best = captions.result()[0]
                    except UserError as error:
                        failed += 1
                        errors += [str(error)] if failed <= MOST_ERRORS else []
                        continue
                    done += 1
                    newest.appendleft((name, best))
                    writer.writerow([name, best.text, f"{best.score:.4f}"])
                    if time.monotonic() - said > 0.3:
                        said = time.monotonic()
                        rate, ended = done / (said - started), done + failed
                        left = (len(wanted) - ended) / rate
                        text = f"{ended:,} of {len(wanted):,} · {rate:.1f} pictures/s · {left:.0f} s left"
                        yield progress(ended, len(wanted), text, newest, errors)
    finally:  # whoever has left is not captioned for
        for _, captions in waiting:
            captions.cancel()
    errors += [f"and {failed - MOST_ERRORS:,} more"] if failed > MOST_ERRORS else []
    text = f"{done:,} of {len(wanted):,} pictures captioned in {time.monotonic() - started:.1f} s"
    others = in_words(left_out(source.name for source in shown))
    text += f"; {others}" if others else ""
    yield progress(1, 1, text, newest, errors)


def _patiently(captioner: Captioner, source: Source, options: dict[str, Any]) -> Future[list[Caption]]:
    """Submits once there is room; a picture that cannot be read fails in its turn."""
    while True:
        try:
            return captioner.submit(str(source.path), source.name, options)
        except BusyError:
            time.sleep(0.2)
        except UserError as error:
            failed: Future[list[Caption]] = Future()
            failed.set_exception(error)
            return failed


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
            self.line = in_one_line(line.strip()[-500:]) or self.line

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Has it save what it has, and end."""
        if self.running and self.process is not None:
            self.process.terminate()
            self.process.wait()
