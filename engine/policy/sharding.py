"""Divides weights among the processes that train together, with torch's FSDP2 (`fully_shard`).

Each process holds its share of the weights, of their gradients and of Adam's moments. A layer's
weights are gathered when a forward or backward pass reaches it and let go after it (Rajbhandari et
al. 2020, arXiv:1910.02054, stage 3). Every pass is then an appointment: each process must make as
many, of as many layers, in the same order. An update is made so that they do. Play is not, since no
two conversations are alike: it takes place in `whole`, where each process has all weights.

Accelerate is asked for the processes alone. Its own FSDP becomes DDP on CPUs without a word.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

Module = TypeVar("Module", bound=nn.Module)


def shard(module: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Divides a module's weights among all processes, in place: its layers one by one, and what
    stands around them together.

    Args:
        module: what is called in an update; the passes begin with it.
        layers: its parts whose weights are gathered one after the other.
        device: that all of it is on.
    """
    mesh = _mesh(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def outline(module: Module, device: str = "meta") -> Module:
    """Returns a copy of a module whose weights are on another device: on "meta" it has none, and
    `filled` fills it."""
    known = {
        id(p): nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, known)


def filled(
    empty: Module, module: nn.Module, device: torch.device | str | None = None, keep: bool = True
) -> Module:
    """Returns a copy of a module that is divided, whole in this process; every process calls this
    together.

    Args:
        empty: the module's outline, taken before it was divided.
        module: the module.
        device: of the copy's weights; default: the module's.
        keep: False: this process takes part alone, and the copy has no weights.
    """
    made = copy.deepcopy(empty)
    weights: dict[int, nn.Parameter] = {}
    for parameter in module.parameters():
        value = full(parameter.detach())
        if keep:
            value = value.to(device or value.device, copy=True)
            weights[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    if keep:
        own = module.named_parameters(remove_duplicate=False)  # tied ones stay tied
        made.load_state_dict({n: weights[id(p)] for n, p in own}, strict=False, assign=True)
    return made


def full(tensor: Tensor) -> Tensor:
    """Returns a tensor with the shares of all processes; every process calls this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share(value: Tensor, like: Tensor) -> Tensor:
    """Returns this process's share of a value that all have, as the tensor `like` is divided."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    placed = value.to(like.device, like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gathers all weights into every process, within the context; passes are no appointments there.
    Every process enters it together."""
    parts: list[Any] = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def save_shares(state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Writes the tensors that are divided, each process its shares, where there are any; every
    process calls this together. Returns the others."""
    divided: dict[str, Any] = {k: v for k, v in state.items() if isinstance(v, DTensor)}
    if divided:
        save(divided, storage_writer=FileSystemWriter(folder))
    return {k: v for k, v in state.items() if k not in divided}


def load_shares(folder: Path, device: torch.device | None) -> dict[str, Tensor]:
    """Returns what `save_shares` wrote, whatever the number of processes was.

    Args:
        folder: where it stands.
        device: of the tensors, divided again among all processes, which call this together; None:
            whole, in this process alone.
    """
    reader = FileSystemReader(folder)
    mesh = None if device is None else _mesh(device)
    found: dict[str, Tensor] = {}
    for name, kept in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(kept, TensorStorageMetadata)
        size, kind = tuple(kept.size), kept.properties.dtype
        found[name] = (
            torch.empty(size, dtype=kind)
            if mesh is None
            else zeros(size, dtype=kind, device_mesh=mesh, placements=[Shard(0)])
        )
    load(found, storage_reader=reader, no_dist=mesh is None)
    return found


def _mesh(device: torch.device) -> DeviceMesh:
    return DeviceMesh(device.type, torch.arange(torch.distributed.get_world_size()))
