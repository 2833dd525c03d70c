"""The published update rules in plain PyTorch, one tensor at a time: what `optimizer_update_` means.

Sums, products, quotients and roots are separate float32 operations (no fused multiply-add), so that every backend that
rounds as IEEE 754 says gives the same bits. Coefficients are computed in float64 and rounded once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _optimizer_codes as codes
from ._numerics import ieee_sqrt

ALGORITHMS = {"adam": 0, "lamb": 1, "lion": 2, "sgd": 3, "adagrad": 4, "rmsprop": 5}
ADAM, LAMB, LION, SGD, ADAGRAD, RMSPROP = ALGORITHMS.values()
FLAGS = {"maximize": 1, "decoupled": 2, "amsgrad": 4, "nesterov": 8, "momentum": 16, "centered": 32, "uncorrected": 64}
MAXIMIZE, DECOUPLED, AMSGRAD, NESTEROV, MOMENTUM, CENTERED, UNCORRECTED = FLAGS.values()
ROUNDINGS = {"nearest": 0, "stochastic": 1, "kahan": 2, "split_master": 3}
NEAREST, STOCHASTIC, KAHAN, SPLIT_MASTER = ROUNDINGS.values()


@dataclass(frozen=True)
class Rule:
    """What all tensors of one call share; `optimizer_update_` documents the fields."""

    algorithm: int
    flags: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def slots(algorithm: int, flags: int) -> str:
    """The states of an algorithm in order, one letter each: s signed (int8 codes), u never negative (uint8 codes)."""
    if algorithm in (ADAM, LAMB):
        return "suu" if flags & AMSGRAD else "su"
    if algorithm == LION:
        return "s"
    if algorithm == SGD:
        return "s" if flags & MOMENTUM else ""
    if algorithm == ADAGRAD:
        return "u"
    return "u" + ("s" if flags & MOMENTUM else "") + ("s" if flags & CENTERED else "")


def factor(rule: Rule, step: int) -> float:
    """What the learning rate is multiplied by beside the ratio: 1 / (1 - beta1^step), or Adagrad's decay."""
    if rule.algorithm == ADAM and not rule.flags & UNCORRECTED:
        return 1.0 / (1.0 - rule.beta1**step)
    if rule.algorithm == ADAGRAD:
        return 1.0 / (1.0 + (step - 1) * rule.beta1)
    return 1.0


def advance(rule: Rule, p: Tensor, g: Tensor, states: list[Tensor], step: int) -> tuple[Tensor, list[Tensor]]:
    """(direction u, new states): the parameter becomes p * decay - lr * ratio * factor * u."""
    flags, b1, b2, eps, wd = rule.flags, rule.beta1, rule.beta2, rule.eps, rule.weight_decay
    if flags & MAXIMIZE:
        g = -g
    coupled = wd != 0.0 and not flags & DECOUPLED and rule.algorithm not in (LAMB, LION)
    if coupled:
        g = g + p * wd
    if rule.algorithm in (ADAM, LAMB):
        return _adam(rule, p, g, states, step)
    if rule.algorithm == LION:
        (m,) = states
        return torch.sign(m * b1 + g * (1.0 - b1)), [m * b2 + g * (1.0 - b2)]
    if rule.algorithm == SGD:
        if not flags & MOMENTUM:
            return g, []
        buffer = g if step == 1 else states[0] * b1 + g * (1.0 - b2)
        return (g + buffer * b1 if flags & NESTEROV else buffer), [buffer]
    if rule.algorithm == ADAGRAD:
        total = states[0] + g * g
        return g / (ieee_sqrt(total) + eps), [total]
    return _rmsprop(rule, g, states)


def _adam(rule: Rule, p: Tensor, g: Tensor, states: list[Tensor], step: int) -> tuple[Tensor, list[Tensor]]:
    b1, b2 = rule.beta1, rule.beta2
    corrected = not rule.flags & UNCORRECTED
    m = states[0] + (g - states[0]) * (1.0 - b1)
    v = states[1] * b2 + (g * g) * (1.0 - b2)
    new = [m, v]
    if rule.flags & AMSGRAD:
        v = torch.maximum(states[2], v)
        new.append(v)
    root = ieee_sqrt(v) * (1.0 / math.sqrt(1.0 - b2**step) if corrected else 1.0)
    u = m / (root + rule.eps)
    if rule.algorithm == LAMB:
        u = u * (1.0 / (1.0 - b1**step) if corrected else 1.0) + p * rule.weight_decay
    return u, new


def _rmsprop(rule: Rule, g: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    alpha = rule.beta2
    square = states[0] * alpha + (g * g) * (1.0 - alpha)
    new = [square]
    if rule.flags & CENTERED:
        mean = states[-1] + (g - states[-1]) * (1.0 - alpha)
        # Low-precision state can leave the variance below zero, where the exact one never is.
        square = (square - mean * mean).clamp(min=0.0)
        centered = [mean]
    else:
        centered = []
    u = g / (ieee_sqrt(square) + rule.eps)
    if rule.flags & MOMENTUM:
        u = states[1] * rule.beta1 + u
        new.append(u)
    return u, new + centered


def master_of(p: Tensor, extra: Tensor | None, rounding: int) -> Tensor:
    """The parameter in the width it is updated in."""
    if p.dtype == torch.float64:
        return p.clone()
    if extra is None:
        return p.float()
    return codes.join_master(p, extra) if rounding == SPLIT_MASTER else p.float() + extra.float()


def read_state(state: Tensor, scale: Tensor | None, block_size: int) -> Tensor:
    """A state as float32 (float64 stays)."""
    if scale is not None:
        return codes.decode(state, scale, block_size)
    return state.clone() if state.dtype == torch.float64 else state.float()


def global_index(p: Tensor, start: int, row_stride: int) -> Tensor:
    """int64 of p's shape: each element's index in the unsharded tensor."""
    rows = codes.as_rows(p)
    if p.dim() < 2:
        return torch.arange(start, start + p.numel(), device=p.device).reshape(p.shape)
    down = torch.arange(rows.shape[0], device=p.device).unsqueeze(1) * row_stride
    return (start + down + torch.arange(rows.shape[1], device=p.device)).reshape(p.shape)


def write_back(
    p: Tensor, extra: Tensor | None, value: Tensor, rounding: int, index: Tensor, step: int, stream: int, seed: int
) -> None:
    """Rounds the updated value into p, and what rounding took away into extra."""
    if extra is None and rounding == STOCHASTIC and p.dtype == torch.bfloat16:
        p.copy_(codes.truncate_to_bfloat16(value, codes.random_bits(index, step, stream, seed)))
    elif extra is None:
        p.copy_(value)
    elif rounding == SPLIT_MASTER:
        high, low = codes.split_master(value)
        p.copy_(high)
        extra.copy_(low)
    else:
        p.copy_(value)
        extra.copy_(value - p.float())


def write_state(
    state: Tensor, scale: Tensor | None, value: Tensor, index: Tensor, step: int, stream: int, seed: int, block: int
) -> None:
    """Rounds a new state into its storage."""
    if scale is None and state.dtype != torch.bfloat16:
        state.copy_(value)
        return
    bits = codes.dither_bits(index, step, stream, seed)
    if scale is None:
        state.copy_(codes.truncate_to_bfloat16(value, bits >> 16))
        return
    new_codes, new_scale = codes.encode(value, state, bits, block)
    state.copy_(new_codes)
    scale.copy_(new_scale)
