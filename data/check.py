"""Check whether a data set is fit to train on: reads every picture and caption once.

    python dataset.py check DIR

Writes under --output-dir only, never into the data folder, and needs a few hundred bytes of memory per picture.

A data set is not fit (exit code 1) if
- it has no train split;
- more than max_bad_share of its pictures are missing or undecodable (training would stop too);
- a test picture is, by its id, also a train picture (training refuses that too);
- more than max_bad_share of the val or of the test pictures are byte-for-byte copies of train pictures.
Fewer such copies are a warning: most collections of photographs have some, and they hardly change a score. Near
duplicates are a warning too, because only the user can decide what is still the same picture.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from tqdm import tqdm

from config import FEW, UserError, check_fields
from data.budget import why_missing
from data.copies import Known, View, find_phash, look_at
from data.kinds import files_below, is_picture
from data.pictures import load_picture
from data.pixels import in_threads
from data.reading import Names
from data.sources import load_tables
from data.table import CaptionTable
from flags import parse_flags
from utils import atomic, counted, in_one_line, writable_directory, write_csv, write_json

SHOWN = 5  # examples printed
PAIRS_SHOWN = 8
ODD = "[^ -~]"  # what is not printable ASCII
ODD_CHARACTERS = {  # a caption counts for the first that matches
    "replacement character": r"\x{fffd}",
    "mojibake": "[ÃÂ][¡-¿€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|â€|ï¿½|ï»¿|ðŸ",
    "control or invisible": r"[\x00-\x1f\x7f-\x9f\x{200b}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2060}-\x{2069}\x{feff}]",
    "emoji": r"[\x{1f000}-\x{1faff}\x{2600}-\x{27bf}\x{2b50}\x{2b55}\x{fe0f}]",
    "Chinese, Japanese or Korean": r"\p{Han}|\p{Hiragana}|\p{Katakana}|\p{Hangul}",
    "right-to-left": r"\p{Arabic}|\p{Hebrew}|\p{Syriac}|\p{Thaana}",
    "other non-ASCII": "",
}
NOT_PLAIN = {  # a caption may be of several kinds
    "that begin with [, { or <": r"^[\[{<]",
    "with HTML entities": r"&(#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]{1,7});",
    "with mark-up": r"</?[a-zA-Z][^<>]*>",
    "with URL-encoding": r"%([0-9A-F]{2}|[a-f]\d|\d[a-f])|^[^ ]*[^ +]\+[^ +]+\+[^ ]*$",
    "that say nan or None": r"(?i)^(nan|none|null|n/?a|<na>|#n/a|undefined)$",
    "with special tokens": r"<\|[^|>]*\|>",
}
DAMAGED = ("replacement character", "mojibake", "control or invisible")


class BadPicture(NamedTuple):
    """A picture that is missing or cannot be decoded."""

    part: str
    picture: str
    reason: str


class Duplicate(NamedTuple):
    """A picture (a row of its split) and its copy in an earlier split: an exact one, or else the nearest near one."""

    part: str
    row: int
    same_as_part: str
    same_as_row: int
    distance: int | None  # bits in which their perceptual hashes differ; None where the files are byte-for-byte equal


@dataclass
class Report:
    """The results of a check."""

    tables: dict[str, CaptionTable]  # by split, without test where val serves as test
    figures: dict[str, Any]  # all counts, as in check.json
    bad: list[BadPicture]
    duplicates: list[Duplicate]
    warnings: list[str]
    reasons: list[str]  # why the data is not fit to train on; empty if it is fit

    @property
    def verdict(self) -> str:
        """The verdict and its reasons, as text."""
        return f"not fit: {'; '.join(self.reasons)}" if self.reasons else "fit to train on"


def check_tables(
    tables: dict[str, CaptionTable],
    max_bad_share: float = 0.01,
    max_words: int = 100,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Report:
    """Check all pictures and captions of a data set's splits, as load_tables returns them.

    progress shows a bar; None: only if standard error is a terminal.
    """
    phash = find_phash()
    parts = {split: t for split, t in tables.items() if split != "test" or t is not tables.get("val")}
    views: dict[str, View] = {}
    off = None if progress is None else not progress
    with tqdm(desc="reading pictures", total=sum(map(len, parts.values())), unit="picture", disable=off) as bar:
        for split, table in parts.items():
            views[split] = view = View(len(table))
            in_threads(partial(look_at, table, phash, view), range(len(table)), bar, num_workers)
    bad, duplicates, copies = [], [], {}
    for split, table in parts.items():
        near = Names(table.root).nearest
        for number, name in enumerate(table.missing):
            why = why_missing(table.root / name)
            why += near(name) if number < SHOWN and why == "no such file" else ""
            bad.append(BadPicture(split, str(table.root / name), why))
        bad += [BadPicture(split, table.name_of(row), why) for row, why in sorted(views[split].bad.items())]
    for first, later in itertools.combinations(parts, 2):
        found = find_copies(views, first, later)
        exact = sum(pair.distance is None for pair in found)
        copies[f"{first}/{later}"] = {"exact": exact, "near": len(found) - exact if phash else None}
        duplicates += found
    figures = {
        "parts": {split: count_part(table, views[split]) for split, table in parts.items()},
        "left_out": next(iter(parts.values())).left_out,
        "unused": unused(list(parts.values())),
        "captions": count_captions(list(parts.values()), max_words),
        "duplicates": copies,
    }
    warnings, reasons = judge(parts, figures, max_bad_share)
    figures |= {"warnings": warnings, "reasons": reasons, "fit": not reasons}
    return Report(parts, figures, bad, duplicates, warnings, reasons)


# Pictures


def find_copies(views: dict[str, View], first: str, later: str) -> list[Duplicate]:
    """Find at most one copy for each picture of the later split in the first one."""
    known, found = Known(views[first]), []
    for row in range(len(views[first].sha256)):
        known.add(row)
    for row in range(len(views[later].sha256)):
        if copy := known.find(views[later], row):
            found.append(Duplicate(later, row, first, *copy))
    return found


def count_part(table: CaptionTable, view: View) -> dict[str, Any]:
    """Count a split's pictures, captions and copies."""
    each = pc.list_value_length(table.rows["captions"]).to_numpy()
    good = [digest for digest in view.sha256 if digest]
    return {
        "pictures": len(table),
        "captions": table.num_captions,
        "captions_a_picture": {"min": int(each.min()), "median": float(np.median(each)), "max": int(each.max())},
        "missing": len(table.missing),
        "undecodable": len(view.bad),
        "exact_copies_inside": len(good) - len(set(good)),
    }


def unused(tables: list[CaptionTable]) -> dict[str, Any]:
    """Count the pictures below the data's folder that are in no split (no caption names them), and name the first."""
    named = {posixpath.normpath(name) for t in tables for name in (*t.rows["picture"].to_pylist(), *t.missing)}
    root = tables[0].root
    names = [file.relative_to(root).as_posix() for file in files_below(root) if is_picture(file)]
    others = [name for name in names if name not in named]
    return {"pictures": len(others), "first": in_one_line(others[0]) if others else None}


# Captions


def count_captions(tables: list[CaptionTable], max_words: int) -> dict[str, Any]:
    """Statistics of all splits' captions together, computed by Arrow: no Python object per caption."""
    captions = pa.chunked_array([chunk for table in tables for chunk in table.captions().chunks], pa.string())
    words = pc.add(pc.count_substring(captions, " "), 1).to_numpy()  # a table's captions have single spaces
    numbers = np.concatenate([pc.list_value_length(table.rows["captions"]).to_numpy() for table in tables])
    owners = pa.table({"caption": captions, "pictures": np.repeat(np.arange(len(numbers)), numbers)})
    different = owners.group_by(["caption", "pictures"]).aggregate([]).num_rows
    shared = owners.group_by("caption").aggregate([("pictures", "count_distinct")])
    shared = shared.rename_columns(["caption", "pictures"]).filter(pc.field("pictures") > 1)
    shared = shared.sort_by([("pictures", "descending"), ("caption", "ascending")])
    longer = np.flatnonzero(words > max_words)
    return {
        "words": {
            "min": int(words.min()),
            "median": float(np.median(words)),
            "95 %": float(np.percentile(words, 95)),
            "max": int(words.max()),
            "captions_of_0_1_2_words": np.bincount(words[words <= max_words]).tolist(),
        },
        "over_long": {
            "more_words_than": max_words,
            "captions": len(longer),
            "example": captions[longer[0]].as_py() if len(longer) else None,
        },
        "on_several_pictures": shared[:SHOWN].to_pylist(),
        "twice_on_a_picture": len(owners) - different,
        "odd_characters": count_odd(captions),
        "not_plain": count_not_plain(captions),
    }


def count_odd(captions: pa.ChunkedArray) -> dict[str, Any]:
    """{kind: {captions, example}}; a caption counts once, for its first matching kind."""
    found: dict[str, Any] = {}
    others = captions.filter(pc.match_substring_regex(captions, ODD))
    for kind, pattern in ODD_CHARACTERS.items():
        has = pc.match_substring_regex(others, pattern)
        matching, others = others.filter(has), others.filter(pc.invert(has))
        if len(matching):
            found[kind] = {"captions": len(matching), "example": matching[0].as_py()}
    return found


def count_not_plain(captions: pa.ChunkedArray) -> dict[str, Any]:
    """{kind: {captions, example}} of text such as mark-up, which a model would learn to write."""
    kinds = {kind: captions.filter(pc.match_substring_regex(captions, like)) for kind, like in NOT_PLAIN.items()}
    return {kind: {"captions": len(each), "example": each[0].as_py()} for kind, each in kinds.items() if len(each)}


# The verdict


def judge(tables: dict[str, CaptionTable], figures: dict[str, Any], max_bad_share: float) -> list[list[str]]:
    """Warnings, and reasons why the data is not fit, by the rules at the top of this file."""
    parts, captions = figures["parts"], figures["captions"]
    odd, longer = captions["odd_characters"], captions["over_long"]
    warnings, reasons = [], [] if "train" in parts else ["no train split"]
    bad = sum(part["missing"] + part["undecodable"] for part in parts.values())
    total = sum(part["pictures"] + part["missing"] for part in parts.values())
    if bad > max_bad_share * total:
        reasons.append(f"pictures missing or undecodable: {bad:,} of {total:,} (allowed: {max_bad_share:.1%})")
    elif bad:
        warnings.append(f"pictures missing or undecodable: {bad:,} of {total:,}")
    if {"train", "test"} <= set(parts):
        known = int(np.isin(tables["test"].keys(), tables["train"].keys()).sum())
        reasons += [f"test pictures that are, by their ids, train pictures: {known:,}"] if known else []
    numbers = {split: part["pictures"] for split, part in parts.items() if split != "train"}
    warnings += [
        f"{split}: numbers rest on {counted(n, 'pictures')}, mostly chance below {FEW}"
        for split, n in numbers.items()
        if n < FEW
    ]
    for pair, number in figures["duplicates"].items():
        first, later = pair.split("/")
        exact, total = number["exact"], parts[later]["pictures"]
        text = f"{later} pictures that are also in {first}: {exact:,} of {total:,}"
        if first == "train" and exact > max_bad_share * total:
            reasons.append(f"{text} (allowed: {max_bad_share:.1%})")
        elif exact:
            warnings.append(text)
        if number["near"]:
            warnings.append(f"{later} pictures that look like one in {first}: {number['near']:,} of {total:,}")
    if longer["captions"]:
        warnings.append(f"captions of more than {longer['more_words_than']} words: {longer['captions']:,}")
    warnings += [f"damaged captions ({kind}): {odd[kind]['captions']:,}" for kind in DAMAGED if kind in odd]
    plain = captions["not_plain"].items()
    warnings += [f"captions {kind}: {each['captions']:,}, such as {excerpt(each['example'])}" for kind, each in plain]
    return [warnings, reasons]


# Output


def print_report(report: Report) -> None:
    """Print everything except the verdict."""
    parts, captions, copies = (report.figures[name] for name in ("parts", "captions", "duplicates"))
    lines = [("data", next(iter(report.tables.values())).about)]
    for split, part in parts.items():
        least, _, most = part["captions_a_picture"].values()
        each = f"{least}" if least == most else f"{least} to {most}"
        lines += [
            (
                split,
                f"{counted(part['pictures'], 'pictures')}, {counted(part['captions'], 'captions')} ({each} a picture)",
            )
        ]
    if "val" in parts and "test" not in parts:
        lines += [("test", "none: val serves as test")]
    lines += [("skipped", counted(number, what)) for what, number in report.figures["left_out"].items()]
    number, first = report.figures["unused"].values()
    lines += (
        [("unused", f"{counted(number, 'pictures')} below the folder in no split, such as {first}")] if number else []
    )
    words, longer = captions["words"], captions["over_long"]
    lines += [("words", f"min {words['min']}, median {words['median']:g}, 95 % {words['95 %']:g}, max {words['max']}")]
    if longer["captions"]:
        lines += [("over-long", f"{longer['captions']:,}, such as {excerpt(longer['example'])}")]
    for row in captions["on_several_pictures"]:
        lines += [("repeated", f"on {row['pictures']:,} pictures: {excerpt(row['caption'])}")]
    if again := captions["twice_on_a_picture"]:
        lines += [("repeated", f"{counted(again, 'captions')} repeated on the same picture")]
    for kind, found in captions["odd_characters"].items():
        lines += [("characters", f"{kind}: {found['captions']:,}, such as {excerpt(found['example'])}")]
    lines += [("bad", f"{bad.picture} ({bad.part}): {bad.reason}") for bad in report.bad[:SHOWN]]
    if len(report.bad) > SHOWN:
        lines += [("bad", f"and {len(report.bad) - SHOWN:,} more, see bad_samples.csv")]
    for split, part in parts.items():
        lines += [("duplicates", f"inside {split}: {part['exact_copies_inside']:,} exact")]
    for pair, number in copies.items():
        near = "" if number["near"] is None else f", {number['near']:,} near"
        lines += [("duplicates", f"{pair.replace('/', ' and ')}: {number['exact']:,} exact{near}")]
    if any(number["near"] is None for number in copies.values()):
        lines += [("duplicates", "near ones not searched, ImageHash is missing: pip install -r requirements/data.txt")]
    lines += [("warning", warning) for warning in report.warnings]
    for name, text in lines:
        print(in_one_line(f"{name:11} {text}"))


def excerpt(caption: str) -> str:
    """60 characters around the first odd one, in quotes, invisible ones as escapes."""
    odd = re.search(ODD, caption)
    start = max(0, odd.start() - 30) if odd else 0
    cut = caption[start : start + 60]
    return repr("…" * (start > 0) + cut + "…" * (start + 60 < len(caption)))


def write_report(report: Report, directory: Path) -> None:
    """Write check.json, bad_samples.csv, duplicates.csv, lengths.png and, if there are duplicates, duplicates.png."""
    write_json(directory / "check.json", report.figures)
    write_csv(directory / "bad_samples.csv", [BadPicture._fields, *report.bad], "\n")
    rows: list[Sequence[Any]] = [("part", "picture", "same_as_part", "same_as_picture", "kind", "bits")]
    for part, row, other, other_row, distance in report.duplicates:
        kind = ("exact", 0) if distance is None else ("near", distance)
        rows.append((part, report.tables[part].name_of(row), other, report.tables[other].name_of(other_row), *kind))
    write_csv(directory / "duplicates.csv", rows, "\n")
    draw_lengths(directory / "lengths.png", report.figures["captions"])
    draw_duplicates(directory / "duplicates.png", report)


def draw_lengths(path: Path, captions: dict[str, Any]) -> None:
    """Draw a histogram of the captions' lengths."""
    from matplotlib.figure import Figure

    words, longer = captions["words"], captions["over_long"]
    numbers = words["captions_of_0_1_2_words"]
    title = counted(sum(numbers) + longer["captions"], "captions")
    if longer["captions"]:
        title += f", {longer['captions']:,} of more than {longer['more_words_than']} words not shown"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="words in a caption", ylabel="captions")
    axes.bar(range(len(numbers)), numbers, width=0.9, color="0.7")
    axes.axvline(words["median"], color="0", label=f"median: {words['median']:g} words")
    axes.axvline(words["95 %"], color="0", linestyle="--", label=f"95 % have at most {words['95 %']:g}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def draw_duplicates(path: Path, report: Report) -> None:
    """Draw some pairs, from exact copies to the least similar; write no file if there are none."""
    from matplotlib.figure import Figure

    path.unlink(missing_ok=True)  # from an earlier check
    pairs = sorted(report.duplicates, key=lambda d: -1 if d.distance is None else d.distance)
    if not pairs:
        return
    chosen = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, PAIRS_SHOWN).astype(int))]
    columns, rows = min(2, len(chosen)), -(-len(chosen) // 2)
    figure = Figure(figsize=(5.4 * columns, 3.1 * rows), layout="constrained")
    for box, pair in zip(figure.subfigures(rows, columns, squeeze=False).flat, chosen, strict=False):
        box.suptitle("the same file" if pair.distance is None else f"near: {pair.distance} of 64 bits differ", size=10)
        places = ((pair.part, pair.row), (pair.same_as_part, pair.same_as_row))
        for axes, (part, row) in zip(box.subplots(1, 2), places, strict=True):
            table = report.tables[part]
            name = Path(table.name_of(row)).name
            axes.imshow(load_picture(table.picture(row), 256, name).permute(1, 2, 0).numpy())
            label = name if len(name) <= 34 else f"{name[:16]}…{name[-16:]}"
            axes.set_xlabel(f"{part}: {label}", size=8, parse_math=False)
            axes.set(xticks=[], yticks=[])
    with atomic(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=90)


# The command


@dataclass(kw_only=True)
class CheckConfig:
    """Command-line options of the check. Exit code 0: fit, 1: not fit, 2: the data cannot be read."""

    data_dir: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of the data, or its captions file; omit it for a data set on the Hub."""
    dataset: str = "auto"
    """Layout of the data: auto (recognised), coco, karpathy, flickr30k, flickr8k, imagefolder, webdataset, csv, sidecar;
    or user/name, a data set on the Hugging Face Hub."""
    image_column: str | None = None
    """Name of a table's picture column, if it is not a usual one."""
    caption_column: str | None = None
    """Name of a table's caption column, if it is not a usual one; txt: use name.txt, not name.caption."""
    output_dir: Path = Path("check")
    """Folder for check.json, bad_samples.csv, duplicates.csv, lengths.png and duplicates.png."""
    max_bad_share: float = 0.01
    """Largest share of pictures that may be missing or undecodable, or copies of train pictures (0 to 1)."""
    max_words: int = 100
    """Captions with more words are reported as over-long."""
    num_workers: int | None = None
    """Threads that read pictures (default: one per core, at most 16)."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        check_fields(self, "max_bad_share", lambda x: 0 <= x <= 1, "between 0 and 1")
        check_fields(self, "max_words num_workers", lambda x: x >= 1, "at least 1")
        if self.data_dir is None and "/" not in self.dataset:
            raise UserError("name the folder of the data: python dataset.py check DIR")


def main(arguments: list[str] | None = None) -> int:
    """Run the check from the command line; return the exit code."""
    config = parse_flags(CheckConfig, __doc__, arguments, prog="dataset.py check")
    tables = load_tables(config.dataset, config.data_dir or ".", config.image_column, config.caption_column)
    root = next(iter(tables.values())).root
    if config.output_dir.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{config.output_dir} is inside the data folder {root}: choose another --output-dir")
    directory = writable_directory(config.output_dir)
    report = check_tables(tables, config.max_bad_share, config.max_words, config.num_workers)
    write_report(report, directory)
    print_report(report)
    print(f"written to {directory}\n{report.verdict}")
    return 1 if report.reasons else 0
