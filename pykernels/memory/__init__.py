"""What autograd keeps for backward, made smaller: recompute it, move it to the host, or hold it in INT8."""

from .checkpoint import DIAL, CheckpointReport, checkpoint_
from .compress import compress_activations
from .offload import offload_activations

__all__ = ["DIAL", "CheckpointReport", "checkpoint_", "compress_activations", "offload_activations"]
