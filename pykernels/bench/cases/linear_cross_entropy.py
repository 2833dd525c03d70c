"""linear_cross_entropy, forward and backward: three products at least. Shape is tokens x classes x hidden size.

Bytes: input, weight and targets read, both gradients written. Peak bytes count the gradients. On a CPU without products
of bfloat16 the bfloat16 cell has 64 tokens: PyTorch's own take a minute a call at 4096.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch.utils.checkpoint import checkpoint

from ... import functional
from ...ops._chunks import multiplies_bfloat16
from ...ops.linear_cross_entropy import default_strategy
from .. import peers
from ..case import Absent, Cell, Context, Entry, Provider

OP = "linear_cross_entropy"
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def work(m: int, v: int, k: int, itemsize: int) -> tuple[int, int]:
    """Operations and bytes of one forward and backward."""
    return 6 * m * v * k, 2 * itemsize * (m * k + v * k) + 8 * m


def cells(quick: bool, cuda: bool) -> list[Cell]:
    found = []
    for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]:
        m, v, k = (32, 500, 64) if quick else (4096, 32000, 1024)
        if dtype == torch.bfloat16 and not cuda and not multiplies_bfloat16():
            m = 64
        operations, moved = work(m, v, k, dtype.itemsize)
        found.append(
            Cell(
                OP,
                f"{m}x{v}x{k}",
                operations,
                moved,
                "copy",
                partial(build, dtype=dtype),
                variant="forward+backward " + str(dtype).removeprefix("torch."),
                seconds=0.4 if quick or cuda else 10.0,
                rounds=3 if quick or cuda else 5,
            )
        )
    return found


def plain(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch_functional.cross_entropy(torch_functional.linear(x, weight).float(), target)


def chunked(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What one writes by hand: checkpointed chunks of 256 tokens."""
    total = x.new_zeros((), dtype=torch.float32)
    for rows, targets in zip(x.split(256), target.split(256), strict=True):
        total = total + checkpoint(plain, rows, weight, targets, use_reentrant=False) * len(targets)
    return total / len(target)


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    m, v, k = cell.dims
    x = context.randn(m, k, dtype=dtype).requires_grad_()
    weight = (context.randn(v, k) * k**-0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (m,), device=context.device, generator=context.generator)
    name = str(dtype).removeprefix("torch.")

    def step(loss: Loss) -> Provider:
        def call(_index: int) -> torch.Tensor:
            return torch.autograd.grad(loss(x, weight, target), (x, weight))[0]

        return Provider(call, name, lambda: loss(x, weight, target), (x, weight, target))

    def torch_chunked() -> Provider:
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if options is None:
            raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
        return step(lambda x, w, t: torch_functional.linear_cross_entropy(x, w, t, options=options()))

    def ours(strategy: str | None) -> Provider:
        def loss(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            result = functional.linear_cross_entropy(x, weight, target, strategy=strategy)
            assert isinstance(result, torch.Tensor)
            return result

        return step(loss)

    yield "pykernels", lambda: ours(None)
    default = default_strategy(x, weight, "mean")
    slow = context.device.type == "cpu" and m * v * k > 1 << 35  # where every provider takes seconds
    if not (slow and default == "forward"):
        other = "recompute" if default == "forward" else "forward"
        yield f"pykernels {other}", lambda: ours(other)
    yield "torch eager", lambda: step(plain)
    yield "torch.compile", lambda: step(peers.compiled(plain))
    yield "torch linear_cross_entropy", torch_chunked
    if not slow:
        yield "torch checkpointed chunks", lambda: step(chunked)
