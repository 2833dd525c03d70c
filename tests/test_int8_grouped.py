"""int8_grouped_matmul and int8_grouped_linear on every backend: bit for bit what a call for each expert gives.

Groups: one expert; none with rows; the first, the last, two in a row without any; very unequal, as routers make them;
one row each, which reads the weights once; more rows than are counted. T and the groups lie on both sides of a tile.
"""

from __future__ import annotations

import pytest
import torch

import pykernels.functional as F
from pykernels.bench.memory import saved_bytes
from tests.matrix import BACKENDS, DEVICE, FLOATS, use

ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
# (counts, rows beyond them, N, K)
GROUPS = [
    ([5], 0, 7, 33),
    ([0], 3, 5, 4),
    ([], 2, 5, 4),
    ([0, 0, 3], 0, 17, 64),
    ([1, 1, 1, 1, 1], 2, 9, 48),
    ([20, 0, 0, 1, 35, 0], 4, 19, 31),
    ([2, 3], 0, 4, 0),
    ([1, 2], 3, 0, 8),
    ([0, 0], 0, 3, 8),
]
LARGE = [
    ([0, 300, 7, 0, 64, 65, 1, 0], 9, 130, 515),  # beyond AVX2's item of 192 rows
    ([4, 5, 16, 17, 1], 0, 1000, 260),  # on both sides of streaming
    ([1] * 36, 1, 17, 100),  # more experts than a warp has lanes
]
CASES = [(backend, group) for backend in BACKENDS for group in GROUPS + (LARGE if backend != "triton" else [])]

# The interpreter takes its time: every third group where the epilogue is what is tried.
FUSED = [case for number, case in enumerate(CASES) if case[0] != "triton" or number % 3 == 0]


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.cpu().int() @ b.cpu().int().t()).to(DEVICE)


def tensor(counts: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(counts, dtype=dtype, device=DEVICE)


def each_expert(call, counts: list[int], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """call(expert, slice of its rows) for each, and zeros below."""
    out = torch.zeros(rows, columns, dtype=dtype, device=DEVICE)
    first = 0
    for expert, count in enumerate(counts):
        out[first : first + count] = call(expert, slice(first, first + count))
        first += count
    return out


@pytest.mark.parametrize(("backend", "group"), CASES, ids=str)
def test_accumulators_are_exact(backend: str, group: tuple) -> None:
    counts, beyond, n, k = group
    rows = sum(counts) + beyond
    a, b = codes(rows, k), codes(len(counts), n, k)
    with use(backend):
        got = F.int8_grouped_matmul(a, b, tensor(counts, torch.int32), out_dtype=torch.int32)
    want = each_expert(lambda e, r: exact(a[r], b[e]), counts, rows, n, torch.int32)
    assert got.dtype == torch.int32 and torch.equal(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("backend", "group"), FUSED, ids=str)
def test_equal_to_a_product_for_each_expert(backend: str, group: tuple, activation: str | None) -> None:
    counts, beyond, n, k = group
    rows = sum(counts) + beyond
    a, b = codes(rows, k), codes(len(counts), n, k)
    number = ACTIVATIONS.index(activation)
    a_scale = torch.rand(rows if number % 2 else 1, device=DEVICE) * 0.02 + 1e-3
    b_scale = torch.rand(len(counts), n, device=DEVICE) * 0.02 + 1e-3 if number != 3 else None
    bias = torch.randn(len(counts), n, device=DEVICE).to(FLOATS[number % 3]) if number != 1 else None
    out_dtype = FLOATS[number % 2]

    def one(e: int, r: slice) -> torch.Tensor:
        scale, column = a_scale[r] if number % 2 else a_scale, None if b_scale is None else b_scale[e]
        how = {"bias": None if bias is None else bias[e], "activation": activation, "out_dtype": out_dtype}
        return F.int8_matmul(a[r], b[e], scale, column, **how)

    with use(backend):
        got = F.int8_grouped_matmul(
            a, b, tensor(counts), a_scale, b_scale, bias=bias, activation=activation, out_dtype=out_dtype
        )
        want = each_expert(one, counts, rows, n, out_dtype)
    assert got.dtype == out_dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("backend", "group"), FUSED, ids=str)
def test_linear_is_quantise_then_multiply(backend: str, group: tuple, dtype: torch.dtype) -> None:
    counts, beyond, n, k = group
    x = torch.randn(sum(counts) + beyond, k, device=DEVICE).to(dtype)
    qweight = F.quantize_rowwise(torch.randn(len(counts), n, k, device=DEVICE))
    bias = torch.randn(len(counts), n, device=DEVICE).to(dtype)
    with use(backend):
        got = F.int8_grouped_linear(x, qweight, tensor(counts), bias, activation="silu")
        want = each_expert(
            lambda e, r: F.int8_matmul(
                *_halves(F.quantize_rowwise(x[r]), qweight, e), bias=bias[e], activation="silu", out_dtype=dtype
            ),
            counts,
            len(x),
            n,
            dtype,
        )
    assert got.dtype == dtype and torch.equal(got, want)


def _halves(left: tuple, right: tuple, expert: int) -> tuple:
    (q, scale), (weight, weight_scale) = left, right
    return q, weight[expert], scale, weight_scale[expert]


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_may_be_strided(backend: str) -> None:
    counts = tensor([2, 9, 0, 4, 7], torch.int64).repeat_interleave(2)[::2]
    a, b = codes(50, 90)[::2, 3:71][:22], codes(70, 3, 5, 80)
    with use(backend):
        for weight in (b[:68, 0, :, :33].permute(1, 2, 0), b[:5, 1, :, 5:73], b[:1, 2, :, :68].expand(5, 5, 68)):
            got = F.int8_grouped_matmul(a, weight, counts, out_dtype=torch.int32)
            same = F.int8_grouped_matmul(a.clone(), weight.clone(), counts.clone(), out_dtype=torch.int32)
            plain = each_expert(
                lambda e, r, w=weight: exact(a[r], w[e]), counts.tolist(), 22, weight.shape[1], torch.int32
            )
            assert torch.equal(got, same) and torch.equal(got, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_does_not_depend_on_the_others(backend: str) -> None:
    x, qweight = torch.randn(30, 40, device=DEVICE), F.quantize_rowwise(torch.randn(3, 11, 40, device=DEVICE))
    with use(backend):
        whole = F.int8_grouped_linear(x, qweight, tensor([13, 2, 15]))
        x[:13] = float("nan")
        beside = F.int8_grouped_linear(x, qweight, tensor([13, 2, 15]))
    assert torch.equal(beside[13:], whole[13:]) and bool(beside[:13].isnan().all())


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows_than_a_workspace_holds(threads: int) -> None:
    """K = 40,000 leaves room for 96 rows at once: groups are cut, and several share a workspace."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        counts = [50, 0, 40, 210, 3, 1, 100]
        a, b = codes(410, 40000), codes(7, 5, 40000)
        got = F.int8_grouped_matmul(a, b, tensor(counts), out_dtype=torch.int32)
        want = each_expert(lambda e, r: F.int8_matmul(a[r], b[e], out_dtype=torch.int32), counts, 410, 5, torch.int32)
        assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


BAD = [
    ({"counts": [3, -1]}, "expected counts to be 0 or more"),
    ({"counts": [3, 4]}, "expected counts to sum to at most the 6 rows"),
    ({"counts": [2**62, 2**62]}, "expected counts to sum to at most the 6 rows"),
    ({"counts": [3]}, r"expected counts to have shape \[2\]"),
    ({"counts": [3.0, 2.0]}, "expected counts to be int32 or int64, got float32"),
    ({"b": codes(2, 5, 7)}, r"to have shape \[E, N, 8\]"),
    ({"b": codes(5, 8)}, "to have 3 dimensions, got 2"),
    ({"b": torch.ones(2, 5, 8)}, "to be int8, got float32"),
    ({"b_scale": torch.ones(5)}, r"to have shape \[2, 5\], got \[5\]"),
    ({"b_scale": torch.ones(2, 5).half()}, "to be float32"),
    ({"bias": torch.ones(5)}, r"to have shape \[2, 5\], got \[5\]"),
    ({"bias": torch.ones(2, 5).int()}, "to be float32, bfloat16 or float16, got int32"),
]


@pytest.mark.parametrize("backend", ["reference", "native:portable"])
@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_refusals(backend: str, change: dict, said: str) -> None:
    given = {"b": codes(2, 5, 8).cpu(), "counts": [3, 2], "b_scale": torch.ones(2, 5), "bias": None} | change
    counts, b = torch.tensor(given["counts"]), given["b"].cpu()
    with use(backend):
        with pytest.raises(RuntimeError, match=said):
            F.int8_grouped_matmul(codes(6, 8).cpu(), b, counts, b_scale=given["b_scale"], bias=given["bias"])
        with pytest.raises(RuntimeError, match=said):
            F.int8_grouped_linear(torch.ones(6, 8), (b, given["b_scale"]), counts, given["bias"])


def test_what_has_no_answer_is_refused() -> None:
    a, b, counts = codes(6, 8), codes(2, 5, 8), tensor([3, 2])
    with pytest.raises(RuntimeError, match="expected no b_scale with out_dtype int32"):
        F.int8_grouped_matmul(a, b, counts, b_scale=torch.ones(2, 5, device=DEVICE), out_dtype=torch.int32)
    with pytest.raises(ValueError, match="expected activation to be one of"):
        F.int8_grouped_matmul(a, b, counts, activation="swish")


def test_nothing_is_saved_for_inference_and_autocast_casts() -> None:
    x, qweight = torch.randn(6, 8, device=DEVICE), F.quantize_rowwise(torch.randn(2, 5, 8, device=DEVICE))
    assert saved_bytes(lambda: F.int8_grouped_linear(x, qweight, tensor([3, 3])), ()) == 0
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = F.int8_grouped_linear(x, qweight, tensor([3, 3]))
    assert torch.equal(got, F.int8_grouped_linear(x.bfloat16(), qweight, tensor([3, 3])))


def test_compiles_into_one_graph_for_any_counts() -> None:
    torch.compiler.reset()
    x, qweight = torch.randn(9, 16, device=DEVICE), F.quantize_rowwise(torch.randn(3, 5, 16, device=DEVICE))
    compiled = torch.compile(F.int8_grouped_linear, fullgraph=True, backend="aot_eager")
    for counts in ([3, 3, 3], [9, 0, 0], [0, 2, 1]):
        assert torch.equal(compiled(x, qweight, tensor(counts)), F.int8_grouped_linear(x, qweight, tensor(counts)))
