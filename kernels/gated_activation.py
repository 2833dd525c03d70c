"""gated_activation: act(gate) * up in one pass, and its gradients in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import as_rows, block_rows, check_float, narrow, sigmoid

RELU2 = 5
TILE = 2048  # elements a program takes
TILE_K = 1024


@triton.jit
def _value_slope(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative: 1 relu, 2 gelu, 3 gelu_tanh, 4 silu, 5 relu squared. NaN stays NaN."""
    if ACTIVATION == 1:
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x))
    elif ACTIVATION == 2:
        # Phi(-t) = exp(-t^2 / 2) R(t), t = |x|, as in csrc/cpu/gated_activation_functions.h: 1 + erf would cancel.
        t = tl.where(tl.abs(x) > 13.19, 13.19, tl.abs(x))
        inverse = 1.0 / (t + 3.5)
        y = 1.0 - 7.0 * inverse
        p = 0.00011483321583065996 * y + 0.0004296163588147446
        p = p * y - 0.0004941458593523282
        p = p * y - 0.0031802705366186204
        p = p * y + 0.006491602936372533
        p = p * y + 0.017407409091918943
        p = p * y - 0.1160527376949811
        p = p * y + 0.3154249747480527
        p = p * y - 0.5655617578058487
        p = p * y + 0.7444160750608565
        e = tl.exp(-0.5 * t * t)
        tail = p * inverse * e
        below = tail - 0.3989422804014327 * t * e
        value = tl.where(x < 0.0, 0.0, x) - t * tail
        slope = tl.where(x > 0.0, 1.0 - below, below)
    elif ACTIVATION == 5:
        positive = tl.where(x < 0.0, 0.0, x)
        value = positive * positive
        slope = positive + positive
    else:
        # x sigmoid(a); limits, so that 0 is never multiplied by infinity.
        if ACTIVATION == 3:
            above = tl.where(x < -12.0, -12.0, x)
            z = tl.where(above > 12.0, 12.0, above)
            a = 1.5957691216057308 * (z + 0.044715 * z * z * z)
            turn = 1.5957691216057308 * (z + 3 * 0.044715 * z * z * z)
        else:
            above = tl.where(x < -100.0, -100.0, x)
            a = tl.where(above > 100.0, 100.0, above)
            turn = a
        s = sigmoid(a)
        value = above * s
        rest = tl.where(a < 0.0, 1.0 - s, sigmoid(-a))  # 1 - s, which cancels above 0
        slope = s * (1.0 + rest * turn)
    return value, slope


@triton.jit
def product(gate_ptr, up_ptr, offsets, up_offsets, mask, ACTIVATION: tl.constexpr):
    """act(gate) * up, rounded to their type."""
    x = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    v, _ = _value_slope(x, ACTIVATION)
    if ACTIVATION != 5:
        v = v * tl.load(up_ptr + up_offsets, mask=mask, other=0.0).to(tl.float32)
    return narrow(v, gate_ptr.dtype.element_ty)


@triton.jit
def _tile(M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's rows and columns, and where they exist."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    return rows[:, None], cols[None, :], (rows < M)[:, None] & (cols < K)[None, :]


@triton.jit
def _gated_activation(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    M,
    K,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, cols, mask = _tile(M, K, BLOCK_M, BLOCK_K)
    v = product(gate_ptr, up_ptr, rows * gate_stride + cols, rows * up_stride + cols, mask, ACTIVATION)
    tl.store(out_ptr + rows * K + cols, v, mask=mask)


@triton.jit
def _gated_activation_backward(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_stride,
    grad_step,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    M,
    K,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, cols, mask = _tile(M, K, BLOCK_M, BLOCK_K)
    g = tl.load(grad_ptr + rows * grad_stride + cols * grad_step, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = _value_slope(x, ACTIVATION)
    dtype = gate_ptr.dtype.element_ty
    if ACTIVATION != 5:
        slope = slope * tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_up_ptr + rows * grad_up_stride + cols, narrow(g * value, dtype), mask=mask)
    tl.store(grad_gate_ptr + rows * grad_gate_stride + cols, narrow(g * slope, dtype), mask=mask)


def inputs(gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up as rows: of two tensors, the halves of one, or gate twice for relu2, which reads no up."""
    check_float(gate, "gate")
    rows = as_rows(gate)
    if up is not None:
        return rows, as_rows(up)
    if activation == RELU2:
        return rows, rows
    half = gate.shape[-1] // 2
    return rows[:, :half], rows[:, half:]


def _blocks(M: int, K: int) -> tuple[tuple[int], dict[str, int]]:
    block_k = min(TILE_K, triton.next_power_of_2(K))
    block_m = block_rows(TILE, block_k)
    return (triton.cdiv(M, block_m) * triton.cdiv(K, block_k),), {"BLOCK_M": block_m, "BLOCK_K": block_k}


def gated_activation(gate: torch.Tensor, up: torch.Tensor | None, activation: int) -> torch.Tensor:
    """act(gate) * up [..., I]; see pykernels.functional.swiglu."""
    left, right = inputs(gate, up, activation)
    M, K = left.shape
    out = torch.empty((*gate.shape[:-1], K), dtype=gate.dtype, device=gate.device)
    if out.numel():
        grid, blocks = _blocks(M, K)
        with torch.cuda.device_of(gate):
            _gated_activation[grid](
                left,
                right,
                out,
                left.stride(0),
                right.stride(0),
                M,
                K,
                ACTIVATION=activation,
                **blocks,
                num_warps=4,
                enable_fp_fusion=False,  # as in the quantised kernel: the two agree bit for bit
            )
    return out


def gated_activation_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up; of a packed gate one packed gradient, and an empty one."""
    left, right = inputs(gate, up, activation)
    M, K = left.shape
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(0 if up is None else up.shape, dtype=gate.dtype, device=gate.device)
    if grad.numel():
        rows = grad.reshape(M, K)
        if rows.stride(1) not in (0, 1):  # one value expanded to a row is read as it is
            rows = rows.contiguous()
        grad_left, grad_right = inputs(grad_gate, None if up is None else grad_up, activation)
        grid, blocks = _blocks(M, K)
        with torch.cuda.device_of(gate):
            _gated_activation_backward[grid](
                rows,
                left,
                right,
                grad_left,
                grad_right,
                rows.stride(0),
                rows.stride(1),
                left.stride(0),
                right.stride(0),
                grad_left.stride(0),
                grad_right.stride(0),
                M,
                K,
                ACTIVATION=activation,
                **blocks,
                num_warps=4,
            )
    return grad_gate, grad_up
