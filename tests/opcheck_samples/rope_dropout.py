"""rope with a packed qkv and positions; dropout with a residual."""

import torch

import pykernels.functional as F


def samples() -> dict[str, tuple]:
    qkv = torch.randn(2, 6, 8, 16, requires_grad=True)
    cos, sin = F.rope_tables(16, 10, rotary_dim=12)
    x, residual = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40, requires_grad=True)
    return {
        "rope": (qkv[:, :, :4], qkv[:, :, 4:6], cos, sin, torch.randint(0, 10, (2, 6)), True, False),
        "dropout": (x, residual, 0.3, torch.tensor([5, 9])),
    }
