"""The products of a mixture of experts: an expert without rows, rows without an expert."""

import torch

import pykernels.functional as F


def samples() -> dict[str, tuple]:
    x, counts = torch.randn(9, 24), torch.tensor([5, 0, 2], dtype=torch.int32)
    q, scale = F.quantize_rowwise(x)
    weight, weight_scale = F.quantize_rowwise(torch.randn(3, 10, 24))
    bias = torch.randn(3, 10)
    return {
        "int8_grouped_matmul": (q, weight, counts, scale, weight_scale, bias.clone(), 4, torch.bfloat16),
        "int8_grouped_linear": (
            x.requires_grad_(),
            weight,
            weight_scale,
            counts.long(),
            bias.requires_grad_(),
            1,
            None,
        ),
        "int8_grouped_linear_backward": (torch.randn(9, 10), weight, weight_scale, counts, torch.bfloat16),
        "grouped_sum": (torch.randn(9, 10), counts),
    }
