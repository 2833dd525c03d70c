"""The gradient of int8_grouped_linear on every backend, against float64, and nn.Int8GroupedLinear, which is made of it.

Groups as in tests/test_int8_grouped.py: experts without rows, with one, very unequal; rows beyond the counts; no rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pykernels.functional as F
from pykernels.bench.memory import peak_bytes, saved_bytes
from pykernels.nn import Int8GroupedLinear, Int8Linear
from pykernels.ops import int8_grouped_linear_backward as op
from tests.matrix import BACKENDS, DEVICE, FLOATS, assert_within_roundings, use
from tests.test_int8_grouped import ACTIVATIONS, GROUPS, LARGE, codes, each_expert, tensor

# AVX2 and portable differ in what is recomputed for an activation alone: the products here are PyTorch's.
PLACES = [b for b in BACKENDS if b not in ("reference", "native:portable")]
NO_ROWS = ([0, 0], 0, 6, 9)
CASES = [
    (backend, group)
    for backend in PLACES
    for group in [NO_ROWS, *GROUPS, *(LARGE[:2] if backend != "triton" else [([17, 0, 33], 2, 70, 129)])]
]


def experts(group: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales over several binades, so that one of the wrong expert shows, and the dequantised weights."""
    counts, _, n, k = group
    weight = codes(len(counts), n, k)
    scale = torch.exp2(torch.randn(len(counts), n, device=DEVICE) * 2) / 128
    return weight, scale, weight.double() * scale.double()[..., None]


def of_each(counts: list[int], rows: int, columns: int, call) -> torch.Tensor:
    return each_expert(call, counts, rows, columns, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("backend", "group"), CASES, ids=str)
def test_against_float64(backend: str, group: tuple, dtype: torch.dtype) -> None:
    counts, beyond, n, k = group
    weight, scale, floats = experts(group)
    rows = sum(counts) + beyond
    x = torch.randn(rows, k, device=DEVICE).to(dtype).requires_grad_()
    bias = torch.randn(len(counts), n, device=DEVICE).requires_grad_()
    grad = torch.randn(rows, n, device=DEVICE).to(dtype)
    grad[sum(counts) :] = float("nan")  # of rows that no expert counts: it belongs to nobody
    with use(backend):
        y = F.int8_grouped_linear(x, (weight, scale), tensor(counts), bias)
        got = torch.autograd.grad(y, (x, bias), grad)
    truth = of_each(counts, rows, k, lambda e, r: grad[r].double() @ floats[e])
    size = of_each(counts, rows, k, lambda e, r: grad[r].double().abs() @ floats[e].abs())
    # Float32 sums of n terms; a kernel may cut what becomes 16 bits anyway to two bfloat16, 2^-16 of it at the most.
    cut = backend == "triton" and dtype != torch.float32
    assert got[0].dtype == dtype
    assert_within_roundings(got[0], truth, 4 + n / 32 + 128 * cut, size)
    assert not got[0][sum(counts) :].any()
    sums = of_each(counts, rows, n, lambda e, r: grad[r].double())[: sum(counts)]
    expert = torch.arange(len(counts), device=DEVICE).repeat_interleave(tensor(counts))
    zero = torch.zeros(len(counts), n, dtype=torch.float64, device=DEVICE)
    bias_truth = zero.index_add(0, expert, sums)
    assert_within_roundings(got[1], bias_truth, 4, zero.index_add(0, expert, sums.abs()))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("backend", PLACES)
def test_as_int8_linear_of_each_expert(backend: str, activation: str | None) -> None:
    """With an activation too, whose gradient is taken at the recomputed sums. Bit for bit where both are PyTorch's, but
    for its functions of several terms, which give the ends of a tensor other last bits."""
    group = ([5, 0, 1, 9], 2, 21, 40)
    counts, beyond, n, k = group
    weight, scale, _ = experts(group)
    x = torch.randn(15 + beyond, k, device=DEVICE, requires_grad=True)
    bias = torch.randn(4, n, device=DEVICE)
    grad = torch.randn(15 + beyond, n, device=DEVICE)

    def one(e: int, r: slice) -> torch.Tensor:
        rows = x.detach()[r].requires_grad_()
        y = F.int8_linear(rows, (weight[e], scale[e]), bias[e], activation=activation)
        return torch.autograd.grad(y, rows, grad[r])[0]

    with use(backend):
        y = F.int8_grouped_linear(x, (weight, scale), tensor(counts), bias, activation=activation)
        (got,) = torch.autograd.grad(y, x, grad)
        want = each_expert(one, counts, len(x), k, torch.float32)
    if backend == "triton" or DEVICE == "cuda" or activation not in (None, "relu"):
        assert_within_roundings(got, want, 8, want.abs().max().expand_as(want).double())
    else:
        assert torch.equal(got, want)


def test_every_triton_configuration() -> None:
    from pykernels.kernels import _tuning
    from pykernels.kernels import int8_grouped_linear_backward as module

    for config in [c for configs in module.CONFIGS.values() for c in configs] + [module.UNALIGNED]:
        m, n, k = config["BLOCK_M"], 2 * config["BLOCK_N"], config["BLOCK_K"] + 16
        for columns in (n, n + 3):  # without a mask along N, and with one
            group = ([0, m + 1, 3], 2, columns, k)
            weight, scale, floats = experts(group)
            grad = torch.randn(m + 6, columns, device=DEVICE)
            with use("triton"), _tuning.force_config(config):
                got = torch.ops.pykernels.int8_grouped_linear_backward(grad, weight, scale, tensor(group[0]))
            truth = of_each(group[0], m + 6, k, lambda e, r, f=floats, g=grad: g[r].double() @ f[e])
            size = of_each(group[0], m + 6, k, lambda e, r, f=floats, g=grad: g[r].double().abs() @ f[e].abs())
            assert_within_roundings(got, truth, 4, size)


@pytest.mark.parametrize("backend", PLACES)
def test_operands_may_be_strided(backend: str) -> None:
    weight, scale = codes(70, 3, 21, 5)[:33, 0].permute(2, 1, 0), torch.rand(21, 5, device=DEVICE).t()
    counts = tensor([3] * 5).repeat_interleave(2)[::2]
    wide, floats = torch.randn(21, 63, device=DEVICE), weight.double() * scale.double()[..., None]
    with use(backend):
        for grad in (wide[:17, 5:26], wide[:17, ::3], wide[:1, :21].expand(17, 21), wide.t()[:21, :17].t()):
            got = torch.ops.pykernels.int8_grouped_linear_backward(grad, weight, scale, counts)
            truth = of_each([3] * 5, 17, 33, lambda e, r, g=grad: g[r].double() @ floats[e])
            size = of_each([3] * 5, 17, 33, lambda e, r, g=grad: g[r].double().abs() @ floats[e].abs())
            assert_within_roundings(got, truth, 4, size)
            sums = torch.ops.pykernels.grouped_sum(grad, counts)
            torch.testing.assert_close(sums, grad[:15].reshape(5, 3, 21).sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["native:portable", "triton"])
def test_counts_that_cannot_be(backend: str) -> None:
    """A CPU refuses them; a kernel that nobody waits for takes a negative one as 0 and ends groups with the rows."""
    counts, grad = tensor([-(2**63), 4, 2**63 - 1, 5]), torch.randn(10, 6, device=DEVICE)
    weight, scale, floats = experts(([0] * 4, 0, 6, 8))
    with use(backend):
        if backend != "triton" and DEVICE == "cpu":
            with pytest.raises(RuntimeError, match="int8_grouped_linear_backward: expected counts to be 0 or more"):
                torch.ops.pykernels.int8_grouped_linear_backward(grad, weight, scale, counts)
            with pytest.raises(RuntimeError, match="grouped_sum: expected counts to be 0 or more"):
                torch.ops.pykernels.grouped_sum(grad, counts)
            return
        got = torch.ops.pykernels.int8_grouped_linear_backward(grad, weight, scale, counts)
        sums = torch.ops.pykernels.grouped_sum(grad, counts)
    first, second = grad[:4].double(), grad[4:].double()
    truth = torch.cat([first @ floats[1], second @ floats[2]])
    assert_within_roundings(got, truth, 4, torch.cat([first.abs() @ floats[1].abs(), second.abs() @ floats[2].abs()]))
    torch.testing.assert_close(sums[1:3].double(), torch.stack([first.sum(0), second.sum(0)]), rtol=1e-6, atol=1e-6)
    assert not sums[[0, 3]].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grad": torch.ones(6, 5).double()}, "expected grad to be float32, bfloat16 or float16, got float64"),
        ({"grad": torch.ones(6, 4)}, r"expected weight to have shape \[E, 4, K\], with the N of grad, got \[2, 5, 8\]"),
        ({"weight": torch.ones(2, 5, 8)}, "expected weight to be int8"),
        ({"weight_scale": torch.ones(2, 8)}, r"expected weight_scale to have shape \[2, 5\], got \[2, 8\]"),
        ({"counts": torch.ones(3).long()}, r"expected counts to have shape \[2\], one element for each expert"),
        ({"counts": torch.ones(2)}, "expected counts to be int32 or int64, got float32"),
        ({"out_dtype": torch.int8}, "expected out_dtype to be float32, bfloat16 or float16"),
    ],
)
def test_refusals(change: dict, said: str) -> None:
    given = {"grad": torch.ones(6, 5), "weight": codes(2, 5, 8).cpu(), "weight_scale": torch.ones(2, 5)}
    given |= {"counts": torch.tensor([3, 2]), "out_dtype": None}
    for function in (op.reference, op.fake):
        with pytest.raises(RuntimeError, match=f"int8_grouped_linear_backward: {said}"):
            function(**given | change)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_saved_bytes(dtype: torch.dtype) -> None:
    """The weights and counts by reference; with an activation x [T, K] and the bias, also by reference."""
    x = torch.randn(11, 24, device=DEVICE).to(dtype).requires_grad_()
    qweight, bias = F.quantize_rowwise(torch.randn(3, 5, 24, device=DEVICE)), torch.randn(3, 5, device=DEVICE)
    for counts in (tensor([4, 0, 7]), tensor([4, 0, 7], torch.int32)):

        def saved(parameters: tuple, activation: str | None, c=counts) -> int:
            return saved_bytes(lambda: F.int8_grouped_linear(x, qweight, c, bias, activation=activation), parameters)

        size = 3 * counts.itemsize
        assert saved((), None) == 3 * 5 * 24 + 4 * 3 * 5 + size
        assert saved(qweight, None) == size and saved((*qweight, counts), None) == 0
        assert saved(qweight, "silu") == size + 11 * 24 * x.itemsize + 4 * 3 * 5
        assert saved((*qweight, counts, x, bias), "silu") == 0


def test_no_float_copy_of_all_experts() -> None:
    """Beside the result, backward holds two float slices of one expert's weight; all sixteen would be 4 MiB."""
    group = ([3] * 16, 0, 256, 256)
    weight, scale, _ = experts(group)
    grad, counts = torch.randn(48, 256, device=DEVICE), tensor(group[0])
    call = torch.ops.pykernels.int8_grouped_linear_backward
    peak = peak_bytes(lambda: call(grad, weight, scale, counts), torch.device(DEVICE))
    assert peak < 2 * 4 * 256 * 256 + 8 * grad.nbytes < 4 * weight.numel()


def test_compiles_into_one_graph_for_any_counts() -> None:
    torch.compiler.reset()
    qweight, bias = F.quantize_rowwise(torch.randn(3, 5, 16, device=DEVICE)), torch.randn(3, 5, device=DEVICE)

    def step(x: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return F.int8_grouped_linear(torch.relu(x), qweight, counts, b, activation="silu") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for counts in ([3, 3, 3], [9, 0, 0], [0, 2, 1]):
        found = []
        for call in (step, compiled):
            x = torch.linspace(-1, 1, 9 * 16, device=DEVICE).view(9, 16).requires_grad_()
            b = bias.clone().requires_grad_()
            y = call(x, b, tensor(counts))
            found.append((y, *torch.autograd.grad(y.sum(), (x, b))))
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_nothing_waits_for_the_counts() -> None:
    qweight = F.quantize_rowwise(torch.randn(3, 64, 96, device="cuda"))
    counts, bias = torch.tensor([5, 0, 20], device="cuda"), torch.randn(3, 64, device="cuda", requires_grad=True)
    x = torch.randn(30, 96, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for mode in ("default", "error"):  # the first call may compile and tune
        torch.cuda.set_sync_debug_mode(mode)
        try:
            F.int8_grouped_linear(x, qweight, counts, bias, activation="silu").sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestLayer:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_is_an_int8_linear_for_each_expert(self, bias: bool, dtype: torch.dtype) -> None:
        linears = [nn.Linear(24, 10, bias=bias, dtype=dtype, device=DEVICE) for _ in range(4)]
        layer = Int8GroupedLinear.from_float(linears)
        counts, x = [3, 0, 1, 5], torch.randn(11, 24, device=DEVICE).to(dtype)
        each = [Int8Linear.from_float(linear) for linear in linears]
        assert torch.equal(layer.weight, torch.stack([one.weight for one in each]))
        got = layer(input=x, counts=tensor(counts))
        assert got.dtype == dtype and list(layer.parameters()) == []
        assert torch.equal(got, each_expert(lambda e, r: each[e](x[r]), counts, 11, 10, dtype))
        stacked = torch.stack([linear.weight.detach() for linear in linears])
        biases = torch.stack([linear.bias.detach() for linear in linears]) if bias else None
        again = Int8GroupedLinear.from_float(stacked, biases)
        assert again.state_dict().keys() == layer.state_dict().keys()
        assert all(torch.equal(value, layer.state_dict()[name]) for name, value in again.state_dict().items())
        assert repr(layer) == f"Int8GroupedLinear(num_experts=4, in_features=24, out_features=10, bias={bias})"
        assert not Int8GroupedLinear.from_float(nn.ModuleList(linears).eval()).training

    def test_to_float_is_the_dequantised_layers(self) -> None:
        linears = [nn.Linear(24, 10, device=DEVICE) for _ in range(3)]
        layer = Int8GroupedLinear.from_float(linears)
        restored = layer.to_float()
        for expert, (linear, one) in enumerate(zip(linears, restored, strict=True)):
            step = linear.weight.abs().amax(1, keepdim=True) / 127
            assert type(one) is nn.Linear and one.weight.requires_grad
            assert ((one.weight - linear.weight).abs() <= 0.5001 * step).all()
            assert torch.equal(one.weight, layer.dequantized_weight()[expert])
            assert torch.equal(one.bias, linear.bias) and one.bias.data_ptr() != layer.bias[expert].data_ptr()
        assert torch.equal(Int8GroupedLinear.from_float(restored).weight, layer.weight)
        assert layer.to_float(torch.bfloat16)[0].weight.dtype == torch.bfloat16

    def test_adapters_beside_frozen_experts_learn(self) -> None:
        """What is before the experts learns through them; the experts stay as they are."""
        torch.manual_seed(0)
        before = nn.Linear(12, 12, device=DEVICE)
        layer = Int8GroupedLinear.from_float([nn.Linear(12, 3, device=DEVICE) for _ in range(4)])
        frozen = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.bias.requires_grad_()
        x, target = torch.randn(64, 12, device=DEVICE), torch.randn(64, 3, device=DEVICE) * 0.3
        counts = tensor([10, 0, 50, 4])
        optimizer = torch.optim.Adam([*before.parameters(), layer.bias], lr=0.03)
        losses = []
        for _ in range(80):
            loss = nn.functional.mse_loss(layer(before(x), counts), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0]
        assert not torch.equal(layer.bias[0], frozen["bias"][0]) and torch.equal(layer.bias[1], frozen["bias"][1])
        assert torch.equal(layer.weight, frozen["weight"]) and torch.equal(layer.scale, frozen["scale"])

    def test_compiles_into_one_graph(self) -> None:
        torch.compiler.reset()
        layer = Int8GroupedLinear.from_float(torch.randn(3, 10, 24, device=DEVICE), torch.randn(3, 10, device=DEVICE))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for counts in ([2, 0, 4], [6, 0, 0]):
            x = torch.randn(7, 24, device=DEVICE, requires_grad=True)
            got, want = (call(x, tensor(counts)) for call in (compiled, layer))
            assert torch.equal(got, want)
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
            assert torch.equal(*grads)

    @pytest.mark.parametrize(
        ("experts", "bias", "error", "words"),
        [
            ([], None, ValueError, "experts: got none, accepts 1 or more"),
            (3, None, TypeError, "experts: got a int, accepts linear layers or a tensor"),
            ([nn.Linear(4, 3), nn.Conv1d(1, 1, 1)], None, TypeError, r"experts\[1\]: got a Conv1d, accepts torch"),
            (
                [nn.Linear(4, 3), nn.Linear(4, 2)],
                None,
                ValueError,
                r"experts\[1\]: got .*\[2, 4\].*, accepts .*\[3, 4\]",
            ),
            ([nn.Linear(4, 3), nn.Linear(4, 3, bias=False)], None, ValueError, r"experts\[1\]: .*without a bias"),
            ([nn.Linear(4, 3)], torch.ones(1, 3), ValueError, "bias: got a tensor, accepts None"),
            (torch.ones(3, 4), None, ValueError, r"experts: got torch.float32 \[3, 4\], accepts \[num_experts"),
            (torch.ones(0, 3, 4), None, ValueError, "experts: got"),
            (torch.ones(2, 3, 4).double(), None, TypeError, r"experts\[0\]: got torch.float64"),
            (torch.full((2, 3, 4), float("nan")), None, ValueError, r"experts\[0\]: got NaN"),
            (torch.ones(2, 3, 4), torch.ones(3), ValueError, r"bias: got torch.float32 \[3\], accepts .* \[2, 3\]"),
            (torch.ones(2, 3, 4), torch.full((2, 3), float("inf")), ValueError, "bias: got NaN or infinite"),
        ],
    )
    def test_refusals(self, experts, bias, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            Int8GroupedLinear.from_float(experts, bias)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    weight = torch.randint(-127, 128, (2, 8, 16), dtype=torch.int8), torch.rand(2, 8)
    y = F.int8_grouped_linear(x, weight, torch.tensor([1, 3]))
    grad = torch.randn_like(y, requires_grad=True)
    (grad_x,) = torch.autograd.grad(y, x, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="int8_grouped_linear"):
        grad_x.sum().backward()
