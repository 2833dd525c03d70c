"""What optimizer_update_ and optimizer_norms refuse, in the same words on every backend, and the norms."""

from collections.abc import Callable

import pytest
import torch

from pykernels.ops import _optimizer_reference as rules
from tests.matrix import DEVICE, ISAS, use
from tests.optimizer_problems import STATE_KINDS, Problem, assert_same_bits, problem

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU kernels")

CODES = {"state": "codes", "dtype": torch.bfloat16, "rounding": rules.KAHAN}


def put(name: str, i: int, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Problem], None]:
    def change(given: Problem) -> None:
        getattr(given, name)[i] = value(getattr(given, name)[i])

    return change


def drop(name: str) -> Callable[[Problem], None]:
    return lambda given: getattr(given, name).pop()


def assign(name: str, value: object) -> Callable[[Problem], None]:
    return lambda given: setattr(given, name, value)


BAD: dict[str, Callable[[Problem], None]] = {
    "expected algorithm to be from 0 to 5, got 6": assign("algorithm", 6),
    "expected rounding to be from 0 to 3, got -1": assign("rounding", -1),
    "expected block_size to be positive, got 0": assign("block_size", 0),
    "expected grads to have 2 tensors, got 1": drop("grads"),
    "expected states to have 4 tensors, got 3": drop("states"),
    "expected steps to have 2 tensors, got 1": drop("steps"),
    "expected scales to have 0 or 4 tensors, got 3": drop("scales"),
    "expected extras to have 2 tensors, got 1": drop("extras"),
    "expected params[0] to be float32, bfloat16, float16 or float64, got int32": put("params", 0, lambda t: t.int()),
    "expected params[1] to be torch.bfloat16 as params[0], got torch.float32": put("params", 1, lambda t: t.float()),
    "expected params[1] to be contiguous, got strides [1, 4]": put("params", 1, lambda t: t.t().contiguous().t()),
    "expected grads[1] to be contiguous, got strides [1, 4]": put("grads", 1, lambda t: t.t().contiguous().t()),
    "expected grads[1] to be float32, bfloat16, float16 or float64, got int64": put("grads", 1, lambda t: t.long()),
    "expected grads[1] to have the dtype of grads[0]": put("grads", 1, lambda t: t.float()),
    "expected grads[0] to be contiguous of the shape of params[0], [3, 70], got [210]": put(
        "grads", 0, lambda t: t.view(-1)
    ),
    "expected steps[1] to be float32, got int64": put("steps", 1, lambda t: t.long()),
    "expected steps[0] to have 1 element, got 2": put("steps", 0, lambda t: torch.zeros(2)),
    "expected extras[0] to be bfloat16, got int16": put("extras", 0, lambda t: t.view(torch.int16)),
    "expected extras[1] to be contiguous of the shape of params[1], [4, 4], got [16]": put(
        "extras", 1, lambda t: t.view(-1)
    ),
    "expected states[2] to be uint8, got torch.int8": put("states", 2, lambda t: t.view(torch.int8)),
    "expected states[3] to be uint8, got torch.int8": put("states", 3, lambda t: t.view(torch.int8)),
    "expected states[1] to be contiguous of the shape of params[1], [4, 4], got [16]": put(
        "states", 1, lambda t: t.view(-1)
    ),
    "expected scales[1] to be float32, got float64": put("scales", 1, lambda t: t.double()),
    "expected scales[0] to be contiguous of shape [3, 2], got [2, 3]": put("scales", 0, lambda t: t.view(2, 3)),
    "expected lr to have 1 element, got 2": assign("lr", [0.1, 0.2]),
    "expected grad_scale to be float32 or float64, got int64": assign("grad_scale", torch.ones((), dtype=torch.int64)),
    "expected found_inf to have 1 element, got 3": assign("found_inf", torch.zeros(3)),
    "expected place to have 0 or 6 integers, got 3": assign("place", [0, 0, 1]),
    "expected ratio to be float32, got float64": assign("ratio", torch.ones(2, dtype=torch.float64)),
    "expected ratio to have shape [2], got [3]": assign("ratio", torch.ones(3)),
}


@pytest.mark.parametrize("backend", ["reference", *ISAS[-1:]])
@pytest.mark.parametrize("message", list(BAD))
def test_refusals_change_nothing(backend: str, message: str) -> None:
    given = problem(rules.ADAM, shapes=[(3, 70), (4, 4)], **CODES)
    BAD[message](given)
    before = given.clone()
    with use(backend), pytest.raises(RuntimeError) as refusal:
        given.update()
    assert f"optimizer_update_: {message}" in str(refusal.value)
    assert_same_bits(given, before)


@pytest.mark.parametrize("backend", ["reference", *ISAS[-1:]])
def test_refusals_of_whole_lists(backend: str) -> None:
    cases = [
        (problem(rules.ADAM, state="float32").clone(extras=[torch.zeros(1)]), "expected extras to have 0 tensors"),
        (problem(rules.ADAM, state="codes", shapes=[(3, 4)]), "expected params[0] with 8-bit state to have at least 2"),
        (problem(rules.ADAM, state="float32", shapes=[(3, 4)]), "expected states[0] to be float32 or bfloat16"),
        (problem(rules.SGD, rules.MOMENTUM, dtype=torch.float64, state="float64", shapes=[(3,)]), "to be float64"),
        (problem(rules.ADAM, dtype=torch.bfloat16, rounding=rules.SPLIT_MASTER, shapes=[(3,)]), "for split_master"),
    ]
    flat = cases[1][0]
    for name in ("params", "grads", "states"):
        setattr(flat, name, [tensor.view(-1) for tensor in getattr(flat, name)])
    cases[2][0].states[0] = cases[2][0].states[0].half()
    cases[3][0].states[0] = cases[3][0].states[0].float()
    for name in ("params", "grads"):
        setattr(cases[4][0], name, [tensor.half() for tensor in getattr(cases[4][0], name)])
    for given, message in cases:
        before = given.clone()
        with use(backend), pytest.raises(RuntimeError) as refusal:
            given.update()
        assert message in str(refusal.value)
        assert_same_bits(given, before)


@pytest.mark.parametrize("backend", ["reference", *ISAS])
def test_no_tensors_is_no_work(backend: str) -> None:
    with use(backend):
        Problem(rules.ADAM, 0, [], [], [], [], [], [], rules.NEAREST, (0.9, 0.999, 1e-8, 0.0)).update()
        with pytest.raises(RuntimeError, match="expected params to have at least 1 tensor, got 0"):
            Problem(rules.ADAM, 0, [], [], [], [], [], [], rules.NEAREST, (0.9, 0.999, 1e-8, 0.0)).norms()


ALGORITHMS = [
    (rules.ADAM, 0),
    (rules.LAMB, rules.AMSGRAD),
    (rules.LION, 0),
    (rules.SGD, rules.MOMENTUM | rules.NESTEROV),
    (rules.ADAGRAD, 0),
    (rules.RMSPROP, rules.MOMENTUM | rules.CENTERED),
]


@pytest.mark.parametrize("state", STATE_KINDS)
@pytest.mark.parametrize(("algorithm", "flags"), ALGORITHMS)
def test_norms(algorithm: int, flags: int, state: str) -> None:
    """Within 1e-6 of the sums in float64, the same for any number of threads, and nothing changed."""
    for dtype, rounding in ((torch.float32, 0), (torch.bfloat16, rules.KAHAN), (torch.bfloat16, rules.SPLIT_MASTER)):
        given = problem(algorithm, flags, dtype=dtype, state=state, rounding=rounding)
        given.grad_scale = torch.tensor(2.0)
        with use("reference"):
            given.update()
            wanted = given.norms()
        before = given.clone()
        for backend in ISAS:
            with use(backend):
                torch.testing.assert_close(given.norms(), wanted, rtol=1e-6, atol=0)
        assert_same_bits(given, before)


def test_norms_of_wide_ranges_and_threads() -> None:
    """Squares beyond float32's range count, and NaN is NaN."""
    given = problem(rules.SGD, shapes=[(300, 400), (5, 7), (2, 9), (0, 3), (4, 4)])
    given.numbers = (0.0, 0.0, 0.0, 0.0)
    given.grads[1] *= 1e-25
    given.params[1] *= 1e-22
    given.params[2] *= 1e22
    given.grads[4][1, 2] = float("nan")
    with use("reference"):
        wanted = given.norms()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for backend in ISAS:
                with use(backend):
                    found.append(given.norms())
    finally:
        torch.set_num_threads(before)
    for got in found:
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0, equal_nan=True)
    half = len(found) // 2
    for one, two in zip(found[:half], found[half:], strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())
