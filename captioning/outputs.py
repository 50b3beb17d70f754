"""Write captions: to a CSV or JSON-lines file, or to a text beside each picture; and draw figures of attention.

    output = open_output("captions.csv", names)
    output.begin({"model": "user/model", "num_beams": 3})
    for name in output.missing(names): output.add(name, captions)

Captions are written picture by picture, so that a run that was stopped or killed can be resumed: pictures that have
captions are skipped, and an incomplete last line is cut off. A file records the model and settings that wrote it, so no
other model can resume it. Training and evaluation can read these files.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioning.models import is_url
from captioning.pipeline import Caption
from captioning.xmp import has_description, with_caption, xmp_path
from config import UserError, ViTGPT2Config
from data.kinds import is_picture
from data.pictures import PictureSource, decode
from data.reading import MADE_BY, file_names
from data.sidecars import has_caption, texts_beside
from utils import atomic, counted, first_line, in_one_line, json_of, shown, write_json, write_text

PANEL = 360  # pixels of the longer side of a picture in a figure


def open_output(
    name: str, names: Sequence[str], num_captions: int = 1, scores: bool = False
) -> CaptionFile | Sidecars | XmpFiles:
    """Open the output of this name for these pictures: a .csv or .jsonl file, or the word sidecar or xmp."""
    if Path(name).suffix.lower() in (".csv", ".jsonl"):
        return CaptionFile(Path(name), num_captions, scores)
    if name not in ("sidecar", "xmp"):
        raise UserError(f"output {name}: must be a .csv file, a .jsonl file, or the word sidecar or xmp")
    if scores:
        raise UserError(f"output {name} cannot hold scores: use a .csv or a .jsonl file")
    return Sidecars(names) if name == "sidecar" else XmpFiles(names)


class CaptionFile:
    """A file with a line for each picture: file_name, then caption (and score), or captions (and scores) if several.

    In a CSV several captions have a column each: caption_1, caption_2, ... Names are written as given, with line breaks
    and invalid Unicode escaped. The model and settings are the first line, or for a CSV in a file beside it.
    """

    def __init__(self, path: Path, num_captions: int = 1, scores: bool = False, flag: str = "--output") -> None:
        """Open the file, and resume it if it exists. Raises UserError, which advises to change the flag, if it has other
        columns or cannot be written."""
        self.path, self.scores, self.flag = path, scores, flag
        self.is_csv = path.suffix.lower() == ".csv"
        kinds = ("caption", "score") if scores else ("caption",)
        if num_captions == 1:
            endings = [""]
        else:
            endings = [f"_{number}" for number in range(1, num_captions + 1)] if self.is_csv else ["s"]
        self.columns = ["file_name", *(kind + ending for kind in kinds for ending in endings)]
        self.done: set[str] = set()
        self.about, self.made_by = path.with_name(f"{path.name}.json"), dict[str, Any]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                raise UserError(f"{path}: is a link: name the file itself as {flag}")
            self._file = path.open("a+b")
            self._resume()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}): choose another {flag}") from error

    def _resume(self) -> None:
        """Read the existing lines, and cut off an incomplete last one."""
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        starts = [self._line(self.columns)] if self.is_csv else [b'{"file_name": ', f'{{"{MADE_BY}": '.encode()]
        if not complete and not any(start.startswith(content[: len(start)]) for start in starts):
            raise self._not_ours()
        try:
            lines = complete.decode("utf-8-sig").split("\n")[:-1]
            if self.is_csv:
                first, *rows = csv.reader(lines) if lines else [self.columns]
                if first != self.columns or any(len(row) != len(self.columns) for row in rows):
                    raise self._not_ours()
                self.done = {row[0] for row in rows}
            else:
                records = [json_of(line) for line in lines]
                if records and list(records[0]) == [MADE_BY]:
                    self.made_by = dict(records.pop(0)[MADE_BY])
                if any(list(record) != self.columns for record in records):
                    raise self._not_ours()
                self.done = {record["file_name"] for record in records}
        except (ValueError, TypeError, csv.Error) as error:  # not UTF-8, not JSON, not objects
            raise self._not_ours() from error
        self._file.truncate(len(complete))
        if self.is_csv:
            with contextlib.suppress(OSError, ValueError, TypeError):  # files of older versions have no such record
                self.made_by = dict(json_of(self.about.read_text(encoding="utf-8-sig")))

    def begin(self, made_by: dict[str, Any], overwrite: bool = False) -> int:
        """Record the model and the settings. With overwrite, delete all existing captions. Returns how many pictures lost
        their captions. Raises UserError if captions of another model or other settings exist and overwrite is False."""
        there, before = len(self.done), self.made_by or made_by
        if there and not overwrite:
            other = [name for name in before | made_by if before.get(name) != made_by.get(name)]
            if other not in ([], ["model"]):
                differences = in_one_line(", ".join(f"{name} {before.get(name, 'unset')}" for name in other))
                raise UserError(
                    f"{self}: has captions of {counted(there, 'pictures')}, made with {differences}: choose another {self.flag}, or "
                    "add --overwrite to replace them"
                )
            return 0
        self._file.truncate(0)
        self.done.clear()
        if self.is_csv:
            with _writing(self.about):
                write_json(self.about, made_by)
        self._write(self._line(self.columns) if self.is_csv else json.dumps({MADE_BY: made_by}).encode() + b"\n")
        return there

    def _not_ours(self) -> UserError:
        columns = ", ".join(self.columns)
        return UserError(
            f"{self.path}: exists, but its columns are not {columns}: move it away, or give the same "
            "--num-captions and --scores as before"
        )

    def _line(self, values: Sequence[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue().encode()

    def _write(self, line: bytes) -> None:
        with _writing(self.path):
            self._file.write(line)
            self._file.flush()

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names that have no line yet."""
        return [name for name in names if in_one_line(name) not in self.done]

    def add(self, name: str, captions: Sequence[Caption]) -> None:
        """Write a picture's line."""
        name = in_one_line(name)
        texts: list[Any] = [caption.text for caption in captions]
        scores: list[Any] = [round(caption.score or 0.0, 4) for caption in captions] if self.scores else []
        if self.is_csv:
            self._write(self._line([name, *texts, *scores]))
        else:
            values = [name, *(column[0] if len(captions) == 1 else column for column in (texts, scores) if column)]
            record = dict(zip(self.columns, values, strict=True))
            self._write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.done.add(name)

    def __str__(self) -> str:
        return str(self.path)


class Sidecars:
    """name.txt beside each name.jpg, a caption per line; name.png.txt for a name.png where name.txt is name.jpg's. Any
    file that a reader takes for a picture's text (name.caption, name.TXT) counts as one, unless it is empty."""

    def __init__(self, names: Sequence[str]) -> None:
        """Find the existing texts. Raises UserError for URLs, which have no folder for a text."""
        for name in filter(is_url, names):
            raise UserError(f"{name}: has no folder for a text beside it: use --output with a .csv or a .jsonl file")
        self._there: set[Path] = set()
        self._texts: dict[Path, Path] = {}
        owners: dict[Path, Path] = {}
        wanted = {Path(name) for name in names}
        for folder in {path.parent for path in wanted}:
            files = sorted(folder / name for name in file_names(folder))
            pictures = [file for file in files if file in wanted or is_picture(file)]
            for picture, texts in texts_beside(pictures, files).items():
                there = [*filter(has_caption, texts)][:1]
                self._there |= {picture} & wanted if there else set()
                free = [*there, picture.with_suffix(".txt"), picture.with_name(f"{picture.name}.txt")]
                self._texts[picture] = next(text for text in free if owners.setdefault(text, picture) == picture)

    def begin(self, made_by: dict[str, Any], overwrite: bool = False) -> int:
        """With overwrite, treat all existing texts as missing and return their number."""
        replaced, self._there = (len(self._there), set()) if overwrite else (0, self._there)
        return replaced

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names without a text. Those of a name.png.txt come first, the longest first: until that file exists, a reader
        takes name.txt for it."""
        missing = [name for name in names if Path(name) not in self._there]
        return sorted(missing, key=lambda name: -len(name) if self._text(name).stem == Path(name).name else 0)

    def add(self, name: str, captions: Sequence[Caption]) -> None:
        """Write a picture's text atomically; none where there is no caption."""
        if lines := lines_of(captions):
            with _writing(text := self._text(name)):
                write_text(text, lines)

    def _text(self, name: str) -> Path:
        return self._texts.get(Path(name), Path(name).with_suffix(".txt"))

    def __str__(self) -> str:
        return "texts beside the pictures"


def lines_of(captions: Sequence[Caption]) -> str:
    """A caption on each line, without those that were left out."""
    return "".join(f"{caption.text}\n" for caption in captions if caption.text)


class XmpFiles:
    """name.jpg.xmp beside each name.jpg, with its captions as the description. A description that is there counts as done."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises UserError for URLs, and for an XMP file that is damaged."""
        for name in filter(is_url, names):
            raise UserError(
                f"{name}: has no folder for an XMP file beside it: use --output with a .csv or a .jsonl file"
            )
        self._done = {name for name in names if has_description(xmp_path(name))}

    def begin(self, made_by: dict[str, Any], overwrite: bool = False) -> int:
        """With overwrite, descriptions do not count as done; returns how many there are."""
        replaced, self._done = (len(self._done), set()) if overwrite else (0, self._done)
        return replaced

    def missing(self, names: Sequence[str]) -> list[str]:
        """The pictures without a description."""
        return [name for name in names if name not in self._done]

    def add(self, name: str, captions: Sequence[Caption]) -> None:
        """Write a picture's XMP file atomically; none where there is no caption."""
        if text := lines_of(captions):
            with _writing(path := xmp_path(name)):
                write_text(path, with_caption(path, text.rstrip("\n")))

    def __str__(self) -> str:
        return "XMP files beside the pictures"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror}): fix that, and run the same command to resume"
        raise UserError(in_one_line(message)) from error


def draw_words(path: Path, source: PictureSource, caption: Caption, config: ViTGPT2Config) -> None:
    """Draw a figure of a caption, word by word: the brighter a region, the more attention it has. A line surrounds the
    regions with more than half of the highest attention."""
    from matplotlib.figure import Figure

    picture = Image.fromarray(decode(source, PANEL))
    margin = (1 - config.image_size / config.resize_size) / 2  # the model sees only the middle
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
    figure.suptitle("\n".join(textwrap.wrap(shown(caption.text), 22 * columns)), parse_math=False)
    for axes, (word, attention) in zip(panels, caption.words, strict=False):
        share = Image.fromarray(attention / max(attention.max(), 1e-9)).resize(picture.size, Image.Resampling.BICUBIC)
        heat = np.asarray(share).clip(0, 1)
        axes.imshow(pixels * (0.15 + 0.85 * heat[..., None]))
        axes.contour(heat, levels=[0.5], colors="white", linewidths=1)
        axes.set_title(shown(word), size=12, parse_math=False)
    with atomic(path if path.suffix else path.with_suffix(".png")) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:] or "png", dpi=110)


def check_figure(path: Path) -> None:
    """Raise UserError where no figure can be written to this path."""
    from matplotlib.figure import Figure

    try:
        Figure().savefig(io.BytesIO(), format=path.suffix[1:] or None)
        tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:  # no such folder; no such format
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: the heat map cannot be written ({reason})") from error
