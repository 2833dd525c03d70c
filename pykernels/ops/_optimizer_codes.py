"""How optimizer state is kept in 8 and 16 bits, and how parameters are rounded: the numerics every backend repeats.

An element's randomness is a function of (seed, stream, step, global index) alone: stream numbers the tensors of an
optimizer, and the global index is that of the unsharded tensor, so that a shard rounds as the whole would.
"""

import torch
from torch import Tensor

from ._numerics import _MASK, ieee_div, ieee_sqrt

SIGNED_MAX = 127
UNSIGNED_MAX = 255
# Below this the inverse of a scale would overflow: such a block is all zeros.
TINY = 2.0**-100
# Odd multipliers (golden ratio, murmur3, xxhash): along any one argument the dither is a Weyl sequence, whose average
# over steps converges like 1 / steps and not like 1 / sqrt(steps).
DITHER_STEP, DITHER_INDEX, DITHER_STREAM, DITHER_SEED = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F
MIX_FIRST, MIX_SECOND = 0x7FEB352D, 0x846CA68B


def dither_bits(index: Tensor, step: int, stream: int, seed: int) -> Tensor:
    """uint32 words (as int64) for the rounding of state; index: int64 global element indices."""
    base = step * DITHER_STEP + stream * DITHER_STREAM + seed * DITHER_SEED
    return ((index & _MASK) * DITHER_INDEX + (base & _MASK)) & _MASK


def _mix(x: Tensor, key: int) -> Tensor:
    x = ((x ^ (x >> 16)) * MIX_FIRST & _MASK) ^ key
    return (x ^ (x >> 15)) * MIX_SECOND & _MASK


def random_key(step: int, stream: int, seed: int) -> int:
    """What tells the random bits of two steps, streams or seeds apart."""
    base = dither_bits(torch.zeros(1, dtype=torch.int64), step, stream, seed)
    mixed = int(_mix(base, 0))
    return mixed ^ (mixed >> 16)


def random_bits(index: Tensor, step: int, stream: int, seed: int) -> Tensor:
    """16 random bits (as int64) for the rounding of parameters: the upper half of a hash of dither_bits.

    It is the finaliser of a 32-bit hash (two rounds of shift, xor and multiply with Wellons's constants, "lowbias32")
    with a key of (step, stream, seed) put in between: a counter-based stream, at a tenth of Philox's cost, whose bits
    and correlations `tests/test_optimizer_update.py` measures. The index counts modulo 2^32.
    """
    return _mix(dither_bits(index, step, stream, seed), random_key(step, stream, seed)) >> 16


def truncate_to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """bfloat16 of float32 x rounded up with the probability of its fraction; bits: 16 random bits as int64."""
    raw = (x.contiguous().view(torch.int32).to(torch.int64) & _MASK) + bits
    high = (raw >> 16) & 0xFFFF
    rounded = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(x), rounded, x.to(torch.bfloat16))


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (bfloat16 rounded to nearest, half up; int16 `low`) with bits(master) = (bits(high) << 16) + low."""
    raw = master.contiguous().view(torch.int32).to(torch.int64) & _MASK
    high = ((raw + 0x8000) >> 16) & 0xFFFF
    low = raw - (high << 16)
    low = torch.where(low > 0x7FFF, low - 0x100000000, low)  # high wrapped to 0 from the last of the NaNs
    signed = torch.where(high >= 0x8000, high - 0x10000, high)
    return signed.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that split_master took apart."""
    raw = ((high.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF) << 16) + low.to(torch.int64)
    raw = raw & _MASK
    return torch.where(raw >= 0x80000000, raw - 0x100000000, raw).to(torch.int32).view(torch.float32)


def as_rows(x: Tensor) -> Tensor:
    """The matrix whose rows are cut into blocks: dimension 0 by the rest, so that a shard of dimension 0 cuts none."""
    return x.reshape(x.shape[0], x.shape[1:].numel()) if x.dim() > 1 else x.reshape(1, x.numel())


def scale_shape(shape: torch.Size, block_size: int) -> list[int]:
    """The shape of the scales of a tensor of this shape: [dimension 0, blocks of its flattened rest]."""
    rest = shape[1:].numel()
    return [shape[0], (rest + block_size - 1) // block_size]


def _per_element(scale: Tensor, columns: int, block_size: int) -> Tensor:
    return scale.repeat_interleave(block_size, dim=1)[:, :columns]


def _block_max(rows: Tensor, block_size: int) -> Tensor:
    pad = -rows.shape[1] % block_size
    return torch.nn.functional.pad(rows, (0, pad)).unflatten(1, (-1, block_size)).amax(2)


def decode(codes: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """int8 (first moments) or uint8 (second moments) -> float32 of the codes' shape.

    int8: sign(c) (c / 127)^2 scale with scale the block's absmax. uint8: (c / 255 scale)^2 with scale the square root
    of the block's maximum: a second moment is only ever used through its root.
    """
    rows = as_rows(codes).float()
    if codes.dtype == torch.int8:
        step = ieee_div(scale, torch.full_like(scale, float(SIGNED_MAX**2)))
        return (rows * rows.abs() * _per_element(step, rows.shape[1], block_size)).reshape(codes.shape)
    step = ieee_div(scale, torch.full_like(scale, float(UNSIGNED_MAX)))
    root = rows * _per_element(step, rows.shape[1], block_size)
    return (root * root).reshape(codes.shape)


def encode(value: Tensor, like: Tensor, bits: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """float32 -> (codes in the dtype of `like`, scale), the inverse of `decode`; bits: dither_bits of the elements.

    Codes are floor(exact code + dither): unbiased over steps, where rounding to nearest would freeze a moment that
    moves by less than half a code a step, as every second moment with beta2 = 0.999 does. A positive second moment
    never gets code 0, which would make its update infinite. A block that holds NaN or infinity gets that as its scale.
    """
    signed = like.dtype == torch.int8
    rows = as_rows(value)
    root = rows.abs() if signed else ieee_sqrt(rows)
    scale = _block_max(root, block_size)
    top = float(SIGNED_MAX**2 if signed else UNSIGNED_MAX)
    usable = torch.isfinite(scale) & (scale >= TINY)
    inverse = torch.where(usable, ieee_div(torch.full_like(scale, top), scale), torch.zeros_like(scale))
    scale = torch.where(scale < TINY, torch.zeros_like(scale), scale)
    each = _per_element(inverse, rows.shape[1], block_size)
    exact = torch.where(each == 0, torch.zeros_like(root), root * each)
    if signed:
        exact = ieee_sqrt(exact)
    dither = (as_rows(bits) >> 8).float() * 2.0**-24
    codes = (exact + dither).floor().clamp(max=float(SIGNED_MAX if signed else UNSIGNED_MAX))
    if signed:
        codes = torch.where(rows < 0, -codes, codes)
    else:
        codes = torch.where(exact > 0, codes.clamp(min=1.0), codes)
    return codes.to(like.dtype).reshape(value.shape), scale
