"""Samples of the operators that span several layers, with every tensor argument that each can take."""

from __future__ import annotations

import torch
from torch import Tensor

from pykernels.functional import rope_tables


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def samples() -> dict[str, tuple]:
    """{operator: arguments}."""
    x, residual, norm = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(16)
    rstd = torch.rand(2, 5)
    qkv = [torch.randn(n, 16) for n in (16, 8, 8)]
    mlp = [torch.randn(24, 16), torch.randn(24, 16), torch.randn(16, 24)]
    q, kv = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 2, 4)
    out, lse = torch.ops.pykernels.attention(q, kv, kv.flip(0), True, 0.5)
    gate, up = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    tables = (*rope_tables(4, 8), torch.arange(1, 6))
    one = (1, 1e-6, 0.0)  # rms_norm
    f32 = torch.float32
    return {
        "attention": (leaf(2, 5, 4, 4), leaf(2, 5, 2, 4), leaf(2, 5, 2, 4), True, 0.5),
        "attention_backward": (out, q, kv, kv.flip(0), out, lse, True, 0.5),
        "norm_linear": (
            *(leaf(2, 5, 16), leaf(2, 5, 16), leaf(16), leaf(16), [leaf(16, 16), leaf(8, 16)], [leaf(8)], [1]),
            *(2, 1e-5, 0.0, f32, True, 4),
        ),
        "norm_linear_backward": (
            *([out.flatten(2), kv.flatten(2)], residual, x, x, rstd, None, norm, None, qkv[:2], [0, 1]),
            *(*one, f32, [True, True, False]),
        ),
        "glu_linear": (leaf(2, 5, 24), leaf(2, 5, 24), leaf(16, 24), leaf(16), 4, f32, 5),
        "glu_linear_backward": (x, gate, up, mlp[2], 4, True, True),
        "norm_mlp": (
            *(leaf(2, 5, 16), leaf(2, 5, 16), leaf(16), leaf(16)),
            *([leaf(24, 16), leaf(24, 16), leaf(16, 24)], [leaf(24), leaf(16)], [0, 2], *one, 4, f32, True),
        ),
        "norm_mlp_backward": (
            *(x, residual, None, x, rstd, None, norm, norm, mlp, [torch.randn(24)], [1], [0, 2], [1]),
            *(*one, 4, f32, [True, True, True]),
        ),
        "norm_attention": (
            *(leaf(2, 5, 16), leaf(16), leaf(16), [leaf(16, 16), leaf(8, 16), leaf(8, 16)], [leaf(8)], [2], *tables),
            *(*one, 4, False, True, 0.5, f32),
        ),
        "norm_attention_backward": (
            *(out, x, out, lse, rstd, None, norm, None, qkv, [torch.randn(8)], [2], *tables, [0, 2], [2]),
            *(*one, 4, False, True, 0.5, f32, [True, True, False]),
        ),
    }
