"""Compute tokens with onnxruntime on a CPU: for a few rows its kernels read weights as fast as memory allows.

    engine = find_engine("int8")
    model.generate(pixel_values, int8=True, engine=engine)

A decoding step is a graph that is built here, in a second; nothing is exported or saved. torch encodes the pictures and
scores the finished captions. 8-bit weights have a scale for each block, and activations are rounded block by block, so
that no row depends on another. Needs onnx and onnxruntime (requirements/onnx.txt).
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.cache import DecoderCache
from utils import first_line

MOST_ROWS = 16
"""Captions at a time up to which these kernels are faster than torch's."""
CALLS = 8
"""Calls with so few captions after which the graph is built: from then on building it saves time."""
BLOCK = 128
"""Neighbouring weights of a row that share a scale."""
MOST_BYTES = 2_000_000_000
"""Limit of a graph's weights: protobuf allows 2 GiB."""

Engine = Callable[[Any, Any, int], Any]


@functools.cache
def find_engine(precision: str, after: int = CALLS) -> Engine | None:
    """The `engine` of model.generate, for fp32 and int8; None for other precisions, or where a package is missing."""
    if precision not in ("fp32", "int8") or any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxruntime")):
        return None
    return functools.partial(_decoder, int8=precision == "int8", after=after)


def _decoder(model: Any, fast: Any, rows: int, *, int8: bool, after: int) -> Any:
    """A decoder of the model for `rows` captions; the fast copy's decoder where onnxruntime would be no faster."""
    size = model.decoder.config.decoder_num_layers * 14 * model.decoder.config.decoder_embed_dim**2
    size = (size + model.decoder.wte.weight.numel()) * (1 if int8 else 4)
    if fast is model or rows > MOST_ROWS or model.config.bridge != "cross_attention" or size > MOST_BYTES:
        return fast.decoder
    made = model.copies.made  # the fast copy is cached here too, until the weights change
    made["calls"] = made.get("calls", 0) + 1
    if made["calls"] > after and "onnxruntime" not in made:
        try:
            made["onnxruntime"] = make_session(step_graph(model.decoder, int8))
        except Exception as error:  # a version without these operators, or out of memory
            print(f"onnxruntime cannot be used, continuing with torch ({first_line(error)})", file=sys.stderr)
            made["onnxruntime"] = None
    session = made.get("onnxruntime")
    return RuntimeDecoder(fast.decoder, session) if session else fast.decoder


def in_words(precision: str) -> str:
    """Which library computes tokens, and why: a line for the user."""
    if precision not in ("fp32", "int8"):
        return "torch"
    if find_engine(precision) is None:
        return "torch (pip install -r requirements/onnx.txt: onnxruntime is faster for a few captions at a time)"
    return f"onnxruntime for up to {MOST_ROWS} captions at a time, from the {CALLS + 1}th time on, else torch"


class RuntimeCache:
    """KV cache of the graph: the pictures' keys and values by layer, the text's of all layers in one tensor."""

    def __init__(self, cache: DecoderCache, rows: int, heads: int, size: int) -> None:
        from onnxruntime import OrtValue

        parts = [part.transpose(1, 2).float().contiguous().numpy() for layer in cache.cross for part in layer]
        self.cross = {f"cross_{number}": OrtValue.ortvalue_from_numpy(part) for number, part in enumerate(parts)}
        self.past = OrtValue.ortvalue_from_numpy(np.zeros((len(parts), rows, heads, 0, size), np.float32))
        self.rows = torch.arange(rows)
        self.length = 0

    def reorder(self, rows: Tensor) -> None:
        """From the next step on, row i continues what row rows[i] has written."""
        self.rows = self.rows[rows]


class RuntimeDecoder:
    """A decoder with the methods that a search calls; onnxruntime computes its steps."""

    def __init__(self, decoder: Any, session: Any) -> None:
        self.decoder, self.session, self.config = decoder, session, decoder.config

    def new_cache(self, encoder_hidden_states: Tensor, rows: int, max_length: int) -> RuntimeCache:
        """An empty cache for `rows` captions; it grows with them."""
        heads = self.config.decoder_num_heads
        cache = self.decoder.new_cache(encoder_hidden_states, rows, 0)
        # From here on torch only chooses tokens: its other threads would spin on the cores that onnxruntime needs.
        torch.set_num_threads(1)
        return RuntimeCache(cache, rows, heads, self.config.decoder_embed_dim // heads)

    def next_logits(self, tokens: Tensor, cache: RuntimeCache) -> Tensor:
        """float32 logits (rows, V) of the token that follows the cache and these tokens (rows, T)."""
        from onnxruntime import OrtValue

        positions = torch.arange(cache.length, cache.length + tokens.shape[1])
        x = self.decoder.wte(tokens) + self.decoder.wpe(positions)
        given = {"x": x.float().numpy(), "rows": cache.rows.numpy()}
        feeds = {name: OrtValue.ortvalue_from_numpy(value) for name, value in given.items()}
        logits, cache.past = self.session.run_with_ort_values(None, feeds | cache.cross | {"past": cache.past})
        cache.length += tokens.shape[1]
        cache.rows = torch.arange(len(tokens))
        return torch.from_numpy(logits.numpy())


def make_session(graph: Graph) -> Any:
    """An onnxruntime session with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between tokens its threads sleep
    return onnxruntime.InferenceSession(graph.serialized(), options, providers=["CPUExecutionProvider"])


def step_graph(decoder: Any, int8: bool) -> Graph:
    """Build a decoding step of GPT-2 with cross-attention.

    x (R, T, D), the tokens' embeddings; rows (R,), the row that each row continues; past (2 * layers, R, H, P, D/H);
    cross_0, cross_1 and so on, each layer's keys and values of the pictures, (N, H, S, D/H), where R is a multiple of N
    -> logits (R, V) of the next token, and the past with these tokens.
    """
    layers, width, heads = len(decoder.blocks), decoder.config.decoder_embed_dim, decoder.config.decoder_num_heads
    graph = Graph(int8)
    first, last = graph.constant("first", np.zeros(1, np.int64)), graph.constant("last", np.array(-1, np.int64))
    graph.add("Shape", ["x"], "shape")
    graph.add("Shape", ["cross_0"], "pictures", start=0, end=1)
    graph.add("Concat", ["pictures", graph.constant("rest", np.array([-1, width], np.int64))], "folded", axis=0)
    graph.add("Gather", ["past", "rows"], "before", axis=1)
    befores = graph.split("before", 2 * layers, axis=0)
    x, present = "x", []
    for index, block in enumerate(decoder.blocks):
        attention, cross, pair = block.attn, block.crossattention, slice(2 * index, 2 * index + 2)
        parts = graph.split(graph.linear(graph.norm(x, block.ln_1), attention.c_attn), 3, axis=2)
        past = [graph.add("Squeeze", [name, first]) for name in befores[pair]]
        mixed, *new = graph.attend([*parts, "", "", "", *past], 3, heads, unidirectional=1)
        present += [graph.add("Unsqueeze", [name, first]) for name in new]
        x = graph.add("Add", [x, graph.linear(mixed, attention.c_proj)])
        query = graph.linear(graph.norm(x, block.ln_cross_attn), cross.q_attn)
        query = graph.add("Reshape", [query, "folded"])  # a picture's rows side by side: (N, K * T, D)
        (attended,) = graph.attend([query, f"cross_{2 * index}", f"cross_{2 * index + 1}"], 1, heads)
        x = graph.add("Add", [x, graph.linear(graph.add("Reshape", [attended, "shape"]), cross.c_proj)])
        hidden = graph.add("Gelu", [graph.linear(graph.norm(x, block.ln_2), block.c_fc)], approximate="tanh")
        x = graph.add("Add", [x, graph.linear(hidden, block.c_proj)])
    graph.add("Concat", present, "present", axis=0)
    graph.product(graph.norm(graph.add("Gather", [x, last], axis=1), decoder.ln_f), decoder.wte.weight, "logits")
    size = width // heads
    graph.inputs = {"x": ["R", "T", width], "rows": ["R"], "past": [2 * layers, "R", heads, "P", size]}
    graph.inputs |= {f"cross_{number}": ["N", heads, "S", size] for number in range(2 * layers)}
    graph.outputs = ["logits", "present"]
    return graph


class Graph:
    """A graph under construction, of ONNX's operators and onnxruntime's. Tensors are identified by their names."""

    def __init__(self, int8: bool) -> None:
        self.int8 = int8
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: list[str] = []

    def serialized(self) -> bytes:
        """The model as bytes that onnxruntime reads."""
        from onnx import TensorProto, helper

        kinds = {"rows": TensorProto.INT64}
        tensor = helper.make_tensor_value_info
        inputs = [tensor(name, kinds.get(name, TensorProto.FLOAT), shape) for name, shape in self.inputs.items()]
        outputs = [tensor(name, TensorProto.FLOAT, None) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "step", inputs, outputs, self.weights)
        domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a constant tensor and return its name."""
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> list[str]:
        """Add a node and return the names of its outputs."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs

    def add(self, kind: str, inputs: list[str], name: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.node(kind, inputs, [name or f"{kind}_{len(self.nodes)}"], **attributes)[0]

    def split(self, x: str, number: int, axis: int) -> list[str]:
        """Split a tensor into equal parts."""
        return self.node("Split", [x], [f"{x}_{part}" for part in range(number)], axis=axis, num_outputs=number)

    def attend(self, inputs: list[str], outputs: int, heads: int, **attributes: Any) -> list[str]:
        """Multi-head attention: query, key, value, past keys and values -> result, keys and values with the past."""
        names = [f"attention_{len(self.nodes)}_{number}" for number in range(outputs)]
        return self.node("MultiHeadAttention", inputs, names, domain="com.microsoft", num_heads=heads, **attributes)

    def norm(self, x: str, layer: Any) -> str:
        """LayerNorm."""
        at = len(self.nodes)
        names = [self.constant(f"gain_{at}", numbers(layer.weight)), self.constant(f"shift_{at}", numbers(layer.bias))]
        return self.add("LayerNormalization", [x, *names], axis=-1, epsilon=layer.eps)

    def linear(self, x: str, layer: Any) -> str:
        """A linear layer with its bias."""
        product = self.product(x, layer.weight)
        return self.add("Add", [product, self.constant(f"bias_{len(self.nodes)}", numbers(layer.bias))])

    def product(self, x: str, weight: Tensor, name: str | None = None) -> str:
        """x times the transposed weight (out, in)."""
        at, (outputs, inputs) = len(self.nodes), weight.shape
        if not self.int8:
            return self.add("MatMul", [x, self.constant(f"weight_{at}", numbers(weight.t()))], name)
        blocks, scales = eight_bits(weight.detach())
        names = [self.constant(f"weight_{at}", blocks), self.constant(f"scales_{at}", scales)]
        options: dict[str, Any] = {
            "K": inputs,
            "N": outputs,
            "bits": 8,
            "block_size": BLOCK,
            "accuracy_level": 4,
        }  # 4: products in 8 bits
        return self.add("MatMulNBits", [x, *names], name, domain="com.microsoft", **options)


def numbers(tensor: Tensor) -> np.ndarray:
    """The tensor as a float32 NumPy array."""
    return tensor.detach().float().contiguous().numpy()


def eight_bits(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """weight (out, in) -> uint8 (out, blocks, BLOCK), where 128 stands for 0, and a scale for each block."""
    outputs, inputs = weight.shape
    blocks = torch.nn.functional.pad(weight.float(), (0, -inputs % BLOCK)).view(outputs, -1, BLOCK)
    scales = blocks.abs().amax(-1).clamp(min=1e-12) / 127
    return ((blocks / scales.unsqueeze(-1)).round() + 128).to(torch.uint8).numpy(), scales.flatten().numpy()
