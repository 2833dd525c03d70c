"""What the operators that span several layers are made of: a norm, linear layers, and a gate, forward and backward.

Each function runs the kernels that autograd would run for the layers one by one, in the same order and the same dtypes,
so that a segment which recomputes gives bit for bit what the separate layers give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dequantize, gated_activation, layer_norm, quantize_blockwise, rms_norm  # noqa: F401 operators used

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


def bias_gradients(grads: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradient of each bias from that of its layer's result."""
    return [
        rows(grad).sum(0).to(bias.dtype)
        for grad, bias in zip(grads, biases, strict=True)
        if grad is not None and bias is not None
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


def gate_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor | None,
    activation: int,
    wants_weight: bool,
    wants_input: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of gate, up and weight in act(gate) * up @ weight.T; the product is computed again for weight's."""
    to_weight = None
    product_grad = grad
    if weight is not None:
        flat = rows(grad)
        if wants_weight:
            product = _ops.gated_activation.default(gate, up, activation)
            to_weight = (flat.t() @ rows(product.to(grad.dtype))).to(weight.dtype)
            del product
        if wants_input:
            product_grad = (flat @ weight.to(grad.dtype)).view(*grad.shape[:-1], weight.shape[1]).to(gate.dtype)
    if not wants_input:
        return None, None, to_weight
    to_gate, to_up = _ops.gated_activation_backward.default(product_grad, gate, up, activation)
    return to_gate, None if up is None else to_up, to_weight
