"""What the saved-tensor hooks share: which tensors are parameters, which are one and the same, and how each is seen."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

E = TypeVar("E")


class Kept(Protocol):
    """Something that gives back the elements of a tensor, flat."""

    def restore(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class View:
    """How one saved tensor sees the elements that an entry keeps."""

    entry: Kept
    shape: torch.Size
    stride: tuple[int, ...]

    def restore(self) -> torch.Tensor:
        return self.entry.restore().as_strided(self.shape, self.stride)


def view_of(entry: Kept, tensor: torch.Tensor) -> View:
    """The strides survive where the tensor is dense; flat() has made any other contiguous."""
    stride = tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
    return View(entry, tensor.shape, stride)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in the order of memory; a copy where they do not lie in one run."""
    return tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.contiguous().flatten()


def is_plain(tensor: torch.Tensor, min_bytes: int) -> bool:
    """Whether it is a strided tensor of min_bytes or more, with memory for each of its elements."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not expanded and 0 < tensor.nbytes <= tensor.untyped_storage().nbytes() and tensor.nbytes >= min_bytes


class Parameters:
    """Knows a parameter, a view of one, and a detached copy of either that shares its memory.

    The last only for parameters of modules called since watch(): nothing on a detached tensor but its memory says where
    it came from.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}
        self._modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def watch(self) -> Any:
        """Notes the parameters of every module that is called; returns the handle that ends it."""
        return torch.nn.modules.module.register_module_forward_pre_hook(self._note)

    def _note(self, module: torch.nn.Module, args: Any) -> None:
        if module in self._modules:
            return
        self._modules.update(module.modules())
        for parameter in module.parameters():
            self._add(parameter)

    def _add(self, parameter: torch.Tensor) -> None:
        storage = parameter.untyped_storage()
        self._storages.setdefault(storage._cdata, StorageWeakRef(storage))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        base = tensor
        while base._base is not None:
            base = base._base
        if isinstance(base, torch.nn.Parameter) or isinstance(tensor, torch.nn.Parameter):
            self._add(tensor)
            return True
        return tensor.untyped_storage()._cdata in self._storages


def identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that hold the same values in the same memory. Reshaped and transposed views of a whole dense
    tensor count as one: they differ in how its elements are seen."""
    if is_dense(tensor):
        seen: tuple[Any, ...] = (tensor.numel(),)
    else:
        seen = (tuple(tensor.shape), tensor.stride())
    return tensor.untyped_storage()._cdata, tensor._version, tensor.dtype, tensor.storage_offset(), *seen


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one run of memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class Shared(Generic[E]):
    """One entry for each tensor, however often it is saved, for as long as its memory and the entry live."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[E]]] = {}

    def get(self, tensor: torch.Tensor, make: Callable[[], E]) -> E:
        # The weak reference keeps the address of the storage from being given to another, so that the key stays true.
        key = identity(tensor)
        found = self._entries.get(key)
        entry = None if found is None or found[0].expired() else found[1]()
        if entry is None:
            entry = make()
            self._entries[key] = (StorageWeakRef(tensor.untyped_storage()), weakref.ref(entry))
            if len(self._entries) % 256 == 0:
                self._drop_dead()
        return entry

    def _drop_dead(self) -> None:
        self._entries = {k: (s, e) for k, (s, e) in self._entries.items() if not s.expired() and e() is not None}
