"""Dense tensors in any order of memory as the contiguous tensors that the operator takes, without a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _shard
from ._state import MASTER_LOW, SCALE, STEP, Group, as_bytes, quantised

Order = tuple[int, ...]


def layout(group: Group, param: Tensor) -> tuple[Order | None, bool]:
    """(permutation under which the local part is contiguous, or None for its own order; whether it must be copied).

    8-bit blocks and global indices go along rows in logical order, whatever the order of memory, or a checkpoint would
    depend on it: such parameters are copied rather than permuted, as are those with gaps.
    """
    part = _shard.local(param.detach())
    if part.is_contiguous():
        return None, False
    strides = list(part.stride())
    order = tuple(sorted(range(part.dim()), key=lambda dim: (-strides[dim], dim)))
    logical = quantised(group, param.shape, param.dtype) or _shard.is_dtensor(param)
    if logical or not part.permute(order).is_contiguous():
        return None, True
    return order, False


def in_order(tensor: Tensor, order: Order | None) -> Tensor:
    """The tensor permuted and contiguous: a view where it already lies so, a copy elsewhere."""
    return (tensor if order is None else tensor.permute(order)).contiguous()


def arrange(state: dict[str, Tensor], group: Group, param: Tensor) -> None:
    """Rearranges state (as loaded from elsewhere) to lie in memory as the operator needs it beside its parameter."""
    order, _ = layout(group, param)
    for key, value in state.items():
        held = _shard.local(value)
        target = None if key.endswith(SCALE) else order
        if key == MASTER_LOW and target is not None:
            target = (*target, len(target))
        if key == STEP or (held if target is None else held.permute(target)).is_contiguous():
            continue
        if target is None:
            kept = held.contiguous()
        else:
            low = key == MASTER_LOW
            dtype = torch.int16 if low else held.dtype
            kept = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
            kept = (as_bytes(kept) if low else kept).copy_(held)
        state[key] = _shard.wrap(kept, param, list(value.shape))
