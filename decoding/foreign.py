"""Load untrusted models through transformers: pass on only config fields that describe layers, none that name code, and
build no model that is larger than the file's tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config import UserError
from utils import first_line, json_of, shown

# Config fields that are dropped: they name code, kernels to download, files or other models, set how weights are packed
# or distributed over devices, or make a list that may fill memory.
NOT_TAKEN = set(
    [
        "architectures",
        "attn_implementation",
        "auto_map",
        "base_model_name_or_path",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "device",
        "device_map",
        "distributed_config",
        "dtype",
        "experts_implementation",
        "id2label",
        "kernel_config",
        "label2id",
        "max_memory",
        "name_or_path",
        "num_labels",
        "pruned_heads",
        "quantization_config",
        "torch_dtype",
        "torchscript",
        "tp_plan",
        "trust_remote_code",
        "use_kernels",
    ]
)
MOST_LAYERS = 1000


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn any error of transformers, tokenizers and their clients into a UserError that starts with `what`.

    This includes panics of tokenizers, which are not subclasses of Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({first_line(error)})") from error


def plain(about: Any) -> Any:
    """Remove the fields NOT_TAKEN and private ones from a config, at any depth. Raises UserError if it has more layers
    than MOST_LAYERS."""
    if isinstance(about, list):
        return [plain(value) for value in about]
    if not isinstance(about, dict):
        return about
    for name, value in about.items():
        # Checked here because some configs make a list of that length before any layer is built.
        if name.endswith(("layer", "layers")) and isinstance(value, int | float) and value > MOST_LAYERS:
            raise UserError(f"{name} is {value}: no model has so many layers")
    return {name: plain(value) for name, value in about.items() if not (name.startswith("_") or name in NOT_TAKEN)}


def their_config(text: str, kinds: Container[str]) -> Any:
    """Make transformers' config from a config.json's text if its model_type is one of `kinds`. May raise any error."""
    from transformers import AutoConfig

    about = json_of(text)
    if (kind := str(about.get("model_type"))) not in kinds:
        why = "needs code from its repository, which is never run" if "auto_map" in about else "is not supported"
        raise UserError(f"model_type {shown(kind)[:40]} {why}")
    if about.get("quantization_config"):
        raise UserError("its weights are quantized: name the model before quantization")
    return AutoConfig.for_model(**plain(about))


def check_ids(text: str) -> None:
    """Raise UserError if a token id in a tokenizer.json or a vocab.json is so high that a list of all ids would fill
    memory."""
    about = json_of(text)
    if isinstance(about.get("model"), dict):  # in a vocab.json "model" is an ordinary token
        about = about["model"].get("vocab")
    highest = max(about.values(), default=0) if isinstance(about, dict) else 0
    if highest > 1 << 22:
        raise UserError(f"a token has the id {highest}: no vocabulary is so large")


@contextlib.contextmanager
def no_larger(shapes: Iterable[Sequence[int]]) -> Iterator[None]:
    """Context in which models are built on the meta device. Raises UserError as soon as one is larger than tensors of
    these shapes can fill.

    The limits leave room for weights that are registered twice, as a tied head is, and for a tensor of the file that
    becomes several.
    """
    import torch
    from torch.nn.modules import module

    sizes = [torch.Size(shape).numel() for shape in shapes]
    tensors, numbers = 4 * len(sizes) + 64, 2 * sum(sizes) + (1 << 24)

    def register(owner: Any, name: str, tensor: Any) -> None:
        nonlocal tensors, numbers
        if tensor is not None and tensor.is_meta:  # another thread may build a model with real tensors
            tensors, numbers = tensors - 1, numbers - tensor.numel()
            if min(tensors, numbers) < 0:
                raise UserError("its config describes a larger model than its weights")

    hooks = [module.register_module_parameter_registration_hook(register)]
    hooks.append(module.register_module_buffer_registration_hook(register))
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def load_theirs(auto: Any, folder: Path, kinds: Container[str]) -> tuple[Any, list[str]]:
    """Load a model in fp32 with one of transformers' Auto classes; also return the names of the tensors it does not
    use. Runs no code from the folder. May raise any error; raises UserError if tensors are missing."""
    import torch
    from safetensors import safe_open

    if (folder / "adapter_config.json").exists():  # transformers would download their base model
        raise UserError("these are adapters of peft: merge them into their model first, and name that")
    config = their_config((folder / "config.json").read_text(encoding="utf-8-sig"), kinds)
    shapes: list[Sequence[int]] = []
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  # not a dict
    if shapes:  # if there are none, from_pretrained says what is missing
        with no_larger(shapes):
            auto.from_config(config, trust_remote_code=False)
    options = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    with _without_bar():
        model, found = auto.from_pretrained(folder, config=config, dtype=torch.float32, **options)
    if missing := sorted(found["missing_keys"]):  # transformers would use random ones
        raise UserError(f"{len(missing)} weights are missing, for example {missing[0]}")
    return model, sorted(found["unexpected_keys"])


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Hide transformers' bar for a file's tensors; downloads keep theirs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
