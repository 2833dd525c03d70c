"""How operators get their gradients: lists of tensors, defaults, who needs what, and at what cost."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pykernels.ops import _autograd

SCHEMA = "(Tensor x, Tensor[] weights, float factor=2.0, Tensor? shift=None) -> (Tensor[], Tensor)"


def products(x: Tensor, weights: list[Tensor], factor: float = 2.0, shift: Tensor | None = None) -> Any:
    total = x.sum() if shift is None else x.sum() + shift
    return [factor * x * weight for weight in weights], total


class Seen:
    inputs: tuple[Any, ...]
    needs: tuple[Any, ...]
    needs_later: tuple[Any, ...]
    grads: tuple[Any, ...]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    Seen.inputs, Seen.needs = inputs, ctx.needs_input_grad
    x, weights, ctx.factor, _ = inputs
    ctx.save_for_backward(x, *weights)


def backward(ctx: Any, grads: list[Tensor], grad_total: Tensor) -> Any:
    Seen.grads, Seen.needs_later = (grads, grad_total), ctx.needs_input_grad
    x, *weights = ctx.saved_tensors
    to_x = grad_total.expand_as(x)
    for grad, weight in zip(grads, weights, strict=True):
        to_x = to_x + ctx.factor * grad * weight
    return to_x, [ctx.factor * grad * x for grad in grads]  # the trailing None are left out


@pytest.fixture(scope="module")
def op() -> Iterator[Any]:
    library = torch.library.Library("pykernels", "FRAGMENT")
    library.define("test_products" + SCHEMA)
    library.impl("test_products", products, "CompositeExplicitAutograd")
    _autograd.register("test_products", backward, setup_context)
    yield torch.ops.pykernels.test_products.default


@pytest.mark.parametrize("count", [0, 1, 3])
def test_gradients_of_lists(op: Any, count: int) -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(count)]

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        outs, total = op(x, list(weights), 3.0)
        assert isinstance(outs, list) and len(outs) == count
        return (*outs, total)

    assert torch.autograd.gradcheck(run, (x, *weights))


def test_inputs_have_their_defaults_and_each_its_need(op: Any) -> None:
    x, frozen, weight = torch.randn(2), torch.randn(2), torch.randn(2, requires_grad=True)
    (first, second), total = op(x, [frozen, weight])
    assert Seen.inputs[2:] == (2.0, None)
    assert Seen.needs == (False, [False, True], False, False)
    second.sum().backward()
    assert Seen.needs_later == Seen.needs
    torch.testing.assert_close(weight.grad, 2 * x)
    assert [grad.shape for grad in Seen.grads[0]] == [x.shape, x.shape]
    assert frozen.grad is None and first.grad_fn is not None and total.grad_fn is not None


def test_no_node_where_nobody_asks(op: Any) -> None:
    weight = torch.randn(2, requires_grad=True)
    (product,), total = op(torch.randn(2), [weight.detach()])
    assert product.grad_fn is None and total.grad_fn is None
    with torch.no_grad():
        (product,), _ = op(torch.randn(2), [weight])
    assert product.grad_fn is None


def test_compiles_whole(op: Any) -> None:
    @torch.library.register_fake("pykernels::test_products")
    def fake(x: Tensor, weights: list[Tensor], factor: float = 2.0, shift: Tensor | None = None) -> Any:
        return [torch.empty_like(x) for _ in weights], x.new_empty(())

    def run(x: Tensor, weight: Tensor) -> Tensor:
        (product,), total = op(x, [weight])
        return (product.square().sum() + total).sin()

    x, weight = (torch.randn(4, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(run(x, weight), (x, weight))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_refuses_arguments_that_are_given_by_name_only() -> None:
    library = torch.library.Library("pykernels", "FRAGMENT")
    library.define("test_keyword_only(Tensor x, *, float factor) -> Tensor")
    with pytest.raises(ValueError, match="keyword-only"):
        _autograd.register("test_keyword_only", backward)


@pytest.mark.parametrize("count", [1, 3])
def test_takes_fewer_python_calls_than_torch(count: int) -> None:
    """Of torch's own registration, counted and not timed: that is what this module is for."""
    library = torch.library.Library("pykernels", "FRAGMENT")
    for name in (f"test_ours_{count}", f"test_torchs_{count}"):
        library.define(name + SCHEMA)
        library.impl(name, products, "CompositeExplicitAutograd")
    _autograd.register(f"test_ours_{count}", backward, setup_context)
    torch.library.register_autograd(
        f"pykernels::test_torchs_{count}", backward, setup_context=setup_context, lib=library
    )
    x = torch.randn(4, requires_grad=True)
    calls: dict[str, int] = {}
    for name in (f"test_ours_{count}", f"test_torchs_{count}"):
        operator, seen = getattr(torch.ops.pykernels, name).default, [0]

        def count_call(frame: Any, event: str, _: Any, seen: list[int] = seen) -> None:
            seen[0] += event == "call"

        for profile in (None, count_call):  # the first time warms up
            sys.setprofile(profile)
            outs, total = operator(x, [x] * count)
            torch.autograd.backward([*outs, total], [torch.ones_like(x)] * count + [total])
            sys.setprofile(None)
        calls[name] = seen[0]
    ours, torchs = calls.values()
    assert ours <= torchs / 2, calls
