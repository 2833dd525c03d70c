"""What the optimizer tests share: parameters, gradients, and a run of many steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 2.0**-23
# A vector, a matrix whose rows end inside a 256 block, one of many rows, a 4-D weight, a scalar and an empty tensor.
SHAPES = ((300,), (7, 517), (129, 33), (8, 3, 5, 5), (), (0, 4))


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Leaf tensors with the same values each time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gradients(step: int, params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of one step, of sizes from 1e-3 to 1e3 between tensors, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(1000 + step)
    sizes = [10.0 ** (3 - i % 7) for i in range(len(params))]
    return [
        (torch.randn(p.shape, generator=generator) * size).to(p.dtype) for p, size in zip(params, sizes, strict=True)
    ]


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> list[Tensor]:
    """The parameters after some steps."""
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(step, params), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach().clone() for p in params]


def run(cls: Callable[..., Any], dtype: torch.dtype, steps: int, **kwargs: Any) -> list[Tensor]:
    """A fresh optimizer of a class over fresh parameters."""
    params = parameters(dtype)
    return train(cls(params, **copy.deepcopy(kwargs)), params, steps)


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether all tensors are the same, bit for bit."""
    return len(a) == len(b) and all(torch.equal(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and states, to see that nothing changed."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [v for p in params for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in [*params, *states]]


class Regression:
    """A small problem that every optimizer solves: a two-layer network fits a smooth function of its inputs."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(256, 24, generator=generator)
        self.y = torch.sin(self.x @ torch.randn(24, 4, generator=generator) * 0.5)
        torch.manual_seed(4)
        self.model = torch.nn.Sequential(torch.nn.Linear(24, 96), torch.nn.GELU(), torch.nn.Linear(96, 4)).to(dtype)
        self.dtype = dtype

    def loss(self) -> Tensor:
        """The mean squared error over all examples, computed from the parameters in float32."""
        params = {name: p.float() for name, p in self.model.named_parameters()}
        out = torch.func.functional_call(self.model, params, (self.x,))
        return (out - self.y).square().mean()

    def train(self, optimizer: Any, steps: int) -> float:
        """The loss after some steps."""
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()
        return self.loss().item()
