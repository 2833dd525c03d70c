"""cross_entropy_update_ and cross_entropy_backward_: cross-entropy over logits that exist one tile at a time.

A tile [N, tile] holds the classes first_class and on of N rows. update_ folds it into a running state, finish turns the
state into losses, and backward_ overwrites a tile with its gradient.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _library
from ._checks import check, check_device, check_dtype
from ._cross_entropy import capped, check_arguments, check_backward, row_losses, total_weight, wide
from .cross_entropy import BACKWARD, OPTIONS, gradient
from .cross_entropy import NAME as CROSS_ENTROPY

INPLACE = f"{CROSS_ENTROPY}_backward_"
INPLACE_SCHEMA = (
    f"{INPLACE}(Tensor grad, Tensor? grad_lse, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor lse, {OPTIONS},"
    " int first_class, int num_classes) -> ()"
)
UPDATE = f"{CROSS_ENTROPY}_update_"
UPDATE_SCHEMA = (
    f"{UPDATE}(Tensor(a!) state, Tensor logits, Tensor target, Tensor? weight, int ignore_index, float softcap,"
    " int first_class) -> ()"
)
STATE = 4  # columns of update_'s state: running maximum, sum of exp(z - maximum), z[target], sum of weight * z


def check_tile(op: str, logits: Tensor, first_class: int, num_classes: int) -> None:
    check(logits.dim() == 2, op, f"expected logits to have 2 dimensions, got {logits.dim()}")
    check(
        first_class >= 0 and first_class + logits.shape[1] <= num_classes,
        op,
        f"expected the {logits.shape[1]} columns of logits from class {first_class} on to be within {num_classes}",
    )


def inplace_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int,
    num_classes: int,
) -> None:
    check_tile(INPLACE, logits, first_class, num_classes)
    check_backward(INPLACE, grad, grad_lse, logits, target, weight, lse, num_classes)


def inplace_reference(
    grad: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    *rest: Any,
) -> None:
    inplace_fake(grad, grad_lse, logits, target, weight, lse, *rest)
    logits.copy_(gradient(grad, grad_lse, logits, target, weight, lse, *rest))


def update_fake(
    state: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    first_class: int,
) -> None:
    num_classes = first_class + logits.shape[-1] if weight is None else weight.shape[0]
    check_tile(UPDATE, logits, first_class, num_classes)
    check_arguments(UPDATE, logits, target, weight, num_classes)
    check_dtype(UPDATE, "state", state, wide(logits.dtype))
    check_device(UPDATE, "state", state, "logits", logits)
    check(
        state.shape == (target.shape[0], STATE) and state.is_contiguous(),
        UPDATE,
        f"expected state to be contiguous of shape [{target.shape[0]}, {STATE}], got {list(state.shape)}",
    )


def update_reference(
    state: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    first_class: int,
) -> None:
    update_fake(state, logits, target, weight, ignore_index, softcap, first_class)
    z = capped(logits, softcap)
    end = first_class + logits.shape[1]
    top = torch.maximum(state[:, 0], z.amax(1))
    total = state[:, 1] * torch.exp(state[:, 0] - top) + torch.exp(z - top.unsqueeze(1)).sum(1)
    keep = target != ignore_index
    here = keep & (target >= first_class) & (target < end)
    index = torch.where(here, target - first_class, 0).unsqueeze(1)
    on_target = torch.where(here, z.gather(1, index).squeeze(1), state[:, 2])
    weighted = state[:, 3] + (z if weight is None else z * weight[first_class:end]).sum(1)
    state.copy_(torch.where(keep.unsqueeze(1), torch.stack([top, total, on_target, weighted], 1), state))


def new_state(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state of update_ before the first tile."""
    state = like.new_zeros(rows, STATE, dtype=dtype)
    state[:, 0].fill_(torch.finfo(dtype).min)  # not -inf, whose difference from itself is NaN
    return state


def finish(
    state: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `cross_entropy` returns, from update_'s state after the last tile; lse is 0 where the target is ignored."""
    keep = target != ignore_index
    top, total, on_target, weighted = state.unbind(1)
    log_total = torch.log(total)
    lse = torch.where(keep, top + log_total, 0.0)
    smooth = total_weight(weight, num_classes) * lse - weighted if label_smoothing else None
    nll = log_total - (on_target - top)
    options = (ignore_index, label_smoothing, z_loss)
    loss = row_losses(lse, nll, smooth, target, weight, *options, num_classes)
    return loss, lse, keep & (on_target >= top)


_library.define(INPLACE_SCHEMA, inplace_reference, inplace_fake, triton=BACKWARD)
_library.define(UPDATE_SCHEMA, update_reference, update_fake, triton=CROSS_ENTROPY)
