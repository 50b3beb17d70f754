"""Pictures decoded in processes of their own: the same pixels, and an end to what takes too long or too much."""

from __future__ import annotations

import io
import struct
import threading
import time

import pytest
import torch
from conftest import tiny_config
from PIL import Image

from captioning.decoder import BusyError, PictureDecoder
from config import UserError
from data.pictures import prepare_picture

QOI = b"qoif" + struct.pack(">IIBB", 4000, 4000, 3, 0) + b"\x40" * 16_000_000  # which Pillow decodes in Python


def jpeg(**options) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((1200, 900), 60).convert("RGB").save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def decoder():
    decoder = PictureDecoder(workers=2, seconds=60)
    yield decoder
    decoder.close()


def test_the_same_pixels_and_a_preview(decoder, tmp_path):
    config, content = tiny_config(), jpeg()
    pixels = decoder.prepare(content, config, "p")
    assert torch.equal(pixels, prepare_picture(content, config)) and pixels.dtype == torch.uint8
    (tmp_path / "p.jpg").write_bytes(content)
    assert torch.equal(decoder.prepare(str(tmp_path / "p.jpg"), config, "p"), pixels)
    with Image.open(io.BytesIO(decoder.preview(content))) as shown:
        assert shown.format == "JPEG" and shown.size == (720, 540)


def test_what_cannot_be_read_is_said_and_the_process_goes_on(decoder, tmp_path):
    with pytest.raises(UserError, match=r"^p.jpg: not a picture that can be read \(damaged"):
        decoder.prepare(b"no picture", tiny_config(), "p.jpg")
    with pytest.raises(UserError, match=r"no such file$"):
        decoder.prepare(str(tmp_path / "x.jpg"), tiny_config(), "x.jpg")
    assert decoder.replaced == 0


def test_a_picture_that_takes_too_long_is_stopped(decoder):
    """It kept a thread of the page busy for as long as it liked."""
    content, config, before = jpeg(), tiny_config(), decoder.replaced
    decoder.prepare(content, config, "p")
    decoder.seconds = 0.5
    process = decoder.idle.queue[-1].process
    with pytest.raises(UserError, match=r"^slow\\n.qoi: took longer than 0.5 s to decode: send a smaller one$"):
        decoder.prepare(QOI, config, "slow\n.qoi")
    decoder.seconds = 60
    assert decoder.prepare(content, config, "p").shape == (3, 16, 16)
    process.join(10)
    assert not process.is_alive() and decoder.replaced == before + 2 and decoder.idle.qsize() == 2


@pytest.mark.skipif("sys.platform == 'win32'")
def test_what_takes_more_than_a_moment_keeps_nobody_waiting(decoder):
    """Two pictures of 79 megapixels, 1.6 s each, had both processes, and everybody else waited for them."""
    decoder.room, slow, ends = threading.BoundedSemaphore(1), decoder.patient.queue[0], []

    def ask() -> None:
        with pytest.raises(UserError, match="its decoder ended") as error:
            decoder.prepare(QOI, tiny_config(), "slow.qoi")
        ends.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not decoder.patient.empty():
        time.sleep(0.01)
    assert all(decoder.prepare(jpeg(), tiny_config(), "p").shape == (3, 16, 16) for _ in range(4))
    with pytest.raises(BusyError, match=r"^slow.qoi: busy with large pictures: try again"):
        decoder.prepare(QOI, tiny_config(), "slow.qoi")
    assert decoder.patient.empty() and not ends
    slow.process.kill()
    thread.join()
    assert ends and decoder.patient.qsize() == 1 and decoder.idle.qsize() == 2


@pytest.mark.skipif("sys.platform != 'linux'")
def test_a_picture_that_takes_too_much_memory_is_refused():
    """Eight clients with 79 megapixels each took 4.3 GiB."""
    file = io.BytesIO()
    Image.new("RGB", (6000, 6000)).save(file, "PNG")
    decoder = PictureDecoder(workers=1, seconds=60, memory=100 << 20)
    with pytest.raises(UserError, match=r"^p: .*memory|^p: its decoder ended"):
        decoder.prepare(file.getvalue(), tiny_config(), "p")
    assert decoder.prepare(jpeg(), tiny_config(), "p").shape == (3, 16, 16)
    decoder.close()


def test_a_process_that_is_killed_is_replaced(decoder):
    before = decoder.replaced
    worker = decoder.idle.queue[-1]
    worker.process.kill()
    worker.process.join()
    with pytest.raises(UserError, match="its decoder ended"):  # whoever comes then hears of it
        decoder.prepare(jpeg(), tiny_config(), "p")
    assert decoder.replaced == before + 1
    assert decoder.prepare(jpeg(), tiny_config(), "p").shape == (3, 16, 16)


def test_more_askers_than_processes_wait(decoder):
    """Never are more pictures decoded at a time than there are processes."""
    config, content, done, most = tiny_config(), jpeg(), [], 0

    def ask() -> None:
        done.append(decoder.prepare(content, config, "p"))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, 2 - decoder.idle.qsize())
        time.sleep(0.001)
    assert len(done) == 12 and all(torch.equal(pixels, done[0]) for pixels in done)
    assert most <= 2 and decoder.idle.qsize() == 2
