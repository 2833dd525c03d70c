"""dropout, forward and backward, p = 0.1. Shape is M x K.

Bytes: x read and y written, the gradient of y read and that of x written; a mask need not move at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "dropout"
P = 0.1


def work(m: int, k: int, itemsize: int) -> int:
    """Bytes of a forward and its backward."""
    return 4 * itemsize * m * k


def cells(quick: bool, cuda: bool) -> list[Cell]:
    m, k = (512, 1024) if quick else (4096, 4096)
    return [
        Cell(
            OP,
            f"{m}x{k}",
            0,
            work(m, k, dtype.itemsize),
            "copy",
            partial(build, dtype=dtype),
            variant=f"forward+backward {str(dtype).removeprefix('torch.')}",
            seconds=0.4 if quick or cuda else 2.5,
        )
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]
    ]


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    m, k = cell.dims
    x = context.randn(m, k, dtype=dtype).requires_grad_()
    grad = context.randn(m, k, dtype=dtype)
    name = str(dtype).removeprefix("torch.")

    def both_ways(function: Callable[[torch.Tensor], torch.Tensor]) -> Provider:
        return Provider(
            lambda i: torch.autograd.grad(function(x), x, grad), name, forward=lambda: function(x), parameters=(x,)
        )

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, P)

    yield "pykernels", lambda: both_ways(lambda x: functional.dropout(x, P))
    yield "torch eager", lambda: both_ways(plain)
    yield "torch.compile", lambda: both_ways(peers.compiled(plain))
