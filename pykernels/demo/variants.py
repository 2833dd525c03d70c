"""The forms in which each model is measured, from float32 to INT8."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import pykernels

Batches = Sequence[Any]
BASELINE = "float32"
# 6, from models a hundred times larger, leaves most of the outliers of SmolLM2 in: its loss then rises by 0.017.
OUTLIER_THRESHOLD = 3.0


class Absent(RuntimeError):
    """A variant that cannot be made on this machine; the message is the reason."""


@dataclass(frozen=True)
class Variant:
    """A name for the table and the function that turns a private float32 copy of the model into it."""

    name: str
    convert: Callable[[nn.Module, Batches], nn.Module]

    def build(self, model: nn.Module, calibration: Batches) -> nn.Module:
        """A converted copy of ``model``, which stays as it was.

        Raises:
            Absent: this machine or installation cannot make it.
        """
        return self.convert(copy.deepcopy(model), calibration).eval()


def _linears(model: nn.Module) -> Iterator[str]:
    return (name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name)


def _float32(model: nn.Module, calibration: Batches) -> nn.Module:
    return model


def _bfloat16(model: nn.Module, calibration: Batches) -> nn.Module:
    return model.to(torch.bfloat16)


def _torch_dynamic(model: nn.Module, calibration: Batches) -> nn.Module:
    if next(model.parameters()).device.type != "cpu":
        raise Absent("torch.ao.quantization.quantize_dynamic runs on the CPU only")
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if not engines:
        raise Absent("this torch was built without a quantized engine")
    qconfig = dict.fromkeys(_linears(model), torch.ao.quantization.default_dynamic_qconfig)
    return torch.ao.quantization.quantize_dynamic(model, qconfig, dtype=torch.qint8, inplace=True)


def _w8a8(model: nn.Module, calibration: Batches) -> nn.Module:
    pykernels.quantize_(model, pykernels.Int8DynamicConfig())
    return model


def _w8a8_smoothed(model: nn.Module, calibration: Batches) -> nn.Module:
    pykernels.quantization.smooth_(model, calibration, progress=False)
    return _w8a8(model, calibration)


def _w8a8_outliers(model: nn.Module, calibration: Batches) -> nn.Module:
    result = pykernels.quantization.calibrate(model, calibration, progress=False)
    pykernels.quantize_(model, pykernels.Int8OutlierConfig(OUTLIER_THRESHOLD, result))
    return model


def _w8a16(model: nn.Module, calibration: Batches) -> nn.Module:
    pykernels.quantize_(model, pykernels.Int8WeightOnlyConfig())
    return model


VARIANTS = (
    Variant(BASELINE, _float32),
    Variant("bf16", _bfloat16),
    Variant("torch dynamic INT8", _torch_dynamic),
    Variant("pykernels W8A8", _w8a8),
    Variant("pykernels W8A8 smoothed", _w8a8_smoothed),
    Variant("pykernels W8A8 outliers", _w8a8_outliers),
    Variant("pykernels W8A16", _w8a16),
)
