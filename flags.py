"""The scripts' flags, read by tyro; and their help: `--help` shows the flags that most people set, `--help-all` shows all of them.

tyro prints it, from a copy of the script's dataclass that is made for reading: the docstrings without their line breaks, each
default once, and no second name such as --no-no-upload.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from config import UserError
from utils import printable

T = TypeVar("T")

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
SHOWN_AS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


def parse_flags(
    kind: type[T],
    description: str | None,
    arguments: list[str] | None = None,
    common: Collection[str] = (),
    hidden: Collection[str] = (),
    **options: Any,
) -> T:
    """Parse a command line into a config with tyro. common: the fields that --help shows (none: all); hidden: those that
    --help-all does not show either. A UserError from the config's checks is raised unchanged."""
    import tyro  # late: benchmark.py gpu runs without it

    given = sys.argv[1:] if arguments is None else arguments
    if dataclasses.is_dataclass(kind) and (asked := {*HELP, HELP_ALL}.intersection(given)):
        shown = () if HELP_ALL in asked else common
        about = {name: value for name, value in options.items() if name in ("config", "prog")}
        print_help(kind, description or "", options.get("default"), shown, hidden, **about)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=arguments, description=description, **options)
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        for line in complaint.getvalue().splitlines():
            print(printable(line), file=sys.stderr)
        raise


def print_help(
    kind: type[Any], description: str, defaults: Any, common: Collection[str], hidden: Collection[str], **options: Any
) -> None:
    """Print the help of a dataclass of flags, and exit. common: the only fields to show (none: all); hidden: fields that
    only programs set; options: tyro.cli's."""
    import tyro

    if common:
        number = len(set(all_fields(kind)).difference(hidden))
        description = f"{description.rstrip()}\n\nThe flags that most people set; {HELP_ALL} shows all {number}."
    shown = for_reading(kind, defaults, set(common or all_fields(kind)).difference(hidden))
    print(wrapped(description), end="\n\n")  # tyro would join its lines
    tyro.cli(shown, args=["--help"], description="", **options)


def all_fields(kind: type[Any]) -> Iterator[str]:
    """The names of a dataclass's flags, with those of its groups."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield from all_fields(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else [field.name]


def for_reading(kind: type[Any], defaults: Any, shown: Collection[str]) -> type[Any]:
    """A dataclass whose help is that of `kind`, for reading. shown: its fields. defaults None: those of the class."""
    from tyro import conf as markers

    conf: Any = markers  # to a type checker they are types
    hints, texts = typing.get_type_hints(kind, include_extras=True), docstrings(kind)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(kind):
        hint, text = hints[field.name], texts.get(field.name, "")
        value = default_of(field) if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(hint):
            group = for_reading(hint, value, shown)  # type: ignore[arg-type]
            fields += [(field.name, group, dataclasses.field(default_factory=group))] * bool(dataclasses.fields(group))
        elif field.name in shown:
            named = field.name.upper() if conf.Positional in typing.get_args(hint) else ""
            about = conf.arg(help=text, help_behavior_hint=hint_of(value, text), metavar=word(hint, named))
            marks = (about,) if value is True else (about, conf.FlagCreatePairsOff)
            fields.append(
                (field.name, Annotated[(hint, *marks)], dataclasses.field(default_factory=partial(copy.copy, value)))
            )
    made = dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)
    made.__doc__ = kind.__doc__
    return made


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def docstrings(kind: type[Any]) -> dict[str, str]:
    """{field: the text below it in the source, in one line}, also of the base classes' fields."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if dataclasses.is_dataclass(base)]):
        with contextlib.suppress(OSError, TypeError):  # a class that was made by a program has no source
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
            for field, text in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def hint_of(value: Any, text: str) -> str:
    """The default in brackets, or nothing where the text says it, and where it is nothing."""
    nothing = value is None or value is False or value is dataclasses.MISSING or value in ("", (), [])
    return "" if nothing or "(default" in text else f"(default: {'on' if value is True else value})"


def word(hint: Any, name: str = "") -> str | None:
    """What stands for a value: N, TEXT, {a,b}, ...; the name of an argument without a flag; None for a switch, which has
    no value."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [each for each in typing.get_args(hint) if each is not type(None)]
        hint = typing.Literal[True, False] if kinds == [bool] else kinds[0]
    if typing.get_origin(hint) is typing.Literal:
        return f"{{{','.join(map(str, typing.get_args(hint)))}}}"
    if typing.get_origin(hint) in (list, tuple):
        return f"{name or word(typing.get_args(hint)[0])} ..."
    return name or SHOWN_AS.get(hint)


def wrapped(text: str) -> str:
    """A text with its paragraphs as wide as the terminal; indented lines stay."""
    width = shutil.get_terminal_size().columns
    paragraphs = re.split(r"\n{2,}", text.strip())
    return "\n\n".join(
        each if re.search(r"^ ", each, re.M) else textwrap.fill(" ".join(each.split()), width) for each in paragraphs
    )
