"""One scale for each column: quantize_colwise, quantize_both (rows too, in one pass) and quantize_transposed.

INT8 training wants each operand contiguous along the dimension that its product sums over.
"""

import torch

from .. import _library
from ._checks import check_dim, check_float_input
from ._numerics import absmax, absmax_scale, to_codes, uniform

COLWISE = "quantize_colwise"
BOTH = "quantize_both"
TRANSPOSED = "quantize_transposed"


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
    scale, inverse = absmax_scale(absmax(x, 1))
    q = to_codes(x, inverse, uniform(seed, x.shape, x.device) if stochastic else None)
    return q.contiguous(), scale.squeeze(1).contiguous(), *transposed(x, stochastic, seed)


def transposed(x: torch.Tensor, stochastic: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(TRANSPOSED, x)
    scale, inverse = absmax_scale(absmax(x, 0))
    # The generator's second stream: the roundings of the two copies that quantize_both makes are independent.
    noise = uniform(seed, x.shape, x.device, 1) if stochastic else None
    return to_codes(x, inverse, noise).t().contiguous(), scale.squeeze(0).contiguous()


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


def fake_transposed(x: torch.Tensor, stochastic: bool = False, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(TRANSPOSED, x)
    return x.new_empty(x.shape[::-1], dtype=torch.int8), x.new_empty(x.shape[1:], dtype=torch.float32)


_library.define(f"{COLWISE}(Tensor x, bool stochastic=False, int seed=0) -> (Tensor, Tensor)", colwise, fake_colwise)
_library.define(
    f"{BOTH}(Tensor x, bool stochastic=False, int seed=0) -> (Tensor, Tensor, Tensor, Tensor)", both, fake_both
)
_library.define(
    f"{TRANSPOSED}(Tensor x, bool stochastic=False, int seed=0) -> (Tensor, Tensor)",
    transposed,
    fake_transposed,
    triton=BOTH,
)
