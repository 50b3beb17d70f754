"""Public captioners by short names, such as vit-gpt2: downloaded and converted once, then read from the cache.

The table is here for every script, so torch is imported late: --help should not wait for it.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from config import UserError
from utils import ask_hub, cache_file, first_line, locked, unfinished_of, writable_directory
from weights.file import Saved, check_finite, find_model_file, read_model_file, write_model_file

VERSION = 1  # of the converted files: add one when an older one can no longer be used
ADVICE = "set VIT_GPT2_CACHE to a folder with room for it"


@dataclass(frozen=True)
class Known:
    """A public captioner of transformers' VisionEncoderDecoder form."""

    repository: str
    """On the Hugging Face Hub."""
    licence: str
    size: str
    """Of the download, about."""
    good_for: str


KNOWN = {
    "vit-gpt2": Known("nlpconnect/vit-gpt2-image-captioning", "Apache-2.0", "982 MB", "photographs"),
    "distilvit": Known("Mozilla/distilvit", "Apache-2.0", "730 MB", "short alternative texts for photographs"),
}


def read_captioner(source: str | os.PathLike[str], allow_pickle: bool = False) -> Saved:
    """Read a captioner from a model file of this project, a folder that this project or transformers wrote, a Hub
    repository (user/name) of either kind, or by its short name. Raises UserError if there is none."""
    from weights.huggingface import read_transformers

    name = str(source)
    short = re.fullmatch(r"[\w-]+", name) and not Path(name).exists()
    path = converted(name, allow_pickle) if short else find_model_file(source)
    if path.name == "config.json":  # it has no model file of this project, so transformers may have written it
        return read_transformers(source, allow_pickle)
    return read_model_file(path)


def converted(name: str, allow_pickle: bool = False) -> Path:
    """The cached model file of a short name; it is downloaded and converted if it is missing. Raises UserError."""
    if name not in KNOWN:
        names = ", ".join(f"{name} ({known.good_for}, {known.size})" for name, known in KNOWN.items())
        raise UserError(f"{name}: no such model file or folder, and no known name: use {names}, or name a file")
    path = cache_file(name, KNOWN[name].repository, f"{VERSION}.safetensors")
    if path.is_file():
        return path
    writable_directory(path.parent, ADVICE)
    with locked(path.with_name(f"{path.name}.lock")):
        if not path.is_file():
            for left in unfinished_of(path):  # of a process that was killed: no other one holds the lock
                left.unlink()
            convert(name, path, allow_pickle)
    return path


def convert(name: str, path: Path, allow_pickle: bool) -> None:
    """Download a known captioner, unless the Hub client's cache has it, and write it to the path. Raises UserError."""
    from safetensors import SafetensorError

    from weights.huggingface import read_transformers

    refusal = ask_hub(KNOWN[name].repository)
    if refusal is None:
        announce(name, path, allow_pickle)
    try:
        saved = read_transformers(KNOWN[name].repository, allow_pickle)
    except UserError as error:
        raise not_available(name, refusal) if refusal else error from error
    check_finite(saved.path, saved.tensors)
    try:
        write_model_file(saved, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}): {ADVICE}") from error


def announce(name: str, path: Path, allow_pickle: bool) -> None:
    """Say what will be downloaded. Raises UserError where only a pickle could be, and that is not allowed."""
    from huggingface_hub import snapshot_download

    from weights.huggingface import PICKLES, WANTED

    known = KNOWN[name]
    try:
        files = snapshot_download(known.repository, allow_patterns=[*WANTED, *PICKLES], dry_run=True)
    except Exception as error:  # the client has a dozen error types
        raise not_available(name, error) from error
    wanted = [file for file in files if not file.filename.startswith("pytorch_model")]
    if not any(file.filename.endswith(".safetensors") for file in wanted):
        if not allow_pickle:
            why = "are a pickle, which may run untrusted code when it is read"
            advice = "if you trust it, add --allow-pickle, which reads its tensors and nothing else"
            raise UserError(f"{name}: the weights of {known.repository} {why}: {advice}")
        wanted = files
    if size := sum(file.file_size or 0 for file in wanted if file.will_download):
        about = f"{max(1, round(size / 1e6)):,} MB, licence {known.licence}"
        print(f"{name}: downloading {known.repository} ({about}), once, to be kept as {path}", file=sys.stderr)


def not_available(name: str, error: Exception) -> UserError:
    """The error for a captioner that is neither here nor available."""
    where = f"{KNOWN[name].repository} is not available from the Hugging Face Hub ({first_line(error)})"
    return UserError(f"{name}: not downloaded yet, and {where}: run the command once with a network, or name a file")
