"""Tokenizers, samples and batches, and where their pixels are kept."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, needs_shared, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import finished
from torch.utils.data._utils.pin_memory import pin_memory

import utils
from config import Augmentation, UserError
from data import pixels
from data.table import make_table
from dataset import (
    Batches,
    CaptionDataset,
    Tokens,
    collate,
    decode,
    load_picture,
    load_table,
    load_tokenizer,
    make_dataloader,
    mirrored,
    prepare_picture,
    train_tokenizer,
)
from model import ImageCaptionModel

EVERYTHING = Augmentation(flip=0.5, random_resized_crop=0.5, color_jitter=0.3, rand_augment=9)


def dataset(table, tokenizer, **options) -> CaptionDataset:
    config = tiny_config(vocab_size=len(tokenizer), resize_size=20)
    return CaptionDataset(table, tokenizer, config, **options)


def damaged_copy(scenes_dir: Path, folder: Path, number: int, damaged: int) -> Path:
    """So many of the drawn training scenes as COCO 2017, the first of them damaged."""
    shutil.copytree(scenes_dir / "annotations", folder / "annotations")
    for part in ("val2017", "test2017"):
        shutil.copytree(scenes_dir / part, folder / part)
    source = folder / "annotations" / "captions_train2017.json"
    content = json.loads(source.read_text())
    content["images"] = content["images"][:number]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    source.write_text(json.dumps(content))
    (folder / "train2017").mkdir()
    for i, image in enumerate(content["images"]):
        picture = (scenes_dir / "train2017" / image["file_name"]).read_bytes()
        (folder / "train2017" / image["file_name"]).write_bytes(picture[:99] if i < damaged else picture)
    return folder


# Tokenizers


def test_gpt2_tokenizer_from_a_folder():
    folder = needs_shared("gpt2")
    tokenizer = load_tokenizer(str(folder), [], 50257)
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == 50256
    for vector in json.loads((folder / "test_vectors.json").read_text(encoding="utf-8")):
        assert tokenizer(vector["text"]).input_ids == vector["ids"]


def test_trained_tokenizer_keeps_words_whole_and_every_text():
    texts = ["two small red circles at the top", "red circles", "a dog"] * 5
    tokenizer = train_tokenizer(texts, 500)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer("red circles").input_ids == tokenizer("two small red circles").input_ids[2:]
    odd = "Café 東京 🙂 unseen!"
    ids = torch.tensor([tokenizer(odd).input_ids + [tokenizer.eos_token_id] * 2])
    assert decode(tokenizer, ids) == [odd]


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
def test_a_captions_end_of_text_is_text(kind, scenes_tokenizer):
    """<|endoftext|> inside a caption became the end token, in the middle of a target. The same holds for every special
    token, and the tokenizer stays as it was."""
    tokenizer = scenes_tokenizer if kind == "trained" else load_tokenizer(str(needs_shared("gpt2")), [], 50257)
    text = "a red circle<|endoftext|> and a <|endoftext|>"
    tokens = Tokens([text, "a red circle"], tokenizer, 100)
    assert tokenizer.eos_token_id not in tokens.ids
    assert tokenizer.decode(tokens[0].tolist()).strip() == text
    assert tokens[1].tolist() == tokenizer("a red circle").input_ids
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]


def test_tokenizers_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="at least 257"):
        train_tokenizer(["a"], 100)
    with pytest.raises(UserError, match="--tokenizer train") as error:
        load_tokenizer(str(tmp_path), [], 50257)
    assert "\n" not in str(error.value)


# Batches


def test_a_batch_is_what_its_docstring_says(scenes_table, scenes_tokenizer):
    data = dataset(scenes_table, scenes_tokenizer)
    batch = collate([data[0, row] for row in range(4)], data.config, 6)
    end = scenes_tokenizer.eos_token_id
    assert batch.pixel_values.shape == (4, 3, 16, 16) and batch.pixel_values.dtype == torch.uint8
    assert batch.input_ids.shape == batch.labels.shape == (4, 6, batch.lengths.max())
    assert (batch.lengths[:, 5] == 0).all()  # scenes have five captions: the sixth place is empty
    for n in range(4):
        for k in range(5):
            length = batch.lengths[n, k]
            ids = scenes_tokenizer(scenes_table.captions_of(n)[k]).input_ids
            assert batch.input_ids[n, k, :length].tolist() == [end, *ids]
            assert batch.labels[n, k, :length].tolist() == [*ids, end]  # the end token is a target
            assert (batch.labels[n, k, length:] == -100).all()
    real = batch.positions[batch.positions < batch.labels.numel()]
    assert torch.equal(real, (batch.labels.flatten() != -100).nonzero().squeeze(-1))
    assert len(batch.positions) % 64 == 0
    assert batch.captions == [scenes_table.captions_of(row) for row in range(4)]


ODD = ["", " \t", "\u200f\u202eabc", "red " * 10_000, "🙂" * 50, "東京の猫", "שלום", "a\0b", "3.5", "e\u0301" * 9]


def test_odd_captions_give_finite_losses(scenes_dir, scenes_tokenizer, scenes_table):
    """Over-long captions are cut with their end token kept, and counted."""
    table = make_table([(scenes_table.picture(0), 0, [*ODD, "blue"]), (scenes_table.picture(1), 1, ["\u200d"])])
    data = dataset(table, scenes_tokenizer, captions_per_image=12)
    assert data.tokens.cut == 3  # the red, the smiling and, in bytes, the Japanese one
    batch = collate([data[0, 0], data[0, 1]], data.config, 12)
    assert batch.input_ids.shape[-1] == data.config.max_length
    ends = batch.labels.gather(2, (batch.lengths - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert (ends[batch.lengths > 0] == data.config.end_token_id).all()
    model = ImageCaptionModel(data.config)
    loss = model(*batch.inputs).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.lists(st.text(max_size=30), max_size=4), min_size=1, max_size=4))
def test_any_captions_give_finite_losses(texts, scenes_table, scenes_tokenizer):
    table = make_table([(scenes_table.picture(n), n, captions) for n, captions in enumerate(texts)])
    if not len(table):
        return
    data = dataset(table, scenes_tokenizer)
    batch = collate([data[0, row] for row in range(len(table))], data.config, 5)
    model = ImageCaptionModel(data.config)
    assert model(*batch.inputs).loss.isfinite()


def test_a_batch_without_any_target_has_the_loss_zero(scenes_table, scenes_tokenizer, tmp_path):
    """The mean over no targets is 0 / 0, and one NaN in the gradients ruins a run."""
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    data = dataset(make_table([(tmp_path / "bad.jpg", 0, ["red"])]), scenes_tokenizer)
    batch = collate([data[0, 0]], data.config, 5)
    assert batch.lengths.sum() == 0 and (batch.labels == -100).all()
    model = ImageCaptionModel(data.config)
    loss = model(*batch.inputs).loss
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def batches(data, **options):
    return [(b.rows, b.pixel_values, b.input_ids) for b in make_dataloader(data, 7, shuffle=True, **options)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("keep", ["no", "memory", "disk"])
def test_batches_are_a_pure_function_of_seed_epoch_and_step(scenes_table, scenes_tokenizer, keep):
    """Started in the middle, or with workers, the loader must give the very batches that it gave from the start."""
    data = dataset(scenes_table, scenes_tokenizer, augmentation=EVERYTHING, captions_per_image=2, keep=keep)
    state = torch.random.get_rng_state()
    assert data[0, 3].pixels.shape == (3, 16, 16)
    assert torch.equal(torch.random.get_rng_state(), state)  # or loading in this process would change dropout
    whole = batches(data, last_step=30)
    for options in ({}, {"num_workers": 2}, {"num_workers": 4}):
        later = batches(data, first_step=9, last_step=30, **options)
        for batch, other in zip(whole[9:], later, strict=True):
            assert batch[0] == other[0] and torch.equal(batch[1], other[1]) and torch.equal(batch[2], other[2])
    assert whole[0][0] != whole[14][0]  # another epoch, another order


@pytest.mark.parametrize("pictures", [96, 92])
def test_processes_share_the_global_batches(scenes_table, scenes_tokenizer, pictures):
    """One process or two: the same pictures in the same step; of a last batch of one, the second process gets none."""
    data = dataset(scenes_table.head(pictures), scenes_tokenizer)
    alone = batches(data)
    shares = [batches(data, rank=rank, world_size=2) for rank in (0, 1)]
    for whole, first, second in zip(alone, *shares, strict=True):
        assert whole[0][0::2] == first[0] and whole[0][1::2] == second[0]
        assert torch.equal(whole[1][1::2], second[1][: len(second[0])])  # none: a black one stands in


def test_an_epoch_visits_everything_once(scenes_table, scenes_tokenizer):
    data = dataset(scenes_table, scenes_tokenizer)
    rows = [row for batch in make_dataloader(data, 7, shuffle=True) for row in batch.rows]
    assert sorted(rows) == list(range(len(scenes_table)))
    one = dataset(scenes_table, scenes_tokenizer, captions_per_image=1)
    rows = [row for batch in make_dataloader(one, 7, shuffle=True) for row in batch.rows]
    assert sorted(rows) == sorted(list(range(len(scenes_table))) * 5)


def test_micro_batches_add_up_to_the_batch(scenes_table, scenes_tokenizer):
    """Gradients of the parts, weighed by their tokens, are those of the whole batch."""
    data = dataset(scenes_table, scenes_tokenizer)
    batch = dataclasses.replace(collate([data[0, row] for row in range(7)], data.config, 5), bad=[(6, "cut")])
    assert [part.bad for part in batch.micro(3)] == [[(6, "cut")]] * 3  # by row, whichever part has it
    model = ImageCaptionModel(data.config)
    gradients = []
    for size in (7, 3):
        model.zero_grad()
        for part in batch.micro(size):
            loss = model(*part.inputs).loss
            (loss * (part.lengths.sum() / batch.lengths.sum())).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_longer_batches_give_the_same_loss(scenes_table, scenes_tokenizer):
    """cuDNN plans its attention for every length of a batch anew, 0.4 s a step; lengths rounded up are few."""
    data = dataset(scenes_table, scenes_tokenizer)
    data.length_multiple = 8
    model, plain = ImageCaptionModel(data.config).eval(), dataset(scenes_table, scenes_tokenizer)
    shapes = set()
    for batch, other in zip(make_dataloader(data, 2), make_dataloader(plain, 2), strict=True):
        shapes.add(batch.input_ids.shape[2])
        torch.testing.assert_close(model(*batch.inputs).loss, model(*other.inputs).loss)
    assert shapes <= {8, 16, 24} and len(shapes) < 4
    config = dataclasses.replace(data.config, max_length=12)  # no position lies beyond
    assert collate([plain[0, 0]], config, 5, length_multiple=8).input_ids.shape[2] == 12


def test_a_loader_pins_a_batch(scenes_table, scenes_tokenizer, monkeypatch):
    """torch's loader leaves what it does not know as it is: pages that no GPU copies from by itself."""
    data = dataset(scenes_table, scenes_tokenizer)
    batch = collate([data[0, 0]], data.config, 5)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor.clone())
    moved = pin_memory(batch)
    assert [id(tensor) for tensor in pinned] == [id(each) for each in vars(batch).values() if torch.is_tensor(each)]
    assert moved is not batch and torch.equal(moved.pixel_values, batch.pixel_values) and moved.rows == batch.rows
    assert moved["pixel_values"] is moved.pixel_values  # as scripts read it that know a batch as a dictionary


def padding(data, batch_size: int) -> float:
    loader = make_dataloader(data, batch_size, shuffle=True)
    real, room = 0, 0
    for batch in loader:
        real, room = real + int(batch.lengths.sum()), room + batch.input_ids.numel()
    return 1 - real / room


def test_batches_are_grouped_by_length(scenes_tokenizer, scenes_table):
    folder = needs_shared("flickr8k")
    table = load_table("flickr8k", folder, "train")
    config = tiny_config(vocab_size=50257, max_length=512)
    tokenizer = load_tokenizer(str(needs_shared("gpt2")), [], 50257)
    data = CaptionDataset(table, tokenizer, config)
    data.pixels.cached = torch.zeros(1, 3, 16, 16, dtype=torch.uint8).expand(len(table), 3, 16, 16)
    assert padding(data, 32) < 0.258 + 0.02
    data.captions_per_image = 1
    assert padding(data, 32) < 0.10


def test_grouping_loses_no_randomness(scenes_table, scenes_tokenizer):
    """Sorting the whole epoch would put the same captions together every time, and the short ones first."""
    data = dataset(scenes_table, scenes_tokenizer)
    orders = [Batches(data, 8, 0, 1, True).order(epoch).reshape(-1, 8) for epoch in range(30)]
    together = {tuple(sorted(batch)) for order in orders for batch in order.tolist()}
    assert len(together) > 0.9 * 30 * len(orders[0])
    longest = np.array([Batches(data, 8, 0, 1, True).lengths[order].max(1) for order in orders])
    assert abs(longest[:, 0].mean() - longest[:, -1].mean()) < longest.mean() / 4


# Pixels


@pytest.mark.parametrize("keep", ["no", "memory", "disk"])
def test_training_and_captioning_see_the_same_pixels(scenes_table, scenes_tokenizer, keep):
    data = dataset(scenes_table, scenes_tokenizer, keep=keep)
    for row in (3, 95):
        assert torch.equal(data[0, row].pixels, prepare_picture(scenes_table.picture(row), data.config))


def test_augmentation_crops_and_flips(scenes_table, scenes_tokenizer):
    data = dataset(scenes_table, scenes_tokenizer, augmentation=Augmentation(flip=0.5))
    seen = {data[epoch, 0].pixels.numpy().tobytes() for epoch in range(40)}
    assert len(seen) > 10
    plain = dataset(scenes_table, scenes_tokenizer)
    assert len({plain[epoch, 0].pixels.numpy().tobytes() for epoch in range(5)}) == 1


@pytest.mark.parametrize("name", ["random_resized_crop", "color_jitter", "rand_augment"])
def test_every_augmentation_changes_pictures(scenes_table, scenes_tokenizer, name):
    strength = 9 if name == "rand_augment" else 0.3
    data = dataset(scenes_table, scenes_tokenizer, augmentation=Augmentation(**{name: strength}))
    data.augmenter.room = 0  # no crops of its own
    seen = {data[epoch, 0].pixels.numpy().tobytes() for epoch in range(10)}
    assert len(seen) > 4 and data[0, 0].pixels.shape == (3, 16, 16) and data[0, 0].pixels.dtype == torch.uint8


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"rand_augment": 31}, {"color_jitter": -1}])
def test_augmentations_that_make_no_sense(wrong):
    with pytest.raises(UserError, match="between 0 and"):
        Augmentation(**wrong)


@pytest.mark.parametrize(
    ("caption", "other"),
    [
        ("a cat on the left", "a cat on the right"),
        ("The Right-hand dog, LEFT of it", "The Left-hand dog, RIGHT of it"),
        ("the rightmost and the leftmost", "the leftmost and the rightmost"),
        ("a bright copyright, cleft", "a bright copyright, cleft"),
    ],
)
def test_mirrored_captions(caption, other):
    assert mirrored(caption) == other and mirrored(other) == caption


def test_a_mirrored_picture_has_a_mirrored_caption(scenes_table, scenes_tokenizer):
    """A model that sees flipped pictures with unchanged captions learns that left is right."""
    data = dataset(scenes_table, scenes_tokenizer, augmentation=Augmentation(flip=1.0))
    data.augmenter.room = 0
    plain = dataset(scenes_table, scenes_tokenizer)
    changed = 0
    for row in range(len(scenes_table)):
        sample = data[0, row]
        assert torch.equal(sample.pixels, data.pixels[row][:, :16, :16].flip(-1))
        told = [scenes_tokenizer.decode(tokens).strip() for tokens in sample.tokens]
        assert told == [mirrored(caption) for caption in scenes_table.captions_of(row)]
        changed += told != scenes_table.captions_of(row)
        assert [t.tolist() for t in plain[0, row].tokens] == [scenes_tokenizer(c).input_ids for c in sample.captions]
    assert changed > 10


def test_cutting_out_on_the_device_gives_the_same_batch(scenes_table, scenes_tokenizer):
    """--cache-on-gpu crops and mirrors in one gather; here the device is the CPU."""
    augmentation = Augmentation(flip=0.5)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = [dataset(scenes_table, scenes_tokenizer, augmentation=augmentation, keep="memory") for _ in range(2)]
    data[1].keep_on(device)
    loaders = [make_dataloader(d, 7, shuffle=True) for d in data]
    for batch, other in zip(*loaders, strict=True):
        assert not len(other.pixel_values)
        assert torch.equal(batch.pixel_values, other.to(device, data[1]).pixel_values.cpu())
        parts = [part.to(device, data[1]).pixel_values.cpu() for part in other.micro(3)]
        assert torch.equal(batch.pixel_values, torch.cat(parts))


# Pictures kept on disk


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIT_GPT2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pixel_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("pixels-*") if path.suffix not in (".json", ".lock")]


def test_kept_pictures_are_made_once_and_anew_when_one_changes(
    kept, scenes_dir, tmp_path, scenes_tokenizer, monkeypatch
):
    folder = damaged_copy(scenes_dir, tmp_path / "data", 20, damaged=1)
    first = dataset(load_table("coco", folder, "train"), scenes_tokenizer, keep="disk")
    (file,) = pixel_files(kept)
    assert list(first.pixels.bad) == [0] and file.stat().st_size == 20 * (3 * 20 * 20 + 4)

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "load_picture", lambda *of: asked.append(of) or load_picture(*of))
        again = dataset(load_table("coco", folder, "train"), scenes_tokenizer, keep="disk")
    assert torch.equal(first.pixels.cached, again.pixels.cached) and again.pixels.bad == first.pixels.bad
    assert len(asked) == 1  # the bad one: what was wrong may have been the network's disk

    Image.new("RGB", (9, 9), "white").save(folder / "train2017" / "000000000000.png")
    mended = dataset(load_table("coco", folder, "train"), scenes_tokenizer, keep="disk")
    assert not mended.pixels.bad and (mended[0, 0].pixels == 255).all()
    assert pixel_files(kept) != [file] and len(pixel_files(kept)) == 1  # the old one is not left to fill the disk


def test_a_passing_fault_is_not_kept_for_ever(kept, scenes_table, scenes_tokenizer, monkeypatch):
    """Out of memory, or a network's disk away: it once made a good picture a bad one for all runs to come."""

    def fails(source, size, name, resample):
        if name.endswith("7.png"):
            raise UserError(f"{name}: not enough memory")
        return load_picture(source, size, name, resample)

    with monkeypatch.context() as patch:
        patch.setattr(pixels, "load_picture", fails)
        assert dataset(scenes_table, scenes_tokenizer, keep="disk").pixels.bad
    again = dataset(scenes_table, scenes_tokenizer, keep="disk").pixels
    assert not again.bad and torch.equal(again.cached[7], load_picture(scenes_table.picture(7), 20))


def test_what_a_killed_process_left_is_cleared_away(kept, scenes_table, scenes_tokenizer, monkeypatch):
    name = []
    monkeypatch.setattr(pixels, "cache_file", lambda *of: name.append(utils.cache_file(*of)) or name[-1])
    kept.mkdir()
    dataset(scenes_table, scenes_tokenizer, keep="disk")
    name[0].with_name(f"{name[0].name}.1234.part").write_bytes(b"x" * 99)
    name[0].unlink()
    dataset(scenes_table, scenes_tokenizer, keep="disk")
    assert not list(kept.glob("*.part"))


def test_an_interrupted_cache_is_not_taken_for_whole(kept, scenes_table, scenes_tokenizer, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pixels, "load_picture", interrupted)
        dataset(scenes_table, scenes_tokenizer, keep="disk")
    assert not pixel_files(kept)
    assert torch.equal(
        dataset(scenes_table, scenes_tokenizer, keep="disk").pixels.cached,
        dataset(scenes_table, scenes_tokenizer, keep="memory").pixels.cached,
    )


def test_no_room_and_no_folder_for_kept_pictures(kept, scenes_table, scenes_tokenizer, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="run without --cache"):
        patch.setattr(pixels.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        dataset(scenes_table, scenes_tokenizer, keep="disk")
    kept.rmdir() if kept.is_dir() and not any(kept.iterdir()) else shutil.rmtree(kept)
    kept.write_text("a file stands where the folder should be")
    with pytest.raises(UserError, match="VIT_GPT2_CACHE"):
        dataset(scenes_table, scenes_tokenizer, keep="disk")


def test_a_cache_has_its_room_before_anything_is_written(kept, scenes_table, scenes_tokenizer, monkeypatch):
    """It was a sparse file: when the disk was full the process died of SIGBUS, without a word."""
    taken = []

    def looks(*of):
        (unfinished,) = kept.rglob(".pixels-*.unfinished")
        taken.append(unfinished.stat().st_blocks * 512)
        return load_picture(*of)

    needed = len(scenes_table) * (3 * 20 * 20 + 4)
    for number, fault in enumerate([None, OSError(errno.EOPNOTSUPP, "no such call on this disk")]):
        monkeypatch.setenv("VIT_GPT2_CACHE", str(kept / str(number)))
        with monkeypatch.context() as patch:
            patch.setattr(pixels, "load_picture", looks)
            if fault:
                patch.setattr(os, "posix_fallocate", Mock(side_effect=fault))
            dataset(scenes_table, scenes_tokenizer, keep="disk")
    assert len(taken) == 2 * len(scenes_table) and min(taken) >= needed


def test_a_full_disk_is_one_line(kept, scenes_table, scenes_tokenizer, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=r"cannot be cached in .* \(No space left on device\): run without --cache"):
        dataset(scenes_table, scenes_tokenizer, keep="disk")
    assert not list(kept.glob("*pixels-*")) or all(path.suffix == ".lock" for path in kept.glob("*pixels-*"))


def test_a_kept_picture_that_changed_on_the_disk_is_decoded_anew(kept, scenes_table, scenes_tokenizer, capsys):
    """A flipped bit went into training unseen, in every run that used the cache."""
    sound = dataset(scenes_table, scenes_tokenizer, keep="disk").pixels.cached.clone()
    (file,) = pixel_files(kept)
    content = file.read_bytes()
    for place in (0, 5 * 1200 + 77, len(content) - 1):  # in the first picture, the sixth, and the last one's checksum
        damaged = bytearray(content)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        data = dataset(scenes_table, scenes_tokenizer, keep="disk")
        capsys.readouterr()
        assert all(torch.equal(data.pixels[row], sound[row]) for row in range(len(scenes_table)))
        assert capsys.readouterr().out.count("is damaged and deleted") == 1
        assert not file.exists(), "the next run is to make it again"
    file.write_bytes(damaged)
    data = dataset(scenes_table, scenes_tokenizer, keep="disk")
    data.keep_on(torch.device("cpu"))
    assert torch.equal(data.on_gpu, sound) and not file.exists()
    for wrong in (content[:-1], b"", content + b"x"):
        file.write_bytes(wrong)
        assert torch.equal(dataset(scenes_table, scenes_tokenizer, keep="disk").pixels.cached, sound)
        assert file.read_bytes() == content


def make_cache(table, tokenizer, queue) -> None:
    data = dataset(table, tokenizer, keep="disk", progress=False)
    queue.put(hash(data.pixels.cached.numpy().tobytes()))


def test_processes_share_one_cache(kept, scenes_table, scenes_tokenizer):
    """Two ranks that start together: one makes it, the other waits."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=make_cache, args=(scenes_table, scenes_tokenizer, queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert len({queue.get(timeout=60) for _ in ranks}) == 1
    for rank in ranks:
        rank.join()
    assert len(pixel_files(kept)) == 1


def test_shards_give_the_samples_that_files_give(kept, scenes_dir, tmp_path, scenes_tokenizer):
    """Pictures are read out of the tar in place, by workers too."""
    files = load_table("coco", scenes_dir, "val")
    (tmp_path / "shards" / "val").mkdir(parents=True)
    with tarfile.open(tmp_path / "shards" / "val" / "0000.tar", "w") as shard:
        for row in range(len(files)):
            about = {"captions": files.captions_of(row), "image_id": files.id_of(row)}
            for suffix, content in (("png", files.picture(row).read_bytes()), ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{row:09}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    shards = load_table("auto", tmp_path / "shards", "val")
    expected = batches(dataset(files, scenes_tokenizer))
    for options, workers in (({}, 0), ({}, 2), ({"keep": "disk"}, 0)):
        found = batches(dataset(shards, scenes_tokenizer, **options), num_workers=workers)
        for batch, other in zip(expected, found, strict=True):
            assert batch[0] == other[0] and torch.equal(batch[1], other[1]) and torch.equal(batch[2], other[2])


# Damaged pictures


@pytest.mark.parametrize("keep", ["no", "memory", "disk"])
def test_damaged_pictures_are_black_untaught_and_named(kept, scenes_dir, tmp_path, scenes_tokenizer, keep):
    table = load_table("coco", damaged_copy(scenes_dir, tmp_path / "data", 20, damaged=2), "train")
    data = dataset(table, scenes_tokenizer, keep=keep, augmentation=EVERYTHING)
    for workers in (0, 2):
        found, targets = {}, 0
        for batch in make_dataloader(data, 5, shuffle=True, num_workers=workers):
            found |= dict(batch.bad)
            targets += int(batch.lengths.sum())
            for place, row in enumerate(batch.rows):
                assert (row in (0, 1)) == (int(batch.lengths[place].sum()) == 0)
        assert sorted(found) == [0, 1] and "000000000001.png" in found[1]
        assert targets == len(data.tokens.ids) + 18 * 5 - sum(len(data.tokens[n]) for n in range(10))


# Memory


PROBE = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from dataset import CaptionDataset, make_dataloader, train_tokenizer
from config import ViTGPT2Config
from data.table import make_table
from pathlib import Path

def private():
    lines = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return sum(int(lines[kind].split()[0]) for kind in ("Private_Dirty",)) / 1024

texts = [f"caption number {{n}} of a table that is as large as COCO's" for n in range({captions})]
table = make_table((Path(f"/none/{{n}}.jpg"), n, texts[n : n + 5]) for n in range(0, len(texts), 5))
tokenizer = train_tokenizer(texts[:100], 300)
del texts
data = CaptionDataset(table, tokenizer, ViTGPT2Config(vocab_size=len(tokenizer)))
data.pixels.cached = torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(len(table), 3, 8, 8)
if os.fork() == 0:
    before = private()
    for row in range(len(table)):
        data[0, row]
    print(private() - before, flush=True)
    os._exit(0)
os.wait()
"""


def test_reading_a_large_table_copies_nothing():
    """Python objects are copied into every worker as their reference counts change: these captions in lists cost each
    worker 10 MB, and COCO's 100."""
    code = PROBE.format(root=str(ROOT), captions=60_000)
    assert float(finished("-c", code).stdout) < 3


def test_kept_files_notice_their_sources(tmp_path):
    (tmp_path / "a").write_text("a")
    first = utils.stamps([tmp_path / "a"])
    (tmp_path / "a").write_text("ab")
    assert utils.key_of(first) != utils.key_of(utils.stamps([tmp_path / "a"]))
    assert utils.key_of([1, "x"]) == utils.key_of([1, "x"])
