"""int8_matmul, int8_linear, int8_weight_only_linear on every backend, against exact integers and a float64 truth."""

import pytest
import torch

import pykernels.functional as F
from tests.matrix import BACKENDS, DEVICE, FLOATS, assert_within_roundings, products, use

CASES = [(backend, shape) for backend in BACKENDS for shape in products(backend)]
ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
# float32 operations that may each round once between the accumulator and the result: conversion, two scales, bias,
# residual, and an activation good to a few units in the last place of its argument.
LINEAR_SLACK, ACTIVATION_SLACK = 4, 12


def interpreter_out(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Triton's interpreter truncates to bf16 where a GPU rounds, so there bf16 goes in and float32 comes out."""
    return torch.float32 if backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16 else dtype


def codes(*shape: int) -> torch.Tensor:
    """Random int8 with the extreme codes present, -128 too."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


@pytest.mark.parametrize(("backend", "shape"), CASES)
def test_accumulators_are_exact(backend: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = codes(m, k), codes(n, k)
    with use(backend):
        got = F.int8_matmul(a, b, out_dtype=torch.int32)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu().long(), a.cpu().long() @ b.cpu().long().t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_accumulator_is_exact(backend: str) -> None:
    """K = 131,071 of (-128)^2 is 2^31 - 2^14: the last value before int32 overflows."""
    k = 131071 if backend != "triton" else 4096
    a, b = (
        torch.full((2, k), -128, dtype=torch.int8, device=DEVICE),
        torch.full((3, k), -128, dtype=torch.int8, device=DEVICE),
    )
    with use(backend):
        got = F.int8_matmul(a, b, out_dtype=torch.int32)
        mixed = F.int8_matmul(a, -1 - b, out_dtype=torch.int32)
    assert got.unique().tolist() == [k * 16384]
    assert mixed.unique().tolist() == [-k * 128 * 127]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("backend", "shape"), [c for c in CASES if 0 not in c[1]][::2])
def test_epilogue(backend: str, shape: tuple[int, int, int], activation: str | None) -> None:
    """Every part at once: row and column scales, zero points, bias, activation, residual, each output dtype."""
    m, n, k = shape
    a, b = codes(m, k), codes(n, k)
    # Results of the size of one, so that the curved part of the activations is met.
    a_scale = torch.rand(m, device=DEVICE) / (70 * max(k, 1) ** 0.5) + 1e-5
    b_scale = torch.rand(n, device=DEVICE) / 70 + 1e-3
    zero_point = torch.randint(-128, 128, (m,), dtype=torch.int32, device=DEVICE)
    bias = torch.randn(n, device=DEVICE)
    for dtype in FLOATS if backend != "triton" else (torch.float16,):
        residual = torch.randn(m, n, device=DEVICE).to(dtype)
        with use(backend):
            got = F.int8_matmul(
                a, b, a_scale, b_scale, bias=bias, residual=residual, activation=activation,
                a_zero_point=zero_point, out_dtype=dtype,
            )  # fmt: skip
        exact = (a.double() - zero_point.double()[:, None]) @ b.double().t()
        scaled = exact * a_scale.double()[:, None] * b_scale.double()
        inner = scaled + bias.double()
        truth = ACTIVATIONS[activation](inner) + residual.double()
        magnitude = scaled.abs() + bias.double().abs() + residual.double().abs() + 1e-6
        assert_within_roundings(got, truth, ACTIVATION_SLACK if activation else LINEAR_SLACK, magnitude)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a_scalar", [False, True])
@pytest.mark.parametrize("b_scalar", [False, True])
def test_scales_per_tensor_and_per_row(backend: str, a_scalar: bool, b_scalar: bool) -> None:
    a, b = codes(9, 70), codes(21, 70)
    a_scale = torch.rand(() if a_scalar else (9,), device=DEVICE) + 0.5
    b_scale = torch.rand((1,) if b_scalar else (21,), device=DEVICE) + 0.5
    with use(backend):
        got = F.int8_matmul(a, b, a_scale, b_scale)
    truth = a.double() @ b.double().t() * a_scale.double().reshape(-1, 1) * b_scale.double()
    assert_within_roundings(got, truth, 3, truth.abs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_may_be_strided(backend: str) -> None:
    """Rows apart, odd byte offsets, a transposed b, a broadcast row: each equals its contiguous copy."""
    big = codes(20, 201)
    for a in (
        big[::2, 3:100],
        big[:10, 1:98],
        big[:1, 7:104].expand(10, 97),
        big[:97, :10].t() if False else big[:10, 4:101],
    ):
        b = codes(97, 18).t()
        with use(backend):
            got = F.int8_matmul(a, b, out_dtype=torch.int32)
        assert torch.equal(got.cpu().long(), a.cpu().long() @ b.cpu().long().t())


@pytest.mark.parametrize(("backend", "shape"), [c for c in CASES if 0 not in c[1]])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_linear_is_quantise_then_multiply(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The fused call equals the two it fuses: same codes, exact sum, one rounding. Static scales too."""
    m, n, k = shape
    x, weight = torch.randn(m, k, device=DEVICE, dtype=dtype), torch.randn(n, k, device=DEVICE)
    bias = torch.randn(n, device=DEVICE, dtype=dtype)
    static = torch.tensor(0.03, device=DEVICE)
    with use("reference"):
        qweight = F.quantize_rowwise(weight)
        quantised = {None: F.quantize_rowwise(x), static: F.quantize_rowwise(x, scale=static)}
    for x_scale, (q, scale) in quantised.items():
        with use(backend):
            got = F.int8_linear(x, qweight, bias, x_scale=x_scale, out_dtype=interpreter_out(backend, dtype))
        scaled = q.double() @ qweight[0].double().t() * scale.double()[:, None] * qweight[1].double()
        assert got.shape == (m, n)
        assert_within_roundings(got, scaled + bias.double(), LINEAR_SLACK, scaled.abs() + bias.double().abs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_neighbours(backend: str) -> None:
    """One row alone, in a batch, and beside a row of NaN: bit for bit the same."""
    x, qweight = torch.randn(40, 100, device=DEVICE), F.quantize_rowwise(torch.randn(30, 100, device=DEVICE))
    with use(backend):
        whole = F.int8_linear(x, qweight)
        alone = F.int8_linear(x[7:8], qweight)
        x[8] = float("nan")
        beside = F.int8_linear(x, qweight)
    assert torch.equal(whole[7:8], alone) and torch.equal(beside[7], whole[7])
    assert bool(beside[8].isnan().all()) and not bool(beside[9:].isnan().any())


@pytest.mark.parametrize(("backend", "shape"), [c for c in CASES if 0 not in c[1]])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_only_is_no_worse_than_torch(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against float64 the error is at most a small factor of torch's own product in the same dtype."""
    m, n, k = shape
    x = torch.randn(m, k, device=DEVICE, dtype=dtype)
    for groups in {1, 3 if k % 3 == 0 else 1, k}:
        weight = codes(n, k)
        scale = torch.rand(n, groups, device=DEVICE) / 64 + 1e-3
        floats = weight.double() * scale.double().repeat_interleave(k // groups, 1)
        truth = x.double() @ floats.t()
        with use(backend):
            got = F.int8_weight_only_linear(x, (weight, scale[:, 0].contiguous() if groups == 1 else scale))
        # Sums of k products: float32 accumulation in any order stays below k roundings of the sum of magnitudes, and
        # in practice far below; torch's error on the same sum, tripled, is the sharper bound where k is large.
        torch_error = (torch.nn.functional.linear(x, floats.to(dtype)).double() - truth).abs().max()
        rounding = 0.5 * (2.0**-7 if dtype == torch.bfloat16 else 2.0**-10 if dtype == torch.float16 else 2.0**-22)
        bound = 3 * torch_error + rounding * truth.abs() + 4 * 2.0**-24 * (x.double().abs() @ floats.abs().t())
        assert bool(((got.double() - truth).abs() <= bound).all())
