"""A new encoder that starts as trained ones look."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import write_bases
from processes import small_config

from model import EncoderBlock, ImageCaptionModel
from training.start import make_model, start_as_trained


@torch.no_grad()
@pytest.mark.parametrize(("width", "heads"), [(96, 3), (30, 3), (96, 1)])
def test_an_encoder_starts_as_trained_ones_look(width, heads):
    """Every head's queries and keys multiply to the largest part, of the head's rank, of 0.7 (Z + I), values and projection
    to 0.4 (Z - I), and positions of patches side by side are alike."""
    torch.manual_seed(0)
    vision = {"vision_embed_dim": width, "vision_num_heads": heads, "vision_num_layers": 2, "image_size": 128}
    decoder = {"decoder_embed_dim": width, "decoder_num_heads": heads, "decoder_num_layers": 1, "vocab_size": 100}
    encoder = ImageCaptionModel(**vision, **decoder).encoder
    start_as_trained(encoder)
    for block in encoder.blocks:
        assert isinstance(block, EncoderBlock)
        query, key, value = block.qkv.weight.view(3, heads, width // heads, width)
        for product in query.mT @ key:
            # 0.49 (I + Z)(I + Z)' has 2 * 0.49 on its diagonal: the largest singular values are above its root
            assert heads == 1 or product.square().sum() > 1.2 * (2 * 0.49 * width / heads)
            if heads == 1:
                assert product.diagonal().mean() == pytest.approx(0.7, abs=0.03)
                assert (product - 0.7 * torch.eye(width)).std() == pytest.approx(0.7 * width**-0.5, rel=0.05)
        torch.testing.assert_close(query.norm(dim=(1, 2)), key.norm(dim=(1, 2)))
        mixed = block.proj.weight @ value.flatten(0, 1)
        assert mixed.diagonal().mean() == pytest.approx(-0.4, abs=0.05)
        assert (mixed + 0.4 * torch.eye(width)).std() == pytest.approx(0.4 * width**-0.5, rel=0.1)
    patches = encoder.position_embeddings[0, 1:].view(8, 8, width)
    near, far = (patches[3, 3] - patches[3, 4]).norm(), (patches[3, 3] - patches[3, 7]).norm()
    assert near < far and torch.allclose(near, (patches[3, 3] - patches[4, 3]).norm())


def test_a_run_can_start_so(scenes_dir, scenes_table):
    config = small_config(scenes_dir, mimetic=True)
    _, model = make_model(config, scenes_table, None)
    _, plain = make_model(dataclasses.replace(config, mimetic=False), scenes_table, None)
    expected = plain.encoder
    torch.manual_seed(config.seed)
    ImageCaptionModel(model.config)  # draws as many numbers
    start_as_trained(expected)
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_pretrained_encoder_stays_as_it_is(tmp_path, scenes_dir, scenes_table):
    """A preset that starts so can be combined with a pretrained encoder."""
    bases = write_bases(tmp_path, 48, 8, 300, 64)
    config = small_config(scenes_dir, init_encoder=bases["encoder"], mimetic=True)
    _, model = make_model(config, scenes_table, None)
    _, plain = make_model(dataclasses.replace(config, mimetic=False), scenes_table, None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
