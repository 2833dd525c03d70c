"""rms_norm with a weight against torch.nn.functional.rms_norm. Shape is M x K; see bench/norms.py."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as torch_functional
from torch import Tensor

from ... import functional
from .. import norms
from ..case import Cell

OP = "rms_norm"
EPS = 1e-6
work = partial(norms.work, statistics=1)
build = norms.build


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return torch_functional.rms_norm(x, x.shape[-1:], weight, EPS)


def ours(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight, eps=EPS)


def cells(quick: bool, cuda: bool) -> list[Cell]:
    return norms.cells(OP, 1, ours, plain, 1, quick, cuda)
