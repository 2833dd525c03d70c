"""Self-attention with rotary positions: the projections and rope are ours, mask, cache and attention transformers'."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional as F
from ...nn._save import group_size, norm_arguments, plain_linear, plain_norm
from . import _probe as probe
from ._swap import Fused, takes

_FORMS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))


@dataclass
class AttentionState:
    """What tells one family's attention from another's.

    projections: names of the linear layers that read x. head_norms: query and key pass q_norm and k_norm.
    passes: which of "sliding_window" and "softcap" go to the attention function. eager: that of the model's own file.
    """

    projections: tuple[str, ...]
    head_dim: int
    queries: int
    keys: int
    head_norms: bool
    passes: tuple[str, ...]
    eager: Callable[..., Any]


class FusedAttention(Fused):
    """The attention, alone or behind a norm that its layer hands over."""

    config: Any
    layer_idx: int
    training: bool
    o_proj: Any

    def fused_forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if args or not takes(hidden_states) or not is_rope(position_embeddings):
            arguments = (hidden_states, position_embeddings, attention_mask, past_key_values, *args)
            return self.own_forward(*arguments, **kwargs)
        return self.attend("all", hidden_states, None, position_embeddings, attention_mask, past_key_values, **kwargs)

    def attend(
        self,
        save: str,
        x: Tensor,
        norm: nn.Module | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """(the attention of norm(x), its weights or None)."""
        state: AttentionState = self._pykernels
        layers = [getattr(self, name) for name in state.projections]
        readable = save != "all" and plain_linear(*layers) and plain_norm(norm)
        tables = rope_tables(*position_embeddings)
        if readable and save == "recompute_qkv" and self._recomputable(attention_mask, past_key_values):
            (query, key, value), biases = self._split(layers)
            options = norm_arguments(norm, x) | tables
            out = F.norm_attention(x, query, key, value, biases, head_dim=state.head_dim, **options)
            return self._project(save, out.flatten(-2)), None
        if readable:
            weights, biases = self._split(layers)
            outs = F.norm_linear(x, weights, biases, group_size=group_size(save), **norm_arguments(norm, x))
        else:
            normed = x if norm is None else norm(x)
            outs = [layer(normed) for layer in layers]
            if len(outs) == 1:
                outs = outs[0].split([state.queries, state.keys, state.keys], -1)
        q, k, v = (t.unflatten(-1, (-1, state.head_dim)) for t in outs)
        if state.head_norms:
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[attr-defined]
        if q.dtype != k.dtype or not takes(q):
            raise RuntimeError(f"fuse_: expected query and key of one float dtype, got {q.dtype} and {k.dtype}")
        q, k = F.rope(q, k, **tables)
        assert k is not None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            extra = []
            if "cache_position" in kwargs:  # transformers 4: what a static cache needs
                cos, sin = position_embeddings
                extra = [{"cos": cos, "sin": sin, "cache_position": kwargs["cache_position"]}]
            k, v = past_key_values.update(k, v, self.layer_idx, *extra)
        out, weights = self._function()(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,  # type: ignore[attr-defined]
            scaling=self.scaling,  # type: ignore[attr-defined]
            **self._passed(),
            **kwargs,
        )
        return self._project(save, out.reshape(*x.shape[:-1], -1)), weights

    def _project(self, save: str, out: Tensor) -> Tensor:
        if save != "all" and plain_linear(self.o_proj):
            return F.norm_linear(out, self.o_proj.weight, self.o_proj.bias, norm=None)
        return self.o_proj(out)

    def _split(self, layers: list[Any]) -> tuple[list[Tensor], list[Any]]:
        """The weights and biases of query, key and value; views where they are packed."""
        if len(layers) == 3:
            return [layer.weight for layer in layers], [layer.bias for layer in layers]
        sizes, packed = [self._pykernels.queries, self._pykernels.keys, self._pykernels.keys], layers[0]
        biases = [None] * 3 if packed.bias is None else list(packed.bias.split(sizes))
        return list(packed.weight.split(sizes)), biases

    def _recomputable(self, mask: Any, cache: Any) -> bool:
        """Causal attention without a mask, as SDPA is then asked for: what norm_attention computes."""
        return mask is None and cache is None and self.config._attn_implementation == "sdpa" and not self._dropout()

    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0  # type: ignore[attr-defined]

    def _passed(self) -> dict[str, Any]:
        passed = {}
        if "sliding_window" in self._pykernels.passes:
            window = getattr(self.config, "sliding_window", None)
            passed["sliding_window"] = getattr(self, "sliding_window", window)
        if "softcap" in self._pykernels.passes:
            passed["softcap"] = self.attn_logit_softcapping  # type: ignore[attr-defined]
        return passed

    def _function(self) -> Callable[..., Any]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = self.config._attn_implementation
        return self._pykernels.eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def is_rope(embeddings: Any) -> bool:
    """(cos, sin), each [B or 1, S, R]: not the three-dimensional positions of images."""
    return isinstance(embeddings, tuple) and len(embeddings) == 2 and embeddings[0].dim() == 3


def rope_tables(cos: Tensor, sin: Tensor) -> dict[str, Any]:
    """transformers' cos and sin [B or 1, S, R], its second half a copy of the first, as arguments of rope."""
    batch, seq, half = cos.shape[0], cos.shape[1], cos.shape[2] // 2
    cos, sin = cos[..., :half].reshape(batch * seq, half), sin[..., :half].reshape(batch * seq, half)
    rows = None if batch == 1 else torch.arange(batch * seq, device=cos.device).view(batch, seq)
    return {"cos": cos, "sin": sin, "position_ids": rows}


def recognise(module: Any) -> AttentionState | None:
    """What tells this attention from others, or None for anything else. ValueError says why it cannot be served."""
    if "attention" not in type(module).__name__.lower():
        return None
    form = next((form for form in _FORMS if all(name in module._modules for name in (*form, "o_proj"))), None)
    if form is None:
        if any("proj" in name or "query" in name or "attn" in name for name in module._modules):
            raise ValueError(
                "it has no q_proj, k_proj and v_proj, or qkv_proj, and o_proj to turn query and key behind"
            )
        return None
    own, config = type(module), getattr(module, "config", None)
    needed = ("head_dim", "scaling", "attention_dropout", "layer_idx")
    if absent := [name for name in needed if not hasattr(module, name)]:
        raise ValueError(f"it has no {', '.join(absent)}")
    if config is None or module._parameters or module._buffers:
        raise ValueError("it has no config, or parameters beside those of its projections")
    eager = vars(sys.modules[own.__module__]).get("eager_attention_forward")
    if eager is None or "position_embeddings" not in inspect.signature(own.forward).parameters:
        raise ValueError(
            "its forward takes no position_embeddings (no rope, or another transformers than 4.5x and 5.x)"
        )
    heads, dim = config.num_attention_heads, module.head_dim
    groups = getattr(config, "num_key_value_heads", None) or heads
    norms = {"q_norm", "k_norm"} <= module._modules.keys()
    passes = tuple(name for name in ("sliding_window", "softcap") if name in _words(own.forward))
    state = AttentionState(form, dim, heads * dim, groups * dim, norms, passes, eager)
    if not _computes(module, state):
        raise ValueError("it computes something else than rotary attention of o_proj, q_proj, k_proj and v_proj")
    return state


def _words(function: Any) -> set[str]:
    """Names that a function's code mentions, those of keyword arguments too."""
    code = inspect.unwrap(function).__code__
    constants = [c if isinstance(c, tuple) else (c,) for c in code.co_consts]
    return {*code.co_names, *(word for group in constants for word in group if isinstance(word, str))}


def _computes(module: nn.Module, state: AttentionState) -> bool:
    """Whether the module's own forward gives what FusedAttention gives."""
    from ._swap import fused_class

    sizes = [state.queries, state.keys, state.keys]
    if len(state.projections) == 1:
        sizes = [sum(sizes)]
    children: dict[str, nn.Module | None] = {
        name: probe.linear(probe.SIZE, size, seed=place)
        for place, (name, size) in enumerate(zip(state.projections, sizes, strict=True))
    }
    children["o_proj"] = probe.linear(state.queries, probe.SIZE, seed=7)
    if state.head_norms:
        children |= {name: probe.small_norm(module._modules[name], state.head_dim) for name in ("q_norm", "k_norm")}  # type: ignore[arg-type]
    children |= probe.free_children(module, set(children))
    small = probe.skeleton(module, children, config=probe.eager_config(module.config))
    ours = probe.skeleton(module, children, config=small.config)
    x, angle = probe.numbers(2, 3, probe.SIZE), 3 * probe.numbers(1, 3, state.head_dim // 2, seed=9)
    angle = torch.cat((angle, angle), -1)
    rope = angle.cos(), angle.sin()
    with torch.no_grad():
        expected = type(module).forward(small, hidden_states=x, position_embeddings=rope, attention_mask=None)
        ours.__class__ = fused_class(FusedAttention, type(module))
        ours.__dict__["_pykernels"] = state
        got = ours.attend("inputs+preact", x, None, rope)
    return isinstance(expected, tuple) and len(expected) == 2 and probe.same(got[0], expected[0])
