"""int8_matmul, both operands int8 already, scales per row and column applied. Shape is M x N x K.

Bytes: both int8 operands, their float32 scales and the float32 output, each once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "int8_matmul"


def work(m: int, n: int, k: int) -> tuple[int, int]:
    """Operations and bytes of one call."""
    return 2 * m * n * k, m * k + n * k + 4 * (m + n) + 4 * m * n


def cells(quick: bool, cuda: bool) -> list[Cell]:
    shapes = [(512, 1024, 1024)] if quick else [(m, 4096, 4096) for m in (512, 2048, 4096)]
    if cuda and not quick:
        shapes += [(16, 4096, 4096), (64, 4096, 4096), (8192, 8192, 8192)]
    return [
        Cell(
            OP,
            f"{m}x{n}x{k}",
            work(m, n, k)[0],
            work(m, n, k)[1],
            "read",
            build,
            caches=("cold",) if cuda else ("warm",),
            weight_bytes=n * k,
            seconds=0.4 if quick or cuda else 5.0,
        )
        for m, n, k in shapes
    ]


def build(cell: Cell, context: Context) -> Iterator[Entry]:
    m, n, k = cell.dims
    a, b = context.randint8(m, k), context.randint8(n, k)
    a_scale, b_scale = context.randn(m).abs_().add_(0.1), context.randn(n).abs_().add_(0.1)
    context.truth = (a[:16].double() * a_scale[:16, None].double()) @ (b.double() * b_scale[:, None].double()).t()
    x, w = a * a_scale[:, None], b * b_scale[:, None]
    column = b.t() if x.is_cuda else b.t().contiguous()

    def scaled(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(codes, weight).float() * a_scale[:, None] * b_scale

    def compiled() -> Provider:
        function = peers.compiled(scaled)
        return Provider(lambda _i: function(a, column), "int8")

    def floating(dtype: torch.dtype) -> Provider:
        left, right = x.to(dtype), w.to(dtype)
        return Provider(lambda _i: left @ right.t(), str(dtype).removeprefix("torch."))

    yield "pykernels", lambda: Provider(lambda _i: functional.int8_matmul(a, b, a_scale, b_scale), "int8")
    yield "torch._int_mm", lambda: Provider(lambda _i: scaled(a, column), "int8")
    yield "torch._int_mm compiled", compiled
    if not x.is_cuda:
        for engine in peers.ENGINES:
            yield f"torch.ao {engine}", partial(peers.dynamic, x, [w], engine)
    yield "torch float32", lambda: floating(torch.float32)
    yield "torch bfloat16", lambda: floating(torch.bfloat16)
