"""Readers for the usual layouts of pictures with captions, listed in LAYOUTS.

A reader is a function that finds the captions files in a folder, and one that yields rows from them. None opens a
picture or follows a name out of the folder; each reports damage in one line, with the file and the line or id.
"""

from __future__ import annotations

import itertools
import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from config import UserError
from data import reading
from data.budget import open_file
from data.columns import IMAGEFOLDER_FILES, Columns, csv_records, find_columns, read_columns
from data.kinds import TEXT_SUFFIXES, files_below, is_picture
from data.reading import Names, clean, clean_all, parse_json, read_text, split_of
from data.shards import find_shards, read_shards
from data.sidecars import has_caption, texts_beside
from data.table import LeftOut, Row


@dataclass(frozen=True)
class Layout:
    """One layout of pictures with captions."""

    shape: str  # what is in the folder, as a text
    find: Callable[[Path, Columns], list[Path]]  # the files that hold the captions; none if it is another layout
    read: Callable[[Path, list[Path], Columns], Iterable[Row | LeftOut]]  # their rows, pictures' paths below the folder
    like: Callable[[Path, Columns], list[Path]] = lambda root, columns: []
    """The same files under other names, recognised by content: tried if no layout's usual names are there."""
    source: str = ""
    """Where to download them."""


# COCO


def _find_coco(root: Path, columns: Columns) -> list[Path]:
    """Each split's annotations, the newest year's if there are several. COCO's test captions are not public: a test
    file counts only if its folder of pictures is there, as in the demo's data."""
    splits = {}
    for path in sorted(root.glob("annotations/captions_*.json")):
        match = re.fullmatch(r"(train|val|test)\d*", name := path.stem.removeprefix("captions_"))
        if match and (match[1] != "test" or (root / name).is_dir()):
            splits[match[1]] = path
    return list(splits.values())


def _coco_form(root: Path, columns: Columns) -> list[Path]:
    """The files with COCO's lists and captions in them, here or one folder down (VizWiz, nocaps, many tools)."""
    return [path for pattern in ("*.json", "*/*.json") for path in sorted(root.glob(pattern)) if _has_cocos_lists(path)]


def _has_cocos_lists(path: Path) -> bool:
    """Whether a file has COCO's lists. Searches the text: parsing a gigabyte of JSON takes half a minute."""
    try:
        with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            lists = all(re.search(rb'"%s"\s*:\s*\[' % key, content) for key in (b"images", b"annotations"))
            return lists and content.find(b'"caption"') >= 0
    except (OSError, ValueError):  # ValueError: an empty file
        return False


def _read_coco(root: Path, files: list[Path], columns: Columns) -> Iterator[Row | LeftOut]:
    """Yield pictures in the order of the file's "images", with their captions in the order of the captions' ids; in the
    file's order if some ids are not numbers. Captions that VizWiz rejects are skipped."""
    reading.one_of_each(root, files, (split_of(path.stem) for path in files))
    known_names = Names(root)
    listed = cache(lambda folder: reading.file_names(root / folder))
    for source in files:
        split, name = split_of(source.stem), source.stem.removeprefix("captions_")
        of_split = [base + each for each in (name, *reading.WORDS.get(split, "").split()) for base in ("", "images/")]
        there = [each for each in (*of_split, "images", "Images", ".") if (root / each).is_dir()]
        # COCO's file names tell where the pictures are, or should be.
        named = [each for each in there if each in of_split[:2]] or [name] if name != source.stem else []
        folders = list(dict.fromkeys([*named[:1], *there]))
        images, annotations = reading.lists_of(parse_json(read_text(source), source), source, "images", "annotations")
        names: dict[int | str, str] = {}
        domains: dict[int | str, str] = {}
        for i, image in enumerate(images):
            image_id = reading.field_of(image, "id", (int, str), f"{source}: images[{i}]")
            if image_id in names:
                raise UserError(f"{source}: image {image_id!r} occurs twice: remove one of them")
            names[image_id] = known_names.checked(image.get("file_name"), f"{source}: image {image_id!r}")
            domains[image_id] = reading.domain_of(image)
        numbered = all(isinstance(each, dict) and type(each.get("id")) is int for each in annotations)
        captions: dict[int | str, list[tuple[int, str]]] = {image_id: [] for image_id in names}
        for i, annotation in enumerate(annotations):
            number = annotation["id"] if numbered else i
            where = f"{source}: annotation {number}" if numbered else f"{source}: annotations[{i}]"
            image_id = reading.field_of(annotation, "image_id", (int, str), where)
            if image_id not in captions:
                raise UserError(
                    f"{where}: its image {image_id!r} is not among the {len(names):,} 'images': the file is cut, get it "
                    "again or remove the annotation"
                )
            if reading.is_rejected(annotation):
                yield LeftOut("rejected captions", where.removeprefix(f"{source}: "))
            else:
                captions[image_id] += [(number, caption) for caption in clean_all(annotation.get("caption"), where)]
        del images, annotations
        for image_id, numbered_captions in captions.items():
            picture = _coco_picture(names[image_id], folders, listed)
            texts = [caption for _, caption in sorted(numbered_captions)]
            yield Row(split, picture, image_id, texts, domain=domains[image_id])


def _coco_picture(name: str, folders: list[str], listed: Callable[[str], set[str]]) -> str:
    """A picture's path: in the split's folder, in images/ or in the root, with or without the folder in its name."""
    tried = [f"{folder}/{each}" for each in dict.fromkeys((name, name.rpartition("/")[2])) for folder in folders]
    found = (path for path in tried if path.rpartition("/")[2] in listed(path.rpartition("/")[0]))
    return next(found, tried[0]).removeprefix("./")


# Karpathy's splits

FLICKR_FOLDERS = (
    "Images images flickr30k_images/flickr30k_images flickr30k_images flickr30k-images Flicker8k_Dataset "
    "Flickr8k_Dataset/Flicker8k_Dataset Flickr8k_Dataset"
)


def _read_karpathy(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Read the files of Karpathy & Fei-Fei (2015, arXiv:1412.2306). COCO's pictures are searched in the 2014 folders
    and, by their number, in the 2017 folders; their id is that number. The id of others is the file name."""
    reading.one_of_each(root, files, [""])
    source, known_names = files[0], Names(root)
    (images,) = reading.lists_of(parse_json(read_text(source), source), source, "images")
    listed = cache(lambda folder: reading.file_names(root / folder))
    named = (image.get("filename") for image in images if isinstance(image, dict))
    flickr = known_names.first_folder(FLICKR_FOLDERS.split(), (name for name in named if isinstance(name, str)))
    for i, image in enumerate(images):
        where = f"{source}: images[{i}]"
        name = known_names.checked(reading.field_of(image, "filename", str, where), where)
        split = reading.split_word(reading.field_of(image, "split", str, where), where)
        captions = [
            clean(s.get("raw"), where) for s in reading.field_of(image, "sentences", list, where) if isinstance(s, dict)
        ]
        if "cocoid" in image:
            number = reading.field_of(image, "cocoid", int, where)
            old, new = known_names.checked(image.get("filepath", "val2014"), where), f"{number:012d}.jpg"
            paths = [(base + old, name) for base in ("", "images/")]
            paths += [(base + year, new) for base in ("", "images/") for year in ("val2017", "train2017")]
            folder, file = next((path for path in paths if path[1] in listed(path[0])), ("train2017", new))
            yield Row(split, f"{folder}/{file}", number, captions)
        else:
            yield Row(split, flickr + name, name, captions)


# Flickr30k and Flickr8k


def _token_captions(source: Path, known_names: Names) -> dict[str, list[str]]:
    """{picture: its captions} from the authors' files: name.jpg#0, a tab, a caption."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(source).split("\n"), start=1):
        match = re.fullmatch(r"(.+?)#\d+\s+(.*)", line)
        if match:
            texts = captions.setdefault(known_names.checked(match[1], f"{source}:{number}"), [])
            texts.extend(clean_all(match[2], f"{source}:{number}"))
        elif line.strip():
            raise UserError(f"{source}:{number}: not 'name#number caption': fix the line or get the file again")
    return captions


FLICKR30K_PATHS = [f"{folder}/results.csv" for folder in (".", "flickr30k_images", "flickr30k_images/flickr30k_images")]


def _read_flickr30k(root: Path, files: list[Path], columns: Columns) -> Iterator[Row]:
    """Read the authors' results_20130124.token, or Kaggle's results.csv."""
    source, known_names = files[0], Names(root)
    if source.suffix == ".token":
        captions = _token_captions(source, known_names)
        folder = known_names.first_folder([*FLICKR_FOLDERS.split(), "."], captions)
    else:
        captions = _kaggle_captions(source, known_names)
        base = source.parent.relative_to(root)
        folder = known_names.first_folder((f"{base}/flickr30k_images", f"{base}", f"{base}/images", "."), captions)
    for name, texts in captions.items():
        yield Row("", (folder or "flickr30k_images/").removeprefix("./") + name, name, texts)


def _kaggle_captions(source: Path, known_names: Names) -> dict[str, list[str]]:
    """{picture: its captions} from lines image_name| comment_number| comment; one line lacks its second bar."""
    lines = read_text(source).split("\n")  # not at U+2028 or another break inside a caption
    if [word.strip() for word in lines[0].split("|")] != ["image_name", "comment_number", "comment"]:
        raise UserError(
            f"{source}:1: the header is not 'image_name| comment_number| comment': get Kaggle's Flickr30k again, or "
            "read another table with --dataset csv"
        )
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        name, _, after = line.partition("|")
        match = re.fullmatch(r"\s*\d+\s*(?:\||\s)(.*)", after)
        if not match and line.strip():
            raise UserError(f"{source}:{number}: not 'name| number| caption': fix the line or get the file again")
        if match:
            texts = captions.setdefault(known_names.checked(name.strip(), f"{source}:{number}"), [])
            texts.extend(clean_all(match[1], f"{source}:{number}"))
    return captions


FLICKR8K_LISTS = {split: f"Flickr_8k.{split.replace('val', 'dev')}Images.txt" for split in ("train", "val", "test")}


def _find_flickr8k(root: Path, *names: str) -> list[Path]:
    """The first of the named files that is there, and the lists of its pictures' splits."""
    captions = reading.files_of(root, *names)[:1]
    return captions and [*captions, *reading.files_of(captions[0].parent, *FLICKR8K_LISTS.values())]


def _read_flickr8k(root: Path, files: list[Path], columns: Columns) -> Iterator[Row | LeftOut]:
    """Read Kaggle's captions.txt, or the authors' Flickr8k.token.txt. With the authors' split lists, yield the lists'
    pictures only, in their order."""
    source, known_names = files[0], Names(root)
    captions: dict[str, list[str]] = {}
    if source.name == "captions.txt":
        for where, record in csv_records(source, ","):
            if list(record) != ["image", "caption"]:
                raise UserError(
                    f"{source}:1: the header is {','.join(record)!r} where 'image,caption' is expected: fix it or get "
                    "the file again"
                )
            texts = captions.setdefault(known_names.checked(record["image"], where), [])
            texts.extend(clean_all(record["caption"], where))
        usual = f"{source.parent.relative_to(root)}/Images/"
        folder = known_names.first_folder([usual[:-1], "."], captions) or usual
    else:
        captions = _token_captions(source, known_names)
        folder = known_names.first_folder([*FLICKR_FOLDERS.split(), "."], captions)
    folder = folder.removeprefix("./")
    if len(files) == 1:
        yield from (Row("", folder + name, name, texts) for name, texts in captions.items())
        return
    taken: set[str] = set()
    for split, list_name in FLICKR8K_LISTS.items():
        listed = source.with_name(list_name)
        if listed not in files:
            continue
        lines = read_text(listed).splitlines()
        named = ((line.strip(), f"{listed}:{n}") for n, line in enumerate(lines, start=1) if line.strip())
        names = list(itertools.starmap(known_names.checked, named))
        if repeated := [name for name, times in Counter(names).items() if times > 1]:
            raise UserError(f"{listed}: listed more than once: {reading.some(repeated)}: list each picture once")
        # A truncated CSV file is still valid CSV, so a listed picture that is not in captions.txt is an error.
        if unknown := [name for name in names if name not in captions]:
            raise UserError(
                f"{source}: no line for {reading.some(unknown)} of the {len(names):,} pictures in {list_name}: the file is cut "
                "or another data set's, get it again"
            )
        yield from (Row(split, folder + name, name, captions[name]) for name in names)
        taken.update(names)
    yield from (LeftOut("pictures in none of the lists", name) for name in captions if name not in taken)


# A user's folder: name.jpg with name.txt beside it


def pictures_below(root: Path, kind: str | None = None) -> Iterator[tuple[Path, list[Path]]]:
    """Yield every picture below root, except hidden ones, with the texts beside it; the first one is to be used."""
    for _, inside in itertools.groupby(files_below(root), key=lambda file: file.parent):
        files = list(inside)
        yield from texts_beside([*filter(is_picture, files)], files, kind).items()


def _read_sidecars(root: Path, files: list[Path], columns: Columns) -> Iterator[Row | LeftOut]:
    """Read every line that is not empty as a caption. A folder train/, val/ or test/ gives the split."""
    unread = {file: None for file in files_below(root) if file.suffix.lower() in TEXT_SUFFIXES}
    for picture, texts in pictures_below(root, columns.caption):
        for text in texts:
            unread.pop(text, None)
        name = picture.relative_to(root).as_posix()
        if not reading.is_text(name):
            raise UserError(f"{root}: {name!r} is not valid UTF-8: rename the picture")
        lines = [line for text in texts[:1] for line in read_text(text).split("\n") if line.strip()]
        captions = clean_all(lines, str(texts[0]) if texts else "")
        for text in filter(has_caption, texts[1:]):
            yield LeftOut("texts of pictures that have another", text.relative_to(root).as_posix())
        yield Row(reading.SPLIT_WORDS.get(name.split("/")[0].lower(), ""), name, name, captions)
    yield from (LeftOut("texts without a picture", text.relative_to(root).as_posix()) for text in unread)


LAYOUTS = {
    "coco": Layout(
        "COCO: annotations/captions_{train,val}2017.json, train2017/, val2017/", _find_coco, _read_coco, _coco_form
    ),
    "karpathy": Layout(
        "Karpathy's split: dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json",
        lambda root, _: reading.files_of(root, *(f"dataset_{name}.json" for name in ("coco", "flickr30k", "flickr8k"))),
        _read_karpathy,
        source="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    ),
    "flickr30k": Layout(
        "Flickr30k: flickr30k_images/results.csv",
        lambda root, _: reading.files_of(root, *FLICKR30K_PATHS)[:1],
        _read_flickr30k,
        lambda root, _: [file for at in (".", "*") for file in sorted(root.glob(f"{at}/results*.token"))][:1],
    ),
    "flickr8k": Layout(
        "Flickr8k: captions.txt, Images/",
        lambda root, _: _find_flickr8k(root, "captions.txt", "flickr8k/captions.txt"),
        _read_flickr8k,
        lambda root, _: _find_flickr8k(
            root, *(f"{at}/Flickr8k.token.txt" for at in (".", "Flickr8k_text", "flickr8k"))
        ),
    ),
    "imagefolder": Layout(
        "imagefolder: metadata.jsonl, .csv or .parquet",
        lambda root, _: [
            file for folder in reading.split_folders(root) for file in reading.files_of(folder, *IMAGEFOLDER_FILES)
        ],
        read_columns,
    ),
    "webdataset": Layout("WebDataset: *.tar", find_shards, read_shards),
    "csv": Layout(
        "a CSV, TSV or JSON file with a picture column and a caption column",
        find_columns,
        read_columns,
        partial(find_columns, usual=False),
    ),
    "sidecar": Layout(
        "name.txt beside each name.jpg",
        lambda root, columns: [text for _, texts in pictures_below(root, columns.caption) for text in texts[:1]],
        _read_sidecars,
    ),
}
