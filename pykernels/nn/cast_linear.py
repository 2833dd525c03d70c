"""Linear layer that computes in a 16-bit float and answers in the dtype of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """``nn.Linear`` whose parameters are bfloat16 or float16, in a model whose activations may be of another dtype.

    The input [..., in_features] of any float dtype is cast to the weight's, and the output back to the input's.
    """

    @classmethod
    def from_float(cls, linear: nn.Linear, dtype: torch.dtype, *, name: str = "") -> CastLinear:
        """Cast a copy of ``linear``; raises ValueError, with ``name``, unless its values are finite in ``dtype``."""
        cast = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=dtype)
        for key, parameter in linear.named_parameters(recurse=False):
            value = parameter.detach().to(dtype, copy=True)
            if value.device.type != "meta" and not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"{name or cls.__name__}.{key}: got NaN or values outside {dtype}, accepts finite ones."
                )
            setattr(cast, key, nn.Parameter(value, requires_grad=parameter.requires_grad))
        return cast.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)
