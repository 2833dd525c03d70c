"""Optimizers with torch.optim's arguments: one launch for many tensors, state in 32, 16 or 8 bits, DTensors welcome."""

from ._base import FusedOptimizer
from ._state import StateOptions
from .adam import Adam, Adam8bit, AdamW, AdamW8bit

__all__ = ["Adam", "Adam8bit", "AdamW", "AdamW8bit", "FusedOptimizer", "StateOptions"]
