"""Protect the web page: limit who may send requests, to which routes, how much data is stored, and for how long.

gradio answers many more routes than the page and its endpoint need, fetches URLs, and reads bodies of any size. app.py
puts Door in front of it and limits its files by Uploads. Knows neither models nor the page's content.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from config import UserError
from utils import in_one_line, locked, named

READ = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static|svelte)/.*|/gradio_api/("
    r"theme\.css|info/?|openapi\.json|app_id/?|user/?|login_check/?|startup-events|queue/(status|data)|upload_progress"
    r"|heartbeat/[^/]+|call/.+|file=(?!.*://).*)|/v1/models",  # gradio would fetch a file whose name is a URL
    re.DOTALL,
)
WRITE = re.compile(r"/gradio_api/(upload|queue/join|cancel|reset/?|(run|api|call)/.+)|/v1/chat/completions")

PATIENCE = 30.0  # seconds without data after which a request is refused
MOST_JSON = 4 << 20  # bytes of a request that is not an upload: enough for a folder of 9,000 files
MOST_HELD = 128 << 20  # bytes of all these requests together
MOST_VALUES = 200_000  # JSON values in one request
MOST_TEXT = 4096  # characters of each text in it

LEAST = 1 << 16  # bytes that every file counts for at least, so that the number of files is limited too
KEPT, FRESH = 3600.0, 120.0  # seconds until a file is deleted: normally, and where space is short
OURS = "captions-page-"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RefusedError(Exception):
    """A request that is refused: the HTTP status and the reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(in_one_line(why)[:300])
        self.status = status


def host_names(host: str, allowed: Iterable[str]) -> set[str]:
    """The names by which clients reach a page that listens at this host, and the allowed names."""
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host.strip("[]") else host, *allowed}
    if host.strip("[]") in ("0.0.0.0", "::", ""):
        machine = socket.gethostname()
        names |= {machine, machine.split(".")[0], f"{machine.split('.')[0]}.local"}
    return {name.strip().lower().rstrip(".") for name in names} - {""}


def check_free(host: str, port: int) -> None:
    """Raise UserError if nothing can listen at this host and port."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port}: must be 1 to 65535")
    name = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        socket.create_server((name, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = f"port {port} of {name} is in use: stop the program that listens there, or choose another --port"
        else:
            why = f"cannot listen at {name}, port {port} ({error.strerror}): choose another --port or --host"
        raise UserError(in_one_line(why)) from None


class Door:
    """The page's ASGI application, behind all checks. Pages of other sites may neither read nor send: neither by a host
    name that resolves to this machine (DNS rebinding), nor by a browser that can reach it (cross-site requests)."""

    def __init__(self, app: Any, names: set[str], most_bytes: int = MOST_JSON) -> None:
        """most_bytes: largest picture, which a request in OpenAI's form contains."""
        self.app, self.names, self.most_chat = app, names, MOST_JSON + 4 * most_bytes // 3
        self.hosts = {name.rsplit(":", 1)[0] if re.search(r"[^:]:\d+$", name) else name for name in names}
        self.held = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # gradio has no websockets
            return await send({"type": "websocket.close"})
        started = False

        async def sent(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self.check(scope)
            await self.pass_on(scope, receive, sent)
        except Exception as error:  # answered in one line: gradio and uvicorn would write a traceback
            status, why = _answer(error)
            if status >= 500 and not isinstance(error, RefusedError):
                print(f"page        {why}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # the client may have left
                if not started:
                    kind = b"text/plain; charset=utf-8"
                    if scope["path"].startswith("/v1/"):  # in OpenAI's form
                        kind, why = b"application/json", json.dumps({"error": {"message": why, "type": "refused"}})
                    head = [(b"content-type", kind), (b"x-content-type-options", b"nosniff")]
                    await send({"type": "http.response.start", "status": status, "headers": head})
                await send({"type": "http.response.body", "body": b"" if started else why.encode()})

    def check(self, scope: Message) -> None:
        """Raise RefusedError for unknown host names, pages of other sites, and routes that the page does not use."""
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value.decode("latin-1").strip())
        hosts = headers.get(b"host", [])
        forwarded = [value.split(",")[0].strip() for value in headers.get(b"x-forwarded-host", [])]
        server = [re.sub("^https?://", "", value.split(",")[0]) for value in headers.get(b"x-gradio-server", [])]
        for host in [*hosts, *forwarded, *server]:  # gradio trusts all of them
            if not self.is_own(host, scope):
                raise RefusedError(403, f"{host[:100]}: not a host name of this page: add it with --allowed-hosts")
        if len(hosts) != 1:
            raise RefusedError(400, "a request must have exactly one Host header")
        for origin in headers.get(b"origin", []):
            site = re.sub("^https?://", "", origin.lower())
            same_port = _port(site) in {_port(host) for host in [*hosts, *forwarded]}
            if site not in self.names and not (site != origin.lower() and same_port and self.is_own(site, scope)):
                raise RefusedError(403, f"{origin[:100]}: requests from pages of other sites are refused")
        safe = scope["method"] in ("GET", "HEAD")
        if not safe and "cross-site" in headers.get(b"sec-fetch-site", []):
            raise RefusedError(403, "requests from pages of other sites are refused")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise RefusedError(405, "only GET and POST are allowed")
        if not (READ if safe else WRITE).fullmatch(scope["path"]):
            raise RefusedError(404, "this page has no such route")

    def is_own(self, host: str, scope: Message) -> bool:
        """Whether "name" or "name:port" is this machine: one of its names, or the address that the client reached."""
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:\d{1,5})?", host.lower(), re.ASCII)
        if match is None:
            return False
        name = match[1].rstrip(".")
        reached = str((scope.get("server") or ("",))[0]).removeprefix("::ffff:")
        return name in self.hosts or (bool(reached) and name.strip("[]") == reached)

    async def pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on to gradio, after reading and checking its JSON."""
        taken = bytearray()

        async def read() -> Message:
            return messages.pop() if messages else await receive()

        try:
            if scope["path"] == "/gradio_api/upload":
                return await self.app(scope, _patient(receive), send)
            if scope["method"] == "POST":
                await self.take(_patient(receive), taken, chat=scope["path"].startswith("/v1/"))
            messages: list[Message] = [{"type": "http.request", "body": bytes(taken)}]
            await self.app(scope, read, send)
        finally:
            self.held -= len(taken)

    async def take(self, receive: Receive, taken: bytearray, chat: bool = False) -> None:
        """Read the complete body into `taken`. Raises RefusedError where it is not a JSON object, or too large."""
        more, most = True, self.most_chat if chat else MOST_JSON
        while more:
            message = await receive()
            self.held += len(message.get("body", b""))
            taken += message.get("body", b"")
            more = message.get("more_body", False)
            if len(taken) > most:
                raise RefusedError(413, f"the request is larger than {most >> 20} MiB")
            if self.held > MOST_HELD:
                raise RefusedError(503, "busy: try again in a moment")
        try:
            sent = json.loads(taken)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"not JSON ({named(error)})") from None
        if not isinstance(sent, dict):
            raise RefusedError(400, "not a JSON object")
        if not chat:
            _check_values(sent)


def _check_values(sent: Any) -> None:
    """Raise RefusedError for what would take much memory: gradio stores what a session sends."""
    level, values = [sent], 0
    for _ in range(8):
        values += len(level)
        if values > MOST_VALUES or any(isinstance(each, str) and len(each) > MOST_TEXT for each in level):
            raise RefusedError(
                413, f"more than {MOST_VALUES:,} values, or a text of more than {MOST_TEXT:,} characters"
            )
        level = [
            each
            for group in level
            if isinstance(group, dict | list)
            for each in ([*group, *group.values()] if isinstance(group, dict) else group)
        ]
    if level:
        raise RefusedError(400, "lists or objects are nested too deeply")


def _port(host: str) -> str:
    match = re.search(r":(\d{1,5})$", host)
    return match[1] if match else ""


def _answer(error: Exception) -> tuple[int, str]:
    if isinstance(error, RefusedError):
        return error.status, str(error)
    at_fault = not isinstance(error, OSError | MemoryError | RuntimeError | ExceptionGroup)
    return 400 if at_fault else 500, in_one_line(f"cannot be answered ({named(error)})")[:300]


def _patient(receive: Receive) -> Receive:
    """The same function, which raises RefusedError where the client pauses too long or disconnects."""

    async def patient() -> Message:
        try:
            message = await asyncio.wait_for(receive(), PATIENCE)
        except TimeoutError:
            raise RefusedError(408, f"no data was received for {PATIENCE:g} s") from None
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the connection was closed")
        return message

    return patient


# Uploaded files


def is_local(address: str, headers: Any) -> bool:
    """Whether a request came from this machine. One that a proxy forwarded did not, whatever address it claims."""
    passed_on = any(
        name in headers for name in ("x-forwarded-for", "x-forwarded-host", "x-real-ip", "forwarded", "via")
    )
    return not passed_on and (address == "::1" or address.removeprefix("::ffff:").startswith("127."))


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """A temporary folder of this process, in GRADIO_TEMP_DIR or the system's folder; it is deleted at the end. Folders
    left behind by killed processes are deleted too."""
    home = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    home.mkdir(parents=True, exist_ok=True)
    for left in [] if os.name == "nt" else home.glob(f"{OURS}*"):
        if not left.is_symlink() and left.stat().st_uid == os.getuid():
            with contextlib.suppress(UserError, OSError), locked(left / ".lock", "in use"):
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=OURS, dir=home)).resolve()
    try:
        with locked(folder / ".lock"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Uploads:
    """Limits of the files that clients upload: their total size, and one hour for each. Where space is short the oldest
    are deleted first, but none of the last two minutes."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.held, self.cleaned = 0, 0.0

    def take(self, size: int) -> None:
        """Count more bytes, and delete files if they exceed the limit. Raises UserError where that is not enough."""
        self.held += size
        if self.held > self.most_bytes and time.monotonic() - self.cleaned > 1:
            self.clean()
        if self.held > self.most_bytes:
            raise UserError(
                f"the maximum allowed size of all files here is {self.most_bytes / 2**30:g} GiB "
                "(--max-upload-gigabytes): upload it again in a few minutes"
            )

    def clean(self) -> None:
        """Delete files that are too old, and where space is short newer ones."""
        files, now = [], time.time()
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # deleted meanwhile
                stat = path.lstat()
                if path.is_dir():
                    if now - stat.st_mtime > FRESH:
                        path.rmdir()  # fails unless it is empty
                elif path.name != ".lock":
                    files.append((stat.st_mtime, max(stat.st_size, LEAST), path))
        self.held = sum(size for _, size, _ in files)
        for changed, size, path in sorted(files):
            if now - changed > (FRESH if self.held > self.most_bytes // 2 else KEPT):
                with contextlib.suppress(OSError):
                    path.unlink()
                    self.held -= size
        self.cleaned = time.monotonic()
