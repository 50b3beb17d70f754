"""What strangers can do to the web page: over real connections to a real server, with what it holds counted."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, needs_package, tiny_config
from PIL import Image
from processes import free_port

import app
from captioning import door, service
from captioning.door import Door, Uploads, host_names, is_local, upload_folder
from config import UserError
from model import ImageCaptionModel

pytestmark = needs_package("gradio", "app")

META = {"_type": "gradio.FileData"}
OPTIONS = service.decoding_options("normal", "safe", 1)


class Page:
    """The page at work in this process."""

    def __init__(self, model: ImageCaptionModel | None, folder: Path, allowed: tuple[str, ...] = ()) -> None:
        self.captioner, self.training = service.Captioner("cpu", "fp32"), service.Training()
        self.captioner.model = model
        self.folder, self.port = folder, free_port()
        self.page = app.build(self.captioner, 1 << 20, self.training)
        app.launch(self.page, "127.0.0.1", self.port, 1 << 20, allowed)

    def ask(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, str]:
        """Status and text of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        with connection.getresponse() as answer:
            return answer.status, answer.read().decode(errors="replace")

    def post(self, path: str, sent: object, **headers: str) -> tuple[int, str]:
        """JSON."""
        return self.ask("POST", f"/gradio_api/{path}", json.dumps(sent), Content_Type="application/json", **headers)

    def outcome(self, event: int, data: list, route: str = "queue/join", **headers: str) -> str:
        """What an event of the page gives in the end, by one of the ways to ask for it."""
        if route == "run":
            return self.post("run/predict", {"data": data, "fn_index": event}, **headers)[1]
        session = os.urandom(6).hex()
        status, text = self.post(route, {"data": data, "fn_index": event, "session_hash": session}, **headers)
        return (
            text if status != 200 else self.ask("GET", f"/gradio_api/queue/data?session_hash={session}", **headers)[1]
        )


@pytest.fixture(scope="module")
def make_page(tmp_path_factory):
    """Makes pages; their uploads go into folders of their own."""
    pages, before = [], os.environ.get("GRADIO_TEMP_DIR")

    def make(model: ImageCaptionModel | None, **options) -> Page:
        folder = tmp_path_factory.mktemp("uploads")
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        pages.append(Page(model, folder, **options))
        return pages[-1]

    yield make
    for page in pages:
        page.page.close(verbose=False)
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


@pytest.fixture(scope="module")
def model(scenes_tokenizer) -> ImageCaptionModel:
    config = tiny_config(image_size=32, resize_size=40, max_length=40, vocab_size=len(scenes_tokenizer))
    model = ImageCaptionModel(config).eval()
    model.tokenizer = scenes_tokenizer
    return model


@pytest.fixture(scope="module")
def page(make_page, model) -> Page:
    return make_page(model, allowed=("page.example.org",))


@pytest.fixture(scope="module")
def bare(make_page) -> Page:
    return make_page(None)


@pytest.fixture
def picture(tmp_path) -> str:
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def multipart(*parts: tuple[str, str | None, bytes]) -> tuple[bytes, str]:
    """A body of (field, file name or None, content), and its Content-Type."""
    body = b""
    for field, name, content in parts:
        file = "" if name is None else f'; filename="{name}"'
        body += f'--x\r\nContent-Disposition: form-data; name="{field}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--x--\r\n", "multipart/form-data; boundary=x"


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


# Names and sites


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/queue/status"])
def test_a_name_that_only_leads_here_is_refused(page, path):
    """DNS rebinding: a page whose name leads to this machine for a moment read captions, and sent pictures."""
    for own in ("localhost", "127.0.0.1", f"LOCALHOST:{page.port}", "[::1]:1", "page.example.org", "localhost."):
        assert page.ask("GET", path, Host=own)[0] == 200, own
    for foreign in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "8.8.8.8",
        "",
        "localhost@evil",
        "[::2]",
    ):
        status, text = page.ask("GET", path, Host=foreign)
        assert status in (400, 403) and "\n" not in text and "Traceback" not in text, foreign
    for header in ("X-Forwarded-Host", "X-Gradio-Server"):  # gradio puts them into what all others are told
        assert page.ask("GET", path, **{header: "evil.example"})[0] == 403


def test_a_page_of_another_site_may_not_ask(page):
    """A web page elsewhere could fill the disk with uploads, and train."""
    body, kind = multipart(("files", "a.txt", b"x"))
    here = f"http://127.0.0.1:{page.port}"
    routes = ["upload", "queue/join", "call/caption", "run/predict", "cancel", "reset"]
    for route in routes:
        for origin in (
            "https://evil.example",
            "null",
            "http://127.0.0.1:1",
            f"{here}.evil.example",
            f"http://a@127.0.0.1:{page.port}",
        ):
            assert page.ask("POST", f"/gradio_api/{route}", body, Origin=origin, Content_Type=kind)[0] == 403, origin
        assert page.ask("POST", f"/gradio_api/{route}", body, Sec_Fetch_Site="cross-site")[0] == 403
    assert page.ask("GET", "/config", Origin="https://evil.example")[0] == 403 and not files_in(page.folder)
    for headers in ({}, {"Origin": here}, {"Origin": here.replace("127.0.0.1", "localhost")}):
        assert page.ask("POST", "/gradio_api/upload", body, Content_Type=kind, **headers)[0] == 200
    behind = {"Host": "page.example.org", "Origin": "https://page.example.org"}
    assert page.ask("POST", "/gradio_api/upload", body, Content_Type=kind, **behind)[0] == 200


def test_the_names_of_this_machine():
    """0.0.0.0 is reached by the machine's name and by the address that the connection came to, as uvicorn says it."""
    wide, narrow = Door(None, host_names("0.0.0.0", ())), Door(None, host_names("127.0.0.1", ()))
    reached = {"server": ("192.168.7.7", 7860)}
    assert wide.is_own(f"{socket.gethostname()}:7860", reached) and wide.is_own("192.168.7.7:7860", reached)
    assert not wide.is_own("192.168.7.8", reached) and not wide.is_own("evil.example", reached)
    assert not narrow.is_own("evil.example", {"server": None}) and narrow.is_own("localhost", {"server": None})
    assert Door(None, host_names("127.0.0.1", ("A.example:8443",))).is_own("a.example", reached)


@pytest.mark.parametrize(
    "path",
    [
        "component_server",
        "proxy=http://127.0.0.1:1/",
        "file=http://127.0.0.1:1/",
        "file=https://a/b",
        "file/etc/passwd",
        "dev/reload",
        "deep_link?session_hash=a",
        "process_recording",
        "vibe-edit",
        "vibe-code",
        "undo-vibe-edit",
        "vibe-starter-queries",
        "run-history/connect",
        "stream/a",
        "custom_component/a/client/b/c",
        "mcp/",
        "profiling/clear",
        "../monitoring",
        "../monitoring/summary",
        "../login",
        "../logout",
    ],
)
def test_routes_that_the_page_does_not_need_are_none(page, path):
    """gradio has some that fetch addresses, write files or show what others ask for."""
    path = f"/{path[3:]}" if path.startswith("../") else f"/gradio_api/{path}"
    for method in ("GET", "POST", "PUT", "DELETE"):
        status, text = page.ask(method, path, b"" if method == "POST" else None)
        assert status in (404, 405) and "\n" not in text.strip()


# What is sent


class Counting(http.server.BaseHTTPRequestHandler):
    """Counts who asks."""

    def do_GET(self) -> None:
        """Any request."""
        self.server.asked += 1  # type: ignore[attr-defined]
        self.send_error(404)


@pytest.mark.parametrize("route", ["queue/join", "run", "call/caption", "call/v2/caption"])
def test_no_field_of_any_event_fetches(page, route):
    """A file whose path is an address was fetched by gradio in every field but those for files."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    server.asked = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/a.png"
    outside = [
        address,
        "HTTP" + address[4:],
        "file:///etc/passwd",
        "/etc/passwd",
        f"{page.folder}/../../x.png",
        str(ROOT / "README.md"),
    ]
    try:
        for event, function in page.page.fns.items():
            for place in range(len(function.inputs)):
                for path in outside if place == 0 else [address]:
                    file = {"path": path, "url": address, "orig_name": "a.png", "meta": META}
                    for sent in (file, [file], {"a": [file]}):
                        data = [None] * len(function.inputs)
                        data[place] = sent
                        if route.startswith("call/v2"):
                            _, text = page.post(route, {"picture": None, "url": "", "length": sent, "style": sent})
                        elif route in ("queue/join", "run"):
                            text = page.outcome(event, data, route)
                        else:
                            _, text = page.post(route, {"data": data})
                        if "event_id" in text and route.startswith("call"):
                            text = page.ask("GET", f"/gradio_api/call/caption/{json.loads(text)['event_id']}")[1]
                        assert "root:" not in text and "Traceback" not in text
                        if route == "queue/join" and not function.inputs[place].stateful:
                            assert '"success":false' in text or "must be" in text, text
        assert page.ask("GET", f"/gradio_api/file={address}")[0] == 404
        assert server.asked == 0 and not [path for path in files_in(page.folder) if path.suffix == ".png"]
    finally:
        server.shutdown()


HOSTILE = [
    b"null", b"", b"[]", b'"a"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"data": null}', b'{"data": {}}', b'{"data": []}',
    b'{"data": [null, null, null, null, null, null]}', b'{"data": [1, 2, 3, 4, 5, 6, 7]}', b'{"data": ["a"], "fn_index": -1}',
    b'{"data": [], "fn_index": 9999, "session_hash": "a"}', b'{"data": [], "fn_index": "x", "session_hash": "a"}',
    b'{"data": [[[[[[[[[[[[]]]]]]]]]]]}', b'{"data": ["' + b"a" * 5000 + b'"]}', b'{"data": [' + b"[]," * 300_000 + b"[]]}",
    b'{"data": [NaN, Infinity, 1e999, true, {}, []]}', b'{"data": [{"path": null}, {"path": 7}]}', b" " * (5 << 20),
    b'{"data": [{"path": "a", "meta": {"_type": "gradio.FileData"}}, "", "normal", "safe", 1, ' + b"9" * 5000 + b"]}",
    b'{"data": [], "session_hash": "' + b"a" * 100_000 + b'"}', b'{"data": [], "session_hash": 7}',
    b'{"picture": null}', b'{"event_id": 7}', b'{"session_hash": "a", "fn_index": 0, "event_id": "b"}',
]  # fmt: skip


@pytest.mark.parametrize(
    "route",
    ["queue/join", "run/predict", "run/nope", "call/caption", "call/v2/nope", "cancel"],
)
def test_what_is_malformed_is_one_line_and_leaves_no_traceback(page, capfd, route):
    """null at the endpoint left 262 tracebacks in the page's log."""
    for body in HOSTILE:
        status, text = page.ask("POST", f"/gradio_api/{route}", body, Content_Type="application/json")
        assert (400 <= status < 500 or '"error"' in text or status == 200) and "Traceback" not in text, (
            body[:50],
            text,
        )
        if status == 200 and "event_id" in text and route.startswith("call"):
            said = page.ask("GET", f"/gradio_api/call/caption/{json.loads(text)['event_id']}")[1]
            assert "event: error" in said, (body[:50], said)
    assert page.ask("GET", "/gradio_api/queue/data?session_hash=nobody")[0] == 200  # and an error inside
    assert page.ask("GET", "/gradio_api/call/caption/nobody")[0] == 200
    time.sleep(0.2)
    log = capfd.readouterr()
    assert "Traceback" not in log.err + log.out, (log.err + log.out)[-3000:]
    assert (log.err + log.out).count("\n") < 5


# Uploads


@pytest.fixture
def bounded(page, monkeypatch):
    """Uploads of the page in 1 MiB."""
    from gradio import route_utils

    monkeypatch.setattr(route_utils, "GradioMultiPartParser", route_utils.GradioMultiPartParser)
    uploads = Uploads(page.folder, 1 << 20)
    app.keep(uploads)
    for path in files_in(page.folder):
        path.unlink()
    return uploads


def test_uploads_together_are_bounded_and_old_ones_go(page, bounded):
    """A web page could fill the disk: every upload stayed for an hour, however many they were."""
    for number in range(40):
        body, kind = multipart(("files", f"{number}.png", os.urandom(100_000)))
        status, text = page.ask("POST", "/gradio_api/upload", body, Content_Type=kind)
        assert status == 200 or (status == 413 and "--max-upload-gigabytes" in text)
        assert sum(path.stat().st_size for path in files_in(page.folder)) <= 1 << 20
    assert status == 413 and 5 <= len(files_in(page.folder)) <= 10
    many, kind = multipart(*[("files", f"{number}.png", b"x") for number in range(40)])
    assert page.ask("POST", "/gradio_api/upload", many, Content_Type=kind)[0] == 413
    for path in files_in(page.folder):
        os.utime(path, (time.time() - door.FRESH - 9,) * 2)
    bounded.cleaned = 0
    body, kind = multipart(("files", "new.png", b"x" * 100_000))
    assert page.ask("POST", "/gradio_api/upload", body, Content_Type=kind)[0] == 200
    assert 0 < len(files_in(page.folder)) < 8
    for path in files_in(page.folder):
        os.utime(path, (time.time() - door.KEPT - 9,) * 2)
    bounded.clean()
    assert not files_in(page.folder) and bounded.held == 0


def test_what_is_no_upload_of_files_leaves_nothing(page, bounded):
    """A field without a file was held in memory, and a file in another field stayed on disk, whatever their size."""
    for parts in (
        [("files", None, b"x" * 3000)],
        [("other", "a.png", b"x")],
        [("files", "a.png", b"x"), ("b", None, b"")],
    ):
        body, kind = multipart(*parts)
        status, text = page.ask("POST", "/gradio_api/upload", body, Content_Type=kind)
        assert status == 400 and "\n" not in text
    for kind in ("multipart/form-data", "text/plain", "multipart/form-data; boundary=y"):
        assert 400 <= page.ask("POST", "/gradio_api/upload", b"--x\r\n", Content_Type=kind)[0] < 500 or kind[-1] == "y"
    for name in ("../../../a.png", "/etc/passwd", "a" * 3000 + ".png", "\x01\x02", "..", "nul"):
        body, kind = multipart(("files", name, b"x"))
        page.ask("POST", "/gradio_api/upload", body, Content_Type=kind)
    assert all(path.is_relative_to(page.folder) for path in files_in(page.folder))
    assert not (page.folder.parent / "a.png").exists()


def test_an_upload_that_is_cut_leaves_nothing(page, bounded):
    """What a client had sent before it left stayed on disk for ever."""
    body, kind = multipart(("files", "a.png", b"x" * 200_000))
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    for length, sent in (
        (f"Content-Length: {len(body)}", body[:100_000]),
        ("Transfer-Encoding: chunked", b"186a0\r\n" + body[:100_000] + b"\r\n"),
    ):
        with socket.create_connection(("127.0.0.1", page.port)) as client:
            client.sendall(f"{head}{length}\r\n\r\n".encode() + sent)
            until = time.monotonic() + 20
            while not files_in(page.folder) and time.monotonic() < until:
                time.sleep(0.01)
            assert files_in(page.folder)
        while files_in(page.folder) and time.monotonic() < until:
            time.sleep(0.01)
        assert not files_in(page.folder)


def test_a_body_that_pauses_is_given_up(page, bounded, monkeypatch):
    """Whether of an upload or of anything else."""
    monkeypatch.setattr(door, "PATIENCE", 0.2)
    for route, kind in (("upload", "multipart/form-data; boundary=x"), ("queue/join", "application/json")):
        with socket.create_connection(("127.0.0.1", page.port), timeout=20) as client:
            head = f"POST /gradio_api/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 999\r\n\r\n"
            client.sendall(
                head.encode() + b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nxx'
            )
            assert b" 408 " in client.recv(1000)
    assert not files_in(page.folder)


def test_a_page_that_was_killed_leaves_no_uploads(tmp_path, monkeypatch):
    """The next one deletes them, and leaves those of a page that runs."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    left = tmp_path / f"{door.OURS}left"
    left.mkdir()
    (left / "a.png").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{door.OURS}link").symlink_to(tmp_path / "elsewhere")
    with upload_folder() as running, upload_folder() as other:
        assert running.is_dir() and other.is_dir() and running != other and not left.exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()] == ["elsewhere"]


# The demo's training


def test_training_is_for_this_machine_while_there_is_no_model(bare, page, model, monkeypatch):
    """Anybody could start it by its number, and the new model replaced the one that all others were using."""
    started = []
    monkeypatch.setattr(service.Training, "start", lambda self: started.append(self))
    events = [event for event, function in bare.page.fns.items() if function.name == "train"]
    assert len(events) == 1 and not [function for function in page.page.fns.values() if function.name == "train"]
    for headers in (
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-For": "8.8.8.8"},
        {"Via": "a"},
        {"Forwarded": "for=::1"},
    ):
        for route in ("queue/join", "run"):
            assert "this machine" in bare.outcome(events[0], [], route, **headers)
    assert not started
    bare.outcome(events[0], [])
    assert len(started) == 1
    bare.captioner.model = model
    try:
        for route in ("queue/join", "run"):
            assert "a model here already" in bare.outcome(events[0], [], route)
    finally:
        bare.captioner.model = None
    assert len(started) == 1


def test_this_machine():
    for address in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"):
        assert is_local(address, {}) and not is_local(address, {"x-forwarded-for": "127.0.0.1"})
    for address in ("192.168.1.2", "10.0.0.1", "::2", "", "localhost", "8.8.8.8", "::ffff:8.8.8.8"):
        assert not is_local(address, {})


def test_no_event_replaces_what_is_served(page, model):
    """Every event, asked for by its number with nothing, with texts and with numbers."""
    for event, function in page.page.fns.items():
        for value in (None, "a", 1):
            page.outcome(event, [value] * len(function.inputs))
    assert page.captioner.model is model and page.training.process is None


# The worker


class Panic(BaseException):
    """As pyo3's."""


@pytest.mark.parametrize(
    "error",
    [
        Panic("the tokenizer\npanicked"),
        KeyboardInterrupt(),
        SystemExit(3),
        MemoryError(),
        GeneratorExit(),
        ValueError("a"),
    ],
)
def test_the_worker_survives_whatever_a_model_raises(model, picture, error, monkeypatch):
    """A tokenizer's panic ended its thread, and whoever came later waited for ever."""
    captioner = service.Captioner("cpu", "fp32")
    captioner.model = model
    caption, right = captioner._caption, OPTIONS | {"num_beams": 2}

    def broken(group):
        if group[0].options["num_beams"] == 3:
            raise error
        return caption(group)

    monkeypatch.setattr(captioner, "_caption", broken)
    asked = [captioner.submit(picture, "a", options) for options in (OPTIONS | {"num_beams": 3}, right)]
    with pytest.raises(UserError, match=type(error).__name__) as said:
        asked[0].result(20)
    assert "\n" not in str(said.value) and asked[1].result(20)
    assert captioner.submit(picture, "a", right).result(20)


class Incomparable:
    """Whose comparison fails, as an array's does."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None


def test_options_that_cannot_be_compared_fail_alone(model, picture):
    captioner = service.Captioner("cpu", "fp32")
    captioner.model = model
    odd = [captioner.submit(picture, "a", OPTIONS | {"num_beams": Incomparable()}) for _ in range(2)]
    assert captioner.submit(picture, "a", OPTIONS).result(20)
    for each in odd:
        with pytest.raises(UserError):
            each.result(20)


def test_who_left_is_passed_over_and_too_many_are_told(model, picture, monkeypatch):
    """The list of those who wait grew without bound, and those who had left were captioned for."""
    captioner = service.Captioner("cpu", "fp32")
    captioner.model = model
    caption, sizes = captioner._caption, []
    begun, go_on = threading.Event(), threading.Event()

    def slow(group):
        sizes.append(len(group))
        begun.set()
        assert go_on.wait(20)
        return caption(group)

    monkeypatch.setattr(captioner, "_caption", slow)
    monkeypatch.setattr(service, "MOST_WAITING", 5)
    first = captioner.submit(picture, "a", OPTIONS)
    assert begun.wait(20)
    waiting = [captioner.submit(picture, "a", OPTIONS) for _ in range(5)]
    with pytest.raises(UserError, match="busy: 5 pictures"):
        captioner.submit(picture, "a", OPTIONS)
    for each in waiting[:3]:
        assert each.cancel()
    go_on.set()
    assert first.result(20) and waiting[3].result(20) and waiting[4].result(20) and sizes == [1, 2]


def test_a_folder_waits_for_room_and_leaves_nothing_behind(model, picture, tmp_path, monkeypatch):
    """One that is too busy is no picture's failure; one whose reader has left asks for nothing more."""
    captioner = service.Captioner("cpu", "fp32")
    captioner.model = model
    monkeypatch.setattr(service, "MOST_WAITING", 3)
    sources = [service.Source(f"{number}.png", path=picture) for number in range(20)]
    *_, end = service.caption_folder(captioner, sources, service.Settings(), tmp_path / "a.csv")
    assert "20 of 20 pictures captioned" in end
    monkeypatch.setattr(service, "MOST_ERRORS", 2)
    bad = [service.Source(f"{number}.png", path="nowhere") for number in range(9)]
    *_, end = service.caption_folder(captioner, bad, service.Settings(), tmp_path / "b.csv")
    assert end.count("problem") == 3 and "and 7 more" in end


def test_tidy_forgets(page, tmp_path):
    """What gradio remembers of clients that have gone, and of files that are deleted."""
    page.page._queue.pending_event_ids_session["gone"] = {"a"}
    page.page.upload_file_set.add("gone.png")
    app.tidy(page.page, Uploads(tmp_path, 1 << 20))
    assert "gone" not in page.page._queue.pending_event_ids_session and not page.page.upload_file_set
