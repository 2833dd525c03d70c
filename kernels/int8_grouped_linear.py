"""int8_grouped_linear: two launches, quantize_rowwise and int8_grouped_matmul, with only int8 between them."""

from __future__ import annotations

import torch

from ._common import check_float
from .int8_grouped_matmul import int8_grouped_matmul
from .quantize_rowwise import quantize_rowwise


def int8_grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [T, K] float sorted by expert, weight int8 [E, N, K], counts [E], to [T, N]; see pykernels.functional."""
    check_float(x, dims=2)
    q, scale = quantize_rowwise(x)
    return int8_grouped_matmul(q, weight, counts, scale, weight_scale, bias, activation, out_dtype or x.dtype)
