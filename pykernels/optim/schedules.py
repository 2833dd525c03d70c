"""Learning rates with a warm-up, as LambdaLR: linear, cosine and warm-up-stable-decay.

All rise linearly in `warmup_steps` steps, of which the first already has lr / warmup_steps, and end at `final` times
the optimizer's lr after `total_steps`. The objects are plain data, so that a scheduler's state_dict holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class _Schedule:
    warmup_steps: int
    total_steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if not 0 <= self.warmup_steps <= self.total_steps or self.total_steps < 1:
            raise ValueError(
                f"{name}: expected 0 <= warmup_steps <= total_steps and total_steps >= 1, "
                f"got {self.warmup_steps} and {self.total_steps}"
            )
        if not self.final >= 0.0:
            raise ValueError(f"{name}: expected final to be at least 0, got {self.final}")

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        rest = max(1, self.total_steps - self.warmup_steps)
        return self.after(min(1.0, (step - self.warmup_steps) / rest))

    def after(self, progress: float) -> float:
        """The factor once warm: progress goes from 0 to 1 at total_steps."""
        raise NotImplementedError


class Linear(_Schedule):
    """Falls in a line."""

    def after(self, progress: float) -> float:
        """As the base class says."""
        return 1.0 + (self.final - 1.0) * progress


class Cosine(_Schedule):
    """Falls along half a cosine (Loshchilov and Hutter, "SGDR", 2017, without restarts)."""

    def after(self, progress: float) -> float:
        """As the base class says."""
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass
class WSD(_Schedule):
    """Stays at 1, then falls in a line over the last decay_steps (Hu et al., "MiniCPM", 2024)."""

    decay_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay_steps <= self.total_steps - self.warmup_steps:
            raise ValueError(
                f"wsd: expected decay_steps from 0 to total_steps - warmup_steps = "
                f"{self.total_steps - self.warmup_steps}, got {self.decay_steps}"
            )

    def after(self, progress: float) -> float:
        """As the base class says."""
        left = (1.0 - progress) * max(1, self.total_steps - self.warmup_steps)
        return self.final + (1.0 - self.final) * min(1.0, left / max(1, self.decay_steps))


def linear(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, *, final: float = 0.0, last_epoch: int = -1
) -> LambdaLR:
    """Warm-up, then a line down to final * lr at total_steps. Call step() after each optimizer.step()."""
    return LambdaLR(optimizer, Linear(warmup_steps, total_steps, final), last_epoch)


def cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, *, final: float = 0.0, last_epoch: int = -1
) -> LambdaLR:
    """Warm-up, then half a cosine down to final * lr at total_steps. Call step() after each optimizer.step()."""
    return LambdaLR(optimizer, Cosine(warmup_steps, total_steps, final), last_epoch)


def wsd(
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    total_steps: int,
    *,
    decay_steps: int,
    final: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Warm-up, lr until decay_steps before total_steps, then a line down to final * lr: training can be prolonged from
    any stable step. Call step() after each optimizer.step()."""
    return LambdaLR(optimizer, WSD(warmup_steps, total_steps, final, decay_steps), last_epoch)
