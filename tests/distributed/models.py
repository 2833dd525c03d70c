"""Models to train on one rank and on many, and the training loops that both share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

MICRO = 4  # micro-batches in a step, shared out among the ranks
Make = Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor, wherever its parts lie."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, whole."""
    return {name: whole(p) for name, p in model.named_parameters()}


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, names and dtypes too."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every tensor of the optimizer's state by name, whole."""
    state = optimizer.state
    return {f"{name}.{key}": whole(v) for name, p in model.named_parameters() for key, v in state[p].items()}


class Dots(nn.Module):
    """A block whose loss is the product of its parameters with whole numbers, which are therefore the gradients: their
    sums over ranks are exact in any order. 257 rows are cut unevenly, 3 leave a rank out of 4 without any."""

    def __init__(self, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.index = index
        self.weight = nn.Parameter(torch.randn(257, 17).to(dtype))
        self.bias = nn.Parameter(torch.randn(3).to(dtype))
        self.cube = nn.Parameter(torch.randn(6, 5, 4).to(dtype))

    def forward(self, total: torch.Tensor, step: int, micro: int) -> torch.Tensor:
        for j, p in enumerate((self.weight, self.bias, self.cube)):
            numbers = torch.Generator().manual_seed(((step * MICRO + micro) * 8 + self.index) * 4 + j)
            factors = torch.randint(-8, 9, p.shape, generator=numbers).to(p.dtype)
            total = total + (p * factors).float().sum()
        return total


class Exact(nn.Module):
    """Two blocks in a list and one parameter beside them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Dots(i, dtype) for i in range(2))
        self.scale = nn.Parameter(torch.randn(7).to(dtype))

    def forward(self, step: int, micro: int) -> torch.Tensor:
        factors = torch.arange(-3, 4).to(self.scale.dtype) * (micro + 1)
        total = (self.scale * factors).float().sum()
        for block in self.blocks:
            total = block(total, step, micro)
        return total


def train_exact(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    rank: int = 0,
    world: int = 1,
    before_step: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Steps of an `Exact` model; the gradient of a step is the mean over micro-batches. Returns the losses."""
    mine = MICRO // world
    losses = []
    for step in steps:
        loss = torch.stack([model(step, rank * mine + i) for i in range(mine)]).mean()
        loss.backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Mlp(nn.Module):
    """A small network with a tied weight, so that sums are rounded as in life."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(31, 18)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(18), nn.Linear(18, 257), nn.GELU(), nn.Linear(257, 18)) for _ in range(2)
        )
        self.head = nn.Linear(18, 31)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def train_mlp(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    rank: int = 0,
    world: int = 1,
    before_step: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Next-token prediction on random tokens: 8 sequences a step, shared out. Returns the losses."""
    numbers = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(31, (8, 9), generator=numbers)[rank * 8 // world : (rank + 1) * 8 // world]
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
