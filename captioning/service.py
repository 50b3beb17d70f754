"""Answer the web page and its endpoint: caption the pictures of many clients in batches, and train the demo.

    captioner = Captioner("auto", "auto")
    captioner.load("vit-gpt2-captioning.safetensors")
    captioner.submit("cat.jpg", "cat.jpg", decoding_options("normal", "safe", captions=3)).result()

app.py makes the page. Nothing here knows gradio. torch is imported late, so that app.py --help is fast.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captioning import decoder
from captioning.controls import Finish, Length, length_options
from captioning.decoder import BusyError
from captioning.models import load_model
from captioning.page import MOST_ROWS, card, model_line, progress, results, table
from config import NUM_BEAMS, UserError
from data.kinds import in_words, is_picture, left_out
from utils import ROOT, choose_device, in_one_line, named

if TYPE_CHECKING:
    from torch import Tensor

    from captioning.pipeline import Caption
    from model import ImageCaptionModel

MOST_AT_ONCE = 16  # pictures in a batch
MOST_WAITING = 400  # pictures that wait for their captions; more are refused
MOST_SHOWN = 24  # pictures at a time in the page, each with its heat maps; a folder may have more
MOST_ERRORS = 100  # errors that are listed for a folder; the others are counted
DEMO = [sys.executable, str(ROOT / "main.py"), "--preset", "demo", "--no-upload"]

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
    """Equal for requests that may share a batch."""


class Captioner:
    """A model that many clients use at the same time: waiting pictures with equal options are captioned in one batch.
    No caption depends on the other pictures of its batch: they share no rows, and none is padded."""

    def __init__(self, device: str, precision: str) -> None:
        self.device = choose_device(device)[0]
        self.precision = "fp32" if precision == "auto" and self.device.type == "cuda" else precision
        self.model: ImageCaptionModel | None = None
        self.name = ""
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()
        decoder.shared()  # starts its processes, so that they are ready for the first picture
        threading.Thread(target=self._work, daemon=True).start()

    def load(self, source: str, allow_pickle: bool = False) -> None:
        """Use this model from now on."""
        self.model = load_model(source, str(self.device), allow_pickle=allow_pickle)
        path = Path(source)
        self.name = path.name.removesuffix(".safetensors") if path.exists() else source

    def about(self) -> str:
        """HTML that says which model answers; "" while there is none."""
        return model_line(self.name, self.model.num_parameters) if self.model else ""

    def submit(self, picture: str | bytes, name: str, options: dict[str, Any]) -> Future[list[Caption]]:
        """Queue a picture; the result will be its captions, the best first. Raises UserError if it cannot be read."""
        group = repr(sorted(options.items()))
        if self.model is None:
            raise UserError("there is no model here yet: train one (python main.py --preset demo)")
        self._check_room()
        request = Request(decoder.shared().prepare(picture, self.model.config, name), options, Future(), group)
        with self.changed:
            self._check_room()
            self.waiting.append(request)
            self.changed.notify()
        return request.captions

    def _check_room(self) -> None:
        if len(self.waiting) >= MOST_WAITING:
            raise BusyError(f"busy: {MOST_WAITING} pictures are already waiting: try again in a moment")

    def _work(self) -> None:
        while True:
            together = self._next()
            if not together:
                continue
            try:
                for request, captions in zip(together, self._caption(together), strict=True):
                    request.captions.set_result(captions)
            except BaseException as error:  # also a tokenizer's panic: its clients get an error, later ones are served
                if not isinstance(error, UserError):
                    error = UserError(in_one_line(f"captioning failed ({named(error)})"))
                for request in together:
                    if not request.captions.done():
                        request.captions.set_exception(error)

    def _next(self) -> list[Request]:
        """Wait for requests, and return the next batch; requests of clients that disconnected are dropped."""
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
        pixels = torch.stack([request.pixels for request in requests])
        answers = caption_batch(self.model, pixels, self.precision, scores=True, **options)
        for captions in answers:
            if "do_sample" in options:  # beams are already sorted by score
                captions.sort(key=lambda caption: caption.score or 0, reverse=True)
        return answers


def decoding_options(
    length: Length, style: Style, captions: int, beams: int = NUM_BEAMS, attention: bool = False, **controls: Any
) -> dict[str, Any]:
    """Options for Captioner.submit. Safe captions are the best of a beam search (1 beam: greedy); the other styles sample.
    For length see controls.length_options. `controls` are more options of model.generate; empty ones are dropped."""
    options: dict[str, Any] = {"attention": attention, "num_return_sequences": captions}
    sampled = style != "safe"
    options |= {"do_sample": True, **SAMPLED[style]} if sampled else {"num_beams": max(beams, captions)}
    options |= {name: value for name, value in controls.items() if value}
    return options | length_options(length, captions, beams, sampled)


# Requests of the page


@dataclass(frozen=True)
class Settings:
    """What the page's settings and the parameters of its endpoint say."""

    length: Length = "normal"
    style: Style = "safe"
    captions: int = 1
    prefix: str = ""
    without: str = ""
    """Words that captions do not have, separated by commas."""
    prepend: str = ""
    append: str = ""
    percent: float | None = None
    """Captions that the model is less sure of are left out."""

    def options(self, beams: int = NUM_BEAMS, attention: bool = False) -> dict[str, Any]:
        """Options for Captioner.submit."""
        words = [word.strip() for word in self.without.split(",") if word.strip()]
        controls = {"prefix": self.prefix.strip(), "bad_words": words}
        return decoding_options(self.length, self.style, self.captions, beams, attention, **controls)

    def finish(self) -> Finish:
        """What is done to the captions afterwards."""
        return Finish(prepend=self.prepend, append=self.append, min_confidence=(self.percent or 0) / 100)


@dataclass(frozen=True)
class Source:
    """A picture to read: an uploaded file (path) or a URL. Which of them is never guessed from the name."""

    name: str
    path: str | None = None
    url: str | None = None

    def read(self, most_bytes: int) -> bytes:
        """Read the file's content. Raises UserError."""
        from data.fetch import PrivateAddressError, fetch_picture

        if self.url is not None:
            try:
                return fetch_picture(self.url, max_bytes=most_bytes)
            except PrivateAddressError as error:
                raise UserError(f"{error}: save the picture, and give the file instead") from None
        try:
            return Path(self.path or "").read_bytes()
        except OSError:
            raise UserError(f"{self.name}: the file was deleted: upload it again") from None

    @property
    def place(self) -> list[tuple[bool, str]]:
        """For sorting as example_usage.py does: the files of a folder by name, then the folders in it."""
        *folders, name = self.name.split("/")
        return [*((True, folder) for folder in folders), (False, name)]


def full_url(text: str) -> str:
    """What a person wrote as the address of a picture, with https:// where a host name has no scheme."""
    text = text.strip()
    return f"https://{text}" if re.match(r"(?!-)[\w-]+(\.[\w-]+)*\.[^\W\d]{2,}(:\d+)?/", text) else text


def show(captioner: Captioner, sources: Sequence[Source], settings: Settings, most_bytes: int) -> str:
    """HTML of pictures with their captions, in order, and a line for each that could not be captioned."""
    options, finish = settings.options(attention=True), settings.finish()
    waiting, cards, errors = [], [], []
    for source in sources[:MOST_SHOWN]:
        try:
            content = source.read(most_bytes)
            waiting.append((source.name, content, captioner.submit(content, source.name, options)))
        except UserError as error:
            errors.append(str(error))
    if len(sources) > MOST_SHOWN:
        errors.append(f"{MOST_SHOWN} of {len(sources)} pictures are shown: the Folder tab takes thousands")
    for name, content, captions in waiting:
        config = captioner.model.config  # type: ignore[union-attr]
        try:
            shown = decoder.shared().preview(content, name)
            cards.append(card(name, shown, config.image_size / config.resize_size, captions.result(), finish))
        except UserError as error:
            errors.append(str(error))
    return results(cards, errors)


def caption_folder(captioner: Captioner, sources: Sequence[Source], settings: Settings, path: Path) -> Iterator[str]:
    """Write the CSV that example_usage.py --output captions.csv --scores writes, and yield progress as HTML: the newest
    rows, and at the end the first ones. No others stay in memory."""
    from captioning.outputs import CaptionFile  # imported late: it imports torch

    sources = [source for source in sources if not any(part[:1] == "." for part in source.name.split("/"))]
    wanted = sorted((source for source in sources if is_picture(source.name)), key=lambda source: source.place)
    options, finish = replace(settings, captions=1).options(), settings.finish()
    done, failed = 0, 0
    first: list[tuple[str, Caption]] = []
    newest: deque[tuple[str, Caption]] = deque(maxlen=8)
    errors = _same_names(wanted)
    waiting: deque[tuple[str, Future[list[Caption]]]] = deque()
    started = reported = time.monotonic()
    output = CaptionFile(path, scores=True)
    output.begin({})
    try:
        for source in [*wanted, None]:
            if source is not None:
                waiting.append((source.name, _patiently(captioner, source, options)))
            while waiting and (source is None or len(waiting) > 2 * MOST_AT_ONCE):
                name, captions = waiting.popleft()
                try:
                    best = finish.caption(captions.result()[0])
                except UserError as error:
                    failed += 1
                    errors += [str(error)] if failed <= MOST_ERRORS else []
                    continue
                done += 1
                newest.appendleft((name, best))
                first += [(name, best)] if done <= MOST_ROWS else []
                output.add(name, [best])
                if time.monotonic() - reported > 0.3:
                    reported = time.monotonic()
                    rate, ended = done / (reported - started), done + failed
                    left = (len(wanted) - ended) / rate
                    text = f"{ended:,} of {len(wanted):,} · {rate:.1f} pictures/s · {left:.0f} s left"
                    text += f" · {failed:,} could not be captioned" if failed else ""
                    yield progress(ended, len(wanted), text, newest)
    finally:  # a client that has left needs no more captions
        for _, captions in waiting:
            captions.cancel()
    errors += [f"and {failed - MOST_ERRORS:,} more"] if failed > MOST_ERRORS else []
    text = f"{done:,} of {len(wanted):,} pictures captioned in {time.monotonic() - started:.1f} s"
    others = in_words(left_out(source.name for source in sources))
    yield table(f"{text}; {others}" if others else text, first, done, errors)


def _same_names(sources: Sequence[Source]) -> list[str]:
    """A line if pictures have the same name, as of browsers and programs that send names without folders."""
    same = [name for name, number in Counter(source.name for source in sources).items() if number > 1]
    return [f"{same[0]}: several pictures have this name: their rows in the CSV cannot be told apart"] if same else []


def _patiently(captioner: Captioner, source: Source, options: dict[str, Any]) -> Future[list[Caption]]:
    """Wait until the queue has room, then submit. If the picture cannot be read, the future raises the UserError."""
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
    """Training of the demo, in a separate process."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.line = "starting"
        self.lock = threading.Lock()

    def start(self) -> None:
        """Start training, unless it is running already."""
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
        """Whether training has started and not ended."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Stop training; it saves a checkpoint first."""
        if self.running and self.process is not None:
            self.process.terminate()
            self.process.wait()
