"""int8_block_scaled_matmul and int8_block_scaled_linear on every backend, against float64.

Shapes (M, N, K): one of each; both sides of a block in K (127, 128, 129) and of a tile of b in N; few rows, which AVX2
streams (1 to 4), and their successor; more blocks than a strip (4) or a panel (64) of b holds; rows and columns cut
unevenly; none of anything.
"""

from __future__ import annotations

import pytest
import torch

import pykernels.functional as F
from pykernels.bench.memory import saved_bytes
from tests.matrix import BACKENDS, DEVICE, FLOATS, assert_within_roundings, use

SMALL = [(1, 1, 1), (2, 130, 127), (3, 5, 128), (4, 129, 129), (5, 17, 300), (7, 4, 0), (0, 3, 9), (3, 0, 9)]
SHAPES = [*SMALL, (1, 300, 1000), (4, 70, 515), (5, 16, 513), (70, 257, 900), (195, 300, 260), (9, 33, 8500)]
CASES = [(backend, shape) for backend in BACKENDS for shape in (SMALL if backend == "triton" else SHAPES)]


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All codes, and scales over several binades, so that a scale of the wrong block shows."""
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=DEVICE)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=DEVICE)
    blocks = -(-k // 128)
    a_scale = torch.exp2(torch.randn(m, blocks, device=DEVICE) * 2)
    return a, b, a_scale, torch.exp2(torch.randn(-(-n // 128), blocks, device=DEVICE) * 2)


def spread(scale: torch.Tensor, rows: int, columns: int, tile: int) -> torch.Tensor:
    return scale.double().repeat_interleave(tile, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def check(got: torch.Tensor, a, b, a_scale, b_scale, bias: torch.Tensor | None = None) -> None:
    """Against float64: each block's sum is exact; scaling it rounds, and so does each of the additions."""
    (m, k), n = a.shape, len(b)
    left, right = a.double() * spread(a_scale, m, k, 1), b.double() * spread(b_scale, n, k, 128)
    blocks = [slice(k0, k0 + 128) for k0 in range(0, k, 128)]
    terms = [left[:, block] @ right[:, block].t() for block in blocks]
    zero = torch.zeros(m, n, dtype=torch.float64, device=DEVICE)
    last = zero if bias is None else zero + bias.double()
    magnitude = sum((term.abs() for term in terms), last.abs())
    # AVX2 adds up eight lanes of each block, whose sizes may be above the block's own: hence the second term.
    lanes = left.abs() @ right.abs().t() / 16 if m <= 4 else zero
    assert got.shape == (m, n)
    assert_within_roundings(got, sum(terms, last), 3 + len(blocks) / 4, magnitude + lanes)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("backend", "shape"), CASES, ids=str)
def test_against_float64(backend: str, shape: tuple[int, int, int], out_dtype: torch.dtype) -> None:
    a, b, a_scale, b_scale = operands(*shape)
    bias = torch.randn(len(b), device=DEVICE)
    if out_dtype == torch.float16:
        a_scale = a_scale * 2.0**-16
    with use(backend):
        got = F.int8_block_scaled_matmul(a, b, a_scale, b_scale, bias=bias, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    check(got, a, b, a_scale, b_scale, bias)


def test_every_triton_configuration() -> None:
    from pykernels.kernels import _tuning
    from pykernels.kernels import int8_block_scaled_matmul as module

    for config in [c for configs in module.CONFIGS.values() for c in configs] + [module.UNALIGNED]:
        given = operands(config["BLOCK_M"] + 1, config["BLOCK_N"] + 65, 144)
        with use("triton"), _tuning.force_config(config):
            check(F.int8_block_scaled_matmul(*given), *given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_may_be_strided(backend: str) -> None:
    a, b, a_scale, b_scale = operands(40, 150, 400)
    with use(backend):
        for rows in (2, 7):
            views = a[::3, 5:205][:rows], b[10:, 100:300]
            scales = a_scale.t().contiguous().t()[:rows, :2], b_scale.repeat(1, 2)[:2, ::2][:, :2]
            got = F.int8_block_scaled_matmul(*views, *scales)
            assert torch.equal(got, F.int8_block_scaled_matmul(*(t.clone() for t in (*views, *scales))))
            column = b.t().contiguous().t()
            assert torch.equal(
                F.int8_block_scaled_matmul(a[:rows], column, a_scale[:rows], b_scale),
                F.int8_block_scaled_matmul(a[:rows], b, a_scale[:rows], b_scale),
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_is_quantise_then_multiply(backend: str, dtype: torch.dtype) -> None:
    x, bias = torch.randn(2, 3, 200, device=DEVICE).to(dtype), torch.randn(140, device=DEVICE).to(dtype)
    qweight = F.quantize_blockwise(torch.randn(140, 200, device=DEVICE), (128, 128))
    with use(backend):
        got = F.int8_block_scaled_linear(x, qweight, bias)
        q, scale = F.quantize_blockwise(x.view(6, 200), 128)
        want = F.int8_block_scaled_matmul(q, qweight[0], scale, qweight[1], bias=bias, out_dtype=dtype)
        assert got.dtype == dtype and torch.equal(got.view(6, 140), want)
        assert F.int8_block_scaled_linear(x[:, :0], qweight).shape == (2, 0, 140)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_outliers_cost_less_than_with_a_scale_for_each_row(backend: str) -> None:
    """A few channels a hundred times the others, as the activations of language models have them."""
    x, weight = torch.randn(64, 1024, device=DEVICE), torch.randn(256, 1024, device=DEVICE) / 32
    x[:, [3, 500]] *= 100
    truth = x.double() @ weight.double().t()

    def error(y: torch.Tensor) -> float:
        return float(((y.double() - truth).square().mean() / truth.square().mean()).sqrt())

    with use(backend):
        blocks = error(F.int8_block_scaled_linear(x, F.quantize_blockwise(weight, (128, 128))))
        rows = error(F.int8_linear(x, F.quantize_rowwise(weight)))
    assert blocks < 0.5 * rows, (blocks, rows)


def test_gradient_is_that_of_the_dequantised_layer() -> None:
    x = torch.randn(5, 300, device=DEVICE, requires_grad=True)
    bias = torch.randn(1100, device=DEVICE, requires_grad=True)
    qweight = F.quantize_blockwise(torch.randn(1100, 300, device=DEVICE), (128, 128))
    grad = torch.randn(5, 1100, device=DEVICE)
    got = torch.autograd.grad(F.int8_block_scaled_linear(x, qweight, bias), (x, bias), grad)
    weight = F.dequantize_blockwise(*qweight, (128, 128))
    truth = grad.double() @ weight.double()
    assert_within_roundings(got[0], truth, 4, grad.double().abs() @ weight.double().abs())
    torch.testing.assert_close(got[1], grad.sum(0))
    assert saved_bytes(lambda: F.int8_block_scaled_linear(x, qweight, bias), qweight) == 0
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert F.int8_block_scaled_linear(x, qweight).dtype == torch.bfloat16


def test_a_row_of_nan_stays_visible_and_alone() -> None:
    x, qweight = torch.randn(9, 300), F.quantize_blockwise(torch.randn(20, 300), (128, 128))
    whole = F.int8_block_scaled_linear(x, qweight)
    x[4, 7] = float("nan")
    beside = F.int8_block_scaled_linear(x, qweight)
    keep = torch.arange(9) != 4
    assert torch.equal(beside[keep], whole[keep]) and bool(beside[4].isnan().all())


BAD = [
    ({"a": torch.ones(4, 200)}, "expected a to be int8, got float32"),
    ({"b": torch.ones(140, 199).char()}, r"to have shape \[N, 200\]"),
    ({"a_scale": torch.ones(4, 1)}, r"a_scale to have shape \[4, 2\], one element for each row's block of 128"),
    ({"a_scale": torch.ones(4, 2).half()}, "a_scale to be float32"),
    ({"b_scale": torch.ones(140, 2)}, r"b_scale to have shape \[2, 2\], one element for each tile of 128 x 128"),
    ({"bias": torch.ones(139)}, r"bias to have shape \[140\]"),
    ({"out_dtype": torch.int32}, "out_dtype to be float32, bfloat16 or float16"),
]


@pytest.mark.parametrize("backend", ["reference", "native:portable"])
@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_refusals(backend: str, change: dict, said: str) -> None:
    a, b, a_scale, b_scale = (t.cpu() for t in operands(4, 140, 200))
    given = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale} | change
    with use(backend), pytest.raises(RuntimeError, match=said):
        F.int8_block_scaled_matmul(**given)
