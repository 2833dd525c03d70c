"""memory_per_rank: what a rank keeps for parameters, gradients and optimizer state, after Rajbhandari et al., "ZeRO",
2020 (equations of section 5), with the state's width and the rounding of this package's optimizers."""

from __future__ import annotations

import torch

from ..ops._optimizer_reference import ALGORITHMS, MOMENTUM, ROUNDINGS, slots

STAGES = (0, 1, 2, 3)
STATE_BITS = (32, 16, 8)
# Flags of the algorithms as they are used most: SGD with momentum, RMSprop without.
FLAGS = {"adam": 0, "adamw": 0, "lamb": 0, "lion": 0, "sgd": MOMENTUM, "adagrad": 0, "rmsprop": 0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def state_bytes_per_parameter(
    state_bits: int = 32,
    rounding: str | None = None,
    *,
    algorithm: str = "adamw",
    param_dtype: torch.dtype = torch.bfloat16,
    block_size: int = 256,
) -> float:
    """Bytes of optimizer state for one parameter, the paper's K.

    `state_bits`: 32, 16 or 8 for each moment (8: a float32 scale for each block_size codes as well). `rounding`:
    "nearest" and "stochastic" add nothing, "kahan" adds a compensation in the parameter's dtype, "split_master" 2
    bytes, and None, the paper's mixed precision, a float32 copy of the weight; float32 parameters need none of these.
    """
    if state_bits not in STATE_BITS:
        raise ValueError(f"state_bytes_per_parameter: expected state_bits to be 32, 16 or 8, got {state_bits!r}")
    if rounding is not None and rounding not in ROUNDINGS:
        raise ValueError(
            f"state_bytes_per_parameter: expected rounding to be None or one of {list(ROUNDINGS)}, got {rounding!r}"
        )
    if algorithm not in FLAGS:
        raise ValueError(f"state_bytes_per_parameter: expected algorithm to be one of {list(FLAGS)}, got {algorithm!r}")
    if block_size < 1:
        raise ValueError(f"state_bytes_per_parameter: expected block_size to be 1 or more, got {block_size}")
    moment = state_bits / 8 + (4 / block_size if state_bits == 8 else 0)
    low = param_dtype in (torch.bfloat16, torch.float16)
    beside = {None: 4, "kahan": param_dtype.itemsize, "split_master": 2}.get(rounding, 0) if low else 0
    moments = len(slots(ALGORITHMS[algorithm.removesuffix("w")], FLAGS[algorithm]))
    return moments * moment + beside


def memory_per_rank(
    n_params: float,
    world_size: int,
    stage: int,
    *,
    param_dtype: torch.dtype = torch.bfloat16,
    grad_dtype: torch.dtype | None = None,
    state_bits: int = 32,
    rounding: str | None = None,
    algorithm: str = "adamw",
    block_size: int = 256,
    offload: str | None = None,
) -> float:
    """Bytes a rank keeps on its device: params + grads + K, of which a stage divides some by world_size.

    Stage 0 divides nothing, 1 the state, 2 gradients as well, 3 all three. The defaults are the paper's mixed-precision
    Adam, 2 + 2 + 12 bytes a parameter; `state_bytes_per_parameter` says what state_bits and rounding make of the 12.
    grad_dtype: None for the parameter's. offload="optimizer" leaves the state to the host.
    Not counted: activations, the parameters that stages 2 and 3 gather while they are used, buckets in flight.
    ValueError: a value outside these.
    """
    if n_params < 0:
        raise ValueError(f"memory_per_rank: expected n_params to be 0 or more, got {n_params}")
    if world_size < 1:
        raise ValueError(f"memory_per_rank: expected world_size to be 1 or more, got {world_size}")
    if stage not in STAGES:
        raise ValueError(f"memory_per_rank: expected stage to be 0, 1, 2 or 3, got {stage!r}")
    if offload not in (None, "optimizer"):
        raise ValueError(f'memory_per_rank: expected offload to be None or "optimizer", got {offload!r}')
    params = param_dtype.itemsize
    grads = (grad_dtype or param_dtype).itemsize
    state = state_bytes_per_parameter(
        state_bits, rounding, algorithm=algorithm, param_dtype=param_dtype, block_size=block_size
    )
    if offload:
        state = 0.0
    # The last stage that keeps a whole copy of each.
    shares = [part / (world_size if stage >= first else 1) for part, first in ((params, 3), (grads, 2), (state, 1))]
    return n_params * sum(shares)
