"""geglu of two tensors against gelu(gate) * up in plain PyTorch. Shape is M x I; see bench/gated_activations.py."""

from __future__ import annotations

import torch.nn.functional as torch_functional
from torch import Tensor

from ... import functional
from .. import gated_activations
from ..case import Cell

OP = "geglu"
work = gated_activations.work
build = gated_activations.build


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return torch_functional.gelu(gate) * up


def cells(quick: bool, cuda: bool) -> list[Cell]:
    return gated_activations.cells(OP, functional.geglu, plain, quick, cuda)
