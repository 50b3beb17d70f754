"""The README and docs/ keep their word: flags, files and links exist, and commands run in an empty folder."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_config, write_bases

from config import UserError
from convert import save_transformers
from dataset import train_tokenizer
from flags import parse_flags
from model import ImageCaptionModel

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.S | re.M)
SHELL = [block.replace("\\\n", " ") for language, block in BLOCKS if not language]
SNIPPETS = [block for language, block in BLOCKS if language == "python"]
INLINE = re.findall(r"`(python [^`]+)`", TEXT)
LINES = [re.split(r"\s# ", line)[0].strip() for block in SHELL for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ") or "| python " in line] + INLINE
NAMED = {"python main.py", "python dataset.py check"}  # in a sentence, without arguments
# Everything that starts one of the scripts, under torchrun too: (script, arguments).
STARTED = dict.fromkeys(
    (found[1], (found[2] or "").strip())
    for line in (*LINES, *INLINE)
    if line not in NAMED and "--help" not in line and (found := re.search(r"(?:^|\s)(\w+)\.py(?:\s(.*))?$", line))
)


def parsed(script: str, arguments: list[str]) -> Any:
    """What a script makes of its arguments, without doing it."""
    if script == "main":
        return importlib.import_module("main").parse_arguments(arguments)
    if script == "benchmark":
        file, kind = importlib.import_module("benchmark").COMMANDS[arguments[0]]
        command = getattr(importlib.import_module(f"benchmarks.{file}"), kind)
        return command.parsed(arguments[1:]) if arguments[0] == "gpu" else parse_flags(command, None, arguments[1:])
    if script == "dataset":
        assert arguments.pop(0) == "check"
    if script == "convert":
        convert = importlib.import_module("convert")
        kinds: Any = convert.ToTransformers | convert.FromTransformers | convert.Onnx | convert.Merge
        return parse_flags(kinds, None, arguments)
    if script == "example_usage":  # which takes pictures behind its flags, too
        config = importlib.import_module("example_usage").CaptionConfig
        found: Any = parse_flags(config, None, arguments, return_unknown_args=True)
        assert not [argument for argument in found[1] if argument.startswith("--")], found[1]
        return found[0]
    file, kind = {
        "evaluate": ("evaluate", "EvaluateConfig"),
        "dataset": ("data.check", "CheckConfig"),
        "app": ("app", "AppConfig"),
        "upload_to_hf": ("publishing.config", "UploadConfig"),
        "auto_upload": ("auto_upload", "AutoConfig"),
    }[script]
    return parse_flags(getattr(importlib.import_module(file), kind), None, arguments)


@pytest.mark.parametrize(("script", "arguments"), STARTED)
def test_every_command_is_one_that_its_script_takes(script, arguments):
    try:
        parsed(script, shlex.split(arguments))
    except (SystemExit, UserError) as error:
        pytest.fail(f"{script}.py {arguments}: {error}")


def test_every_flag_and_file_that_is_named_exists():
    assert len(COMMANDS) >= 8
    files = ["config.py", "evaluate.py", "data/check.py", "convert.py", "publishing/config.py", "publishing/hub.py"]
    files += ["auto_upload.py", "example_usage.py", "app.py", "captioning/filtering.py"]
    paths = [*map(ROOT.joinpath, files), *(ROOT / "benchmarks").glob("*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in paths)
    fields = set(re.findall(r"^    (\w+): ", sources, re.M))
    fields |= {
        "help",
        "help_all",
        "tyro_print_completion",
        "no_build_isolation",
        "ignore_scripts",
        "prefix",
    }  # tyro's own, pip's and npm's
    fields |= {"index_url", "rm", "build_arg"}  # pip's and docker's
    fields |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "node_rank", "master_addr"}  # torchrun's
    fields |= {"nodes", "ntasks_per_node", "signal", "array", "gpus", "requeue"}  # srun's and sbatch's
    for flag in set(re.findall(r"(?<=[\s`])--([a-z][a-z0-9-]*[a-z0-9])", TEXT)):
        name = flag.replace("-", "_")
        assert name in fields or name.removeprefix("no_") in fields, flag
    names = set(re.findall(r"`([\w/]+\.(?:py|md))`", TEXT)) | set(re.findall(r"python (\w+\.py)", TEXT))
    names |= set(re.findall(r"requirements/\w+\.txt", TEXT)) | set(re.findall(r"tests/[\w/]+\.py", TEXT))
    for name in names:
        assert (ROOT / name).is_file(), name


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.is_file(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(PAGES["README.md"].split()) <= 2300
    for page in PAGES:
        assert page == "README.md" or f"]({page}" in PAGES["README.md"], page


def test_the_map_has_every_file():
    """Of the scripts and the wings; benchmarks/ is named as a whole."""
    wings = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("benchmarks", "tests")]
    for path in (*ROOT.glob("*.py"), *(path for wing in wings for path in wing.glob("*.py"))):
        if path.name != "__init__.py":
            assert f"`{path.relative_to(ROOT).as_posix()}`" in PAGES["docs/how_it_works.md"], path


def test_every_dependency_has_its_reason():
    files = [ROOT / "requirements.txt", *(ROOT / "requirements").iterdir()]
    requirements = "".join(path.read_text() for path in files)
    for name in re.findall(r"^([\w-]+)>=", requirements, re.M):
        assert name in PAGES["docs/dependencies.md"], name


def test_ci_runs_the_readmes_test_command():
    """And ends where it fails: `set -e` does not see a failure before the last && of a list."""
    command = next(command for command in COMMANDS if "requirements/dev.txt" in command)
    assert f"{command} || exit 1" in (ROOT / ".ci" / "run").read_text().splitlines()


def clean_copy(directory: Path) -> Path:
    """The files that git knows, in an empty folder."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    return directory


TINY = "--image-size 32 --patch-size 8 --vision-embed-dim 32 --vision-num-layers 1 --vision-num-heads 2 --decoder-embed-dim 32"
TINY += " --decoder-num-layers 1 --decoder-num-heads 2 --device cpu"
# Commands that need more than two cores, minutes and no network: each entry is the beginning of one.
ELSEWHERE = {
    "python main.py --preset demo": "the slow test below",
    "python main.py --preset coco-siglip2": "COCO, pretrained models: test_cards.py",
    "python main.py --preset img2gpt": "Flickr30k, pretrained models: test_adapters.py",
    "python main.py --precision bf16 --init": "COCO",
    "python main.py --dataset karpathy": "COCO",
    "python main.py --data-dir my_photos --init pretrained": "pretrained models: test_pretrained.py",
    "python main.py --objective scst --reward": "PAC-S: test_scst.py",
    "python evaluate.py vit-gpt2-captioning.safetensors --dataset karpathy": "COCO",
    "python evaluate.py vit-gpt2-captioning.safetensors --data-dir nocaps": "nocaps: test_evaluate.py",
    "python evaluate.py vit-gpt2-captioning.safetensors --data-dir my_photos --tokenizer icu": "icu4py: test_words.py",
    "python evaluate.py vit-gpt2-captioning.safetensors --data-dir flickr8k --calibrate": "30 pictures: test_evaluate.py",
    'python example_usage.py "shards/*.tar" vit-gpt2-captioning.safetensors --output out --format jsonl --engine ray': "Ray: test_shards.py",
    "python example_usage.py photo.jpg --model distilvit": "the Hub: test_known.py",
    "python example_usage.py photo.jpg --model vit-gpt2 --allow-pickle": "the Hub: test_known.py",
    "python example_usage.py photos --model distilvit": "the Hub: test_known.py",
    "python upload_to_hf.py": "the Hub: test_upload.py",
    "python app.py": "it serves until it is stopped: test_app.py",
    "python benchmark.py": "minutes: test_benchmark.py",
    "python -m venv": "an installation",
}


@pytest.fixture(scope="module")
def user(tmp_path_factory, scenes_dir) -> Path:
    """A user's folder, with everything that the commands name."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("user")
    pictures = sorted((scenes_dir / "train2017").iterdir())
    for name in ("photos", "more", "my_photos", "flickr8k/Images"):
        (folder / name).mkdir(parents=True)
    shutil.copy(pictures[0], folder / "photo.jpg")
    shutil.copy(pictures[1], folder / "photos/one.jpg")
    shutil.copy(pictures[1], folder / "more/one.png")
    captions = ["image,caption"]
    for number, picture in enumerate(pictures[:60]):
        shutil.copy(picture, folder / f"my_photos/{number}.jpg")
        (folder / f"my_photos/{number}.txt").write_text(f"a drawing of number {number}\nshapes\n")
        shutil.copy(picture, folder / f"flickr8k/Images/{number}.jpg")
        captions += [f"{number}.jpg,a drawing of number {number} .", f"{number}.jpg,shapes of {number} colours ."]
    (folder / "flickr8k/captions.txt").write_text("\n".join(captions) + "\n")
    said = [{"image_id": n, "caption": f"a drawing of number {n}"} for n in range(30)]
    references = {"images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(30)], "annotations": []}
    references["annotations"] = [entry | {"id": n} for n, entry in enumerate(said)]
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "captions.json").write_text(json.dumps(said))
    for name in ("a/references.json", "captions_val2014.json"):
        (folder / name).write_text(json.dumps(references))
    (folder / "captions.json").write_text(json.dumps(said))
    write_bases(folder, image_size=32, vocab_size=300)
    tokenizer = train_tokenizer([entry["caption"] for entry in said], 300)
    model = ImageCaptionModel(tiny_config(image_size=32, vocab_size=len(tokenizer), max_length=40))
    model.tokenizer = tokenizer
    for name in ("vit-gpt2-captioning.safetensors", "photos.safetensors"):
        model.save_file(folder / name)
    save_transformers(model, folder / "DIR_OR_REPO")
    (folder / "words.txt").write_text("a\ndrawing\nof\n")
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards/0.tar", "w") as tar:
        tar.add(pictures[0], "0.jpg")
    name = "runs/my_photos-20260101-120000/img2gpt_epoch_3.safetensors"
    (folder / name).parent.mkdir(parents=True)
    model.save_file(folder / name)  # a whole model, where adapters would have to name pretrained ones
    return folder


def runs_here(command: str) -> bool:
    return not any(command.startswith(beginning) for beginning in ELSEWHERE) and command not in NAMED


def test_every_exception_is_still_needed():
    assert [beginning for beginning in ELSEWHERE if not any(line.startswith(beginning) for line in COMMANDS)] == []


HERE = list(dict.fromkeys(filter(runs_here, COMMANDS)))


@pytest.mark.parametrize("command", HERE)
def test_every_other_command_runs(user, command):
    """As it is printed, in a user's folder and without a network; trainings are cut short."""
    if "onnx" in command:
        pytest.importorskip("onnxscript", reason="needs requirements/onnx.txt")
    if "main.py" in command:
        command += " --max-steps 2 --batch-size 4 --wandb off --resume never --output-dir out"
        command += "" if "--init-model" in command else f" {TINY}"
    command = re.sub(r"python (\w+\.py)", rf"{sys.executable} {ROOT}/\1", command)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(["bash", "-c", command], cwd=user, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout, done.stdout[-1000:] + done.stderr[-2000:]
    if wanted := re.search(r"--(?:output|heatmap) (\S+)", command):
        written = user / ("photos/one.txt" if wanted[1] == "sidecar" else wanted[1])
        assert written.is_dir() or written.read_bytes().strip()
        assert written.suffix != ".csv" or len(written.read_text().splitlines()) == 3  # a header and two pictures


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_runs(user, snippet, monkeypatch, capsys):
    """But the page's, whose endpoints test_app.py and test_chat.py ask: those have to compile."""
    code = compile(snippet, "snippet", "exec")
    if "gradio_client" not in snippet and "openai" not in snippet:
        monkeypatch.chdir(user)
        exec(code, {})
        assert "print(" not in snippet or capsys.readouterr().out


@pytest.mark.slow
def test_the_first_commands_on_a_bare_machine(tmp_path):
    """Install, demo and example from an empty folder, as the README has them."""
    copy = clean_copy(tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "TQDM"))}
    done = subprocess.run(
        ["bash", "-ec", SHELL[0]],
        cwd=copy,
        env=environment,
        check=True,
        timeout=3000,
        text=True,
        stdout=subprocess.PIPE,
    )
    (run,) = (copy / "runs").iterdir()
    assert json.loads((run / "metrics.json").read_text())["scene_accuracy"] >= 0.9
    assert "a drawn scene" in done.stdout.splitlines()[-2]
