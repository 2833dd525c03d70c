"""What the INT8 layers share: buffers whose dtype never changes, and a state_dict load that is all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def describe(value: Any) -> str:
    """A tensor's dtype and shape for an error message, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def has_non_finite(scale: Tensor) -> bool:
    """True where a scale on a real device holds NaN or infinity. A meta tensor holds no values."""
    return scale.device.type != "meta" and not bool(torch.isfinite(scale).all())


class Int8Module(nn.Module):
    """Base of the INT8 layers.

    Attributes of a subclass:
        fixed_dtypes: buffers that keep their dtype under ``.to(dtype)``, ``.half()`` and ``.type()``.
        resizable_dims: for a buffer, the dimensions in which a checkpoint may differ from this layer.
    """

    fixed_dtypes: ClassVar[dict[str, torch.dtype]] = {"weight": torch.int8, "scale": torch.float32}
    resizable_dims: ClassVar[dict[str, tuple[int, ...]]] = {}

    weight: Tensor
    scale: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Module:
        before = {name: self._buffers.get(name) for name in self.fixed_dtypes}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != self.fixed_dtypes[name]:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and name not in self._non_persistent_buffers_set
        }
        found = {
            key[len(prefix) :]: value
            for key, value in state_dict.items()
            if key.startswith(prefix) and "." not in key[len(prefix) :]
        }
        if found.keys().isdisjoint(own):
            missing_keys.extend(prefix + name for name in own)
            unexpected_keys.extend(prefix + name for name in found)
            return
        problems = self._state_dict_problems(own, found, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        for name in self.resizable_dims:
            if name in own and own[name].shape != found[name].shape:
                self._buffers[name] = own[name].new_empty(found[name].shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _state_dict_problems(self, own: dict[str, Tensor], found: dict[str, Any], prefix: str) -> list[str]:
        layer = f"{type(self).__name__} {prefix.rstrip('.') or '(root)'}"
        problems = []
        for name, buffer in own.items():
            accepts = describe(buffer)
            if name not in found:
                problems.append(f"{prefix}{name}: missing from the state_dict; {layer} accepts {accepts}.")
                continue
            value = found[name]
            if not isinstance(value, Tensor):
                problems.append(f"{prefix}{name}: got {describe(value)}, {layer} accepts {accepts}.")
            elif not self._accepts(name, buffer, value):
                hint = ""
                if name == "weight" and value.is_floating_point():
                    hint = (
                        " This is a float checkpoint: load it before quantize_,"
                        " or convert it with `python -m pykernels quantize`."
                    )
                problems.append(f"{prefix}{name}: got {describe(value)}, {layer} accepts {accepts}.{hint}")
            elif name.endswith("scale") and has_non_finite(value):
                problems.append(f"{prefix}{name}: got NaN or infinite values, {layer} accepts finite scales.")
        for name in found.keys() - own.keys():
            problems.append(
                f"{prefix}{name}: got {describe(found[name])}, {layer} accepts only {', '.join(own)};"
                " the checkpoint was quantised with another config."
            )
        return problems

    def _accepts(self, name: str, buffer: Tensor, value: Tensor) -> bool:
        if name in self.fixed_dtypes:
            if value.dtype != self.fixed_dtypes[name]:
                return False
        elif not value.is_floating_point():
            return False
        free = self.resizable_dims.get(name, ())
        return value.dim() == buffer.dim() and all(
            dim in free or got == want for dim, (got, want) in enumerate(zip(value.shape, buffer.shape, strict=True))
        )


def check_float_linear(linear: Any, argument: str = "linear") -> None:
    """Raise unless ``linear`` can be quantised: an ``nn.Linear`` with a finite fp32, bf16 or fp16 weight."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{argument}: got {describe(linear)}, accepts torch.nn.Linear.")
    check_float_weight(linear.weight, f"{argument}.weight")
    if linear.bias is not None and has_non_finite(linear.bias):
        raise ValueError(f"{argument}.bias: got NaN or infinite values, accepts finite ones.")


def check_float_weight(weight: Tensor, argument: str) -> None:
    """Raise unless ``weight`` is a finite matrix of fp32, bf16 or fp16."""
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.dim() != 2:
        raise TypeError(f"{argument}: got {describe(weight)}, accepts a float32, bfloat16 or float16 matrix.")
    if has_non_finite(weight):
        raise ValueError(f"{argument}: got NaN or infinite values, accepts finite ones.")
