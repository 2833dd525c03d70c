"""One launch for many tensors: a table of addresses and sizes on the device, and how a program finds its tensor in it.

The table is int64 [fields, n] with field 0 the first program of each tensor, then whatever numbers the kernels share.
Tensors that vector loads can serve come first: each of the two groups is one launch.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl

Entry = tuple[int, ...]
KEPT = 64  # tables; a training step needs a few, and gradients allocated anew each step come back at few addresses
ARENA = 1 << 17  # int64, 1 MiB of pinned memory


class Group(NamedTuple):
    """The tensors of one launch: columns first to first + count of the table."""

    aligned: bool
    first: int
    count: int
    programs: int


class Table(NamedTuple):
    """data [fields * n + numbers] on the device; `order` lists the tensors as the columns have them."""

    data: torch.Tensor
    n: int
    groups: list[Group]
    order: list[int]


def build(
    device: torch.device, entries: list[Entry], programs: list[int], aligned: list[bool], numbers: Entry = ()
) -> Table:
    """entries: the fields of each tensor after field 0; programs: how many each tensor takes."""
    order = sorted(range(len(entries)), key=lambda i: not aligned[i])
    split = sum(aligned)
    firsts, groups = [], []
    for begin, end in ((0, split), (split, len(order))):
        total = 0
        for i in order[begin:end]:
            firsts.append(total)
            total += programs[i]
        if total:
            groups.append(Group(begin == 0 and split > 0, begin, end - begin, total))
    values = tuple(firsts)
    for field in zip(*(entries[i] for i in order), strict=True):
        values += field
    return Table(_upload(values + numbers, device), len(order), groups, order)


_tables: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()
_arenas: dict[torch.device, torch.Tensor] = {}
_captured: list[torch.Tensor] = []  # what the copies of captured graphs read at every replay


def _upload(values: Entry, device: torch.device) -> torch.Tensor:
    """`values` on the device without waiting for it; the same values as lately cost no copy.

    A captured graph copies its table from pinned memory that is never given back: the pointers are the graph's own.
    That memory is set aside by calls outside capture, since pinning is refused inside.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        pinned = _from_arena(device, len(values))
        pinned.copy_(torch.tensor(values, dtype=torch.int64))
        _captured.append(pinned)
        return torch.empty(len(values), dtype=torch.int64, device=device).copy_(pinned, non_blocking=True)
    key = (device, torch.cuda.current_stream(device).cuda_stream, values)
    room = _arenas.get(device)
    if room is None or room.numel() < 4 * len(values):
        _arenas[device] = torch.empty(max(ARENA, 8 * len(values)), dtype=torch.int64, pin_memory=True)
    found = _tables.pop(key, None)
    if found is None:
        # PyTorch's allocator keeps the pinned copy until the transfer is over.
        found = torch.tensor(values, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
    _tables[key] = found  # the last to be given up
    while len(_tables) > KEPT:
        _tables.popitem(last=False)
    return found


def _from_arena(device: torch.device, count: int) -> torch.Tensor:
    room = _arenas.get(device)
    if room is None or room.numel() < count:
        raise RuntimeError(
            f"a captured graph needs {8 * count} bytes of pinned memory for the addresses of its tensors, which cannot "
            "be taken during capture: make the same call once before, as PyTorch asks for every capture"
        )
    _arenas[device] = room[count:]
    return room[:count]


# Device code below.


@triton.jit
def find(table_ptr, first, count):
    """The column of this program's tensor: the last of its group whose first program is not after it."""
    program = tl.program_id(0)
    low, high = first, first + count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table as a pointer; ALIGNED promises 16 bytes."""
    p = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p
