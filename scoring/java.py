"""METEOR, which needs no Java, and SPICE and the Java tokenizer, which do.

Java runs the jars of an installed pycocoevalcap (requirements/full.txt). They are started from here because
pycocoevalcap's drivers have no time limit, let the system's language change the number format, and can block on a full
pipe. A metric that lacks something is skipped with a one-line note; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from config import UserError
from scoring.meteor import meteor_scores, packaged
from scoring.tokens import tokenize
from utils import in_one_line

SECONDS = 1800.0  # default time limit of one Java program; SPICE needs the most, as it parses every caption

# METEOR reads the numbers that it has written, which fails in languages with a decimal comma.
_LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class JavaScores(NamedTuple):
    """METEOR and SPICE, as far as they are available, under the names "meteor" and "spice"."""

    corpus: dict[str, float]  # the numbers that papers report, as fractions
    per_picture: dict[str, list[float]]  # the same metrics for each of the N pictures
    notes: list[str]  # one line for each skipped metric, with the reason


def java_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]], seconds: float = SECONDS, spice: bool = True
) -> JavaScores:
    """METEOR 1.5 (Denkowski and Lavie 2014, WMT), without Java, and SPICE 1.0 (Anderson et al. 2016, arXiv:1607.08822).

    candidates[i] is the caption under test of picture i, references[i] are its references. Both are tokenized first, as
    in the COCO evaluation; for SPICE by Java. METEOR's corpus score comes from counts summed over the pictures, SPICE's
    is the mean over the pictures. If one fails, the other is still computed. Without `spice` no Java is started. Each
    Java program may take `seconds`. SPICE needs Java 8 to 14, and Stanford's models, which pycocoevalcap does not
    include.

    Raises UserError only for lists that do not match.
    """
    if not candidates or len(candidates) != len(references):
        raise UserError(
            f"{len(candidates)} captions for {len(references)} pictures: give one for each, and at least one"
        )
    if not all(references):
        raise UserError(f"picture {[bool(captions) for captions in references].index(False)} has no reference")
    scores = JavaScores({}, {}, [])
    try:
        known = [[tokenize(caption) for caption in captions] for captions in references]
        found = meteor_scores([tokenize(caption) for caption in candidates], known)
        scores.corpus["meteor"], scores.per_picture["meteor"] = found
    except UserError as error:
        scores.notes.append(f"METEOR skipped: {error}")
    if not spice:
        return scores
    try:
        words = iter(java_tokenize([*candidates, *itertools.chain.from_iterable(references)], seconds))
        tested = [" ".join(next(words)) for _ in candidates]
        found = _spice(tested, [[" ".join(next(words)) for _ in captions] for captions in references], seconds)
        scores.corpus["spice"], scores.per_picture["spice"] = found
    except UserError as error:
        scores.notes.append(f"SPICE skipped: {error}")
    return scores


def java_tokenize(captions: Sequence[str], seconds: float = SECONDS) -> list[list[str]]:
    """Each caption's words by Stanford's PTBTokenizer 3.4.1, without the COCO evaluation's list of punctuation.

    metrics.tokenize gives the same words without Java, except for one caption in thousands. White space is collapsed
    first, as a line separator inside a caption would shift all captions after it. Raises UserError where Java or
    pycocoevalcap is missing, fails, or takes longer than `seconds`.
    """
    jar = packaged("tokenizer", "stanford-corenlp-3.4.1.jar")
    arguments = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = [" ".join(caption.split()) for caption in captions]
    with _java([*arguments, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"], seconds) as program:
        answers = program.ask(lines, len(lines), last=True)
    return [[word for word in line.split() if word not in _PUNCTUATION] for line in answers]


def _meteor(
    candidates: Sequence[str], references: Sequence[Sequence[str]], seconds: float
) -> tuple[float, list[float]]:
    """METEOR of tokenized captions by its jar: the corpus, and each picture. The tests compare meteor.py with it."""
    jar = packaged("meteor", "meteor-1.5.jar")
    pictures = [" ||| ".join([*known, tested]) for tested, known in zip(candidates, references, strict=True)]
    with _java(["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"], seconds, jar.parent) as program:
        counts = program.ask([f"SCORE ||| {captions}" for captions in pictures], len(pictures))
        # The answer is every picture's score, then the score of their summed counts.
        *each, corpus = map(float, program.ask([" ||| ".join(["EVAL", *counts])], len(pictures) + 1, last=True))
    return corpus, each


def _spice(candidates: Sequence[str], references: Sequence[Sequence[str]], seconds: float) -> tuple[float, list[float]]:
    """SPICE of tokenized captions: the corpus, and each picture."""
    jar = packaged("spice", "spice-1.0.jar")
    missing = [name for name in _SPICE_MODELS if not (jar.parent / "lib" / name).is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is not in {jar.parent / 'lib'}: download Stanford's models once with "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    if (version := _java_version()) >= 15:
        # It writes its results with the JavaScript engine that Java 15 removed, so it would fail at the very end.
        raise UserError(f"its jar needs Java 8 to 14, but the java on the PATH is version {version}")
    pictures = [
        {"image_id": i, "test": tested, "refs": list(known)}
        for i, (tested, known) in enumerate(zip(candidates, references, strict=True))
    ]
    with tempfile.TemporaryDirectory(prefix="spice-") as directory:
        source, results = Path(directory, "captions.json"), Path(directory, "scores.json")
        source.write_text(json.dumps(pictures), encoding="ascii")
        arguments = ["-Xmx8G", "-jar", str(jar), str(source), "-out", str(results), "-silent"]
        with _java(arguments, seconds, jar.parent) as program:
            program.wait()
            scores = {
                one["image_id"]: float(one["scores"]["All"]["f"]) for one in json.loads(results.read_text("utf-8"))
            }
            each = [scores[i] for i in range(len(pictures))]
    return float(np.mean(each)), each


def _java_version() -> int:
    """Java's major version: 8 for "1.8.0_392", 17 for "17.0.15"."""
    with _java(["-version"], 60) as program:
        program.wait()
        found = re.search(r'version "(?:1\.)?(\d+)', program.complaints())
        if not found:
            raise ValueError("java does not print its version")
        return int(found[1])


@contextlib.contextmanager
def _java(arguments: Sequence[str], seconds: float, directory: Path | None = None) -> Iterator[_Program]:
    """Run a Java program, which is killed with all its children at the end of the block, or after `seconds`.

    Raises UserError where Java is missing or the time is over, and for any OSError, ValueError or KeyError in the
    block, as an incomplete answer causes these.
    """
    java = shutil.which("java")
    if java is None:
        raise UserError("there is no java on the PATH")
    environment = dict(os.environ)
    if "_JAVA_OPTIONS" in environment:  # it overrides the command line
        environment["_JAVA_OPTIONS"] += " " + " ".join(_LOCALE)
    with tempfile.TemporaryFile() as errors:  # a file, as a pipe that nobody reads would fill up and block
        try:
            process = subprocess.Popen(
                [java, *_LOCALE, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                env=environment,
                cwd=directory,
                start_new_session=True,  # a new process group, so that its children can be killed with it
            )
        except OSError as error:
            raise UserError(f"{java} cannot be started ({error.strerror})") from error
        program = _Program(process, errors)
        timer = threading.Timer(seconds, program.end, [True])
        timer.daemon = True
        timer.start()
        try:
            yield program
        except (OSError, ValueError, KeyError) as error:
            if not program.late:
                raise UserError(f"java failed ({program.why(error)})") from error
            raise UserError(f"it took longer than {seconds:g} seconds") from error
        finally:
            timer.cancel()
            timer.join()
            program.end()
            process.wait()
            for pipe in (program.stdin, program.stdout):
                with contextlib.suppress(OSError):  # unsent lines cannot be flushed to a killed program
                    pipe.close()


class _Program:
    """A running program, with pipes that can block neither it nor this process."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout
        self.errors, self.late = errors, False

    def ask(self, lines: Sequence[str], number: int, last: bool = False) -> list[str]:
        """Send lines (then end of file, if these are the last) and read `number` lines of answer at the same time."""
        writer = threading.Thread(target=self._send, args=(lines, last), daemon=True)
        writer.start()
        answers = [line.rstrip("\n") for line in itertools.islice(self.stdout, number)]
        if len(answers) < number:
            raise ValueError(f"{len(answers)} of {number} answers")
        writer.join()
        return answers

    def _send(self, lines: Sequence[str], last: bool) -> None:
        # ask() notices a program that has died.
        with contextlib.suppress(OSError, ValueError):
            self.stdin.writelines(f"{line}\n" for line in lines)
            self.stdin.flush()
            if last:
                self.stdin.close()

    def wait(self) -> None:
        """Wait until it ends by itself, and ignore its output. Raises ValueError for an exit status other than 0."""
        for _ in self.stdout:
            pass
        if status := self.process.wait():
            raise ValueError(f"exit status {status}")

    def end(self, late: bool = False) -> None:
        """Kill it and its children; late means that its time is over."""
        self.late |= late
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def complaints(self) -> str:
        """The first 64 KiB of what it has written to standard error so far."""
        self.errors.seek(0)
        return self.errors.read(1 << 16).decode("utf-8", "replace")

    def why(self, error: Exception) -> str:
        """Why it failed: its first line that names an error, else its last line, else the error raised here."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # it may still be writing
        lines = [line.strip() for line in self.complaints().splitlines() if not line.startswith("Picked up ")]
        named = [line for line in lines if re.search("Exception|Error|error", line)]
        return in_one_line((named[:1] or lines[-1:] or [str(error)])[0])
