"""The gradients of int8_grouped_linear, one launch each; programs find their rows among the counts, on the device.

grad_x [T, K] = (grad [T, N] * scale[e]) @ weight[e] [N, K]: the int8 weight becomes floats in registers alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import FLOATS, INF_BITS, INTERPRETED, abs_bits, check_float, narrow, refuse
from ._tile_order import tile_at
from ._tuning import Config, bucket, tuned
from .int8_grouped_matmul import group_tile, most_row_tiles


def _config(m: int, k: int, n: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_K": k, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


# By the largest number of rows that an expert has on average, the default first; float32, with its three products, has
# room for fewer. BLOCK_N is the step of the sum.
CONFIGS: dict[int, list[Config]] = {
    16: [_config(16, 64, 64, 4, 4), _config(16, 128, 32, 4, 4)],
    8192: [_config(64, 128, 32, 8, 3), _config(64, 64, 64, 4, 3)],
}
FLOAT32_CONFIGS = {16: CONFIGS[16][:1], 8192: CONFIGS[8192]}
UNALIGNED = _config(32, 64, 32, 4, 1)
SUM_BLOCKS = {"BLOCK_T": 32, "BLOCK_N": 128}


def configs_for(rows: int, aligned: bool, parts: int) -> list[Config]:
    if not aligned:
        return [UNALIGNED]
    by_rows = FLOAT32_CONFIGS if parts == 3 else CONFIGS
    return next(configs for limit, configs in by_rows.items() if bucket(rows) <= limit)


@triton.jit
def _product(v, w, acc, PARTS: tl.constexpr):
    """acc + v w with v float32 and w int8, on the tensor cores: an int8 is one bfloat16, and v the sum of three.

    Two of them leave 2^-17 of v, which a result of 16 bits does not show.
    """
    for _ in tl.static_range(PARTS):
        part = v.to(tl.bfloat16)
        if INTERPRETED:
            acc = tl.dot(part.to(tl.float32), w.to(tl.float32), acc)
        else:
            acc = tl.dot(part, w.to(tl.bfloat16), acc)
        v = tl.where(abs_bits(part) < INF_BITS, v - part.to(tl.float32), 0.0)
    return acc


@triton.jit
def _grouped_grad_input(
    grad_ptr,
    w_ptr,
    scale_ptr,
    counts_ptr,
    out_ptr,
    T,
    N,
    K,
    E,
    tiles_m,
    grad_stride,
    w_step,
    w_stride,
    PARTS: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile_m, tile_k = tile_at(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_K))
    expert, first, end = group_tile(counts_ptr, tile_m, T, E, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    cols = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if expert < E:
        n = tl.arange(0, BLOCK_N)
        grad_rows = grad_ptr + tl.where(rows < end, rows, 0)[:, None] * grad_stride
        w_cols = w_ptr + expert * w_step + tl.where(cols < K, cols, 0)[None, :]
        for n0 in range(0, N, BLOCK_N):
            if EVEN_N:
                grad = tl.load(grad_rows + (n0 + n)[None, :])
                scale = tl.load(scale_ptr + expert * N + n0 + n)
                w = tl.load(w_cols + (n0 + n).to(tl.int64)[:, None] * w_stride)
            else:
                inside = n0 + n < N
                grad = tl.load(grad_rows + (n0 + n)[None, :], mask=inside[None, :], other=0.0)
                scale = tl.load(scale_ptr + expert * N + n0 + n, mask=inside, other=0.0)
                w = tl.load(w_cols + (n0 + n).to(tl.int64)[:, None] * w_stride, mask=inside[:, None], other=0)
            acc = _product(grad.to(tl.float32) * scale[None, :], w, acc, PARTS)
    mask = (rows < end)[:, None] & (cols < K)[None, :]
    tl.store(out_ptr + rows[:, None] * K + cols[None, :], narrow(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grouped_sum(
    rows_ptr,
    counts_ptr,
    out_ptr,
    T,
    N,
    E,
    stride,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    expert = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int64)
    counts = tl.minimum(tl.maximum(counts, 0), T)
    first = tl.minimum(tl.sum(tl.where(e < expert, counts, 0), 0), T)
    end = tl.minimum(tl.sum(tl.where(e <= expert, counts, 0), 0), T)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for base in range(first, end, BLOCK_T):
        rows = base + tl.arange(0, BLOCK_T)
        mask = (rows < end)[:, None] & (cols < N)[None, :]
        acc += tl.load(rows_ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + expert.to(tl.int64) * N + cols, tl.sum(acc, 0), mask=cols < N)


def int8_grouped_linear_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """grad [T, N] float sorted by expert, weight int8 [E, N, K], scale [E, N], counts [E], to grad_x [T, K]."""
    check_float(grad, "grad", dims=2)
    T, N = grad.shape
    E, w_n, K = weight.shape
    if weight.dtype != torch.int8 or w_n != N:
        refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", f"int8 [E, {N}, K]")
    if weight_scale.shape != (E, N) or weight_scale.dtype != torch.float32:
        refuse("weight_scale", f"{weight_scale.dtype} {tuple(weight_scale.shape)}", f"float32 [{E}, {N}]")
    if counts.shape != (E,) or counts.dtype not in (torch.int32, torch.int64):
        refuse("counts", f"{counts.dtype} {tuple(counts.shape)}", f"int32 or int64 [{E}]")
    out_dtype = out_dtype or grad.dtype
    if out_dtype not in FLOATS:
        refuse("out_dtype", out_dtype, "float32, bfloat16 or float16")
    out = torch.empty((T, K), dtype=out_dtype, device=grad.device)
    if out.numel() == 0:
        return out
    if E == 0:
        return out.zero_()
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    weight = weight if weight.stride(2) == 1 else weight.contiguous()
    weight_scale, counts = weight_scale.contiguous(), counts.contiguous()
    parts = 3 if torch.float32 in (grad.dtype, out_dtype) else 2

    def launch(config: Config) -> None:
        tiles_m = most_row_tiles(T, E, config["BLOCK_M"])
        _grouped_grad_input[(tiles_m * triton.cdiv(K, config["BLOCK_K"]),)](
            grad,
            weight,
            weight_scale,
            counts,
            out,
            T,
            N,
            K,
            E,
            tiles_m,
            grad.stride(0),
            weight.stride(0),
            weight.stride(1),
            PARTS=parts,
            EVEN_N=N % config["BLOCK_N"] == 0,
            BLOCK_E=triton.next_power_of_2(E + 1),
            **config,
        )

    sizes = (K, grad.stride(0), weight.stride(0), weight.stride(1), grad.data_ptr(), weight.data_ptr())
    aligned = all(size % 16 == 0 for size in sizes)
    rows = triton.cdiv(T, E)
    key = (bucket(rows), E, N, K, grad.dtype, out_dtype, aligned)
    with torch.cuda.device_of(grad):
        launch(tuned("int8_grouped_linear_backward", key, configs_for(rows, aligned, parts), grad.device, launch))
    return out


def grouped_sum(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The float32 sums [E, N] of each expert's rows [T, N], in an order that the counts alone decide."""
    check_float(rows, "rows", dims=2)
    if counts.dim() != 1 or counts.dtype not in (torch.int32, torch.int64):
        refuse("counts", f"{counts.dtype} {tuple(counts.shape)}", "int32 or int64 [E]")
    (T, N), E = rows.shape, counts.numel()
    out = torch.empty((E, N), dtype=torch.float32, device=rows.device)
    if out.numel() == 0:
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    grid = (triton.cdiv(N, SUM_BLOCKS["BLOCK_N"]), E)
    with torch.cuda.device_of(rows):
        _grouped_sum[grid](
            rows,
            counts.contiguous(),
            out,
            T,
            N,
            E,
            rows.stride(0),
            BLOCK_E=triton.next_power_of_2(E + 1),
            **SUM_BLOCKS,
        )
    return out
