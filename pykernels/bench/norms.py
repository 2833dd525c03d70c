"""The cells of rms_norm and layer_norm, forward and backward. Shape is M x K.

Bytes: x read and y written, then the gradient of y and x read and that of x written: five tensors of M x K, and the
float32 statistics of a row written once and read once. The parameters are small beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import peers
from .case import Cell, Context, Entry, Provider

Norm = Callable[..., Tensor]  # (x, *parameters) -> y
SHAPES = [(2048, 2048), (4096, 4096), (2048, 5632)]


def work(m: int, k: int, itemsize: int, statistics: int) -> int:
    """Bytes of one forward and backward; statistics: numbers a row."""
    return 5 * itemsize * m * k + 8 * statistics * m


def cells(op: str, statistics: int, ours: Norm, plain: Norm, parameters: int, quick: bool, cuda: bool) -> list[Cell]:
    """parameters: how many vectors of K the norm has."""
    shapes = [(256, 512)] if quick else [(16384, 4096), (8192, 8192)] if cuda else SHAPES
    return [
        Cell(
            op,
            f"{m}x{k}",
            0,
            work(m, k, dtype.itemsize, statistics),
            "copy",
            partial(build, ours=ours, plain=plain, parameters=parameters, dtype=dtype),
            variant=f"forward+backward {str(dtype).removeprefix('torch.')}",
            seconds=0.4 if quick or cuda else 4.0,
        )
        for m, k in shapes
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]
    ]


def build(
    cell: Cell, context: Context, ours: Norm, plain: Norm, parameters: int, dtype: torch.dtype
) -> Iterator[Entry]:
    m, k = cell.dims
    x, grad = context.randn(m, k, dtype=dtype), context.randn(m, k, dtype=dtype)
    held = [context.randn(k, dtype=dtype) for _ in range(parameters)]
    context.truth = plain(x[:64].double(), *(parameter.double() for parameter in held))

    def step(norm: Norm) -> Provider:
        leaf = x.detach().requires_grad_()
        leaves = [parameter.detach().requires_grad_() for parameter in held]

        def call(_index: int) -> Tensor:
            y = norm(leaf, *leaves)
            y.backward(grad)
            for tensor in (leaf, *leaves):
                tensor.grad = None
            return y.detach()

        return Provider(call, str(dtype).removeprefix("torch."), lambda: norm(leaf, *leaves), tuple(leaves))

    yield "pykernels", lambda: step(ours)
    yield "torch eager", lambda: step(plain)
    yield "torch.compile", lambda: step(peers.compiled(plain))
