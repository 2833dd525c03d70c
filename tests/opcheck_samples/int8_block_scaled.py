"""Block-scaled products: ragged tiles in both directions, a gradient for x and the bias."""

import torch

import pykernels.functional as F


def samples() -> dict[str, tuple]:
    x = torch.randn(6, 200)
    weight, weight_scale = F.quantize_blockwise(torch.randn(140, 200), (128, 128))
    q, scale = F.quantize_blockwise(x, 128)
    bias = torch.randn(140)
    return {
        "int8_block_scaled_matmul": (q, weight, scale, weight_scale, bias, torch.bfloat16),
        "int8_block_scaled_linear": (
            x.clone().requires_grad_(),
            weight,
            weight_scale,
            bias.clone().requires_grad_(),
            None,
        ),
    }
