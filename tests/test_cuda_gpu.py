"""The compiled CUDA operators on a GPU, against the references on the CPU. `make gpu-check` runs this file."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import pykernels.functional as F
from pykernels import _library
from pykernels.ops import int8_linear, int8_matmul, int8_weight_only_linear, quantize_rowwise

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]


def gpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.to(DEVICE) for t in tensors]


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def assert_within_rounding(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, float32_steps: int) -> None:
    """got is want rounded to its dtype, give or take float32's own roundings at the size of the terms."""
    want = want.double()
    bound = torch.finfo(got.dtype).eps / 2 * want.abs() + float32_steps * 2.0**-24 * size.double()
    error = (got.cpu().double() - want).abs()
    assert not got.isnan().any()
    assert bool((error <= bound).all()), f"worst {float((error / bound).max())} of the bound"


SERVED = ["quantize_rowwise", "int8_matmul", "int8_linear", "int8_weight_only_linear", "int8_block_scaled_matmul"]


@pytest.mark.parametrize("op", SERVED)
def test_the_compiled_library_serves(op: str) -> None:
    assert _library.has_native(op, "cuda"), _library._native["cuda"].reason


# A warp a row, a block a row, rows longer than registers hold, odd lengths, no rows, no columns.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(5, 8), (33, 513), (2, 3, 1024), (7, 4096), (3, 40000), (129, 1), (0, 64), (4, 0)], ids=str
)
@pytest.mark.parametrize("mode", ["dynamic", "stochastic", "static", "static rows"])
def test_quantize_rowwise(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    x = torch.randn(shape).to(dtype)
    if x.numel() and x.shape[0] > 4:
        x[1] = 0
        x[2, -1] = float("nan")
        x[3, 0] = float("inf")
    scale = {"static": torch.tensor(0.02), "static rows": torch.rand(x[..., :1].numel())}
    given = scale.get(mode) if x.numel() else None
    want_q, want_scale = quantize_rowwise.reference(x, mode == "stochastic", 2**40 + 5, given)
    q, got_scale = F.quantize_rowwise(
        x.to(DEVICE), stochastic=mode == "stochastic", seed=2**40 + 5, scale=None if given is None else given.to(DEVICE)
    )
    assert torch.equal(q.cpu(), want_q)
    assert torch.equal(got_scale.cpu().nan_to_num(7e9), want_scale.nan_to_num(7e9))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_rowwise_of_a_view(dtype: torch.dtype) -> None:
    x = torch.randn(64, 300).to(dtype)
    for view in (lambda t: t[:, 1:258], lambda t: t[::3, 8:264], lambda t: t.t(), lambda t: t[:1].expand(5, 300)):
        want = quantize_rowwise.reference(view(x))
        got = F.quantize_rowwise(view(x.to(DEVICE)))
        assert torch.equal(got[0].cpu(), want[0])
        assert torch.equal(got[1].cpu(), want[1])


# Both sides of 16 rows (small-M path and tiles), both tile sizes, ragged tiles, odd K (guarded loads), empty and K = 0.
MATMUL = [
    (1, 1, 1), (1, 4096, 4096), (3, 1000, 272), (16, 129, 513), (17, 64, 64), (64, 256, 1024), (65, 67, 63),
    (200, 4096, 496), (1000, 2000, 384), (2048, 3000, 1024), (0, 5, 8), (5, 0, 8), (5, 8, 0),
]  # fmt: skip


@pytest.mark.parametrize("m,n,k", MATMUL)
def test_int8_matmul_is_exact(m: int, n: int, k: int) -> None:
    a, b = codes(m, k), codes(n, k)
    got = F.int8_matmul(*gpu(a, b), out_dtype=torch.int32)
    assert torch.equal(got.cpu(), int8_matmul.reference(a, b, out_dtype=torch.int32))


def test_int8_matmul_of_views() -> None:
    a, b = codes(40, 200), codes(50, 200)
    for low, high in ((0, 160), (3, 100), (16, 144)):
        got = F.int8_matmul(a.to(DEVICE)[::2, low:high], b.to(DEVICE)[:, low:high], out_dtype=torch.int32)
        assert torch.equal(got.cpu(), int8_matmul.reference(a[::2, low:high], b[:, low:high], out_dtype=torch.int32))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("m", [5, 70])
def test_int8_matmul_epilogue(m: int, activation: str | None, out_dtype: torch.dtype) -> None:
    n, k = 136, 320
    a, b = codes(m, k), codes(n, k)
    a_scale, b_scale = torch.rand(m) * 0.02, torch.rand(n) * 0.01
    zero_point = torch.randint(-128, 128, (m,), dtype=torch.int32)
    bias, residual = torch.randn(n).bfloat16(), torch.randn(m, n).half()
    acc = (a.double() - zero_point.double()[:, None]) @ b.double().T
    v = acc * a_scale.double()[:, None] * b_scale.double() + bias.double()
    f = torch.nn.functional
    act = {None: lambda t: t, "relu": f.relu, "gelu": f.gelu, "silu": f.silu}
    want = act.get(activation, lambda t: f.gelu(t, approximate="tanh"))(v) + residual.double()
    size = v.abs() + bias.double().abs() + residual.double().abs()
    given = gpu(a, b, a_scale, b_scale, bias, residual, zero_point)
    for b_sum in (None, b.sum(1, dtype=torch.int32).to(DEVICE)):
        got = F.int8_matmul(
            *given[:4], bias=given[4], residual=given[5], activation=activation, a_zero_point=given[6], b_sum=b_sum,
            out_dtype=out_dtype,
        )  # fmt: skip
        assert_within_rounding(got, want, size, 8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape,n", [((1, 4096), 4096), ((2, 7, 511), 130), ((300, 1024), 512), ((0, 16), 4)], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_int8_linear(shape: tuple[int, ...], n: int, dtype: torch.dtype, static: bool) -> None:
    x, bias = torch.randn(shape).to(dtype), torch.randn(n).to(dtype)
    weight, weight_scale = quantize_rowwise.reference(torch.randn(n, shape[-1]))
    x_scale = torch.tensor(0.03) if static else None
    want = int8_linear.reference(x, weight, weight_scale, bias, None, 0, x_scale, torch.float32)
    x_gpu, w_gpu, s_gpu, b_gpu, xs_gpu = gpu(x, weight, weight_scale, bias, x_scale)
    got = F.int8_linear(x_gpu, (w_gpu, s_gpu), b_gpu, x_scale=xs_gpu)
    assert got.dtype == dtype
    assert_within_rounding(got, want, want.abs() + bias.float().abs(), 8)


# Few rows, small and large tiles; ragged in every direction, rows off their alignment, more blocks than stages.
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "m,n,k", [(1, 4096, 4096), (16, 130, 129), (33, 300, 1024), (70, 129, 333), (2048, 3000, 1536), (3, 5, 0)]
)
def test_int8_block_scaled_matmul(m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    a, b, bias, blocks = codes(m, k), codes(n, k), torch.randn(n), -(-k // 128)
    a_scale = torch.rand(m, blocks) * 1e-2
    b_scale = torch.rand(-(-n // 128), blocks) * 1e-2
    left = a.double() * a_scale.double().repeat_interleave(128, 1)[:, :k]
    right = b.double() * b_scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    want, size = bias.double().expand(m, n), bias.double().abs().expand(m, n)
    for k0 in range(0, k, 128):
        term = left[:, k0 : k0 + 128] @ right[:, k0 : k0 + 128].T
        want, size = want + term, size + term.abs()
    got = F.int8_block_scaled_matmul(*gpu(a, b, a_scale, b_scale), bias=bias.to(DEVICE), out_dtype=out_dtype)
    assert_within_rounding(got, want, size, 2 + blocks)


# Tensor cores with one scale a row and with groups, both sides of their tile sizes; multiply-adds for what is left.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k,group", [(4096, 4096), (1024, 128), (192, 64), (160, 16), (45, 9), (37, 37)])
@pytest.mark.parametrize("m,n", [(1, 1000), (16, 72), (33, 130), (257, 64)])
def test_int8_weight_only_linear(m: int, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(m, k).to(dtype), codes(n, k), torch.randn(n).to(dtype)
    scale = torch.rand(n, k // group) * 0.02 + 0.001
    full = weight.double() * scale.double().repeat_interleave(group, 1)
    want = x.double() @ full.T + bias.double()
    size = x.double().abs() @ full.abs().T + bias.double().abs()
    x_gpu, w_gpu, s_gpu, b_gpu = gpu(x, weight, scale[:, 0].contiguous() if group == k else scale, bias)
    assert_within_rounding(F.int8_weight_only_linear(x_gpu, (w_gpu, s_gpu), b_gpu), want, size, 16)


def test_weight_only_agrees_with_its_reference() -> None:
    x, weight, scale = torch.randn(3, 64), codes(10, 64), torch.rand(10, 2)
    x_gpu, w_gpu, s_gpu = gpu(x, weight, scale)
    got = F.int8_weight_only_linear(x_gpu, (w_gpu, s_gpu), activation="silu")
    torch.testing.assert_close(
        got.cpu(), int8_weight_only_linear.reference(x, weight, scale, None, 4), rtol=1e-4, atol=1e-3
    )


GRID: dict[str, Callable[..., torch.Tensor]] = {
    "quantize_rowwise": lambda x, q, w, s: F.quantize_rowwise(x)[0],
    "small rows": lambda x, q, w, s: F.int8_matmul(q[:5], w, out_dtype=torch.int32),
    "small rows, unaligned": lambda x, q, w, s: F.int8_matmul(q[:5, 1:], w[:, 1:], out_dtype=torch.int32),
    "tiles": lambda x, q, w, s: F.int8_matmul(q, w, out_dtype=torch.int32),
    "tiles, unaligned": lambda x, q, w, s: F.int8_matmul(q[:, 1:], w[:, 1:], out_dtype=torch.int32),
    "groups": lambda x, q, w, s: F.int8_grouped_matmul(
        q, w.expand(3, -1, -1), torch.tensor([40, 0, 29], device=x.device), out_dtype=torch.int32
    ),
    "blocks, few": lambda x, q, w, s: F.int8_block_scaled_matmul(q[:9], w, s[:9], s[:1]),
    "blocks": lambda x, q, w, s: F.int8_block_scaled_matmul(q, w, s, s[:1]),
    "weight only, few": lambda x, q, w, s: F.int8_weight_only_linear(x[:3], (w, s[:, 0].contiguous())),
    "weight only": lambda x, q, w, s: F.int8_weight_only_linear(x, (w, s[:, 0].contiguous())),
}


@pytest.mark.parametrize("kernel", GRID)
def test_small_grid(kernel: str) -> None:
    """What the sanitizer runs: ragged tiles, one step of K more than whole ones."""
    x, q, w, s = torch.randn(70, 272).bfloat16(), codes(70, 272), codes(70, 272), torch.rand(70, 3) * 0.01
    want = GRID[kernel](x, q, w, s)
    got = GRID[kernel](*gpu(x, q, w, s)).cpu()
    if want.is_floating_point():
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(want.dtype).eps, atol=1e-4)
    else:
        assert torch.equal(got, want)


def test_a_side_stream_is_used() -> None:
    x, weight = torch.randn(64, 1024), codes(512, 1024)
    scale = torch.rand(512)
    want = int8_linear.reference(x, weight, scale)
    x_gpu, w_gpu, s_gpu = gpu(x, weight, scale)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x_gpu)
        torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
        late.copy_(x_gpu)
        got = F.int8_linear(late, (w_gpu, s_gpu))
    stream.synchronize()
    assert_within_rounding(got, want, want.abs(), 8)


@pytest.mark.parametrize("m", [1, 40])
def test_a_cuda_graph_captures_int8_linear(m: int) -> None:
    x, weight = torch.randn(m, 1024), codes(512, 1024)
    scale = torch.rand(512)
    x_gpu, w_gpu, s_gpu = gpu(x, weight, scale)
    F.int8_linear(x_gpu, (w_gpu, s_gpu))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = F.int8_linear(x_gpu, (w_gpu, s_gpu))
    fresh = torch.randn(m, 1024)
    x_gpu.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    want = int8_linear.reference(fresh, weight, scale)
    assert_within_rounding(got, want, want.abs(), 8)


def test_offsets_beyond_int32() -> None:
    rows, cols = 70_000, 32_768
    if torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free GPU memory")
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device=DEVICE).fill_(1)
    x[-2:] = torch.randn(2, cols, device=DEVICE)
    q, scale = F.quantize_rowwise(x)
    want_q, want_scale = quantize_rowwise.reference(x[-2:].cpu())
    assert torch.equal(q[-2:].cpu(), want_q)
    assert torch.equal(scale[-2:].cpu(), want_scale)
    assert bool((q[:-2].amin() == 127).item())
    # And as an operand and an output of the product: rows that start beyond 2^31.
    sums = F.int8_matmul(q, q[-1:], out_dtype=torch.int32)
    assert int(sums[-1, 0]) == int((want_q[1].double() ** 2).sum())


def test_a_mismatch_is_refused_before_any_launch() -> None:
    a = codes(4, 8).to(DEVICE)
    with pytest.raises(RuntimeError, match="int8_matmul: expected b to have shape"):
        F.int8_matmul(a, codes(4, 9).to(DEVICE))
    with pytest.raises(RuntimeError, match="int8_matmul: expected b on the device of a"):
        F.int8_matmul(a, codes(4, 8))
    with pytest.raises(RuntimeError, match="quantize_rowwise: expected x to be"):
        F.quantize_rowwise(a)
    torch.cuda.synchronize()
