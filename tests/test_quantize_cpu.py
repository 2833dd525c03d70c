"""The C++ quantisation kernels, bit for bit against numpy, on each instruction set the machine has, 1 and 2 threads.

Shapes. Vectors hold 4, 8 or 16 floats, loops are unrolled by 4, random numbers come in chunks of 256 elements and in
fours, so K takes values around 16, 64 and 256 on both sides (15, 17, 63, 64, 65, 255, 257), 1 and 3 (less than one
vector and not a multiple of 4, so a row starts inside a counter), and 1000. M takes 0, 1, a few, and 67 or 300, which
is enough for two threads and leaves a ragged tile. (0, 5) and (5, 0) are the empty ones. quantize_both works in tiles
of 64 x 64, so matrices of exactly one, of four, and of one row or column beyond are added for it.
"""

import itertools

import numpy as np
import pytest
import torch

import pykernels

SHAPES = [(0, 5), (5, 0), (1, 1), (3, 3), (4, 15), (2, 17), (5, 63), (3, 64), (7, 65), (2, 255), (3, 257), (67, 130)]
SHAPES += [(300, 1000), (1, 70000)]
MATRICES = [*SHAPES, (1, 64), (64, 1), (64, 64), (128, 128), (65, 129)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0x1234_5678_9ABC_DEF0 - 2**63
ISAS = ["portable", "avx2", "avx512_vnni"]
OPS = torch.ops.pykernels


def supported(isa):
    try:
        with pykernels.cpu_isa(isa):
            return True
    except RuntimeError:
        return False


def everywhere(call):
    """The results of call() under each supported instruction set and thread count."""
    before = torch.get_num_threads()
    try:
        for isa, threads in itertools.product(filter(supported, ISAS), (1, 2)):
            torch.set_num_threads(threads)
            with pykernels.cpu_isa(isa):
                yield call()
    finally:
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


def check(call, want):
    for got in everywhere(call):
        for g, w in zip(got, want, strict=True):
            assert g.is_contiguous()
            assert g.numpy().dtype == w.dtype
            np.testing.assert_array_equal(g.numpy(), w)


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


def reference_colwise(x, seed=None, stream=0):
    x = x.float().numpy()
    scale, inverse = scale_and_inverse(*absmax_and_finite(x, 0))
    return codes(x, inverse, None if seed is None else uniform(x.shape, seed, stream)), scale[0]


def spread(values, block, shape):
    """One value for each block, repeated to the elements."""
    if len(block) == 2:
        values = np.repeat(values, block[0], axis=0)[: shape[0]]
    return np.repeat(values, block[-1], axis=-1)[..., : shape[-1]]


def reference_blockwise(x, block):
    x = x.float().numpy()
    bm, bk = block if len(block) == 2 else (1, block[0])
    grid = (-(-x.shape[0] // bm), -(-x.shape[1] // bk))
    absmax, finite = np.zeros(grid, np.float32), np.ones(grid, bool)
    for i, j in np.ndindex(*grid):
        tile = x[i * bm : (i + 1) * bm, j * bk : (j + 1) * bk]
        absmax[i, j], finite[i, j] = np.abs(tile).max(), np.isfinite(tile).all()
    scale, inverse = scale_and_inverse(absmax, finite)
    return codes(x, spread(inverse, block, x.shape)), scale


def reference_asymmetric(x):
    x = x.float().numpy()
    with np.errstate(all="ignore"):
        low, high = x.min(-1, keepdims=True, initial=0), x.max(-1, keepdims=True, initial=0)
        span = high - low
        finite = np.isfinite(x).all(-1, keepdims=True) & np.isfinite(span)
        live = finite & (span >= np.float32(255) * np.finfo(np.float32).tiny)
        scale = np.where(live, span / np.float32(255), np.where(finite, np.float32(0), np.float32("nan")))
        inverse = np.float32(1) / np.where(live, scale, np.float32(1))
        zero_point = np.where(live, np.clip(np.rint(np.float32(-128) - low * inverse), -128, 127), 0)
        q = np.where(live, np.clip(np.rint(x * inverse) + zero_point, -128, 127), 0)
    return q.astype(np.int8), scale[..., 0], zero_point[..., 0].astype(np.int32)


def check_dequantized(call, centred, scale, out_dtype):
    """The float32 product, rounded by torch."""
    with np.errstate(all="ignore"):
        want = torch.from_numpy(np.broadcast_to(centred.astype(np.float32) * scale, centred.shape).copy())
    for got in everywhere(call):
        assert got.is_contiguous()
        assert got.dtype == out_dtype
        np.testing.assert_array_equal(got.float().numpy(), want.to(out_dtype).float().numpy())


def test_philox_of_this_file_gives_the_published_answers():
    # From the known-answer vectors of Random123, for counters whose last word is 0.
    assert [hex(w) for w in philox([0], 0, 0)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_is_supported(isa):
    """Only here does a machine that lacks one say so; everywhere() passes over it."""
    if not supported(isa):
        pytest.skip(f"this CPU does not support {isa}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rowwise(shape, dtype):
    x = make(shape, dtype)
    check(lambda: OPS.quantize_rowwise(x), reference_rowwise(x))
    check(lambda: OPS.quantize_rowwise(x, True, SEED), reference_rowwise(x, SEED))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", ["0-dim", "one", "per row"])
def test_rowwise_given_scale(dtype, count):
    x = make((7, 65), dtype)
    scale = {"0-dim": torch.tensor(0.013), "one": torch.tensor([-0.5]), "per row": torch.rand(7)}[count]
    if count == "per row":
        scale[6] = 0
    check(lambda: OPS.quantize_rowwise(x, scale=scale), reference_rowwise(x, scale=scale))
    check(lambda: OPS.quantize_rowwise(x, True, SEED, scale), reference_rowwise(x, SEED, scale))


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
def test_rowwise_views(view):
    x = view(make((30, 80)))
    check(lambda: OPS.quantize_rowwise(x, True, 7), reference_rowwise(x.contiguous(), 7))


def test_rowwise_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]] * 3).repeat(1, 3)  # whole vectors and a tail
    for q, scale in everywhere(lambda: OPS.quantize_rowwise(x)):
        assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126] * 3] * 3
        assert scale.tolist() == [1.0] * 3


def test_stochastic_product_and_sum_round_separately():
    """Elements placed so that x * inverse + u falls on an integer: a fused multiply-add would give other codes."""
    absmax = np.float32(1.7)
    inverse = np.float32(127) / absmax
    u = uniform((40, 300), SEED)
    whole = np.random.default_rng(0).integers(-100, 100, u.shape)
    x = ((whole - u) / inverse).astype(np.float32)
    x[0], x[:, 0] = absmax, absmax  # every row and every column has the same scale
    fused = np.floor((x.astype(np.float64) * inverse + u).astype(np.float32)).clip(-127, 127)
    assert (fused != codes(x, inverse, u)).sum() > 100
    x = torch.from_numpy(x)
    check(lambda: OPS.quantize_rowwise(x, True, SEED), reference_rowwise(x, SEED))
    check(lambda: OPS.quantize_colwise(x, True, SEED), reference_colwise(x, SEED))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_colwise(shape, dtype):
    x = make(shape, dtype)
    check(lambda: OPS.quantize_colwise(x), reference_colwise(x))
    check(lambda: OPS.quantize_colwise(x, True, SEED), reference_colwise(x, SEED))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_both(shape, dtype):
    x = make(shape, dtype)
    for seed in (None, SEED):
        col, col_scale = reference_colwise(x, seed, stream=1)
        want = (*reference_rowwise(x, seed), np.ascontiguousarray(col.T), col_scale)
        check(lambda seed=seed: OPS.quantize_both(x, seed is not None, seed or 0), want)
        check(lambda seed=seed: OPS.quantize_transposed(x, seed is not None, seed or 0), want[2:])


def test_both_of_a_matrix_whose_transposed_copy_bypasses_the_caches():
    x = make((2112, 2048), torch.bfloat16)
    col, col_scale = reference_colwise(x)
    transposed = (np.ascontiguousarray(col.T), col_scale)
    check(lambda: OPS.quantize_both(x), (*reference_rowwise(x), *transposed))
    check(lambda: OPS.quantize_transposed(x), transposed)


@pytest.mark.parametrize("op", ["quantize_colwise", "quantize_both", "quantize_transposed"])
def test_matrix_views(op):
    wide, op = make((70, 200)), getattr(OPS, op)
    for view in (wide[:, 3:150], wide[1::2], wide.t(), wide[:, ::3]):
        want = [w.numpy() for w in op(view.contiguous(), True, 5)]
        check(lambda view=view: op(view, True, 5), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [[1], [5], [64], [128], [1000], [3, 5], [64, 64], [128, 32], [500, 1]])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (7, 65), (300, 260)])
def test_blockwise(shape, block, dtype):
    x = make(shape, dtype)
    want_q, want_scale = reference_blockwise(x, block)
    check(lambda: OPS.quantize_blockwise(x, block), (want_q, want_scale))
    q, scale = torch.from_numpy(want_q), torch.from_numpy(want_scale)
    # The dtype serves as the output's here.
    check_dequantized(
        lambda: OPS.dequantize(q, scale, block, None, dtype), want_q, spread(want_scale, block, shape), dtype
    )


@pytest.mark.parametrize("block", [[16, 64], [9, 500], [8, 3000]])
def test_tiles_of_a_wide_matrix(block):
    """Strips of 2048 columns: whole tiles fill them, tiles leave a rest, and one tile is wider than a strip."""
    x = make((37, 4500), torch.bfloat16)
    check(lambda: OPS.quantize_blockwise(x, block), reference_blockwise(x, block))


def test_blockwise_of_three_dimensions_and_views():
    x = make((6, 8, 50))
    for view in (x, x[:, 2:5, 7:], x.transpose(0, 1)):
        flat = view.reshape(-1, view.shape[-1])
        q, scale = OPS.quantize_blockwise(view, [16])
        want_q, want_scale = OPS.quantize_blockwise(flat, [16])
        assert scale.shape == (*view.shape[:-1], -(-view.shape[-1] // 16))
        assert torch.equal(q.flatten(0, 1), want_q)
        np.testing.assert_array_equal(scale.flatten(0, 1).numpy(), want_scale.numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])  # ranges around 0, and wholly on one side of it
def test_asymmetric(shape, shift, dtype):
    x = make(shape, dtype) + torch.tensor(shift, dtype=dtype)
    want_q, want_scale, want_zero = reference_asymmetric(x)
    check(lambda: OPS.quantize_asymmetric(x), (want_q, want_scale, want_zero))
    if shape[-1] == 0:
        return
    q, scale, zero = map(torch.from_numpy, (want_q, want_scale[:, None], want_zero[:, None]))
    centred = want_q.astype(np.int32) - want_zero[:, None]
    check_dequantized(lambda: OPS.dequantize(q, scale, [shape[-1]], zero, dtype), centred, want_scale[:, None], dtype)


def test_asymmetric_range_overflows():
    x = torch.tensor([[3e38, -3e38], [1.0, -1.0]])
    check(lambda: OPS.quantize_asymmetric(x), reference_asymmetric(x))


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_dequantize_rounds_to_nearest_even(out_dtype):
    """Every int8 code under scales whose products are subnormal, ordinary, tied, overflowing, infinite and NaN."""
    q = torch.arange(-128, 128, dtype=torch.int8)[None, :].repeat(9, 1)
    scale = torch.tensor([0.0, 1.1e-7, 5.96e-8, 1.00390625, 1.0 / 3, 517.0, 3e36, float("inf"), float("nan")])[:, None]
    check_dequantized(lambda: OPS.dequantize(q, scale, [256], None, out_dtype), q.numpy(), scale.numpy(), out_dtype)


@pytest.mark.parametrize("width", [1, 7, 16, 65, 300])
def test_dequantize_colwise_with_zero_points(width):
    generator = torch.Generator().manual_seed(width)
    q = torch.randint(-128, 128, (130, 2 * width), generator=generator, dtype=torch.int8)[:, width:]
    scale = torch.rand(1, width, generator=generator)
    zero_point = torch.randint(-128, 128, (1, width), generator=generator, dtype=torch.int32)
    centred = q.numpy().astype(np.int32) - zero_point.numpy()
    check_dequantized(lambda: OPS.dequantize(q, scale, [130, 1], zero_point), centred, scale.numpy(), torch.float32)


def test_rowwise_errors():
    op = OPS.quantize_rowwise
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


def test_errors_of_the_others():
    for op in (OPS.quantize_colwise, OPS.quantize_both, OPS.quantize_transposed):
        with pytest.raises(RuntimeError, match=r"expected x to have 2 dimensions, got 3"):
            op(torch.zeros(2, 3, 4))
        with pytest.raises(RuntimeError, match="expected x to be float32, bfloat16 or float16, got float64"):
            op(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"expected block_size to be positive, got \[4, 0\]"):
        OPS.quantize_blockwise(torch.zeros(2, 3), [4, 0])
    with pytest.raises(RuntimeError, match="expected block_size to have 1 or 2 elements, got 3"):
        OPS.quantize_blockwise(torch.zeros(2, 3), [4, 1, 1])
    with pytest.raises(RuntimeError, match="expected x to have 2 dimensions for a block_size of 2 elements"):
        OPS.quantize_blockwise(torch.zeros(2, 3, 4), [4, 4])
    with pytest.raises(RuntimeError, match="expected x to be float32, bfloat16 or float16, got int8"):
        OPS.quantize_asymmetric(torch.zeros(2, 3, dtype=torch.int8))
    q, scale = torch.zeros(4, 6, dtype=torch.int8), torch.ones(4, 2)
    with pytest.raises(RuntimeError, match=r"expected scale to have shape \[4, 3\], one for each block of q"):
        OPS.dequantize(q, scale, [2])
    with pytest.raises(RuntimeError, match="expected q to be int8, got float32"):
        OPS.dequantize(q.float(), scale, [3])
    with pytest.raises(RuntimeError, match="expected zero_point to be int32, got int8"):
        OPS.dequantize(q, scale, [3], torch.zeros(4, 2, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="expected out_dtype to be float32, bfloat16 or float16, got int8"):
        OPS.dequantize(q, scale, [3], None, torch.int8)
