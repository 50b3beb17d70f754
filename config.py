"""The configs of models and runs: ViTGPT2Config, TrainConfig, and the named recipes in PRESETS.

Every field of TrainConfig and of its model is a flag of main.py; the sentence under a field is the flag's help.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PRETRAINED = {"encoder": "google/vit-base-patch16-224-in21k", "decoder": "gpt2"}
"""Models that --init pretrained starts from: their names on the Hub."""
NUM_BEAMS = 3
"""Default number of beams in scripts and evaluations."""
LONGEST = 32
"""Default length limit of a caption, in tokens, with the end token."""

FEW = 200
"""A score measured on fewer pictures than this is mostly noise."""


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: what, where, what to do."""


def check_fields(config: Any, names: str, fits: Callable[[Any], bool], what: str) -> None:
    """Raise UserError for the first of these fields whose value fails the test `fits`. None always passes."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise UserError(f"{name} is {value}: it must be {what}")


def check_numbers(config: Any) -> None:
    """Raise UserError for the first field whose value has the wrong type or is out of range: the values may come from
    an untrusted file."""
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), str(f.type)
        least = 0 if f.name.endswith(("_id", "_ids", "_registers")) else 1
        most = 1000 if f.name.endswith("_layers") else (1 << 31) - 1
        for number in value if isinstance(value, tuple) else [value]:
            if number is None and f.default is None:
                continue
            wrong = ""
            if "int" in kind and not (type(number) is int and least <= number <= most):
                wrong = f"a whole number from {least} to {most:,}"
            if "float" in kind and not (type(number) in (int, float) and abs(number) < 1e9):
                wrong = "a number"
            if kind == "bool" and type(number) is not bool:
                wrong = "true or false"
            if kind.startswith("str") and not isinstance(number, str):
                wrong = "text"
            if wrong:
                raise UserError(f"{f.name} is {ascii(number)[:40]}: it must be {wrong}")


FILLED_IN: Any = None
"""Default of fields that __post_init__ computes from other fields, so that they always have a value."""
NEWER = {"vision_mlp_dim", "vision_activation", "vision_norm_eps", "vision_norm_first", "vision_norm_last"}
NEWER |= {"vision_class_token", "vision_registers", "vision_layer_scale", "vision_positions", "vision_patch_bias"}
"""Fields that did not exist in version 0.1: its files and fingerprints lack them."""
NEWER_SETTINGS = ("encoder_layer", "schedule", "cautious_decay", "reference_weight", "mimetic", "contrastive_weight")
"""Settings of a run that did not exist in version 0.1, and whose default is what it did."""
CHOICES = {
    "resample": ("bicubic", "bilinear"),
    "bridge": ("cross_attention", "prefix"),
    "vision_activation": ("gelu", "gelu_tanh", "quick_gelu", "swiglu"),
    "vision_positions": ("learned", "rotary"),
}
"""Allowed values of the fields that take one of several words."""


@dataclass(kw_only=True)
class ViTGPT2Config:
    """A vision transformer (ViT) joined to GPT-2. The defaults are ViT-B/16 and GPT-2 small with 512 positions."""

    image_size: int = 224
    """Side of the encoder's square input picture, in pixels."""
    patch_size: int = 16
    """Side of one patch, in pixels; must divide image_size."""
    resize_size: int = FILLED_IN
    """Pictures are resized to this side, then cropped to image_size (default: image_size, no crop)."""
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    """How pictures are resized; pretrained encoders bring their setting."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from each colour (as a fraction of 255)."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Each colour is divided by this after the mean is subtracted."""
    vision_embed_dim: int = 768
    """Width of the encoder."""
    vision_num_layers: int = 12
    """Layers of the encoder."""
    vision_num_heads: int = 12
    """Attention heads of the encoder; must divide vision_embed_dim."""
    vision_dropout: float = 0.0
    """Dropout in the encoder."""
    vision_drop_path: float = 0.0
    """Stochastic depth: share of the pictures that skip a branch of the encoder's last layer in training; it falls
    linearly to 0 at the first layer."""
    vision_mlp_dim: int | None = None
    """Width inside the encoder's MLPs (default: four times vision_embed_dim)."""
    vision_activation: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    """Activation in the encoder's MLPs; swiglu multiplies two halves (Shazeer 2020, arXiv:2002.05202)."""
    vision_norm_eps: float = 1e-12
    """Added to the variance in the encoder's norms."""
    vision_norm_first: bool = False
    """Layer norm before the encoder's first layer, as in CLIP."""
    vision_norm_last: bool = True
    """Layer norm after the encoder's last layer; CLIP's states are used without it."""
    vision_class_token: bool = True
    """Class token: a learned state of the full picture, before the patches; SigLIP has none."""
    vision_registers: int = 0
    """Register tokens after the class token: extra learned states (Darcet et al. 2024, arXiv:2309.16588)."""
    vision_layer_scale: bool = False
    """Layer scale: a learned factor per channel at the end of each branch (Touvron et al. 2021, arXiv:2103.17239)."""
    vision_positions: Literal["learned", "rotary"] = "learned"
    """Positions of the patches: learned embeddings, or rotated queries and keys, as in DINOv3."""
    vision_patch_bias: bool = True
    """Bias in the patch embedding; CLIP has none."""
    vocab_size: int = 50257
    """Size of the vocabulary; for a tokenizer trained on the captions, its largest size."""
    max_length: int = 512
    """Positions of the decoder: room for the longest caption, in tokens, and the picture's prefix if there is one. How long
    captions get is up to the model; --caption-length limits them."""
    decoder_embed_dim: int = 768
    """Width of the decoder."""
    decoder_num_layers: int = 12
    """Layers of the decoder."""
    decoder_num_heads: int = 12
    """Attention heads of the decoder; must divide decoder_embed_dim."""
    dropout: float = 0.1
    """Dropout in the decoder: after the embeddings and at the end of every residual branch."""
    bridge: Literal["cross_attention", "prefix"] = "cross_attention"
    """How the decoder gets the picture: cross-attention in every layer, or a prefix before the text."""
    prefix_length: int | None = None
    """Positions of the picture's prefix, pooled by attention (default: not pooled, one for each of the encoder's
    states)."""
    language_model: str | None = None
    """The transformers config (JSON) of another causal language model that replaces GPT-2; --decoder sets it."""
    prompt_ids: tuple[int, ...] = ()
    """Tokens of the prompt between the picture's prefix and every caption; --prompt sets them."""
    end_token_id: int = FILLED_IN
    """Token that ends a caption (default: the vocabulary's last, as in GPT-2); training uses the tokenizer's."""
    start_token_id: int = FILLED_IN
    """Token that starts a caption (default: end_token_id); training uses the tokenizer's."""
    pad_token_id: int = FILLED_IN
    """Token that pads short captions (default: end_token_id); training uses the tokenizer's."""

    def __post_init__(self) -> None:
        self.prompt_ids = tuple(self.prompt_ids)
        self.image_mean = tuple(self.image_mean)  # type: ignore[assignment]  # JSON gives lists
        self.image_std = tuple(self.image_std)  # type: ignore[assignment]
        check_numbers(self)
        if self.resize_size is None:
            self.resize_size = self.image_size
        if self.end_token_id is None:
            self.end_token_id = self.vocab_size - 1
        if self.start_token_id is None:
            self.start_token_id = self.end_token_id
        if self.pad_token_id is None:
            self.pad_token_id = self.end_token_id
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}: change one of them"
            )
        if self.resize_size < self.image_size:
            raise UserError(f"resize_size {self.resize_size} is smaller than image_size {self.image_size}")
        if self.num_patches > 1 << 16 or self.resize_size > max(4096, self.image_size):
            raise UserError(
                f"pictures of {self.resize_size} pixels, {self.num_patches} patches: too large, choose smaller sizes"
            )
        for part in ("vision", "decoder"):
            width, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            if width % heads:
                raise UserError(
                    f"{part}_num_heads {heads} does not divide {part}_embed_dim {width}: change one of them"
                )
        if not 0 <= max(self.end_token_id, self.start_token_id, self.pad_token_id) < self.vocab_size:
            raise UserError(f"a special token's id lies outside the vocabulary of {self.vocab_size}")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or not all(self.image_std):
            raise UserError("image_mean and image_std need three numbers each, and no image_std may be zero")
        check_fields(self, "dropout vision_dropout vision_drop_path", lambda x: 0 <= x < 1, "at least 0 and below 1")
        check_fields(self, "vision_norm_eps", lambda x: x >= 0, "at least 0")
        if self.vision_positions == "rotary" and self.vision_embed_dim // self.vision_num_heads % 4:
            raise UserError(
                "rotary positions need encoder heads whose size is a multiple of 4: change vision_num_heads"
            )
        if self.vision_registers and not self.vision_class_token:
            raise UserError("vision_registers needs a class token: add vision_class_token, or set it to 0")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} {value!r} is unknown: use {', '.join(known[:-1])} or {known[-1]}")
        if self.language_model and self.bridge != "prefix":
            raise UserError("language_model needs bridge prefix: set that, or leave language_model out")
        if self.prompt_ids and self.bridge != "prefix":
            raise UserError("a prompt needs bridge prefix: set that, or leave the prompt out")
        if self.prefix_length is not None and self.bridge != "prefix":
            raise UserError(f"prefix_length {self.prefix_length} needs bridge prefix: set that, or leave it out")
        if self.text_positions < 2:
            raise UserError(
                f"max_length {self.max_length} has no room for a caption after the picture's {self.prefix_positions} "
                "positions: raise it, or lower prefix_length"
            )

    @property
    def prefix_positions(self) -> int:
        """The decoder's positions that the picture and the prompt take; 0 with cross-attention."""
        if self.bridge == "cross_attention":
            return 0
        return (self.prefix_length or self.num_states) + len(self.prompt_ids)

    @property
    def text_positions(self) -> int:
        """The decoder's positions for the text, with its start token."""
        return self.max_length - self.prefix_positions

    @property
    def num_patches(self) -> int:
        """P, the patches of one picture, without class token and registers."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_states(self) -> int:
        """S, the encoder's states of one picture: class token, registers and patches."""
        return self.vision_class_token + self.vision_registers + self.num_patches

    @property
    def vision_mlp(self) -> int:
        """Width inside the encoder's MLPs."""
        return self.vision_mlp_dim or 4 * self.vision_embed_dim

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values. Those newer than version 0.1 are skipped at their default, so that version 0.1 can
        read a plain ViT's files, and its runs stay resumable."""
        values, defaults = dataclasses.asdict(self), {f.name: f.default for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in NEWER or value != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViTGPT2Config:
        """The inverse of to_dict. Raises UserError for a field this version does not know."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"the model's config has unknown fields: {', '.join(unknown)}")
        return cls(**values)


@dataclass(kw_only=True)
class Augmentation:
    """Changes to training pictures, besides the random crop where resize_size exceeds image_size. Zeros: none."""

    flip: float = 0.0
    """Share of the pictures that are mirrored; left and right are swapped in their captions."""
    random_resized_crop: float = 0.0
    """Smallest share of a picture's area in a random crop, which is resized back; 0: no such crop."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    rand_augment: int = 0
    """Magnitude of RandAugment, 0 to 30 (Cubuk et al. 2019, arXiv:1909.13719)."""

    def __post_init__(self) -> None:
        check_fields(self, "flip random_resized_crop color_jitter", lambda x: 0 <= x <= 1, "between 0 and 1")
        check_fields(self, "rand_augment", lambda x: 0 <= x <= 30, "between 0 and 30")

    @property
    def moves_pixels_only(self) -> bool:
        """Whether there are only crops and flips, which the GPU can apply to a batch at once."""
        return not (self.random_resized_crop or self.color_jitter or self.rand_augment)


@dataclass(kw_only=True)
class Captioning:
    """Flags that captioning scripts share."""

    num_captions: int = 1
    """Captions of each picture, the best first."""
    num_beams: int | None = None
    """Beams of the search; 1 is greedy (default: 3, at least num_captions; 1 when sampling)."""
    length_penalty: float = 1.0
    """Above 0, beam search prefers longer captions."""
    max_length: int | None = None
    """Longest caption, in tokens (default: 32, or fewer if the model has fewer positions)."""
    min_length: int = 0
    """Shortest caption, in tokens."""
    prefix: str = ""
    """Text that every caption starts with, such as "a photo of"; the model continues it."""
    bad_words: tuple[str, ...] = ()
    """Words that no caption contains."""
    no_repeat_ngram_size: int = 0
    """No sequence of this many tokens occurs twice in a caption; 0: no limit."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were already written become less likely."""
    do_sample: bool = False
    """Sample each token instead of beam search."""
    temperature: float = 1.0
    """Sampling temperature: above 1 gives more varied captions, below 1 safer ones."""
    top_k: int = 50
    """Sample only from this many most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample only from the most likely tokens whose probabilities add up to this, 0 to 1."""
    base_dir: Path | None = None
    """Folder to search for the pretrained models that an adapter file needs, before the Hub."""
    allow_pickle: bool = False
    """Also read weights of transformers that are a pickle, from a source you trust; only the tensors are read."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to run on."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    """Number format of matrix products; auto: fp16 on CUDA, elsewhere bf16 if faster. int8: large models on a CPU."""
    debug: bool = False
    """Show tracebacks of errors."""

    def options(self, **more: Any) -> dict[str, Any]:
        """The flags and `more` as options of model.generate."""
        options = {name: getattr(self, name) for name in ("num_beams", "length_penalty", "max_length")}
        options |= {"num_return_sequences": self.num_captions if self.num_captions > 1 else None}
        controls = ("min_length", "prefix", "bad_words", "no_repeat_ngram_size", "repetition_penalty")
        options |= {n: getattr(self, n) for n in controls if getattr(self, n) != getattr(Captioning, n)} | more
        if self.do_sample:
            options |= {name: getattr(self, name) for name in ("do_sample", "temperature", "top_k", "top_p")}
        return default_decoding(options)


def default_decoding(options: dict[str, Any]) -> dict[str, Any]:
    """Drop options of model.generate that are None, and add the scripts' default number of beams."""
    given = {name: value for name, value in options.items() if value is not None}
    beams = 1 if given.get("do_sample") else max(NUM_BEAMS, given.get("num_return_sequences", 1))
    return {"num_beams": beams} | given


# A run. Each class is a group in `main.py --help`.


@dataclass(kw_only=True)
class Basics:
    """The most common options."""

    preset: str = "coco"
    """Named recipe that sets the defaults of all other flags: coco, coco-siglip2, coco-siglip2-scst, demo, flickr8k or
    img2gpt."""
    dataset: str = "auto"
    """Layout of the data: auto (detect it; COCO if there is no data_dir), coco, karpathy, flickr30k, flickr8k,
    imagefolder, webdataset, csv, sidecar; user/name, a data set on the Hugging Face Hub; or scenes, which are drawn."""
    data_dir: Path | None = None
    """Folder of the data, or its caption file (default: ./coco_data for COCO, Flickr30k from Kaggle; scenes are drawn
    into the output directory)."""
    output_dir: Path | None = None
    """Folder for everything the run writes (default: runs/<preset>-<date>-<time>, or for your data
    runs/<its folder>-<date>-<time>)."""
    epochs: int = 10
    """Passes over the training pictures."""
    batch_size: int = 128
    """Pictures in a batch, over all processes."""
    learning_rate: float = 2e-4
    """Highest learning rate; it falls to zero (see schedule)."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to train on."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of matrix products; auto: fp16 on CUDA, elsewhere bf16 if it is measured to be faster."""
    resume: str = "auto"
    """auto: resume the newest unfinished run with the same settings; never: start again (checkpoints in the same folder
    are moved to checkpoints.previous); or the folder of a run to resume."""
    plan: bool = False
    """Only print steps, hours and memory of the run on an H100 and on a card of 24 GB; needs no data."""


@dataclass(kw_only=True)
class Data:
    """The pictures and captions, and how they are cached."""

    image_column: str | None = None
    """Column of the pictures, if a table has an unusual name for it."""
    caption_column: str | None = None
    """Column of the captions, if a table has an unusual name for it; txt: read name.txt instead of name.caption."""
    num_scenes: int = 20000
    """Training pictures to draw when the data set is scenes."""
    max_bad_share: float = 0.01
    """Largest allowed share of missing or damaged pictures; they are listed in bad_samples.csv and skipped."""
    allow_overlap: bool = False
    """Allow test pictures that the model is also trained on."""
    cache: bool = False
    """Cache all resized pictures in a memory-mapped file that later runs and other processes share. (Pictures that fit
    into 40 % of the memory are always cached in memory.)"""
    cache_on_gpu: bool = False
    """Cache the training pictures on the GPU, and crop and mirror them there."""
    num_workers: int = 4
    """Processes that decode and augment pictures, if needed (at most 16, and at most one per core)."""


@dataclass(kw_only=True)
class Start:
    """The model before its first step."""

    init: Literal["scratch", "pretrained"] = "scratch"
    """Start from random weights, or from a pretrained ViT and GPT-2 with new cross-attention."""
    init_encoder: str | None = None
    """Pretrained ViT, DeiT, MAE, MSN, CLIP, SigLIP, DINOv2 or DINOv3: a Hub name or a folder (with init pretrained:
    google/vit-base-patch16-224-in21k)."""
    encoder_layer: int = -1
    """Layer of init_encoder whose states are used: -1 the last, -2 the one before it, as is usual with CLIP."""
    init_decoder: str | None = None
    """Pretrained GPT-2: a Hub name or a folder (with init pretrained: gpt2); its tokenizer comes with it."""
    decoder: str | None = None
    """Any causal language model of transformers (Llama, Mistral, Qwen, ...) as decoder, after a prefix: a Hub name or a
    folder. Needs init_encoder or init pretrained. GPT-2 runs in this project's code; gradient_checkpointing does not
    apply to the others."""
    prompt: str = ""
    """Text between picture and caption, such as "a photo of"; needs a prefix."""
    init_model: str | None = None
    """A full captioner to start from, of this project or of transformers: a file, a folder or a Hub name. Its sizes and
    tokenizer replace those in the settings."""
    base_dir: Path | None = None
    """Folder to search for pretrained models by name, before the Hub."""
    tokenizer: str = "auto"
    """gpt2 (from the Hub); a folder with vocab.json and merges.txt; train: a new one, on the captions; auto: gpt2 if it
    is available, else train."""
    mimetic: bool = False
    """Give an encoder attention weights and positions that resemble those of trained ones (Trockman & Kolter 2023,
    arXiv:2305.09828); no effect on a pretrained encoder."""
    seed: int = 0
    """Seed of the weights, the order, the crops and the drawn scenes."""


@dataclass(kw_only=True)
class Learning:
    """The training step and the number of steps."""

    max_steps: int | None = None
    """Stop after this many steps; overrides epochs."""
    captions_per_image: int = 5
    """Captions per picture in one step; with 1, an epoch visits every caption once instead of every picture."""
    accumulation_steps: int = 1
    """Batches whose gradients are added up to one step."""
    objective: Literal["cross_entropy", "scst"] = "cross_entropy"
    """cross_entropy: predict the references' tokens. scst: self-critical training, raise the reward of captions that
    the model samples (start from a trained model with init_model, learning rate about 1e-5; no flips, word dropout, label
    smoothing or contrastive loss)."""
    baseline: Literal["others", "greedy"] = "others"
    """Score that a sampled caption must beat in self-critical training: the mean of the picture's other samples, or
    that of its greedy caption."""
    reward: Literal["cider_d", "pac_s", "mix"] = "cider_d"
    """Reward of self-critical training: CIDEr-D; PAC-S, with pac; or mix, their sum. PAC-S alone uses no references:
    its captions drift away from human ones."""
    reference_weight: float = 0.0
    """Weight of the references' cross-entropy beside the rewards in self-critical training, which keeps the captions'
    variety (0: none)."""
    pac: str | None = None
    """Weights of PAC-S for the reward: a Hub name or a folder of a CLIP in transformers' format, with safetensors."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the matrices inside the layers, and AdamW for all other weights."""
    encoder_learning_rate: float | None = None
    """Learning rate of the encoder (default: learning_rate)."""
    decoder_learning_rate: float | None = None
    """Learning rate of the decoder without its cross-attention (default: learning_rate)."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a layer to the one below it, in encoder and decoder."""
    freeze: tuple[Literal["encoder", "decoder", "new"], ...] = ()
    """What to freeze; new is the cross-attention and the projection."""
    warmup_steps: int = 500
    """Steps in which the learning rate rises from zero (at most a tenth of the run)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to zero after the warm-up: along a cosine, or in a straight line (Bergsma et al. 2025,
    arXiv:2502.15938)."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and embeddings have none."""
    cautious_decay: bool = False
    """Muon decays weights only where its update makes them smaller too (Chen et al. 2025, arXiv:2510.12402)."""
    gradient_clip: float = 1.0
    """Largest norm of the gradients."""
    overflow_limit: int = 20
    """Steps in a row whose fp16 gradients may overflow before the run stops."""
    ema: float = 0.0
    """Decay of a running average of the weights, such as 0.999, which is then evaluated and saved (0: none)."""
    word_dropout: float = 0.0
    """Share of the decoder's input tokens that training hides, so that the decoder must use the picture."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the full vocabulary."""
    contrastive_weight: float = 0.0
    """Weight of a contrastive loss beside that of the captions: pictures and captions must find each other among those that
    a process has in a batch (accumulation_steps adds none); a simpler form of CoCa's (Yu et al. 2022, arXiv:2205.01917).
    The logged loss does not contain it. No effect with rewards."""


@dataclass(kw_only=True)
class Adapters:
    """Adapters: train a few weights of a large pretrained model."""

    lora: bool = False
    """Freeze the pretrained weights and train low-rank adapters on some layers (LoRA, Hu et al. 2021,
    arXiv:2106.09685); new layers are trained in full."""
    qlora: bool = False
    """LoRA with the frozen layers in 4 bits (NF4, doubly quantized: QLoRA, Dettmers et al. 2023, arXiv:2305.14314), if
    bitsandbytes supports it here."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """An adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """Dropout of an adapter's input."""
    lora_targets: str = r"encoder\.blocks\.\d+\.qkv|decoder\.blocks\.\d+\.attn\.c_attn|decoder\.body\..*"
    """Pretrained linear layers with an adapter: a regular expression for their full names (default: queries, keys and
    values of the encoder and of GPT-2, every layer of another language model)."""
    merge: bool = False
    """Merge the adapters into the pretrained weights and save the full model, instead of the adapters alone."""


@dataclass(kw_only=True)
class Speed:
    """Time and memory."""

    compile: bool | None = None
    """Compile the training step with torch.compile: --compile or --no-compile (default: in a long run on a GPU, without
    adapters or another language model). A resumed run then matches only up to rounding."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them: slower, less memory."""
    shard: bool = False
    """Shard weights, gradients and optimizer moments of a model with another decoder over torchrun's processes (FSDP2).
    A process has all weights only while captions or checkpoints are written."""
    flash_attention: bool = True
    """Use the flash_attn package if it is installed and supports the case."""


@dataclass(kw_only=True)
class Watching:
    """Validation, checkpoints and logs."""

    eval_interval: int = 500
    """Steps between sample captions for a fixed set of pictures."""
    val_pictures: int = 1000
    """Validation pictures that get a greedy caption after every epoch. Their CIDEr-D chooses the best checkpoint (below
    200 pictures it is mostly noise, so the validation loss chooses; 0: no captions)."""
    patience: int | None = None
    """Stop after this many epochs without improvement (default: never)."""
    caption_length: int = LONGEST
    """Longest caption in evaluations, in tokens."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints (default: one after every epoch)."""
    checkpoint_minutes: float = 30.0
    """Also save a checkpoint after this many minutes without one, without validation; 0: not by time."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, besides the best one."""
    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    """Weights & Biases. auto: online if there is a key, else off."""
    wandb_project: str = "vit-gpt2-captioning"
    """Project in Weights & Biases."""
    no_upload: bool = False
    """On a terminal, do not ask at the end whether to publish the model."""
    yes: bool = False
    """Answer yes to every question, such as the one before a large download."""
    debug: bool = False
    """Show tracebacks of errors."""


@dataclass(kw_only=True)
class TrainConfig(
    Watching, Speed, Adapters, Learning, Start, Data, Basics
):  # dataclass takes the last one's fields first
    """The settings of a training run. Every field is a flag of main.py."""

    augmentation: Augmentation = field(default_factory=Augmentation)
    """Augmentation of training pictures."""
    model: ViTGPT2Config = field(default_factory=ViTGPT2Config)
    """Sizes of the model."""

    def __post_init__(self) -> None:
        from_0 = "num_workers warmup_steps weight_decay seed val_pictures checkpoint_minutes"
        from_1 = "epochs max_steps batch_size captions_per_image accumulation_steps eval_interval checkpoint_interval "
        from_1 += "keep_checkpoints num_scenes caption_length patience overflow_limit lora_rank"
        above_0 = "learning_rate encoder_learning_rate decoder_learning_rate layer_decay gradient_clip lora_alpha"
        check_fields(self, from_0, lambda x: x >= 0, "at least 0")
        check_fields(self, from_1, lambda x: x >= 1, "at least 1")
        check_fields(self, "seed", lambda x: x < 1 << 31, "below 2147483648")
        check_fields(self, above_0, lambda x: x > 0, "positive")
        check_fields(self, "layer_decay", lambda x: x <= 1, "at most 1")
        if self.objective == "scst":
            if self.init_model is None:
                raise UserError("objective scst needs a trained model to improve: name it with --init-model")
            if self.captions_per_image < 2 and self.baseline == "others":
                raise UserError("baseline others needs several captions a picture: use --captions-per-image 2 or more")
        elif self.reward != "cider_d":
            raise UserError(f"reward {self.reward} is for self-critical training: add --objective scst")
        elif self.reference_weight:
            raise UserError("reference_weight is for self-critical training: add --objective scst")
        if (self.reward != "cider_d") != (self.pac is not None):
            raise UserError("reward pac_s and mix, and nothing else, need PAC-S's weights: name them with --pac")
        started = {"encoder": self.init_encoder, "decoder": self.init_decoder or self.decoder, "new": None}
        for part in self.freeze:
            if not (self.init_model or started[part] or (self.init == "pretrained" and part != "new")):
                raise UserError(
                    f"freeze {part}: its weights would stay random: name a pretrained model for it to start from"
                )
        if self.init_model and (self.init != "scratch" or self.init_encoder or self.init_decoder):
            raise UserError("init_model is a full model: leave init, init_encoder and init_decoder out")
        if self.decoder and (self.init_decoder or self.init_model):
            raise UserError("decoder cannot be combined with init_decoder or init_model: leave those out")
        if self.adapts and not (
            self.init_model or self.init == "pretrained" or (self.init_encoder and (self.init_decoder or self.decoder))
        ):
            raise UserError("lora and qlora adapt a pretrained model: add --init pretrained, or --init-model")
        if self.prompt and self.init_model:
            raise UserError("init_model has its own prompt: leave out --prompt")
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise UserError(f"lora_targets {self.lora_targets!r} is not a regular expression: {error}") from error
        if self.merge and not self.adapts:
            raise UserError("merge has no effect without adapters: add --lora or --qlora, or leave it out")
        if self.compile and self.qlora:
            raise UserError("compile does not support qlora's 4-bit layers: leave one of them out")
        if self.shard and (self.qlora or self.compile or self.optimizer != "adamw" or self.objective == "scst"):
            raise UserError(
                "shard needs adamw and cross_entropy, without qlora and compile: leave it out, or change those"
            )
        if self.cache_on_gpu and not self.augmentation.moves_pixels_only:
            raise UserError("cache_on_gpu supports only crops and flips: leave it out, or the other augmentations")
        shares = "word_dropout label_smoothing max_bad_share ema lora_dropout"
        if self.cautious_decay and self.optimizer != "muon":
            raise UserError("cautious_decay is Muon's: add --optimizer muon, or leave it out")
        check_fields(self, "reference_weight contrastive_weight", lambda x: x >= 0, "at least 0")
        check_fields(self, shares, lambda x: 0 <= x < 1, "at least 0 and below 1")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values = dataclasses.asdict(self) | {"model": self.model.to_dict()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @property
    def learned_captions(self) -> int:
        """Captions per picture that a step learns: in self-critical training samples, and references if they have a weight."""
        return self.captions_per_image * (2 if self.reference_weight else 1)

    @property
    def adapts(self) -> bool:
        """Whether the run trains adapters."""
        return self.lora or self.qlora

    @property
    def learned_from(self) -> dict[str, Any]:
        """The settings that change what a run learns, as JSON values; not those for output, loading and the like."""
        elsewhere = (
            "output_dir resume plan yes debug num_workers eval_interval keep_checkpoints checkpoint_interval checkpoint_minutes "
            "cache cache_on_gpu max_bad_share allow_overlap no_upload base_dir merge wandb wandb_project shard"
        )
        values = {name: value for name, value in self.to_dict().items() if name not in elsewhere.split()}
        values["compile"] = bool(self.compile)  # older versions had no None: their runs stay resumable
        for name in NEWER_SETTINGS:  # older versions lack them: their runs stay resumable
            if values[name] == getattr(TrainConfig, name):
                del values[name]
        if self.reward == "cider_d":
            del values["reward"], values["pac"]
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for two configs whose runs learn the same."""
        values = self.learned_from
        if self.lora_targets == Adapters.lora_targets:  # hash the older default, so that its runs stay resumable
            values["lora_targets"] += r"\.[qkv]_proj"
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def sizes(encoder: tuple[int, int, int], decoder: tuple[int, int, int], **others: Any) -> ViTGPT2Config:
    """A model config from (width, layers, heads) of its encoder and its decoder."""
    for part, numbers in (("vision", encoder), ("decoder", decoder)):
        others |= zip((f"{part}_embed_dim", f"{part}_num_layers", f"{part}_num_heads"), numbers, strict=True)
    return ViTGPT2Config(**others)


SIGLIP2 = ViTGPT2Config(image_size=384, vision_class_token=False, vision_activation="gelu_tanh", vision_norm_eps=1e-6)
"""The sizes of SigLIP2-B/16 at 384 pixels and GPT-2, which the weights bring too."""
PRESETS = {
    "coco": TrainConfig(),
    # A strong pretrained encoder on the split that papers report. Every number is explained in docs/training.md.
    "coco-siglip2": TrainConfig(
        preset="coco-siglip2",
        dataset="karpathy",
        init_encoder="google/siglip2-base-patch16-384",
        init_decoder="gpt2",
        epochs=6,
        learning_rate=2e-4,
        encoder_learning_rate=2e-5,
        decoder_learning_rate=5e-5,
        weight_decay=0.05,
        label_smoothing=0.1,
        ema=0.999,
        model=SIGLIP2,
    ),
    # Afterwards: rewards, from the model that coco-siglip2 left in the folder.
    "coco-siglip2-scst": TrainConfig(
        preset="coco-siglip2-scst",
        dataset="karpathy",
        objective="scst",
        init_model="vit-gpt2-captioning.safetensors",
        epochs=10,
        learning_rate=5e-6,
        encoder_learning_rate=1e-6,
        warmup_steps=100,
        model=dataclasses.replace(SIGLIP2, dropout=0.0),
    ),
    # Drawn scenes, minutes on two CPU cores. Muon learns them in a third of AdamW's steps: EXPERIMENTS.md. The lowest
    # loss chooses the best checkpoint: CIDEr-D depends on which of five phrasings a caption has, and chose a worse one.
    "demo": TrainConfig(
        preset="demo",
        dataset="scenes",
        tokenizer="train",
        epochs=3,
        batch_size=64,
        optimizer="muon",
        learning_rate=2e-3,
        warmup_steps=30,
        val_pictures=0,
        eval_interval=200,
        model=sizes((128, 4, 4), (128, 2, 4), image_size=48, patch_size=8, vocab_size=512, max_length=32, dropout=0.0),
    ),
    # A pretrained ViT and GPT-2, joined by a prefix and fine-tuned on one small GPU.
    "img2gpt": TrainConfig(
        preset="img2gpt",
        dataset="flickr30k",
        init="pretrained",
        qlora=True,
        epochs=3,
        batch_size=16,
        warmup_steps=100,
        eval_interval=200,
        model=ViTGPT2Config(bridge="prefix"),
    ),
    # Real photographs from scratch, 40 minutes of one CPU core.
    "flickr8k": TrainConfig(
        preset="flickr8k",
        dataset="flickr8k",
        tokenizer="train",
        epochs=12,
        batch_size=32,
        optimizer="muon",
        learning_rate=2e-3,
        warmup_steps=100,
        weight_decay=0.5,
        mimetic=True,
        contrastive_weight=0.2,
        word_dropout=0.1,
        augmentation=Augmentation(flip=0.5),
        model=sizes((192, 6, 3), (192, 4, 3), image_size=128, resize_size=144, vocab_size=4096, max_length=64),
    ),
}
