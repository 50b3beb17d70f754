"""Strangers' pictures, decoded in processes of their own, where they can be stopped.

    pictures = PictureDecoder()
    pixels = pictures.prepare(content, model.config, "cat.jpg")
    shown = pictures.preview(content, "cat.jpg")

However a picture was made, it takes at most so many seconds and so much memory: then its process is killed, and another one
takes its place. Few pictures need more than a moment; those that do go to one process that gives way to all others, one
after another, so that nobody else waits for them.
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
from utils import available_memory, in_one_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SECONDS = 10.0  # that a picture may take
MOMENT = 0.3  # of these, computed: 20 megapixels of a camera's JPEG take a third of it
MOST_SLOW = 8  # pictures that need more and wait for it; the next are told to come again
MEMORY = 3 << 29  # bytes: 80 million pixels with transparency take 1.2 GiB
PREVIEW = 720  # pixels of the longer side of a picture in the page


class BusyError(UserError):
    """More wait than can be held."""


class PictureDecoder:
    """Processes that decode pictures, for as many threads as like to ask."""

    def __init__(self, workers: int | None = None, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        """Starts them (by default one for every two cores, 2 to 4), and does not wait until they are ready."""
        self.seconds, self.memory = seconds, min(memory, available_memory() // 2)
        self.replaced = 0
        """Processes that were killed, or ended by themselves."""
        self.idle: LifoQueue[_Worker] = LifoQueue()  # one that is warm goes first
        for _ in range(workers or min(4, max(2, (os.cpu_count() or 1) // 2))):
            self.idle.put(_Worker(self.memory, MOMENT))
        self.patient: LifoQueue[_Worker] = LifoQueue()
        self.patient.put(_Worker(self.memory))
        self.room = threading.BoundedSemaphore(MOST_SLOW)

    def prepare(self, source: str | bytes, config: ViTGPT2Config, name: str) -> Tensor:
        """As prepare_picture does: uint8 (3, S, S). Raises UserError."""
        import torch

        content = self.run(name, prepare, source, config, name)
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(3, config.image_size, config.image_size)

    def preview(self, content: bytes, name: str = "picture") -> bytes:
        """A JPEG of the picture, small enough to stand in the page. Raises UserError."""
        return self.run(name, preview, content)

    def run(self, name: str, work: Callable[..., T], *arguments: Any) -> T:
        """What work, a function of a module's, gives in one of the processes. Raises UserError, which names the picture."""
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
        except BaseException as error:  # it is busy still, or has ended
            worker.process.kill()
            worker.process.join()
            slow = worker.moment and worker.process.exitcode == -signal.SIGPROF
            worker, self.replaced = _Worker(self.memory, worker.moment), self.replaced + 1
            if slow:
                raise _SlowError from None
            if isinstance(error, EOFError | OSError):
                raise UserError(in_one_line(f"{name}: its decoder ended: damaged, or too large")) from None
            raise
        finally:
            idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the processes that are idle; the others end with this one."""
        for idle in (self.idle, self.patient):
            while not idle.empty():
                idle.get().process.kill()


class _SlowError(Exception):
    """A picture that needs more than a moment."""


class _Worker:
    """A process, and the way to it. One that is given a moment ends where a picture takes longer."""

    def __init__(self, memory: int, moment: float = 0.0) -> None:
        context, self.moment = _context(), moment if hasattr(signal, "setitimer") else 0.0  # which Windows has not
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, memory, self.moment), daemon=True)
        self.process.start()
        other.close()
        self.started = False

    def ready(self) -> None:
        """Returns when it has imported everything, which no picture is to blame for. Raises EOFError where it has ended."""
        if not self.started:
            self.started = bool(self.connection.recv())


@functools.cache
def _context() -> Any:
    """A fork of this process would have a copy of whatever its threads were doing. One of a process that has imported torch
    and does nothing takes 60 ms and 14 MiB; starting anew, as Windows must, takes 2 s and 300 MiB."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "PIL.Image", "simplejpeg"])
    return context


@functools.cache
def shared() -> PictureDecoder:
    """The one of this process."""
    return PictureDecoder()


# In the processes


def _serve(connection: Connection, memory: int, moment: float) -> None:
    """Answers until nobody asks any more, or an answer takes more than a moment of the processor's time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page, which ends this one
    import torch

    import data.pictures  # noqa: F401  now, and not on a picture's time

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
                signal.setitimer(signal.ITIMER_PROF, moment)  # at its end the system ends the process, whatever it does
            answer = work(*arguments)
        except UserError as error:
            answer = UserError(str(error))  # without the errors that it came from
        except Exception as error:
            answer = UserError(in_one_line(f"picture: cannot be decoded ({type(error).__name__})"))
        if moment:
            signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(answer)


def prepare(source: str | bytes, config: ViTGPT2Config, name: str) -> bytes:
    """The bytes of prepare_picture's pixels."""
    from data.pictures import prepare_picture

    return prepare_picture(source, config, name).numpy().tobytes()


def preview(content: bytes) -> bytes:
    """A JPEG of a picture that prepare has read."""
    from PIL import Image

    from data.pictures import decode

    image = Image.fromarray(decode(content, PREVIEW))
    image.thumbnail((PREVIEW, PREVIEW))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()
