"""32-bit optimizers against torch.optim, over the inputs that torch tests its own with."""

import copy
import importlib.util
import inspect
import sys
import types
import unittest
from collections.abc import Iterator

import pytest
import torch

from pykernels import optim

from .optim_matrix import EPS, run

if importlib.util.find_spec("expecttest") is None:
    # torch's test helpers want it for a base class; the table of inputs does not.
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
from torch.testing._internal.common_optimizers import optim_db

STEPS = 100
NAMES = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")
CASES = [
    pytest.param(getattr(optim, info.optim_cls.__name__), info.optim_cls, given.kwargs, id=f"{name}-{given.desc}")
    for info in optim_db
    if (name := info.optim_cls.__name__) in NAMES
    for given in info.optim_inputs_func(device="cpu")
    if not given.kwargs.get("capturable")  # torch refuses it for CPU parameters
]
CASES += [
    pytest.param(
        optim.Adam, torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, id="Adam-decoupled"
    ),
    pytest.param(optim.AdamW, torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-3}, id="AdamW-betas"),
    pytest.param(optim.RMSprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9}, id="RMSprop-centered-0.9"),
]


def test_the_grid_is_torchs() -> None:
    assert len(CASES) >= 35


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's threads cost more than these small tensors do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Measured here after 100 steps: 2 ulps, and 6 for RMSprop.
ULPS = {"RMSprop": 8.0}


@pytest.mark.parametrize(("ours", "theirs", "kwargs"), CASES)
def test_parity(ours: type, theirs: type, kwargs: dict) -> None:
    """After 100 steps: within a few float32 ulps (of the tensor's largest element) of torch's, and no further from a
    float64 run than twice as far as torch's is, give or take an ulp. One element alone is a random walk of 100 steps,
    in which either may be lucky: four ulps there.
    """
    kept = copy.deepcopy(kwargs)
    got = run(ours, torch.float32, STEPS, **kwargs)
    want = run(theirs, torch.float32, STEPS, **kwargs)
    truth = run(theirs, torch.float64, STEPS, **kept)
    for g, w, t in zip(got, want, truth, strict=True):
        if t.numel():
            ulp = EPS * t.abs().max()
            slack = 1.0 if t.numel() > 1 else 4.0
            assert (g - w).abs().max() <= ULPS.get(ours.__name__, 4.0) * ulp
            assert (g - t).abs().max() <= 2 * (w - t).abs().max() + slack * ulp


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_torchs(name: str) -> None:
    """The reference serves float64: as far from torch as rounding in another order takes it."""
    kwargs = {"weight_decay": 0.1}
    got = run(getattr(optim, name), torch.float64, 20, **kwargs)
    want = run(getattr(torch.optim, name), torch.float64, 20, **kwargs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [*NAMES, "LAMB", "Lion"])
def test_torchs_arguments(name: str) -> None:
    """torch's names, defaults and order, then options that are keywords only."""
    ours = inspect.signature(getattr(optim, name)).parameters
    if name in NAMES:
        theirs = inspect.signature(getattr(torch.optim, name)).parameters
        assert [(p.name, p.default, p.kind) for p in theirs.values()] == [
            (p.name, p.default, p.kind) for p in ours.values() if p.kind != inspect.Parameter.VAR_KEYWORD
        ]
    with pytest.raises(TypeError, match="no_such"):
        getattr(optim, name)([torch.zeros(1, requires_grad=True)], no_such=1)
