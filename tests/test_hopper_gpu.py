"""The Hopper products on a GPU of compute capability 9.0, against the reference; `make gpu-check` runs this file."""

from __future__ import annotations

import pytest
import torch

import pykernels.functional as F
from pykernels import _library
from pykernels.ops import heuristics, int8_matmul
from tests.test_cuda_gpu import ACTIVATIONS, FLOATS, assert_within_rounding, codes, gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

# By the kernel an H100 chooses: whole tiles and ragged ones, one step of K and a ragged last, K that is cut.
BRANCHES = {
    "small_m": [(1, 4096, 4096), (16, 136, 528)],
    "mma_sync": [(64, 1000, 1001), (130, 129, 256)],
    "tile_64x64": [(64, 4096, 4096), (17, 8, 16), (33, 1000, 272)],
    "tile_64x128": [(256, 4096, 4096), (128, 14336, 4096)],
    "tile_128x128": [(512, 4096, 4096), (500, 4104, 4000)],
    "tile_128x256": [(4096, 4096, 1024), (4001, 4088, 1040)],
    "stream_128x128": [(256, 14336, 4096), (250, 14344, 4112)],
}
SHAPES = [(name, shape) for name, shapes in BRANCHES.items() for shape in shapes]


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The exact sums, by float64 products on the device: the CPU would take minutes."""
    return (a.double() @ b.double().t()).to(torch.int32)


def test_the_hopper_kernels_are_built() -> None:
    _host = pytest.importorskip("pykernels._host")
    assert _library.has_native("int8_matmul", "cuda"), _library._native["cuda"].reason
    assert _host.build_info()["hopper"].startswith("yes"), _host.build_info()["hopper"]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_sums_are_exact_on_every_branch(name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    if sms == 132:
        assert heuristics.choose(m, n, k, sms, 4).name == name
    a, b = gpu(codes(m, k), codes(n, k))
    want = product(a, b)
    for _ in range(3):  # stream-K adds in another order each time
        assert torch.equal(F.int8_matmul(a, b, out_dtype=torch.int32), want)
    scaled = F.int8_matmul(a, b, out_dtype=torch.bfloat16)
    assert torch.equal(scaled, want.float().bfloat16())


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(64, 136, 320), (256, 4096, 512), (512, 4096, 512), (4096, 4096, 256)], ids=str)
def test_epilogue(shape: tuple[int, int, int], activation: str | None, out_dtype: torch.dtype) -> None:
    m, n, k = shape
    a, b = codes(m, k), codes(n, k)
    a_scale, b_scale = torch.rand(m) * 0.02, torch.rand(n) * 0.01
    zero_point = torch.randint(-128, 128, (m,), dtype=torch.int32)
    bias, residual = torch.randn(n).half(), torch.randn(m, n).to(out_dtype)
    a, b, a_scale, b_scale, zero_point, bias, residual = gpu(a, b, a_scale, b_scale, zero_point, bias, residual)
    sums = product(a, b).double() - zero_point.double()[:, None] * b.double().sum(1)
    v = sums * a_scale.double()[:, None] * b_scale.double() + bias.double()
    f = torch.nn.functional
    act = {None: lambda t: t, "relu": f.relu, "gelu": f.gelu, "silu": f.silu}
    want = act.get(activation, lambda t: f.gelu(t, approximate="tanh"))(v) + residual.double()
    size = v.abs() + bias.double().abs() + residual.double().abs()
    got = F.int8_matmul(
        a, b, a_scale, b_scale, bias=bias, residual=residual, activation=activation, a_zero_point=zero_point,
        out_dtype=out_dtype,
    )  # fmt: skip
    assert_within_rounding(got, want.cpu(), size.cpu(), 8)


@pytest.mark.parametrize("case", ["residual of another width", "a off 16 bytes", "n off 16 bytes"])
def test_what_tma_cannot_address_is_served_too(case: str) -> None:
    m, n, k = 256, 4090 if case == "n off 16 bytes" else 4096, 512
    a, b = gpu(codes(m, k + 16), codes(n, k))
    a = a[:, 1 : k + 1] if case == "a off 16 bytes" else a[:, :k]
    residual = torch.randn(m, n, device="cuda") if case == "residual of another width" else None
    got = F.int8_matmul(a, b, residual=residual, out_dtype=torch.bfloat16)
    want = product(a, b).float() + (0 if residual is None else residual)
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("name", [name for name in BRANCHES if name not in ("small_m", "mma_sync")])
def test_small_grid(name: str) -> None:
    """What the sanitizer runs: the branch's own shape, a step of K or, to be cut, the least."""
    m, n, _ = BRANCHES[name][0]
    k = 2048 if name.startswith("stream") else 128
    a, b = gpu(codes(m, k), codes(n, k))
    assert torch.equal(F.int8_matmul(a, b, out_dtype=torch.int32), product(a, b))


def test_captured_in_a_graph() -> None:
    """Also stream-K, whose counters are cleared by a node of the graph."""
    for m, n, k in (BRANCHES["tile_128x128"][0], BRANCHES["stream_128x128"][0]):
        a, b = gpu(codes(m, k), codes(n, k))
        F.int8_matmul(a, b, out_dtype=torch.int32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = F.int8_matmul(a, b, out_dtype=torch.int32)
        a.copy_(codes(m, k))
        for _ in range(2):
            out.zero_()
            graph.replay()
            assert torch.equal(out, product(a, b))


def test_the_reference_says_the_same() -> None:
    a, b = codes(70, 272), codes(136, 272)
    assert torch.equal(
        F.int8_matmul(*gpu(a, b), out_dtype=torch.int32).cpu(), int8_matmul.reference(a, b, out_dtype=torch.int32)
    )
