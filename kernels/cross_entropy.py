"""cross_entropy: losses and logsumexp of rows of logits in one read, of whole rows or of a tile of the classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import as_rows

BLOCK = 4096  # logits a program reads at a time
LOWEST = tl.constexpr(-3.4028234663852886e38)  # no logit yet; the distance from -inf to -inf would be NaN


@triton.jit
def tanh(x):
    a = tl.abs(x)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = (p * z - 3.33332819422e-1) * z * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def capped(x, softcap, CAP: tl.constexpr):
    """The logits the loss is about, in float32."""
    x = x.to(tl.float32)
    if CAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def _fold(logits, weight_ptr, columns, softcap, top, total, weighted, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Folds a row into its running maximum, sum of exp(z - maximum) and sum of weight * z."""
    for k0 in range(0, columns, BLOCK):
        cols = k0 + tl.arange(0, BLOCK)
        live = cols < columns
        z = capped(tl.load(logits + cols, mask=live, other=0.0), softcap, CAP)
        new_top = tl.maximum(top, tl.max(tl.where(live, z, LOWEST), axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.where(live, tl.exp(z - new_top), 0.0), axis=0)
        top = new_top
        if weight_ptr is not None:
            z = z * tl.load(weight_ptr + cols, mask=live, other=0.0)
        weighted += tl.sum(tl.where(live, z, 0.0), axis=0)
    return top, total, weighted


@triton.jit
def row_loss(top, total, z, weighted, weight, weight_sum, label_smoothing, z_loss, num_classes, SMOOTH: tl.constexpr):
    """(loss, logsumexp) from the statistics of a row; z is the target's logit and weight its class's."""
    log_total = tl.log(total)
    lse = top + log_total
    loss = (1.0 - label_smoothing) * weight * (log_total - (z - top)) + z_loss * lse * lse
    if SMOOTH:
        loss += label_smoothing / num_classes * (weight_sum * lse - weighted)
    return loss, lse


@triton.jit
def _cross_entropy(
    logits_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    loss_ptr,
    lse_ptr,
    correct_ptr,
    stride,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    columns = tl.where(target == ignore_index, 0, V)  # nothing to read
    logits = logits_ptr + row * stride
    top, zero = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    top, total, weighted = _fold(logits, weight_ptr, columns, softcap, top, zero, zero, CAP, BLOCK)
    here = (target >= 0) & (target < columns)
    z = capped(tl.load(logits + target, mask=here, other=0.0), softcap, CAP)
    weight, weight_sum = 1.0, V * 1.0
    if weight_ptr is not None:
        weight, weight_sum = tl.load(weight_ptr + target, mask=here, other=0.0), tl.load(weight_sum_ptr)
    loss, lse = row_loss(top, total, z, weighted, weight, weight_sum, label_smoothing, z_loss, V, SMOOTH)
    keep = columns > 0
    tl.store(loss_ptr + row, tl.where(keep, loss, 0.0))
    tl.store(lse_ptr + row, tl.where(keep, lse, 0.0))
    tl.store(correct_ptr + row, here & (z >= top))


@triton.jit
def _cross_entropy_update(
    state_ptr,
    logits_ptr,
    target_ptr,
    weight_ptr,
    stride,
    columns,
    ignore_index,
    softcap,
    first_class,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    columns = tl.where(target == ignore_index, 0, columns)
    logits, state = logits_ptr + row * stride, state_ptr + row * 4
    top, total, weighted = tl.load(state), tl.load(state + 1), tl.load(state + 3)
    if weight_ptr is not None:
        weight_ptr += first_class
    top, total, weighted = _fold(logits, weight_ptr, columns, softcap, top, total, weighted, CAP, BLOCK)
    column = target - first_class
    here = (column >= 0) & (column < columns)
    z = capped(tl.load(logits + column, mask=here, other=0.0), softcap, CAP)
    tl.store(state, top)
    tl.store(state + 1, total)
    tl.store(state + 2, z, mask=here)
    tl.store(state + 3, weighted)


def block_of(columns: int) -> tuple[int, int]:
    """Logits and warps of a program: 16 logits a thread."""
    block = min(BLOCK, triton.next_power_of_2(columns))
    return block, max(1, block // 512)


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [..., V] to (loss, logsumexp, whether no logit is above the target's), one each a row."""
    loss = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    lse, correct = torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)
    rows = as_rows(logits)
    block, warps = block_of(rows.shape[1])
    if loss.numel():
        with torch.cuda.device_of(logits):
            _cross_entropy[(rows.shape[0],)](
                rows,
                target.contiguous(),
                None if weight is None else weight.contiguous(),
                None if weight is None else weight.sum(),
                loss,
                lse,
                correct,
                rows.stride(0),
                rows.shape[1],
                ignore_index,
                label_smoothing,
                z_loss,
                softcap,
                CAP=softcap != 0.0,
                SMOOTH=label_smoothing != 0.0,
                BLOCK=block,
                num_warps=warps,
            )
    return loss, lse, correct


def cross_entropy_update_(
    state: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float,
    first_class: int,
) -> None:
    """Folds logits [N, columns] into state [N, 4]."""
    rows = as_rows(logits)
    block, warps = block_of(rows.shape[1])
    if target.numel():
        with torch.cuda.device_of(logits):
            _cross_entropy_update[(rows.shape[0],)](
                state,
                rows,
                target.contiguous(),
                None if weight is None else weight.contiguous(),
                rows.stride(0),
                rows.shape[1],
                ignore_index,
                softcap,
                first_class,
                CAP=softcap != 0.0,
                BLOCK=block,
                num_warps=warps,
            )
