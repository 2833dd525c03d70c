"""cross_entropy_backward: the gradient of logits from their logsumexp, in one read; also written over the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import as_rows, narrow
from .cross_entropy import block_of, tanh


@triton.jit
def _cross_entropy_backward(
    grad_ptr,
    grad_lse_ptr,
    logits_ptr,
    target_ptr,
    weight_ptr,
    weight_sum_ptr,
    lse_ptr,
    out_ptr,
    grad_stride,
    stride,
    out_stride,
    columns,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    first_class,
    num_classes,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = cols < columns
    target, lse = tl.load(target_ptr + row), tl.load(lse_ptr + row)
    keep = target != ignore_index
    grad = tl.where(keep, tl.load(grad_ptr + row * grad_stride), 0.0)
    weight, weight_sum = 1.0, num_classes * 1.0
    if weight_ptr is not None:
        inside = keep & (target >= 0) & (target < num_classes)
        weight, weight_sum = tl.load(weight_ptr + target, mask=inside, other=0.0), tl.load(weight_sum_ptr)
    on_target = grad * (1.0 - label_smoothing) * weight
    on_all = grad * (label_smoothing / num_classes)
    on_p = on_target + on_all * weight_sum + 2.0 * z_loss * lse * grad
    if grad_lse_ptr is not None:
        on_p += tl.where(keep, tl.load(grad_lse_ptr + row), 0.0)
    z = tl.load(logits_ptr + row * stride + cols, mask=live & keep, other=0.0).to(tl.float32)
    if CAP:
        unit = tanh(z / softcap)
        z = softcap * unit
    dz = tl.where(on_p == 0.0, 0.0, tl.exp(z - lse) * on_p)
    if SMOOTH:
        if weight_ptr is not None:
            dz -= on_all * tl.load(weight_ptr + first_class + cols, mask=live, other=0.0)
        else:
            dz -= on_all
    dz -= tl.where(first_class + cols == target, on_target, 0.0)
    if CAP:
        dz *= 1.0 - unit * unit
    tl.store(out_ptr + row * out_stride + cols, narrow(dz, out_ptr.dtype.element_ty), mask=live)


def _backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    rows: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    out: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int,
    num_classes: int,
) -> None:
    if out.numel() == 0:
        return
    block, warps = block_of(rows.shape[1])
    grad = grad if grad.dim() == 1 else grad.contiguous()
    with torch.cuda.device_of(rows):
        _cross_entropy_backward[(rows.shape[0] * triton.cdiv(rows.shape[1], block),)](
            grad,
            None if grad_lse is None else grad_lse.contiguous(),
            rows,
            target.contiguous(),
            None if weight is None else weight.contiguous(),
            None if weight is None else weight.sum(),
            lse.contiguous(),
            out,
            grad.stride(0) if grad.dim() == 1 else 1,
            rows.stride(0),
            out.stride(0),
            rows.shape[1],
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            first_class,
            num_classes,
            CAP=softcap != 0.0,
            SMOOTH=label_smoothing != 0.0,
            BLOCK=block,
            num_warps=warps,
        )


def cross_entropy_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> torch.Tensor:
    """The gradient of logits from those of loss and logsumexp, in the dtype of logits."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, options = as_rows(logits), (ignore_index, label_smoothing, z_loss, softcap)
    flat = out.view(rows.shape)
    _backward(grad, grad_lse, rows, target, weight, lse, flat, *options, 0, rows.shape[1])
    return out


def cross_entropy_backward_(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first_class: int,
    num_classes: int,
) -> None:
    """Writes the gradient over logits [N, columns], the classes first_class and on."""
    options = (ignore_index, label_smoothing, z_loss, softcap, first_class, num_classes)
    _backward(grad, grad_lse, logits, target, weight, lse, logits, *options)
