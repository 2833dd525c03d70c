"""squared_norms and scale_tensors_ on every backend."""

import pytest
import torch

from tests.matrix import DEVICE, ISAS, use

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A span of 65536 from below, exactly and from above; whole vectors and rests; nothing.
SIZES = (0, 1, 7, 8, 33, 2048, 65535, 65536, 70001)


def tensors(scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)
        for dtype in DTYPES
        for size in SIZES
    ]


def norms(given: list[torch.Tensor]) -> torch.Tensor:
    return torch.ops.pykernels.squared_norms(given)


@pytest.mark.parametrize("backend", ISAS)
def test_norms_are_those_in_float64(backend: str) -> None:
    given = tensors()
    wanted = torch.stack([tensor.double().square().sum() for tensor in given])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with use(backend):
                found.append(norms(given))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=0)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("backend", ["reference", *ISAS])
def test_squares_beyond_float32_count(backend: str) -> None:
    given = [torch.tensor([1e25, 1.0]), torch.full((1000,), 1e-24), torch.zeros(9), torch.tensor([1.0, float("nan")]),
             torch.tensor([-float("inf"), 2.0]), torch.full((100,), 1e30, dtype=torch.bfloat16)]  # fmt: skip
    with use(backend):
        got = norms(given)
    wanted = torch.stack([tensor.double().square().sum() for tensor in given])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("factor", [0.37, 1e-12, float("nan")])
def test_scaling_is_the_reference_bit_for_bit(backend: str, factor: float) -> None:
    for dtype in (torch.float32, torch.float64):
        got, wanted = tensors(3.0), tensors(3.0)
        with use("reference"):
            torch.ops.pykernels.scale_tensors_(wanted, torch.tensor(factor, dtype=dtype))
        with use(backend):
            torch.ops.pykernels.scale_tensors_(got, torch.tensor(factor, dtype=dtype))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert factor != factor or any(not torch.equal(a, b) for a, b in zip(got, tensors(3.0), strict=True))


@pytest.mark.parametrize("backend", ["reference", *ISAS])
def test_a_factor_of_one_writes_nothing(backend: str) -> None:
    given = tensors()
    versions = [tensor.clone() for tensor in given]
    with use(backend):
        torch.ops.pykernels.scale_tensors_(given, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(given, versions, strict=True))


@pytest.mark.parametrize("backend", ["reference", *ISAS[-1:]])
def test_refusals(backend: str) -> None:
    one = torch.ones(3)
    cases = [
        ([], "expected tensors to have at least 1 tensor, got 0"),
        ([one, one.int()], "expected tensors[1] to be float32, bfloat16, float16 or float64, got int32"),
        ([one, torch.ones(3, 4).t()], "expected tensors[1] to be contiguous, got strides [1, 4]"),
    ]
    with use(backend):
        for given, message in cases:
            for op, call in (
                ("squared_norms", lambda given=given: norms(given)),
                ("scale_tensors_", lambda given=given: torch.ops.pykernels.scale_tensors_(given, torch.tensor(2.0))),
            ):
                with pytest.raises(RuntimeError) as refusal:
                    call()
                assert f"{op}: {message}" in str(refusal.value)
        for factor, message in ((torch.ones(2), "factor to have 1 element, got 2"), (torch.tensor(2), "got int64")):
            with pytest.raises(RuntimeError) as refusal:
                torch.ops.pykernels.scale_tensors_([one], factor)
            assert message in str(refusal.value)
    assert torch.equal(one, torch.ones(3))
