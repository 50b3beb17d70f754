"""Makes Python on Linux refuse what Windows refuses: fork, links, a file in use, to sync a folder.

This folder goes on PYTHONPATH. Python imports a module of this name at its start, so every process that a test starts,
and all that those start, are like that. On Windows a file in use (open or mapped) is neither replaced nor renamed nor
deleted; here that holds for the files that the process itself uses.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

flags_of = fcntl.fcntl
for module in ("fcntl", "resource"):
    sys.modules[module] = None  # type: ignore[assignment]  # importing it fails
for name in ("O_DIRECTORY", "killpg", "nice", "posix_fallocate", "sync", "sysconf", "sysconf_names"):
    delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "setitimer"):
    delattr(signal, name)
multiprocessing.set_start_method("spawn")
multiprocessing.get_all_start_methods = lambda: ["spawn"]  # type: ignore[method-assign]


class CDLL(ctypes.CDLL):
    def __init__(self, name: Any, *rest: Any, **more: Any) -> None:
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        super().__init__(name, *rest, **more)


ctypes.CDLL = CDLL  # type: ignore[misc]


def refuse(*paths: Any) -> None:
    """Raise PermissionError if this process has one of the files open or mapped, or a file in one of the folders."""
    with open("/proc/self/maps") as maps:
        used = {line.rstrip("\n").split(maxsplit=5)[5] for line in maps if "/" in line}
    for number in os.listdir("/proc/self/fd"):
        try:
            used.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # it listed the folder
            continue
    for path in map(os.path.realpath, paths):
        if any(name == path or name.startswith(f"{path}/") for name in used):
            raise PermissionError(errno.EACCES, "another process is using the file", path)


def unlink(path: Any, *, dir_fd: int | None = None, do: Callable[..., None] = os.unlink) -> None:
    refuse(path)
    do(path, dir_fd=dir_fd)


def rename(source: Any, target: Any, *, do: Callable[..., None] = os.rename, **more: Any) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "file exists", str(target))
    refuse(source)
    do(source, target, **more)


def replace(source: Any, target: Any, *, do: Callable[..., None] = os.replace, **more: Any) -> None:
    if os.path.isdir(target):
        raise PermissionError(errno.EACCES, "access is denied", str(target))
    refuse(source, target)
    do(source, target, **more)


def symlink(source: Any, target: Any, *rest: Any, **more: Any) -> None:
    raise OSError(errno.EPERM, "a required privilege is not held by the client", str(source))


def opened(path: Any, flags: int, *rest: Any, do: Callable[..., int] = os.open, **more: Any) -> int:
    if os.path.isdir(path) and not flags & os.O_TMPFILE == os.O_TMPFILE:  # of tempfile, which on Windows does without
        raise PermissionError(errno.EACCES, "permission denied", str(path))
    return do(path, flags, *rest, **more)


def fsync(descriptor: Any, do: Callable[..., None] = os.fsync) -> None:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    if flags_of(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "bad file descriptor")
    do(descriptor)


os.unlink = os.remove = unlink  # type: ignore[assignment]
os.rename, os.replace, os.symlink = rename, replace, symlink  # type: ignore[assignment]
os.open, os.fsync = opened, fsync
