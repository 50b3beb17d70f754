"""The loop's promises: captions that end, pictures that matter, optimizers, schedule, resuming to the bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from PIL import Image
from processes import newest, run, small_config, start, stop_after
from tiny import tiny_flags

from config import PRESETS, TrainConfig, UserError
from data.table import make_table
from dataset import CaptionDataset, collate, decode
from model import CrossAttention, EncoderBlock, ImageCaptionModel
from train import train
from training.checkpoint import checkpoints
from training.distributed import ALONE
from training.estimates import duration, step_operations
from training.job import Chosen, plan, prepare
from training.learner import Learner, Step, blank_words
from training.optimizers import Average, Muon, Updater, build_optimizers, freeze, learning_rate_at, orthogonalized
from training.run import Run
from utils import file_hash, read_log


def test_it_learns_to_stop(scenes_table, scenes_tokenizer):
    """GPT-2's end token is also its padding; masking targets by token id once made models that never stop."""
    texts = [["a dog"], ["two dogs run on the green grass"], ["three men"], ["a red circle left of a small blue cross"]]
    table = make_table((scenes_table.picture(n), n, own) for n, own in enumerate(texts))
    torch.manual_seed(0)
    config = tiny_config(
        vocab_size=len(scenes_tokenizer), max_length=48, vision_embed_dim=64, decoder_embed_dim=64, image_size=48
    )
    model = ImageCaptionModel(config).train()
    batch = collate(
        [CaptionDataset(table, scenes_tokenizer, config, captions_per_image=1)[0, n] for n in range(4)], config, 1
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        model(*batch.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sequences = model.generate(batch.pixel_values, max_length=48).sequences
    assert decode(scenes_tokenizer, sequences) == [text for (text,) in texts]
    for row, tokens in zip(sequences.tolist(), batch.lengths.flatten().tolist(), strict=True):
        assert row.index(config.end_token_id) == tokens - 1


def test_the_schedule_warms_up_and_falls_to_zero():
    config = TrainConfig(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_at(step, 200, config) for step in range(201)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 == max(rates)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[200] == pytest.approx(0)
    assert learning_rate_at(0, 5, config) == 1.0  # a very short run does not spend itself warming up
    linear = dataclasses.replace(config, schedule="linear")
    assert [learning_rate_at(step, 210, linear) for step in (10, 60, 110, 209)] == pytest.approx(
        [1, 0.75, 0.5, 1 / 200]
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_layer_matrices_decay(kind):
    model = ImageCaptionModel(tiny_config())
    config = TrainConfig(optimizer=kind, weight_decay=0.3)
    groups = [group for optimizer in build_optimizers(model, config) for group in optimizer.param_groups]
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in model.parameters())
    decaying = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decaying}
    assert "decoder.blocks.0.attn.c_attn.weight" in names and "encoder.blocks.1.fc1.weight" in names
    assert not any("bias" in name or "norm" in name or "wte" in name or "wpe" in name for name in names)


def parts(model: ImageCaptionModel) -> dict[str, str]:
    """Every parameter's part, told from what the modules are."""
    joins = [m for m in model.modules() if isinstance(m, CrossAttention)]
    joins += [block.ln_cross_attn for block in model.decoder.blocks]
    new = {id(parameter) for module in joins for parameter in module.parameters()}
    return {name: "new" if id(p) in new else name.split(".")[0] for name, p in model.named_parameters()}


def test_parts_and_layers_have_learning_rates_of_their_own():
    """A layer that learns at another's rate forgets what it was pretrained for, and nothing says so."""
    model = ImageCaptionModel(tiny_config())
    rates = {"learning_rate": 8e-4, "encoder_learning_rate": 4e-4, "decoder_learning_rate": 2e-4}
    config = TrainConfig(optimizer="muon", layer_decay=0.5, **rates)
    groups = [group for optimizer in build_optimizers(model, config) for group in optimizer.param_groups]
    share = {id(parameter): group["share"] for group in groups for parameter in group["params"]}
    below = {"norm": 0, "ln_f": 0, "blocks.1": 1, "blocks.0": 2}  # layers; embeddings have all of them above
    for name, parameter in model.named_parameters():
        part = parts(model)[name]
        depth = next((depth for start, depth in below.items() if name.partition(".")[2].startswith(start)), 3)
        expected = {"encoder": 0.5, "decoder": 0.25, "new": 1}[part] * (0.5**depth if part != "new" else 1)
        assert share[id(parameter)] == expected, name
    updater = Updater(model, config, torch.amp.GradScaler("cpu", enabled=False))
    sum(parameter.sum() for parameter in model.parameters()).backward()
    updater.update(torch.ones(()), 0.1)
    assert all(group["lr"] == 0.1 * group["share"] for o in updater.optimizers for group in o.param_groups)


@pytest.mark.parametrize("frozen", [("encoder",), ("decoder", "new")])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_frozen_parts_stay_as_they_are(kind, frozen):
    """Weight decay, or an average over processes, moves weights that no gradient reaches."""
    model = ImageCaptionModel(tiny_config())
    freeze(model, frozen)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = TrainConfig(optimizer=kind, freeze=frozen, weight_decay=0.5, init_model="any")
    updater = Updater(model, config, torch.amp.GradScaler("cpu", enabled=False))
    for _ in range(2):
        learn_something(model)
        updater.update(torch.ones(()), 1e-2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parts(model)[name] in frozen), name
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, ("encoder", "decoder", "new"))


def learn_something(model: ImageCaptionModel) -> None:
    pictures = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    ids = torch.randint(0, 49, (3, 2, 24))
    model(pictures, ids, labels=ids).loss.backward()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_after_a_step_that_is_not_finite_nothing_changes(kind):
    """On a GPU the loop looks some steps later: weights moved by then are no more those from before the bad step."""
    model = ImageCaptionModel(tiny_config())
    updater = Updater(model, TrainConfig(optimizer=kind), torch.amp.GradScaler("cpu", enabled=False))
    moved = []
    for bad in (None, "gradient", None, None):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        learn_something(model)
        if bad:
            model.decoder.wte.weight.grad[0, 0] = float("nan")
        norm = updater.update(torch.ones(()), 1e-2)
        assert norm.isfinite() == (not bad)
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    assert moved == [True, False, False, False] and updater.broken == 1
    updater = Updater(model, TrainConfig(optimizer=kind), torch.amp.GradScaler("cpu", enabled=False))
    learn_something(model)
    updater.update(torch.tensor(float("inf")), 1e-2)  # a loss whose gradients are finite all the same
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and updater.broken == 1


SHAPES = list(enumerate([(8, 24), (8, 24), (24, 8), (4, 24)]))  # no square: of a singular one bf16 leaves nothing


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_muon_equals_the_same_iteration_in_double_precision(shape):
    """torch's Muon computes in bf16, which a CPU with AVX2 alone emulates: the demo took 22 minutes instead of five. Ours
    in fp32 is the exact iteration, of each matrix of a batch by itself."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    made = orthogonalized(matrices, torch.float32)
    for matrix, ours in zip(matrices.double(), made, strict=True):
        x = matrix / matrix.norm()
        for _ in range(5):  # the definition, on the side that is not the shorter one as well
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        assert (ours.double() - x).abs().max() < 1e-5 and x.norm() > 3


def test_muon_steps_as_torchs_does():
    """Momentum, decay and the size of a step are torch.optim.Muon's, whose moments in old checkpoints go on here."""
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(n))) for n, shape in SHAPES]
        for _ in range(2)
    )
    before = [parameter.detach().clone() for parameter in ours]
    mine = Muon(ours, 0.02, 0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape)
        mine.step()
        other.step()
        if step == 1:  # as a checkpoint has it
            state = {number: {"momentum_buffer": other.state[b]["momentum_buffer"]} for number, b in enumerate(theirs)}
            mine.load_state_dict(mine.state_dict() | {"state": state})
        for a, b, began in zip(ours, theirs, before, strict=True):  # which bf16 rounds, in another order
            assert (a - b).norm() < 0.15 * (b - began).norm()
            assert torch.equal(mine.state[a]["momentum_buffer"], other.state[b]["momentum_buffer"])


def test_cautious_decay_makes_only_those_weights_smaller_that_shrink_anyway():
    """Where update and weight have one sign the update shrinks the weight; elsewhere decay would work against it."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))) for _ in range(3)]
    before, gradient = weights[0].detach().clone(), torch.randn(6, 4)
    for weight, decay, cautious in zip(weights, (0.0, 0.5, 0.5), (False, False, True), strict=True):
        weight.grad = gradient.clone()
        Muon([weight], lr=0.1, weight_decay=decay, cautious=cautious).step()
    without, plain, careful = weights
    shrinks = (before - without) * before > 0
    assert 0 < shrinks.sum() < shrinks.numel()
    torch.testing.assert_close(careful[shrinks], plain[shrinks])
    torch.testing.assert_close(careful[~shrinks], without[~shrinks])
    config = TrainConfig(optimizer="muon", cautious_decay=True)
    assert build_optimizers(ImageCaptionModel(tiny_config()), config)[0].cautious
    with pytest.raises(UserError, match="cautious_decay is Muon's"):
        TrainConfig(cautious_decay=True)


def test_the_average_forgets_its_beginning():
    """With its full decay from the first step, an average of 0.999 is of random weights for a thousand steps."""
    model = ImageCaptionModel(tiny_config())
    average = Average(model, 0.5)
    expected = [parameter.detach().double() for parameter in model.parameters()]
    for step in range(12):
        for parameter in model.parameters():
            parameter.data.normal_()
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [
            decay * a + (1 - decay) * p.detach().double() for a, p in zip(expected, model.parameters(), strict=True)
        ]
    for a, b in zip(average.model.parameters(), expected, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-6) and not a.requires_grad


def test_drop_path_leaves_out_branches_of_whole_pictures():
    """Dropping single numbers is another method; without the others' growth training and use see different sizes."""
    block = EncoderBlock(tiny_config(), drop_path=0.25)
    x = torch.rand(4000, 5, 32) + 1
    assert torch.equal(block.eval().branch(x), x)
    seen = block.train().branch(x)
    kept = (seen != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1)) and kept.all(1).float().mean() == pytest.approx(0.75, abs=0.03)
    assert torch.allclose(seen[kept.all(1)], x[kept.all(1)] / 0.75)
    assert seen.mean() == pytest.approx(x.mean().item(), rel=0.05)
    model = ImageCaptionModel(tiny_config(vision_drop_path=0.2))
    assert [layer.drop_path for layer in model.encoder.blocks] == [0, 0.2]


def test_blank_words_spare_the_start_token():
    config = tiny_config()
    ids = torch.ones(4, 5, 20, dtype=torch.int64)
    blanked = blank_words(ids, 0.5, config)
    assert (blanked[..., 0] == 1).all()
    assert 0.3 < (blanked[..., 1:] == config.pad_token_id).float().mean() < 0.7
    assert blank_words(ids, 0.0, config) is ids


def test_estimates_are_of_the_right_size():
    """One pair of base size costs 38 GFLOP when five captions share a picture, 135 one by one (DESIGN.md's figures)."""
    base = TrainConfig().model
    assert step_operations(base, 5, 16) / 5 == pytest.approx(38e9, rel=0.1)
    assert step_operations(base, 1, 16) == pytest.approx(135e9, rel=0.1)
    assert [duration(s) for s in (30, 600, 7200, 864000)] == ["30 s", "10 min", "2.0 h", "10.0 days"]


# Whole runs, as processes

SMALL = [
    *("--preset", "demo", "--num-scenes", "160", "--batch-size", "16", "--max-steps", "24"),
    *tiny_flags(image_size=48),
    *("--dropout", "0.1", "--word-dropout", "0.1", "--checkpoint-interval", "4"),
    # Two runs are compared to the bit: on a busy machine `auto` measured bf16 as faster for one and not for the other.
    *("--precision", "bf16"),
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    run([*SMALL, "--output-dir", "out"], directory)
    return directory / "out"


SLOW = [pytest.param(*stop, marks=pytest.mark.slow) for stop in ((signal.SIGTERM, 143), (signal.SIGKILL, -9))]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), *SLOW])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, whole_run, number, code):
    arguments = [*SMALL, "--output-dir", "out", "--data-dir", "scenes"]
    # The data folder is no part of what is learned here, but it is of the settings: both calls name it.
    assert stop_after(10, start(arguments, tmp_path), tmp_path / "out", number) == code
    assert not (tmp_path / "out" / "metrics.json").exists()
    output = run(arguments, tmp_path)
    assert "going on at step" in output
    name = "vit-gpt2-captioning.safetensors"
    assert file_hash(tmp_path / "out" / name) == file_hash(whole_run / name)
    curves = [
        [(line["step"], line["loss"]) for line in read_log(out / "metrics.jsonl") if "loss" in line]
        for out in (tmp_path / "out", whole_run)
    ]
    assert [step for step, _ in curves[0]] == [10, 20, 24]
    assert curves[0][-1] == curves[1][-1]


def test_checkpoints_are_few_and_whole(whole_run):
    assert [path.name for path in checkpoints(whole_run)] == ["step-00000020", "step-00000024"]
    for path in checkpoints(whole_run):
        names = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
        assert sorted(p.name for p in path.iterdir()) == names
    assert json.loads((whole_run / "run.json").read_text())["finished"]


def test_runs_find_their_own_continuation(tmp_path, monkeypatch, whole_run):
    """auto goes on with an unfinished run of the same settings only; another's folder is refused, not overwritten."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(PRESETS["demo"], max_steps=5)
    other = dataclasses.replace(config, learning_rate=1e-3)
    unfinished = Path("runs/demo-20200101-000000")
    (unfinished / "checkpoints/step-00000003").mkdir(parents=True)
    (unfinished / "checkpoints/step-00000003/manifest.json").write_text("{}")
    about = {"fingerprint": config.fingerprint, "finished": False, "config": config.to_dict()}
    (unfinished / "run.json").write_text(json.dumps(about))
    assert Run.find(config).folder == unfinished
    assert Run.find(other).folder != unfinished
    assert Run.find(dataclasses.replace(config, resume="never")).folder != unfinished
    with pytest.raises(UserError, match=r"other settings \(learning_rate 0.002 instead of 0.001\)"):
        Run.find(dataclasses.replace(other, output_dir=unfinished))
    with pytest.raises(UserError, match=r"other settings \(schedule 'cosine' instead of 'linear'\)"):
        Run.find(dataclasses.replace(config, schedule="linear", output_dir=unfinished))
    with pytest.raises(UserError, match="no checkpoint"):
        Run.find(dataclasses.replace(config, resume="nowhere"))


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {Run.find(dataclasses.replace(PRESETS["demo"], seed=seed)) for seed in range(4)}
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "coco"),
        ({"data_dir": Path("coco_data")}, "coco"),
        ({"data_dir": Path("my photos")}, "my_photos"),
        ({"data_dir": Path("my photos/captions.csv")}, "my_photos"),
        ({"data_dir": Path("coco_data"), "dataset": "csv"}, "coco"),
        ({"data_dir": Path("my photos"), "dataset": "karpathy"}, "coco"),
        ({"dataset": "somebody/data-set"}, "data-set"),
    ],
)
def test_runs_are_named_after_own_data(tmp_path, monkeypatch, changes, name):
    """Everybody's own photographs were trained on in runs/coco-..."""
    monkeypatch.chdir(tmp_path)
    for file in ("coco_data/annotations/captions_train2017.json", "my photos/captions.csv"):
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
    config = dataclasses.replace(PRESETS["coco"], **changes)
    run = Run.find(config)
    assert re.fullmatch(rf"runs/{name}-\d{{8}}-\d{{6}}", run.folder.as_posix())
    (run.folder / "checkpoints/step-00000003").mkdir(parents=True)
    (run.folder / "checkpoints/step-00000003/manifest.json").write_text("{}")
    (run.folder / "run.json").write_text(json.dumps({"fingerprint": config.fingerprint, "finished": False}))
    assert Run.find(config) == run


def test_the_plan_says_that_val_serves_as_test(tmp_path, scenes_dir):
    """COCO's had "5,000 pictures to validate, 5,000 to test", which are the same ones."""
    for own in ("train2017", "val2017", "annotations/captions_train2017.json", "annotations/captions_val2017.json"):
        (tmp_path / own).parent.mkdir(exist_ok=True)
        (tmp_path / own).symlink_to(scenes_dir / own)
    for folder, said in ((tmp_path, "pictures to validate, also used as test"), (scenes_dir, " to test")):
        config = dataclasses.replace(PRESETS["demo"], dataset="coco", data_dir=folder, tokenizer="train")
        job = prepare(config, ALONE, Chosen(Run(tmp_path / "run"), torch.device("cpu"), torch.float32))
        (line,) = [line for line in plan(job, 0).splitlines() if "to validate" in line]
        assert said in line


def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole_run, capsys):
    shutil.copytree(whole_run / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/step-00000024/optimizer.safetensors").write_bytes(b"cut")
    folder, weights, _, state = newest(tmp_path)
    assert folder.name == "step-00000020" and state["step"] == 20
    assert "step-00000024 is damaged" in capsys.readouterr().out
    model = ImageCaptionModel.from_pretrained(whole_run / "checkpoints/step-00000020/model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def own_photos(folder, scenes_table, number: int, damaged: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for row in range(number):
        picture = scenes_table.picture(row).read_bytes()
        (folder / f"{row}.png").write_bytes(picture[:50] if row < damaged else picture)
        (folder / f"{row}.txt").write_text("\n".join(scenes_table.captions_of(row)))


OWN = [
    "--preset",
    "demo",
    "--dataset",
    "auto",
    "--data-dir",
    "photos",
    "--vision-num-layers",
    "1",
    "--precision",
    "fp32",
]


def test_a_step_without_a_readable_picture_changes_nothing(tmp_path, scenes_table):
    """Its mean over no tokens was 0 / 0, and the run ended with advice about its learning rate."""
    own_photos(tmp_path / "photos", scenes_table, 20, damaged=4)
    run([*OWN, "--batch-size", "1", "--max-bad-share", "0.5", "--max-steps", "18", "--output-dir", "out"], tmp_path)
    assert all(line["loss"] > 0 for line in read_log(tmp_path / "out/metrics.jsonl") if "loss" in line)


def test_a_run_goes_on_only_with_the_data_it_began_with(tmp_path, scenes_table):
    """A tokenizer trained anew on other captions gave old embeddings new words, and nobody noticed."""
    own_photos(tmp_path / "photos", scenes_table, 20)
    flags = [*OWN, "--batch-size", "4", "--epochs", "400", "--checkpoint-interval", "2"]
    process = start([*flags, "--output-dir", "out"], tmp_path)
    while not checkpoints(tmp_path / "out"):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    own_photos(tmp_path / "photos", scenes_table, 24)
    process = start([*flags, "--output-dir", "out"], tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "have changed since out started" in output and "--resume never" in output


def test_a_run_that_left_the_numbers_stops_and_saves_nothing(tmp_path):
    """Weights that were not finite once pushed the good checkpoints out."""
    process = start([*SMALL, "--output-dir", "out", "--learning-rate", "1e30", "--checkpoint-interval", "2"], tmp_path)
    output, _ = process.communicate(timeout=120)
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))  # not behind the progress bar
    assert process.returncode == 2
    assert re.search(
        r"is not finite at step \d+, of the pictures \d+(, \d+){15}; the step has not changed the weights", line
    )
    for path in checkpoints(tmp_path / "out"):
        for tensor in ImageCaptionModel.from_pretrained(path / "model.safetensors").parameters():
            assert tensor.isfinite().all()


def test_overflows_in_a_row_end_the_run(scenes_table):
    """A scale that is halved for ever is a run that learns nothing, at full price."""
    model, scaler = ImageCaptionModel(tiny_config()), torch.amp.GradScaler("cpu")
    learner = object.__new__(Learner)  # what check() looks at
    config = TrainConfig(overflow_limit=3)
    datasets = {"train": SimpleNamespace(table=scenes_table)}
    learner.job = SimpleNamespace(config=config, datasets=datasets, world=ALONE)
    learner.scaler, learner.updater = scaler, Updater(model, config, scaler)
    for step, bad in enumerate([True, True, False, True, True, True], start=1):
        scaler.scale(sum((p**2).sum() for p in model.parameters())).backward()
        if bad:
            model.decoder.wte.weight.grad[0, 0] = float("inf")
        done = Step(torch.ones(()), learner.updater.update(torch.ones(()), 1e-3), [step], 1)
        if step < 6:
            learner.check([(step, done)])
    with pytest.raises(
        UserError, match=r"gradients of 3 steps in a row, up to step 6, overflowed .*loss scale 2048\):"
    ):
        learner.check([(6, done)])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("asks", [False, True], ids=["the host decides", "the device decides"])
def test_an_overflow_skips_both_optimizers(asks):
    """Clipping by a norm that is not finite once carried one optimizer's NaN into the other's weights; and the scaler
    asks each optimizer about its own gradients alone."""
    model = ImageCaptionModel(tiny_config())
    scaler = torch.amp.GradScaler("cpu")
    updater, loss = Updater(model, TrainConfig(optimizer="muon"), scaler), torch.ones(())
    updater.asks_device = asks  # as on a GPU, where Muon does too
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(sum(p.sum() for p in model.parameters())).backward()
    model.decoder.blocks[0].c_fc.weight.grad[0, 0] = float("nan")
    scale = scaler.get_scale()
    updater.update(loss, 1e-3)
    assert scaler.get_scale() < scale and updater.overflows == 1
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b)
    scaler.scale(sum((p**2).sum() for p in model.parameters())).backward()
    updater.update(loss, 1e-3)
    assert updater.overflows == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("cautious", [False, True])
def test_muon_asks_the_device_whether_to_step(cautious):
    """On a GPU nothing may wait for the answer: where it is no, momenta and weights stay, whatever the gradients are."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    plain, asking = (Muon([weight], lr=0.1, weight_decay=0.1, cautious=cautious) for weight in weights)
    weights[1].data.copy_(weights[0].data)
    for step in range(4):
        gradient = torch.randn(6, 4)
        weights[0].grad, weights[1].grad, asking.found_inf = gradient, gradient.clone(), torch.zeros(())
        plain.step()
        asking.step()
        torch.testing.assert_close(*weights)
        before = [t.clone() for t in (weights[1], asking.state[weights[1]]["momentum_buffer"])]
        weights[1].grad.fill_(float("nan"))
        asking.found_inf = torch.ones(())
        asking.step()
        after = (weights[1], asking.state[weights[1]]["momentum_buffer"])
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_the_gpu(tmp_path, precision):
    output = run([*SMALL, "--device", "cuda", "--precision", precision], tmp_path)
    assert {"fp16": "float16", "bf16": "bfloat16"}[precision] in output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pictures_kept_on_the_gpu_give_the_same_run(tmp_path):
    flags = [*SMALL, "--device", "cuda", "--precision", "fp32", "--flip", "0.5"]
    run([*flags, "--output-dir", "plain"], tmp_path)
    run([*flags, "--output-dir", "kept", "--cache-on-gpu"], tmp_path)
    losses = [
        [line["loss"] for line in read_log(tmp_path / n / "metrics.jsonl") if "loss" in line] for n in ("plain", "kept")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the GPU's own sums are not the same to the bit


def test_what_stays_as_random_as_it_began_is_refused():
    """A frozen encoder without weights to start from is noise for ever."""
    with pytest.raises(UserError, match="freeze encoder"):
        TrainConfig(freeze=("encoder",))
    with pytest.raises(UserError, match="freeze new"):
        TrainConfig(freeze=("new",), init="pretrained")
    TrainConfig(freeze=("encoder",), init="pretrained")


def test_a_part_without_a_whole_picture_is_said_before_the_first_step(tmp_path, monkeypatch):
    """It was said after the last one."""
    monkeypatch.chdir(tmp_path)
    for name, whole in (("train/a", True), ("train/b", True), ("val/c", False), ("val/d", False)):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/{name}.txt").write_text("a dog runs")
        (tmp_path / f"data/{name}.png").touch()
        if whole:
            Image.new("RGB", (16, 16)).save(tmp_path / f"data/{name}.png")
    config = small_config(tmp_path / "data", max_steps=1, dataset="auto", tokenizer="train", max_bad_share=0.9)
    with pytest.raises(
        UserError, match=r"no picture of the val split can be read: see out.bad_samples.csv, and fix them$"
    ):
        train(config)
    assert not (tmp_path / "out/metrics.jsonl").exists()
