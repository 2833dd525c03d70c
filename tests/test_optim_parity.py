"""32-bit optimizers against torch.optim, over the inputs that torch tests its own with."""

import copy
import importlib.util
import sys
import types
import unittest

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
]
CASES += [
    pytest.param(
        optim.Adam, torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, id="Adam-decoupled"
    ),
    pytest.param(optim.AdamW, torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-3}, id="AdamW-betas"),
    pytest.param(optim.RMSprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9}, id="RMSprop-centered"),
]


def test_the_grid_is_torchs() -> None:
    assert len(CASES) >= 35


@pytest.mark.parametrize(("ours", "theirs", "kwargs"), CASES)
def test_parity(ours: type, theirs: type, kwargs: dict) -> None:
    kwargs = {k: v for k, v in kwargs.items() if k != "capturable"}  # torch refuses it for CPU parameters
    kept = copy.deepcopy(kwargs)
    got = run(ours, torch.float32, STEPS, **kwargs)
    want = run(theirs, torch.float32, STEPS, **kwargs)
    truth = run(theirs, torch.float64, STEPS, **kept)
    for g, w, t in zip(got, want, truth, strict=True):
        if not t.numel():
            continue
        scale = EPS * t.abs().max().item()
        print(
            "PAR",
            ours.__name__,
            (g - w).abs().max().item() / scale,
            (g - t).abs().max().item() / scale,
            (w - t).abs().max().item() / scale,
        )
