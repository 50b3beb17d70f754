"""Small things that many tests need: tiny models, a tiny drawn data set, a tokenizer of its captions."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
if "PYTEST_XDIST_WORKER" in os.environ:  # or the workers' threads fight for the cores: five times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VIT_GPT2_CACHE"] = tempfile.mkdtemp(prefix="vit-gpt2-tests-")

import torch
from tiny import tiny_config

from config import ViTGPT2Config
from data.scenes import draw_scenes
from data.sources import load_table
from dataset import train_tokenizer
from model import ImageCaptionModel

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


# The files that take longest begin, so that no core is left with one of them at the end.
LONGEST = ["test_upload.py", "test_scripts.py", "test_app.py", "test_readme.py", "test_train.py", "test_adapters.py"]
LONGEST += ["test_evaluate.py", "test_distributed.py", "test_benchmark.py", "test_checkpoint.py", "test_captioning.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def random_model(config: ViTGPT2Config, std: float = 0.3) -> ImageCaptionModel:
    """The same one every time, its weights spread wide enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = ImageCaptionModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


@pytest.fixture
def tiny_model() -> ImageCaptionModel:
    return random_model(tiny_config())


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    draw_scenes(directory, {"train": 96, "val": 12, "test": 12}, seed=1)
    return directory


@pytest.fixture(scope="session")
def scenes_table(scenes_dir):
    return load_table("coco", scenes_dir, "train")


@pytest.fixture(scope="session")
def scenes_tokenizer(scenes_table):
    return train_tokenizer(scenes_table.captions().to_pylist(), 400)


def write_bases(folder, image_size=16, patch_size=8, vocab_size=61, positions=32, width=32, layers=2) -> dict[str, str]:
    """A tiny random ViT and GPT-2 as transformers writes them."""
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * width,
        image_size=image_size,
        patch_size=patch_size,
    )
    end = vocab_size - 1
    gpt2 = GPT2Config(n_embd=width, n_layer=layers, n_head=2, n_positions=positions, vocab_size=vocab_size)
    gpt2.bos_token_id = gpt2.eos_token_id = end
    for name, model in (("vit", ViTModel(vit)), ("gpt2", GPT2LMHeadModel(gpt2))):
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "ln" not in key and "norm" not in key:
                    parameter.normal_(std=0.15)
        model.save_pretrained(folder / name)
    return {"encoder": str(folder / "vit"), "decoder": str(folder / "gpt2")}


def write_language_model(kind: str, folder, tokenizer, **changes) -> str:
    """A tiny random Llama, Qwen or another causal language model with its tokenizer; changes: of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    end = tokenizer.eos_token_id
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        tie_word_embeddings=kind == "qwen2",
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    about = AutoConfig.for_model(kind, **(sizes | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(about)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # or nobody would miss it
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def needs_package(name: str, requirements: str) -> pytest.MarkDecorator:
    """Skips tests where a package is not installed. It is not imported: the test or the fixture that needs it does that."""
    absent = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(absent, reason=f"{name} is of requirements/{requirements}.txt")


def needs_shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the shared data set {name}")
    return path


@pytest.fixture(scope="session")
def coco_eval() -> tuple[list[str], list[list[str]]]:
    """The COCO evaluation's own 1,000 candidates and their references."""
    directory = needs_shared("coco_eval")
    results = json.loads((directory / "captions_val2014_fakecap_results.json").read_text())
    references: dict[int, list[str]] = {}
    for annotation in json.loads((directory / "captions_val2014_fakecap_refs.json").read_text())["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [one["caption"] for one in results], [references[one["image_id"]] for one in results]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny random CLIP, as transformers saves one."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    directory = tmp_path_factory.mktemp("clip")
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(directory)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(entries) - 2, "eos_token_id": len(entries) - 1, "pad_token_id": len(entries) - 1}
    torch.manual_seed(3)
    model = CLIPModel(
        CLIPConfig(
            text_config=small | ends | {"vocab_size": len(entries), "max_position_embeddings": 40},
            vision_config=small | {"image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    for parameter in model.parameters():  # spread wide enough that captions differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(directory)
    return directory
