"""linear_distillation: the last layers of a student and a teacher and the divergence between them, chunk by chunk."""

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd
from ._checks import FLOATS, check, check_device, check_dtype, check_vector
from ._vocabulary import Vocabulary, add_weight_gradient, chunks, compute_dtype
from .distillation import REDUCTIONS, SPEC, check_target, rows_that_count

NAME = "linear_distillation"
BACKWARD = f"{NAME}_backward"
_TENSORS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? teacher_input, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_logits, Tensor? target"
)
# gradients: the sum of INPUT, WEIGHT and BIAS to compute (in forward: with a gradient of 1 for the loss); a gradient
# that is not asked for is an empty tensor.
SCHEMA = f"{NAME}({_TENSORS}, {SPEC}, int reduction, int gradients) -> (Tensor, Tensor, Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, {_TENSORS}, {SPEC}, int reduction, int gradients) -> (Tensor, Tensor, Tensor)"
)
INPUT, WEIGHT, BIAS = 1, 2, 4
_ops = torch.ops.pykernels


def _check_linear(op: str, prefix: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in ((f"{prefix}input", x), (f"{prefix}weight", weight)):
        check_dtype(op, name, tensor, *FLOATS, torch.float64)
    check(x.dim() >= 1, op, f"expected {prefix}input to have at least 1 dimension, got 0")
    check_device(op, f"{prefix}weight", weight, f"{prefix}input", x)
    check(
        weight.dim() == 2 and weight.shape[1] == x.shape[-1] and weight.shape[0] > 0,
        op,
        f"expected {prefix}weight to have shape [V, {x.shape[-1]}] for {prefix}input {list(x.shape)}, "
        f"got {list(weight.shape)}",
    )
    if bias is not None:
        check_dtype(op, f"{prefix}bias", bias, *FLOATS, torch.float64)
        check_device(op, f"{prefix}bias", bias, f"{prefix}input", x)
        check_vector(op, f"{prefix}bias", bias, weight.shape[0], f"row of {prefix}weight")


def check_arguments(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    target: Tensor | None,
) -> None:
    """The student's and the teacher's layers agree on the rows and the vocabulary."""
    _check_linear(op, "", input, weight, bias)
    vocabulary = weight.shape[0]
    if teacher_logits is not None:
        check_dtype(op, "teacher_logits", teacher_logits, *FLOATS, torch.float64)
        check_device(op, "teacher_logits", teacher_logits, "input", input)
        wanted = [*input.shape[:-1], vocabulary]
        check(
            list(teacher_logits.shape) == wanted,
            op,
            f"expected teacher_logits to have shape {wanted}, got {list(teacher_logits.shape)}",
        )
    else:
        assert teacher_input is not None and teacher_weight is not None
        _check_linear(op, "teacher_", teacher_input, teacher_weight, teacher_bias)
        check_device(op, "teacher_input", teacher_input, "input", input)
        check(
            teacher_input.shape[:-1] == input.shape[:-1],
            op,
            f"expected teacher_input to have shape {[*input.shape[:-1], 'Ht']}, got {list(teacher_input.shape)}",
        )
        check(
            teacher_weight.shape[0] == vocabulary,
            op,
            f"expected teacher_weight to have the {vocabulary} rows (vocabulary) of weight, "
            f"got {teacher_weight.shape[0]}",
        )
    check_target(op, target, input, "input")


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _run(
    scale: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    target: Tensor | None,
    spec: tuple[Any, ...],
    gradients: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row [N], and the gradients of the sum of scale[row] * loss[row], in float32 or wider."""
    x, t, given = _flat(input), _flat(teacher_input), _flat(teacher_logits)
    assert x is not None
    labels = None if target is None else target.reshape(-1)
    rows, dtype = x.shape[0], compute_dtype(x, weight)
    wide = torch.promote_types(dtype, torch.float32)
    student = Vocabulary(weight, bias, dtype)
    teacher = None
    teacher_dtype = dtype
    if t is not None and teacher_weight is not None:
        teacher_dtype = compute_dtype(t, teacher_weight)
        teacher = Vocabulary(teacher_weight, teacher_bias, teacher_dtype)

    loss = x.new_zeros(rows, dtype=wide)
    grad_input = x.new_empty(x.shape if gradients & INPUT else 0)
    grad_weight = x.new_zeros(weight.shape if gradients & WEIGHT else 0, dtype=wide)
    grad_bias = x.new_zeros(weight.shape[0] if gradients & BIAS else 0, dtype=wide)
    vocabulary = weight.shape[0]
    parts = list(chunks(rows, vocabulary, max(dtype.itemsize, teacher_dtype.itemsize)))
    most = max((part.stop - part.start for part in parts), default=0)
    logits = x.new_empty((most, vocabulary), dtype=dtype)
    teacher_scratch = x.new_empty((most if teacher is not None else 0, vocabulary), dtype=teacher_dtype)
    for part in parts:
        n = part.stop - part.start
        x_part = x[part].to(dtype)
        chunk = student.logits(x_part, logits[:n])
        if teacher is None:
            assert given is not None
            other = given[part]
        else:
            assert t is not None
            other = teacher.logits(t[part].to(teacher_dtype), teacher_scratch[:n])
        label = None if labels is None else labels[part]
        if scale is None or not gradients:
            loss[part] = _ops.distillation_rows.default(chunk, other, label, *spec)
            continue
        loss[part] = _ops.distillation_rows_grad_.default(chunk, other, label, scale[part], *spec)
        if gradients & INPUT:
            grad_input[part] = student.grad_input(chunk)
        if gradients & WEIGHT:
            add_weight_gradient(grad_weight, chunk, x_part)
        if gradients & BIAS:
            grad_bias += chunk.sum(0, dtype=wide)
    return loss, grad_input.reshape(input.shape if gradients & INPUT else 0), grad_weight, grad_bias


def _row_scale(loss_like: Tensor, target: Tensor | None, ignore_index: int, reduction: int, rows: int) -> Tensor:
    """What the reduction multiplies each row's loss by."""
    scale = loss_like.new_ones(rows)
    if reduction == REDUCTIONS["batchmean"]:
        scale = scale / rows_that_count(target, rows, ignore_index)
    return scale


def reference(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, t, tw, tb, given, target, *spec, reduction, gradients = arguments
    tensors = (input, weight, bias, t, tw, tb, given, target)
    check_arguments(NAME, *tensors)
    rows, ignore_index = input.shape[:-1].numel(), spec[-1]
    like = input.new_empty(0, dtype=torch.promote_types(input.dtype, torch.float32))
    scale = _row_scale(like, target, ignore_index, reduction, rows)
    loss, *grads = _run(scale, *tensors, tuple(spec), gradients)
    if reduction == REDUCTIONS["none"]:
        return loss.reshape(input.shape[:-1]), grads[0], grads[1], grads[2]
    return (loss * scale).sum(), grads[0], grads[1], grads[2]


def fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, bias, t, tw, tb, given, target, *_, reduction, gradients = arguments
    check_arguments(NAME, input, weight, bias, t, tw, tb, given, target)
    wide = torch.promote_types(input.dtype, torch.float32)
    return (
        input.new_empty(input.shape[:-1] if reduction == REDUCTIONS["none"] else (), dtype=wide),
        input.new_empty(input.shape if gradients & INPUT else 0),
        input.new_empty(weight.shape if gradients & WEIGHT else 0, dtype=wide),
        input.new_empty(weight.shape[0] if gradients & BIAS else 0, dtype=wide),
    )


def backward_reference(grad: Tensor, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, t, tw, tb, given, target, *spec, reduction, gradients = arguments
    rows = input.shape[:-1].numel()
    scale = _row_scale(grad, target, spec[-1], reduction, rows) * grad.reshape(-1)
    _, *grads = _run(scale, input, weight, bias, t, tw, tb, given, target, tuple(spec), gradients)
    return (
        grads[0],
        grads[1].to(weight.dtype),
        grads[2] if bias is None else grads[2].to(bias.dtype),
    )


def backward_fake(grad: Tensor, input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, gradients = arguments[0], arguments[1], arguments[-1]
    return (
        input.new_empty(input.shape if gradients & INPUT else 0),
        input.new_empty(weight.shape if gradients & WEIGHT else 0, dtype=weight.dtype),
        input.new_empty(weight.shape[0] if gradients & BIAS else 0, dtype=grad.dtype if bias is None else bias.dtype),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _d, _b, _t, _h, _i, _r, gradients = inputs
    # Otherwise a zero gradient of [V, H] would be made for each output that is only kept.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.in_forward = bool(gradients)
    ctx.dtypes = [None if t is None else t.dtype for t in tensors[:3]]
    ctx.arguments = inputs[len(tensors) : -1]
    ctx.save_for_backward(*(output[1:] if gradients else tensors))


def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    rest = [None] * 12
    if grad is None:
        return None, None, None, *rest
    if not ctx.in_forward:
        gradients = sum(flag for flag, need in zip((INPUT, WEIGHT, BIAS), needs, strict=True) if need)
        found = _ops.linear_distillation_backward.default(grad, *ctx.saved_tensors, *ctx.arguments, gradients)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), *rest
    if torch.is_grad_enabled():
        refuse_second_backward(ctx)
    saved = zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
    # In place where autograd frees the graph behind us: a copy of weight's gradient is what this operator is to avoid.
    # A tracer's tensors are of other types, and a compiler decides by itself what is in place.
    scale = Tensor.mul_ if type(grad) is Tensor and not _keeps_graph() else torch.mul
    return *(scale(g, grad).to(dtype) if need else None for g, dtype, need in saved), *rest


def _keeps_graph() -> bool:
    """Whether the running backward was asked to retain its graph; True where this torch cannot say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(f"{NAME}: a second derivative is not defined; gradients are computed in closed form")


_library.define(SCHEMA, reference, fake, composite=True)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, refuse_second_backward)
