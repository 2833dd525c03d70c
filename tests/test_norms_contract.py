"""What rms_norm and layer_norm promise beside their values: memory, gradients, compilers, refusals, and the layers."""

import pytest
import torch
from torch import Tensor, nn

import pykernels
import pykernels.functional as F
import pykernels.nn as pknn
from pykernels.bench.memory import saved_bytes
from tests.matrix import FLOATS

NORMS = {"rms_norm": F.rms_norm, "layer_norm": F.layer_norm}
STATISTICS = {"rms_norm": 1, "layer_norm": 2}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NORMS)
def test_saved_bytes(name: str, dtype: torch.dtype, residual: bool) -> None:
    """M*K*itemsize for h (x itself without a residual), and 4 a row for each statistic."""
    M, K = 7, 33
    x, r = (torch.randn(M, K).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(K, requires_grad=True) for _ in range(2))
    forward = lambda: NORMS[name](x, weight, bias, residual=r if residual else None, prenorm=residual)  # noqa: E731
    assert saved_bytes(forward, (weight, bias)) == M * K * dtype.itemsize + 4 * STATISTICS[name] * M
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()) or t, id):
        forward()
    assert (x.untyped_storage().data_ptr() in kept) == (not residual)
    with torch.no_grad():
        assert saved_bytes(forward, ()) == 0


@pytest.mark.parametrize("name", NORMS)
def test_gradcheck(name: str) -> None:
    x, r = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    norm = NORMS[name]
    with pykernels.backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, w, b, r: norm(x, w, b, residual=r, prenorm=True, weight_offset=0.5), (x, weight, bias, r)
        )
        assert torch.autograd.gradcheck(lambda x, r: norm(x, residual=r), (x, r))
        assert torch.autograd.gradcheck(norm, (x,))
    with pytest.raises(RuntimeError, match="x to be float32, bfloat16 or float16, got float64"):
        norm(x)


@pytest.mark.parametrize("name", NORMS)
def test_a_gradient_of_either_result_alone(name: str) -> None:
    x, r = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    weight = torch.randn(9, requires_grad=True)
    y, h = NORMS[name](x, weight, residual=r, prenorm=True)
    grad = torch.randn(4, 9)
    assert torch.equal(torch.autograd.grad(h, x, grad, retain_graph=True)[0], grad)
    (alone,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (again,) = torch.autograd.grad(y, r, grad, retain_graph=True)
    (both,) = torch.autograd.grad((y, h), x, (grad, grad))
    assert torch.equal(alone, again)
    torch.testing.assert_close(both, alone + grad)


@pytest.mark.parametrize("name", NORMS)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    x, grad = torch.randn(1300, 333).bfloat16(), torch.randn(1300, 333).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [
                x.clone().requires_grad_(),
                torch.ones(333, requires_grad=True),
                torch.zeros(333).requires_grad_(),
            ]
            y = NORMS[name](*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_compiles_whole_and_gives_the_same(name: str) -> None:
    """Forward and backward in one graph, sizes dynamic; the statistics keep float32 under autocast too."""

    def step(x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
        y, h = NORMS[name](torch.relu(x), weight, residual=r, prenorm=True)
        return y * 2 + h

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (4, 9):
        eager = [torch.randn(rows, 24).requires_grad_(), torch.randn(24, requires_grad=True), torch.randn(rows, 24)]
        other = [v.detach().clone().requires_grad_(v.requires_grad) for v in eager]
        expected, got = step(*eager), compiled(*other)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        expected.square().sum().backward()
        got.square().sum().backward()
        for a, b in zip(other[:2], eager[:2], strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_autocast_changes_nothing(name: str) -> None:
    x, weight, residual = torch.randn(5, 16).bfloat16(), torch.randn(16), torch.randn(5, 16)
    outside = NORMS[name](x, weight, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        inside = NORMS[name](x, weight, residual=residual)
        with pykernels.backend("reference"):
            reference = NORMS[name](x.float(), weight)
    assert torch.equal(inside, outside) and reference.dtype == torch.float32
    torch.testing.assert_close(reference, NORMS[name](x.float(), weight))


BAD = [
    ({"x": torch.ones(2, 3, dtype=torch.int32)}, RuntimeError, "x to be float32"),
    ({"x": torch.ones(())}, RuntimeError, "x to have at least 1 dimension, got 0"),
    ({"weight": torch.ones(4)}, RuntimeError, r"weight to have shape \[3\].*got \[4\]"),
    ({"weight": torch.ones(3, dtype=torch.int64)}, RuntimeError, "weight to be float32.*got int64"),
    ({"bias": torch.ones(1, 3)}, RuntimeError, r"bias to have shape \[3\].*got \[1, 3\]"),
    ({"residual": torch.ones(3)}, RuntimeError, r"residual to have the shape of x, \[2, 3\], got \[3\]"),
    ({"residual": torch.ones(2, 3, dtype=torch.int8)}, RuntimeError, "residual to be float32, got int8"),
    ({"eps": -1e-6}, ValueError, "eps to be 0 or more, got -1e-06"),
    ({"eps": float("nan")}, ValueError, "eps to be 0 or more, got nan"),
]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("name", NORMS)
def test_bad_input_is_named(name: str, change: dict, error: type[Exception], message: str, backend: str) -> None:
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(3), **change}
    for quantize in (False, True):
        with pytest.raises(error, match=f"{name}.*: expected {message}"), pykernels.backend(backend):
            NORMS[name](arguments.pop("x"), arguments.pop("weight"), **arguments, quantize=quantize)
        arguments = {"x": torch.ones(2, 3), "weight": torch.ones(3), **change}


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("name", NORMS)
def test_bad_input_of_backward_is_named(name: str, backend: str) -> None:
    op = getattr(torch.ops.pykernels, f"{name}_backward").default
    h, rows = torch.ones(2, 3), torch.ones(2)
    extra = (rows,) * (STATISTICS[name] - 1)
    with pykernels.backend(backend):
        with pytest.raises(RuntimeError, match=r"grad to have the shape of h, \[2, 3\], got \[3, 3\]"):
            op(torch.ones(3, 3), None, h, None, rows, *extra)
        with pytest.raises(RuntimeError, match="grad_h to be float32, got bfloat16"):
            op(h, h.bfloat16(), h, None, rows, *extra)
        with pytest.raises(RuntimeError, match=r"rstd to have shape \[2\], got \[3\]"):
            op(h, None, h, None, torch.ones(3), *extra)
        with pytest.raises(RuntimeError, match=r"weight to have shape \[3\].*got \[2\]"):
            op(h, None, h, torch.ones(2), rows, *extra)


@pytest.mark.parametrize("name", NORMS)
def test_what_has_no_gradient_says_so(name: str) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=rf"{name}: quantize=True has no gradient.*torch.no_grad"):
        NORMS[name](x, quantize=True)
    (first,) = torch.autograd.grad(NORMS[name](x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()
    op = getattr(torch.ops.pykernels, name).default
    with pytest.raises(RuntimeError, match="keep_h to be True"):
        op(x, None, None, torch.ones(3, 8), 1e-6, 0.0, False)


LAYERS = [
    (pknn.RMSNorm, nn.RMSNorm, {}),
    (pknn.RMSNorm, nn.RMSNorm, {"eps": 1e-4, "elementwise_affine": False}),
    (pknn.LayerNorm, nn.LayerNorm, {}),
    (pknn.LayerNorm, nn.LayerNorm, {"eps": 1e-3, "bias": False}),
    (pknn.LayerNorm, nn.LayerNorm, {"elementwise_affine": False}),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("ours", "theirs", "options"), LAYERS)
def test_layers_are_drop_ins(ours: type[nn.Module], theirs: type[nn.Module], options: dict, dtype: torch.dtype) -> None:
    layer, expected = ours(24, **options, dtype=dtype), theirs(24, **options, dtype=dtype)
    assert isinstance(layer, theirs) and layer.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), expected.parameters(), strict=True))
    for parameter in expected.parameters():
        nn.init.normal_(parameter)
    layer.load_state_dict(expected.state_dict())
    x = torch.randn(2, 3, 24).mul_(1e-2).to(dtype)  # small enough for eps to be seen
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(layer(x), expected(x), rtol=tolerance, atol=tolerance)


def test_layers_with_an_offset_begin_as_the_identity() -> None:
    x = torch.randn(4, 12)
    for layer in (pknn.RMSNorm(12, weight_offset=1.0), pknn.LayerNorm([12], weight_offset=1.0)):
        assert layer.weight.abs().max() == 0 and "weight_offset=1.0" in repr(layer)
        plain = type(layer)(12)
        torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("layer", [pknn.RMSNorm, pknn.LayerNorm])
def test_layers_refuse_more_than_the_last_dimension(layer: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"normalized_shape: got \[3, 4\], accepts one size"):
        layer((3, 4))
