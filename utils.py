"""Helpers for every script: one-line errors, signals, atomic writes, the disk cache, device and precision.

Nothing here depends on models or data.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from config import UserError

if TYPE_CHECKING:  # importing torch takes a second, and --help should not wait for it
    import torch

ROOT = Path(__file__).resolve().parent  # of this repository
# Closing a terminal sends SIGHUP. Slurm can be set to send SIGUSR1 before a job's time ends. Windows has neither.
STOP_SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
LEFT_AFTER = 24 * 60 * 60  # seconds; an older unfinished file belongs to a process that was killed
HUB_SECONDS = 10.0  # timeout of a request to the Hub
# Environment variables with access tokens, by service.
TOKENS = {"hub": ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"], "kaggle": ["KAGGLE_API_TOKEN", "KAGGLE_KEY"]}
TOKENS |= {"wandb": ["WANDB_API_KEY"]}
JOINED = re.compile(r"(?<=[^\x00-\x7f\s])([\u200c\u200d])(?=[^\x00-\x7f\s])")  # joiners in Persian, Hindi and emoji


def module_file(name: str) -> Path:
    """The file of a module of this project, such as "data.table". For any other module, no such file exists."""
    return ROOT.joinpath(*name.split(".")).with_suffix(".py")


# Scripts


class Printed(io.FileIO):
    """A script's output stream. Output that cannot be written (the pipe's reader exited, the disk is full, the terminal
    was closed) is dropped. The first failure raises an error, unless `without_reader`: then the script continues."""

    without_reader = failed = False
    lost: ClassVar[str] = ""
    """Why standard output is dropped; empty if it is not."""

    def write(self, content: Any) -> int:
        """Write all of the content, or drop it."""
        done = 0
        try:
            while done < len(content) and not self.failed:
                written = super().write(memoryview(content)[done:])
                if written is None:  # the stream was made non-blocking, and its reader is slow
                    select.select([], [self], [])
                done += written or 0
        except OSError as error:
            self.failed = True
            if self.fileno() == 1:
                Printed.lost = str(error.strerror)
                if not self.without_reader:
                    raise
                print(f"nothing more can be printed ({error.strerror}): continuing without output", file=sys.stderr)
        return len(content)


def open_streams(without_reader: bool) -> None:
    """Make sure that printing never crashes a script: open closed streams on os.devnull, replace characters that the
    console cannot show, and let Printed handle failing writes. without_reader: the script continues without a reader."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # else printed text would go into a file opened later
        pass
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name) or os.fdopen(number, "w", encoding="utf-8")
        if old is getattr(sys, f"__{name}__") and isinstance(getattr(old.buffer, "raw", old.buffer), io.FileIO):
            raw, lines = Printed(number, "w", closefd=False), old.line_buffering or old.write_through
            raw.without_reader = without_reader
            old = io.TextIOWrapper(io.BufferedWriter(raw), old.encoding, "replace", line_buffering=lines)
        setattr(sys, name, old)


def exit_on_interrupt() -> None:
    """Exit at once on Ctrl-C, until raise_on_interrupt: imports take seconds, and some of them swallow KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_on_interrupt() -> None:
    """Raise KeyboardInterrupt on Ctrl-C again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(os.write(2, b"stopped\n") and 130)


def silence_libraries() -> None:
    """Hide what libraries tell programmers: warnings of future changes, and transformers' of texts that we shorten."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    if logging := sys.modules.get("transformers.utils.logging"):
        logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|huggingface_hub|gradio|onnx\w*)\b")


def run_script(main: Callable[[], int | None], without_reader: bool = False) -> None:
    """Run a script's main: a UserError becomes one line and exit code 2, Ctrl-C exit code 130. --debug: show tracebacks.

    without_reader: the script does more than print, so it continues when its output can no longer be written."""
    debug = "--debug" in sys.argv
    if not debug:
        silence_libraries()
    open_streams(without_reader)
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        if debug:
            print(trace(), file=sys.stderr)
        # An error in a loader's worker has a traceback before its message.
        print(f"error: {printable(str(error).rpartition('config.UserError: ')[2].strip())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except Exception as error:
        code = 1
        if not (isinstance(error, BrokenPipeError) and Printed.lost):  # the pipe's reader exited: `... | head`
            if debug:
                print(trace(), file=sys.stderr)
            print(f"error: {named(error)} (--debug shows where)", file=sys.stderr)
    sys.exit(code)


class StopSignal:
    """Turn the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 into a request to stop at the next step. A second signal stops
    at once, except SIGHUP: when a terminal closes, both the shell and the system send it."""

    def __init__(self, grace: float = 0.0) -> None:
        """A second signal within `grace` seconds is ignored: torchrun forwards a signal that the terminal or Slurm has
        already sent to its processes."""
        self.received: int | None = None
        self._grace, self._since = grace, 0.0
        numbers = [getattr(signal, name) for name in STOP_SIGNALS]
        # Signals that nohup ignores stay ignored. SIGINT is always handled: shells ignore it for background processes.
        heard = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heard}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif signal.Signals(number).name != "SIGHUP" and time.monotonic() - self._since >= self._grace:
            sys.exit(exit_code_of(number))

    @property
    def exit_code(self) -> int:
        """The exit code that the process should end with."""
        return exit_code_of(self.received or signal.SIGTERM)

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def exit_code_of(number: int) -> int:
    """The exit code for a signal: 130 for Ctrl-C, as in shells, and 143 for all others."""
    return 130 if number == signal.SIGINT else 143


# Errors in one line


def counted(number: int, plural: str) -> str:
    """A number and what is counted: "1 picture without a caption", "2,000 pictures". The noun is the first word that ends
    in s."""
    return f"{number:,} " + (re.sub(r"(?<=[a-z])s\b", "", plural, count=1) if number == 1 else plural)


def some(names: list[str]) -> str:
    """A printable count of tensors, with the names of the first three."""
    first = shown(", ".join(names[:3]))
    return f"{len(names)} tensors ({first}{', ...' if len(names) > 3 else ''})" if names else "nothing"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable; its type if it has no text."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__))


def named(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def in_one_line(message: str) -> str:
    """The message with line breaks, lone surrogates and the like (a file name may contain them) written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)


def shown(text: object) -> str:
    """Untrusted text (a caption, a name) made safe for a terminal: one line, without characters that move the cursor or
    reverse the text. Characters that join letters or emoji stay."""
    return "".join(part if part in "\u200c\u200d" else in_one_line(part) for part in JOINED.split(str(text)))


def tokens(service: str) -> dict[str, str]:
    """The access tokens for a service, by the environment variable or file that holds them."""
    found = {name: os.environ[name] for name in TOKENS[service] if os.environ.get(name)}
    hub, home = sys.modules.get("huggingface_hub.constants"), os.path.expanduser("~/.kaggle/access_token")
    files = {"hub": getattr(hub, "HF_TOKEN_PATH", ""), "kaggle": home}
    with contextlib.suppress(OSError, KeyError):
        found[files[service]] = Path(files[service]).read_text(encoding="utf-8", errors="surrogateescape")
    return {name: token.strip() for name, token in found.items()}


def check_tokens(service: str) -> None:
    """Raise UserError for a token with invalid characters. A client would retry, and show the token in its message."""
    for name, token in tokens(service).items():
        if not re.fullmatch("[!-~]*", token):
            raise UserError(f"{in_one_line(name)}: the token has an invalid character: set it again")


def printable(message: str) -> str:
    """The message in one line, with "..." in place of every token, also of one that is written as a Python value."""
    message = in_one_line(message)
    for token in (token for service in TOKENS for token in tokens(service).values() if len(token) > 7):
        coded = token.encode("utf-8", "surrogateescape")
        for form in sorted({token, in_one_line(token), ascii(token)[1:-1], repr(coded)[2:-1]}, key=len, reverse=True):
            message = message.replace(form, "...")
    return message


def trace() -> str:
    """The printable traceback of the current error."""
    return "\n".join(map(printable, traceback.format_exc().splitlines()))


def json_of(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError, also for JSON that is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@contextlib.contextmanager
def one_line(source: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any error from an invalid config into a UserError that names its source."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{source}: its JSON files are not as transformers writes them ({named(error)})") from error


# Files and folders


def unfinished_name(path: Path) -> Path:
    """A temporary name beside the path that nobody can guess. unfinished_of finds what killed processes left there."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.unfinished")


def unfinished_of(path: Path) -> list[Path]:
    """The unfinished files and folders of this path, also those of other running processes."""
    return [*path.parent.glob(f".{glob.escape(path.name[:50])}.*unfinished")]


def clear_left(path: Path) -> None:
    """Delete unfinished files and folders of the path that are so old that their processes must have been killed."""
    for left in unfinished_of(path):
        with contextlib.suppress(OSError):  # it was just finished, or belongs to another user
            if time.time() - left.stat().st_mtime > LEFT_AFTER:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a new, empty file, which replaces the path when the block succeeds and is deleted
    when it fails.

    Several processes may write to one path: it has the content of the last one, never a mixture.
    """
    unfinished = unfinished_name(path)
    unfinished.touch(exist_ok=False)  # does not follow a link, and sets the same permissions as open()
    try:
        yield unfinished
        sync(unfinished)  # else a power cut could leave the name without its content
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):  # replaced; or after an error it may still be open, and Windows refuses
            unfinished.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Iterable[Sequence[Any]], line_end: str = "\r\n") -> None:
    """Write a CSV file atomically."""
    with atomic(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=line_end).writerows(rows)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that a crash cut short."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json_of(text))
            except ValueError:
                break
    return lines


def dated_folder(name: str) -> Path:
    """Create a new folder name-<date>-<time>, also when several scripts do so in the same second."""
    name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    writable_directory(Path(name).parent)
    for number in itertools.count(1):
        folder = Path(name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def writable_directory(path: Path, advice: str = "choose another --output-dir") -> Path:
    """Create the folder. Raises UserError if it cannot be created or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}): {advice}") from error
    return path


def put_in_place(source: Path, target: Path) -> Path | None:
    """Copy source to target. A different target is renamed to *.previous.* first, and that path is returned."""
    if target.exists() and file_hash(target) == file_hash(source):
        return None
    previous = target.with_name(f"{target.stem}.previous{target.suffix}")
    clear_left(target)
    with atomic(target) as unfinished:
        shutil.copyfile(source, unfinished)
        sync(unfinished)  # slow, so it comes before the target is renamed
        try:
            target.replace(previous)
        except FileNotFoundError:  # no target; or another run, which ends at the same time, has just renamed it
            return None
    return previous


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Windows does so only for a file, and
    only if it is open for writing."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(directory: str | os.PathLike[str], written: list[str], marker: str) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, which replaces the directory when the block succeeds.

    The directory must be new, empty, or contain only files named in `written`, with the marker among them. Raises
    UserError otherwise.
    """
    from safetensors import SafetensorError

    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file: name another folder")
    inside = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    others = [name for name in inside if name not in written or marker not in inside]
    if others:
        raise UserError(f"{directory}: holds other files ({', '.join(others[:3])}): name a new or empty folder")
    unfinished = unfinished_name(directory)
    try:
        clear_left(directory)
        unfinished.mkdir(parents=True)
        yield unfinished
        old = directory.rename(unfinished_name(directory)) if directory.exists() else None
        unfinished.rename(directory)
        if old:  # its files may still be in use, and Windows deletes none of those
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: cannot be written ({first_line(error)}): name another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, taken: str | None = None) -> Iterator[None]:
    """Hold a lock that only one process can hold. If another holds it: wait, or raise UserError(taken) if given.

    The system frees the lock when the process ends, also when it is killed. (On Windows nothing is locked.)
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    if path.is_symlink():
        raise UserError(f"{path}: is a link, which could point anywhere: delete it")
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w") as lock:
        os.register_at_fork(after_in_child=lock.close)  # else a loader's worker would still hold the lock for a while
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if taken else fcntl.LOCK_EX)
        except BlockingIOError:
            raise UserError(taken) from None
        yield


# The disk cache: a folder of files whose names contain a hash of their inputs; it may be deleted at any time


def cache_dir() -> Path:
    """The cache folder, which may not exist yet: VIT_GPT2_CACHE from the environment, else vit-gpt2-captioning in the
    user's cache folder (XDG_CACHE_HOME, ~/.cache, or without a home the folder for temporary files)."""
    if chosen := os.environ.get("VIT_GPT2_CACHE"):
        return Path(chosen).expanduser()
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a container's user without a home
        home = Path(tempfile.gettempdir())
    return home / "vit-gpt2-captioning"


def key_of(*parts: Any) -> str:
    """A hash of the parts (JSON values and paths): 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(parts, default=str, sort_keys=True).encode(), digest_size=8).hexdigest()


def stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Absolute name, size and modification time of each file: a key made of them changes when a file is edited."""
    return [(str(path.absolute()), (s := path.stat()).st_size, s.st_mtime_ns) for path in paths]


def cache_file(kind: str, owner: Any, key: str) -> Path:
    """The cache file for this key. Files with the same kind and owner but other keys are older versions of it."""
    return cache_dir() / f"{kind}-{key_of(owner)}-{key}"


def delete_older(path: Path) -> None:
    """Delete the older versions of a cache file."""
    for other in path.parent.glob(f"{path.name.rpartition('-')[0]}-*"):
        if not other.name.startswith(path.name) and not other.name.endswith((".part", ".lock")):
            with contextlib.suppress(OSError):  # another process has just deleted it, or on Windows is using it
                other.unlink()


# Device and precision


def dtypes() -> dict[str, torch.dtype]:
    """The dtypes by their names on the command line."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@functools.cache
def matmul_rate(device_type: str, dtype: torch.dtype, size: int = 512) -> float:
    """Floating-point operations per second of a matrix product; 0 if the device cannot compute it.

    A 128 x 128 product comes first. If it takes over 2 ms (bf16 on a CPU that emulates it), its rate is returned, and
    nothing larger is tried.
    """
    try:
        if (small := timed_product(device_type, dtype, 128)) > 2e-3:
            return 2 * 128**3 / small
        return 2 * size**3 / timed_product(device_type, dtype, size)
    except (RuntimeError, TypeError):  # the device does not support the dtype
        return 0.0


def timed_product(device_type: str, dtype: torch.dtype, size: int) -> float:
    """Seconds of a matrix product: the best of up to 20 timings within 50 ms, as the machine may be busy. The first one
    does not count: it starts threads and loads kernels."""
    import torch

    def multiply() -> float:
        start = time.perf_counter()
        for _ in range(2):
            a @ a
        if device_type != "cpu":
            getattr(torch, device_type).synchronize()
        return (time.perf_counter() - start) / 2

    a = torch.randn(size, size, device=device_type).to(dtype)
    multiply()
    timings = [multiply()]
    while len(timings) < 20 and sum(timings) < 0.025:
        timings.append(multiply())
    return min(timings)


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The device and the reason. `auto` takes CUDA, else mps if it multiplies faster than the CPU, else the CPU."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto":
        if not available.get(wanted, False):
            raise UserError(f"device {wanted} is not available here: use --device auto")
        return torch.device(wanted), "requested"
    if available["cuda"]:
        return torch.device("cuda"), f"found {torch.cuda.get_device_name()}"
    if available["mps"]:
        mps, cpu = (matmul_rate(kind, torch.float32, 1024) for kind in ("mps", "cpu"))
        reason = f"measured: mps {mps / 1e9:.0f}, cpu {cpu / 1e9:.0f} GFLOP/s"
        return torch.device("mps" if mps > cpu else "cpu"), reason
    return torch.device("cpu"), "no GPU found"


def choose_precision(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and the reason. `auto` takes fp16 on CUDA, elsewhere bf16 if it is measured to be
    faster, else fp32.

    int8 is for captions on a CPU (generate's int8); everything else then computes as with auto."""
    import torch

    if wanted == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: use --precision auto, bf16 or fp32")
    if wanted == "int8" and device.type != "cpu":
        raise UserError("precision int8 is for a CPU: use --precision auto, or --device cpu")
    if wanted not in ("auto", "int8"):
        return dtypes()[wanted], "requested"
    if device.type == "cuda":
        return torch.float16, "the default on CUDA; --precision bf16 uses bf16"
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return torch.float32, "this CPU has no fast bf16, only AVX2"
    single, half = (matmul_rate(device.type, dtype) for dtype in (torch.float32, torch.bfloat16))
    reason = f"measured: bf16 {half / 1e9:.0f}, fp32 {single / 1e9:.0f} GFLOP/s"
    return (torch.bfloat16 if half > 1.2 * single else torch.float32), reason


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision with this dtype; nothing for float32."""
    import torch

    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)


# The Hugging Face Hub


def ask_hub(name: str, kind: str = "model") -> Exception | None:
    """None if the Hub has this repository and lets us read it; otherwise the error of the Hub or the network.

    One request, without the client's retries: those take minutes on a machine without network."""
    from huggingface_hub import HfApi

    try:
        check_tokens("hub")
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
    except Exception as error:  # the client has a dozen error types for missing, private and unreachable repositories
        return error
    return None


def hub_folder(name: str, wanted: list[str], kind: str = "model") -> Path:
    """The folder in the Hub client's cache with the wanted files (patterns) of a repository user/name (kind: model or
    dataset). They are downloaded if the Hub can be reached. Raises UserError, in one line, if they are neither cached nor available."""
    from huggingface_hub import snapshot_download

    refusal = ask_hub(name, kind)
    try:
        offline = refusal is not None
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=wanted, local_files_only=offline))
    except Exception as error:
        why = first_line(refusal or error)
        raise UserError(f"{name}: no such path here, and not available from the Hugging Face Hub: {why}") from error


# Processes and memory


def forks() -> bool:
    """Whether processes may be started by a fork: on Linux, unless another start method was chosen. Windows has no fork,
    and macOS's is not safe once torch is imported."""
    import multiprocessing

    return sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) in (None, "fork")


def keep_freed_memory() -> None:
    """Make glibc's allocator keep the memory that tensors free. By default it returns large blocks to the system, which
    fills them with zeros again at every training step. Other allocators are left unchanged."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # macOS has no mallopt, Windows no CDLL(None)
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
            mallopt(option, value)


def available_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit if that is less."""
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())  # not on Windows
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else 8 << 30]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(name).read_text()))
    return min(limits)
