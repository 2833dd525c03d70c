"""Clipping gradients by their global norm: a pass for the norms, one for the scaling, none where nothing is clipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from . import _shard

_ops = torch.ops.pykernels


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for plain tensors and DTensors of any meshes together; returns the global norm.

    parameters: tensors, or (name, tensor) pairs as named_parameters() gives them, for the error's sake. Gradients are
    multiplied by min(1, max_norm / (norm + 1e-6)) in place. The norm is a scalar on the first gradient's device,
    the same on every rank, float32 (float64 with float64 gradients), and is not read back unless error_if_nonfinite.
    Squares are summed in float64; the sums of one mesh are reduced together. Other norms go through torch.
    Errors: RuntimeError naming the parameters whose gradient is not finite (error_if_nonfinite) or is sparse,
    ValueError for a max_norm below 0 or a norm_type not above; no gradient has changed then. foreach changes nothing.
    """
    if not max_norm >= 0.0:
        raise ValueError(f"clip_grad_norm_: expected max_norm to be at least 0, got {max_norm}")
    norm_type = float(norm_type)
    if not norm_type > 0.0:
        raise ValueError(f"clip_grad_norm_: expected norm_type to be above 0, got {norm_type}")
    named = [(name, p.grad) for name, p in _named(parameters) if p.grad is not None]
    if not named:
        return torch.tensor(0.0)
    for name, grad in named:
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"clip_grad_norm_: expected the gradient of parameter {name} to be dense, got {grad.layout}"
            )
    groups: dict[Any, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, grad in named:
        groups[(grad.device, *_shard.sharding(grad))].append((name, grad))
    named = [pair for members in groups.values() for pair in members]
    grads = [grad for _, grad in named]
    norms = squared_norms(grads).sqrt() if norm_type == 2.0 else _other_norms(grads, norm_type)
    total = torch.linalg.vector_norm(norms, norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        bad = [name for (name, _), norm in zip(named, norms.tolist(), strict=True) if not isfinite(norm)]
        raise RuntimeError(
            f"clip_grad_norm_: expected finite gradients, got NaN or infinity in parameter {', '.join(bad)}"
        )
    _scale(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total if any(g.dtype == torch.float64 for g in grads) else total.float()


def _named(parameters: Any) -> list[tuple[str, Tensor]]:
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    return [(repr(p[0]), p[1]) if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(listed)]


def squared_norms(grads: list[Tensor]) -> Tensor:
    """[n] float64: the squared 2-norm of every gradient over all ranks, on the device of the first. Neighbours on one
    device and mesh share a pass and an all-reduce."""
    sums = []
    whole = [_shard.without_partial(g.detach()) for g in grads]
    for (_, *sharded), members in groupby(whole, lambda g: (g.device, *_shard.sharding(g))):
        parts = [_dense(_shard.local(g)).contiguous() for g in members]
        squares = _shard.all_reduce(_ops.squared_norms(parts), tuple(sharded))
        sums.append(_shard.moved(squares, grads[0].device))
    return torch.cat(sums)


def _other_norms(grads: list[Tensor], norm_type: float) -> Tensor:
    """[n] float64: another norm of every gradient, one at a time."""
    norms = []
    for grad in grads:
        whole = _shard.without_partial(grad)
        part, sharded = _shard.local(whole), _shard.sharding(whole)
        if not part.numel():
            norm = torch.zeros((), dtype=torch.float64, device=part.device)
        else:
            norm = torch.linalg.vector_norm(part, norm_type, dtype=torch.float64)
        if sharded and norm_type == inf:
            mesh, dims = sharded
            norm = norm.to(mesh.device_type)
            for dim in dims:
                torch.distributed.all_reduce(norm, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        elif sharded:
            norm = _shard.all_reduce(norm**norm_type, sharded) ** (1.0 / norm_type)
        norms.append(norm.to(grads[0].device))
    return torch.stack(norms)


def _scale(grads: list[Tensor], factor: Tensor) -> None:
    buckets: dict[torch.device, list[Tensor]] = defaultdict(list)
    for grad in grads:
        part = _dense(_shard.local(grad))
        if part.is_contiguous():
            buckets[part.device].append(part)
        else:
            part.mul_(factor.to(part.device, part.dtype))
    for device, parts in buckets.items():
        _ops.scale_tensors_(parts, factor.to(device, non_blocking=True))
    torch.autograd.graph.increment_version(grads)


def _dense(tensor: Tensor) -> Tensor:
    """The dimensions in memory order: contiguous unless there are gaps."""
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))
