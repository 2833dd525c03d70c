"""Stochastic gradient descent with momentum, dampening and Nesterov's momentum, as torch.optim.SGD."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..ops import _optimizer_reference as rules
from ._base import FusedOptimizer
from ._plan import Numbers
from ._state import Group, StateOptions


class SGD(FusedOptimizer):
    """torch.optim.SGD's arguments, defaults and results, and the options of `StateOptions`.

    State of a parameter: step and, with momentum, momentum_buffer.
    """

    algorithm = rules.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StateOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    def flags(self, group: Group) -> int:
        """As the base class says."""
        momentum = rules.MOMENTUM if group["momentum"] != 0 else 0
        return super().flags(group) | momentum | (rules.NESTEROV if group["nesterov"] else 0)

    def numbers(self, group: Group) -> Numbers:
        """As the base class says."""
        return float(group["momentum"]), float(group["dampening"]), 0.0, float(group["weight_decay"])
