"""The C++ quantisation kernels, bit for bit: every instruction set here, one and two threads, against numpy.

Shapes. Vectors hold 4, 8 or 16 floats, loops are unrolled by 4, random numbers come in chunks of 256 elements and in
fours, so K takes values around 16, 64 and 256 on both sides (15, 17, 63, 64, 65, 255, 257), 1 and 3 (less than one
vector and not a multiple of 4, so a row starts inside a counter), and 1000. M takes 0, 1, a few, and 67 or 300, which
is enough for two threads and leaves a ragged tile. (0, 5) and (5, 0) are the empty ones.
"""

import numpy as np
import pytest
import torch

import pykernels

SHAPES = [(0, 5), (5, 0), (1, 1), (3, 3), (4, 15), (2, 17), (5, 63), (3, 64), (7, 65), (2, 255), (3, 257), (67, 130)]
SHAPES += [(300, 1000), (1, 70000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x1234_5678_9ABC_DEF0 - 2**63
ISAS = ["portable", "avx2", "avx512_vnni"]


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


def make(shape, dtype=torch.float32, seed=0):
    """Rows of very different sizes, and in the larger shapes a zero, a subnormal, a huge, a NaN and an infinite row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if x.numel() == 0:
        return x.to(dtype)
    rows = x.view(-1, shape[-1])
    rows *= torch.logspace(-3, 3, rows.shape[0])[:, None]
    if rows.shape[0] >= 5 and shape[-1] > 0:
        rows[0] = 0
        rows[1] = torch.where(rows[1] > 0, 1.0, -1.0) * torch.finfo(torch.float32).smallest_normal / 3
        rows[2, -1] = torch.finfo(dtype).max
        rows[3, shape[-1] // 2] = float("nan")
        rows[4, 0] = -float("inf")
    return x.to(dtype)


def philox(counter, key, stream):
    """Words [n, 4] of philox4x32-10 for 64-bit counters [n]."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    counter = np.asarray(counter, np.uint64)
    c = [counter & mask, counter >> shift, np.full_like(counter, stream), np.zeros_like(counter)]
    k = [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> shift) ^ c[1] ^ np.uint64(k[0]), p1 & mask, (p0 >> shift) ^ c[3] ^ np.uint64(k[1]), p0 & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, 1)


def uniform(shape, seed, stream=0):
    count = int(np.prod(shape))
    words = philox(np.arange((count + 3) // 4), seed, stream).reshape(-1)[:count]
    return ((words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)).reshape(shape)


def scale_and_inverse(absmax, finite):
    """absmax and finite have any shape; float32 throughout."""
    live = finite & (absmax >= np.float32(127) * np.finfo(np.float32).tiny)
    safe = np.where(live, absmax, np.float32(1))
    scale = np.where(live, safe / np.float32(127), np.float32(0))
    return np.where(finite, scale, np.float32("nan")), np.where(live, np.float32(127) / safe, np.float32(0))


def codes(x, inverse, u=None):
    """x and inverse broadcast; u None rounds to nearest even."""
    with np.errstate(all="ignore"):
        v = np.where(inverse == 0, np.float32(0), x * inverse).astype(np.float32)
        v = np.rint(v) if u is None else np.floor(v + u)
    return np.clip(v, -127, 127).astype(np.int8)


def absmax_and_finite(x, axis):
    return np.abs(x).max(axis=axis, keepdims=True, initial=0), np.isfinite(x).all(axis=axis, keepdims=True)


def assert_same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.is_contiguous()
        np.testing.assert_array_equal(g.numpy(), w)
        assert g.numpy().dtype == w.dtype


def reference_rowwise(x, seed=None, scale=None):
    x = x.float().numpy()
    absmax, finite = absmax_and_finite(x, -1)
    if scale is None:
        scale_out, inverse = scale_and_inverse(absmax, finite)
    else:
        scale = np.broadcast_to(scale.numpy().reshape(-1, 1), (absmax.size, 1)).reshape(absmax.shape)
        safe = np.where(scale == 0, np.float32(1), scale)
        inverse = np.where(finite & (scale != 0), np.float32(1) / safe, np.float32(0))
        scale_out = np.where(finite, scale, np.float32("nan"))
    return codes(x, inverse, None if seed is None else uniform(x.shape, seed)), scale_out[..., 0]


def test_philox_of_this_file_gives_the_published_answers():
    # From the known-answer vectors of Random123, for counters whose last word is 0.
    assert [hex(w) for w in philox([0], 0, 0)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rowwise(isa, threads, shape, dtype):
    x = make(shape, dtype)
    assert_same(torch.ops.pykernels.quantize_rowwise(x), reference_rowwise(x))
    assert_same(torch.ops.pykernels.quantize_rowwise(x, True, SEED), reference_rowwise(x, SEED))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", ["0-dim", "one", "per row"])
def test_rowwise_given_scale(isa, dtype, count):
    x = make((7, 65), dtype)
    scale = {"0-dim": torch.tensor(0.013), "one": torch.tensor([-0.5]), "per row": torch.rand(7)}[count]
    if count == "per row":
        scale[6] = 0
    assert_same(torch.ops.pykernels.quantize_rowwise(x, scale=scale), reference_rowwise(x, scale=scale))
    got = torch.ops.pykernels.quantize_rowwise(x, True, SEED, scale)
    assert_same(got, reference_rowwise(x, SEED, scale))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 5:70],  # rows apart, read in place
        lambda x: x[::3],
        lambda x: x.t(),  # stride 1 lies in the wrong dimension
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(9, -1),  # row stride 0
        lambda x: x[0],  # one dimension: a single scale
        lambda x: x.view(5, 6, 80)[:, 1:4],  # two leading strides that do not collapse
        lambda x: x.view(5, 6, 80)[:, :, 3:],  # and that do
    ],
)
def test_rowwise_views(isa, view):
    x = view(make((30, 80)))
    got = torch.ops.pykernels.quantize_rowwise(x, True, 7)
    assert got[1].shape == x.shape[:-1]
    assert_same(got, reference_rowwise(x.contiguous(), 7))


def test_rowwise_ties_go_to_even(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale = torch.ops.pykernels.quantize_rowwise(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert scale.tolist() == [1.0]


def test_rowwise_errors():
    op = torch.ops.pykernels.quantize_rowwise
    with pytest.raises(RuntimeError, match="expected x to be float32, bfloat16 or float16, got int32"):
        op(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="expected x to have at least 1 dimension, got 0"):
        op(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"expected scale to have 1 element or one for each of the 2 rows of x"):
        op(torch.zeros(2, 3), scale=torch.zeros(3))
    with pytest.raises(RuntimeError, match="expected scale to be float32, got float64"):
        op(torch.zeros(2, 3), scale=torch.zeros(2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected scale to be finite, got nan at row 1"):
        op(torch.zeros(2, 3), scale=torch.tensor([1.0, float("nan")]))
