"""int8_linear: rows of x quantised on the way into an int8 product; a float copy of neither side is ever made.

One row (decoding) is one kernel: each program quantises the row for itself while it reads its own weights. More rows
are two launches, quantize_rowwise and int8_matmul, with only int8 between them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import FLOATS, MAX_K, abs_bits, check_float, encode, finish, given_scale_inverse, refuse, scale_inverse
from ._tuning import Config, tuned
from .int8_matmul import int8_matmul
from .quantize_rowwise import quantize_rowwise

ROW_CONFIGS: list[Config] = [
    {"BLOCK_N": 8, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 16, "BLOCK_K": 512, "num_warps": 4, "num_stages": 3},
]


@triton.jit
def _int8_linear_row(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    N,
    K,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    top = tl.zeros((BLOCK_K,), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        top = tl.maximum(top, abs_bits(tl.load(x_ptr + k0 + k, mask=k0 + k < K, other=0.0)))
    bits = tl.max(top, axis=0)
    if x_scale_ptr is not None:
        scale, inverse = given_scale_inverse(bits, tl.load(x_scale_ptr).to(tl.float32))
    else:
        scale, inverse = scale_inverse(bits)
    w_rows = w_ptr + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        w = tl.load(w_rows + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
        x = tl.load(x_ptr + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
        q = encode(x, inverse, 0.0, False).to(tl.int32)
        acc += w.to(tl.int32) * q[None, :]
    row = tl.zeros((1,), tl.int64)
    total = tl.sum(acc, axis=1)[None, :]
    v = total.to(tl.float32) * scale * tl.load(w_scale_ptr + cols, mask=cols < N, other=0.0)[None, :]
    finish(v, row, cols, 1, N, bias_ptr, residual_ptr, N, out_ptr, N, ACTIVATION)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [..., K] float by weight int8 [N, K] with a scale a row, to [..., N]; see pykernels.functional."""
    check_float(x)
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[1] > MAX_K:
        refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", f"int8 [N, {x.shape[-1]}], at most {MAX_K} columns")
    N, K = weight.shape
    shape = (*x.shape[:-1], N)
    M = x.shape[:-1].numel()
    out_dtype = out_dtype or x.dtype
    if out_dtype not in FLOATS:
        refuse("out_dtype", out_dtype, "float32, bfloat16 or float16")
    if weight_scale.shape != (N,) or weight_scale.dtype != torch.float32:
        refuse("weight_scale", f"{weight_scale.dtype} {tuple(weight_scale.shape)}", f"float32 [{N}]")
    if bias is not None and (bias.shape != (N,) or bias.dtype not in FLOATS):
        refuse("bias", f"{bias.dtype} {tuple(bias.shape)}", f"a float tensor [{N}]")
    if residual is not None and (residual.shape != shape or residual.dtype not in FLOATS):
        refuse("residual", f"{residual.dtype} {tuple(residual.shape)}", f"a float tensor {shape}")
    if x_scale is not None and x_scale.numel() != 1:
        refuse("x_scale", f"{x_scale.numel()} values", "one value")
    if M != 1 or K == 0 or N == 0:
        q, scale = quantize_rowwise(x.reshape(M, K), scale=x_scale)
        residual = None if residual is None else residual.reshape(M, N)
        return int8_matmul(q, weight, scale, weight_scale, bias, residual, activation, out_dtype=out_dtype).view(shape)

    out = torch.empty(shape, dtype=out_dtype, device=x.device)
    row, weight = x.reshape(K).contiguous(), weight.contiguous()
    tensors = (
        row,
        x_scale,
        weight,
        weight_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(),
        out,
    )

    def launch(config: Config) -> None:
        _int8_linear_row[(triton.cdiv(N, config["BLOCK_N"]),)](
            *tensors, N, K, ACTIVATION=activation, **config, enable_fp_fusion=False
        )

    with torch.cuda.device_of(x):
        launch(tuned("int8_linear", (N, K, x.dtype), ROW_CONFIGS, x.device, launch))
    return out
