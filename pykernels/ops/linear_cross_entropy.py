"""linear_cross_entropy: the loss of input @ weight.T + bias, whose logits exist one tile at a time.

After "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al., arXiv 2411.09009), which recomputes logits
in backward, and Liger Kernel (arXiv 2410.10989), which takes the gradients in the forward pass.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd
from ._autocast import autocast
from ._checks import check, names_argument
from ._chunks import product_dtype, wide_dtype
from ._cross_entropy import check_options, check_reduction, check_target, check_target_range, reduce
from ._linear_cross_entropy import BACKWARD, GRADIENTS, NAME, Three, check_arguments, forward, gradients, recompute
from .cross_entropy import OPTIONS

SCHEMA = f"{NAME}(Tensor input, Tensor weight, Tensor target, Tensor? bias, {OPTIONS}) -> (Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor lse, {OPTIONS}, "
    "bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)"
)
GRADIENTS_SCHEMA = (
    f"{GRADIENTS}(Tensor input, Tensor weight, Tensor target, Tensor? bias, {OPTIONS}, bool mean, "
    "bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
STRATEGIES = (None, "forward", "recompute")
AFFORDABLE_BYTES = 32 << 20
_ops = torch.ops.pykernels


def fake(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *_: object) -> Three:
    check_arguments(NAME, input, weight, target, bias)
    loss = input.new_empty(target.shape, dtype=wide_dtype(input))
    return loss, torch.empty_like(loss), input.new_empty(target.shape, dtype=torch.bool)


def _empty_gradients(input: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool, needs_bias: bool) -> Three:
    grad_input = input.new_empty(input.shape if needs_input else 0)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    return grad_input, grad_weight, weight.new_empty(weight.shape[:1] if needs_bias else 0)


def recompute_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    *needs: bool,
) -> Three:
    check_arguments(BACKWARD, input, weight, target, bias)
    return _empty_gradients(input, weight, *needs)


def gradients_fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    mean: bool,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, lse, correct = fake(input, weight, target, bias)
    return loss.new_empty(()), lse, correct, *_empty_gradients(input, weight, *needs)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    input, weight, target, bias, *ctx.options = inputs
    ctx.save_for_backward(input, weight, target, bias, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
    if grad is None or not any(needs):
        return (None,) * 8
    results = _ops.linear_cross_entropy_backward.default(grad.contiguous(), *ctx.saved_tensors, *ctx.options, *needs)
    to_input, to_weight, to_bias = (g if wanted else None for g, wanted in zip(results, needs, strict=True))
    return to_input, to_weight, None, to_bias, *[None] * 4


def setup_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[-3:]
    ctx.save_for_backward(*(g if wanted else None for g, wanted in zip(output[3:], ctx.needs, strict=True)))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    # Without retain_graph nobody asks for the saved gradients again: they are scaled where they lie and given away. A
    # compiler's stand-ins are left alone: it sees what is written to, and reuses memory by itself.
    give = type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    # On the CPU it costs nothing to see that there is nothing to scale (loss.backward()).
    one = give and grad.device.type == "cpu" and float(grad) == 1.0
    scaled: list[Tensor | None] = []
    for g in ctx.saved_tensors:
        if g is None or one:
            scaled.append(g)
        else:
            scaled.append(g.mul_(grad) if give else g * grad)  # grad stays wide: float16 ends below a scale of 2**16
    to_input, to_weight, to_bias = scaled
    return to_input, to_weight, None, to_bias, *[None] * 8


def refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(f"{NAME}: second derivatives are not implemented: use linear and cross_entropy of torch")


_library.define(SCHEMA, forward, fake, composite=True, triton=NAME)  # its kernel never writes a logit
_library.define(BACKWARD_SCHEMA, recompute, recompute_fake, composite=True)
_library.define(GRADIENTS_SCHEMA, gradients, gradients_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(GRADIENTS, backward_gradients, setup_gradients)
_autograd.register(BACKWARD, refuse_second_backward)


def default_strategy(input: Tensor, weight: Tensor, reduction: str) -> str:
    """ "forward" where it needs no more than AFFORDABLE_BYTES beyond the gradients themselves, else "recompute"."""
    # In float16 a gradient that the loss scale has not reached yet would underflow.
    if reduction == "none" or input.dtype == torch.float16:
        return "recompute"
    sums = weight.requires_grad and wide_dtype(input) != weight.dtype
    copies = product_dtype(input) != weight.dtype
    return "forward" if weight.numel() * 4 * (sums + copies) <= AFFORDABLE_BYTES else "recompute"


@names_argument
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    return_lse: bool = False,
    return_accuracy: bool = False,
    strategy: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """cross_entropy(linear(input, weight, bias), target) whose logits exist one tile at a time, forward and backward.

    input [..., H], weight [V, H] and bias [V] of one dtype: float32, bfloat16 or float16; target [...] int64 -> a
    float32 scalar, or float32 [...] with reduction "none". The loss is that of `cross_entropy`, which says what
    ignore_index, label_smoothing, z_loss and softcap mean. Where every target is ignored the loss and all gradients
    are 0.

    shift: position t predicts target t + 1: input [..., S, H] and target [..., S] as they are, no slice and no copy of
    input; results have S - 1 positions.
    return_lse: also logsumexp of the logits, float32, one a position, 0 where ignored; detached.
    return_accuracy: also the share of counted positions whose target has the largest logit (a tie counts), a float32
    scalar. The result is then a tuple: loss, lse, accuracy, those that were asked for.

    strategy, with N positions (S - 1 become S under shift) and b bytes an element:

        "recompute"  backward makes the logits again: four products for three. Saved: input, weight, bias and target by
                     reference, 4 bytes a position, and 4 bytes with "mean".
        "forward"    the gradients are made in the forward pass, "mean" and "sum" only. Saved: b * N * H (gradient of
                     input) + b * V * H (of weight) + b * V (of bias), each only where it is wanted, and nothing else.
        None         "forward" if it needs at most 32 MiB beyond the gradients themselves, else "recompute". Beyond the
                     gradients it needs 4 * V * H of sums where weight is 16 bits wide, and as much again on a CPU that
                     has no bfloat16 products; nothing for float32. "none" always recomputes, and so does float16, whose
                     gradients would underflow in the forward pass, before the loss scale reaches them.

    At work: one tile of logits (32 MiB; 56 MiB for "forward" in float32), and in 16 bits the float32 sums: of the
    gradient of input, 4 * N * H, and of a tile of that of weight. On the CPU ignored positions cost nothing. Under
    autocast input, weight and bias are cast as linear would cast them. A second backward through a graph that was
    retained works with both strategies; without retain_graph "forward" gives the saved gradients away, and autograd
    refuses a second backward as it always does.

    Errors, before anything runs: ValueError for an option outside its range, an unknown reduction or strategy,
    strategy="forward" with reduction "none", and on the CPU a target out of range; RuntimeError for a wrong dtype,
    shape or device. NotImplementedError for a second derivative.
    """
    check_reduction(NAME, reduction)
    check_options(NAME, label_smoothing, z_loss, softcap)
    if strategy not in STRATEGIES:
        raise ValueError(f"{NAME}: expected strategy to be None, 'forward' or 'recompute', got {strategy!r}")
    if strategy == "forward" and reduction == "none":
        raise ValueError(f"{NAME}: expected strategy to be None or 'recompute' with reduction 'none', got 'forward'")
    check(
        input.dim() >= 1 + shift, NAME, f"expected input to have shape [..., {'S, ' * shift}H], got {list(input.shape)}"
    )
    check_target(NAME, target, input.shape[:-1], "input", input)
    input, weight, bias = autocast(input), autocast(weight), None if bias is None else autocast(bias)
    shape = target.shape
    if shift:
        target = torch.cat([target[..., 1:], torch.full_like(target[..., :1], ignore_index)], -1)
    rows, flat = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)
    check_arguments(NAME, rows, weight, flat, bias)
    check_target_range(NAME, flat, weight.shape[0], ignore_index)

    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (rows, weight, bias)]
    if any(needs) and (strategy or default_strategy(rows, weight, reduction)) == "forward":
        mean = reduction == "mean"
        loss, lse, correct, *_ = _ops.linear_cross_entropy_gradients.default(
            rows, weight, flat, bias, *options, mean, *needs
        )
    else:
        loss, lse, correct = _ops.linear_cross_entropy.default(rows, weight, flat, bias, *options)
        loss = reduce(loss, flat, None, ignore_index, reduction)

    def positions(values: Tensor) -> Tensor:
        return values.view(shape)[..., : shape[-1] - 1] if shift else values.view(shape)

    results = [positions(loss) if reduction == "none" else loss]
    if return_lse:
        results.append(positions(lse))
    if return_accuracy:
        results.append(correct.sum() / (flat != ignore_index).sum().clamp(min=1))
    return results[0] if len(results) == 1 else tuple(results)
