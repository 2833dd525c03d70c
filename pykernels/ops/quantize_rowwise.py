"""quantize_rowwise: symmetric int8 with one scale for each row."""

import torch

from .. import _library
from ._checks import check, check_device, check_dtype, check_float_input
from ._numerics import absmax, absmax_scale, given_scale, to_codes, uniform

NAME = "quantize_rowwise"
SCHEMA = f"{NAME}(Tensor x, bool stochastic=False, int seed=0, Tensor? scale=None) -> (Tensor, Tensor)"


def check_arguments(x: torch.Tensor, scale: torch.Tensor | None) -> None:
    """x float with a last dimension; scale float32, one element or one for each row."""
    check_float_input(NAME, "x", x)
    if scale is None:
        return
    check_dtype(NAME, "scale", scale, torch.float32)
    check_device(NAME, "scale", scale, "x", x)
    rows = x.shape[:-1].numel()
    check(
        scale.numel() == 1 or (scale.numel() == rows and scale.dim() <= x.dim()),
        NAME,
        f"expected scale to have 1 element or one for each of the {rows} rows of x, got shape {list(scale.shape)}",
    )


def reference(
    x: torch.Tensor, stochastic: bool = False, seed: int = 0, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(x, scale)
    if scale is None:
        row_scale, inverse = absmax_scale(absmax(x, -1))
    else:
        if scale.device.type == "cpu":
            check(bool(torch.isfinite(scale).all()), NAME, "expected scale to be finite, got NaN or infinity")
        rows = x.shape[:-1]
        given = scale.reshape(-1).expand(rows.numel()) if scale.numel() == 1 else scale.reshape(-1)
        row_scale, inverse = given_scale(given.reshape(rows).unsqueeze(-1), torch.isfinite(x).all(-1, keepdim=True))
    noise = uniform(seed, x.shape, x.device) if stochastic else None
    return to_codes(x, inverse, noise).contiguous(), row_scale.squeeze(-1).contiguous()


def fake(
    x: torch.Tensor, stochastic: bool = False, seed: int = 0, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(x, scale)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


_library.define(SCHEMA, reference, fake)
