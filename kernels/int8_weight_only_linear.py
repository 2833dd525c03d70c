"""int8_weight_only_linear: float activations by int8 weights, which become floats in registers and nowhere else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import FLOATS, INF_BITS, INTERPRETED, abs_bits, check_float, finish, refuse
from ._tile_order import tile_at
from ._tuning import Config, bucket, tuned


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# By the largest M they serve, the default first; BLOCK_K is cut down to the group size. float32 has its own, for its
# three products, and so do rows that are not 16-byte aligned, which are read element by element.
CONFIGS: dict[int, list[Config]] = {
    16: [_config(16, 64, 128, 4, 4), _config(16, 64, 256, 4, 3)],
    64: [_config(64, 64, 128, 4, 3), _config(32, 128, 64, 4, 4)],
    8192: [_config(128, 128, 64, 8, 3), _config(64, 128, 64, 4, 3)],
}
FLOAT32_CONFIGS: list[Config] = [_config(64, 64, 64, 4, 3)]
UNALIGNED = _config(32, 64, 32, 4, 1)
ROW_CONFIGS: list[Config] = [
    {"BLOCK_N": 8, "BLOCK_K": 512, "num_warps": 4, "num_stages": 2},
    {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 2},
]


def configs_for(M: int, N: int, aligned: bool, dtype: torch.dtype) -> list[Config]:
    if M == 1:
        return ROW_CONFIGS
    if not aligned:
        return [UNALIGNED]
    if dtype == torch.float32:
        return FLOAT32_CONFIGS
    # Rows of the output that are not 16-byte aligned take more registers (see int8_matmul).
    most = 8192 if N % 16 == 0 else 64
    return next(configs for limit, configs in CONFIGS.items() if min(bucket(M), most) <= limit)


@triton.jit
def _to_float32(w):
    """int8 to float32 by placing the byte in the mantissa of 2**23: two full-rate instructions, not a conversion."""
    return ((w.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _product(w, x, acc):
    """acc + w x^T with w int8 and x of any float type, on the tensor cores.

    A float32 is the sum of three bfloat16, and an int8 is one bfloat16: three exact products instead of float32 ones.
    """
    if INTERPRETED and x.dtype != tl.float32:
        return tl.dot(w.to(tl.float32), x.to(tl.float32).T, acc)
    elif x.dtype == tl.float32:
        for _ in tl.static_range(3):
            part = x.to(tl.bfloat16)
            if INTERPRETED:
                acc = tl.dot(w.to(tl.float32), part.to(tl.float32).T, acc)
            else:
                acc = tl.dot(w.to(tl.bfloat16), part.T, acc)
            x = tl.where(abs_bits(part) < INF_BITS, x - part.to(tl.float32), 0.0)
        return acc
    else:
        return tl.dot(w.to(x.dtype), x.T, acc)


@triton.jit
def _weight_only(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    M,
    N,
    K,
    GROUP,
    groups,
    GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + tl.where(rows < M, rows, 0)[:, None] * x_stride
    w_rows = w_ptr + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * K
    # The product is computed transposed, weights first: on Hopper the first operand may come from registers.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    steps = tl.cdiv(GROUP, BLOCK_K)
    for step in range(groups * steps):
        group = step // steps
        k0 = group * GROUP + (step - group * steps) * BLOCK_K
        if EVEN_K:
            x = tl.load(x_rows + (k0 + k)[None, :])
            w = tl.load(w_rows + (k0 + k)[None, :])
        else:
            inside = (k0 + k < group * GROUP + GROUP)[None, :]
            x = tl.load(x_rows + (k0 + k)[None, :], mask=inside, other=0.0)
            w = tl.load(w_rows + (k0 + k)[None, :], mask=inside, other=0)
        if GROUPED:
            scale = tl.load(scale_ptr + cols.to(tl.int64) * groups + group, mask=cols < N, other=0.0)
            acc += _product(w, x, tl.zeros((BLOCK_N, BLOCK_M), tl.float32)) * scale[:, None]
        else:
            acc = _product(w, x, acc)
    if not GROUPED:
        acc *= tl.load(scale_ptr + cols, mask=cols < N, other=0.0)[:, None]
    finish(tl.trans(acc), rows, cols, M, N, bias_ptr, None, 0, out_ptr, N, ACTIVATION)


@triton.jit
def _weight_only_row(
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    GROUP,
    groups,
    GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = tl.where(cols < N, cols, 0).to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        w = tl.load(w_ptr + rows * K + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0)
        x = tl.load(x_ptr + k0 + k, mask=k0 + k < K, other=0.0).to(tl.float32)
        if GROUPED:
            group = tl.minimum((k0 + k) // GROUP, groups - 1)
            acc += _to_float32(w) * x[None, :] * tl.load(scale_ptr + rows * groups + group[None, :])
        else:
            acc += _to_float32(w) * x[None, :]
    total = tl.sum(acc, axis=1)
    if not GROUPED:
        total *= tl.load(scale_ptr + cols, mask=cols < N, other=0.0)
    finish(total[None, :], tl.zeros((1,), tl.int64), cols, 1, N, bias_ptr, None, 0, out_ptr, N, ACTIVATION)


def int8_weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: int = 0,
) -> torch.Tensor:
    """x [..., K] float by weight int8 [N, K], scale [N] or [N, K / g], to [..., N] of x's dtype."""
    check_float(x)
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        refuse("weight", f"{weight.dtype} {tuple(weight.shape)}", f"int8 [N, {x.shape[-1]}]")
    N, K = weight.shape
    groups = weight_scale.shape[1] if weight_scale.dim() == 2 else 1
    if (
        weight_scale.dtype != torch.float32
        or weight_scale.shape not in ((N,), (N, groups))
        or (K and (groups == 0 or K % groups))
    ):
        refuse(
            "weight_scale",
            f"{weight_scale.dtype} {tuple(weight_scale.shape)}",
            f"float32 [{N}] or [{N}, G] where G divides K = {K}",
        )
    if bias is not None and (bias.shape != (N,) or bias.dtype not in FLOATS):
        refuse("bias", f"{bias.dtype} {tuple(bias.shape)}", f"a float tensor [{N}]")
    M = x.shape[:-1].numel()
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if K == 0:
        groups, weight_scale = 1, weight_scale.new_zeros(N)
    x = x.reshape(M, K)
    x = x if x.stride(1) == 1 or K == 1 else x.contiguous()
    group = K // groups
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    bias = None if bias is None else bias.contiguous()

    def launch_row(config: Config) -> None:
        _weight_only_row[(triton.cdiv(N, config["BLOCK_N"]),)](
            x, weight, weight_scale, bias, out, N, K, group, groups, GROUPED=groups > 1, ACTIVATION=activation, **config
        )

    def launch(config: Config) -> None:
        block_k = max(16, min(config["BLOCK_K"], triton.next_power_of_2(group)))
        tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
        _weight_only[(tiles,)](
            x,
            weight,
            weight_scale,
            bias,
            out,
            x.stride(0),
            M,
            N,
            K,
            group,
            groups,
            GROUPED=groups > 1,
            ACTIVATION=activation,
            EVEN_K=group % block_k == 0,
            **{**config, "BLOCK_K": block_k},
        )

    size, run = (1, launch_row) if M == 1 else (bucket(M), launch)
    aligned = all(n % 16 == 0 for n in (group, x.stride(0), x.data_ptr(), weight.data_ptr()))
    with torch.cuda.device_of(x):
        run(
            tuned(
                "int8_weight_only_linear",
                (size, N, K, groups, x.dtype, aligned),
                configs_for(M, N, aligned, x.dtype),
                x.device,
                run,
            )
        )
    return out
