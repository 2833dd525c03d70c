"""What the norm layers share."""

from __future__ import annotations

from collections.abc import Sequence


def check_last_dimension(normalized_shape: int | Sequence[int]) -> list[int]:
    """[K]; raises ValueError for a norm over more than the last dimension."""
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if len(shape) != 1:
        raise ValueError(
            f"normalized_shape: got {shape}, accepts one size: the norm is over the last dimension (flatten the others)"
        )
    return shape
