"""distillation_rows: how far a student's logits are from a teacher's, row by row, and the student's gradient."""

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd
from ._checks import FLOATS, check, check_device, check_dtype, names_argument

NAME = "distillation_rows"
BACKWARD = f"{NAME}_backward"
INPLACE = f"{NAME}_grad_"
SPEC = "int divergence, float beta, float temperature, float hard_weight, int ignore_index"
SCHEMA = f"{NAME}(Tensor student, Tensor teacher, Tensor? target, {SPEC}) -> Tensor"
BACKWARD_SCHEMA = f"{BACKWARD}(Tensor grad, Tensor student, Tensor teacher, Tensor? target, {SPEC}) -> Tensor"
# The losses, with scale[row] * gradient written over the student's logits: what a chunked caller needs in one pass.
INPLACE_SCHEMA = f"{INPLACE}(Tensor(a!) student, Tensor teacher, Tensor? target, Tensor scale, {SPEC}) -> Tensor"

DIVERGENCES = {"kl": 0, "reverse_kl": 1, "jsd": 2, "mse": 3}
REDUCTIONS = {"none": 0, "batchmean": 1, "sum": 2}
_ops = torch.ops.pykernels


def check_rows(
    op: str, student: Tensor, teacher: Tensor, target: Tensor | None, divergence: int, beta: float, temperature: float
) -> None:
    """student and teacher [..., V], any two floating dtypes (float64 in the reference alone); target int64 [...]."""
    check_dtype(op, "student", student, *FLOATS, torch.float64)
    check_dtype(op, "teacher", teacher, *FLOATS, torch.float64)
    check(student.dim() >= 1, op, "expected student to have at least 1 dimension, got 0")
    check_device(op, "teacher", teacher, "student", student)
    check(
        teacher.shape == student.shape,
        op,
        f"expected teacher to have the shape of student, {list(student.shape)}, got {list(teacher.shape)}",
    )
    check(student.shape[-1] > 0, op, "expected student to have a vocabulary of at least 1, got 0")
    check_target(op, target, student, "student")
    check(divergence in DIVERGENCES.values(), op, f"expected divergence to be 0, 1, 2 or 3, got {divergence}")
    check(temperature > 0, op, f"expected temperature to be positive, got {temperature}")
    if divergence == DIVERGENCES["jsd"]:
        check(0 < beta < 1, op, f"expected beta to be inside (0, 1), got {beta}")


def check_target(op: str, target: Tensor | None, x: Tensor, name: str) -> None:
    """One int64 label for each row of x."""
    if target is None:
        return
    check_dtype(op, "target", target, torch.int64)
    check_device(op, "target", target, name, x)
    check(
        target.shape == x.shape[:-1],
        op,
        f"expected target to have shape {list(x.shape[:-1])}, one label for each row of {name}, "
        f"got {list(target.shape)}",
    )


def check_labels(op: str, target: Tensor | None, vocabulary: int, ignore_index: int) -> None:
    """Labels are classes or ignore_index. On a GPU reading them would stall it: the row's loss is NaN instead."""
    if target is None or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bool(bad.any()):
        found = int(target[bad][0])
        raise ValueError(
            f"{op}: expected target to be in [0, {vocabulary}) or ignore_index ({ignore_index}), got {found}"
        )


def _soft(student: Tensor, teacher: Tensor, divergence: int, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and its gradient to student / temperature, in the dtype of the arguments."""
    s, t = student / temperature, teacher / temperature
    if divergence == DIVERGENCES["reverse_kl"]:
        s = s.masked_fill(t == -torch.inf, -torch.inf)
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if divergence == DIVERGENCES["kl"]:
        return _weighted(p, log_p - log_q).sum(-1), q - p
    if divergence == DIVERGENCES["mse"]:
        difference = q - p
        slope = 2 * difference
        return difference.square().sum(-1), q * (slope - (q * slope).sum(-1, keepdim=True))
    if divergence == DIVERGENCES["reverse_kl"]:
        slope = log_q - log_p
        loss = _weighted(q, slope).sum(-1)
        return loss, _weighted(q, slope - loss.unsqueeze(-1))
    # With d = log(p / q) and the mixture m = beta p + (1 - beta) q, the smaller of log(m / p) and log(m / q) comes from
    # exp(-|d|), which cannot overflow and is exactly 0 where p = q; the other differs from it by d.
    d = torch.where((p == 0) & (q == 0), torch.zeros_like(p), log_p - log_q)
    below = d <= 0
    weight = torch.where(below, torch.full_like(d, beta), torch.full_like(d, 1 - beta))
    near = torch.log1p(weight * torch.expm1(-d.abs()))
    log_p_over_m = torch.where(below, d - near, -near)
    slope = torch.where(below, -near, -near - d)
    student_kl = _weighted(q, slope).sum(-1)
    loss = beta * _weighted(p, log_p_over_m).sum(-1) + (1 - beta) * student_kl
    return loss, (1 - beta) * _weighted(q, slope - student_kl.unsqueeze(-1))


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is, even if the value is infinite."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def _rows(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    divergence: int,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Losses [...] and their gradients to student [..., V], in float32 or, if student is, in float64."""
    check_labels(NAME, target, student.shape[-1], ignore_index)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(wide), teacher.to(wide)
    loss, grad = _soft(student, teacher, divergence, beta, temperature)
    loss = loss * ((1 - hard_weight) * temperature**2)
    grad = grad * ((1 - hard_weight) * temperature)
    if target is None:
        return loss, grad
    live = target != ignore_index
    if hard_weight != 0:
        label = torch.where(live, target, 0).unsqueeze(-1)
        log_q = student.log_softmax(-1)
        loss = loss - hard_weight * log_q.gather(-1, label).squeeze(-1)
        grad = grad + hard_weight * log_q.exp()
        grad = grad.scatter_add(-1, label, torch.full_like(label, -hard_weight, dtype=wide))
    return torch.where(live, loss, 0.0), torch.where(live.unsqueeze(-1), grad, 0.0)


def reference(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    divergence: int,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
) -> Tensor:
    check_rows(NAME, student, teacher, target, divergence, beta, temperature)
    return _rows(student, teacher, target, divergence, beta, temperature, hard_weight, ignore_index)[0]


def fake(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    divergence: int,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
) -> Tensor:
    check_rows(NAME, student, teacher, target, divergence, beta, temperature)
    return student.new_empty(student.shape[:-1], dtype=_wide(student))


def _wide(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _check_scale(op: str, name: str, scale: Tensor, student: Tensor) -> None:
    check_dtype(op, name, scale, _wide(student))
    check_device(op, name, scale, "student", student)
    check(
        scale.shape == student.shape[:-1],
        op,
        f"expected {name} to have shape {list(student.shape[:-1])}, one value for each row, got {list(scale.shape)}",
    )


def backward_reference(grad: Tensor, student: Tensor, teacher: Tensor, target: Tensor | None, *spec: Any) -> Tensor:
    check_rows(BACKWARD, student, teacher, target, *spec[:3])
    _check_scale(BACKWARD, "grad", grad, student)
    return (_rows(student, teacher, target, *spec)[1] * grad.unsqueeze(-1)).to(student.dtype)


def backward_fake(grad: Tensor, student: Tensor, teacher: Tensor, target: Tensor | None, *spec: Any) -> Tensor:
    check_rows(BACKWARD, student, teacher, target, *spec[:3])
    _check_scale(BACKWARD, "grad", grad, student)
    return student.new_empty(student.shape)


def inplace_reference(student: Tensor, teacher: Tensor, target: Tensor | None, scale: Tensor, *spec: Any) -> Tensor:
    check_rows(INPLACE, student, teacher, target, *spec[:3])
    _check_scale(INPLACE, "scale", scale, student)
    loss, grad = _rows(student, teacher, target, *spec)
    student.copy_(grad * scale.unsqueeze(-1))
    return loss


def inplace_fake(student: Tensor, teacher: Tensor, target: Tensor | None, scale: Tensor, *spec: Any) -> Tensor:
    check_rows(INPLACE, student, teacher, target, *spec[:3])
    _check_scale(INPLACE, "scale", scale, student)
    return student.new_empty(student.shape[:-1], dtype=_wide(student))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, target, *spec = inputs
    ctx.save_for_backward(student, teacher, target)
    ctx.spec = spec


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher, target = ctx.saved_tensors
    grad_student = None
    if ctx.needs_input_grad[0]:
        grad_student = _ops.distillation_rows_backward.default(grad, student, teacher, target, *ctx.spec)
    return grad_student, *[None] * 7


def refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(f"{NAME}: a second derivative is not defined; gradients are computed in closed form")


_library.define(SCHEMA, reference, fake, triton="distillation")
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, triton="distillation")
_library.define(INPLACE_SCHEMA, inplace_reference, inplace_fake, triton="distillation")
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, refuse_second_backward)


def one_of(op: str, name: str, got: object, table: dict[str, int]) -> int:
    """The number of a name; ValueError names what is accepted."""
    if not isinstance(got, str) or got not in table:
        raise ValueError(f"{op}: expected {name} to be one of {', '.join(map(repr, table))}, got {got!r}")
    return table[got]


def check_values(op: str, temperature: float, hard_weight: float) -> None:
    """The numbers that every form takes."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: expected temperature to be positive and finite, got {temperature}")
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"{op}: expected hard_weight to be in [0, 1], got {hard_weight}")


def check_hard(op: str, hard_weight: float, target: Tensor | None) -> None:
    """The hard part needs labels."""
    if hard_weight and target is None:
        raise ValueError(f"{op}: expected target for hard_weight {hard_weight}, got None")


def divergence_of_beta(op: str, beta: float) -> int:
    """The ends of the generalised JSD are the two KL divergences, by definition."""
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: expected beta to be in [0, 1], got {beta}")
    return DIVERGENCES["kl" if beta == 0 else "reverse_kl" if beta == 1 else "jsd"]


def rows_that_count(target: Tensor | None, rows: int, ignore_index: int) -> Tensor | int:
    """How many rows "batchmean" divides by, at least 1; on the device where labels decide it."""
    if target is None:
        return max(rows, 1)
    return (target != ignore_index).sum().clamp(min=1)


@names_argument
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    divergence: str = "kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:
    """(1 - hard_weight) * temperature**2 * D(p, q) + hard_weight * cross_entropy(student_logits, target).

    student_logits, teacher_logits: [..., V], each float32, bfloat16 or float16; target: int64 [...] -> float32 scalar,
    or [...] for reduction "none". p = softmax(teacher / temperature), q = softmax(student / temperature). divergence:

        "kl"          sum p log(p / q), forward KL (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)
        "reverse_kl"  sum q log(q / p), over the tokens that the teacher allows: where a teacher logit is -inf the
                      divergence would be infinite, so q is normalised over the other tokens
        "jsd"         beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: the generalised
                      Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv 2306.13649). beta = 0 is "kl" and
                      beta = 1 is "reverse_kl" by definition, as there; the limits of the formula are 0
        "mse"         sum (q - p)**2, the squared distance of the softened probabilities

    The factor temperature**2 keeps the size of the gradient (Hinton et al., section 2). A row whose target is
    ignore_index contributes nothing to either part, also with hard_weight 0. reduction: "batchmean" divides the sum by
    the number of rows that are not ignored, as in torch's kl_div, "sum", or "none". All rows ignored gives 0.
    Statistics are float32; no gradient flows to the teacher.

    Saved for backward: references to both logits and target, nothing else. Errors, before anything runs: ValueError
    for a value and on the CPU for a label out of range (on a GPU its loss is NaN), RuntimeError for a dtype, shape or
    device. NotImplementedError for a second derivative.
    """
    op = "distillation_loss"
    check_values(op, temperature, hard_weight)
    check_hard(op, hard_weight, target)
    kind = one_of(op, "divergence", divergence, DIVERGENCES)
    code = one_of(op, "reduction", reduction, REDUCTIONS)
    if divergence == "jsd":
        kind = divergence_of_beta(op, beta)
    spec = (kind, beta, temperature, hard_weight, ignore_index)
    check_rows(op, student_logits, teacher_logits, target, *spec[:3])
    check_labels(op, target, student_logits.shape[-1], ignore_index)
    loss = _ops.distillation_rows.default(student_logits, teacher_logits.detach(), target, *spec)
    if code == REDUCTIONS["none"]:
        return loss
    total = loss.sum()
    return total if code == REDUCTIONS["sum"] else total / rows_that_count(target, loss.numel(), ignore_index)
