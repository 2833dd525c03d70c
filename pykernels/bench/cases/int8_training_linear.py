"""int8_training_linear, forward and backward: three products. Shape is M x N x K, all in bfloat16 but where named.

Bytes: x, weight and the gradient of the output read; the output and both gradients written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ... import functional
from .. import peers
from ..case import Absent, Cell, Context, Entry, Provider

OP = "int8_training_linear"


def work(m: int, n: int, k: int, itemsize: int = 2) -> tuple[int, int]:
    """Operations and bytes of one forward and backward."""
    return 6 * m * n * k, itemsize * 2 * (m * k + n * k + m * n)


def cells(quick: bool, cuda: bool) -> list[Cell]:
    shapes = [(256, 512, 512)] if quick else [(4096, 4096, 4096)] if cuda else [(512, 1024, 1024), (2048, 2048, 2048)]
    return [
        Cell(
            OP,
            f"{m}x{n}x{k}",
            work(m, n, k)[0],
            work(m, n, k)[1],
            "read",
            build,
            caches=("cold",) if cuda else ("warm",),
            variant="forward+backward",
            seconds=0.4 if quick or cuda else 4.0,
        )
        for m, n, k in shapes
    ]


def build(cell: Cell, context: Context) -> Iterator[Entry]:
    m, n, k = cell.dims
    x, weight = context.randn(m, k, dtype=torch.bfloat16), context.randn(n, k).mul_(k**-0.5)
    grad = context.randn(m, n, dtype=torch.bfloat16)
    context.truth = x[:16].double() @ weight.double().t()

    def step(layer: nn.Module, dtype: torch.dtype) -> Provider:
        inputs, grads = x.to(dtype).requires_grad_(), grad.to(dtype)

        def call(_index: int) -> torch.Tensor:
            output = layer(inputs)
            output.backward(grads)
            inputs.grad = None
            layer.zero_grad(set_to_none=True)
            return output.detach()

        return Provider(call, str(dtype).removeprefix("torch."), lambda: layer(inputs), tuple(layer.parameters()))

    def torchao() -> Provider:
        api = peers.require("torchao.quantization")
        training = peers.require("torchao.prototype.quantized_training")
        model = plain(torch.bfloat16)
        api.quantize_(model, training.Int8MixedPrecisionTrainingConfig(module_swap=True))
        if type(model[0]) is nn.Linear:
            raise Absent("torchao left the layer an nn.Linear: nothing would run in INT8")
        torch._dynamo.reset()
        model.compile(dynamic=False)
        return step(model, torch.bfloat16)

    def plain(dtype: torch.dtype) -> nn.Sequential:
        return peers.sequential(weight.to(dtype, copy=True)).requires_grad_()

    yield "pykernels", lambda: step(_Ours(weight), torch.bfloat16)
    yield "torch float32", lambda: step(plain(torch.float32), torch.float32)
    yield "torch bfloat16", lambda: step(plain(torch.bfloat16), torch.bfloat16)
    yield "torchao compiled", torchao


class _Ours(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.to(torch.bfloat16, copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.int8_training_linear(x, self.weight)
