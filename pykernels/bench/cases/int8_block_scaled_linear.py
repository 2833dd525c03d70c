"""int8_block_scaled_linear end to end, quantisation counted. Shape is M x N x K: x [M, K], weight [N, K].

Bytes: x and the output in float32, the int8 weight and its float32 scales, each once.
"""

from __future__ import annotations

from collections.abc import Iterator

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "int8_block_scaled_linear"


def work(m: int, n: int, k: int) -> tuple[int, int]:
    """Operations and bytes of one call."""
    return 2 * m * n * k, 4 * m * k + n * k + 4 * -(-n // 128) * -(-k // 128) + 4 * m * n


def cells(quick: bool, cuda: bool) -> list[Cell]:
    shapes = [(16, 256, 256)] if quick else [(m, 4096 if cuda else 2048, 4096) for m in (1, 16, 256, 4096)]
    return [
        Cell(
            OP,
            f"{m}x{n}x{k}",
            *work(m, n, k),
            "read",
            build,
            caches=("cold",),
            weight_bytes=n * k,
            seconds=0.4 if quick or cuda else 2.5,
        )
        for m, n, k in shapes
    ]


def build(cell: Cell, context: Context) -> Iterator[Entry]:
    m, n, k = cell.dims
    x = context.randn(m, k)
    weights = [context.randn(n, k).mul_(k**-0.5) for _ in range(context.copies)]
    context.truth = x[:16].double() @ weights[0].double().t()

    def ours() -> Provider:
        held = [functional.quantize_blockwise(w, (128, 128)) for w in weights]
        return Provider(lambda i: functional.int8_block_scaled_linear(x, held[i % len(held)]), "float32")

    def rowwise() -> Provider:
        held = [functional.quantize_rowwise(w) for w in weights]
        return Provider(lambda i: functional.int8_linear(x, held[i % len(held)]), "float32")

    yield "pykernels", ours
    yield "pykernels int8_linear", rowwise
    yield from peers.linear(x, weights, context)
