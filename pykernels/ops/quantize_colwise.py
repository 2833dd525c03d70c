"""quantize_colwise and quantize_both: one scale for each column, and both orders in one pass for INT8 training."""

import torch

from .. import _library
from ._checks import check_dim, check_float_input
from ._numerics import absmax, absmax_scale, to_codes, uniform

COLWISE = "quantize_colwise"
BOTH = "quantize_both"


def check_arguments(op: str, x: torch.Tensor) -> None:
    """x is a float matrix."""
    check_float_input(op, "x", x)
    check_dim(op, "x", x, 2)


def colwise(x: torch.Tensor, stochastic: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(COLWISE, x)
    scale, inverse = absmax_scale(absmax(x, 0))
    noise = uniform(seed, x.shape, x.device) if stochastic else None
    return to_codes(x, inverse, noise).contiguous(), scale.squeeze(0).contiguous()


def both(
    x: torch.Tensor, stochastic: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_arguments(BOTH, x)
    row_scale, row_inverse = absmax_scale(absmax(x, 1))
    col_scale, col_inverse = absmax_scale(absmax(x, 0))
    # Two streams of the generator: the roundings of the two copies are independent.
    noise = [uniform(seed, x.shape, x.device, stream) if stochastic else None for stream in (0, 1)]
    q = to_codes(x, row_inverse, noise[0])
    qt = to_codes(x, col_inverse, noise[1]).t()
    return q.contiguous(), row_scale.squeeze(1).contiguous(), qt.contiguous(), col_scale.squeeze(0).contiguous()


def fake_colwise(x: torch.Tensor, stochastic: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(COLWISE, x)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[1:], dtype=torch.float32)


def fake_both(
    x: torch.Tensor, stochastic: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_arguments(BOTH, x)
    m, k = x.shape
    return (
        x.new_empty((m, k), dtype=torch.int8),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((k, m), dtype=torch.int8),
        x.new_empty((k,), dtype=torch.float32),
    )


_library.define(f"{COLWISE}(Tensor x, bool stochastic=False, int seed=0) -> (Tensor, Tensor)", colwise, fake_colwise)
_library.define(
    f"{BOTH}(Tensor x, bool stochastic=False, int seed=0) -> (Tensor, Tensor, Tensor, Tensor)", both, fake_both
)
