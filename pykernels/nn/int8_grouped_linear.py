"""The experts of a mixture: linear layers with INT8 weights, stacked, and one call for the rows of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from ._int8_module import Int8Module, check_float_linear, check_float_weight, describe, has_non_finite


class Int8GroupedLinear(Int8Module):
    """``y_e = x_e @ (weight[e] * scale[e]).T + bias[e]`` for the rows of each expert e, with INT8 products (W8A8).

    Each expert's rows get what an ``Int8Linear`` of it would give them, bit for bit, in one call for all experts that
    does not look at the counts on a GPU. Every tensor is a buffer, so the layer is frozen: gradients flow to the input,
    and to ``bias`` after ``layer.bias.requires_grad_()``. Backward keeps ``functional.int8_grouped_linear``'s, which is
    the weights, scales and counts by reference.

    Buffers:
        weight: int8 [num_experts, out_features, in_features], contiguous.
        scale: float32 [num_experts, out_features]; stays float32 under ``.to(dtype)``.
        bias: [num_experts, out_features] in the layer's float dtype, or None.

    Shapes: input float32, bfloat16 or float16 [T, in_features], its rows sorted by expert, and counts int32 or int64
    [num_experts] on the input's device, how many rows each has -> [T, out_features] in the input's dtype. Rows beyond
    the sum of the counts become 0.
    """

    bias: Tensor | None
    fixed_dtypes: ClassVar = {"weight": torch.int8, "scale": torch.float32}

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.out_features = out_features
        rows = (num_experts, out_features)
        self.register_buffer("weight", torch.zeros(*rows, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(rows, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(rows, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_float(
        cls, experts: Sequence[nn.Linear] | nn.ModuleList | Tensor, bias: Tensor | None = None
    ) -> Int8GroupedLinear:
        """Quantise experts; they are left as they were. One at a time, so that no float copy of them all is made.

        Args:
            experts: linear layers of one shape, dtype and device, all with a bias or none, or their weights as one
                tensor [num_experts, out_features, in_features]; finite, in float32, bfloat16 or float16.
            bias: [num_experts, out_features] beside such a tensor; layers have their own.

        Raises:
            TypeError: ``experts`` or one of them is of another type, or a weight of another dtype.
            ValueError: no experts, experts that differ, a bias of another shape, or a value that is not finite.
        """
        weights, biases, training = _checked(experts, bias)
        first = weights[0]
        layer = cls(len(weights), first.shape[1], first.shape[0], biases is not None, device="meta")
        layer.weight = torch.empty(len(weights), *first.shape, dtype=torch.int8, device=first.device)
        layer.scale = torch.empty(len(weights), first.shape[0], device=first.device)
        for expert, weight in enumerate(weights):
            layer.weight[expert], layer.scale[expert] = F.quantize_rowwise(weight)
        if biases is not None:
            layer.bias = torch.stack(list(biases))
        return layer.train(training)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [num_experts, out_features, in_features] that the INT8 codes stand for."""
        return F.dequantize_rowwise(self.weight, self.scale, out_dtype=dtype)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.ModuleList:
        """An ``nn.Linear`` for each expert with its dequantised weight, in ``dtype`` (default: as ``Int8Linear``)."""
        dtype = dtype or (torch.float32 if self.bias is None else self.bias.dtype)
        linears = nn.ModuleList()
        for expert in range(self.num_experts):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
            weight = F.dequantize_rowwise(self.weight[expert], self.scale[expert], out_dtype=dtype)
            linear.weight = nn.Parameter(weight)
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias[expert].detach().to(dtype, copy=True))
            linears.append(linear)
        return linears.train(self.training)

    def forward(self, input: Tensor, counts: Tensor) -> Tensor:
        return F.int8_grouped_linear(input, (self.weight, self.scale), counts, self.bias)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


def _checked(
    experts: Sequence[nn.Linear] | nn.ModuleList | Tensor, bias: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None, bool]:
    """(weight of each expert, bias of each or None, training) of what from_float takes."""
    if isinstance(experts, Tensor):
        return (*_checked_stack(experts, bias), True)
    if bias is not None:
        raise ValueError("bias: got a tensor, accepts None beside linear layers, which have their own.")
    if not isinstance(experts, (Sequence, nn.ModuleList)):
        raise TypeError(f"experts: got {describe(experts)}, accepts linear layers or a tensor of their weights.")
    linears: list[nn.Linear] = list(experts)  # type: ignore[arg-type]  # what else they are is refused below
    if not linears:
        raise ValueError("experts: got none, accepts 1 or more.")
    for expert, linear in enumerate(linears):
        check_float_linear(linear, f"experts[{expert}]")
        got, want = _kind(linear), _kind(linears[0])
        if got != want:
            raise ValueError(f"experts[{expert}]: got {got}, accepts what experts[0] is, {want}.")
    biases = None if linears[0].bias is None else [linear.bias.detach() for linear in linears]
    return [linear.weight.detach() for linear in linears], biases, linears[0].training


def _checked_stack(weights: Tensor, bias: Tensor | None) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    if weights.dim() != 3 or len(weights) == 0:
        raise ValueError(f"experts: got {describe(weights)}, accepts [num_experts, out_features, in_features].")
    for expert, weight in enumerate(weights):
        check_float_weight(weight, f"experts[{expert}]")
    if bias is None:
        return weights.detach().unbind(), None
    if bias.shape != weights.shape[:2] or not bias.is_floating_point():
        raise ValueError(f"bias: got {describe(bias)}, accepts a float tensor {list(weights.shape[:2])}.")
    if has_non_finite(bias):
        raise ValueError("bias: got NaN or infinite values, accepts finite ones.")
    return weights.detach().unbind(), bias.detach().unbind()


def _kind(linear: nn.Linear) -> str:
    """What experts have in common, for people."""
    with_bias = "without a bias" if linear.bias is None else "with a bias"
    return f"{describe(linear.weight)} on {linear.weight.device} {with_bias}"
