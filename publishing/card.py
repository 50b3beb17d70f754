"""The model card of a published model, written from what is known: its config, its run, what was measured.

Never guesses: what no file says is not in the card.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from config import LONGEST, NUM_BEAMS, PRETRAINED, UserError, ViTGPT2Config
from data.pictures import prepare_picture
from data.tokenizer import decode
from model import ImageCaptionModel
from scoring.report import METRICS
from scoring.results import warnings_about
from utils import json_of, read_log

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

HUB = "https://huggingface.co"
SHOWN = 5  # sample captions


class DataSet(NamedTuple):
    """What is known of a usual data set."""

    name: str
    about: str
    language: str = "en"


PEOPLE = (
    "Its captions were written by crowd workers about photographs of mostly Western everyday life. They guess at gender, "
    "age, origin and occupation from looks, and models learn and amplify such guesses "
    "([Hendricks et al. 2018](https://arxiv.org/abs/1803.09797), [Zhao et al. 2021](https://arxiv.org/abs/2106.08503), "
    "[van Miltenburg 2016](https://arxiv.org/abs/1605.06083))."
)
RESEARCH = " Its pictures belong to their photographers and are for non-commercial research and education only."
COCO = DataSet("COCO 2017", PEOPLE + " The pictures belong to their photographers, under the licences that COCO lists.")
DATA_SETS = {
    "scenes": DataSet("drawn scenes", "The model has seen coloured shapes on plain grounds, and nothing else."),
    "karpathy": DataSet("Karpathy's split", PEOPLE),
    "flickr8k": DataSet("Flickr8k", PEOPLE + RESEARCH),
    "flickr30k": DataSet("Flickr30k", PEOPLE + RESEARCH),
}
# What the Hub calls the caption metrics; the others of metrics.json say how they were made.
HUB_METRICS = {
    **{f"bleu_{n}": "bleu" for n in (1, 2, 3, 4)},
    **{
        name: name
        for name in (
            "meteor",
            "spice",
            "chair_s",
            "chair_i",
            "clip_score",
            "ref_clip_score",
            "pac_score",
            "ref_pac_score",
        )
    },
    "rouge_l": "rouge",
    "cider_d": "cider",
    "scene_accuracy": "accuracy",
}
PROTOCOL = "pictures subset references_per_picture decoding precision tokenizer document_frequencies left_out"
SETTINGS = (
    "epochs max_steps batch_size accumulation_steps captions_per_image optimizer learning_rate objective reward prompt "
    "warmup_steps weight_decay gradient_clip word_dropout label_smoothing caption_length seed"
)
OF_ADAPTERS = "lora_rank lora_alpha lora_dropout lora_targets"
ON_THE_HUB = {"gpt2": "openai-community/gpt2"}


@dataclass(kw_only=True)
class Facts:
    """What a run's folder says of a model; metrics, captions and samples only where they are of these very weights."""

    about: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    captions: list[str]
    samples: Path | None

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings."""
        return self.about.get("config", {})

    @property
    def drawn(self) -> bool:
        """Whether its pictures were drawn by scenes.py, so that anybody may show them."""
        return self.config.get("dataset") == "scenes"

    @property
    def data(self) -> DataSet:
        """The data set, by the best name there is for it."""
        layout, folder = self.config.get("dataset", ""), self.config.get("data_dir")
        if layout in DATA_SETS:
            return DATA_SETS[layout]
        if "/" in layout:
            return DataSet(layout, f"See the [data set's card]({HUB}/datasets/{layout}).", "")
        return DataSet(Path(folder).name, "", "") if folder else COCO

    @property
    def tested_on(self) -> str:
        """The data set that the metrics are of, where that is another one by its own name."""
        layout, folder = self.config.get("dataset", ""), self.config.get("data_dir")
        usual = {"scenes": "scenes", "auto": "coco_data", "coco": "coco_data"}
        own = Path(folder).name if folder else usual.get(layout)
        name = str(self.metrics.get("data", own))
        return self.data.name if own in (None, name) else name

    @property
    def base_models(self) -> list[str]:
        """The pretrained parts, or the whole model, that it started from."""
        config, pretrained = self.config, PRETRAINED if self.config.get("init") == "pretrained" else {}
        parts = [config.get("init_model"), config.get("init_encoder") or pretrained.get("encoder")]
        parts += [config.get("decoder") or config.get("init_decoder") or pretrained.get("decoder")]
        return hub_names(parts)

    @property
    def seconds(self) -> float:
        """Time spent in training steps, from the speeds that the log has."""
        size, total, before = self.config.get("batch_size", 0) * self.config.get("accumulation_steps", 1), 0.0, 0
        for line in self.history:
            if speed := line.get("pictures_per_second"):
                total, before = total + (line["step"] - before) * size / speed, line["step"]
        return total


def read_facts(folder: Path, weights_sha256: str, step: int | None = None) -> Facts:
    """A run's folder, its log up to this step, for a file with these weights. Raises UserError where its files cannot be
    read."""

    def read(name: str) -> Any:
        return json_of((folder / name).read_text(encoding="utf-8"))

    try:
        about, metrics = read("run.json"), read("metrics.json") if (folder / "metrics.json").is_file() else {}
        same = metrics.get("weights_sha256") == weights_sha256
        known = read("captions.json") if same and (folder / "captions.json").is_file() else []
        captions = [str(entry["caption"]) for entry in known]
        history = [line for line in read_log(folder / "metrics.jsonl") if step is None or line["step"] <= step]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: its JSON files cannot be read ({type(error).__name__}: {error})") from error
    samples = folder / "samples.png" if same and (folder / "samples.png").is_file() else None
    return Facts(about=about, history=history, metrics=metrics if same else {}, captions=captions, samples=samples)


def local(name: str) -> bool:
    """Whether a name of weights is a path, here or where they were trained, and nothing that the Hub knows."""
    path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(".safetensors")
    unowned = "/" not in name and not re.match(r"(distil)?gpt2", name)  # the Hub has few names without an owner
    return path or unowned or Path(name).exists()


def base_models(model: ImageCaptionModel, run: Facts | None) -> list[str]:
    """The models that its adapters are for, or those that its run started from."""
    if model.merged:
        return hub_names(model.merged["bases"].get(part) for part in ("model", *PRETRAINED))
    return run.base_models if run else []


def hub_names(names: Iterable[str | None]) -> list[str]:
    """Names of weights, as the Hub has them; of a folder here the last part."""
    return [ON_THE_HUB.get(name, Path(name).name if local(name) else name) for name in names if name]


def scrubbed(values: Any) -> Any:
    """JSON values without what is only this machine's: of a path its last part, where a run writes nothing at all."""
    if isinstance(values, dict):
        return {name: scrubbed(value) for name, value in values.items() if name not in ("output_dir", "resume")}
    if isinstance(values, list):
        return [scrubbed(value) for value in values]
    if isinstance(values, str) and re.match(r"([~/.]|[A-Za-z]:[/\\])", values):
        return re.split(r"[/\\]", values.rstrip("/\\"))[-1]
    return values


# The card

Layout = Literal["transformers", "remote code", "adapters", "project"]


def layout_of(model: ImageCaptionModel) -> Layout:
    """How a model is published: so that transformers loads it, alone or by code that comes with it, or this project only;
    one that adapters were merged into, as those."""
    if model.merged:
        return "adapters"
    if model.config.bridge == "cross_attention":
        return "transformers"
    return "project" if model.config.language_model else "remote code"


def write_card(
    folder: Path,
    model: ImageCaptionModel,
    run: Facts | None,
    repository: str,
    license: str = "apache-2.0",
    language: str | None = None,
    benchmark: str | None = None,
    space: bool = False,
) -> None:
    """Writes README.md into a folder that is otherwise finished, and .eval_results for a benchmark.

    space: whether a Space of the same name shows the model.
    The metadata has the evaluation results as a model-index, which holds for any data set. The newer form,
    .eval_results, is for benchmarks that are registered on the Hub, so somebody has to name one.
    """
    pixels = prepare_picture(folder / "example.png", model.config)[None]
    caption = plain(decode(model.tokenizer, model.generate(pixels, num_beams=NUM_BEAMS).sequences)[0])
    browser = (folder / "onnx").is_dir()
    about = metadata(model, run, repository, license, language, browser, caption)
    sections = {
        "": opening(model.config, run, caption, repository if space else None),
        "Use it": usage(repository, model, browser),
        "Results": numbers(run) if run and run.metrics else "",
        "Samples": samples(run, folder) if run else "",
        "The model": architecture(model, run),
        "Training": training(run, model) if run else "",
        "Limitations and biases": limitations(model, run),
        "Licence": rights(license, model, run),
        "Citation": citation(repository, model),
    }
    body = [f"# {repository.split('/')[1]}"]
    body += [f"## {name}\n\n{text}" if name else text for name, text in sections.items() if text]
    content = f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"
    (folder / "README.md").write_text(content, encoding="utf-8")
    if benchmark:
        write_eval_results(folder, run.metrics if run else {}, benchmark)


def metadata(
    model: ImageCaptionModel,
    run: Facts | None,
    repository: str,
    license: str,
    language: str | None,
    browser: bool,
    caption: str,
) -> ModelCardData:
    """The card's head, as the Hub reads it; `caption` is what the model says of the example."""
    from huggingface_hub import ModelCardData

    results = measured(run) if run else []
    data_set = run.config.get("dataset", "") if run else ""
    kinds = {result.metric_type for result in results} & {"bleu", "rouge"}
    example = {"src": f"{HUB}/{repository}/resolve/main/example.png", "example_title": "drawn shapes"}
    decoder = decoder_name(model.config).lower().replace("-", "")
    return ModelCardData(
        license=license,
        language=language or (run.data.language if run else "") or None,
        library_name="transformers" if layout_of(model) in ("transformers", "remote code") else None,
        pipeline_tag="image-to-text",
        tags=["image-captioning", "vit", decoder, *(["onnx", "transformers.js"] if browser else [])],
        base_model=[name for name in base_models(model, run) if "/" in name] or None,
        base_model_relation="adapter" if model.merged else None,
        datasets=[data_set] if "/" in data_set else None,
        metrics=sorted(kinds) or None,
        model_name=repository.split("/")[1] if results else None,
        eval_results=results or None,
        widget=[example | {"output": {"text": caption}}],
    )


def label(metric: str) -> str:
    """A metric's name for people."""
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")


def measured(run: Facts) -> list[EvalResult]:
    """The run's metrics, as the Hub lists them."""
    from huggingface_hub import EvalResult

    data_set = run.config.get("dataset", "")
    return [
        EvalResult(
            task_type="image-to-text",
            dataset_type=data_set if "/" in data_set else run.tested_on,
            dataset_name=run.tested_on,
            dataset_split=run.metrics.get("split"),
            metric_type=kind,
            metric_name=label(name),
            metric_value=round(run.metrics[name], 4),
            metric_args={"max_order": int(name[-1])} if kind == "bleu" else None,
        )
        for name, kind in HUB_METRICS.items()
        if name in run.metrics
    ]


def write_eval_results(folder: Path, metrics: dict[str, Any], benchmark: str) -> None:
    """.eval_results for a benchmark of the Hub, user/dataset:task:metric. Raises UserError for one not measured."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    data_set, task, metric = benchmark.split(":")
    if metric not in metrics:
        raise UserError(f"benchmark {benchmark}: {metric} was not measured of these weights")
    entry = EvalResultEntry(data_set, task, round(metrics[metric], 4), notes=protocol(metrics))
    (folder / ".eval_results").mkdir()
    path = folder / ".eval_results" / f"{data_set.replace('/', '-')}.yaml"
    path.write_text(yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


def plain(text: str) -> str:
    """A text on one line."""
    return " ".join(text.split())


def escape(text: str) -> str:
    """Anybody's text as Markdown that shows it."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(plain(text), quote=False))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def opening(config: ViTGPT2Config, run: Facts | None, caption: str, space: str | None) -> str:
    """What it is, and an example."""
    data = f", trained on {escape(run.data.name)}" if run else ""
    writer = f"a {decoder_name(config)}"
    writer += " with cross-attention writes" if config.bridge == "cross_attention" else " reads its patches and writes"
    return (
        f"Writes captions for pictures: a vision transformer looks at {config.image_size} x {config.image_size} pixels, "
        f"{writer}{data}.\n\n"
        f"![drawn shapes](example.png)\n\nIts caption of this drawing: {escape(caption) or '(nothing)'}"
        + (f"\n\nTry it on your own pictures: [the Space]({HUB}/spaces/{space})." if space else "")
    )


def decoder_name(config: ViTGPT2Config) -> str:
    """What kind of language model it is."""
    return json.loads(config.language_model)["model_type"] if config.language_model else "GPT-2"


def usage(repository: str, model: ImageCaptionModel, browser: bool) -> str:
    """How to load it: up to three ways."""
    ways, layout = [], layout_of(model)
    if layout == "transformers":
        how = by_transformers(repository, "AutoModelForImageTextToText", "", "")
        ways.append(f"With transformers, and no code from here:\n\n{how}")
    if layout == "remote code":
        longest = min(LONGEST, model.config.text_positions)
        trust = ", trust_remote_code=True"
        how = by_transformers(repository, "AutoModel", trust, f", max_new_tokens={longest}, num_beams={NUM_BEAMS}")
        ways.append(f"With transformers, by the code that is here:\n\n{how}")
    if model.merged:
        bases = " and ".join(map(escape, base_models(model, None)))
        rounded = ", rounded to 4 bits as in training (`pip install bitsandbytes`)"
        ways.append(
            f"These are adapters (LoRA), and what joins picture and text; the rest is {bases}, which the project loads and "
            f"merges them into{rounded if model.merged['quantized'] else ''}."
        )
    ways.append(
        f"""With the project that it was trained by, or with the Python files of this repository (`hf download {repository}`), to go
on training (`run.json`, where there is one, has the settings):

```python
from model import ImageCaptionModel

model = ImageCaptionModel.from_pretrained("{repository}")
sequences = model.generate(pixel_values, num_beams={NUM_BEAMS}).sequences  # model.tokenizer decodes them
```"""
    )
    if layout == "transformers":
        ways.append(f"In a browser or in Node:\n\n{in_browser(repository, model, browser)}")
    return "\n\n".join(ways)


def by_transformers(repository: str, loader: str, loading: str, options: str) -> str:
    """Python that captions a picture: by which class, and what its loading and its generate are told besides."""
    return f"""```python
from PIL import Image
from transformers import AutoImageProcessor, {loader}, AutoTokenizer

name = "{repository}"
model = {loader}.from_pretrained(name{loading})
processor = AutoImageProcessor.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name{loading})
pixel_values = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt").pixel_values
tokens = model.generate(pixel_values{options})
print(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0].strip())
```"""


def in_browser(repository: str, model: ImageCaptionModel, browser: bool) -> str:
    """JavaScript that captions a picture, or how to get the files for it."""
    if not browser:
        command = f"python convert.py onnx {repository} captioner-onnx --int8"
        return f"There are no ONNX files here; the project makes them for transformers.js:\n\n```\n{command}\n```"
    return f"""```js
import {{ pipeline }} from '@huggingface/transformers';

const captioner = await pipeline('image-to-text', '{repository}', {{ dtype: 'q8' }});
const [{{ generated_text }}] = await captioner('photo.jpg', {{ max_new_tokens: {min(LONGEST, model.config.max_length)} }});
```"""


def numbers(run: Facts) -> str:
    """The caption metrics with their intervals, and how they were made."""
    metrics, rows = run.metrics, []
    for name in HUB_METRICS:
        if name in metrics:
            low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
            interval = "" if low is None else f"{low:.4f} to {high:.4f}"
            rows.append((label(name), f"{metrics[name]:.4f}", interval))
    found = table(("metric", "value", "95 % interval"), rows)
    where = f"{metrics.get('split', '')} pictures of {run.tested_on}"
    return (
        f"On the {escape(where)}. BLEU and ROUGE-L are fractions, CIDEr-D goes to 10.\n\n{found}\n\n"
        f"How they were made: {protocol(metrics)}. All of them are in `metrics.json`."
    )


def protocol(metrics: dict[str, Any]) -> str:
    """How metrics were made, in one line."""
    said = [(name.replace("_", " "), metrics[name]) for name in PROTOCOL.split() if name in metrics]
    return "; ".join(f"{name}: {escape(str(value))}" for name, value in said)


def samples(run: Facts, folder: Path) -> str:
    """Captions of pictures that were not trained on: with the pictures where they may be shown, otherwise alone."""
    if (folder / "samples.png").is_file():
        how = "Chosen by their place in the test set, not by how good they are; references in grey."
        return f"{how}\n\n![](samples.png)"
    captions = run.captions[:: max(1, len(run.captions) // SHOWN)][:SHOWN]
    listed = "\n".join(f"- {escape(caption)}" for caption in captions)
    how = "Captions of test pictures, chosen by their place; the pictures are not ours to show."
    return listed and f"{how}\n\n{listed}"


def architecture(model: ImageCaptionModel, run: Facts | None) -> str:
    """Sizes."""
    c = model.config
    how = "with cross-attention in every layer" if c.bridge == "cross_attention" else "after a prefix of the picture"
    heads = "" if c.language_model else f"{c.decoder_num_heads} heads, "  # theirs are their own affair
    layouts = {
        "transformers": "transformers' `VisionEncoderDecoderModel`",
        "remote code": "one safetensors file, and the code by which transformers loads it",
        "adapters": "adapters, in one safetensors file of the project's own",
        "project": "one safetensors file of the project's own",
    }
    vision = f"{c.vision_num_layers} layers, width {c.vision_embed_dim}"
    text = f"{c.decoder_num_layers} layers, width {c.decoder_embed_dim}"
    rows = [
        ("parameters", f"{model.num_parameters:,}"),
        ("encoder", f"ViT, {vision}, {c.vision_num_heads} heads, patches of {c.patch_size} x {c.patch_size}"),
        ("decoder", f"{decoder_name(c)} {how}, {text}, {heads}{c.max_length} positions"),
        ("vocabulary", f"{c.vocab_size:,}" + ("" if c.language_model else " (byte-level BPE)")),
        ("base models", ", ".join(map(escape, base_models(model, run)))),
        ("layout", layouts[layout_of(model)]),
    ]
    return table(("", ""), [row for row in rows if row[1]])


def training(run: Facts, model: ImageCaptionModel) -> str:
    """Data, settings, hardware and time, as far as the run has written them down."""
    steps = max((line["step"] for line in run.history), default=0)
    seen = len(model.trained_on)
    rows = [("data", escape(run.data.name) + (f", {seen:,} pictures" if seen else ""))]
    if steps:
        rows.append(("steps", f"{steps:,}" + ("" if run.metrics else " so far")))
    for name in ("hardware", "device", "precision"):
        if name in run.about and not (name == "device" and "hardware" in run.about):
            rows.append((name, escape(str(run.about[name]))))
    if seconds := run.about.get("seconds") or run.seconds:
        rows.append(("time in training", f"{seconds / 60:.1f} minutes"))
    names = [*SETTINGS.split(), *(OF_ADAPTERS.split() if model.merged else [])]
    settings = {name: run.config.get(name) for name in names}
    if settings["max_steps"]:
        del settings["epochs"]
    if settings["objective"] != "scst":
        del settings["reward"]
    rows += [(name.replace("_", " "), str(value)) for name, value in settings.items() if value not in (None, "")]
    return table(("", ""), rows)


def limitations(model: ImageCaptionModel, run: Facts | None) -> str:
    """What to know before relying on captions."""
    said = [
        "It names what it has learned to name, and may state with the same ease what is not there. Do not rely on its "
        "captions where a mistake harms somebody.",
        f"It sees every picture squeezed to {model.config.image_size} x {model.config.image_size} pixels: small things and "
        "text are lost.",
        (run.data.about if run else "") or "Its captions can be no better or fairer than those that it was trained on.",
    ]
    if run and run.metrics:
        said += warnings_about(run.metrics)
    return "\n".join(f"- {text}" for text in said if text)


def rights(license: str, model: ImageCaptionModel, run: Facts | None) -> str:
    """Whose terms hold."""
    others = [name for name in base_models(model, run) if "/" in name]
    others += [run.data.name] if run and not run.drawn else []
    also = f" The terms of {', '.join(map(escape, others))} hold besides." if others else ""
    return f"{license} for the weights, [Apache 2.0](https://www.apache.org/licenses/LICENSE-2.0) for the Python files.{also}"


def citation(repository: str, model: ImageCaptionModel) -> str:
    """How to cite it, and what it is made of."""
    owner, name = repository.split("/")
    key = re.sub(r"\W", "", name) or "model"
    made_of = ["the encoder is that of [Dosovitskiy et al. 2020](https://arxiv.org/abs/2010.11929)"]
    if not model.config.language_model:
        made_of.append('the decoder that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"')
    if model.merged:
        made_of.append("the adapters are those of [Hu et al. 2021](https://arxiv.org/abs/2106.09685)")
        if model.merged["quantized"]:
            made_of.append("over weights in 4 bits, [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)")
    said = ", ".join(made_of)
    return f"""```bibtex
@misc{{{key}, author = {{{owner}}}, title = {{{name}}}, howpublished = {{\\url{{{HUB}/{repository}}}}}}}
```

{said[0].upper()}{said[1:]}."""
