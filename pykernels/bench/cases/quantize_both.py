"""quantize_both: row codes and the transposed column codes from one call. Shape is M x K.

Bytes: x read once (no implementation that finds a column's maximum before it writes reads a large x once: 100 percent
is out of reach unless x stays in a cache), two int8 copies and both float32 scale vectors written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "quantize_both"


def work(m: int, k: int, itemsize: int) -> int:
    """Bytes of one call."""
    return itemsize * m * k + 2 * m * k + 4 * (m + k)


def cells(quick: bool, cuda: bool) -> list[Cell]:
    m, k = (1024, 1024) if quick else (16384, 4096) if cuda else (4096, 4096)
    return [
        Cell(
            OP,
            f"{m}x{k}",
            0,
            work(m, k, dtype.itemsize),
            "copy",
            partial(build, dtype=dtype),
            variant=str(dtype).removeprefix("torch."),
            seconds=0.4 if quick or cuda else 2.5,
        )
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]
    ]


def plain(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes, scale = peers.quantize_plain(x)
    column_codes, column_scale = peers.quantize_plain(x.t())
    return codes, scale, column_codes.contiguous(), column_scale


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    m, k = cell.dims
    inputs = [context.randn(m, k, dtype=dtype) for _ in range(2)]
    name = str(dtype).removeprefix("torch.")

    def compiled() -> Provider:
        function = peers.compiled(plain)
        return Provider(lambda i: function(inputs[i % 2]), name)

    yield "pykernels", lambda: Provider(lambda i: functional.quantize_both(inputs[i % 2]), name)
    yield "torch eager", lambda: Provider(lambda i: plain(inputs[i % 2]), name)
    yield "torch.compile of the formula", compiled
