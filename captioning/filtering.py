"""Filter and clean a data set: choose the pictures and captions of the train split that are good enough to train on.

    python example_usage.py DIR model.safetensors --filter DIR/good.jsonl --keep both --min-confidence 0.3
    python main.py --data-dir DIR/good.jsonl

With --keep both, captions of a model stand beside the person's, and the worst of both are left out, as CapFilt does (Li et
al. 2022, arXiv:2201.12086). Pictures of val and test and their captions pass unchanged, so that scores still compare;
pictures of train that are copies of one of them are left out.

Writes good.jsonl, good.left_out.jsonl (what was left out, and why) and, where a model is used, good.scores.jsonl: each caption
and the model's confidence in it. With these, other limits need no model again, and a run that was stopped resumes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from config import UserError, check_fields
from data.columns import is_filtered
from data.reading import MADE_BY
from utils import atomic, counted, in_one_line, json_of

if TYPE_CHECKING:  # modules that import torch are imported late, so that --help does not wait for it
    from torch import Tensor

    from captioning.controls import Finish
    from captioning.pipeline import Caption
    from data.table import CaptionTable
    from model import ImageCaptionModel

AT_A_TIME = 2048  # captions whose CLIPScores are computed together
SURE = 5.0  # by how much another language has to be more likely, in nats: of short captions the detector knows little
OTHERS = ("test", "val")  # the splits that are not filtered


@dataclass(kw_only=True)
class FilterOptions:
    """Options for filtering a data set."""

    filter: Path | None = None
    """Filter the data set: write a .jsonl of its good captions, to train on, into its folder. What is left out is listed
    beside it."""
    keep: Literal["own", "model", "both"] = "own"
    """Captions that are filtered: the data's, the model's, or both."""
    copies: Literal["drop", "keep"] = "drop"
    """Pictures of train that are copies of others, or nearly."""
    min_words: int = 1
    """Leave out captions with fewer words."""
    max_words: int = 100
    """Leave out captions with more words."""
    language: str | None = None
    """Leave out captions in another language than this: a code such as en."""
    min_clip_score: float = 0.0
    """Leave out captions with a lower CLIPScore, 0 to 2.5."""
    clip: str = "openai/clip-vit-base-patch32"
    """CLIP for the CLIPScore: a folder, or a name on the Hub."""

    def check(self) -> None:
        """Raise UserError for options that cannot be."""
        if self.filter is None:
            fields = FilterOptions.__dataclass_fields__.values()
            if given := [field.name for field in fields if getattr(self, field.name) != field.default]:
                raise UserError(f"{given[0]} is an option of --filter: add --filter, or leave it out")
            return
        if self.filter.suffix.lower() != ".jsonl":
            raise UserError(f"filter {self.filter}: name a .jsonl file in the data's folder")
        check_fields(self, "min_words max_words", lambda x: x >= 1, "at least 1")
        check_fields(self, "min_clip_score", lambda x: 0 <= x <= 2.5, "from 0 to 2.5")
        if self.min_words > self.max_words:
            raise UserError(f"min_words is {self.min_words} and max_words {self.max_words}: no caption has both")


@dataclass(frozen=True)
class Captioner:
    """The model that writes or judges captions, and its settings."""

    model: ImageCaptionModel
    made_by: dict[str, Any]
    """For the record of the scores: the model, its hash and the settings."""
    decoding: dict[str, Any]
    """Options of caption_batch."""
    finish: Finish
    batch_size: int | None = None


class LeftOut(NamedTuple):
    """A caption, or a picture (without a caption), that was left out."""

    image: str
    caption: str | None
    reason: str
    detail: str = ""


@dataclass
class Filtered:
    """The result: {name: captions} of the train pictures that are kept, the number of model's captions among them, and what
    was left out."""

    kept: dict[str, list[str]]
    by_model: int
    left_out: list[LeftOut]

    def counts(self) -> Iterator[str]:
        """What was left out, by reason, in words."""
        numbers = Counter((entry.caption is None, entry.reason) for entry in self.left_out)
        for (is_picture, reason), number in sorted(numbers.items(), key=lambda item: (not item[0][0], -item[1])):
            yield f"{counted(number, 'pictures' if is_picture else 'captions')}: {reason}"


def filter_data(
    options: FilterOptions, folder: str, captioner: Captioner | None = None, min_confidence: float = 0.0
) -> Filtered:
    """Filter the data set in a folder, and write the lists. captioner: needed for the captions of a model, and for
    min_confidence. Raises UserError if nothing is left, or if the pictures are not below the folder of the list."""
    out = options.filter or Path()
    _check_target(out)
    languages = _detector(options.language)
    tables = _load(folder, options.keep)
    if "train" not in tables:
        raise UserError(f"{folder}: has no train split, and only that is filtered")
    train = tables["train"]
    names = {split: [_beside(out, table, row) for row in range(len(table))] for split, table in tables.items()}
    left_out = [LeftOut(_relative(out, train.root / name), None, "missing") for name in train.missing]
    rows = list(_good_pictures(tables, names, options, left_out))
    captions = _candidates(options, train, rows, names["train"], captioner, left_out)
    owned = {row: 0 if options.keep == "model" else len(train.captions_of(row)) for row in captions}
    good = {
        row: [
            (i >= owned[row], caption.text)
            for i, caption in enumerate(each)
            if not _left_out(names["train"][row], caption, each[:i], options, min_confidence, languages, left_out)
        ]
        for row, each in captions.items()
    }
    if options.min_clip_score:
        good = _by_clip(options, train, good, names["train"], left_out)
    left_out += [LeftOut(names["train"][row], None, "no caption left") for row in good if not good[row]]
    kept = {names["train"][row]: [text for _, text in each] for row, each in good.items() if each}
    result = Filtered(kept, sum(theirs for each in good.values() for theirs, _ in each), left_out)
    if not kept:
        raise UserError(f"{folder}: no caption of train passes ({', '.join(result.counts())}): ask for less")
    _write(out, options, captioner, min_confidence, result, tables, names)
    return result


# Reading


def _check_target(out: Path) -> None:
    """Raise UserError where a file exists that is no earlier list."""
    if out.is_file() and not is_filtered(out):
        raise UserError(f"{out}: exists, and is no list of an earlier --filter: choose another name")
    if not out.parent.is_dir():
        raise UserError(f"{out}: no such folder: the list stands in the data's folder")


def _load(folder: str, keep: str) -> dict[str, CaptionTable]:
    """The data set's splits; or, for captions of a model alone, a folder of pictures as one of train."""
    from captioning.pipeline import picture_names
    from data.sources import load_tables, recognise
    from data.table import uncaptioned

    try:
        recognise(Path(folder))
    except UserError:
        if keep != "model" or not Path(folder).is_dir():
            raise
        pictures = (Path(name).relative_to(folder).as_posix() for name in picture_names([folder]))
        return {"train": uncaptioned(pictures, Path(folder))}
    return {split: table for split, table in load_tables("auto", folder).items() if table.split == split}


def _beside(out: Path, table: CaptionTable, row: int) -> str:
    """The picture's name below the list's folder."""
    picture = table.rows["picture"][row].as_py()
    if table.hub_rows is not None or table.rows["offset"][row].as_py() >= 0:
        raise UserError(
            f"{table.name_of(row)}: is inside a larger file, and a list names files: unpack the pictures, or caption "
            "the shards (--format) and choose by the score of each picture"
        )
    return _relative(out, table.root / picture)


def _relative(out: Path, picture: Path) -> str:
    folder, file = (Path(os.path.abspath(path)) for path in (out.parent, picture))
    if not file.is_relative_to(folder):  # above it, or on another drive of Windows
        raise UserError(f"{out}: a list stands above its pictures: write it into {picture.parent}, or a folder above")
    return file.relative_to(folder).as_posix()


# Pictures


def _good_pictures(
    tables: dict[str, CaptionTable],
    names: dict[str, list[str]],
    options: FilterOptions,
    left_out: list[LeftOut],
) -> Iterator[int]:
    """Yield the rows of train whose pictures can be read and are no copies of another one."""
    from tqdm import tqdm

    from data.copies import Known, View, find_phash, look_at
    from data.pixels import in_threads

    splits = [split for split in OTHERS if split in tables and options.copies == "drop"] + ["train"]
    views = {split: View(len(tables[split])) for split in splits}
    with tqdm(desc="reading pictures", total=sum(len(tables[s]) for s in splits), unit="picture", disable=None) as bar:
        for split in splits:
            look = partial(look_at, tables[split], find_phash(), views[split])
            in_threads(look, range(len(tables[split])), bar)
    known = {split: Known(view) for split, view in views.items()}
    for split in splits[:-1]:
        for row in range(len(tables[split])):
            known[split].add(row)
    for row, name in enumerate(names["train"]):
        if why := views["train"].bad.get(row):
            left_out.append(LeftOut(name, None, "cannot be read", in_one_line(why)))
            continue
        found = {split: known[split].find(views["train"], row) for split in splits if options.copies == "drop"}
        if copy := next(((split, each) for split, each in found.items() if each), None):
            split, (other, bits) = copy
            kind = "copy" if bits is None else "near copy"
            where = "another train picture" if split == "train" else f"a {split} picture"
            left_out.append(LeftOut(name, None, f"{kind} of {where}", names[split][other]))
            continue
        known["train"].add(row)
        yield row


# Captions


def _candidates(
    options: FilterOptions,
    train: CaptionTable,
    rows: Sequence[int],
    names: Sequence[str],
    captioner: Captioner | None,
    left_out: list[LeftOut],
) -> dict[int, list[Caption]]:
    """The captions of each row that are to be filtered: the data's and then the model's, with the model's confidence."""
    from tqdm import tqdm

    from captioning.outputs import CaptionFile
    from captioning.pipeline import Caption, caption_batch, caption_pictures, confidences

    own = {row: [] if options.keep == "model" else train.captions_of(row) for row in rows}
    if captioner is None:
        return {row: [Caption(text) for text in texts] for row, texts in own.items()}
    out = options.filter or Path()
    scores = CaptionFile(path := out.with_suffix(".scores.jsonl"), num_captions=2, scores=True, flag="--filter")
    scores.begin({"filter": "scores", "keep": options.keep, **captioner.made_by})
    of_name = {in_one_line(names[row]): row for row in rows}
    missing = scores.missing(list(of_name))

    def write(batch: Sequence[str], pixels: Tensor) -> list[list[Caption]]:
        texts = [own[of_name[name]] for name in batch]
        answers = [
            [Caption(text, score) for text, score in zip(captions, each, strict=True)]
            for captions, each in zip(texts, confidences(captioner.model, pixels, texts, precision), strict=True)
        ]
        if options.keep == "own":
            return answers
        theirs = caption_batch(captioner.model, pixels, precision, scores=True, **captioner.decoding)
        finished = [list(map(captioner.finish.caption, captions)) for captions in theirs]
        return [a + b for a, b in zip(answers, finished, strict=True)]

    def source(name: str) -> Any:
        return train.picture(of_name[name])

    precision = captioner.made_by["precision"]
    results = caption_pictures(captioner.model, missing, batch_size=captioner.batch_size, source=source, write=write)
    with tqdm(total=len(of_name), initial=len(of_name) - len(missing), unit="picture", disable=None) as bar:
        for result in results:
            bar.update()
            if not result.error:
                scores.add(result.name, result.captions)
    found: dict[int, list[Caption]] = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        name, texts, values = json_of(line).values()
        row = of_name.get(name)
        if row is None:
            continue
        each = [(texts, values)] if isinstance(texts, str) else list(zip(texts, values, strict=True))
        if [text for text, _ in each[: len(own[row])]] != own[row]:
            raise UserError(f"{path}: has scores of other captions of {names[row]}: delete it, and run this again")
        found[row] = [Caption(text, value) for text, value in each]
    left_out += [LeftOut(names[row], None, "cannot be read") for row in rows if row not in found]
    return found


def _left_out(
    name: str,
    caption: Caption,
    before: Sequence[Caption],
    options: FilterOptions,
    min_confidence: float,
    languages: Callable[[str], str] | None,
    left_out: list[LeftOut],
) -> bool:
    """Whether a caption is left out; if so, say so in the list."""
    reason, detail, words = "", "", len(caption.text.split())
    if caption.text in [other.text for other in before]:
        reason = "repeats another caption of the picture"
    elif words < options.min_words:
        reason = f"fewer than {options.min_words} words"
    elif words > options.max_words:
        reason = f"more than {options.max_words} words"
    elif (caption.score or 0.0) < min_confidence:
        reason, detail = f"confidence below {min_confidence:g}", f"{caption.score or 0.0:.4f}"
    elif languages and (language := languages(caption.text)) != options.language:
        reason, detail = f"not in the language {options.language}", language
    if reason:
        left_out.append(LeftOut(name, caption.text, reason, detail))
    return bool(reason)


def _detector(language: str | None) -> Callable[[str], str] | None:
    """A function from a text to the code of its language, or None if no language is asked for."""
    if language is None:
        return None
    try:
        from py3langid import rank
    except ImportError:
        raise UserError("language needs py3langid: pip install -r requirements/data.txt") from None
    if language not in (known := sorted(code for code, _ in rank("a"))):
        raise UserError(f"language {language!r} is not known: use one of {', '.join(known)}")

    def detect(text: str) -> str:
        scores = dict(rank(text))
        best = max(scores, key=scores.__getitem__)
        return best if scores[best] - scores[language] > SURE else language

    return detect


def _by_clip(
    options: FilterOptions,
    train: CaptionTable,
    good: dict[int, list[tuple[bool, str]]],
    names: Sequence[str],
    left_out: list[LeftOut],
) -> dict[int, list[tuple[bool, str]]]:
    """Without the captions whose CLIPScore is too low."""
    from tqdm import tqdm

    from scoring.clip import Clip, similarity
    from utils import choose_device

    clip, least = Clip(options.clip, choose_device("auto")[0]), options.min_clip_score
    found = dict(good)
    entries = [(row, entry) for row, each in good.items() for entry in each]
    with tqdm(desc="CLIPScore", total=len(entries), unit="caption", disable=None) as bar:
        for start in range(0, len(entries), AT_A_TIME):
            some = entries[start : start + AT_A_TIME]
            rows = {row: number for number, row in enumerate(dict.fromkeys(row for row, _ in some))}
            pictures = clip.pictures([train.picture(row) for row in rows])
            texts = clip.captions([text for _, (_, text) in some])
            values = similarity(texts, pictures[[rows[row] for row, _ in some]], "clip").tolist()
            for (row, entry), value in zip(some, values, strict=True):
                if value < least:
                    found[row] = [other for other in found[row] if other != entry]
                    left_out.append(LeftOut(names[row], entry[1], f"CLIPScore below {least:g}", f"{value:.4f}"))
            bar.update(len(some))
    return found


# Writing


def _write(
    out: Path,
    options: FilterOptions,
    captioner: Captioner | None,
    min_confidence: float,
    result: Filtered,
    tables: dict[str, CaptionTable],
    names: dict[str, list[str]],
) -> None:
    """Write the list of what is kept, and that of what was left out."""
    settings: dict[str, Any] = {"keep": options.keep, "copies": options.copies, "min_confidence": min_confidence}
    settings |= {"min_words": options.min_words, "max_words": options.max_words, "language": options.language}
    settings |= {"min_clip_score": options.min_clip_score, "clip": options.clip} if options.min_clip_score else {}
    made_by = {"filter": settings} | (captioner.made_by if captioner else {})
    of_table = len(tables) > 1 or tables["train"].num_captions > 0  # else the training sets val and test aside
    parts = {"train": result.kept}
    parts |= {
        split: {name: tables[split].captions_of(row) for row, name in enumerate(names[split])}
        for split in OTHERS[::-1]
        if split in tables
    }
    lists = {
        out: [
            {"image": name, "captions": captions} | ({"split": split} if of_table else {})
            for split, pictures in parts.items()
            for name, captions in pictures.items()
        ],
        out.with_suffix(".left_out.jsonl"): [
            {key: value for key, value in entry._asdict().items() if value} for entry in result.left_out
        ],
    }
    for path, records in lists.items():
        with atomic(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for record in [{MADE_BY: made_by}, *records]:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
