"""The quantisers: every backend bit for bit like the reference, and the reference against what the words promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pykernels.functional as F
from tests.matrix import BACKENDS, DEVICE, FLOATS, use

OTHERS = [backend for backend in BACKENDS if backend != "reference"]
# Vector widths are 8 and 16, transposes work on 16 x 16 or 64 x 64, philox gives four words: sizes around each.
SHAPES = [(1, 1), (3, 5), (16, 16), (17, 63), (64, 64), (65, 130), (5, 1000)]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -3e-39, 1.4e-36, 3.3e38, 1.0, -127.5]


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal values over many magnitudes, a zero row, and rows with NaN and infinity where there are enough rows."""
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    if shape[0] > 4:
        x[1] = 0
        x[2, 0], x[3, -1] = math.nan, -math.inf
    return x.to(dtype).to(DEVICE)


def calls(x: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    """The result of every quantiser."""
    rows = torch.rand(x.shape[0], device=x.device) / 20 + 1e-3
    return {
        "rowwise": F.quantize_rowwise(x),
        "rowwise stochastic": F.quantize_rowwise(x, stochastic=True, seed=2**40 + 7),
        "rowwise static": F.quantize_rowwise(x, scale=torch.tensor(0.05, device=x.device)),
        "rowwise static rows": F.quantize_rowwise(x, scale=rows, stochastic=True, seed=-3),
        "colwise": F.quantize_colwise(x),
        "colwise stochastic": F.quantize_colwise(x, stochastic=True, seed=11),
        "both": F.quantize_both(x),
        "both stochastic": F.quantize_both(x, stochastic=True, seed=12),
        "transposed": F.quantize_transposed(x),
        "transposed stochastic": F.quantize_transposed(x, stochastic=True, seed=12),
        "blockwise 1-D": F.quantize_blockwise(x, 16),
        "blockwise 2-D": F.quantize_blockwise(x, (3, 20)),
        "asymmetric": F.quantize_asymmetric(x),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", OTHERS)
def test_bit_equal_to_the_reference(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if backend == "triton" and (dtype == torch.float16 or shape[0] * shape[1] > 5000):
        shape = (6, 40)  # the interpreter is slow
    x = sample(shape, dtype)
    torch.manual_seed(1)
    with use("reference"):
        expected = calls(x)
    torch.manual_seed(1)
    with use(backend):
        got = calls(x)
    for name, tensors in expected.items():
        for mine, reference in zip(got[name], tensors, strict=True):
            assert mine.dtype == reference.dtype and mine.shape == reference.shape, name
            torch.testing.assert_close(
                mine, reference, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
            assert mine.is_contiguous(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_half_a_step(backend: str) -> None:
    x = torch.randn(20, 70, device=DEVICE)
    with use(backend):
        q, scale = F.quantize_rowwise(x)
        back = F.dequantize_rowwise(q, scale)
        qc, col_scale = F.quantize_colwise(x)
        back_c = F.dequantize_colwise(qc, col_scale)
        qa, a_scale, zero = F.quantize_asymmetric(x)
        back_a = F.dequantize_asymmetric(qa, a_scale, zero)
        qb, b_scale = F.quantize_blockwise(x, (6, 32))
        back_b = F.dequantize_blockwise(qb, b_scale, (6, 32))
    tolerance = 0.5 * (1 + 2**-15)  # half a step, and the roundings of scale and product
    assert bool(((back - x).abs() <= tolerance * scale[:, None]).all())
    assert bool(((back_c - x).abs() <= tolerance * col_scale).all())
    # An asymmetric range is clamped at its ends, where the zero point's own rounding costs up to half a step more.
    assert bool(((back_a - x).abs() <= 2 * tolerance * a_scale[:, None]).all())
    assert bool(
        ((back_b - x).abs() <= tolerance * b_scale.repeat_interleave(6, 0)[:20].repeat_interleave(32, 1)[:, :70]).all()
    )
    assert q.abs().amax(1).tolist() == [127] * 20  # the largest element uses the whole range


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_rows(backend: str) -> None:
    """Zero and subnormal rows are scale 0, rows that are not finite are scale NaN: documented, never silent."""
    x = torch.ones(4, 9, device=DEVICE)
    x[0], x[1, 3], x[2, 4] = 0, math.nan, math.inf
    x[3] = 1e-39
    with use(backend):
        q, scale = F.quantize_rowwise(x)
        back = F.dequantize_rowwise(q, scale)
        _, a_scale, _ = F.quantize_asymmetric(x)
    assert scale[0] == 0 and scale[3] == 0 and bool(scale[1:3].isnan().all())
    assert q.abs().max() == 0
    assert bool((back[0] == 0).all()) and bool(back[1:3].isnan().all())
    assert a_scale[0] == 0 and bool(a_scale[1:3].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_static_scale_too_small_to_invert_gives_zeros(backend: str) -> None:
    with use(backend):
        for tiny in (0.0, 1e-39):
            q, scale = F.quantize_rowwise(torch.ones(2, 3, device=DEVICE), scale=torch.tensor(tiny, device=DEVICE))
            assert q.abs().max() == 0 and scale.tolist() == [torch.tensor(tiny).item()] * 2
        q, _ = F.quantize_rowwise(torch.ones(2, 3, device=DEVICE), scale=torch.tensor(1e-37, device=DEVICE))
        assert q.min() == 127


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    x = torch.empty(shape, device=DEVICE)
    with use(backend):
        assert F.quantize_rowwise(x)[1].tolist() == [0.0] * shape[0]
        assert F.quantize_both(x)[2].shape == shape[::-1]
        assert F.quantize_blockwise(x, 4)[1].shape == (shape[0], -(-shape[1] // 4))
        assert F.quantize_asymmetric(x)[2].tolist() == [0] * shape[0]
        assert F.dequantize_rowwise(*F.quantize_rowwise(x)).shape == shape


def test_stochastic_rounding_is_unbiased_and_seeded() -> None:
    """The mean over 4,000 seeds is within 5 standard errors of x; a seed gives one result, another a different one."""
    x = torch.linspace(-1, 1, 41)[None]
    draws = torch.stack(
        [F.dequantize_rowwise(*F.quantize_rowwise(x, stochastic=True, seed=seed)) for seed in range(4000)]
    )
    step = 1 / 127
    assert (draws.mean(0) - x).abs().max() < 5 * 0.5 * step / 4000**0.5
    assert torch.equal(draws[3], F.dequantize_rowwise(*F.quantize_rowwise(x, stochastic=True, seed=3)))
    assert not torch.equal(draws[3], draws[4])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(300, 1111)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(calls(x.clone()))
            torch.manual_seed(0)
    finally:
        torch.set_num_threads(threads)
    for name in ("rowwise stochastic", "both stochastic", "colwise stochastic", "blockwise 2-D"):
        assert all(torch.equal(a, b) for a, b in zip(results[0][name], results[1][name], strict=True)), name


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_stride_and_value(data: st.DataObject) -> None:
    """Leading dimensions, slices, transposes, broadcasts and special values: native equals reference on its copy."""
    shape = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(FLOATS))
    base = torch.randn([2 * size + 1 for size in shape])
    for _ in range(data.draw(st.integers(0, 3))):
        base.view(-1)[data.draw(st.integers(0, base.numel() - 1))] = data.draw(st.sampled_from(SPECIAL))
    x = base.to(dtype)[
        tuple(slice(data.draw(st.integers(0, 1)), None, data.draw(st.sampled_from([1, 2]))) for _ in shape)
    ]
    x = x.permute(data.draw(st.permutations(range(x.dim()))))
    if x.shape[0] and data.draw(st.booleans()):
        x = x[:1].expand(3, *x.shape[1:])
    got = (*F.quantize_rowwise(x), *F.quantize_asymmetric(x), *F.quantize_blockwise(x, 3))
    with use("reference"):
        copy = x.contiguous()
        expected = (*F.quantize_rowwise(copy), *F.quantize_asymmetric(copy), *F.quantize_blockwise(copy, 3))
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0, equal_nan=True)
