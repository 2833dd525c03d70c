"""For which device a tensor on the meta device is planned: operators that choose by device then choose as they would
there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_device: ContextVar[str] = ContextVar("planned device", default="meta")


def device_type(x: Tensor) -> str:
    """The type of x's device, or of the device that is planned for where x is on the meta device."""
    return _device.get() if x.device.type == "meta" else x.device.type


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Within the block, meta tensors stand for tensors of this type of device: "cpu" or "cuda"."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)
