"""Half a day of strangers in a few minutes: 32 clients, a tenth of whose requests are hostile, beside 32 honest ones.

ATTACK_MINUTES=10 pytest -m slow tests/captioning/test_attack.py (how long each of the two parts takes; half a minute will do)
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_package, tiny_config
from PIL import Image
from processes import free_port, launch

from model import ImageCaptionModel
from weights.file import MODEL_FILE

pytestmark = needs_package("gradio", "app")

MINUTES = float(os.environ.get("ATTACK_MINUTES", "10"))
CLIENTS = 32


def jpeg(**options) -> bytes:
    """A photograph's worth of noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    Image.fromarray(noise).resize((640, 480)).save(out, "JPEG", **options)
    return out.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes 1,500 times."""
    picture = jpeg(progressive=True, quality=30)
    last = picture.rindex(b"\xff\xda")
    return picture[:last] + picture[last:-2] * 1500 + picture[-2:]


def huge_png() -> bytes:
    """79 megapixels in a quarter of a MiB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    width, height = 8900, 8900
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@dataclass
class Client:
    """One that keeps its connection."""

    port: int
    connection: http.client.HTTPConnection = field(init=False)
    used: float = 0.0

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Status and text."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if time.monotonic() - self.used > 3:  # the page closes what is idle for five seconds
            self.connection.close()
        try:
            self.connection.request(method, path, body, named)
            answer = self.connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except BaseException:
            self.connection.close()
            raise
        finally:
            self.used = time.monotonic()

    def post(self, route: str, sent: object, **headers: str) -> tuple[int, str]:
        """JSON."""
        return self.ask(
            "POST", f"/gradio_api/{route}", json.dumps(sent).encode(), Content_Type="application/json", **headers
        )

    def upload(self, content: bytes, name: str = "a.jpg", **headers: str) -> tuple[int, str]:
        """A file."""
        body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body += content + b"\r\n--x--\r\n"
        return self.ask("POST", "/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x", **headers)

    def caption(self, content: bytes) -> str:
        """What a picture's caption comes as, or its error."""
        status, text = self.upload(content)
        if status != 200:
            return f"upload: {status} {text}"
        file = {"path": json.loads(text)[0], "orig_name": "a.jpg", "meta": {"_type": "gradio.FileData"}}
        status, text = self.post("call/caption", {"data": [file, "", "normal", "safe", 1, 3]})
        return text if status != 200 else self.ask("GET", f"/gradio_api/call/caption/{json.loads(text)['event_id']}")[1]

    def cut_upload(self) -> None:
        """One that ends in the middle."""
        head = (
            "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        )
        part = '--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{head}Content-Length: 9999999\r\n\r\n{part}".encode() + bytes(1 << 20))


def hostile_kinds(honest: bytes) -> dict[str, Callable[[Client], object]]:
    """What strangers send, by name."""
    scans, huge, large = many_scans(), huge_png(), os.urandom(21 << 20)
    file = {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}}
    bad = [b"{", b"null", b"[" * 50_000, b'{"data": null}']
    kinds: dict[str, Callable[[Client], object]] = {
        "bad JSON": lambda client: client.ask("POST", "/gradio_api/queue/join", random.choice(bad)),
        "null": lambda client: client.post("run/caption", {"data": [None] * 6}),
        "wrong types": lambda client: client.post("run/caption", {"data": [[], {}, 1, "x", "y", [[]]]}),
        "an address as a file": lambda client: client.post("run/caption", {"data": [file] * 6}),
        "a foreign name": lambda client: client.ask("GET", "/config", Host="evil.example"),
        "a foreign site": lambda client: client.upload(honest, Origin="https://evil.example"),
        "too large": lambda client: client.upload(large),
        "many scans": lambda client: client.caption(scans),
        "79 megapixels": lambda client: client.caption(huge),
        "cut short": lambda client: client.caption(honest[: len(honest) // 3]),
        "events by number": lambda client: client.post("run/predict", {"data": [], "fn_index": random.randrange(9)}),
        "an upload that ends": Client.cut_upload,
        "huge headers": lambda client: client.ask("GET", "/config", X_Huge="a" * 200_000),
        "results not fetched": lambda client: client.post("queue/join", {"data": [None, "", "normal", "safe", 1, 3], "fn_index": 4, "session_hash": os.urandom(9).hex()}),
    }  # fmt: skip
    return kinds


def resident(pid: int) -> dict[int, float]:
    """MiB of a process and its children, memory that several share divided among them."""
    held: dict[int, float] = {}
    with contextlib.suppress(OSError, IndexError):
        held[pid] = int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0]) / 1024
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        for child in [child for task in tasks for child in (task / "children").read_text().split()]:
            held |= resident(int(child))
    return held


def part(
    port: int, pictures: list[bytes], kinds: dict, seconds: float, think: float
) -> tuple[list[float], list[str], dict]:
    """Seconds of each honest caption, the honest errors, and how many of each hostile kind were sent."""
    took: list[float] = []
    errors: list[str] = []
    sent = dict.fromkeys(kinds, 0)
    until = time.monotonic() + seconds

    def one(number: int) -> None:
        draw, client, stranger = random.Random(number), Client(port), Client(port)
        time.sleep(draw.random() * think)
        while time.monotonic() < until:
            if kinds and draw.random() < 0.1:
                kind = draw.choice(list(kinds))
                sent[kind] += 1
                with contextlib.suppress(OSError, http.client.HTTPException):  # refused in the middle
                    kinds[kind](stranger)
            else:
                started = time.monotonic()
                try:
                    said = client.caption(draw.choice(pictures))
                except (OSError, http.client.HTTPException) as error:
                    said = repr(error)
                took.append(time.monotonic() - started)
                if "event: complete" not in said:
                    errors.append(said[:300])
            pause = draw.expovariate(1 / think) if think else 0.0
            time.sleep(max(0.0, min(pause, until - time.monotonic())))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(CLIENTS if think else 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took, errors, sent


@pytest.mark.slow
def test_honest_clients_beside_hostile_ones(scenes_tokenizer, tmp_path, capsys):
    """Prints what honest clients wait, quiet and beside hostile ones, and what the page holds; the clients share the
    machine's cores with the page, so each thinks between two requests for as long as makes the quiet load half of what
    the page can do."""
    torch.manual_seed(0)
    config = tiny_config(image_size=32, resize_size=40, max_length=40, vocab_size=len(scenes_tokenizer))
    model = ImageCaptionModel(config).eval()
    model.tokenizer = scenes_tokenizer
    model.save_file(tmp_path / MODEL_FILE)
    pictures = [jpeg(quality=quality) for quality in range(60, 90, 3)]
    kinds = hostile_kinds(pictures[0])
    port, uploads = free_port(), tmp_path / "uploads"
    command = ("app.py", "--model", tmp_path / MODEL_FILE, "--port", port, "--precision", "fp32")
    log = (tmp_path / "log").open("wb")
    with launch(*command, stderr=log, environment={"GRADIO_TEMP_DIR": uploads}) as server:
        assert server.stdout.readline().startswith("model") and server.stdout.readline().startswith("page")
        memory, disk, ended = [], [], threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                held = resident(server.pid)
                memory.append(held if server.pid in held else memory[-1])
                with contextlib.suppress(OSError):
                    disk.append(sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file()))

        try:
            threading.Thread(target=watch, daemon=True).start()
            part(port, pictures, {}, 4, 0)  # what the first requests alone need
            warm, _, _ = part(port, pictures, {}, 8, 0)
            think = 2 * CLIENTS * 8 / len(warm)
            quiet, quiet_errors, _ = part(port, pictures, {}, 60 * MINUTES, think)
            start = len(memory)
            took, errors, sent = part(port, pictures, kinds, 60 * MINUTES, think)
        finally:
            ended.set()
            server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130 and not list(uploads.iterdir())
    said = (tmp_path / "log").read_text()
    (low, high), (before, after) = np.percentile(quiet, [50, 99]), np.percentile(took, [50, 99])
    quarters = {
        name: [float(np.median(part)) for part in np.array_split(values, 4)]
        for name, values in {
            "all": [sum(held.values()) for held in memory[start:]],
            "the page": [held[server.pid] for held in memory[start:]],
        }.items()
    }
    most = max(sum(held.values()) for held in memory[start:])
    with capsys.disabled():
        print(f"\n{len(warm) / 8:.1f} captions/s at most; each client thinks {think:.1f} s: half of that, quiet")
        print(f"quiet          {len(quiet)} honest, {len(quiet_errors)} errors, p50 {low:.2f} s, p99 {high:.2f} s")
        print(f"under attack   {len(took)} honest, {len(errors)} errors, p50 {before:.2f} s, p99 {after:.2f} s; {sent}")
        for name, medians in quarters.items():
            print(f"memory, {name:8} {' '.join(f'{value:.0f}' for value in medians)} MiB, the medians of four quarters")
        print(f"               {most:.0f} MiB at most; before the attack {sum(memory[start].values()):.0f}")
        print(f"uploads        {max(disk) / 2**20:.0f} MiB at most; the log has {len(said):,} characters")
        for error in sorted(set(errors))[:5]:
            print(f"               {error}")
    assert not quiet_errors and not errors
    assert "Traceback" not in said and max(disk) < 5 << 30
    assert quarters["all"][-1] < 1.1 * quarters["all"][0]
