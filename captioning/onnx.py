"""Export a model to ONNX files, for onnxruntime anywhere and transformers.js in a browser or Node.

    python convert.py onnx vit-gpt2-captioning.safetensors my-captioner-onnx

torch's exporter needs onnx and onnxscript; 8-bit files also need onnxruntime (requirements/onnx.txt). The folder is the
one that `convert.py to-transformers` writes, with onnx/ instead of the weights; transformers.js expects these names.

The encoder returns what the decoder needs of a picture: each layer's cross-attention keys and values, concatenated, so
that no token computes them again. They are named last_hidden_state and encoder_hidden_states, because a runtime passes
the one on as the other without reading it. The decoder takes any number of tokens, with or without a past.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from model import DecoderBlock, ImageCaptionModel
from utils import new_folder
from weights.huggingface import MARKER, WEIGHTS, WRITTEN, write_their_files

OPSET = 20  # supported by the runtimes of the last two years
ENCODER, DECODER = "encoder_model", "decoder_model_merged"  # transformers.js expects these names


def save_onnx(model: ImageCaptionModel, directory: str | os.PathLike[str], int8: bool = False) -> None:
    """Write the folder; int8 adds files with 8-bit weights, whose names end in _quantized.

    Raises UserError where a package is missing, or where the folder must not be written (see utils.new_folder).
    """
    if model.config.bridge != "cross_attention":
        raise UserError("ONNX files need a model with cross-attention: this one reads a prefix")
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if int8 else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX files need {', '.join(missing)}: pip install -r requirements/onnx.txt")
    with new_folder(directory, [*(name for name in WRITTEN if name != WEIGHTS), "onnx"], MARKER) as folder:
        write_their_files(model.saved(), folder)  # first, as it fails where the tokenizer is missing
        (folder / "onnx").mkdir()
        export(model, folder / "onnx")
        if int8:
            for name in (ENCODER, DECODER):
                quantize(folder / "onnx" / f"{name}.onnx", folder / "onnx" / f"{name}_quantized.onnx")


class PictureEncoder(nn.Module):
    """pixel_values (N, 3, S, S), normalised -> the pictures' keys and values, (N, P + 1, layers * 2 * D)."""

    def __init__(self, model: ImageCaptionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        hidden = self.model.encode(pixel_values)
        return torch.cat([layer.c_attn(hidden) for layer in self.model.decoder.cross_attentions()], -1)


class TokenDecoder(nn.Module):
    """Logits of the next token from some tokens, the pictures' keys and values, and the text's past keys and values."""

    def __init__(self, model: ImageCaptionModel) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """input_ids (N, T); encoder_hidden_states, the output of PictureEncoder; past: keys and values of each layer,
        (N, H, P, D/H) each -> logits of the next token, (N, 1, V), and the past with these tokens."""
        decoder, length, before = self.decoder, input_ids.shape[1], past[0].shape[2]
        positions = torch.arange(length, device=input_ids.device) + before
        x = decoder.wte(input_ids) + decoder.wpe(positions)
        future = torch.arange(before + length, device=input_ids.device) > positions.unsqueeze(-1)  # (T, P + T)
        hidden = torch.where(future, float("-inf"), 0.0)
        pictures = encoder_hidden_states.chunk(2 * len(decoder.blocks), -1)
        present: list[Tensor] = []
        for index, block in enumerate(decoder.blocks):
            assert isinstance(block, DecoderBlock)
            attention, cross, heads = block.attn, block.crossattention, block.attn.num_heads
            query, key, value = (split(part, heads) for part in attention.c_attn(block.ln_1(x)).chunk(3, -1))
            key = torch.cat([past[2 * index], key], 2)
            value = torch.cat([past[2 * index + 1], value], 2)
            present += [key, value]
            x = x + attention.c_proj(attend(query, key, value, hidden))
            query = split(cross.q_attn(block.ln_cross_attn(x)), heads)
            key, value = (split(part, heads) for part in pictures[2 * index : 2 * index + 2])
            x = x + cross.c_proj(attend(query, key, value))
            x = x + block.c_proj(F.gelu(block.c_fc(block.ln_2(x)), approximate="tanh"))
        return decoder.head(decoder.ln_f(x[:, -1:])), *present


def split(x: Tensor, heads: int) -> Tensor:
    """(N, T, D) -> (N, H, T, D/H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention (N, H, T, D/H) -> (N, T, D), in plain matrix products, which every runtime supports."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def export(model: ImageCaptionModel, folder: Path) -> None:
    """Write encoder_model.onnx and decoder_model_merged.onnx, in fp32."""
    config, layers = model.config, model.config.decoder_num_layers
    model = copy.deepcopy(model).float().cpu().eval()
    pixels = torch.zeros(2, 3, config.image_size, config.image_size)
    heads = config.decoder_num_heads
    past = [torch.zeros(2, heads, 3, config.decoder_embed_dim // heads) for _ in range(2 * layers)]  # not one, repeated
    names = [f"{n}.{part}" for n in range(layers) for part in ("key", "value")]
    # transformers.js finds the batch dimension by this name when it makes the first, empty past.
    batch, tokens, before = (torch.export.Dim(name) for name in ("batch_size", "tokens", "past_tokens"))
    with torch.no_grad():
        encoder = PictureEncoder(model).eval()
        to_file(encoder, {"pixel_values": (pixels, {0: batch})}, ["last_hidden_state"], folder / f"{ENCODER}.onnx")
        inputs = {
            "input_ids": (torch.zeros(2, 4, dtype=torch.int64), {0: batch, 1: tokens}),
            "encoder_hidden_states": (encoder(pixels), {0: batch}),
            "past": (past, [{0: batch, 2: before}] * len(past)),
        }
        to_file(
            TokenDecoder(model).eval(),
            inputs,
            ["logits", *(f"present.{name}" for name in names)],
            folder / f"{DECODER}.onnx",
            ["input_ids", "encoder_hidden_states", *(f"past_key_values.{name}" for name in names)],
        )


def to_file(
    module: nn.Module,
    inputs: dict[str, tuple[Any, Any]],
    outputs: list[str],
    path: Path,
    names: list[str] | None = None,
) -> None:
    """Export a module with torch. inputs: argument -> (an example, its dimensions that vary); names: the file's inputs,
    where they differ from the arguments."""
    examples, dynamic = zip(*inputs.values(), strict=True)
    with quiet():
        torch.onnx.export(
            module,
            examples,
            path,
            input_names=names or list(inputs),
            output_names=outputs,
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
        )
    drop_origins(path)


def drop_origins(path: Path) -> None:
    """Remove the origin of each node from a file: the exporter writes stack traces, with this machine's paths."""
    import onnx

    model = onnx.load(path)
    graphs = [model.graph, *model.functions]
    parts = [part for graph in graphs for part in (*graph.node, *graph.value_info)]
    parts += [*model.graph.input, *model.graph.output, *model.graph.initializer]
    for part in (model, *graphs, *parts):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    onnx.save(model, path)


def quantize(source: Path, target: Path) -> None:
    """Write the same graph with 8-bit weights, a scale for each output; activations are rounded at run time.

    Weights use 7 of their 8 bits: a CPU without VNNI adds two products in 16 bits, where two large ones overflow.
    """
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    with quiet():
        quant_pre_process(source, target, skip_symbolic_shape=True)  # transposes the head's weights in the file
        kinds = ["MatMul", "Gather"]
        quantize_dynamic(target, target, kinds, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress and their warnings about each other."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
