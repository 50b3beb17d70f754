"""The compiled step: one graph, the same losses, and nothing that waits for a GPU between two lines of the log."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from conftest import write_bases, write_language_model
from processes import flags as flags_of
from processes import run, small_config
from torch.utils._python_dispatch import TorchDispatchMode

from config import TrainConfig, UserError
from train import training_batches
from training.distributed import ALONE
from training.job import Chosen, prepare
from training.learner import Learner
from training.run import Run
from utils import read_log
from weights.file import MODEL_FILE

KINDS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "word_dropout": 0.2, "ema": 0.9, "contrastive_weight": 0.5},
    "checkpointed": {"gradient_checkpointing": True, "bridge": "prefix", "prefix_length": 4},
    "lora": {"lora": True, "lora_dropout": 0.0},
    "llama": {"bridge": "prefix", "prefix_length": 4, "max_length": 64, "contrastive_weight": 0.5},
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path, scenes_tokenizer) -> dict:
    """The settings of a kind, with the pretrained parts that it asks for."""
    changes = KINDS[request.param]
    if request.param not in ("lora", "llama"):
        return changes
    folder = tmp_path / "bases"
    folder.mkdir()
    parts = write_bases(folder, 48, 8, len(scenes_tokenizer), 64)
    given = {"tokenizer": "auto", "init_encoder": parts["encoder"]}
    if request.param == "llama":
        return changes | given | {"decoder": write_language_model("llama", folder / "llama", scenes_tokenizer)}
    pytest.importorskip("peft")
    scenes_tokenizer.backend_tokenizer.model.save(parts["decoder"])
    return changes | given | {"init_decoder": parts["decoder"]}


def learner_of(scenes_dir, folder, **changes) -> Learner:
    # 26 pictures a batch of 96: the last batch of an epoch is smaller
    config = small_config(scenes_dir, **({"batch_size": 26, "max_steps": 20, "dropout": 0.1} | changes))
    chosen = Chosen(Run(folder), torch.device("cpu"), torch.float32)
    return Learner(prepare(config, ALONE, chosen))


def losses_of(learner: Learner, steps: int) -> list[float]:
    learner.job.datasets["train"].length_multiple = 4
    batches = training_batches(dataclasses.replace(learner.job, steps=steps), 0)
    return [learner.step(batch, step, 1e-3).loss.item() for step, batch in enumerate(batches)]


def compared(scenes_dir, tmp_path, monkeypatch, backend: str, steps: int, **changes) -> None:
    """Compiled and plain losses, and how many graphs that took."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain = losses_of(learner_of(scenes_dir, tmp_path, compile=False, **changes), steps)
    assert losses_of(learner_of(scenes_dir, tmp_path, compile=True, **changes), steps) == pytest.approx(plain, abs=1e-5)
    assert counters["stats"]["unique_graphs"] in (1, 2, 3) and not counters["graph_break"], counters


def test_the_compiled_step_is_one_graph_and_the_same(scenes_dir, tmp_path, monkeypatch, kind):
    """`--compile` broke the graph in every layer for as long as no test used it. Here its kernels are torch's own."""
    compared(scenes_dir, tmp_path, monkeypatch, "aot_eager", 8, **kind)


@pytest.mark.slow
def test_compiled_kernels_give_the_same_losses(scenes_dir, tmp_path, monkeypatch, kind):
    compared(scenes_dir, tmp_path, monkeypatch, "inductor", 20, **{"dropout": 0.0} | kind)


def test_four_bits_are_not_compiled():
    """bitsandbytes changes the type of a bias while it computes, which ended a run in a compiler's traceback."""
    with pytest.raises(UserError, match="compile does not support qlora"):
        TrainConfig(init="pretrained", qlora=True, compile=True)


@pytest.mark.slow
def test_a_whole_compiled_run(scenes_dir, tmp_path):
    """By the flag, as a user would; then self-critical training of the model that came out."""
    config = small_config(scenes_dir, compile=True, output_dir="out", max_steps=12)
    assert "compile     " in run(flags_of(config), tmp_path)
    assert read_log(tmp_path / "out" / "metrics.jsonl")
    critic = {"objective": "scst", "init_model": MODEL_FILE, "max_steps": 4, "allow_overlap": True}
    config = dataclasses.replace(config, output_dir="critic", **critic)
    assert "compile     " in run(flags_of(config), tmp_path)
    assert any("reward" in line for line in read_log(tmp_path / "critic" / "metrics.jsonl"))


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: values that are fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"ema": 0.9, "word_dropout": 0.1, "contrastive_weight": 0.5}], ids=["plain", "all"]
)
def test_a_step_fetches_nothing_from_the_device(scenes_dir, tmp_path, changes):
    """Each `.item()` in the loop makes a GPU idle until Python has the next kernels ready. Lengths are the loader's."""
    learner = learner_of(scenes_dir, tmp_path, **changes)
    (first, second) = training_batches(dataclasses.replace(learner.job, steps=2), 0)
    learner.step(first, 0, 1e-3)
    counts = Waits()
    moved = learner.moved(second)
    with counts:
        loss, _ = learner.losses(moved, 0.1, 0.0)
    loss.backward()
    with counts:
        learner.updater.update(loss.detach(), 1e-3)
        if learner.average:
            learner.average.update(learner.model, 1)
    assert not counts.found


def test_the_contrastive_loss_is_learned_but_not_logged_as_the_captions(scenes_dir, tmp_path):
    """The compared losses above are the captions': they would not show if the other one were left out."""
    learner = learner_of(scenes_dir, tmp_path, contrastive_weight=0.5, dropout=0.0, word_dropout=0.0)
    (batch,) = training_batches(dataclasses.replace(learner.job, steps=1), 0)
    model, part = learner.model, learner.moved(batch)
    found = model(part.pixel_values, part.input_ids, part.lengths, part.labels, part.positions, contrastive=True)
    expected = torch.autograd.grad(
        found.loss + 0.5 * found.contrastive_loss, list(model.parameters()), allow_unused=True
    )
    learner.updater.update = lambda loss, rate: torch.zeros(())  # keeps the gradients
    done = learner.step(batch, 0, 1e-3)
    assert done.loss.item() == pytest.approx(found.loss.item())
    assert done.contrast.item() == pytest.approx(found.contrastive_loss.item())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
