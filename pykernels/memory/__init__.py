"""What a training step keeps in memory, made smaller: recomputed, on the host, in INT8; and planned beforehand."""

from .checkpoint import CheckpointReport, checkpoint_
from .compress import compress_activations
from .offload import offload_activations
from .planner import DoesNotFit, Plan, plan
from .recipe import Recipe
from .search import search

__all__ = [
    "CheckpointReport",
    "DoesNotFit",
    "Plan",
    "Recipe",
    "checkpoint_",
    "compress_activations",
    "offload_activations",
    "plan",
    "search",
]
