"""int8_grouped_linear: rows quantised on the way into int8_grouped_matmul, for the experts of a mixture (W8A8)."""

from typing import Any, NoReturn

import torch

from .. import _library
from . import _autograd, int8_grouped_matmul, quantize_rowwise
from ._autocast import autocast
from ._checks import FLOATS, check, check_dtype, names
from ._enums import ACTIVATIONS, activation_code
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


REFUSAL = f"{NAME}: no gradient is defined; use torch.no_grad(), or int8_linear for each expert, which has one"


def backward(ctx: Any, grad: torch.Tensor) -> NoReturn:
    raise NotImplementedError(REFUSAL)


_library.define(SCHEMA, reference, fake)
_autograd.register(NAME, backward)


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
    For inference: saves nothing, and NotImplementedError where x or bias wants a gradient. Other errors as in
    int8_grouped_matmul.
    """
    code = activation_code(NAME, activation)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise NotImplementedError(REFUSAL)
    weight, scale = qweight
    op = torch.ops.pykernels.int8_grouped_linear.default
    return op(autocast(x), weight, scale, counts, bias, code, out_dtype)
