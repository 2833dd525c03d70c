"""linear(act(x)) as one node that keeps x, or x in INT8, and computes act(x) again: an MLP without a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import functional as F
from ._probe import ACTIVATIONS

_aten = torch.ops.aten
_BACKWARD = {
    "silu": lambda grad, x: _aten.silu_backward(grad, x),
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
}


class ActivationLinear(torch.autograd.Function):
    """x [..., K], weight [K, N] if transposed (GPT-2's Conv1D) or [N, K], bias [N] or None -> [..., N].

    Saved for backward, with M rows: x, M*K*itemsize bytes; with a group_size, M*K and 4*M for each group instead.
    Under autocast the product is in its dtype, as torch.nn.functional.linear's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        transposed: bool,
        group_size: int | None,
    ) -> Tensor:
        device = x.device.type
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on meta
        compute = torch.get_autocast_dtype(device) if on else x.dtype
        ctx.options = activation, transposed, group_size, x.dtype
        kept = (x, None) if group_size is None else F.quantize_blockwise(x, group_size)
        ctx.save_for_backward(*kept, weight, bias)
        wide = weight.to(compute)
        act = ACTIVATIONS[activation](x).to(compute)
        return torch.nn.functional.linear(
            act, wide.t() if transposed else wide, None if bias is None else bias.to(compute)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight, bias = ctx.saved_tensors
        activation, transposed, group_size, dtype = ctx.options
        if scale is not None:
            x = F.dequantize_blockwise(x, scale, group_size, out_dtype=dtype)
        to_x = to_weight = to_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            wide = weight.to(grad.dtype)
            to_act = (rows @ (wide.t() if transposed else wide)).view(x.shape)
            to_x = _BACKWARD[activation](to_act.to(dtype), x)
        if ctx.needs_input_grad[1]:
            act = ACTIVATIONS[activation](x).to(grad.dtype).reshape(-1, x.shape[-1])
            to_weight = (act.t() @ rows if transposed else rows.t() @ act).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0).to(bias.dtype)
        return to_x, to_weight, to_bias, None, None, None
