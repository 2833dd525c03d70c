"""squared_norms and scale_tensors_: many tensors in one launch for each dtype, sums in float64 and in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tensor_table as tables
from ._common import narrow
from ._optimizer_launch import TYPES, on_device
from ._tensor_table import Group, Table, find, pointer

TILE = 2048
TILES = 4
SUMMED = 256  # partial sums added at a time
INDEX, SIZE, ADDRESS = (tl.constexpr(i) for i in range(1, 4))


@triton.jit(do_not_specialize=["n", "first_tensor", "tensors"])
def _sum_squares(
    table_ptr,
    partial_ptr,
    n,
    first_tensor,
    tensors,
    TYPE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    i = find(table_ptr, first_tensor, tensors)
    size = tl.load(table_ptr + SIZE * n + i)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    x_ptr = pointer(tl.load(table_ptr + ADDRESS * n + i), TYPE, ALIGNED)
    first = (tl.program_id(0) - tl.load(table_ptr + i)) * (TILES * TILE)
    total = tl.zeros((TILE,), tl.float64)
    for at in range(first, tl.minimum(first + TILES * TILE, size), TILE):
        offset = at + tl.arange(0, TILE)
        x = tl.load(x_ptr + offset, mask=offset < size, other=0.0).to(tl.float64)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["n", "first_tensor", "tensors", "programs"])
def _add_up(
    table_ptr, partial_ptr, out_ptr, n, first_tensor, tensors, programs, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """out [.., WIDTH] at each tensor's place: the sums of its programs' partial sums, one tensor a program."""
    i = tl.program_id(0)
    begin = tl.load(table_ptr + first_tensor + i)
    last = i + 1 == tensors
    end = tl.where(last, programs, tl.load(table_ptr + first_tensor + i + 1, mask=i + 1 < tensors, other=0))
    index = tl.load(table_ptr + INDEX * n + first_tensor + i)
    for w in tl.static_range(WIDTH):
        total = tl.zeros((BLOCK,), tl.float64)
        for at in range(begin, end, BLOCK):
            lanes = at + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + lanes * WIDTH + w, mask=lanes < end, other=0.0)
        tl.store(out_ptr + index * WIDTH + w, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["n", "first_tensor", "tensors"])
def _scale(
    table_ptr,
    factor_ptr,
    n,
    first_tensor,
    tensors,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    i = find(table_ptr, first_tensor, tensors)
    size = tl.load(table_ptr + SIZE * n + i)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    x_ptr = pointer(tl.load(table_ptr + ADDRESS * n + i), TYPE, ALIGNED)
    first = (tl.program_id(0) - tl.load(table_ptr + i)) * (TILES * TILE)
    for at in range(first, tl.minimum(first + TILES * TILE, size), TILE):
        offset = at + tl.arange(0, TILE)
        x = tl.load(x_ptr + offset, mask=offset < size, other=0.0).to(WIDE)
        tl.store(x_ptr + offset, narrow(x * factor.to(WIDE), TYPE), mask=offset < size)


def add_up(partial: torch.Tensor, out: torch.Tensor, table: Table, group: Group) -> None:
    """The partial sums [programs, WIDTH] of one launch into out [n, WIDTH], both float64."""
    _add_up[(group.count,)](
        table.data, partial, out, table.n, group.first, group.count, group.programs, WIDTH=partial.shape[1],
        BLOCK=SUMMED, num_warps=4,
    )  # fmt: skip


def _by_dtype(tensors: list[torch.Tensor]) -> dict[torch.dtype, Table]:
    """One table for each dtype, whose first field is the place in `tensors`."""
    found = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [(i, t.numel(), t.data_ptr()) for i, t in enumerate(tensors) if t.dtype == dtype]
        programs = [-(-size // (TILE * TILES)) for _, size, _ in chosen]
        aligned = [size % 16 == 0 and address % 16 == 0 for _, size, address in chosen]
        found[dtype] = tables.build(tensors[0].device, chosen, programs, aligned)
    return found


def squared_norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[n] float64 on the tensors' device."""
    device = tensors[0].device
    out = torch.zeros(len(tensors), 1, dtype=torch.float64, device=device)
    with torch.cuda.device_of(tensors[0]):
        for dtype, table in _by_dtype(tensors).items():
            for group in table.groups:
                partial = torch.empty(group.programs, 1, dtype=torch.float64, device=device)
                _sum_squares[(group.programs,)](
                    table.data, partial, table.n, group.first, group.count,
                    TYPE=TYPES[dtype], TILE=TILE, TILES=TILES, ALIGNED=group.aligned, num_warps=4,
                )  # fmt: skip
                add_up(partial, out, table, group)
    return out.reshape(-1)


def scale_tensors_(tensors: list[torch.Tensor], factor: torch.Tensor) -> None:
    """In place; where factor is 1, which the kernel finds out, nothing is read or written."""
    with torch.cuda.device_of(tensors[0]):
        factor = on_device(factor, tensors[0].device)
        for dtype, table in _by_dtype(tensors).items():
            wide = tl.float64 if dtype == torch.float64 else tl.float32
            for group in table.groups:
                _scale[(group.programs,)](
                    table.data, factor, table.n, group.first, group.count,
                    TYPE=TYPES[dtype], WIDE=wide, TILE=TILE, TILES=TILES, ALIGNED=group.aligned, num_warps=4,
                )  # fmt: skip
