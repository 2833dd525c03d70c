"""optimizer_update_ and optimizer_norms: one launch for many tensors, with every number of the step read on the device.

A first kernel increases the steps and works out what depends on them, in float64; it and the second do nothing where
found_inf is set. A program of the second takes TILES tiles of GROUP blocks of one tensor; a block of 8-bit state has
its scale, other tensors are cut into blocks of the tile's size. An update is a few roundings in a fixed order, so
fusing multiply and add is turned off: the results are the reference's, bit for bit.
"""

from __future__ import annotations

import torch
import triton

from ._common import refuse
from ._optimizer_kernel import COEFFICIENTS, optimizer_step, prepare_step
from ._optimizer_launch import Call, call_of, on_device
from .tensor_norms import add_up

PREPARED = 128  # tensors a program of the first kernel takes
ADAM, LION, DECOUPLED = 0, 2, 2


def _coefficients(call: Call, algorithm: int, flags: int, update: bool, *rest: object) -> torch.Tensor:
    out = torch.empty(COEFFICIENTS, call.table.n, dtype=torch.float64, device=call.table.data.device)
    grid = (triton.cdiv(call.table.n, PREPARED),)
    prepare_step[grid](
        call.table.data, out, call.steps, *rest, call.table.n,
        ALGORITHM=algorithm, FLAGS=flags, UPDATE=update, BLOCK=PREPARED, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def optimizer_update_(
    algorithm: int,
    flags: int,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[torch.Tensor],
    scales: list[torch.Tensor],
    extras: list[torch.Tensor],
    steps: list[torch.Tensor],
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: int,
    seed: int,
    place: list[int],
    block_size: int,
    ratio: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    """See pykernels/ops/optimizer_update.py. `lr` may be on the host, but then a captured graph keeps its value."""
    if not params:
        return
    device = params[0].device
    with torch.cuda.device_of(params[0]):
        lists = (params, grads, states, scales, extras, steps)
        call = call_of(*lists, beta1, beta2, eps, weight_decay, rounding, seed, place, block_size)
        if call.steps is not None and found_inf is not None:
            refuse("steps", steps[0].device, f"on {device} with found_inf, which only the device knows")
        found_inf, grad_scale = on_device(found_inf, device), on_device(grad_scale, device)
        given = (lr, 0.0) if lr.device == device else (None, float(lr))
        coefficients = _coefficients(call, algorithm, flags, True, *given, ratio, found_inf)
        decoupled = weight_decay != 0.0 and (algorithm == LION or (algorithm == ADAM and bool(flags & DECOUPLED)))
        for group in call.table.groups:
            optimizer_step[(group.programs,)](
                call.table.data, coefficients, grad_scale, found_inf, None, call.table.n, group.first, group.count,
                ALGORITHM=algorithm, FLAGS=flags, DECOUPLED=decoupled, enable_fp_fusion=False,
                **call.constants(group),
            )  # fmt: skip
        if call.steps is not None:
            torch._foreach_add_(steps, 1.0)


def optimizer_norms(
    algorithm: int,
    flags: int,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[torch.Tensor],
    scales: list[torch.Tensor],
    extras: list[torch.Tensor],
    steps: list[torch.Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding: int,
    block_size: int,
    grad_scale: torch.Tensor | None,
) -> torch.Tensor:
    """[n, 2] float32: sums of squares of each parameter and of its next direction, in float64 and a fixed order."""
    device = params[0].device
    with torch.cuda.device_of(params[0]):
        lists = (params, grads, states, scales, extras, steps)
        call = call_of(*lists, beta1, beta2, eps, weight_decay, rounding, 0, [], block_size)
        grad_scale = on_device(grad_scale, device)
        out = torch.zeros(len(params), 2, dtype=torch.float64, device=device)
        coefficients = _coefficients(call, algorithm, flags, False, None, 0.0, None, None)
        for group in call.table.groups:
            partial = torch.empty(group.programs, 2, dtype=torch.float64, device=device)
            optimizer_step[(group.programs,)](
                call.table.data, coefficients, grad_scale, None, partial, call.table.n, group.first, group.count,
                ALGORITHM=algorithm, FLAGS=flags, DECOUPLED=False, enable_fp_fusion=False,
                **call.constants(group),
            )  # fmt: skip
            add_up(partial, out, call.table, group)
        return out.float()
