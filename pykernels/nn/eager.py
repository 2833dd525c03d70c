"""The same layers as one would write them without this package: the baseline that is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import _rope_tables

_ACTIVATIONS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}


class EagerRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), in float32 and back, as transformers' LlamaRMSNorm is written."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class EagerAttention(nn.Module):
    """Causal attention by scaled_dot_product_attention, rotated as transformers' apply_rotary_pos_emb does."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool | str,
        theta: float,
        length: int,
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.length = head_dim, theta, length
        self.groups = num_heads // kv_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bool(bias))
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bool(bias))
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bool(bias))
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias is True)

    def forward(self, x: Tensor) -> Tensor:
        rows = max(self.length, x.shape[1])
        cos, sin = (t[: x.shape[1]] for t in _rope_tables(self.head_dim, rows, self.theta, None, x.device))
        cos, sin = torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (t * cos + _rotate_half(t) * sin for t in (q, k))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups > 1)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class EagerMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class EagerBlock(nn.Module):
    """TransformerBlock in plain PyTorch, one operation a node, with the same parameters by the same names."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        intermediate_size: int,
        head_dim: int | None,
        norm: str,
        activation: str,
        eps: float | None,
        bias: bool | str,
        rope_theta: float,
        max_position_embeddings: int,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.self_attn = EagerAttention(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim or hidden_size // num_heads,
            bias,
            rope_theta,
            max_position_embeddings,
        )
        self.mlp = EagerMLP(hidden_size, intermediate_size, activation, bias is True)
        if norm == "pre":
            self.input_layernorm = EagerRMSNorm(hidden_size, 1e-6 if eps is None else eps)
            self.post_attention_layernorm: nn.Module = EagerRMSNorm(hidden_size, 1e-6 if eps is None else eps)
        else:
            self.post_attention_layernorm = nn.LayerNorm(hidden_size, 1e-5 if eps is None else eps)
            self.post_feedforward_layernorm = nn.LayerNorm(hidden_size, 1e-5 if eps is None else eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "pre":
            x = x + self.self_attn(self.input_layernorm(x))
            return x + self.mlp(self.post_attention_layernorm(x))
        x = self.post_attention_layernorm(x + self.self_attn(x))
        return self.post_feedforward_layernorm(x + self.mlp(x))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
