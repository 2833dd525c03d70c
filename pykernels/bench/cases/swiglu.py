"""swiglu of two tensors against silu(gate) * up in plain PyTorch. Shape is M x I; see bench/gated_activations.py."""

from __future__ import annotations

import torch.nn.functional as torch_functional
from torch import Tensor

from ... import functional
from .. import gated_activations
from ..case import Cell

OP = "swiglu"
work = gated_activations.work
build = gated_activations.build


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return torch_functional.silu(gate) * up


def cells(quick: bool, cuda: bool) -> list[Cell]:
    return gated_activations.cells(OP, functional.swiglu, plain, quick, cuda)
