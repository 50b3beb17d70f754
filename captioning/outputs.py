"""Where captions are written: a CSV or JSON-lines file, a text beside each picture; and a figure of where words looked.

    output = open_output("captions.csv", names)
    if "cat.jpg" not in output: output.add("cat.jpg", captions)

Captions are written picture by picture, so that a run that was stopped, or killed, goes on where it was: what is there
already is known, and half a line at the end is cut off. The files are layouts that training and evaluation read.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.models import is_url
from captioning.pipeline import Caption
from config import UserError, ViTGPT2Config
from data.pictures import PictureSource, decode
from utils import first_line, in_one_line, write_text

PANEL = 360  # pixels of a picture's longer side in a figure


def open_output(name: str, names: Sequence[str], num_captions: int = 1, scores: bool = False) -> CaptionFile | Sidecars:
    """The output of this name, for pictures of these names: a .csv or .jsonl file, or the word sidecar."""
    if Path(name).suffix.lower() in (".csv", ".jsonl"):
        return CaptionFile(Path(name), num_captions, scores)
    if name != "sidecar":
        raise UserError(f"output {name}: name a .csv or a .jsonl file, or say sidecar")
    if scores:
        raise UserError("output sidecar has no place for scores: use a .csv or a .jsonl file")
    return Sidecars(names)


class CaptionFile:
    """A line for each picture: file_name, then caption (and score), or captions (and scores) where there are several.

    A CSV has columns of their own for several: caption_1, caption_2, ... Names are as they were given, with line breaks
    and what is no Unicode as escapes.
    """

    def __init__(self, path: Path, num_captions: int = 1, scores: bool = False) -> None:
        """Goes on with the file if it is there. Raises UserError where it has other columns, or cannot be written."""
        self.path, self.scores = path, scores
        self.is_csv = path.suffix.lower() == ".csv"
        kinds = ("caption", "score") if scores else ("caption",)
        if num_captions == 1:
            endings = [""]
        else:
            endings = [f"_{number}" for number in range(1, num_captions + 1)] if self.is_csv else ["s"]
        self.columns = ["file_name", *(kind + ending for kind in kinds for ending in endings)]
        self.done: set[str] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._go_on()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}): choose another --output") from error

    def _go_on(self) -> None:
        """Reads what is there, and cuts off half a line at the end."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        header = self._line(self.columns) if self.is_csv else b'{"file_name": '
        if not whole and not header.startswith(content[: len(header)]):
            raise self._not_ours()
        try:
            lines = whole.decode("utf-8").split("\n")[:-1]
            if self.is_csv:
                first, *rows = csv.reader(lines) if lines else [self.columns]
                if first != self.columns or any(len(row) != len(self.columns) for row in rows):
                    raise self._not_ours()
                self.done = {row[0] for row in rows}
            else:
                records = [json.loads(line) for line in lines]
                if any(list(record) != self.columns for record in records):
                    raise self._not_ours()
                self.done = {record["file_name"] for record in records}
        except (ValueError, TypeError, csv.Error) as error:  # not UTF-8, not JSON, not objects
            raise self._not_ours() from error
        self._file.truncate(len(whole))
        if self.is_csv and not lines:
            self._write(header)

    def _not_ours(self) -> UserError:
        columns = ", ".join(self.columns)
        return UserError(
            f"{self.path}: already there, and not with the columns {columns} only: move it away, or say the same "
            "--num-captions and --scores as before"
        )

    def _line(self, values: Sequence[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue().encode()

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise _cannot_go_on(self.path, error) from error

    def __contains__(self, name: str) -> bool:
        return in_one_line(name) in self.done

    def add(self, name: str, captions: Sequence[Caption]) -> None:
        """Writes a picture's line."""
        name = in_one_line(name)
        texts: list[Any] = [caption.text for caption in captions]
        scores: list[Any] = [round(caption.score or 0.0, 4) for caption in captions] if self.scores else []
        if self.is_csv:
            self._write(self._line([name, *texts, *scores]))
        else:
            values = [name, *(own[0] if len(captions) == 1 else own for own in (texts, scores) if own)]
            record = dict(zip(self.columns, values, strict=True))
            self._write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.done.add(name)

    def __str__(self) -> str:
        return str(self.path)


class Sidecars:
    """name.txt beside each name.jpg, a caption a line. A text that is there is left as it is."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises UserError for names whose captions would have no file of their own."""
        owners: dict[Path, str] = {}
        for name in names:
            if is_url(name):
                raise UserError(
                    f"{name}: has no folder for a text beside it: use --output with a .csv or a .jsonl file"
                )
            if (owner := owners.setdefault(self._text(name), name)) != name:
                raise UserError(f"{name} and {owner} would share {self._text(name)}: use a .csv or a .jsonl file")

    def __contains__(self, name: str) -> bool:
        return self._text(name).exists()

    def add(self, name: str, captions: Sequence[Caption]) -> None:
        """Writes a picture's text, all of it or nothing."""
        text = self._text(name)
        try:
            write_text(text, "".join(f"{caption.text}\n" for caption in captions))
        except OSError as error:
            raise _cannot_go_on(text, error) from error

    def _text(self, name: str) -> Path:
        return Path(name).with_suffix(".txt")

    def __str__(self) -> str:
        return "texts beside the pictures"


def _cannot_go_on(path: Path, error: OSError) -> UserError:
    return UserError(
        in_one_line(f"{path}: cannot be written ({error.strerror}): mend that, and the same command goes on")
    )


def draw_words(path: Path, source: PictureSource, caption: Caption, config: ViTGPT2Config) -> None:
    """A figure of a caption, word by word: the brighter a place, the more the model looked there, and a line around what
    it looked at more than half as much as where it looked most."""
    from matplotlib.figure import Figure

    picture = Image.fromarray(decode(source, PANEL))
    assert config.resize_size is not None
    margin = (1 - config.image_size / config.resize_size) / 2  # of what the model sees, the middle
    left, top = (round(side * margin) for side in picture.size)
    picture = picture.crop((left, top, picture.width - left, picture.height - top))
    picture.thumbnail((PANEL, PANEL))
    pixels = np.asarray(picture) / 255
    columns = min(5, len(caption.words) + 1)
    rows = -(-(len(caption.words) + 1) // columns)
    figure = Figure(figsize=(2.4 * columns, (2.4 * picture.height / picture.width + 0.35) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in figure.axes:
        axes.axis("off")
    next(panels).imshow(pixels)
    figure.suptitle("\n".join(textwrap.wrap(caption.text, 22 * columns)), parse_math=False)
    for axes, (word, looks) in zip(panels, caption.words, strict=False):
        share = Image.fromarray(looks / max(looks.max(), 1e-9)).resize(picture.size, Image.Resampling.BICUBIC)
        seen = np.asarray(share).clip(0, 1)
        axes.imshow(pixels * (0.15 + 0.85 * seen[..., None]))
        axes.contour(seen, levels=[0.5], colors="white", linewidths=1)
        axes.set_title(word, size=12, parse_math=False)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # no such folder; no such format
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: the heat map cannot be written ({reason})") from error
