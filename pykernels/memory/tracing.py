"""A training step run on the meta device, and the memory it would take: every allocation and release, in order.

No number is computed and no weight exists. Operators made of others are opened, so that their own temporaries count;
what a kernel takes inside itself does not (oneDNN's scratch, the tiles that an attention kernel holds for each thread).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._library import OPS
from ..nn.attention import _tables
from ..ops._planned import planned_for

PHASES = ("forward", "backward", "step")
KINDS = ("parameters", "optimizer state", "gradients", "saved activations", "logits", "temporaries", "in flight")
ROUNDS_TO = {"cpu": 1, "cuda": 512}  # bytes of a block of the allocator


class Sharding(Protocol):
    """What one of several ranks holds beside the step: see pykernels.memory.ranks."""

    state_share: float

    def attach(self, tracer: Tracer) -> list[Any]: ...
    def start(self) -> Iterator[tuple[str, int]]: ...
    def on(self, event: str, place: int, nbytes: int = 0) -> Iterator[tuple[str, int]]: ...


@dataclass
class Timeline:
    """What a step takes, in bytes: the peak, its phase, the operation that reached it, what it is made of; the peak of
    each phase; and the most of each kind at any time."""

    peak: int = 0
    peak_phase: str = PHASES[0]
    peak_operation: str = ""
    at_peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    most: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    largest_temporary: int = 0


@dataclass
class _Block:
    nbytes: int
    last_dim: int
    kind: str = "temporaries"


class Tracer(TorchDispatchMode):
    """Notes when memory of meta tensors is taken and released: blocks, and events that name a block and a sign.

    opens: operators made of others are run as those, so that what they hold meanwhile is seen.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.blocks: list[_Block] = []
        self.events: list[tuple[int, int, str]] = []
        self.held = self.highest = 0  # bytes
        self.opens = True
        self._depth = 0  # of opened operators
        self._alone = _uses_alone()
        self._live: dict[int, int] = {}
        self._device, self._round = device, ROUNDS_TO[device]

    def live(self) -> set[int]:
        """The blocks that are alive."""
        return set(self._live.values())

    def block_of(self, tensor: Tensor) -> int | None:
        """The number of the block that a tensor lies in, if it is alive."""
        return self._live.get(tensor.untyped_storage()._cdata)

    def bytes_of(self, tensor: Tensor) -> int:
        """The bytes of the block that a tensor lies in."""
        number = self.block_of(tensor)
        return 0 if number is None else self.blocks[number].nbytes

    def name(self, tensor: Tensor, kind: str) -> None:
        """Says what the block of a tensor is."""
        number = self.block_of(tensor)
        if number is not None:
            self.blocks[number].kind = kind

    def mark(self, event: str, place: int) -> None:
        """Notes an event that takes no memory by itself; it is told from others by the sign 0."""
        self.events.append((place, 0, event))

    def add(self, tensor: Tensor, operation: str = "") -> None:
        """Takes a tensor in, unless its memory is known."""
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        number = len(self.blocks)
        nbytes = -(-storage.nbytes() // self._round) * self._round
        self.blocks.append(_Block(nbytes, tensor.shape[-1] if tensor.dim() else 1))
        self._live[key] = number
        self.events.append((number, 1, operation))
        self.held += nbytes
        self.highest = max(self.highest, self.held)
        weakref.finalize(storage, self._release, key, number)

    def _release(self, key: int, number: int) -> None:
        if self._live.get(key) == number:
            del self._live[key]
        self.held -= self.blocks[number].nbytes
        self.events.append((number, -1, ""))

    def _engine_adds(self, args: Sequence[Any]) -> bool:
        """Whether it is autograd that adds up two gradients, and would write the sum over the first if it were not for
        the mode: where nothing else holds that one."""
        if self._depth or torch.is_grad_enabled() or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
            return False
        first, second = args
        if first.shape != second.shape or first.dtype != second.dtype or not first.is_meta:
            return False
        return all(got <= alone for got, alone in zip(_uses(first), self._alone, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        op = OPS.get(name.removeprefix("pykernels::")) if name.startswith("pykernels::") else None
        if self.opens and op is not None and op.composite and not (op.triton and self._device == "cuda"):
            self._depth += 1
            with self:
                result = op.reference(*args, **(kwargs or {}))
            self._depth -= 1
        elif func is torch.ops.aten.add.Tensor and self._engine_adds(args):
            result = args[0].add_(args[1])
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple) else (result,):
            if isinstance(leaf, Tensor):
                self.add(leaf, name)
            elif isinstance(leaf, list):
                for inner in leaf:
                    if isinstance(inner, Tensor):
                        self.add(inner, name)
        return result


def _uses(tensor: Tensor) -> tuple[int, int]:
    """How many hold a tensor, and its memory, those included that are here for asking."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


@functools.cache
def _uses_alone() -> tuple[int, int]:
    """_uses of a gradient that autograd alone holds when it adds another to it."""
    seen: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled():
                self._note(args)
            return func(*args, **(kwargs or {}))

        def _note(self, args: Sequence[Any]) -> None:
            first, _ = args
            seen.append(_uses(first))

    x = torch.empty(3, device="meta", requires_grad=True)
    y = x * 1.0
    loss = (torch.sin(y) * torch.cos(y)).sum()
    with torch.enable_grad(), Watch():
        loss.backward()
    return seen[-1]


class FlashAttention(TorchFunctionMode):
    """scaled_dot_product_attention of meta tensors as a real device's kernel does it, which holds a tile of the scores:
    on the meta device PyTorch would choose the one that holds them all."""

    def __enter__(self) -> Any:
        # multi_head_attention_forward calls it from where no mode looks.
        self._own = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = _attention_by(self._own)
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        super().__exit__(*arguments)
        torch.nn.functional.scaled_dot_product_attention = self._own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attention_by(func) if func is self._own else func)(*args, **(kwargs or {}))


def _attention_by(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function that takes the place of PyTorch's `own`."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not query.is_meta or dropout_p:
            return own(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    return attention


def trace_step(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer | None,
    *,
    device: str = "cpu",
    vocabulary: int | None = None,
    sharding: Sharding | None = None,
) -> Timeline:
    """The memory of a step in the steady state: loss_of() is the forward, then backward, then the optimizer's step.

    model and what loss_of reads are on the meta device; the optimizer has no state yet. device: "cpu" or "cuda", whose
    choices of kernels and rounding of sizes are followed. vocabulary: results whose last dimension is so large are
    called logits. sharding: of the step over ranks, None for one device.
    """
    tracer = Tracer(device)
    for key in [key for key in _tables if key[-1] == torch.device("meta")]:
        del _tables[key]  # made anew below, where they count
    trained = [p for p in model.parameters() if p.requires_grad]
    for tensor in (*model.parameters(), *model.buffers()):
        tracer.add(tensor)
    marks: list[int] = []
    hooks = [] if sharding is None else sharding.attach(tracer)
    with planned_for(device), FlashAttention(), tracer:
        tracer.opens = False
        with torch.no_grad():
            loss_of()  # makes what is kept from one step to the next: rope's tables
        tracer.opens = True
        for number in tracer.live():
            tracer.blocks[number].kind = "parameters"
        if optimizer is not None:
            for p in trained:
                p.grad = torch.empty_like(p)
            optimizer.step()
            optimizer.zero_grad()
            for tensor in _state_tensors(optimizer):
                tracer.name(tensor, "optimizer state")
        before = tracer.live()
        tracer.events = [(number, 1, "") for number in before]
        loss = loss_of()
        marks.append(len(tracer.events))
        tracer.name(loss, "temporaries")
        for number in tracer.live() - before:
            if number != tracer.block_of(loss):
                tracer.blocks[number].kind = "saved activations"
        loss.backward()
        del loss
        marks.append(len(tracer.events))
        for p in trained:
            if p.grad is not None:
                tracer.name(p.grad, "gradients")
        if optimizer is not None:
            optimizer.step()
        marks.append(len(tracer.events))
    gradients = {place: p.grad for place, p in enumerate(model.parameters()) if p.grad is not None}
    blocks = {place: tracer.block_of(grad) for place, grad in gradients.items()}
    del gradients
    for p in trained:
        p.grad = None
    for hook in hooks:
        hook.remove()
    return _replay(tracer, len(before), marks, vocabulary, sharding, blocks)


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return [leaf for state in optimizer.state.values() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def _replay(
    tracer: Tracer,
    start: int,
    marks: list[int],
    vocabulary: int | None,
    sharding: Sharding | None,
    gradients: Mapping[int, int | None],
) -> Timeline:
    """Runs through the events again, now that it is known what each block was. gradients: the block of each one."""
    share = 1.0 if sharding is None else sharding.state_share
    sizes = []
    for block in tracer.blocks:
        if vocabulary is not None and block.last_dim == vocabulary and block.kind in KINDS[3:6]:
            block.kind = "logits"
        sizes.append(math.ceil(block.nbytes * share) if block.kind == "optimizer state" else block.nbytes)
    held, line = dict.fromkeys(KINDS, 0), Timeline()

    def note(phase: int, operation: str) -> None:
        now, name = sum(held.values()), PHASES[phase]
        line.phases[name] = max(line.phases[name], now)
        if now > line.peak:
            line.peak, line.peak_phase, line.peak_operation, line.at_peak = now, name, operation, dict(held)
        for kind, nbytes in held.items():
            line.most[kind] = max(line.most[kind], nbytes)

    def change(phase: int, changes: Iterable[tuple[str, int]], operation: str) -> None:
        for kind, nbytes in changes:
            held[kind] += nbytes
            note(phase, operation)

    def event(phase: int, name: str, place: int = 0) -> None:
        if sharding is not None:
            number = gradients.get(place) if name == "accumulated" else None
            change(phase, sharding.on(name, place, 0 if number is None else sizes[number]), name)

    phase = 0
    for index, (number, sign, operation) in enumerate(tracer.events[: marks[-1]]):
        if index == start and sharding is not None:
            for kind, nbytes in sharding.start():
                held[kind] += nbytes
        while index >= marks[phase]:
            if phase == 1:
                event(phase, "end_backward")
            phase += 1
            note(phase, "")
        if not sign:
            if not (phase and operation.endswith("forward")):  # checkpointing runs a forward again in backward
                event(phase, operation, number)
            continue
        kind = tracer.blocks[number].kind
        held[kind] += sign * sizes[number]
        if index < start:
            continue
        if sign > 0 and kind == "temporaries":
            line.largest_temporary = max(line.largest_temporary, sizes[number])
        note(phase, operation)
    for rest in range(phase, len(PHASES)):
        if rest > phase:
            note(rest, "")
        if rest == 1:
            event(rest, "end_backward")
    event(2, "end_step")
    return line


@dataclass(frozen=True)
class LayerTrace:
    """Bytes of one layer: kept for backward, its input counted; and beside that the most that its forward and its
    backward hold, the gradients of its parameters counted."""

    saved: int
    forward: int
    backward: int


def trace_layer(
    layer: Callable[[Tensor], Tensor],
    parameters: Iterable[Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: str,
) -> LayerTrace:
    """The memory of layer(x) with x of this shape on the meta device, and of its backward."""
    tracer = Tracer(device)
    with planned_for(device), FlashAttention(), tracer:
        leaf = torch.empty((), dtype=dtype, device="meta", requires_grad=True)
        x = leaf.expand(shape).clone()
        with torch.no_grad():
            layer(x)
        for tensor in parameters:
            tracer.add(tensor)
        around = tracer.held - tracer.bytes_of(x)
        tracer.highest = tracer.held
        y = layer(x)
        del x
        forward = tracer.highest
        saved = tracer.held - around - tracer.bytes_of(y)
        tracer.highest = 0
        edge, gradient = torch.autograd.graph.get_gradient_edge(y), torch.empty_like(y)
        del y
        torch.autograd.backward((edge,), (gradient,))
        backward = tracer.highest
    for tensor in parameters:
        tensor.grad = None
    return LayerTrace(saved, max(0, forward - around - saved), max(0, backward - around - saved))
