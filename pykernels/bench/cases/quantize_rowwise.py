"""quantize_rowwise of float32 and bfloat16. Shape is M x K.

Bytes: x read once, codes and float32 scales written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "quantize_rowwise"


def work(m: int, k: int, itemsize: int) -> int:
    """Bytes of one call."""
    return itemsize * m * k + m * k + 4 * m


def cells(quick: bool, cuda: bool) -> list[Cell]:
    shapes = [(1024, 1024)] if quick else [(4096, 4096), (16384, 1024)]
    if cuda and not quick:
        shapes = [(16384, 4096), (65536, 4096)]
    found = []
    for m, k in shapes:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]:
            found.append(
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
            )
    return found


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    m, k = cell.dims
    inputs = [context.randn(m, k, dtype=dtype) for _ in range(2)]
    name = str(dtype).removeprefix("torch.")

    def compiled() -> Provider:
        function = peers.compiled(peers.quantize_plain)
        return Provider(lambda i: function(inputs[i % 2]), name)

    yield "pykernels", lambda: Provider(lambda i: functional.quantize_rowwise(inputs[i % 2]), name)
    yield "torch eager", lambda: Provider(lambda i: peers.quantize_plain(inputs[i % 2]), name)
    yield "torch.compile of the formula", compiled
