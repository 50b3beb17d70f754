"""evaluate's contract, the loss with shuffled pictures, results files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import needs_shared, tiny_config
from processes import finished

from config import UserError
from data.sources import load_table
from dataset import Batch, CaptionDataset, make_dataloader
from decoding.packed import available
from evaluate import (
    BadPictures,
    caption_loss,
    contact_sheet,
    evaluate,
    evaluate_captions,
    evaluate_dataset,
    gathered,
    main,
)
from model import ImageCaptionModel
from scoring import metrics as metrics_module
from scoring.matching import matched, read_results
from scoring.metrics import CiderD, novelty, score_captions, self_cider
from scoring.results import Captioned, warnings_about
from weights import file as model_file

bleu_counts = metrics_module._bleu_counts
CPU = torch.device("cpu")


@pytest.fixture
def model_and_loader(scenes_table, scenes_tokenizer):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(scenes_tokenizer), resize_size=16)
    model = ImageCaptionModel(config)
    model.tokenizer = scenes_tokenizer
    return model, make_dataloader(CaptionDataset(scenes_table.head(20), scenes_tokenizer, config), 8)


def test_evaluate_is_bleu_4_as_a_float(model_and_loader):
    model, loader = model_and_loader
    bleu = evaluate(model, loader, model.tokenizer, "cpu")
    assert isinstance(bleu, float) and 0 <= bleu <= 1
    metrics = evaluate_captions(model, loader, model.tokenizer, "cpu")
    assert metrics["bleu_4"] == bleu
    assert {"bleu_1", "rouge_l", "cider_d", "unique_captions", "cut_captions"} <= set(metrics)


def test_a_model_that_repeats_a_reference_scores_one(model_and_loader, monkeypatch):
    """The whole chain, from tokens to score: a model that writes each picture's first reference has BLEU 1."""
    model, loader = model_and_loader
    firsts = iter([list(batch.labels[:, 0]) for batch in loader])

    def copy_first(pixels, **options):
        rows = torch.stack(next(firsts))
        return type("Generated", (), {"sequences": rows.masked_fill(rows == -100, model.config.end_token_id)})

    monkeypatch.setattr(model, "generate", copy_first)
    assert evaluate(model, loader, model.tokenizer, "cpu") == pytest.approx(1)


def test_caption_loss_is_the_mean_over_tokens_whatever_the_batches(model_and_loader):
    model, loader = model_and_loader
    other = make_dataloader(loader.dataset, 5)
    first, second = (caption_loss(model, each, CPU, torch.float32) for each in (loader, other))
    assert first == pytest.approx(second, rel=1e-5)
    assert caption_loss(model, loader, CPU, torch.float32, shuffle_pictures=True) != first


def test_a_loader_of_ones_own_may_give_dictionaries(model_and_loader):
    model, loader = model_and_loader
    own = [vars(batch) | {"names": "of no use"} for batch in loader]
    pictures = [{name: batch[name] for name in ("pixel_values", "rows", "captions")} for batch in own]
    given = evaluate_captions(model, loader, model.tokenizer, "cpu", max_length=6)
    assert evaluate_captions(model, pictures, model.tokenizer, "cpu", max_length=6) == given
    losses = [caption_loss(model, each, CPU, torch.float32) for each in (loader, own)]
    assert losses[0] == losses[1]


def test_a_batch_of_one_is_shuffled_too(model_and_loader):
    """Rolling a batch of one picture by one gave each picture its own captions, and no difference in the loss."""
    model, loader = model_and_loader
    one_by_one = make_dataloader(loader.dataset, 1)
    right, shuffled = (caption_loss(model, one_by_one, CPU, torch.float32, shuffle) for shuffle in (False, True))
    assert shuffled != right


def test_captions_with_dollars_can_be_drawn(tmp_path):
    """Matplotlib took what stands between two $ for a formula, and failed on most captions that have them."""
    contact_sheet(
        tmp_path / "s.png", [torch.zeros(3, 8, 8, dtype=torch.uint8)], ["pays $1 # 2 for $3"], [["$$", "\\x"]]
    )
    assert (tmp_path / "s.png").stat().st_size > 1000


GOOD = [{"image_id": 2, "caption": "b"}, {"image_id": 1, "caption": "a"}]
KNOWN = {"annotations": [{"image_id": i, "caption": f"a dog number {i} runs"} for i in (1, 2, 2)]}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_results_are_matched_by_the_id(mark, tmp_path):
    """A byte order mark, which editors leave, was said not to be COCO's format."""
    (tmp_path / "refs.json").write_text(mark + json.dumps(KNOWN), encoding="utf-8")
    (tmp_path / "good.json").write_text(mark + json.dumps(GOOD), encoding="utf-8")
    names, candidates, known = read_results(tmp_path / "good.json", tmp_path / "refs.json")
    assert names == [1, 2] and candidates == ["a", "b"] and list(map(len, known)) == [1, 2]


CAPTIONS = {1: "a", 2: "b"}
LINES = "\n".join(map(json.dumps, GOOD))
SHAPES: dict[str, str | bytes] = {
    "texts": json.dumps([{"image_id": str(i), "caption": c} for i, c in CAPTIONS.items()]),
    "zeros": json.dumps([{"image_id": f"{i:012d}", "caption": c} for i, c in CAPTIONS.items()]),
    "one text, one number": json.dumps([GOOD[0], {"image_id": "1", "caption": "a"}]),
    "fractions": json.dumps([{"image_id": float(i), "caption": c} for i, c in CAPTIONS.items()]),
    "fractions as texts": json.dumps([{"image_id": f"{i}.0", "caption": c} for i, c in CAPTIONS.items()]),
    "COCO's file names": json.dumps(
        [{"image_id": f"val2014/COCO_val2014_{i:012d}.jpg", "caption": c} for i, c in CAPTIONS.items()]
    ),
    "our own lines": "".join(
        f'{{"file_name": "val2017/{i:012d}.jpg", "caption": "{c}"}}\n' for i, c in CAPTIONS.items()
    ),
    "a dictionary": json.dumps(CAPTIONS),
    "a dictionary of lists": json.dumps({i: [c] for i, c in CAPTIONS.items()}),
    "annotations": json.dumps({"info": {}, "annotations": GOOD}),
    "lines": f"{LINES}\r\n\n",
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "lines with a mark": b"\xef\xbb\xbf" + LINES.encode(),
    "UTF-16, as a redirect writes it on Windows": json.dumps(GOOD).encode("utf-16"),
    "some twice": json.dumps(GOOD * 2 + GOOD[:1]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_results_as_people_have_them(tmp_path, shape):
    """Each of them was refused: "1" had nothing to do with 1, and only a plain list of UTF-8 was read."""
    content = SHAPES[shape]
    (tmp_path / "refs.json").write_text(json.dumps(KNOWN))
    (tmp_path / "r.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = matched(tmp_path / "r.json", tmp_path / "refs.json")
    assert found[:2] == ([1, 2], ["a", "b"]) and list(map(len, found[2])) == [1, 2]
    assert found[3] == ({"equal_captions_dropped": "3"} if shape == "some twice" else {})


@pytest.mark.parametrize(
    ("known", "own"),
    [
        (2**63 + 1, str(2**63 + 1)),  # as a table keeps what no int64 holds
        (str(2**64), 2**64),
        ("COCO_val2014_000000000042.jpg", 42),
        ("1000268201_693b08cb0e.jpg", "Images/1000268201_693b08cb0e"),
        ("a.b.jpg", "x\\a.b.png"),
    ],
)
def test_ids_that_mean_the_same(tmp_path, known, own):
    for name, image in (("refs", known), ("r", own)):
        entries = [{"image_id": "other.jpg", "caption": "x"}, {"image_id": image, "caption": f"{name} y"}]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    names, captions, references, *_ = matched(tmp_path / "r.json", tmp_path / "refs.json")
    assert (names, captions, references) == (["other.jpg", known], ["x", "r y"], [["x"], ["refs y"]])


def test_equal_ids_come_before_those_that_are_alike(tmp_path):
    """References may have 1 and "1", or the same number in two folders: then only the very same id will do."""
    entries = [{"image_id": i, "caption": f"{i!r}"} for i in (1, "1", "a/2.jpg", "b/2.jpg")]
    (tmp_path / "refs.json").write_text(json.dumps(entries))
    assert matched(tmp_path / "refs.json", tmp_path / "refs.json")[1] == ["1", "'1'", "'a/2.jpg'", "'b/2.jpg'"]
    (tmp_path / "r.json").write_text(json.dumps([*entries[:2], {"image_id": 2, "caption": "x"}]))
    with pytest.raises(
        UserError, match=r"2 pictures of .*\(a/2.jpg, b/2.jpg\): the types of the ids differ, 2 here and 'a/2.jpg'"
    ):
        matched(tmp_path / "r.json", tmp_path / "refs.json")


def test_a_subset_says_so_in_every_table(tmp_path):
    """Captions of a part of the references could not be scored at all; CIDEr-D of a part is another number."""
    known = {"annotations": [{"image_id": i, "caption": f"a dog number {i} runs"} for i in range(40)]}
    (tmp_path / "refs.json").write_text(json.dumps(known))
    (tmp_path / "r.json").write_text(json.dumps({i: f"a dog number {i}" for i in range(30)}))
    files = ("--results", "r.json", "--references", "refs.json")
    with pytest.raises(UserError, match=r"no caption for 10 pictures .* \(30, 31, 32\): .*, or add --subset"):
        run_evaluate(tmp_path, *files)
    said = "30 of the 40 pictures"
    output = run_evaluate(tmp_path, *files, "--subset")
    assert f"subset                     {said}" in output and f"WARNING: Only {said}" in output
    found = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert found["subset"] == said and found["pictures"] == 30
    assert len(json.loads((tmp_path / "evaluation/references.json").read_text())["images"]) == 30
    report = (tmp_path / "evaluation/report.html").read_text()
    assert f"Only {said}" in report and ">Subset</th>" in report
    output = run_evaluate(tmp_path, "--compare", "r.json", "r.json", *files[2:], "--subset")
    compared = json.loads((tmp_path / "evaluation/comparison.json").read_text())
    assert output.count(f"subset {said}") == 2 and compared["a"]["subset"] == compared["b"]["subset"] == said
    (tmp_path / "other.json").write_text(json.dumps({i: "a dog" for i in range(10, 40)}))
    with pytest.raises(UserError, match="captions of different pictures"):
        run_evaluate(tmp_path, "--compare", "r.json", "other.json", *files[2:], "--subset")
    for content in ("{}", '{"77": "a"}'):
        (tmp_path / "none.json").write_text(content)
        with pytest.raises(UserError, match=r"no caption for 40 pictures"):
            run_evaluate(tmp_path, "--results", "none.json", *files[2:], "--subset")


BAD_RESULTS = {
    "lack a picture": (json.dumps(GOOD[:1]), r"no caption for 1 picture of .* \(1\)"),
    "lack all": ("[]", r"no caption for 2 pictures .* \(1, 2\)"),
    "differ on a picture": (json.dumps([*GOOD, {"image_id": 2, "caption": "c"}]), "2 captions for picture 2"),
    "differ in a dictionary": ('{"1": "a", "2": "b", "2": "c"}', "2 captions for picture 2"),
    "have several captions": (json.dumps({"1": ["a"], "2": ["b", "c"]}), "2 captions for picture 2"),
    "have another picture": (
        json.dumps([*GOOD, {"image_id": 3, "caption": "c"}]),
        r"1 picture not in .*\(3\)",
    ),
    "have an id of another kind": (
        json.dumps([*GOOD, {"image_id": "1", "caption": "c"}]),
        "1 picture not in",
    ),
    "have a break in an id": (json.dumps([*GOOD, {"image_id": "a\nb", "caption": "c"}]), r"\(a\\nb\)"),
    "lack a caption": (json.dumps([{"image_id": 1}]), "bad.json: not in COCO's format"),
    "have none": (json.dumps([{"image_id": 1, "caption": None}, GOOD[0]]), "bad.json: not in COCO's format"),
    "have a list for an id": (json.dumps([{"image_id": [1], "caption": "a"}]), "bad.json: not in COCO's format"),
    "have true for an id": (
        json.dumps([{"image_id": True, "caption": "a"}, GOOD[0]]),
        "bad.json: not in COCO's format",
    ),
    "have half a character": (json.dumps([{"image_id": 1, "caption": "\ud800"}, GOOD[0]]), "bad.json: not in COCO's"),
    "may mean the same": (
        json.dumps([GOOD[0], {"image_id": "1", "caption": "a"}, {"image_id": "01", "caption": "a"}]),
        r"no caption for 1 picture of .* \(1\): the types of the ids differ, '1' here and 1 there",
    ),
    "name other pictures": (
        json.dumps([GOOD[0], {"image_id": "dog\n", "caption": "a"}]),
        r"differ, 'dog\\n' here and 1 there",
    ),
    "have a part of a number": (json.dumps([{"image_id": 1.5, "caption": "a"}, GOOD[0]]), "bad.json: not in COCO's"),
    "are cut in a line": ('{"image_id": 1, "caption": "a"}\n{"image_id": 2, "cap', "not in COCO's .*line 2 column"),
    "are a number": ("5", "bad.json: not in COCO's format"),
    "are cut short": (json.dumps(GOOD)[:-5], "bad.json: not in COCO's format"),
    "are nested without end": ("[" * 100_000, "bad.json: not in COCO's format"),
    "are empty": ("", "bad.json: not in COCO's format"),
}


@pytest.mark.parametrize("what", BAD_RESULTS)
def test_bad_results_are_one_line_and_nothing_is_scored(what, tmp_path):
    """A picture that the references lack was passed over, and a bad caption blamed on the references' file."""
    content, says = BAD_RESULTS[what]
    (tmp_path / "refs.json").write_text(json.dumps(KNOWN))
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_results(tmp_path / "bad.json", tmp_path / "refs.json")
    assert str(error.value).isprintable()


def test_bad_results_end_the_command_line(tmp_path):
    (tmp_path / "refs.json").write_text(json.dumps(KNOWN))
    for name, content in (("good", GOOD), ("few", GOOD[:1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for files in (("--results", "few.json"), ("--compare", "good.json", "few.json")):
        done = finished("evaluate.py", *files, "--references", "refs.json", cwd=tmp_path, code=2)
        assert done.stdout == "" and done.stderr.count("\n") == 1
        assert "no caption for 1 picture of" in done.stderr and not (tmp_path / "evaluation").exists()


def test_the_official_example_scores_as_published():
    folder = needs_shared("coco_eval")
    files = (folder / "captions_val2014_fakecap_results.json", folder / "captions_val2014_fakecap_refs.json")
    scores = score_captions(*read_results(*files)[1:])
    assert scores["cider_d"] == pytest.approx(0.599791, abs=1e-3)
    assert scores["bleu_4"] == pytest.approx(0.190829, abs=5e-4)


def run_evaluate(folder, *arguments) -> str:
    """What evaluate.py prints, run in this process, as another one takes seconds to start; test_scripts.py starts one."""
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        folder = [] if "--output-dir" in arguments else ["--output-dir", "evaluation"]
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), *folder])
        main()
    return output.getvalue()


def test_a_results_file_gets_numbers_intervals_and_a_report(tmp_path):
    folder = needs_shared("coco_eval")
    references = folder / "captions_val2014_fakecap_refs.json"
    output = run_evaluate(
        tmp_path, "--results", folder / "captions_val2014_fakecap_results.json", "--references", references
    )
    found = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert found["cider_d"] == pytest.approx(0.599791, abs=1e-3) and found["cider_d_low"] < found["cider_d"]
    assert found["cider_d"] < found["cider_d_high"] and found["tokenizer"].startswith("PTB")
    assert "METEOR and SPICE: not asked for" in found["left_out"] and "0.5998   (" in output
    assert found["document_frequencies"] == "of the 1,000 pictures evaluated" and found["pictures"] == 1000
    assert found["references_per_picture"] == "5.005" and found["decoding"] == found["weights_sha256"] == "unknown"
    assert not any(isinstance(value, dict | list) for value in found.values()), "metrics.json is flat"
    written = json.loads((tmp_path / "evaluation/captions.json").read_text())  # as the COCO server takes them
    assert all(set(one) == {"image_id", "caption"} and type(one["image_id"]) is int for one in written)
    assert "CIDEr-D" in (tmp_path / "evaluation/report.html").read_text()
    with open(tmp_path / "evaluation/per_picture.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1000
    assert np.mean([float(row["cider_d"]) for row in rows]) == pytest.approx(found["cider_d"], abs=1e-5)
    # What it wrote serves as input again: the same captions are no better than themselves.
    ours = tmp_path / "evaluation/captions.json"
    output = run_evaluate(tmp_path, "--compare", ours, ours, "--references", tmp_path / "evaluation/references.json")
    compared = json.loads((tmp_path / "evaluation/comparison.json").read_text())
    assert compared["cider_d"]["difference"] == 0 and compared["cider_d"]["p_value"] == 1
    assert compared["cider_d"]["a"] == pytest.approx(found["cider_d"]) and "cider_d" in output
    for said in ("tokenizer", "document_frequencies", "pictures", "references_per_picture"):
        assert compared[said] == found[said] and str(found[said]) in output
    # Fixed document frequencies give another CIDEr-D, and every table says whose they are.
    _, _, known = read_results(ours, references)
    CiderD(known[:500]).save(tmp_path / "half.npz")
    files = ("--references", references, "--document-frequencies", tmp_path / "half.npz")
    for output in (
        run_evaluate(tmp_path, "--results", ours, *files),
        run_evaluate(tmp_path, "--compare", ours, ours, *files),
    ):
        assert "of 500 pictures, from " in output
    half = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    expected = CiderD(known[:500]).score([one["caption"] for one in written], known).corpus
    assert half["cider_d"] == pytest.approx(expected) and half["cider_d"] != pytest.approx(found["cider_d"])
    assert half["bleu_4"] == found["bleu_4"] and half["cider_d_low"] < half["cider_d"] < half["cider_d_high"]


def test_what_to_know_before_numbers_are_believed():
    """Models that ignore the picture or never end were praised for their BLEU."""
    good = {"pictures": 1000, "unique_captions": 0.8, "loss": 2.0, "loss_shuffled_pictures": 2.4, "cut_captions": 0.0}
    assert warnings_about(good) == [] and warnings_about({"pictures": 200, "unique_captions": 0.8}) == []
    for change, word in (
        ({"loss_shuffled_pictures": 2.001}, "ignores the picture"),
        ({"unique_captions": 0.01}, "same caption"),
        ({"cut_captions": 0.5}, "cut off"),
        ({"pictures_trained_on": 96}, "trained on"),
        ({"pictures": 3}, "These numbers come from 3 pictures"),
    ):
        (warning,) = warnings_about(good | change)
        assert word in warning


def test_a_model_on_a_data_set(model_and_loader, tmp_path):
    model, loader = model_and_loader
    model.trained_on = loader.dataset.table.keys()[:3]
    captioned, metrics = evaluate_dataset(model, loader.dataset, CPU, torch.float32, tmp_path, max_length=6)
    assert metrics["pictures"] == len(captioned.captions) == 20 and metrics["pictures_trained_on"] == 3
    assert len(metrics["weights_sha256"]) == 64 and metrics["decoding"] == "max_length 6, num_beams 3"
    assert (metrics["split"], metrics["precision"]) == ("train", "float32") and "no training captions" in metrics[
        "left_out"
    ]
    page = (tmp_path / "report.html").read_text()
    assert "were trained on" in page and "data:image/jpeg;base64," in page and metrics["weights_sha256"] in page
    with torch.no_grad():
        model.decoder.ln_f.bias += 1
    int8 = available("int8")
    again = evaluate_dataset(model, loader.dataset, CPU, torch.float32, tmp_path, max_length=6, int8=int8)[1]
    assert again["weights_sha256"] != metrics["weights_sha256"]
    assert again["precision"] == ("int8, the loss in float32" if int8 else "float32")


def test_n_grams_are_counted_once(model_and_loader, tmp_path, monkeypatch):
    """Scores, their intervals and those of each picture each counted all n-grams anew."""
    model, loader = model_and_loader
    counted = []
    monkeypatch.setattr(metrics_module, "_bleu_counts", lambda *one: counted.append(1) or bleu_counts(*one))
    evaluate_dataset(model, loader.dataset, CPU, torch.float32, tmp_path, max_length=6)
    assert counted == [1]


@pytest.mark.parametrize("decoding", [{}, {"do_sample": True}])
def test_several_captions_of_a_picture(model_and_loader, tmp_path, decoding):
    """The first is scored; how much they differ is self-CIDEr; samples are the same every time."""
    model, loader = model_and_loader
    decoding |= {"max_length": 6, "num_return_sequences": 4}
    captioned, metrics = evaluate_dataset(model, loader.dataset, CPU, torch.float32, tmp_path, **decoding)
    written = json.loads((tmp_path / "all_captions.json").read_text())
    assert [one["captions"] for one in written] == captioned.several and {*map(len, captioned.several)} == {4}
    assert [own[0] for own in captioned.several] == captioned.captions and len(captioned.cut) == 20
    expected = self_cider(captioned.several, CiderD(captioned.references))
    assert metrics["self_cider"] == pytest.approx(expected.corpus) and expected.corpus > 0
    with open(tmp_path / "per_picture.csv", newline="") as file:
        assert [float(row["self_cider"]) for row in csv.DictReader(file)] == pytest.approx(
            expected.per_picture, abs=1e-6
        )
    page = (tmp_path / "report.html").read_text()
    assert "Self-CIDEr" in page and "Calibration" in page
    if not decoding.get("do_sample"):  # of the first ones, as generate has them
        batch = Batch.of(next(iter(make_dataloader(loader.dataset, 3))))
        found = model.generate(batch.pixel_values, return_scores=True, num_beams=4, **decoding)
        assert captioned.confidences[:3] == pytest.approx(found.mean_log_probs.exp()[::4].tolist(), rel=1e-4)
    assert ("seed 0" if decoding.get("do_sample") else "num_beams 4") in metrics["decoding"]
    again, _ = evaluate_dataset(model, loader.dataset, CPU, torch.float32, tmp_path, **decoding)
    assert again.several == captioned.several


def test_shares_are_gathered_in_the_tables_order():
    """With whatever columns they have; one share may be empty."""
    shares = [Captioned([2, 0], ["c", "a"], [["z"], ["x"]], [False, True], confidences=[0.3, 0.1])]
    shares += [Captioned([1], ["b"], [["y"]], [False], confidences=[0.2]), Captioned([], [], [], [])]
    found = gathered(shares)
    assert (found.captions, found.references) == (["a", "b", "c"], [["x"], ["y"], ["z"]])
    assert (found.cut, found.several, found.confidences) == ([True, False, False], [], [0.1, 0.2, 0.3])
    assert gathered(shares[2:]).captions == []


def test_a_model_by_the_command_line(model_and_loader, scenes_dir, tmp_path):
    """Of its own accord it reads val, and says with test what that is for; all tables say how captions were made."""
    model, _ = model_and_loader
    model.save_file(tmp_path / "m.safetensors")
    arguments = ("m.safetensors", "--data-dir", scenes_dir, "--max-length", "5")
    output = run_evaluate(tmp_path, *arguments)
    found = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert found["split"] == "val" and "for the final number" not in output
    captions = [one["caption"] for one in json.loads((tmp_path / "evaluation/captions.json").read_text())]
    training = load_table("auto", scenes_dir, "train").captions().to_pylist()
    assert found["novel_captions"] == novelty(captions, training) and found["training_captions"] == len(training)
    for said in ("split", "weights_sha256", "decoding", "tokenizer", "document_frequencies", "references_per_picture"):
        assert said in output and str(found[said]) in (tmp_path / "evaluation/report.html").read_text()

    test = run_evaluate(
        tmp_path, *arguments, "--split", "test", "--output-dir", "t", "--num-captions", "2", "--do-sample"
    )
    found = json.loads((tmp_path / "t/metrics.json").read_text())
    assert found["split"] == "test" and "for the final number" in test and found["self_cider"] >= 0

    # Files of captions keep what is known of them, as long as they are those that the evaluation wrote.
    other = tmp_path / "other.json"
    other.write_text((tmp_path / "t/captions.json").read_text().replace("]", " ]"))
    run_evaluate(
        tmp_path, "--compare", tmp_path / "t/captions.json", other, "--references", tmp_path / "t/references.json"
    )
    compared = json.loads((tmp_path / "evaluation/comparison.json").read_text())
    assert {name: compared["a"][name] for name in ("decoding", "weights_sha256", "split")}.items() <= found.items()
    assert compared["b"] == {"captions": str(other), "decoding": "unknown", "weights_sha256": "unknown"}


def test_overlap_is_marked_in_every_table(model_and_loader, scenes_dir, tmp_path):
    model, _ = model_and_loader
    model.trained_on = load_table("auto", scenes_dir, "val").keys()[:5]
    model.save_file(tmp_path / "m.safetensors")
    arguments = ("m.safetensors", "--data-dir", scenes_dir, "--max-length", "5")
    refused = finished("evaluate.py", *arguments, cwd=tmp_path, code=2)
    assert "5 of the 12 val pictures" in refused.stderr.splitlines()[-1]
    ours, known = "evaluation/captions.json", "evaluation/references.json"
    for output in (
        run_evaluate(tmp_path, *arguments, "--allow-overlap"),
        run_evaluate(tmp_path, "--results", ours, "--references", known, "--output-dir", "again"),
        run_evaluate(tmp_path, "--compare", ours, "again/captions.json", "--references", known),
    ):
        assert (
            "pictures_trained_on" in output
            and "WARNING: " in output
            and "5 of the 12 pictures were trained on" in output
        )


def test_bad_pictures_are_remembered_when_a_run_goes_on(tmp_path, scenes_table):
    """A run that was stopped began to count, and to write its file, anew."""
    table = scenes_table.head(20)
    bad = BadPictures(tmp_path / "bad.csv", [table], most=0.1)
    bad._add(table, [("a.png", "cut, twice"), ("b.png", "empty")])
    again = BadPictures(tmp_path / "bad.csv", [table], most=0.1, go_on=True)
    assert again.found == bad.found
    with pytest.raises(UserError, match="3 of 20 pictures"):
        again._add(table, [("c.png", "empty")])
    assert (tmp_path / "bad.csv").read_text().count("\n") == 4
    BadPictures(tmp_path / "bad.csv", [table])
    assert not (tmp_path / "bad.csv").exists()  # a new run does not point at an old one's pictures


def test_a_model_of_many_pictures_keeps_a_sample_of_their_keys(tmp_path, scenes_tokenizer, monkeypatch):
    """A file's header holds 100 MB; ten million keys did not fit, and the first checkpoint failed."""
    monkeypatch.setattr(model_file, "MOST_KEYS", 10)
    model = ImageCaptionModel(tiny_config())
    model.trained_on = np.arange(100, dtype=np.uint64) << np.uint64(40)
    model.save_file(tmp_path / "m.safetensors")
    assert ImageCaptionModel.from_pretrained(tmp_path / "m.safetensors").trained_on.tolist() == [
        n << 40 for n in range(10)
    ]


def scored(folder, captions: list[str], references: list[list[str]], *flags: str) -> tuple[dict, str]:
    """metrics.json and what is printed of captions against references, by the command line."""
    known = [{"image_id": i, "caption": text} for i, own in enumerate(references) for text in own]
    for name, entries in (("c.json", enumerate(captions)), ("r.json", None)):
        own = known if entries is None else [{"image_id": i, "caption": text} for i, text in entries]
        (folder / name).write_text(json.dumps(own))
    output = run_evaluate(folder, "--results", "c.json", "--references", "r.json", *flags)
    return json.loads((folder / "evaluation/metrics.json").read_text()), output


def test_cider_d_that_cannot_be_computed_is_not_zero(tmp_path):
    """A perfect caption of a single picture had a CIDEr-D of 0.0000 (0.0000 to 0.0000), and so had equal references."""
    horse = ["a man rides a brown horse", "a person on a horse outside"]
    for captions, references in ((horse[:1], [horse]), (["a dog runs"] * 2, [["a dog runs"]] * 2)):
        metrics, output = scored(tmp_path, captions, references)
        assert "cider_d" not in metrics and "cider_d_low" not in metrics and metrics["rouge_l"] == 1
        assert "WARNING: CIDEr-D cannot be computed, as each word is in every picture's references." in output
        header = (tmp_path / "evaluation/per_picture.csv").read_text().splitlines()[0]
        assert header == "picture,caption,bleu_1,bleu_2,bleu_3,bleu_4,rouge_l"
        assert "CIDEr-D cannot be computed" in (tmp_path / "evaluation/report.html").read_text()
        compared = run_evaluate(tmp_path, "--compare", "c.json", "c.json", "--references", "r.json")
        assert "WARNING: CIDEr-D cannot be computed" in compared and "\ncider_d" not in compared
    metrics, _ = scored(tmp_path, ["a dog runs", "a cat"], [["a dog runs"], ["a cat sits"]])
    assert metrics["cider_d"] > 0


def test_no_significance_where_there_is_none(tmp_path):
    """--compare on three pictures printed `bleu_3 0.0000 0.0000 p 0.002`: 1.8e-13 against 3.4e-09, what keeps 0 / 0 away."""
    references = [["a red cube"], ["two blue balls lie here"], ["the green cone"]]
    metrics, output = scored(tmp_path, ["cube", "balls lie", "a cone"], references)
    assert metrics["bleu_3"] == metrics["bleu_3_high"] == metrics["bleu_4"] == 0 and 0 < metrics["bleu_2"] < 1
    assert "WARNING: These numbers come from 3 pictures" in output and "WARNING: One reference per picture" in output
    (tmp_path / "better.json").write_text(
        json.dumps([{"image_id": i, "caption": c} for i, c in enumerate(["red", "blue balls", "green"])])
    )
    output = run_evaluate(tmp_path, "--compare", "c.json", "better.json", "--references", "r.json")
    table = json.loads((tmp_path / "evaluation/comparison.json").read_text())
    assert "WARNING: no p for fewer than 30 pictures" in output
    assert table["bleu_3"]["difference"] == 0 and table["bleu_3"]["interval"] == [0, 0]
    assert all(table[name]["p_value"] is None for name in ("bleu_1", "rouge_l", "cider_d"))
    many = [f"word{i} and more" for i in range(30)]
    scored(tmp_path, many, [[text] for text in many])
    run_evaluate(tmp_path, "--compare", "c.json", "c.json", "--references", "r.json")
    assert json.loads((tmp_path / "evaluation/comparison.json").read_text())["bleu_1"]["p_value"] == 1


def test_captions_without_spaces_are_scored_by_characters_or_words_on_request(tmp_path):
    """Unsegmented Chinese was one word a caption: nearly right was 0 in all metrics, and nothing was said."""
    captions, references = ["一个男人骑马", "两只狗在雪地玩耍"], [["一个男人骑着马"], ["两只狗在雪地里玩耍"]]
    metrics, output = scored(tmp_path, captions, references)
    assert metrics["bleu_1"] == 0 and "2 references are in a script without spaces" in output
    for name, about in (
        ("characters", "PTB and characters, by metrics.characters"),
        ("icu", "PTB and ICU's words, by"),
    ):
        metrics, output = scored(tmp_path, captions, references, "--tokenizer", name)
        assert metrics["bleu_1"] > 0.6 and metrics["cider_d"] > 3 and "without spaces" not in output
        assert metrics["tokenizer"].startswith(about) and metrics["tokenizer"] in output
        flags = ("--references", "r.json", "--tokenizer", name)
        assert metrics["tokenizer"] in run_evaluate(tmp_path, "--compare", "c.json", "c.json", *flags)
    _, output = scored(tmp_path, ["dog", "cat"], [["dog"], ["cat"]])
    assert "WARNING: Most references are one word" in output


def test_a_loss_that_is_no_number_is_a_warning():
    known = {"pictures": 500, "references_per_picture": "5", "words_per_reference": "10", "left_out": "nothing"}
    losses = {"loss": float("nan"), "loss_shuffled_pictures": float("nan"), "unique_captions": 1.0}
    (warning,) = warnings_about(known | losses)
    assert warning.startswith("The loss is not finite")


def test_benchmarks_in_their_own_files_are_scored_as_their_servers_do(tmp_path):
    """nocaps by domain, each with its own document frequencies; VizWiz without what was rejected; TextCaps' own names."""
    texts = {
        i: [f"a {colour} {thing} here", f"one {thing}"]
        for i, (colour, thing) in enumerate(
            zip(
                ["red", "blue", "green", "black", "white", "grey"],
                ["dog", "cat", "cow", "bird", "horse", "sheep"],
                strict=True,
            )
        )
    }
    domains = ["in-domain", "near-domain", "out-domain"]
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": domains[i % 3]} for i in texts]
    annotations = [{"image_id": i, "caption": text} for i, own in texts.items() for text in own]
    captions = {i: own[0].replace("here", "there") for i, own in texts.items()}
    results = json.dumps([{"image_id": i, "caption": text} for i, text in captions.items()])
    (tmp_path / "c.json").write_text(results)

    def score(content: dict) -> dict:
        (tmp_path / "r.json").write_text(json.dumps(content))
        run_evaluate(tmp_path, "--results", "c.json", "--references", "r.json")
        return json.loads((tmp_path / "evaluation/metrics.json").read_text())

    plain = score({"annotations": annotations})
    nocaps = score({"images": images, "annotations": annotations})
    assert nocaps["cider_d"] == plain["cider_d"] and "cider_d_in_domain" not in plain
    for number, domain in enumerate(("in_domain", "near_domain", "out_domain")):
        rows = [i for i in texts if i % 3 == number]
        expected = score_captions([captions[i] for i in rows], [texts[i] for i in rows])
        assert nocaps[f"pictures_{domain}"] == 2
        for name, value in expected.items():
            assert nocaps[f"{name}_{domain}"] == pytest.approx(value)
            assert nocaps[f"{name}_{domain}_low"] <= value <= nocaps[f"{name}_{domain}_high"]
    assert "cider d near domain" in (tmp_path / "evaluation/report.html").read_text().lower()

    textcaps = score(
        {"data": [{"image_id": e["image_id"], "caption_str": e["caption"], "caption_id": 1} for e in annotations]}
    )
    assert textcaps["cider_d"] == plain["cider_d"]

    flags = {"is_rejected": False, "is_precanned": False, "text_detected": True}
    vizwiz = [entry | flags for entry in annotations]
    vizwiz[0] |= {"is_rejected": True}
    vizwiz[2] |= {"is_precanned": True}
    vizwiz[3] |= {"is_rejected": True}
    found = score({"images": images[:0], "annotations": vizwiz})
    assert found["pictures"] == 5 and found["references_rejected"] == "3; pictures without any other: 1"
    rows = [0, 2, 3, 4, 5]
    expected = score_captions([captions[i] for i in rows], [texts[i][i == 0 :] for i in rows])
    assert found["cider_d"] == pytest.approx(expected["cider_d"])


def test_a_model_on_nocaps_is_scored_by_domain(model_and_loader, scenes_dir, tmp_path):
    """Its folder as --data-dir was scored as one set: domains were read from --references alone."""
    model, _ = model_and_loader
    (source,) = scenes_dir.glob("annotations/captions_val*.json")
    content = json.loads(source.read_text())
    kinds = ["in-domain", "near-domain", "out-domain"]
    for i, image in enumerate(content["images"]):
        image["domain"] = kinds[i % 3]
    (tmp_path / "val").symlink_to(scenes_dir / source.stem.removeprefix("captions_"))
    (tmp_path / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    table = load_table("auto", tmp_path, "val")
    dataset = CaptionDataset(table, model.tokenizer, model.config)
    options = {"max_length": 8, "num_beams": 1}
    cpu, out = torch.device("cpu"), tmp_path / "out"
    out.mkdir()
    captioned, metrics = evaluate_dataset(model, dataset, cpu, torch.float32, out, **options)
    rows = [i for i, kind in enumerate(captioned.domains) if kind == "near-domain"]
    assert len(rows) == metrics["pictures_near_domain"] == len(content["images"]) // 3
    own = score_captions([captioned.captions[i] for i in rows], [captioned.references[i] for i in rows])
    assert metrics["cider_d_near_domain"] == pytest.approx(own["cider_d"])
    references = tmp_path / "nocaps_val_4500_captions.json"
    run_evaluate(tmp_path, "--results", out / "captions.json", "--references", references)
    again = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert again["cider_d_out_domain"] == pytest.approx(metrics["cider_d_out_domain"])


def test_the_confidence_from_which_captions_are_right(model_and_loader, scenes_dir, tmp_path):
    """The threshold that is found gives the precision that is promised when it is asked for."""
    model, _ = model_and_loader
    model.save_file(tmp_path / "m.safetensors")
    arguments = ("m.safetensors", "--data-dir", scenes_dir, "--split", "train", "--max-length", "8", "--num-beams", "1")
    run_evaluate(tmp_path, *arguments)
    with (tmp_path / "evaluation/per_picture.csv").open() as file:
        scores = sorted(float(row["cider_d"]) for row in csv.DictReader(file))
    right = str(scores[len(scores) // 2])  # half of all captions are right
    output = run_evaluate(tmp_path, *arguments, "--calibrate", "0.3", "--right", right)
    found = json.loads((tmp_path / "evaluation/metrics.json").read_text())["calibrated"]
    assert found["precision"] >= found["low"] >= 0.3 and "calibrated  confidence" in output
    assert (tmp_path / "evaluation/calibration.png").stat().st_size > 5000
    output = run_evaluate(tmp_path, *arguments, "--min-confidence", str(found["threshold"]), "--right", right)
    again = json.loads((tmp_path / "evaluation/metrics.json").read_text())["at_min_confidence"]
    assert again == pytest.approx(found) and "at          confidence" in output
    with pytest.raises(UserError, match="no threshold gives a precision of 1"):
        run_evaluate(tmp_path, *arguments, "--calibrate", "1", "--right", str(scores[-1] + 1))


def test_other_words_have_other_frequencies(tmp_path):
    """Frequencies of Stanford's words beside --tokenizer characters gave a CIDEr-D of neither."""
    CiderD([["a dog"], ["a cat"]]).save(tmp_path / "df.npz")
    with pytest.raises(UserError, match="remove one of them"):
        scored(tmp_path, ["a dog"], [["a dog"]], "--tokenizer", "characters", "--document-frequencies", "df.npz")


def test_long_captions_are_warned_of(tmp_path):
    _, output = scored(tmp_path, ["a dog " * 30, "a cat " * 30], [["a dog runs"], ["a cat sleeps"]])
    assert "WARNING: Captions of more than 40 words: these metrics were made for one sentence" in output
