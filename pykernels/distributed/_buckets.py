"""Buckets: many tensors in one buffer for one collective, each cut along dimension 0 as FSDP2 and DTensor cut it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# The names since torch 2.13, and before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Piece:
    """One tensor's place: rows [start, start + rows) are this rank's, `chunk` rows every rank's but the last ones'."""

    offset: int  # of this tensor in each rank's part of the buffer, in elements
    chunk: int
    start: int
    rows: int
    width: int  # elements in a row

    @property
    def size(self) -> int:
        return self.chunk * self.width


class Bucket:
    """Tensors of one dtype and device, at least 1-dimensional, cut over the ranks of a group."""

    def __init__(self, tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
        self.tensors, self.group = tensors, group
        self.world, self.rank = group.size(), group.rank()
        self.pieces: list[Piece] = []
        offset = 0
        for tensor in tensors:
            rows, width = tensor.shape[0], tensor.shape[1:].numel()
            chunk = -(-rows // self.world)
            start = min(rows, chunk * self.rank)
            self.pieces.append(Piece(offset, chunk, start, min(chunk, rows - start), width))
            offset += chunk * width
        self.part = offset

    def pack(self, i: int, whole: torch.Tensor, buffer: torch.Tensor) -> None:
        """Tensor i into [world, part], the parts that no row falls into as zeros."""
        piece = self.pieces[i]
        target = buffer[:, piece.offset : piece.offset + piece.size]
        flat = whole.reshape(-1)
        full = flat.numel() // piece.size if piece.size else 0
        target[:full].copy_(flat[: full * piece.size].view(full, piece.size))
        if full < self.world:
            rest = flat[full * piece.size :]
            target[full, : rest.numel()].copy_(rest)
            target[full, rest.numel() :].zero_()
            target[full + 1 :].zero_()

    def unpack(self, i: int, buffer: torch.Tensor, whole: torch.Tensor) -> None:
        """The inverse of pack, except this rank's own rows, which `whole` has."""
        piece = self.pieces[i]
        flat = whole.view(-1)
        for rank in range(self.world):
            begin = rank * piece.size
            count = min(piece.size, flat.numel() - begin)
            if rank != self.rank and count > 0:
                flat[begin : begin + count].copy_(buffer[rank, piece.offset : piece.offset + count])

    def shard(self, i: int, part: torch.Tensor) -> torch.Tensor:
        """Tensor i's rows of this rank, as a view of [part]."""
        piece = self.pieces[i]
        rows = part[piece.offset : piece.offset + piece.rows * piece.width]
        return rows.view(piece.rows, *self.tensors[i].shape[1:])

    def rows(self, i: int, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a whole tensor, as a view of it."""
        return whole.narrow(0, self.pieces[i].start, self.pieces[i].rows)

    def reduce_scatter(self, buffer: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """[world, n] -> the sum of every rank's row for this rank [n], once the work has been waited for."""
        result = buffer.new_empty(buffer.shape[1])
        return result, _reduce_scatter(result, buffer.view(-1), op=dist.ReduceOp.SUM, group=self.group, async_op=True)

    def all_gather(self, wholes: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """[world, part] of every rank's rows, once the work has been waited for."""
        mine = wholes[0].new_zeros(self.part)
        for i, whole in enumerate(wholes):
            self.shard(i, mine).copy_(self.rows(i, whole))
        result = mine.new_empty(self.world, self.part)
        return result, _all_gather(result.view(-1), mine, group=self.group, async_op=True)


def split(tensors: list[torch.Tensor], max_bytes: int) -> list[list[torch.Tensor]]:
    """Buckets of at most max_bytes (or one tensor), in the order of `tensors`, each of one dtype and device."""
    open_: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    buckets = []
    for tensor in tensors:
        key = (tensor.dtype, tensor.device)
        size = tensor.numel() * tensor.element_size()
        if open_.get(key) and sizes[key] + size > max_bytes:
            buckets.append(open_.pop(key))
        if key not in open_:
            open_[key], sizes[key] = [], 0
        open_[key].append(tensor)
        sizes[key] += size
    return [*buckets, *open_.values()]
