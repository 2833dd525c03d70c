"""Loading a state_dict: everything is checked first, dtypes are kept, and an error leaves everything as it was."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _shard
from ._arguments import check_group, name_of
from ._state import MASTER_LOW, STEP, Group, as_bytes, step_device, table

if TYPE_CHECKING:
    from ._base import FusedOptimizer

_FIXED = ("state_bits", "rounding", "block_size", "min_8bit_size")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """What `FusedOptimizer.load_state_dict` says."""
    prepare(optimizer, state_dict)()


def prepare(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> Callable[[], None]:
    """Checks everything and changes nothing; what it returns loads."""
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(optimizer, state_dict) or state_dict
    saved_groups = deepcopy([{k: v for k, v in g.items() if k != "params"} for g in state_dict["param_groups"]])
    ids = [g["params"] for g in state_dict["param_groups"]]
    groups = _merge(optimizer, saved_groups, ids)
    placed = [
        (saved, param, group, name_of(group, index, position))
        for index, (group, saved_ids) in enumerate(zip(groups, ids, strict=True))
        for position, (saved, param) in enumerate(zip(saved_ids, group["params"], strict=True))
    ]
    saved_state = state_dict["state"]
    known = {saved for saved, *_ in placed}
    checked = {}
    for saved, param, group, name in placed:
        if saved in saved_state:
            checked[saved] = _check(optimizer, name, group, param, saved_state[saved])

    def commit() -> None:
        state: defaultdict[Any, Any] = defaultdict(dict)
        for saved, param, group, _ in placed:
            if saved in checked:
                # Popped, so that the old state of each parameter is freed before the next one's copy is taken.
                old = optimizer.state.pop(param, {})
                state[param] = _adopt(optimizer.slots(group), group, param, checked[saved], old)
        state.update({key: value for key, value in saved_state.items() if key not in known})
        optimizer.__setstate__({"state": state, "param_groups": groups})
        for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
            post_hook(optimizer)

    return commit


def _merge(optimizer: FusedOptimizer, saved_groups: list[Group], ids: list[list[Any]]) -> list[Group]:
    """The loaded groups with this optimizer's parameters, and its own settings where the file has none."""
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if len(groups) != len(saved_groups):
        raise ValueError(f"{name}: expected {len(groups)} parameter groups in the state_dict, got {len(saved_groups)}")
    merged = []
    for index, (group, saved, saved_ids) in enumerate(zip(groups, saved_groups, ids, strict=True)):
        if len(group["params"]) != len(saved_ids):
            raise ValueError(
                f"{name}: expected group {index} of the state_dict to have {len(group['params'])} parameters, "
                f"got {len(saved_ids)}"
            )
        for key in _FIXED:
            if key in saved and saved[key] != group[key] and not _alike(key, saved, group):
                first = name_of(group, index, 0) if saved_ids else f"group {index}"
                raise ValueError(
                    f"{name}: expected the state of parameter {first} to have {key}={group[key]!r}, got {saved[key]!r}"
                )
        kept = {key: value for key, value in group.items() if key not in saved}
        merged.append({**saved, **kept, "params": group["params"]})
        check_group(name, index, merged[-1])
    return merged


def _alike(key: str, saved: Group, group: Group) -> bool:
    """Block sizes do not matter where nothing is cut into blocks."""
    return key in ("block_size", "min_8bit_size") and saved.get("state_bits") == group["state_bits"] != 8


def _check(optimizer: FusedOptimizer, name: str, group: Group, param: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state, each tensor of the kind that this optimizer keeps."""
    what = f"{type(optimizer).__name__}: expected the state of parameter {name} to have"
    wanted = table(group, optimizer.slots(group), param.shape, param.dtype)
    low = saved.get(MASTER_LOW)
    if isinstance(low, Tensor) and low.dtype == torch.int16:  # as it was saved before it was pairs of bytes
        part = as_bytes(_shard.local(low).contiguous())
        saved = {**saved, MASTER_LOW: _shard.wrap(part, low, [*low.shape, 2])}
    present = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
    if not any(key in present for key in wanted) and (wanted or STEP not in saved):
        return {}  # torch's SGD before its first step with momentum
    for key, (dtype, shape) in wanted.items():
        if key not in present:
            raise ValueError(f"{what} {key}, got {sorted(saved)}")
        value = present[key]
        convertible = dtype in _FLOATS and value.dtype in _FLOATS and key in optimizer.slots(group)
        if value.dtype != dtype and not convertible:
            raise ValueError(f"{what} {key} in {dtype}, got {value.dtype}")
        if list(value.shape) != shape:
            raise ValueError(f"{what} {key} of shape {shape}, got {list(value.shape)}")
        if not _shard.same_layout(value, param):
            raise ValueError(f"{what} {key} laid out over ranks as the parameter is, got another layout")
    step = saved.get(STEP, 1.0)
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"{what} a step of 1 element, got {list(step.shape)}")
    return saved


def _adopt(
    named: dict[str, str], group: Group, param: Tensor, saved: dict[str, Any], old: dict[str, Tensor]
) -> dict[str, Any]:
    """Copies of the saved tensors in this optimizer's dtypes, on the parameter's device."""
    if not saved:
        return {}
    state: dict[str, Any] = {}
    # torch's SGD counts no steps; its buffer exists from the first one on.
    step = saved.get(STEP, 1.0)
    if step is not old.get(STEP):
        step = torch.tensor(float(step), dtype=torch.float32, device=step_device(group, param))
    state[STEP] = step
    for key, (dtype, _) in table(group, named, param.shape, param.dtype).items():
        value = saved[key]
        state[key] = value if value is old.get(key) else value.to(param.device, dtype, copy=True)
    # What this optimizer does not know is kept, so that it is saved again.
    state.update({key: value for key, value in saved.items() if key not in state and value is not None})
    return state
