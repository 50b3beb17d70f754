#!/usr/bin/env python
"""Caption pictures, from the command line or from Python.

    python example_usage.py photo.jpg vit-gpt2-captioning.safetensors
    python example_usage.py photos/ "more/*.png" https://example.org/cat.jpg user/model
    python example_usage.py photos/ --output captions.csv  # resumes, if run again
    python example_usage.py photo.jpg distilvit  # a public model, downloaded once
    python example_usage.py "shards/*.tar" user/model --output out --format parquet
    python example_usage.py DIR user/model --filter DIR/good.jsonl --keep both
    find . -name "*.jpg" | python example_usage.py - --output sidecar
    python example_usage.py  # a drawn scene, with the newest model here

    from example_usage import caption_image
    caption_image(image_path="photo.jpg", model_source="vit-gpt2-captioning.safetensors")

Without --model, the last argument is the model if it ends in .safetensors, is a folder with config.json, or is
user/name or a short name and no local path; otherwise the newest local model is used. By default the command decodes
with 3 beams. caption_image samples, and does the same as the command with do_sample=False, num_beams=3. The exit code
is 0 if all pictures were captioned, 1 if some could not be (they are named on standard error), 2 if nothing could be
started, 130 after Ctrl-C.
"""

from __future__ import annotations

from utils import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # until a model is loaded

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tqdm import tqdm

from captioning.controls import Finish, Length, length_options, read_words
from captioning.filtering import Captioner, FilterOptions, filter_data
from captioning.models import is_model, load_model, newest_model, weights_sha256
from config import LONGEST, Captioning, UserError
from data.scenes import draw, make_scene
from flags import parse_flags
from utils import choose_device, counted, printable, raise_on_interrupt, run_script, shown
from weights.file import MODEL_FILE

if TYPE_CHECKING:  # modules that import torch are imported late, so that --help does not wait for it
    from captioning.outputs import CaptionFile, Sidecars, XmpFiles
    from captioning.pipeline import Result
    from data.pictures import PictureSource
    from model import ImageCaptionModel


def caption_image(
    image_path: str | Path,
    model_source: str | Path = MODEL_FILE,
    device: str = "cuda",
    max_length: int = LONGEST,
    temperature: float = 1.0,
    do_sample: bool = True,
    top_k: int = 50,
    top_p: float = 0.95,
    base_dir: Path | None = None,
    allow_private_urls: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> str:
    """Return one caption of a picture (a path or a URL), by a model (a file, a folder, a Hub name user/repo, or a
    short name such as vit-gpt2).

    Samples by default; do_sample=False is greedy, or beam search with num_beams=3. Without a GPU the device "cuda"
    means the best one available. URLs of private addresses and weights that are a pickle are refused unless allowed.
    Raises UserError for a picture or a model that cannot be read.
    """
    import torch

    from captioning.pipeline import caption_batch, picture_source
    from data.pictures import prepare_picture

    if device == "cuda" and not torch.cuda.is_available():
        device = "auto"
    model = load_model(str(model_source), str(choose_device(device)[0]), base_dir, allow_pickle)
    name = str(image_path)
    pixels = prepare_picture(picture_source(name, allow_private_urls), model.config, name)
    options |= {"max_length": max_length, "do_sample": do_sample}
    if do_sample:
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return caption_batch(model, pixels.unsqueeze(0), **options)[0][0].text


@dataclass(kw_only=True)
class PictureOptions:
    """Options for the pictures to caption, and where the captions are written."""

    inputs: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """Pictures, folders (with their subfolders), patterns such as "*.jpg", URLs, or - for a list of them on standard
    input; then the model, unless --model names it."""
    model: str | None = None
    """The model: a .safetensors file, a folder, user/name, or a public one for photographs: vit-gpt2 or distilvit
    (default: the last argument, or else the newest here)."""
    output: str | None = None
    """captions.csv or captions.jsonl, a line for each picture; sidecar, name.txt beside each name.jpg; or xmp,
    name.jpg.xmp beside it, where photo programs read descriptions (default: print the captions). Pictures that already
    have captions there are skipped."""
    format: Literal["tar", "parquet", "jsonl"] | None = None
    """Caption shards (.tar or .parquet files, or a folder in parts) into the folder --output, one file of this format for
    each shard. Shards whose file exists are skipped."""
    shard_size: int = 1000
    """Pictures of a folder per shard."""
    engine: Literal["local", "ray"] = "local"
    """What captions the shards: this process, or all processes of torchrun; or a Ray cluster (requirements/ray.txt)."""
    address: str | None = None
    """Address of the Ray cluster (default: start one on this machine)."""
    length: Length = "normal"
    """Prefer shorter or longer captions."""
    only_words: Path | None = None
    """File of the only words that captions may contain, one on each line."""
    prepend: str = ""
    """Text to put before each caption, such as a trigger word: "ohwx style, "."""
    append: str = ""
    """Text to put after each caption."""
    min_confidence: float = 0.0
    """Leave out captions of less confidence than this, 0 to 1: evaluate.py --calibrate finds a good threshold."""
    instead: str = ""
    """Text in place of captions that min_confidence leaves out (default: an empty caption, or no file)."""
    overwrite: bool = False
    """Replace all captions in --output, and print how many there were."""
    scores: bool = False
    """Add each caption's confidence: the geometric mean of its words' probabilities, 0 to 1."""
    heatmap: Path | None = None
    """Draw a figure of the model's attention for each word of the caption; for a single picture only."""
    allow_private_urls: bool = False
    """Also fetch URLs of addresses that are not public, such as http://localhost, and use the environment's proxies."""
    batch_size: int | Literal["auto"] = "auto"
    """Pictures captioned at a time; halved where memory runs out."""


@dataclass(kw_only=True)
class CaptionConfig(Captioning, FilterOptions, PictureOptions):  # dataclass takes the last one's fields first
    """Caption pictures: paths, folders, patterns or URLs, and the model last."""

    num_beams: Annotated[int | None, tyro.conf.arg(aliases=["--beams"])] = None
    top_p: float = 0.95

    def __post_init__(self) -> None:
        for name in ("num_captions", "num_beams", "max_length", "batch_size", "shard_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"min_confidence is {self.min_confidence:g}: it must be from 0 to 1")
        self.check()
        if self.filter and (self.output or self.format or self.heatmap or self.overwrite or self.instead):
            raise UserError(
                "filter goes with none of --output, --format, --heatmap, --overwrite, --instead: leave it out"
            )
        if self.instead and not self.min_confidence:
            raise UserError("instead has no effect without --min-confidence: add it, or leave out --instead")
        if self.format and not self.output:
            raise UserError("format is for shards: name their folder with --output")
        if self.format and (self.heatmap or self.overwrite):
            raise UserError(
                "format goes with neither --heatmap nor --overwrite: leave it out, or name another --output"
            )
        if not self.format and (self.engine != "local" or self.address):
            raise UserError("engine and address are for shards: add --format")
        if self.overwrite and not self.output:
            raise UserError("overwrite has no effect without --output: add --output, or leave out --overwrite")

    @property
    def finish(self) -> Finish:
        """What is done to captions before they are written."""
        return Finish(self.prepend, self.append, self.min_confidence, self.instead)

    def decoding(self) -> dict[str, Any]:
        """Options of caption_batch, and through it of model.generate."""
        words = {"only_words": read_words(self.only_words)} if self.only_words else {}
        options = self.options(**words)
        beams = options.get("num_beams", 1)
        return options | length_options(self.length, self.num_captions, beams, self.do_sample, self.max_length)


def print_captions(result: Result, several: bool, scores: bool) -> None:
    """Print a picture's captions, with its name where there are several pictures."""
    for caption in result.captions:
        about = [shown(result.name)] if several else []
        score = [f"{caption.score:.4f}"] if scores and caption.score is not None else []
        tqdm.write("\t".join([*about, shown(caption.text) or "(not sure)", *score]), file=sys.stdout)


def caption_all(
    config: CaptionConfig,
    model: ImageCaptionModel,
    names: list[str],
    output: CaptionFile | Sidecars | XmpFiles | None,
    source: Callable[[str], PictureSource],
) -> int:
    """Caption the pictures that the output does not have yet; write or print the captions. Returns an exit code."""
    from captioning.engine import in_words
    from captioning.outputs import draw_words
    from captioning.pipeline import caption_pictures
    from decoding.packed import how_int8

    if config.precision == "int8":
        print(f"int8        {how_int8()}; tokens by {in_words('int8')}", file=sys.stderr)
    wanted = names if output is None else output.missing(names)
    size = None if config.batch_size == "auto" else config.batch_size
    options = {"precision": config.precision, "attention": config.heatmap is not None, **config.decoding()}
    scores = config.scores or config.min_confidence > 0
    results = config.finish(caption_pictures(model, wanted, batch_size=size, source=source, scores=scores, **options))
    captioned = failed = unsure = 0
    start, already, few = time.monotonic(), len(names) - len(wanted), len(wanted) <= 16
    pause = 0.1 if sys.stderr.isatty() else 30  # seconds between updates of the bar, so that it does not fill a log
    try:
        with tqdm(total=len(names), initial=already, unit=" pictures", disable=few, mininterval=pause) as bar:
            for result in results:
                bar.update()
                if result.error:
                    tqdm.write(f"error: {printable(result.error)}", file=sys.stderr)
                    failed += 1
                    continue
                captioned += 1
                unsure += not any(caption.text for caption in result.captions)
                if output:
                    output.add(result.name, result.captions)
                else:
                    print_captions(result, len(names) > 1, config.scores)
                if config.heatmap and result.captions[0].words:
                    draw_words(config.heatmap, source(result.name), result.captions[0], model.config)
    except KeyboardInterrupt:
        if output is None:
            raise
        advice = "" if config.overwrite else "; run the same command to resume"
        print(f"stopped: {captioned:,} more captioned in {output}{advice}", file=sys.stderr)
        return 130
    if output:
        before = f", {already:,} were there" if already else ""
        rate = captioned / max(time.monotonic() - start, 1e-9)
        doubtful = f", {unsure:,} of them without a caption below the confidence" if unsure else ""
        said = f"{counted(captioned, 'pictures')} captioned ({rate:.1f} a second){doubtful}{before}"
        print(f"{output}: {said}, {failed:,} could not be read")
    return 1 if failed else 0


def caption_shards(config: CaptionConfig, inputs: list[str], model_source: str) -> int:
    """Caption shards into a folder. Returns an exit code."""
    from captioning.shards import Work, find_shards, run

    shards = find_shards(inputs, config.shard_size)
    size = None if config.batch_size == "auto" else config.batch_size
    work = Work(
        model_source,
        Path(config.output or ""),
        config.format or "parquet",
        config.device,
        config.precision,
        config.base_dir,
        size,
        config.decoding(),
        config.finish,
        config.allow_pickle,
    )
    captioned, failed, there, broken, start = 0, 0, 0, 0, time.monotonic()
    try:
        with tqdm(total=len(shards), unit=" shards", mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
            for done in run(work, shards, config.engine, config.address):
                bar.update()
                captioned, failed, there = captioned + done.captioned, failed + done.failed, there + done.was_there
                bar.set_postfix_str(f"{captioned / (time.monotonic() - start):.1f} pictures/s", refresh=False)
                if done.error:
                    broken += 1
                    tqdm.write(f"error: {printable(done.error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"stopped: {counted(captioned, 'pictures')} captioned; the same command resumes", file=sys.stderr)
        return 130
    rate = captioned / max(time.monotonic() - start, 1e-9)
    before = f", {counted(there, 'shards')} skipped" if there else ""
    lost = f", {counted(broken, 'shards')} could not be read" if broken else ""
    print(
        f"{config.output}: {counted(captioned, 'pictures')} captioned ({rate:.1f} a second){before}, {failed:,} failed{lost}"
    )
    return 1 if failed or broken else 0


def filter_folder(config: CaptionConfig, inputs: list[str], model_source: str | None) -> int:
    """Filter a data set. Returns an exit code."""
    if len(inputs) != 1:
        raise UserError(f"filter takes one data set, and {len(inputs)} are named: name its folder")
    captioner = None
    if config.keep != "own" or config.min_confidence:
        model_source = model_source or newest_model()
        raise_on_interrupt()
        model = load_model(model_source, str(choose_device(config.device)[0]), config.base_dir, config.allow_pickle)
        options = config.decoding()
        made_by = {"model": model_source, "weights": weights_sha256(model)[:16], "precision": config.precision}
        finish = Finish(config.prepend, config.append)
        size = None if config.batch_size == "auto" else config.batch_size
        captioner = Captioner(model, made_by | finish.recorded(options), options, finish, size)
    try:
        result = filter_data(config, inputs[0], captioner, config.min_confidence)
    except KeyboardInterrupt:
        print("stopped: run the same command to resume", file=sys.stderr)
        return 130
    captions = sum(map(len, result.kept.values()))
    for line in result.counts():
        print(f"left out    {line}")
    print(
        f"kept        {counted(len(result.kept), 'pictures')}, {counted(captions, 'captions')}, {result.by_model:,} of them by the model"
    )
    print(f"train on them: python main.py --data-dir {config.filter}")
    return 0


# Flags that --help shows.
COMMON = ["inputs", "model", "output", "format", "length", "prefix", "prepend", "min_confidence", "scores"]
COMMON += ["num_captions", "num_beams", "filter", "device"]


def main() -> int:
    """Run the command line. Returns 1 if some of the pictures could not be captioned, 130 if it was stopped."""
    parsed: Any = parse_flags(CaptionConfig, __doc__, common=COMMON, return_unknown_args=True)
    config, behind = parsed  # inputs behind options are unknown to the parser
    if any(argument.startswith("-") and argument != "-" for argument in behind):
        parse_flags(CaptionConfig, __doc__)  # exits with an error that names the unknown flag
    from captioning.outputs import check_figure, open_output
    from captioning.pipeline import picture_names, picture_source

    inputs = [*config.inputs, *behind]
    named = config.model or (inputs.pop() if inputs and is_model(inputs[-1]) else None)
    if config.filter:
        return filter_folder(config, inputs, named)
    model_source = named or newest_model()
    if config.format:
        return caption_shards(config, inputs, model_source)
    names, output = picture_names(inputs), None
    source: Callable[[str], PictureSource] = partial(picture_source, allow_private=config.allow_private_urls)
    if not inputs:
        scene, _, rng = make_scene(0, "example", 0)
        drawn = {f"a drawn scene ({scene.captions(rng)[0]})": draw(scene, rng)}
        names, source = list(drawn), drawn.__getitem__
    if config.heatmap and len(names) != 1:
        raise UserError(f"a heat map is of a single picture, and there are {len(names):,}: name one, or leave it out")
    if config.heatmap:
        check_figure(config.heatmap)
    if config.output and inputs:
        names = list(dict.fromkeys(names))
        output = open_output(config.output, names, config.num_captions, config.scores)
    model = load_model(model_source, str(choose_device(config.device)[0]), config.base_dir, config.allow_pickle)
    raise_on_interrupt()
    if output:
        made_by = {"model": model_source, "weights": weights_sha256(model)[:16], "precision": config.precision}
        made_by |= {"max_length": min(LONGEST, model.config.text_positions)}
        made_by |= config.finish.recorded(config.decoding())
        if replaced := output.begin(made_by, config.overwrite):
            print(f"{output}: replacing the captions of {counted(replaced, 'pictures')}")
    if not inputs:
        print(f"{names[0]}, captioned by {model_source}:")
    return caption_all(config, model, names, output, source)


if __name__ == "__main__":
    run_script(main)
