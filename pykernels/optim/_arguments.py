"""Checks of hyperparameters and parameters before anything changes. Each names what it got and what it accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import _optimizer_reference as rules
from . import _shard
from ._state import Group, quantised

STATE_BITS = (32, 16, 8)
_NOT_NEGATIVE = (
    "lr",
    "eps",
    "weight_decay",
    "momentum",
    "lr_decay",
    "initial_accumulator_value",
    "max_unorm",
    "max_grad_norm",
)
_PARAMETERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(group: Group, index: int, position: int) -> str:
    """How errors call parameter `position` of group `index`: its own name where named_parameters() gave one."""
    named = group.get("param_names")
    return repr(named[position]) if named else f"{position} of group {index}"


def _fail(optimizer: str, what: str, accepted: str, got: object) -> None:
    raise ValueError(f"{optimizer}: expected {what} to be {accepted}, got {got!r}")


def check_group(optimizer: str, index: int, group: Group) -> None:
    """Every hyperparameter of a parameter group, its own or a default."""
    where = f" of group {index}" if index else ""
    for key in _NOT_NEGATIVE:
        value = group.get(key, 0.0)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                _fail(optimizer, key + where, "one number", value)
            if value.device.type != "cpu":
                continue  # reading it would wait for the device
        if not value >= 0.0:
            _fail(optimizer, key + where, "at least 0", value)
    for i, beta in enumerate(group.get("betas", ())):
        check_scalar(optimizer, f"betas[{i}]{where}", beta)
        if not 0.0 <= beta < 1.0:
            _fail(optimizer, f"betas[{i}]{where}", "in [0, 1)", beta)
    if not 0.0 <= group.get("alpha", 0.0) <= 1.0:
        _fail(optimizer, "alpha" + where, "in [0, 1]", group["alpha"])
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        _fail(optimizer, "momentum and dampening" + where, "above 0 and 0 with nesterov", _pair(group))
    if group["differentiable"]:
        _fail(optimizer, "differentiable" + where, "False: no gradient flows through a fused step", True)
    if group["state_bits"] not in STATE_BITS:
        _fail(optimizer, "state_bits" + where, "one of 32, 16 and 8", group["state_bits"])
    if group["rounding"] not in rules.ROUNDINGS:
        _fail(optimizer, "rounding" + where, f"one of {', '.join(rules.ROUNDINGS)}", group["rounding"])
    for key, least in (("block_size", 1), ("min_8bit_size", 0)):
        if not isinstance(group[key], int) or group[key] < least:
            _fail(optimizer, key + where, f"an integer of at least {least}", group[key])


def _pair(group: Group) -> tuple[Any, Any]:
    return group["momentum"], group["dampening"]


def check_scalar(optimizer: str, what: str, value: Any) -> None:
    """A number, or a tensor of one element that can be read without waiting for a device."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.device.type != "cpu"):
        _fail(optimizer, what, "a number or a CPU tensor of one element", value)


def check_parameter(optimizer: str, name: str, group: Group, param: Tensor) -> None:
    """The parameter has a dtype and a layout that can be updated as the group says."""
    what = f"parameter {name}"
    if param.dtype not in _PARAMETERS:
        _fail(optimizer, what, "float32, bfloat16, float16 or float64", param.dtype)
    if param.dtype == torch.float16 and group["rounding"] in ("stochastic", "split_master"):
        _fail(optimizer, what, f"bfloat16 or float32 for rounding={group['rounding']!r}", param.dtype)
    if param.layout != torch.strided:
        _fail(optimizer, what, "a dense tensor", param.layout)
    part = _shard.local(param.detach())
    if any(size > 1 and stride == 0 for size, stride in zip(part.shape, part.stride(), strict=True)):
        _fail(optimizer, what, "a tensor whose elements do not share memory", f"strides {list(part.stride())}")
    if quantised(group, param.shape, param.dtype):
        _check_blocks(optimizer, what, group["block_size"], param)


def _check_blocks(optimizer: str, what: str, block_size: int, param: Tensor) -> None:
    """Shards of any dimension but the first must be cut between blocks, or ranks would share a scale."""
    sharded, _ = _shard.cut(param)
    if not sharded or sharded[-1] == 0:
        return
    inner = param.shape[2:].numel()
    ranks = param.device_mesh.size()  # type: ignore[attr-defined]
    pieces = 1
    for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):  # type: ignore[attr-defined]
        pieces *= size if placement.is_shard(1) else 1
    piece = -(-param.shape[1] // pieces) * inner
    if sharded[-1] > 1 or piece % block_size:
        accepted = f"sharded in dimension 0, or in dimension 1 in multiples of block_size={block_size} (8-bit state)"
        _fail(optimizer, what, accepted, f"shape {list(param.shape)} as {param.placements} over {ranks} ranks")  # type: ignore[attr-defined]


def check_gradient(optimizer: str, name: str, param: Tensor, grad: Tensor) -> None:
    """The gradient is a dense float tensor on the device of its parameter."""
    what = f"the gradient of parameter {name}"
    if grad.layout != torch.strided:
        raise RuntimeError(f"{optimizer}: expected {what} to be dense, got {grad.layout}: sparse is not supported")
    if grad.dtype not in _PARAMETERS:
        _fail(optimizer, what, "float32, bfloat16, float16 or float64", grad.dtype)
    if _shard.is_dtensor(grad) != _shard.is_dtensor(param):
        kind = "a DTensor" if _shard.is_dtensor(param) else "a plain tensor"
        _fail(optimizer, what, f"{kind} as the parameter is", type(grad).__name__)
