"""int8_grouped_linear: eight experts, quantisation counted. Shape is T x N x K: x [T, K], weights [8, N, K].

The experts' rows are unequal, as a router makes them: an eighth of them gets two fifths, another none. Bytes: x and the
output in float32, the int8 weights of the experts that have rows and their scales, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ... import functional
from .. import peers
from ..case import Absent, Cell, Context, Entry, Provider

OP = "int8_grouped_linear"
EXPERTS = 8
SHARES = (16, 0, 2, 5, 1, 8, 4, 4)  # of 40


def counts_of(rows: int) -> list[int]:
    """Rows of each expert; what the shares leave over goes to the first ones that have any."""
    found = [rows * share // sum(SHARES) for share in SHARES]
    for expert in [e for e, share in enumerate(SHARES) if share][: rows - sum(found)]:
        found[expert] += 1
    return found


def work(t: int, n: int, k: int) -> tuple[int, int]:
    """Operations and bytes of one call."""
    used = sum(count > 0 for count in counts_of(t))
    return 2 * t * n * k, 4 * t * k + used * (n * k + 4 * n) + 4 * t * n


def cells(quick: bool, cuda: bool) -> list[Cell]:
    shapes = [(16, 256, 256)] if quick else [(t, 2048, 2048) for t in (8, 64, 512, 4096)]
    if cuda and not quick:
        shapes += [(t, 14336, 4096) for t in (16, 256, 8192)]
    return [
        Cell(
            OP,
            f"{t}x{n}x{k}",
            *work(t, n, k),
            "read",
            build,
            caches=("cold",),
            weight_bytes=EXPERTS * n * k,
            seconds=0.4 if quick or cuda else 5.0,
        )
        for t, n, k in shapes
    ]


def build(cell: Cell, context: Context) -> Iterator[Entry]:
    t, n, k = cell.dims
    rows = counts_of(t)
    x, counts = context.randn(t, k), torch.tensor(rows, device=context.device)
    weights = [context.randn(EXPERTS, n, k).mul_(k**-0.5) for _ in range(context.copies)]
    first = min(16, rows[0])
    context.truth = x[:first].double() @ weights[0][0].double().t()

    def each(call: Callable[[torch.Tensor, int, int], torch.Tensor], inputs: torch.Tensor, dtype: str) -> Provider:
        """call(rows of an expert, copy, expert) for each that has rows: what the host knows of the counts is free."""
        used = [expert for expert, count in enumerate(rows) if count]

        def run(i: int) -> torch.Tensor:
            parts = inputs.split(rows)
            return torch.cat([call(parts[expert], i % len(weights), expert) for expert in used])

        return Provider(run, dtype)

    def ours() -> Provider:
        held = [functional.quantize_rowwise(w) for w in weights]
        return Provider(lambda i: functional.int8_grouped_linear(x, held[i % len(held)], counts), "float32")

    def ours_each() -> Provider:
        held = [[functional.quantize_rowwise(expert) for expert in w] for w in weights]
        return each(lambda part, i, expert: functional.int8_linear(part, held[i][expert]), x, "float32")

    def int_mm() -> Provider:
        if x.is_cuda and min(count for count in rows if count) <= 16:
            raise Absent("torch._int_mm on CUDA accepts only more than 16 rows")
        pairs = [[peers.quantize_plain(expert) for expert in w] for w in weights]
        held = [[(q.t() if x.is_cuda else q.t().contiguous(), s[:, 0]) for q, s in w] for w in pairs]
        return each(lambda part, i, expert: peers.int_mm_linear(part, *held[i][expert]), x, "float32")

    def floating(dtype: torch.dtype) -> Provider:
        held = [w.to(dtype) for w in weights]
        call = torch.nn.functional.linear
        return each(lambda part, i, expert: call(part, held[i][expert]), x.to(dtype), str(dtype).removeprefix("torch."))

    def grouped_mm() -> Provider:
        if not hasattr(torch, "_grouped_mm"):
            raise Absent("this torch has no _grouped_mm")
        inputs, held = x.bfloat16(), [w.bfloat16().transpose(1, 2) for w in weights]
        ends = counts.cumsum(0).int()
        return Provider(lambda i: torch._grouped_mm(inputs, held[i % len(held)], offs=ends), "bfloat16")

    yield "pykernels", ours
    yield "pykernels int8_linear each", ours_each
    yield "torch._int_mm each", int_mm
    yield "torch float32 each", lambda: floating(torch.float32)
    yield "torch bfloat16 each", lambda: floating(torch.bfloat16)
    yield "torch._grouped_mm", grouped_mm
