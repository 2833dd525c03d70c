"""int8_block_scaled_linear: x quantised by blocks of 128 along K, then int8_block_scaled_matmul (W8A8)."""

from typing import Any

import torch

from .. import _library
from . import _autograd
from ._autocast import autocast
from ._checks import FLOATS, check, check_device, check_dtype, check_vector, names
from ._weight_grad import SLICE
from .int8_block_scaled_matmul import BLOCK, check_block_scale
from .int8_linear import check_weight
from .quantize_blockwise import expand_blocks

NAME = "int8_block_scaled_linear"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor"
)


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_weight(NAME, x, weight)
    grid = [-(-size // BLOCK) for size in weight.shape]
    check_block_scale(NAME, "weight_scale", weight_scale, grid, "tile of 128 x 128", "x", x)
    if bias is not None:
        check_dtype(NAME, "bias", bias, *FLOATS)
        check_device(NAME, "bias", bias, "x", x)
        check_vector(NAME, "bias", bias, weight.shape[0], "output column")
    check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)}, got {out_dtype}")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or x.dtype
    check_arguments(x, weight, weight_scale, bias, out_dtype)
    ops = torch.ops.pykernels
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
    q, scale = ops.quantize_blockwise.default(rows, [BLOCK])
    out = ops.int8_block_scaled_matmul.default(q, weight, scale, weight_scale, bias, out_dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or x.dtype
    check_arguments(x, weight, weight_scale, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, bias, _ = inputs
    ctx.x_dtype, ctx.x_shape = x.dtype, x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, weight_scale)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    flat = grad.reshape(-1, weight.shape[0])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(flat, weight, weight_scale).to(ctx.x_dtype).reshape(ctx.x_shape)
    if ctx.needs_input_grad[3]:
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


def grad_input(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """grad [M, N] by the dequantised weight, a slice of its rows at a time: float32 [M, K]."""
    n, k = weight.shape
    with torch.autocast(grad.device.type, enabled=False):
        total = torch.zeros(grad.shape[0], k, dtype=torch.float32, device=grad.device)
        for begin in range(0, n, SLICE):
            part = weight[begin : begin + SLICE]
            blocks = scale[begin // BLOCK : (begin + SLICE) // BLOCK]
            part = part.float() * expand_blocks(blocks, part.shape, [BLOCK, BLOCK])
            total = total.addmm(grad[:, begin : begin + SLICE].float(), part)
        return total


_library.define(SCHEMA, reference, fake, composite=True)
_autograd.register(NAME, backward, setup_context)


def int8_block_scaled_linear(
    x: torch.Tensor,
    qweight: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x @ W.T + bias with x quantised in blocks of 128 along K on the fly: int8_linear where outliers cost too much.

    x [..., K] float; qweight (int8 [N, K], float32 [ceil(N / 128), ceil(K / 128)]), as quantize_blockwise(W, (128,
    128)) returns; bias [N] -> [..., N] in out_dtype (default: that of x).
    Differentiable in x and bias, through the dequantised weight (straight-through). Saved for backward: nothing beyond
    the weight, which is kept by reference. Under autocast x is cast as linear would cast it.
    Errors: RuntimeError names the argument, before anything runs.
    """
    weight, scale = qweight
    return torch.ops.pykernels.int8_block_scaled_linear.default(autocast(x), weight, scale, bias, out_dtype)
