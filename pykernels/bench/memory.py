"""Bytes that a call holds at its peak, and bytes that a forward keeps for backward."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes torch's allocator held at once beyond those held before the call, the output included.

    Scratch that a library takes from the system allocator is not seen (oneDNN's, for one).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with _silent_stderr(), torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        kept = call()
    del kept
    assert profile.kineto_results is not None
    held = peak = 0
    for _time, size in sorted(_allocations(profile.kineto_results.experimental_event_tree())):
        held += size
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in a forward; the parameters' own live on anyway."""
    held = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
        total = sum(storages.values())
    del kept
    return total


def _allocations(events: Any) -> Iterator[tuple[int, int]]:
    for event in events:
        if isinstance(event.extra_fields, torch._C._profiler._ExtraFields_Allocation):
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler writes lines of its own to file descriptor 2, past sys.stderr."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
