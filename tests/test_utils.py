"""Device and precision chosen with a reason, files that are whole or absent, the log, one-line errors."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import finished

import utils
from config import UserError
from training.tracking import MetricLog
from utils import (
    StopSignal,
    atomic,
    choose_device,
    choose_precision,
    counted,
    new_folder,
    put_in_place,
    read_log,
    run_script,
    writable_directory,
    write_text,
)
from weights.file import write_tensors

CPU = torch.device("cpu")


@pytest.mark.parametrize(("half", "expected"), [(300.0, torch.bfloat16), (110.0, torch.float32), (0.0, torch.float32)])
def test_precision_on_a_cpu_follows_the_measurement(monkeypatch, half, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(utils, "matmul_rate", lambda device, dtype: half * 1e9 if dtype == torch.bfloat16 else 100e9)
    dtype, reason = choose_precision("auto", CPU)
    assert dtype == expected and f"bf16 {half:.0f}, fp32 100 GFLOP/s" in reason


@pytest.mark.parametrize(("mps", "expected"), [(900.0, "mps"), (50.0, "cpu")])
def test_apple_gpus_are_taken_only_where_they_are_faster(monkeypatch, mps, expected):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(utils, "matmul_rate", lambda device, dtype, size: (mps if device == "mps" else 100.0) * 1e9)
    device, reason = choose_device("auto")
    assert device.type == expected and f"mps {mps:.0f}" in reason


def test_the_rate_is_measured():
    rate = utils.matmul_rate("cpu", torch.float32, 256)
    assert 1e8 < rate < 1e14
    assert utils.matmul_rate("cpu", torch.float32, 256) == rate  # once a process


def test_the_start_of_the_threads_is_not_the_rate(monkeypatch):
    """On a busy machine the first product took 40 ms, no other was timed, and fp32 was said to compute 0 GFLOP/s: bf16
    was chosen, even where the CPU emulates it."""
    clock = itertools.chain([0.0, 0.08], itertools.count(1.0, 1e-3))
    monkeypatch.setattr(utils, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert utils.timed_product("cpu", torch.float32, 8) == pytest.approx(5e-4)


def test_a_slow_precision_is_found_out_by_a_small_product(monkeypatch):
    """Every process that captions spent 6 seconds on multiplying large matrices in a bf16 that the CPU emulates."""
    products = []

    def product(device: str, dtype: torch.dtype, size: int) -> float:
        products.append(size)
        return 2 * size**3 / 1e9  # seconds at 1 GFLOP/s

    monkeypatch.setattr(utils, "timed_product", product)
    assert utils.matmul_rate.__wrapped__("cpu", torch.bfloat16) == pytest.approx(1e9) and products == [128]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert choose_precision("auto", CPU) == (torch.float32, "this CPU has no fast bf16, only AVX2")
    assert products == [128]


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    """GPT-2's tokenizer was asked for file by file with five retries each: four minutes without a network, and then
    vocab.json was said to be missing. So was everything else that goes by a name of the Hub."""
    from huggingface_hub import constants

    from data.sources import load_tables
    from scoring.clip import clip_scores
    from weights.file import find_model_file, gpt2_tokenizer
    from weights.huggingface import find_folder

    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in {"ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(utils, "HUB_SECONDS", 0.2)
        silent.setblocking(False)
        picture = Image.new("RGB", (16, 16))
        for ask in (
            gpt2_tokenizer,
            lambda: find_model_file("ann/model"),
            lambda: find_folder("ann/model", ["config.json"]),
            lambda: load_tables("ann/pictures", "."),
            lambda: clip_scores(["a cat"], [picture], None, "ann/clip"),
        ):
            with pytest.raises(UserError, match="timed out") as raised:
                ask()
            assert "\n" not in str(raised.value)
            asked = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    with silent.accept()[0] as connection:
                        asked.append(connection.recv(100).split()[1])
            of_names = [path for path in asked if re.match(rb"/api/(models|datasets)/", path)]
            assert len(of_names) == 1 and len(asked) <= 2, asked  # the client itself may say once who is asking


def test_fp16_is_the_default_on_cuda_and_refused_on_a_cpu():
    assert choose_precision("auto", torch.device("cuda"))[0] == torch.float16
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cuda is not available"):
            choose_device("cuda")


def test_another_runs_model_is_kept(tmp_path):
    for name, text in {"a": "1", "b": "2", "model.safetensors": "0"}.items():
        (tmp_path / name).write_text(text)
    target = tmp_path / "model.safetensors"
    assert put_in_place(tmp_path / "a", target) == tmp_path / "model.previous.safetensors"
    assert target.read_text() == "1" and (tmp_path / "model.previous.safetensors").read_text() == "0"
    assert put_in_place(tmp_path / "a", target) is None  # the same run again moves nothing
    assert (tmp_path / "model.previous.safetensors").read_text() == "0"


def test_two_that_write_one_file_never_mix(tmp_path):
    """All wrote to one name, .metrics.json.unfinished, before it became metrics.json: two evaluations of a run left a
    mixture, or one took the other's half for its own."""
    texts = [letter * 200_000 for letter in "ab"]
    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write_text, tmp_path / "metrics.json", texts[n % 2]) for n in range(40)]
        while not all(one.done() for one in writing):
            assert not (tmp_path / "metrics.json").exists() or (tmp_path / "metrics.json").read_text() in texts
    assert [one.result() for one in writing] == [None] * 40 and len([*tmp_path.iterdir()]) == 1


def test_a_link_at_an_unfinished_name_is_not_followed(tmp_path, monkeypatch):
    """In a folder where others may write, a link planted at the name that was to be written to had its target lost."""
    (tmp_path / "diary").write_text("mine")
    (tmp_path / ".metrics.json.unfinished").symlink_to("diary")
    write_text(tmp_path / "metrics.json", "{}")
    monkeypatch.setattr(utils, "unfinished_name", lambda path: path.with_name(f".{path.name}.unfinished"))  # guessed
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "metrics.json", "new")
    assert (tmp_path / "diary").read_text() == "mine" and (tmp_path / "metrics.json").read_text() == "{}"


def test_files_are_whole_and_for_others_to_read(tmp_path):
    """A model's file could be read by its owner only: safetensors 0.8 makes them so, and training left it at that."""
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.json", "{}")
        write_tensors({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    with pytest.raises(OSError, match="full"), atomic(tmp_path / "a.json") as unfinished:
        unfinished.write_text("ha")
        raise OSError("the disk is full")
    assert (tmp_path / "a.json").read_text() == "{}" and len([*tmp_path.iterdir()]) == 2


def test_what_killed_processes_left_of_a_folder_goes(tmp_path):
    """But not what another one is just writing."""
    old, busy = (tmp_path / f".model.{name}.unfinished" for name in ("0123abcd", "4567abcd"))
    for folder in (old, busy):
        folder.mkdir()
    os.utime(old, (1e9, 1e9))
    with new_folder(tmp_path / "model", ["a"], "a") as folder:
        (folder / "a").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"model", busy.name}


def test_the_log_survives_a_crash_and_forgets_what_will_be_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, 0)
    for step in (10, 20, 30):
        log.write(step, loss=1.0)
    log.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [line["step"] for line in read_log(path)] == [10, 20, 30]
    MetricLog(path, 20).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(tmp_path):
    """A half-written last line once ran into the first line of the resumed run."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20, "lo')
    log = MetricLog(path, 10)
    log.write(20, loss=1.0)
    log.close()
    assert [line["step"] for line in read_log(path)] == [10, 20]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --output-dir"):
        writable_directory(tmp_path / "file" / "inside")


FROM_WORKER = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  ...\nconfig.UserError: {}\n"


@pytest.mark.parametrize("said", ["{}", FROM_WORKER])
def test_names_of_files_in_errors_are_escaped(capsys, said):
    """Of a message with a line break in a name only the end was said, and what colours a terminal reached it."""
    with pytest.raises(SystemExit):
        run_script(partial(raised, UserError(said.format("a\nb\x1b[31m.txt: mend it"))))
    assert capsys.readouterr().err == "error: a\\nb\\x1b[31m.txt: mend it\n"


def raised(error):
    raise error


@pytest.mark.parametrize(("error", "code"), [(UserError("what: do this"), 2), (KeyboardInterrupt(), 130)])
def test_scripts_end_with_one_line(capsys, error, code):
    with pytest.raises(SystemExit) as end:
        run_script(partial(raised, error))
    assert end.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_signal_that_comes_twice_at_once_is_one_wish():
    """Ctrl-C reaches torchrun and its processes, and torchrun passes it on: they ended at once, and saved nothing."""
    stop = StopSignal(grace=60.0)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.received == signal.SIGINT and stop.exit_code == 130
    finally:
        stop.restore()
    stop = StopSignal()
    try:
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
    finally:
        stop.restore()


def test_one_of_something_is_no_plural():
    assert counted(1, "pictures without a caption") == "1 picture without a caption"
    assert counted(1, "empty captions") == "1 empty caption" and counted(1200, "pictures") == "1,200 pictures"


def test_what_libraries_tell_programmers_is_hidden(tmp_path):
    """torch's FutureWarnings and transformers' "will result in indexing errors" reached people; --debug shows them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import warnings\nfrom utils import run_script\n"
        "def main():\n"
        "    warnings.warn('old', FutureWarning)\n"
        "    from weights.file import gpt2_tokenizer\n"
        "    from transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        "    from tokenizers import Tokenizer, models\n"
        "    made = Tokenizer(models.WordLevel({'a': 0, 'b': 1}, unk_token='b'))\n"
        "    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=1).encode('abc abc')\n"
        "    from transformers.utils import logging\n"
        "    logging.get_logger('transformers.x').warning('for programmers')\n"
        "    print('done')\n"
        "run_script(main)\n"
    )
    environment = {"PYTHONPATH": ROOT}
    done = finished(script, environment=environment)
    assert (done.stdout, done.stderr) == ("done\n", "")
    assert "FutureWarning" in finished(script, "--debug", environment=environment).stderr
