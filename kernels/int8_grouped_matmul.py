"""int8_grouped_matmul: one launch for all experts; each program finds its tile among the counts, on the device.

The grid has room for the most row tiles that T rows in E groups, and the rows that no group counts, can make; the
programs beyond those that the counts do make end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import FLOATS, MAX_K, int8_epilogue, refuse
from ._tile_order import tile_at
from ._tuning import Config, bucket, tuned


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# By the largest number of rows that an expert has on average, the default first.
CONFIGS: dict[int, list[Config]] = {
    16: [_config(16, 64, 256, 4, 4), _config(16, 64, 128, 4, 5)],
    64: [_config(64, 64, 128, 4, 4)],
    8192: [_config(128, 128, 128, 8, 4), _config(64, 128, 128, 4, 4)],
}
UNALIGNED = _config(32, 64, 64, 4, 1)  # as in int8_matmul


def configs_for(rows: int, N: int, aligned: bool) -> list[Config]:
    if not aligned:
        return [UNALIGNED]
    # Rows of the output that are not 16-byte aligned take more registers (see int8_matmul).
    most = 8192 if N % 16 == 0 else 64
    return next(configs for limit, configs in CONFIGS.items() if min(bucket(rows), most) <= limit)


def most_row_tiles(rows: int, experts: int, block: int) -> int:
    """Row tiles of E groups and the uncounted rows, at most: every group that is not empty may end in a part of one."""
    return min(rows, (rows + (experts + 1) * (block - 1)) // block)


@triton.jit
def group_tile(counts_ptr, tile, T, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of the group) of a row tile. Expert E has the rows that none counts; no rows, no tile.

    BLOCK_E is above E. A negative count is 0 and groups end with the rows, whatever the counts say.
    """
    e = tl.arange(0, BLOCK_E)
    # At most T each, so that a sum of counts that are not to be believed stays far inside int64.
    counts = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int64)
    counts = tl.minimum(tl.maximum(counts, 0), T)
    sums = tl.cumsum(counts, 0)
    ends = tl.where(e < E, tl.minimum(sums, T), T)
    starts = tl.where(e <= E, tl.minimum(sums - counts, T), T)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_ends <= tile).to(tl.int64), 0)
    chosen = e == expert
    first_tile = tl.sum(tl.where(chosen, tile_ends - tiles, 0), 0)
    first = tl.sum(tl.where(chosen, starts, 0), 0) + (tile - first_tile) * BLOCK_M
    return expert, first, tl.sum(tl.where(chosen, ends, 0), 0)


@triton.jit
def _int8_grouped_matmul(
    a_ptr,
    b_ptr,
    counts_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    T,
    N,
    K,
    E,
    tiles_m,
    a_stride,
    b_step,
    b_stride,
    a_scale_stride,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring row tiles mostly share an expert, and so its tiles of b.
    tile_m, tile_n = tile_at(tl.program_id(0), tiles_m, tl.cdiv(N, BLOCK_N))
    expert, first, end = group_tile(counts_ptr, tile_m, T, E, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if expert >= E:
        mask = (rows < end)[:, None] & (cols < N)[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * N + cols[None, :], zeros, mask=mask)
        return

    k = tl.arange(0, BLOCK_K)
    a_rows = a_ptr + tl.where(rows < end, rows, 0)[:, None] * a_stride
    b_rows = b_ptr + expert * b_step + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * b_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_rows + (k0 + k)[None, :])
            b = tl.load(b_rows + (k0 + k)[None, :])
        else:
            a = tl.load(a_rows + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
            b = tl.load(b_rows + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
    if b_scale_ptr is not None:
        b_scale_ptr += expert * N
    if bias_ptr is not None:
        bias_ptr += expert * N
    int8_epilogue(
        acc,
        rows,
        cols,
        end,
        N,
        a_scale_ptr,
        a_scale_stride,
        b_scale_ptr,
        1,
        None,
        0,
        None,
        bias_ptr,
        None,
        0,
        out_ptr,
        N,
        ACTIVATION,
    )


def int8_grouped_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    counts: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """a int8 [T, K] sorted by expert, b int8 [E, N, K], counts [E], to [T, N]; see pykernels.functional."""
    if a.dtype != torch.int8 or a.dim() != 2:
        refuse("a", f"{a.dtype} with {a.dim()} dimensions", "an int8 matrix")
    (T, K), (E, N, b_k) = a.shape, b.shape
    if b.dtype != torch.int8 or b_k != K or K > MAX_K:
        refuse("b", f"{b.dtype} {tuple(b.shape)}", f"int8 [E, N, {K}], at most {MAX_K} columns")
    if counts.shape != (E,) or counts.dtype not in (torch.int32, torch.int64):
        refuse("counts", f"{counts.dtype} {tuple(counts.shape)}", f"int32 or int64 [{E}]")
    for name, t, dtypes in (("b_scale", b_scale, (torch.float32,)), ("bias", bias, FLOATS)):
        if t is not None and (t.shape != (E, N) or t.dtype not in dtypes):
            refuse(name, f"{t.dtype} {tuple(t.shape)}", f"{' or '.join(map(str, dtypes))} [{E}, {N}]")
    out_dtype = out_dtype or torch.float32
    out = torch.empty((T, N), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    if E == 0:
        return out.zero_()
    a = a if a.stride(1) == 1 else a.contiguous()
    b = b if b.stride(2) == 1 else b.contiguous()
    a_scale, b_scale, bias = (None if t is None else t.contiguous() for t in (a_scale, b_scale, bias))
    counts = counts.contiguous()

    def launch(config: Config) -> None:
        tiles_m = most_row_tiles(T, E, config["BLOCK_M"])
        _int8_grouped_matmul[(tiles_m * triton.cdiv(N, config["BLOCK_N"]),)](
            a,
            b,
            counts,
            out,
            a_scale,
            b_scale,
            bias,
            T,
            N,
            K,
            E,
            tiles_m,
            a.stride(0),
            b.stride(0),
            b.stride(1),
            0 if a_scale is None or a_scale.numel() == 1 else 1,
            ACTIVATION=activation,
            EVEN_K=K % config["BLOCK_K"] == 0,
            BLOCK_E=triton.next_power_of_2(E + 1),
            **config,
        )

    aligned = all(size % 16 == 0 for size in (K, a.stride(0), b.stride(0), b.stride(1), a.data_ptr(), b.data_ptr()))
    rows = triton.cdiv(T, E)
    key = (bucket(rows), E, N, K, out_dtype, aligned)
    with torch.cuda.device_of(a):
        launch(tuned("int8_grouped_matmul", key, configs_for(rows, N, aligned), a.device, launch))
    return out
