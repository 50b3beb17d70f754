"""Control over captions: length, words, text around them, and no caption if the model is not sure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config import UserError
from data.reading import read_text

if TYPE_CHECKING:  # it imports torch
    from captioning.pipeline import Caption, Result

Length = Literal["short", "normal", "long"]
LONG = 12  # tokens of a long caption, at least


def length_options(
    length: Length, captions: int, beams: int, do_sample: bool, max_length: int | None = None
) -> dict[str, Any]:
    """Options of caption_batch for shorter or longer captions: more beams with another length_penalty, or the shortest or
    longest of three times as many samples. {} for normal ones."""
    if length == "normal":
        return {}
    if do_sample:
        return {"num_return_sequences": 3 * captions, "keep": captions, "longest_first": length == "long"}
    penalty, shortest = (0.0, 0) if length == "short" else (2.0, min(LONG, max_length or LONG))
    return {"num_beams": max(beams, 2 * captions), "length_penalty": penalty, "min_length": shortest}


def read_words(path: Path) -> tuple[str, ...]:
    """Read words from a file, one on each line; lines that start with # are comments. Raises UserError if there are none."""
    lines = [" ".join(line.split()) for line in read_text(path).split("\n")]
    words = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not words:
        raise UserError(f"{path}: no words in it: write one on each line")
    return words


@dataclass(frozen=True)
class Finish:
    """Changes to captions before they are written."""

    prepend: str = ""
    """Text put before each caption."""
    append: str = ""
    """Text put after each caption."""
    min_confidence: float = 0.0
    """Captions with less confidence are left out."""
    instead: str = ""
    """Text in place of a caption that is left out."""

    def __call__(self, results: Iterable[Result]) -> Iterator[Result]:
        """Apply the changes to the captions of results."""
        for result in results:
            captions = list(map(self.caption, result.captions))
            yield replace(result, captions=captions)

    def caption(self, caption: Caption) -> Caption:
        """The caption with the text around it, or with the text `instead` if the model is not sure of it."""
        if self.leaves_out(caption):
            return replace(caption, text=self.instead, words=[])
        return replace(caption, text=f"{self.prepend}{caption.text}{self.append}")

    def leaves_out(self, caption: Caption) -> bool:
        """Whether the model is not sure enough of the caption."""
        return (caption.score or 0.0) < self.min_confidence

    def recorded(self, options: dict[str, Any]) -> dict[str, Any]:
        """These settings and the options of model.generate, for the record in caption files; only the number and the hash
        of only_words."""
        about = dict(options)
        if words := about.get("only_words"):
            digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
            about["only_words"] = f"{len(words)} words, {digest}"
        if "bad_words" in about:
            about["bad_words"] = list(about["bad_words"])
        return about | {name: value for name, value in asdict(self).items() if value}
