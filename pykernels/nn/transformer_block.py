"""A transformer layer with a dial for what it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ._save import SaveDial, apply_norm, untouched
from .attention import Attention, Tables
from .layer_norm import LayerNorm
from .mlp import GEGLUMLP, SwiGLUMLP, _GatedMLP
from .rms_norm import RMSNorm

_MLPS = {"silu": (SwiGLUMLP, {}), "gelu": (GEGLUMLP, {}), "gelu_tanh": (GEGLUMLP, {"approximate": "tanh"})}


class TransformerBlock(SaveDial):
    """One layer of a causal transformer, in Llama's form or in that of the first transformers.

        norm="pre"    h = x + attn(norm1(x))        y = h + mlp(norm2(h))                    RMSNorm
        norm="post"   h = norm1(x + attn(x))        y = norm2(h + mlp(h))                    LayerNorm

    Args:
        hidden_size, num_heads, num_kv_heads, intermediate_size: x [B, S, hidden_size] -> the same shape.
        norm: "pre" or "post". eps: None for 1e-6 (RMSNorm) or 1e-5 (LayerNorm).
        activation: "silu" (SwiGLUMLP), "gelu" or "gelu_tanh" (GEGLUMLP). dropout: of both branches, before the sum.
        save: what is kept for backward. u is hidden_size * itemsize, for a token of a layer shaped as Llama 3 8B's,
            norm="pre", bf16; docs/memory.md has the formulas, to the byte, and pykernels.memory.contract computes them:
            "all"            17 u     plain autograd, one node an operation
            "inputs+preact"  11.5 u   no matmul is repeated; norms and the gate's product are
            "int8"           7.1 u    the same with gate, up and the norms' inputs in INT8, groups of 128 columns
            "recompute_mlp"  4.5 u    gate and up are computed again: at most 18 % more matmul operations
            "recompute_qkv"  3 u      query, key and value too: at most 22 %
            "checkpoint"     1 u      the input; torch.utils.checkpoint runs the layer again, RNG state kept
        other keyword arguments: of Attention.

    Results and gradients of all values agree bit for bit (on a GPU: if torch.use_deterministic_algorithms), but for the
    gradients of "int8". Its copies are rounded to nearest: no random state is used up, the error of an element is at
    most absmax / 254 of its group, half of what stochastic rounding allows, and it is not carried from step to step.

    Submodules have Llama's names: input_layernorm ("pre"), self_attn, post_attention_layernorm, mlp,
    post_feedforward_layernorm ("post"). Each may be replaced, wrapped (LoRA) or hooked; it is then called as a module
    and keeps what it keeps; behind a wrapped layer of the MLP, "recompute_mlp" becomes torch's checkpoint of norm and
    MLP, and "recompute_qkv" is "recompute_mlp" where a layer of attention is wrapped. Int8TrainingLinear layers keep
    the INT8 activation that their product used. The dial of the block rules those of self_attn and mlp.
    Errors: ValueError names an unknown value and what is accepted.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        intermediate_size: int,
        num_kv_heads: int | None = None,
        norm: str = "pre",
        activation: str = "silu",
        eps: float | None = None,
        dropout: float = 0.0,
        bias: bool | str = False,
        save: str = "inputs+preact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__(save)
        if norm not in ("pre", "post"):
            raise ValueError(f"norm: got {norm!r}, accepts 'pre', 'post'.")
        if activation not in _MLPS:
            raise ValueError(f"activation: got {activation!r}, accepts {', '.join(map(repr, _MLPS))}.")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: got {dropout}, accepts 0 to 1.")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm, self.dropout = norm, dropout
        self.self_attn: nn.Module = Attention(
            hidden_size, num_heads, num_kv_heads=num_kv_heads, bias=bias, **attention, **place
        )
        mlp, options = _MLPS[activation]
        self.mlp: nn.Module = mlp(hidden_size, intermediate_size, bias=bias is True, **options, **place)
        self.input_layernorm: nn.Module | None = None
        self.post_feedforward_layernorm: nn.Module | None = None
        if norm == "pre":
            self.input_layernorm = RMSNorm(hidden_size, eps=1e-6 if eps is None else eps, **place)
            self.post_attention_layernorm: nn.Module = RMSNorm(hidden_size, eps=1e-6 if eps is None else eps, **place)
        else:
            self.post_attention_layernorm = LayerNorm(hidden_size, eps=1e-5 if eps is None else eps, **place)
            self.post_feedforward_layernorm = LayerNorm(hidden_size, eps=1e-5 if eps is None else eps, **place)

    def forward(self, x: Tensor, *, position_ids: Tensor | None = None, tables: Tables | None = None) -> Tensor:
        """position_ids: int64 [S] or [B, S]. tables: (cos, sin) to turn by, in place of the layer's own."""
        return self._dialled(self._run, x, position_ids, tables)

    def _run(self, save: str, x: Tensor, position_ids: Tensor | None, tables: Tables | None) -> Tensor:
        branch = self._attend(save, x, position_ids, tables)
        stream, residual = self._add(x, branch)
        out, h = self._feed_forward(save, stream, residual)
        stream, residual = self._add(h, out)
        if self.norm == "pre":
            return stream if residual is None else stream + residual
        return apply_norm(self.post_feedforward_layernorm, stream, save, residual)[0]

    def _attend(self, save: str, x: Tensor, position_ids: Tensor | None, tables: Tables | None) -> Tensor:
        attention = self.self_attn
        if isinstance(attention, Attention) and type(attention).forward is Attention.forward and untouched(attention):
            return attention.run(save, x, self.input_layernorm, position_ids, tables)
        normed = apply_norm(self.input_layernorm, x, save)[0]
        return attention(normed, position_ids=position_ids, tables=tables)

    def _feed_forward(self, save: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The branch, and the stream that it is added to."""
        mlp, norm, post = self.mlp, self.post_attention_layernorm, self.norm == "post"
        if isinstance(mlp, _GatedMLP) and type(mlp).forward is _GatedMLP.forward and untouched(mlp):
            return mlp.run(save, x, norm, residual, post)
        normed, h = apply_norm(norm, x, save, residual)
        return mlp(normed), normed if post else h

    def _add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor | None]:
        """(x, branch) for the next norm to add; with dropout, their sum."""
        if self.training and self.dropout:
            return F.dropout(branch, self.dropout, residual=x), None
        return x, branch

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}, dropout={self.dropout}, save={self.save!r}"
