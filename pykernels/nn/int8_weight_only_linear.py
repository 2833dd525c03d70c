"""Linear layer with an INT8 weight and float activations (W8A16)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from ..quantization.config import Int8WeightConfig, Int8WeightOnlyConfig
from .int8_linear import Int8Linear


class Int8WeightOnlyLinear(Int8Linear):
    """``y = x @ (weight * scale).T + bias`` with the weight dequantised in registers, never as a tensor.

    Buffers are those of ``Int8Linear``; with ``group_size`` g, ``scale`` is float32 [out_features, in_features / g].

    Raises:
        ValueError: ``in_features`` is not a multiple of ``group_size``.
    """

    mode = "weight_only"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if group_size is not None and (group_size < 1 or in_features % group_size):
            raise ValueError(f"group_size: got {group_size}, accepts a divisor of in_features = {in_features}.")
        self._group_size = group_size
        self._groups = None if group_size is None else in_features // group_size
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale, or None for one scale a row."""
        return self._group_size

    def _scale_shape(self) -> tuple[int, ...]:
        return (self.out_features,) if self._groups is None else (self.out_features, self._groups)

    @classmethod
    def _from_checked(cls, linear: nn.Linear, config: Int8WeightConfig, name: str) -> Int8Linear:
        group_size = config.group_size if isinstance(config, Int8WeightOnlyConfig) else None
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, group_size=group_size, device="meta"
        )
        weight = linear.weight.detach()
        quantized = F.quantize_rowwise(weight) if group_size is None else F.quantize_blockwise(weight, group_size)
        layer.weight, layer.scale = quantized
        layer._copy_bias(linear)
        return layer

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.group_size is None:
            return super().dequantized_weight(dtype)
        return F.dequantize_blockwise(self.weight, self.scale, self.group_size, out_dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.int8_weight_only_linear(input, (self.weight, self.scale), self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.group_size is None else f", group_size={self.group_size}")
