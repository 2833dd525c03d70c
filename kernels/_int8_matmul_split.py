"""The second launch of int8_matmul where K is split: the parts' sums, and everything after the product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import int8_epilogue

BLOCK_M, BLOCK_N = 4, 256


@triton.jit
def _reduce(
    partial_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    zero_point_ptr,
    b_sum_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    out_stride,
    residual_stride,
    a_scale_stride,
    b_scale_stride,
    zero_point_stride,
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + (part * M + rows)[:, None] * N + cols[None, :], mask=mask, other=0)
    int8_epilogue(
        acc,
        rows,
        cols,
        M,
        N,
        a_scale_ptr,
        a_scale_stride,
        b_scale_ptr,
        b_scale_stride,
        zero_point_ptr,
        zero_point_stride,
        b_sum_ptr,
        bias_ptr,
        residual_ptr,
        residual_stride,
        out_ptr,
        out_stride,
        ACTIVATION,
    )


def reduce(
    partial: torch.Tensor, tensors: tuple[torch.Tensor | None, ...], strides: tuple[int, ...], activation: int
) -> None:
    """partial int32 [split, M, N] summed and finished; tensors and strides as the kernel names them."""
    split, M, N = partial.shape
    _reduce[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)](
        partial,
        *tensors,
        M,
        N,
        *strides,
        ACTIVATION=activation,
        SPLIT_K=split,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )
