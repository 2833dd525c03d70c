"""The Triton launchers in Triton's interpreter, against the references of pykernels/ops.

Shapes are small, since the interpreter runs one program at a time. (1, 1) and (3, 5) are below every tile and every
vector width; (7, 64) has whole Philox blocks and one ragged row tile, (5, 130) neither; (70, 37) takes two
tiles along M.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pykernels.kernels import (  # noqa: E402
    _common,
    _tuning,
    dequantize,
    int8_linear,
    int8_matmul,
    quantize_asymmetric,
    quantize_blockwise,
    quantize_both,
    quantize_colwise,
    quantize_rowwise,
)
from pykernels.kernels.int8_weight_only_linear import CONFIGS as WEIGHT_ONLY_CONFIGS  # noqa: E402
from pykernels.kernels.int8_weight_only_linear import int8_weight_only_linear as weight_only  # noqa: E402
from pykernels.ops import _numerics  # noqa: E402
from pykernels.ops.dequantize import reference as dequantize_reference  # noqa: E402
from pykernels.ops.int8_linear import reference as int8_linear_reference  # noqa: E402
from pykernels.ops.int8_matmul import reference as int8_matmul_reference  # noqa: E402
from pykernels.ops.quantize_asymmetric import reference as asymmetric_reference  # noqa: E402
from pykernels.ops.quantize_blockwise import reference as blockwise_reference  # noqa: E402
from pykernels.ops.quantize_colwise import both as both_reference  # noqa: E402
from pykernels.ops.quantize_colwise import colwise as colwise_reference  # noqa: E402
from pykernels.ops.quantize_rowwise import reference as rowwise_reference  # noqa: E402

pytestmark = pytest.mark.skipif(not _tuning.interpreted(), reason="with a GPU the launchers take CUDA tensors")

SHAPES = [(1, 1), (3, 5), (7, 64), (5, 130), (70, 37)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEDS = [None, 0, -1, 2**40 + 3]  # None: round to nearest; the key has two halves and a sign


def same(ours: torch.Tensor | tuple[torch.Tensor, ...], theirs: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    """Equal to the bit, NaN where NaN, of one dtype."""
    if isinstance(ours, torch.Tensor):
        ours, theirs = (ours,), (theirs,)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Values over several binades with what quantisers stumble on: zero, NaN, infinite, tiny rows, exact ties."""
    x = (torch.randn(shape) * torch.exp2(torch.randint(-6, 6, shape).float())).to(dtype)
    if shape[0] >= 5:
        x[0] = 0
        x[1, shape[1] // 2] = float("nan")
        x[2, 0] = -float("inf")
        x[3] = 1e-38
        x[4] = torch.arange(shape[1]) % 255 / 2 - 63.5
        x[4, 0] = 127
    return x


@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(SHAPES, DTYPES)))
def test_quantizers_match_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = matrix(shape, dtype)
    for seed in SEEDS:
        noise = (False, 0) if seed is None else (True, seed)
        same(quantize_rowwise.quantize_rowwise(x, *noise), rowwise_reference(x, *noise))
        same(quantize_colwise.quantize_colwise(x, *noise), colwise_reference(x, *noise))
        same(quantize_both.quantize_both(x, *noise), both_reference(x, *noise))
        same(quantize_both.quantize_transposed(x, *noise), both_reference(x, *noise)[2:])
    same(quantize_asymmetric.quantize_asymmetric(x), asymmetric_reference(x))


@pytest.mark.parametrize("block_size", [[1], [16], [7], [200], [1, 16], [4, 5], [64, 64], [200, 3]])
def test_blockwise_matches_bit_for_bit(block_size: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, dtype in zip(SHAPES[1:], [*DTYPES, torch.float32], strict=True):
        x = matrix(shape, dtype)
        same(quantize_blockwise.quantize_blockwise(x, block_size), blockwise_reference(x, block_size))
    x = matrix((12, 37), torch.float32)
    monkeypatch.setattr(quantize_blockwise, "TILE", 16)  # blocks larger than a tile are walked in two loops
    same(quantize_blockwise.quantize_blockwise(x, block_size), blockwise_reference(x, block_size))


@pytest.mark.parametrize("K", [130, 132])
def test_long_rows_take_the_loop(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quantize_rowwise, quantize_asymmetric):
        monkeypatch.setattr(module, "ONE_PASS_K", 32)
        monkeypatch.setattr(module, "LOOP_K", 32)
    x = matrix((6, K), torch.bfloat16)
    same(quantize_rowwise.quantize_rowwise(x), rowwise_reference(x))
    same(quantize_rowwise.quantize_rowwise(x, True, 5), rowwise_reference(x, True, 5))
    same(quantize_asymmetric.quantize_asymmetric(x), asymmetric_reference(x))


@pytest.mark.parametrize("scale", [torch.tensor(0.02), torch.tensor([0.0]), torch.rand(6)])
def test_given_scale(scale: torch.Tensor) -> None:
    x = matrix((6, 40), torch.float32)
    same(quantize_rowwise.quantize_rowwise(x, scale=scale), rowwise_reference(x, scale=scale))
    same(quantize_rowwise.quantize_rowwise(x, True, 9, scale), rowwise_reference(x, True, 9, scale))


def test_views_and_more_dimensions() -> None:
    x = matrix((12, 24), torch.float32)
    for view in (x.t(), x[::2, 3:20], x[:, ::2], x.view(3, 4, 24)[:, 1:], x[0]):
        same(quantize_rowwise.quantize_rowwise(view), rowwise_reference(view))
        same(quantize_asymmetric.quantize_asymmetric(view), asymmetric_reference(view))
        same(quantize_blockwise.quantize_blockwise(view, [5]), blockwise_reference(view, [5]))
        if view.dim() == 2:
            same(quantize_colwise.quantize_colwise(view, True, 1), colwise_reference(view, True, 1))
            same(quantize_both.quantize_both(view), both_reference(view))
            same(quantize_both.quantize_transposed(view, True, 1), both_reference(view, True, 1)[2:])


@triton.jit
def _uniform(out_ptr, seed, row, K, QUADS: tl.constexpr):
    rows = row.to(tl.int64) + tl.arange(0, 2)
    u = _common.uniform(seed, rows, 8, K, 1, QUADS, 16)
    tl.store(out_ptr + tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :], u)


@pytest.mark.parametrize(("K", "quads"), [(4096, True), (4096, False), (4099, False)])
def test_philox_past_four_billion_blocks(K: int, quads: bool) -> None:
    """No test can hold a tensor whose counter needs its high word, but the function can be asked."""
    row = 2**25
    out = torch.empty(2, 16)
    _uniform[(1,)](out, 77, row, K, QUADS=quads)
    index = torch.tensor([[(row + r) * K + 8 + j for j in range(16)] for r in range(2)])
    words = _numerics.philox(77, (index >> 2).reshape(-1), 1)
    bits = words.gather(1, (index & 3).reshape(-1, 1)).reshape(2, 16)
    same(out, (bits >> 8).float() * 2.0**-24)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_dequantize(out_dtype: torch.dtype) -> None:
    for (M, K), block in itertools.product(SHAPES, ([1], [7], [200], [3, 4], [1000, 1], [1, 1000])):
        q = torch.randint(-128, 128, (M, K), dtype=torch.int8)
        grid = (M if len(block) == 1 else -(-M // block[0]), -(-K // block[-1]))
        scale, zero_point = torch.rand(grid), torch.randint(-128, 128, grid, dtype=torch.int32)
        for arguments in ((q, scale, block), (q.t().contiguous().t(), scale, block, zero_point)):
            ours = dequantize.dequantize(*arguments, out_dtype=out_dtype)
            same(ours, dequantize_reference(*arguments, out_dtype=out_dtype))


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def product_configs() -> list[dict[str, int]]:
    listed = [config for configs in int8_matmul.CONFIGS.values() for config in configs]
    return [*listed, *(config for _, config in int8_matmul.LARGE), int8_matmul.UNALIGNED]


@pytest.mark.parametrize("config", product_configs(), ids=str)
def test_products_are_exact_in_every_configuration(config: dict[str, int]) -> None:
    """(20, 70, 300): ragged in every dimension, K shorter than all the splits together; (1, 1, 1): nearly empty."""
    for M, N, K in ((20, 70, 300), (1, 1, 1)):
        a, b = codes(M, K), codes(N, K)
        with _tuning.force_config(config):
            ours = int8_matmul.int8_matmul(a, b, out_dtype=torch.int32)
        assert torch.equal(ours.long(), a.long() @ b.long().t())


@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 1, 1), (17, 33, 65), (2, 300, 48), (130, 3, 16), (300, 20, 32), (3, 4, 0)]
)
def test_product_shapes_and_strides(M: int, N: int, K: int) -> None:
    a, b = codes(M, K + 9)[:, :K], codes(N, K + 3)[:, 3:]
    exact = a.long() @ b.long().t()
    assert torch.equal(int8_matmul.int8_matmul(a, b, out_dtype=torch.int32).long(), exact)
    transposed = a.t().contiguous().t()
    assert torch.equal(int8_matmul.int8_matmul(transposed, b, out_dtype=torch.int32).long(), exact)


def test_group_ordering_reaches_every_tile() -> None:
    """Seventeen tiles of rows: two full groups of eight and a ragged one."""
    a, b = codes(17 * 32 - 5, 16), codes(150, 16)
    with _tuning.force_config(int8_matmul.UNALIGNED):
        assert torch.equal(int8_matmul.int8_matmul(a, b, out_dtype=torch.int32).long(), a.long() @ b.long().t())


def within_one_rounding(ours: torch.Tensor, truth: torch.Tensor, largest: torch.Tensor) -> None:
    """ours is truth (float64) rounded to its dtype, give or take the float32 arithmetic of terms up to `largest`."""
    eps = torch.finfo(ours.dtype).eps
    slack = 8 * torch.finfo(torch.float32).eps * largest
    error = (ours.double() - truth).abs()
    assert (error <= 0.5 * eps * truth.abs() + slack + torch.finfo(ours.dtype).tiny).all(), error.max()


def activations(v: torch.Tensor, activation: int) -> torch.Tensor:
    gelu = torch.nn.functional.gelu
    return [v, v.relu(), gelu(v), gelu(v, approximate="tanh"), torch.nn.functional.silu(v)][activation]


@pytest.mark.parametrize(("activation", "out_dtype"), list(itertools.product(range(5), DTYPES)))
def test_epilogue_is_within_one_rounding_of_float64(activation: int, out_dtype: torch.dtype) -> None:
    M, N, K = 9, 37, 80
    a, b = codes(M, K), codes(N, K)
    bias, residual = torch.randn(N), torch.randn(M, N + 3).to(out_dtype)[:, :N]
    zero_point = torch.randint(-128, 128, (M,), dtype=torch.int32)
    exact = a.double() @ b.double().t()
    for row, column in ((torch.rand(M) / 100, torch.rand(N) / 100), (torch.tensor(1e-4), torch.rand(1)), (None, None)):
        for shift in (None, zero_point):
            ours = int8_matmul.int8_matmul(a, b, row, column, bias, residual, activation, shift, out_dtype=out_dtype)
            v = exact if shift is None else exact - shift.double()[:, None] * b.double().sum(1)
            v = v * (1 if row is None else row.double().reshape(-1, 1)) * (1 if column is None else column.double())
            largest = v.abs() + bias.double().abs() + residual.double().abs()
            truth = activations(v + bias.double(), activation) + residual.double()
            if out_dtype == torch.float16:  # past its range both are infinite, and nothing is left to compare
                held = truth.abs() < 6e4
                ours, truth, largest = ours[held], truth[held], largest[held]
            within_one_rounding(ours, truth, largest)


def test_zero_point_difference_of_33_bits() -> None:
    """The largest accumulator minus the largest correction of the other sign does not fit an int32."""
    K = 131071
    a, b = torch.full((1, K), -128, dtype=torch.int8), torch.full((2, K), 127, dtype=torch.int8)
    b[1] = -128
    zero_point = torch.tensor([127], dtype=torch.int32)
    with _tuning.force_config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16384, "SPLIT_K": 1}):  # few steps: fast here
        ours = int8_matmul.int8_matmul(a, b, a_zero_point=zero_point)
    same(ours, torch.tensor([[-255 * 127 * K, 255 * 128 * K]]).double().float())
    same(ours, int8_matmul_reference(a, b, a_zero_point=zero_point, b_sum=b.sum(1, dtype=torch.int32)))


@pytest.mark.parametrize(("M", "dtype"), list(itertools.product((1, 5), DTYPES)))
def test_int8_linear(M: int, dtype: torch.dtype) -> None:
    K, N = 100, 30
    x, w, w_scale = torch.randn(M, K).to(dtype), codes(N, K), torch.rand(N)
    bias, residual = torch.randn(N).to(dtype), torch.randn(M, N).to(dtype)
    for activation, x_scale in itertools.product(range(5), (None, torch.tensor(0.02))):
        q, scale = rowwise_reference(x, scale=x_scale)
        v = (q.double() @ w.double().t()) * scale.double()[:, None] * w_scale.double()
        largest = v.abs() + bias.double().abs() + residual.double().abs()
        truth = activations(v + bias.double(), activation) + residual.double()
        ours = int8_linear.int8_linear(x, w, w_scale, bias, residual, activation, x_scale)
        assert ours.dtype == dtype
        within_one_rounding(ours, truth, largest)
    for config in int8_linear.ROW_CONFIGS if M == 1 else ():
        with _tuning.force_config(config):
            ours = int8_linear.int8_linear(x, w, w_scale, bias, out_dtype=torch.float32)
        torch.testing.assert_close(ours, int8_linear_reference(x, w, w_scale, bias, out_dtype=torch.float32))
    x[0, 3] = float("nan")
    assert int8_linear.int8_linear(x, w, w_scale)[0].isnan().all()
    assert int8_linear.int8_linear(torch.randn(2, 3, K), w, w_scale).shape == (2, 3, N)


@pytest.mark.parametrize(("M", "dtype"), list(itertools.product((1, 19), DTYPES)))
def test_weight_only(M: int, dtype: torch.dtype) -> None:
    """Groups of 25 (ragged in a tile), 64 (a whole tile), one group, and a scale per row."""
    N = 70
    for activation, (K, shape) in enumerate(((100, (N, 4)), (192, (N, 3)), (100, (N, 1)), (100, (N,)), (1, (N,)))):
        x, w, scale, bias = torch.randn(M, K).to(dtype), codes(N, K), torch.rand(shape) / 10, torch.randn(N)
        spread = scale.reshape(N, -1).repeat_interleave(K // scale.reshape(N, -1).shape[1], dim=1)
        floats = w.double() * spread.double()
        v = x.double() @ floats.t() + bias.double()
        # A sum of K products in float32, in whatever order: the bound is on the sum of their sizes.
        largest = x.double().abs() @ floats.abs().t() + bias.double().abs()
        ours = weight_only(x, w, scale, bias, activation)
        assert ours.dtype == dtype
        within_one_rounding(ours, activations(v, activation), largest)


def test_weight_only_float32_keeps_its_last_bits() -> None:
    """Three bfloat16 make a float32: cut to two, or to tf32, the smallest term here would be lost."""
    x, w = torch.full((4, 16), 1 + 2.0**-11 + 2.0**-23), torch.ones(20, 16, dtype=torch.int8)
    w[:, 8:] = -1
    x[:, 8:] = 1 + 2.0**-11
    same(weight_only(x, w, torch.ones(20)), torch.full((4, 20), 8 * 2.0**-23))


@pytest.mark.parametrize("config", [c for cs in WEIGHT_ONLY_CONFIGS.values() for c in cs], ids=str)
def test_weight_only_in_every_configuration(config: dict[str, int]) -> None:
    x, w, scale = torch.randn(40, 256).to(torch.bfloat16), codes(90, 256), torch.rand(90, 2)
    with _tuning.force_config(config):
        ours = weight_only(x, w, scale)
    floats = w.double() * scale.double().repeat_interleave(128, dim=1)
    within_one_rounding(ours, x.double() @ floats.t(), x.double().abs() @ floats.abs().t())


def test_empty() -> None:
    for shape in ((0, 5), (5, 0), (0, 0)):
        x = torch.empty(shape)
        same(quantize_rowwise.quantize_rowwise(x), rowwise_reference(x))
        same(quantize_colwise.quantize_colwise(x), colwise_reference(x))
        same(quantize_asymmetric.quantize_asymmetric(x), asymmetric_reference(x))
        same(quantize_blockwise.quantize_blockwise(x, [4]), blockwise_reference(x, [4]))
        same(quantize_both.quantize_both(x), both_reference(x))
        same(quantize_both.quantize_transposed(x), both_reference(x)[2:])
        w, w_scale = codes(3, shape[1]), torch.rand(3)
        assert weight_only(x, w, w_scale).shape == (shape[0], 3)
        ours = int8_linear.int8_linear(x, w, w_scale, torch.ones(3))
        same(ours, torch.ones(shape[0], 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_rowwise.quantize_rowwise(codes(2, 3)), "x to be float32"),
        (lambda: quantize_rowwise.quantize_rowwise(torch.randn(2, 3), scale=torch.rand(3)), "scale"),
        (lambda: quantize_colwise.quantize_colwise(torch.randn(2)), "x to be 2 dimensions"),
        (lambda: quantize_blockwise.quantize_blockwise(torch.randn(2, 3), [0]), "block_size"),
        (lambda: dequantize.dequantize(codes(2, 3), torch.rand(2), [3]), "scale"),
        (lambda: int8_matmul.int8_matmul(codes(2, 3), codes(2, 4)), "b to be"),
        (lambda: int8_matmul.int8_matmul(codes(1, 131072), codes(1, 131072)), "131071"),
        (lambda: int8_matmul.int8_matmul(codes(2, 3), codes(2, 3), torch.rand(3)), "a_scale"),
        (
            lambda: int8_matmul.int8_matmul(codes(2, 3), codes(2, 3), bias=torch.rand(2), out_dtype=torch.int32),
            "out_dtype",
        ),
        (lambda: int8_linear.int8_linear(torch.randn(2, 3), codes(4, 5), torch.rand(4)), "weight"),
        (
            lambda: weight_only(torch.randn(2, 6), codes(4, 6), torch.rand(4, 4)),
            "weight_scale",
        ),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


class Tuning:
    """A device whose timings are the configurations' own numbers, and a count of how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        self.measured: list[int] = []
        self.capturing = False
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.delenv("PYKERNELS_AUTOTUNE", raising=False)
        monkeypatch.setattr(_tuning, "_tuned", {})
        monkeypatch.setattr(_tuning, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU/1")
        monkeypatch.setattr(triton.testing, "do_bench", lambda call, **options: call())

    def launch(self, config: dict[str, int]) -> int:
        self.measured.append(config["time"])
        if config["time"] < 0:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return config["time"]

    def pick(self, *times: int) -> int:
        configs = [{"time": time} for time in times]
        return _tuning.tuned("op", (16, 4096), configs, torch.device("cuda", 0), self.launch)["time"]


def test_tuning_measures_once_and_remembers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = Tuning(monkeypatch, tmp_path)
    assert device.pick(3, -1, 1, 2) == 1
    assert device.measured == [3, -1, 1, 2]
    assert device.pick(3, -1, 1, 2) == 1 and len(device.measured) == 4
    _tuning._tuned.clear()  # as in a new process: read from disk
    assert device.pick(3, -1, 1, 2) == 1 and len(device.measured) == 4
    (file,) = (tmp_path / "pykernels").iterdir()
    assert file.name == f"Test-GPU-1-triton-{triton.__version__}.json"
    _tuning._tuned.clear()
    assert device.pick(5, 4) == 4  # what the file names is no longer offered
    _tuning._tuned.clear()
    file.write_text("{")
    assert device.pick(7, 6) == 6


def test_tuning_never_measures_under_capture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = Tuning(monkeypatch, tmp_path)
    device.capturing = True
    assert device.pick(3, 1) == 3 and not device.measured
    device.capturing = False
    assert device.pick(3, 1) == 1  # the default taken under capture was not remembered
    with pytest.raises(RuntimeError, match="no configuration fits"):
        _tuning._tuned.clear()
        (tmp_path / "pykernels").rename(tmp_path / "gone")
        device.pick(-1, -2)
