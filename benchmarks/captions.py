"""benchmark.py generate, folder and precision: captioning against transformers, of a folder, in lower precision."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.timing import fastest, sizes, timed
from captioning.engine import MOST_ROWS, find_engine, in_words
from captioning.pipeline import BATCH_SIZES, caption_batch, caption_pictures, picture_names, prepared
from config import NUM_BEAMS, UserError, ViTGPT2Config
from data.skipped import check_overlap
from dataset import CaptionDataset, load_table, load_tokenizer, make_dataloader
from decoding.packed import Int8Linear, Precision, available, how_int8, pack
from evaluate import caption_batches
from model import ImageCaptionModel
from scoring.metrics import interval_of, resampled_sums
from training.estimates import step_operations
from utils import choose_device, dtypes
from weights.huggingface import write_transformers

PRECISIONS = dtypes()
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Bytes of one weight."""
BY_RUNTIME = "int8 by onnxruntime"


def packed_precisions() -> list[str]:
    """Precisions that this CPU can caption in: always fp32, at least by torch's plain layers."""
    halves: tuple[Precision, ...] = ("bf16", "int8")
    return ["fp32", *(name for name in halves if available(name))]


def floor(config: ViTGPT2Config, pictures: int, beams: int, length: int, precision: str) -> float:
    """Lower bound on the seconds that captioning takes, from this CPU's measured rates: encoding the pictures and, for
    each token, reading the weights or computing with them, whichever takes longer."""
    rate, memory = product_rate(precision), memory_rate()
    width, words = config.decoder_embed_dim, config.vocab_size
    weights = config.decoder_num_layers * 14 * width**2 + words * width
    token = max(weights * BYTES[precision] / memory, 2 * pictures * beams * weights / rate)
    return pictures * step_operations(config, 0, 0) / 3 / rate + length * token


@functools.cache
def product_rate(precision: str) -> float:
    """Operations per second of a base-size layer's matrix product with the positions of two pictures, best of 20."""
    weight, x = torch.randn(3072, 768), torch.randn(394, 768)
    layer: Any = pack(weight, None, precision)  # type: ignore[arg-type]
    if isinstance(layer, Int8Linear):
        layer, x = layer.product, torch.full(x.shape, 200, dtype=torch.uint8)
    elif precision == "bf16":
        x = x.bfloat16()
    return 2 * weight.numel() * len(x) / min(timed(lambda: layer(x)) for _ in range(20))


@functools.cache
def memory_rate() -> float:
    """Bytes per second that this CPU reads from an array larger than its caches, best of 8."""
    numbers = torch.ones(1 << 27)
    return numbers.nbytes / min(timed(numbers.sum) for _ in range(8))


@dataclass(kw_only=True)
class GenerateBenchmark:
    """Caption with transformers and with our code in turn, from the same random weights. On a CPU transformers runs in
    fp32, ours in fp32, bf16 and int8; on a GPU both run in bf16."""

    batch_sizes: tuple[int, ...] = (1, 8)
    """Pictures per batch; on a GPU also try 512."""
    num_beams: tuple[int, ...] = (1, 3)
    """Beams; 1 is greedy. More than 1 is measured with the smallest batch only."""
    length: int = 20
    """Tokens per caption."""
    rounds: int = 5
    """Rounds, in each of which both take a turn; a ratio is the median over rounds."""
    tokenizer: str = "train"
    """train (on one caption: enough for random weights), gpt2 (from the Hub), or a folder with GPT-2's vocab.json and
    merges.txt."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on."""
    output: Path = Path("benchmark-generate.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""
    model: ViTGPT2Config = field(default_factory=sizes)
    """Sizes of the model."""

    def run(self) -> dict[str, Any]:
        """Return seconds and ratios."""
        model, theirs = self.models(self.model)
        if model.device.type == "cpu":
            print(f"memory is read at {memory_rate() / 1e9:.1f} GB/s; int8: {how_int8()}")
            print(f"tokens by {in_words('fp32')} (in this benchmark: from the first batch on)")
        figures = []
        for pictures in self.batch_sizes:
            for beams in self.num_beams if pictures == min(self.batch_sizes) else (1,):
                figures.append(self.compare(model, theirs, pictures, beams))
        return {"generate": figures}

    def models(self, sizes: ViTGPT2Config) -> tuple[ImageCaptionModel, Any]:
        """Our model and transformers', with equal weights, on the device."""
        from transformers import VisionEncoderDecoderModel

        torch.manual_seed(0)
        model = ImageCaptionModel(sizes).eval()
        # Ours has no tokenizer: with one it never generates ids that the tokenizer lacks, while transformers does.
        tokenizer = load_tokenizer(self.tokenizer, ["a picture"], sizes.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            write_transformers(dataclasses.replace(model.saved(), tokenizer=tokenizer), Path(folder) / "theirs")
            theirs = VisionEncoderDecoderModel.from_pretrained(Path(folder) / "theirs").eval()
        device, _ = choose_device(self.device)
        model.to(device)
        theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        return model, theirs

    def compare(self, model: ImageCaptionModel, theirs: Any | None, pictures: int, beams: int) -> dict[str, Any]:
        """Measure one batch size and number of beams; only our model where theirs is None."""
        cpu = model.device.type == "cpu"
        pixels = torch.randn(pictures, 3, model.config.image_size, model.config.image_size).to(model.device)
        lengths = {"min_new_tokens": self.length, "max_new_tokens": self.length}
        ids = {"eos_token_id": model.config.end_token_id, "pad_token_id": model.config.pad_token_id}
        ids["decoder_start_token_id"] = model.config.start_token_id

        def peer() -> Any:
            assert theirs is not None
            return theirs.generate(pixels.to(theirs.dtype), num_beams=beams, do_sample=False, **lengths, **ids)

        def ours(precision: str) -> Any:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision != "fp32"):
                options = {"min_length": self.length, "max_length": self.length, "num_beams": beams}
                engine = find_engine(precision, after=0) if cpu else None  # used from the first batch on
                return model.generate(pixels, int8=precision == "int8", engine=engine, **options).sequences

        precisions = packed_precisions() if cpu else ["bf16"]
        figures: dict[str, Any] = {"pictures": pictures, "beams": beams}
        note = ""
        if theirs is not None:
            figures["equal"] = torch.equal(peer()[:, 1:], ours(precisions[0]))
            note = f" ({precisions[0]} tokens equal: {figures['equal']})"
        print(f"{pictures} pictures, {beams} beams, {self.length} tokens{note}", flush=True)
        for name in precisions:  # the model holds packed copies for one precision at a time
            ours(name)
            work: list[Callable[[], Any]] = [peer] if theirs is not None else []
            work.append(functools.partial(ours, name))
            rounds = np.array([[timed(piece) for piece in work] for _ in range(self.rounds)])
            *others, seconds = np.median(rounds, 0).tolist()
            figures[name] = {"seconds": seconds}
            line = f"  {name} {seconds:8.4f} s {pictures / seconds:8.1f} captions/s"
            if others:
                ratio = float(np.median(rounds[:, 0] / rounds[:, 1]))
                figures[name] |= {"transformers": others[0], "ratio": ratio}
                line += f"   transformers {others[0]:8.4f} s   {ratio:5.2f}x"
            if cpu:
                least = floor(model.config, pictures, beams, self.length, name)
                figures[name]["floor"] = least
                line += f"   floor {least:.3f} s, {least / seconds:.0%} of the floor's speed"
            print(line, flush=True)
        return figures


@dataclass(kw_only=True)
class FolderBenchmark:
    """Caption a folder as example_usage.py does, where picture decoding and captioning overlap. Compare with the model
    alone, on pictures decoded before, and with picture decoding alone."""

    model: str
    """The model: a file, a folder or a Hub name."""
    folder: Path
    """Folder of pictures."""
    pictures: int = 256
    """Largest number of pictures to caption, the first ones of the folder."""
    batch_size: int | None = None
    """Pictures per batch (default: depends on the device)."""
    num_beams: int = NUM_BEAMS
    """Beams; 1 is greedy."""
    rounds: int = 3
    """Rounds; the best time of each counts."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    """Precision of matrix products."""
    output: Path = Path("benchmark-folder.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Return pictures per second, and the folder's speed as a share of its slower part's."""
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
        model_alone()  # warm-up: the first call prepares packed copies and kernels
        rates = {name: len(pixels) / seconds for name, seconds in fastest(work, self.rounds).items()}
        share = rates["folder"] / min(rates["decoding"], rates["model"])
        for name, rate in rates.items():
            print(f"{name:12}{rate:10.1f} pictures/s")
        print(
            f"the folder runs at {share:.0%} of the speed of its slower part ({len(pixels)} pictures, {size} at a time, {device})"
        )
        return {"folder": rates | {"share": share, "pictures": len(pixels), "batch_size": size, "device": str(device)}}


@dataclass(kw_only=True)
class PrecisionBenchmark:
    """Measure CIDEr-D of one model in each precision. Any rounding reverses near ties, which moves the score of one
    search by a percent up or down. So the cost is a mean over several numbers of beams, with a bootstrap interval over
    pictures."""

    model: str
    """The model: a file, a folder or a Hub name."""
    data_dir: Path
    """Pictures with captions, in any layout that training reads."""
    dataset: str = "auto"
    """Layout of the data; auto detects it."""
    splits: tuple[str, ...] = ("val", "test")
    """Splits to caption."""
    num_beams: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Beams; 1 is greedy."""
    batch_size: int = 64
    """Pictures per batch."""
    allow_overlap: bool = False
    """Also caption pictures that the model was trained on: there the cost of rounding is valid, the scores are not."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to run on."""
    output: Path = Path("benchmark-precision.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        if not self.splits or not self.num_beams or min(self.batch_size, *self.num_beams) < 1:
            raise UserError("splits and num_beams need an entry each, and num_beams and batch_size must be at least 1")

    def run(self) -> dict[str, Any]:
        """Return CIDEr-D by beams and precision, and each precision's loss against fp32 as a share of fp32's score."""
        scores = self.scores()
        figures: dict[str, Any] = {"beams": self.num_beams, "pictures": len(scores["fp32"][0])}
        figures |= {name: [float(each.mean()) for each in arrays] for name, arrays in scores.items()}
        plain = np.mean(scores.pop("fp32"), 0)
        if not plain.any():
            raise UserError(f"{self.model}: no caption shares a word with its references, so no cost can be measured")
        for name, arrays in scores.items():
            cost = plain - np.mean(arrays, 0)
            drawn = resampled_sums(np.stack([cost, plain], 1), 1000, seed=0)
            share, (low, high) = float(cost.sum() / plain.sum()), interval_of(drawn[:, 0] / drawn[:, 1])
            figures[f"{name}_cost"] = {"share": share, "interval": (low, high)}
            print(f"{name} costs {share:.2%} of CIDEr-D (95 % interval {low:.2%} to {high:.2%})")
        return {"precision": figures}

    def scores(self) -> dict[str, list[np.ndarray]]:
        """CIDEr-D by precision, fp32 first: one array (pictures,) for each number of beams."""
        device, _ = choose_device(self.device)
        model = ImageCaptionModel.from_pretrained(self.model).to(device)
        precisions = packed_precisions() if device.type == "cpu" else ["fp32", "fp16", "bf16"]
        if "int8" in precisions and find_engine("int8"):
            precisions.append(BY_RUNTIME)
        # Keyed by the split that was loaded: where a data set has no test, val is loaded for it, and must count once.
        tables = {table.split: table for table in (load_table(self.dataset, self.data_dir, s) for s in self.splits)}
        for table in tables.values():
            check_overlap(model.trained_on, table, self.allow_overlap)
        parts = [CaptionDataset(table, model.tokenizer, model.config) for table in tables.values()]
        scores: dict[str, list[np.ndarray]] = {name: [] for name in precisions}
        print(f"{'beams':>5} " + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in precisions))
        for beams in self.num_beams:
            for name in precisions:
                dtype = PRECISIONS.get(name, torch.float32)
                options: dict[str, Any] = {"progress": False, "num_beams": beams, "int8": name.startswith("int8")}
                size = self.batch_size
                if name == BY_RUNTIME:
                    options["engine"], size = find_engine("int8", after=0), max(1, MOST_ROWS // beams)
                captioned = [
                    caption_batches(model, make_dataloader(part, size), model.tokenizer, device, dtype, **options)
                    for part in tqdm(parts, f"{beams} beams, {name}", leave=False)
                ]
                scores[name].append(np.concatenate([part.statistics.per_picture()["cider_d"] for part in captioned]))
            means = [f"{arrays[-1].mean():{max(9, len(name) + 2)}.4f}" for name, arrays in scores.items()]
            print(f"{beams:5} " + "".join(means), flush=True)
        return scores
