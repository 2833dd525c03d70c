"""What a step sees, as a function of the seed and the step alone: nothing to restore when a run goes on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import TrainingError

HELD_OUT = 20  # one part in so many of the tokens, the last, is never trained on


def seed_of(seed: int, step: int) -> int:
    """Torch's CPU generator reads 32 bits of a seed; this spreads both numbers over them."""
    return (seed * 0x9E3779B1 + step) % 2**32


def windows(tokens: Tensor, batch: int, context: int, count: int, seed: int) -> Tensor:
    """int64 [count, batch, context + 1] from random places of tokens [N]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - context - 1, (count, batch, 1), generator=generator)
    return tokens[starts + torch.arange(context + 1)].long()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


class Batches:
    """batches(step) is int64 [batch, context + 1]; `held_out` is a list of such. A rank of several gets its rows."""

    def __init__(
        self, tokens: Tensor, batch: int, context: int, seed: int, validation: int, rank: int = 0, ranks: int = 1
    ) -> None:
        cut = len(tokens) - len(tokens) // HELD_OUT
        if len(tokens) // HELD_OUT < context + 2:
            raise TrainingError(
                f"the corpus has {len(tokens):,} tokens, --context {context} needs {HELD_OUT * (context + 2):,}, of "
                f"which one in {HELD_OUT} is held out: give more text or a smaller --context."
            )
        self._train, self._shape, self._seed = tokens[:cut], (batch, context), seed
        self._rows = slice(batch // ranks * rank, batch // ranks * (rank + 1))
        self.held_out = [b[self._rows] for b in windows(tokens[cut:], batch, context, validation, seed_of(seed, -1))]

    def __call__(self, step: int) -> Tensor:
        return windows(self._train, *self._shape, 1, seed_of(self._seed, step))[0][self._rows]
