"""Self-critical training: what is sampled, what it is worth, and that learning from it raises CIDEr-D."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_config

from config import PRESETS, UserError
from dataset import CaptionDataset, collate
from model import ImageCaptionModel
from scoring.clip import Clip, clip_scores
from scoring.tokens import tokenize
from training.scst import END, SelfCritic, as_captions

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture
def small(scenes_table, scenes_tokenizer):
    """A model, eight pictures as a batch, and a critic of the table."""
    torch.manual_seed(0)
    sizes = tiny_config(
        vocab_size=len(scenes_tokenizer), max_length=24, vision_embed_dim=64, decoder_embed_dim=64, image_size=48
    )
    model = ImageCaptionModel(sizes).train()
    model.tokenizer = scenes_tokenizer
    data = CaptionDataset(scenes_table, scenes_tokenizer, sizes)
    batch = collate([data[0, row] for row in range(8)], sizes, 5)
    config = dataclasses.replace(PRESETS["demo"], objective="scst", init_model="itself")
    return model, batch, config, SelfCritic(scenes_table, config, 16, CPU)


def test_samples_are_laid_out_as_the_collate_lays_out_captions(small):
    """A target that is one place off teaches every word the one before it."""
    model, batch, _, _ = small
    end = model.config.end_token_id
    tokens = batch.labels.masked_fill(batch.labels < 0, end)  # as generate gives them
    made = as_captions(tokens, model)
    for name in ("labels", "lengths", "positions"):
        assert torch.equal(made[name], getattr(batch, name)), name
    real = torch.arange(tokens.shape[-1]) < batch.lengths[..., None]
    assert torch.equal(made["input_ids"][real], batch.input_ids[real])
    cut = as_captions(torch.full((1, 1, 4), 5), model)
    assert cut["lengths"].item() == 4 and (cut["labels"] == 5).all(), "a caption that never ended has no end to learn"


@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_a_sample_is_worth_what_it_has_above_its_baseline(small, baseline):
    model, batch, config, critic = small
    critic.config = dataclasses.replace(config, baseline=baseline)
    drawn = critic.sample(model, batch, CPU, FP32)
    assert drawn.input_ids.shape[:2] == drawn.weights.shape == drawn.rewards.shape == (8, 5)
    ids = drawn.labels.masked_fill(drawn.labels < 0, model.config.end_token_id)
    rewards = critic.score(model, np.repeat(batch.rows, 5), ids.flatten(0, 1))
    assert torch.allclose(drawn.rewards.flatten(), torch.from_numpy(rewards).float())
    if baseline == "others":
        assert drawn.weights.sum(1).abs().max() < 1e-4
        first = drawn.rewards[0]
        assert drawn.weights[0, 0] == pytest.approx((first[0] - first[1:].mean()).item(), abs=1e-5)
    else:
        above = drawn.rewards - drawn.weights
        assert torch.allclose(above, above[:, :1].expand_as(above), atol=1e-5)
    assert model.training


def test_a_caption_that_breaks_off_is_worth_less(small, scenes_table):
    """Without the end among the words, captions learned to stop at "a picture of a"."""
    _, _, _, critic = small
    words = tokenize(scenes_table.captions_of(0)[0])
    for cut in (words[:-1], words[:-2]):
        unpunished = critic.cider.reward([0], [cut])
        assert critic.cider.reward([0], [[*cut, END]]) < unpunished < critic.cider.reward([0], [words])


def test_pac_s_and_the_mix_are_rewards(small, scenes_table, clip_folder):
    """PAC-S of each sample as evaluate.py --pac has it, nothing for a caption that breaks off; mix adds CIDEr-D. A damaged
    picture does not end the run."""
    model, _, config, critic = small
    end, known, clip = model.config.end_token_id, scenes_table.captions().to_pylist()[:60], Clip(clip_folder, "cpu")
    likeness = clip.captions(known) @ clip.pictures([scenes_table.picture(row) for row in range(12)]).T
    captions = likeness.max(1).values.topk(4).indices.tolist()  # of random weights half of all are 0
    rows, texts = likeness[captions].argmax(1).numpy(), [known[i] for i in captions]
    tokens = torch.full((4, 40), end)
    for i, text in enumerate(texts):
        ids = model.tokenizer.encode(text)
        tokens[i, : len(ids)] = torch.tensor(ids)
    never_ends = tokens[3:].clone()
    never_ends[0, len(ids) :] = ids[-1]
    pictures = [scenes_table.picture(row) for row in rows.tolist()]
    pac = clip_scores(texts, pictures, model=clip_folder, metric="pac", progress=False).per_picture["pac_score"]
    assert pac.min() > 0, "or nothing is compared"
    expected = {"pac_s": pac}
    expected["mix"] = expected["pac_s"] + critic.score(model, rows, tokens)
    for reward, scores in expected.items():
        critic = SelfCritic(scenes_table, dataclasses.replace(config, reward=reward, pac=str(clip_folder)), 16, CPU)
        np.testing.assert_allclose(critic.score(model, rows, tokens), scores, rtol=1e-5)
        np.testing.assert_array_equal(critic.score(model, rows, tokens), critic.score(model, rows, tokens))
    of_pac = dataclasses.replace(critic.config, reward="pac_s")
    assert not SelfCritic(scenes_table, of_pac, 16, CPU).score(model, rows[3:], never_ends).any()
    lost = dataclasses.replace(scenes_table, root=scenes_table.root / "gone")
    assert not SelfCritic(lost, critic.config, 16, CPU).pictures(critic.clip, rows).any()


def test_references_beside_the_samples(small):
    """The loss of both together is that of the samples and that of the references, each by its share of the tokens."""
    model, batch, config, critic = small
    model.eval()  # else dropout differs
    torch.manual_seed(0)
    drawn = critic.sample(model, batch, CPU, FP32)
    critic.config = dataclasses.replace(config, reference_weight=0.25)
    torch.manual_seed(0)
    both = critic.sample(model, batch, CPU, FP32)
    assert both.input_ids.shape[:2] == both.weights.shape == (8, 10) and torch.equal(both.rewards, drawn.rewards)
    model.eval()
    samples, references = (int(part.lengths.sum()) for part in (drawn, batch))
    expected = samples * model(*drawn.inputs, weights=drawn.weights).loss
    expected = (expected + 0.25 * references * model(*batch.inputs).loss) / (samples + references)
    assert model(*both.inputs, weights=both.weights).loss.item() == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(UserError, match="reference_weight is for self-critical training"):
        dataclasses.replace(PRESETS["demo"], reference_weight=0.1)


def test_weights_multiply_each_captions_loss(small):
    model, batch, _, _ = small
    model.eval()
    weights = torch.randn(8, 5)
    loss = model(*batch.inputs, weights=weights).loss
    logits = model(batch.pixel_values, batch.input_ids).logits.log_softmax(-1)
    labels, real = batch.labels.clamp(min=0), batch.labels >= 0
    chosen = logits.gather(-1, labels[..., None]).squeeze(-1)
    expected = -(chosen * real * weights[..., None]).sum() / real.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_picture_that_cannot_be_read_teaches_nothing(small):
    model, batch, _, critic = small
    drawn = critic.sample(model, dataclasses.replace(batch, bad=[(batch.rows[3], "damaged")]), CPU, FP32)
    assert (drawn.weights[3] == 0).all() and drawn.weights.abs().sum() > 0


def test_learning_from_rewards_raises_them(small):
    """From random captions up, on eight pictures, by nothing but their rewards. By how much depends on how the machine
    rounds (a half, it once had to be); that they rise does not."""
    model, batch, _, critic = small
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):  # enough for words, far from enough for the right ones
        model(*batch.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    rewards = []
    for _ in range(60):
        drawn = critic.sample(model, batch, CPU, FP32).to(CPU)
        model(*drawn.inputs, weights=drawn.weights).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(drawn.rewards.mean().item())
    first, last = np.array(rewards[:20]), np.array(rewards[-20:])
    assert last.mean() - first.mean() > 3 * np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 20)  # standard errors


def test_what_cannot_be_improved_is_refused():
    with pytest.raises(UserError, match="--init-model"):
        dataclasses.replace(PRESETS["demo"], objective="scst")
    with pytest.raises(UserError, match="captions-per-image"):
        dataclasses.replace(PRESETS["demo"], objective="scst", init_model="x", captions_per_image=1)
    with pytest.raises(UserError, match="--objective scst"):
        dataclasses.replace(PRESETS["demo"], reward="mix", pac="x")
    for changes in ({"reward": "mix"}, {"pac": "x"}):
        with pytest.raises(UserError, match="--pac"):
            dataclasses.replace(PRESETS["demo"], objective="scst", init_model="x", **changes)


def test_a_run_of_before_rewards_could_be_chosen_is_the_same_run():
    """New fields would change every fingerprint, and no run would resume."""
    assert not {"reward", "pac"} & PRESETS["flickr8k"].learned_from.keys()
