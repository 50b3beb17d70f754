"""The graph that `--compile` makes: one, whatever lengths the captions have."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model, tiny_config


@pytest.mark.parametrize("captions", [1, 5])
@pytest.mark.parametrize("bridge", ["cross_attention", "prefix"])
def test_lengths_neither_break_nor_multiply_the_graph(bridge, captions):
    """`causal=length > 1` was a symbol to the compiler once lengths differed: every decoder layer broke the graph, seven
    lengths made 20 graphs, and nothing said so. The backend "eager" makes graphs without compiling kernels."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = random_model(tiny_config(max_length=40, bridge=bridge)).train()
    compiled = torch.compile(model, backend="eager")
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for length in range(3, 15):
        shape = (2, captions, length)
        ids = torch.randint(0, 49, shape)
        lengths = torch.randint(2, length + 1, shape[:2])
        lengths[0, 0] = length
        real = (torch.arange(length) < lengths.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
        positions = torch.nn.functional.pad(real, (0, -len(real) % 64), value=ids.numel())
        batch = (pictures, ids, lengths, ids, positions)
        compiled(*batch).loss.backward()
        assert torch.allclose(compiled(*batch).loss, model(*batch).loss, atol=1e-5), length
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 3, counters
