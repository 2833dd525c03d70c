"""compress_activations: what autograd saves, held in INT8 until backward asks for it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch

from .. import functional
from ._saved import Parameters, Shared, View, flat, is_plain, view_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Compressed:
    """The elements of a tensor in the order of its memory: int8 codes, a float32 scale for each group."""

    def __init__(self, x: torch.Tensor, group_size: int, stochastic: bool, seed: int) -> None:
        whole = x.numel() // group_size * group_size
        parts = [x[:whole].view(-1, group_size), x[whole:].view(1, -1)]
        self.dtype = x.dtype
        self.parts = [
            functional.quantize_rowwise(part, stochastic=stochastic, seed=seed + place)
            for place, part in enumerate(parts)
            if part.numel()
        ]
        # Asked on the CPU alone: elsewhere it would wait for the device.
        self.keep_exact = x.device.type == "cpu" and not all(bool(scale.isfinite().all()) for _, scale in self.parts)
        self._restored: weakref.ref[torch.Tensor] | None = None  # for as long as some backward holds it

    def restore(self) -> torch.Tensor:
        x = None if self._restored is None else self._restored()
        if x is None:
            x = torch.cat([functional.dequantize_rowwise(q, scale, self.dtype).flatten() for q, scale in self.parts])
            self._restored = weakref.ref(x)
        return x


@contextlib.contextmanager
def compress_activations(
    bits: int = 8,
    *,
    min_bytes: int = 1 << 20,
    group_size: int = 128,
    stochastic: bool = True,
    seed: int | None = None,
) -> Iterator[None]:
    """Within the block, what autograd saves for backward is held in INT8 with a float32 scale for each group.

    Compressed are float32, bfloat16 and float16 tensors of min_bytes or more: to 1 + 4 / group_size bytes an element.
    Never integer tensors, parameters or views of them. A tensor that several nodes save, reshaped or transposed too, is
    compressed once. Groups are runs of group_size elements in memory, each scaled by its own largest. The block is for
    the forward; backward may run outside it.
    stochastic: rounds up with the probability of the fraction, so that a gradient that is linear in a saved tensor (the
    weight's of a linear layer) is right on average, as in ActNN (Chen et al., 2021); the error of an element is below
    one step, absmax / 127 of its group. Otherwise to nearest: half a step, with a bias.
    seed: of the rounding; drawn from torch's CPU generator when None. Every tensor has its own stream.
    A group with NaN or infinity comes back as NaN on a GPU, where looking would wait for the device; on the CPU such a
    tensor is kept as it is.
    Large statistics are compressed too: attention's log-sum-exp, 4 bytes a row and head, is better kept exact, so
    choose min_bytes above its size.
    Errors: ValueError for other bits than 8, a negative min_bytes or a group_size below 1.
    """
    if bits != 8:
        raise ValueError(f"compress_activations: expected bits to be 8, got {bits}")
    if group_size < 1:
        raise ValueError(f"compress_activations: expected group_size to be 1 or more, got {group_size}")
    if min_bytes < 0:
        raise ValueError(f"compress_activations: expected min_bytes to be 0 or more, got {min_bytes}")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    parameters, shared = Parameters(), Shared[_Compressed]()
    drawn = 0

    def compress(tensor: torch.Tensor) -> _Compressed:
        nonlocal drawn
        drawn += 2  # a seed for the whole groups, one for the last, shorter one
        return _Compressed(flat(tensor.detach()), group_size, stochastic, (seed + drawn) % 2**63)

    def pack(tensor: torch.Tensor) -> torch.Tensor | View:
        if tensor.dtype not in FLOATS or not is_plain(tensor, min_bytes) or tensor in parameters:
            return tensor
        with torch.no_grad():
            entry = shared.get(tensor, lambda: compress(tensor))
        return tensor if entry.keep_exact else view_of(entry, tensor)

    def unpack(packed: torch.Tensor | View) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else packed.restore()

    handle = parameters.watch()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        handle.remove()
