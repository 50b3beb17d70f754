"""FSDP2: spread a model's weights, gradients and moments over the processes (Zhao et al. 2023, arXiv:2304.11277).

Each transformer layer is gathered while it computes, all other weights for the complete step. To write captions and
files, a plain model gets all weights for that time.
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
    """The transformer layers in a module: the members of its outermost ModuleLists."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else layers_of(child)


def shard(model: ImageCaptionModel) -> ImageCaptionModel:
    """A sharded model with the first process's weights. The given model loses its weights (see fill)."""
    from torch.distributed.fsdp import fully_shard

    learning = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    mesh = dist.init_device_mesh(model.device.type, (dist.get_world_size(),))
    empty(model.eval())  # it is not trained
    for layer in layers_of(learning):
        fully_shard(layer, mesh=mesh)
    watch_prefix(learning.decoder)
    fully_shard(learning, mesh=mesh)
    return learning


def watch_prefix(decoder: Any) -> None:
    """Gather a layer also for the gradients of its keys and values: FSDP gathers it for those of its output, but the
    last layer's output at the prefix is not used."""

    def watch(body: nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        for layer, cache in zip(layers_of(decoder), named[decoder.cache_name].layers, strict=True):
            for states in (cache.keys, cache.values):
                if states.requires_grad:
                    states.register_hook(lambda gradient, layer=layer: layer.unshard())

    decoder.body.register_forward_hook(watch, with_kwargs=True)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, which all processes must call together; a plain tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # DTensor takes long to import


def collected(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU. Of a sharded one, only the first process gets it; the others get an empty tensor."""
    full = full_tensor(tensor)
    return full.cpu() if full is tensor or dist.get_rank() == 0 else torch.empty(0)


def like(example: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of full_tensor: this process's shard if the example is a shard, else the tensor unchanged."""
    if not hasattr(example, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = example.device_mesh, example.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(example.device), mesh, placements, src_data_rank=None)


def load_weights(model: ImageCaptionModel, weights: dict[str, Tensor]) -> None:
    """The inverse of own_state, for a plain or a sharded model."""
    current = model.own_state()
    model.load_own_state({name: like(current.get(name, tensor), tensor) for name, tensor in weights.items()})


def fill(model: ImageCaptionModel, sharded: ImageCaptionModel) -> None:
    """Copy all weights of a sharded model into a plain one; later training steps do not change the copy."""
    model.load_state_dict({name: full_tensor(tensor) for name, tensor in sharded.state_dict().items()}, assign=True)


def empty(model: ImageCaptionModel) -> None:
    """Free a model's weights; names and shapes stay."""
    model.copies.drop()
    model.load_state_dict({name: tensor.to("meta") for name, tensor in model.state_dict().items()}, assign=True)
