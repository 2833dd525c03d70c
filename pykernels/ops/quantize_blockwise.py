"""quantize_blockwise: one scale for each block along the last dimension, or for each tile of a matrix."""

from collections.abc import Sequence

import torch

from .. import _library
from ._checks import check, check_dim, check_float_input
from ._numerics import absmax_scale, to_codes

NAME = "quantize_blockwise"


def grid_shape(op: str, name: str, shape: Sequence[int], block_size: Sequence[int]) -> list[int]:
    """The shape of the scales: the last block of a dimension may be ragged."""
    check(
        len(block_size) in (1, 2) and all(size > 0 for size in block_size),
        op,
        f"expected block_size to be one or two positive sizes, got {list(block_size)}",
    )
    if len(block_size) == 2:
        check(len(shape) == 2, op, f"expected {name} to have 2 dimensions for 2-D blocks, got {len(shape)}")
        return [-(-size // block) for size, block in zip(shape, block_size, strict=True)]
    check(len(shape) >= 1, op, f"expected {name} to have at least 1 dimension, got 0")
    return [*shape[:-1], -(-shape[-1] // block_size[0])]


def expand_blocks(scale: torch.Tensor, shape: Sequence[int], block_size: Sequence[int]) -> torch.Tensor:
    """Repeats block values to the elements of a tensor of the given shape."""
    if len(block_size) == 2:
        scale = scale.repeat_interleave(block_size[0], dim=0)[: shape[0]]
    return scale.repeat_interleave(block_size[-1], dim=-1)[..., : shape[-1]]


def reference(x: torch.Tensor, block_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    check_float_input(NAME, "x", x)
    grid = grid_shape(NAME, "x", x.shape, block_size)
    if len(block_size) == 2:
        check_dim(NAME, "x", x, 2)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=torch.int8), x.new_zeros(grid, dtype=torch.float32)
    rows, bk = x.shape[:-1].numel(), block_size[-1]
    bm = block_size[0] if len(block_size) == 2 else 1
    padded = torch.nn.functional.pad(x.float().reshape(rows, -1), (0, -x.shape[-1] % bk, 0, -rows % bm))
    tiles = padded.reshape(padded.shape[0] // bm, bm, padded.shape[1] // bk, bk)
    scale, inverse = absmax_scale(tiles.abs().amax((1, 3)))
    spread = expand_blocks(inverse.reshape(grid), x.shape, block_size)
    return to_codes(x, spread).contiguous(), scale.reshape(grid).contiguous()


def fake(x: torch.Tensor, block_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    check_float_input(NAME, "x", x)
    grid = grid_shape(NAME, "x", x.shape, block_size)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(grid, dtype=torch.float32)


_library.define(f"{NAME}(Tensor x, int[] block_size) -> (Tensor, Tensor)", reference, fake)
