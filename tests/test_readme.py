"""The README keeps its word: its flags exist, its files exist, its commands run in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config, write_bases

from convert import save_transformers
from dataset import train_tokenizer
from model import ImageCaptionModel

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.S | re.M) if not language]
LINES = [line.split("  #")[0].strip() for block in SHELL for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python ") or "| python " in line] + re.findall(
    r"`(python [^`]+)`", TEXT
)


def test_every_flag_and_file_it_names_exists():
    assert len(COMMANDS) >= 8
    sources = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in (
            "config.py",
            "evaluate.py",
            "data/check.py",
            *(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").iterdir() if path.suffix == ".py"),
            "convert.py",
            "publishing/config.py",
            "publishing/hub.py",
            "auto_upload.py",
            "example_usage.py",
            "app.py",
        )
    }
    fields = set(re.findall(r"^    (\w+): ", "".join(sources.values()), re.M))
    fields |= {"help", "no_build_isolation", "ignore_scripts", "prefix"}  # tyro's own, pip's and npm's
    fields |= {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint"}  # torchrun's
    fields |= {"nodes", "ntasks_per_node", "signal"}  # srun's
    for flag in set(re.findall(r"(?<=[\s`])--([a-z][a-z0-9-]*[a-z0-9])", TEXT)):
        name = flag.replace("-", "_")
        assert name in fields or name.removeprefix("no_") in fields, flag
    for name in set(re.findall(r"`([\w/]+\.(?:py|md))`", TEXT)) | set(re.findall(r"python (\w+\.py)", TEXT)):
        assert (ROOT / name).is_file(), name


def test_every_dependency_has_its_reason():
    files = [ROOT / "requirements.txt", *(ROOT / "requirements").iterdir()]
    requirements = "".join(path.read_text() for path in files)
    section = TEXT.split("## Dependencies")[1].split("## ")[0]
    for name in re.findall(r"^([\w-]+)>=", requirements, re.M):
        assert name in section, name


def test_ci_runs_the_test_command_as_it_stands_here():
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
# Commands that no machine without a network, or with two cores and minutes, can run: what follows begins one of them.
ELSEWHERE = {
    "python main.py --preset demo": "the slow test below",
    "python main.py --preset img2gpt": "Flickr30k, pretrained models: test_adapters.py",
    "python main.py --precision bf16 --compile": "COCO",
    "python main.py --dataset karpathy": "COCO",
    "python main.py --data-dir my_photos --init pretrained": "pretrained models: test_pretrained.py",
    "python evaluate.py vit-gpt2-captioning.safetensors --dataset karpathy": "COCO",
    "python convert.py from-transformers nlpconnect": "the Hub",
    "python upload_to_hf.py": "the Hub: test_upload.py",
    "python app.py": "it serves until it is stopped: test_app.py",
    "python benchmark.py": "minutes: test_benchmark.py",
    "python -m venv": "an installation",
}


@pytest.fixture(scope="module")
def user(tmp_path_factory, scenes_dir) -> Path:
    """A user's folder, with all that the README's commands name."""
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
    name = "runs/img2gpt-20260101-120000/img2gpt_epoch_3.safetensors"
    (folder / name).parent.mkdir(parents=True)
    model.save_file(folder / name)  # a whole model, where adapters would have to name pretrained ones
    return folder


NAMED = {
    "python main.py",
    "python convert.py merge",
    "python dataset.py check",
}  # in a sentence, with nothing behind it


def runs_here(command: str) -> bool:
    return not any(command.startswith(beginning) for beginning in ELSEWHERE) and command not in NAMED


def test_what_is_left_out_is_there():
    assert [beginning for beginning in ELSEWHERE if not any(line.startswith(beginning) for line in COMMANDS)] == []


HERE = list(dict.fromkeys(filter(runs_here, COMMANDS)))


@pytest.mark.parametrize("command", HERE)
def test_every_other_command_runs(user, command):
    """As it stands in the README, in a user's folder and without a network; trainings are cut short."""
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
        assert written.read_bytes().strip()
        assert written.suffix != ".csv" or len(written.read_text().splitlines()) == 3  # a header and two pictures


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
