"""Write the code with which transformers loads a model with a prefix, for which it has no class (trust_remote_code).

    AutoModel.from_pretrained(folder, trust_remote_code=True).generate(pixel_values, max_new_tokens=32, num_beams=3)

`save_pretrained` calls write_remote_code. It writes one file with the code for captioning from config.py,
decoding/cache.py, model.py and decoding/search.py, followed by a thin PreTrainedModel. One file, because transformers
takes a module that such a file imports for a package to install. The source files are read as text, not imported.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from utils import module_file, write_json, write_text
from weights.file import MODEL_FILE, Saved, gpt2_tokenizer
from weights.huggingface import their_files

MODULE = "modeling_img2gpt"
SOURCES: dict[str, tuple[str, ...]] = {"config": ("UserError", "check_fields", "check_numbers", "ViTGPT2Config")}
SOURCES["config"] += ("FILLED_IN", "NEWER", "CHOICES")
SOURCES |= dict.fromkeys(("decoding.cache", "model", "decoding.search"), ())  # (): all of it
# Functions that a PreTrainedModel does not call: they read and write this project's files, or make fast copies.
SKIPPED = {"fast_copy", "own_state", "load_own_state", "saved", "from_saved", "save_file", "save_pretrained"}
SKIPPED |= {"from_pretrained"}

THIN = '''
def fast_copy(model, int8, rows):
    """Return the model itself: only the full project has copies with packed weights or recorded steps."""
    if int8:
        raise UserError("int8 is not available here")
    return model


class Img2GPTConfig(PreTrainedConfig):
    """Holds ViTGPT2Config's fields as `captioner`."""

    model_type = "img2gpt"

    def __init__(self, captioner=None, **kwargs):
        self.captioner = captioner or {}
        super().__init__(**kwargs)


class Img2GPTModel(PreTrainedModel):
    """Captions pictures that the folder's image processor has prepared."""

    config_class, base_model_prefix, main_input_name = Img2GPTConfig, "captioner", "pixel_values"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.captioner = ImageCaptionModel(ViTGPT2Config.from_dict(config.captioner))
        self.post_init()

    def _init_weights(self, module):
        """Set the buffers that no file has: the colours' mean and standard deviation, and rotary positions."""
        if isinstance(module, VisionTransformer):
            for buffer, values in ((module.mean, module.config.image_mean), (module.std, module.config.image_std)):
                buffer.copy_(torch.tensor(values).view(3, 1, 1))
            if module.turns is not None:
                side, size = module.config.image_size // module.config.patch_size, module.turns.shape[-1]
                module.turns.copy_(rotary_turns(side, size))

    def forward(self, pixel_values, input_ids, labels=None, lengths=None):
        """Call ImageCaptionModel: labels are aligned with input_ids, -100 where there is no target."""
        return self.captioner(pixel_values, input_ids, lengths, labels)

    def generate(self, pixel_values, max_new_tokens=None, min_new_tokens=0, **options):
        """Generate token ids (N * num_return_sequences, L); the options are those of `generate` above."""
        if self.captioner._tokenizer is None and (isinstance(options.get("prefix"), str) or "bad_words" in options):
            self.captioner.tokenizer = AutoTokenizer.from_pretrained(self.config.name_or_path)
        options |= {"max_length": max_new_tokens, "min_length": min_new_tokens}
        return self.captioner.generate(pixel_values, **options).sequences


Img2GPTConfig.register_for_auto_class()
Img2GPTModel.register_for_auto_class("AutoModel")
'''


def write_remote_code(saved: Saved, folder: Path) -> None:
    """Write the files beside the model file: the code, config.json, image processor and tokenizer."""
    files = their_files(saved.config, saved.tokenizer or gpt2_tokenizer())
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        write_json(folder / name, files[name])
    about: dict[str, Any] = {"architectures": ["Img2GPTModel"], "model_type": "img2gpt"}
    about |= {"auto_map": {"AutoConfig": f"{MODULE}.Img2GPTConfig", "AutoModel": f"{MODULE}.Img2GPTModel"}}
    about |= {"transformers_weights": MODEL_FILE, "captioner": saved.config.to_dict()}
    about["dtype"] = str(saved.tensors["decoder.wte.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", about)
    write_text(folder / f"{MODULE}.py", remote_code())


def remote_code() -> str:
    """The source code of the module."""
    imports: list[ast.Import | ast.ImportFrom] = []
    bodies: list[str] = []
    for name, wanted in SOURCES.items():
        text = module_file(name).read_text(encoding="utf-8")
        lines = text.splitlines()
        dropped: set[int] = set()
        for node in ast.walk(tree := ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and is_ours(node.module):
                dropped |= lines_of(node)  # all the code is in one file
            elif isinstance(node, ast.FunctionDef) and node.name in SKIPPED:
                dropped |= lines_of(node)
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                if getattr(node, "module", None) != "__future__" and not is_ours(getattr(node, "module", None)):
                    imports.append(node)
            elif isinstance(node, ast.If) or (isinstance(node, ast.Expr) and node is tree.body[0]):
                continue  # imports for type checkers, and the docstring
            elif not wanted or name_of(node) in wanted:
                bodies.append("\n".join(lines[n - 1] for n in sorted(lines_of(node) - dropped)))
    head = f'"""{MODULE}: generated by weights/remote.py of this model\'s project. Do not edit."""'
    bodies = [*filter(str.strip, bodies), THIN.strip()]
    body = "\n\n\n".join(bodies)
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    needed = {
        f"{f'from {node.module} ' if isinstance(node, ast.ImportFrom) else ''}import {ast.unparse(alias)}"
        for node in imports
        for alias in node.names
        if (alias.asname or alias.name) in used
    }
    theirs = "from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel"
    return "\n".join([head, "from __future__ import annotations", *sorted(needed), theirs, "", "", body, ""])


def name_of(node: Any) -> str | None:
    """The name that a statement defines: of a function, of a class, or of a variable that it assigns."""
    target = [*getattr(node, "targets", ()), getattr(node, "target", None)][0]
    return getattr(node, "name", None) or getattr(target, "id", None)


def is_ours(module: str | None) -> bool:
    """Whether a module belongs to this project."""
    return module is not None and module_file(module).is_file()


def lines_of(node: Any) -> set[int]:
    """The line numbers of a node, decorators included."""
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return set(range(first, node.end_lineno + 1))
