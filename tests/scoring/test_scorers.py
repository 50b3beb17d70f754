"""java.py, chair.py, clip.py: the Java tokenizer, what happens where things are missing, CHAIR, CLIPScore."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_shared
from PIL import Image
from safetensors.torch import load_file, save_file

from config import UserError
from scoring import chair as chair_module
from scoring import java
from scoring.chair import chair, objects_in
from scoring.clip import clip_scores
from scoring.java import java_scores, java_tokenize
from scoring.meteor import packaged
from scoring.metrics import score_captions, tokenize
from scoring.results import Captioned, MoreScores, write_evaluation

PACKAGE = importlib.util.find_spec("pycocoevalcap")
needs_java = pytest.mark.skipif(
    shutil.which("java") is None or PACKAGE is None, reason="needs java and pycocoevalcap (requirements/full.txt)"
)


@needs_java
def test_our_tokens_are_javas(coco_eval):
    captions = [*coco_eval[0], *(caption for references in coco_eval[1] for caption in references)]
    assert equal_share(captions) == 1


@needs_java
def test_on_javas_tokens_each_picture_scores_what_pycocoevalcap_gives_it(coco_eval):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    words = iter(java_tokenize([*coco_eval[0], *(caption for own in coco_eval[1] for caption in own)]))
    candidates = [next(words) for _ in coco_eval[0]]
    references = [[next(words) for _ in own] for own in coco_eval[1]]
    results = {i: [" ".join(caption)] for i, caption in enumerate(candidates)}
    truth = {i: [" ".join(caption) for caption in own] for i, own in enumerate(references)}
    bleu, bleus = Bleu(4).compute_score(truth, results, verbose=0)
    others = [scorer.compute_score(truth, results) for scorer in (Rouge(), Cider())]
    ours, each = score_captions(candidates, references), score_captions(candidates, references, per_picture=True)
    for name, corpus, scores in zip(
        ours, (*bleu, *(o[0] for o in others)), (*bleus, *(o[1] for o in others)), strict=True
    ):
        assert ours[name] == pytest.approx(corpus, abs=1e-9), name
        assert np.abs(each[name] - scores).max() < 1e-9, name


@needs_java
@pytest.mark.slow
def test_our_tokens_are_javas_on_all_of_coco():
    """The captions of COCO 2014 ship inside SPICE's jar."""
    captions = []
    with zipfile.ZipFile(packaged("spice", "spice-1.0.jar")) as jar:
        for part in ("train", "val"):
            content = json.loads(jar.read(f"coco/annotations/captions_{part}2014.json"))
            captions += [annotation["caption"] for annotation in content["annotations"]]
    assert len(captions) > 600_000
    assert equal_share(captions) >= 0.99998


def equal_share(captions: list[str]) -> float:
    theirs = java_tokenize(captions)
    same = sum(tokenize(caption) == words for caption, words in zip(captions, theirs, strict=True))
    print(f"{same:,} of {len(captions):,} captions have the same tokens")
    return same / len(captions)


@needs_java
def test_nothing_in_a_caption_shifts_the_next():
    odd = ["", "A man's dog, isn't it?", "a\u2028b\x0bc\rd\x85e\nf", "“é” ||| (y)", "\ud800 lone", "", "the end.", ""]
    words = java_tokenize(odd)
    assert words[:3] == [[], ["a", "man", "'s", "dog", "is", "n't", "it"], list("abcdef")]
    assert words[3] == ["é", "|", "|", "|", "-lrb-", "y", "-rrb-"]
    assert words[-3:] == [[], ["the", "end"], []]
    assert java_tokenize([]) == []


def test_without_java(monkeypatch, tmp_path):
    fake_package(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert java_scores(["a"], [["a"]]).notes[-1] == "SPICE skipped: there is no java on the PATH"
    with pytest.raises(UserError, match="no java on the PATH"):
        java_tokenize(["a"])


def test_without_pycocoevalcap(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scores = java_scores(["a"], [["a"]])
    assert not scores.corpus and not scores.per_picture
    assert scores.notes == [
        f"{name} skipped: pycocoevalcap is not installed: pip install -r requirements/full.txt"
        for name in ("METEOR", "SPICE")
    ]


@pytest.mark.parametrize(("candidates", "references"), [([], []), (["a"], []), (["a", "b"], [["a"], []])])
def test_lists_that_do_not_fit(candidates, references):
    with pytest.raises(UserError):
        java_scores(candidates, references)


def fake_package(directory: Path, monkeypatch) -> None:
    """A pycocoevalcap with empty jars, found before any other."""
    package = directory / "pycocoevalcap"
    for name in (
        "tokenizer/stanford-corenlp-3.4.1.jar",
        "meteor/meteor-1.5.jar",
        "spice/spice-1.0.jar",
        *(f"spice/lib/{name}" for name in java._SPICE_MODELS),
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (package / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    monkeypatch.syspath_prepend(directory)


def fake_java(directory: Path, monkeypatch, program: str) -> None:
    """A java on the PATH that is a Python program, and a package whose jars it may look at."""
    fake_package(directory, monkeypatch)
    java = directory / "java"
    java.write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys, time\narguments = sys.argv\n{program}")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


# Tokenizes like cat, and gives every picture its number of references over ten as SPICE.
FAKE = """
if "-version" in arguments:
    print('openjdk version "VERSION"', file=sys.stderr)
elif "-preserveLines" in arguments:
    sys.stdout.writelines(sys.stdin)
else:
    pictures = json.load(open(next(a for a in arguments if a.endswith("captions.json"))))
    scores = [{"image_id": p["image_id"], "scores": {"All": {"f": len(p["refs"]) / 10}}} for p in pictures]
    print("chatter" * 100_000)
    json.dump(scores[::-1], open(arguments[arguments.index("-out") + 1], "w"))
"""

FAILS = """
print("Picked up _JAVA_OPTIONS: -Dx=Error", file=sys.stderr)
print('Exception in thread "main" java.lang.OutOfMemoryError: too small', file=sys.stderr)
print("  at Main.main", file=sys.stderr)
sys.exit(1)
"""


def test_each_scorer_on_its_own(tmp_path, monkeypatch):
    """METEOR's data is missing; SPICE, whose real models cannot be had here, is still read, whatever its order."""
    fake_java(tmp_path, monkeypatch, FAKE.replace("VERSION", "1.8.0_392"))
    scores = java_scores(["a", "b"], [["a"], ["b", "c", "d"]])
    assert scores.corpus == {"spice": pytest.approx(0.2)} and scores.per_picture == {"spice": [0.1, 0.3]}
    (note,) = scores.notes
    assert note.startswith("METEOR skipped: ") and note.endswith("reinstall pycocoevalcap")
    assert "meteor-1.5.jar" in note and "\n" not in note


def test_a_java_that_fails_says_why(tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, FAILS)
    assert java_scores(["a"], [["a"]]).notes[1] == (
        'SPICE skipped: java failed (Exception in thread "main" java.lang.OutOfMemoryError: too small)'
    )


def test_spice_says_which_java_it_needs(tmp_path, monkeypatch):
    """Its jar would parse everything, and then die of the JavaScript engine that Java 15 dropped."""
    fake_java(tmp_path, monkeypatch, FAKE.replace("VERSION", "17.0.15"))
    note = java_scores(["a"], [["a"]]).notes[1]
    assert note == "SPICE skipped: its jar needs Java 8 to 14, but the java on the PATH is version 17"


def test_pipes_never_block(tmp_path, monkeypatch):
    """A program that complains a lot, and that answers while it is still being written to."""
    fake_java(
        tmp_path, monkeypatch, "for line in sys.stdin:\n    sys.stderr.write('x' * 100_000)\n    print(line, end='')"
    )
    captions = ["word " * 2000] * 200
    assert java_tokenize(captions, seconds=60) == [["word"] * 2000] * 200


def test_the_time_limit_ends_the_program_and_its_children(tmp_path, monkeypatch):
    fake_java(
        tmp_path,
        monkeypatch,
        f"child = subprocess.Popen(['sleep', '600'])\nopen({str(tmp_path / 'pids')!r}, 'w').write("
        "f'{os.getpid()} {child.pid} ')\ntime.sleep(600)",
    )
    start = time.monotonic()
    scores = java_scores(["a"], [["a"]], seconds=2)
    assert scores.notes[1] == "SPICE skipped: it took longer than 2 seconds"
    assert time.monotonic() - start < 30
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    end = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < end, pids
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    """A process that has ended but that nobody has asked about is not."""
    try:
        os.kill(int(pid), 0)
        status = Path("/proc", pid, "stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


@needs_java
def test_the_time_limit_ends_java():
    with pytest.raises(UserError, match=r"longer than 0\.05 seconds"):
        java_tokenize(["a"] * 1000, seconds=0.05)


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A man's two dogs sit on a couch.", ["person", "dog", "couch"]),
        ("Women and children wait at the bus stop", ["person", "person"]),
        ("a hot dog and a teddy bear on a table", ["hot dog", "teddy bear", "dining table"]),
        ("a baby elephant near its mother", ["elephant", "person"]),
        ("mother ponies and geese", ["horse", "bird"]),
        ("an orange cat beside three oranges", ["cat", "orange"]),
        ("an orange on a plate of knives", ["orange", "knife"]),
        ("a pick-up truck, a fire engine and sheep", ["truck", "truck", "sheep"]),
        ("toilet paper and an oven mitt beside a glass of wine", ["wine glass"]),
        ("a catcher's mitt", ["baseball glove"]),
        ("a quiet field under a blue sky", []),
        ("", []),
    ],
)
def test_objects_in(caption, objects):
    assert objects_in(caption) == objects


def test_every_phrase_means_one_thing():
    synonyms_of = chair_module.synonyms()
    phrases: dict[tuple[str, ...], str] = dict.fromkeys(chair_module._listed(synonyms_of.pop("nothing")), "")
    for name, synonyms in synonyms_of.items():
        for phrase in chair_module._listed(f"{name}, {synonyms}"):
            assert phrases.setdefault(phrase, name) == name, phrase


@pytest.fixture
def instances(tmp_path) -> Path:
    """Picture 1: a dog and a person; 2: a cat; 3: nothing."""
    pytest.importorskip("pycocotools", reason="needs pycocotools (requirements/full.txt)")
    path = tmp_path / "instances.json"
    names = {1: "person", 17: "cat", 18: "dog"}
    path.write_text(
        json.dumps(
            {
                "images": [{"id": i} for i in (1, 2, 3)],
                "categories": [{"id": i, "name": name} for i, name in names.items()],
                "annotations": [
                    {"id": number, "image_id": image, "category_id": category}
                    for number, (image, category) in enumerate([(1, 18), (1, 18), (1, 1), (2, 17)])
                ],
            }
        )
    )
    return path


def test_chair(instances, capsys):
    captions = {1: "a man with two dogs and a cat", 2: "a cat on a couch beside a couch", 3: "a red wall"}
    result = chair(captions, instances)
    assert result == (2 / 3, 3 / 6, {1: ["cat"], 2: ["couch", "couch"]})
    result = chair(captions, instances, {2: ["the sofa has a cat"], 3: []})
    assert result == (1 / 3, 1 / 6, {1: ["cat"]})
    assert chair({3: "a red wall"}, instances) == (0, 0, {})
    assert capsys.readouterr().out == ""


def test_chair_reads_a_byte_order_mark(instances):
    instances.write_text("\ufeff" + instances.read_text(), encoding="utf-8")
    assert chair({2: "a dog"}, instances) == (1, 1, {2: ["dog"]})


def test_chair_errors_are_one_line(instances, tmp_path, monkeypatch):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text(instances.read_text().replace('"cat"', '"unicorn"'))
    (tmp_path / "broken.json").write_text("{")
    for captions, path, message in (
        ({9: "a cat"}, instances, "1 of the captions' pictures are not in it"),
        ({1: "a cat"}, tmp_path / "absent.json", "cannot be read"),
        ({1: "a cat"}, tmp_path / "list.json", "not COCO's instances"),
        ({1: "a cat"}, tmp_path / "broken.json", "not COCO's instances"),
        ({1: "a cat"}, tmp_path / "other.json", "80 kinds"),
    ):
        with pytest.raises(UserError, match=message) as error:
            chair(captions, path)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/full\.txt"):
        chair({1: "a cat"}, instances)


def test_people_invent_little():
    """COCO's own captions name what is there; those of other pictures do not."""
    pytest.importorskip("pycocotools", reason="needs pycocotools (requirements/full.txt)")
    annotations = needs_shared("tiny_coco") / "annotations"
    content = json.loads((annotations / "captions_val2017.json").read_text())
    references: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    own = {image: captions[0] for image, captions in references.items()}
    others = dict(zip(own, [*list(own.values())[1:], own[next(iter(own))]], strict=True))
    path = annotations / "instances_val2017.json"
    assert {c["name"] for c in json.loads(path.read_text())["categories"]} == set(chair_module.synonyms()) - {"nothing"}
    assert chair(own, path).chair_i < 0.2 < 0.5 < chair(others, path).chair_i


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    directory = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    paths = [directory / f"{i}.{'png' if i % 2 else 'jpg'}" for i in range(7)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return paths


CAPTIONS = ["a dog", "two cats on a bed", "", "a very long caption " * 9, "é!", "a bus", "kites"]
REFERENCES = [["a dog", "one dog"], ["cats"], ["a wall", "a", "b"], ["text"], ["a"], ["a red bus"], ["kite", "sky"]]


@pytest.mark.parametrize(("metric", "weight"), [("clip", 2.5), ("pac", 2.0)])
def test_clip_scores_are_the_papers(clip_folder, photos, metric, weight):
    """Against the formulas written out for one picture at a time, through CLIP's own forward."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    expected, expected_ref, embedded = [], [], []
    for caption, photo, references in zip(CAPTIONS, photos, REFERENCES, strict=True):
        texts = [f"A photo depicts {text}" for text in (caption, *references)]
        image = Image.open(photo).convert("RGB")
        inputs = processor(text=texts, images=image, padding=True, truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        said, *known = output.text_embeds
        embedded.append((said, output.image_embeds[0]))
        score = weight * max(0.0, float(torch.cosine_similarity(said, output.image_embeds[0], 0)))
        nearest = max(0.0, *(float(torch.cosine_similarity(said, one, 0)) for one in known))
        expected.append(score)
        expected_ref.append(2 / (1 / score + 1 / nearest) if score and nearest else 0.0)
    assert 0 < np.count_nonzero(expected) < len(expected)  # both sides of the cut at 0

    texts, pictures = (torch.stack(own) for own in zip(*embedded, strict=True))
    nearest = torch.cosine_similarity(texts.unsqueeze(1), pictures, -1).argmax(-1)

    scores = clip_scores(CAPTIONS, photos, REFERENCES, clip_folder, batch_size=3, progress=False, metric=metric)
    each = {f"{metric}_score": expected, f"ref_{metric}_score": expected_ref}
    each[f"{metric}_retrieval"] = (nearest == torch.arange(len(texts))).double().tolist()
    assert scores.per_picture.keys() == scores.corpus.keys() == each.keys()
    for name, values in each.items():
        assert scores.per_picture[name] == pytest.approx(values, abs=1e-4)
        assert scores.corpus[name] == pytest.approx(np.mean(values), abs=1e-4)

    some = [Image.open(path) for path in photos[:2]]
    alone = clip_scores(CAPTIONS[:2], some, model=clip_folder, progress=False, metric=metric)
    assert list(alone.corpus) == [f"{metric}_score", f"{metric}_retrieval"]
    assert alone.per_picture[f"{metric}_score"] == pytest.approx(expected[:2], abs=1e-4)


def test_an_evaluation_says_them_with_intervals(clip_folder, photos, tmp_path):
    """--clip had no interval, and without pictures was left out without a word."""
    captioned = Captioned([], CAPTIONS, REFERENCES, [])
    more = MoreScores(clip=str(clip_folder), pac=str(clip_folder))
    arguments = ("a title", captioned, range(len(CAPTIONS)), {}, {}, more)
    found = write_evaluation(tmp_path, *arguments, lambda i: photos[i])
    for name in ("clip_score", "clip_retrieval", "ref_clip_score", "pac_score", "pac_retrieval", "ref_pac_score"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"], name
    assert found["clip_score"] == pytest.approx(1.25 * found["pac_score"])
    header = (tmp_path / "per_picture.csv").read_text().splitlines()[0]
    assert header.endswith("clip_score,clip_retrieval,ref_clip_score,pac_score,pac_retrieval,ref_pac_score")
    found = write_evaluation(tmp_path, *arguments)
    assert "CLIPScore: no pictures, name" in found["left_out"] and "PAC-S: no pictures" in found["left_out"]


def test_clip_errors_are_one_line(clip_folder, photos, tmp_path):
    gap = shutil.copytree(clip_folder, tmp_path / "gap")
    weights = load_file(gap / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, gap / "model.safetensors", {"format": "pt"})
    (tmp_path / "torn.jpg").write_bytes(photos[0].read_bytes()[:400])
    for arguments, message in (
        ((["a"], photos[:1], None, tmp_path / "nowhere"), "cannot be loaded"),
        ((["a"], photos[:1], None, gap), "1 weights are missing, for example text_projection.weight"),
        ((["a"], photos[:2], None, clip_folder), "for every picture"),
        ((["a"], photos[:1], [[]], clip_folder), "no reference"),
        ((["a"], [tmp_path / "torn.jpg"], None, clip_folder), "torn.jpg: not a picture"),
    ):
        with pytest.raises(UserError, match=message) as error:
            clip_scores(*arguments, progress=False)
        assert "\n" not in str(error.value)
