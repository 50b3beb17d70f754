"""meteor.py and paraphrases.py against the jar, the published figure, and hand counts on a few words of their own."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import random
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import needs_shared

from config import UserError
from scoring import java
from scoring.java import java_scores
from scoring.meteor import English, meteor_scores, normalize, packaged, score
from scoring.paraphrases import Paraphrases
from scoring.results import MoreScores
from scoring.tokens import tokenize

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="needs java and pycocoevalcap (requirements/full.txt)",
)

Captions = tuple[list[list[str]], list[list[list[str]]]]

FUNCTION = "a\nthe\non\n"
SYNSETS = "cab\n01\ntaxi\n01\nmouse\n02\nrodent\n02 03\nsofa\n04\ncouch\n04\n"
EXCEPTIONS = "mouse\nmice\n"
TABLE = [("two of them", "a pair"), ("sat", "was sitting"), ("was sitting", "sat"), ("on top of", "over")]


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A pycocoevalcap that knows a few words, found before any other, and an empty cache."""
    folder = tmp_path / "pycocoevalcap"
    (folder / "meteor/data").mkdir(parents=True)
    (folder / "__init__.py").touch()
    with zipfile.ZipFile(folder / "meteor/meteor-1.5.jar", "w") as jar:
        parts = {"function/english.words": FUNCTION, "synonym/english.synsets": SYNSETS}
        for name, content in (parts | {"synonym/english.exceptions": EXCEPTIONS}).items():
            jar.writestr(name, content)
    with gzip.open(folder / "meteor/data/paraphrase-en.gz", "wt") as table:
        table.writelines(f"0.5\n{one}\n{other}\n" for one, other in TABLE)
    monkeypatch.delitem(sys.modules, "pycocoevalcap", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("VIT_GPT2_CACHE", str(tmp_path / "cache"))
    return folder


def meteor(candidate: str, *references: str) -> float:
    return meteor_scores([candidate.split()], [[reference.split() for reference in references]])[1][0]


def test_the_papers_formula():
    """Four content words and two function words against three and two: 2.6 and 1 of them matched in two chunks."""
    precision, recall = (0.75 * 2.6 + 0.25) / (0.75 * 4 + 0.25 * 2), (0.75 * 2.6 + 0.25) / (0.75 * 3 + 0.25 * 2)
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    expected = mean * (1 - 0.6 * (2 / 4) ** 0.2)
    assert score([4, 2, 2.6, 1, 4, 3, 2, 2.6, 1, 4, 2]) == pytest.approx(expected, abs=1e-12)
    assert score([4, 2, 0, 0, 0, 3, 2, 0, 0, 0, 0]) == score([0] * 11) == 0


def test_by_hand(package):
    assert meteor("the dog sat", "the dog sat") == 1
    assert meteor("dog the", "the dog") == pytest.approx(0.4)  # two chunks of two words
    assert meteor("a taxi", "a cab") == pytest.approx((0.75 * 0.8 + 0.25) / 1)  # a synonym, whole: no penalty
    assert meteor("mice", "rodent") == pytest.approx(0.8)  # an irregular plural's base has the synonym
    assert meteor("cabs", "cab") == 0  # stem and synonym compete, and neither is worth a chunk,
    assert meteor("the cabs", "the cab") == pytest.approx(0.75 * 0.6 + 0.25)  # but lengthens one: the stem comes first
    assert meteor("", "a") == meteor("a", "") == meteor("x", "y") == 0
    assert meteor("a dog", "x y", "a dog", "z") == 1  # the best reference counts
    assert meteor("two of them", "a pair") == pytest.approx(0.6)
    assert meteor("was sitting", "sat") == pytest.approx(0.6)  # competes with itself, but two words are worth a chunk


def test_an_evaluation_has_it_without_java(package, monkeypatch):
    """--meteor starts no Java; METEOR had come with SPICE alone, by --java."""
    monkeypatch.setenv("PATH", "")
    asked = MoreScores(meteor=True).score([1, 2], ["the dog", "a taxi"], [["the dog"], ["a cab"]], None)
    corpus, each, notes = asked
    assert each == {"meteor": pytest.approx([1, 0.75 * 0.8 + 0.25])} and 0.85 < corpus["meteor"] < 1
    assert (
        notes[0] == "SPICE: not asked for (--java)" and "meteor" not in MoreScores().score([1], ["a"], [["a"]], None)[0]
    )


def test_the_corpus_is_scored_by_its_sums(package):
    corpus, each = meteor_scores([["dog", "the"], ["dog"]], [[["the", "dog"]], [["dog"]]])
    assert each == pytest.approx([0.4, 1]) and corpus == pytest.approx(1 - 0.6 * (2 / 3) ** 0.2)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("it 's n't o'clock", "it ' s n 't o 'clock"),
        ("a t-shirt at 5:30 p.m.", "a t shirt at 5 : 30 pm"),
        ("1,000 bar-b-que -lrb- $ 5 -rrb-", "1,000 bar b-que -lrb- $ 5 -rrb-"),
        ("st. x st. 5 and/or u.s. st.", "st. x st . 5 and / or us st ."),
        ("café é'é ½ #tag", "café é 'é ½ # tag"),
    ],
)
def test_normalize(caption, words):
    """What the jar's -norm makes of a caption's tokens."""
    assert normalize(caption) == words.split()


def test_the_index_is_made_once(package, capsys):
    table = Paraphrases(packaged("meteor", "data", "paraphrase-en.gz"))
    phrases = ["sat", "over", "was sitting", "a pair", "two of them", "on top of", "sat", "dog"]
    expected = {"sat": ["was sitting"], "was sitting": ["sat"], "two of them": ["a pair"], "on top of": ["over"]}
    assert table.among(phrases) == expected and table.among(["sat", "dog"]) == table.among([]) == {}
    assert capsys.readouterr().out.count("\n") == 1
    assert Paraphrases(packaged("meteor", "data", "paraphrase-en.gz")).among(phrases) == expected
    assert capsys.readouterr().out == ""
    (index,) = [path for path in (package.parent / "cache").iterdir() if path.suffix != ".lock"]
    index.write_bytes(index.read_bytes()[:-1])
    assert Paraphrases(packaged("meteor", "data", "paraphrase-en.gz")).among(phrases) == expected


def test_what_is_missing_or_damaged_is_said_in_one_line(package, monkeypatch):
    table = package / "meteor/data/paraphrase-en.gz"
    whole = table.read_bytes()
    for content in (b"", b"text", whole[:-9], gzip.compress(b"0.5\none\n")):
        table.write_bytes(content)
        with pytest.raises(UserError, match=r"paraphrase-en\.gz.* cannot be indexed") as error:
            meteor("a", "a")
        assert "\n" not in str(error.value)
    monkeypatch.setenv("VIT_GPT2_CACHE", str(table / "below a file"))
    with pytest.raises(UserError, match="VIT_GPT2_CACHE"):
        meteor("a", "a")
    monkeypatch.setitem(sys.modules, "nltk.stem.snowball", None)
    with pytest.raises(UserError, match=r"nltk is not installed.*requirements/full\.txt"):
        meteor("a", "a")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pycocoevalcap is not installed: pip install -r requirements/full\.txt"):
        packaged("meteor", "meteor-1.5.jar")


@pytest.fixture(scope="module")
def captions(coco_eval) -> Captions:
    return [tokenize(one) for one in coco_eval[0]], [[tokenize(one) for one in own] for own in coco_eval[1]]


@pytest.fixture(scope="module")
def coco_scores(coco_eval) -> java.JavaScores:
    return java_scores(*coco_eval)


@needs_java
def test_published_meteor(coco_scores):
    published = json.loads((needs_shared("coco_eval") / "expected_scores.json").read_text())
    assert coco_scores.corpus["meteor"] == pytest.approx(published["METEOR"], abs=1e-3)
    assert len(coco_scores.per_picture["meteor"]) == 1000
    if "spice" in coco_scores.corpus:
        assert coco_scores.corpus["spice"] == pytest.approx(published["SPICE"], abs=1e-3)
    else:
        (note,) = coco_scores.notes
        assert note.startswith("SPICE skipped: ") and "\n" not in note


@needs_java
def test_equals_the_jar(captions, monkeypatch):
    """Also on a machine that writes 0,5; captions without words cost nobody else."""
    monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=de -Duser.country=DE")
    mixed, mixed_references = mixes(captions, 200)
    candidates = [[], ["a", "dog"], ["x"], *captions[0][:200], *mixed]
    references = [[["a", "dog"], []], [[]], [["y"], ["y", "z"]], *captions[1][:200], *mixed_references]
    check(candidates, references)


@needs_java
@pytest.mark.slow
def test_equals_the_jar_on_2000(captions):
    check(*captions)
    check(*mixes(captions, 1000))


def check(candidates: list[list[str]], references: list[list[list[str]]]) -> None:
    English([])  # the index is made before
    start = time.perf_counter()
    corpus, each = meteor_scores(candidates, references)
    ours = time.perf_counter() - start
    expected, by_jar = java._meteor([" ".join(words) for words in candidates], joined(references), 300)
    jars = time.perf_counter() - start - ours
    equal = sum(abs(one - other) < 1e-9 for one, other in zip(each, by_jar, strict=True))
    print(f"{equal:,} of {len(each):,} pictures have the jar's number; {ours:.1f} s, the jar {jars:.1f} s")
    assert corpus == pytest.approx(expected, abs=1e-9)
    assert each == pytest.approx(by_jar, abs=1e-9)


def joined(references: list[list[list[str]]]) -> list[list[str]]:
    return [[" ".join(words) for words in own] for own in references]


def mixes(captions: Captions, number: int) -> Captions:
    """Candidates that are references with words inflected, replaced by synonyms and paraphrases, left out, repeated."""
    draw = random.Random(0)
    english = English([])
    synonyms: dict[str, list[str]] = {}
    for word, senses in english.synsets.items():
        for sense in senses.split():
            synonyms.setdefault(sense, []).append(word)
    paraphrases: dict[str, list[str]] = {}
    with gzip.open(packaged("meteor", "data", "paraphrase-en.gz"), "rt", encoding="utf-8") as lines:
        for _, one, other in itertools.islice(zip(lines, lines, lines, strict=True), 300_000):
            paraphrases.setdefault(one.strip(), []).append(other.strip())
            paraphrases.setdefault(other.strip(), []).append(one.strip())
    chosen = [draw.choice(captions[1]) for _ in range(number)]
    candidates = []
    for references in chosen:
        words = draw.choice(references) + draw.choice([[], draw.choice(references)])
        mixed: list[str] = []
        while words:
            length, luck = draw.randint(1, 4), draw.random()
            phrase = " ".join(words[:length])
            if luck < 0.5 and phrase in paraphrases:
                mixed += draw.choice(paraphrases[phrase]).split()
                words = words[length:]
                continue
            word, *words = words
            senses = sorted(english.senses(word))
            if luck < 0.6:
                word += draw.choice(["s", "ed", "ing", "ly"])
            elif luck < 0.75 and senses:
                word = draw.choice(synonyms[draw.choice(senses)])
            elif luck < 0.8:
                word = draw.choice(["'s", "n't", "t-shirt", "o'clock", "5:30", "p.m.", "st.", "-lrb-", "a", word])
            mixed += [word] * (luck < 0.95)
        candidates.append(mixed)
    return candidates, chosen
