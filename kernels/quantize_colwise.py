"""quantize_colwise: symmetric int8 codes and one float32 scale per column."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import absmax_bits, as_rows, check_float, encode, scale_inverse, uniform

TILES_M = 8
BLOCK_M, BLOCK_K = 32, 128


@triton.jit(do_not_specialize=["seed"])
def _quantize_colwise(
    x_ptr,
    bits_ptr,
    q_ptr,
    scale_ptr,
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
    k0 = (tl.program_id(0) % tiles_k) * BLOCK_K
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = k0 + tl.arange(0, BLOCK_K)
    scale, inverse = scale_inverse(tl.load(bits_ptr + cols, mask=cols < K, other=0))
    if tl.program_id(0) < tiles_k:
        tl.store(scale_ptr + cols, scale, mask=cols < K)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    u = uniform(seed, rows, k0, K, 0, QUADS, BLOCK_K) if STOCHASTIC else 0.0
    q = encode(x, inverse[None, :], u, STOCHASTIC)
    tl.store(q_ptr + rows[:, None] * K + cols[None, :], q, mask=mask)


def quantize_colwise(x: torch.Tensor, stochastic: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float to (int8 codes [M, K], float32 scale [K]); see pykernels.functional."""
    check_float(x, dims=2)
    M, K = x.shape
    q = torch.empty((M, K), dtype=torch.int8, device=x.device)
    scale = torch.empty(K, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, scale.zero_()
    x = as_rows(x)
    bits = torch.zeros(K, dtype=torch.int32, device=x.device)
    tiles_k = triton.cdiv(K, BLOCK_K)
    with torch.cuda.device_of(x):
        absmax_bits[(triton.cdiv(M, BLOCK_M * TILES_M) * tiles_k,)](
            x, None, bits, x.stride(0), M, K, TILES_M=TILES_M, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=4
        )
        _quantize_colwise[(triton.cdiv(M, BLOCK_M) * tiles_k,)](
            x,
            bits,
            q,
            scale,
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
    return q, scale
