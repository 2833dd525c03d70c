"""The linear layers of Llama-3 8B and 70B in bfloat16, quantisation counted and not. Shape is M x N x K.

Bytes: x and the output in bfloat16, the int8 weight and its float32 scales, each once. "pykernels" quantises,
multiplies and scales; "pykernels product" starts from codes, as after a norm that quantises.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ... import _library, functional
from .. import peers
from ..case import Absent, Cell, Context, Entry, Provider

OP = "int8_llama"
ROWS = (1, 8, 16, 64, 128, 256, 1024, 4096, 8192)
# (N, K): q, k and v in one; attention's output; gate and up in one; down.
LAYERS_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
LAYERS_70B = ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))


def work(m: int, n: int, k: int) -> tuple[int, int]:
    """Operations and bytes of one call."""
    return 2 * m * n * k, 2 * m * k + n * k + 4 * n + 2 * m * n


def cells(quick: bool, cuda: bool) -> list[Cell]:
    # A CPU would take hours over all of it, and int8_linear has what a CPU is measured at.
    layers, rows = (LAYERS_8B + LAYERS_70B, ROWS) if cuda and not quick else (LAYERS_8B[1:2], (1, 16))
    shapes = [(m, n, k) for n, k in layers for m in rows]
    return [
        Cell(
            OP,
            f"{m}x{n}x{k}",
            *work(m, n, k),
            "read",
            build,
            caches=("cold",),
            weight_bytes=n * k,
            seconds=0.3,
        )
        for m, n, k in shapes
    ]


def build(cell: Cell, context: Context) -> Iterator[Entry]:
    m, n, k = cell.dims
    x = context.randn(m, k, dtype=torch.bfloat16)
    weights = [context.randn(n, k, dtype=torch.bfloat16).mul_(k**-0.5) for _ in range(context.copies)]
    context.truth = x[:16].double() @ weights[0].double().t()

    def codes() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [functional.quantize_rowwise(w) for w in weights]

    def ours() -> Provider:
        held = codes()
        return Provider(lambda i: functional.int8_linear(x, held[i % len(held)]), "bfloat16")

    def product() -> Provider:
        held = codes()
        q, scale = functional.quantize_rowwise(x)
        return Provider(
            lambda i: functional.int8_matmul(
                q, held[i % len(held)][0], scale, held[i % len(held)][1], out_dtype=torch.bfloat16
            ),
            "bfloat16",
            note="quantisation not counted",
        )

    def triton() -> Provider:
        usable, why = _library.triton_available()
        if not usable or not x.is_cuda:
            raise Absent(why if not usable else "x is not on a GPU")
        held, launcher = codes(), _library.triton_launcher("int8_linear")
        return Provider(lambda i: launcher(x, *held[i % len(held)]), "bfloat16")

    yield "pykernels", ours
    yield "pykernels product", product
    yield "pykernels triton", triton
    yield from peers.linear(x, weights, context)
