"""Linear layer with an INT8 weight and activations quantised per token (dynamic) or by one fixed scale (static)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import functional as F
from ..quantization.config import Int8DynamicConfig, Int8StaticConfig, Int8WeightConfig
from ._int8_module import Int8Module, check_float_linear


class Int8Linear(Int8Module):
    """Drop-in for ``nn.Linear``: ``y = x @ (weight * scale).T + bias``, with an INT8 product (W8A8).

    Each row of the input is quantised with its own scale. A static layer (``static=True``) uses the calibrated
    ``input_scale`` instead. Every tensor is a buffer, so the layer is frozen: gradients flow to the input, and to
    ``bias`` after ``layer.bias.requires_grad_()``; backward saves what ``functional.int8_linear`` saves.

    Buffers:
        weight: int8 [out_features, in_features], contiguous.
        scale: float32 [out_features]; stays float32 under ``.to(dtype)``.
        bias: [out_features] in the layer's float dtype, or None.
        input_scale: float32 scalar, only when static.

    Shapes: input float32, bfloat16 or float16 [..., in_features] -> [..., out_features] in the input's dtype.

    ``from_float`` picks the subclass that the config asks for.
    """

    bias: Tensor | None
    input_scale: Tensor | None
    mode = "dynamic"
    fixed_dtypes: ClassVar = {"weight": torch.int8, "scale": torch.float32, "input_scale": torch.float32}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        static: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(self._scale_shape(), dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device) if static else None)

    def _scale_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    @classmethod
    def from_float(cls, linear: nn.Linear, config: Int8WeightConfig | None = None, *, name: str = "") -> Int8Linear:
        """Quantise ``linear``; it is left as it was.

        Args:
            linear: finite weight in float32, bfloat16 or float16.
            config: ``Int8DynamicConfig`` (default), ``Int8StaticConfig``, ``Int8WeightOnlyConfig`` or
                ``Int8OutlierConfig``; it decides the class that comes back.
            name: the layer's name in the model, under which ``config.calibration`` knows it.

        Raises:
            TypeError: ``linear`` or ``config`` is of another type, or the weight of another dtype.
            ValueError: a weight or bias is not finite, or the calibration does not know ``name``.
        """
        from . import linear_class_for  # the subclasses import this module

        config = Int8DynamicConfig() if config is None else config
        check_float_linear(linear, name or "linear")
        return linear_class_for(config)._from_checked(linear, config, name)

    @classmethod
    def _from_checked(cls, linear: nn.Linear, config: Int8WeightConfig, name: str) -> Int8Linear:
        static = isinstance(config, Int8StaticConfig)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, static=static, device="meta")
        layer.weight, layer.scale = F.quantize_rowwise(linear.weight.detach())
        if isinstance(config, Int8StaticConfig):
            layer.input_scale = config.calibration.input_scale(name).to(linear.weight.device)
        layer._copy_bias(linear)
        return layer

    def _copy_bias(self, linear: nn.Linear) -> None:
        if linear.bias is not None:
            self.bias = linear.bias.detach().clone()
        self.train(linear.training)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] that the INT8 codes stand for."""
        return F.dequantize_rowwise(self.weight, self.scale, out_dtype=dtype)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ``nn.Linear`` with the dequantised weight, in ``dtype`` (default: the bias's dtype, else float32)."""
        dtype = dtype or (torch.float32 if self.bias is None else self.bias.dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.dequantized_weight(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        return F.int8_linear(input, (self.weight, self.scale), self.bias, x_scale=self.input_scale)

    def extra_repr(self) -> str:
        mode = "static" if self.input_scale is not None else self.mode
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, mode={mode}"
        )
