"""quantize_asymmetric: int8 codes with a float32 scale and an int32 zero point per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import INF_BITS, ROUND, abs_bits, as_rows, block_rows, check_float, nan_unless

MIN_RANGE = tl.constexpr(255 * 2.0**-126)
ONE_PASS_K = 16384
LOOP_K = 4096


@triton.jit
def _rint(v):
    """Half to even, for |v| < 2**22."""
    return (v + ROUND) - ROUND


@triton.jit
def _encode(x, inverse, zero_point):
    # |x / scale| is at most 255 in a row that is used, so adding ROUND is exact enough to round.
    v = _rint(tl.where(inverse == 0.0, 0.0, x * inverse)) + zero_point
    return tl.minimum(tl.maximum(v, -128.0), 127.0).to(tl.int32).to(tl.int8)


@triton.jit
def _quantize_asymmetric(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    x_stride,
    M,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < M)[:, None]
    cols = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + rows[:, None] * x_stride
    q_rows = q_ptr + rows[:, None] * K
    x = tl.load(x_rows + cols[None, :], mask=live & (cols < K)[None, :], other=0.0).to(tl.float32)
    low, high, top = tl.minimum(x, 0.0), tl.maximum(x, 0.0), abs_bits(x)
    if not ONE_PASS:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            more = tl.load(x_rows + (k0 + cols)[None, :], mask=live & (k0 + cols < K)[None, :], other=0.0).to(
                tl.float32
            )
            low, high, top = tl.minimum(low, more), tl.maximum(high, more), tl.maximum(top, abs_bits(more))
    low, high = tl.min(low, axis=1), tl.max(high, axis=1)
    span = high - low
    finite = (tl.max(top, axis=1) < INF_BITS) & (abs_bits(span) < INF_BITS)
    usable = finite & (span >= MIN_RANGE)
    scale = tl.div_rn(tl.where(usable, span, 255.0), 255.0)
    inverse = tl.where(usable, tl.div_rn(1.0, scale), 0.0)
    zero_point = tl.minimum(tl.maximum(-128.0 - tl.where(usable, low, 0.0) * inverse, -128.0), 127.0)
    zero_point = tl.where(usable, _rint(zero_point), 0.0)
    tl.store(scale_ptr + rows, nan_unless(finite, tl.where(usable, scale, 0.0)), mask=rows < M)
    tl.store(zero_point_ptr + rows, zero_point.to(tl.int32), mask=rows < M)
    inverse, zero_point = inverse[:, None], zero_point[:, None]
    if ONE_PASS:
        tl.store(q_rows + cols[None, :], _encode(x, inverse, zero_point), mask=live & (cols < K)[None, :])
    else:
        for k0 in range(0, K, BLOCK_K):
            mask = live & (k0 + cols < K)[None, :]
            x = tl.load(x_rows + (k0 + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(q_rows + (k0 + cols)[None, :], _encode(x, inverse, zero_point), mask=mask)


def quantize_asymmetric(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] float to (int8 of the same shape, float32 scale, int32 zero point), both x.shape[:-1]."""
    check_float(x)
    K = x.shape[-1]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    zero_point = torch.empty(x.shape[:-1], dtype=torch.int32, device=x.device)
    M = scale.numel()
    if x.numel() == 0:
        return q, scale.zero_(), zero_point.zero_()
    rows = as_rows(x)
    one_pass = K <= ONE_PASS_K
    block_k = triton.next_power_of_2(K) if one_pass else LOOP_K
    block_m = block_rows(2048, block_k)
    with torch.cuda.device_of(x):
        _quantize_asymmetric[(triton.cdiv(M, block_m),)](
            rows,
            q,
            scale,
            zero_point,
            rows.stride(0),
            M,
            K,
            ROWS=block_m,
            BLOCK_K=block_k,
            ONE_PASS=one_pass,
            num_warps=16 if block_k > 8192 else 8 if block_k > 2048 else 4,
            enable_fp_fusion=False,
        )
    return q, scale, zero_point
