"""Model files and folders by strangers: whatever is wrong with them is one line and exit code 2, and runs nobody's code."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model, tiny_config, write_bases, write_language_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert
import evaluate
import example_usage
import main
import upload_to_hf
from captioning.models import _load_model
from config import UserError
from dataset import train_tokenizer
from decoding.foreign import check_ids, plain
from model import ImageCaptionModel
from training.start import initialise
from utils import run_script
from weights.file import METADATA_KEY

HOSTILE = [
    None,
    True,
    False,
    2.5,
    1e400,
    float("nan"),
    -1,
    0,
    10**9,
    10**30,
    "12",
    "\x1b]0;x\x07\u202e",
    [],
    {},
    [[1]],
    {"a": 1},
]
DEEP = "[" * 100_000 + "]" * 100_000


def run(capsys, monkeypatch, script, *arguments) -> tuple[int, str]:
    """A script's main in this process, as its command line runs it: its exit code, and standard error."""
    _load_model.cache_clear()
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_script(script.main)
    return end.value.code, capsys.readouterr().err


def one_line(code: int, said: str) -> None:
    assert code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1 and said[:-1].isprintable() and len(said) < 2000, said


@pytest.fixture(scope="module")
def words(scenes_table):
    return train_tokenizer(scenes_table.captions().to_pylist(), 300)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, words) -> dict[str, Path]:
    """A whole model of each bridge, and adapters with their base."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for bridge in ("cross_attention", "prefix"):
        model = random_model(tiny_config(bridge=bridge, vocab_size=len(words)))
        model.tokenizer = words
        model.save_file(found.setdefault(bridge, folder / f"{bridge}.safetensors"))
    return found


def metadata(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[METADATA_KEY])


def written(path: Path, source: Path, about, tensors=None) -> Path:
    """The model with other metadata (a text as it is), or other tensors."""
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(load_file(source) if tensors is None else tensors, path, {METADATA_KEY: text})
    return path


def commands(path: Path, tmp_path: Path, scenes_dir: Path) -> dict:
    """Everything that loads a model, from the user's side."""
    small = ["--data-dir", scenes_dir, "--device", "cpu", "--max-steps", 1, "--batch-size", 2, "--no-upload", "--yes"]
    return {
        "example_usage": (example_usage, scenes_dir / "val2017" / "x.jpg", "--model", path, "--device", "cpu"),
        "evaluate": (evaluate, path, "--data-dir", scenes_dir, "--output-dir", tmp_path / "e", "--device", "cpu"),
        "main": (main, "--init-model", path, "--output-dir", tmp_path / "r", *small),
        "convert": (convert, "to-transformers", path, tmp_path / "t"),
        "onnx": (convert, "onnx", path, tmp_path / "o"),
        "upload": (upload_to_hf, "ann/x", "--model-path", path, "--dry-run"),
    }


def hostile_metadata(about: dict):
    """The metadata with one of the hostile values in each field."""
    for name in about["config"]:
        for value in HOSTILE:
            other = copy.deepcopy(about)
            other["config"][name] = value
            yield f"config.{name}={value!r}", other
    for name in ("config", "tokenizer", "trained_on", "adapters"):
        for value in HOSTILE:
            yield f"{name}={value!r}", about | {name: value}
    good = {"bases": {"encoder": None, "decoder": None}, "key": "0" * 16, "scale": 1.0, "quantized": False}
    for name in good:
        for value in HOSTILE:
            yield f"adapters.{name}={value!r}", about | {"adapters": good | {name: value}}


@pytest.mark.parametrize("bridge", ["cross_attention", "prefix"])
def test_every_field_of_the_metadata(bridge, sound, tmp_path):
    """2.5 or true layers, 1e400, a billion of anything, null: TypeErrors, gigabytes, a MemoryError. Each is a UserError in
    one line, or a model that the file's tensors fit."""
    about, path = metadata(sound[bridge]), tmp_path / "x.safetensors"
    refusals = 0
    for what, other in hostile_metadata(about):
        written(path, sound[bridge], other)
        try:
            model = ImageCaptionModel.from_pretrained(path)
            assert model.state_dict().keys() == load_file(path).keys(), what
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and str(path) in str(error), what
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
    assert refusals > 300


def test_each_command_says_one_line(sound, tmp_path, scenes_dir, capsys, monkeypatch):
    """All that load a model meet the same gate: hostile sizes, hostile text, deep JSON, NaN."""
    about, source = metadata(sound["cross_attention"]), sound["cross_attention"]
    tensors = load_file(source)
    about["config"]["vision_num_layers"] = 10**9
    files = {"layers": written(tmp_path / "layers.safetensors", source, about)}
    about["config"]["vision_num_layers"] = "\x1b]0;x\x07\u202e"
    files["text"] = written(tmp_path / "text.safetensors", source, about)
    files["deep"] = written(tmp_path / "deep.safetensors", source, DEEP)
    good, odd = metadata(source), tensors | {"\x1b[31m\u202ename": torch.zeros(1)}
    files["name"] = written(tmp_path / "name.safetensors", source, good, odd)
    nan = tensors | {"decoder.ln_f.weight": torch.full((32,), float("nan"))}
    files["nan"] = written(tmp_path / "nan.safetensors", source, good, nan)
    for what, path in files.items():
        for script, *arguments in commands(path, tmp_path, scenes_dir).values():
            code, said = run(capsys, monkeypatch, script, *arguments)
            one_line(code, said)
            assert str(path) in said and (what != "nan" or "decoder.ln_f.weight contains NaN" in said), (what, said)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_weights_that_are_no_numbers(value, dtype, sound, tmp_path):
    """A model with one NaN captioned every picture "!" with code 0."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(sound["prefix"]).items()}
    ImageCaptionModel.from_pretrained(
        written(tmp_path / "good.safetensors", sound["prefix"], metadata(sound["prefix"]), tensors)
    )
    tensors["decoder.wte.weight"][7, 3] = value
    if dtype == torch.float64:
        tensors["decoder.wte.weight"][7, 3] = 1e300  # which fp32 has no place for
    path = written(tmp_path / "x.safetensors", sound["prefix"], metadata(sound["prefix"]), tensors)
    with pytest.raises(UserError, match=r"decoder\.wte\.weight contains NaN or infinity"):
        ImageCaptionModel.from_pretrained(path)


def change(folder: Path, name: str, **values) -> None:
    about = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(about | values))


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit(7)"
AUTO = {
    "AutoConfig": "evil.C",
    "AutoModelForCausalLM": "evil.M",
    "AutoModel": "evil.M",
    "AutoTokenizer": ["evil.T", None],
}
KERNEL = "kernels-community/flash-attn"
FOLDERS = {
    "own code": (dict(model_type="evil", auto_map=AUTO), "needs code from its repository, which is never run"),
    "layers": (dict(num_hidden_layers=10**9), "no model has so many"),
    "more layers": (dict(num_hidden_layers=900), "describes a larger model"),
    "layer missing": (dict(num_hidden_layers=3), "weights are missing"),
    "wide": (dict(hidden_size=1 << 20), "describes a larger model"),
    "vocabulary": (dict(vocab_size=10**9), "describes a larger model"),
    "float layers": (dict(num_hidden_layers=2.5), "no usable language model"),
    "text layers": (dict(num_hidden_layers="2"), "no usable language model"),
    "quantized": (dict(quantization_config={"quant_method": "evil"}), "quantized"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, words) -> Path:
    return Path(write_language_model("llama", tmp_path_factory.mktemp("llama"), words))


def copied(llama: Path, folder: Path) -> Path:
    shutil.copytree(llama, folder)
    (folder / "evil.py").write_text(CODE)
    return folder


@pytest.mark.parametrize("what", FOLDERS)
def test_a_strangers_decoder(what, llama, tmp_path, capsys, monkeypatch):
    """--decoder asked on the terminal whether to run the folder's code; a billion layers filled the memory; a missing
    layer was made up."""
    values, message = FOLDERS[what]
    change(folder := copied(llama, tmp_path / "lm"), "config.json", **values)
    with pytest.raises(UserError, match=message) as error:
        initialise(tiny_config(bridge="prefix", max_length=64), None, str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("ran"))


def test_settings_that_name_code_do_not_reach_transformers(llama, tmp_path):
    """attn_implementation may name a repository of kernels, which is fetched and run; base models of adapters likewise."""
    fetched = dict(
        attn_implementation=KERNEL, _attn_implementation=KERNEL, experts_implementation=KERNEL, auto_map=AUTO
    )
    fetched |= dict(dtype="evil", device_map="auto", trust_remote_code=True, num_labels=10**9, _name_or_path="/x")
    fetched |= dict(base_model_name_or_path="ann/x", pruned_heads={"0": [0]})
    assert plain(fetched | {"text_config": fetched, "a": [fetched]}) == {"text_config": {}, "a": [{}]}
    folder = copied(llama, tmp_path / "lm")
    change(folder, "config.json", **fetched)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    config, model = initialise(tiny_config(bridge="prefix", max_length=64), None, str(folder))
    assert KERNEL not in config.language_model and not list(tmp_path.rglob("ran"))
    about = json.loads(config.language_model) | fetched
    model.config.language_model = json.dumps(about)
    again = ImageCaptionModel.from_saved(model.saved())
    assert again.decoder.body.config._attn_implementation in ("sdpa", "eager")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "ann/x"}))
    with pytest.raises(UserError, match="adapters of peft"):
        initialise(tiny_config(bridge="prefix", max_length=64), None, str(folder))


def test_a_language_model_in_the_metadata(llama, tmp_path):
    """A billion layers in the field that describes the decoder."""
    _, model = initialise(tiny_config(bridge="prefix", max_length=64), None, str(llama))
    about = json.loads(model.config.language_model)
    model.save_file(source := tmp_path / "sound.safetensors")
    for values in (
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 999},
        {"hidden_size": 1 << 22},
        {"model_type": "x"},
    ):
        other = metadata(source)
        other["config"]["language_model"] = json.dumps(about | values)
        with pytest.raises(UserError) as error:
            ImageCaptionModel.from_pretrained(written(tmp_path / "x.safetensors", source, other))
        assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)
    for text in (DEEP, "[]", "null", "{"):
        other = metadata(source)
        other["config"]["language_model"] = text
        with pytest.raises(UserError):
            ImageCaptionModel.from_pretrained(written(tmp_path / "x.safetensors", source, other))


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "generation_config.json"]
)
def test_deep_json_beside_the_weights(name, sound, tmp_path, capsys, monkeypatch, scenes_dir):
    """100,000 brackets were a RecursionError."""
    convert.save_transformers(ImageCaptionModel.from_pretrained(sound["cross_attention"]), tmp_path / "theirs")
    for text in (DEEP, '{"a":' * 900 + "1" + "}" * 900):
        (tmp_path / "theirs" / name).write_text(text)
        code, said = run(
            capsys, monkeypatch, example_usage, scenes_dir / "x.jpg", tmp_path / "theirs", "--device", "cpu"
        )
        if text is DEEP:
            one_line(code, said)
        assert "Traceback" not in said and code


def test_a_word_with_the_number_of_a_billion(sound, llama, tmp_path):
    """A list of all numbers up to it took 4 GB, of a file of 100 KB."""
    about = metadata(sound["prefix"])
    about["tokenizer"]["model"]["vocab"]["!"] = 10**9
    with pytest.raises(UserError, match="a token has the id 1000000000"):
        ImageCaptionModel.from_pretrained(written(tmp_path / "x.safetensors", sound["prefix"], about))
    folder = copied(llama, tmp_path / "lm")
    (folder / "tokenizer.json").write_text(json.dumps(about["tokenizer"]))
    with pytest.raises(UserError, match="a token has the id 1000000000"):
        initialise(tiny_config(bridge="prefix", max_length=64), None, str(folder))


def test_a_vit_of_a_billion_layers(tmp_path):
    bases = write_bases(tmp_path)
    for part, name in (("encoder", "num_hidden_layers"), ("decoder", "n_layer")):
        folder = Path(bases[part])
        before = (folder / "config.json").read_text()
        change(folder, "config.json", **{name: 10**9})
        with pytest.raises(UserError, match="from 1 to 1,000"):
            initialise(tiny_config(), bases["encoder"], bases["decoder"])
        (folder / "config.json").write_text(before)


def test_model_may_be_a_word():
    """GPT-2's own vocab.json has it, and was refused: it was taken for a tokenizer.json."""
    check_ids('{"model": 4, "vocab": 5}')
    with pytest.raises(UserError, match="a token has the id 1000000000"):
        check_ids('{"model": 4, "vocab": 1000000000}')
