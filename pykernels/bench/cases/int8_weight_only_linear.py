"""int8_weight_only_linear (W8A16), one scale per row of the weight. Shape is M x N x K.

Bytes: x and the output in bfloat16, the int8 weight and its float32 scales, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as torch_functional

from ... import functional
from .. import peers
from ..case import Absent, Cell, Context, Entry, Provider

OP = "int8_weight_only_linear"


def work(m: int, n: int, k: int) -> tuple[int, int]:
    """Operations and bytes of one call."""
    return 2 * m * n * k, 2 * m * k + n * k + 4 * n + 2 * m * n


def cells(quick: bool, cuda: bool) -> list[Cell]:
    rows, sizes = ((1,), (1024,)) if quick else ((1, 16, 64, 512), (2048, 4096))
    return [
        Cell(
            OP,
            f"{m}x{n}x{n}",
            work(m, n, n)[0],
            work(m, n, n)[1],
            "read",
            build,
            weight_bytes=n * n,
            seconds=0.4 if quick or cuda else 2.5,
        )
        for n in sizes
        for m in rows
    ]


def build(cell: Cell, context: Context) -> Iterator[Entry]:
    m, n, k = cell.dims
    x = context.randn(m, k, dtype=torch.bfloat16)
    weights = [context.randn(n, k).mul_(k**-0.5) for _ in range(context.copies)]
    context.truth = x[:16].double() @ weights[0].double().t()
    copies = len(weights)
    wide = x.float()

    def held() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(q, s[:, 0]) for q, s in map(peers.quantize_plain, weights)]

    def ours(inputs: torch.Tensor, dtype: str) -> Provider:
        pairs = [functional.quantize_rowwise(w) for w in weights]
        return Provider(lambda i: functional.int8_weight_only_linear(inputs, pairs[i % copies]), dtype)

    def plain(dtype: torch.dtype) -> Provider:
        inputs, matrices = x.to(dtype), [w.to(dtype) for w in weights]
        return Provider(
            lambda i: torch_functional.linear(inputs, matrices[i % copies]), str(dtype).removeprefix("torch.")
        )

    def formula(wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> Provider:
        pairs = held()
        function = wrap(lambda inputs, q, s: torch_functional.linear(inputs, q.to(inputs.dtype)) * s.to(inputs.dtype))
        return Provider(lambda i: function(x, *pairs[i % copies]), "bfloat16")

    def int8pack() -> Provider:
        if x.is_cuda:
            raise Absent("torch._weight_int8pack_mm: measured on the CPU only")
        pairs = [(q, s.to(torch.bfloat16)) for q, s in held()]
        return Provider(lambda i: torch._weight_int8pack_mm(x, *pairs[i % copies]), "bfloat16")

    def torchao() -> Provider:
        api = peers.require("torchao.quantization")
        layers = [peers.sequential(w.to(torch.bfloat16)) for w in weights]
        for layer in layers:
            api.quantize_(layer, api.Int8WeightOnlyConfig())
        matrices = [layer[0].weight for layer in layers]
        function = peers.compiled(lambda inputs, weight: torch_functional.linear(inputs, weight))
        return Provider(lambda i: function(x, matrices[i % copies]), "bfloat16")

    yield "pykernels", lambda: ours(x, "bfloat16")
    yield "pykernels float32", lambda: ours(wide, "float32")
    yield "torch float32", lambda: plain(torch.float32)
    yield "torch bfloat16", lambda: plain(torch.bfloat16)
    yield "torch._weight_int8pack_mm", int8pack
    yield "torch.compile of the formula", lambda: formula(peers.compiled)
    yield "torchao compiled", torchao
