"""cross_entropy: softmax cross-entropy on class indices that keeps the logits and one number a row for backward."""

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd
from ._checks import names_argument
from ._cross_entropy import (
    capped,
    check_arguments,
    check_backward,
    check_options,
    check_reduction,
    check_target_range,
    reduce,
    row_losses,
    total_weight,
    wide,
)

NAME = "cross_entropy"
OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"
SCHEMA = f"{NAME}(Tensor logits, Tensor target, Tensor? weight, {OPTIONS}) -> (Tensor, Tensor, Tensor)"
BACKWARD = f"{NAME}_backward"
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, Tensor? grad_lse, Tensor logits, Tensor target, Tensor? weight, Tensor lse, {OPTIONS})"
    " -> Tensor"
)
_ops = torch.ops.pykernels


def reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(NAME, logits, target, weight)
    check_target_range(NAME, target, logits.shape[-1], ignore_index)
    z = capped(logits, softcap)
    keep = target != ignore_index
    lse = torch.where(keep, torch.logsumexp(z, -1), 0.0)
    log_p = torch.log_softmax(z, -1)
    index = torch.where(keep, target, 0).unsqueeze(-1)
    smooth = None
    if label_smoothing:
        smooth = -(log_p if weight is None else log_p * weight).sum(-1)
    nll = -log_p.gather(-1, index).squeeze(-1)
    loss = row_losses(lse, nll, smooth, target, weight, ignore_index, label_smoothing, z_loss, logits.shape[-1])
    correct = keep & (z.gather(-1, index).squeeze(-1) >= z.amax(-1))
    return loss, lse, correct


def fake(logits: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    check_arguments(NAME, logits, target, weight)
    loss = logits.new_empty(target.shape, dtype=wide(logits.dtype))
    return loss, torch.empty_like(loss), logits.new_empty(target.shape, dtype=torch.bool)


def gradient(
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
) -> Tensor:
    """The gradient of logits[..., first_class :] in the wide dtype.

    With w the class weights, W their sum, t the target and s = label_smoothing,
        d loss / d z[c] = ((1 - s) w[t] + s W / V + 2 z_loss lse) p[c] - (1 - s) w[t] [c = t] - s w[c] / V.
    """
    z = capped(logits, softcap)
    keep = target != ignore_index
    grad = torch.where(keep, grad, 0.0)
    w = 1.0 if weight is None else weight[torch.where(keep, target, 0)]
    on_target = grad * (1.0 - label_smoothing) * w
    on_all = grad * (label_smoothing / num_classes)
    on_p = on_target + on_all * total_weight(weight, num_classes) + 2.0 * z_loss * lse * grad
    if grad_lse is not None:
        on_p = on_p + torch.where(keep, grad_lse, 0.0)
    live = (keep & (on_p != 0)).unsqueeze(-1)
    dz = torch.where(live, torch.exp(z - lse.unsqueeze(-1)) * on_p.unsqueeze(-1), 0.0)
    if label_smoothing:
        tile = 1.0 if weight is None else weight[first_class : first_class + logits.shape[-1]]
        dz = dz - on_all.unsqueeze(-1) * tile
    classes = torch.arange(first_class, first_class + logits.shape[-1], device=logits.device)
    dz = dz - torch.where(classes == target.unsqueeze(-1), on_target.unsqueeze(-1), 0.0)
    return dz * (1.0 - torch.tanh(logits.to(z.dtype) / softcap) ** 2) if softcap else dz


def backward_reference(
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
) -> Tensor:
    check_backward(BACKWARD, grad, grad_lse, logits, target, weight, lse)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    dz = gradient(grad, grad_lse, logits, target, weight, lse, *options, 0, logits.shape[-1])
    return dz.to(logits.dtype).contiguous()


def backward_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    *_: object,
) -> Tensor:
    check_backward(BACKWARD, grad, grad_lse, logits, target, weight, lse)
    return logits.new_empty(logits.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, target, weight, output[1])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    logits, target, weight, lse = ctx.saved_tensors
    result = None
    if ctx.needs_input_grad[0] and not (grad is None and grad_lse is None):
        grad = torch.zeros_like(lse) if grad is None else grad
        result = _ops.cross_entropy_backward.default(grad, grad_lse, logits, target, weight, lse, *ctx.options)
    return result, *[None] * 6


def refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("cross_entropy: second derivatives are not implemented: use torch's cross_entropy")


_library.define(SCHEMA, reference, fake)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, refuse_second_backward)


@names_argument
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """torch.nn.functional.cross_entropy on class indices, in float32 whatever the dtype of logits.

    logits [..., V] float32, bfloat16 or float16 (classes last, any row stride); target [...] int64; weight float32 [V],
    a factor for each class -> a float32 scalar, or float32 [...] with reduction "none". The formulas are torch's, class
    weights with label smoothing and "mean" (divided by the sum of the targets' weights) included. It differs in two
    things: bfloat16 and float16 logits give a float32 loss, and a mean over no target at all is 0, not NaN.

    softcap: the loss is that of softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
    z_loss: adds z_loss * logsumexp(logits)**2 to each row (PaLM, arXiv 2204.02311), not scaled by class weights.

    Saved for backward: logits, target and weight by reference, 4 bytes a row (logsumexp), and with "mean" 4 bytes.
    grad_logits is computed in float32 and rounded once to the dtype of logits.

    Errors, before anything runs: ValueError for label_smoothing outside [0, 1], a negative z_loss, a softcap that is
    not positive, an unknown reduction, and on the CPU a target out of range (on a GPU, where a
    check would wait for the device, such a row's loss means nothing); RuntimeError for a wrong dtype, shape or device.
    NotImplementedError for a second derivative.
    """
    check_reduction(NAME, reduction)
    check_options(NAME, label_smoothing, z_loss, softcap)
    check_arguments(NAME, logits, target, weight)
    check_target_range(NAME, target, logits.shape[-1], ignore_index)
    loss, _, _ = _ops.cross_entropy.default(
        logits, target, weight, ignore_index, label_smoothing, z_loss, softcap or 0.0
    )
    return reduce(loss, target, weight, ignore_index, reduction)
