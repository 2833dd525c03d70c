"""Layer norm that keeps its input and two numbers a row for backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as F
from ._norm_module import check_last_dimension


class LayerNorm(nn.LayerNorm):
    """Drop-in for ``torch.nn.LayerNorm`` over the last dimension, with the same parameters and state dict.

    Args:
        normalized_shape: K, or [K]; more dimensions raise ValueError.
        weight_offset: added to the weight, which is then initialised to 1 - weight_offset.

    Input [..., K] -> [..., K] in its dtype. Backward saves the input and 8 bytes a row: see
    ``pykernels.functional.layer_norm``, which also fuses a residual and INT8 quantisation.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset
        super().__init__(check_last_dimension(normalized_shape), eps, elementwise_affine, bias, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, eps=self.eps, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_offset={self.weight_offset}"
