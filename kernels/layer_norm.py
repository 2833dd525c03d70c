"""layer_norm: the launchers of its three operators."""

from __future__ import annotations

import torch

from . import _norm


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    keep_h: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd, mean); see pykernels.functional.layer_norm."""
    return _norm.forward(x, weight, bias, residual, eps, weight_offset, keep_h, centre=True, quantize=False)


def layer_norm_quantized(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    keep_h: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scale, h)."""
    q, h, scale, _ = _norm.forward(x, weight, bias, residual, eps, weight_offset, keep_h, centre=True, quantize=True)
    return q, scale, h


def layer_norm_backward(
    grad: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    mean: torch.Tensor,
    weight_offset: float = 0.0,
    weight_grad: bool = True,
    bias_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_x, grad_weight, grad_bias)."""
    return _norm.backward(grad, grad_h, h, weight, rstd, mean, weight_offset, weight_grad, bias_dtype)
