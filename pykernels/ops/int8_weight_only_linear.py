"""int8_weight_only_linear: float activations, int8 weight dequantised in registers (W8A16)."""

from typing import Any

import torch
import torch.nn.functional as tf

from .. import _library
from . import _autograd
from ._checks import check, check_device, check_dtype, check_vector
from ._enums import ACTIVATIONS
from ._epilogue import activate, check_epilogue
from ._weight_grad import grad_input
from .int8_linear import check_weight

NAME = "int8_weight_only_linear"
SCHEMA = f"{NAME}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, int activation=0) -> Tensor"


def check_arguments(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, activation: int
) -> None:
    """weight_scale holds one value for each row of weight, or one for each group of columns in a row."""
    check_weight(NAME, x, weight)
    check_dtype(NAME, "weight_scale", weight_scale, torch.float32)
    check_device(NAME, "weight_scale", weight_scale, "x", x)
    n, k = weight.shape
    if weight_scale.dim() == 2:
        groups = weight_scale.shape[1]
        check(
            weight_scale.shape[0] == n and groups > 0 and k % groups == 0,
            NAME,
            f"expected weight_scale to have shape [{n}, groups] with groups a divisor of K = {k}, "
            f"got {list(weight_scale.shape)}",
        )
    else:
        check_vector(NAME, "weight_scale", weight_scale, n, "row of weight")
    check_epilogue(NAME, x, x.shape[:-1], n, bias, None, activation)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: int = 0,
) -> torch.Tensor:
    check_arguments(x, weight, weight_scale, bias, activation)
    scale = weight_scale if weight_scale.dim() == 2 else weight_scale[:, None]
    group = weight.shape[1] // scale.shape[1] if scale.shape[1] else 1
    floats = weight.float() * scale.repeat_interleave(group, dim=1)
    out = tf.linear(x.float(), floats, None if bias is None else bias.float())
    return activate(out, activation).to(x.dtype)


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: int = 0,
) -> torch.Tensor:
    check_arguments(x, weight, weight_scale, bias, activation)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, bias, activation = inputs
    ctx.activation, ctx.x_dtype, ctx.x_shape = activation, x.dtype, x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    again = activation != ACTIVATIONS[None]
    ctx.save_for_backward(weight, weight_scale, *((x, bias) if again else (None, None)))


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale, x, bias = ctx.saved_tensors
    if ctx.activation != ACTIVATIONS[None]:
        pre = torch.ops.pykernels.int8_weight_only_linear(x, weight, weight_scale, bias, 0)
        with torch.enable_grad():
            pre = pre.float().detach().requires_grad_()
            (grad,) = torch.autograd.grad(activate(pre, ctx.activation), pre, grad.float())
    flat = grad.reshape(-1, weight.shape[0])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(flat, weight, weight_scale, ctx.x_dtype).reshape(ctx.x_shape)
    if ctx.needs_input_grad[3]:
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


_library.define(SCHEMA, reference, fake)
_autograd.register(NAME, backward, setup_context)
