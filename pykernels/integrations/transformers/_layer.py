"""A whole decoder layer: its norms are read by the products behind them, so that no normalised tensor is kept."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...nn._save import apply_norm, untouched
from . import _probe as probe
from ._attention import AttentionState, FusedAttention, is_rope
from ._gated_mlp import FusedGatedMLP
from ._swap import Dial, swap, takes

_PRE = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_SANDWICH = (*_PRE, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_DROPOUTS = {"resid_attn_dropout", "resid_mlp_dropout"}


@dataclass
class LayerState:
    """sandwich: a norm before and one after attention and MLP (Gemma 2 and 3); else one before each (Llama).

    tuples: the layer returns (hidden states,), as some of transformers 4 do.
    """

    sandwich: bool
    save: str
    tuples: bool = False


class FusedDecoderLayer(Dial):
    """The layer, with the dial of pykernels.nn.TransformerBlock."""

    training: bool
    self_attn: Any
    mlp: Any
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    pre_feedforward_layernorm: nn.Module
    post_feedforward_layernorm: nn.Module

    def fused_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not takes(hidden_states) or not is_rope(kwargs.get("position_embeddings")):
            return self.own_forward(hidden_states, *args, **kwargs)
        if self._pykernels.tuples:
            if kwargs.get("output_attentions"):
                return self.own_forward(hidden_states, **kwargs)
            return (self._run_dialled(hidden_states, kwargs),)
        return self._run_dialled(hidden_states, kwargs)

    def _run_dialled(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        cache = kwargs.get("past_key_values")
        if self.save in ("recompute_qkv", "checkpoint") and cache is not None and torch.is_grad_enabled():
            # A layer that runs twice must not write to the cache twice; an empty one is of no use in training.
            if not self.training or cache.get_seq_length(self.self_attn.layer_idx):
                return self._run("recompute_mlp", hidden_states, kwargs)
            kwargs |= {"past_key_values": None, "use_cache": False}
        return self._dialled(self._run, hidden_states, kwargs)

    def _run(self, save: str, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        save = save if torch.is_grad_enabled() else "all"
        branch = self._attend(save, x, kwargs)
        if self._pykernels.sandwich:
            h = x + self.post_attention_layernorm(branch)
            out, h = self._feed_forward(save, h, self.pre_feedforward_layernorm, None)
            return h + self.post_feedforward_layernorm(out)
        if "resid_attn_dropout" in self._modules:  # type: ignore[attr-defined]
            branch = self.resid_attn_dropout(branch)  # type: ignore[attr-defined]
        out, h = self._feed_forward(save, x, self.post_attention_layernorm, branch)
        if "resid_mlp_dropout" in self._modules:  # type: ignore[attr-defined]
            out = self.resid_mlp_dropout(out)  # type: ignore[attr-defined]
        return h + out

    def _attend(self, save: str, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        attention: Any = self.self_attn
        if isinstance(attention, FusedAttention) and untouched(attention):  # type: ignore[arg-type]
            return attention.attend(save, x, self.input_layernorm, **kwargs)[0]
        return attention(hidden_states=apply_norm(self.input_layernorm, x, save)[0], **kwargs)[0]

    def _feed_forward(self, save: str, x: Tensor, norm: nn.Module, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The MLP of norm(h), and h = x + residual."""
        if isinstance(self.mlp, FusedGatedMLP) and untouched(self.mlp):  # type: ignore[arg-type]
            return self.mlp.run(save, x, norm, residual)
        normed, h = apply_norm(norm, x, save, residual)
        return self.mlp(normed), h


def recognise(module: nn.Module, save: str) -> LayerState | None:
    """The form of a decoder layer, or None for anything else. ValueError says why one cannot be served."""
    if not {"self_attn", "mlp"} <= module._modules.keys():
        return None
    names = module._modules.keys() - _DROPOUTS
    if names not in (set(_PRE), set(_SANDWICH)) or module._parameters:
        raise ValueError(f"its parts are not {', '.join(_PRE)} (and {', '.join(_SANDWICH[4:])})")
    if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
        raise ValueError("its forward takes no position_embeddings: its parts are fused one by one")
    state = LayerState(names == set(_SANDWICH), save)
    if not _computes(module, state):
        raise ValueError("it adds up its parts in another way: they are fused one by one")
    return state


class _Branch(nn.Module):
    """Stands for attention: (linear(hidden_states), None)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.layer_idx = probe.linear(probe.SIZE, probe.SIZE, seed=4), 0

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.linear(hidden_states), None


def _computes(module: nn.Module, state: LayerState) -> bool:
    """Whether the layer's own forward gives what FusedDecoderLayer gives."""
    norms = {name for name in module._modules if "norm" in name}
    children: dict[str, nn.Module | None] = {
        name: probe.small_norm(module._modules[name], probe.SIZE)  # type: ignore[arg-type]
        for name in norms
    }
    children |= {name: nn.Identity() for name in module._modules if name in _DROPOUTS}
    children |= {"self_attn": _Branch(), "mlp": probe.linear(probe.SIZE, probe.SIZE, seed=6)}
    small, ours = probe.skeleton(module, children), probe.skeleton(module, children)
    x, rope = probe.numbers(2, 3, probe.SIZE), (torch.ones(1, 3, 2), torch.zeros(1, 3, 2))
    with torch.no_grad():
        expected = type(module).forward(small, x, position_embeddings=rope)
        state.tuples = isinstance(expected, tuple)
        swap(ours, FusedDecoderLayer, LayerState(state.sandwich, "all"))
        got = ours.fused_forward(x, position_embeddings=rope)
    alone = expected[0] if state.tuples and len(expected) == 1 else expected
    return isinstance(alone, Tensor) and probe.same(got, alone)


def refuse_recompute_qkv(attention: Any, state: AttentionState | None) -> str | None:
    """Why query, key and value of this attention cannot be computed again on their own, or None."""
    if state is None:
        return "its attention is not fused"
    if state.head_norms:
        return "query and key pass norms of their own"
    if abs(attention.scaling - state.head_dim**-0.5) > 1e-12 * state.head_dim:
        return "its attention is not scaled by head_dim ** -0.5"
    if "softcap" in state.passes and attention.attn_logit_softcapping is not None:
        return "its attention caps its logits"
    if attention.config._attn_implementation != "sdpa":
        return f'its attn_implementation is {attention.config._attn_implementation!r}, not "sdpa"'
    return None
