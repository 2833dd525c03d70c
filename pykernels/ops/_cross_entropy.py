"""What the cross-entropies share: argument checks, the loss of a row from its statistics, and the reductions."""

import torch
from torch import Tensor

from ._checks import FLOATS, check, check_device, check_dtype

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: expected reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_options(op: str, label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    """Raises ValueError for values no formula stands for."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: expected label_smoothing to be within [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: expected z_loss to be finite and at least 0, got {z_loss}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{op}: expected softcap to be None or finite and above 0, got {softcap}")


def check_target_range(op: str, target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises ValueError on the CPU for a class that is neither ignore_index nor within [0, num_classes).

    On a GPU the values stay unseen, so that nothing waits for the device.
    """
    if target.device.type != "cpu" or torch.compiler.is_compiling() or target.numel() == 0:
        return
    low, high = target.aminmax()
    if int(low) >= 0 and int(high) < num_classes:
        return
    bad = target[(target != ignore_index) & ((target < 0) | (target >= num_classes))]
    if bad.numel():
        raise ValueError(
            f"{op}: expected target to be within [0, {num_classes}) or ignore_index ({ignore_index}), "
            f"got {int(bad.flatten()[0])}"
        )


def check_target(op: str, target: Tensor, shape: torch.Size, name: str, like: Tensor) -> None:
    """target is int64, one class for each row of `like`."""
    check_dtype(op, "target", target, torch.int64)
    check_device(op, "target", target, name, like)
    check(
        target.shape == shape,
        op,
        f"expected target to have shape {list(shape)}, one class for each row of {name}, got {list(target.shape)}",
    )


def check_weight(op: str, weight: Tensor | None, num_classes: int, name: str, like: Tensor) -> None:
    """Class weights are float32 (float64 beside float64), one for each class."""
    if weight is None:
        return
    check_dtype(op, "weight", weight, torch.float64 if like.dtype == torch.float64 else torch.float32)
    check_device(op, "weight", weight, name, like)
    check(
        weight.shape == (num_classes,),
        op,
        f"expected weight to have shape [{num_classes}], one value for each class, got {list(weight.shape)}",
    )


def check_arguments(op: str, logits: Tensor, target: Tensor, weight: Tensor | None, num_classes: int = 0) -> None:
    """logits [..., V] float, target [...] int64, weight [num_classes or V]."""
    check_dtype(op, "logits", logits, *FLOATS, torch.float64)
    check(
        logits.dim() >= 1 and logits.shape[-1] >= 1,
        op,
        f"expected logits to have shape [..., V] with V at least 1, got {list(logits.shape)}",
    )
    check_target(op, target, logits.shape[:-1], "logits", logits)
    check_weight(op, weight, num_classes or logits.shape[-1], "logits", logits)


def check_rows(op: str, name: str, rows: Tensor | None, target: Tensor, logits: Tensor) -> None:
    """float32 (float64 beside float64), one value for each row."""
    if rows is None:
        return
    check_dtype(op, name, rows, wide(logits.dtype))
    check_device(op, name, rows, "logits", logits)
    check(
        rows.shape == target.shape,
        op,
        f"expected {name} to have shape {list(target.shape)}, one value for each row, got {list(rows.shape)}",
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """What losses and their statistics are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def capped(logits: Tensor, softcap: float) -> Tensor:
    """z, the logits the loss is about, in the wide dtype."""
    z = logits.to(wide(logits.dtype))
    return softcap * torch.tanh(z / softcap) if softcap else z


def total_weight(weight: Tensor | None, num_classes: int) -> Tensor | float:
    return float(num_classes) if weight is None else weight.sum()


def row_losses(
    lse: Tensor,
    nll: Tensor,
    smooth: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    num_classes: int,
) -> Tensor:
    """The loss of each row from -log p[target] and smooth = sum of weight * -log p; 0 where ignored."""
    keep = target != ignore_index
    if weight is not None:
        nll = nll * weight[torch.where(keep, target, 0)]
    loss = nll * (1.0 - label_smoothing)
    if smooth is not None:
        loss = loss + smooth * (label_smoothing / num_classes)
    if z_loss:
        loss = loss + z_loss * lse * lse
    return torch.where(keep, loss, 0.0)


def check_backward(
    op: str,
    grad: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    num_classes: int = 0,
) -> None:
    check_arguments(op, logits, target, weight, num_classes)
    for name, rows in (("grad", grad), ("grad_lse", grad_lse), ("lse", lse)):
        check_rows(op, name, rows, target, logits)


def denominator(target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """What a mean divides by: the targets' weights added up, or 1 where every target is ignored. Never waits."""
    keep = target != ignore_index
    if weight is None:
        return keep.sum().clamp(min=1).to(dtype)
    total = torch.where(keep, weight[torch.where(keep, target, 0)], 0.0).sum(dtype=dtype)
    return torch.where(keep.any(), total, 1.0)


def reduce(loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / denominator(target, weight, ignore_index, loss.dtype)
