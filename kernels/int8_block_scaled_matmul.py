"""int8_block_scaled_matmul: one tensor-core product for each block of K, its int32 sums scaled into float32 ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import FLOATS, finish, refuse
from ._tile_order import tile_at
from ._tuning import Config, bucket, tuned

SCALED = 128  # a step along K is a block; a tile of b's rows lies within one


def _config(m: int, n: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


# By the largest M they serve, the default first. Two sets of accumulators leave room for no larger tile.
CONFIGS: dict[int, list[Config]] = {
    16: [_config(16, 32, 4, 5), _config(16, 64, 4, 4)],
    64: [_config(64, 64, 4, 4)],
    8192: [_config(128, 128, 8, 4), _config(64, 128, 8, 4)],
}
UNALIGNED = _config(32, 64, 8, 1)  # read byte by byte, as in int8_matmul


def configs_for(M: int, N: int, aligned: bool) -> list[Config]:
    if not aligned:
        return [UNALIGNED]
    # Rows of the output that are not 16-byte aligned take more registers (see int8_matmul).
    most = 8192 if N % 16 == 0 else 64
    return next(configs for limit, configs in CONFIGS.items() if min(bucket(M), most) <= limit)


@triton.jit
def _int8_block_scaled(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    a_stride,
    b_stride,
    blocks,
    EVEN_K: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tile_n * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)

    # Rows past the edge read row 0 again; only K needs a mask.
    k = tl.arange(0, SCALED)
    inside = tl.where(rows < M, rows, 0)
    a_rows = a_ptr + inside[:, None] * a_stride
    b_rows = b_ptr + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * b_stride
    a_scale = a_scale_ptr + inside * blocks
    b_scale = b_scale_ptr + (first_col // SCALED).to(tl.int64) * blocks
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(0, blocks):
        k0 = block * SCALED
        if EVEN_K:
            a = tl.load(a_rows + (k0 + k)[None, :])
            b = tl.load(b_rows + (k0 + k)[None, :])
        else:
            a = tl.load(a_rows + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
            b = tl.load(b_rows + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
        scale = tl.load(a_scale + block) * tl.load(b_scale + block)
        acc += tl.dot(a, b.T, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
    finish(acc, rows, cols, M, N, bias_ptr, None, 0, out_ptr, N, 0)


def int8_block_scaled_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """a int8 [M, K] by b int8 [N, K] transposed, scaled by blocks, to [M, N]; see pykernels.functional."""
    for name, t in (("a", a), ("b", b)):
        if t.dtype != torch.int8 or t.dim() != 2:
            refuse(name, f"{t.dtype} with {t.dim()} dimensions", "an int8 matrix")
    (M, K), (N, b_k) = a.shape, b.shape
    blocks = triton.cdiv(K, SCALED)
    if b_k != K:
        refuse("b", f"K = {b_k}", f"the K of a, {K}")
    for name, t, shape in (("a_scale", a_scale, (M, blocks)), ("b_scale", b_scale, (triton.cdiv(N, SCALED), blocks))):
        if t.shape != shape or t.dtype != torch.float32:
            refuse(name, f"{t.dtype} {tuple(t.shape)}", f"float32 {shape}")
    if bias is not None and (bias.shape != (N,) or bias.dtype not in FLOATS):
        refuse("bias", f"{bias.dtype} {tuple(bias.shape)}", f"a float tensor [{N}]")
    out = torch.empty((M, N), dtype=out_dtype or torch.float32, device=a.device)
    if out.numel() == 0:
        return out
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    tensors = (a_scale.contiguous(), b_scale.contiguous(), None if bias is None else bias.contiguous(), out)

    def launch(config: Config) -> None:
        grid = (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)
        _int8_block_scaled[grid](
            a, b, *tensors, M, N, K, a.stride(0), b.stride(0), blocks, EVEN_K=K % SCALED == 0, SCALED=SCALED, **config
        )

    aligned = all(size % 16 == 0 for size in (K, a.stride(0), b.stride(0), a.data_ptr(), b.data_ptr()))
    key = (bucket(M), N, K, out.dtype, aligned)
    with torch.cuda.device_of(a):
        launch(tuned("int8_block_scaled_matmul", key, configs_for(M, N, aligned), a.device, launch))
    return out
