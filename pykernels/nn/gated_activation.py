"""Gated activations as layers without parameters: of one packed tensor, or of two."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F
from ..ops._enums import gelu_code


class SwiGLU(nn.Module):
    """silu(gate) * up, see functional.swiglu: packed [..., 2 * I] -> [..., I], or gate and up [..., I] each.

    Saves for backward its inputs alone, by reference.
    """

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return F.swiglu(gate, up)


class GEGLU(nn.Module):
    """gelu(gate) * up, see functional.geglu; approximate is "none" or "tanh", as in torch.nn.GELU."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        gelu_code("GEGLU", approximate)  # an unknown name is refused here, not at the first call
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return F.geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class ReGLU(nn.Module):
    """relu(gate) * up, see functional.reglu; packed or not, as SwiGLU."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return F.reglu(gate, up)


class ReLU2(nn.Module):
    """relu(x)^2, see functional.relu2. Saves its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu2(x)
