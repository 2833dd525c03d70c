"""The cells of swiglu and geglu, forward and backward. Shape is M x I, that of the result.

Bytes: gate and up read and the result written, then the gradient, gate and up read and the two gradients written:
eight tensors of M x I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import peers
from .case import Cell, Context, Entry, Provider

Gated = Callable[[Tensor, Tensor], Tensor]
SHAPES = [(2048, 2048), (4096, 4096), (2048, 5632)]


def work(m: int, i: int, itemsize: int) -> int:
    """Bytes of one forward and backward."""
    return 8 * itemsize * m * i


def cells(op: str, ours: Gated, plain: Gated, quick: bool, cuda: bool) -> list[Cell]:
    shapes = [(256, 512)] if quick else [(16384, 4096), (8192, 14336)] if cuda else SHAPES
    return [
        Cell(
            op,
            f"{m}x{i}",
            0,
            work(m, i, dtype.itemsize),
            "copy",
            partial(build, ours=ours, plain=plain, dtype=dtype),
            variant=f"forward+backward {str(dtype).removeprefix('torch.')}",
            seconds=0.4 if quick or cuda else 4.0,
        )
        for m, i in shapes
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]
    ]


def build(cell: Cell, context: Context, ours: Gated, plain: Gated, dtype: torch.dtype) -> Iterator[Entry]:
    m, i = cell.dims
    gate, up, grad = (context.randn(m, i, dtype=dtype) for _ in range(3))
    context.truth = plain(gate[:64].double(), up[:64].double())

    def step(function: Gated) -> Provider:
        leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]

        def call(_index: int) -> Tensor:
            out = function(*leaves)
            out.backward(grad)
            for tensor in leaves:
                tensor.grad = None
            return out.detach()

        return Provider(call, str(dtype).removeprefix("torch."), lambda: function(*leaves))

    yield "pykernels", lambda: step(ours)
    yield "torch eager", lambda: step(plain)
    yield "torch.compile", lambda: step(peers.compiled(plain))
