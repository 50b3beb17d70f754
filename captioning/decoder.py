"""Decode untrusted pictures in separate processes, which can be killed.

    pictures = PictureDecoder()
    pixels = pictures.prepare(content, model.config, "cat.jpg")
    shown = pictures.preview(content, "cat.jpg")

Every picture has a limit of time and of memory; a process that exceeds it is killed and replaced. Most pictures need
only a moment. The others are decoded one after another by a single low-priority process, so that nobody else waits for
them.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import LifoQueue
from typing import TYPE_CHECKING, Any, TypeVar

from config import UserError, ViTGPT2Config
from utils import available_memory, forks, in_one_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SECONDS = 10.0  # a picture's limit of time
MOMENT = 0.3  # seconds of CPU time in a fast process: a camera's JPEG of 20 megapixels takes a third of it
MOST_SLOW = 8  # slow pictures that may wait; more are refused with "try again"
MEMORY = 3 << 29  # bytes: 80 million pixels with transparency take 1.2 GiB
PREVIEW = 720  # pixels of the longer side of a picture in the page


class BusyError(UserError):
    """Too many pictures are waiting: try again later."""


class PictureDecoder:
    """Processes that decode pictures. Any number of threads may use them."""

    def __init__(self, workers: int | None = None, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        """Start the processes (by default one for every two cores, 2 to 4) without waiting until they are ready."""
        self.seconds, self.memory = seconds, min(memory, available_memory() // 2)
        self.replaced = 0
        """Number of processes that were killed or ended by themselves."""
        self.idle: LifoQueue[_Worker] = LifoQueue()  # last in, first out: a warm process comes first
        for _ in range(workers or min(4, max(2, (os.cpu_count() or 1) // 2))):
            self.idle.put(_Worker(self.memory, MOMENT))
        self.patient: LifoQueue[_Worker] = LifoQueue()
        self.patient.put(_Worker(self.memory))
        self.room = threading.BoundedSemaphore(MOST_SLOW)

    def prepare(self, source: str | bytes, config: ViTGPT2Config, name: str) -> Tensor:
        """The picture as prepare_picture returns it: uint8 (3, S, S). Raises UserError."""
        import torch

        content = self.run(name, prepare, source, config, name)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(3, config.image_size, config.image_size)

    def preview(self, content: bytes, name: str = "picture") -> bytes:
        """A JPEG of the picture, small enough for the page. Raises UserError."""
        return self.run(name, preview, content)

    def run(self, name: str, work: Callable[..., T], *arguments: Any) -> T:
        """Call work, a module-level function, in one of the processes. Raises UserError, which names the picture."""
        try:
            return self._ask(self.idle, name, work, arguments)
        except _SlowError:
            pass
        if not self.room.acquire(blocking=False):
            raise BusyError(
                in_one_line(f"{name}: busy with large pictures: try again in a moment, or send a smaller one")
            )
        try:
            return self._ask(self.patient, name, work, arguments)
        finally:
            self.room.release()

    def _ask(self, idle: LifoQueue[_Worker], name: str, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        worker = idle.get()
        try:
            worker.ready()
            worker.connection.send((work, arguments))
            if not worker.connection.poll(self.seconds):
                raise UserError(
                    in_one_line(f"{name}: took longer than {self.seconds:g} s to decode: send a smaller one")
                )
            answer = worker.connection.recv()
        except BaseException as error:  # the process is still busy, or has ended
            worker.process.kill()
            worker.process.join()
            slow = worker.moment and worker.process.exitcode == -signal.SIGPROF
            worker, self.replaced = _Worker(self.memory, worker.moment), self.replaced + 1
            if slow:
                raise _SlowError from None
            if isinstance(error, EOFError | OSError):
                raise UserError(in_one_line(f"{name}: its decoder ended: the file is damaged or too large")) from None
            raise
        finally:
            idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        """Kill the idle processes; busy ones end together with this process."""
        for idle in (self.idle, self.patient):
            while not idle.empty():
                idle.get().process.kill()


class _SlowError(Exception):
    """The picture needs more CPU time than MOMENT."""


class _Worker:
    """A process and the connection to it. Where a moment is given (seconds of CPU time), a slower picture ends it."""

    def __init__(self, memory: int, moment: float = 0.0) -> None:
        context, self.moment = _context(), moment if hasattr(signal, "setitimer") else 0.0  # not on Windows
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, memory, self.moment), daemon=True)
        self.process.start()
        other.close()
        self.started = False

    def ready(self) -> None:
        """Wait for the imports, which are not to count as a picture's time. Raises EOFError if the process ended."""
        if not self.started:
            self.started = bool(self.connection.recv())


@functools.cache
def _context() -> Any:
    """How processes are started. A fork of this process would copy the state of its threads. A fork of an idle process
    that has imported torch takes 60 ms and 14 MiB; a fresh start, as on Windows, takes 2 s and 300 MiB."""
    if not forks():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "PIL.Image", "simplejpeg"])
    return context


@functools.cache
def shared() -> PictureDecoder:
    """The PictureDecoder of this process, made at the first call."""
    return PictureDecoder()


# Run in the decoding processes


def _serve(connection: Connection, memory: int, moment: float) -> None:
    """Answer requests until the connection closes, or a picture takes more CPU time than `moment` (0: no limit)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C, and then ends this one
    import torch

    import data.pictures  # noqa: F401  imported now, not in the time of the first picture

    torch.set_num_threads(1)
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory,) * 2)
    if not moment and hasattr(os, "nice"):
        os.nice(10)
    connection.send(True)
    while True:
        try:
            work, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if moment:
                signal.setitimer(signal.ITIMER_PROF, moment)  # then the system ends the process, whatever it does
            answer = work(*arguments)
        except UserError as error:
            answer = UserError(str(error))  # without the errors that caused it
        except Exception as error:
            answer = UserError(in_one_line(f"picture: cannot be decoded ({type(error).__name__})"))
        if moment:
            signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(answer)


def prepare(source: str | bytes, config: ViTGPT2Config, name: str) -> bytes:
    """The pixels of prepare_picture, as bytes."""
    from data.pictures import prepare_picture

    return prepare_picture(source, config, name).numpy().tobytes()


def preview(content: bytes) -> bytes:
    """A JPEG of a picture that `prepare` could read."""
    from PIL import Image

    from data.pictures import decode

    image = Image.fromarray(decode(content, PREVIEW))
    image.thumbnail((PREVIEW, PREVIEW))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()
