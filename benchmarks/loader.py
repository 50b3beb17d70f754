"""benchmark.py data: the data loader against plain transformers, and time and memory of large caption tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.timing import fastest
from config import PRESETS, UserError, ViTGPT2Config
from data.table import CaptionTable, make_table
from dataset import Batches, CaptionDataset, load_tables, load_tokenizer, make_dataloader
from utils import ROOT


def photographs(folder: Path, number: int) -> list[Path]:
    """Write 640 x 480 JPEGs of quality 90 that decode as slowly as photographs: noise, weaker at high frequencies."""
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


# Run in a process without torch, so that its memory is that of the table.
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
    """Measure the loader's speed, the share of padding, and the time and memory of caption tables by size."""

    pictures: int = 256
    """Pictures of 640 x 480 to read."""
    rounds: int = 5
    """Rounds in which each loader reads them; the best time of each counts."""
    captions: tuple[int, ...] = (5_000, 50_000, 500_000)
    """Sizes of the tables to measure, in captions."""
    data_dir: Path | None = None
    """Data set whose share of padding is measured, such as Flickr8k (default: none)."""
    tokenizer: str = "gpt2"
    """GPT-2's tokenizer, for the share of padding: gpt2 (from the Hub), or a folder with vocab.json and merges.txt."""
    output: Path = Path("benchmark-data.json")
    """JSON file to write the figures to."""
    debug: bool = False
    """Show tracebacks of errors."""

    def run(self) -> dict[str, Any]:
        """Return all figures."""
        with tempfile.TemporaryDirectory() as folder:
            os.environ["VIT_GPT2_CACHE"] = f"{folder}/cache"
            figures: dict[str, Any] = {"loader": self.loader(Path(folder))}
            if self.data_dir is not None:
                figures["padding"] = self.padding(self.data_dir)
            if sys.platform == "linux":  # which tells how much memory processes share
                figures["table"] = [self.growth(Path(folder) / str(captions), captions) for captions in self.captions]
        return figures

    def loader(self, folder: Path) -> dict[str, float]:
        """Pictures per second on one core: transformers' processor, our loader decoding, our loader from its cache."""
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
        """The share of padding among a batch's positions, and its floor: the share with batches of one picture."""
        table = load_tables("auto", data_dir)["train"]
        tokenizer = load_tokenizer(self.tokenizer, [], PRESETS["coco"].model.vocab_size)
        print(f"padding of {len(table):,} pictures, one epoch")
        return [self.padding_of(table, tokenizer, *sizes) for sizes in ((5, 32), (5, 128), (1, 32), (1, 128))]

    def padding_of(self, table: CaptionTable, tokenizer: Any, captions: int, batch_size: int) -> dict[str, float]:
        """Both shares for one batch size and number of captions per picture."""
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
        """Load a table of that many captions in COCO's layout twice; return both times, and the memory of the second
        load, which reads the cache."""
        pictures = captions // 5
        (folder / "annotations").mkdir(parents=True)
        for part, number in (("train2017", pictures), ("val2017", 1)):
            (folder / part).mkdir()
            for i in range(number):
                os.close(os.open(folder / part / f"{i:012d}.jpg", os.O_CREAT))
            with open(folder / "annotations" / f"captions_{part}.json", "w", encoding="utf-8") as file:
                images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in range(number)]
                caption = "a caption of fifty-two letters, as long as COCO's: "
                texts = [{"id": n, "image_id": n // 5, "caption": f"{caption}{n:06}"} for n in range(5 * number)]
                json.dump({"images": images, "annotations": texts}, file)
        first, second = (self.load_elsewhere(folder) for _ in range(2))
        figures = {"captions": captions, "first_seconds": first["seconds"]} | second
        print(
            "table of {captions:9,} captions: loaded in {first_seconds:6.2f} s, then in {seconds:.2f} s; adds {added_mb:.1f} "
            "MB to a process (in all {process_mb:.0f} MB), {worker_mb:.1f} MB to each of 4 workers".format(**figures)
        )
        return figures

    def load_elsewhere(self, folder: Path) -> dict[str, float]:
        """Load a table in a separate process, which forks four workers that read all of it."""
        command = [sys.executable, "-c", TABLE_PROBE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise UserError(f"loading the table of {folder.name} captions failed: {done.stderr.strip()[-200:]}")
        return json.loads(done.stdout)  # type: ignore[no-any-return]
