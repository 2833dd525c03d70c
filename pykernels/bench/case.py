"""What a case file says: the cells it measures, the work each must do, and who can do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .timer import Call


class Absent(Exception):
    """Raised by a provider that cannot serve a cell; its text is the reason printed and written to the CSV."""


@dataclass
class Provider:
    """One way to do the operation.

    `call(index)` does it once and returns the output; the index picks one of the copies of the weights.
    `forward`, when the cell has a backward, runs the forward alone, so that the tensors it saves beside its
    `parameters` can be counted.
    """

    call: Call
    dtype: str
    forward: Callable[[], object] | None = None
    parameters: tuple[torch.Tensor, ...] = ()
    note: str = ""


# A name, and what makes the provider (or raises Absent), so that one missing peer does not stop the others.
Entry = tuple[str, Callable[[], Provider]]


@dataclass
class Context:
    """What the providers of a cell are built from: a device, how many copies of the weights, random inputs.

    `truth`, set by the case, is what call(0) approximates: its first rows in float64, for the relative error.
    """

    device: torch.device
    copies: int
    generator: torch.Generator
    truth: torch.Tensor | None = None

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).to(dtype)

    def randint8(self, *shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device, generator=self.generator)


@dataclass
class Cell:
    """One operation at one shape.

    Args:
        op: name in pykernels.functional, or of a layer.
        shape: sizes joined by x, in the order the case's docstring gives.
        operations: multiplications and additions that must be done; 0 when bytes alone bound it.
        bytes: that must move. traffic: the ceiling they are held against, "read" or "copy".
        build: makes the providers.
        caches: "cold" (weights read from memory in each call), "warm" (as the last call left them).
        weight_bytes: of the INT8 weight, which sets how many copies a cold measurement rotates among.
        seconds: wall time to spend on each of `caches`. rounds: turns that each provider gets whatever that takes.
    """

    op: str
    shape: str
    operations: int
    bytes: int
    traffic: str
    build: Callable[[Cell, Context], Iterator[Entry]]
    caches: tuple[str, ...] = ("cold",)
    variant: str = "forward"
    weight_bytes: int = 0
    seconds: float = 2.0
    rounds: int = 3

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.shape.split("x"))

    def copies(self, cache_bytes: int) -> int:
        """Copies whose sum is twice the last-level cache: none is still there when its turn comes round again."""
        if "cold" not in self.caches or self.weight_bytes == 0:
            return 1
        return max(2, math.ceil(2 * cache_bytes / self.weight_bytes))
