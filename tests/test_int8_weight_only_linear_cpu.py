"""The C++ weight-only product: every instruction set this machine has, against float64.

Shapes (M, N, K, groups), for AVX-512. Streaming kernels take 6 rows and 4 or 8 columns, 16 of K at a time; panels 6 rows
and 64 columns, K packed in fours and blocked at 2048 (float32) or 4096 (bfloat16). (1, 1, 1, 1) to (5, 9, 33, 1) are all tail,
(1, 70, 256, 4) and (24, 20, 96, 3) stream, (25, 64, 64, 1) is the first panel in float32 and (7, 65, 130, 1) in
bfloat16, (30, 81, 320, 10) has ragged edges and short groups, (30, 33, 75, 3) groups of odd size, which pairs of
bfloat16 would straddle, (14, 20, 9000, 1) and (30, 20, 9000, 90) several blocks along K with tails, and
(26, 20, 8448, 33) blocks that must be cut to whole groups of 256.

AVX2 streams up to 12 rows, in tiles of 1 to 6 rows by 8 to 2 columns, 64 and then 8 of K at a time: STREAMED has a tile
of each height with all three tails, and 7 to 12 rows in several. Its panels are 6 rows by 16 columns, expanded 16 of K at
a time and blocked at 256: (13, 17, 300, 1) is the first, with a column and 44 of K over, (200, 40, 272, 17) two parts of
M with groups of 16 that end in the next block, (20, 150, 520, 5) two panels with groups that straddle chunks and blocks.
"""

import pytest
import torch

import pykernels

SHAPES = [(0, 4, 8, 1), (4, 0, 8, 2), (3, 5, 0, 1), (1, 1, 1, 1), (2, 3, 5, 5), (5, 9, 33, 1), (1, 70, 256, 4)]
SHAPES += [(24, 20, 96, 3), (25, 64, 64, 1), (7, 65, 130, 1), (30, 81, 320, 10), (30, 33, 75, 3)]
SHAPES += [(14, 20, 9000, 1), (30, 20, 9000, 90), (26, 20, 8448, 33)]
STREAMED = [(m, 11, 77, 1) for m in (1, 2, 3, 4, 6, 7, 12)] + [(m, 11, 231, 3) for m in (1, 2, 3, 4, 5, 6, 9)]
SHAPES += [*STREAMED, (13, 17, 300, 1), (200, 40, 272, 17), (20, 150, 520, 5)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512_vnni"]

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


def problem(m, n, k, groups, dtype):
    x = torch.randn(m, k).to(dtype)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n, groups) * 0.02 + 0.001
    floats = weight.double() * scale.double().repeat_interleave(max(k // groups, 1), 1)[:, :k]
    return x, weight, scale[:, 0] if groups == 1 else scale, floats


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_torch(shape, dtype, isa):
    """float32 sums of exact codes: the error stays below 1.5 times that of PyTorch's product in the same dtype, whose
    weight is rounded to it, plus one rounding of the result; in float32 below the bound of any order of summation."""
    x, weight, scale, floats = problem(*shape, dtype)
    bias = torch.randn(shape[1]).to(dtype)
    truth = x.double() @ floats.t() + bias.double()
    got = F.int8_weight_only_linear(x, (weight, scale), bias)
    assert got.dtype == dtype and got.shape == truth.shape
    if got.numel() == 0:
        return
    magnitude = x.double().abs() @ floats.abs().t() + bias.double().abs()
    eps = torch.finfo(torch.float32).eps
    bound = torch.finfo(dtype).eps * truth.abs() + (4 + 0.5 * shape[2] ** 0.5) * eps * magnitude
    excess = ((got.double() - truth).abs() - bound).max().item()
    assert excess <= 0, f"error exceeds the bound by {excess}"
    if dtype != torch.float32:
        theirs = torch.nn.functional.linear(x, floats.to(dtype), bias)
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= 1.5 * (theirs.double() - truth).abs().max() + rounding


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("m", [3, 40])
def test_activation(m, activation, isa):
    x, weight, scale, _ = problem(m, 70, 64, 1, torch.float32)
    plain = F.int8_weight_only_linear(x, (weight, scale))
    got = F.int8_weight_only_linear(x, (weight, scale), activation=activation)
    one = torch.ones(70)
    with pykernels.backend("reference"):
        identity = (torch.eye(70, dtype=torch.int8), one)
        want = F.int8_weight_only_linear(plain, identity, activation=activation)
    torch.testing.assert_close(got, want, rtol=4e-6, atol=1e-6)


def test_strides_and_leading_dimensions(isa):
    x = torch.randn(3, 4, 200)
    weight = torch.randint(-128, 128, (33, 200), dtype=torch.int8)
    scale = torch.rand(33)
    for view, codes in (
        (x[..., 50:146], weight[:, 7:103]),
        (x[:, ::2, 4:100], weight[:, :96]),
        (x[0, 0, :96], weight[:, ::2][:, :96]),
        (x[:, :, ::2][..., :96], weight[:, 104:]),
    ):
        got = F.int8_weight_only_linear(view, (codes, scale))
        assert got.shape == (*view.shape[:-1], 33)
        want = F.int8_weight_only_linear(view.contiguous(), (codes.contiguous(), scale))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("m", [4, 40])
def test_non_finite_input_stays_in_its_row(m, isa):
    for dtype in FLOATS:
        x, weight, scale, _ = problem(m, 40, 75, 3, dtype)
        clean = F.int8_weight_only_linear(x, (weight, scale))
        x[1, 74] = float("nan")
        got = F.int8_weight_only_linear(x, (weight, scale))
        assert got[1].isnan().all()
        torch.testing.assert_close(got[[0, 2, 3]], clean[[0, 2, 3]], rtol=0, atol=0)


def test_bad_input():
    x, weight, scale, _ = problem(2, 6, 8, 1, torch.float32)
    linear = torch.ops.pykernels.int8_weight_only_linear
    with pytest.raises(
        RuntimeError, match=r"expected weight_scale to have shape .6., one element for each row of weight"
    ):
        linear(x, weight, scale[:5])
    with pytest.raises(
        RuntimeError, match=r"expected weight_scale to have shape .6, groups. with groups a divisor of K = 8"
    ):
        linear(x, weight, torch.ones(6, 3))
    with pytest.raises(RuntimeError, match="expected weight to be int8, got float32"):
        linear(x, weight.float(), scale)
    with pytest.raises(RuntimeError, match="expected x to be float32, bfloat16 or float16, got float64"):
        linear(x.double(), weight, scale)
    with pytest.raises(RuntimeError, match=r"expected weight to have shape .N, 8., with the K of x, got .6, 7."):
        linear(x, weight[:, :7], scale)
