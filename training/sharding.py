"""FSDP2: a model whose weights, gradients and moments are spread over the processes (Zhao et al. 2023, arXiv:2304.11277).

Each transformer layer is gathered while it computes, the rest for a whole step. Captions and files are made by a plain
model that has all weights as long as that takes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import ImageCaptionModel


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The transformer layers in a module: what its outermost lists hold."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else layers_of(child)


def shard(model: ImageCaptionModel) -> ImageCaptionModel:
    """A sharded model with the first process's weights; the model itself is left without any (see fill)."""
    from torch.distributed.fsdp import fully_shard

    learning = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    mesh = dist.init_device_mesh(model.device.type, (dist.get_world_size(),))
    empty(model.eval())  # it will not learn
    for layer in layers_of(learning):
        fully_shard(layer, mesh=mesh)
    watch_prefix(learning.decoder)
    fully_shard(learning, mesh=mesh)
    return learning


def watch_prefix(decoder: Any) -> None:
    """Gathers a layer for the gradients of its keys and values too: FSDP waits for those of what it returns, and the last
    layer's states of a prefix nobody reads."""

    def watch(body: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        for layer, kept in zip(layers_of(decoder), named[decoder.cache_name].layers, strict=True):
            for states in (kept.keys, kept.values):
                if states.requires_grad:
                    states.register_hook(lambda gradient, layer=layer: layer.unshard())

    decoder.body.register_forward_hook(watch, with_kwargs=True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a shard what all processes have together; they must all ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # DTensor takes long to import


def collected(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; of a sharded one the first process alone gets it, and the others nothing."""
    full = whole(tensor)
    return full.cpu() if full is tensor or dist.get_rank() == 0 else torch.empty(0)


def like(example: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of whole: the tensor itself, or this process's shard of it where the example is one."""
    if not hasattr(example, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = example.device_mesh, example.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(example.device), mesh, placements, src_data_rank=None)


def load_weights(model: ImageCaptionModel, weights: dict[str, Tensor]) -> None:
    """The inverse of own_state, of a plain model or of a sharded one."""
    own = model.own_state()
    model.load_own_state({name: like(own.get(name, tensor), tensor) for name, tensor in weights.items()})


def fill(model: ImageCaptionModel, sharded: ImageCaptionModel) -> None:
    """Gives a plain model all weights of a sharded one, which no step changes."""
    model.load_state_dict({name: whole(tensor) for name, tensor in sharded.state_dict().items()}, assign=True)


def empty(model: ImageCaptionModel) -> None:
    """Takes a model's weights away: names and shapes stay."""
    model.copies.drop()
    model.load_state_dict({name: tensor.to("meta") for name, tensor in model.state_dict().items()}, assign=True)
