"""Write the model card of a published model, from its config, its run and its metrics.

Nothing is guessed: the card has only what a file says.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from config import LONGEST, NEWER_SETTINGS, NUM_BEAMS, PRETRAINED, TrainConfig, UserError, ViTGPT2Config
from data.pictures import prepare_picture
from data.tokenizer import decode
from model import ImageCaptionModel
from scoring.report import METRICS
from scoring.results import warnings_about
from utils import json_of, read_log

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

HUB = "https://huggingface.co"
SHOWN = 5  # sample captions in the card


class DataSet(NamedTuple):
    """Facts about a common data set."""

    name: str
    about: str
    language: str = "en"


PEOPLE = (
    "Its captions were written by crowd workers about photographs of mostly Western everyday life. They guess gender, "
    "age, origin and occupation from looks, and models learn and amplify such guesses "
    "([Hendricks et al. 2018](https://arxiv.org/abs/1803.09797), [Zhao et al. 2021](https://arxiv.org/abs/2106.08503), "
    "[van Miltenburg 2016](https://arxiv.org/abs/1605.06083))."
)
RESEARCH = " Its pictures belong to their photographers and are for non-commercial research and education only."
COCO = DataSet("COCO 2017", PEOPLE + " The pictures belong to their photographers, under the licences that COCO lists.")
DATA_SETS = {
    "scenes": DataSet("drawn scenes", "The model was trained on coloured shapes on plain backgrounds only."),
    "karpathy": DataSet("Karpathy's split", PEOPLE),
    "flickr8k": DataSet("Flickr8k", PEOPLE + RESEARCH),
    "flickr30k": DataSet("Flickr30k", PEOPLE + RESEARCH),
}
# The Hub's names of the caption metrics; the other entries of metrics.json say how the metrics were made.
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
    """What a run's folder says about a model; metrics, captions and samples only if they are of the same weights."""

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
        """Whether its pictures were drawn by data/scenes.py, so that anybody may show them."""
        return self.config.get("dataset") == "scenes"

    @property
    def data(self) -> DataSet:
        """The training data set, with the best name that is known."""
        layout, folder = self.config.get("dataset", ""), self.config.get("data_dir")
        if layout in DATA_SETS:
            return DATA_SETS[layout]
        if "/" in layout:
            return DataSet(layout, f"See the [data set's card]({HUB}/datasets/{layout}).", "")
        return DataSet(Path(folder).name, "", "") if folder else COCO

    @property
    def tested_on(self) -> str:
        """Name of the data set that the metrics are of, which may differ from the training data set."""
        layout, folder = self.config.get("dataset", ""), self.config.get("data_dir")
        usual = {"scenes": "scenes", "auto": "coco_data", "coco": "coco_data"}
        trained_on = Path(folder).name if folder else usual.get(layout)
        name = str(self.metrics.get("data", trained_on))
        return self.data.name if trained_on in (None, name) else name

    @property
    def base_models(self) -> list[str]:
        """The pretrained encoder and decoder, or the full model, that training started from."""
        config, pretrained = self.config, PRETRAINED if self.config.get("init") == "pretrained" else {}
        parts = [config.get("init_model"), config.get("init_encoder") or pretrained.get("encoder")]
        parts += [config.get("decoder") or config.get("init_decoder") or pretrained.get("decoder")]
        return hub_names(parts)

    @property
    def seconds(self) -> float:
        """Time spent in training steps, computed from the speeds in the log."""
        size, total, before = self.config.get("batch_size", 0) * self.config.get("accumulation_steps", 1), 0.0, 0
        for line in self.history:
            if speed := line.get("pictures_per_second"):
                total, before = total + (line["step"] - before) * size / speed, line["step"]
        return total


def read_facts(folder: Path, weights_sha256: str, step: int | None = None) -> Facts:
    """Read a run's folder, with its log up to this step, for a model with these weights. Raises UserError where its
    files cannot be read."""

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
    """Whether a name of weights is a path, here or on the machine that trained them, and not a name on the Hub."""
    path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(".safetensors")
    unowned = "/" not in name and not re.match(r"(distil)?gpt2", name)  # the Hub has few names without an owner
    return path or unowned or Path(name).exists()


def base_models(model: ImageCaptionModel, run: Facts | None) -> list[str]:
    """The base models of its adapters, or the models that its run started from."""
    if model.merged:
        return hub_names(model.merged["bases"].get(part) for part in ("model", *PRETRAINED))
    return run.base_models if run else []


def hub_names(names: Iterable[str | None]) -> list[str]:
    """Names of weights on the Hub; for a local folder only its last component."""
    return [ON_THE_HUB.get(name, Path(name).name if local(name) else name) for name in names if name]


def scrubbed(values: Any) -> Any:
    """JSON values without this machine's data: paths become their last component; output_dir and resume are removed."""
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
    """The form in which a model is published: for transformers alone, for transformers with code in the repository, or
    for this project only; a model with merged adapters is published as adapters."""
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
    """Write README.md into an otherwise finished folder, and .eval_results for a benchmark.

    space: whether a Space of the same name shows the model.
    The metadata has the evaluation results as a model-index, which works for any data set. The newer form,
    .eval_results, is only for benchmarks that are registered on the Hub, so the user has to name one.
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
    """The card's metadata for the Hub; `caption` is the model's caption of the example."""
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
    """A metric's readable name."""
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")


def measured(run: Facts) -> list[EvalResult]:
    """The run's metrics in the Hub's format."""
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
    """Write .eval_results for a benchmark of the Hub, user/dataset:task:metric. Raises UserError if not measured."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    data_set, task, metric = benchmark.split(":")
    if metric not in metrics:
        raise UserError(f"benchmark {benchmark}: {metric} was not measured with these weights")
    entry = EvalResultEntry(data_set, task, round(metrics[metric], 4), notes=protocol(metrics))
    (folder / ".eval_results").mkdir()
    path = folder / ".eval_results" / f"{data_set.replace('/', '-')}.yaml"
    path.write_text(yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


def plain(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())


def escape(text: str) -> str:
    """Escape untrusted text for Markdown."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(plain(text), quote=False))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def opening(config: ViTGPT2Config, run: Facts | None, caption: str, space: str | None) -> str:
    """Description of the model, and an example."""
    data = f", trained on {escape(run.data.name)}" if run else ""
    writer = f"a {decoder_name(config)}"
    writer += " with cross-attention writes" if config.bridge == "cross_attention" else " reads its patches and writes"
    return (
        f"Writes captions for pictures: a vision transformer reads {config.image_size} x {config.image_size} pixels, "
        f"{writer}{data}.\n\n"
        f"![drawn shapes](example.png)\n\nIts caption of this drawing: {escape(caption) or '(nothing)'}"
        + (f"\n\nTry it on your own pictures: [the Space]({HUB}/spaces/{space})." if space else "")
    )


def decoder_name(config: ViTGPT2Config) -> str:
    """Name of the decoder's kind of language model."""
    return json.loads(config.language_model)["model_type"] if config.language_model else "GPT-2"


def usage(repository: str, model: ImageCaptionModel, browser: bool) -> str:
    """Instructions for loading the model, up to three ways."""
    ways, layout = [], layout_of(model)
    if layout == "transformers":
        how = by_transformers(repository, "AutoModelForImageTextToText", "", "")
        ways.append(f"With transformers, without code from this repository:\n\n{how}")
    if layout == "remote code":
        longest = min(LONGEST, model.config.text_positions)
        trust = ", trust_remote_code=True"
        how = by_transformers(repository, "AutoModel", trust, f", max_new_tokens={longest}, num_beams={NUM_BEAMS}")
        ways.append(f"With transformers and the code in this repository:\n\n{how}")
    if model.merged:
        bases = " and ".join(map(escape, base_models(model, None)))
        rounded = ", rounded to 4 bits as in training (`pip install bitsandbytes`)"
        ways.append(
            f"These are adapters (LoRA), and the layers that join picture and text. The other weights are {bases}: the "
            f"project loads them and merges the adapters into them{rounded if model.merged['quantized'] else ''}."
        )
    ways.append(
        f"""With the project that trained it, or with the Python files of this repository (`hf download {repository}`),
also for further training (`run.json`, if present, has the settings):

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
    """Python code that captions a picture, with a class and further arguments for its loading and for generate."""
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
    """JavaScript code that captions a picture, or how to make the files for it."""
    if not browser:
        command = f"python convert.py onnx {repository} captioner-onnx --int8"
        return f"This repository has no ONNX files; the project makes them for transformers.js:\n\n```\n{command}\n```"
    return f"""```js
import {{ pipeline }} from '@huggingface/transformers';

const captioner = await pipeline('image-to-text', '{repository}', {{ dtype: 'q8' }});
const [{{ generated_text }}] = await captioner('photo.jpg', {{ max_new_tokens: {min(LONGEST, model.config.max_length)} }});
```"""


def numbers(run: Facts) -> str:
    """The caption metrics with their intervals, and how they were computed."""
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
        f"How they were computed: {protocol(metrics)}. All of them are in `metrics.json`."
    )


def protocol(metrics: dict[str, Any]) -> str:
    """How the metrics were computed, in one line."""
    settings = [(name.replace("_", " "), metrics[name]) for name in PROTOCOL.split() if name in metrics]
    return "; ".join(f"{name}: {escape(str(value))}" for name, value in settings)


def samples(run: Facts, folder: Path) -> str:
    """Captions of test pictures, with the pictures if they may be shown."""
    if (folder / "samples.png").is_file():
        how = "Chosen by their position in the test set, not by their quality; references in grey."
        return f"{how}\n\n![](samples.png)"
    captions = run.captions[:: max(1, len(run.captions) // SHOWN)][:SHOWN]
    listed = "\n".join(f"- {escape(caption)}" for caption in captions)
    how = "Captions of test pictures, chosen by their position; the pictures may not be shown here."
    return listed and f"{how}\n\n{listed}"


def architecture(model: ImageCaptionModel, run: Facts | None) -> str:
    """A table of the model's sizes."""
    c = model.config
    how = "with cross-attention in every layer" if c.bridge == "cross_attention" else "after a prefix of the picture"
    heads = "" if c.language_model else f"{c.decoder_num_heads} heads, "  # only known for GPT-2
    layouts = {
        "transformers": "transformers' `VisionEncoderDecoderModel`",
        "remote code": "one safetensors file, and the code with which transformers loads it",
        "adapters": "adapters, in one safetensors file in the project's format",
        "project": "one safetensors file in the project's format",
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
    """Data, settings, hardware and time, as far as the run has recorded them."""
    steps = max((line["step"] for line in run.history), default=0)
    pictures = len(model.trained_on)
    rows = [("data", escape(run.data.name) + (f", {pictures:,} pictures" if pictures else ""))]
    if steps:
        rows.append(("steps", f"{steps:,}" + ("" if run.metrics else " so far")))
    for name in ("hardware", "device", "precision"):
        if name in run.about and not (name == "device" and "hardware" in run.about):
            rows.append((name, escape(str(run.about[name]))))
    if seconds := run.about.get("seconds") or run.seconds:
        rows.append(("time in training", f"{seconds / 60:.1f} minutes"))
    newer = [n for n in NEWER_SETTINGS if run.config.get(n, getattr(TrainConfig, n)) != getattr(TrainConfig, n)]
    names = [*SETTINGS.split(), *newer, *(OF_ADAPTERS.split() if model.merged else [])]
    settings = {name: run.config.get(name) for name in names}
    if settings["max_steps"]:
        del settings["epochs"]
    if settings["objective"] != "scst":
        del settings["reward"]
    else:
        settings.pop("contrastive_weight", None)  # no effect there
    if run.config.get("init_model") or run.config.get("init_encoder") or run.config.get("init") == "pretrained":
        settings.pop("mimetic", None)
    rows += [(name.replace("_", " "), str(value)) for name, value in settings.items() if value not in (None, "")]
    return table(("", ""), rows)


def limitations(model: ImageCaptionModel, run: Facts | None) -> str:
    """Warnings about the captions."""
    warnings = [
        "It names only what it has learned to name, and may also name things that are not there. Do not rely on its "
        "captions where a mistake harms somebody.",
        f"It sees every picture resized to {model.config.image_size} x {model.config.image_size} pixels: small things and "
        "text are lost.",
        (run.data.about if run else "") or "Its captions can be no better or fairer than those that it was trained on.",
    ]
    if run and run.metrics:
        warnings += warnings_about(run.metrics)
    return "\n".join(f"- {text}" for text in warnings if text)


def rights(license: str, model: ImageCaptionModel, run: Facts | None) -> str:
    """The licences that apply."""
    others = [name for name in base_models(model, run) if "/" in name]
    others += [run.data.name] if run and not run.drawn else []
    also = f" The terms of {', '.join(map(escape, others))} also apply." if others else ""
    return f"{license} for the weights, [Apache 2.0](https://www.apache.org/licenses/LICENSE-2.0) for the Python files.{also}"


def citation(repository: str, model: ImageCaptionModel) -> str:
    """How to cite the model, and the papers it is based on."""
    owner, name = repository.split("/")
    key = re.sub(r"\W", "", name) or "model"
    made_of = ["the encoder is that of [Dosovitskiy et al. 2020](https://arxiv.org/abs/2010.11929)"]
    if not model.config.language_model:
        made_of.append('the decoder that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"')
    if model.merged:
        made_of.append("the adapters are those of [Hu et al. 2021](https://arxiv.org/abs/2106.09685)")
        if model.merged["quantized"]:
            made_of.append("over weights in 4 bits, [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)")
    papers = ", ".join(made_of)
    return f"""```bibtex
@misc{{{key}, author = {{{owner}}}, title = {{{name}}}, howpublished = {{\\url{{{HUB}/{repository}}}}}}}
```

{papers[0].upper()}{papers[1:]}."""
