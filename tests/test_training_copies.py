"""int8_training_linear: which INT8 copies of its operands are made."""

import types

import pytest
import torch

from pykernels.ops import int8_training
from tests.test_training import SWITCHES, config, problem, run


@pytest.mark.parametrize("stochastic", (True, False))
@pytest.mark.parametrize("output, grad_input, grad_weight", SWITCHES)
def test_no_copy_is_quantised_that_no_product_reads(output, grad_input, grad_weight, stochastic, monkeypatch):
    """Counted: one quantize_both where rows and columns of a tensor are both needed, else the one that is."""
    seen = []

    class Recorder:
        def __getattr__(self, name):
            op = getattr(torch.ops.pykernels, name)

            def call(*args, **how):
                if name.startswith("quantize_"):
                    seen.append((name.removeprefix("quantize_"), tuple(args[0].shape)))
                return op.default(*args, **how)

            return types.SimpleNamespace(default=call)

    monkeypatch.setattr(int8_training, "_ops", Recorder())
    x, weight, bias, grad = problem((6,), 8, 16)
    run(x, weight, bias, grad, config(output, grad_input, grad_weight, stochastic))
    want = []
    if output:
        want.append(("rowwise", (8, 16)))
    if output or grad_weight:
        want.append(("both" if output and grad_weight else "rowwise" if output else "transposed", (6, 16)))
    if grad_input or grad_weight:
        want.append(("both" if grad_input and grad_weight else "rowwise" if grad_input else "transposed", (6, 8)))
    if grad_input:
        want.append(("transposed", (8, 16)))
    assert sorted(seen) == sorted(want)
