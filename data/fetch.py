"""Download pictures from the web so that neither the address nor the answer can do harm.

    content = fetch_picture("https://example.org/cat.jpg")

Addresses are checked where the connection is made: the name is resolved once, every address it has must be public, and
the connection goes to a checked address. So it does not matter how the address was written, where a redirect leads, or
what the name resolves to a moment later. One deadline covers everything from resolving the name to the last byte.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from typing import Any

from config import UserError
from data.pictures import open_picture, reason
from utils import first_line, in_one_line

SECONDS = 20.0  # for the complete download
BYTES = 50 << 20  # received, and also after decompression
REDIRECTS = 5
CHUNK = 1 << 16

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # all of IPv6 that is assigned for public use
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses, in networks that speak only IPv6


class PrivateAddressError(UserError):
    """The address is not public: whoever catches this knows what the user can do about it."""


def fetch_picture(url: str, *, allow_private: bool = False, seconds: float = SECONDS, max_bytes: int = BYTES) -> bytes:
    """Download a picture file from an http or https address, at most 50 MiB, within 20 seconds.

    Private, loopback, link-local and all other addresses that are not public are refused, also behind names and
    redirects. So are proxies, because they would resolve the names; allow_private allows all of these. Raises
    UserError, in one line, for what cannot be downloaded and for what is not a picture; PrivateAddressError for a refused
    address.
    """
    fetch = _Fetch(url, allow_private, seconds, max_bytes)
    thread = threading.Thread(target=fetch.run, daemon=True)  # resolving a name ignores the deadline
    thread.start()
    thread.join(seconds)
    late = thread.is_alive()  # an error after the stop is not the reason
    fetch.stop()
    error = fetch.error if fetch.content is None else None
    if fetch.content is None and (late or not isinstance(error, UserError)):
        late = late or time.monotonic() >= fetch.deadline
        why = f"it took longer than {seconds:g} s" if late or error is None else _why(error)
        error = UserError(f"cannot be fetched ({why})")
    if error is not None:
        kind = PrivateAddressError if isinstance(error, PrivateAddressError) else UserError
        raise kind(in_one_line(f"{url if len(url) < 500 else url[:500] + '...'}: {error}")) from None
    assert fetch.content is not None
    return fetch.content


def is_public(address: str) -> bool:
    """Whether an IP address is public; an IPv6 address that contains an IPv4 address is checked by the latter."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        carried = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(ip.packed[12:]) if ip in NAT64 else None)
        if carried is None:
            return ip.is_global and ip in GLOBAL_UNICAST
        ip = carried
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Fetch(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """One download: opens the connections that urllib asks for, and can be stopped from another thread."""

    def __init__(self, url: str, allow_private: bool, seconds: float, max_bytes: int) -> None:
        super().__init__()
        self.url, self.allow_private, self.max_bytes = url, allow_private, max_bytes
        self.seconds, self.deadline = seconds, time.monotonic() + seconds
        self.content: bytes | None = None
        self.error: Exception | None = None
        self.socket: socket.socket | None = None

    def run(self) -> None:
        """Set content, or error."""
        try:
            self.content = self.fetched()
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        """Wake the thread if it waits for a server."""
        with contextlib.suppress(OSError, AttributeError):  # closed already, or none yet
            self.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def opened(self, connection: socket.socket) -> None:
        """Remember the connection for stop. Raises TimeoutError after the deadline: stop may have come too early."""
        self.socket = connection
        if time.monotonic() >= self.deadline:
            raise TimeoutError

    def fetched(self) -> bytes:
        """Download the content. Raises UserError, OSError, HTTPException or ValueError."""
        parts = urllib.parse.urlsplit(self.url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("only http and https addresses can be fetched")
        if not parts.netloc.isascii():
            parts = parts._replace(netloc=parts.netloc.encode("idna").decode())
        url = urllib.parse.quote(parts.geturl(), safe=string.punctuation)
        opener = urllib.request.OpenerDirector()  # without the handlers of file:, ftp: and data:
        for handler in (
            urllib.request.ProxyHandler(None if self.allow_private else {}),
            self,
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        headers = {"User-Agent": "vit-gpt2-captioning", "Accept": "image/*", "Accept-Encoding": "identity"}
        with opener.open(urllib.request.Request(url, headers=headers), timeout=self.seconds) as answer:
            content = self._read(answer)
        try:
            open_picture(io.BytesIO(content)).close()
        except Exception as error:  # Pillow raises a dozen kinds
            kind = answer.headers.get_content_type()
            raise UserError(
                f"not a picture ({'a web page' if kind == 'text/html' else kind}: {reason(error)})"
            ) from None
        return content

    def _read(self, answer: http.client.HTTPResponse) -> bytes:
        """Read the body, decompressed. Raises UserError as soon as it exceeds the limit."""
        too_large = UserError(f"larger than {self.max_bytes / (1 << 20):g} MiB")
        promised = answer.headers.get("Content-Length", "")
        if promised.isdigit() and int(promised) > self.max_bytes:
            raise too_large
        encoding = answer.headers.get("Content-Encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "x-gzip"):  # the only one asked for
            raise UserError(f"its answer is compressed as {encoding}")
        unpack = None if encoding == "identity" else zlib.decompressobj(16 + zlib.MAX_WBITS)
        content, wire = bytearray(), 0
        while chunk := answer.read1(CHUNK):
            wire += len(chunk)
            content += chunk if unpack is None else unpack.decompress(chunk, self.max_bytes + 1 - len(content))
            if max(wire, len(content)) > self.max_bytes:
                raise too_large
        if (promised.isdigit() and wire < int(promised)) or (unpack is not None and not unpack.eof):
            raise UserError("cannot be fetched (the connection was cut)")
        if not content:
            raise UserError("cannot be fetched (the answer is empty)")
        return bytes(content)

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to an address that was checked to be public."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not all(is_public(str(address[4][0])) for address in found):
            raise PrivateAddressError("leads to an address that is not public")
        last: OSError = OSError("the name has no address")
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(max(0.001, self.deadline - time.monotonic()))
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                last = error
        raise last

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a connection for urllib."""
        return self.do_open(self._make(_Connection), request)  # type: ignore[arg-type]  # a function will do

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Open an encrypted connection for urllib."""
        return self.do_open(self._make(_SecureConnection), request, context=ssl.create_default_context())  # type: ignore[arg-type]

    def _make(self, kind: type[_Connection]) -> Callable[..., _Connection]:
        def make(host: str, **options: Any) -> _Connection:
            connection = kind(host, **options)
            connection.fetch = self
            return connection

        return make


class _Connection(http.client.HTTPConnection):
    """A connection that a _Fetch opens and can close."""

    fetch: _Fetch

    def connect(self) -> None:
        """Called by http.client before it sends the request."""
        if self.fetch.allow_private:
            super().connect()
        else:
            self.sock = self.fetch.connect(self.host, self.port)
        self.fetch.opened(self.sock)


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """With the bases in this order, HTTPSConnection.connect encrypts what _Connection.connect has opened."""

    def connect(self) -> None:
        """Called by http.client before it sends the request."""
        super().connect()
        self.fetch.opened(self.sock)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request."""
        fp.close()  # or urllib would read the body of the redirect, however long
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _why(error: BaseException) -> str:
    """The reason for urllib's error, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"answer {error.code} {error.reason}".split("\n")[0][:200]
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    return str(getattr(error, "strerror", None) or first_line(error))[:200]
