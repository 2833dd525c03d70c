"""Adagrad (Duchi et al., 2011) as torch.optim.Adagrad."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..ops import _optimizer_reference as rules
from ._base import FusedOptimizer
from ._plan import Numbers
from ._state import Group, StateOptions


class Adagrad(FusedOptimizer):
    """torch.optim.Adagrad's arguments, defaults and results, and the options of `StateOptions`.

    State of a parameter: step and sum. torch's takes it when it is made; this one at the first step or init_states().
    """

    algorithm = rules.ADAGRAD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StateOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    def numbers(self, group: Group) -> Numbers:
        """As the base class says."""
        return float(group["lr_decay"]), 0.0, group["eps"], group["weight_decay"]
