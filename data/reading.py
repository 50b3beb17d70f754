"""Helpers of all readers: clean captions, match pictures' names with files, read text and JSON with one-line errors.

Never follows a name out of the data folder.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import itertools
import json
import math
import os
import posixpath
import re
import unicodedata
import urllib.error
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from config import UserError
from data.budget import open_file
from data.kinds import PICTURE_SUFFIXES, files_below, is_picture

WORDS = {"train": "train training restval", "val": "val valid validation dev", "test": "test testing"}
SPLIT_WORDS = {word: split for split, words in WORDS.items() for word in words.split()}
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # control characters but white space
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
ITEM = rf"(?:np\.str_\()?u?(?:{QUOTED})\)?"
LISTED = re.compile(rf"\[\s*{ITEM}(?:(?:\s*,\s*|\s+){ITEM})*\s*,?\s*\]", re.DOTALL)  # NumPy writes no commas
MADE_BY = "made_by"  # the only field of a JSON lines file's first line, if that says what wrote the captions
PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SHEETS = (".xlsx", ".xls", ".ods", ".numbers")


# Captions


def clean(caption: Any, where: str) -> str:
    """Return a caption as one line of text: white space collapsed, control characters and lone surrogates removed,
    numbers as digits, "" for null. Raises UserError, which starts with `where`, for anything else."""
    if caption is None or (isinstance(caption, float) and math.isnan(caption)):
        return ""
    if not isinstance(caption, str | int | float) or isinstance(caption, bool):
        raise UserError(f"{where}: the caption is {str(caption)[:40]!r} and not text: fix it or remove it")
    text = str(caption).encode("utf-8", "replace").decode("utf-8")
    return " ".join(CONTROL.sub("", text).split())


def clean_all(value: Any, where: str) -> list[str]:
    """Clean a caption or a list of them; of a conversation, the last answer; of text that is a list, its items."""
    if isinstance(value, str):
        value = listed(value)
    if not isinstance(value, list):
        return [clean(value, where)]
    if value and all(isinstance(turn, dict) and {"from", "role"} & set(turn) for turn in value):
        answers = [turn for turn in value if turn.get("from", turn.get("role")) in ("gpt", "assistant")]
        value = [turn.get("value", turn.get("content")) for turn in answers[-1:]]
    each = (clean_all(item, where) if isinstance(item, str) else [clean(item, where)] for item in value)
    return list(itertools.chain.from_iterable(each))


def listed(text: str) -> str | list[str | None]:
    """Parse a text that is a list of texts, as JSON, Python or NumPy writes it; other text is returned unchanged."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return text
    with contextlib.suppress(ValueError, RecursionError):
        items = json.loads(stripped)
        return items if all(isinstance(item, str | None) for item in items) else text
    with contextlib.suppress(ValueError, SyntaxError):  # an invalid escape
        return [ast.literal_eval(item) for item in re.findall(QUOTED, stripped)] if LISTED.fullmatch(stripped) else text
    return text


# Pictures' names


def stays_inside(name: str) -> bool:
    """Whether a relative name, read as a POSIX or a Windows path, stays below the folder it is joined to."""
    parts = name.replace("\\", "/").split("/")
    return parts[0] != "" and ":" not in parts[0] and ".." not in parts


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; a name from an old archive in another encoding cannot."""
    return name.encode("utf-8", "replace").decode("utf-8") == name


def folded(name: str) -> str:
    """A name in a form for comparison: without letter case, and with accents in one Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def stem(name: str) -> str:
    """A name without a picture's suffix."""
    base, suffix = os.path.splitext(name)
    return base if suffix.lower() in PICTURE_SUFFIXES else name


@dataclass(frozen=True)
class Names:
    """Finds the pictures that captions files name in the data folder."""

    root: Path

    @functools.cached_property
    def alike(self) -> dict[str, list[str]]:
        """{a picture's folded name without folder and suffix: its paths below the root}; the folder is walked once."""
        found: dict[str, list[str]] = {}
        for file in files_below(self.root):
            path = file.relative_to(self.root).as_posix()
            if is_picture(file) and is_text(path):
                found.setdefault(stem(folded(file.name)), []).append(path)
        return found

    def checked(self, name: Any, where: str) -> str:
        """Turn a picture's name from a captions file into a path below the root. The name may have Windows separators,
        be an absolute path inside the root, or be a URL or a path elsewhere whose end matches one picture here. Raises
        UserError for an invalid name, and for one that leads out of the root."""
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: no picture is named: fix it or remove it")
        if not is_text(name):
            raise UserError(f"{where}: {name!r} is not valid UTF-8: rename the picture")
        if stays_inside(name):
            as_windows_writes = "\\" in name and not os.path.isfile(self.root / name)
            return posixpath.normpath(name.replace("\\", "/")) if as_windows_writes else name
        if ".." not in name.replace("\\", "/").split("/"):
            for root in (self.root.absolute(), self.root.resolve()):
                if Path(name).is_relative_to(root):
                    return Path(name).relative_to(root).as_posix()
            end = unquote(re.split(r"[?#]", name)[0]) if "://" in name else name.replace("\\", "/")
            if same := self.match(end, anywhere=True):
                return same
        cure = "download the pictures into it first" if "://" in name else "use a relative name without .."
        raise UserError(f"{where}: {name!r} leads out of the data folder{self.nearest(name)}: {cure}")

    def match(self, name: str, anywhere: bool = False) -> str | None:
        """The one picture with this name, ignoring case, Unicode form and suffix; with `anywhere` also ignoring its
        folders, but the picture with the most matching folders wins. None if there is none, or more than one."""
        *folders, last = folded(posixpath.normpath(name)).split("/")
        found = [(path, folded(path).split("/")) for path in self.alike.get(stem(last), [])]
        if anywhere:
            pairs = (zip(reversed(folders), parts[-2::-1], strict=False) for _, parts in found)
            agree = [sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], each)) for each in pairs]
            found = [each for each, number in zip(found, agree, strict=True) if number == max(agree)]
        else:
            found = [each for each in found if each[1][:-1] == folders]
        for like in (lambda path, _: path.endswith(name.rpartition("/")[2]), lambda _, parts: parts[-1] == last):
            found = [each for each in found if like(*each)] or found
        return found[0][0] if len(found) == 1 else None

    def first_folder(self, folders: Sequence[str], names: Iterable[str]) -> str:
        """Find the folder below the root that has the pictures: the first one with a file of one of the first hundred
        names, or else with a file whose name is spelled differently. Returns "folder/", or "" if there is none."""
        hundred = [name for name in itertools.islice(names, 100) if stays_inside(name)]
        for is_there in (lambda path: os.path.isfile(self.root / path), self.match):
            for folder in folders:
                if any(is_there(f"{folder}/{name}") for name in hundred):
                    return f"{folder}/"
        return ""

    def nearest(self, name: str) -> str:
        """The most similar name here, in brackets; "" if none is similar."""
        last = stem(folded(name.replace("\\", "/").rpartition("/")[2]))
        close = difflib.get_close_matches(last, self.alike, 1)
        return f" (the most similar name is {self.alike[close[0]][0]!r})" if close else ""


def id_or_name(value: Any, name: str) -> int | str:
    """A picture's id from a column or field, as a number if it is one; the picture's name if there is no id."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, str | int) and value != "" else name


def split_word(value: Any, where: str) -> str:
    """The split that a column names, "" for none. Raises UserError for a word that means none of the three."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    if split := SPLIT_WORDS.get(str(value).strip().lower()):
        return split
    raise UserError(f"{where}: split {value!r} is none of {', '.join(SPLIT_WORDS)}: fix it or leave it empty")


def split_of(*names: str) -> str:
    """train, val or test if one of the names contains such a word, else ""."""
    words = (word for name in names for word in re.split(r"[^a-z]+", name.lower()))
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


# Benchmarks of COCO's form

DOMAIN = re.compile("[a-z]{1,20}-domain")


def domain_of(image: Any) -> str:
    """The domain of an entry of nocaps' "images": in-domain, near-domain or out-domain; "" for others."""
    domain = image.get("domain") if isinstance(image, dict) else None
    return domain if isinstance(domain, str) and DOMAIN.fullmatch(domain) else ""


def is_rejected(annotation: Any) -> bool:
    """Whether VizWiz excludes an annotation: rejected, or one of its sentences for pictures that show nothing."""
    return isinstance(annotation, dict) and any(
        annotation.get(name) is True for name in ("is_rejected", "is_precanned")
    )


# Folders


def file_names(folder: Path) -> set[str]:
    """The names of the files in folder; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            # entry.is_file() raises for links in a circle.
            return {entry.name for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry)}
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file system can have
        return set()


def split_folders(root: Path) -> list[Path]:
    """The folder, and those in it that are named after a split."""
    return [root, *sorted(path for path in root.iterdir() if path.is_dir() and split_of(path.name))]


def files_of(root: Path, *names: str) -> list[Path]:
    """Paths of those names that are files in the folder."""
    return [path for name in names if (path := root / name).is_file()]


def one_of_each(root: Path, files: list[Path], splits: Iterable[str]) -> None:
    """Raise UserError if two of the files are of the same split: the user has to choose one."""
    if len(set(splits)) < len(files):
        raise UserError(f"{root} holds {some(path.name for path in files)}: name one of the files with --data-dir")


def unusable(names: Iterable[str]) -> str:
    """Say which files the user has to unpack or save in another format first, and how; "" for none."""
    kinds = (("unpack {}", PACKED), ("save {} as CSV", SHEETS))
    found = [(how, [name for name in names if name.lower().endswith(suffixes)]) for how, suffixes in kinds]
    return " and ".join(how.format(", ".join(those[:3])) for how, those in found if those)


# Files and messages


def reason(error: BaseException) -> str:
    """An exception's text as one line."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__


def some(names: Iterable[Any]) -> str:
    """How many, and the first three."""
    listed = list(names)
    return f"{len(listed):,} ({', '.join(map(repr, listed[:3]))}{', ...' if len(listed) > 3 else ''})"


def encoding_of(start: bytes) -> str:
    """The encoding of a text with this start: UTF-8, or UTF-16 as Excel and PowerShell write it."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    even, odd = start[0:4:2], start[1:4:2]  # one of an English letter's two bytes is zero
    return "utf-16-le" if odd == b"\0\0" else "utf-16-be" if even == b"\0\0" else "utf-8-sig"


def read_text(path: Path) -> str:
    """Read a text file, with or without a byte order mark."""
    try:
        with open_file(path) as file:
            content = file.read()
        return content.decode(encoding_of(content)).replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}: put it there, or name another folder") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: save the file as UTF-8, or get it again") from None


def parse_json(text: str, source: Path, line: int | None = None) -> Any:
    """Parse JSON. `line` is the text's line number, if the text is one line of the source."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source}:{line or error.lineno}"
        raise UserError(f"{where}: not JSON ({error.msg}): cut or damaged, fix it or get it again") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{source}: not readable as JSON ({reason(error)}): get it again") from None


def field_of(record: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A record's field. Raises UserError if it is missing or of another type."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: {key!r} is missing or of the wrong type: fix the file or get it again")
    return value


def lists_of(content: Any, source: Path, *keys: str) -> list[Any]:
    """A record's lists under these keys. Raises UserError if one is missing."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        names = " and ".join(map(repr, keys))
        raise UserError(f"{source}: no list {names} in it: this is another kind of file")
    return [content[key] for key in keys]
