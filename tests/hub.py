"""A small Hugging Face Hub on loopback: the requests that huggingface_hub's client makes to publish and load models.

Contents lie in a folder by their SHA-256, a commit is a list of names and contents, branches and pull requests point at
commits. Faults are switched on by a pattern: a status, or a connection that is cut in the middle of a request's body.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".onnx", ".png", ".bin")  # kept as LFS objects
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    """Branches and pull requests by name, and the commits they point at: name -> SHA-256 of its content."""

    private: bool
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, tree: dict[str, str], message: str) -> str:
        """Makes a commit that the ref points at."""
        number = hashlib.sha1(f"{len(self.commits)}{sorted(tree.items())}".encode()).hexdigest()
        self.commits[number], self.refs[ref] = tree, number
        self.messages.append(message)
        return number

    def tree(self, revision: str = "main") -> dict[str, str]:
        """The names in a revision with their SHA-256."""
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Request:
    """What was asked, and by whom; the body's size."""

    line: str
    token: str | None
    size: int


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories until it is shut down. Its tokens: who writes by which, and who may only read."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.tokens = {"hf_writes": "ann", "hf_reads": None}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[list[Any]] = []
        self.lock = threading.RLock()
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remembers connections, which clients keep open."""
        self.connections.append(request)
        super().process_request(request, client_address)

    def shutdown(self) -> None:
        """Nobody is answered any more."""
        super().shutdown()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, pattern: str, status: int | None, times: int = 1_000_000) -> None:
        """The next requests that match get this status; None: half of the body is read and the connection cut."""
        self.faults.append([re.compile(pattern), status, times])

    def lines(self, pattern: str = "") -> list[str]:
        """The requests so far that match."""
        return [request.line for request in self.requests if re.search(pattern, request.line)]

    def put(self, content: bytes) -> str:
        """Keeps a content; returns its SHA-256."""
        number = hashlib.sha256(content).hexdigest()
        (self.folder / number).write_bytes(content)
        return number

    def get(self, number: str) -> bytes:
        """The content of this SHA-256."""
        return (self.folder / number).read_bytes()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository that somebody made before."""
        made = self.repositories[name] = Repository(private)
        made.commit("main", {path: self.put(content) for path, content in files.items()}, "initial commit")
        return made


@contextmanager
def running_hub(folder: Path, port: int = 0) -> Iterator[Hub]:
    """A Hub that answers inside the block."""
    with Hub(folder, port) as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield hub
        hub.shutdown()


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Faults first, then whatever ROUTES says."""
        hub, path = self.server, unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        size = int(self.headers.get("Content-Length") or 0)
        line = f"{self.command} {path}"
        with hub.lock:
            hub.requests.append(Request(line, token, size))
            fault = next((f for f in hub.faults if f[2] > 0 and f[0].search(line)), None)
            if fault:
                fault[2] -= 1
        if fault and fault[1] is None:
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.body(size)
        if fault:
            return self.reply(fault[1], {"error": "a fault"}, {"X-Error-Message": "a fault"})
        try:
            with hub.lock:
                if token is not None and token not in hub.tokens:
                    text = "Invalid credentials in Authorization header"
                    raise RefusedError(401, text)
                for method, pattern, handle in ROUTES:
                    if self.command in method and (found := re.fullmatch(pattern, path)):
                        asked = found.groupdict()
                        if kind := asked.pop("space", None):
                            asked["name"] = f"{kind.rstrip('/')}/{asked['name']}"  # as they are kept here
                        return handle(self, token, body, **asked)
            raise RefusedError(404, f"nobody answers {line}")
        except RefusedError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.reply(error.status, {"error": error.message}, headers)

    def body(self, size: int) -> bytes:
        """The request's body, sent whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(size)
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Bytes, or anything else as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # What routes need

    def writer(self, token: str | None, name: str) -> None:
        """Raises unless this token may write there."""
        if token is None:
            raise RefusedError(401, "Invalid username or password.")
        if self.server.tokens[token] != owner(name):
            raise RefusedError(403, "You don't have the rights")

    def repository(self, token: str | None, name: str) -> Repository:
        """The repository, for whoever may see it."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and (token is None or self.server.tokens[token] != owner(name))):
            raise RefusedError(404 if token else 401, "Repository not found", "RepoNotFound")
        return found

    def revision(self, repository: Repository, revision: str) -> str:
        """The commit of a branch, a pull request or a commit."""
        number = repository.refs.get(revision, revision)
        if number not in repository.commits:
            raise RefusedError(404, "Revision not found", "RevisionNotFound")
        return number

    # Routes

    def create(self, token: str | None, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.server.tokens.get(token)}/{asked['name']}"
        if asked.get("type") == "space":
            if asked.get("sdk") != "gradio":
                raise RefusedError(400, "a Space needs an sdk")
            name = f"spaces/{name}"
        self.writer(token, name)
        where = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self.reply(409, where | {"error": "You already created this model repo"})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if name.startswith("spaces/"):  # a new one has a card already
            files["README.md"] = b"---\nsdk: gradio\n---\n"
        self.server.add(name, files, private)
        self.reply(200, where)

    def validate(self, token: str | None, body: bytes) -> None:
        asked = json.loads(body)
        check = {"model": card_errors, "space": space_errors}[asked["repoType"]]
        errors = [{"message": message} for message in check(asked["content"])]
        if self.headers.get("Accept") == "text/plain":
            return self.reply(400 if errors else 200, "\n".join(error["message"] for error in errors).encode())
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, token: str | None, body: bytes, name: str, revision: str | None = None) -> None:
        found = self.repository(token, name)
        number = self.revision(found, revision or "main")
        files = [{"rfilename": path} for path in sorted(found.commits[number])]
        self.reply(
            200, {"id": name, "modelId": name, "sha": number, "private": found.private, "siblings": files, "tags": []}
        )

    def tree(self, token: str | None, body: bytes, name: str, revision: str, path: str | None = None) -> None:
        found = self.repository(token, name)
        files = found.commits[self.revision(found, revision)]
        inside = {p: number for p, number in files.items() if p.startswith(f"{path}/" if path else "")}
        if path and not inside:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        self.reply(200, [self.entry(p, number) for p, number in sorted(inside.items())])

    def entry(self, path: str, number: str) -> dict[str, Any]:
        content = self.server.get(number)
        about: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LARGE):
            about["lfs"] = {"oid": number, "size": len(content), "pointerSize": 134}
        return about

    def preupload(self, token: str | None, body: bytes, name: str, revision: str) -> None:
        found = self.repository(token, name)
        if "create_pr" not in self.path:
            self.writer(token, name)
        files, tree = json.loads(body)["files"], found.commits[self.revision(found, revision)]
        answers = []
        for asked in files:
            path, large = asked["path"], asked["path"].endswith(LARGE)
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if path in tree:
                answers[-1]["oid"] = tree[path] if large else git_hash(self.server.get(tree[path]))
        self.reply(200, {"files": answers})

    def batch(self, token: str | None, body: bytes, name: str) -> None:
        self.repository(token, name)
        objects = json.loads(body)["objects"]
        for asked in objects:
            if not (self.server.folder / asked["oid"]).exists():
                asked["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"},
                    "verify": {"href": f"{self.server.url}/verify/{name}"},
                }
        self.reply(200, {"transfer": "basic", "objects": objects})

    def keep(self, token: str | None, body: bytes, number: str) -> None:
        if hashlib.sha256(body).hexdigest() != number:
            raise RefusedError(400, "the content is another")
        self.server.put(body)
        self.reply(200)

    def verify(self, token: str | None, body: bytes, name: str) -> None:
        asked = json.loads(body)
        if not (self.server.folder / asked["oid"]).exists():
            raise RefusedError(404, "no such object")
        self.reply(200, {})

    def commit(self, token: str | None, body: bytes, name: str, revision: str) -> None:
        found, pr = self.repository(token, name), "create_pr" in self.path
        if not pr:
            self.writer(token, name)
        tree = dict(found.commits[self.revision(found, revision)])
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                tree[value["path"]] = self.server.put(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (self.server.folder / value["oid"]).exists():
                    raise RefusedError(400, "no such object")
                tree[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del tree[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
        made = found.commit(f"refs/pr/{number}" if pr else revision, tree, message)
        where = f"{self.server.url}/{name}"
        answer = {"commitUrl": f"{where}/commit/{made}", "commitOid": made, "success": True}
        self.reply(200, answer | ({"pullRequestUrl": f"{where}/discussions/{number}"} if pr else {}))

    def branch(self, token: str | None, body: bytes, name: str, revision: str) -> None:
        self.writer(token, name)
        found = self.repository(token, name)
        if revision in found.refs:
            raise RefusedError(409, "Reference already exists")
        found.refs[revision] = found.refs["main"]
        self.reply(200, {})

    def file(self, token: str | None, body: bytes, name: str, revision: str, path: str) -> None:
        found = self.repository(token, name)
        number = self.revision(found, revision)
        if path not in found.commits[number]:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        content = found.commits[number][path]
        data = self.server.get(content)
        tag = content if path.endswith(LARGE) else git_hash(data)
        self.reply(200, data, {"X-Repo-Commit": number, "ETag": f'"{tag}"'})


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
SPACE = "(?P<space>(spaces|datasets)/)?"
MODELS = f"/api/(models|(?P<space>spaces|datasets))/{NAME}"
ROUTES = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", MODELS, Handler.info),
    ("GET", f"{MODELS}/revision/{REVISION}", Handler.info),
    ("GET", f"{MODELS}/tree/{REVISION}(/(?P<path>.+))?", Handler.tree),
    ("POST", f"{MODELS}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"{MODELS}/commit/{REVISION}", Handler.commit),
    ("POST", f"{MODELS}/branch/{REVISION}", Handler.branch),
    ("POST", rf"/{SPACE}{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<number>\w+)", Handler.keep),
    ("POST", f"/verify/{SPACE}{NAME}", Handler.verify),
    (("GET", "HEAD"), f"/{SPACE}{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.file),
]


def owner(name: str) -> str:
    """Whose it is."""
    return name.removeprefix("spaces/").split("/")[0]


def git_hash(content: bytes) -> str:
    """git's number of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata(content: str) -> dict[str, Any]:
    """The head of a README. Raises ValueError."""
    found = re.match(r"---\n(.*?)\n---", content, re.S)
    if not found:
        raise ValueError("no metadata")
    try:
        return yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error


def space_errors(content: str) -> list[str]:
    """What the Hub would not take in a Space's configuration, after its documentation."""
    try:
        about = metadata(content)
    except ValueError as error:
        return [str(error)]
    colours = "red|yellow|green|blue|indigo|purple|pink|gray"
    patterns = {
        "sdk": "gradio",
        "sdk_version": r"\d+\.\d+\.\d+",
        "python_version": r"3\.\d+",
        "app_file": r"[\w/]+\.py",
    }
    patterns |= {"colorFrom": colours, "colorTo": colours, "short_description": ".{1,60}", "license": r"[a-z0-9.-]+"}
    return [
        f'"{n}" must be a known one' for n, wanted in patterns.items() if not re.fullmatch(wanted, str(about.get(n)))
    ]


def card_errors(content: str) -> list[str]:
    """What the Hub would not take in a model card's metadata, after its documentation."""
    try:
        about = metadata(content)
    except ValueError as error:
        return [str(error)]
    errors = []
    texts = {
        "license": r"[a-z0-9.-]+",
        "language": r"[a-z]{2,3}",
        "pipeline_tag": r"image-to-text",
        "library_name": r"\w+",
    }
    for name, pattern in texts.items():
        if name in about and not re.fullmatch(pattern, str(about[name])):
            errors.append(f'"{name}" must be a known one')
    for name, pattern in {
        "tags": r".+",
        "datasets": r"[\w./-]+",
        "base_model": r"[\w.-]+/[\w.-]+",
        "metrics": r"\w+",
    }.items():
        if not all(isinstance(value, str) and re.fullmatch(pattern, value) for value in about.get(name, [])):
            errors.append(f'"{name}" must be a list of texts')
    for number, model in enumerate(about.get("model-index", [])):
        place = f'"model-index[{number}]'
        errors += [f'{place}.{name}" is required' for name in ("name", "results") if not model.get(name)]
        for result in model.get("results", []):
            wanted = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'{place}.{part}.{name}" is required' for part, name in wanted if not result[part].get(name)]
            for metric in result["metrics"]:
                if not metric.get("type") or not isinstance(metric.get("value"), int | float):
                    errors.append(f'{place}.metrics" need a type and a value')
    for widget in about.get("widget", []):
        if not str(widget.get("src", "")).startswith("https://"):
            errors.append('"widget.src" must be an address')
    return errors
