"""LAMB (You et al., "Large Batch Optimization for Deep Learning", ICLR 2020), also with 8-bit state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from ..ops import _optimizer_reference as rules
from . import _shard
from ._base import FusedOptimizer
from ._plan import Plan
from ._state import Group, StateOptions


class LAMB(FusedOptimizer):
    """Adam's direction plus decoupled weight decay, scaled for each tensor to the norm of the tensor.

        u = m_hat / (sqrt(v_hat) + eps) + weight_decay p;  p -= lr |p| / |u| u  (the ratio is 1 where a norm is 0)

    The norms are those of whole tensors: of a DTensor's shards over all ranks, with one all-reduce for each bucket.
    Arguments as torch.optim.AdamW's, and
    bias_correction: m_hat and v_hat are divided by 1 - beta^step, as the paper has it.
    adapt: False turns the ratio off, for a group of biases and norms as is usual.
    max_grad_norm: the global norm of all gradients is clipped to this first (None or 0: off), as apex's FusedLAMB does;
    `.grad` itself stays as it is. Nothing is read back to the host. There is one such norm, so groups that differ in
    max_grad_norm are refused (ValueError).
    """

    algorithm = rules.LAMB

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adapt: bool = True,
        max_grad_norm: float | None = None,
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
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "bias_correction": bias_correction,
            "adapt": adapt,
            "max_grad_norm": max_grad_norm or 0.0,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer's; max_grad_norm must be that of the groups before."""
        limit = param_group.get("max_grad_norm", self.defaults["max_grad_norm"]) or 0.0
        if self.param_groups and limit >= 0.0:
            self._check_limit(len(self.param_groups), limit)
        super().add_param_group({**param_group, "max_grad_norm": limit})

    def _check_limit(self, index: int, limit: float) -> None:
        first = self.param_groups[0]["max_grad_norm"] or 0.0
        if (limit or 0.0) != first:
            raise ValueError(
                f"{type(self).__name__}: expected max_grad_norm of group {index} to be {first!r} as of group 0, since"
                f" the norm is that of all gradients, got {limit!r}"
            )

    def flags(self, group: Group) -> int:
        """As the base class says."""
        corrected = 0 if group["bias_correction"] else rules.UNCORRECTED
        return super().flags(group) | corrected | (rules.AMSGRAD if group["amsgrad"] else 0)

    def _gradient_divisor(self, plan: Plan, grads: list[list[Tensor]], scale: Tensor | None) -> Tensor | None:
        for index, group in enumerate(self.param_groups):
            self._check_limit(index, group["max_grad_norm"])
        limit = self.param_groups[0]["max_grad_norm"] or 0.0
        if not limit > 0.0:
            return scale
        device = plan.buckets[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        for bucket, part in zip(plan.buckets, grads, strict=True):
            square = _shard.all_reduce(torch.ops.pykernels.squared_norms(part).sum(), bucket.sharded)
            total += _shard.moved(square, device)
        norm = total.sqrt()
        if scale is None:
            return (norm / limit).clamp(min=1.0).float()
        scale = _shard.moved(scale, device).double()
        return torch.maximum(scale, norm / limit).float()


class LAMB8bit(LAMB):
    """LAMB with state_bits=8."""

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, state_bits=8, **kwargs)
