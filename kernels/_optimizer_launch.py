"""What optimizer_update_ and optimizer_norms pass to their kernels: the table of a call and its constants."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _tensor_table as tables
from ._common import refuse

TILE = 1024  # elements a program holds at a time
TILES = 4  # tiles a program goes through: the search for its tensor is paid once for them
MAX_BLOCK = 4096
SLOTS = 3
STOCHASTIC = 1
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
# Fields of the table after the first program; kernels name them in the same order.
FIELDS = ("index", "blocks", "per_row", "columns", "stream", "start", "row_stride", "step", "p", "g", "extra")
FIELDS += ("s0", "s1", "s2", "c0", "c1", "c2")


class Call(NamedTuple):
    table: tables.Table
    steps: torch.Tensor | None  # copies on the device of steps that are on the host
    shared_constants: dict[str, Any]

    def constants(self, group: tables.Group) -> dict[str, Any]:
        # Single elements take an address each, so that a thread holds half as many.
        warps = max(4, self.shared_constants["BLOCK"] // 512) * (1 if group.aligned else 2)
        return {**self.shared_constants, "ALIGNED": group.aligned, "num_warps": warps}


def call_of(
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
    seed: int,
    place: list[int],
    block_size: int,
) -> Call:
    if scales and block_size > MAX_BLOCK:
        refuse("block_size", block_size, f"at most {MAX_BLOCK} for the Triton kernel")
    n, device = len(params), params[0].device
    host_steps = _host_steps(steps, device)
    block = triton.next_power_of_2(block_size) if scales else TILE
    each = block_size if scales else TILE
    group = max(1, TILE // block)
    p_type = params[0].dtype
    random = bool(scales) or any(s.dtype == torch.bfloat16 for s in states[::n])
    random |= rounding == STOCHASTIC and p_type == torch.bfloat16
    entries, programs, aligned = [], [], []
    for i, p in enumerate(params):
        rest = p.numel() // max(1, p.shape[0]) if p.dim() > 1 else p.numel()
        stream, start, row_stride = place[3 * i : 3 * i + 3] or (i, 0, rest)
        whole = p.dim() < 2 or (not scales and (not random or row_stride == rest))
        rows, columns = (1, p.numel()) if whole else (p.shape[0], rest)
        per_row = -(-columns // each)
        kept, kept_scales = _addresses(states[i::n]), _addresses(scales[i::n])
        extra = extras[i].data_ptr() if extras else 0
        step = 0 if host_steps is not None else steps[i].data_ptr()
        entries.append(
            (
                i,
                rows * per_row,
                max(1, per_row),
                columns,
                stream,
                start,
                row_stride,
                step,
                p.data_ptr(),
                grads[i].data_ptr(),
                extra,
                *kept,
                *kept_scales,
            )
        )
        programs.append(-(-rows * per_row // (group * TILES)))
        divisible = columns % 16 == 0 and each % 16 == 0
        aligned.append(divisible and all(a % 16 == 0 for a in (p.data_ptr(), grads[i].data_ptr(), extra, *kept)))
    doubles = torch.tensor([beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, weight_decay], dtype=torch.float64)
    numbers = (_int64(seed), *doubles.view(torch.int64).tolist())
    kinds = [TYPES[s.dtype] for s in states[::n]] + [None] * SLOTS
    return Call(
        tables.build(device, entries, programs, aligned, numbers),
        host_steps,
        {
            "P": TYPES[p_type],
            "G": TYPES[grads[0].dtype],
            "E": TYPES[extras[0].dtype] if extras else None,
            "S0": kinds[0],
            "S1": kinds[1],
            "S2": kinds[2],
            "WIDE": tl.float64 if p_type == torch.float64 else tl.float32,
            "ROUNDING": rounding,
            "DECAY": weight_decay != 0.0,
            "EACH": each,
            "BLOCK": block,
            "GROUP": group,
            "TILES": TILES,
        },
    )


def _addresses(states: list[torch.Tensor]) -> list[int]:
    return [state.data_ptr() for state in states] + [0] * (SLOTS - len(states))


def _int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


def _host_steps(steps: list[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    if steps[0].device == device:
        return None
    if torch.cuda.is_current_stream_capturing():
        refuse("steps", steps[0].device, f"on {device} in a captured graph")
    joined = torch.stack([step.reshape(()) for step in steps])
    return joined.pin_memory().to(device, non_blocking=True)


def on_device(scalar: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A scalar where the kernel can read it."""
    return scalar if scalar is None or scalar.device == device else scalar.to(device, non_blocking=True)
