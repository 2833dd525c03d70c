"""Optimizers on many ranks, on PyTorch's own engine: FSDP2, DTensor and torch.distributed.checkpoint.

Only the planner is imported at once; the rest is when it is first asked for, since torch.distributed.tensor is slow to
import and some builds of torch lack it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .memory import memory_per_rank, state_bytes_per_parameter

if TYPE_CHECKING:
    from ._manifest import CheckpointError
    from .checkpoint import load_checkpoint, save_checkpoint
    from .offload import OffloadedOptimizer
    from .replicated import ReplicatedOptimizer
    from .sharding import zero

_LAZY = {
    "OffloadedOptimizer": "offload",
    "CheckpointError": "_manifest",
    "ReplicatedOptimizer": "replicated",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "zero": "sharding",
}
__all__ = [
    "CheckpointError",
    "OffloadedOptimizer",
    "ReplicatedOptimizer",
    "load_checkpoint",
    "memory_per_rank",
    "save_checkpoint",
    "state_bytes_per_parameter",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    if not torch.distributed.is_available():
        raise RuntimeError(f"pykernels.distributed.{name} needs torch.distributed, which this build of torch lacks")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
