"""What of a stranger's model reaches transformers: of a config what describes layers and nothing that names code, and no
more of them than the file's tensors can fill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config import UserError
from utils import first_line, json_of, shown

# What names code, kernels to fetch, files or other models, says how weights are packed or spread, or fills a list.
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
    """Whatever transformers, tokenizers and their clients raise, as a UserError that begins so; tokenizers' panics too,
    which are no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({first_line(error)})") from error


def plain(about: Any) -> Any:
    """A config without what is not taken, at any depth. Raises UserError for more layers than any model has."""
    if isinstance(about, list):
        return [plain(value) for value in about]
    if not isinstance(about, dict):
        return about
    for name, value in about.items():
        # Some configs make a list of them, before there is a layer.
        if name.endswith(("layer", "layers")) and isinstance(value, int | float) and value > MOST_LAYERS:
            raise UserError(f"{name} is {value}, and no model has so many")
    return {name: plain(value) for name, value in about.items() if not (name.startswith("_") or name in NOT_TAKEN)}


def their_config(text: str, kinds: Container[str]) -> Any:
    """transformers' config of a config.json's text, where its model_type is one of these. Raises anything."""
    from transformers import AutoConfig

    about = json_of(text)
    if (kind := str(about.get("model_type"))) not in kinds:
        why = "needs code of its own, which is never run" if "auto_map" in about else "is none that will do"
        raise UserError(f"model_type {shown(kind)[:40]} {why}")
    if about.get("quantization_config"):
        raise UserError("its weights are quantized: name the model as it was before")
    return AutoConfig.for_model(**plain(about))


def check_ids(text: str) -> None:
    """Raises UserError where a tokenizer.json or a vocab.json numbers its words so high that a list of all fills memory."""
    about = json_of(text)
    if isinstance(about.get("model"), dict):  # in a vocab.json it is a word like any other
        about = about["model"].get("vocab")
    highest = max(about.values(), default=0) if isinstance(about, dict) else 0
    if highest > 1 << 22:
        raise UserError(f"a word has the number {highest}")


@contextlib.contextmanager
def no_larger(shapes: Iterable[Sequence[int]]) -> Iterator[None]:
    """Models are built without memory in here, and no further than tensors of these shapes can fill them: else UserError.

    A part may be there twice, as a tied head is, and a tensor of a file may stand for several.
    """
    import torch
    from torch.nn.modules import module

    sizes = [torch.Size(shape).numel() for shape in shapes]
    tensors, numbers = 4 * len(sizes) + 64, 2 * sum(sizes) + (1 << 24)

    def register(owner: Any, name: str, tensor: Any) -> None:
        nonlocal tensors, numbers
        if tensor is not None and tensor.is_meta:  # another thread may build a real one
            tensors, numbers = tensors - 1, numbers - tensor.numel()
            if min(tensors, numbers) < 0:
                raise UserError("it describes a larger model")

    hooks = [module.register_module_parameter_registration_hook(register)]
    hooks.append(module.register_module_buffer_registration_hook(register))
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def load_theirs(auto: Any, folder: Path, kinds: Container[str]) -> tuple[Any, list[str]]:
    """A model in fp32 by a class of transformers' that chooses by config.json, and the tensors that it has no place for.
    Runs none of the folder's code. Raises anything, also where tensors are missing or a part of the config's model."""
    import torch
    from safetensors import safe_open

    if (folder / "adapter_config.json").exists():  # whose base would be fetched
        raise UserError("these are adapters of peft: name a model that they are merged into")
    config = their_config((folder / "config.json").read_text(encoding="utf-8-sig"), kinds)
    shapes: list[Sequence[int]] = []
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118  # not a dict
    if shapes:  # else it says what is missing
        with no_larger(shapes):
            auto.from_config(config, trust_remote_code=False)
    options = {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    model, found = auto.from_pretrained(folder, config=config, dtype=torch.float32, **options)
    if missing := sorted(found["missing_keys"]):  # it would go on with random ones
        raise UserError(f"{len(missing)} weights are missing, {missing[0]} among them")
    return model, sorted(found["unexpected_keys"])
