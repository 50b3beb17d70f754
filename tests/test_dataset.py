"""Pictures, tokenizers, samples and batches."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from conftest import needs_shared, tiny_config
from PIL import Image

from config import UserError
from dataset import (
    CaptionDataset,
    collate,
    decode,
    load_picture,
    load_tokenizer,
    make_dataloader,
    micro_batches,
    prepare_picture,
    train_tokenizer,
)
from model import ImageCaptionModel
from sources import CaptionTable


def dataset(table, tokenizer, **options) -> CaptionDataset:
    config = tiny_config(vocab_size=len(tokenizer), resize_size=20)
    return CaptionDataset(table, tokenizer, config, **options)


# Pictures


def test_pictures_come_out_square_upright_and_on_white(tmp_path):
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (0, 0, 20, 20))  # the left half
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.new("RGB", (8, 8))
        inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
        turned = picture if inverse is None else picture.transpose(Image.Transpose(inverse))
        turned.save(tmp_path / "p.png", exif=exif)
        pixels = load_picture(tmp_path / "p.png", 16)
        assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
        assert torch.equal(pixels, load_picture(picture, 16)), orientation
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (load_picture(clear, 4) == 255).all()


def test_sixteen_bits_are_scaled_not_clipped():
    """Pillow's own conversion makes 16-bit pictures almost white."""
    grey = Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16))
    assert (load_picture(grey, 8).float() - 128).abs().max() <= 1


def test_modes_agree(tmp_path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    for mode in ("RGBA", "P", "CMYK", "L", "1", "LA"):
        expected = colour.convert(mode).convert("RGB")
        assert (load_picture(colour.convert(mode), 16).int() - load_picture(expected, 16).int()).abs().max() <= 2, mode


def test_training_and_captioning_see_the_same_pixels(scenes_table, scenes_tokenizer):
    data = dataset(scenes_table, scenes_tokenizer)
    for cached in (data, dataset(scenes_table, scenes_tokenizer, cache=False)):
        assert torch.equal(cached[0, 3].pixels, prepare_picture(scenes_table.paths[3], data.config))


def test_unreadable_pictures_are_named_in_one_line(tmp_path):
    good = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(good, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(good.getvalue()[:900])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.gif").write_bytes(b"")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    for name in ("cut.jpg", "text.png", "empty.gif", "bomb.png", "absent.jpg"):
        with pytest.raises(UserError, match=name) as error:
            load_picture(tmp_path / name, 16)
        assert "\n" not in str(error.value)


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
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["pixel_values"].dtype == torch.uint8
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 6, batch["lengths"].max())
    assert (batch["lengths"][:, 5] == 0).all()  # scenes have five captions: the sixth place is empty
    for n in range(4):
        for k in range(5):
            length = batch["lengths"][n, k]
            ids = scenes_tokenizer(scenes_table.captions[n][k]).input_ids
            assert batch["input_ids"][n, k, :length].tolist() == [end, *ids]
            assert batch["labels"][n, k, :length].tolist() == [*ids, end]  # the end token is a target
            assert (batch["labels"][n, k, length:] == -100).all()
    real = batch["positions"][batch["positions"] < batch["labels"].numel()]
    assert torch.equal(real, (batch["labels"].flatten() != -100).nonzero().squeeze(-1))
    assert len(batch["positions"]) % 64 == 0
    assert batch["captions"] == scenes_table.captions[:4]


def test_long_captions_are_cut_with_their_end_kept(scenes_table, scenes_tokenizer):
    table = CaptionTable(scenes_table.paths[:1], [0], [["red " * 300, "blue"]], "made", "train")
    data = dataset(table, scenes_tokenizer)
    batch = collate([data[0, 0]], data.config, 5)
    assert batch["input_ids"].shape[-1] == data.config.max_length
    assert batch["labels"][0, 0, -1] == data.config.end_token_id


def batches(data, **options):
    return [(b["rows"], b["pixel_values"], b["input_ids"]) for b in make_dataloader(data, 7, shuffle=True, **options)]


def test_batches_are_a_pure_function_of_seed_epoch_and_step(scenes_table, scenes_tokenizer):
    """Started in the middle, or with workers, the loader must give the very batches that it gave from the start."""
    data = dataset(scenes_table, scenes_tokenizer, augment=True, random_flip=True, captions_per_image=2)
    whole = batches(data, last_step=30)
    for other in (batches(data, first_step=9, last_step=30), batches(data, first_step=9, last_step=30, num_workers=2)):
        for (rows, pixels, ids), (other_rows, other_pixels, other_ids) in zip(whole[9:], other, strict=True):
            assert rows == other_rows and torch.equal(pixels, other_pixels) and torch.equal(ids, other_ids)
    assert whole[0][0] != whole[14][0]  # another epoch, another order


def test_an_epoch_visits_everything_once(scenes_table, scenes_tokenizer):
    data = dataset(scenes_table, scenes_tokenizer)
    rows = [row for batch in make_dataloader(data, 7, shuffle=True) for row in batch["rows"]]
    assert sorted(rows) == list(range(len(scenes_table)))
    one = dataset(scenes_table, scenes_tokenizer, captions_per_image=1)
    rows = [row for batch in make_dataloader(one, 7, shuffle=True) for row in batch["rows"]]
    assert sorted(rows) == sorted(list(range(len(scenes_table))) * 5)


def test_micro_batches_add_up_to_the_batch(scenes_table, scenes_tokenizer):
    """Gradients of the parts, weighed by their tokens, are those of the whole batch."""
    data = dataset(scenes_table, scenes_tokenizer)
    batch = collate([data[0, row] for row in range(7)], data.config, 5)
    model = ImageCaptionModel(data.config)
    names = ("pixel_values", "input_ids", "lengths", "labels", "positions")
    gradients = []
    for size in (7, 3):
        model.zero_grad()
        for part in micro_batches(batch, size):
            loss = model(*(part[name] for name in names)).loss
            (loss * (part["lengths"].sum() / batch["lengths"].sum())).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_augmentation_crops_and_flips(scenes_table, scenes_tokenizer):
    data = dataset(scenes_table, scenes_tokenizer, augment=True, random_flip=True)
    seen = {data[epoch, 0].pixels.numpy().tobytes() for epoch in range(40)}
    assert len(seen) > 10
    plain = dataset(scenes_table, scenes_tokenizer)
    assert len({plain[epoch, 0].pixels.numpy().tobytes() for epoch in range(5)}) == 1
