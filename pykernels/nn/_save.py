"""The dial `save=` of the layers that keep little for backward, and which inner modules their fused nodes may read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional as F
from ._hooks import HOOKS
from .layer_norm import LayerNorm
from .rms_norm import RMSNorm

SAVE = ("all", "inputs+preact", "int8", "recompute_mlp", "recompute_qkv", "checkpoint")
GROUP = 128  # columns that share a scale in INT8: 3 % more than the codes, and a fraction of a row's error
RECOMPUTES_MLP = ("recompute_mlp", "recompute_qkv")


def check_save(save: Any) -> str:
    """save itself; ValueError names what is accepted."""
    if save not in SAVE:
        raise ValueError(f"save: got {save!r}, accepts {', '.join(map(repr, SAVE))}.")
    return save


class SaveDial(nn.Module):
    """A module with `save`, what it keeps for backward: one of SAVE, at any time."""

    def __init__(self, save: str) -> None:
        super().__init__()
        self.save = save

    @property
    def save(self) -> str:
        """What is kept for backward: one of pykernels.nn._save.SAVE."""
        return self._save

    @save.setter
    def save(self, value: str) -> None:
        self._save = check_save(value)

    def _dialled(self, run: Callable[..., Any], *args: Any) -> Any:
        """run(save, *args), under torch's checkpoint where the dial says so and a gradient may be wanted."""
        if self.save != "checkpoint":
            return run(self.save, *args)
        if not torch.is_grad_enabled():
            return run("inputs+preact", *args)
        return checkpoint(run, "inputs+preact", *args, use_reentrant=False)


def group_size(save: str) -> int | None:
    """Of the INT8 copies that the dial's value asks for."""
    return GROUP if save == "int8" else None


def untouched(module: nn.Module) -> bool:
    """Nobody hooked the module or replaced its forward, so that its parameters say all that it does."""
    return not any(getattr(module, hooks) for hooks in HOOKS) and "forward" not in module.__dict__


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly of this class and untouched: a fused node may read it instead of calling it."""
    return type(module) is kind and untouched(module)


def plain_linear(*layers: nn.Module) -> bool:
    """Each is a torch.nn.Linear that a fused node may read: not a wrapper, not hooked, its weight not computed."""
    return all(
        is_plain(layer, nn.Linear) and type(layer.weight) in (nn.Parameter, Tensor) and "weight" in layer._parameters
        for layer in layers
    )


class ReadableNorm:
    """Mixed into a norm that is not of this package: it says what it computes, so that a fused node may read it."""

    def norm_arguments(self, x: Tensor) -> dict[str, Any]:
        """As the function of this name."""
        raise NotImplementedError


def plain_norm(norm: nn.Module | None) -> bool:
    """None, or a norm that a fused node may read: an RMSNorm or LayerNorm of ours, or a ReadableNorm."""
    if norm is None or is_plain(norm, RMSNorm) or is_plain(norm, LayerNorm):
        return True
    return isinstance(norm, ReadableNorm) and untouched(norm)


def norm_arguments(norm: nn.Module | None, x: Tensor) -> dict[str, Any]:
    """The norm as keyword arguments of functional.norm_linear and its like."""
    if norm is None:
        return {"norm": None}
    if isinstance(norm, ReadableNorm):
        return norm.norm_arguments(x)
    rms = isinstance(norm, RMSNorm)
    eps = norm.eps
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return {
        "norm": "rms_norm" if rms else "layer_norm",
        "norm_weight": norm.weight,
        "norm_bias": None if rms else norm.bias,
        "eps": eps,
        "weight_offset": norm.weight_offset,
    }


def apply_norm(norm: nn.Module | None, x: Tensor, save: str, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = x + residual, as nodes of their own: the way round where an inner layer is not plain.

    Without a norm the first is x again, but another node, where the gradients of all that read it are added up first.
    """
    if norm is None:
        return x.view_as(x), x
    if not plain_norm(norm):
        h = x if residual is None else x + residual
        return norm(h), h
    arguments = norm_arguments(norm, x)
    if save == "int8":
        return F.norm_linear(x, [], residual=residual, normed=True, prenorm=True, group_size=GROUP, **arguments)
    function = F.rms_norm if arguments.pop("norm") == "rms_norm" else F.layer_norm
    weight, bias = arguments.pop("norm_weight"), arguments.pop("norm_bias")
    return function(x, weight, bias, residual=residual, prenorm=True, **arguments)
