"""quantize_rowwise: symmetric int8 codes and one float32 scale per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import (
    abs_bits,
    as_rows,
    block_rows,
    check_float,
    encode,
    given_scale_inverse,
    refuse,
    scale_inverse,
    uniform,
)

ONE_PASS_K = 16384  # a row up to this long stays in registers between its maximum and its codes
LOOP_K = 4096


@triton.jit(do_not_specialize=["seed"])
def _quantize_rowwise(
    x_ptr,
    q_ptr,
    scale_ptr,
    given_ptr,
    x_stride,
    given_stride,
    M,
    K,
    seed,
    STOCHASTIC: tl.constexpr,
    QUADS: tl.constexpr,
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
    top = abs_bits(x)
    if not ONE_PASS:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            more = tl.load(x_rows + (k0 + cols)[None, :], mask=live & (k0 + cols < K)[None, :], other=0.0)
            top = tl.maximum(top, abs_bits(more))
    bits = tl.max(top, axis=1)
    if given_ptr is not None:
        given = tl.load(given_ptr + rows * given_stride, mask=rows < M, other=0.0).to(tl.float32)
        scale, inverse = given_scale_inverse(bits, given)
    else:
        scale, inverse = scale_inverse(bits)
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    if ONE_PASS:
        u = uniform(seed, rows, 0, K, 0, QUADS, BLOCK_K) if STOCHASTIC else 0.0
        q = encode(x, inverse[:, None], u, STOCHASTIC)
        tl.store(q_rows + cols[None, :], q, mask=live & (cols < K)[None, :])
    else:
        for k0 in range(0, K, BLOCK_K):
            mask = live & (k0 + cols < K)[None, :]
            x = tl.load(x_rows + (k0 + cols)[None, :], mask=mask, other=0.0).to(tl.float32)
            u = uniform(seed, rows, k0, K, 0, QUADS, BLOCK_K) if STOCHASTIC else 0.0
            tl.store(q_rows + (k0 + cols)[None, :], encode(x, inverse[:, None], u, STOCHASTIC), mask=mask)


def quantize_rowwise(
    x: torch.Tensor, stochastic: bool = False, seed: int = 0, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] float to (int8 codes of the same shape, float32 scale x.shape[:-1]); see pykernels.functional."""
    check_float(x)
    K = x.shape[-1]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    out_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    M = out_scale.numel()
    if scale is not None:
        if scale.numel() not in (1, M):
            refuse("scale", f"{scale.numel()} values", f"one value, or one for each of the {M} rows")
        scale = scale.reshape(-1).to(x.device, torch.float32).contiguous()
    if M == 0:
        return q, out_scale
    if K == 0:
        return q, out_scale.zero_() if scale is None else out_scale.copy_(scale.expand(M).view_as(out_scale))
    rows = as_rows(x)
    one_pass = K <= ONE_PASS_K
    block_k = triton.next_power_of_2(K) if one_pass else LOOP_K
    block_m = block_rows(2048, block_k)
    with torch.cuda.device_of(x):
        _quantize_rowwise[(triton.cdiv(M, block_m),)](
            rows,
            q,
            out_scale,
            scale,
            rows.stride(0),
            0 if scale is None or scale.numel() == 1 else 1,
            M,
            K,
            seed,
            STOCHASTIC=stochastic,
            QUADS=K % 4 == 0 and block_k >= 4,
            ROWS=block_m,
            BLOCK_K=block_k,
            ONE_PASS=one_pass,
            num_warps=16 if block_k > 8192 else 8 if block_k > 2048 else 4,
            enable_fp_fusion=False,
        )
    return q, out_scale
