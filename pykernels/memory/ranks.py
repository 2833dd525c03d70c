"""What one of several ranks holds and a single device does not: parameters gathered, gradients on their way; when.

Follows `distributed.zero`: ReplicatedOptimizer under stage 1, FSDP2 under stages 2 and 3 (its buffers live as in
torch's _fsdp_param_group.py), and DistributedDataParallel with gradient_as_bucket_view without a stage. On the CPU
gloo copies what it gathers and reduces once more while it does; NCCL does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from ..distributed import _buckets
from ..distributed.replicated import BUCKET_BYTES, IN_FLIGHT
from ..distributed.sharding import units_of
from .recipe import Recipe
from .tracing import Tracer

ROOT = -1  # the unit of the parameters that are in no other
Change = tuple[str, int]  # of the bytes of a kind


@dataclass
class Unit:
    """What is gathered and reduced at once. Bytes: of its parameters, padded as they are cut; of those that train."""

    full: int = 0
    trained: int = 0
    waits_for: int = 0  # gradients
    gathered: bool = False
    requested: bool = False
    grads: dict[int, int] = field(default_factory=dict)  # bytes, not yet reduced, by the parameter's place


class Ranks:
    """The events of a step on one of world_size ranks, and the bytes that each takes or gives back."""

    def __init__(self, model: nn.Module, recipe: Recipe, world_size: int, device: str) -> None:
        self.stage, self.world = recipe.stage, world_size
        self._copies = 1 if device == "cpu" else 0
        self.state_share = 0.0 if recipe.offload else 1.0 / world_size if self.stage else 1.0
        self._host = recipe.offload == "parameters"
        self._model, self._modules = model, units_of(model)
        self._parameters = list(dict.fromkeys(model.parameters()))
        self._units = {place: Unit() for place in (*range(len(self._modules)), ROOT)}
        owner = {p: place for place, module in enumerate(self._modules) for p in module.parameters()}
        self._owner = [owner.get(p, ROOT) for p in self._parameters]
        for p, place in zip(self._parameters, self._owner, strict=True):
            self._units[place].full += self._padded(p)
            if p.requires_grad:
                self._units[place].trained += self._padded(p)
                self._units[place].waits_for += 1
        self._trained = sum(unit.trained for unit in self._units.values())
        self._last_gathered: int | None = None  # whose collective's result is still there
        self._reducing: list[int] = []  # bytes of the buffers that are being reduced
        if self.stage == 1:
            trained: list[Tensor] = [p for p in reversed(self._parameters) if p.requires_grad]
            place_of: dict[Tensor, int] = {p: place for place, p in enumerate(self._parameters)}
            buckets = _buckets.split(trained, BUCKET_BYTES)
            self._bucket_of = {place_of[p]: number for number, bucket in enumerate(buckets) for p in bucket}
            self._bytes = [
                sum(map(self._padded, bucket)) + world_size * len(bucket) * bucket[0].element_size()
                for bucket in buckets
            ]
            self._missing = [len(bucket) for bucket in buckets]
            self._open: set[int] = set()
            self._launched = 0

    def _padded(self, p: Tensor) -> int:
        rows = p.shape[0] if p.dim() else 1
        return p.nbytes // max(1, rows) * -(-rows // self.world) * self.world

    def _part(self, nbytes: int) -> int:
        return nbytes // self.world

    def attach(self, tracer: Tracer) -> list[Any]:
        """Hooks that mark the events while the step is traced; what they return is to be removed."""
        handles: list[Any] = []
        for place, p in enumerate(self._parameters):
            if p.requires_grad:
                handles.append(
                    p.register_post_accumulate_grad_hook(lambda p, place=place: tracer.mark("accumulated", place))
                )
        for place, module in ((ROOT, self._model), *enumerate(self._modules)):

            def before(module: nn.Module, args: Any, place: int = place) -> None:
                tracer.mark("pre_forward", place)

            def after(module: nn.Module, args: Any, output: Any, place: int = place) -> None:
                tracer.mark("post_forward", place)
                outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
                if outputs:
                    register_multi_grad_hook(
                        outputs, lambda _, place=place: tracer.mark("pre_backward", place), mode="any"
                    )

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        return handles

    def start(self) -> Iterator[Change]:
        """Between two steps, beside what one device holds then."""
        if self.stage >= 2:
            held = sum(p.nbytes for p in self._parameters)
            kept = 0 if self._host else sum(self._part(unit.full) for unit in self._units.values())
            yield "parameters", kept - held
        elif not self.stage and self.world > 1:
            yield "gradients", self._trained  # the buckets

    def on(self, event: str, place: int, nbytes: int = 0) -> Iterator[Change]:
        """The changes at an event. place: of the unit, or of the parameter whose gradient of nbytes is accumulated."""
        if self.stage >= 2:
            yield from getattr(self, f"_{event}")(place, nbytes)
        elif event == "accumulated" and (self.stage or self.world > 1):
            if self.stage:
                yield from self._into_bucket(self._bucket_of[place])
            yield "gradients", -nbytes
            if self.stage:
                while self._launched < len(self._missing) and not self._missing[self._launched]:
                    yield from self._launch()
        elif event == "end_backward" and self.stage:
            while self._launched < len(self._missing):
                if self._launched not in self._open:
                    yield "in flight", self._bytes[self._launched]
                yield from self._launch()
            yield "in flight", -(1 + self._copies) * sum(self._bytes[-IN_FLIGHT:])
        elif event == "end_step" and self.stage:
            yield from self._gather_again()

    def _into_bucket(self, bucket: int) -> Iterator[Change]:
        if bucket not in self._open:
            self._open.add(bucket)
            yield "in flight", self._bytes[bucket]
        self._missing[bucket] -= 1

    def _launch(self) -> Iterator[Change]:
        bucket, copies = self._launched, 1 + self._copies
        if bucket >= IN_FLIGHT:
            yield "in flight", -copies * self._bytes[bucket - IN_FLIGHT]
        yield "gradients", self._part(self._bytes[bucket])
        yield "in flight", self._copies * self._bytes[bucket]
        self._launched += 1

    def _gather_again(self) -> Iterator[Change]:
        """Stage 1's updated rows: this rank's part and all of a bucket, the next on its way while one is unpacked."""
        sizes = [(1 + self._copies) * nbytes + self._part(nbytes) for nbytes in self._bytes]
        for number, nbytes in enumerate(sizes):
            yield "in flight", nbytes
            if number >= IN_FLIGHT - 1:
                yield "in flight", -sizes[number - IN_FLIGHT + 1]

    # Stages 2 and 3. A gather takes the collective's result, and the parameters that are copied out of it.

    def _pre_forward(self, place: int, _: int) -> Iterator[Change]:
        unit = self._units[place]
        if unit.gathered or not unit.full:
            return
        yield from self._collect(unit)
        if self._last_gathered is not None:
            yield "in flight", -self._units[self._last_gathered].full
        yield "in flight", unit.full
        unit.gathered, self._last_gathered = True, place

    def _post_forward(self, place: int, _: int) -> Iterator[Change]:
        if place == ROOT:
            if self._last_gathered is not None:
                yield "in flight", -self._units[self._last_gathered].full
            self._last_gathered = None
        elif self.stage == 3 and self._units[place].gathered:
            self._units[place].gathered = False
            yield "in flight", -self._units[place].full

    def _pre_backward(self, place: int, _: int) -> Iterator[Change]:
        unit = self._units[place]
        if not unit.gathered and unit.full:
            if not unit.requested:
                yield from self._collect(unit)
            yield "in flight", unit.full
            yield "in flight", -unit.full
            unit.gathered, unit.requested = True, False
        following = self._units.get(len(self._modules) - 1 if place == ROOT else place - 1)
        if place != 0 and following is not None and not (following.gathered or following.requested):
            following.requested = True
            yield from self._collect(following)

    def _collect(self, unit: Unit) -> Iterator[Change]:
        yield "in flight", (1 + self._copies) * unit.full
        yield "in flight", -self._copies * unit.full

    def _accumulated(self, place: int, nbytes: int) -> Iterator[Change]:
        number = self._owner[place]
        unit = self._units[number]
        unit.grads[place] = nbytes
        if len(unit.grads) == unit.waits_for and number != ROOT:
            yield from self._reduce(number)

    def _reduce(self, number: int) -> Iterator[Change]:
        unit = self._units[number]
        if unit.gathered:
            unit.gathered = False
            yield "in flight", -unit.full
        if self._reducing:
            yield "in flight", -self._reducing.pop()
        if not unit.grads:
            return
        self._reducing.append(unit.trained)
        yield "in flight", unit.trained
        last = unit.grads[max(unit.grads)]  # foreach_reduce's loop still holds it
        yield "gradients", last - sum(unit.grads.values())
        yield "gradients", self._part(unit.trained)
        yield "in flight", self._copies * unit.trained
        yield "in flight", -self._copies * unit.trained
        yield "gradients", -last
        if self._host:
            yield "gradients", -self._part(unit.trained)
        unit.grads.clear()

    def _end_backward(self, place: int, _: int) -> Iterator[Change]:
        for number in (ROOT, *range(len(self._modules))):
            if self._units[number].gathered or self._units[number].grads:
                yield from self._reduce(number)
        if self._reducing:
            yield "in flight", -self._reducing.pop()

    def _end_step(self, place: int, _: int) -> Iterator[Change]:
        yield from ()
