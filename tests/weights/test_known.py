"""Short names of public captioners: the real scripts and client of the Hub, with tiny models of the same form."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from hub import running_hub
from PIL import Image
from processes import finished, free_port, launch
from safetensors.torch import load_file, save_file
from test_convert import make_theirs, spread, tokenizer  # noqa: F401

from captioning.models import is_model
from config import UserError
from model import ImageCaptionModel
from weights.known import KNOWN

GREEDY = ("--num-beams", 1, "--max-length", 12, "--precision", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def safe(tmp_path_factory, tokenizer) -> Path:  # noqa: F811
    """A folder like distilvit's: weights in safetensors. Single letters are unlikely, so that captions have words."""
    folder = tmp_path_factory.mktemp("safe")
    model = make_theirs(folder, tokenizer)
    torch.manual_seed(9)  # with which a greedy caption does not repeat one word
    spread(model)
    with torch.no_grad():
        model.decoder.transformer.wte.weight[:256] *= 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pickled(tmp_path_factory, safe) -> Path:
    """A folder like vit-gpt2's: weights in a pickle, and none in safetensors."""
    folder = tmp_path_factory.mktemp("pickled")
    shutil.copytree(safe, folder, dirs_exist_ok=True)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def hub(tmp_path, safe, pickled):
    with running_hub(tmp_path / "hub") as running:
        for name, folder in (("vit-gpt2", pickled), ("distilvit", safe)):
            running.add(KNOWN[name].repository, {path.name: path.read_bytes() for path in folder.iterdir()})
        yield running


def stop(hub) -> None:
    """From now on connections are refused."""
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def user(tmp_path, hub) -> dict[str, object]:
    """A user's folder with a picture, and the environment of the user's commands."""
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    known = dict.fromkeys(name for name in os.environ if name.startswith("HF_"))
    known |= {"HF_HOME": tmp_path / "home", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return known | {"VIT_GPT2_CACHE": tmp_path / "cache", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def kept(folder: Path) -> list[str]:
    """The files in the cache, without the locks."""
    return [path.name for path in (folder / "cache").glob("*") if path.suffix != ".lock"]


def caption(folder: Path, environment, *arguments: object, code: int = 0) -> tuple[str, str]:
    """What example_usage.py prints, and what it says on standard error."""
    command = ("example_usage.py", "photo.png", *arguments, *GREEDY)
    done = finished(*command, environment=environment, cwd=folder, code=code)
    return done.stdout.strip(), done.stderr


def their_caption(folder: Path, picture: Path) -> str:
    """The greedy caption by transformers itself."""
    model = transformers.VisionEncoderDecoderModel.from_pretrained(folder).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    pixels = processor(Image.open(picture), return_tensors="pt").pixel_values
    end = words.eos_token_id
    ids = model.generate(
        pixels, do_sample=False, num_beams=1, max_new_tokens=12, decoder_start_token_id=end, pad_token_id=end
    )
    return words.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_it_is_downloaded_and_converted_once(tmp_path, hub, user, safe):
    """The first command says what it downloads; the second one needs no network. The caption is transformers' own."""
    wanted = their_caption(safe, tmp_path / "photo.png")
    said, notes = caption(tmp_path, user, "--model", "distilvit")
    assert said == wanted and len(set(wanted.split())) > 3
    (line,) = [line for line in notes.splitlines() if "downloading" in line]
    assert line.startswith("distilvit: downloading Mozilla/distilvit (1 MB, licence Apache-2.0), once")
    (file,) = kept(tmp_path)
    assert line.endswith(f"{tmp_path / 'cache' / file}")
    stop(hub)
    before = len(hub.requests)
    again, notes = caption(tmp_path, user | {"HF_HOME": tmp_path / "empty"}, "distilvit")  # also as last argument
    assert (again, notes) == (wanted, "") and len(hub.requests) == before


def test_a_pickle_only_where_it_is_allowed(tmp_path, hub, user, pickled, safe):
    said, notes = caption(tmp_path, user, "--model", "vit-gpt2", code=2)
    assert said == "" and notes.startswith("error: vit-gpt2: the weights of nlpconnect/") and notes.count("\n") == 1
    assert "--allow-pickle" in notes and kept(tmp_path) == []
    assert not hub.lines("GET .*(pytorch_model|vocab|config.json)")  # nothing was downloaded
    said, notes = caption(tmp_path, user, "--model", "vit-gpt2", "--allow-pickle")
    assert said == their_caption(safe, tmp_path / "photo.png")  # the same weights
    assert "vit-gpt2: downloading nlpconnect/vit-gpt2-image-captioning (1 MB, licence Apache-2.0)" in notes
    stop(hub)
    assert caption(tmp_path, user, "--model", "vit-gpt2") == (said, "")


@pytest.mark.slow
def test_a_pickle_by_its_full_name(tmp_path, user, safe):
    """The flag is for every model of transformers, not only for those with short names."""
    name = KNOWN["vit-gpt2"].repository
    assert "--allow-pickle" in caption(tmp_path, user, name, code=2)[1]
    assert caption(tmp_path, user, name, "--allow-pickle")[0] == their_caption(safe, tmp_path / "photo.png")


@pytest.mark.slow
def test_other_scripts_know_the_names(tmp_path, user, scenes_dir):
    """evaluate.py, convert.py, and caption_image; app.py is below."""
    flags = ("--data-dir", scenes_dir, "--allow-pickle", "--device", "cpu", "--output-dir", "evaluation")
    finished("evaluate.py", "vit-gpt2", *flags, environment=user, cwd=tmp_path)
    assert "bleu_4" in json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    done = finished("convert.py", "to-transformers", "vit-gpt2", "out", environment=user, cwd=tmp_path)
    assert "written to out" in done.stdout
    code = "from example_usage import caption_image; "
    code += "print(caption_image('photo.png', 'vit-gpt2', 'cpu', 12, do_sample=False))"
    python = user | {"PYTHONPATH": ROOT}
    done = finished("-c", code, environment=python, cwd=tmp_path)
    assert done.stdout.strip() == caption(tmp_path, user, "vit-gpt2")[0]


@pytest.mark.slow
def test_the_page_knows_the_names(tmp_path, user):
    pytest.importorskip("gradio", reason="gradio is of requirements/app.txt")
    command = ("app.py", "--model", "vit-gpt2", "--allow-pickle", "--port", free_port(), "--device", "cpu")
    process = launch(*command, environment=user | {"PYTHONUNBUFFERED": "1"}, cwd=tmp_path)
    line = next((line for line in process.stdout if line.startswith(("model", "page"))), "")
    process.send_signal(signal.SIGTERM)
    _, notes = process.communicate(timeout=120)
    assert line.startswith("model       vit-gpt2, on cpu"), notes
    assert len(kept(tmp_path)) == 1


def test_without_a_network_one_line_says_what_is_missing(tmp_path, hub, user):
    stop(hub)
    for environment in (user, user | {"HF_HUB_OFFLINE": "1"}):
        said, notes = caption(tmp_path, environment, "--model", "distilvit", code=2)
        assert said == "" and notes.count("\n") == 1
        assert notes.startswith("error: distilvit: not downloaded yet, and Mozilla/distilvit is not available")
        assert "run the command once with a network" in notes
    assert kept(tmp_path) == []


def test_what_the_hubs_client_has_is_converted_without_a_network(tmp_path, hub, user):
    code = "from huggingface_hub import snapshot_download; snapshot_download('Mozilla/distilvit')"
    finished("-c", code, environment=user)
    stop(hub)
    said, notes = caption(tmp_path, user, "distilvit")
    assert said and "downloading" not in notes and len(kept(tmp_path)) == 1


def test_a_failed_conversion_leaves_nothing(tmp_path, user):
    """The weights do not fit on the disk (here: files have a limit), or the process is killed while it writes them."""
    code = "from huggingface_hub import snapshot_download; snapshot_download('Mozilla/distilvit')"
    finished("-c", code, environment=user)
    limited = 'ulimit -f 50; exec "$@"'  # KB; the model has 300
    command = ("example_usage.py", "photo.png", "distilvit", *GREEDY)
    done = finished(*command, environment=user, cwd=tmp_path, shell=limited, code=2)
    assert re.fullmatch(r"error: .* cannot be written \(.*\): set VIT_GPT2_CACHE .*", done.stderr.splitlines()[-1])
    assert kept(tmp_path) == []
    killed = "import os, signal, sys, utils\n"
    killed += "utils.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
    killed += "from weights.known import converted\nconverted('distilvit')"
    finished("-c", killed, environment=user | {"PYTHONPATH": ROOT}, code=-signal.SIGKILL)
    (left,) = kept(tmp_path)
    assert left.endswith(".unfinished")
    assert caption(tmp_path, user, "distilvit")[0]
    (file,) = kept(tmp_path)
    assert file.endswith(".safetensors")  # and what was left is gone


def test_bad_weights_are_not_kept(tmp_path, hub, user, safe):
    weights = load_file(safe / "model.safetensors")
    weights["encoder.layernorm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "bad.safetensors", metadata={"format": "pt"})
    files = {path.name: path.read_bytes() for path in safe.iterdir()}
    hub.add("Mozilla/distilvit", files | {"model.safetensors": (tmp_path / "bad.safetensors").read_bytes()})
    _, notes = caption(tmp_path, user, "distilvit", code=2)
    assert "contains NaN or infinity" in notes and kept(tmp_path) == []


def test_two_processes_download_it_once(tmp_path, hub, user):
    command = ("example_usage.py", "photo.png", "distilvit", *GREEDY)
    both = [launch(*command, environment=user, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert said[0][0] == said[1][0] != ""
    assert sum("downloading" in notes for _, notes in said) == 1
    assert len(hub.lines("GET .*/model.safetensors")) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, user):
    (tmp_path / "file").write_text("")
    _, notes = caption(tmp_path, user | {"VIT_GPT2_CACHE": tmp_path / "file/cache"}, "distilvit", code=2)
    assert notes.count("\n") == 1 and "VIT_GPT2_CACHE" in notes


def test_unknown_short_names(tmp_path, monkeypatch):
    """The error names the known ones, for what looks like a short name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"vitgpt2: no such model file or folder, .* vit-gpt2 .* distilvit"):
        ImageCaptionModel.from_pretrained("vitgpt2")
    for name in ("absent.safetensors", "a/b/c", "./vit-gpt2"):
        with pytest.raises(UserError, match="no such model file or folder: train one"):
            ImageCaptionModel.from_pretrained(name)
    assert is_model("vit-gpt2") and is_model("distilvit") and not is_model("vitgpt2")


def test_a_path_comes_before_a_short_name(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained(tmp_path / "vit-gpt2")
    assert ImageCaptionModel.from_pretrained("vit-gpt2").config == tiny_model.config
    (tmp_path / "distilvit").mkdir()  # a folder of pictures
    assert not is_model("distilvit")


def test_the_page_about_captioning_has_the_table():
    text = (ROOT / "docs" / "captioning.md").read_text(encoding="utf-8")
    for name, known in KNOWN.items():
        link = f"[{known.repository}](https://huggingface.co/{known.repository})"
        assert f"| `{name}` | {link} | {known.licence} | {known.size} | {known.good_for}" in text
