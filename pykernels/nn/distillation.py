"""Losses that train a student on a teacher's distribution."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F
from ..ops.distillation import DIVERGENCES, REDUCTIONS, check_values, divergence_of_beta, one_of
from ..ops.linear_kl_div import STRATEGIES


class _DistillationModule(nn.Module):
    """The options that both losses share."""

    def __init__(self, beta: float, temperature: float, hard_weight: float, ignore_index: int, reduction: str) -> None:
        super().__init__()
        name = type(self).__name__
        check_values(name, temperature, hard_weight)
        divergence_of_beta(name, beta)
        one_of(name, "reduction", reduction, REDUCTIONS)
        self.beta = beta
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.ignore_index = ignore_index
        self.reduction = reduction

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, temperature={self.temperature}, hard_weight={self.hard_weight}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


class DistillationLoss(_DistillationModule):
    """Knowledge distillation from logits: a soft loss against the teacher, mixed with cross-entropy on labels.

    ``(1 - hard_weight) * temperature**2 * D + hard_weight * cross_entropy``, after Hinton, Vinyals and Dean (2015).

    Args:
        divergence: ``"kl"`` (forward), ``"reverse_kl"``, ``"jsd"`` (with ``beta``) or ``"mse"``, the squared distance
            of the softened probabilities; ``functional.distillation_loss`` has the formulas.
        temperature: both logits are divided by it in the soft loss; positive.
        hard_weight: share of the cross-entropy, in [0, 1]; above 0 ``forward`` needs ``target``.
        ignore_index: a row with this label counts in neither part.
        reduction: ``"batchmean"``, ``"sum"`` or ``"none"``.

    Shapes: student and teacher logits [..., V], target int64 [...] -> float32 scalar, or [...] for ``"none"``.
    Saves references to its arguments for backward, nothing else. ValueError for an option out of range.
    """

    def __init__(
        self,
        divergence: str = "kl",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__(beta, temperature, hard_weight, ignore_index, reduction)
        one_of(type(self).__name__, "divergence", divergence, DIVERGENCES)
        self.divergence = divergence

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None) -> Tensor:
        return F.distillation_loss(
            student_logits,
            teacher_logits,
            target,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"divergence={self.divergence!r}, {super().extra_repr()}"


class LinearDistillationLoss(_DistillationModule):
    """The same from the last hidden states, through both models' output layers: no logits are ever held whole.

    Args:
        beta: of the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649); 0, the default, is
            KL(teacher || student), 1 is KL(student || teacher).
        strategy: ``None``, ``"forward"`` or ``"recompute"``; ``functional.linear_jsd`` says what each saves.
        temperature, hard_weight, ignore_index, reduction: as in ``DistillationLoss``.

    Shapes: input [..., H], weight [V, H]; teacher_input [..., Ht] and teacher_weight [V, Ht], or teacher_logits
    [..., V]; target int64 [...]. ValueError for an option out of range.
    """

    def __init__(
        self,
        beta: float = 0.0,
        *,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "batchmean",
        strategy: str | None = None,
    ) -> None:
        super().__init__(beta, temperature, hard_weight, ignore_index, reduction)
        if strategy not in STRATEGIES:
            raise ValueError(
                f"LinearDistillationLoss: expected strategy to be None, 'forward' or 'recompute', got {strategy!r}"
            )
        self.strategy = strategy

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        teacher_input: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        return F.linear_jsd(
            input,
            weight,
            teacher_input,
            teacher_weight,
            bias=bias,
            teacher_bias=teacher_bias,
            teacher_logits=teacher_logits,
            target=target,
            beta=self.beta,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            strategy=self.strategy,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, strategy={self.strategy!r}"
