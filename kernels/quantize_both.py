"""quantize_both: the row-quantised matrix and the transposed column-quantised one from the same reading of the tile.

INT8 training needs both, so that the operands of each of its products are contiguous along the summed dimension.
quantize_transposed is the same without the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import absmax_bits, as_rows, check_float, encode, scale_inverse, uniform

TILES_M = 4
BLOCK_M, BLOCK_K = 64, 64


@triton.jit(do_not_specialize=["seed"])
def _quantize_both(
    x_ptr,
    row_bits_ptr,
    col_bits_ptr,
    q_ptr,
    row_scale_ptr,
    qt_ptr,
    col_scale_ptr,
    x_stride,
    M,
    K,
    seed,
    STOCHASTIC: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_m, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)

    if q_ptr is not None:
        scale, inverse = scale_inverse(tl.load(row_bits_ptr + rows, mask=rows < M, other=0))
        if tile_k == 0:
            tl.store(row_scale_ptr + rows, scale, mask=rows < M)
        u = uniform(seed, rows, tile_k * BLOCK_K, K, 0, QUADS, BLOCK_K) if STOCHASTIC else 0.0
        tl.store(q_ptr + rows[:, None] * K + cols[None, :], encode(x, inverse[:, None], u, STOCHASTIC), mask=mask)

    scale, inverse = scale_inverse(tl.load(col_bits_ptr + cols, mask=cols < K, other=0))
    if tile_m == 0:
        tl.store(col_scale_ptr + cols, scale, mask=cols < K)
    u = uniform(seed, rows, tile_k * BLOCK_K, K, 1, QUADS, BLOCK_K) if STOCHASTIC else 0.0
    qt = tl.trans(encode(x, inverse[None, :], u, STOCHASTIC))
    tl.store(
        qt_ptr + cols.to(tl.int64)[:, None] * M + rows[None, :], qt, mask=(cols < K)[:, None] & (rows < M)[None, :]
    )


def _quantize(
    x: torch.Tensor,
    stochastic: bool,
    seed: int,
    q: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    qt: torch.Tensor,
    col_scale: torch.Tensor,
) -> None:
    """Fill the copies of x [M, K], which is not empty; without q and row_scale the transposed one alone."""
    M, K = x.shape
    x = as_rows(x)
    rows = 0 if q is None else M
    bits = torch.zeros(rows + K, dtype=torch.int32, device=x.device)
    row_bits, col_bits = None if q is None else bits[:rows], bits[rows:]
    tiles_k = triton.cdiv(K, BLOCK_K)
    with torch.cuda.device_of(x):
        absmax_bits[(triton.cdiv(M, BLOCK_M * TILES_M) * tiles_k,)](
            x, row_bits, col_bits, x.stride(0), M, K, TILES_M=TILES_M, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=4
        )
        _quantize_both[(triton.cdiv(M, BLOCK_M) * tiles_k,)](
            x,
            row_bits,
            col_bits,
            q,
            row_scale,
            qt,
            col_scale,
            x.stride(0),
            M,
            K,
            seed,
            STOCHASTIC=stochastic,
            QUADS=K % 4 == 0,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            enable_fp_fusion=False,
        )


def quantize_both(
    x: torch.Tensor, stochastic: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K] float to (int8 [M, K], row scale [M], int8 transposed [K, M], column scale [K])."""
    check_float(x, dims=2)
    M, K = x.shape
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    qt = torch.empty((K, M), dtype=torch.int8, device=x.device)
    row_scale = torch.empty(M, dtype=torch.float32, device=x.device)
    col_scale = torch.empty(K, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, row_scale.zero_(), qt, col_scale.zero_()
    _quantize(x, stochastic, seed, q, row_scale, qt, col_scale)
    return q, row_scale, qt, col_scale


def quantize_transposed(x: torch.Tensor, stochastic: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float to (int8 transposed [K, M], column scale [K]): quantize_both's second half, bit for bit."""
    check_float(x, dims=2)
    M, K = x.shape
    qt = torch.empty((K, M), dtype=torch.int8, device=x.device)
    scale = torch.empty(K, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return qt, scale.zero_()
    _quantize(x, stochastic, seed, None, None, qt, scale)
    return qt, scale
