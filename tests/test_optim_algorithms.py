"""LAMB and Lion against the published algorithms in float64, and what norms do to an update."""

import pytest
import torch
from torch import Tensor

from pykernels import optim

from .optim_matrix import EPS, gradients, parameters, run, train

STEPS = 30
BETA1, BETA2, LR, DECAY = 0.9, 0.99, 3e-3, 0.05


def lamb(params: list[Tensor], max_unorm: float = 0.0, max_grad_norm: float = 0.0, adapt: bool = True) -> list[Tensor]:
    """Algorithm 2 of You et al. (2020) with phi(z) = z and bias correction."""
    p = [x.detach().double().clone() for x in params]
    m, v = [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p]
    for t in range(1, STEPS + 1):
        grads = [g.double() for g in gradients(t - 1, params)]
        if max_grad_norm:
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
            grads = [g / max(1.0, norm / max_grad_norm) for g in grads]
        for i, g in enumerate(grads):
            m[i] = BETA1 * m[i] + (1 - BETA1) * g
            v[i] = BETA2 * v[i] + (1 - BETA2) * g * g
            m_hat, v_hat = m[i] / (1 - BETA1**t), v[i] / (1 - BETA2**t)
            u = m_hat / (v_hat.sqrt() + 1e-6) + DECAY * p[i]
            trust = p[i].norm() / u.norm() if adapt and p[i].norm() > 0 and u.norm() > 0 else 1.0
            if max_unorm and u.norm() * trust > max_unorm * p[i].norm():
                trust = max_unorm * p[i].norm() / u.norm()
            p[i] -= LR * trust * u
    return p


def lion(params: list[Tensor], max_unorm: float = 0.0, max_grad_norm: float = 0.0, adapt: bool = True) -> list[Tensor]:
    """Algorithm 2 of Chen et al. (2023)."""
    p = [x.detach().double().clone() for x in params]
    m = [torch.zeros_like(x) for x in p]
    for t in range(1, STEPS + 1):
        for i, g in enumerate(gradients(t - 1, params)):
            update = torch.sign(BETA1 * m[i] + (1 - BETA1) * g.double())
            scale = 1.0
            if max_unorm and update.norm() > max_unorm * p[i].norm():
                scale = max_unorm * p[i].norm() / update.norm()
            p[i] = p[i] * (1 - LR * DECAY) - LR * scale * update
            m[i] = BETA2 * m[i] + (1 - BETA2) * g.double()
    return p


COMMON = {"lr": LR, "betas": (BETA1, BETA2), "weight_decay": DECAY}
CASES = [
    (optim.LAMB, lamb, {}),
    (optim.LAMB, lamb, {"max_unorm": 0.5}),
    (optim.LAMB, lamb, {"max_unorm": 0.5, "adapt": False}),
    (optim.LAMB, lamb, {"max_grad_norm": 50.0}),
    (optim.LAMB, lamb, {"adapt": False}),
    (optim.Lion, lion, {}),
    (optim.Lion, lion, {"max_unorm": 0.3}),
]
IDS = [f"{case[0].__name__}-{'-'.join(map(str, case[2])) or 'plain'}" for case in CASES]


@pytest.mark.parametrize(("cls", "published", "kwargs"), CASES, ids=IDS)
def test_published(cls: type, published: object, kwargs: dict) -> None:
    """Each step rounds the parameter once and its update a few times: a few ulps of the largest after 30."""
    got = run(cls, torch.float32, STEPS, **COMMON, **kwargs)
    want = published(parameters(), **kwargs)  # type: ignore[operator]
    without = published(parameters())  # type: ignore[operator]
    differs = False
    for g, w, other in zip(got, want, without, strict=True):
        if w.numel():
            bound = 16 * EPS * w.abs().max()
            assert (g - w).abs().max() <= bound
            differs |= bool((w - other).abs().max() > 100 * bound)
    assert differs == bool(kwargs), "the option must matter at these settings"


def test_lamb_keeps_the_gradients_it_clips() -> None:
    params = parameters()
    optimizer = optim.LAMB(params, max_grad_norm=1e-3)
    train(optimizer, params, 1)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients(0, params), strict=True))


def test_a_parameter_of_zeros_leaves_zero() -> None:
    """Its norm is 0: neither the trust ratio nor max_unorm may hold it there."""
    for kwargs in ({}, {"max_unorm": 0.1}):
        p = torch.zeros(10, requires_grad=True)
        p.grad = torch.ones(10)
        optim.LAMB([p], **kwargs).step()
        assert bool((p < 0).all())


def test_other_algorithms_take_max_unorm() -> None:
    """AdamW's first direction is sign(g): of norm sqrt(n), cut to max_unorm |p|."""
    p = torch.full((100,), 0.5, requires_grad=True)
    p.grad = torch.ones(100)
    optim.AdamW([p], lr=0.1, weight_decay=0.0, max_unorm=0.2).step()
    torch.testing.assert_close(p.detach(), torch.full((100,), 0.5 - 0.1 * 0.2 * 0.5))
