"""int8_linear end to end, quantisation counted. Shape is M x N x K: x [M, K], weight [N, K].

Bytes: x and the output in float32, the int8 weight and its float32 scales, each once.
"""

from __future__ import annotations

from collections.abc import Iterator

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "int8_linear"
ROWS = (1, 16, 64, 256, 1024, 4096)
SIZES = (1024, 2048, 4096)


def work(m: int, n: int, k: int) -> tuple[int, int]:
    """Operations and bytes of one call."""
    return 2 * m * n * k, 4 * m * k + n * k + 4 * n + 4 * m * n


def cells(quick: bool, cuda: bool) -> list[Cell]:
    rows, sizes = ((1, 64), (1024,)) if quick else (ROWS, SIZES[1:] if cuda else SIZES)
    found = []
    for size in sizes:
        for m in rows:
            operations, count = work(m, size, size)
            found.append(
                Cell(
                    OP,
                    f"{m}x{size}x{size}",
                    operations,
                    count,
                    "read",
                    build,
                    caches=("cold",) if cuda else ("cold", "warm"),
                    weight_bytes=size * size,
                    seconds=0.4 if quick or cuda else 2.5,
                )
            )
    return found


def build(cell: Cell, context: Context) -> Iterator[Entry]:
    m, n, k = cell.dims
    x = context.randn(m, k)
    weights = [context.randn(n, k).mul_(k**-0.5) for _ in range(context.copies)]
    context.truth = x[:16].double() @ weights[0].double().t()

    def ours() -> Provider:
        held = [functional.quantize_rowwise(w) for w in weights]
        return Provider(lambda i: functional.int8_linear(x, held[i % len(held)]), "float32")

    yield "pykernels", ours
    yield from peers.linear(x, weights, context)
