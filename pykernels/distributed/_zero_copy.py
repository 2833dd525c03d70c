"""State in pinned host memory that a GPU kernel reads and writes in place, over the bus and without a staging copy."""

from __future__ import annotations

from typing import Any

import torch

from ..optim._shard import local, wrap
from ._mirror import Inner


class _Mapped:
    """Pinned host memory as the CUDA array interface describes it: under unified addressing the pointer is valid on
    both sides, and the runtime tells torch.as_tensor which device it belongs to."""

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host  # keeps it alive as long as the view
        self.__cuda_array_interface__ = {
            "shape": (host.numel(),),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 3,
        }


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A device tensor of the same values whose memory is pinned on the host; a tensor on the CPU as it is."""
    if not tensor.is_cuda or tensor.numel() == 0:
        return tensor
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    with torch.cuda.device(tensor.device):
        host = torch.empty(raw.shape, dtype=torch.uint8, pin_memory=True)
        host.copy_(raw)
        return torch.as_tensor(_Mapped(host), device=tensor.device).view(tensor.dtype).view(tensor.shape)


class ZeroCopy:
    """Keeps the state of an optimizer, but its scalars, on the host, also what is made late or loaded."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._placed: dict[int, torch.Tensor] = {}
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self.place(optimizer))
        optimizer.register_load_state_dict_post_hook(self.place)
        if init := getattr(optimizer, "init_states", None):
            init()
        self.place(optimizer)

    def place(self, optimizer: torch.optim.Optimizer) -> None:
        """Moves what does not lie there yet."""
        placed = {}
        for state in optimizer.state.values():
            for name, value in state.items():
                if not isinstance(value, torch.Tensor) or value.dim() == 0:
                    continue
                here = local(value)
                if self._placed.get(id(here)) is not here:
                    here = to_host(here)
                    value = state[name] = wrap(here, value, value.shape) if here is not local(value) else value
                placed[id(local(value))] = local(value)
        self._placed = placed


def zero_copy(params: Any, optimizer_cls: Inner, **kwargs: Any) -> torch.optim.Optimizer:
    """An optimizer of this class whose state lies in host memory and is updated where the parameters are."""
    optimizer = optimizer_cls(params, **kwargs)
    ZeroCopy(optimizer)
    return optimizer
