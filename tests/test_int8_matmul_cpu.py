"""The C++ INT8 products: every instruction set this machine has, one and two threads, against exact integers.

Shapes (M, N, K). Kernels tile 6 rows by 64 columns (in vectors of 16) and read K in steps of 4, 16 or 64 bytes, so: (1,
1, 1) and (1, 3, 5) are all tail; (7, 65, 63), (6, 64, 64), (13, 129, 65) stand just below, on and just above every
tile; (2, 8, 130), (5, 17, 1000) and (16, 100, 257) are decoding, which streams the weight, and (17, 33, 66) its
successor; (70, 70, 300), (97, 81, 67) and (200, 16, 128) are packed panels with ragged edges, the last with few columns
and many rows, which splits M, as (1030, 1100, 8) does for its rows alone; (90, 40, 9000) needs two blocks along K; the
zeros are empty or have empty sums. AVX2 tiles 4 rows by 16 columns by 512 of K: (4, 31, 515) and (5, 16, 513) stand
either side of its first panel, (3, 70, 79) and (2, 6, 65) stream ragged rows of the weight, (195, 300, 34) splits both
rows and columns unevenly.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pykernels

SHAPES = [(0, 4, 8), (4, 0, 8), (3, 5, 0), (1, 1, 1), (1, 3, 5), (6, 64, 64), (7, 65, 63), (13, 129, 65), (2, 8, 130)]
SHAPES += [(5, 17, 1000), (16, 100, 257), (17, 33, 66), (70, 70, 300), (97, 81, 67), (200, 16, 128), (90, 40, 9000)]
SHAPES += [(4, 31, 515), (5, 16, 513), (3, 70, 79), (2, 6, 65), (195, 300, 34), (1030, 1100, 8)]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512_vnni"]
EPS = torch.finfo(torch.float32).eps

F = pykernels.functional


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        context = pykernels.cpu_isa(request.param)
        context.__enter__()
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this machine lacks {request.param}: {error}")
    yield request.param
    context.__exit__(None, None, None)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def codes(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def exact(a, b):
    """The product in float64, where every partial sum is an integer below 2^53."""
    return a.double() @ b.double().t()


def activated(v, activation):
    """The activation in float64, written so that it does not cancel in the tails."""
    if activation == "relu":
        return v.clamp_min(0)
    if activation == "gelu":
        return v * torch.special.erfc(-v / 2**0.5) / 2
    if activation == "gelu_tanh":
        return v * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))
    if activation == "silu":
        return v * torch.sigmoid(v)
    return v


def assert_rounded(got, truth, magnitude):
    """One rounding of the output dtype, and a few float32 roundings of the largest term that was added."""
    bound = torch.finfo(got.dtype).eps * truth.abs() + 6 * EPS * magnitude + torch.finfo(got.dtype).smallest_normal
    excess = ((got.double() - truth).abs() - bound).max().item() if got.numel() else 0.0
    assert excess <= 0, f"{got.dtype}: error exceeds the bound by {excess}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulators_are_exact(shape, isa, threads):
    m, n, k = shape
    a, b = codes(m, k), codes(n, k)
    got = F.int8_matmul(a, b, out_dtype=torch.int32)
    assert got.dtype == torch.int32 and torch.equal(got, exact(a, b).int())


def test_extreme_codes_do_not_saturate_or_overflow(isa):
    """The largest K with the largest codes stands at 2^31 - 2^14; vpmaddubsw and a saturating sum would both fail."""
    k = 131071
    a = torch.full((7, k), -128, dtype=torch.int8)
    b = torch.full((3, k), -128, dtype=torch.int8)
    b[1] = 127
    got = F.int8_matmul(a, b, out_dtype=torch.int32)
    assert got[0].tolist() == [128 * 128 * k, -128 * 127 * k, 128 * 128 * k]
    assert torch.equal(got, got[:1].expand(7, 3))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 70])
def test_products_of_extreme_codes_are_exact(m, isa):
    """-128 on one side, the other, both or neither, in every pairing of neighbours along K, on every kernel."""
    values = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8)
    k = 1031
    a, b = values[torch.randint(6, (m, k))], values[torch.randint(6, (37, k))]
    a[0], b[5] = -128, -128
    got = F.int8_matmul(a, b, out_dtype=torch.int32)
    assert torch.equal(got, exact(a, b).int()) and got[0, 5] == 128 * 128 * k


def test_row_strides_and_views(isa):
    a, b = codes(40, 200), codes(70, 300)
    for rows, columns in (
        (a[::2, 3:130], b[1::3, 100:227]),
        (a[:, :96], b[:, 200:296]),
        (a.t()[:70], b.t()[:40].t()[:, :40]),
    ):
        assert torch.equal(F.int8_matmul(rows, columns, out_dtype=torch.int32), exact(rows, columns).int())
    repeated = a[:1].expand(20, 200)
    assert torch.equal(F.int8_matmul(repeated, b[:, :200], out_dtype=torch.int32), exact(repeated, b[:, :200]).int())


def test_nothing_is_read_past_the_end(isa):
    """Operands that end with their page's data: a poisoned neighbour must not leak into the result."""
    for m, n, k in ((1, 5, 61), (8, 5, 61), (40, 70, 61)):
        space = torch.full((n * k + 64,), 127, dtype=torch.int8)
        b = space[: n * k].view(n, k)
        b.copy_(codes(n, k))
        a = codes(m, k)
        assert torch.equal(F.int8_matmul(a, b, out_dtype=torch.int32), exact(a, b).int())


@pytest.mark.parametrize("shape", [(5, 17, 1000), (40, 70, 300)], ids=str)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_epilogue(shape, out_dtype, activation, isa):
    m, n, k = shape
    a, b = codes(m, k), codes(n, k)
    options = itertools.cycle(FLOATS)
    for per_row, with_bias, with_zero in itertools.product((0, 1), repeat=3):
        per_column, with_residual = per_row ^ with_bias, with_bias ^ with_zero
        a_scale = torch.rand(m) * 0.01 + 0.001 if per_row else torch.tensor(0.004)
        b_scale = torch.rand(n) * 0.01 + 0.001 if per_column else torch.tensor([0.005])
        bias = torch.randn(n).to(next(options)) if with_bias else None
        residual = torch.randn(m, n + 3).to(next(options))[:, 3:] if with_residual else None
        zero = torch.randint(-128, 128, (m,), dtype=torch.int32) if with_zero else None
        acc = exact(a, b)
        if with_zero:
            acc = acc - zero[:, None].double() * b.double().sum(1)
        v = acc * a_scale.double().reshape(-1, 1) * b_scale.double()
        magnitude = v.abs()
        if with_bias:
            v = v + bias.double()
            magnitude = magnitude + bias.double().abs()
        truth = activated(v, activation)
        if with_residual:
            truth = truth + residual.double()
            magnitude = magnitude + residual.double().abs()
        for b_sum in (None, b.sum(1, dtype=torch.int32)) if with_zero else (None,):
            got = F.int8_matmul(
                a, b, a_scale, b_scale, bias=bias, residual=residual, activation=activation, a_zero_point=zero,
                b_sum=b_sum, out_dtype=out_dtype,
            )  # fmt: skip
            assert got.dtype == out_dtype
            assert_rounded(got, truth, magnitude)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_are_accurate_in_the_tails(activation, isa):
    """An empty sum leaves the bias alone, so the activation is seen bare: within 4 ulp even where it underflows."""
    x = torch.cat([torch.linspace(-14, 14, 20011), torch.logspace(-30, 2, 999), -torch.logspace(-30, 1.9, 999)])
    got = F.int8_matmul(codes(1, 0), codes(x.numel(), 0), bias=x, activation=activation)[0]
    truth = activated(x.double(), activation)
    normal = truth.abs() > 2 * torch.finfo(torch.float32).smallest_normal
    difference = (got.double() - truth).abs()
    error = (difference / truth.abs())[normal].max().item()
    assert error <= 4 * EPS, f"{error / EPS} ulp"
    assert (difference[~normal] <= 4 * torch.finfo(torch.float32).smallest_normal).all()
    special = torch.tensor([float("inf"), float("nan"), 0.0])
    values = F.int8_matmul(codes(1, 0), codes(3, 0), bias=special, activation=activation)[0]
    assert values[0] == float("inf") and values[1].isnan() and values[2] == 0


def test_half_precision_stores_round_to_nearest_even(isa):
    """Every bf16 and fp16 halfway case among these floats, the overflow of fp16, and NaN, as PyTorch rounds them."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).int()
    x = torch.cat([bits.view(torch.float32), (bits & ~0xFFFF | 0x8000).view(torch.float32), torch.randn(4096) * 1e-5])
    x = torch.cat([x, torch.tensor([65504.0, 65519.0, 65520.0, 6e-8, 2.9e-8, float("inf"), float("nan")])])
    for dtype in (torch.bfloat16, torch.float16):
        got = F.int8_matmul(codes(2, 0), codes(x.numel(), 0), bias=x, out_dtype=dtype)
        torch.testing.assert_close(got, x.to(dtype).expand(2, -1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] > 0], ids=str)
def test_linear_is_quantisation_then_product(shape, dtype, isa, threads):
    """The very same codes and scales, so float32 results are those of int8_matmul to the bit."""
    m, n, k = shape
    x = torch.randn(m, k).to(dtype)
    if m > 3:
        x[1] = 0
        x[2, 0] = float("inf")
    qw = F.quantize_rowwise(torch.randn(n, k))
    bias = torch.randn(n)
    residual = torch.randn(m, n).to(dtype)
    for scale in (None, torch.tensor(0.03)):
        q, s = F.quantize_rowwise(x, scale=scale)
        for activation in (None, "gelu"):
            got = F.int8_linear(x, qw, bias, activation=activation, residual=residual, x_scale=scale)
            want = F.int8_matmul(
                q, *(qw[0], s, qw[1]), bias=bias, activation=activation, residual=residual, out_dtype=dtype
            )
            assert got.dtype == dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_linear_shapes_and_strides(isa):
    x = torch.randn(3, 4, 200)
    qw = F.quantize_rowwise(torch.randn(33, 96))
    for view in (x[..., 50:146], x[:, ::2, 4:100], x[0, 0, :96], x[:, :, ::2][..., :96], x[:, :0, :96]):
        got = F.int8_linear(view, qw)
        assert got.shape == (*view.shape[:-1], 33)
        torch.testing.assert_close(got, F.int8_linear(view.contiguous(), qw), rtol=0, atol=0)


def test_a_row_does_not_depend_on_the_batch(isa):
    """Decoding and prefill take different kernels and must agree to the bit."""
    x = torch.randn(300, 320)
    qw = F.quantize_rowwise(torch.randn(130, 320))
    whole = F.int8_linear(x, qw, activation="silu")
    for begin, end in ((0, 1), (5, 8), (10, 26), (30, 90)):
        assert torch.equal(F.int8_linear(x[begin:end], qw, activation="silu"), whole[begin:end])


def test_calls_from_several_threads_do_not_share_memory():
    """Scratch belongs to a thread: products of different shapes, started together, must not disturb each other."""
    problems = [
        (torch.randn(m, k), F.quantize_rowwise(torch.randn(n, k))) for m, n, k in ((3, 70, 512), (80, 130, 300)) * 4
    ]
    want = [F.int8_linear(x, qw) for x, qw in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for got, expected in zip(pool.map(lambda p: F.int8_linear(*p), problems), want, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 8)}, "int8_matmul: expected a to be int8, got float32"),
        ({"b": codes(3, 9)}, "int8_matmul: expected b to have shape .N, 8., with the K of a, got .3, 9."),
        ({"b": codes(3)}, "int8_matmul: expected b to have 2 dimensions, got 1"),
        ({"a_scale": torch.ones(3)}, "int8_matmul: expected a_scale to have 1 element or shape .2., .* got .3."),
        ({"b_scale": torch.ones(3).double()}, "int8_matmul: expected b_scale to be float32, got float64"),
        ({"bias": torch.ones(4)}, "int8_matmul: expected bias to have shape .3., .* got .4."),
        ({"residual": torch.ones(2, 4)}, "int8_matmul: expected residual to have shape .2, 3., .* got .2, 4."),
        ({"activation": 7}, "int8_matmul: expected activation to be 0 to 4, got 7"),
        ({"b_sum": torch.ones(3).int()}, "int8_matmul: expected a_zero_point with b_sum, got None"),
        ({"out_dtype": torch.int32, "bias": torch.ones(3)}, "int8_matmul: expected no bias with out_dtype int32"),
        ({"out_dtype": torch.int64}, "int8_matmul: expected out_dtype to be float32, bfloat16, float16 or int32"),
        ({"a": codes(1, 131072), "b": codes(1, 131072)}, "int8_matmul: expected K to be at most 131071"),
    ],
)
def test_bad_input(change, message):
    arguments = {"a": codes(2, 8), "b": codes(3, 8)} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pykernels.int8_matmul(**arguments)
