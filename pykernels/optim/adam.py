"""Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019), and both with 8-bit state."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..ops import _optimizer_reference as rules
from ._base import FusedOptimizer
from ._state import Group, StateOptions


class Adam(FusedOptimizer):
    """torch.optim.Adam's arguments, defaults and results, and the options of `StateOptions`.

    State of a parameter: step, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq: 8 (12) bytes an element with
    state_bits=32, 4 (6) with 16, 2 (3) and 4 bytes a block for each with 8.
    """

    algorithm = rules.ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StateOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, options)

    def flags(self, group: Group) -> int:
        """As the base class says."""
        decoupled = rules.DECOUPLED if group["decoupled_weight_decay"] else 0
        return super().flags(group) | decoupled | (rules.AMSGRAD if group["amsgrad"] else 0)


class AdamW(Adam):
    """torch.optim.AdamW's arguments, defaults and results, and the options of `StateOptions`; state as Adam's."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A state_dict of Adam that is loaded into AdamW does not turn it into Adam: as torch has it.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


class Adam8bit(Adam):
    """Adam with state_bits=8."""

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, state_bits=8, **kwargs)


class AdamW8bit(AdamW):
    """AdamW with state_bits=8."""

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, state_bits=8, **kwargs)
