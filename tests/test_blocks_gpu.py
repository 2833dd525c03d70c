"""The operators of the fused blocks on a GPU against their references on the CPU; `make gpu-check` runs it."""

from __future__ import annotations

import pytest
import torch

import pykernels
from pykernels import _library
from tests import opcheck_samples

pytestmark = pytest.mark.gpu
SAMPLES = opcheck_samples.collect()
HOST_ARGUMENTS = {"key"}  # a Philox key stays on the CPU, where its launcher reads it
# tests/test_optimizer_gpu.py has them: they take lists and write into what they get.
OPTIMIZER = {"optimizer_update_", "optimizer_norms", "squared_norms", "scale_tensors_"}


def on_gpu(name: str) -> list:
    arguments = getattr(torch.ops.pykernels, name).default._schema.arguments
    return [
        value.detach().cuda() if isinstance(value, torch.Tensor) and argument.name not in HOST_ARGUMENTS else value
        for argument, value in zip(arguments, SAMPLES[name], strict=False)
    ]


@pytest.mark.parametrize("name", sorted(n for n in SAMPLES if n not in OPTIMIZER and not _library.OPS[n].composite))
def test_triton_agrees_with_the_reference(name: str) -> None:
    """The sample of every operator: integers as they are but for ties, floats to a few roundings of the largest."""
    op = getattr(torch.ops.pykernels, name).default
    with torch.no_grad():
        with pykernels.backend("triton"):
            assert _library.serving(name, "cuda")[0] == "triton"
            got = op(*on_gpu(name))
        want = _library.OPS[name].reference(*(v.detach() if isinstance(v, torch.Tensor) else v for v in SAMPLES[name]))
    for g, w in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (got, want)), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        if not g.numel():
            continue
        error, size = (g.cpu().double() - w.double()).abs().max(), w.double().abs().max()
        bound = 1.0 if not g.dtype.is_floating_point else 8 * torch.finfo(g.dtype).eps * float(size) + 1e-30
        assert float(error) <= bound, f"{name}: off by {float(error)}, of at most {bound}"
