"""Loading a quantised checkpoint: checked as a whole before the first tensor changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..nn._int8_module import Int8Module, describe
from .container import CheckpointError, read_container
from .convert import scale_name

_SHOWN = 10


def load_checkpoint_(model: nn.Module, path: Path | str) -> None:
    """Load a safetensors file into a model after ``quantize_``; either all of it or nothing.

    Args:
        model: its layers must be those that the file was made for. A key of a tied tensor may be absent.
        path: what ``python -m pykernels quantize`` or ``save_file(model.state_dict(), path)`` wrote.

    Raises:
        CheckpointError: the file is missing, cut short, or does not match ``model``: the message names each key, what
            it got and what the model accepts. The model is as it was.
    """
    from safetensors.torch import load_file

    path = Path(path)
    read_container(path)
    found = load_file(path)
    problems = checkpoint_problems(model, found)
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
        raise CheckpointError(f"{path} does not match the model, which was left as it was:{shown}{more}")
    model.load_state_dict(found, strict=False)


def checkpoint_problems(model: nn.Module, found: dict[str, Tensor]) -> list[str]:
    """Each mismatch between a model and a state_dict, as a sentence; empty if it fits."""
    problems: list[str] = []
    checked: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Int8Module):
            prefix = f"{name}." if name else ""
            own = {key: buffer for key, buffer in module.state_dict().items() if isinstance(buffer, Tensor)}
            here = {key[len(prefix) :]: value for key, value in found.items() if _directly_under(key, prefix)}
            checked |= {prefix + key for key in (*own, *here)}
            problems += module._state_dict_problems(own, here, prefix)
    state: dict[str, Any] = {key: value for key, value in model.state_dict().items() if key not in checked}
    present = {_place(value) for key, value in state.items() if key in found and isinstance(value, Tensor)}
    for key, value in state.items():
        if key not in found:
            if isinstance(value, Tensor) and _place(value) not in present:
                problems.append(f"{key}: missing; the model accepts {describe(value)}.")
        elif found[key].shape != value.shape or found[key].is_floating_point() != value.is_floating_point():
            hint = " Call quantize_ first." if scale_name(key) in found else ""
            problems.append(f"{key}: got {describe(found[key])}, the model accepts {describe(value)}.{hint}")
    problems += [
        f"{key}: got {describe(value)}, the model has no such tensor."
        for key, value in found.items()
        if key not in state and key not in checked
    ]
    return problems


def _directly_under(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and "." not in key[len(prefix) :]


def _place(value: Tensor) -> tuple[Any, ...]:
    return (value.device, value.data_ptr(), value.shape)
