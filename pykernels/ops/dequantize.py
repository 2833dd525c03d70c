"""dequantize: (q - zero_point) * scale for every block layout; rowwise and colwise are blocks of one row or column."""

from collections.abc import Sequence

import torch

from .. import _library
from ._checks import FLOATS, check, check_device, check_dtype, names
from .quantize_blockwise import expand_blocks, grid_shape

NAME = "dequantize"
SCHEMA = (
    f"{NAME}(Tensor q, Tensor scale, int[] block_size, Tensor? zero_point=None, ScalarType out_dtype=float) -> Tensor"
)


def check_arguments(
    q: torch.Tensor,
    scale: torch.Tensor,
    block_size: Sequence[int],
    zero_point: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """scale and zero_point have one element for each block of q."""
    check_dtype(NAME, "q", q, torch.int8)
    check_dtype(NAME, "scale", scale, torch.float32)
    check_device(NAME, "scale", scale, "q", q)
    grid = grid_shape(NAME, "q", q.shape, block_size)
    check(
        list(scale.shape) == grid,
        NAME,
        f"expected scale to have shape {grid}, one element for each block, got {list(scale.shape)}",
    )
    if zero_point is not None:
        check_dtype(NAME, "zero_point", zero_point, torch.int32)
        check_device(NAME, "zero_point", zero_point, "q", q)
        check(
            zero_point.shape == scale.shape,
            NAME,
            f"expected zero_point to have the shape of scale, {grid}, got {list(zero_point.shape)}",
        )
    check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)}, got {out_dtype}")


def reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    block_size: Sequence[int],
    zero_point: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    check_arguments(q, scale, block_size, zero_point, out_dtype)
    centred = q.to(torch.int32)
    if zero_point is not None:
        centred = centred - expand_blocks(zero_point, q.shape, block_size)
    return (centred.float() * expand_blocks(scale, q.shape, block_size)).to(out_dtype).contiguous()


def fake(
    q: torch.Tensor,
    scale: torch.Tensor,
    block_size: Sequence[int],
    zero_point: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    check_arguments(q, scale, block_size, zero_point, out_dtype)
    return q.new_empty(q.shape, dtype=out_dtype)


_library.define(SCHEMA, reference, fake)
