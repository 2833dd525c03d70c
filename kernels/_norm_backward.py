"""Backward of rms_norm and layer_norm: rows in registers, or in two kernels where they are too long for that.

A program owns a run of rows and one line of the partial sums of grad_weight and grad_bias, added up afterwards in a
fixed order: no atomics, and the same result at every call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import as_rows, block_rows, check_float
from ._norm_backward_long import (
    _norm_backward_long,
    _norm_column_sums,
    load_rows,
    load_weight,
    row_statistics,
    store_grad_x,
)

ONE_PASS_K = (
    8192  # h, grad, weight and the sums fit in registers; half as much with a mean, or rows off their alignment
)
LOOP_K = 2048
PROGRAMS_PER_PROCESSOR = 2
SUM_ROWS, SUM_COLUMNS = 16, 128


@triton.jit
def _norm_backward(
    grad_ptr,
    grad_h_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    mean_ptr,
    grad_x_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    grad_stride,
    grad_h_stride,
    h_stride,
    M,
    K,
    weight_offset,
    rows_per_program,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_K)
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
        if weight_sums_ptr is not None:
            weight_sum += grad * x_hat
        if bias_sums_ptr is not None:
            bias_sum += grad
        if weight_ptr is not None:
            grad *= load_weight(weight_ptr, cols, K, weight_offset)
        v = grad - x_hat * (tl.sum(grad * x_hat, axis=1, keep_dims=True) / K)
        if mean_ptr is not None:
            v -= tl.sum(grad, axis=1, keep_dims=True) / K
        grad_h = grad_h_ptr
        if grad_h_ptr is not None:
            grad_h = grad_h_ptr + rows[:, None] * grad_h_stride + cols[None, :]
        store_grad_x(grad_x_ptr + rows[:, None] * K + cols[None, :], grad_h, v * rstd, mask)
    line = tl.program_id(0).to(tl.int64) * K + cols
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + line, tl.sum(weight_sum, axis=0), mask=cols < K)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + line, tl.sum(bias_sum, axis=0), mask=cols < K)


def backward(
    grad: torch.Tensor,
    grad_h: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    mean: torch.Tensor | None,
    weight_offset: float,
    weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_x, grad_weight, grad_bias); see pykernels/ops/rms_norm.py."""
    check_float(h, "h")
    K = h.shape[-1]
    M = h.shape[:-1].numel()
    weight_dtype = weight.dtype if weight is not None and weight_grad else None
    grad_x = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if M == 0 or K == 0:
        sums = (None if dtype is None else grad_x.new_zeros(1, K) for dtype in (weight_dtype, bias_dtype))
        return (grad_x, *_parameter_grads(grad_x, weight, *sums, weight_dtype, bias_dtype))
    grads, rows, added = as_rows(grad), as_rows(h), None if grad_h is None else as_rows(grad_h)
    weight = None if weight is None else weight.contiguous()
    rstd, mean = rstd.contiguous(), None if mean is None else mean.contiguous()
    strides = (grads.stride(0), 0 if added is None else added.stride(0), rows.stride(0))

    operands = (grads, added, rows, weight, rstd, mean, grad_x)
    vectors = all(n % 16 == 0 for n in (K, *strides, *(t.data_ptr() for t in operands if t is not None)))
    limit = ONE_PASS_K if mean is None and vectors else ONE_PASS_K // 2
    short = limit >= K
    block_k = triton.next_power_of_2(K) if short else LOOP_K
    block_m = block_rows(1024, block_k) if short else SUM_ROWS
    programs = min(triton.cdiv(M, block_m), PROGRAMS_PER_PROCESSOR * _processors(h.device))
    rows_per_program = triton.cdiv(triton.cdiv(M, programs), block_m) * block_m
    programs = triton.cdiv(M, rows_per_program)
    weight_sums, bias_sums = (
        None if dtype is None else torch.empty(programs, K, dtype=torch.float32, device=h.device)
        for dtype in (weight_dtype, bias_dtype)
    )
    with torch.cuda.device_of(h):
        if short:
            _norm_backward[(programs,)](
                *operands,
                weight_sums,
                bias_sums,
                *strides,
                M,
                K,
                weight_offset,
                rows_per_program,
                ROWS=block_m,
                BLOCK_K=block_k,
                num_warps=max(4, min(32, block_k // 256)),
                maxnreg=None if mean is None else 96,  # else ptxas spills a little to fit more blocks
            )
        else:
            _norm_backward_long[(M,)](*operands, *strides, M, K, weight_offset, BLOCK_K=block_k, num_warps=8)
            if weight_sums is not None or bias_sums is not None:
                _norm_column_sums[(programs, triton.cdiv(K, SUM_COLUMNS))](
                    grads,
                    rows,
                    rstd,
                    mean,
                    weight_sums,
                    bias_sums,
                    strides[0],
                    strides[2],
                    M,
                    K,
                    rows_per_program,
                    ROWS=SUM_ROWS,
                    BLOCK_K=SUM_COLUMNS,
                    num_warps=4,
                )
    return (grad_x, *_parameter_grads(grad_x, weight, weight_sums, bias_sums, weight_dtype, bias_dtype))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _parameter_grads(
    like: torch.Tensor,
    weight: torch.Tensor | None,
    weight_sums: torch.Tensor | None,
    bias_sums: torch.Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = like.new_empty(0) if weight is None else weight.new_empty(0)
    grad_weight = nothing if weight_sums is None else weight_sums.sum(0, dtype=torch.float32).to(weight_dtype)
    grad_bias = like.new_empty(0) if bias_sums is None else bias_sums.sum(0, dtype=torch.float32).to(bias_dtype)
    return grad_weight, grad_bias
