"""dropout: elementwise, with the mask drawn from the index of each element."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._common import as_rows, check_float, narrow, uniform

BLOCK = 1024


@triton.jit(do_not_specialize=["seed", "offset"])
def _dropout(
    x_ptr,
    residual_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    K,
    blocks,
    p,
    factor,
    seed,
    offset,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    k0 = (program % blocks) * BLOCK
    column = k0 + tl.arange(0, BLOCK)
    mask = column < K
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.reshape(uniform(seed, row + tl.arange(0, 1), k0, K, 0, QUADS, BLOCK, offset), (BLOCK,))
    y = tl.where(u >= p, x * factor, 0.0)
    if residual_ptr is not None:
        y = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32) + y
    tl.store(out_ptr + row * K + column, narrow(y, out_ptr.dtype.element_ty), mask=mask)


def dropout(x: torch.Tensor, residual: torch.Tensor | None, p: float, key: torch.Tensor) -> torch.Tensor:
    """x of any shape, residual of the same, key int64 [2] (seed, offset) on the CPU; see pykernels.functional."""
    check_float(x if x.dim() else x.reshape(1))
    out = torch.empty(x.shape, dtype=x.dtype if residual is None else residual.dtype, device=x.device)
    n = x.numel()
    if n == 0:
        return out
    seed, offset = key.tolist()
    # In one piece it is one row, whose Philox blocks are whole; else rows of the last dimension, read where they lie.
    if x.is_contiguous() and (residual is None or residual.is_contiguous()):
        x = x.reshape(1, n)
        residual = None if residual is None else residual.reshape(1, n)
    x = as_rows(x)
    residual = None if residual is None else as_rows(residual)
    M, K = x.shape
    block = min(BLOCK, max(4, triton.next_power_of_2(K)))
    blocks = triton.cdiv(K, block)
    with torch.cuda.device_of(x):
        _dropout[(M * blocks,)](
            x,
            residual,
            out,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            K,
            blocks,
            math.ceil(p * 2**24) * 2.0**-24,
            0.0 if p == 1.0 else 1.0 / (1.0 - p),
            seed,
            offset,
            QUADS=M == 1 or K % 4 == 0,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
