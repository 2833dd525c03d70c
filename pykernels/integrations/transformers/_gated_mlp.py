"""down(act(gate(x)) * up(x)), gate and up apart or packed in one linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ... import functional as F
from ...nn._save import (
    RECOMPUTES_MLP,
    apply_norm,
    group_size,
    norm_arguments,
    plain_linear,
    plain_norm,
)
from . import _probe as probe
from ._swap import Dial, takes

_FORMS = (("gate_proj", "up_proj"), ("gate_up_proj",))


@dataclass
class GatedState:
    """inputs: the names of the layers that read x."""

    inputs: tuple[str, ...]
    activation: str
    save: str


class FusedGatedMLP(Dial):
    """The MLP, alone or behind a norm that its layer hands over, with the dial of pykernels.nn.SwiGLUMLP."""

    down_proj: Any

    def fused_forward(self, x: Tensor) -> Tensor:
        return self._dialled(self.run, x)[0] if takes(x) else self.own_forward(x)

    def run(
        self, save: str, x: Tensor, norm: nn.Module | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the MLP of norm(h), h) with h = x + residual."""
        if save == "all" or not torch.is_grad_enabled():
            normed, h = apply_norm(norm, x, save, residual)
            return self._rest("all", [layer(normed) for layer in self._inputs()]), h
        readable = plain_linear(*self._inputs()) and plain_norm(norm)
        if save in RECOMPUTES_MLP and readable and plain_linear(self.down_proj):
            weights, biases = self._split()
            options = norm_arguments(norm, x) | {"activation": self._pykernels.activation}
            down = self.down_proj
            if norm is not None:
                options |= {"residual": residual, "prenorm": True}
            got = F.norm_mlp(x, weights[0], weights[1], down.weight, (*biases, down.bias), **options)
            return (got, x) if norm is None else got
        if save in RECOMPUTES_MLP:
            h = x if residual is None else x + residual.to(x.dtype)
            return checkpoint(self._composed, save, h, norm, None, use_reentrant=False)
        return self._composed(save, x, norm, residual)

    def _inputs(self) -> list[Any]:
        return [getattr(self, name) for name in self._pykernels.inputs]

    def _split(self) -> tuple[list[Tensor], list[Any]]:
        """The weights and biases of gate and up; views where they are packed."""
        layers = self._inputs()
        if len(layers) == 2:
            return [layer.weight for layer in layers], [layer.bias for layer in layers]
        packed = layers[0]
        return list(packed.weight.chunk(2)), [None, None] if packed.bias is None else list(packed.bias.chunk(2))

    def _composed(self, save: str, x: Tensor, norm: nn.Module | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Two nodes, or as near to them as layers that cannot be read allow."""
        layers = self._inputs()
        if plain_linear(*layers) and plain_norm(norm):
            options = norm_arguments(norm, x) | {"group_size": group_size(save)}
            if norm is not None:
                options |= {"residual": residual, "prenorm": True}
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            outs = list(F.norm_linear(x, weights, biases, **options))
            h = x if norm is None else outs.pop()
        else:
            normed, h = apply_norm(norm, x, save, residual)
            outs = [layer(normed) for layer in layers]
        return self._rest(save, outs), h

    def _rest(self, save: str, gates: list[Tensor]) -> Tensor:
        """Gate and up, or both packed -> the result."""
        gate, up = gates if len(gates) == 2 else (gates[0], None)
        options = {"activation": self._pykernels.activation, "group_size": group_size(save)}
        if save != "all" and plain_linear(self.down_proj):
            return F.glu_linear(gate, up, self.down_proj.weight, self.down_proj.bias, **options)
        return self.down_proj(F.glu_linear(gate, up, None, **options))


def recognise(module: nn.Module, save: str) -> GatedState | None:
    """The form of a gated MLP, or None for anything else. ValueError says why one cannot be served."""
    form = next((form for form in _FORMS if all(name in module._modules for name in (*form, "down_proj"))), None)
    if form is None:
        return None
    if module._parameters or module._buffers:
        raise ValueError("it has parameters of its own beside its linear layers")
    rest = probe.free_children(module, {*form, "down_proj"})
    functions = [f for n in ("act_fn", "activation_fn", "act") if (f := getattr(module, n, None)) is not None]
    activation = probe.activation_name(functions[0]) if functions else None
    if activation is None:
        raise ValueError(f"its activation is none of {', '.join(probe.ACTIVATIONS)}")
    state = GatedState(form, activation, save)
    width = probe.SIZE * (2 if len(form) == 1 else 1)
    layers = {name: probe.linear(probe.SIZE, width, seed=place) for place, name in enumerate(form)}
    small = probe.skeleton(module, {**rest, **layers, "down_proj": probe.linear(probe.SIZE, probe.SIZE, seed=5)})
    x = probe.numbers(2, 3, probe.SIZE)
    with torch.no_grad():
        gate, up = [layer(x) for layer in layers.values()] if len(form) == 2 else layers[form[0]](x).chunk(2, -1)
        expected = small.down_proj(probe.ACTIVATIONS[activation](gate) * up)
        if not probe.same(type(module).forward(small, x), expected):
            raise ValueError("it computes something else than down(act(gate(x)) * up(x))")
    return state
