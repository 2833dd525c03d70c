"""layer_norm with weight and bias against torch.nn.functional.layer_norm. Shape is M x K; see bench/norms.py."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as torch_functional
from torch import Tensor

from ... import functional
from .. import norms
from ..case import Cell

OP = "layer_norm"
EPS = 1e-5
work = partial(norms.work, statistics=2)
build = norms.build


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch_functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, weight, bias, eps=EPS)


def cells(quick: bool, cuda: bool) -> list[Cell]:
    return norms.cells(OP, 2, ours, plain, 2, quick, cuda)
