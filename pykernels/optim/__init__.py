"""Optimizers with torch.optim's arguments: one launch for many tensors, state in 32, 16 or 8 bits, DTensors welcome."""

from . import schedules
from ._base import FusedOptimizer
from ._state import StateOptions
from .adagrad import Adagrad
from .adam import Adam, Adam8bit, AdamW, AdamW8bit
from .clip import clip_grad_norm_
from .in_backward import OptimizerInBackward, optimizer_in_backward
from .lamb import LAMB, LAMB8bit
from .lion import Lion, Lion8bit
from .noise_scale import GradientNoiseScale
from .rmsprop import RMSprop
from .schedules import cosine, linear, wsd
from .sgd import SGD
from .state_bytes import state_bytes

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "FusedOptimizer",
    "GradientNoiseScale",
    "LAMB8bit",
    "Lion",
    "Lion8bit",
    "OptimizerInBackward",
    "RMSprop",
    "StateOptions",
    "clip_grad_norm_",
    "cosine",
    "linear",
    "optimizer_in_backward",
    "schedules",
    "state_bytes",
    "wsd",
]
