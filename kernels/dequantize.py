"""dequantize: int8 codes back to a float type, for scales (and zero points) on any grid of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import FLOATS, as_rows, narrow, refuse

BLOCK_M, BLOCK_K = 8, 512


@triton.jit
def _dequantize(
    q_ptr,
    scale_ptr,
    zero_point_ptr,
    out_ptr,
    q_stride,
    M,
    K,
    BM,
    BK,
    blocks_k,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    block = (rows // BM)[:, None] * blocks_k + (cols // BK)[None, :]
    q = tl.load(q_ptr + rows[:, None] * q_stride + cols[None, :], mask=mask, other=0).to(tl.int32)
    if zero_point_ptr is not None:
        q -= tl.load(zero_point_ptr + block, mask=mask, other=0)
    v = q.to(tl.float32) * tl.load(scale_ptr + block, mask=mask, other=0.0)
    tl.store(out_ptr + rows[:, None] * K + cols[None, :], narrow(v, out_ptr.dtype.element_ty), mask=mask)


def dequantize(
    q: torch.Tensor,
    scale: torch.Tensor,
    block_size: list[int],
    zero_point: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(q - zero_point) * scale of q's shape; scale and zero_point have the shape of the grid of blocks."""
    if q.dtype != torch.int8 or q.dim() < 1:
        refuse("q", f"{q.dtype} with {q.dim()} dimensions", "int8 with one dimension or more")
    if out_dtype not in FLOATS:
        refuse("out_dtype", out_dtype, "float32, bfloat16 or float16")
    if len(block_size) not in (1, 2) or min(block_size) < 1 or (len(block_size) == 2 and q.dim() != 2):
        refuse("block_size", list(block_size), "[b], or [bm, bk] for a matrix, each at least 1")
    K, M = q.shape[-1], q.shape[:-1].numel()
    bm, bk = (1, block_size[0]) if len(block_size) == 1 else block_size
    blocks_m, blocks_k = triton.cdiv(M, bm), triton.cdiv(K, bk)
    grid_shape = (*q.shape[:-1], blocks_k) if len(block_size) == 1 else (blocks_m, blocks_k)
    if scale.shape != grid_shape or scale.dtype != torch.float32:
        refuse("scale", f"{scale.dtype} {tuple(scale.shape)}", f"float32 {grid_shape}")
    if zero_point is not None and (zero_point.shape != grid_shape or zero_point.dtype != torch.int32):
        refuse("zero_point", f"{zero_point.dtype} {tuple(zero_point.shape)}", f"int32 {grid_shape}")
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    if q.numel() == 0:
        return out
    rows = as_rows(q)
    with torch.cuda.device_of(q):
        _dequantize[(triton.cdiv(M, BLOCK_M) * triton.cdiv(K, BLOCK_K),)](
            rows,
            scale.contiguous(),
            None if zero_point is None else zero_point.contiguous(),
            out,
            rows.stride(0),
            M,
            K,
            bm,
            bk,
            blocks_k,
            BLOCK_M=BLOCK_M,
            BLOCK_K=BLOCK_K,
            num_warps=4,
        )
    return out
