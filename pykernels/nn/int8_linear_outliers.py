"""Linear layer with an INT8 product for ordinary activations and a float one for the outliers (LLM.int8())."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from ..quantization.config import Int8OutlierConfig, Int8WeightConfig
from .int8_linear import Int8Linear


class Int8OutlierLinear(Int8Linear):
    """``Int8Linear`` that multiplies outlier activations in float (arXiv 2208.07339).

    With ``columns``, the calibrated columns are outliers in every call: their INT8 codes are zero, and their float
    weights are kept beside. Without (None), each row takes its elements above ``threshold``, and these are multiplied
    with the dequantised INT8 weight. Either way a row's result does not depend on the rows beside it.

    Buffers: those of ``Int8Linear``, and with columns
        outlier_columns: int64 [columns].
        outlier_weight: [out_features, columns] in the layer's float dtype.
    A checkpoint may bring another number of columns than the layer has.
    """

    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    mode = "outlier"
    fixed_dtypes: ClassVar = Int8Linear.fixed_dtypes | {"outlier_columns": torch.int64}
    resizable_dims: ClassVar = {"outlier_columns": (0,), "outlier_weight": (1,)}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        columns: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.threshold = threshold
        indices = weight = None
        if columns is not None:
            indices = torch.zeros(columns, dtype=torch.int64, device=device)
            weight = torch.zeros(out_features, columns, dtype=dtype, device=device)
        self.register_buffer("outlier_columns", indices)
        self.register_buffer("outlier_weight", weight)

    @classmethod
    def _from_checked(cls, linear: nn.Linear, config: Int8WeightConfig, name: str) -> Int8Linear:
        if not isinstance(config, Int8OutlierConfig):
            raise TypeError(f"config: got {config!r}, accepts Int8OutlierConfig.")
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, threshold=config.threshold, device="meta"
        )
        weight = linear.weight.detach()
        if config.calibration is not None:
            columns = config.calibration.outlier_columns(name, config.threshold).to(weight.device)
            layer.outlier_columns = columns
            layer.outlier_weight = weight.index_select(1, columns)
            weight = weight.index_fill(1, columns, 0)
        layer.weight, layer.scale = F.quantize_rowwise(weight)
        layer._copy_bias(linear)
        return layer

    def _state_dict_problems(self, own: dict[str, Tensor], found: dict[str, Tensor], prefix: str) -> list[str]:
        problems = super()._state_dict_problems(own, found, prefix)
        if problems or self.outlier_columns is None:
            return problems
        columns, width = found["outlier_columns"], found["outlier_weight"].shape[1]
        if columns.numel() != width:
            problems.append(
                f"{prefix}outlier_weight: got {width} columns, accepts {columns.numel()} (outlier_columns)."
            )
        elif columns.numel() and (columns.min() < 0 or columns.max() >= self.in_features):
            problems.append(f"{prefix}outlier_columns: accepts indices in [0, {self.in_features}), got others.")
        return problems

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = super().dequantized_weight(dtype)
        if self.outlier_columns is None or self.outlier_weight is None:
            return weight
        return weight.index_copy(1, self.outlier_columns, self.outlier_weight.to(dtype))

    def forward(self, input: Tensor) -> Tensor:
        qweight = (self.weight, self.scale)
        if self.outlier_columns is not None and self.outlier_columns.numel() == 0:
            return F.int8_linear(input, qweight, self.bias)
        return F.int8_linear_outliers(
            input, qweight, self.outlier_weight, self.threshold, columns=self.outlier_columns, bias=self.bias
        )

    def extra_repr(self) -> str:
        chosen = "per row" if self.outlier_columns is None else self.outlier_columns.numel()
        return f"{super().extra_repr()}, threshold={self.threshold}, outlier_columns={chosen}"
