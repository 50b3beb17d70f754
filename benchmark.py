"""Speed, and what it costs, side by side with transformers and pycocoevalcap, on the machine at hand.

    python benchmark.py data          the loader against the plain transformers path, and how the table grows
    python benchmark.py generate      captions by our decoding and by transformers', from the same weights
    python benchmark.py folder        captions of a folder, against the model alone and decoding alone
    python benchmark.py precision     what fewer bits cost: CIDEr-D of a model in each precision
    python benchmark.py train         training steps by our loop and by transformers' model in an ordinary one
    python benchmark.py race          Flickr8k in equal time: five captions a step, one, and transformers
    python benchmark.py golden        the same small run by two commits: is all that it leaves the same?
    python benchmark.py metrics       BLEU, ROUGE-L, CIDEr-D and rewards by our arrays and by pycocoevalcap

Prints its figures and writes them as JSON. Peers run in turn in one process, so that ratios mean something where
absolute figures do not.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.training import GoldenBenchmark, RaceBenchmark, TrainBenchmark
from captioning.pipeline import BATCH_SIZES, caption_batch, caption_pictures, picture_names, prepared
from config import PRESETS, UserError, ViTGPT2Config
from convert import save_transformers
from data.skipped import check_overlap
from data.table import CaptionTable, make_table
from dataset import Batches, CaptionDataset, load_table, load_tables, load_tokenizer, make_dataloader
from decoding.packed import Precision, available
from evaluate import caption_loader
from files import write_json
from model import ImageCaptionModel
from scoring.metrics import CiderD, interval_of, resampled_sums, score_captions
from utils import PRECISIONS, ROOT, choose_device, parse_flags, run_script


def timed(work: Callable[[], Any]) -> float:
    """Seconds that a piece of work takes, on a GPU to its end."""
    settle = torch.cuda.synchronize if torch.cuda.is_available() else int
    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start


def fastest(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each piece of work: its best of several rounds, in which all take turns."""
    seconds = dict.fromkeys(work, float("inf"))
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for name, piece in work.items():
            seconds[name] = min(seconds[name], timed(piece))
    return seconds


def packed_precisions() -> list[str]:
    """What this CPU captions in: fp32 always, if need be by torch's plain layers."""
    halves: tuple[Precision, ...] = ("bf16", "int8")
    return ["fp32", *(name for name in halves if available(name))]


# The loader


def photographs(folder: Path, number: int) -> list[Path]:
    """640 x 480 JPEGs of quality 90 that cost a decoder what photographs do: noise whose strength falls with frequency."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(number)]
    for path in tqdm(paths, "making pictures", unit="picture", leave=False):
        picture = np.zeros((480, 640, 3))
        for octave in range(7):
            size = (5 << octave, 4 << octave)
            noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
            picture += np.asarray(noise.resize((640, 480), Image.Resampling.BICUBIC), dtype=float) / 2**octave
        Image.fromarray((picture / 2).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


# Run in a process without torch, so that what it holds is the table.
TABLE_PROBE = """
import json, multiprocessing, sys, time
from data.sources import load_tables

def memory(*kinds):
    lines = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return sum(int(lines[kind].split()[0]) for kind in kinds) / 1024

def read(table, queue):
    before = memory("Private_Dirty", "Private_Clean")
    for row in range(len(table)):
        table.captions_of(row), table.picture(row)
    queue.put(memory("Private_Dirty", "Private_Clean") - before)

before, start = memory("Rss"), time.perf_counter()
table = load_tables("coco", sys.argv[1])["train"]
seconds = time.perf_counter() - start
for row in range(len(table)):
    table.captions_of(row)
figures = {"seconds": seconds, "added_mb": memory("Rss") - before, "process_mb": memory("Rss")}
context = multiprocessing.get_context("fork")
queue = context.Queue()
workers = [context.Process(target=read, args=(table, queue)) for _ in range(4)]
for worker in workers:
    worker.start()
figures["worker_mb"] = max(queue.get() for _ in workers)
for worker in workers:
    worker.join()
print(json.dumps(figures))
"""


@dataclass(kw_only=True)
class DataBenchmark:
    """The loader's speed, the share of padding, and the growth of the table."""

    pictures: int = 256
    """Pictures of 640 x 480 to read."""
    rounds: int = 5
    """Times that each path reads them; the best counts."""
    captions: tuple[int, ...] = (5_000, 50_000, 500_000)
    """Sizes of the table to measure, in captions."""
    data_dir: Path | None = None
    """Captions whose share of padding is measured, such as Flickr8k's (default: none)."""
    tokenizer: str = "gpt2"
    """GPT-2's tokenizer, for the share of padding: from the Hub, or a folder with vocab.json and merges.txt."""
    output: Path = Path("benchmark-data.json")
    """Where the figures are written to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """All figures."""
        with tempfile.TemporaryDirectory() as folder:
            os.environ["VIT_GPT2_CACHE"] = f"{folder}/cache"
            figures: dict[str, Any] = {"loader": self.loader(Path(folder))}
            if self.data_dir is not None:
                figures["padding"] = self.padding(self.data_dir)
            figures["table"] = [self.growth(Path(folder) / str(captions), captions) for captions in self.captions]
        return figures

    def loader(self, folder: Path) -> dict[str, float]:
        """Pictures/s on one core: transformers' processor, our loader decoding, and our loader from its cache."""
        from transformers import ViTImageProcessorPil

        torch.set_num_threads(1)
        paths = photographs(folder, self.pictures)
        table = make_table((path, i, [f"a picture with number {i}"] * 5) for i, path in enumerate(paths))
        tokenizer = load_tokenizer("train", table.captions().to_pylist(), 300)
        config = ViTGPT2Config(vocab_size=len(tokenizer))
        processor = ViTImageProcessorPil(size={"height": config.image_size, "width": config.image_size})

        def peer() -> None:
            for path in paths:
                processor(Image.open(path).convert("RGB"), return_tensors="pt")

        def ours(data: CaptionDataset) -> Callable[[], None]:
            def read() -> None:
                for _ in make_dataloader(data, 64, shuffle=True):
                    pass

            return read

        work = {
            "transformers": peer,
            "decoding": ours(CaptionDataset(table, tokenizer, config, progress=False)),
            "cache": ours(CaptionDataset(table, tokenizer, config, keep="disk", progress=False)),
        }
        rates = {name: self.pictures / seconds for name, seconds in fastest(work, self.rounds).items()}
        print("pictures/s on one core, 640 x 480 JPEGs to 224, with five captions each")
        for name, rate in rates.items():
            print(f"  {name:14} {rate:9,.0f}   {rate / rates['transformers']:5.1f}x")
        return rates

    def padding(self, data_dir: Path) -> list[dict[str, float]]:
        """The share of a batch's positions that are padding, and the least possible: batches of one picture."""
        table = load_tables("auto", data_dir)["train"]
        tokenizer = load_tokenizer(self.tokenizer, [], PRESETS["coco"].model.vocab_size)
        print(f"padding of {len(table):,} pictures, one epoch")
        return [self.padding_of(table, tokenizer, *sizes) for sizes in ((5, 32), (5, 128), (1, 32), (1, 128))]

    def padding_of(self, table: CaptionTable, tokenizer: Any, captions: int, batch_size: int) -> dict[str, float]:
        """The same for one batch size and number of captions a picture."""
        data = CaptionDataset(table, tokenizer, PRESETS["coco"].model, captions_per_image=captions)

        def share(size: int, shuffle: bool) -> float:
            batches, lengths, padded = Batches(data, size, 0, 1, shuffle), data.tokens.lengths + 1, 0
            order = batches.order(0)
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                padded += (batches.lengths[chosen].max() + 1) * len(chosen) * captions
            return 1 - float(lengths.sum() / padded)

        figures = {"captions": captions, "batch_size": batch_size, "padding": share(batch_size, True)}
        figures["floor"] = share(1, False)
        print("  {captions} captions, batches of {batch_size:3}: {padding:.1%} (floor {floor:.1%})".format(**figures))
        return figures

    def growth(self, folder: Path, captions: int) -> dict[str, float]:
        """Time and memory of a table of so many captions in COCO's layout, the second time it is loaded."""
        pictures = captions // 5
        (folder / "annotations").mkdir(parents=True)
        for part, number in (("train2017", pictures), ("val2017", 1)):
            (folder / part).mkdir()
            for i in range(number):
                os.close(os.open(folder / part / f"{i:012d}.jpg", os.O_CREAT))
            with open(folder / "annotations" / f"captions_{part}.json", "w") as file:
                images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(number)]
                texts = [
                    {
                        "id": n,
                        "image_id": n // 5,
                        "caption": f"a caption of fifty-two letters, as long as COCO's: {n:06}",
                    }
                    for n in range(5 * number)
                ]
                json.dump({"images": images, "annotations": texts}, file)
        first, second = (self.load_elsewhere(folder) for _ in range(2))
        figures = {"captions": captions, "first_seconds": first["seconds"]} | second
        print(
            "table of {captions:9,} captions: loaded in {first_seconds:6.2f} s, then in {seconds:.2f} s; adds {added_mb:.1f} "
            "MB to a process (all of it: {process_mb:.0f} MB), {worker_mb:.1f} MB to each of 4 workers".format(
                **figures
            )
        )
        return figures

    def load_elsewhere(self, folder: Path) -> dict[str, float]:
        """Loads a table in a process of its own, and reads all of it in four more that it forks."""
        command = [sys.executable, "-c", TABLE_PROBE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise UserError(f"loading the table of {folder.name} captions failed: {done.stderr.strip()[-200:]}")
        return json.loads(done.stdout)  # type: ignore[no-any-return]


# Captions


@dataclass(kw_only=True)
class GenerateBenchmark:
    """Captions of 20 tokens by transformers and by ours, from the same random weights, in turn: on a CPU transformers in
    fp32 and ours in fp32, bf16 and int8, on a GPU both in bf16."""

    batch_sizes: tuple[int, ...] = (1, 8)
    """Pictures captioned at a time; on a GPU also try 512."""
    num_beams: tuple[int, ...] = (1, 3)
    """Beams; 1 is greedy. More than one only with the smallest batch."""
    length: int = 20
    """Tokens of a caption."""
    rounds: int = 5
    """Times that each captions them; a ratio is the median over pairs, in each of which both take their turn."""
    tokenizer: str = "gpt2"
    """GPT-2's tokenizer: from the Hub, or a folder with vocab.json and merges.txt."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    output: Path = Path("benchmark-generate.json")
    """Where the figures are written to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Seconds and ratios."""
        from transformers import VisionEncoderDecoderModel

        torch.manual_seed(0)
        model = ImageCaptionModel(ViTGPT2Config()).eval()
        model.tokenizer = load_tokenizer(self.tokenizer, [], model.config.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            save_transformers(model, Path(folder) / "theirs")
            theirs = VisionEncoderDecoderModel.from_pretrained(Path(folder) / "theirs").eval()
        device, _ = choose_device(self.device)
        model.to(device)
        theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        figures = []
        for pictures in self.batch_sizes:
            for beams in self.num_beams if pictures == min(self.batch_sizes) else (1,):
                figures.append(self.compare(model, theirs, pictures, beams))
        return {"generate": figures}

    def compare(self, model: ImageCaptionModel, theirs: Any, pictures: int, beams: int) -> dict[str, Any]:
        """One batch size and number of beams."""
        cpu = model.device.type == "cpu"
        pixels = torch.randn(pictures, 3, model.config.image_size, model.config.image_size).to(model.device)
        lengths = {"min_new_tokens": self.length, "max_new_tokens": self.length}
        ids = {"eos_token_id": model.config.end_token_id, "pad_token_id": model.config.pad_token_id}
        ids["decoder_start_token_id"] = model.config.start_token_id

        def peer() -> Any:
            return theirs.generate(pixels.to(theirs.dtype), num_beams=beams, do_sample=False, **lengths, **ids)

        def ours(precision: str) -> Any:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision != "fp32"):
                options = {"min_length": self.length, "max_length": self.length, "num_beams": beams}
                return model.generate(pixels, int8=precision == "int8", **options).sequences

        precisions = packed_precisions() if cpu else ["bf16"]
        equal = torch.equal(peer()[:, 1:], ours(precisions[0]))
        print(f"{pictures} pictures, {beams} beams, {self.length} tokens ({precisions[0]} tokens equal: {equal})")
        figures: dict[str, Any] = {"pictures": pictures, "beams": beams, "equal": equal}
        for name in precisions:  # twins are kept for one precision at a time
            ours(name)
            pairs = np.array([[timed(peer), timed(functools.partial(ours, name))] for _ in range(self.rounds)])
            theirs_seconds, seconds = np.median(pairs, 0)
            ratio = float(np.median(pairs[:, 0] / pairs[:, 1]))
            figures[name] = {"seconds": float(seconds), "transformers": float(theirs_seconds), "ratio": ratio}
            rate = f"{pictures / seconds:8.1f} captions/s"
            print(f"  {name} {seconds:8.4f} s {rate}   transformers {theirs_seconds:8.4f} s   {ratio:5.2f}x")
        return figures


@dataclass(kw_only=True)
class FolderBenchmark:
    """Captions of a folder's pictures as example_usage.py makes them, where decoding and captioning overlap; against the
    model alone, on pictures decoded before, and against decoding alone."""

    model: str
    """The model: a file, a folder or a Hub name."""
    folder: Path
    """Folder of pictures."""
    pictures: int = 256
    """How many of them to caption: the first ones."""
    batch_size: int | None = None
    """Pictures captioned at a time (default: what suits the device)."""
    num_beams: int = 3
    """Beams; 1 is greedy."""
    rounds: int = 3
    """Times that each is done; the best counts."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    """Of matrix products."""
    output: Path = Path("benchmark-folder.json")
    """Where the figures are written to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Pictures a second, and the share that the whole has of its slower part."""
        device, _ = choose_device(self.device)
        model = ImageCaptionModel.from_pretrained(self.model).to(device)
        names = picture_names([str(self.folder)])[: self.pictures]
        size = self.batch_size or BATCH_SIZES[device.type]
        options: dict[str, Any] = {"num_beams": self.num_beams, "precision": self.precision}
        pixels = [picture for _, picture in prepared(names, model.config) if isinstance(picture, torch.Tensor)]
        if not pixels:
            raise UserError(f"{self.folder}: no picture can be read")

        def model_alone() -> None:
            for start in range(0, len(pixels), size):
                caption_batch(model, torch.stack(pixels[start : start + size]), **options)

        work: dict[str, Callable[[], Any]] = {
            "decoding": lambda: list(prepared(names, model.config)),
            "model": model_alone,
            "folder": lambda: list(caption_pictures(model, names, batch_size=size, **options)),
        }
        model_alone()  # once, for what is prepared at the first time
        rates = {name: len(pixels) / seconds for name, seconds in fastest(work, self.rounds).items()}
        share = rates["folder"] / min(rates["decoding"], rates["model"])
        for name, rate in rates.items():
            print(f"{name:12}{rate:10.1f} pictures/s")
        print(f"the folder runs at {share:.0%} of its slower part ({len(pixels)} pictures, {size} at a time, {device})")
        return {"folder": rates | {"share": share, "pictures": len(pixels), "batch_size": size, "device": str(device)}}


@dataclass(kw_only=True)
class PrecisionBenchmark:
    """CIDEr-D of one model in each precision. Any rounding turns near ties the other way, which moves the number of a single
    search by a percent up or down; so the cost is a mean over several numbers of beams, with the interval that other
    pictures would give."""

    model: str
    """The model: a file, a folder or a Hub name."""
    data_dir: Path
    """Pictures with captions, in any layout that training reads."""
    dataset: str = "auto"
    """Its layout; auto recognises it."""
    splits: tuple[str, ...] = ("val", "test")
    """The parts to caption."""
    num_beams: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Beams; 1 is greedy."""
    batch_size: int = 64
    """Pictures captioned at a time."""
    allow_overlap: bool = False
    """Caption pictures that the model was trained on too: what rounding costs there is of use, the scores are not."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to run."""
    output: Path = Path("benchmark-precision.json")
    """Where the figures are written to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        if not self.splits or not self.num_beams or min(self.batch_size, *self.num_beams) < 1:
            raise UserError("splits and num_beams need an entry each, and num_beams and batch_size must be at least 1")

    def run(self) -> dict[str, Any]:
        """CIDEr-D by beams and precision, and how much less than fp32 each has, as a share of fp32's."""
        device, _ = choose_device(self.device)
        model = ImageCaptionModel.from_pretrained(self.model).to(device)
        precisions = packed_precisions() if device.type == "cpu" else ["fp32", "fp16", "bf16"]
        # By the part that each is: val serves as test where a data set has none.
        tables = {table.split: table for table in (load_table(self.dataset, self.data_dir, s) for s in self.splits)}
        loaders = []
        for table in tables.values():
            check_overlap(model.trained_on, table, self.allow_overlap)
            loaders.append(make_dataloader(CaptionDataset(table, model.tokenizer, model.config), self.batch_size))
        scores: dict[str, list[np.ndarray]] = {name: [] for name in precisions}  # for each number of beams (pictures,)
        print(f"{'beams':>5} " + "".join(f"{name:>9}" for name in precisions))
        for beams in self.num_beams:
            for name in precisions:
                dtype = PRECISIONS.get(name, torch.float32)
                options: dict[str, Any] = {"progress": False, "num_beams": beams, "int8": name == "int8"}
                captioned = [
                    caption_loader(model, loader, model.tokenizer, device, dtype, **options)
                    for loader in tqdm(loaders, f"{beams} beams, {name}", leave=False)
                ]
                scores[name].append(np.concatenate([own.statistics.per_picture()["cider_d"] for own in captioned]))
            print(f"{beams:5} " + "".join(f"{scores[name][-1].mean():9.4f}" for name in precisions), flush=True)
        figures: dict[str, Any] = {"beams": self.num_beams, "pictures": len(scores["fp32"][0])}
        figures |= {name: [float(each.mean()) for each in scores[name]] for name in precisions}
        plain = np.mean(scores["fp32"], 0)
        if not plain.any():
            raise UserError(f"{self.model}: no caption has a word of its references, so there is nothing to lose")
        for name in precisions[1:]:
            cost = plain - np.mean(scores[name], 0)
            drawn = resampled_sums(np.stack([cost, plain], 1), 1000, seed=0)
            share, (low, high) = float(cost.sum() / plain.sum()), interval_of(drawn[:, 0] / drawn[:, 1])
            figures[f"{name}_cost"] = {"share": share, "interval": (low, high)}
            print(f"{name} costs {share:.2%} of CIDEr-D (95 % interval {low:.2%} to {high:.2%})")
        return {"precision": figures}


# Metrics


def made_up_captions(pictures: int, references: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """A candidate and some references for each picture, as words: 8 to 14 of 8,000, as often as Zipf's law has it, half
    of them from a dozen that the picture's captions share."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(8000)])
    often = 1 / np.arange(1, len(vocabulary) + 1)
    often /= often.sum()

    def caption(shared: np.ndarray) -> list[str]:
        own = rng.choice(len(vocabulary), rng.integers(8, 15), p=often)
        words = np.where(rng.random(len(own)) < 0.5, rng.choice(shared, len(own)), own)
        return vocabulary[words].tolist()  # type: ignore[no-any-return]

    topics = [rng.choice(len(vocabulary), 12, p=often) for _ in range(pictures)]
    return [caption(topic) for topic in topics], [[caption(topic) for _ in range(references)] for topic in topics]


@dataclass(kw_only=True)
class MetricsBenchmark:
    """BLEU, ROUGE-L and CIDEr-D, and CIDEr-D as a reward, by pycocoevalcap and by metrics.py, from the same words."""

    pictures: int = 5_000
    """Pictures to score, each with one candidate."""
    references: int = 5
    """References of each picture."""
    rewarded: int = 50
    """Pictures of a batch to reward."""
    samples: int = 5
    """Sampled captions of each picture of the batch; at most `pictures` in all."""
    rounds: int = 3
    """Times that each scores them; the best counts."""
    output: Path = Path("benchmark-metrics.json")
    """Where the figures are written to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        if not 1 <= self.rewarded * self.samples <= self.pictures:
            batch = f"rewarded is {self.rewarded} and samples {self.samples}"
            raise UserError(f"{batch}: their product must be from 1 to pictures, {self.pictures}")

    def run(self) -> dict[str, Any]:
        """Seconds, ratios, and the largest difference of any score."""
        try:
            import pycocoevalcap.cider.cider  # noqa: F401
        except ImportError:
            raise UserError("pycocoevalcap is not installed: pip install -r requirements/full.txt") from None
        captions = made_up_captions(self.pictures, self.references)
        print(f"{self.pictures:,} pictures with {self.references} references")
        return {"scores": self.scores(*captions), "reward": self.reward(*captions)}

    def scores(self, candidates: list[list[str]], references: list[list[list[str]]]) -> dict[str, float]:
        """All metrics of all pictures."""
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
        """The reward of a batch. pycocoevalcap is timed with the batch's own frequencies, as it takes no others; to
        compare scores, its scorer is handed those of all pictures."""
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs, cook_test

        pictures = [i for i in range(self.rewarded) for _ in range(self.samples)]
        # A sample begins as a reference of its picture does and goes on as any candidate, from far off to nearly right.
        samples = [references[i][0][: n % 9] + candidates[n][n % 9 :] for n, i in enumerate(pictures)]
        results, truth = as_sentences(samples, [references[i] for i in pictures])
        cider = CiderD(references)

        scorer = CiderScorer()
        everything = [cook_refs([" ".join(words) for words in captions]) for captions in references]
        scorer.crefs = everything
        scorer.compute_doc_freq()
        # It pairs candidates with as many entries of crefs, and takes the length of crefs for the number of pictures.
        scorer.ctest = [cook_test(sentence) for [sentence] in results.values()]
        scorer.crefs = [everything[i] for i in pictures] + everything[len(pictures) :]
        difference = np.abs(scorer.compute_cider() - cider.reward(pictures, samples)).max()

        work = {
            "pycocoevalcap": lambda: Cider().compute_score(truth, results),
            "metrics": lambda: cider.reward(pictures, samples),
        }
        return self.report(f"reward of {len(samples)} captions", work, difference)

    def report(self, name: str, work: dict[str, Callable[[], Any]], difference: float) -> dict[str, float]:
        """Times both, prints and returns the figures; scores that differ are an error."""
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
    """Candidates and references the way pycocoevalcap takes them."""
    results = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    return results, {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}


COMMANDS = {
    "data": DataBenchmark,
    "generate": GenerateBenchmark,
    "folder": FolderBenchmark,
    "precision": PrecisionBenchmark,
    "metrics": MetricsBenchmark,
    "train": TrainBenchmark,
    "race": RaceBenchmark,
    "golden": GoldenBenchmark,
}


def main() -> None:
    """The command line."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in COMMANDS:
        raise UserError(f"usage: python benchmark.py {'|'.join(COMMANDS)} (--help after it shows the flags)")
    config: Any = parse_flags(COMMANDS[name], __doc__, arguments)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    write_json(config.output, versions | config.run())
    print(f"written to {config.output}")


if __name__ == "__main__":
    run_script(main)
