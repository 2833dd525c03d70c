"""quantize_blockwise: symmetric int8 codes, one float32 scale per block of a row or per two-dimensional tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import abs_bits, as_rows, check_float, encode, refuse, scale_inverse

TILE = 4096  # values one program holds at a time


@triton.jit
def _load(x_ptr, x_stride, row0, rows, col0, cols, col_end, M, BK):
    """One chunk of GROUP neighbouring blocks as [rows, GROUP, cols], with its column indices and its mask."""
    k = col0[None, :, None] + cols[None, None, :]
    m = row0 + rows.to(tl.int64)[:, None, None]
    mask = (m < M) & (k < col_end) & (cols < BK)[None, None, :]
    return tl.load(x_ptr + m * x_stride + k, mask=mask, other=0.0).to(tl.float32), m, k, mask


@triton.jit
def _quantize_blockwise(
    x_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    M,
    K,
    BM,
    BK,
    blocks_k,
    TILE_M: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    groups = tl.cdiv(blocks_k, GROUP)
    block_m = (tl.program_id(0) // groups).to(tl.int64)
    block_k = (tl.program_id(0) % groups) * GROUP + tl.arange(0, GROUP)
    row0, row_end = block_m * BM, tl.minimum(block_m * BM + BM, M)
    col0 = block_k * BK
    rows, cols = tl.arange(0, TILE_M), tl.arange(0, TILE_K)
    if ONE_PASS:
        x, m, k, mask = _load(x_ptr, x_stride, row0, rows, col0, cols, K, row_end, BK)
        top = abs_bits(x)
    else:
        top = tl.zeros((TILE_M, GROUP, TILE_K), tl.int32)
        for m0 in range(0, BM, TILE_M):
            for k0 in range(0, BK, TILE_K):
                x, m, k, mask = _load(x_ptr, x_stride, row0, m0 + rows, col0, k0 + cols, K, row_end, BK)
                top = tl.maximum(top, abs_bits(x))
    scale, inverse = scale_inverse(tl.max(tl.max(top, axis=2), axis=0))
    tl.store(scale_ptr + block_m * blocks_k + block_k, scale, mask=block_k < blocks_k)
    inverse = inverse[None, :, None]
    if ONE_PASS:
        tl.store(q_ptr + m * K + k, encode(x, inverse, 0.0, False), mask=mask)
    else:
        for m0 in range(0, BM, TILE_M):
            for k0 in range(0, BK, TILE_K):
                x, m, k, mask = _load(x_ptr, x_stride, row0, m0 + rows, col0, k0 + cols, K, row_end, BK)
                tl.store(q_ptr + m * K + k, encode(x, inverse, 0.0, False), mask=mask)


def quantize_blockwise(x: torch.Tensor, block_size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] with [b], or [M, K] with [bm, bk], to (int8 of x's shape, float32 scale of the block grid's shape)."""
    if len(block_size) not in (1, 2) or min(block_size) < 1:
        refuse("block_size", list(block_size), "[b] or [bm, bk], each at least 1")
    check_float(x, dims=2 if len(block_size) == 2 else None)
    K, M = x.shape[-1], x.shape[:-1].numel()
    bm, bk = (1, block_size[0]) if len(block_size) == 1 else block_size
    bm, bk = min(bm, max(M, 1)), min(bk, max(K, 1))
    blocks_m, blocks_k = triton.cdiv(M, bm), triton.cdiv(K, bk)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid_shape = (*x.shape[:-1], blocks_k) if len(block_size) == 1 else (blocks_m, blocks_k)
    scale = torch.empty(grid_shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, scale
    rows = as_rows(x)
    tile_k = min(TILE, triton.next_power_of_2(bk))
    tile_m = min(max(1, TILE // tile_k), triton.next_power_of_2(bm))
    one_pass = tile_k >= bk and tile_m >= bm
    group = min(TILE // (tile_k * tile_m), triton.next_power_of_2(blocks_k)) if one_pass else 1
    with torch.cuda.device_of(x):
        _quantize_blockwise[(blocks_m * triton.cdiv(blocks_k, group),)](
            rows,
            q,
            scale,
            rows.stride(0),
            M,
            K,
            bm,
            bk,
            blocks_k,
            TILE_M=tile_m,
            GROUP=group,
            TILE_K=tile_k,
            ONE_PASS=one_pass,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return q, scale
