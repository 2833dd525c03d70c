"""Gradients of the frozen-weight layers, autocast, and the whole compiler on one of them."""

import pytest
import torch

import pykernels.functional as F

N, K = 24, 40


def layer(name: str):
    """A function of (x, bias) and the float64 weight that its backward should use."""
    weight = torch.randn(N, K)
    q, scale = F.quantize_rowwise(weight)
    if name == "weight_only_groups":
        groups = torch.rand(N, 5) / 100
        return lambda x, b, act: F.int8_weight_only_linear(x, (q, groups), b, activation=act), q.double() * (
            groups.double().repeat_interleave(K // 5, 1)
        )
    dequantised = q.double() * scale.double()[:, None]
    if name == "weight_only":
        return lambda x, b, act: F.int8_weight_only_linear(x, (q, scale), b, activation=act), dequantised
    if name == "outliers":
        columns = torch.tensor([2, 30])
        kept = weight[:, columns]
        dequantised[:, columns] = kept.double()
        return lambda x, b, act: F.int8_linear_outliers(x, (q, scale), kept, columns=columns, bias=b), dequantised
    return lambda x, b, act: F.int8_linear(x, (q, scale), b, activation=act), dequantised


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("name", ["int8", "weight_only", "weight_only_groups", "outliers"])
def test_gradients_match_the_dequantised_layer(name: str, activation: str | None) -> None:
    """The straight-through gradient: that of the layer with the dequantised weight, at the layer's own output."""
    if name == "outliers" and activation:
        return
    call, weight = layer(name)
    x, bias = torch.randn(3, 5, K, requires_grad=True), torch.randn(N, requires_grad=True)
    grad = torch.randn(3, 5, N)
    call(x, bias, activation).backward(grad)
    pre = call(x, bias, None).detach().double().requires_grad_()
    functions = {
        None: lambda v: v * 1,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
    }
    functions[activation](pre).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), pre.grad @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad.double(), pre.grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "expected"), [(None, {torch.int8}), ("silu", {torch.int8, torch.float32})])
def test_saved_for_backward_is_by_reference(activation: str | None, expected: set[torch.dtype]) -> None:
    """Nothing new is kept: the weight and its scale, with an activation x and bias, all of them the caller's own."""
    q = F.quantize_rowwise(torch.randn(N, K))
    x, bias = torch.randn(7, K, requires_grad=True), torch.randn(N)
    own = {t.untyped_storage().data_ptr() for t in (*q, x, bias)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.int8_linear(x, q, bias, activation=activation)
    assert saved and {t.untyped_storage().data_ptr() for t in saved} <= own
    if activation is None:
        assert sum(t.numel() * t.element_size() for t in saved) == N * K + 4 * N


@pytest.mark.parametrize("name", ["int8", "weight_only", "outliers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    call, _ = layer(name)
    x = torch.randn(4, K, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = call(x, None, None)
    assert out.dtype == dtype
    assert torch.equal(out, call(x.to(dtype), None, None))
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_inductor_compiles_forward_and_backward_into_one_graph() -> None:
    """torch.compile with its default backend, dynamic sizes too: equal to eager, no graph break."""
    q = F.quantize_rowwise(torch.randn(N, K))

    def step(x: torch.Tensor) -> torch.Tensor:
        return F.int8_linear(torch.relu(x), q, activation="silu") * 2

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (4, 9):
        x = torch.randn(rows, K)
        eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        step(eager_x).sum().backward()
        out = compiled(compiled_x)
        out.sum().backward()
        torch.testing.assert_close(out, step(x))
        torch.testing.assert_close(compiled_x.grad, eager_x.grad)
