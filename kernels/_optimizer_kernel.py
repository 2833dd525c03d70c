"""The device code of optimizer_update_ and optimizer_norms."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import narrow
from ._optimizer_launch import FIELDS
from ._optimizer_rules import advance, corrections
from ._optimizer_states import (
    KAHAN,
    SPLIT_MASTER,
    STOCHASTIC,
    dither_bits,
    divide,
    join_master,
    random_bits,
    read_state,
    split_master,
    truncate_to_bfloat16,
    write_state,
)
from ._tensor_table import find, pointer

INDEX, BLOCKS, PER_ROW, COLUMNS, STREAM, START, ROW_STRIDE, STEP = (tl.constexpr(i) for i in range(1, 9))
PARAM, GRAD, EXTRA, STATE, SCALE = (tl.constexpr(i) for i in (9, 10, 11, 12, 15))
NUMBERS = tl.constexpr(len(FIELDS) + 1)
LENGTH, DECAYED, FACTOR, ROOT, UNIT, NOW = (tl.constexpr(i) for i in range(6))
COEFFICIENTS = 6


@triton.jit
def _number(table_ptr, n, i):
    """Double i after the seed: beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay."""
    return tl.load(table_ptr + NUMBERS * n + 1 + i).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["n"])
def prepare_step(
    table_ptr,
    out_ptr,
    steps_ptr,
    lr_ptr,
    lr: tl.float64,
    ratio_ptr,
    found_inf_ptr,
    n,
    ALGORITHM: tl.constexpr,
    FLAGS: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float64 coefficients [COEFFICIENTS, n] of the step that follows; UPDATE increases the steps on the device."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    index = tl.load(table_ptr + INDEX * n + i, mask=mask, other=0)
    if steps_ptr is not None:
        now = tl.load(steps_ptr + index, mask=mask, other=0.0) + 1.0
    else:
        step_ptr = tl.load(table_ptr + STEP * n + i, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        now = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
        if UPDATE:
            tl.store(step_ptr, now, mask=mask)
    factor, root_factor, unit = corrections(
        now.to(tl.int32), _number(table_ptr, n, 0), _number(table_ptr, n, 2), ALGORITHM, FLAGS
    )
    tl.store(out_ptr + FACTOR * n + i, factor, mask=mask)
    tl.store(out_ptr + ROOT * n + i, root_factor, mask=mask)
    tl.store(out_ptr + UNIT * n + i, unit, mask=mask)
    tl.store(out_ptr + NOW * n + i, now.to(tl.float64), mask=mask)
    if UPDATE:
        rate = factor * 0.0 + (tl.load(lr_ptr).to(tl.float64) if lr_ptr is not None else lr)
        length = rate * factor
        if ratio_ptr is not None:
            length = length * tl.load(ratio_ptr + index, mask=mask, other=0.0).to(tl.float64)
        tl.store(out_ptr + LENGTH * n + i, length, mask=mask)
        tl.store(out_ptr + DECAYED * n + i, 1.0 - rate * _number(table_ptr, n, 5), mask=mask)


@triton.jit(do_not_specialize=["n", "first_tensor", "tensors"])
def optimizer_step(
    table_ptr,
    coefficients_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    partial_ptr,
    n,
    first_tensor,
    tensors,
    P: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    WIDE: tl.constexpr,
    ALGORITHM: tl.constexpr,
    FLAGS: tl.constexpr,
    ROUNDING: tl.constexpr,
    DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One step, or with partial_ptr float64 [programs, 2] the sums of squares of parameter and direction instead."""
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    i = find(table_ptr, first_tensor, tensors)
    blocks_end = tl.load(table_ptr + BLOCKS * n + i)
    per_row = tl.load(table_ptr + PER_ROW * n + i)
    columns = tl.load(table_ptr + COLUMNS * n + i)
    start = tl.load(table_ptr + START * n + i)
    row_stride = tl.load(table_ptr + ROW_STRIDE * n + i)
    if ALIGNED:
        columns = tl.multiple_of(columns, 16)
    stream = tl.load(table_ptr + STREAM * n + i)
    seed = tl.load(table_ptr + NUMBERS * n)
    p_ptr = pointer(tl.load(table_ptr + PARAM * n + i), P, ALIGNED)
    g_ptr = pointer(tl.load(table_ptr + GRAD * n + i), G, ALIGNED)
    e_address = tl.load(table_ptr + EXTRA * n + i)
    s0_address = tl.load(table_ptr + STATE * n + i)
    s1_address = tl.load(table_ptr + (STATE + 1) * n + i)
    s2_address = tl.load(table_ptr + (STATE + 2) * n + i)
    c0_address = tl.load(table_ptr + SCALE * n + i)
    c1_address = tl.load(table_ptr + (SCALE + 1) * n + i)
    c2_address = tl.load(table_ptr + (SCALE + 2) * n + i)
    beta1, rest1 = _number(table_ptr, n, 0).to(WIDE), _number(table_ptr, n, 1).to(WIDE)
    beta2, rest2 = _number(table_ptr, n, 2).to(WIDE), _number(table_ptr, n, 3).to(WIDE)
    eps, weight_decay = _number(table_ptr, n, 4).to(WIDE), _number(table_ptr, n, 5).to(WIDE)
    factor = tl.load(coefficients_ptr + FACTOR * n + i)
    root_factor = tl.load(coefficients_ptr + ROOT * n + i).to(WIDE)
    unit = tl.load(coefficients_ptr + UNIT * n + i).to(WIDE)
    step = tl.load(coefficients_ptr + NOW * n + i).to(tl.int64)
    if partial_ptr is None:
        length = tl.load(coefficients_ptr + LENGTH * n + i).to(WIDE)
        decayed = tl.load(coefficients_ptr + DECAYED * n + i).to(WIDE)
    if grad_scale_ptr is not None:
        grad_scale = tl.load(grad_scale_ptr).to(WIDE)
    lanes = tl.arange(0, BLOCK)
    sum_p, sum_u = tl.zeros((GROUP,), tl.float64), tl.zeros((GROUP,), tl.float64)
    first = (tl.program_id(0) - tl.load(table_ptr + i)) * (TILES * GROUP)
    for block in range(first, tl.minimum(first + TILES * GROUP, blocks_end), GROUP):
        blocks = block + tl.arange(0, GROUP)
        live = blocks < blocks_end
        row, column = blocks // per_row, (blocks % per_row) * EACH
        offset = (row * columns + column)[:, None] + lanes[None, :]
        mask = live[:, None] & ((column[:, None] + lanes[None, :]) < columns)
        if EACH != BLOCK:
            mask = mask & (lanes < EACH)[None, :]
        p = tl.load(p_ptr + offset, mask=mask, other=0.0)
        g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(WIDE)
        if grad_scale_ptr is not None:
            g = divide(g, tl.zeros_like(g) + grad_scale)
        master = p.to(WIDE)
        if E is not None:
            e_ptr = pointer(e_address, E, ALIGNED) + offset
            e = tl.load(e_ptr, mask=mask, other=0)
            if ROUNDING == SPLIT_MASTER:
                master = join_master(p, e)
            elif P != tl.float64:
                master = master + e.to(WIDE)
        s0 = read_state(s0_address, c0_address, offset, blocks, mask, live, S0, WIDE, ALIGNED)
        s1 = read_state(s1_address, c1_address, offset, blocks, mask, live, S1, WIDE, ALIGNED)
        s2 = read_state(s2_address, c2_address, offset, blocks, mask, live, S2, WIDE, ALIGNED)
        u, s0, s1, s2 = advance(
            master, g, s0, s1, s2, beta1, rest1, beta2, rest2, eps, weight_decay, root_factor, unit, step == 1,
            ALGORITHM, FLAGS, DECAY,
        )  # fmt: skip
        if partial_ptr is not None:
            wide = tl.where(mask, master, 0.0).to(tl.float64)
            direction = tl.where(mask, u, 0.0).to(tl.float64) * factor
            sum_p += tl.sum(wide * wide, axis=1)
            sum_u += tl.sum(direction * direction, axis=1)
        else:
            value = (master * decayed if DECOUPLED else master) - u * length
            places = start + row * row_stride + column
            bits = dither_bits(places[:, None] + lanes[None, :], step, stream, seed)
            write_state(s0, s0_address, c0_address, offset, blocks, mask, live, bits, S0, ALIGNED)
            write_state(s1, s1_address, c1_address, offset, blocks, mask, live, bits, S1, ALIGNED)
            write_state(s2, s2_address, c2_address, offset, blocks, mask, live, bits, S2, ALIGNED)
            if ROUNDING == SPLIT_MASTER:
                rounded, low = split_master(value)
                tl.store(e_ptr, low, mask=mask)
            elif ROUNDING == STOCHASTIC and P == tl.bfloat16:
                rounded = truncate_to_bfloat16(value, random_bits(bits, step, stream, seed))
            else:
                rounded = narrow(value, P)
                if ROUNDING == KAHAN:
                    tl.store(e_ptr, narrow(value - rounded.to(WIDE), P), mask=mask)
            tl.store(p_ptr + offset, rounded, mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + 2 * tl.program_id(0), tl.sum(sum_p, axis=0))
        tl.store(partial_ptr + 2 * tl.program_id(0) + 1, tl.sum(sum_u, axis=0))
