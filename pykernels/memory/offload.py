"""offload_activations: what autograd saves, kept in pinned host memory until just before backward asks for it."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ._saved import Parameters, Shared, View, flat, is_plain, view_of

IN_FLIGHT = 4  # tensors on their way out whose device memory is not yet free
_said = False


class Device(Protocol):
    """What the bookkeeping needs of an accelerator. A ticket stands for a copy under way on the side stream."""

    def owns(self, tensor: torch.Tensor) -> bool: ...
    def store(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]: ...
    def load(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]: ...
    def done(self, ticket: Any) -> bool: ...
    def wait(self, ticket: Any) -> None: ...


class Cuda:
    """One side stream for each device; nothing here makes the host wait."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        # What the current stream was given so far comes first: it makes x, or last used the memory load() is given.
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
        return self._streams[device]

    def store(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        side = self._side(x.device)
        with torch.cuda.stream(side):
            host.copy_(x, non_blocking=True)
        return host, (side.record_event(), x.device)

    def load(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        x = torch.empty(host.shape, dtype=host.dtype, device=device)  # from the pool of the stream that will use it
        side = self._side(device)
        with torch.cuda.stream(side):
            x.copy_(host, non_blocking=True)
        return x, (side.record_event(), device)

    def done(self, ticket: Any) -> bool:
        return bool(ticket[0].query())

    def wait(self, ticket: Any) -> None:
        torch.cuda.current_stream(ticket[1]).wait_event(ticket[0])


class _Offloaded:
    """One tensor's elements: on the device until the copy out is done, then on the host, back on the device for use."""

    def __init__(self, owner: Offloader, x: torch.Tensor, index: int) -> None:
        self.owner, self.index, self.device, self.uses = owner, index, x.device, 0
        self.version = x._version
        self.source: torch.Tensor | None = x
        self.host, self.ticket = owner.device.store(x)
        self.coming: tuple[torch.Tensor, Any] | None = None
        self._here: torch.Tensor | None = None
        self._served = 0

    def release(self) -> None:
        """Lets go of the device memory; what the current stream does next comes after the copy."""
        assert self.source is not None
        changed = self.source._version != self.version
        self.owner.device.wait(self.ticket)
        self.source = None
        if changed:
            raise RuntimeError(
                "offload_activations: a tensor saved for backward was modified in place while it was copied to the "
                "host: use the out-of-place operation, or raise min_bytes above its size"
            )

    @property
    def on_host_only(self) -> bool:
        return self.source is None and self.coming is None and self._here is None

    def fetch(self) -> None:
        self.coming = self.owner.device.load(self.host, self.device)

    def restore(self) -> torch.Tensor:
        x = self._here if self._here is not None else self.source
        if x is None:
            if self.coming is None:
                self.fetch()
            assert self.coming is not None
            (x, ticket), self.coming = self.coming, None
            self.owner.device.wait(ticket)
        # Kept for the other nodes that saved it; a second backward starts over from the host.
        self._served = (self._served + 1) % self.uses
        self._here = x if self._served else None
        self.owner.fetch_before(self.index)
        return x


class Offloader:
    """The hooks' bookkeeping: what is offloaded once, what leaves the device when, what comes back before its use."""

    def __init__(self, device: Device, min_bytes: int, prefetch: int) -> None:
        self.device, self.min_bytes, self.prefetch = device, min_bytes, prefetch
        self.parameters = Parameters()
        self._shared = Shared[_Offloaded]()
        self._order: list[weakref.ref[_Offloaded]] = []
        self._leaving: deque[_Offloaded] = deque()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | View:
        if not self.device.owns(tensor) or not is_plain(tensor, self.min_bytes) or tensor in self.parameters:
            return tensor
        with torch.no_grad():
            entry = self._shared.get(tensor, lambda: self._offload(flat(tensor.detach())))
        entry.uses += 1
        return view_of(entry, tensor)

    def unpack(self, packed: torch.Tensor | View) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed.restore()

    def _offload(self, x: torch.Tensor) -> _Offloaded:
        while self._leaving and self.device.done(self._leaving[0].ticket):
            self._leaving.popleft().release()
        while len(self._leaving) >= IN_FLIGHT:
            self._leaving.popleft().release()
        entry = _Offloaded(self, x, len(self._order))
        self._order.append(weakref.ref(entry))
        self._leaving.append(entry)
        return entry

    def fetch_before(self, index: int) -> None:
        """Starts the way back of the tensors saved before this one: backward asks for them next."""
        ahead = 0
        for place in range(index - 1, -1, -1):
            if ahead == self.prefetch:
                return
            entry = self._order[place]()
            if entry is None:
                continue
            if entry.on_host_only:
                entry.fetch()
            ahead += 1

    def finish(self) -> None:
        """Frees what is still on its way out. The hooks are gone, so an error of one entry must not keep the others."""
        errors = []
        while self._leaving:
            try:
                self._leaving.popleft().release()
            except RuntimeError as error:
                errors.append(error)
        if errors:
            raise errors[0]


@contextlib.contextmanager
def offload_activations(min_bytes: int = 1 << 20, *, prefetch: int = 2) -> Iterator[None]:
    """Within the block, CUDA tensors that autograd saves for backward go to pinned host memory and come back in time.

    Offloaded are tensors of min_bytes or more, never parameters or views of them; a tensor that several nodes save,
    reshaped or transposed too, is copied once. Copies run on a side stream, beside the forward; in backward, the
    `prefetch` tensors saved before the one in use are already on their way. At most 4 tensors wait for their copy to
    end before their device memory is free. The host never waits. The block is for the forward; backward may run
    outside it. Host memory is freed with the graph, so a second backward (retain_graph=True) works.
    Without a CUDA device nothing is done, and one warning says so; CPU tensors are always left alone.
    Errors: ValueError for a negative min_bytes or prefetch; RuntimeError when a saved tensor is modified in place while
    it is being copied. As in Rhu et al., "vDNN", 2016.
    """
    if min_bytes < 0:
        raise ValueError(f"offload_activations: expected min_bytes to be 0 or more, got {min_bytes}")
    if prefetch < 0:
        raise ValueError(f"offload_activations: expected prefetch to be 0 or more, got {prefetch}")
    if not torch.cuda.is_available():
        _say_once()
        yield
        return
    with offloading(Offloader(Cuda(), min_bytes, prefetch)):
        yield


@contextlib.contextmanager
def offloading(offloader: Offloader) -> Iterator[None]:
    """The hooks of one offloader."""
    handle = offloader.parameters.watch()
    try:
        with torch.autograd.graph.saved_tensors_hooks(offloader.pack, offloader.unpack):
            yield
    finally:
        handle.remove()
        offloader.finish()


def _say_once() -> None:
    global _said
    if not _said:
        _said = True
        warnings.warn(
            "pykernels.memory.offload_activations: no CUDA device, so saved tensors stay where they are", stacklevel=4
        )
