"""rms_norm: y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset) + bias, with h = x + residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd, _norm
from ._checks import names_argument

NAME = "rms_norm"
QUANTIZED = f"{NAME}_quantized"
BACKWARD = f"{NAME}_backward"
SCHEMA = f"{NAME}({_norm.FORWARD_ARGUMENTS.format(eps='1e-06')}) -> (Tensor, Tensor, Tensor)"
QUANTIZED_SCHEMA = f"{QUANTIZED}({_norm.FORWARD_ARGUMENTS.format(eps='1e-06')}) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = f"{BACKWARD}({_norm.BACKWARD_ARGUMENTS.format(mean='')}) -> (Tensor, Tensor, Tensor)"
_ops = torch.ops.pykernels


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.forward(NAME, x, weight, bias, residual, eps, weight_offset, keep_h, centre=False)[:3]


def fake(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.fake_forward(NAME, x, weight, bias, residual, keep_h)


def quantized_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.quantized(QUANTIZED, x, weight, bias, residual, eps, weight_offset, keep_h, centre=False)


def quantized_fake(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.fake_quantized(QUANTIZED, x, weight, bias, residual, keep_h)


def backward_reference(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float = 0.0,
    weight_grad: bool = True,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.backward(BACKWARD, grad, grad_h, h, weight, rstd, None, weight_offset, weight_grad, bias_dtype)


def backward_fake(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    weight_offset: float = 0.0,
    weight_grad: bool = True,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm.fake_backward(BACKWARD, grad, grad_h, h, weight, weight_grad, bias_dtype, rstd=rstd)


def backward(ctx: Any, grad: Tensor | None, grad_h: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    return _norm.run_backward(ctx, _ops.rms_norm_backward.default, grad, grad_h)


_library.define(SCHEMA, reference, fake)
_library.define(QUANTIZED_SCHEMA, quantized_reference, quantized_fake, triton=NAME)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, triton=NAME)
_autograd.register(NAME, backward, _norm.setup_context)
_autograd.register(QUANTIZED, _norm.refuse_gradient)
_autograd.register(BACKWARD, _norm.refuse_gradient)


@names_argument
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    prenorm: bool = False,
    quantize: bool = False,
) -> Any:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), with what stands around it in a model.

        h = x + residual                                                  (rounded to the dtype of x)
        y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset) + bias   (in float32, rounded once)

    x, residual: [..., K] float32, bfloat16 or float16. weight, bias: [K], each of any of the three dtypes; an absent
    weight is 1 and takes no offset. weight_offset: 1.0 for Gemma, whose weight is stored as a difference from 1.
    A residual of another float dtype is cast to that of x.

    Returns y in the dtype of x. prenorm: (y, h), h being the new residual stream (x itself without a residual).
    quantize: (int8 codes, float32 scale [...]) in place of y, exactly what quantize_rowwise makes of it.

    Saved for backward, in bytes, M rows of K columns:

        M*K*itemsize + 4*M    h and rstd; without a residual h is x, by reference

    and the weight by reference. Backward recomputes the rest and never divides by weight; h's gradient is added in the
    same pass; the parameters' gradients accumulate in float32, in an order that does not depend on the threads.

    Errors: RuntimeError names a wrong dtype, shape or device before anything runs; ValueError for a negative eps;
    NotImplementedError for quantize=True where a gradient is wanted, and for a second derivative.
    """
    return _norm.call(NAME, x, weight, bias, residual, eps, weight_offset, prenorm, quantize)
