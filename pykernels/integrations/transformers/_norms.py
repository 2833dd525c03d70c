"""RMSNorm and LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ...nn._save import ReadableNorm
from . import _probe as probe
from ._swap import Fused, takes


@dataclass
class NormState:
    """kind: "rms_norm" or "layer_norm"."""

    kind: str
    eps: float
    weight_offset: float = 0.0


class FusedNorm(Fused, ReadableNorm):
    """The norm, which keeps its input and the rows' statistics."""

    weight: Tensor | None
    bias: Tensor | None

    def fused_forward(self, hidden_states: Tensor) -> Tensor:
        if not takes(hidden_states):
            return self.own_forward(hidden_states)
        state = self._pykernels
        if state.kind == "layer_norm":
            return F.layer_norm(hidden_states, self.weight, self.bias, eps=state.eps)
        return F.rms_norm(hidden_states, self.weight, eps=state.eps, weight_offset=state.weight_offset)

    def norm_arguments(self, x: Tensor) -> dict[str, Any]:
        state = self._pykernels
        return {
            "norm": state.kind,
            "norm_weight": self.weight,
            "norm_bias": self.bias if state.kind == "layer_norm" else None,
            "eps": state.eps,
            "weight_offset": state.weight_offset,
        }


def recognise(module: nn.Module) -> NormState | None:
    """What the module computes, if it is a norm at all. ValueError says why a norm cannot be served."""
    if "norm" not in type(module).__name__.lower() or not module._parameters:
        return None
    if type(module) is nn.LayerNorm:
        if len(module.normalized_shape) != 1:
            raise ValueError(f"it normalises the last {len(module.normalized_shape)} dimensions, not one")
        return NormState("layer_norm", module.eps)
    weight = module._parameters.get("weight")
    eps = next((v for v in (getattr(module, n, None) for n in ("variance_epsilon", "eps")) if v is not None), None)
    plain = len(module._parameters) == 1 and not module._modules and not module._buffers
    if not plain or weight is None or weight.dim() != 1 or not isinstance(eps, float):
        raise ValueError("not a norm over the last dimension with one weight and an eps")
    size = max(weight.shape[0], 1)
    small, x = probe.skeleton(module, {}), probe.numbers(3, size)
    with torch.no_grad():
        got = type(module).forward(small, x)
        for offset in (0.0, 1.0):
            if probe.same(got, _rms(x, small.weight + offset, eps)):
                return NormState("rms_norm", eps, offset)
    raise ValueError("it computes something else than x / sqrt(mean(x^2) + eps) * weight")


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
