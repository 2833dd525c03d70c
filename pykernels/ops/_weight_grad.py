"""What the backward of a linear layer with a frozen int8 weight needs: grad @ dequantised weight, a slice at a time."""

import torch

SLICE = 1024  # output columns whose weight is dequantised at once


def grad_input(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """grad [M, N], weight int8 [N, K], scale [N] or [N, groups] -> [M, K], accumulated in float32.

    Holds at most SLICE rows of the weight in float: 4 * SLICE * K bytes.
    """
    with torch.autocast(grad.device.type, enabled=False):
        return _grad_input(grad, weight, scale).to(out_dtype)


def _grad_input(grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    n, k = weight.shape
    total = torch.zeros(grad.shape[0], k, dtype=torch.float32, device=grad.device)
    for begin in range(0, n, SLICE):
        rows = slice(begin, min(begin + SLICE, n))
        part = weight[rows].float()
        if scale.dim() == 2:
            part = part * scale[rows].repeat_interleave(k // scale.shape[1], dim=1)
        else:
            part = part * scale[rows, None]
        total = total.addmm(grad[:, rows].float(), part)
    return total
