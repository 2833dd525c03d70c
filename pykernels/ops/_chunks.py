"""Matrix products whose result exists one tile at a time: how they are cut, and the pieces they are made of.

On the CPU 16-bit operands are widened to float32 a tile at a time unless the CPU multiplies bfloat16 itself: the plain
bfloat16 product of a CPU that does not is 6 to 10 times slower than that of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ._planned import device_type

TILE_BYTES = 32 << 20  # of logits
# Of logits whose rows are whole. Each chunk of rows passes over the weight and its gradient: 56 MiB take a tenth less
# time than 32, and leave room below 64 for all else.
CHUNK_BYTES = 56 << 20
WIDE_BYTES = 8 << 20  # of the rows of a weight, or of an input, that are widened at a time
CACHED_COLUMNS = 1024
LEAST_ROWS = 64  # fewer rows in a product, and reading the weight costs more than multiplying


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product_dtype(x: Tensor) -> torch.dtype:
    """What products with x are computed on."""
    if device_type(x) != "cpu" or x.dtype in (torch.float32, torch.float64):
        return x.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums of products with x are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pieces(total: int, largest: int) -> list[slice]:
    """[0, total) in the fewest pieces of at most `largest`, all about as long."""
    count = -(-total // max(largest, 1))
    size = -(-total // max(count, 1))
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, max(size, 1))]


def rows_a_chunk(classes: int, dtype: torch.dtype, copies: bool) -> int:
    """Rows of logits [rows, classes] made at a time; `copies`: beside others of the weight or of its gradient."""
    return max(LEAST_ROWS, (TILE_BYTES if copies else CHUNK_BYTES) // (classes * dtype.itemsize))


class Tiles:
    """The tiles of x @ weight.T, cut along both sides, in one scratch buffer that is written over.

    x [N, K] (the rows `picked`, where given) and weight [V, K] of one dtype; bias [V] or None. The classes are the
    outer loop, so that each row of the weight is read, and widened, once.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, picked: Tensor | None) -> None:
        self.x, self.weight, self.bias, self.picked = x, weight, bias, picked
        self.dtype = product_dtype(x)
        widens = self.dtype != x.dtype
        rows, (classes, k) = x.shape[0] if picked is None else picked.shape[0], weight.shape
        fits = WIDE_BYTES // (max(k, 1) * self.dtype.itemsize) if widens else rows
        self.rows = pieces(rows, max(LEAST_ROWS, min(fits, 4096)))
        tallest = self.rows[0].stop if self.rows else 1
        columns = max(LEAST_ROWS, TILE_BYTES // (tallest * self.dtype.itemsize))
        self.columns = pieces(classes, min(columns, max(LEAST_ROWS, fits)) if widens else columns)
        self.scratch = x.new_empty(tallest * self.columns[0].stop, dtype=self.dtype)

    def weight_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(classes, their rows of the weight) from first to last."""
        for columns in self.columns:
            yield columns, self.weight[columns].to(self.dtype)

    def input_block(self, rows: slice) -> Tensor:
        block = self.x[rows] if self.picked is None else self.x.index_select(0, self.picked[rows])
        return block.to(self.dtype)

    def logits(self, block: Tensor, tile: Tensor, columns: slice) -> Tensor:
        """block @ tile.T + bias, valid until the next call."""
        shape = (block.shape[0], tile.shape[0])
        out = self.scratch[: shape[0] * shape[1]].view(shape)
        return linear(block, tile, None if self.bias is None else self.bias[columns], out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x @ weight.T + bias into out."""
    # MKL's float32 product with a tall transposed matrix is 1.4 times faster in pieces that stay in the cache.
    columns = CACHED_COLUMNS if device_type(x) == "cpu" else weight.shape[0]
    for piece in pieces(weight.shape[0], columns):
        if bias is None:
            torch.mm(x, weight[piece].t(), out=out[:, piece])
        else:
            torch.addmm(bias[piece].to(x.dtype), x, weight[piece].t(), out=out[:, piece])
    return out


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, or total = a @ b the first time, when total may hold anything."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
        return
    product = torch.mm(a, b, out_dtype=total.dtype) if a.is_cuda else torch.mm(a, b)
    total.copy_(product) if first else total.add_(product)
