"""gated_activation_quantized: act(gate) * up as symmetric int8 with one scale a row, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import abs_bits, block_rows, encode, scale_inverse
from .gated_activation import TILE, inputs, product

ONE_PASS_K = 8192  # a product up to this long stays in registers between its maximum and its codes
LOOP_K = 4096


@triton.jit
def _quantize_gated_activation(
    gate_ptr,
    up_ptr,
    q_ptr,
    scale_ptr,
    gate_stride,
    up_stride,
    M,
    K,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows, live = row[:, None], (row < M)[:, None]
    gate_rows, up_rows = gate_ptr + rows * gate_stride, up_ptr + rows * up_stride
    cols = tl.arange(0, BLOCK_K)[None, :]
    v = product(gate_rows, up_rows, cols, cols, live & (cols < K), ACTIVATION).to(tl.float32)
    top = abs_bits(v)
    if not ONE_PASS:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            more = product(gate_rows, up_rows, k0 + cols, k0 + cols, live & (k0 + cols < K), ACTIVATION)
            top = tl.maximum(top, abs_bits(more))
    scale, inverse = scale_inverse(tl.max(top, axis=1))
    tl.store(scale_ptr + row, scale, mask=row < M)
    if ONE_PASS:
        tl.store(q_ptr + rows * K + cols, encode(v, inverse[:, None], 0.0, False), mask=live & (cols < K))
    else:
        for k0 in range(0, K, BLOCK_K):
            mask = live & (k0 + cols < K)
            v = product(gate_rows, up_rows, k0 + cols, k0 + cols, mask, ACTIVATION).to(tl.float32)
            tl.store(q_ptr + rows * K + k0 + cols, encode(v, inverse[:, None], 0.0, False), mask=mask)


def gated_activation_quantized(
    gate: torch.Tensor, up: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [..., I], float32 scale [...]): quantize_rowwise of gated_activation, bit for bit."""
    left, right = inputs(gate, up, activation)
    M, K = left.shape
    q = torch.empty((*gate.shape[:-1], K), dtype=torch.int8, device=gate.device)
    scale = torch.empty(gate.shape[:-1], dtype=torch.float32, device=gate.device)
    if q.numel() == 0:
        return q, scale.zero_()
    one_pass = K <= ONE_PASS_K
    block_k = triton.next_power_of_2(K) if one_pass else LOOP_K
    rows = block_rows(TILE, block_k)
    with torch.cuda.device_of(gate):
        _quantize_gated_activation[(triton.cdiv(M, rows),)](
            left,
            right,
            q,
            scale,
            left.stride(0),
            right.stride(0),
            M,
            K,
            ACTIVATION=activation,
            ROWS=rows,
            BLOCK_K=block_k,
            ONE_PASS=one_pass,
            num_warps=16 if block_k > 4096 else 8 if block_k > 2048 else 4,
            enable_fp_fusion=False,
        )
    return q, scale
