"""Converting models: configs, ``quantize_``, calibration, smoothing and checkpoints."""

from __future__ import annotations

from .config import (
    BF16Config,
    FP16Config,
    Int8DynamicConfig,
    Int8OutlierConfig,
    Int8StaticConfig,
    Int8TrainingConfig,
    Int8WeightOnlyConfig,
    QuantizationConfig,
)

# The configs come first: pykernels.nn needs them, and the modules below need pykernels.nn.
from .api import quantize_  # isort: skip
from .calibrate import CalibrationResult, InputStatistics, calibrate  # isort: skip
from .convert import CheckpointReport, Selection, quantize_checkpoint, quantize_folder  # isort: skip
from .container import CheckpointError  # isort: skip
from .load import load_checkpoint_  # isort: skip
from .report import QuantizationReport  # isort: skip
from .smooth import SmoothingReport, smooth_  # isort: skip

__all__ = [
    "BF16Config",
    "CalibrationResult",
    "CheckpointError",
    "CheckpointReport",
    "FP16Config",
    "InputStatistics",
    "Int8DynamicConfig",
    "Int8OutlierConfig",
    "Int8StaticConfig",
    "Int8TrainingConfig",
    "Int8WeightOnlyConfig",
    "QuantizationConfig",
    "QuantizationReport",
    "Selection",
    "SmoothingReport",
    "calibrate",
    "load_checkpoint_",
    "quantize_",
    "quantize_checkpoint",
    "quantize_folder",
    "smooth_",
]
