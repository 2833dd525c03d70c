"""zero: a model and its optimizer on many ranks, in the three stages of Rajbhandari et al., "ZeRO", 2020."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ._mirror import Inner
from ._zero_copy import zero_copy
from .offload import OffloadedOptimizer
from .replicated import ReplicatedOptimizer

OFFLOADS = (None, "optimizer", "optimizer_zero_copy", "parameters")


def zero(
    model: nn.Module,
    optimizer_cls: Inner,
    stage: int = 3,
    mesh: DeviceMesh | None = None,
    offload: str | None = None,
    *,
    units: Iterable[nn.Module] | None = None,
    param_groups: Callable[[nn.Module], Iterable[Any]] | None = None,
    reduce_dtype: torch.dtype | None = None,
    broadcast: bool = True,
    **optim_kwargs: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """(model, optimizer) for training on every rank of `mesh`; the model is changed in place.

    optimizer_cls: of pykernels.optim or torch.optim; it is given optim_kwargs.
    stage: 3 shards parameters, gradients and state (FSDP2's `fully_shard`, resharding after forward); 2 keeps
    parameters gathered from a block's forward to its backward (reshard_after_forward=False); 1 keeps plain parameters,
    whole on every rank, and returns a `ReplicatedOptimizer`. Call it after the model is on its device and before any
    other optimizer is made: under stages 2 and 3 its parameters become DTensors.
    mesh: None for all ranks; one dimension, or two: replicas by shards (HSDP).
    offload: "optimizer" keeps master weights and state in host memory and updates them there (`OffloadedOptimizer`);
    "optimizer_zero_copy" keeps the state in pinned host memory that the GPU's kernel reads and writes directly;
    "parameters" keeps parameters, gradients and state in host memory (FSDP2's CPUOffloadPolicy; stages 2 and 3).
    units: the modules that FSDP2 gathers one at a time; None for the elements of the outermost ModuleLists. The model
    itself takes what is left.
    param_groups: a function of the model, once it is sharded, that gives the optimizer's groups; None for all
    parameters. reduce_dtype: gradients are reduced in it; None for their own dtype.
    broadcast: start from the parameters and buffers of the first rank.

    A model on which you called `fully_shard` yourself needs none of this: give its parameters to the optimizer.
    ValueError: a stage, offload or mesh outside these, no process group, a scalar parameter, one on the meta device, a
    model that is sharded already. Nothing is changed then.
    """
    _check(model, stage, mesh, offload)
    mesh = mesh if mesh is not None else init_device_mesh(_device_type(), (dist.get_world_size(),))
    if stage == 1:
        for name, p in model.named_parameters():
            if p.device.type != mesh.device_type:
                raise ValueError(f"zero: expected {name} on the mesh's {mesh.device_type}, got it on {p.device}")
    units = units_of(model) if units is None else _checked_units(model, units)
    # Refuses what the optimizer would refuse, before the model is changed.
    optimizer_cls([nn.Parameter(torch.empty(0))], **optim_kwargs)
    if broadcast:
        _broadcast(model, mesh)
    make: Inner = optimizer_cls
    if offload == "optimizer":
        make = partial(OffloadedOptimizer, optimizer_cls=optimizer_cls)
    elif offload == "optimizer_zero_copy":
        make = partial(zero_copy, optimizer_cls=optimizer_cls)
    groups = param_groups or nn.Module.parameters
    if stage == 1:
        return model, ReplicatedOptimizer(groups(model), make, mesh, reduce_dtype=reduce_dtype, **optim_kwargs)
    policy = OffloadPolicy()
    if offload == "parameters":
        policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    for module in (*units, model):
        fully_shard(
            module,
            mesh=mesh,
            # None is FSDP2's default: what is in no unit stays gathered after forward, as backward begins with it.
            reshard_after_forward=None if stage == 3 else False,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
            offload_policy=policy,
        )
    return model, make(groups(model), **optim_kwargs)


def _check(model: nn.Module, stage: int, mesh: DeviceMesh | None, offload: str | None) -> None:
    if stage not in (1, 2, 3):
        raise ValueError(f"zero: expected stage to be 1, 2 or 3, got {stage!r}")
    if offload not in OFFLOADS:
        raise ValueError(f"zero: expected offload to be one of {list(OFFLOADS)}, got {offload!r}")
    if stage == 1 and offload == "parameters":
        raise ValueError('zero: expected stage 2 or 3 with offload="parameters", got stage 1')
    if not dist.is_initialized():
        raise ValueError(
            "zero: there is no process group: start the script with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if mesh is not None and (not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2)):
        got = f"one of {mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise ValueError(f"zero: expected mesh to be a DeviceMesh of 1 or 2 dimensions or None, got {got}")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("zero: the model is sharded already: give its parameters to the optimizer")
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            raise ValueError(f"zero: expected plain parameters, got a DTensor for {name}")
        if p.dim() == 0:
            raise ValueError(f"zero: expected {name} to have 1 dimension or more, got a scalar: give it shape [1]")
        if p.is_meta:
            raise ValueError(
                f"zero: expected {name} to have values, got it on the meta device: use fully_shard, then "
                "to_empty, then give the parameters to the optimizer"
            )
        if not p.is_contiguous():
            raise ValueError(f"zero: expected {name} to be contiguous, got strides {list(p.stride())}")


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend() else "cpu"


def units_of(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost ModuleLists and ModuleDicts that have parameters and are called."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                visit(child, True)
            elif not listed:
                visit(child, False)
            elif next(child.parameters(), None) is not None and child not in found:
                found.append(child)

    visit(model, isinstance(model, (nn.ModuleList, nn.ModuleDict)))
    return found


def _checked_units(model: nn.Module, units: Iterable[nn.Module]) -> list[nn.Module]:
    chosen = list(units)
    names = {module: name for name, module in model.named_modules()}
    for module in chosen:
        if module not in names or module is model:
            raise ValueError(f"zero: expected units to be modules inside the model, got a {type(module).__name__}")
    # fully_shard goes from the inside out.
    return sorted(chosen, key=lambda module: names[module].count("."), reverse=True)


@torch.no_grad()
def _broadcast(model: nn.Module, mesh: DeviceMesh) -> None:
    """The first rank's values everywhere. A tensor elsewhere than the mesh's device goes through it."""
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().to(device)
        for dim in range(mesh.ndim):
            dist.broadcast(there, group=mesh.get_group(dim), group_src=0)
        tensor.copy_(there)
