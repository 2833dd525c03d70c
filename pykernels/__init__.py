"""Fused INT8 kernels, memory-saving blocks and optimizers for PyTorch, on the CPU and the GPU."""

from . import _library, ops
from ._library import backend, cpu_isa

_library.load()

from . import (  # noqa: E402
    distributed,
    functional,
    memory,
    nn,
    optim,
    quantization,
)
from .quantization import (  # noqa: E402
    BF16Config,
    FP16Config,
    Int8DynamicConfig,
    Int8OutlierConfig,
    Int8StaticConfig,
    Int8TrainingConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

__version__ = "0.1.0"
__all__ = [
    "BF16Config",
    "FP16Config",
    "Int8DynamicConfig",
    "Int8OutlierConfig",
    "Int8StaticConfig",
    "Int8TrainingConfig",
    "Int8WeightOnlyConfig",
    "backend",
    "cpu_isa",
    "distributed",
    "functional",
    "memory",
    "nn",
    "ops",
    "optim",
    "quantization",
    "quantize_",
]
