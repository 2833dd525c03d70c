"""int8_linear_outliers: LLM.int8() (Dettmers et al., 2022): large activations in float, the rest in INT8.

y = int8(x without outliers) + (outliers of x) @ W. Three ways to choose the outliers, none of which reads anything
back to the host:
  columns (0): a fixed set of columns from calibration; their float weights are at hand, so the extra product is small;
  row (1):     every element with |x| > threshold, each row for itself: a row's result never depends on its neighbours;
  batch (2):   every column in which any row passes the threshold, as bitsandbytes does.
The last two have no fixed shape to gather into, so their float part is a full weight-only product.
"""

from typing import Any

import torch

from .. import _library
from . import _autograd
from ._checks import FLOATS, check, check_device, check_dtype
from ._weight_grad import grad_input
from .int8_linear import check_weight

NAME = "int8_linear_outliers"
MODES = {"columns": 0, "row": 1, "batch": 2}
SCHEMA = (
    f"{NAME}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, float threshold=6.0, int mode=1, "
    "Tensor? columns=None, Tensor? weight_fp=None) -> Tensor"
)


def check_arguments(
    x: torch.Tensor,
    weight: torch.Tensor,
    threshold: float,
    mode: int,
    columns: torch.Tensor | None,
    weight_fp: torch.Tensor | None,
) -> None:
    """The outlier arguments; int8_linear checks the others."""
    check_weight(NAME, x, weight)
    check(mode in MODES.values(), NAME, f"expected mode to be 0 (columns), 1 (row) or 2 (batch), got {mode}")
    check(threshold > 0, NAME, f"expected threshold to be positive, got {threshold}")
    if mode != MODES["columns"]:
        check(columns is None and weight_fp is None, NAME, "expected columns and weight_fp with mode 'columns' only")
        return
    check(
        columns is not None and weight_fp is not None,
        NAME,
        "expected columns and weight_fp with mode 'columns', got None",
    )
    assert columns is not None and weight_fp is not None
    check_dtype(NAME, "columns", columns, torch.int64)
    check_dtype(NAME, "weight_fp", weight_fp, *FLOATS)
    check_device(NAME, "columns", columns, "x", x)
    check_device(NAME, "weight_fp", weight_fp, "x", x)
    shape = [weight.shape[0], columns.numel()]
    check(
        columns.dim() == 1 and list(weight_fp.shape) == shape,
        NAME,
        f"expected weight_fp to have shape {shape}, the columns of the float weight, got {list(weight_fp.shape)}",
    )


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    threshold: float = 6.0,
    mode: int = 1,
    columns: torch.Tensor | None = None,
    weight_fp: torch.Tensor | None = None,
) -> torch.Tensor:
    check_arguments(x, weight, threshold, mode, columns, weight_fp)
    ops = torch.ops.pykernels
    if mode == MODES["columns"]:
        assert columns is not None and weight_fp is not None
        kept = x.index_select(-1, columns)
        rest = x.index_fill(-1, columns, 0.0)
        outliers = torch.nn.functional.linear(kept.float(), weight_fp.float())
        return ops.int8_linear(rest, weight, weight_scale, bias, outliers, 0, None, x.dtype)
    large = x.abs() > threshold
    if mode == MODES["batch"]:
        large = large.flatten(0, -2).any(0).expand_as(x)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    outliers = ops.int8_weight_only_linear(torch.where(large, x, zero).float(), weight, weight_scale, None, 0)
    return ops.int8_linear(torch.where(large, zero, x), weight, weight_scale, bias, outliers, 0, None, x.dtype)


def fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    threshold: float = 6.0,
    mode: int = 1,
    columns: torch.Tensor | None = None,
    weight_fp: torch.Tensor | None = None,
) -> torch.Tensor:
    check_arguments(x, weight, threshold, mode, columns, weight_fp)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, bias, _, mode, columns, weight_fp = inputs
    ctx.mode, ctx.x_dtype, ctx.x_shape = mode, x.dtype, x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, weight_scale, columns, weight_fp)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale, columns, weight_fp = ctx.saved_tensors
    flat = grad.reshape(-1, weight.shape[0])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad_input(flat, weight, weight_scale, torch.float32)
        if columns is not None:
            grad_x = grad_x.index_copy(1, columns, flat.float() @ weight_fp.float())
        grad_x = grad_x.to(ctx.x_dtype).reshape(ctx.x_shape)
    if ctx.needs_input_grad[3]:
        grad_bias = flat.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None, None


_library.define(SCHEMA, reference, fake, composite=True)
_autograd.register(NAME, backward, setup_context)
