"""Device code and launchers of rms_norm and layer_norm, which differ by a mean."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import abs_bits, as_rows, block_rows, check_float, encode, narrow, scale_inverse
from ._norm_backward import backward as backward

ONE_PASS_K = 16384  # a row up to this long stays in registers; half as much where it is read element by element
LOOP_K = 2048


@triton.jit
def _load_h(x_rows, residual_rows, cols, mask):
    """x + residual, rounded to the dtype of x, as float32; residual_rows may be None."""
    x = tl.load(x_rows + cols, mask=mask, other=0.0)
    h = x.to(tl.float32)
    if residual_rows is not None:
        h = narrow(h + tl.load(residual_rows + cols, mask=mask, other=0.0).to(tl.float32), x.dtype).to(tl.float32)
    return h


@triton.jit
def _normalise(h, mean, rstd, weight_ptr, bias_ptr, weight_offset, cols, mask, dtype: tl.constexpr):
    """(h - mean) * rstd * weight + bias as the output rounds it, 0 outside the mask."""
    y = (h - mean) * rstd
    if weight_ptr is not None:
        y = y * (tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, narrow(y, dtype), 0.0)


@triton.jit
def _norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    scale_ptr,
    h_ptr,
    rstd_ptr,
    mean_ptr,
    x_stride,
    residual_stride,
    M,
    K,
    eps,
    weight_offset,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (rows < M)[:, None]
    cols = tl.arange(0, BLOCK_K)[None, :]
    dtype = x_ptr.dtype.element_ty
    x_rows = x_ptr + rows[:, None] * x_stride
    residual_rows = residual_ptr
    if residual_ptr is not None:
        residual_rows = residual_ptr + rows[:, None] * residual_stride
    here = rows[:, None] * K + cols

    mask = live & (cols < K)
    h = _load_h(x_rows, residual_rows, cols, mask)
    mean = tl.zeros((ROWS, 1), tl.float32)
    if CENTRE:
        total = h
        if not ONE_PASS:
            for k0 in range(BLOCK_K, K, BLOCK_K):
                total += _load_h(x_rows, residual_rows, k0 + cols, live & (k0 + cols < K))
        mean = tl.div_rn(tl.sum(total, axis=1, keep_dims=True), K * 1.0)
    v = tl.where(mask, h - mean, 0.0)
    squares = v * v
    if h_ptr is not None:
        tl.store(h_ptr + here, narrow(h, dtype), mask=mask)
    if not ONE_PASS:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            more = live & (k0 + cols < K)
            h = _load_h(x_rows, residual_rows, k0 + cols, more)
            v = tl.where(more, h - mean, 0.0)
            squares += v * v
            if h_ptr is not None:
                tl.store(h_ptr + (here + k0), narrow(h, dtype), mask=more)
    variance = tl.div_rn(tl.sum(squares, axis=1, keep_dims=True), K * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows[:, None], rstd, mask=live)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows[:, None], mean, mask=live)

    if ONE_PASS:
        y = _normalise(h, mean, rstd, weight_ptr, bias_ptr, weight_offset, cols, mask, dtype)
        if scale_ptr is not None:
            scale, inverse = scale_inverse(tl.max(abs_bits(y), axis=1, keep_dims=True))
            tl.store(scale_ptr + rows[:, None], scale, mask=live)
            tl.store(y_ptr + here, encode(y.to(tl.float32), inverse, 0.0, False), mask=mask)
        else:
            tl.store(y_ptr + here, y, mask=mask)
    else:
        if scale_ptr is not None:
            top = tl.zeros((ROWS, BLOCK_K), tl.int32)
            for k0 in range(0, K, BLOCK_K):
                more = live & (k0 + cols < K)
                h = _load_h(x_rows, residual_rows, k0 + cols, more)
                y = _normalise(h, mean, rstd, weight_ptr, bias_ptr, weight_offset, k0 + cols, more, dtype)
                top = tl.maximum(top, abs_bits(y))
            scale, inverse = scale_inverse(tl.max(top, axis=1, keep_dims=True))
            tl.store(scale_ptr + rows[:, None], scale, mask=live)
        for k0 in range(0, K, BLOCK_K):
            more = live & (k0 + cols < K)
            h = _load_h(x_rows, residual_rows, k0 + cols, more)
            y = _normalise(h, mean, rstd, weight_ptr, bias_ptr, weight_offset, k0 + cols, more, dtype)
            if scale_ptr is not None:
                y = encode(y.to(tl.float32), inverse, 0.0, False)
            tl.store(y_ptr + (here + k0), y, mask=more)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    keep_h: bool,
    centre: bool,
    quantize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, h, rstd, mean), or (codes, h, scale, nothing); see pykernels/ops/rms_norm.py."""
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_float(tensor, name)
    K = x.shape[-1]
    y = torch.empty(x.shape, dtype=torch.int8 if quantize else x.dtype, device=x.device)
    keep_h = keep_h and residual is not None
    h = torch.empty(x.shape if keep_h else (0,), dtype=x.dtype, device=x.device)
    per_row, mean = (
        torch.empty(x.shape[:-1] if wanted else (0,), dtype=torch.float32, device=x.device)
        for wanted in (True, centre and not quantize)
    )
    M = per_row.numel()
    if M == 0 or K == 0:
        nothing = 0.0 if quantize else float("nan")
        return y, h, per_row.fill_(nothing), mean.fill_(nothing)
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    strides = (rows.stride(0), 0 if added is None else added.stride(0))
    inputs = (t for t in (rows, added, weight, bias) if t is not None)
    vectors = all(n % 16 == 0 for n in (K, *strides, *(t.data_ptr() for t in inputs)))
    one_pass = K <= (ONE_PASS_K if vectors else ONE_PASS_K // 2)
    block_k = triton.next_power_of_2(K) if one_pass else LOOP_K
    block_m = block_rows(2048, block_k)
    with torch.cuda.device_of(x):
        _norm_forward[(triton.cdiv(M, block_m),)](
            rows,
            added,
            weight,
            bias,
            y,
            per_row if quantize else None,
            h if keep_h else None,
            None if quantize else per_row,
            mean if mean.numel() else None,
            *strides,
            M,
            K,
            eps,
            weight_offset,
            CENTRE=centre,
            ROWS=block_m,
            BLOCK_K=block_k,
            ONE_PASS=one_pass,
            num_warps=16 if block_k > 8192 else 8 if block_k > 2048 else 4,
            enable_fp_fusion=False,  # so that codes are those of quantize_rowwise, and y the same in both
        )
    return y, h, per_row, mean
