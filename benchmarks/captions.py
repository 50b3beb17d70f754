"""benchmark.py generate, folder and precision: captions beside transformers', of a folder, and in fewer bits."""

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
from evaluate import caption_loader
from model import ImageCaptionModel
from scoring.metrics import interval_of, resampled_sums
from training.estimates import step_operations
from utils import choose_device, dtypes
from weights.huggingface import write_transformers

PRECISIONS = dtypes()
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Of a weight."""
BY_RUNTIME = "int8 by onnxruntime"


def packed_precisions() -> list[str]:
    """What this CPU captions in: fp32 always, if need be by torch's plain layers."""
    halves: tuple[Precision, ...] = ("bf16", "int8")
    return ["fp32", *(name for name in halves if available(name))]


def floor(config: ViTGPT2Config, pictures: int, beams: int, length: int, precision: str) -> float:
    """The seconds that captions take where nothing but this CPU's rates holds them up: the pictures' operations, and for each
    token the weights' bytes or its operations, whichever takes longer."""
    rate, memory = product_rate(precision), memory_rate()
    width, words = config.decoder_embed_dim, config.vocab_size
    weights = config.decoder_num_layers * 14 * width**2 + words * width
    token = max(weights * BYTES[precision] / memory, 2 * pictures * beams * weights / rate)
    return pictures * step_operations(config, 0, 0) / 3 / rate + length * token


@functools.cache
def product_rate(precision: str) -> float:
    """Operations a second of a base-size layer's product with two pictures' positions, the best of several."""
    weight, x = torch.randn(3072, 768), torch.randn(394, 768)
    layer: Any = pack(weight, None, precision)  # type: ignore[arg-type]
    if isinstance(layer, Int8Linear):
        layer, x = layer.product, torch.full(x.shape, 200, dtype=torch.uint8)
    elif precision == "bf16":
        x = x.bfloat16()
    return 2 * weight.numel() * len(x) / min(timed(lambda: layer(x)) for _ in range(20))


@functools.cache
def memory_rate() -> float:
    """Bytes a second that this CPU reads of more than its caches hold, the best of several."""
    numbers = torch.ones(1 << 27)
    return numbers.nbytes / min(timed(numbers.sum) for _ in range(8))


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
    tokenizer: str = "train"
    """train (of a caption: random weights need no more), or GPT-2's: gpt2 from the Hub, a folder with vocab.json and
    merges.txt."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    output: Path = Path("benchmark-generate.json")
    """Where the figures are written to."""
    debug: bool = False
    """Show tracebacks of errors."""
    model: ViTGPT2Config = field(default_factory=sizes)
    """Sizes of the model."""

    def run(self) -> dict[str, Any]:
        """Seconds and ratios."""
        model, theirs = self.models(self.model)
        if model.device.type == "cpu":
            print(f"memory is read at {memory_rate() / 1e9:.1f} GB/s; int8: {how_int8()}")
            print(f"tokens by {in_words('fp32')} (here from the first time on)")
        figures = []
        for pictures in self.batch_sizes:
            for beams in self.num_beams if pictures == min(self.batch_sizes) else (1,):
                figures.append(self.compare(model, theirs, pictures, beams))
        return {"generate": figures}

    def models(self, sizes: ViTGPT2Config) -> tuple[ImageCaptionModel, Any]:
        """Our model and transformers', on the device."""
        from transformers import VisionEncoderDecoderModel

        torch.manual_seed(0)
        model = ImageCaptionModel(sizes).eval()
        # Ours without: ids that a tokenizer lacks are never drawn, which transformers does.
        tokenizer = load_tokenizer(self.tokenizer, ["a picture"], sizes.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            write_transformers(dataclasses.replace(model.saved(), tokenizer=tokenizer), Path(folder) / "theirs")
            theirs = VisionEncoderDecoderModel.from_pretrained(Path(folder) / "theirs").eval()
        device, _ = choose_device(self.device)
        model.to(device)
        theirs.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        return model, theirs

    def compare(self, model: ImageCaptionModel, theirs: Any | None, pictures: int, beams: int) -> dict[str, Any]:
        """One batch size and number of beams; ours alone where theirs is None."""
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
                engine = find_engine(precision, after=0) if cpu else None  # from the first time on
                return model.generate(pixels, int8=precision == "int8", engine=engine, **options).sequences

        precisions = packed_precisions() if cpu else ["bf16"]
        figures: dict[str, Any] = {"pictures": pictures, "beams": beams}
        said = ""
        if theirs is not None:
            figures["equal"] = torch.equal(peer()[:, 1:], ours(precisions[0]))
            said = f" ({precisions[0]} tokens equal: {figures['equal']})"
        print(f"{pictures} pictures, {beams} beams, {self.length} tokens{said}", flush=True)
        for name in precisions:  # twins are kept for one precision at a time
            ours(name)
            work: list[Callable[[], Any]] = [peer] if theirs is not None else []
            work.append(functools.partial(ours, name))
            rounds = np.array([[timed(piece) for piece in work] for _ in range(self.rounds)])
            *others, seconds = np.median(rounds, 0).tolist()
            figures[name] = {"seconds": seconds}
            said = f"  {name} {seconds:8.4f} s {pictures / seconds:8.1f} captions/s"
            if others:
                ratio = float(np.median(rounds[:, 0] / rounds[:, 1]))
                figures[name] |= {"transformers": others[0], "ratio": ratio}
                said += f"   transformers {others[0]:8.4f} s   {ratio:5.2f}x"
            if cpu:
                least = floor(model.config, pictures, beams, self.length, name)
                figures[name]["floor"] = least
                said += f"   floor {least:.3f} s, {least / seconds:.0%} of it reached"
            print(said, flush=True)
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
    num_beams: int = NUM_BEAMS
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
        scores = self.scores()
        figures: dict[str, Any] = {"beams": self.num_beams, "pictures": len(scores["fp32"][0])}
        figures |= {name: [float(each.mean()) for each in own] for name, own in scores.items()}
        plain = np.mean(scores.pop("fp32"), 0)
        if not plain.any():
            raise UserError(f"{self.model}: no caption has a word of its references, so there is nothing to lose")
        for name, own in scores.items():
            cost = plain - np.mean(own, 0)
            drawn = resampled_sums(np.stack([cost, plain], 1), 1000, seed=0)
            share, (low, high) = float(cost.sum() / plain.sum()), interval_of(drawn[:, 0] / drawn[:, 1])
            figures[f"{name}_cost"] = {"share": share, "interval": (low, high)}
            print(f"{name} costs {share:.2%} of CIDEr-D (95 % interval {low:.2%} to {high:.2%})")
        return {"precision": figures}

    def scores(self) -> dict[str, list[np.ndarray]]:
        """CIDEr-D by precision, fp32 first: for each number of beams (pictures,)."""
        device, _ = choose_device(self.device)
        model = ImageCaptionModel.from_pretrained(self.model).to(device)
        precisions = packed_precisions() if device.type == "cpu" else ["fp32", "fp16", "bf16"]
        if "int8" in precisions and find_engine("int8"):
            precisions.append(BY_RUNTIME)
        # By the part that each is: val serves as test where a data set has none.
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
                    caption_loader(model, make_dataloader(part, size), model.tokenizer, device, dtype, **options)
                    for part in tqdm(parts, f"{beams} beams, {name}", leave=False)
                ]
                scores[name].append(np.concatenate([own.statistics.per_picture()["cider_d"] for own in captioned]))
            means = [f"{own[-1].mean():{max(9, len(name) + 2)}.4f}" for name, own in scores.items()]
            print(f"{beams:5} " + "".join(means), flush=True)
        return scores
