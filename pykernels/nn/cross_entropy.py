"""CrossEntropyLoss and LinearCrossEntropyLoss: the losses of pykernels.functional as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional


class CrossEntropyLoss(nn.Module):
    """``nn.CrossEntropyLoss`` on class indices with the classes LAST: logits [..., V], target [...] int64.

    The arguments, and those that torch has not (``z_loss``, ``softcap``), are of ``functional.cross_entropy``.
    ``weight`` is a buffer, as in torch, so that it moves with the module. Saved for backward: the logits by reference
    and 4 bytes a row. Raises ValueError at the first call for an option outside its range.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "reduction": reduction,
        }

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target, self.weight, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearCrossEntropyLoss(nn.Module):
    """The loss of a model's last linear layer, without its logits: ``loss(hidden, head.weight, target)``.

    The weight is given at each call, since it nearly always belongs to the model (its ``lm_head``, often tied to the
    embedding): the module owns no parameters, and replaces ``criterion(head(hidden), target)`` as it stands. Positional
    order is that of ``functional.linear_cross_entropy``, whose docstring says what each option means and what is saved:
    hidden [..., H], weight [V, H], target [...] int64, bias [V] or None.

    ``shift=True`` trains a causal model on ``(hidden, weight, input_ids)`` as they are. With ``return_lse`` or
    ``return_accuracy`` the result is a tuple.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "reduction": reduction,
            "shift": shift,
            "return_lse": return_lse,
            "return_accuracy": return_accuracy,
            "strategy": strategy,
        }

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        return functional.linear_cross_entropy(input, weight, target, bias, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
