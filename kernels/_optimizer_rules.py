"""The update rules on the device, in the order of operations of pykernels/ops/_optimizer_reference.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._optimizer_states import divide, root

ADAM, LAMB, LION, SGD, ADAGRAD, RMSPROP = (tl.constexpr(i) for i in range(6))
MAXIMIZE, DECOUPLED, AMSGRAD, NESTEROV, MOMENTUM, CENTERED, UNCORRECTED = (tl.constexpr(1 << i) for i in range(7))


@triton.jit
def advance(
    p,
    g,
    s0,
    s1,
    s2,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    weight_decay,
    root_factor,
    unit,
    first,
    ALGORITHM: tl.constexpr,
    FLAGS: tl.constexpr,
    DECAY: tl.constexpr,
):
    """(direction, s0, s1, s2) of a tile; rest is 1 - beta, root_factor and unit are the bias corrections of the step,
    `first` says that it is step 1. States that the algorithm lacks pass through."""
    if MAXIMIZE & FLAGS:
        g = -g
    if DECAY and not (DECOUPLED & FLAGS) and ALGORITHM != LAMB and ALGORITHM != LION:
        g = g + p * weight_decay
    if ALGORITHM == ADAM or ALGORITHM == LAMB:
        s0 = s0 + (g - s0) * rest1
        s1 = s1 * beta2 + (g * g) * rest2
        v = s1
        if AMSGRAD & FLAGS:
            s2 = tl.maximum(s2, v, propagate_nan=tl.PropagateNan.ALL)
            v = s2
        u = divide(s0, root(v) * root_factor + eps)
        if ALGORITHM == LAMB:
            u = u * unit + p * weight_decay
    elif ALGORITHM == LION:
        mix = s0 * beta1 + g * rest1
        u = tl.where(mix > 0.0, 1.0, 0.0) - tl.where(mix < 0.0, 1.0, 0.0)
        s0 = s0 * beta2 + g * rest2
    elif ALGORITHM == SGD:
        u = g
        if MOMENTUM & FLAGS:
            s0 = tl.where(first, g, s0 * beta1 + g * rest2)
            u = s0
            if NESTEROV & FLAGS:
                u = g + s0 * beta1
    elif ALGORITHM == ADAGRAD:
        s0 = s0 + g * g
        u = divide(g, root(s0) + eps)
    else:
        s0 = s0 * beta2 + (g * g) * rest2
        square = s0
        if CENTERED & FLAGS:
            if MOMENTUM & FLAGS:
                s2 = s2 + (g - s2) * rest2
                mean = s2
            else:
                s1 = s1 + (g - s1) * rest2
                mean = s1
            square = tl.maximum(square - mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
        u = divide(g, root(square) + eps)
        if MOMENTUM & FLAGS:
            s1 = s1 * beta1 + u
            u = s1
    return u, s0, s1, s2


@triton.jit
def power(base, exponent):
    """float64 base to the power of int32 exponents below 2**25, by squaring."""
    result = tl.zeros_like(exponent).to(tl.float64) + 1.0
    square = result * base
    for bit in range(25):
        result = tl.where(((exponent >> bit) & 1) != 0, result * square, result)
        square = square * square
    return result


@triton.jit
def corrections(step, beta1, beta2, ALGORITHM: tl.constexpr, FLAGS: tl.constexpr):
    """(factor of the learning rate, root_factor, unit) in float64 for int32 steps."""
    one = tl.zeros_like(step).to(tl.float64) + 1.0
    factor, root_factor, unit = one, one, one
    if (ALGORITHM == ADAM or ALGORITHM == LAMB) and not (UNCORRECTED & FLAGS):
        unit = one / (one - power(beta1, step))
        root_factor = one / tl.sqrt(one - power(beta2, step))
        if ALGORITHM == ADAM:
            factor = unit
    if ALGORITHM == ADAGRAD:
        factor = one / (one + (step - 1).to(tl.float64) * beta1)
    return factor, root_factor, unit
