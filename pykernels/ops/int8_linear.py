"""int8_linear: dynamic row-wise quantisation and the INT8 product behind one call (W8A8)."""

from typing import Any

import torch

from .. import _library
from . import _autograd, int8_matmul, quantize_rowwise
from ._checks import (
    FLOATS,
    check,
    check_device,
    check_dim,
    check_dtype,
    check_float_input,
    check_k,
    check_vector,
    names,
)
from ._enums import ACTIVATIONS
from ._epilogue import activate, check_epilogue
from ._weight_grad import grad_input

NAME = "int8_linear"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? residual=None, "
    "int activation=0, Tensor? x_scale=None, ScalarType? out_dtype=None) -> Tensor"
)


def check_weight(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """x [..., K] float and weight int8 [N, K] on one device."""
    check_float_input(op, "x", x)
    check_dtype(op, "weight", weight, torch.int8)
    check_dim(op, "weight", weight, 2)
    check_device(op, "weight", weight, "x", x)
    k = x.shape[-1]
    check(
        weight.shape[1] == k, op, f"expected weight to have shape [N, {k}], with the K of x, got {list(weight.shape)}"
    )


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    x_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Everything a kernel relies on, in the order of the arguments."""
    check_weight(NAME, x, weight)
    check_k(NAME, x.shape[-1])
    check_dtype(NAME, "weight_scale", weight_scale, torch.float32)
    check_device(NAME, "weight_scale", weight_scale, "x", x)
    check_vector(NAME, "weight_scale", weight_scale, weight.shape[0], "row of weight")
    check_epilogue(NAME, x, x.shape[:-1], weight.shape[0], bias, residual, activation)
    if x_scale is not None:
        check_dtype(NAME, "x_scale", x_scale, torch.float32)
        check_device(NAME, "x_scale", x_scale, "x", x)
        check(x_scale.numel() == 1, NAME, f"expected x_scale to have 1 element, got shape {list(x_scale.shape)}")
    check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)}, got {out_dtype}")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or x.dtype
    check_arguments(x, weight, weight_scale, bias, residual, activation, x_scale, out_dtype)
    q, scale = quantize_rowwise.reference(x.reshape(-1, x.shape[-1]) if x.numel() else x.flatten(0, -2), scale=x_scale)
    flat = None if residual is None else residual.reshape(q.shape[0], weight.shape[0])
    out = int8_matmul.reference(q, weight, scale, weight_scale, bias, flat, activation, out_dtype=out_dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or x.dtype
    check_arguments(x, weight, weight_scale, bias, residual, activation, x_scale, out_dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, bias, residual, activation, x_scale, _ = inputs
    ctx.activation, ctx.x_dtype, ctx.x_shape = activation, x.dtype, x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    # Only an activation needs its input again, and that is recomputed from x rather than kept.
    again = activation != ACTIVATIONS[None]
    ctx.save_for_backward(weight, weight_scale, *((x, bias, x_scale) if again else (None, None, None)))


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale, x, bias, x_scale = ctx.saved_tensors
    grad_residual = grad.to(ctx.residual_dtype) if ctx.needs_input_grad[4] else None
    if ctx.activation != ACTIVATIONS[None]:
        pre = torch.ops.pykernels.int8_linear(x, weight, weight_scale, bias, None, 0, x_scale, torch.float32)
        with torch.enable_grad():
            pre = pre.detach().requires_grad_()
            (grad,) = torch.autograd.grad(activate(pre, ctx.activation), pre, grad.float())
    flat = grad.reshape(-1, weight.shape[0])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(flat, weight, weight_scale, ctx.x_dtype).reshape(ctx.x_shape)
    if ctx.needs_input_grad[3]:
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, grad_residual, None, None, None


_library.define(SCHEMA, reference, fake)
_autograd.register(NAME, backward, setup_context)
