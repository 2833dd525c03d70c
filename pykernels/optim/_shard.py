"""What an optimizer asks of a parameter that may be a DTensor: its local part, where that lies, and sums over ranks.

torch.distributed.tensor is never imported here: where nobody has imported it there are no DTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a torch.distributed.tensor.DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank, without a graph."""
    if not is_dtensor(tensor):
        return tensor
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    # The result of a collective that has not been waited for.
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[operator]


def local_like(tensor: Tensor, param: Tensor) -> Tensor:
    """The local part of a gradient, laid out over the ranks as its parameter is (a Partial sum is reduced)."""
    if not is_dtensor(param) or not is_dtensor(tensor):
        return local(tensor)
    placements = param.placements  # type: ignore[attr-defined]
    if tensor.placements != placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(tensor)


def as_dtensor(part: Tensor, mesh: Any, placements: Iterable[Any], shape: Iterable[int]) -> Tensor:
    """The DTensor of the global `shape` that keeps `part` here, unchecked. DTensor.from_local would move a part on the
    host to the mesh's device, where FSDP2 and OffloadedOptimizer keep it on purpose."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    size = torch.Size(shape)
    stride = tuple(prod(size[i + 1 :]) for i in range(len(size)))
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(size, stride, part.dtype))
    return DTensor(part, spec, requires_grad=False)


def wrap(part: Tensor, param: Tensor, shape: Iterable[int]) -> Tensor:
    """A local tensor as a DTensor of the global `shape` with the mesh and placements of param; itself for others."""
    if not is_dtensor(param):
        return part
    return as_dtensor(part, param.device_mesh, param.placements, shape)  # type: ignore[attr-defined]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy to the host is waited for: what reads it there would not know when it is done."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def same_layout(tensor: Tensor, param: Tensor) -> bool:
    """Whether both are plain tensors, or both DTensors with one mesh and the same placements."""
    if is_dtensor(tensor) != is_dtensor(param):
        return False
    if not is_dtensor(param):
        return True
    return (
        tensor.device_mesh == param.device_mesh  # type: ignore[attr-defined]
        and tensor.placements == param.placements  # type: ignore[attr-defined]
    )


def sharding(param: Tensor) -> tuple[Any, ...]:
    """(mesh, dimensions of the mesh that shard) of a DTensor, () of a tensor that is whole on this rank."""
    if not is_dtensor(param):
        return ()
    dims = tuple(i for i, placement in enumerate(param.placements) if not placement.is_replicate())  # type: ignore[attr-defined]
    return (param.device_mesh, dims) if dims else ()  # type: ignore[attr-defined]


def all_reduce(sums: Tensor, sharded: tuple[Any, ...]) -> Tensor:
    """Sums in place over the ranks among which `sharding` says a tensor is cut."""
    if sharded:
        mesh, dims = sharded
        # Host tensors of a GPU's mesh go through the device: NCCL takes no others.
        there = sums if sums.device.type == mesh.device_type else sums.to(mesh.device_type)
        for dim in dims:
            torch.distributed.all_reduce(there, group=mesh.get_group(dim))
        if there is not sums:
            sums.copy_(there)
    return sums


def cut(param: Tensor) -> tuple[list[int], list[int]]:
    """(dimensions that are sharded, the global index of the local part's first element in each dimension)."""
    if not is_dtensor(param):
        return [], [0] * param.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements, mesh = param.placements, param.device_mesh  # type: ignore[attr-defined]
    _, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    sharded = {p.dim % param.dim() for p in placements if not p.is_replicate() and not p.is_partial()}
    return sorted(sharded), list(offset)


def place(param: Tensor) -> tuple[int, int, int] | None:
    """(leading dimensions, start, row_stride): the local part seen as rows, its leading dimensions, by columns has
    element (row, column) at the index start + row * row_stride + column of the global tensor. None if it cannot be so
    seen."""
    sharded, offset = cut(param)
    last = sharded[-1] if sharded else 0
    if any(dim not in (0, last) for dim in sharded):
        return None
    stride = [prod(param.shape[i + 1 :]) for i in range(param.dim())]
    start = sum(o * s for o, s in zip(offset, stride, strict=True))
    leading = max(1, last)
    return leading, start, prod(param.shape[leading:])


def without_partial(tensor: Tensor) -> Tensor:
    """A DTensor with the sums that are still to be made over ranks made."""
    if not is_dtensor(tensor) or not any(p.is_partial() for p in tensor.placements):  # type: ignore[attr-defined]
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(  # type: ignore[attr-defined,no-any-return]
        placements=[Replicate() if p.is_partial() else p for p in tensor.placements]  # type: ignore[attr-defined]
    )
