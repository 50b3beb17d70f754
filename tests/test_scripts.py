"""The commands people type, as real processes in an empty folder: main.py, example_usage.py, evaluate.py."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_shared
from PIL import Image
from processes import finished
from tiny import tiny_flags

import evaluate
import example_usage
from config import PRESETS, Augmentation, TrainConfig, UserError, ViTGPT2Config
from data.scenes import scene_from_dict, score_scenes
from data.sources import load_table
from dataset import CaptionDataset
from evaluate import caption_loss
from example_usage import caption_image, is_model
from main import INTERNAL, for_any_layout, parse_arguments
from model import ImageCaptionModel
from training.run import name_of

MODEL = "vit-gpt2-captioning.safetensors"


HELP = """
import runpy, sys
name, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_path(name, run_name="__main__")
finally:
    assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    "command",
    ["main", "example_usage", "upload_to_hf", "auto_upload", "convert", "convert onnx", "app", "benchmark metrics"],
)
def test_help_does_not_wait_for_torch(command):
    """`--help` took three seconds, most of which went into importing torch and transformers."""
    name, *command = command.split()
    shown = finished("-c", HELP, ROOT / f"{name}.py", *command, "--help", environment={"PYTHONPATH": ROOT})
    assert "show this help message" in shown.stdout, shown.stderr


def script(cwd: Path, *arguments: str | Path, code: int = 0) -> str:
    """Runs a script; returns its standard output, or its standard error when it is meant to fail."""
    done = finished(*arguments, cwd=cwd, code=code)
    return done.stderr if code else done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo cut short: enough steps to look at pictures, too few to caption them well."""
    directory = tmp_path_factory.mktemp("demo")
    arguments = ["--num-scenes", "3000", "--max-steps", "100", "--output-dir", "out", "--eval-interval", "50"]
    output = script(directory, "main.py", "--preset", "demo", *arguments)
    for word in ("device ", "precision ", "attention ", "parameters", "pictures", "steps ", "estimate "):
        assert word in output
    return directory


def test_the_demo_leaves_everything_it_promises(demo):
    assert {path.name for path in demo.iterdir()} == {"out", MODEL}
    assert (demo / MODEL).read_bytes() == (demo / "out" / MODEL).read_bytes()
    for picture in ("samples.png", "curves.png"):
        assert min(Image.open(demo / "out" / picture).size) > 300
    lines = [json.loads(line) for line in (demo / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(10, 101, 10))
    assert all(line["learning_rate"] >= 0 for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "samples" in line] == [50, 100]
    assert any("val_loss" in line for line in lines)


def test_scenes_test_json_can_be_scored_again(demo):
    metrics = json.loads((demo / "out/metrics.json").read_text())
    entries = json.loads((demo / "out/scenes_test.json").read_text())
    assert len(entries) == 500 and all((demo / "out/scenes/test2017" / entry["file"]).is_file() for entry in entries)
    again = score_scenes([scene_from_dict(e["truth"]) for e in entries], [e["caption"] for e in entries])
    assert again.items() <= metrics.items()
    assert {"bleu_4", "cider_d", "rouge_l", "scene_accuracy", "scene_accuracy_one_group"} <= set(metrics)


def test_the_demo_model_looks_at_the_picture(demo):
    """Swapping pictures among captions must cost the model dearly: a captioner can score well without looking."""
    model = ImageCaptionModel.from_pretrained(demo / MODEL)
    table = load_table("coco", demo / "out/scenes", "test").head(200)
    from dataset import make_dataloader

    loader = make_dataloader(CaptionDataset(table, model.tokenizer, model.config), 50)
    right, shuffled = (caption_loss(model, loader, torch.device("cpu"), torch.float32, s) for s in (False, True))
    assert shuffled > right + 0.3


def test_example_usage(demo, tmp_path):
    picture = demo / "out/scenes/test2017/000000000000.png"
    caption = script(tmp_path, "example_usage.py", picture, demo / MODEL).strip()
    entries = json.loads((demo / "out/scenes_test.json").read_text())
    assert caption == entries[0]["caption"]  # the script and the evaluation decode alike
    (tmp_path / "folder").mkdir()
    for name in ("b.png", "a.png"):
        (tmp_path / "folder" / name).write_bytes(picture.read_bytes())
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    output = script(tmp_path, "example_usage.py", "folder", picture, demo / MODEL)
    assert output.splitlines() == [f"folder/{n}\t{caption}" for n in ("a.png", "b.png")] + [f"{picture}\t{caption}"]
    assert "a drawn scene" in script(demo, "example_usage.py")  # no arguments: the newest local model


def test_example_usage_names_bad_pictures_and_does_the_rest(demo, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    picture = demo / "out/scenes/test2017/000000000000.png"
    error = script(tmp_path, "example_usage.py", "bad.png", picture, demo / MODEL, code=1)
    assert error.strip().splitlines() == [error.strip()] and "bad.png" in error


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_caption_image_takes_paths_and_urls(demo):
    picture = demo / "out/scenes/test2017/000000000000.png"
    greedy = caption_image(picture, demo / MODEL, do_sample=False, num_beams=3)
    entries = json.loads((demo / "out/scenes_test.json").read_text())
    assert greedy == entries[0]["caption"]
    handler = functools.partial(Quiet, directory=str(picture.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        allowed = {"do_sample": False, "num_beams": 3, "allow_private_urls": True}
        assert caption_image(address + picture.name, demo / MODEL, **allowed) == greedy
        with pytest.raises(UserError, match=r"absent\.png"):
            caption_image(address + "absent.png", demo / MODEL, allow_private_urls=True)
        with pytest.raises(UserError, match="not public"):
            caption_image(address + picture.name, demo / MODEL)
        server.shutdown()
    torch.manual_seed(0)
    sampled = caption_image(image_path=str(picture), model_source=str(demo / MODEL), device="cuda", max_length=32,
                            temperature=1.0, do_sample=True, top_k=50, top_p=0.95)  # fmt: skip
    torch.manual_seed(0)
    assert isinstance(sampled, str) and sampled == caption_image(picture, demo / MODEL)
    with pytest.raises(UserError, match="only http"):
        caption_image("file:///etc/passwd", demo / MODEL)


def test_what_is_a_model_and_what_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "pictures").mkdir()
    models = {"m.safetensors", "here", "someone/model", "someone/model-v1.5"}
    for name in models | {
        "folder",
        "user/pictures",
        "photo.jpg",
        "dir/photo.jpg",
        "http://x/y",
        "./a/b",
        "a/b/c",
        "dir/*",
        "-",
    }:
        assert is_model(name) == (name in models), name
    with pytest.raises(UserError, match="no model here"):
        example_usage.newest_model()


def test_another_runs_model_is_kept(demo, tmp_path):
    (tmp_path / MODEL).write_text("someone else's")
    arguments = ["--num-scenes", "64", "--max-steps", "2", "--batch-size", "8", "--seed", "1"]
    script(tmp_path, "main.py", "--preset", "demo", *arguments)
    assert (tmp_path / "vit-gpt2-captioning.previous.safetensors").read_text() == "someone else's"
    assert [path.name[:5] for path in (tmp_path / "runs").iterdir()] == ["demo-"]


def test_evaluate_script(demo, tmp_path):
    """Each evaluation has a folder, and names it; the second one overwrote the first."""
    output = script(tmp_path, "evaluate.py", demo / MODEL, "--data-dir", demo / "out/scenes", "--split", "test")
    before = json.loads((demo / "out/metrics.json").read_text())
    (first,) = (tmp_path / "evaluation").iterdir()
    after = json.loads((first / "metrics.json").read_text())
    assert f"report      evaluation/{first.name}/report.html" in output and first.name.startswith(
        "vit-gpt2-captioning-"
    )
    assert after["bleu_4"] == before["bleu_4"] and "cider_d" in output
    folder = needs_shared("coco_eval")
    results, references = (folder / f"captions_val2014_fakecap_{kind}.json" for kind in ("results", "refs"))
    script(tmp_path, "evaluate.py", "--results", results, "--references", references)
    (second,) = set((tmp_path / "evaluation").iterdir()) - {first}
    assert json.loads((second / "metrics.json").read_text())["cider_d"] == pytest.approx(0.5998, abs=1e-3)


@pytest.mark.slow
def test_flickr8k_preset_cut_short(tmp_path):
    folder = needs_shared("flickr8k")
    model = ["--vision-num-layers", "1", "--decoder-num-layers", "1", "--image-size", "32", "--resize-size", "36"]
    script(tmp_path, "main.py", "--preset", "flickr8k", "--data-dir", folder, "--max-steps", "3", *model)
    (run,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["pictures"] == 1000 and metrics["loss"] < 9


# Data as people have it

SMALL = tiny_flags(max_length=32)


def own_photos(folder: Path, scenes_dir: Path, number: int, damaged: int = 0) -> Path:
    """A person's own folder: so many pictures with a .txt beside each, the first of them damaged."""
    table = load_table("coco", scenes_dir, "train")
    folder.mkdir()
    for row in range(number):
        picture = table.picture(row).read_bytes()
        (folder / f"photo {row:02}.png").write_bytes(picture[:50] if row < damaged else picture)
        (folder / f"photo {row:02}.txt").write_text("\r\n".join(table.captions_of(row)))
    return folder


def test_a_persons_own_folder_simply_works(tmp_path, scenes_dir):
    """Pictures with a .txt beside each, no parts, no tokenizer to be had: one flag is all it takes."""
    own_photos(tmp_path / "my_photos", scenes_dir, 24)
    before = sorted((tmp_path / "my_photos").iterdir())
    output = script(tmp_path, "main.py", "--data-dir", "my_photos", "--max-steps", "2", *SMALL)
    assert "recognised as name.txt beside each name.jpg; 4 pictures each set aside for val and test" in output
    assert "16 pictures, 80 captions" in output and "tokenizer   trained on the captions" in output
    assert sorted((tmp_path / "my_photos").iterdir()) == before  # nothing is written there
    assert (tmp_path / MODEL).is_file()


def test_a_run_starts_from_pretrained_parts(tmp_path, scenes_dir, scenes_tokenizer):
    """--init-encoder and --init-decoder: sizes and the tokenizer are theirs, cross-attention is new."""
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192)
    ViTModel(ViTConfig(**sizes, image_size=24, patch_size=8)).save_pretrained(tmp_path / "vit")
    words = dict(vocab_size=len(scenes_tokenizer), eos_token_id=scenes_tokenizer.eos_token_id)
    words["bos_token_id"] = words["eos_token_id"]
    theirs = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=40, **words))
    theirs.save_pretrained(tmp_path / "gpt2")
    scenes_tokenizer.save_pretrained(tmp_path / "gpt2")
    arguments = ["--data-dir", scenes_dir, "--max-steps", "1", "--learning-rate", "1e-30", "--image-size", "16"]
    parts = ["--init-encoder", "vit", "--init-decoder", "gpt2"]
    output = script(tmp_path, "main.py", *arguments, *parts)
    assert "positions 3 x 3 -> 2 x 2" in output and "new         " in output
    model = ImageCaptionModel.from_pretrained(tmp_path / MODEL)
    assert (model.config.vision_embed_dim, model.config.decoder_num_layers, model.config.image_size) == (48, 3, 16)
    assert torch.equal(model.decoder.wte.weight, theirs.transformer.wte.weight)
    assert model.tokenizer.get_vocab() == scenes_tokenizer.get_vocab()


def test_flickr30k_comes_from_kaggle(tmp_path, scenes_dir, monkeypatch):
    """The recipe of the first version: no folder named, kagglehub's cache at hand, Kaggle's own bad row in the file."""
    pytest.importorskip("kagglehub")
    handle = tmp_path / "kaggle/datasets/hsankesara/flickr-image-dataset"
    pictures = handle / "versions/1/flickr30k_images/flickr30k_images"
    pictures.mkdir(parents=True)
    (handle / "1.complete").touch()
    table = load_table("coco", scenes_dir, "train")
    lines = ["image_name| comment_number| comment"]
    for row in range(24):
        (pictures / f"{1000 + row}.jpg").write_bytes(table.picture(row).read_bytes())
        lines += [f"{1000 + row}.jpg| {n}| {text} ." for n, text in enumerate(table.captions_of(row))]
    lines[-1] = lines[-1].replace("| 4| ", "| 4   ")
    (pictures.parent / "results.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    output = script(tmp_path, "main.py", "--dataset", "flickr30k", "--max-steps", "2", *SMALL)
    assert "flickr30k: 16 pictures, 80 captions" in output


def test_damaged_pictures_are_named_skipped_and_counted(tmp_path, scenes_dir):
    own_photos(tmp_path / "photos", scenes_dir, 40, damaged=1)
    arguments = ["main.py", "--data-dir", "photos", "--max-steps", "4", "--batch-size", "9", *SMALL]
    error = script(tmp_path, *arguments, "--output-dir", "strict", code=2)
    assert "1 of 40 pictures are missing or damaged, 2.5% where 1.0% are allowed" in error
    assert "photo 00.png" in (tmp_path / "strict/bad_samples.csv").read_text()
    output = script(tmp_path, *arguments, "--output-dir", "lenient", "--max-bad-share", "0.05")
    assert "1 picture skipped" in output and "photo 00.png" in (tmp_path / "lenient/bad_samples.csv").read_text()


def test_pictures_trained_on_are_not_scored(demo, tmp_path):
    """A model of train2017 has learned nearly all of Karpathy's test pictures; such a figure once went into a paper."""
    arguments = ["evaluate.py", demo / MODEL, "--data-dir", demo / "out/scenes", "--split", "train"]
    error = script(tmp_path, *arguments, code=2)
    assert "3,000 of the 3,000 train pictures" in error and "--allow-overlap" in error
    model = ImageCaptionModel.from_pretrained(demo / MODEL)
    model.save_pretrained(tmp_path / "saved")
    known = ImageCaptionModel.from_pretrained(tmp_path / "saved").trained_on
    train, test = (load_table("coco", demo / "out/scenes", split) for split in ("train", "test"))
    assert set(known) == set(train.keys()) and not set(known) & set(test.keys())
    evaluate.check_overlap(known, train, allowed=True)


@pytest.mark.slow
def test_a_run_from_the_cache_is_the_same_run(tmp_path, scenes_dir):
    """Pixels kept on disk are the ones that are decoded on the way: the models are equal to the bit."""
    arguments = [
        "main.py",
        "--data-dir",
        scenes_dir,
        "--max-steps",
        "5",
        "--precision",
        "fp32",
        "--flip",
        "0.5",
        *SMALL,
    ]
    arguments += ["--resize-size", "20", "--tokenizer", "train"]
    environment = {"VIT_GPT2_CACHE": tmp_path / "cache"}
    for name, flags in (("plain", ()), ("kept", ("--cache",)), ("again", ("--cache",))):
        done = finished(*arguments, "--output-dir", name, *flags, cwd=tmp_path, environment=environment)
        assert ("cache  " in done.stdout) == (name == "kept")  # made once
    models = {(tmp_path / name / MODEL).read_bytes() for name in ("plain", "kept", "again")}
    assert len(models) == 1


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["main.py"], "./coco_data is not there"),
        (["main.py", "--data-dir", "nowhere"], "nowhere"),
        (["main.py", "--preset", "flickr8k"], "needs --data-dir"),
        (["main.py", "--preset", "flickr9k"], "preset 'flickr9k' is unknown"),
        (["main.py", "--preset", "demo", "--image-size", "50"], "image_size 50 is not divisible by patch_size 8"),
        (["main.py", "--preset", "demo", "--decoder-num-heads", "3"], "decoder_num_heads 3 does not divide"),
        (["main.py", "--preset", "demo", "--output-dir", "file/inside"], "cannot write there"),
        (["main.py", "--preset", "demo", "--batch-size", "0"], "batch_size is 0"),
        (["main.py", "--preset", "demo", "--resume", "nowhere"], "no checkpoint to resume from"),
        (["main.py", "--preset", "demo", "--seed", "-1"], "seed is -1"),
        (["main.py", "--preset", "demo", "--data-dir", "file"], "holds another data set"),
        (["main.py", "--preset", "demo", "--flip", "2"], "flip is 2.0"),
        (
            ["main.py", "--preset", "demo", "--cache-on-gpu", "--color-jitter", "0.1"],
            "cache_on_gpu supports only crops and flips",
        ),
        (["main.py", "--preset", "demo", "--cache-on-gpu", "--device", "cpu"], "it needs a GPU"),
        (["main.py", "--dataset", "nothing", "--data-dir", "."], "dataset 'nothing' is unknown"),
        (["main.py", "--dataset", "flickr8k"], "needs --data-dir"),
        (["dataset.py"], "python dataset.py check DIR"),
        (["dataset.py", "check", "nowhere"], "nowhere"),
        (["main.py", "--tokenizer", "nowhere", "--data-dir", "file"], "file"),
        (["example_usage.py", "photo.jpg"], "not a readable safetensors file"),
        (["example_usage.py", "photo.jpg", "file.safetensors"], "not a readable safetensors file"),
        (["example_usage.py", "photo.jpg", "absent.safetensors"], "no such model file"),
        (["evaluate.py"], "name a model"),
        (["evaluate.py", "--results", "file", "--references", "file"], "not in COCO's format"),
    ],
    ids=lambda value: "-".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line(tmp_path, arguments, words):
    (tmp_path / "file").write_text("text")
    (tmp_path / "file.safetensors").write_text("text")
    error = script(tmp_path, *arguments, code=2)
    assert words in error and len(error.strip().splitlines()) == 1, error
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "file.safetensors", "runs"}


def test_unknown_flags_are_refused(tmp_path):
    assert "--no-such-flag" in script(tmp_path, "main.py", "--no-such-flag", code=2)


# The command line is the config


def test_help_shows_every_field_with_its_sentence(tmp_path):
    """In groups, out of which a config is put together again: a field in none would be neither shown nor read."""
    text = " ".join(script(tmp_path, "main.py", "--help-all").replace("│", " ").split())
    groups = re.findall(r"─ (\w+) options ─", text)
    assert groups == ["basics", "data", "start", "learning", "adapters", "speed", "watching", "augmentation", "model"]
    for config in (TrainConfig, Augmentation, ViTGPT2Config):
        for field in dataclasses.fields(config):
            if field.name not in ("model", "augmentation", *INTERNAL):
                assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert "Highest learning rate" in text and "Width of the encoder" in text


def test_flags_presets_and_the_constants_people_edit(monkeypatch):
    import main

    config = parse_arguments([])
    assert (config.preset, config.dataset) == ("coco", "auto")
    assert (config.batch_size, config.epochs, config.device) == (128, 10, "auto")
    assert (config.learning_rate, config.weight_decay, config.gradient_clip) == (2e-4, 0.01, 1.0)
    assert (config.optimizer, config.captions_per_image, config.model) == ("adamw", 5, ViTGPT2Config())
    monkeypatch.setattr(main, "BATCH_SIZE", 7)
    assert parse_arguments([]).batch_size == 7
    assert parse_arguments(["--batch-size", "9"]).batch_size == 9
    demo = parse_arguments(["--preset", "demo", "--vision-embed-dim", "64", "--flip", "0.5"])
    assert demo.model.vision_embed_dim == 64 and demo.augmentation.flip == 0.5
    assert demo.batch_size == PRESETS["demo"].batch_size
    # Defaults that follow from other fields once stayed at what the preset's own values gave.
    assert parse_arguments(["--image-size", "384"]).model.resize_size == 384
    small = parse_arguments(["--preset", "demo", "--vocab-size", "300"]).model
    assert (small.end_token_id, small.pad_token_id) == (299, 299)
    assert parse_arguments(["--preset", "flickr8k", "--image-size", "96"]).model.resize_size == 144
    flags = "--data-dir --output-dir --max-steps --warmup-steps --precision --seed --num-workers --checkpoint-interval"
    for flag in flags.split():
        parse_arguments([flag, "fp32" if flag == "--precision" else "3"])
    for flag in ("--tokenizer", "--resume"):
        parse_arguments([flag, "x"])
    parse_arguments(["--compile", "--yes"])


def test_seed_names():
    from dataset import download_coco_dataset

    assert callable(download_coco_dataset)
    config = ViTGPT2Config(image_size=224, patch_size=16, vision_embed_dim=768, vocab_size=50257)
    assert (config.max_length, config.bridge, config.num_patches) == (512, "cross_attention", 196)


def test_a_preset_takes_data_in_any_layout(tmp_path):
    """--preset flickr8k refused a folder of photographs with texts beside them."""
    texts = tmp_path / "photos"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"number {number}")
        (texts / f"{number}.jpg").write_bytes(b"")
    theirs = tmp_path / "theirs"
    (theirs / "Images").mkdir(parents=True)
    (theirs / "captions.txt").write_text("image,caption\n1.jpg,one .\n")
    for folder, dataset in ((texts, "auto"), (theirs, "flickr8k"), (tmp_path / "absent", "auto")):
        config = parse_arguments(["--preset", "flickr8k", "--data-dir", str(folder)])
        assert for_any_layout(config).dataset == dataset
    assert name_of(for_any_layout(parse_arguments(["--preset", "flickr8k", "--data-dir", str(texts)]))) == "photos"
    chosen = parse_arguments(["--preset", "flickr8k", "--data-dir", str(texts), "--dataset", "csv"])
    assert for_any_layout(chosen).dataset == "csv"


def test_a_run_that_does_not_fit_into_memory_is_refused(tmp_path, scenes_dir):
    """On a CPU the system killed it in its first step, without a word."""
    flags = (
        "--preset",
        "demo",
        "--dataset",
        "coco",
        "--data-dir",
        scenes_dir,
        "--batch-size",
        20_000_000,
        *tiny_flags(),
    )
    done = finished("main.py", *flags, cwd=tmp_path, code=2)
    assert re.search(r"needs about [\d.]+ GiB of memory, and there are [\d.]+: use a smaller --batch-size", done.stderr)
    assert done.stderr.count("\n") == 1 and "training:" not in done.stderr
