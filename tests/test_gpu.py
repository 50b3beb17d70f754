"""What only a GPU can show; skipped where there is none. `pytest -n 0 -k on_the_gpu` runs them alone."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import random_model, tiny_config
from processes import flags as flags_of
from processes import run, small_config

from config import TrainConfig
from decoding.recorded import recorded_model
from train import training_batches
from training.distributed import ALONE
from training.job import Chosen, prepare
from training.learner import Learner
from training.optimizers import Average, Updater
from training.run import Run
from utils import read_log
from weights.file import MODEL_FILE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PICTURES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
BRIDGES = pytest.mark.parametrize("bridge", ["cross_attention", "prefix"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def gpu_model(**changes):
    return random_model(tiny_config(**({"decoder_embed_dim": 64, "vision_embed_dim": 64} | changes)), std=0.2).cuda()


@BRIDGES
@HALVES
@pytest.mark.parametrize("rows", [1, 6, 18])
def test_recorded_steps_on_the_gpu_are_the_plain_decoders(bridge, dtype, rows):
    """Every place's logits, of a picture with several captions too, against the same weights in fp32, not recorded."""
    model = gpu_model(bridge=bridge)
    twin = recorded_model(model, dtype)
    with torch.no_grad():
        hidden = model.encode(PICTURES[: min(rows, 6)].cuda())
        plain, cache = model.decoder.new_cache(hidden, rows, 9), twin.decoder.new_cache(hidden.to(dtype), rows, 9)
        assert cache.graph is not None
        tokens = torch.randint(0, 49, (rows, 9), generator=torch.Generator().manual_seed(3)).cuda()
        for token in tokens.split(1, 1):
            expected, found = model.decoder.next_logits(token, plain), twin.decoder.next_logits(token, cache)
            assert found.dtype == torch.float32
            assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@BRIDGES
@pytest.mark.parametrize("beams", [1, 3])
def test_weights_changed_after_recording_count_on_the_gpu(bridge, beams):
    """Recorded steps read copies of the weights: what training changes must reach them."""
    model, options = gpu_model(bridge=bridge), dict(max_length=12, num_beams=beams)
    first = model.generate(PICTURES.cuda(), **options).sequences
    (kept,) = model.copies.made[torch.float32].decoder.cached.values()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    found = model.generate(PICTURES.cuda(), **options).sequences
    assert [*model.copies.made[torch.float32].decoder.cached.values()] == [kept]
    assert torch.equal(found, copy.deepcopy(model).cpu().generate(PICTURES, **options).sequences.cuda())
    assert not torch.equal(found, first)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_on_the_gpu(kind):
    model = gpu_model()
    updater = Updater(model, TrainConfig(optimizer=kind), torch.amp.GradScaler("cuda", enabled=False))
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):  # a whole one after the broken one does not count either
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if step == 0 else 1e-3)
        updater.update(torch.ones((), device="cuda"), 1e-3)
    assert updater.broken.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_average_on_the_gpu_is_the_cpus():
    models = [random_model(tiny_config()), random_model(tiny_config()).cuda()]
    averages = [Average(model, 0.9) for model in models]
    for step in range(5):
        for model, average in zip(models, averages, strict=True):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * (step + 1)
            average.update(model, step)
    for a, b in zip(averages[0].model.parameters(), averages[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu())


def trained(tmp_path, scenes_dir, name: str, **changes) -> list[float]:
    config = small_config(scenes_dir, **({"device": "cuda", "precision": "bf16", "output_dir": name} | changes))
    run([*flags_of(config), "--resume", "never"], tmp_path)
    return [line["loss"] for line in read_log(tmp_path / name / "metrics.jsonl") if "loss" in line]


def test_a_compiled_run_on_the_gpu_learns_as_a_plain_one(tmp_path, scenes_dir):
    """`--compile` was broken for as long as no test used it."""
    plain = trained(tmp_path, scenes_dir, "plain", compile=False)
    compiled = trained(tmp_path, scenes_dir, "compiled", compile=True, ema=0.9)
    assert compiled == pytest.approx(plain, rel=2e-2) and compiled[-1] < compiled[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_nothing_on_the_gpu(tmp_path, scenes_dir, optimizer):
    """Not even for the optimizer's decision whether to step: torch itself raises here where something waits."""
    config = small_config(scenes_dir, optimizer=optimizer, device="cuda", ema=0.9, compile=False)
    job = prepare(config, ALONE, Chosen(Run(tmp_path), torch.device("cuda"), torch.bfloat16))
    learner, batches = Learner(job), iter(training_batches(job, 0))
    learner.step(next(batches), 0, 1e-3)
    second = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        learner.step(second, 1, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prefix_and_self_critical_runs_on_the_gpu(tmp_path, scenes_dir):
    losses = trained(
        tmp_path, scenes_dir, "prefix", bridge="prefix", prefix_length=4, precision="fp16", optimizer="muon"
    )
    assert losses[-1] < losses[0]
    options = {"objective": "scst", "init_model": MODEL_FILE, "learning_rate": 1e-5}
    trained(tmp_path, scenes_dir, "scst", bridge="prefix", prefix_length=4, **options)
    rewards = [line["reward"] for line in read_log(tmp_path / "scst" / "metrics.jsonl") if "reward" in line]
    assert rewards and all(0 <= reward <= 10 for reward in rewards)
