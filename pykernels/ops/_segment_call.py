"""Around the operators that span several layers: checks, fake results, and what their Python functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS, check, check_device, check_dim, check_dtype, dtype_name
from ._enums import GATED_ACTIVATIONS
from ._segment import LAYER, NO_NORM, RMS, Norm

FLOATS64 = (*FLOATS, torch.float64)
NORMS = {None: NO_NORM, "rms_norm": RMS, "layer_norm": LAYER}
GATES = {name: code for name, code in GATED_ACTIVATIONS.items() if name != "relu2"}


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
    check(
        weight.shape[1] == k, op, f"expected {name} to have shape [N, {k}], with the K of x, got {list(weight.shape)}"
    )


def check_biases(op: str, weights: Sequence[Tensor], biases: Sequence[Tensor], biased: Sequence[int]) -> None:
    """One bias [N] for each weight that `biased` names."""
    check(len(biases) == len(biased), op, f"expected {len(biased)} biases, as biased names, got {len(biases)}")
    for index, bias in zip(biased, biases, strict=True):
        n = weights[index].shape[0]
        check(bias.shape == (n,), op, f"expected bias {index} to have shape [{n}], got {list(bias.shape)}")


def fake_statistics(norm: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty rstd and mean of the shapes that apply_norm gives, or of none."""
    dtype, shape = torch.promote_types(x.dtype, torch.float32), x.shape[:-1]
    return (
        x.new_empty((0,)) if norm == NO_NORM else x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=dtype) if norm == LAYER else x.new_empty((0,)),
    )


def fake_norm_gradients(
    norm: int,
    like: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of h, weight and bias, as norm_backward gives them."""
    if norm == NO_NORM or not any(wants):
        return like.new_empty(shape if any(wants) else (0,), dtype=dtype), like.new_empty(0), like.new_empty(0)
    weight_dtype = dtype if norm_weight is None else norm_weight.dtype
    bias_dtype = norm_bias.dtype if wants[2] and norm_bias is not None else dtype
    return (
        like.new_empty(shape, dtype=dtype),
        like.new_empty(shape[-1:] if wants[1] else (0,), dtype=weight_dtype),
        like.new_empty(shape[-1:] if wants[2] else (0,), dtype=bias_dtype),
    )


def like_parameters(parameters: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Empty gradients of the parameters at these places."""
    return [parameters[place].new_empty(parameters[place].shape) for place in places]


def refuse_second_backward(op: str) -> Callable[..., None]:
    """The backward of a backward operator."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{op}: a second derivative is not defined; build the layers one by one for it")

    return refuse


def norm_code(op: str, norm: str | None) -> int:
    """The number of a norm's name; ValueError names what is accepted."""
    return _code(op, "norm", norm, NORMS)


def gate_code(op: str, activation: str) -> int:
    """The number of a gate's activation; ValueError names what is accepted."""
    return _code(op, "activation", activation, GATES)


def _code(op: str, argument: str, name: Any, known: dict[Any, int]) -> int:
    try:
        return known[name]
    except (KeyError, TypeError):
        accepted = ", ".join(repr(key) for key in known)
        raise ValueError(f"{op}: expected {argument} to be one of {accepted}, got {name!r}") from None


def norm_eps(op: str, norm: int, eps: float | None) -> float:
    """eps as given, or the default of the norm; ValueError for a negative one."""
    if eps is None:
        return 1e-5 if norm == LAYER else 1e-6
    if not eps >= 0:
        raise ValueError(f"{op}: expected eps to be 0 or more, got {eps}")
    return eps


def saved_group(op: str, group_size: int | None, *inputs: Tensor | None) -> int:
    """The group size to save with, 0 for none: also where no input wants a gradient, so that nothing is saved."""
    if group_size is None:
        return 0
    if group_size < 1:
        raise ValueError(f"{op}: expected group_size to be None or at least 1, got {group_size}")
    return group_size if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs) else 0


def compute_dtype(op: str, x: Tensor, weights: Sequence[Tensor]) -> torch.dtype:
    """The dtype linear layers compute in: autocast's, or that of x, which the weights then have too."""
    device = x.device.type
    on = torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device)  # not on meta
    if on and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for weight in weights:
        same = f"expected each weight to be {dtype_name(x.dtype)}, as x (or autocast), got {dtype_name(weight.dtype)}"
        check(weight.dtype == x.dtype, op, same)
    return x.dtype


def split_biases(op: str, biases: Sequence[Tensor | None], count: int) -> tuple[list[Tensor], list[int]]:
    """The biases there are and their places; ValueError unless there is one, or None, for each of `count` weights."""
    if len(biases) != count:
        raise ValueError(
            f"{op}: expected bias to have one entry, or None, for each of the {count} weights, got {len(biases)}"
        )
    return [bias for bias in biases if bias is not None], [i for i, bias in enumerate(biases) if bias is not None]
