"""How many bytes of state a parameter costs: the formula that the planner uses and that tests measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ._base import FusedOptimizer
from ._state import table
from .adam import AdamW


def state_bytes(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    optimizer: type[FusedOptimizer] = AdamW,
    **kwargs: Any,
) -> int:
    """Bytes of the state of one parameter, the step's 4 included: `state_bytes((4096, 4096), torch.bfloat16, AdamW,
    state_bits=8, rounding="stochastic")`.

    shape: that of the parameter, or of a shard of it that is large enough to be quantised as the whole is.
    kwargs: the optimizer's own. For AdamW an element costs 8, 4 or 2 + 8 / block_size (state_bits 32, 16, 8), and 2
    more with rounding "kahan" or "split_master" (bfloat16).
    """
    probe = torch.empty(tuple(shape), dtype=dtype, device="meta", requires_grad=True)
    made = optimizer([probe], **kwargs)  # type: ignore[call-arg]
    group = made.param_groups[0]
    kept = table(group, made.slots(group), probe.shape, dtype)
    return 4 + sum(each.itemsize * math.prod(size) for each, size in kept.values())
