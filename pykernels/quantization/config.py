"""What ``quantize_`` can do to a linear layer, one dataclass each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..functional import Int8TrainingConfig as Int8TrainingConfig

if TYPE_CHECKING:
    from .calibrate import CalibrationResult


@dataclass(frozen=True)
class Int8DynamicConfig:
    """W8A8: INT8 weight with a scale per row, activations quantised per token at every call."""


@dataclass(frozen=True)
class Int8WeightOnlyConfig:
    """W8A16: INT8 weight, float activations.

    Args:
        group_size: columns that share a scale; None for one scale a row. It must divide ``in_features``.
    """

    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise ValueError(f"group_size: got {self.group_size!r}, accepts None or a positive int.")


@dataclass(frozen=True)
class Int8StaticConfig:
    """W8A8 with one fixed activation scale a layer.

    Args:
        calibration: what ``pykernels.quantization.calibrate`` returned for this model.
    """

    calibration: CalibrationResult = field(repr=False)


@dataclass(frozen=True)
class Int8OutlierConfig:
    """W8A8 that keeps the activations above ``threshold`` in float (LLM.int8(), arXiv 2208.07339).

    Args:
        threshold: magnitude above which an activation is an outlier.
        calibration: what ``calibrate`` returned. With it, the columns whose absmax passes ``threshold`` are outliers
            in every call, and their weights are kept in float. Without it, each row picks its own outliers at every
            call, and they are multiplied with the dequantised INT8 weight: no float copy, but two products.
    """

    threshold: float = 6.0
    calibration: CalibrationResult | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold: got {self.threshold!r}, accepts a positive number.")


@dataclass(frozen=True)
class BF16Config:
    """Weight and product in bfloat16; the input is cast, and the output has the dtype of the input."""


@dataclass(frozen=True)
class FP16Config:
    """Weight and product in float16; the input is cast, and the output has the dtype of the input."""


Int8WeightConfig = Int8DynamicConfig | Int8WeightOnlyConfig | Int8StaticConfig | Int8OutlierConfig
QuantizationConfig = Int8WeightConfig | Int8TrainingConfig | BF16Config | FP16Config
