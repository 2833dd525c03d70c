"""cross_entropy, forward and backward, of float32 and bfloat16 logits. Shape is rows x classes.

Bytes: the logits read in the forward pass and again in backward, their gradient written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "cross_entropy"


def work(m: int, v: int, itemsize: int) -> int:
    """Bytes of one forward and backward."""
    return 3 * itemsize * m * v


def cells(quick: bool, cuda: bool) -> list[Cell]:
    m, v = (64, 1000) if quick else (4096, 32000)
    return [
        Cell(
            OP,
            f"{m}x{v}",
            0,
            work(m, v, dtype.itemsize),
            "copy",
            partial(build, dtype=dtype),
            variant="forward+backward " + str(dtype).removeprefix("torch."),
            seconds=0.4 if quick or cuda else 3.0,
        )
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]
    ]


def plain(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch_functional.cross_entropy(logits.float(), target)


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    m, v = cell.dims
    logits = context.randn(m, v, dtype=dtype).requires_grad_()
    target = torch.randint(v, (m,), device=context.device, generator=context.generator)
    name = str(dtype).removeprefix("torch.")

    def step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Provider:
        def call(_index: int) -> torch.Tensor:
            return torch.autograd.grad(loss(logits, target), logits)[0]

        return Provider(call, name, lambda: loss(logits, target), (logits, target))

    yield "pykernels", lambda: step(functional.cross_entropy)
    yield "torch eager", lambda: step(plain)
    yield "torch.compile", lambda: step(peers.compiled(plain))
