"""Read and write transformers' folders: configs and tensors of VisionEncoderDecoder, and of its ViT and GPT-2.

It uses the tensor names that transformers writes to disk, and loads a folder completely or raises an error: it checks
every name and shape, and whether this model can represent the config. Pickles are read only on request.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from config import LONGEST, NUM_BEAMS, UserError, ViTGPT2Config
from utils import first_line, hub_folder, json_of, new_folder, one_line, some, write_json
from weights.file import (
    METADATA_KEY,
    Saved,
    check_shapes,
    gpt2_tokenizer,
    keys_from_text,
    keys_to_text,
    lfs_advice,
    plain_names,
    tokenizer_from_json,
    write_tensors,
)
from weights.vision import (
    Name,
    Source,
    as_ours,
    as_theirs,
    family_named,
    prefix_of,
    require,
    split_off,
    square,
    their_fields,
    vision_fields,
    vision_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
PICKLES = [f"{PICKLE}*", "pytorch_model-*.bin"]
SAFELY = "name one with safetensors, or write it again with transformers (from_pretrained, then save_pretrained)"
MARKER = f"{METADATA_KEY}.json"  # metadata unknown to transformers; it shows that this project wrote the folder
WRITTEN = [MARKER, WEIGHTS, "config.json", "generation_config.json", "preprocessor_config.json"]
WRITTEN += ["tokenizer.json", "tokenizer_config.json"]
WANTED = [*WRITTEN, "processor_config.json", "vocab.json", "merges.txt", f"{WEIGHTS}.index.json", "model-*.safetensors"]

# Our config fields, with transformers' name and default for each.
GPT2_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 50257),
    "max_length": ("n_positions", 1024),
    "decoder_embed_dim": ("n_embd", 768),
    "decoder_num_layers": ("n_layer", 12),
    "decoder_num_heads": ("n_head", 12),
    "dropout": ("resid_pdrop", 0.1),
}
# Settings that change what the weights compute, with the values that this model supports, transformers' default first.
GPT2_SETTINGS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "cross_attention_hidden_size": (None,),
}

RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
UNUSED = r"(^|\.)(attn|crossattention)\.(masked_)?bias$"  # GPT-2's causal masks: captions do not depend on them
# A layer's modules: our name, theirs, and its outputs and inputs as multiples of the width (a norm has no inputs).
GPT2_LAYER: dict[str, tuple[str, tuple[int, ...]]] = {
    **{name: (name, (1,)) for name in ("ln_1", "ln_cross_attn", "ln_2")},
    **{f"attn.{name}": (f"attn.{name}", shape) for name, shape in (("c_attn", (3, 1)), ("c_proj", (1, 1)))},
    "crossattention.q_attn": ("crossattention.q_attn", (1, 1)),
    "crossattention.c_attn": ("crossattention.c_attn", (2, 1)),
    "crossattention.c_proj": ("crossattention.c_proj", (1, 1)),
    "c_fc": ("mlp.c_fc", (4, 1)),
    "c_proj": ("mlp.c_proj", (1, 4)),
}


def tensor_names(config: ViTGPT2Config, vit: str = "encoder.", gpt2: str = "decoder.transformer.") -> Iterator[Name]:
    """The names of every tensor of the model; vit and gpt2 are the prefixes of transformers' names."""
    D, W = config.vision_embed_dim, config.decoder_embed_dim
    modules = [Name("decoder.ln_f", (f"{gpt2}ln_f",), (W,))]
    if D != W:
        modules.append(Name("enc_to_dec_proj", ("enc_to_dec_proj",), (W, D)))
    for n in range(config.decoder_num_layers):
        for name, (t, times) in GPT2_LAYER.items():
            if config.bridge == "cross_attention" or "cross" not in name:
                shape = tuple(W * t for t in times)
                modules.append(Name(f"decoder.blocks.{n}.{name}", (f"{gpt2}h.{n}.{t}",), shape, len(shape) == 2))
    yield from vision_names(config, vit)
    yield Name("decoder.wte.weight", (f"{gpt2}wte.weight",), (config.vocab_size, W))
    yield Name("decoder.wpe.weight", (f"{gpt2}wpe.weight",), (config.max_length, W))
    for ours, theirs, shape, transposed, _ in modules:
        yield Name(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), shape, transposed)
        yield Name(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs), shape[:1])


def rename(state: dict[str, Tensor], names: list[Name]) -> dict[str, Tensor]:
    """Convert our tensors to those of transformers; those that are not transposed share memory with ours."""
    return {
        theirs: (part.mT if name.transposed else part.reshape(name.flat or part.shape)).contiguous()
        for name in names
        for theirs, part in zip(name.theirs, state[name.ours].chunk(len(name.theirs)), strict=True)
    }


def take(path: Path, weights: dict[str, Tensor], names: list[Name]) -> dict[str, Tensor]:
    """Convert transformers' tensors to ours. Raises UserError unless they have exactly these names and shapes."""
    blank = {name.ours: torch.empty(name.shape, device="meta") for name in names}
    check_shapes(path, rename(blank, names), weights)
    joined = {name: torch.cat([weights[theirs] for theirs in name.theirs]) for name in names}
    return {n.ours: tensor.mT if n.transposed else tensor.reshape(n.shape) for n, tensor in joined.items()}


# Writing


def write_transformers(saved: Saved, directory: Source) -> None:
    """Write a folder for transformers' AutoModelForImageTextToText, AutoImageProcessor and AutoTokenizer.

    Raises UserError if the folder must not be overwritten (see utils.new_folder), or if there is no tokenizer and
    GPT-2's is not available.
    """
    config = saved.config
    if config.bridge != "cross_attention":
        raise UserError("transformers' VisionEncoderDecoder has no prefix: this model cannot be converted")
    weights = rename({name: t.detach().cpu() for name, t in saved.tensors.items()}, list(tensor_names(config)))
    as_theirs(config, "encoder.", weights)
    with new_folder(directory, WRITTEN, MARKER) as folder:
        write_tensors(weights, folder / WEIGHTS, {"format": "pt"})
        write_their_files(saved, folder)


def write_their_files(saved: Saved, folder: Path) -> None:
    """Write the files beside the weights: config, processor, tokenizer, and metadata unknown to transformers."""
    contents = their_files(saved.config, saved.tokenizer or gpt2_tokenizer())
    contents["config.json"]["dtype"] = str(saved.tensors["decoder.wte.weight"].dtype).removeprefix("torch.")
    contents[MARKER] = {"trained_on": keys_to_text(saved.trained_on)}
    for name, content in contents.items():
        write_json(folder / name, content)


def their_files(config: ViTGPT2Config, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, Any]]:
    """The contents of a transformers folder's JSON files, by name."""
    start, end, pad = config.start_token_id, config.end_token_id, config.pad_token_id
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad}
    decoder = {name: allowed[0] for name, allowed in GPT2_SETTINGS.items()} | ids
    decoder |= {theirs: getattr(config, ours) for ours, (theirs, _) in GPT2_FIELDS.items()}
    decoder |= {"n_inner": None, "embd_pdrop": config.dropout, "attn_pdrop": 0.0}
    decoder |= {"is_decoder": True, "add_cross_attention": True}
    crops = config.resize_size != config.image_size
    processor = {
        # In transformers 4 ViT's processor cannot crop, DeiT's can.
        "image_processor_type": "DeiTImageProcessor" if crops else "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.resize_size, "width": config.resize_size},
        "resample": RESAMPLING[config.resample],
        "do_center_crop": crops,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
    }
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    words_of = tokenizer.convert_ids_to_tokens
    tokens = {"bos_token": words_of(start), "eos_token": words_of(end), "pad_token": words_of(pad)}
    return {
        "config.json": {
            "architectures": ["VisionEncoderDecoderModel"],
            "model_type": "vision-encoder-decoder",
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,  # between encoder and decoder; the head is tied in the decoder's config
            "decoder_start_token_id": start,
            "encoder": their_fields(config) if config.bridge == "cross_attention" else {},  # see remote.py for a prefix
            "decoder": decoder,
            **ids,
        },
        "generation_config.json": {
            "decoder_start_token_id": start,
            "max_new_tokens": min(LONGEST, config.max_length),
            "num_beams": NUM_BEAMS,
            **ids,
        },
        "preprocessor_config.json": processor,
        "tokenizer.json": words,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",  # in transformers 4 and 5
            "model_max_length": config.max_length,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": (words["pre_tokenizer"] or {}).get("add_prefix_space", False),  # 4 reads only this
            **tokens,
        },
    }


# Reading


def read_transformers(source: Source, allow_pickle: bool = False) -> Saved:
    """Read a captioner from a folder or a Hub repository that transformers (4 or 5) wrote.

    Prints on standard error which tensors were skipped. A pytorch_model.bin is read only with allow_pickle. Raises
    UserError, one line, for what this model cannot represent and for files that do not fit together.
    """
    folder = find_folder(source, WANTED)
    about, marker, processor = read_json(folder, "config.json"), read_json(folder, MARKER), read_processor(folder)
    require(source, "", {"model_type": None} | about, {"model_type": ("vision-encoder-decoder",)})
    with one_line(source):
        encoder, decoder = about["encoder"], about["decoder"]
        require(source, "decoder.", decoder, {"add_cross_attention": (True,)})
        fields = vision_fields(source, "encoder.", encoder) | gpt2_fields(source, "decoder.", decoder)
        fields |= special_ids(source, read_json(folder, "generation_config.json"), about, decoder)
        fields |= picture_fields(source, processor, fields["image_size"])
        config = ViTGPT2Config.from_dict(fields)
        trained_on = keys_from_text(marker.get("trained_on", ""))
        family = family_named(source, "encoder.", encoder)
    advice = "if you trust it, python convert.py from-transformers --allow-pickle reads its tensors and nothing else"
    path, weights = read_weights(source, folder, allow_pickle, advice)
    untie(path, weights, "decoder.lm_head.weight", "decoder.transformer.wte.weight")
    unused = split_off(weights, "", f"{UNUSED}|{family.unused}")
    vit = prefix_of(family.patches, weights)
    as_ours(config, vit, weights)
    tokenizer = read_tokenizer(source, folder, config)
    if tokenizer is None and config.vocab_size != 50257:  # of this size, it is GPT-2's
        raise UserError(f"{source}: no tokenizer.json, and no vocab.json with merges.txt: add the tokenizer's files")
    ours = take(path, weights, list(tensor_names(config, vit)))
    if unused and not marker:  # in folders of this project unused tensors are expected
        print(f"{source}: {some(unused)} skipped, captions do not depend on them", file=sys.stderr)
    return Saved(config, ours, tokenizer, trained_on, path=path)


def find_folder(source: Source, wanted: list[str]) -> Path:
    """Return the folder, or a cached one with a Hub repository's wanted files. Raises UserError if there is neither."""
    path, name = Path(source), str(source)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"{name}: no such folder: name one that transformers wrote, or user/name on the Hugging Face Hub"
        )
    return hub_folder(name, wanted)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing, except for config.json. Raises UserError."""
    path = folder / name
    if not path.exists() and name != "config.json":
        return {}
    try:
        about = json_of(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): name a folder that transformers wrote") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({first_line(error)})") from error
    if not isinstance(about, dict):
        raise UserError(f"{path}: not a JSON object")
    return about


def read_processor(folder: Path) -> dict[str, Any]:
    """Read the picture preprocessing, which in some folders is inside processor_config.json; {} if there is none."""
    about = read_json(folder, "preprocessor_config.json")
    return about or read_json(folder, "processor_config.json").get("image_processor") or {}


def read_weights(
    source: Source, folder: Path, allow_pickle: bool = False, advice: str = SAFELY
) -> tuple[Path, dict[str, Tensor]]:
    """Read all tensors, from one file or from several with an index; also return the path to show in messages."""
    files = weight_files(folder, WEIGHTS)
    if not files and (folder / "onnx").is_dir():
        raise UserError(f"{source}: has ONNX files and no {WEIGHTS}: name the model they were made from")
    if not files and (instead := what_instead(folder)):
        raise UserError(f"{source}: no {WEIGHTS}: {instead}")
    if not files and not allow_pickle:
        why = f"a {PICKLE} is a pickle, which may run untrusted code when it is read"
        raise UserError(f"{source}: no {WEIGHTS}, and {why}: {advice}")
    if not files:
        folder = find_folder(source, PICKLES)
        files = weight_files(folder, PICKLE)
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            pickled = path.suffix == ".bin"
            weights |= torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        except Exception as error:  # damaged or hostile files raise SafetensorError, UnpicklingError, EOFError, ...
            fault = lfs_advice(path) or f"cannot be read as tensors ({first_line(error)})"
            raise UserError(f"{path}: {fault}") from error
    if not weights or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in weights.items()):
        raise UserError(f"{source}: no {WEIGHTS}, and no {PICKLE} with named tensors")
    return files[0] if len(files) == 1 else folder, plain_names(weights)


def what_instead(folder: Path) -> str:
    """What a folder without weights is, if users often mistake it for a model, and what to do; else an empty text."""
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{WEIGHTS}")]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
        return f"a trainer's folder, with weights only in its checkpoints: name {newest}"
    if (folder / "adapter_config.json").is_file():
        return "it has only adapters, as peft writes them: merge them into their model first (peft's merge_and_unload)"
    return ""


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file of that name, or the files listed in its index; [] if there is neither."""
    if (folder / name).is_file():
        return [folder / name]
    with one_line(folder / f"{name}.index.json"):
        shards = sorted(set(read_json(folder, f"{name}.index.json").get("weight_map", {}).values()))
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise UserError(f"the file {shard} that it lists is not beside it")
    return [folder / shard for shard in shards]


def read_tokenizer(source: Source, folder: Path, config: ViTGPT2Config) -> PreTrainedTokenizerFast | None:
    """Read the tokenizer from tokenizer.json, or from vocab.json and merges.txt; None if there is neither."""
    if words := read_json(folder, "tokenizer.json"):
        text = json.dumps(words)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        text = gpt2_tokenizer(str(folder)).backend_tokenizer.to_str()
    else:
        return None
    with one_line(source):
        tokenizer = tokenizer_from_json(text, config)
        if None in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
            ids = f"{config.start_token_id}, {config.end_token_id} or {config.pad_token_id}"
            raise UserError(f"its tokenizer has no token {ids}, with which captions start, end or are padded")
    return tokenizer


def gpt2_fields(source: Source, part: str, about: dict[str, Any]) -> dict[str, Any]:
    """Our config fields from a GPT-2's config."""
    require(source, part, about, GPT2_SETTINGS)
    fields = numbers(about, GPT2_FIELDS)
    require(source, part, about, {"n_inner": (None, 4 * fields["decoder_embed_dim"])})
    return fields


def numbers(about: dict[str, Any], names: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """Read our numeric fields by transformers' names. Raises TypeError for one that is not a number."""
    fields = {ours: about.get(theirs, default) for ours, (theirs, default) in names.items()}
    for ours, value in fields.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{names[ours][0]} is {value!r}")
    return fields


def special_ids(source: Source, *configs: dict[str, Any]) -> dict[str, int | None]:
    """The special tokens' ids, each from the first config that has it; newer folders use generation_config.json."""

    def first(name: str) -> int | None:
        value = next((config[name] for config in configs if config.get(name) is not None), None)
        if isinstance(value, list) and len(value) != 1:
            raise UserError(f"{source}: {name} is {value}, which this model cannot represent: only one id")
        return value[0] if isinstance(value, list) else value

    start = first("decoder_start_token_id")
    start = first("bos_token_id") if start is None else start
    return {"start_token_id": start, "end_token_id": first("eos_token_id"), "pad_token_id": first("pad_token_id")}


def picture_fields(source: Source, about: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Our fields from a preprocessor_config.json, which must produce pictures of image_size."""
    part = "preprocessor "
    require(source, part, about, {"do_resize": (True,), "do_rescale": (True,)})
    if not math.isclose(factor := about.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-4):
        raise UserError(f"{source}: {part}rescale_factor is {factor}, which this model cannot represent: only 1/255")
    kind = about.get("image_processor_type") or about.get("feature_extractor_type") or ""
    crops = about.get("do_center_crop", kind.startswith("DeiT"))
    resized = square(source, f"{part}size", about.get("size") or (256 if crops else 224))
    size = square(source, f"{part}crop_size", about.get("crop_size") or 224) if crops else resized
    if about and size != image_size:
        raise UserError(f"{source}: the preprocessor makes pictures of {size} pixels, the encoder takes {image_size}")
    return pixel_fields(source, about) | {"resize_size": resized if about else image_size}


def pixel_fields(
    source: Source, about: dict[str, Any], colours: Any = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
) -> dict[str, Any]:
    """Resampling, mean and standard deviation from a preprocessor_config.json; colours: default mean and deviation."""
    number = about.get("resample", RESAMPLING["bicubic"] if not about else RESAMPLING["bilinear"])
    names = [name for name, known in RESAMPLING.items() if known == number]
    if not names:
        raise UserError(f"{source}: resample {number} cannot be represented: only {RESAMPLING}")
    if not about.get("do_normalize", True):
        return {"resample": names[0], "image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    mean, std = (tuple(about.get(name) or c) for name, c in zip(("image_mean", "image_std"), colours, strict=True))
    return {"resample": names[0], "image_mean": mean, "image_std": std}


def untie(path: Path, weights: dict[str, Tensor], head: str, embedding: str) -> None:
    """Remove a head that is a copy of the embedding. Raises UserError if it differs."""
    stored = weights.pop(head, None)
    if stored is not None and not torch.equal(stored, weights.setdefault(embedding, stored)):
        raise UserError(f"{path}: {head} differs from {embedding}, and this model has one tensor for both")
