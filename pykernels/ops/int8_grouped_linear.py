"""int8_grouped_linear: rows quantised on the way into int8_grouped_matmul, for the experts of a mixture (W8A8)."""

from typing import Any

import torch

from .. import _library
from . import _autograd, int8_grouped_matmul, quantize_rowwise
from ._autocast import autocast
from ._checks import FLOATS, check, check_dtype, names
from ._enums import ACTIVATIONS, activation_code
from ._epilogue import activate
from .int8_grouped_matmul import check_groups, check_per_expert

NAME = "int8_grouped_linear"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor weight, Tensor weight_scale, Tensor counts, Tensor? bias=None, int activation=0, "
    "ScalarType? out_dtype=None) -> Tensor"
)


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    out_dtype: torch.dtype,
) -> None:
    """Everything a kernel relies on but the values of counts."""
    check_dtype(NAME, "x", x, *FLOATS)
    check_groups(NAME, "x", x, "weight", weight, counts)
    check_per_expert(NAME, "weight_scale", weight_scale, "weight", weight, torch.float32)
    if bias is not None:
        check_per_expert(NAME, "bias", bias, "weight", weight, *FLOATS)
    check(activation in ACTIVATIONS.values(), NAME, f"expected activation to be 0 to 4, got {activation}")
    check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)}, got {out_dtype}")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or x.dtype
    check_arguments(x, weight, weight_scale, counts, bias, activation, out_dtype)
    if counts.device.type == "cpu":
        int8_grouped_matmul.check_counts(NAME, counts, x.shape[0])
    q, scale = quantize_rowwise.reference(x)
    return int8_grouped_matmul.reference(q, weight, counts, scale, weight_scale, bias, activation, out_dtype)


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or x.dtype
    check_arguments(x, weight, weight_scale, counts, bias, activation, out_dtype)
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=out_dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, counts, bias, activation, _ = inputs
    ctx.activation, ctx.x_dtype = activation, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    again = activation != ACTIVATIONS[None]  # as in int8_linear
    ctx.save_for_backward(weight, weight_scale, counts, *((x, bias) if again else (None, None)))


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale, counts, x, bias = ctx.saved_tensors
    ops = torch.ops.pykernels
    if ctx.activation != ACTIVATIONS[None]:
        pre = ops.int8_grouped_linear(x, weight, weight_scale, counts, bias, 0, torch.float32)
        with torch.enable_grad():
            pre = pre.detach().requires_grad_()
            (grad,) = torch.autograd.grad(activate(pre, ctx.activation), pre, grad.float())
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ops.int8_grouped_linear_backward(grad, weight, weight_scale, counts, ctx.x_dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = ops.grouped_sum(grad, counts).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


_library.define(SCHEMA, reference, fake)
_autograd.register(NAME, backward, setup_context)


def int8_grouped_linear(
    x: torch.Tensor,
    qweight: tuple[torch.Tensor, torch.Tensor],
    counts: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act(x_e @ W[e].T + bias[e]) for each expert e, with x quantised row by row on the fly (W8A8).

    x [T, K] float, its rows sorted by expert as in int8_grouped_matmul; qweight (int8 [E, N, K], float32 [E, N]), as
    quantize_rowwise of the stacked weights returns; counts int32 or int64 [E] on the device of x; bias [E, N] -> [T, N]
    in out_dtype (default: that of x). Rows that no expert counts are 0. Each group's result is that of int8_linear, bit
    for bit. Under autocast x is cast as linear would cast it.
    Differentiable in x and bias (the experts are frozen), through the dequantised weights (straight-through), row by
    row as int8_linear. Saved for backward: nothing beyond the weights and counts, which are kept by reference; with an
    activation x too, T * K * itemsize bytes, and bias, by reference. On a GPU no weight becomes a float tensor, and
    nothing waits for the counts where Triton is installed; on a CPU a slice of one expert's weight is float at a time.
    Errors as in int8_grouped_matmul.
    """
    code = activation_code(NAME, activation)
    weight, scale = qweight
    op = torch.ops.pykernels.int8_grouped_linear.default
    return op(autocast(x), weight, scale, counts, bias, code, out_dtype)
