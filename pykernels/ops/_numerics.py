"""The arithmetic that the references share: absmax scales, rounding, Philox. docs/numerics.md says it in words."""

import torch

FLT_MIN = 1.17549435e-38
_MASK = 0xFFFFFFFF


def ieee_div(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float32 division, correctly rounded: a Python scalar on either side would become a product with a reciprocal."""
    return torch.div(a.float(), b.float())


def ieee_sqrt(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded float32 roots (float64 stays): PyTorch's own on the CPU are an ulp off one time in five."""
    return x.sqrt() if x.dtype == torch.float64 else x.double().sqrt().float()


def absmax_scale(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, inverse) of float32 absmax values: absmax / 127 and 127 / absmax.

    Where the scale would be subnormal (zero rows too) both are 0; where absmax is not finite the scale is NaN.
    """
    full = torch.full_like(absmax, 127.0)
    bad = ~torch.isfinite(absmax)
    tiny = absmax < 127.0 * FLT_MIN
    zero = torch.zeros_like(absmax)
    scale = torch.where(bad, torch.full_like(absmax, float("nan")), torch.where(tiny, zero, ieee_div(absmax, full)))
    inverse = torch.where(bad | tiny, zero, ieee_div(full, absmax))
    return scale, inverse


def given_scale(scale: torch.Tensor, finite: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, inverse) for a static scale; rows that are not finite get NaN, a scale too small to invert codes 0."""
    zero = torch.zeros_like(scale)
    inverse = torch.where(finite & (scale.abs() >= FLT_MIN), ieee_div(torch.ones_like(scale), scale), zero)
    return torch.where(finite, scale, torch.full_like(scale, float("nan"))), inverse


def absmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """max |x| in float32 along dim, kept; NaN if any element is; 0 for an empty dimension."""
    if x.shape[dim] == 0:
        return x.float().sum(dim, keepdim=True)
    return x.float().abs().amax(dim, keepdim=True)


def to_codes(x: torch.Tensor, inverse: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """clamp(round(x * inverse)) as int8; round to nearest even, or floor(. + u) with u uniform in [0, 1)."""
    scaled = torch.where(inverse == 0, torch.zeros((), device=x.device), x.float() * inverse)
    rounded = scaled.round() if uniform is None else (scaled + uniform).floor()
    return rounded.clamp(-127, 127).to(torch.int8)


def _mul_hi_lo(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = x * factor  # wraps in int64, which leaves the low 64 bits right
    return (product >> 32) & _MASK, product & _MASK


def philox(seed: int, counters: torch.Tensor, stream: int = 0, step: int = 0) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al., 2011): int64 counters [n] -> four uint32 words each, as int64 [n, 4]."""
    c0, c1 = counters & _MASK, (counters >> 32) & _MASK
    c2, c3 = torch.full_like(counters, stream), torch.full_like(counters, step)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(seed: int, shape: torch.Size, device: torch.device, stream: int = 0) -> torch.Tensor:
    """float32 in [0, 1), element i from word i % 4 of counter i // 4: a function of the seed and the index alone."""
    count = shape.numel()
    counters = torch.arange((count + 3) // 4, device=device, dtype=torch.int64)
    words = philox(seed, counters, stream).reshape(-1)[:count]
    return ((words >> 8).float() * 2.0**-24).reshape(shape)
