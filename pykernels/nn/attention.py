"""Causal self-attention with grouped heads, rotary positions and a dial for what it keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from ._save import SaveDial, apply_norm, group_size, norm_arguments, plain_linear, plain_norm

Tables = tuple[Tensor, Tensor]
_tables: dict[tuple[object, ...], Tables] = {}


def _rope_tables(head_dim: int, rows: int, theta: float, rotary_dim: int | None, device: torch.device) -> Tables:
    """One pair of tables for all layers alike, on their device; float32 whatever the model is cast to."""
    if torch.compiler.is_compiling():  # the compiler makes one pair of equal calls by itself
        return F.rope_tables(head_dim, rows, theta=theta, rotary_dim=rotary_dim, device=device)
    key = (head_dim, theta, rotary_dim, device)
    known = _tables.get(key)
    if known is None or known[0].shape[0] < rows:
        with torch.inference_mode(False):  # a later training step saves what an inference made
            known = _tables[key] = F.rope_tables(head_dim, rows, theta=theta, rotary_dim=rotary_dim, device=device)
    return known


class Attention(SaveDial):
    """o_proj(attention(rope(q_proj(x)), rope(k_proj(x)), v_proj(x))), the kernels being those of PyTorch's SDPA.

    Args:
        hidden_size, num_heads: K and H; x [B, S, K] -> [B, S, K]. num_kv_heads: G, a divisor of H; None for H.
        head_dim: D; None for hidden_size / num_heads.
        bias: True, False, or "qkv" for query, key and value alone.
        causal: a position sees itself and those before.
        rope: rotate query and key by position: rope_theta, rotary_dim (None for D), interleaved, and
            max_position_embeddings, the positions that position_ids may name.
        save: what is kept for backward, in bytes, with M = B*S rows; docs/memory.md has the formulas:
            "all", "inputs+preact", "recompute_mlp"   M*(K + (2*H + 2*G)*D)*itemsize + 4*M*H: x, q, k, v, out, lse
            "int8"            M*(K + 4*ceil(K/128) + (2*H + 2*G)*D*itemsize) + 4*M*H: the same with x in INT8
            "recompute_qkv"   M*(K + H*D)*itemsize + 4*M*H: x, out, lse
            "checkpoint"      M*K*itemsize: x

    k and v are kept unexpanded. The inner linear layers may be replaced or hooked: they are then called as modules,
    and "recompute_qkv" keeps q, k and v.
    Errors: ValueError for sizes that do not divide, an odd rotary_dim, or an unknown save.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool | str = False,
        causal: bool = True,
        rope: bool = True,
        rope_theta: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        max_position_embeddings: int = 8192,
        save: str = "inputs+preact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(save)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and hidden_size % num_heads):
            raise ValueError(f"num_heads: got {num_heads}, accepts a divisor of hidden_size {hidden_size}.")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads: got {kv_heads}, accepts a divisor of num_heads {num_heads}.")
        if bias not in (True, False, "qkv"):
            raise ValueError(f"bias: got {bias!r}, accepts True, False, 'qkv'.")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal, self.rope, self.rope_theta, self.rotary_dim = causal, rope, rope_theta, rotary_dim
        self.interleaved, self.max_position_embeddings = interleaved, max_position_embeddings
        if rope:
            F.rope_tables(self.head_dim, 0, theta=rope_theta, rotary_dim=rotary_dim)  # for its checks
        queries, keys = num_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, queries, bool(bias), device, dtype)
        self.k_proj = nn.Linear(hidden_size, keys, bool(bias), device, dtype)
        self.v_proj = nn.Linear(hidden_size, keys, bool(bias), device, dtype)
        self.o_proj = nn.Linear(queries, hidden_size, bias is True, device, dtype)

    def forward(self, x: Tensor, *, position_ids: Tensor | None = None, tables: Tables | None = None) -> Tensor:
        """position_ids: int64 [S] or [B, S]. tables: (cos, sin) to turn by, in place of the layer's own."""
        return self._dialled(self.run, x, None, position_ids, tables)

    def run(
        self,
        save: str,
        x: Tensor,
        norm: nn.Module | None = None,
        position_ids: Tensor | None = None,
        tables: Tables | None = None,
    ) -> Tensor:
        """The attention of norm(x)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        readable = save != "all" and plain_linear(*projections) and plain_norm(norm)
        if tables is None and self.rope:
            rows = max(self.max_position_embeddings, x.shape[1])
            tables = _rope_tables(self.head_dim, rows, self.rope_theta, self.rotary_dim, x.device)
        weights = [layer.weight for layer in projections] if readable else []
        biases = [layer.bias for layer in projections] if readable else []
        if readable and save == "recompute_qkv":
            cos, sin = (None, None) if tables is None else tables
            out = F.norm_attention(
                x,
                weights[0],
                weights[1],
                weights[2],
                biases,
                head_dim=self.head_dim,
                cos=cos,
                sin=sin,
                position_ids=position_ids,
                interleaved=self.interleaved,
                causal=self.causal,
                **norm_arguments(norm, x),
            )
        else:
            if readable:
                q, k, v = F.norm_linear(x, weights, biases, group_size=group_size(save), **norm_arguments(norm, x))
            else:
                normed, _ = apply_norm(norm, x, save)
                q, k, v = (layer(normed) for layer in projections)
            q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
            if tables is not None:
                q, k = F.rope(q, k, *tables, position_ids=position_ids, interleaved=self.interleaved)
            out = F.attention(q, k, v, causal=self.causal)
        out = out.flatten(-2)
        if save != "all" and plain_linear(self.o_proj):
            return F.norm_linear(out, self.o_proj.weight, self.o_proj.bias, norm=None)
        return self.o_proj(out)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, causal={self.causal}, save={self.save!r}"
        )
