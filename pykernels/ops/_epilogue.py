"""The epilogue of every INT8 product: scales, zero point, bias, activation, residual; its reference and its checks."""

import torch
import torch.nn.functional as tf

from ._checks import FLOATS, check, check_device, check_dtype, check_one_or_each, check_vector
from ._enums import ACTIVATIONS


def activate(x: torch.Tensor, activation: int) -> torch.Tensor:
    """The activation of a number from _enums.ACTIVATIONS."""
    if activation == 1:
        return tf.relu(x)
    if activation == 2:
        return tf.gelu(x)
    if activation == 3:
        return tf.gelu(x, approximate="tanh")
    if activation == 4:
        return tf.silu(x)
    return x


def check_epilogue(
    op: str,
    a: torch.Tensor,
    rows: torch.Size,
    n: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
) -> None:
    """bias [N] and residual [*rows, N] are floats on the device of a; the activation is one of those that exist."""
    check(activation in ACTIVATIONS.values(), op, f"expected activation to be 0 to 4, got {activation}")
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_device(op, "bias", bias, "the input", a)
        check_vector(op, "bias", bias, n, "output column")
    if residual is not None:
        check_dtype(op, "residual", residual, *FLOATS)
        check_device(op, "residual", residual, "the input", a)
        check(
            residual.shape == torch.Size([*rows, n]),
            op,
            f"expected residual to have shape {[*rows, n]}, as the result, got {list(residual.shape)}",
        )


def check_scale(op: str, name: str, scale: torch.Tensor | None, a: torch.Tensor, length: int, of: str) -> None:
    """None, or float32 with one element or one for each row or column."""
    if scale is None:
        return
    check_dtype(op, name, scale, torch.float32)
    check_device(op, name, scale, "the input", a)
    check_one_or_each(op, name, scale, length, of)


def epilogue(
    value: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """value [M, N], exact -> (value * a_scale * b_scale + bias), activated, + residual, in float32, rounded once."""
    out = value.float()
    if a_scale is not None:
        out = out * (a_scale.reshape(-1, 1) if a_scale.numel() != 1 else a_scale.reshape(()))
    if b_scale is not None:
        out = out * (b_scale if b_scale.numel() != 1 else b_scale.reshape(()))
    if bias is not None:
        out = out + bias.float()
    out = activate(out, activation)
    if residual is not None:
        out = out + residual.float()
    return out.to(out_dtype)
