"""Publishing, by the real scripts as processes and the Hub's real client, against a small Hub on loopback."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config, write_bases
from hub import Hub, running_hub
from huggingface_hub import ModelCard, SpaceCard, constants
from PIL import Image
from processes import SECONDS, free_port, launch, surroundings
from tiny import tiny_flags

import upload_to_hf
from auto_upload import AutoConfig
from config import UserError
from data.pictures import prepare_picture
from example_usage import caption_image
from model import ImageCaptionModel
from publishing import hub as publish
from publishing.card import HUB
from publishing.hub import Stage, UploadConfig
from publishing.space import write_space
from training.checkpoint import save_checkpoint
from weights import adapters

MODEL = "vit-gpt2-captioning.safetensors"
CANARY = "hf_canaryCANARYcanary0123456789"

STARTED: list[subprocess.Popen[str]] = []


def environment(hub: Hub | None, home: Path, token: str | None) -> dict[str, object]:
    """What changes for a process: this Hub, an empty cache, a token or none."""
    known: dict[str, object] = dict.fromkeys(name for name in os.environ if name.startswith(("HF_", "PYTHON")))
    known |= {"HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "HF_TOKEN": token}
    return known | {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9"}


def start(hub: Hub | None, cwd: Path, *arguments: str | Path, token: str | None = CANARY) -> subprocess.Popen[str]:
    """A script as a process; `-I` and what follows are Python's own arguments."""
    own = environment(hub, cwd / "home", token)
    STARTED.append(launch(*arguments, cwd=cwd, environment=own, stdin=subprocess.DEVNULL))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def leave_nothing_running():
    """A watcher would wait for its Hub for ever."""
    yield
    for process in STARTED:
        process.kill()
    STARTED.clear()


def script(hub: Hub | None, cwd: Path, *arguments: str | Path, token: str | None = CANARY, code: int = 0) -> str:
    """Runs one; returns what it printed, or its standard error when it is meant to fail. It goes to a log as well."""
    process = start(hub, cwd, *arguments, token=token)
    output, errors = process.communicate(timeout=SECONDS)
    with open(cwd / "log.txt", "a") as log:
        log.write(output + errors)
    assert process.returncode == code, output + errors
    return errors if code else output


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path / "hub") as running:
        running.tokens[CANARY] = "ann"
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory, scenes_dir) -> Path:
    """A folder in which a tiny model was trained, with a token in the environment."""
    cwd = tmp_path_factory.mktemp("home")
    arguments = ["--preset", "demo", "--dataset", "coco", "--data-dir", scenes_dir, "--max-steps", "200", *tiny_flags()]
    arguments += ["--precision", "fp32"]  # of a model that has hardly learned, captions hang on the last bits
    arguments += ["--output-dir", "runs/tiny", "--batch-size", "16", "--val-pictures", "0", "--wandb", "offline"]
    script(None, cwd, "main.py", *arguments)
    return cwd


@pytest.fixture(scope="module")
def published(home, tmp_path_factory):
    """A Hub that the model was uploaded to."""
    with running_hub(tmp_path_factory.mktemp("hub")) as running:
        running.tokens[CANARY] = "ann"
        assert f"uploaded to {running.url}/ann/tiny" in script(running, home, "upload_to_hf.py", "ann/tiny")
        yield running


def remote(hub: Hub, name: str = "ann/tiny", revision: str = "main") -> dict[str, str]:
    return {path: number for path, number in hub.repositories[name].tree(revision).items() if path != ".gitattributes"}


def local(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def tiny(folder: Path, scenes_tokenizer, seed: int = 0, **fields) -> Path:
    """A random model's file."""
    torch.manual_seed(seed)
    model = ImageCaptionModel(tiny_config(vocab_size=len(scenes_tokenizer), **fields))
    model.tokenizer = scenes_tokenizer
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_file(folder / MODEL)
    return folder / MODEL


@pytest.fixture
def cwd(tmp_path, scenes_tokenizer) -> Path:
    """A folder with a random model and no run."""
    (tmp_path / "cwd").mkdir()
    tiny(tmp_path / "cwd", scenes_tokenizer)
    return tmp_path / "cwd"


def test_what_is_uploaded_is_what_a_dry_run_writes(home, published):
    """And a dry run asks nothing of the Hub."""
    before = len(published.requests)
    assert "nothing was sent" in script(published, home, "upload_to_hf.py", "ann/tiny", "--dry-run", token=None)
    assert len(published.requests) == before
    expected = local(home / "upload/ann/tiny")
    assert remote(published) == expected and len(expected) > 15
    shutil.rmtree(home / "upload")
    wanted = {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
    }
    wanted |= {"README.md", "run.json", "metrics.json", "example.png", "config.py", "model.py", "decoding/search.py"}
    assert wanted <= set(expected) and "samples.png" not in expected  # of pictures that may not be ours
    assert not published.repositories["ann/tiny"].private
    told = json.loads(published.get(expected["run.json"]))
    assert told["config"]["learning_rate"] == 2e-3 and "output_dir" not in told["config"]


def test_uploading_again_sends_nothing(home, published):
    commits = len(published.repositories["ann/tiny"].commits)
    sent = len(published.lines("^PUT|/commit/|/create"))
    assert "nothing had changed" in script(published, home, "auto_upload.py", "ann/tiny")
    assert len(published.lines("^PUT|/commit/|/create")) == sent
    assert len(published.repositories["ann/tiny"].commits) == commits


def as_a_stranger(hub: Hub, cwd: Path, name: str, model: ImageCaptionModel) -> None:
    """The card's own lines in a clean process give the tokens that the model gave before it was published."""
    readme = hub.get(remote(hub, name)["README.md"]).decode()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "AutoImageProcessor" in block)
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    picture.save(cwd / "photo.jpg", "PNG")  # of the model's size: what a resize rounds would tip close choices
    sequence = model.generate(prepare_picture(cwd / "photo.jpg", model.config)[None], num_beams=3).sequences[0]
    code += "\nimport sys\nassert not [m for m in ('config', 'convert', 'model') if m in sys.modules]\nprint(tokens.tolist())"
    text, tokens = script(hub, cwd, "-I", "-c", code, token=None).removesuffix("\n").rsplit("\n", 1)
    first = 1 if model.config.bridge == "cross_attention" else 0  # transformers' own repeats the start token
    theirs = [token for token in json.loads(tokens)[0][first:] if token != model.config.end_token_id]
    assert theirs == [token for token in sequence.tolist() if token != model.config.end_token_id]
    said = model.tokenizer.decode(sequence, skip_special_tokens=True)  # a pipe makes another line break of a CR
    assert len(theirs) > 2 and text.split() == said.split()


def test_a_stranger_loads_it_with_transformers_alone(home, published, tmp_path):
    as_a_stranger(published, tmp_path, "ann/tiny", ImageCaptionModel.from_pretrained(home / MODEL))


def test_a_model_with_a_prefix_brings_its_code(hub, cwd, tmp_path, scenes_tokenizer):
    """It was refused once. The card's lines have transformers run the code of the repository, which is whole by itself."""
    model = ImageCaptionModel.from_pretrained(tiny(cwd, scenes_tokenizer, bridge="prefix"))
    script(hub, cwd, "upload_to_hf.py", "ann/prefix")
    assert {MODEL, "config.json", "modeling_img2gpt.py", "preprocessor_config.json"} <= set(remote(hub, "ann/prefix"))
    as_a_stranger(hub, tmp_path, "ann/prefix", model)
    assert "nothing had changed" in script(hub, cwd, "upload_to_hf.py", "ann/prefix")
    error = script(hub, cwd, "upload_to_hf.py", "ann/prefix", "--onnx", code=2)
    assert "leave out --onnx" in error and error.count("\n") == 1
    tiny(cwd, scenes_tokenizer)  # another kind of model in its place leaves nothing of the first
    script(hub, cwd, "upload_to_hf.py", "ann/prefix")
    assert not {MODEL, "modeling_img2gpt.py"} & set(remote(hub, "ann/prefix"))


def test_adapters_are_published_as_adapters(hub, scenes_dir, tmp_path, scenes_tokenizer):
    """Trained on models of the Hub, uploaded without them, and merged into them again by whoever loads them."""
    pytest.importorskip("peft", reason="needs requirements/qlora.txt")
    bases = write_bases(tmp_path / "bases", vocab_size=len(scenes_tokenizer), positions=64)
    scenes_tokenizer.backend_tokenizer.model.save(bases["decoder"])
    for folder in bases.values():
        hub.add(f"bob/{Path(folder).name}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    arguments = ["--preset", "img2gpt", "--dataset", "coco", "--data-dir", scenes_dir, "--max-steps", "4", "--lora"]
    arguments += ["--init-encoder", "bob/vit", "--init-decoder", "bob/gpt2", "--image-size", "16"]
    arguments += ["--output-dir", "runs/small", "--precision", "fp32", "--wandb", "off"]
    script(hub, cwd, "main.py", *arguments)
    script(hub, cwd, "evaluate.py", MODEL, "--data-dir", scenes_dir, "--output-dir", "runs/small")  # merged, once more
    script(hub, cwd, "upload_to_hf.py", "ann/adapters")
    found = remote(hub, "ann/adapters")
    assert {MODEL, "weights/adapters.py", "metrics.json"} <= set(found) and "model.safetensors" not in found
    assert found[MODEL] == hashlib.sha256((cwd / MODEL).read_bytes()).hexdigest()
    card = ModelCard(hub.get(found["README.md"]).decode())
    assert card.data.base_model == ["bob/vit", "bob/gpt2"] and card.data.base_model_relation == "adapter"
    assert "AutoModel" not in card.text and "| CIDEr-D |" in card.text and not card.data.library_name
    assert "| lora rank |" in card.text and "null" not in str(card.data)
    code = "import sys; sys.path.insert(0, '.')\n"
    code += (
        "import torch; from model import ImageCaptionModel; model = ImageCaptionModel.from_pretrained('ann/adapters')\n"
    )
    code += "print(model.generate(torch.zeros(1, 3, 16, 16), num_beams=3).sequences.tolist())"
    for path, number in found.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(hub.get(number))
    model = ImageCaptionModel.from_pretrained(cwd / MODEL, tmp_path / "bases")
    expected = model.generate(torch.zeros(1, 3, 16, 16), num_beams=3).sequences.tolist()
    assert json.loads(script(hub, tmp_path, "-I", "-c", code, token=None)) == expected


def test_adapters_for_what_nobody_else_has_are_not_published(hub, upload, cwd):
    """A stranger could do nothing with them."""
    about = {"bases": {"model": "./mine.safetensors"}, "key": "", "scale": 1.0, "quantized": False}
    model = ImageCaptionModel.from_pretrained(cwd / MODEL)
    model.save_file(cwd / "mine.safetensors")
    about["key"] = adapters.fingerprint(model)
    model.adapters = about
    model.save_file(cwd / MODEL)
    with pytest.raises(UserError, match=r"nobody else has: make a merged model \(python convert.py merge"):
        upload("ann/adapters")
    assert not hub.repositories


@pytest.mark.slow
def test_another_language_model_goes_as_it_is(hub, cwd, upload, scenes_tokenizer):
    """transformers has no place for it: one file, which this project loads."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    about = LlamaConfig(vocab_size=len(scenes_tokenizer), max_position_embeddings=64, **sizes)
    text = json.dumps(about.to_diff_dict() | {"model_type": "llama", "vocab_size": len(scenes_tokenizer)})
    ids = dict.fromkeys(("start_token_id", "end_token_id", "pad_token_id"), scenes_tokenizer.eos_token_id)
    tiny(cwd, scenes_tokenizer, bridge="prefix", language_model=text, **ids)
    upload("ann/llama")
    assert MODEL in remote(hub, "ann/llama") and "model.safetensors" not in remote(hub, "ann/llama")
    card = ModelCard(hub.get(remote(hub, "ann/llama")["README.md"]).decode())
    assert "llama" in card.data.tags and "gpt2" not in card.data.tags
    assert "llama after a prefix" in card.text and "AutoModel" not in card.text and not card.data.library_name
    Image.effect_noise((16, 16), 90).convert("RGB").save(cwd / "photo.png")
    one, other = (
        script(hub, cwd, "example_usage.py", "photo.png", s, "--num-captions", "4") for s in (MODEL, "ann/llama")
    )
    assert one == other and len(one) > 8


def test_a_space_shows_the_model(hub, cwd, tmp_path):
    """Its files alone, started as the Hub starts them, serve the page with the model of the Hub."""
    gradio_client = pytest.importorskip("gradio_client", reason="needs requirements/app.txt")
    said = script(hub, cwd, "upload_to_hf.py", "ann/model", "--space")
    checked, sent = (
        [n for n, line in enumerate(hub.lines()) if name in line] for name in ("POST /api/validate-yaml", "/commit/")
    )
    assert len(sent) == 2 and checked[1] < sent[0], "a Space whose card is refused must not leave a model behind"
    assert f"uploaded to {hub.url}/ann/model\n" in said and f"uploaded to {hub.url}/spaces/ann/model\n" in said
    assert f"{HUB}/spaces/ann/model" in hub.get(remote(hub, "ann/model")["README.md"]).decode()
    files = remote(hub, "spaces/ann/model")
    about = SpaceCard(hub.get(files["README.md"]).decode()).data
    assert (about.sdk, about.app_file, about.models) == ("gradio", "serve.py", ["ann/model"])
    assert "model.safetensors" not in files and "train.py" not in files
    assert script(hub, cwd, "upload_to_hf.py", "ann/model", "--space").count("nothing had changed") == 2

    space, port = tmp_path / "space", free_port()
    space.mkdir()
    for path, number in files.items():
        (space / path).parent.mkdir(exist_ok=True)
        (space / path).write_bytes(hub.get(number))
    start_it = (space / "serve.py").read_text().replace('"0.0.0.0"', f'"127.0.0.1", "--port", "{port}"')
    (space / "serve.py").write_text(start_it)
    Image.effect_noise((16, 16), 90).convert("RGB").save(space / "photo.png")
    serving = start(hub, space, space / "serve.py", token=None)
    assert serving.stdout.readline().startswith("model") and serving.stdout.readline().startswith("page")
    client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
    (answer,) = client.predict(picture=gradio_client.handle_file(space / "photo.png"), api_name="/caption")
    assert answer["caption"] == caption_image(
        space / "photo.png", cwd / MODEL, max_length=24, do_sample=False, num_beams=3
    )


def test_a_space_installs_packages_by_name(tmp_path):
    """The lists name each other by paths that a Space does not have."""
    pytest.importorskip("gradio", reason="needs requirements/app.txt")
    write_space(tmp_path, "ann/model", {"quantized": True})
    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert all(re.match(r"\w[\w-]*>=[\d.]+$", line) for line in lines), lines
    assert {"torch", "peft", "bitsandbytes"} <= {line.split(">=")[0] for line in lines}


def test_a_space_of_another_make_is_left_alone(hub, cwd):
    """And then the model is not uploaded either."""
    hub.add("spaces/ann/model", {"app.py": b"mine"})
    error = script(hub, cwd, "upload_to_hf.py", "ann/model", "--space", code=2)
    assert "the Space ann/model holds files that were not written here (app.py)" in error and "--pr" not in error
    assert set(remote(hub, "spaces/ann/model")) == {"app.py"}
    assert not remote(hub, "ann/model")
    script(hub, cwd, "upload_to_hf.py", "ann/model", "--space", "--dry-run", token=None)
    assert {"serve.py", "app.py", "requirements.txt"} <= set(local(cwd / "upload/spaces/ann/model"))


def test_the_published_code_loads_it_too(home, published, tmp_path):
    """A snapshot is whole: its own Python files load, run and train on its own weights, and nothing of this folder is
    needed. It holds config.py, model.py and what those import, where a model once dragged 17 modules along."""
    files = {path for path in remote(published) if path.endswith(".py")}
    wings = {path.split("/")[0] for path in files if "/" in path}
    assert wings == {"decoding", "weights"} and {path for path in files if "/" not in path} <= {
        "config.py",
        "model.py",
        "utils.py",
    }
    for path, number in remote(published).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(published.get(number))
    code = "import sys; sys.path.insert(0, '.')\n"
    code += "import torch; from model import ImageCaptionModel; model = ImageCaptionModel.from_pretrained('.')\n"
    code += "print(model.generate(torch.zeros(1, 3, 16, 16), num_beams=3).sequences.tolist())\n"
    code += "ids = torch.arange(6)[None]; optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)\n"
    code += "for _ in range(3):\n    loss = model(torch.zeros(1, 3, 16, 16), ids, labels=ids).loss; loss.backward(); optimizer.step()\n"
    code += "assert loss < 100; model.save_pretrained('further')"
    shown = script(None, tmp_path, "-I", "-c", code, token=None)
    model = ImageCaptionModel.from_pretrained(home / MODEL)
    assert json.loads(shown) == model.generate(torch.zeros(1, 3, 16, 16), num_beams=3).sequences.tolist()


def test_the_token_is_nowhere(home, published):
    """Of a run and of uploads: neither in what they write nor in what they print nor on the Hub."""
    files = [path for folder in (home, published.folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 35 and (home / "log.txt").stat().st_size > 1000
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert {request.token for request in published.requests} >= {CANARY}  # it was used all the same


@pytest.fixture
def upload(hub, cwd, monkeypatch, capsys):
    """Publishes by the real client in this process; returns what it printed."""
    settings = {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cwd / "home"),
    }
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.chdir(cwd)

    def run(name: str, **flags) -> str:
        publish.publish(UploadConfig(repository=name, model_path=MODEL, **flags))
        return capsys.readouterr().out

    return run


def test_a_pull_request_changes_nothing_else(hub, cwd):
    theirs = {"README.md": b"---\nlicense: mit\n---\n", "pytorch_model.bin": b"x" * 100}
    made = hub.add("bob/model", theirs)
    assert "/discussions/1" in script(hub, cwd, "upload_to_hf.py", "bob/model", "--pr")
    assert {"model.safetensors", "pytorch_model.bin"} <= set(made.tree("refs/pr/1"))
    assert set(made.tree("main")) == set(theirs)


def test_a_revision_is_a_branch(hub, cwd):
    command = ["upload_to_hf.py", "ann/model", "--revision", "next"]
    assert "/tree/next" in script(hub, cwd, *command)
    assert "model.safetensors" in hub.repositories["ann/model"].tree("next") and not remote(hub, "ann/model")
    assert "nothing had changed" in script(hub, cwd, *command)


def test_private_is_private(hub, cwd, upload):
    script(hub, cwd, "auto_upload.py", "ann/model", "--private")
    assert hub.repositories["ann/model"].private
    hub.repositories["ann/model"].private = False  # made public since: what is to be private must not go there
    sent = len(hub.lines("^PUT|/commit/"))
    with pytest.raises(UserError, match="everybody can see it"):
        upload("ann/model", private=True)
    assert len(hub.lines("^PUT|/commit/")) == sent


def test_a_repository_of_another_make_is_left_alone(hub, upload):
    """Unless forced; and then its other files stay."""
    made = hub.add("ann/model", {"README.md": b"mine", "weights.bin": b"y"})
    with pytest.raises(UserError, match=r"not written here \(README.md, weights.bin\).*--force"):
        upload("ann/model")
    assert not hub.lines("^PUT|^POST") and set(made.tree()) == {"README.md", "weights.bin"}
    upload("ann/model", force=True)
    assert hub.get(made.tree()["README.md"]) != b"mine" and "weights.bin" in made.tree()


def test_what_an_older_upload_left_goes(hub, cwd, upload, scenes_tokenizer):
    """ONNX files of other weights must not stand beside new ones."""
    upload("ann/model")
    made = hub.repositories["ann/model"]
    old = hub.put(b"of other weights")
    made.commit("main", made.tree() | {"onnx/encoder_model.onnx": old, "notes.txt": old}, "by hand")
    tiny(cwd, scenes_tokenizer, seed=1)
    upload("ann/model")
    assert "onnx/encoder_model.onnx" not in made.tree() and "notes.txt" in made.tree()
    assert "run.json" not in made.tree()  # of a model whose run is not known nothing is told
    assert b"## Training" not in hub.get(made.tree()["README.md"])


def test_a_module_that_a_later_version_drops_goes(hub, upload):
    """It stayed for ever, and a stale captioning.py beside a folder captioning/ would be the one that is imported. What a
    person has added stays; of an upload before there was a manifest the project's own old modules go."""
    upload("ann/model")
    made = hub.repositories["ann/model"]
    old, own = (
        hub.put(b"# old"),
        {"my.py": hub.put(b"# mine"), "data/x.parquet": hub.put(b"PAR1"), "a[1].py": hub.put(b"1")},
    )
    tree = dict(made.tree())
    names = json.loads(hub.get(tree.pop(publish.MANIFEST)))
    assert sorted(tree.keys() - {".gitattributes"} | {publish.MANIFEST}) == sorted([*names, publish.MANIFEST])
    made.commit("main", tree | own | {"captioning.py": old}, "as an older version left it")
    upload("ann/model")
    assert "captioning.py" not in made.tree() and own.keys() <= made.tree().keys()
    newer = hub.put(json.dumps([*names, "wing/room.py", "a[1].py", 7]).encode())
    gone = {"wing/room.py": old, "wing/own.py": old, publish.MANIFEST: newer}
    made.commit("main", made.tree() | gone, "as a newer version left it")
    upload("ann/model")
    assert own.keys() - {"a[1].py"} | {"wing/own.py", "model.py"} <= made.tree().keys()
    assert not {"wing/room.py", "a[1].py"} & made.tree().keys()


def test_what_others_wrote_stays_when_forced(hub, upload):
    """--force deleted a stranger's onnx/ folder."""
    made = hub.add("ann/model", {"onnx/model.onnx": b"x", "captioning.py": b"y"})
    upload("ann/model", force=True)
    assert {"onnx/model.onnx", "captioning.py", "model.py"} <= set(made.tree())


def test_a_card_that_the_hub_refuses_stops_before_the_weights(hub, upload):
    with pytest.raises(UserError, match='"license" must be'):
        upload("ann/model", license="MY OWN")
    assert not hub.lines("^PUT|/commit/")


def test_wrong_flags_are_one_line():
    with pytest.raises(UserError, match="two parts: user/name"):
        UploadConfig(repository="model")
    with pytest.raises(UserError, match="exclude each other"):
        UploadConfig(repository="ann/model", pr=True, revision="next")
    with pytest.raises(UserError, match="user/dataset:task:metric"):
        UploadConfig(repository="ann/model", benchmark="coco")
    assert not {"token"} & {field.name for field in dataclasses.fields(AutoConfig)}


def test_nothing_is_asked_without_a_token_or_a_name(hub, cwd):
    """No request, and one line."""
    cases = [("ann/model", None, "hf auth login"), ("no spaces/allowed", CANARY, "no spaces/allowed")]
    processes = [start(hub, cwd, "upload_to_hf.py", name, token=token) for name, token, _ in cases]
    for process, (_, _, word) in zip(processes, cases, strict=True):
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and word in error and error.count("\n") == 1, error
    assert hub.requests == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_told_at_once(hub, cwd, status):
    token = {401: "hf_unknown", 403: "hf_reads"}[status]
    process = start(hub, cwd, "auto_upload.py", "ann/model", token=token)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and str(status) in error and "hf auth login" in error and error.count("\n") == 1
    asked = hub.lines("models|repos")  # nothing twice; beside them the client looks which programs it is used by
    look = "GET /api/models/ann/model"  # and, where it must not make one, whether it is there after all
    assert asked == [look, "POST /api/repos/create", look][: len(asked)] and not hub.repositories
    assert token not in error


def test_faults_in_the_middle_are_outlasted(hub, cwd):
    """A 503, a connection cut in the middle of the weights, and a commit that fails once."""
    hub.fail("^PUT /lfs", 503, 1)
    hub.fail("^PUT /lfs", None, 1)
    hub.fail("^POST .*/commit/", 503, 1)
    assert "uploaded" in script(hub, cwd, "upload_to_hf.py", "ann/model")
    assert len(hub.lines("^PUT")) == 4 and len(hub.lines("/commit/")) == 2  # two files, two of them twice
    assert "model.safetensors" in remote(hub, "ann/model")


def test_a_hub_that_stays_away_can_be_gone_on_with(hub, cwd):
    """The second run sends no content again."""
    hub.fail("^POST .*/commit/", 503)
    error = script(hub, cwd, "upload_to_hf.py", "ann/model", code=2).splitlines()[-1]
    assert "run again" in error and "503" in error and len(hub.lines("/commit/")) > 2
    sent = len(hub.lines("^PUT"))
    hub.faults.clear()
    assert sent == 2 and set(remote(hub, "ann/model")) == set()
    script(hub, cwd, "upload_to_hf.py", "ann/model")
    assert len(hub.lines("^PUT")) == sent and len(remote(hub, "ann/model")) > 15


@pytest.mark.slow
@pytest.mark.parametrize("status", [503, None], ids=["503", "dropped"])
def test_weights_that_do_not_go_through_are_all_that_is_sent_later(hub, cwd, status):
    script(hub, cwd, "upload_to_hf.py", "ann/model", "--dry-run")
    weights = local(cwd / "upload/ann/model")["model.safetensors"]
    hub.fail(f"^PUT /lfs/{weights}", status)
    assert "run again" in script(hub, cwd, "upload_to_hf.py", "ann/model", code=2)
    assert len(hub.lines(f"^PUT /lfs/{weights}")) >= 6  # the client's own retries
    hub.faults.clear()
    before = len(hub.lines("^PUT"))
    script(hub, cwd, "upload_to_hf.py", "ann/model")
    assert hub.lines("^PUT")[before:] == [f"PUT /lfs/{weights}"]


def test_a_watcher_stages_nothing_through_a_link(tmp_path):
    """A link planted beside a run led a watcher's copies wherever somebody else wanted them."""
    model = tmp_path / "run/checkpoints/step-00000001/model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"weights")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".run.upload").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"\.run\.upload: is a link"):
        Stage(tmp_path / "run").gather()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("away", [10, pytest.param(60, marks=pytest.mark.slow)], ids=["seconds", "a minute"])
def test_watching_a_run_through_a_hub_that_goes_away(tmp_path, scenes_tokenizer, away):
    """Every checkpoint arrives whole, those too that the run deleted while the Hub was away; the run is only read."""
    run = tmp_path / "runs/demo"
    run.mkdir(parents=True)
    numbers: dict[str, str] = {}

    def checkpoint(step: int) -> None:
        path = tiny(tmp_path, scenes_tokenizer, step)
        folder = run / f"checkpoints/step-{step:08d}"
        save_checkpoint(run, step, lambda target: shutil.copyfile(path, target), {}, {}, 0, best=None, keep=9)
        numbers[folder.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        for old in sorted((run / "checkpoints").glob("step-*"))[:-2]:
            assert local(old)["model.safetensors"] == numbers[old.name]
            shutil.rmtree(old)

    (run / "run.json").write_text(json.dumps({"finished": False, "config": {"dataset": "scenes"}}))
    with running_hub(tmp_path / "hub") as hub:
        port = hub.server_port
        hub.tokens[CANARY] = "ann"
        checkpoint(10)
        watcher = start(hub, tmp_path, "auto_upload.py", "ann/run", "--watch", run)
        wait_for(lambda: "ann/run" in hub.repositories and len(hub.repositories["ann/run"].commits) == 2)
        kept = hub.repositories
    (run / "checkpoints/.step-00000015.unfinished").mkdir()  # cut short: never to be seen
    (run / "checkpoints/.step-00000015.unfinished/model.safetensors").write_bytes(b"half")
    for step in (20, 30, 40, 50):  # nobody answers at the Hub's address
        checkpoint(step)
        time.sleep(away / 4)
    with running_hub(tmp_path / "hub", port) as hub:
        hub.tokens[CANARY], hub.repositories = "ann", kept
        shutil.copyfile(run / "checkpoints/step-00000050/model.safetensors", run / MODEL)
        before = local(run)
        about = json.loads((run / "run.json").read_text()) | {"finished": True}
        (run / "run.json").write_text(json.dumps(about))
        output, errors = watcher.communicate(timeout=120)
        assert watcher.returncode == 0, output + errors
        assert "the Hub cannot be reached now" in output and CANARY not in output + errors
        assert {name for name in hub.repositories["ann/run"].refs if name != "main"} == set(numbers)
        weights = {remote(hub, "ann/run", name)["model.safetensors"] for name in numbers}
        assert len(weights) == 5 and remote(hub, "ann/run")["model.safetensors"] in weights
    assert {n: h for n, h in local(run).items() if n != "run.json"} == {
        n: h for n, h in before.items() if n != "run.json"
    }
    assert {path.name for path in run.parent.iterdir()} == {"demo"}  # nothing is left beside it


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_real_run_is_not_disturbed_by_a_watcher_that_is_killed(tmp_path, hub):
    """Stopped and started again in between, the watcher delivers; the run has the bits of one that nobody watched."""
    arguments = ["--preset", "demo", "--num-scenes", "600", "--max-steps", "60", "--checkpoint-interval", "10"]
    arguments += [*tiny_flags(), "--output-dir", "out", "--batch-size", "16"]
    for name in ("alone", "watched"):
        (tmp_path / name).mkdir()
    script(None, tmp_path / "alone", "main.py", *arguments)
    training = start(None, tmp_path / "watched", "main.py", *arguments)
    wait_for((tmp_path / "watched/out").is_dir)
    watch = ["auto_upload.py", "ann/run", "--watch", "out"]
    hub.fail("/api/", 503, 8)
    watcher = start(hub, tmp_path / "watched", *watch)
    wait_for(lambda: len(hub.lines("PUT")) > 2, 120)
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait(60) == 143
    script(hub, tmp_path / "watched", *watch)
    assert training.wait(300) == 0
    one, other = (local(tmp_path / name / "out") for name in ("alone", "watched"))
    assert one[MODEL] == other[MODEL]
    assert remote(hub, "ann/run")["samples.png"] == other["samples.png"]  # drawn scenes may be shown
    assert "step-00000060" in hub.repositories["ann/run"].refs


@pytest.mark.slow
def test_onnx_files_go_along_and_again_unchanged(hub, cwd):
    pytest.importorskip("onnxscript")
    script(hub, cwd, "upload_to_hf.py", "ann/model", "--onnx")
    assert {"onnx/encoder_model.onnx", "onnx/decoder_model_merged_quantized.onnx"} <= set(remote(hub, "ann/model"))
    assert "transformers.js" in hub.get(remote(hub, "ann/model")["README.md"]).decode()
    assert "nothing had changed" in script(hub, cwd, "upload_to_hf.py", "ann/model", "--onnx")


def test_after_training_it_is_asked_once_on_a_terminal_only(hub, cwd, monkeypatch):
    publish.offer_upload(cwd / MODEL)  # no terminal here: it must return
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from publishing.hub import offer_upload; offer_upload()"
    number, terminal = pty.fork()
    if number == 0:
        os.chdir(cwd)
        known = surroundings(environment(hub, cwd / "home", CANARY))
        os.execve(sys.executable, [sys.executable, "-c", code], known)
    shown = b""
    try:
        while b"no: " not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, b"ann/asked\n")
        while True:
            shown += os.read(terminal, 1000)
    except OSError:  # its end
        pass
    assert os.waitpid(number, 0)[1] == 0 and shown.count(b"Publish this model") == 1, shown
    assert b"uploaded to" in shown and "model.safetensors" in remote(hub, "ann/asked")


def test_without_arguments_it_says_how_it_is_used(cwd, monkeypatch, capsys):
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["upload_to_hf.py"])
    upload_to_hf.main()
    assert f"upload_to_hf.py user/name --model-path {cwd / MODEL}" in capsys.readouterr().out
