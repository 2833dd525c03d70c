"""A linear layer that trains with INT8 products and keeps its parameters in float."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import functional as F
from ..quantization.config import Int8TrainingConfig


class Int8TrainingLinear(nn.Linear):
    """torch.nn.Linear whose output, grad-input and grad-weight are INT8 products where ``config`` says so.

    x [..., in_features] -> [..., out_features], in x's dtype. The parameters stay the float tensors that an optimizer
    updates, so checkpoints are those of torch.nn.Linear. With x of M rows it saves M*K + 4*K bytes for backward
    (M*K*itemsize when config.grad_weight is False), and 8 for the seed with stochastic rounding:
    see pykernels.functional.int8_training_linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Int8TrainingConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.config = Int8TrainingConfig() if config is None else config

    @classmethod
    def from_float(cls, linear: nn.Linear, config: Int8TrainingConfig | None = None) -> Int8TrainingLinear:
        """The same layer trained in INT8. It shares ``linear``'s parameters, so an optimizer made before still works.

        Raises TypeError for anything but a torch.nn.Linear, and for one whose weight is computed (parametrized).
        """
        if not isinstance(linear, nn.Linear) or parametrize.is_parametrized(linear):
            raise TypeError(f"from_float: linear must be a torch.nn.Linear with a plain weight, got {type(linear)}")
        layer = cls(1, 1, device="meta", config=config)
        _share(linear, layer)
        return layer

    def to_float(self) -> nn.Linear:
        """The torch.nn.Linear that shares this layer's parameters."""
        linear = nn.Linear(1, 1, device="meta")
        _share(self, linear)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return F.int8_training_linear(x, self.weight, self.bias, self.config)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, config={self.config}"


def _share(source: nn.Linear, target: nn.Linear) -> None:
    target.in_features, target.out_features = source.in_features, source.out_features
    target.weight, target.bias = source.weight, source.bias
    target.train(source.training)
