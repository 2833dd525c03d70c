"""Backward of rms_norm and layer_norm for rows too long for registers: grad_x by rows, and the sums by columns."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import narrow


@triton.jit
def row_statistics(rstd_ptr, mean_ptr, rows, M):
    """rstd and mean [rows, 1] as float32; a mean of 0 where there is none."""
    rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
    mean = tl.zeros_like(rstd)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
    return rstd[:, None], mean[:, None]


@triton.jit
def load_rows(grad_ptr, h_ptr, rstd, mean, mask):
    """grad and x_hat as float32, both 0 outside the mask."""
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr, mask=mask, other=0.0).to(tl.float32)
    return grad, tl.where(mask, (h - mean) * rstd, 0.0)


@triton.jit
def load_weight(weight_ptr, cols, K, weight_offset):
    return tl.load(weight_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :] + weight_offset


@triton.jit
def store_grad_x(grad_x_ptr, grad_h_ptr, v, mask):
    """The pointers are those of the elements; grad_h_ptr may be None."""
    if grad_h_ptr is not None:
        v += tl.load(grad_h_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptr, narrow(v, grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_long(
    grad_ptr,
    grad_h_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    grad_x_ptr,
    grad_stride,
    grad_h_stride,
    h_stride,
    M,
    K,
    weight_offset,
    BLOCK_K: tl.constexpr,
):
    """grad_x of one row."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd, mean = row_statistics(rstd_ptr, mean_ptr, rows, M)
    product = tl.zeros((1, BLOCK_K), tl.float32)
    total = tl.zeros((1, BLOCK_K), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)
        grad, x_hat = load_rows(
            grad_ptr + rows[:, None] * grad_stride + cols[None, :],
            h_ptr + rows[:, None] * h_stride + cols[None, :],
            rstd,
            mean,
            (cols < K)[None, :],
        )
        if weight_ptr is not None:
            grad *= load_weight(weight_ptr, cols, K, weight_offset)
        product += grad * x_hat
        total += grad
    along = tl.sum(product, axis=1, keep_dims=True) / K
    constant = tl.sum(total, axis=1, keep_dims=True) / K
    for k0 in range(0, K, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)
        mask = (cols < K)[None, :]
        grad, x_hat = load_rows(
            grad_ptr + rows[:, None] * grad_stride + cols[None, :],
            h_ptr + rows[:, None] * h_stride + cols[None, :],
            rstd,
            mean,
            mask,
        )
        if weight_ptr is not None:
            grad *= load_weight(weight_ptr, cols, K, weight_offset)
        v = grad - x_hat * along
        if mean_ptr is not None:
            v -= constant
        grad_h = grad_h_ptr
        if grad_h_ptr is not None:
            grad_h = grad_h_ptr + rows[:, None] * grad_h_stride + cols[None, :]
        store_grad_x(grad_x_ptr + rows[:, None] * K + cols[None, :], grad_h, v * rstd, mask)


@triton.jit
def _norm_column_sums(
    grad_ptr,
    h_ptr,
    rstd_ptr,
    mean_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    grad_stride,
    h_stride,
    M,
    K,
    rows_per_program,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The partial sums of a run of rows, for one block of columns."""
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
    first = tl.program_id(0) * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, M), ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        rstd, mean = row_statistics(rstd_ptr, mean_ptr, rows, M)
        grad, x_hat = load_rows(
            grad_ptr + rows[:, None] * grad_stride + cols[None, :],
            h_ptr + rows[:, None] * h_stride + cols[None, :],
            rstd,
            mean,
            mask,
        )
        weight_sum += grad * x_hat
        bias_sum += grad
    line = tl.program_id(0).to(tl.int64) * K + cols
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + line, tl.sum(weight_sum, axis=0), mask=cols < K)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + line, tl.sum(bias_sum, axis=0), mask=cols < K)
