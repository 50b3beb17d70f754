"""What a model is and what a run is: ViTGPT2Config, TrainConfig and the named recipes in PRESETS.

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
"""What --init pretrained starts from, by their names on the Hub."""
NUM_BEAMS = 3
"""Beams that scripts and evaluations search with unless told otherwise."""
LONGEST = 32
"""Tokens of the longest caption unless told otherwise, with the end token."""

FEW = 200
"""Pictures below which a number that is measured on them is mostly chance."""


class UserError(ValueError):
    """Something the user can put right. Its message is one line: what, where, what to do."""


def check_fields(config: Any, names: str, fits: Callable[[Any], bool], what: str) -> None:
    """Raises UserError for the first of these fields whose value does not fit; None always does."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise UserError(f"{name} is {value}: it must be {what}")


def check_numbers(config: Any) -> None:
    """Raises UserError for the first field whose value is not of its kind, or no number that a model can have: a file may
    say anything."""
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), str(f.type)
        least = 0 if f.name.endswith(("_id", "_ids", "_registers")) else 1
        most = 1000 if f.name.endswith("_layers") else (1 << 31) - 1
        for number in value if isinstance(value, tuple) else [value]:
            if number is None and kind.endswith("None"):
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


NEWER = {"vision_mlp_dim", "vision_activation", "vision_norm_eps", "vision_norm_first", "vision_norm_last"}
NEWER |= {"vision_class_token", "vision_registers", "vision_layer_scale", "vision_positions", "vision_patch_bias"}
"""Fields that files and fingerprints of version 0.1 do not know."""
CHOICES = {
    "resample": ("bicubic", "bilinear"),
    "bridge": ("cross_attention", "prefix"),
    "vision_activation": ("gelu", "gelu_tanh", "quick_gelu", "swiglu"),
    "vision_positions": ("learned", "rotary"),
}
"""What the fields that are one of several words may be."""


@dataclass(kw_only=True)
class ViTGPT2Config:
    """A vision transformer joined to GPT-2. The defaults are ViT-B/16 and GPT-2 small with 512 positions."""

    image_size: int = 224
    """Side of the square picture the encoder sees, in pixels."""
    patch_size: int = 16
    """Side of one patch, in pixels; divides image_size."""
    resize_size: int | None = None
    """Pictures are resized to this side, then cropped to image_size (default: image_size, no crop)."""
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    """How pictures are resized; models from elsewhere say it themselves."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from each colour (as a fraction of 255)."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Each colour is divided by this after the mean is subtracted."""
    vision_embed_dim: int = 768
    """Width of the encoder."""
    vision_num_layers: int = 12
    """Layers of the encoder."""
    vision_num_heads: int = 12
    """Attention heads of the encoder; divides vision_embed_dim."""
    vision_dropout: float = 0.0
    """Dropout in the encoder."""
    vision_drop_path: float = 0.0
    """Share of the pictures that skip a branch of the encoder's last layer in training, falling to none at its first
    (stochastic depth)."""
    vision_mlp_dim: int | None = None
    """Width inside the encoder's MLPs (default: four times its own)."""
    vision_activation: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    """What stands inside the encoder's MLPs; swiglu multiplies two halves (Shazeer 2020, arXiv:2002.05202)."""
    vision_norm_eps: float = 1e-12
    """Added to the variance in the encoder's norms."""
    vision_norm_first: bool = False
    """A norm before the encoder's first layer, as in CLIP."""
    vision_norm_last: bool = True
    """A norm behind the encoder's last layer; CLIP's states are read without."""
    vision_class_token: bool = True
    """A learned state of the whole picture, before those of the patches; SigLIP has none."""
    vision_registers: int = 0
    """Learned states that layers may write to, behind the class token (Darcet et al. 2024, arXiv:2309.16588)."""
    vision_layer_scale: bool = False
    """A learned factor for each number at the end of an encoder's branch (Touvron et al. 2021, arXiv:2103.17239)."""
    vision_positions: Literal["learned", "rotary"] = "learned"
    """How patches know where they are: by learned embeddings, or by rotating queries and keys, as in DINOv3."""
    vision_patch_bias: bool = True
    """A bias in the patch embedding; CLIP has none."""
    vocab_size: int = 50257
    """Entries of the tokenizer (a tokenizer trained on the captions is made this large at most)."""
    max_length: int = 512
    """Positions of the decoder: the longest caption it can read, in tokens, with the picture's prefix where it has one."""
    decoder_embed_dim: int = 768
    """Width of the decoder."""
    decoder_num_layers: int = 12
    """Layers of the decoder."""
    decoder_num_heads: int = 12
    """Attention heads of the decoder; divides decoder_embed_dim."""
    dropout: float = 0.1
    """Dropout in the decoder: after the embeddings and at the end of every residual branch."""
    bridge: Literal["cross_attention", "prefix"] = "cross_attention"
    """How the decoder sees the picture: by cross-attention in every layer, or as a prefix that stands before the text."""
    prefix_length: int | None = None
    """Positions that the picture takes as a prefix, pooled by attention (default: one for each patch and the class
    token's)."""
    language_model: str | None = None
    """What transformers' config.json says of another causal language model that writes the captions in GPT-2's place;
    --decoder fills it in."""
    prompt_ids: tuple[int, ...] = ()
    """Tokens that the decoder reads behind the picture's prefix, before every caption; --prompt fills them in."""
    end_token_id: int | None = None
    """The token that ends a caption (default: the vocabulary's last, as in GPT-2); training takes the tokenizer's."""
    start_token_id: int | None = None
    """The token a caption starts with (default: end_token_id); training takes the tokenizer's."""
    pad_token_id: int | None = None
    """The token that fills up short captions (default: end_token_id); training takes the tokenizer's."""

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
                f"pictures of {self.resize_size} pixels, {self.num_patches} patches: more than fit into memory"
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
            raise UserError("registers stand behind a class token: add vision_class_token, or leave them out")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} {value!r} is unknown: use {', '.join(known[:-1])} or {known[-1]}")
        if self.language_model and self.bridge != "prefix":
            raise UserError("language_model needs bridge prefix: add that, or leave it out")
        if self.prompt_ids and self.bridge != "prefix":
            raise UserError("a prompt needs bridge prefix: add that, or leave it out")
        if self.prefix_length is not None and self.bridge != "prefix":
            raise UserError(f"prefix_length {self.prefix_length} needs bridge prefix: add that, or leave it out")
        if self.text_positions < 2:
            raise UserError(
                f"max_length {self.max_length} has no room for a caption behind a picture's {self.prefix_positions} "
                "positions: raise it, or pool the picture to fewer with prefix_length"
            )

    @property
    def prefix_positions(self) -> int:
        """The decoder's positions that the picture takes, with the prompt behind it; none with cross-attention."""
        if self.bridge == "cross_attention":
            return 0
        return (self.prefix_length or self.num_states) + len(self.prompt_ids)

    @property
    def text_positions(self) -> int:
        """The decoder's positions that are left for the text, its start token included."""
        return self.max_length - self.prefix_positions

    @property
    def num_patches(self) -> int:
        """P, the patches of one picture, the class token and registers not counted."""
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
        """The fields as JSON can hold them. Those that came after version 0.1 are left out at their defaults: a plain
        ViT's files stay readable by it, and its runs can be resumed."""
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
    """What training does to pictures, beside the random crop where resize_size leaves room. Zeros: nothing."""

    flip: float = 0.0
    """Share of the pictures that are mirrored, with left and right swapped in their captions."""
    random_resized_crop: float = 0.0
    """Smallest share of the picture's area that a random crop, resized back, keeps; 0: no such crop."""
    color_jitter: float = 0.0
    """How much brightness, contrast and saturation may change, as a share of themselves."""
    rand_augment: int = 0
    """Magnitude of RandAugment (Cubuk et al. 2019, arXiv:1909.13719), of 30."""

    def __post_init__(self) -> None:
        check_fields(self, "flip random_resized_crop color_jitter", lambda x: 0 <= x <= 1, "between 0 and 1")
        check_fields(self, "rand_augment", lambda x: 0 <= x <= 30, "between 0 and 30")

    @property
    def moves_pixels_only(self) -> bool:
        """Whether crops and flips are all there is: what can be done to a batch on the GPU in one go."""
        return not (self.random_resized_crop or self.color_jitter or self.rand_augment)


@dataclass(kw_only=True)
class Captioning:
    """How and where captions are made: flags that scripts share."""

    num_captions: int = 1
    """Captions of each picture, the best first."""
    num_beams: int | None = None
    """Beams; 1 is greedy (default: 3, or as many as captions; 1 when sampling)."""
    length_penalty: float = 1.0
    """Above 0, longer captions win more often in beam search."""
    max_length: int | None = None
    """Longest caption, in tokens (default: 32, or what the model can hold)."""
    do_sample: bool = False
    """Draw each token by its probability instead of searching with beams."""
    temperature: float = 1.0
    """Of sampling: above 1 bolder, below 1 safer."""
    top_k: int = 50
    """Sampling draws from so many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Sampling draws from the likeliest tokens that share this probability, 0 to 1."""
    base_dir: Path | None = None
    """Folder in which the pretrained models that a file of adapters names are looked for before the Hub is asked."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to run."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    """Of matrix products; auto: fp16 on CUDA, elsewhere bf16 where that is faster. int8: on a CPU, for large models."""
    debug: bool = False
    """Show tracebacks of errors."""

    def options(self, **more: Any) -> dict[str, Any]:
        """The flags, and `more`, as options of model.generate."""
        options = {name: getattr(self, name) for name in ("num_beams", "length_penalty", "max_length")}
        options |= {"num_return_sequences": self.num_captions if self.num_captions > 1 else None} | more
        if self.do_sample:
            options |= {name: getattr(self, name) for name in ("do_sample", "temperature", "top_k", "top_p")}
        return default_decoding(options)


def default_decoding(options: dict[str, Any]) -> dict[str, Any]:
    """The options of model.generate that are given (None: not), and as many beams as scripts search with."""
    given = {name: value for name, value in options.items() if value is not None}
    beams = 1 if given.get("do_sample") else max(NUM_BEAMS, given.get("num_return_sequences", 1))
    return {"num_beams": beams} | given


# A run. Its fields stand in the groups of `main.py --help`.


@dataclass(kw_only=True)
class Basics:
    """What is most often set."""

    preset: str = "coco"
    """Named recipe that sets the defaults of all other flags: coco, demo, flickr8k or img2gpt."""
    dataset: str = "auto"
    """Layout of the data: auto (recognised; without a folder COCO), coco, karpathy, flickr30k, flickr8k, imagefolder,
    webdataset, csv, sidecar; user/name, a data set on the Hugging Face Hub; or scenes, drawn on the spot."""
    data_dir: Path | None = None
    """Folder of the data, or the file of captions in it (default: ./coco_data for COCO, Flickr30k from Kaggle; scenes
    are drawn into the output directory)."""
    output_dir: Path | None = None
    """Folder for everything the run writes (default: runs/<preset>-<date>-<time>, of own data
    runs/<its folder>-<date>-<time>)."""
    epochs: int = 10
    """Passes over the training pictures."""
    batch_size: int = 128
    """Pictures that go through the model at a time, over all processes."""
    learning_rate: float = 2e-4
    """Highest learning rate; it falls to zero along a cosine."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to train."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of matrix products; auto: fp16 on CUDA, elsewhere bf16 where it is measured to be faster."""
    resume: str = "auto"
    """auto: go on with the newest unfinished run of the same settings; never (the checkpoints of a run in the same folder
    are kept as checkpoints.previous); or the folder of a run."""


@dataclass(kw_only=True)
class Data:
    """Which pictures and captions, and how they are kept."""

    image_column: str | None = None
    """Column of the pictures, where a table's has no usual name."""
    caption_column: str | None = None
    """Column of the captions, where a table's has no usual name; txt, where name.txt is to count and not name.caption."""
    num_scenes: int = 20000
    """Pictures to draw for training when the data set is scenes."""
    max_bad_share: float = 0.01
    """Largest share of pictures that may be missing or damaged; they are named in bad_samples.csv and skipped."""
    allow_overlap: bool = False
    """Go on although some of the pictures to test on are also trained on."""
    cache: bool = False
    """Keep all pictures, resized, in a memory-mapped file that later runs and other processes share. (Those that fit
    into 40 % of the memory are kept there in any case.)"""
    cache_on_gpu: bool = False
    """Keep the training pictures on the GPU, where they are cropped and mirrored."""
    num_workers: int = 4
    """Processes that decode and augment pictures, where that is to be done (16 at most, and one a core)."""


@dataclass(kw_only=True)
class Start:
    """What the model is before its first step."""

    init: Literal["scratch", "pretrained"] = "scratch"
    """Start from random weights, or from a pretrained ViT and GPT-2 with fresh cross-attention."""
    init_encoder: str | None = None
    """A ViT, DeiT, MAE, MSN, CLIP, SigLIP, DINOv2 or DINOv3 to start from, a Hub name or a folder (with init pretrained:
    google/vit-base-patch16-224-in21k)."""
    encoder_layer: int = -1
    """Which of init_encoder's layers gives the states: -1 is the last, -2 the one before, which CLIP's readers prefer."""
    init_decoder: str | None = None
    """A GPT-2 to start from, a Hub name or a folder (with init pretrained: gpt2); its tokenizer comes with it."""
    decoder: str | None = None
    """Any causal language model of transformers (Llama, Mistral, Qwen, ...) to write captions, behind a prefix: a Hub name
    or a folder. With init_encoder or init pretrained; GPT-2 is this project's own. Its activations are always kept, with
    gradient_checkpointing too."""
    prompt: str = ""
    """What the decoder reads between picture and caption, such as "a photo of"; needs a prefix."""
    init_model: str | None = None
    """A captioner of this project or of transformers to go on from, whole: a file, a folder or a Hub name. Its sizes
    and tokenizer take the place of those in the settings."""
    base_dir: Path | None = None
    """Folder in which pretrained models are looked for by name before the Hub is asked."""
    tokenizer: str = "auto"
    """gpt2 (from the Hub), a folder with vocab.json and merges.txt, or train: one on the captions. auto: gpt2 where it
    can be had, else train."""
    seed: int = 0
    """Of the weights, the order, the crops and the drawn scenes."""


@dataclass(kw_only=True)
class Learning:
    """A step, and how many."""

    max_steps: int | None = None
    """Stop the schedule after this many steps, whatever epochs says."""
    captions_per_image: int = 5
    """Captions of each picture learned in one step; 1 visits every caption once an epoch instead."""
    accumulation_steps: int = 1
    """Batches whose gradients are added up to one step."""
    objective: Literal["cross_entropy", "scst"] = "cross_entropy"
    """Predict the references' words; or self-critical training, raise the CIDEr-D of captions that the model samples
    itself (start from a trained one, with init_model and a learning rate of about 1e-5; no pictures are mirrored, no words
    blanked, no labels smoothed)."""
    baseline: Literal["others", "greedy"] = "others"
    """What a sampled caption must beat in self-critical training: the mean of the picture's other samples, or its
    greedy caption."""
    reward: Literal["cider_d", "pac_s", "mix"] = "cider_d"
    """What self-critical training raises: CIDEr-D; PAC-S, with pac; or mix, their sum. PAC-S alone reads no references and
    drifts from how people write."""
    pac: str | None = None
    """Weights of PAC-S for the reward: a folder or Hub name of a CLIP in safetensors, as transformers has them."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices inside the layers with AdamW for the rest."""
    encoder_learning_rate: float | None = None
    """The same for the encoder alone (default: learning_rate)."""
    decoder_learning_rate: float | None = None
    """The same for the decoder without what joins it to the encoder (default: learning_rate)."""
    layer_decay: float = 1.0
    """Factor of the learning rate from a layer to the one below it, in encoder and decoder."""
    freeze: tuple[Literal["encoder", "decoder", "new"], ...] = ()
    """Parts that are left as they are; new is the cross-attention and the projection."""
    warmup_steps: int = 500
    """Steps in which the learning rate rises from zero (at most a tenth of the run)."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases, norms and embeddings have none."""
    gradient_clip: float = 1.0
    """Largest norm of the gradients."""
    overflow_limit: int = 20
    """Steps in a row whose fp16 gradients may overflow before the run stops."""
    ema: float = 0.0
    """Keep a running average of the weights with this decay, such as 0.999, and evaluate and save that (0: none)."""
    word_dropout: float = 0.0
    """Share of the words that the decoder reads as blanks while it learns, so that it must look at the picture."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over the whole vocabulary."""


@dataclass(kw_only=True)
class Adapters:
    """Learning a little of a large pretrained model."""

    lora: bool = False
    """Leave the pretrained weights as they are and learn adapters of low rank on some layers (LoRA, Hu et al. 2021,
    arXiv:2106.09685), and whatever is new in full."""
    qlora: bool = False
    """The same with the pretrained layers kept in 4 bits (NF4, doubly quantized: QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314), where bitsandbytes can."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """What an adapter adds is multiplied by this over its rank."""
    lora_dropout: float = 0.05
    """Dropout of what an adapter reads."""
    lora_targets: str = r"encoder\.blocks\.\d+\.qkv|decoder\.blocks\.\d+\.attn\.c_attn|decoder\.body\..*"
    """Which pretrained linear layers get one: a regular expression for their whole names (default: queries, keys and
    values of the encoder and of GPT-2, every layer of another language model)."""
    merge: bool = False
    """Save the finished model whole, its adapters merged into the pretrained weights, instead of them alone."""


@dataclass(kw_only=True)
class Speed:
    """Time and memory."""

    compile: bool | None = None
    """Compile the training step with torch.compile (default: in a long run on a GPU, unless adapters or a language model
    learn). A run that goes on then agrees only to rounding: other kernels may serve."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: slower, less memory."""
    shard: bool = False
    """Spread weights, gradients and moments of a model with another decoder over torchrun's processes (FSDP2); they are
    whole on each only while captions or checkpoints are written."""
    flash_attention: bool = True
    """Use the flash_attn package where it is installed and can serve."""


@dataclass(kw_only=True)
class Watching:
    """What is looked at, kept and told on the way."""

    eval_interval: int = 500
    """Steps between sample captions for a fixed set of pictures."""
    val_pictures: int = 1000
    """Validation pictures that are captioned at every epoch's end, greedily, for CIDEr-D: by it the best checkpoint is
    chosen (below 200, where it is mostly chance, by the validation loss; 0: none)."""
    patience: int | None = None
    """Stop after so many epochs without a better one (default: never)."""
    caption_length: int = LONGEST
    """Longest caption to write when evaluating, in tokens."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints (default: one at every epoch's end)."""
    checkpoint_minutes: float = 30.0
    """Minutes after which a checkpoint is written between two others, without an evaluation; 0: not by time."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, beside the best one."""
    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    """Weights & Biases. auto: online where a key is there, else off."""
    wandb_project: str = "vit-gpt2-captioning"
    """Its project."""
    no_upload: bool = False
    """Do not ask at the end, on a terminal, whether to publish the model."""
    yes: bool = False
    """Answer yes to every question, such as the one before a large download."""
    debug: bool = False
    """Show tracebacks of errors."""


@dataclass(kw_only=True)
class TrainConfig(
    Watching, Speed, Adapters, Learning, Start, Data, Basics
):  # dataclass takes the last one's fields first
    """A run. Every field is a flag of main.py."""

    augmentation: Augmentation = field(default_factory=Augmentation)
    """What happens to training pictures."""
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
                raise UserError("baseline others compares a picture's captions: use --captions-per-image 2 or more")
        elif self.reward != "cider_d":
            raise UserError(f"reward {self.reward} is for self-critical training: add --objective scst")
        if (self.reward != "cider_d") != (self.pac is not None):
            raise UserError("reward pac_s and mix, and nothing else, need PAC-S's weights: name them with --pac")
        started = {"encoder": self.init_encoder, "decoder": self.init_decoder or self.decoder, "new": None}
        for part in self.freeze:
            if not (self.init_model or started[part] or (self.init == "pretrained" and part != "new")):
                raise UserError(
                    f"freeze {part}: it would stay as random as it begins, so name what it is to start from"
                )
        if self.init_model and (self.init != "scratch" or self.init_encoder or self.init_decoder):
            raise UserError("init_model is a whole model: leave init, init_encoder and init_decoder out")
        if self.decoder and (self.init_decoder or self.init_model):
            raise UserError("decoder is what init_decoder and init_model name in other ways: leave them out")
        if self.adapts and not (
            self.init_model or self.init == "pretrained" or (self.init_encoder and (self.init_decoder or self.decoder))
        ):
            raise UserError("lora and qlora adapt a pretrained model: add --init pretrained, or --init-model")
        if self.prompt and self.init_model:
            raise UserError("init_model brings its own prompt: leave prompt out")
        try:
            re.compile(self.lora_targets)
        except re.error as error:
            raise UserError(f"lora_targets {self.lora_targets!r} is no regular expression: {error}") from error
        if self.merge and not self.adapts:
            raise UserError("merge has no effect without adapters: add --lora or --qlora, or leave it out")
        if self.compile and self.qlora:
            raise UserError("compile is not for qlora, whose layers no graph can hold: leave one of them out")
        if self.shard and (self.qlora or self.compile or self.optimizer != "adamw" or self.objective == "scst"):
            raise UserError(
                "shard is for adamw and cross_entropy without qlora and compile: leave it out, or change those"
            )
        if self.cache_on_gpu and not self.augmentation.moves_pixels_only:
            raise UserError("cache_on_gpu crops and mirrors only: leave it out, or the other kinds of augmentation")
        shares = "word_dropout label_smoothing max_bad_share ema lora_dropout"
        check_fields(self, shares, lambda x: 0 <= x < 1, "at least 0 and below 1")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        values = dataclasses.asdict(self) | {"model": self.model.to_dict()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @property
    def adapts(self) -> bool:
        """Whether the run learns adapters."""
        return self.lora or self.qlora

    @property
    def learned_from(self) -> dict[str, Any]:
        """The settings that decide what a run learns, as JSON gives them back; where it writes and what it prints does not
        count."""
        elsewhere = (
            "output_dir resume yes debug num_workers eval_interval keep_checkpoints checkpoint_interval checkpoint_minutes "
            "cache cache_on_gpu max_bad_share allow_overlap no_upload base_dir merge wandb wandb_project shard"
        )
        values = {name: value for name, value in self.to_dict().items() if name not in elsewhere.split()}
        values["compile"] = bool(self.compile)  # as it was before the device decided
        if self.encoder_layer == -1:  # as in a run that version 0.1 began
            del values["encoder_layer"]
        if self.reward == "cider_d":
            del values["reward"], values["pac"]
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]

    @property
    def fingerprint(self) -> str:
        """Equal for two configs whose runs learn the same."""
        values = self.learned_from
        if self.lora_targets == Adapters.lora_targets:  # as it was: a run that goes on keeps the layers it began with
            values["lora_targets"] += r"\.[qkv]_proj"
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def sizes(encoder: tuple[int, int, int], decoder: tuple[int, int, int], **others: Any) -> ViTGPT2Config:
    """A model whose encoder and decoder each have this width, so many layers and so many heads."""
    for part, numbers in (("vision", encoder), ("decoder", decoder)):
        others |= zip((f"{part}_embed_dim", f"{part}_num_layers", f"{part}_num_heads"), numbers, strict=True)
    return ViTGPT2Config(**others)


PRESETS = {
    "coco": TrainConfig(),
    # Drawn scenes, minutes on two CPU cores. Muon learns them in a third of AdamW's steps: EXPERIMENTS.md. The best
    # checkpoint has the lowest loss: CIDEr-D is about which of five phrasings is chosen, and once preferred a worse one.
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
    # Real photographs from scratch, half an hour on two CPU cores.
    "flickr8k": TrainConfig(
        preset="flickr8k",
        dataset="flickr8k",
        tokenizer="train",
        epochs=12,
        batch_size=32,
        optimizer="muon",
        learning_rate=2e-3,
        warmup_steps=100,
        weight_decay=0.05,
        word_dropout=0.1,
        augmentation=Augmentation(flip=0.5),
        model=sizes((192, 6, 3), (192, 4, 3), image_size=128, resize_size=144, vocab_size=4096, max_length=64),
    ),
}
