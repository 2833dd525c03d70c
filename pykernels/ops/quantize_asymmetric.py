"""quantize_asymmetric: int8 with a zero point for each row, for activations that are not centred."""

import torch

from .. import _library
from ._checks import check_float_input
from ._numerics import FLT_MIN, ieee_div

NAME = "quantize_asymmetric"


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_float_input(NAME, "x", x)
    xf = x.float()
    zero = torch.zeros_like(xf[..., :1].sum(-1, keepdim=True))
    if x.shape[-1] == 0:
        low = high = zero
    else:
        low, high = xf.amin(-1, keepdim=True).clamp(max=0), xf.amax(-1, keepdim=True).clamp(min=0)
    full = torch.full_like(low, 255.0)
    bad = ~(torch.isfinite(low) & torch.isfinite(high) & torch.isfinite(high - low))
    tiny = (high - low) < 255.0 * FLT_MIN
    scale = torch.where(bad, torch.full_like(low, float("nan")), torch.where(tiny, zero, ieee_div(high - low, full)))
    dead = bad | tiny
    inverse = torch.where(dead, zero, ieee_div(torch.ones_like(low), scale))
    zero_point = torch.where(dead, zero, (-128.0 - low * inverse).round().clamp(-128, 127))
    scaled = torch.where(dead, zero, xf * inverse)
    q = torch.where(dead, zero, (scaled.round() + zero_point).clamp(-128, 127)).to(torch.int8)
    return q.contiguous(), scale.squeeze(-1).contiguous(), zero_point.squeeze(-1).to(torch.int32).contiguous()


def fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_float_input(NAME, "x", x)
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


_library.define(f"{NAME}(Tensor x) -> (Tensor, Tensor, Tensor)", reference, fake)
