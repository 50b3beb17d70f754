"""benchmark.py metrics: time scores and rewards by scoring/metrics.py and by pycocoevalcap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import fastest
from config import UserError
from scoring.metrics import CiderD, score_captions


def made_up_captions(pictures: int, references: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """A candidate and some references for each picture, as lists of words: 8 to 14 words of a vocabulary of 8,000 with
    frequencies by Zipf's law, half of them from a dozen words that the picture's captions share."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(8000)])
    often = 1 / np.arange(1, len(vocabulary) + 1)
    often /= often.sum()

    def caption(shared: np.ndarray) -> list[str]:
        free = rng.choice(len(vocabulary), rng.integers(8, 15), p=often)
        words = np.where(rng.random(len(free)) < 0.5, rng.choice(shared, len(free)), free)
        return vocabulary[words].tolist()  # type: ignore[no-any-return]

    topics = [rng.choice(len(vocabulary), 12, p=often) for _ in range(pictures)]
    return [caption(topic) for topic in topics], [[caption(topic) for _ in range(references)] for topic in topics]


@dataclass(kw_only=True)
class MetricsBenchmark:
    """Time BLEU, ROUGE-L, CIDEr-D, and CIDEr-D as a reward, by pycocoevalcap and by metrics.py, on the same words."""

    pictures: int = 5_000
    """Pictures to score, each with one candidate."""
    references: int = 5
    """References per picture."""
    rewarded: int = 50
    """Pictures in the batch that is rewarded."""
    samples: int = 5
    """Sampled captions per picture of that batch; at most `pictures` in all."""
    rounds: int = 3
    """Rounds in which each scores them; the best time counts."""
    output: Path = Path("benchmark-metrics.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        if not 1 <= self.rewarded * self.samples <= self.pictures:
            batch = f"rewarded is {self.rewarded} and samples {self.samples}"
            raise UserError(f"{batch}: their product must be from 1 to pictures, {self.pictures}")

    def run(self) -> dict[str, Any]:
        """Return seconds, ratios, and the largest difference of any score."""
        try:
            import pycocoevalcap.cider.cider  # noqa: F401
        except ImportError:
            raise UserError("pycocoevalcap is not installed: pip install -r requirements/full.txt") from None
        captions = made_up_captions(self.pictures, self.references)
        print(f"{self.pictures:,} pictures with {self.references} references")
        return {"scores": self.scores(*captions), "reward": self.reward(*captions)}

    def scores(self, candidates: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
        """Time all metrics of all pictures."""
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

        results, truth = as_sentences(candidates, references)

        def peer() -> list[np.ndarray]:
            each = Bleu(4).compute_score(truth, results, verbose=0)[1]
            others = [scorer.compute_score(truth, results)[1] for scorer in (Rouge(), Cider())]
            return [np.array(scores) for scores in (*each, *others)]

        def ours() -> dict[str, np.ndarray]:
            return score_captions(candidates, references, per_picture=True)

        difference = max(np.abs(a - b).max() for a, b in zip(peer(), ours().values(), strict=True))
        return self.report("BLEU, ROUGE-L, CIDEr-D", {"pycocoevalcap": peer, "metrics": ours}, difference)

    def reward(self, candidates: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
        """Time the reward of a batch. pycocoevalcap is timed with document frequencies of the batch, as it accepts no
        others; to compare scores, its scorer is given those of all pictures."""
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

        pictures = [i for i in range(self.rewarded) for _ in range(self.samples)]
        # A sample starts like a reference and ends like a candidate, so that samples range from wrong to nearly right.
        samples = [references[i][0][: n % 9] + candidates[n][n % 9 :] for n, i in enumerate(pictures)]
        results, truth = as_sentences(samples, [references[i] for i in pictures])
        cider = CiderD(references)

        scorer = CiderScorer()
        everything = [cook_refs([" ".join(words) for words in captions]) for captions in references]
        scorer.crefs = everything
        scorer.compute_doc_freq()
        # It pairs the candidates with the first entries of crefs, and takes len(crefs) as the number of pictures.
        scorer.ctest = [cook_test(sentence) for [sentence] in results.values()]
        scorer.crefs = [everything[i] for i in pictures] + everything[len(pictures) :]
        difference = np.abs(scorer.compute_cider() - cider.reward(pictures, samples)).max()

        work = {
            "pycocoevalcap": lambda: Cider().compute_score(truth, results),
            "metrics": lambda: cider.reward(pictures, samples),
        }
        return self.report(f"reward of {len(samples)} captions", work, difference)

    def report(self, name: str, work: dict[str, Callable[[], Any]], difference: float) -> dict[str, float]:
        """Time both, print and return the figures. Raises UserError where their scores differ."""
        if not difference < 1e-9:
            raise UserError(f"{name}: scores differ from pycocoevalcap's by {difference:.1e}: metrics.py is wrong")
        seconds = fastest(work, self.rounds)
        ratio = seconds["pycocoevalcap"] / seconds["metrics"]
        times = "   ".join(f"{who} {time:.4f} s" for who, time in seconds.items())
        print(f"  {name:26}{times}   {ratio:5.1f}x   (largest difference {difference:.0e})")
        return seconds | {"ratio": ratio, "difference": float(difference)}


def as_sentences(
    candidates: list[list[str]], references: list[list[list[str]]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Candidates and references in pycocoevalcap's form: {number: [sentence, ...]}."""
    results = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    return results, {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
