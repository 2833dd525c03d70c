"""Giving one module another forward: its class is swapped for a subclass, its parameters and its name stay."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...nn._save import SaveDial, check_save

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_classes: dict[tuple[type, type], type] = {}


class Fused:
    """Mixed in before a module's own class, so that state dict keys, attributes and isinstance stay as they are.

    A subclass defines fused_forward, and reads what it needs to know of the module in `_pykernels`.
    """

    _pykernels: Any
    _pykernels_own: type[nn.Module]

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the module had before."""
        return self._pykernels_own.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        mixin = next(base for base in type(self).__mro__ if "_pykernels_own" in vars(base)).__bases__[0]
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # a method of object since 3.11
        return _blank, (mixin, self._pykernels_own), state


class Dial(Fused):
    """A fused module with `save`, what it keeps for backward, at any time."""

    @property
    def save(self) -> str:
        """One of pykernels.nn.SAVE."""
        return self._pykernels.save

    @save.setter
    def save(self, value: str) -> None:
        self._pykernels.save = check_save(value)

    _dialled: Any = SaveDial._dialled


def takes(x: Any) -> bool:
    """A tensor of a dtype that the kernels take."""
    return isinstance(x, Tensor) and x.dtype in _DTYPES


def fused_class(mixin: type[Fused], own: type[nn.Module]) -> type[nn.Module]:
    """The subclass of both, under the name of `own`, whose forward has the signature of that of `own`."""
    if (mixin, own) not in _classes:

        @functools.wraps(own.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return mixin.fused_forward(self, *args, **kwargs)

        body = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            "_pykernels_own": own,
            "forward": forward,
        }
        _classes[mixin, own] = type(own.__name__, (mixin, own), body)
    return _classes[mixin, own]


def swap(module: nn.Module, mixin: type[Fused], state: Any) -> None:
    """The module becomes one of `mixin`, which finds `state` in its `_pykernels`."""
    module.__class__ = fused_class(mixin, type(module))
    module.__dict__["_pykernels"] = state


def is_swapped(module: Any) -> bool:
    """It is fused, and no other tool has swapped its class since."""
    return "_pykernels_own" in vars(type(module))


def swap_back(module: Any) -> None:
    """The module is again what it was."""
    module.__class__ = vars(type(module))["_pykernels_own"]
    del module.__dict__["_pykernels"]


def _blank(mixin: type[Fused], own: type[nn.Module]) -> nn.Module:
    cls = fused_class(mixin, own)
    return cls.__new__(cls)
