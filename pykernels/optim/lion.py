"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023), also with 8-bit state."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..ops import _optimizer_reference as rules
from ._base import FusedOptimizer
from ._state import StateOptions


class Lion(FusedOptimizer):
    """p -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay p);  m = beta2 m + (1 - beta2) g.

    lr is three to ten times smaller and weight_decay as much larger than AdamW's (the paper's advice). State of a
    parameter: step and exp_avg, half of AdamW's.
    """

    algorithm = rules.LION

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StateOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)


class Lion8bit(Lion):
    """Lion with state_bits=8."""

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, state_bits=8, **kwargs)
