"""What two or more Triton kernels share: argument checks, rounding, randomness, the epilogue."""

from __future__ import annotations

from typing import NoReturn

import torch
import triton
import triton.language as tl

from ._tuning import interpreted

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_K = 131071  # 128 * 128 * K must stay below 2**31


def refuse(argument: str, got: object, accepts: str) -> NoReturn:
    """Raise what every launcher raises, in the words of pykernels/ops."""
    raise RuntimeError(f"expected {argument} to be {accepts}, got {got}")


def check_float(x: torch.Tensor, name: str = "x", dims: int | None = None) -> None:
    if x.dtype not in FLOATS:
        refuse(name, x.dtype, "float32, bfloat16 or float16")
    if (x.dim() != dims) if dims else (x.dim() < 1):
        refuse(name, f"{x.dim()} dimensions", f"{dims} dimensions" if dims else "one dimension or more")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K] with stride 1 along K; a copy only when the strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def block_rows(elements: int, K: int) -> int:
    """Rows one program takes, so that a tile of K columns holds about `elements` values."""
    return max(1, min(64, elements // triton.next_power_of_2(max(K, 1))))


# Device code below. Kernels that round are launched with enable_fp_fusion=False: a fused multiply-add would round
# x * inverse + u once instead of twice and move a code by one.

# Triton's interpreter truncates to bfloat16, and multiplies bfloat16 matrices as raw integers.
INTERPRETED = tl.constexpr(interpreted())
MIN_ABSMAX = tl.constexpr(127 * 2.0**-126)
NAN_BITS = tl.constexpr(0x7FC00000)  # a NaN differs from itself, so Triton refuses it as a constant
INF_BITS = tl.constexpr(0x7F800000)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds half to even and leaves the integer in the low bits


@triton.jit
def abs_bits(x):
    """|x| as the bits of a float32: ordered like |x|, with infinities and then NaNs on top."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def nan_unless(good, v):
    return tl.where(good, v.to(tl.int32, bitcast=True), NAN_BITS).to(tl.float32, bitcast=True)


@triton.jit
def scale_inverse(bits):
    """Scale and its inverse from the absmax as bits. An inverse of 0 says: all codes are 0."""
    absmax = bits.to(tl.float32, bitcast=True)
    finite = bits < INF_BITS
    usable = finite & (absmax >= MIN_ABSMAX)
    safe = tl.where(usable, absmax, 127.0)
    scale = nan_unless(finite, tl.where(usable, tl.div_rn(safe, 127.0), 0.0))
    return scale, tl.where(usable, tl.div_rn(127.0, safe), 0.0)


@triton.jit
def given_scale_inverse(bits, given):
    """The same where the caller gave the scale: only non-finite input changes it."""
    finite = bits < INF_BITS
    usable = finite & (tl.abs(given) >= 2.0**-126)
    inverse = tl.div_rn(1.0, tl.where(usable, given, 1.0))
    return nan_unless(finite, given), tl.where(usable, inverse, 0.0)


@triton.jit
def round_codes(v):
    """Clamp to +-127 and round half to even, as int8."""
    v = tl.minimum(tl.maximum(v, -127.0), 127.0)
    return (v + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def encode(x, inverse, u, STOCHASTIC: tl.constexpr):
    """int8 codes of float32 x; inverse is broadcast against x, u is uniform in [0, 1) and read only if STOCHASTIC."""
    v = tl.where(inverse == 0.0, 0.0, x * inverse)
    if STOCHASTIC:
        v = tl.minimum(tl.maximum(v + u, -127.0), 127.0)
        return tl.floor(v).to(tl.int32).to(tl.int8)
    return round_codes(v)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10 of uint32 counters. Unlike tl.philox its products are 64 bits wide: one instruction gives both
    halves on a GPU, and the interpreter does not go through them one by one."""
    seed = tl.to_tensor(seed).to(tl.uint64)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(seed, rows, k0, K, WORD: tl.constexpr, QUADS: tl.constexpr, BLOCK_K: tl.constexpr, offset=0):
    """Philox uniforms [len(rows), BLOCK_K] of elements (row, k0 + j) of a row-major [.., K]; rows is int64.

    QUADS (K and k0 are multiples of 4) computes each Philox block once instead of once per element. The counters start
    at offset.
    """
    if QUADS:
        block = rows[:, None] * (K // 4) + (k0 // 4 + tl.arange(0, BLOCK_K // 4))[None, :]
    else:
        index = rows[:, None] * K + (k0 + tl.arange(0, BLOCK_K))[None, :]
        block = index >> 2
    block += offset
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    r0, r1, r2, r3 = philox(seed, low, high, zero + WORD, zero)
    if QUADS:
        bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (rows.shape[0], BLOCK_K))
    else:
        lane = (index & 3).to(tl.int32)
        bits = tl.where(lane < 2, tl.where(lane == 0, r0, r1), tl.where(lane == 2, r2, r3))
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def absmax_bits(
    x_ptr,
    row_bits_ptr,
    col_bits_ptr,
    x_stride,
    M,
    K,
    TILES_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Absmax along both sides of x [M, K] into zeroed int32 buffers; TILES_M tiles down a program, rows optional."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    cols = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = (tl.program_id(0) // tiles_k).to(tl.int64) * TILES_M * BLOCK_M
    top = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for tile in range(TILES_M):
        rows = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < K)[None, :]
        bits = abs_bits(tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0))
        if row_bits_ptr is not None:
            tl.atomic_max(row_bits_ptr + rows, tl.max(bits, axis=1), mask=rows < M, sem="relaxed")
        top = tl.maximum(top, bits)
    tl.atomic_max(col_bits_ptr + cols, tl.max(top, axis=0), mask=cols < K, sem="relaxed")


@triton.jit
def sigmoid(v):
    e = tl.exp(-tl.abs(v))  # never overflows
    return tl.where(v < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """0 none, 1 relu, 2 gelu (erf), 3 gelu_tanh, 4 silu, on float32."""
    if ACTIVATION == 1:
        v = tl.where(v < 0.0, 0.0, v)  # keeps NaN, as torch does
    elif ACTIVATION == 2:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == 3:
        v = v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == 4:
        v = v * sigmoid(v)
    return v


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """float32 to the output's type, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        v = tl.where(v == v, rounded, NAN_BITS).to(tl.float32, bitcast=True)
    return v.to(dtype)


@triton.jit
def finish(v, rows, cols, M, N, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride, ACTIVATION: tl.constexpr):
    """out[rows, cols] = activation(v + bias) + residual; rows is int64, out is row-major with a row stride."""
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    v = activate(v, ACTIVATION)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + rows[:, None] * out_stride + cols[None, :], narrow(v, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def int8_epilogue(
    acc,
    rows,
    cols,
    M,
    N,
    a_scale_ptr,
    a_scale_stride,
    b_scale_ptr,
    b_scale_stride,
    zero_point_ptr,
    zero_point_stride,
    b_sum_ptr,
    bias_ptr,
    residual_ptr,
    residual_stride,
    out_ptr,
    out_stride,
    ACTIVATION: tl.constexpr,
):
    """From int32 accumulators to the output: (acc - zero_point * b_sum) * a_scale * b_scale in float32, then finish."""
    if out_ptr.dtype.element_ty == tl.int32:
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(out_ptr + rows[:, None] * out_stride + cols[None, :], acc, mask=mask)
    else:
        if zero_point_ptr is not None:
            # The difference takes 33 bits. Its two 16-bit halves are exact as float32, so their sum rounds once.
            zero_point = tl.load(zero_point_ptr + rows * zero_point_stride, mask=rows < M, other=0)[:, None]
            b_sum = tl.load(b_sum_ptr + cols, mask=cols < N, other=0)[None, :]
            high = (acc >> 16) - zero_point * (b_sum >> 16)
            low = (acc & 0xFFFF) - zero_point * (b_sum & 0xFFFF)
            v = high.to(tl.float32) * 65536.0 + low.to(tl.float32)
        else:
            v = acc.to(tl.float32)
        if a_scale_ptr is not None:
            v = v * tl.load(a_scale_ptr + rows * a_scale_stride, mask=rows < M, other=0.0)[:, None]
        if b_scale_ptr is not None:
            v = v * tl.load(b_scale_ptr + cols * b_scale_stride, mask=cols < N, other=0.0)[None, :]
        finish(v, rows, cols, M, N, bias_ptr, residual_ptr, residual_stride, out_ptr, out_stride, ACTIVATION)
