"""MLPs without a gate: GPT-2's module, and BERT's pair of modules inside its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...nn._save import RECOMPUTES_MLP, group_size, is_plain, plain_linear
from . import _probe as probe
from ._activation_linear import ActivationLinear
from ._probe import ACTIVATIONS
from ._swap import Dial, takes


@dataclass
class PlainState:
    """first, second: dotted names of the linear layers on both sides of the activation."""

    first: str
    second: str
    activation: str
    save: str


def feed_forward(state: PlainState, save: str, first: Any, second: Any, x: Tensor) -> Tensor:
    """second(act(first(x))), keeping what the dial says; "recompute_mlp" and "recompute_qkv" keep x alone."""
    if save in RECOMPUTES_MLP and torch.is_grad_enabled():
        return checkpoint(_composed, state.activation, None, first, second, x, use_reentrant=False)
    if save == "all" or not torch.is_grad_enabled():
        return second(ACTIVATIONS[state.activation](first(x)))
    return _composed(state.activation, group_size(save), first, second, x)


def _composed(activation: str, group: int | None, first: Any, second: Any, x: Tensor) -> Tensor:
    inner, conv = first(x), is_conv(second)
    if plain_linear(second) or (conv and is_plain(second, type(second)) and type(second.weight) is nn.Parameter):
        return ActivationLinear.apply(inner, second.weight, second.bias, activation, conv, group)
    return second(ACTIVATIONS[activation](inner))


def is_conv(layer: nn.Module) -> bool:
    """GPT-2's linear layer, which holds its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return type(layer) is Conv1D


class FusedMLP(Dial):
    """GPT-2's: dropout(c_proj(act(c_fc(x))))."""

    c_fc: nn.Module
    c_proj: nn.Module
    dropout: nn.Module

    def fused_forward(self, x: Tensor) -> Tensor:
        return self._dialled(self._run, x) if takes(x) else self.own_forward(x)

    def _run(self, save: str, x: Tensor) -> Tensor:
        return self.dropout(feed_forward(self._pykernels, save, self.c_fc, self.c_proj, x))


class FusedBertLayer(Dial):
    """BERT's layer, whose feed_forward_chunk is LayerNorm(dropout(dense(act(dense(x)))) + x)."""

    intermediate: Any
    output: Any

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_forward(*args, **kwargs)

    def feed_forward_chunk(self, x: Tensor) -> Tensor:
        if not takes(x):
            own: Any = self._pykernels_own
            return own.feed_forward_chunk(self, x)
        return self._dialled(self._run, x)

    def _run(self, save: str, x: Tensor) -> Tensor:
        out = feed_forward(self._pykernels, save, self.intermediate.dense, self.output.dense, x)
        return self.output.LayerNorm(self.output.dropout(out) + x)


def recognise(module: nn.Module, save: str) -> PlainState | None:
    """GPT-2's MLP, or None for anything else. ValueError says why one cannot be served."""
    names = {"c_fc", "c_proj", "dropout"}
    if not names <= module._modules.keys() or not hasattr(module, "act"):
        return None
    activation = probe.activation_name(module.act)
    if activation is None:
        raise ValueError(f"its activation is none of {', '.join(ACTIVATIONS)}")
    rest = probe.free_children(module, {"c_fc", "c_proj"})
    first, second = probe.linear(probe.SIZE, 12, True), probe.linear(12, probe.SIZE, True, seed=3)
    small = probe.skeleton(module, {**rest, "c_fc": first, "c_proj": second, "dropout": nn.Identity()})
    x = probe.numbers(2, 3, probe.SIZE)
    with torch.no_grad():
        if not probe.same(type(module).forward(small, x), second(ACTIVATIONS[activation](first(x)))):
            raise ValueError("it computes something else than c_proj(act(c_fc(x)))")
    return PlainState("c_fc", "c_proj", activation, save)


def recognise_bert(module: nn.Module, save: str) -> PlainState | None:
    """BERT's layer, or None for anything else. ValueError says why one cannot be served."""
    own: Any = type(module)
    inner, out = module._modules.get("intermediate"), module._modules.get("output")
    if inner is None or out is None or not hasattr(own, "feed_forward_chunk"):
        return None
    if not {"dense", "LayerNorm", "dropout"} <= out._modules.keys() or "dense" not in inner._modules:
        raise ValueError("its feed forward is not made of dense, LayerNorm and dropout")
    function = getattr(inner, "intermediate_act_fn", None)
    activation = None if function is None else probe.activation_name(function)
    if activation is None:
        raise ValueError(f"its activation is none of {', '.join(ACTIVATIONS)}")
    first, second = probe.linear(probe.SIZE, 12, True), probe.linear(12, probe.SIZE, True, seed=3)
    norm = probe.small_norm(out.LayerNorm, probe.SIZE)
    rest = probe.free_children(inner, {"dense"})
    small = probe.skeleton(
        module,
        {
            "intermediate": probe.skeleton(inner, {**rest, "dense": first}),
            "output": probe.skeleton(out, {"dense": second, "LayerNorm": norm, "dropout": nn.Identity()}),
        },
    )
    x = probe.numbers(2, 3, probe.SIZE)
    with torch.no_grad():
        expected = norm(second(ACTIVATIONS[activation](first(x))) + x)
        if not probe.same(own.feed_forward_chunk(small, x), expected):
            raise ValueError("its feed forward computes something else than LayerNorm(dense(act(dense(x))) + x)")
    return PlainState("intermediate.dense", "output.dense", activation, save)
