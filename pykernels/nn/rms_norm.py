"""Root-mean-square norm that keeps its input and one number a row for backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as F
from ._norm_module import check_last_dimension


class RMSNorm(nn.RMSNorm):
    """Drop-in for ``torch.nn.RMSNorm`` over the last dimension, with the same parameters and state dict.

    Args:
        normalized_shape: K, or [K]; more dimensions raise ValueError.
        eps: None takes the machine epsilon of the statistics, 2^-23 for any input, as ``torch.nn.RMSNorm`` does.
        weight_offset: added to the weight; 1.0 for Gemma, whose weight is then initialised to 0.

    Input [..., K] -> [..., K] in its dtype. Backward saves the input and 4 bytes a row: see
    ``pykernels.functional.rms_norm``, which also fuses a residual and INT8 quantisation.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset
        super().__init__(check_last_dimension(normalized_shape), eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        return F.rms_norm(x, self.weight, eps=eps, weight_offset=self.weight_offset)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_offset={self.weight_offset}"
