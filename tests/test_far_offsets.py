"""Rows that lie more than 2^31 elements apart: an offset computed in 32 bits would read another place, or crash.

The 4 GiB between the rows are never touched, so they take no memory. The other operations test this in their own files.
"""

import pytest
import torch

import pykernels.functional as F
from pykernels.ops._enums import GATED_ACTIVATIONS
from tests.matrix import BACKENDS, DEVICE, use

COLUMNS = 40  # whole vectors of every instruction set, and elements that are left
SILU = GATED_ACTIVATIONS["silu"]


@pytest.fixture(scope="module")
def space() -> torch.Tensor:
    return torch.empty(2**31 + 4 * COLUMNS, dtype=torch.bfloat16, device=DEVICE)


def far(space: torch.Tensor, first: int) -> torch.Tensor:
    """[2, COLUMNS] whose second row lies 2^31 elements behind the first."""
    rows = space[first:].as_strided((2, COLUMNS), (2**31, 1))
    rows.copy_(torch.randn(2, COLUMNS))
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_activation(space: torch.Tensor, backend: str) -> None:
    gate, up, grad = (far(space, i * COLUMNS) for i in range(3))
    near = [t.clone() for t in (gate, up, grad)]
    with use(backend):
        got = torch.ops.pykernels.gated_activation(gate, up, SILU)
        want = torch.ops.pykernels.gated_activation(near[0], near[1], SILU)
        assert torch.equal(got, want)
        got = torch.ops.pykernels.gated_activation_backward(grad, gate, up, SILU)
        want = torch.ops.pykernels.gated_activation_backward(near[2], near[0], near[1], SILU)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy(space: torch.Tensor, backend: str) -> None:
    target = torch.tensor([3, COLUMNS - 1], device=DEVICE)
    logits = far(space, 0)
    results = []
    with use(backend):
        for x in (logits, logits.clone()):
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(x, target, label_smoothing=0.1)
            results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    assert all(torch.equal(g, w) for g, w in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_distillation(space: torch.Tensor, backend: str) -> None:
    student, teacher = far(space, 0), far(space, COLUMNS)
    results = []
    with use(backend):
        for s, t in ((student, teacher), (student.clone(), teacher.clone())):
            s = s.detach().requires_grad_()
            loss = F.distillation_loss(s, t, temperature=2.0)
            results.append((loss.detach(), *torch.autograd.grad(loss, s)))
    assert all(torch.equal(g, w) for g, w in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_grouped_matmul(space: torch.Tensor, backend: str) -> None:
    """Rows of a and experts of b."""
    bytes_ = space.view(torch.int8)
    a = bytes_.as_strided((2, COLUMNS), (2**31, 1))
    b = bytes_[COLUMNS:].as_strided((2, 3, COLUMNS), (2**31, COLUMNS, 1))
    for t in (a, b):
        t.copy_(torch.randint(-128, 128, t.shape, dtype=torch.int8))
    counts = torch.tensor([1, 1], device=DEVICE)
    with use(backend):
        got = F.int8_grouped_matmul(a, b, counts, out_dtype=torch.int32)
    assert torch.equal(got, (a[:, None].int() * b.int()).sum(2, dtype=torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_block_scaled_matmul(space: torch.Tensor, backend: str) -> None:
    bytes_ = space.view(torch.int8)
    a, b = (bytes_[first:].as_strided((2, COLUMNS), (2**31, 1)) for first in (0, COLUMNS))
    for t in (a, b):
        t.copy_(torch.randint(-128, 128, t.shape, dtype=torch.int8))
    one = torch.ones(2, 1, device=DEVICE)
    with use(backend):
        got = F.int8_block_scaled_matmul(a, b, one, one[:1])
    assert torch.equal(got, (a[:, None].int() * b.int()).sum(2).float())
