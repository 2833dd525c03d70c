"""Which tensors an optimizer hands to the operator: made once, checked each step at the price of a few list walks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..ops import _optimizer_reference as rules
from . import _shard
from ._layout import Order, in_order, layout
from ._state import COMPENSATION, MASTER_LOW, SCALE, STEP, Group, as_words, quantised, rounding_of

_ops = torch.ops.pykernels
_is_contiguous = Tensor.is_contiguous
Numbers = tuple[float, float, float, float]


class Bucket:
    """The parameters that one call of the operator updates: they share group, device, dtypes and kind of state."""

    def __init__(
        self, algorithm: int, flags: int, group: Group, slots: list[str], param: Tensor, grad_dtype: torch.dtype
    ) -> None:
        self.algorithm, self.flags, self.group, self.slots = algorithm, flags, group, slots
        self.dtype, self.device, self.grad_dtype = param.dtype, param.device, grad_dtype
        self.quantised = quantised(group, param.shape, param.dtype)
        self.rounding = rounding_of(group, param.dtype)
        self.sharded = _shard.sharding(param)
        self.is_dtensor = _shard.is_dtensor(param)
        self.owners: list[Tensor] = []  # what the user holds
        self.locals: list[Tensor] = []  # its part on this rank
        self.params: list[Tensor] = []  # that part as the operator takes it
        self.orders: list[Order | None] = []
        self.copied: set[int] = set()
        self.specs: list[Any] = []
        self.steps: list[Tensor] = []
        self.extras: list[Tensor] = []
        self.place: list[int] = []
        self._kept: list[list[Tensor]] = [[] for _ in slots]
        self._scales: list[list[Tensor]] = [[] for _ in slots]
        self._lr, self._lr_value = torch.zeros((), dtype=torch.float64), 0.0

    def add(self, param: Tensor, state: dict[str, Tensor], stream: int) -> None:
        """Takes a parameter in, with its state laid out as `_layout.arrange` leaves it."""
        part = _shard.local(param)
        order, copied = layout(self.group, param)
        leading, start, row_stride = _shard.place(param) or (1, 0, 0)
        if copied:
            self.copied.add(len(self.params))

        def view(tensor: Tensor) -> Tensor:
            tensor = _shard.local(tensor.detach())
            if leading > 1 and tensor.is_contiguous():
                return tensor.view(tensor.shape[:leading].numel(), -1) if tensor.numel() else tensor.flatten(1)
            return tensor if order is None else tensor.permute(order)

        if order is not None:
            row_stride = part.permute(order).shape[1:].numel()
        self.owners.append(param)
        self.locals.append(part)
        self.orders.append(order)
        self.specs.append(getattr(param, "_spec", None))
        self.params.append(part if order is None and leading <= 1 else view(param))
        self.steps.append(state[STEP])
        for name, kept, scales in zip(self.slots, self._kept, self._scales, strict=True):
            kept.append(view(state[name]))
            if self.quantised:
                scales.append(_shard.local(state[name + SCALE]))
        self.extras += [view(state[COMPENSATION])] if COMPENSATION in state else []
        self.extras += [view(as_words(_shard.local(state[MASTER_LOW])))] if MASTER_LOW in state else []
        self.place += [stream, start, max(1, row_stride)]

    def close(self) -> None:
        """Called when every parameter is in."""
        self.states = list(chain.from_iterable(self._kept))
        self.scales = list(chain.from_iterable(self._scales))
        self.direct = not self.copied and all(map(is_, self.params, self.locals))
        if not (self.rounding == rules.STOCHASTIC or self.quantised or self.group["state_bits"] == 16):
            self.place = []
        self._strides = [p.stride() for p in self.locals]
        self._dtypes = [self.dtype] * len(self.params)
        self._grad_dtypes = [self.grad_dtype] * len(self.params)

    def gather(self) -> list[Tensor] | None:
        """The gradients as the operator takes them; None where the bucket no longer fits the parameters."""
        grads: list[Any] = [p.grad for p in self.owners]
        parts = self.locals
        if self.is_dtensor:
            if not all(map(is_, [p._local_tensor for p in self.owners], parts)):  # type: ignore[attr-defined]
                return None
            grads = self._local_gradients(grads)
        if [g.dtype for g in grads] != self._grad_dtypes or [p.dtype for p in parts] != self._dtypes:
            return None
        if any(g.is_sparse for g in grads):
            return None
        if self.direct:
            if not all(map(_is_contiguous, parts)):
                return None
            return grads if all(map(_is_contiguous, grads)) else [g.contiguous() for g in grads]
        if [p.stride() for p in parts] != self._strides:
            return None
        for part, view in zip(parts, self.params, strict=True):
            if part is not view and part.data_ptr() != view.data_ptr():
                return None
        return [in_order(g, order).view(p.shape) for g, order, p in zip(grads, self.orders, self.params, strict=True)]

    def _local_gradients(self, grads: list[Any]) -> list[Any]:
        parts = [g._local_tensor for g in grads]
        for i, g in enumerate(grads):
            if g._spec is not self.specs[i] or type(parts[i]) is not Tensor:
                parts[i] = _shard.local_like(g, self.owners[i])
                if g.placements == self.owners[i].placements:  # type: ignore[attr-defined]
                    self.specs[i] = g._spec
        return parts

    def lr(self) -> Tensor:
        """The group's learning rate as a tensor."""
        rate = self.group["lr"]
        if isinstance(rate, Tensor):
            rate = rate.detach()
            return rate if rate.dtype in (torch.float32, torch.float64) else rate.float()
        if self._lr_value != rate:
            self._lr_value = rate
            self._lr.fill_(rate)
        return self._lr

    def norms(self, grads: list[Tensor], numbers: Numbers, grad_scale: Tensor | None) -> Tensor:
        """[n, 2] float32: squared norms of the parameters and of the update's direction, over all ranks."""
        sums: Tensor = _ops.optimizer_norms.default(
            self.algorithm, self.flags, self._contiguous(), grads, self.states, self.scales, self.extras, self.steps,
            *numbers, self.rounding, self.group["block_size"], grad_scale,
        )  # fmt: skip
        return _shard.all_reduce(sums, self.sharded)

    def update(
        self,
        grads: list[Tensor],
        numbers: Numbers,
        ratio: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """One call of the operator."""
        params = self._contiguous()
        _ops.optimizer_update_.default(
            self.algorithm, self.flags, params, grads, self.states, self.scales, self.extras, self.steps, self.lr(),
            *numbers, self.rounding, self.group["seed"], self.place, self.group["block_size"], ratio, grad_scale,
            found_inf,
        )  # fmt: skip
        for i in self.copied:
            self.params[i].copy_(params[i])
        torch.autograd.graph.increment_version(self.owners)

    def _contiguous(self) -> list[Tensor]:
        if not self.copied:
            return self.params
        return [p.contiguous() if i in self.copied else p for i, p in enumerate(self.params)]


class Plan:
    """All buckets of an optimizer, and what must not have changed for them to be right."""

    def __init__(self, params: list[Tensor], state: dict[Tensor, dict[str, Any]], buckets: Iterable[Bucket]) -> None:
        self.params = params
        self.missing = [p.grad is None for p in params]
        self.buckets = list(buckets)
        self.on_accelerator = any(bucket.device.type != "cpu" for bucket in self.buckets)
        self._dicts = list(state.values())
        self._values = list(chain.from_iterable(map(dict.values, self._dicts)))

    def gather(self, state: dict[Tensor, dict[str, Any]]) -> list[list[Tensor]] | None:
        """The gradients of each bucket; None where parameters, gradients or state are no longer those planned for."""
        if [p.grad is None for p in self.params] != self.missing or len(state) != len(self._dicts):
            return None
        if not all(map(is_, state.values(), self._dicts)) or sum(map(len, self._dicts)) != len(self._values):
            return None
        if not all(map(is_, chain.from_iterable(map(dict.values, self._dicts)), self._values)):
            return None
        gathered = []
        for bucket in self.buckets:
            grads = bucket.gather()
            if grads is None:
                return None
            gathered.append(grads)
        return gathered
