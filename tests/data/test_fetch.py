"""fetch.py against hostile addresses and hostile servers, all of them real ones on this machine that count connections."""

from __future__ import annotations

import gzip
import io
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from PIL import Image

from config import UserError
from data import fetch
from data.fetch import fetch_picture, is_public

PUBLIC = "127.0.0.2"  # taken for a public address where a test needs one that answers


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


PICTURE = picture()


class Server:
    """Answers every request by calling `answer` with the connection and the requested path."""

    def __init__(self, answer: Callable[[socket.socket, str], None], address: str = "127.0.0.1", tls=None) -> None:
        self.answer, self.tls = answer, tls
        self.connections = 0
        self.sent = 0
        self.paths: list[str] = []
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.create_server((address, 0), family=family)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            self.connections += 1
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        try:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection:
                request = connection.recv(65536)
                self.paths.append(request.split(b" ")[1].decode())
                self.request = request
                self.answer(connection, self.paths[-1])
        except (OSError, ValueError, IndexError):  # the other side has left, as it should, or speaks TLS
            pass

    def send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        self.sent += len(data)


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(answer, address="127.0.0.1", tls=None) -> Server:
        started.append(Server(answer, address, tls))
        return started[-1]

    yield start
    for server in started:
        server.listener.close()


def plain(body: bytes, *headers: str, status: str = "200 OK") -> Callable[[socket.socket, str], None]:
    """An answer with a body and its length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return lambda connection, path: connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def refused(url: str, match: str = "not public|only http", **options) -> str:
    """The message with which a URL is refused: one line that names the URL."""
    with pytest.raises(UserError, match=match) as caught:
        fetch_picture(url, **options)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(url[:20].replace("\n", "\\n"))
    return message


# Addresses

HOSTILE = """
http://127.0.0.1:PORT/  http://localhost:PORT/  http://LOCALHOST:PORT/  http://127.1:PORT/  http://127.0.1:PORT/
http://2130706433:PORT/  http://0x7f000001:PORT/  http://0x7f.0.0.1:PORT/  http://017700000001:PORT/
http://0177.0.0.1:PORT/  http://127.0.0.2:PORT/  http://127.255.255.254:PORT/  http://0.0.0.0:PORT/  http://0:PORT/
http://[::1]:PORT/  http://[::]:PORT/  http://[::ffff:127.0.0.1]:PORT/  http://[::ffff:7f00:1]:PORT/
http://[0:0:0:0:0:ffff:127.0.0.1]:PORT/  http://[::127.0.0.1]:PORT/  http://[2002:7f00:1::]:PORT/
http://[64:ff9b::7f00:1]:PORT/  http://[64:ff9b::10.0.0.1]:PORT/  http://[64:ff9b:1::1]:PORT/  http://[fe80::1]:PORT/
http://[fec0::1]:PORT/  http://[fc00::1]:PORT/  http://[fd00:ec2::254]:PORT/  http://[ff02::1]:PORT/
http://[2001::1]:PORT/  http://[2001:db8::1]:PORT/  http://10.0.0.1:PORT/  http://172.16.0.1:PORT/
http://192.168.1.1:PORT/  http://169.254.169.254:PORT/latest/meta-data/  http://0xa9fea9fe:PORT/
http://100.64.0.1:PORT/  http://100.127.255.254:PORT/  http://192.0.0.1:PORT/  http://198.18.0.1:PORT/
http://192.0.2.1:PORT/  http://224.0.0.1:PORT/  http://240.0.0.1:PORT/  http://255.255.255.255:PORT/
https://127.0.0.1:PORT/  HTTP://127.0.0.1:PORT/  http://127.0.0.1.:PORT/  http://127。0。0。1:PORT/
http://user@127.0.0.1:PORT/  http://example.org@127.0.0.1:PORT/  http://127.0.0.1:PORT#@example.org/
http://127.0.0.1:PORT\\@example.org/  file:///etc/passwd  FILE:///etc/passwd  ftp://127.0.0.1:PORT/x.png
gopher://127.0.0.1:PORT/x  data:image/png;base64,iVBORw0KGgo=  http:///x.png  http://[::1  dict://127.0.0.1:PORT/
"""


@pytest.mark.parametrize("url", HOSTILE.split())
def test_no_private_connection_is_ever_made(url, serve, monkeypatch):
    """However an address inside is written, nothing is sent there: the servers on it count no connection, and no other
    address is tried."""
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    servers = [serve(plain(PICTURE)), serve(plain(PICTURE), "127.0.0.2")]
    if socket.has_ipv6:
        servers.append(serve(plain(PICTURE), "::1"))
    for server in servers:
        refused(url.replace("PORT", str(server.port)), "not public|only http|cannot be fetched", seconds=5)
    assert [server.connections for server in servers] == [0] * len(servers) and not tried


def test_the_servers_of_these_tests_would_have_answered(serve):
    """The counterpart of the test above, which would pass without any server."""
    server = serve(plain(PICTURE))
    for host in ("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "017700000001", "[::ffff:127.0.0.1]"):
        assert fetch_picture(f"http://{host}:{server.port}/", allow_private=True) == PICTURE
    assert server.connections == 7


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "64:ff9b::808:808",
                                     "::ffff:8.8.8.8", "2002:808:808::1"])  # fmt: skip
def test_public_addresses_are_public(address):
    assert is_public(address)


@pytest.fixture
def resolver(monkeypatch):
    """A resolver that answers each name by the next of its lists of addresses, and the last one for ever."""
    real, names, asked = socket.getaddrinfo, {}, []

    def getaddrinfo(host, port, *arguments, **options):
        asked.append(host)
        if host not in names:
            return real(host, port, *arguments, **options)
        answers = names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [found for address in addresses for found in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == PUBLIC or is_public(address))
    names["asked"] = asked
    return names


def test_names_that_lead_inside(serve, resolver):
    """One private address among a name's is enough, in any place: a second one is tried where the first is silent."""
    inside, outside = serve(plain(PICTURE)), serve(plain(PICTURE), PUBLIC)
    resolver["inside.example"] = [["127.0.0.1"]]
    resolver["both.example"] = [[PUBLIC, "127.0.0.1"]]
    resolver["other.example"] = [["127.0.0.1", PUBLIC]]
    for server in (inside, outside):
        for name in ("inside", "both", "other"):
            refused(f"http://{name}.example:{server.port}/")
    assert inside.connections == outside.connections == 0


def test_a_name_that_changes_between_check_and_connection(serve, resolver):
    """DNS rebinding: a name is looked up once for a connection, and the connection goes to what was judged."""
    inside, outside = serve(plain(PICTURE)), serve(plain(PICTURE), PUBLIC)
    resolver["changing.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert fetch_picture(f"http://changing.example:{outside.port}/") == PICTURE
    assert resolver["asked"] == ["changing.example"]
    refused(f"http://changing.example:{inside.port}/")
    resolver["again.example"] = [[PUBLIC], ["127.0.0.1"]]
    outside.answer = plain(b"", f"Location: http://again.example:{outside.port}/2", status="302 Found")
    refused(f"http://again.example:{outside.port}/")  # the same name, but a new connection
    assert (inside.connections, outside.connections) == (0, 2)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_to_inside(status, serve, resolver):
    inside = serve(plain(PICTURE))
    for target in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]", "0x7f.1"):
        location = f"http://{target}:{inside.port}/"
        outside = serve(plain(b"", f"Location: {location}", status=status), PUBLIC)
        refused(f"http://{PUBLIC}:{outside.port}/")
        assert outside.connections == 1
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x.png", "gopher://127.0.0.1/"):
        outside = serve(plain(b"", f"Location: {target}", status=status), PUBLIC)
        refused(f"http://{PUBLIC}:{outside.port}/", "cannot be fetched")
    assert inside.connections == 0


def test_redirects_that_are_followed(serve):
    server = serve(lambda connection, path: plain(PICTURE)(connection, path))

    def count_down(connection, path):
        left = int(path[1:])
        answer = plain(PICTURE) if left == 0 else plain(b"", f"Location: /{left - 1}", status="302 Found")
        answer(connection, path)

    server.answer = count_down
    assert fetch_picture(f"http://127.0.0.1:{server.port}/5", allow_private=True) == PICTURE
    refused(f"http://127.0.0.1:{server.port}/6", "redirect", allow_private=True)
    assert server.connections == 12 and server.paths[-1] == "/1"


def test_the_environments_proxies_serve_only_where_private_addresses_are_allowed(serve, resolver, monkeypatch):
    """A proxy looks names up in our place, so that they could not be judged."""
    proxy = serve(plain(PICTURE), PUBLIC)
    monkeypatch.setenv("http_proxy", f"http://{PUBLIC}:{proxy.port}")
    refused("http://127.0.0.1:1/cat.png")
    assert proxy.connections == 0
    assert fetch_picture("http://somewhere.example/cat.png", allow_private=True) == PICTURE
    assert proxy.paths == ["http://somewhere.example/cat.png"]


# Answers


def endless(server_of: list[Server], head: bytes, block: bytes) -> Callable[[socket.socket, str], None]:
    def answer(connection: socket.socket, path: str) -> None:
        connection.sendall(head)
        while True:
            server_of[0].send(connection, block)

    return answer


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked", b"Connection: close"])
def test_an_endless_body_is_cut_at_the_cap(head, serve):
    block = PICTURE.ljust(1 << 16, b"\0")
    if b"chunked" in head:
        block = b"10000\r\n" + block + b"\r\n"
    servers: list[Server] = []
    servers.append(serve(endless(servers, b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n", block)))
    refused(f"http://127.0.0.1:{servers[0].port}/", "larger than 2 MiB", allow_private=True, max_bytes=2 << 20)
    assert servers[0].sent < 32 << 20  # what the sockets' buffers hold on top


def test_ten_gigabytes_promised_are_not_begun(serve):
    servers: list[Server] = []
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"
    servers.append(serve(endless(servers, head, bytes(1 << 16))))
    refused(f"http://127.0.0.1:{servers[0].port}/", "larger than 50 MiB", allow_private=True)
    assert servers[0].sent < 32 << 20


def test_a_redirects_endless_body_is_not_read(serve):
    """urllib reads the body of a redirect to its end before it follows: gigabytes, in memory."""
    target, servers = serve(plain(PICTURE)), []
    head = f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{target.port}/\r\n\r\n".encode()
    servers.append(serve(endless(servers, head, bytes(1 << 16))))
    assert fetch_picture(f"http://127.0.0.1:{servers[0].port}/", allow_private=True) == PICTURE
    assert servers[0].sent < 32 << 20


def test_a_gzip_bomb_is_unpacked_to_the_cap_only(serve, monkeypatch):
    bomb = gzip.compress(PICTURE + bytes(300 << 20), 9)
    assert len(bomb) < 1 << 20
    unpacked, real = [], fetch.zlib.decompressobj

    class Watched:
        def __init__(self, *arguments):
            self.inner = real(*arguments)

        def decompress(self, *arguments):
            unpacked.append(self.inner.decompress(*arguments))
            return unpacked[-1]

    server = serve(plain(bomb, "Content-Encoding: gzip"))
    monkeypatch.setattr(fetch.zlib, "decompressobj", Watched)
    refused(f"http://127.0.0.1:{server.port}/", "larger than 2 MiB", allow_private=True, max_bytes=2 << 20)
    assert sum(map(len, unpacked)) == (2 << 20) + 1


def test_gzip_that_nobody_asked_for_is_unpacked(serve):
    server = serve(plain(gzip.compress(PICTURE), "Content-Encoding: gzip"))
    assert fetch_picture(f"http://127.0.0.1:{server.port}/", allow_private=True) == PICTURE
    assert b"Accept-Encoding: identity" in server.request
    server.answer = plain(gzip.compress(PICTURE)[:-20], "Content-Encoding: gzip")
    refused(f"http://127.0.0.1:{server.port}/", "was cut", allow_private=True)
    server.answer = plain(b"not gzip", "Content-Encoding: gzip")
    refused(f"http://127.0.0.1:{server.port}/", "cannot be fetched", allow_private=True)
    server.answer = plain(PICTURE, "Content-Encoding: br")
    refused(f"http://127.0.0.1:{server.port}/", "compressed as br", allow_private=True)


def test_a_lying_length(serve):
    """One that promises less than comes gives what it promised; one that promises more was cut."""

    def lying(length: int):
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()
        return lambda connection, path: connection.sendall(head + PICTURE)

    server = serve(lying(len(PICTURE) + 1))
    refused(f"http://127.0.0.1:{server.port}/", "was cut", allow_private=True)
    server.answer = lying(len(PICTURE) - 100)
    assert fetch_picture(f"http://127.0.0.1:{server.port}/", allow_private=True) == PICTURE[:-100]
    for length in (-1, 1 << 70):
        server.answer = lying(length)
        try:
            assert fetch_picture(f"http://127.0.0.1:{server.port}/", allow_private=True) == PICTURE
        except UserError as error:
            assert "larger than 50 MiB" in str(error)


def trickle(data: bytes, block: int = 1) -> Callable[[socket.socket, str], None]:
    def answer(connection: socket.socket, path: str) -> None:
        for start in range(0, len(data), block):
            connection.sendall(data[start : start + block])
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + PICTURE,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 9999,
        b"HTTP/1.1 200 OK\r\nX-Header: " + b"x" * 9999,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9999,
        b"",
    ],
    ids=["body", "chunks", "header", "continue", "silence"],
)
def test_one_byte_at_a_time_is_cut_at_the_deadline(data, serve):
    """A time limit for each read, which every byte starts anew, let such a server hold its reader for hours."""
    over = threading.Event()

    def answer(connection: socket.socket, path: str) -> None:
        try:
            trickle(data)(connection, path)
            connection.recv(1)
        finally:
            over.set()

    server = serve(answer)
    refused(f"http://127.0.0.1:{server.port}/", "longer than 0.5 s", allow_private=True, seconds=0.5)
    assert over.wait(10)  # the connection is closed, not only left to itself


def test_the_deadline_covers_redirects_together(serve):
    def answer(connection, path):
        time.sleep(0.25)
        plain(b"", f"Location: {path}x", status="302 Found")(connection, path)

    server = serve(answer)
    refused(f"http://127.0.0.1:{server.port}/", "longer than 0.6 s", allow_private=True, seconds=0.6)
    assert server.connections <= 3


def test_the_deadline_covers_the_names_look_up(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: over.wait(30) and [])
    refused("http://slow.example/", "longer than 0.2 s", seconds=0.2)
    over.set()


@pytest.mark.parametrize(
    "body, kind, match",
    [
        (b"<!DOCTYPE html><title>Log in</title>", "text/html; charset=utf-8", r"not a picture \(a web page"),
        (b'{"error": 1}', "application/json", r"not a picture \(application/json"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", r"not a picture \(image/svg"),
        (b"%PDF-1.7", "image/png", "not a picture"),
        (b"", "image/png", "the answer is empty"),
    ],
)
def test_what_is_no_picture_is_named(body, kind, match, serve):
    server = serve(plain(body, f"Content-Type: {kind}"))
    refused(f"http://127.0.0.1:{server.port}/", match, allow_private=True)


def test_pictures_are_known_by_their_bytes(serve):
    """Servers call pictures all kinds of things."""
    server = serve(plain(PICTURE, "Content-Type: text/html"))
    assert fetch_picture(f"http://127.0.0.1:{server.port}/", allow_private=True) == PICTURE


def test_answers_that_are_no_200(serve):
    server = serve(plain(b"", status="404 Not \x1b[31mFound"))
    message = refused(f"http://127.0.0.1:{server.port}/", "answer 404 Not", allow_private=True)
    assert "\x1b" not in message  # which would colour the reader's terminal, or worse
    for answer in (b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/9.9 abc\r\n\r\n", b"HTTP/1.1 302 Found\r\n\r\n", b"\xff" * 999):
        server.answer = lambda connection, path, answer=answer: connection.sendall(answer)
        message = refused(f"http://127.0.0.1:{server.port}/", "cannot be fetched", allow_private=True)
        assert len(message) < 300
    refused("http://127.0.0.1:1/", "(?i)connection refused", allow_private=True)


def test_addresses_as_people_write_them(serve):
    """Spaces and letters of other alphabets, as copied from a browser's address bar or a chat."""
    server = serve(plain(PICTURE))
    for path in ("/a%20b.png", "/a b.png", "/Käse.png", "/x.png?q=ä b#part"):
        assert fetch_picture(f" http://127.0.0.1:{server.port}{path}\n", allow_private=True) == PICTURE
    assert server.paths == ["/a%20b.png", "/a%20b.png", "/K%C3%A4se.png", "/x.png?q=%C3%A4%20b"]
    refused(f"http://127.0.0.1:{server.port}/" + "x" * 99999, allow_private=False)


def test_the_request_cannot_be_smuggled(serve):
    server = serve(plain(PICTURE))
    fetch_picture(f"http://127.0.0.1:{server.port}/x\r\nX-Evil: 1", allow_private=True)
    assert re.search(rb"\r\nX-Evil", server.request) is None


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tls.example -keyout key.pem -out cert.pem"
    try:
        subprocess.run([*command.split(), "-addext", "subjectAltName=DNS:tls.example"], cwd=folder, check=True,
                       capture_output=True)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    return folder


def test_https(serve, resolver, certificate, monkeypatch):
    """Encrypted to the judged address, under the name of the URL, whose certificate is verified."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server = serve(plain(PICTURE), PUBLIC, context)
    resolver["tls.example"] = resolver["other.example"] = [[PUBLIC]]
    refused(f"https://tls.example:{server.port}/", "(?i)certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    for allow in (False, True):
        assert fetch_picture(f"https://tls.example:{server.port}/", allow_private=allow) == PICTURE
    refused(f"https://other.example:{server.port}/", "(?i)certificate")
    server.answer = trickle(b"HTTP/1.1 200 OK\r\n" + b"x" * 9999)
    refused(f"https://tls.example:{server.port}/", "longer than 0.5 s", seconds=0.5)
    silent = serve(lambda connection, path: None, PUBLIC)
    silent._one = lambda connection: silent.paths.append(time.sleep(1) or connection.close())  # no handshake
    refused(f"https://tls.example:{silent.port}/", "longer than 0.5 s|timed out", seconds=0.5)
