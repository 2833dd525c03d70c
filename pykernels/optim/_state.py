"""What state a parameter has: names, dtypes and shapes in one table, from which it is made, checked and counted."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..ops import _optimizer_codes as codes
from ..ops import _optimizer_reference as rules
from . import _shard

Group = dict[str, Any]
STEP = "step"
SCALE = "_scale"
COMPENSATION = "compensation"
MASTER_LOW = "master_low"
_SLOTS = {
    rules.ADAM: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    rules.LAMB: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    rules.LION: ("exp_avg",),
    rules.SGD: ("momentum_buffer",),
    rules.ADAGRAD: ("sum",),
}


class StateOptions(TypedDict, total=False):
    """Keyword arguments that every optimizer takes after torch's own, and every parameter group.

    state_bits: 32, 16 (bfloat16, rounded so that it is right on average) or 8 (codes with a scale a block).
    rounding: how low-precision parameters are written: "nearest", "stochastic" (bfloat16: up with the probability of
        the fraction), "kahan" (bfloat16 and float16: what rounding took away is kept and added to the next update) or
        "split_master" (bfloat16: the lower 16 bits of a float32 master are kept). Nothing changes for float32.
    block_size: elements of a row that share a scale. min_8bit_size: tensors of fewer elements, and vectors, keep
        float32 state. seed: of the rounding.
    max_unorm: the norm of the update is at most this times the norm of the parameter (0: off).
    """

    state_bits: int
    rounding: str
    block_size: int
    min_8bit_size: int
    seed: int
    max_unorm: float


DEFAULTS = StateOptions(state_bits=32, rounding="nearest", block_size=256, min_8bit_size=4096, seed=0, max_unorm=0.0)


def slots(algorithm: int, flags: int) -> dict[str, str]:
    """The states of an algorithm by torch's names, in the operator's order: s signed, u never negative."""
    signs = rules.slots(algorithm, flags)
    if algorithm != rules.RMSPROP:
        return dict(zip(_SLOTS[algorithm], signs, strict=False))
    names = ["square_avg"]
    names += ["momentum_buffer"] if flags & rules.MOMENTUM else []
    names += ["grad_avg"] if flags & rules.CENTERED else []
    return dict(zip(names, signs, strict=True))


def rounding_of(group: Group, dtype: torch.dtype) -> int:
    """The rounding of parameters of a dtype: float32 and wider need none."""
    low = dtype in (torch.bfloat16, torch.float16)
    return rules.ROUNDINGS[group["rounding"]] if low else rules.NEAREST


def quantised(group: Group, shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether a parameter of this global shape has 8-bit state."""
    large = len(shape) >= 2 and math.prod(shape) >= group["min_8bit_size"]
    return group["state_bits"] == 8 and large and dtype != torch.float64


def table(group: Group, named: dict[str, str], shape: torch.Size, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """{key: (dtype, shape)} of the state of a parameter of this shape and dtype, without the step."""
    result: dict[str, tuple[Any, ...]] = {}
    eight = quantised(group, shape, dtype)
    plain = torch.bfloat16 if group["state_bits"] == 16 else torch.float32
    for name, sign in named.items():
        code = torch.int8 if sign == "s" else torch.uint8
        result[name] = (torch.float64 if dtype == torch.float64 else code if eight else plain, list(shape))
        if eight:
            result[name + SCALE] = (torch.float32, codes.scale_shape(shape, group["block_size"]))
    rounding = rounding_of(group, dtype)
    if rounding == rules.KAHAN:
        result[COMPENSATION] = (dtype, list(shape))
    elif rounding == rules.SPLIT_MASTER:
        result[MASTER_LOW] = (torch.uint8, [*shape, 2])
    return result


def as_bytes(low: Tensor) -> Tensor:
    """int16 as the pairs of bytes that MASTER_LOW is kept in, a view: collectives carry no int16."""
    return low.unsqueeze(-1).view(torch.uint8)


def as_words(pairs: Tensor) -> Tensor:
    """The int16 of such pairs, a view."""
    return pairs.view(torch.int16).squeeze(-1)


def step_device(group: Group, param: Tensor) -> torch.device:
    """Where the step lives: beside the parameter when nothing may be read back from there."""
    return param.device if group["capturable"] else torch.device("cpu")


def new_state(group: Group, named: dict[str, str], param: Tensor) -> dict[str, Tensor]:
    """The state of a parameter that has not been updated yet."""
    part = _shard.local(param.detach())
    eight = quantised(group, param.shape, param.dtype)
    state = {STEP: torch.zeros((), dtype=torch.float32, device=step_device(group, param))}
    start = float(group.get("initial_accumulator_value", 0.0))
    for key, (dtype, shape) in table(group, named, param.shape, param.dtype).items():
        if key.endswith(SCALE):
            value = torch.full(codes.scale_shape(part.shape, group["block_size"]), start**0.5, device=part.device)
        else:
            order = torch.contiguous_format if eight else torch.preserve_format
            low = key == MASTER_LOW
            value = torch.zeros_like(part, dtype=torch.int16 if low else dtype, memory_format=order)
            value = as_bytes(value) if low else value
            if start and key in named:
                value.fill_(255 if eight else start)
        state[key] = _shard.wrap(value, param, shape)
    return state
