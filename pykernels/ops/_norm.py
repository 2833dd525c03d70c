"""What rms_norm and layer_norm share: checks, references, fakes, autograd and the call. Only layer_norm has a mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import quantize_rowwise
from ._checks import FLOATS, check, check_device, check_dtype

FORWARD_ARGUMENTS = (
    "Tensor x, Tensor? weight=None, Tensor? bias=None, Tensor? residual=None, float eps={eps}, "
    "float weight_offset=0.0, bool keep_h=True"
)
# bias_dtype: that of the bias whose gradient is wanted, None where none is.
BACKWARD_ARGUMENTS = (
    "Tensor grad, Tensor? grad_h, Tensor h, Tensor? weight, Tensor rstd, {mean}float weight_offset=0.0, "
    "bool weight_grad=True, ScalarType? bias_dtype=None"
)
# float64 is for the references alone, where it lets gradients be checked; no kernel takes it.
DTYPES = (*FLOATS, torch.float64)


def check_parameter(op: str, name: str, parameter: Tensor | None, x: Tensor) -> None:
    """weight or bias: [K] of any float dtype, where K is the last size of x."""
    if parameter is None:
        return
    check_dtype(op, name, parameter, *DTYPES)
    check_device(op, name, parameter, "x", x)
    check(
        parameter.shape == x.shape[-1:],
        op,
        f"expected {name} to have shape [{x.shape[-1]}], one element for each column of x, got {list(parameter.shape)}",
    )


def check_like(op: str, name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """A tensor of the shape, dtype and device of another."""
    if tensor is None:
        return
    check_dtype(op, name, tensor, other.dtype)
    check_device(op, name, tensor, other_name, other)
    check(
        tensor.shape == other.shape,
        op,
        f"expected {name} to have the shape of {other_name}, {list(other.shape)}, got {list(tensor.shape)}",
    )


def check_input(op: str, name: str, x: Tensor) -> None:
    check_dtype(op, name, x, *DTYPES)
    check(x.dim() >= 1, op, f"expected {name} to have at least 1 dimension, got 0")


def check_forward(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    check_input(op, "x", x)
    check_parameter(op, "weight", weight, x)
    check_parameter(op, "bias", bias, x)
    check_like(op, "residual", residual, "x", x)


def check_backward(
    op: str, grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor | None, **statistics: Tensor
) -> None:
    check_input(op, "h", h)
    check_like(op, "grad", grad, "h", h)
    check_like(op, "grad_h", grad_h, "h", h)
    check_parameter(op, "weight", weight, h)
    for name, values in statistics.items():
        check_dtype(op, name, values, wide(h.dtype))
        check_device(op, name, values, "h", h)
        rows = list(h.shape[:-1])
        check(list(values.shape) == rows, op, f"expected {name} to have shape {rows}, got {list(values.shape)}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics: float32, or float64 for a float64 input."""
    return torch.promote_types(dtype, torch.float32)


def forward(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    keep_h: bool,
    centre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, rstd, mean); h is empty where there is no residual, or it is not to be kept."""
    check_forward(op, x, weight, bias, residual)
    h = x if residual is None else x + residual
    v = h.to(wide(h.dtype)).contiguous()
    mean = v.mean(-1, keepdim=True) if centre else v.new_zeros(())
    if centre:
        v = v - mean
    rstd = (v.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = v * rstd
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    kept = h.contiguous() if residual is not None and keep_h else x.new_empty(0)
    return y.to(x.dtype).contiguous(), kept, rstd.squeeze(-1).contiguous(), mean.squeeze(-1).contiguous()


def quantized(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    keep_h: bool,
    centre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, h): forward, then quantize_rowwise."""
    y, h, _, _ = forward(op, x, weight, bias, residual, eps, weight_offset, keep_h, centre)
    return *quantize_rowwise.reference(y), h


def backward(
    op: str,
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_offset: float,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias), each of the last two empty where it is not wanted."""
    check_backward(op, grad, grad_h, h, weight, rstd=rstd, **({} if mean is None else {"mean": mean}))
    v, g = h.to(rstd.dtype).contiguous(), grad.to(rstd.dtype).contiguous()
    rstd, matrix = rstd.unsqueeze(-1), (h.shape[:-1].numel(), h.shape[-1])
    x_hat = (v if mean is None else v - mean.unsqueeze(-1)) * rstd
    scaled = g if weight is None else g * (weight.to(g.dtype) + weight_offset)
    grad_x = scaled - x_hat * (scaled * x_hat).mean(-1, keepdim=True)
    if mean is not None:
        grad_x = grad_x - scaled.mean(-1, keepdim=True)
    grad_x = grad_x * rstd
    if grad_h is not None:
        grad_x = grad_x + grad_h
    grad_weight = h.new_empty(0) if weight is None else weight.new_empty(0)
    if weight is not None and weight_grad:
        grad_weight = (g * x_hat).view(matrix).sum(0).to(weight.dtype)
    grad_bias = h.new_empty(0, dtype=bias_dtype)
    if bias_dtype is not None:
        grad_bias = g.view(matrix).sum(0).to(bias_dtype)
    return grad_x.to(h.dtype).contiguous(), grad_weight, grad_bias


def fake_forward(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, keep_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, rstd); a mean is like rstd."""
    check_forward(op, x, weight, bias, residual)
    h = x.new_empty(x.shape if residual is not None and keep_h else (0,))
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1], dtype=wide(x.dtype))


def fake_quantized(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, keep_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, _ = fake_forward(op, x, weight, bias, residual, keep_h)
    quantize_rowwise.check_arguments(y, None)
    return y.new_empty(y.shape, dtype=torch.int8), y.new_empty(y.shape[:-1], dtype=torch.float32), h


def fake_backward(
    op: str,
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
    **statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(op, grad, grad_h, h, weight, **statistics)
    columns = h.shape[-1]
    grad_weight = h.new_empty(0) if weight is None else weight.new_empty(columns if weight_grad else 0)
    grad_bias = h.new_empty(0 if bias_dtype is None else columns, dtype=bias_dtype)
    return h.new_empty(h.shape), grad_weight, grad_bias


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, weight_offset, keep_h = inputs
    _, h, *statistics = output
    if residual is not None and not keep_h:
        raise RuntimeError("expected keep_h to be True where a gradient is wanted, got False: backward reads h")
    ctx.save_for_backward(x if residual is None else h, weight, *statistics)
    ctx.mark_non_differentiable(*statistics, *([h] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.weight_offset = weight_offset
    ctx.bias_dtype = None if bias is None else bias.dtype


def run_backward(ctx: Any, op: Any, grad: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, residual, eps, weight_offset and keep_h, through the backward operator."""
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    grad_x, grad_weight, grad_bias = grad_h, None, None
    if grad is not None:
        h, weight, *statistics = ctx.saved_tensors
        bias_dtype = ctx.bias_dtype if needs_bias else None
        grad_x, grad_weight, grad_bias = op(
            grad, grad_h, h, weight, *statistics, ctx.weight_offset, needs_weight, bias_dtype
        )
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_x if needs_residual else None,
        None,
        None,
        None,
    )


def refuse_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("rms_norm, layer_norm: a second derivative, or one of quantised codes, is not defined")


def call(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    prenorm: bool,
    quantize: bool,
) -> Any:
    """The public function of either norm."""
    if not eps >= 0:
        raise ValueError(f"{op}: expected eps to be 0 or more, got {eps}")
    if residual is not None and residual.dtype != x.dtype and residual.is_floating_point():
        residual = residual.to(x.dtype)
    parts = (x, weight, bias, residual)
    gradient = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)
    if quantize and gradient:
        raise NotImplementedError(
            f"{op}: quantize=True has no gradient, but an argument requires one: call it under torch.no_grad(), or "
            "quantise y with quantize_rowwise"
        )
    run = getattr(torch.ops.pykernels, f"{op}_quantized" if quantize else op).default
    arguments = (*parts, eps, weight_offset, residual is not None and (prenorm or gradient))
    if gradient or torch.compiler.is_compiling():
        out = run(*arguments)
    else:  # autograd's Python entry costs more than the norm of a few rows
        with torch._C._AutoDispatchBelowAutograd():
            out = run(*arguments)
    result = (out[0], out[1]) if quantize else out[0]
    if not prenorm:
        return result
    return result, x if residual is None else out[2] if quantize else out[1]
