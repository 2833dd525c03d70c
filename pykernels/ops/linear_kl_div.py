"""linear_kl_div and linear_jsd: the functions people call on linear_distillation."""

import torch
from torch import Tensor

from ._autocast import autocast
from ._checks import names_argument
from .distillation import (
    DIVERGENCES,
    REDUCTIONS,
    check_hard,
    check_labels,
    check_values,
    divergence_of_beta,
    one_of,
)
from .linear_distillation import BIAS, INPUT, WEIGHT, check_arguments

STRATEGIES = (None, "forward", "recompute")
# Above this the float32 gradient of weight is not held from forward to backward unless asked for.
FORWARD_BYTES = 1 << 30
_ops = torch.ops.pykernels


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _call(
    op: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    target: Tensor | None,
    divergence: int,
    beta: float,
    temperature: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
    strategy: str | None,
) -> Tensor:
    check_values(op, temperature, hard_weight)
    check_hard(op, hard_weight, target)
    code = one_of(op, "reduction", reduction, REDUCTIONS)
    if strategy not in STRATEGIES:
        raise ValueError(f"{op}: expected strategy to be None, 'forward' or 'recompute', got {strategy!r}")
    if strategy == "forward" and code == REDUCTIONS["none"]:
        raise ValueError(f"{op}: expected strategy 'recompute' (or None) for reduction 'none', got 'forward'")
    teacher_input, teacher_weight, teacher_bias, teacher_logits = teacher
    if (teacher_logits is None) == (teacher_input is None) or (teacher_input is None) != (teacher_weight is None):
        found = [
            name
            for name, value in zip(
                ("teacher_input", "teacher_weight", "teacher_logits"), (*teacher[:2], teacher[3]), strict=True
            )
            if value is not None
        ]
        raise ValueError(
            f"{op}: expected either teacher_input and teacher_weight or teacher_logits, "
            f"got {' and '.join(found) or 'none of them'}"
        )
    if teacher_bias is not None and teacher_weight is None:
        raise ValueError(f"{op}: expected teacher_bias only with teacher_weight, got it with teacher_logits")
    check_arguments(op, input, weight, bias, *teacher, target)
    check_labels(op, target, weight.shape[0], ignore_index)

    input, teacher_input = autocast(input), None if teacher_input is None else autocast(teacher_input)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, weight, bias)]
    # In float16 a gradient that the loss scale has not reached yet would underflow.
    suits = weight.numel() * 4 <= FORWARD_BYTES and code != REDUCTIONS["none"] and input.dtype != torch.float16
    in_forward = strategy == "forward" or (strategy is None and suits)
    gradients = sum(flag for flag, need in zip((INPUT, WEIGHT, BIAS), needs, strict=True) if need) if in_forward else 0
    return _ops.linear_distillation.default(
        input,
        weight,
        bias,
        _detached(teacher_input),
        _detached(teacher_weight),
        _detached(teacher_bias),
        _detached(teacher_logits),
        target,
        divergence,
        beta,
        temperature,
        hard_weight,
        ignore_index,
        code,
        gradients,
    )[0]


@names_argument
def linear_kl_div(
    input: Tensor,
    weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    target: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    strategy: str | None = None,
) -> Tensor:
    """As linear_jsd with beta = 0, KL(teacher || student), or with reverse=True beta = 1, KL(student || teacher)."""
    teacher = (teacher_input, teacher_weight, teacher_bias, teacher_logits)
    kind = DIVERGENCES["reverse_kl" if reverse else "kl"]
    numbers = (kind, float(reverse), temperature, hard_weight, ignore_index)
    return _call("linear_kl_div", input, weight, bias, teacher, target, *numbers, reduction, strategy)


@names_argument
def linear_jsd(
    input: Tensor,
    weight: Tensor,
    teacher_input: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    target: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    strategy: str | None = None,
) -> Tensor:
    """distillation_loss of linear(input, weight, bias) against a teacher, without holding the logits of either.

    (1 - hard_weight) * temperature**2 * D(p, q) + hard_weight * cross_entropy, with the generalised Jensen-Shannon
    divergence of GKD (Agarwal et al. 2023, arXiv 2306.13649): D = beta KL(p || m) + (1 - beta) KL(q || m), where
    p = softmax(teacher / temperature), q = softmax(student / temperature) and m = beta p + (1 - beta) q. beta = 0 is
    KL(p || q) and beta = 1 is KL(q || p) by definition (the limits of the formula itself are 0).
    functional.distillation_loss says the rest: -inf teacher logits, ignored rows, reduction.

    Shapes: input [..., H], weight [V, H], bias [V]; the teacher is teacher_input [..., Ht], teacher_weight [V, Ht] and
    teacher_bias [V], or teacher_logits [..., V]; target int64 [...] -> float32 scalar, or [...] for reduction "none".
    Any of them may be float32, bfloat16 or float16. Gradients go to input, weight and bias, each in its own dtype; the
    teacher is frozen. Under autocast both inputs are cast as torch.nn.functional.linear would cast them.

    The logits exist for one chunk of tokens at a time, at most 32 MiB each for student and teacher (or one row), in
    forward and in backward. 16-bit products run in float32 on a CPU that has none of its own, with 16 MiB of scratch
    for a block of the weight. Saved for backward, in bytes, with N rows:

        strategy "forward"    N*H*itemsize (gradient of input) + 4*V*H (of weight, float32) + 4*V (of bias), each
                              only if wanted: the gradients are computed in forward, in 4 products of N*V*H
        strategy "recompute"  nothing but references to the arguments: 6 products, because backward computes both
                              logits again; it needs no statistics, since a chunk's gradient finds its own

    strategy None takes "forward" where float32 gradients of weight take at most 1 GiB, and "recompute" above that, for
    reduction "none", whose upstream gradients are not known in forward, and for a float16 input, whose gradients would
    underflow before the loss scale reaches them. Both need float32 sums of the weight's gradient at work. A second
    backward works with retain_graph=True; without it "forward" scales the saved gradients in place. Nothing waits for
    the device.

    Errors, before anything runs: ValueError for a value (temperature, beta, hard_weight, reduction, strategy, both or
    neither of teacher_input and teacher_logits) and on the CPU for a label out of range (on a GPU its loss is NaN),
    RuntimeError for a dtype, shape or device. NotImplementedError for a second derivative.
    """
    teacher = (teacher_input, teacher_weight, teacher_bias, teacher_logits)
    numbers = (divergence_of_beta("linear_jsd", beta), beta, temperature, hard_weight, ignore_index)
    return _call("linear_jsd", input, weight, bias, teacher, target, *numbers, reduction, strategy)
