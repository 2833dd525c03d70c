"""linear_kl_div, forward and backward: temperature 2, the teacher's logits from its hidden states. Shape is M x V x H.

Operations: both logits and the two gradients, a product of M x V x H each. Bytes: both inputs, both weights and the two
gradients, each once. The eager and compiled peers hold the logits of both models whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "linear_kl_div"
TEMPERATURE = 2.0


def work(m: int, v: int, h: int, itemsize: int) -> tuple[int, int]:
    """Operations and bytes of one forward and backward."""
    return 8 * m * v * h, itemsize * 3 * (m * h + v * h)


def cells(quick: bool, cuda: bool) -> list[Cell]:
    # A CPU without bfloat16 products takes minutes for the peers' at the size of the float32 cell.
    shapes = {torch.float32: (512, 32000, 1024), torch.bfloat16: (64, 32000, 256)}
    if cuda:
        shapes = dict.fromkeys(shapes, (8192, 128256, 4096))
    if quick:
        shapes = {torch.float32: (128, 4096, 256)}
    return [
        Cell(
            OP,
            f"{m}x{v}x{h}",
            *work(m, v, h, dtype.itemsize),
            "read",
            partial(build, dtype=dtype),
            caches=("cold",) if cuda else ("warm",),
            variant=f"forward+backward {str(dtype).removeprefix('torch.')}",
            seconds=0.4 if quick or cuda else 5.0,
            rounds=3 if quick or cuda else 5,
        )
        for dtype, (m, v, h) in shapes.items()
    ]


def plain(x: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, teacher_weight: torch.Tensor) -> torch.Tensor:
    """The formula in plain PyTorch, its softmax in float32."""
    student_log = (torch_functional.linear(x, weight).float() / TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        teacher_log = (torch_functional.linear(teacher, teacher_weight).float() / TEMPERATURE).log_softmax(-1)
    loss = torch_functional.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    return loss * TEMPERATURE**2


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    m, v, h = cell.dims
    inputs = [context.randn(m, h, dtype=dtype) for _ in range(2)]
    weights = [context.randn(v, h).mul_(h**-0.5).to(dtype) for _ in range(2)]
    name = str(dtype).removeprefix("torch.")

    def step(function: Callable[..., torch.Tensor]) -> Provider:
        x, weight = inputs[0].clone().requires_grad_(), torch.nn.Parameter(weights[0].clone())

        def forward() -> torch.Tensor:
            return function(x, weight, inputs[1], weights[1])

        def call(_index: int) -> torch.Tensor:
            loss = forward()
            loss.backward()
            x.grad = weight.grad = None
            return loss.detach()

        return Provider(call, name, forward, (weight, weights[1]))

    for strategy in ("forward", "recompute"):
        ours = partial(functional.linear_kl_div, temperature=TEMPERATURE, strategy=strategy)
        yield "pykernels" if strategy == "forward" else "pykernels recompute", partial(step, ours)
    yield "torch eager", partial(step, plain)
    yield "torch.compile of the formula", lambda: step(peers.compiled(plain))
