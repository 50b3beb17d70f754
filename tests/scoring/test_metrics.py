"""metrics.py against the published COCO scores, nltk, plain rewritings of the papers' formulas, and hand counts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from scoring.metrics import (
    CiderD,
    Scores,
    bleu,
    bootstrap,
    cider_d,
    diversity,
    novelty,
    paired_bootstrap,
    rouge_l,
    score_captions,
    self_cider,
    tokenize,
)

COCO_EVAL = SHARED / "coco_eval"
NAMES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]

# Few words, so that random captions share n-grams.
words = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=8)
pictures = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5)
quick = settings(max_examples=50, deadline=None)


def test_published_scores(coco_eval: tuple[list[str], list[list[str]]]) -> None:
    published = dict(zip(NAMES, [0.579400, 0.404391, 0.278536, 0.190829, 0.396253, 0.599791], strict=True))
    scores = score_captions(*coco_eval)
    assert list(scores) == NAMES
    # The figures have six decimals, and nothing but our tokens could differ.
    assert scores == pytest.approx(published, abs=1e-6)
    rounded = json.loads((COCO_EVAL / "expected_scores.json").read_text())
    for ours, theirs in zip(NAMES, ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"], strict=True):
        assert scores[ours] == pytest.approx(rounded[theirs], abs=5.1e-4)


def test_published_counts(coco_eval: tuple[list[str], list[list[str]]]) -> None:
    """Words and n-grams of the candidates are counted exactly as the official code counted them."""
    totals = json.loads((COCO_EVAL / "expected_scores.json").read_text())["bleu_totals"]
    lengths = [len(tokenize(caption)) for caption in coco_eval[0]]
    assert sum(lengths) == totals["testlen"]
    assert [sum(max(length - n, 0) for length in lengths) for n in range(4)] == totals["guess"]


def test_nltk_finds_the_same_bleu(coco_eval: tuple[list[str], list[list[str]]]) -> None:
    from nltk.translate.bleu_score import corpus_bleu  # type: ignore[import-untyped]

    candidates = [tokenize(caption) for caption in coco_eval[0]]
    references = [[tokenize(caption) for caption in captions] for captions in coco_eval[1]]
    for n, score in enumerate(bleu(candidates, references), start=1):
        assert score.corpus == pytest.approx(corpus_bleu(references, candidates, weights=[1 / n] * n), abs=1e-9)


def test_per_picture_agrees_with_the_corpus(coco_eval: tuple[list[str], list[list[str]]]) -> None:
    corpus = score_captions(*coco_eval)
    each = score_captions(*coco_eval, per_picture=True)
    assert list(each) == NAMES
    assert all(values.shape == (1000,) and values.dtype == np.float64 for values in each.values())
    for name in ("rouge_l", "cider_d"):
        assert each[name].mean() == pytest.approx(corpus[name])
    alone = score_captions(coco_eval[0][7:8], coco_eval[1][7:8], per_picture=True)
    for name in NAMES[:5]:  # CIDEr-D's idf needs the other pictures
        assert each[name][7] == pytest.approx(alone[name][0])


# Each line is what Stanford's PTBTokenizer 3.4.1 made of it, less the punctuation that the evaluation drops.
TOKENS = {
    "A man's dog isn't here, they're I'm we've you'll": "a man 's dog is n't here they 're i 'm we 've you 'll",
    "CAN'T won't couldn't've cannot gonna Wanna gimme": "ca n't wo n't could n't 've can not gon na wan na gim me",
    "'tis 'twas 'em 'til rock 'n' roll rock'n'roll": "'t is 't was 'em 'til rock 'n' roll rock 'n' roll",
    "the boys' club's house, the 80's-style '50s in '08": "the boys club 's house the 80 's style '50s in '08",
    "5 o'clock O'Neil's ma'am s'mores hors d'oeuvres y'all": "5 o'clock o'neil 's ma'am s'mores hors d'oeuvres y' all",
    "did'nt was'nt": "did nt was nt",
    "A man’s “sign” – or 5–6 dogs—wet…": "a man 's sign or 5 6 dogs wet",
    "Mr. and Mrs. Smith on Main St. with Dr. Jones, Jr.": "mr. and mrs. smith on main st. with dr. jones jr.",
    "the U.S. flag, u.s. at 10 a.m. in D.C.": "the u.s. flag u.s. at 10 a.m. in d.c.",
    "No. 5, no.1 but no.": "no. 5 no. 1 but no",
    "Wash. the car. The wash. ran": "wash. the car the wash ran",
    "J. R. Smith and plan b. The man": "j. r. smith and plan b the man",
    "ready to bat., mat. and cat.": "ready to bat. mat and cat",
    "1,000 1.5 10% $5 $1,000.50 £3 5¢ 1/2 9/11 -5": "1,000 1.5 10 % $ 5 $ 1,000.50 # 3 5 cents 1/2 9/11 -5",
    "5:30pm 5:30 p.m. 10am 22nd 4x4 1950s 1950's #25": "5:30 pm 5:30 p.m. 10am 22nd 4x4 1950s 1950 's # 25",
    "twin-hulled t-shirt's 5-year-old u.s.-made -foo foo-": "twin-hulled t-shirt 's 5-year-old u.s.-made foo foo",
    "refrigerator/freezer and/or w/o a / b": "refrigerator/freezer and/or w/o a / b",
    "foo--bar - foo -- bar": "foo bar foo bar",
    "AT&T R&B b&b salt & pepper A+E a+b": "at&t r&b b & b salt & pepper a+e a + b",
    "(round) [square] {curly} <unk> <3 :)": "-lrb- round -rrb- -lsb- square -rsb- -lcb- curly -rcb- <unk> < 3 :-rrb-",
    "what?? what?! wow!what yes! no? x...": "what ?? what ?! wow!what yes no x.",
    "wait...what.... ok.. . . . end": "wait what ok end",
    "flickr.com small;big 1:cat a=b * ** #tag @name": "flickr.com small big 1 cat a = b * ** #tag @name",
    "café naïve café-style ½": "café naïve café-style 1/2",
}


@pytest.mark.parametrize("caption", TOKENS)
def test_tokens_are_those_of_the_stanford_tokenizer(caption: str) -> None:
    assert tokenize(caption) == TOKENS[caption].split()


@pytest.mark.parametrize("space", ["\u2028", "\u2029", "\u00a0", "\x0b", "\x0c", "\x85", "\x1c", "\r\n", "\t", "  "])
def test_odd_white_space_shifts_nothing(space: str) -> None:
    """A line separator inside one caption made the official pipeline give every later caption its neighbour's words."""
    assert tokenize(f"{space}A dog{space}runs.{space}") == ["a", "dog", "runs"]
    references = [["a dog runs on grass", "one dog is running"], ["the cat sat on a mat"], ["two birds sit on a wire"]]
    plain = ["a dog runs on sand", "the cat sat down", "two birds on a wire"]
    odd = [plain[0].replace(" ", space), *plain[1:]]
    assert score_captions(odd, references) == score_captions(plain, references)
    odd_references = [[caption.replace(" ", space) for caption in references[0]], *references[1:]]
    assert score_captions(plain, odd_references) == score_captions(plain, references)


@quick
@given(st.text(max_size=60))
def test_any_text_becomes_tokens_without_white_space(caption: str) -> None:
    tokens = tokenize(caption)
    assert all(token and not any(character.isspace() for character in token) for token in tokens)
    assert tokenize(f"\u2028{caption}\u00a0") == tokens


@pytest.mark.parametrize("caption", ["a," * 2000, "'" * 9000, "a-" * 4000, "1/" * 4000, "n't" * 3000, "a" * 9000])
def test_a_stuck_model_does_not_hang_the_tokenizer(caption: str) -> None:
    assert len(tokenize(caption)) <= len(caption)


def test_clipped_precision_of_the_bleu_paper() -> None:
    """Papineni et al. 2002, example 2: seven times "the" earns 2 of 7, and no pair is right."""
    references = ["The cat is on the mat.", "There is a cat on the mat."]
    scores = score_captions(["the the the the the the the."], [references])
    assert scores["bleu_1"] == pytest.approx(2 / 7)
    assert scores["bleu_2"] == pytest.approx(0, abs=1e-6)


def test_brevity_penalty_takes_the_closest_reference_and_of_two_the_shorter() -> None:
    four, two, six, eight = "a b c d", "a b", "a b c d e f", "a b c d e f g h"
    assert bleu([four.split()], [[eight.split()]])[0].corpus == pytest.approx(math.exp(1 - 8 / 4))
    assert bleu([four.split()], [[eight.split(), six.split()]])[3].corpus == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu([four.split()], [[six.split(), two.split()]])[0].corpus == pytest.approx(1)


def test_corpus_bleu_sums_counts_before_it_divides() -> None:
    score = bleu([["a", "b", "c", "d"], ["x"]], [[["a", "b", "c", "d"]], [["y"]]])[0]
    assert score.corpus == pytest.approx(4 / 5)
    assert score.per_picture == pytest.approx([1, 0])


def test_rouge_l_examples_of_its_paper() -> None:
    """Lin 2004, section 3.1: with as many words on both sides, P = R = the score."""
    reference = "police killed the gunman"
    scores = rouge_l(["police kill the gunman", "the gunman kill police"], [[reference], [reference]])
    assert scores.per_picture == pytest.approx([3 / 4, 2 / 4])


def test_rouge_l_takes_best_precision_and_best_recall_apart() -> None:
    score = rouge_l(["w x y z"], [["w x", "w x y v v v"]])
    precision, recall = 3 / 4, 2 / 2
    assert score.corpus == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_cider_d_counted_by_hand() -> None:
    """Two pictures, no word in common: every idf is ln 2 and cancels; only 1-grams meet; lengths differ by one."""
    scores = cider_d([["a", "b"], ["c", "d"]], [[["a", "b", "x"]], [["c", "d"]]])
    first = (2 / math.sqrt(2 * 3) + 1 / math.sqrt(1 * 2)) / 4 * math.exp(-1 / 72)
    assert scores.per_picture == pytest.approx([10 * first, 10 * 2 / 4])
    assert scores.corpus == pytest.approx(scores.per_picture.mean())


def test_cider_d_is_ten_for_the_only_reference_and_clips_repetition() -> None:
    references = [[list("abcde")], [list("fghij")]]
    assert cider_d([captions[0] for captions in references], references).per_picture == pytest.approx([10, 10])
    honest, repeating = cider_d([["a"], ["f"]], references), cider_d([["a", "a"], ["f"]], references)
    assert repeating.per_picture[0] < honest.per_picture[0]


def plain_cider_d(
    candidates: Sequence[list[str]],
    references: Sequence[list[list[str]]],
    counted: Sequence[list[list[str]]] | None = None,
) -> list[float]:
    """The formula as the paper writes it, one dictionary an n-gram vector; frequencies are those in `counted`."""
    counted = counted or references

    def grams(caption: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))

    scores = []
    for candidate, captions in zip(candidates, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            document_frequency = Counter(g for own in counted for g in set().union(*(grams(r, n) for r in own)))

            def vector(caption: list[str], n: int = n, df: Counter[Any] = document_frequency) -> dict[Any, float]:
                return {g: c * math.log(len(counted) / max(1, df[g])) for g, c in grams(caption, n).items()}

            mine = vector(candidate)
            for caption in captions:
                theirs = vector(caption)
                dot = sum(min(mine.get(g, 0.0), weight) * weight for g, weight in theirs.items())
                norms = math.hypot(*mine.values()) * math.hypot(*theirs.values())
                difference = max(len(candidate) - 1, 0) - max(len(caption) - 1, 0)
                total += math.exp(-(difference**2) / 72) * (dot / norms if norms else 0.0) / len(captions)
        scores.append(10 * total / 4)
    return scores


def plain_rouge_l(candidate: list[str], captions: list[list[str]]) -> float:
    """The formula over the usual two-dimensional table."""
    precision = recall = 0.0
    for caption in captions:
        table = np.zeros((len(candidate) + 1, len(caption) + 1))
        for i, mine in enumerate(candidate):
            for j, theirs in enumerate(caption):
                table[i + 1, j + 1] = table[i, j] + 1 if mine == theirs else max(table[i, j + 1], table[i + 1, j])
        precision = max(precision, table[-1, -1] / max(len(candidate), 1))
        recall = max(recall, table[-1, -1] / max(len(caption), 1))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if recall else 0.0


@quick
@given(pictures)
def test_arrays_count_like_the_plain_formulas(drawn: list[tuple[list[str], list[list[str]]]]) -> None:
    from nltk.translate.bleu_score import corpus_bleu

    candidates, references = [candidate for candidate, _ in drawn], [captions for _, captions in drawn]
    assert cider_d(candidates, references).per_picture == pytest.approx(plain_cider_d(candidates, references), abs=1e-9)
    assert rouge_l(candidates, references).per_picture == pytest.approx([plain_rouge_l(*one) for one in drawn])
    for n, score in enumerate(bleu(candidates, references), start=1):
        # nltk counts one possible n-gram in a caption too short to have any, and warns where nothing matches.
        if score.corpus > 1e-3 and min(map(len, candidates)) >= n:
            theirs = corpus_bleu(references, candidates, weights=[1 / n] * n)
            assert score.corpus == pytest.approx(theirs, abs=1e-6)


@quick
@given(pictures, st.randoms(use_true_random=False))
def test_order_of_references_and_pictures_changes_nothing(drawn: list[tuple[Any, Any]], random: Any) -> None:
    candidates, references = [candidate for candidate, _ in drawn], [captions for _, captions in drawn]
    scores = score_captions(candidates, references)
    shuffled = [random.sample(captions, len(captions)) for captions in references]
    assert score_captions(candidates, shuffled) == pytest.approx(scores)
    order = random.sample(range(len(drawn)), len(drawn))
    moved = score_captions([candidates[i] for i in order], [references[i] for i in order])
    assert moved == pytest.approx(scores)


@quick
@given(pictures)
def test_scores_are_finite_and_in_range(drawn: list[tuple[list[str], list[list[str]]]]) -> None:
    """Empty candidates and references, one picture, and candidates shorter than four words are all drawn here."""
    candidates, references = [candidate for candidate, _ in drawn], [captions for _, captions in drawn]
    for scores in (
        {name: np.array(score) for name, score in score_captions(candidates, references).items()},
        score_captions(candidates, references, per_picture=True),
        score_captions([[] for _ in drawn], references, per_picture=True),
    ):
        for name, score in scores.items():
            assert np.all(np.isfinite(score)), name
            assert score.min() >= 0, name
            assert score.max() <= (10 if name == "cider_d" else 1) + 1e-9, name


@quick
@given(st.lists(st.lists(words.filter(lambda caption: len(caption) >= 4), min_size=1, max_size=3), min_size=1))
def test_a_perfect_candidate_scores_one(references: list[list[list[str]]]) -> None:
    scores = score_captions([captions[-1] for captions in references], references)
    assert [scores[name] for name in NAMES[:5]] == pytest.approx([1] * 5, abs=1e-6)


def test_corner_captions() -> None:
    assert set(score_captions([""], [["a dog runs"]]).values()) == {0.0}
    assert all(math.isfinite(score) for score in score_captions(["..."], [["!"]]).values())
    short = score_captions(["a dog"], [["A dog."]])
    assert [short["bleu_1"], short["bleu_2"], short["rouge_l"]] == pytest.approx([1, 1, 1])
    assert short["bleu_4"] < 1e-2, "two words hold no 4-gram to get right"
    assert short["cider_d"] == 0, "with one picture every idf is 0"


def test_words_are_taken_as_they_are() -> None:
    candidates, references = ["A dog's bed."], [["The dog's bed!", "a bed"]]
    as_words = [tokenize(candidates[0])], [[tokenize(caption) for caption in references[0]]]
    assert score_captions(*as_words) == score_captions(candidates, references)
    assert score_captions([("A", "dog")], [[("a", "dog")]])["bleu_1"] == pytest.approx(1 / 2)


def test_diversity() -> None:
    assert diversity(["A dog runs.", "a dog runs", "a cat", ""]) == pytest.approx(
        {"distinct_1": 4 / 8, "distinct_2": 3 / 8, "vocabulary": 4, "unique_captions": 3 / 4, "mean_length": 8 / 4}
    )
    assert set(diversity([]).values()) == {0}


def test_novelty_compares_words() -> None:
    assert novelty(["A dog runs.", "a dog", "a cat", "a cat"], ["a dog runs", ["a", "dog"]]) == 2 / 4
    assert novelty(["a dog"], []) == 1
    assert novelty([], ["a dog"]) == 0


def split(drawn: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Candidates and references of drawn pictures."""
    return [candidate for candidate, _ in drawn], [captions for _, captions in drawn]


@quick
@given(pictures)
def test_scores_equal_pycocoevalcap(drawn: list[tuple[Any, Any]]) -> None:
    """Where it has an answer: its ROUGE-L takes an empty caption for one word, its CIDEr fails without any n-gram."""
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu", reason="pycocoevalcap is of requirements/full.txt")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = split(drawn)
    results = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    truth = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    ours = score_captions(candidates, references, per_picture=True)
    theirs = dict(zip(NAMES[:4], bleu_module.Bleu(4).compute_score(truth, results, verbose=0)[1], strict=True))
    written = [caption for captions in references for caption in captions]
    if any(written):
        theirs["cider_d"] = Cider().compute_score(truth, results)[1]
    if all(candidates) and all(written):
        theirs["rouge_l"] = Rouge().compute_score(truth, results)[1]
    for name, scores in theirs.items():
        assert ours[name] == pytest.approx(np.array(scores), abs=1e-9), name


@quick
@given(pictures, st.data())
def test_fixed_frequencies_score_what_cider_d_scores(drawn: list[tuple[Any, Any]], data: Any) -> None:
    """Over the object's own references; a reward is the score of a candidate that stands alone beside them."""
    candidates, references = split(drawn)
    cider, expected = CiderD(references), cider_d(candidates, references)
    assert cider.score(candidates, references).corpus == expected.corpus
    assert np.array_equal(cider.score(candidates, references).per_picture, expected.per_picture)
    assert np.array_equal(cider.reward(range(len(drawn)), candidates), expected.per_picture)

    picture = data.draw(st.lists(st.integers(0, len(drawn) - 1)))
    samples = [data.draw(words) for _ in picture]
    rewards = cider.reward(picture, samples)
    assert rewards.shape == (len(picture),)
    for i, sample, reward in zip(picture, samples, rewards, strict=True):
        other = [*candidates[:i], sample, *candidates[i + 1 :]]
        assert reward == pytest.approx(cider_d(other, references).per_picture[i], abs=1e-12)


@quick
@given(pictures, pictures)
def test_fixed_frequencies_over_other_pictures(first: list[tuple[Any, Any]], second: list[tuple[Any, Any]]) -> None:
    """The plain formula, with frequencies of one set and captions of another."""
    fixed, (candidates, references) = split(first)[1], split(second)
    # A word the fixed set cannot know, so that unknown n-grams meet one another.
    candidates = [[*candidate, "new"] for candidate in candidates]
    references = [[[*caption, "new"] for caption in captions] for captions in references]
    cider = CiderD(fixed)
    scores = cider.score(candidates, references).per_picture
    assert scores == pytest.approx(plain_cider_d(candidates, references, fixed), abs=1e-9)
    assert np.array_equal(cider.score(candidates, references).per_picture, scores), "scoring teaches it nothing"


def test_saved_frequencies(tmp_path: Path) -> None:
    references = [["A dog runs.", "one dog"], ["the cat sat on \u2028 a mat"], [["two", "b\nirds", "\ud800"]]]
    candidates = ["a dog runs home", "a cat sat on a mat", "two birds"]
    cider = CiderD(references)
    path = tmp_path / "frequencies.npz"
    cider.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["frequencies.npz"], "no temporary file stays"
    loaded = CiderD.load(path)
    others = [["a green dog runs"], ["the cat", "on a green mat"], ["two birds"]]
    for own in (references, others):
        expected = cider.score(candidates, own)
        assert np.array_equal(loaded.score(candidates, own).per_picture, expected.per_picture)
        rewarded = CiderD.load(path, own).reward([0, 1, 2], candidates)
        assert rewarded == pytest.approx(expected.per_picture, abs=1e-12)
    again = CiderD.load(path, others)
    again.save(path)
    assert np.array_equal(CiderD.load(path).score(candidates, others).per_picture, expected.per_picture)
    with pytest.raises(UserError, match="no references"):
        loaded.reward([0], ["a dog"])


def test_broken_frequencies_are_named(tmp_path: Path) -> None:
    path = tmp_path / "frequencies.npz"
    CiderD([["a dog runs"], ["a cat"]]).save(path)
    whole = path.read_bytes()
    with np.load(path) as arrays:
        contents = dict(arrays)
    np.savez(tmp_path / "short.npz", **contents | {"keys_2": contents["keys_2"][:1]})  # type: ignore[arg-type]
    np.savez(tmp_path / "objects.npz", words=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(bytes(b ^ 255 if 60 < i < 90 else b for i, b in enumerate(whole)))
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("a dog runs")
    broken = ["short.npz", "objects.npz", "other.npz", "array.npy", "cut.npz", "flipped.npz", "empty.npz", "text.npz"]
    for name in [*broken, "missing.npz"]:
        with pytest.raises(UserError, match=name) as error:
            CiderD.load(tmp_path / name)
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize(
    ("pictures", "candidates", "says"),
    [([0, 1], ["a"], "1 candidates but 2 pictures"), ([2], ["a"], r"outside 0\.\.1"), ([-1], ["a"], r"outside 0\.\.1")],
)
def test_errors_of_rewards(pictures: list[int], candidates: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        CiderD([["a"], ["b"]]).reward(pictures, candidates)


def test_no_candidates_have_no_rewards() -> None:
    assert CiderD([["a"], ["b"]]).reward([], []).shape == (0,)


def plain_bootstrap(
    candidates: list[list[str]], references: list[list[list[str]]], resamples: int, seed: int
) -> list[dict[str, float]]:
    """Every metric of every set drawn, each set written out and scored like any other."""
    rng, number = np.random.default_rng(seed), len(candidates)
    cider, drawn = CiderD(references), []
    for _ in range(resamples):
        chosen = rng.integers(0, number, number)
        own = [candidates[i] for i in chosen], [references[i] for i in chosen]
        drawn.append(score_captions(*own) | {"cider_d": cider.score(*own).corpus})
    return drawn


some = [
    (list("abcd"), [list("abcd"), list("abd")]),
    (list("ab"), [list("bcda")]),
    (list("eabc"), [list("abce"), list("e")]),
    ([], [list("aabb")]),
    (list("dddd"), [list("ddea"), list("dd")]),
]


def test_bootstrap_is_a_plain_loop_over_drawn_sets() -> None:
    candidates, references = split(some)
    drawn = plain_bootstrap(candidates, references, resamples=40, seed=3)
    intervals = bootstrap(candidates, references, resamples=40, seed=3)
    assert list(intervals) == NAMES
    for name, interval in intervals.items():
        assert interval == pytest.approx(np.percentile([one[name] for one in drawn], [2.5, 97.5]), abs=1e-12), name
    assert bootstrap(candidates, references, seed=1) == bootstrap(candidates, references, seed=1)


def test_paired_bootstrap_is_a_plain_loop_over_drawn_sets() -> None:
    a, references = split(some)
    b = [captions[0] for captions in references[:3]] + a[3:4] + [["a"]]
    first, second = (plain_bootstrap(one, references, resamples=40, seed=5) for one in (a, b))
    results = paired_bootstrap(a, b, references, resamples=40, seed=5)
    assert list(results) == NAMES
    for name, result in results.items():
        drawn = np.array([two[name] - one[name] for one, two in zip(first, second, strict=True)])
        assert result.difference == pytest.approx(
            score_captions(b, references)[name] - score_captions(a, references)[name]
        )
        assert result.interval == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=1e-12)
        wrong = min((drawn <= 0).sum(), (drawn >= 0).sum())
        assert result.p_value == pytest.approx(min(1, 2 * (1 + wrong) / 41)), name
    swapped = paired_bootstrap(b, a, references, resamples=40, seed=5)
    assert all(swapped[name].p_value == results[name].p_value for name in NAMES)
    assert all(swapped[name].difference == -results[name].difference for name in NAMES)


@quick
@given(pictures)
def test_nothing_is_significant_between_equal_lists(drawn: list[tuple[Any, Any]]) -> None:
    candidates, references = split(drawn)
    for result in paired_bootstrap(candidates, candidates, references, resamples=20).values():
        assert result == (0, (0, 0), 1)


@quick
@given(pictures)
def test_intervals_lie_within_the_pictures_scores(drawn: list[tuple[Any, Any]]) -> None:
    candidates, references = split(drawn)
    each = score_captions(candidates, references, per_picture=True)
    for name, (low, high) in bootstrap(candidates, references, resamples=30).items():
        assert low <= high
        if not name.startswith("bleu"):
            assert each[name].min() - 1e-9 <= low and high <= each[name].max() + 1e-9


def test_a_clear_difference_is_significant_and_intervals_shrink() -> None:
    references = [[[f"{word}{i}" for word in "abcdef"]] for i in range(100)]
    good, bad = [own[0] for own in references], [own[0][:1] * 6 for own in references]
    good[0] = bad[0]
    assert all(one.p_value == pytest.approx(2 / 1001) for one in paired_bootstrap(bad, good, references).values())
    (low, high), (few_low, few_high) = (bootstrap(good[:n], references[:n])["rouge_l"] for n in (100, 10))
    assert 0 < high - low < few_high - few_low


def test_resamples_must_be_positive() -> None:
    with pytest.raises(UserError, match="resamples is 0"):
        bootstrap(["a"], [["a"]], resamples=0)


def test_self_cider_of_equal_and_of_unlike_captions() -> None:
    """Equal captions span one direction, captions without a common word one each."""
    equal, unlike = (
        [["a dog runs on grass"] * 3, ["two birds sit here"] * 2],
        [["a b c d", "e f g h"], ["i j k l", "m n o p"]],
    )
    assert self_cider(equal).per_picture == pytest.approx([0, 0], abs=1e-6)
    assert self_cider(unlike).per_picture == pytest.approx([1, 1])
    assert self_cider(unlike).corpus == pytest.approx(1)
    assert self_cider([["", ""], ["a", "b"]]).per_picture == pytest.approx([0, 1])
    assert self_cider([["a b", "c d"]]).corpus == 0, "with one picture every idf is 0"
    frequencies = CiderD([["x"], ["y"]])
    assert self_cider([["a b", "c d"]], frequencies).corpus == pytest.approx(1)


def test_self_cider_counted_by_hand() -> None:
    """One of two words in common, no pair: of the four cosines 1/2, 0, 0, 0 are left, and of a caption's own 1, 1, 0, 0."""
    score = self_cider([[["a", "b"], ["a", "c"]]], CiderD([["x"], ["y"]]))
    own, common = 2 / 4, 1 / 2 / 4
    roots = np.sqrt([own + common, own - common])
    assert score.corpus == pytest.approx(-math.log(roots[0] / roots.sum(), 2))


@quick
@given(st.lists(st.lists(words, min_size=2, max_size=4), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_self_cider_is_a_share_and_knows_no_order(captions: list[list[list[str]]], random: Any) -> None:
    scores = self_cider(captions)
    assert isinstance(scores, Scores) and scores.per_picture.shape == (len(captions),)
    assert scores.per_picture.min() >= 0 and scores.per_picture.max() <= 1 + 1e-9
    shuffled = [random.sample(own, len(own)) for own in captions]
    # The root of a rounding error around 0 is 1e-8.
    assert self_cider(shuffled).per_picture == pytest.approx(scores.per_picture, abs=1e-6)


def test_self_cider_needs_two_captions() -> None:
    with pytest.raises(UserError, match=r"picture 0 \(counted from 0\) has one caption"):
        self_cider([["a"], ["a", "b"]])


@pytest.mark.parametrize("metric", [score_captions, bleu, rouge_l, cider_d])
@pytest.mark.parametrize(
    ("candidates", "references", "says"),
    [
        (["a", "b"], [["a"]], "2 candidates but references of 1 pictures"),
        (["a", "b"], [["a"], []], r"picture 1 \(counted from 0\) has no reference"),
        (["a dog"], ["a dog"], r"picture 0 \(counted from 0\) are a str"),
        ([], [], "no captions to score"),
    ],
)
def test_errors_are_one_line(metric: Callable[..., Any], candidates: Any, references: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        metric(candidates, references)
    assert "\n" not in str(error.value)
