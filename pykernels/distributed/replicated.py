"""ReplicatedOptimizer, ZeRO's stage 1: whole parameters on every rank, a shard of the optimizer's state on each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..optim._shard import as_dtensor, local
from . import _buckets
from ._mirror import Inner, MirrorOptimizer

BUCKET_BYTES = 32 << 20
IN_FLIGHT = 2  # buckets that are reduced, or gathered, at a time


class ReplicatedOptimizer(MirrorOptimizer):
    """Reduces gradients while backward runs, updates this rank's rows of each parameter, gathers the rows of the
    others.

    `params` as of any optimizer: plain parameters, equal on every rank, on the mesh's device. `optimizer_cls(params,
    **kwargs)` is given each parameter's local rows as a DTensor cut as FSDP2 would cut it, a view of the parameter.
    mesh: one dimension, or two: replicas by shards.

    As a bucket of gradients (bucket_bytes, in the reverse order of `params`) is complete its reduce-scatter starts, in
    reduce_dtype (None: the gradient's), and the one before the last is waited for: two whole buckets and the one that
    fills are there at a time, of the others this rank's rows. (So a backward with collectives of its own must give
    every rank gradients of the same parameters.) After backward, p.grad is a DTensor of the parameter's shape that
    keeps this rank's rows of the mean, and clip_grad_norm_ works; a parameter with no gradient on any rank has none.
    Backward adds to gradients that are there, as always. Gradients that are assigned by hand count as reduced.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_cls: Inner,
        mesh: DeviceMesh,
        *,
        bucket_bytes: int = BUCKET_BYTES,
        reduce_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        self.mesh, self._bucket_bytes, self._reduce_dtype = mesh, bucket_bytes, reduce_dtype
        self._placements: tuple[Placement, ...] = (*[Replicate()] * (mesh.ndim - 1), Shard(0))
        self._group = mesh.get_group(mesh.ndim - 1)
        self._replicas = mesh.get_group(0) if mesh.ndim == 2 else None
        self._where: dict[torch.Tensor, tuple[int, int]] = {}
        self._buckets: list[_buckets.Bucket] = []
        self._kept: dict[torch.Tensor, torch.Tensor] = {}  # reduced gradients that this backward adds to
        self._unreduced: set[torch.Tensor] = set()
        self._sync = True
        self._forget_round()
        super().__init__(params, optimizer_cls, kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer."""
        super().add_param_group(param_group)
        new = [p for p in self.param_groups[-1]["params"] if p.requires_grad]
        for tensors in _buckets.split(new[::-1], self._bucket_bytes):
            bucket = _buckets.Bucket(tensors, self._group)
            for i, p in enumerate(bucket.tensors):
                self._where[p] = len(self._buckets), i
                # The first runs before autograd adds to p.grad, the second after it.
                p.register_hook(lambda _, p=p: self._before(p))
                p.register_post_accumulate_grad_hook(self._after)
            self._buckets.append(bucket)

    def _mirror_of(self, p: torch.Tensor) -> torch.Tensor:
        bucket = _buckets.Bucket([p], self._group)
        rows = bucket.rows(0, p.detach())
        return nn.Parameter(as_dtensor(rows, self.mesh, self._placements, p.shape), requires_grad=p.requires_grad)

    def _forget_round(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}
        self._arrived: dict[int, set[int]] = {}
        self._works: list[tuple[torch.Tensor, Any]] = []  # of the first buckets, in their order
        self._in_round = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer; also forgets what a backward that raised an error left."""
        self._forget_round()
        self._kept.clear()
        self._unreduced.clear()
        super().zero_grad(set_to_none)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward inside adds up this rank's gradients and sends nothing; the next one outside reduces the sum."""
        self._sync, before = False, self._sync
        try:
            yield
        finally:
            self._sync = before

    def _before(self, p: torch.Tensor) -> None:
        if not isinstance(p.grad, DTensor):
            return
        if not self._sync:
            raise RuntimeError(
                "ReplicatedOptimizer.no_sync: a gradient is reduced already: call step() or zero_grad() first, and "
                "leave the context for the last backward, not the first"
            )
        self._kept[p], p.grad = p.grad, None

    def _after(self, p: torch.Tensor) -> None:
        if not self._sync:
            self._unreduced.add(p)
            return
        assert p.grad is not None
        if not self._in_round:
            self._in_round = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_round)
        self._unreduced.discard(p)
        b, i = self._where[p]
        with torch.no_grad():
            self._put(b, i, p.grad)
        p.grad = None
        while len(self._works) < len(self._buckets) and self._is_complete(len(self._works)):
            self._launch(len(self._works))

    def _is_complete(self, b: int) -> bool:
        return len(self._arrived.get(b, ())) == len(self._buckets[b].tensors)

    def _put(self, b: int, i: int, grad: torch.Tensor | None) -> None:
        """One gradient into its bucket; behind each rank's part stands a flag for each tensor: it had a gradient."""
        bucket = self._buckets[b]
        if b not in self._buffers:
            dtype = self._reduce_dtype or bucket.tensors[0].dtype
            shape = bucket.world, bucket.part + len(bucket.tensors)
            self._buffers[b] = bucket.tensors[0].new_empty(shape, dtype=dtype)
            self._arrived[b] = set()
        buffer, piece = self._buffers[b], bucket.pieces[i]
        buffer[:, bucket.part + i] = 0.0 if grad is None else 1.0
        if grad is None:
            buffer[:, piece.offset : piece.offset + piece.size].zero_()
        else:
            bucket.pack(i, grad, buffer)
            self._arrived[b].add(i)

    def _launch(self, b: int) -> None:
        if (done := b - IN_FLIGHT) >= 0:
            part, work = self._works[done]
            work.wait()
            self._works[done] = part, None  # gloo's work keeps a copy of the buffer
            self._buffers.pop(done)
            del work
        self._works.append(self._buckets[b].reduce_scatter(self._buffers[b]))

    @torch.no_grad()
    def _finish_round(self) -> None:
        """At the end of backward. Every rank reduces every bucket, in one order, whatever gradients it had."""
        for b in range(len(self._works), len(self._buckets)):
            for i in range(len(self._buckets[b].tensors)):
                if i not in self._arrived.get(b, ()):
                    self._put(b, i, None)
            self._launch(b)
        arrived, works = self._arrived, self._works
        for b, (bucket, (part, work)) in enumerate(zip(self._buckets, works, strict=True)):
            if work is not None:
                work.wait()
            works[b] = part, None
            self._buffers.pop(b, None)
            if self._replicas is not None:
                dist.all_reduce(part, group=self._replicas)
            # Only a rank that missed a gradient asks whether another had it: that is a host synchronisation.
            flags = part[bucket.part :].tolist() if len(arrived[b]) < len(bucket.tensors) else None
            part.div_(self.mesh.size())
            for i, p in enumerate(bucket.tensors):
                if flags is None or flags[i] > 0:
                    self._give(p, bucket.shard(i, part))
        self._forget_round()
        for p, grad in self._kept.items():
            p.grad = grad
        self._kept.clear()

    def _give(self, p: torch.Tensor, rows: torch.Tensor) -> None:
        rows = rows.to(p.dtype)
        if (kept := self._kept.pop(p, None)) is not None:
            rows = local(kept).add_(rows)
        p.grad = as_dtensor(rows, self.mesh, self._placements, p.shape)
        mirror = self._mirrors[p]
        # As FSDP2 does: those who hooked the shard hear of it.
        for hook in (getattr(mirror, "_post_accumulate_grad_hooks", None) or {}).values():
            mirror.grad = p.grad
            hook(mirror)

    def _update(self) -> None:
        for p, mirror in self._pairs():
            grad = p.grad
            if grad is not None and not isinstance(grad, DTensor):
                if p in self._unreduced:
                    raise RuntimeError(
                        "ReplicatedOptimizer.step: gradients of no_sync() are not reduced: run the last backward "
                        "before step() outside of it"
                    )
                rows = _buckets.Bucket([p], self._group).rows(0, grad)
                grad = as_dtensor(rows, self.mesh, self._placements, p.shape)
            mirror.grad = grad
        try:
            self.inner.step()
        finally:
            for _, mirror in self._pairs():
                mirror.grad = None
        self._gather()

    def _gather(self) -> None:
        """Every rank's new rows into every parameter, the next bucket on its way while one is unpacked."""
        under_way: list[tuple[_buckets.Bucket, tuple[torch.Tensor, Any]]] = []
        for bucket in [*self._buckets, None]:
            if bucket is not None:
                under_way.append((bucket, bucket.all_gather(bucket.tensors)))
            if len(under_way) > (bucket is not None):
                done, (buffer, work) = under_way.pop(0)
                work.wait()
                for i, p in enumerate(done.tensors):
                    # .data: an optimizer inside must not take these for changes from outside its own rows.
                    done.unpack(i, buffer, p.data)
                del buffer, work
