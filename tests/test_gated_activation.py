"""swiglu, geglu, reglu, relu2: numbers against float64, gradients, layouts, what is saved, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as tf

import pykernels
import pykernels.functional as F
from pykernels import nn
from pykernels.bench.memory import saved_bytes
from tests.matrix import BACKENDS, DEVICE, EPS, FLOATS, use

OTHERS = [backend for backend in BACKENDS if backend != "reference"]
NATIVE = [backend for backend in BACKENDS if backend.startswith("native")]


def _geglu_tanh(gate, up=None, **options):
    return F.geglu(gate, up, approximate="tanh", **options)


# name: (ours, plain PyTorch's activation)
GATED = {
    "swiglu": (F.swiglu, tf.silu),
    "geglu": (F.geglu, tf.gelu),
    "geglu_tanh": (_geglu_tanh, lambda x: tf.gelu(x, approximate="tanh")),
    "reglu": (F.reglu, torch.relu),
}
# Vectors are taken in twos of 4, 8 or 16 elements, Triton's tiles are 1024 wide: one element, a prime, one more than a
# power of two; one row and none.
SHAPES = [(1, 1), (3, 17), (1, 4097), (2, 3, 64), (0, 8), (5, 0)]


def plain(name: str):
    """The formula in plain PyTorch."""
    if name == "relu2":
        return lambda x, _: torch.relu(x).square()
    return lambda gate, up: GATED[name][1](gate) * up


def ours(name: str):
    """The same signature for ours; relu2 leaves the second argument alone."""
    return (lambda x, _: F.relu2(x)) if name == "relu2" else GATED[name][0]


def pooled(tensor):
    """Largest absolute value, and root mean square."""
    return torch.stack((tensor.abs().max(), tensor.square().mean().sqrt()))


def run(function, gate, up, grad):
    """(result, gradient of gate, gradient of up or None)."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    out = function(gate, up)
    out.backward(grad)
    return out.detach(), gate.grad, up.grad


def assert_no_worse(got, peer, truth, what: str) -> None:
    """Largest and root mean square error at most twice plain PyTorch's; where that is exact, half an ulp."""
    if truth is None:
        assert got is None, what
        return
    assert got.dtype == peer.dtype and got.shape == truth.shape and got.is_contiguous(), what
    error, other = pooled(got.double() - truth), pooled(peer.double() - truth)
    half_ulp = EPS[got.dtype] / 2 * pooled(truth)
    assert bool((error <= torch.where(other > 0, 2 * other, half_ulp)).all()), (what, error, other)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*GATED, "relu2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_pytorch_against_float64(backend: str, name: str, dtype: torch.dtype) -> None:
    gate, up, grad = ((2 * torch.randn(17, 301)).to(dtype).to(DEVICE) for _ in range(3))
    truth = run(plain(name), gate.double(), up.double(), grad.double())
    peer = run(plain(name), gate, up, grad)
    with use(backend):
        got = run(ours(name), gate, up, grad)
    for label, *tensors in zip(("result", "gate", "up"), got, peer, truth, strict=True):
        assert_no_worse(*tensors, f"{name} {label}")


@pytest.mark.parametrize("name", [*GATED, "relu2"])
@pytest.mark.parametrize("backend", OTHERS)
def test_every_shape_gives_the_bits_of_one_long_row(backend: str, name: str) -> None:
    """So that what is measured on one shape holds for the ends of rows of every other."""
    for dtype in FLOATS:
        long = [torch.randn(1, 8200).to(dtype).to(DEVICE) for _ in range(3)]
        with use(backend):
            expected = run(ours(name), *long)
            for shape in SHAPES:
                count = math.prod(shape)
                got = run(ours(name), *(t[0, :count].view(shape) for t in long))
                for mine, other in zip(got, expected, strict=True):
                    assert mine is other is None or torch.equal(mine, other[0, :count].view(shape)), (dtype, shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tails(backend: str, name: str, dtype: torch.dtype) -> None:
    """Each sign apart, so that the error of a large value does not hide that of a small one."""
    far = torch.tensor([30, 88, 100, 1e3, 6e4 if dtype == torch.float16 else 3e38])
    for sign in (-1, 1):
        gate = (sign * torch.linspace(3, 30, 1000))[None].to(dtype).to(DEVICE)
        one = torch.ones_like(gate)
        truth = run(plain(name), gate.double(), one.double(), one.double())
        peer = run(plain(name), gate, one, one)
        with use(backend):
            got = run(ours(name), gate, one, one)
            limit = run(ours(name), *(t[None].to(dtype).to(DEVICE) for t in (sign * far, far / far, far / far)))
        for label, *tensors in zip(("result", "gate", "up"), got, peer, truth, strict=True):
            assert_no_worse(*tensors, f"{name} {sign} {label}")
        value = far.to(dtype).to(DEVICE) if sign > 0 else torch.zeros(5, dtype=dtype, device=DEVICE)
        slope = torch.full_like(value, float(sign > 0))
        for mine, expected in zip(limit, (value, slope, value), strict=True):
            torch.testing.assert_close(mine[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", *NATIVE])
def test_gelu_is_accurate_relative_to_its_tiny_values(backend: str) -> None:
    """PyTorch's 1 + erf is 0 below -5.6. Ours keeps its digits down to where exp(-x^2 / 2) leaves float32."""
    x = torch.linspace(-13, 13, 40001)
    wide = x.double()
    truth = wide * 0.5 * torch.special.erfc(-wide * math.sqrt(0.5))
    with use(backend):
        got = F.geglu(x, torch.ones_like(x)).double()
    relative = ((got - truth).abs() / truth.abs().clamp(min=1e-37)) / EPS[torch.float32]
    # The reference is torch's float32 erfc, whose argument is rounded: x^2 ulps of it.
    assert relative.max() <= (6 if backend != "reference" else 400), relative.max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend: str) -> None:
    gate = torch.tensor([[math.nan, math.inf, 1.0]], device=DEVICE)
    with use(backend):
        for name in [*GATED, "relu2"]:
            out, grad_gate, _ = run(ours(name), gate, torch.ones_like(gate), torch.ones_like(gate))
            assert out.isnan().tolist() == [[True, False, False]] and out[0, 1] == math.inf, name
            assert grad_gate.isnan().tolist() == [[True, False, False]], name
        for dtype in (torch.bfloat16, torch.float16):  # every payload of NaN, through the rounding to 16 bits
            one = torch.ones(1, 1, dtype=dtype)
            first = 0x7F81 if dtype == torch.bfloat16 else 0x7C01
            every = torch.arange(first, 0x8000, dtype=torch.int32).to(torch.int16).view(dtype)[None].to(DEVICE)
            for values in (every, -every):
                assert bool(F.reglu(values, one.to(DEVICE).expand_as(values)).isnan().all())
                assert bool(F.swiglu(one.to(DEVICE).expand_as(values), values).isnan().all())


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("backend", OTHERS)
def test_layouts_give_the_same_bits(backend: str, name: str) -> None:
    """Packed, halves of a product, rows with a stride, transposed, and expanded gradients: what contiguous gives."""
    function = GATED[name][0]
    packed, grad = torch.randn(2, 5, 74, device=DEVICE), torch.randn(2, 5, 37, device=DEVICE)
    gate, up = packed[..., :37], packed[..., 37:]
    with use(backend):
        out, grad_gate, grad_up = run(function, gate.contiguous(), up.contiguous(), grad)
        both = packed.clone().requires_grad_()
        result = function(both)
        result.backward(grad)
        assert torch.equal(result, out)
        assert torch.equal(both.grad, torch.cat((grad_gate, grad_up), -1))
        assert torch.equal(function(gate, up), out)
        turned = gate.transpose(0, 2).contiguous().transpose(0, 2)
        assert not turned.is_contiguous() and torch.equal(function(turned, up), out)
        one_row = torch.randn(37, device=DEVICE)
        number, column = torch.tensor(0.75, device=DEVICE), torch.randn(2, 5, 1, device=DEVICE)
        for expanded in (number.expand(2, 5, 37), one_row.expand(2, 5, 37), column.expand(2, 5, 37), grad.mT.mT):
            expected = run(function, gate, up, expanded.contiguous())
            for mine, other in zip(run(function, gate, up, expanded), expected, strict=True):
                assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", NATIVE)
def test_halves_of_a_product_are_not_copied(backend: str) -> None:
    """The peak of a call on slices, and of its backward under an expanded gradient, is that of its results."""
    from pykernels.bench.memory import peak_bytes

    packed = torch.randn(512, 2048)
    gate, up = packed[:, :1024], packed[:, 1024:]
    expanded = torch.tensor(1.0).expand(512, 1024)
    op = torch.ops.pykernels.gated_activation_backward
    with use(backend):
        assert peak_bytes(lambda: F.swiglu(gate, up), gate.device) == 4 * 512 * 1024
        assert peak_bytes(lambda: op(expanded, gate, up, 4), gate.device) == 4 * (2 * 512 * 1024 + 1024)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*GATED, "relu2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantize_is_quantize_rowwise_of_the_result(backend: str, name: str, dtype: torch.dtype) -> None:
    for shape in [(3, 17), (2, 3, 64), (1, 9000), (0, 8), (5, 0)]:  # 9000: Triton's loop over a row
        packed = torch.randn((*shape[:-1], 2 * shape[-1])).to(dtype).to(DEVICE)
        if packed.numel() and packed.dim() == 2:
            packed[0, 3] = 0 if shape[-1] < 9000 else math.nan
        gate, up = packed.chunk(2, dim=-1)
        with use(backend):
            if name == "relu2":
                q, scale = F.relu2(packed, quantize=True)
                expected = F.quantize_rowwise(F.relu2(packed))
            else:
                function = GATED[name][0]
                q, scale = function(packed, quantize=True)
                expected = F.quantize_rowwise(function(gate, up))
                assert torch.equal(function(gate, up, quantize=True)[0], q)
        assert q.dtype == torch.int8 and torch.equal(q, expected[0])
        torch.testing.assert_close(scale, expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*GATED, "relu2"])
def test_gradcheck_once_and_twice(name: str) -> None:
    gate, up = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    function = ours(name)
    with pykernels.backend("reference"):
        for inputs in [(gate, up)] if name == "relu2" else [(gate, up), (gate, None)]:
            wanted = tuple(t for t in inputs if t is not None)
            call = (lambda g, u: function(g, u) + 0 * u) if len(wanted) == 2 else (lambda g: function(g, None))
            assert torch.autograd.gradcheck(call, wanted)
            assert torch.autograd.gradgradcheck(call, wanted)


def test_second_derivative_of_the_native_kernels() -> None:
    x = torch.randn(4, 10, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(F.swiglu(x).sum(), x, create_graph=True)
    (truth,) = torch.autograd.grad((tf.silu(wide[:, :5]) * wide[:, 5:]).sum(), wide, create_graph=True)
    first.square().sum().backward()
    truth.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_pre_activations_are_saved(dtype: torch.dtype) -> None:
    """2 * I * itemsize bytes a row, by reference: the caller's own tensors."""
    gate, up = (torch.randn(7, 33, dtype=dtype, requires_grad=True) for _ in range(2))
    packed = torch.randn(7, 66, dtype=dtype, requires_grad=True)
    for name, (function, _) in GATED.items():
        assert saved_bytes(lambda f=function: f(gate, up), ()) == 2 * 7 * 33 * dtype.itemsize, name
        assert saved_bytes(lambda f=function: f(packed), ()) == 2 * 7 * 33 * dtype.itemsize, name
        assert saved_bytes(lambda f=function: f(gate, up), (gate, up)) == 0, name
    assert saved_bytes(lambda: F.relu2(gate), ()) == 7 * 33 * dtype.itemsize


@pytest.mark.parametrize("backend", NATIVE)
def test_results_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    packed, grad = torch.randn(3, 70000), torch.randn(3, 35000)
    threads, found = torch.get_num_threads(), []
    try:
        with use(backend):
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                x = packed.clone().requires_grad_()
                out = F.geglu(x)
                out.backward(grad)
                found.append((out.detach(), x.grad, *F.geglu(packed, quantize=True)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_compiles_into_one_graph_with_its_backward() -> None:
    torch.compiler.reset()
    x = torch.randn(6, 40, requires_grad=True)
    compiled = torch.compile(lambda x: F.relu2(F.geglu(x, approximate="tanh")), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    got, x.grad = x.grad, None
    F.relu2(F.geglu(x, approximate="tanh")).sum().backward()
    assert torch.equal(got, x.grad)


def test_autocast_leaves_the_dtype_alone() -> None:
    """As PyTorch's own activations, which autocast does not cast."""
    x = torch.randn(4, 10)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in FLOATS:
            assert F.swiglu(x.to(dtype)).dtype == tf.silu(x.to(dtype)).dtype == dtype


def test_layers_call_the_functions() -> None:
    x = torch.randn(4, 10)
    gate, up = x.chunk(2, -1)
    assert torch.equal(nn.SwiGLU()(x), F.swiglu(gate, up)) and torch.equal(nn.SwiGLU()(gate, up), F.swiglu(x))
    assert torch.equal(nn.GEGLU("tanh")(x), F.geglu(x, approximate="tanh"))
    assert not torch.equal(nn.GEGLU()(x), nn.GEGLU("tanh")(x)) and "none" in repr(nn.GEGLU())
    assert torch.equal(nn.ReGLU()(gate, up), F.reglu(x)) and torch.equal(nn.ReLU2()(x), F.relu2(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_names_the_argument(backend: str) -> None:
    x = torch.randn(2, 6, device=DEVICE)
    op = torch.ops.pykernels
    with use(backend):
        for call, words in {
            lambda: F.swiglu(x.int()): "expected gate to be float32.* got int32",
            lambda: F.swiglu(x[:, :5]): r"even last dimension.*\[2, 5\]",
            lambda: F.swiglu(x, x.double()): "expected up to be float32, as gate, got float64",
            lambda: F.swiglu(x, x[:1]): r"expected up to have shape \[2, 6\], as gate, got \[1, 6\]",
            lambda: F.swiglu(x[0, 0]): "at least 1 dimension",
            lambda: op.gated_activation(x, None, 0): "activation to be 1 to 5, got 0",
            lambda: op.gated_activation(x, x, 5): "no up with relu2",
            lambda: op.gated_activation_backward(x, x, None, 4): r"grad to have shape \[2, 3\].* got \[2, 6\]",
            lambda: op.gated_activation_backward(x.half(), x, x, 4): "grad to be float32, got float16",
            lambda: F.swiglu(x.double(), quantize=True): "expected gate to be float32, bfloat16 or float16",
        }.items():
            with pytest.raises(RuntimeError, match=words):
                call()
        with pytest.raises(NotImplementedError, match=r"quantize=True has no gradient.*no_grad"):
            F.reglu(x.requires_grad_(), quantize=True)
    for call in (lambda: F.geglu(x, approximate="sigmoid"), lambda: nn.GEGLU(None)):
        with pytest.raises(ValueError, match="expected approximate to be one of 'none', 'tanh'"):
            call()
