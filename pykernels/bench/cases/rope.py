"""rope of query and key, forward and backward. Shape is S x H x D; q and k, of H / 4 heads, are slices of a packed qkv.

Bytes: q and k read and written once each way; the tables are small and stay in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ... import functional
from .. import peers
from ..case import Cell, Context, Entry, Provider

OP = "rope"
GROUP = 4  # query heads that share a key head


def work(seq: int, heads: int, dim: int, itemsize: int) -> int:
    """Bytes of a forward and its backward."""
    return 4 * itemsize * seq * (heads + heads // GROUP) * dim


def cells(quick: bool, cuda: bool) -> list[Cell]:
    shape = (512, 8, 64) if quick else (4096, 32, 128)
    return [
        Cell(
            OP,
            "x".join(map(str, shape)),
            0,
            work(*shape, dtype.itemsize),
            "copy",
            partial(build, dtype=dtype),
            variant=f"forward+backward {str(dtype).removeprefix('torch.')}",
            seconds=0.4 if quick or cuda else 2.5,
        )
        for dtype in (torch.float32, torch.bfloat16)[: 1 if quick else 2]
    ]


def plain(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As Llama is written in plain PyTorch."""

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turn(q), turn(k)


def build(cell: Cell, context: Context, dtype: torch.dtype) -> Iterator[Entry]:
    seq, heads, dim = cell.dims
    kv_heads = heads // GROUP
    qkv = context.randn(1, seq, heads + 2 * kv_heads, dim, dtype=dtype)
    q = qkv[:, :, :heads].requires_grad_()
    k = qkv[:, :, heads : heads + kv_heads].requires_grad_()
    grads = [context.randn(*x.shape, dtype=dtype) for x in (q, k)]
    cos, sin = functional.rope_tables(dim, seq, device=context.device)
    wide = [torch.cat((table, table), -1)[:, None].to(dtype) for table in (cos, sin)]
    name = str(dtype).removeprefix("torch.")

    def both_ways(forward: Callable[[], tuple[torch.Tensor, torch.Tensor]], held: list[torch.Tensor]) -> Provider:
        return Provider(
            lambda i: torch.autograd.grad(forward(), (q, k), grads), name, forward=forward, parameters=tuple(held)
        )

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        turned_q, turned_k = functional.rope(q, k, cos, sin)
        assert turned_k is not None
        return turned_q, turned_k

    def compiled() -> Provider:
        function = peers.compiled(plain)
        return both_ways(lambda: function(q, k, *wide), wide)

    yield "pykernels", lambda: both_ways(ours, [cos, sin])
    yield "torch eager", lambda: both_ways(lambda: plain(q, k, *wide), wide)
    yield "torch.compile", compiled
