"""How optimizer state is read and rounded on the device: the arithmetic of pykernels/ops/_optimizer_codes.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import INF_BITS, abs_bits, narrow
from ._tensor_table import pointer

NEAREST, STOCHASTIC, KAHAN, SPLIT_MASTER = (tl.constexpr(i) for i in range(4))
TINY = tl.constexpr(2.0**-100)


@triton.jit
def divide(a, b):
    """Correctly rounded: float32 by instruction, float64 by nature."""
    if a.dtype == tl.float64:
        result = a / b
    else:
        result = tl.div_rn(a, b)
    return result


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        result = tl.sqrt(x)
    else:
        result = tl.sqrt_rn(x)
    return result


@triton.jit
def dither_bits(index, step, stream, seed):
    """uint32 words of a Weyl sequence; index is int64, the rest are scalars of the table."""
    base = step.to(tl.uint32) * 0x9E3779B1 + stream.to(tl.uint32) * 0xC2B2AE35 + seed.to(tl.uint32) * 0x27D4EB2F
    return index.to(tl.uint32) * 0x85EBCA6B + base


@triton.jit
def _mix(x, key):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) ^ key
    return (x ^ (x >> 15)) * 0x846CA68B


@triton.jit
def random_bits(dither, step, stream, seed):
    """16 random bits (uint32) of the elements that have these dither_bits."""
    base = step.to(tl.uint32) * 0x9E3779B1 + stream.to(tl.uint32) * 0xC2B2AE35 + seed.to(tl.uint32) * 0x27D4EB2F
    mixed = _mix(base, base ^ base)
    return _mix(dither, mixed ^ (mixed >> 16)) >> 16


@triton.jit
def truncate_to_bfloat16(x, bits):
    """float32 rounded up with the probability of its fraction; bits: 16 random bits as uint32."""
    raw = x.to(tl.uint32, bitcast=True) + bits
    rounded = (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(abs_bits(x) < INF_BITS, rounded, narrow(x, tl.bfloat16))


@triton.jit
def join_master(high, low):
    """bfloat16 and int16 to the float32 that split_master took apart."""
    raw = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)
    return raw.to(tl.float32, bitcast=True)


@triton.jit
def split_master(master):
    raw = master.to(tl.uint32, bitcast=True)
    high = (raw + 0x8000) >> 16
    low = (raw - (high << 16)).to(tl.uint16).to(tl.int16, bitcast=True)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low


@triton.jit
def decode(codes, scale):
    """int8 or uint8 [GROUP, BLOCK] and float32 scale [GROUP] to float32."""
    c = codes.to(tl.float32)
    if codes.dtype == tl.int8:
        value = c * tl.abs(c) * tl.div_rn(scale, 16129.0)[:, None]
    else:
        root = c * tl.div_rn(scale, 255.0)[:, None]
        value = root * root
    return value


@triton.jit
def encode(value, bits, TYPE: tl.constexpr):
    """float32 [GROUP, BLOCK], 0 beyond the tensor, to (codes, scale [GROUP]); bits: dither_bits of the elements."""
    SIGNED: tl.constexpr = TYPE == tl.int8
    TOP: tl.constexpr = 16129.0 if SIGNED else 255.0
    size = tl.abs(value) if SIGNED else tl.sqrt_rn(value)
    top_bits = tl.max(abs_bits(size), axis=1)
    scale = top_bits.to(tl.float32, bitcast=True)
    usable = (top_bits < INF_BITS) & (scale >= TINY)
    inverse = tl.where(usable, tl.div_rn(tl.zeros_like(scale) + TOP, tl.where(usable, scale, 1.0)), 0.0)[:, None]
    scale = tl.where(scale < TINY, 0.0, scale)
    exact = tl.where(inverse == 0.0, 0.0, size * inverse)
    if SIGNED:
        exact = tl.sqrt_rn(exact)
    dither = (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    codes = tl.minimum(tl.floor(exact + dither), 127.0 if SIGNED else 255.0).to(tl.int32)
    if SIGNED:
        codes = tl.where(value < 0.0, -codes, codes)
    else:
        codes = tl.where(exact > 0.0, tl.maximum(codes, 1), codes)
    return codes.to(TYPE), scale


@triton.jit
def read_state(
    address, scale_address, offset, blocks, mask, live, TYPE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr
):
    """A state in the width of the update; 0 where the algorithm has none."""
    if TYPE is None:
        value = 0.0
    elif TYPE == tl.int8 or TYPE == tl.uint8:
        codes = tl.load(pointer(address, TYPE, ALIGNED) + offset, mask=mask, other=0)
        value = decode(codes, tl.load(pointer(scale_address, tl.float32, False) + blocks, mask=live, other=0.0))
    else:
        value = tl.load(pointer(address, TYPE, ALIGNED) + offset, mask=mask, other=0.0).to(WIDE)
    return value


@triton.jit
def write_state(
    value, address, scale_address, offset, blocks, mask, live, bits, TYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    if TYPE is not None:
        p = pointer(address, TYPE, ALIGNED) + offset
        if TYPE == tl.int8 or TYPE == tl.uint8:
            codes, scale = encode(tl.where(mask, value, 0.0).to(tl.float32), bits, TYPE)
            tl.store(p, codes, mask=mask)
            tl.store(pointer(scale_address, tl.float32, False) + blocks, scale, mask=live)
        elif TYPE == tl.bfloat16:
            tl.store(p, truncate_to_bfloat16(value, bits >> 16), mask=mask)
        else:
            tl.store(p, value, mask=mask)
