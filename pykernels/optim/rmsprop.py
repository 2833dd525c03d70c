"""RMSprop (Hinton's lecture 6e, 2012) as torch.optim.RMSprop."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..ops import _optimizer_reference as rules
from ._base import FusedOptimizer
from ._plan import Numbers
from ._state import Group, StateOptions


class RMSprop(FusedOptimizer):
    """torch.optim.RMSprop's arguments, defaults and results, and the options of `StateOptions`.

    State of a parameter: step, square_avg, with momentum momentum_buffer, and with centered grad_avg.
    """

    algorithm = rules.RMSPROP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[StateOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, options)

    def flags(self, group: Group) -> int:
        """As the base class says."""
        momentum = rules.MOMENTUM if group["momentum"] > 0 else 0
        return super().flags(group) | momentum | (rules.CENTERED if group["centered"] else 0)

    def numbers(self, group: Group) -> Numbers:
        """As the base class says."""
        return float(group["momentum"]), float(group["alpha"]), group["eps"], group["weight_decay"]
