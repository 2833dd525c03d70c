"""linear_cross_entropy: losses and logsumexp of x @ weight^T + bias, whose logits never leave the registers.

The forward of "Cut Your Losses in Large-Vocabulary Language Models" (arXiv 2411.09009) without its locks: each program
folds a run of classes into the statistics of its rows, and a second kernel adds the runs up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import INTERPRETED, as_rows
from .cross_entropy import LOWEST, capped, row_loss

RUNS = 8  # of classes; with 4096 rows in blocks of 128, two waves on the largest GPU
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4}
# The softcap's tanh takes registers of its own.
CAPPED_CONFIG = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
# float32 without TF32 runs on the vector units; rows that are not 16-byte aligned are read element by element.
SMALL_CONFIG = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
UNALIGNED_CONFIG = {**SMALL_CONFIG, "num_warps": 8}


@triton.jit
def _linear_statistics(
    x_ptr,
    w_ptr,
    bias_ptr,
    target_ptr,
    part_ptr,
    x_stride,
    w_stride,
    N,
    V,
    K,
    softcap,
    TILES: tl.constexpr,
    TF32: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """part [runs, 4, N], over TILES tiles: maximum, sum of exp(z - maximum), z of the target or 0, sum of z."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < N
    target = tl.load(target_ptr + rows, mask=live, other=-1)
    x_rows = x_ptr + tl.where(live, rows, 0)[:, None] * x_stride
    k = tl.arange(0, BLOCK_K)
    top = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    on_target = tl.zeros((BLOCK_M,), tl.float32)
    sum_z = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(TILES):
        cols = (tl.program_id(1) * TILES + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (cols < V)[None, :]
        w_rows = w_ptr + tl.where(cols < V, cols, 0).to(tl.int64)[:, None] * w_stride
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            mask = (k0 + k < K)[None, :]
            x = tl.load(x_rows + (k0 + k)[None, :], mask=mask, other=0.0)
            w = tl.load(w_rows + (k0 + k)[None, :], mask=mask, other=0.0)
            if INTERPRETED:
                z = tl.dot(x.to(tl.float32), w.to(tl.float32).T, z)
            else:
                z = tl.dot(x, w.T, z, input_precision="tf32" if TF32 else "ieee")
        if bias_ptr is not None:
            z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        z = capped(z, softcap, CAP)
        new_top = tl.maximum(top, tl.max(tl.where(inside, z, LOWEST), axis=1))
        exponential = tl.where(inside, tl.exp(z - new_top[:, None]), 0.0)
        total = total * tl.exp(top - new_top) + tl.sum(exponential, axis=1)
        top = new_top
        on_target += tl.sum(tl.where(inside & (cols[None, :] == target[:, None]), z, 0.0), axis=1)
        sum_z += tl.sum(tl.where(inside, z, 0.0), axis=1)
    part = part_ptr + tl.program_id(1).to(tl.int64) * 4 * N + rows
    tl.store(part, top, mask=live)
    tl.store(part + N, total, mask=live)
    tl.store(part + 2 * N, on_target, mask=live)
    tl.store(part + 3 * N, sum_z, mask=live)


@triton.jit
def _finish(
    part_ptr,
    target_ptr,
    loss_ptr,
    lse_ptr,
    correct_ptr,
    N,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    RUNS: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < N
    keep = tl.load(target_ptr + rows, mask=live, other=0) != ignore_index
    part = part_ptr + rows
    top = tl.load(part, mask=live, other=0.0)
    total = tl.load(part + N, mask=live, other=1.0)
    z = tl.load(part + 2 * N, mask=live, other=0.0)
    sum_z = tl.load(part + 3 * N, mask=live, other=0.0)
    for _ in range(1, RUNS):
        part += 4 * N
        more_top = tl.load(part, mask=live, other=0.0)
        new_top = tl.maximum(top, more_top)
        more = tl.load(part + N, mask=live, other=1.0)
        total = total * tl.exp(top - new_top) + more * tl.exp(more_top - new_top)
        top = new_top
        z += tl.load(part + 2 * N, mask=live, other=0.0)
        sum_z += tl.load(part + 3 * N, mask=live, other=0.0)
    loss, lse = row_loss(top, total, z, sum_z, 1.0, V * 1.0, label_smoothing, z_loss, V, SMOOTH)
    tl.store(loss_ptr + rows, tl.where(keep, loss, 0.0), mask=live)
    tl.store(lse_ptr + rows, tl.where(keep, lse, 0.0), mask=live)
    tl.store(correct_ptr + rows, keep & (z >= top), mask=live)


def linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input [N, H], weight [V, H] to (loss, logsumexp, whether no logit is above the target's), each [N]."""
    N, V = input.shape[0], weight.shape[0]
    loss = torch.empty(N, dtype=torch.float32, device=input.device)
    lse, correct = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)
    if N == 0:
        return loss, lse, correct
    x, w, target = as_rows(input), as_rows(weight), target.contiguous()
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in (x, w))
    large = CAPPED_CONFIG if softcap else CONFIG
    config = UNALIGNED_CONFIG if not aligned else SMALL_CONFIG if x.dtype == torch.float32 else large
    tiles = triton.cdiv(triton.cdiv(V, config["BLOCK_N"]), RUNS)
    runs = triton.cdiv(V, tiles * config["BLOCK_N"])
    parts = torch.empty((runs, 4, N), dtype=torch.float32, device=input.device)
    with torch.cuda.device_of(input):
        _linear_statistics[(triton.cdiv(N, config["BLOCK_M"]), runs)](
            x,
            w,
            None if bias is None else bias.contiguous(),
            target,
            parts,
            x.stride(0),
            w.stride(0),
            N,
            V,
            x.shape[1],
            softcap,
            TILES=tiles,
            TF32=torch.backends.cuda.matmul.allow_tf32,
            CAP=softcap != 0.0,
            **config,
        )
        _finish[(triton.cdiv(N, 128),)](
            parts,
            target,
            loss,
            lse,
            correct,
            N,
            V,
            ignore_index,
            label_smoothing,
            z_loss,
            RUNS=runs,
            SMOOTH=label_smoothing != 0.0,
            BLOCK_M=128,
            num_warps=4,
        )
    return loss, lse, correct
