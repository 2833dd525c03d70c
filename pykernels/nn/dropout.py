"""Dropout: torch.nn.Dropout that keeps 16 bytes for backward instead of a mask."""

from __future__ import annotations

import torch

from .. import functional


class Dropout(torch.nn.Dropout):
    """functional.dropout as a layer, with an optional residual: forward(x, residual=None) -> residual + drop(x).

    p: in [0, 1]. Saved for backward: the key, 16 bytes whatever the size of x; nothing in eval mode and with p = 0.
    Nothing is done in place, so inplace=True is refused. Errors: ValueError for p outside [0, 1], or for inplace=True.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        if inplace:
            raise ValueError("Dropout: expected inplace to be False, got True: use the result, which takes x's place")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"Dropout: expected p to be from 0 to 1, got {p}")
        super().__init__(p, inplace)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        return functional.dropout(x, self.p, training=self.training, residual=residual)
