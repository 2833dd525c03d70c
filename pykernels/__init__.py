"""Fused INT8 kernels, memory-saving blocks and optimizers for PyTorch, on the CPU and the GPU."""

from . import _library, ops
from ._library import backend, cpu_isa

_library.load()

from . import functional  # noqa: E402 the functions bind the operators that are loaded above

__version__ = "0.1.0"
__all__ = ["backend", "cpu_isa", "functional", "ops"]
