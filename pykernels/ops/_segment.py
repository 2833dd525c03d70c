"""What the operators that span several layers are made of: a norm, linear layers, and a gate, forward and backward.

Each function runs the kernels that autograd would run for the layers one by one, in the same order and the same dtypes,
so that a segment which recomputes gives bit for bit what the separate layers give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dequantize, gated_activation, layer_norm, quantize_blockwise, rms_norm  # noqa: F401 the operators used
from ._checks import FLOATS, check, check_device, check_dim, check_dtype

FLOATS64 = (*FLOATS, torch.float64)
NO_NORM, RMS, LAYER = 0, 1, 2
_ops = torch.ops.pykernels


class Norm(NamedTuple):
    """Which norm stands before the linear layers, if any, and its parameters."""

    kind: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    weight_offset: float


class Normed(NamedTuple):
    """y = norm(h), h = x + residual or x itself, and the statistics of its rows; without a norm y is h."""

    y: Tensor
    h: Tensor
    rstd: Tensor | None
    mean: Tensor | None


def check_segment(
    op: str, x: Tensor, residual: Tensor | None, norm: Norm, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> None:
    """x [..., K] float, residual of its shape and dtype, each weight [N, K]; the norm checks its own parameters."""
    check_dtype(op, "x", x, *FLOATS64)
    check(x.dim() >= 1, op, "expected x to have at least 1 dimension, got 0")
    check(norm.kind in (NO_NORM, RMS, LAYER), op, f"expected norm to be 0, 1 or 2, got {norm.kind}")
    if residual is not None:
        check_dtype(op, "residual", residual, x.dtype)
        check_device(op, "residual", residual, "x", x)
        check(residual.shape == x.shape, op, f"expected residual of shape {list(x.shape)}, got {list(residual.shape)}")
    for tensor in (norm.weight, norm.bias):
        if tensor is not None:
            check_device(op, "norm_weight and norm_bias", tensor, "x", x)
            expected = f"expected norm_weight and norm_bias to have shape [{x.shape[-1]}]"
            check(tensor.shape == x.shape[-1:], op, f"{expected}, got {list(tensor.shape)}")
    for weight in weights:
        check_weight(op, "weights", weight, x.shape[-1], x)
    for bias in biases:
        check_dtype(op, "biases", bias, *FLOATS64)
        check_device(op, "biases", bias, "x", x)


def check_weight(op: str, name: str, weight: Tensor, k: int, x: Tensor) -> None:
    """A float matrix [N, k] on the device of x."""
    check_dtype(op, name, weight, *FLOATS64)
    check_dim(op, name, weight, 2)
    check_device(op, name, weight, "x", x)
    check(weight.shape[1] == k, op, f"expected {name} to have shape [N, {k}], with the K of x, got {list(weight.shape)}")


def check_biases(op: str, weights: Sequence[Tensor], biases: Sequence[Tensor], biased: Sequence[int]) -> None:
    """One bias [N] for each weight that `biased` names."""
    check(len(biases) == len(biased), op, f"expected {len(biased)} biases, as biased names, got {len(biases)}")
    for index, bias in zip(biased, biases, strict=True):
        n = weights[index].shape[0]
        check(bias.shape == (n,), op, f"expected bias {index} to have shape [{n}], got {list(bias.shape)}")


def spread(values: Sequence[Tensor], places: Sequence[int], count: int) -> list[Tensor | None]:
    """The values at their places of a list of `count`, None elsewhere."""
    full: list[Tensor | None] = [None] * count
    for place, value in zip(places, values, strict=True):
        full[place] = value
    return full


def rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]."""
    return x.reshape(-1, x.shape[-1])


def apply_norm(norm: Norm, x: Tensor, residual: Tensor | None = None) -> Normed:
    """The norm of x + residual; without a norm, x + residual itself."""
    if norm.kind == NO_NORM:
        h = x if residual is None else x + residual
        return Normed(h, h, None, None)
    op = _ops.rms_norm if norm.kind == RMS else _ops.layer_norm
    y, h, rstd, *mean = op.default(x, norm.weight, norm.bias, residual, norm.eps, norm.weight_offset)
    return Normed(y, x if residual is None else h, rstd, mean[0] if mean else None)


def apply_linears(
    y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], compute: torch.dtype
) -> list[Tensor]:
    """y [..., K] times each weight, in `compute`: what torch.nn.functional.linear gives, under autocast too."""
    y = y.to(compute)
    return [
        torch.nn.functional.linear(y, weight.to(compute), None if bias is None else bias.to(compute))
        for weight, bias in zip(weights, biases, strict=True)
    ]


def linears_backward(
    grads: Sequence[Tensor],
    y: Tensor | None,
    weights: Sequence[Tensor],
    wanted: Sequence[int],
    grad_y: Tensor | None,
    y_dtype: torch.dtype,
    wants_y: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of y and of the weights that `wanted` names; y may be None where there are none of those.

    grad_y: what has already arrived at y. The last layer is added first, as autograd meets them.
    """
    found = {}
    for place in reversed(range(len(weights))):
        grad, weight = grads[place], weights[place]
        flat = rows(grad)
        if wants_y:
            part = (flat @ weight.to(grad.dtype)).view(*grad.shape[:-1], weight.shape[1]).to(y_dtype)
            grad_y = part if grad_y is None else grad_y + part
        if place in wanted:
            assert y is not None
            found[place] = (flat.t() @ rows(y.to(grad.dtype))).to(weight.dtype)
    return grad_y if wants_y else None, [found[place] for place in wanted]


def bias_gradients(
    grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each bias from that of its layer's result."""
    return [
        rows(grad).sum(0).to(dtype) if need and grad is not None else None
        for grad, dtype, need in zip(grads, dtypes, needs, strict=True)
    ]


def norm_backward(
    norm: Norm,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h, weight and bias, each empty where `wants` says that nobody asks."""
    empty = torch.empty if grad_y is None else grad_y.new_empty
    if grad_y is None or h is None or norm.kind == NO_NORM:
        return empty(0) if grad_y is None else grad_y, empty(0), empty(0)
    bias_dtype = norm.bias.dtype if wants[2] and norm.bias is not None else None
    statistics = (rstd,) if norm.kind == RMS else (rstd, mean)
    op = _ops.rms_norm_backward if norm.kind == RMS else _ops.layer_norm_backward
    return op.default(grad_y, grad_h, h, norm.weight, *statistics, norm.weight_offset, wants[1], bias_dtype)


def normed_again(norm: Norm, h: Tensor) -> Tensor:
    """y from the kept h: the same kernel on the same numbers, hence the same bits."""
    return h if norm.kind == NO_NORM else apply_norm(norm, h).y


def compress(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """x as int8 codes and one float32 scale for each group of the last dimension, rounded to nearest."""
    return _ops.quantize_blockwise.default(x, [group_size])


def expand(codes: Tensor, scale: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """The reverse of compress, in `dtype`."""
    return _ops.dequantize.default(codes, scale, [group_size], None, dtype)


def fake_statistics(norm: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty rstd and mean of the shapes that apply_norm gives, or of none."""
    dtype, shape = torch.promote_types(x.dtype, torch.float32), x.shape[:-1]
    return (
        x.new_empty((0,)) if norm == NO_NORM else x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=dtype) if norm == LAYER else x.new_empty((0,)),
    )
