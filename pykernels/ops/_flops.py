"""What torch.utils.flop_counter counts for the operators that multiply matrices: the products they really make.

A product made again in backward counts again, and what a softmax, a norm or a quantisation does counts as nothing, as
with PyTorch's own operators. Attention counts as scaled_dot_product_attention does, causal or not, and positions that
linear_cross_entropy ignores count as the others: a formula sees shapes alone.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

from .int8_linear_outliers import MODES
from .linear_distillation import INPUT, WEIGHT

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]
Formula = Callable[..., int]
FORMULAS: dict[str, Formula] = {}  # by operator


def formula(function: Formula) -> Formula:
    """Enters the function as the formula of the operator it is named after."""
    FORMULAS[function.__name__] = function
    return function


def product(x: Shape, weight: Shape) -> int:
    """[..., K] times [N, K]."""
    return 2 * prod(x) * weight[0]


def linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return product(x, weight)


FORMULAS.update(int8_linear=linear, int8_weight_only_linear=linear, int8_training_linear=linear, int8_matmul=linear)
FORMULAS.update(int8_block_scaled_linear=linear, int8_block_scaled_matmul=linear)


def grouped(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Every row counts, whichever expert it belongs to and also where none counts it: a formula sees no values."""
    return product(x, weight[1:])


FORMULAS.update(int8_grouped_linear=grouped, int8_grouped_matmul=grouped)


@formula
def int8_grouped_linear_backward(grad: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(grad) * weight[2]


@formula
def int8_linear_outliers(
    x: Shape,
    weight: Shape,
    scale: Shape,
    bias: Shape | None = None,
    threshold: float = 6.0,
    mode: int = 1,
    columns: Shape | None = None,
    *_: Any,
    **__: Any,
) -> int:
    """A product in INT8 and one of the outliers: of their columns, or of rows with zeros everywhere else."""
    if mode == MODES["columns"]:
        assert columns is not None
        return product(x, weight) + product((*x[:-1], columns[0]), weight)
    return 2 * product(x, weight)


@formula
def int8_training_linear_backward(grad: Shape, weight: Shape | None, x: Shape | None, *rest: Any, **_: Any) -> int:
    x_scale = rest[0]
    to_x = 0 if weight is None else 2 * prod(grad) * weight[1]
    return to_x + (0 if x is None else 2 * prod(grad) * (x[1] if x_scale is None else x[0]))


@formula
def linear_cross_entropy(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return product(x, weight)


@formula
def linear_cross_entropy_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    needs_input, needs_weight, _needs_bias = rest[-3:]
    return product(x, weight) * (1 + needs_input + needs_weight)


@formula
def linear_cross_entropy_gradients(x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return linear_cross_entropy_backward((), x, weight, *rest)


@formula
def linear_distillation(x: Shape, weight: Shape, bias: Shape | None, *rest: Any, **_: Any) -> int:
    teacher, teacher_weight, _bias, teacher_logits = rest[:4]
    gradients = rest[-1]
    count = product(x, weight) * (1 + bool(gradients & INPUT) + bool(gradients & WEIGHT))
    return count if teacher_logits is not None else count + product(teacher, teacher_weight)


@formula
def linear_distillation_backward(grad: Shape, *arguments: Any, **_: Any) -> int:
    return linear_distillation(*arguments)


def linears_backward(grads: Sequence[Shape], weights: Sequence[Shape], wanted: Sequence[int], wants_y: bool) -> int:
    """_segment.linears_backward: the input's gradient through each weight, and the gradients of those wanted."""
    return sum(
        2 * prod(grad) * weight[1] * (wants_y + (place in wanted))
        for place, (grad, weight) in enumerate(zip(grads, weights, strict=True))
    )


@formula
def norm_linear(x: Shape, *rest: Any, **_: Any) -> int:
    return sum(product(x, weight) for weight in rest[3])


@formula
def norm_linear_backward(grads: Sequence[Shape], *rest: Any, **_: Any) -> int:
    weights, wanted = rest[7:9]
    return linears_backward(grads, weights, wanted, any(rest[-1]))


@formula
def glu_linear(gate: Shape, up: Shape | None, weight: Shape | None, *_: Any, **__: Any) -> int:
    if weight is None:
        return 0
    return product((*gate[:-1], weight[1]), weight)


@formula
def glu_linear_backward(grad: Shape, gate: Shape, up: Shape | None, weight: Shape | None, *rest: Any, **_: Any) -> int:
    _activation, wants_input, wants_weight = rest
    return 0 if weight is None else 2 * prod(grad) * weight[1] * (wants_input + wants_weight)


@formula
def norm_mlp(x: Shape, *rest: Any, **_: Any) -> int:
    gate, up, down = rest[3]
    return product(x, gate) + product(x, up) + product((*x[:-1], down[1]), down)


@formula
def norm_mlp_backward(grad: Shape, grad_y: Any, grad_h: Any, h: Shape, *rest: Any, **_: Any) -> int:
    weights, _biases, _biased, wanted, wanted_biases = rest[4:9]
    (gate, up, down), wants_h = weights, any(rest[-1])
    inner = (*h[:-1], gate[0])
    first = [place for place in wanted if place < 2]
    into = wants_h or bool(first) or any(place < 2 for place in wanted_biases)
    count = product(h, gate) + product(h, up)  # once more
    count += 2 * prod(grad) * down[1] * (into + (2 in wanted))
    return count + (linears_backward([inner, inner], [gate, up], first, wants_h) if into else 0)


def attention_shapes(q: Shape, k: Shape) -> tuple[Shape, Shape, Shape]:
    """Of q, k and v with the heads first, as PyTorch's counter takes them."""
    (batch, queries, heads, width), (_, keys, kv_heads, _) = q, k
    kv = (batch, kv_heads, keys, width)
    return (batch, heads, queries, width), kv, kv


@formula
def attention(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return sys.modules[COUNTER].sdpa_flop_count(*attention_shapes(q, k))


@formula
def attention_backward(grad: Shape, q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    shapes = attention_shapes(q, k)
    return sys.modules[COUNTER].sdpa_backward_flop_count(shapes[0], *shapes)


def heads_of(x: Shape, weights: Sequence[Shape], head_dim: int) -> list[Shape]:
    return [(*x[:2], weight[0] // head_dim, head_dim) for weight in weights[:2]]


@formula
def norm_attention(x: Shape, *rest: Any, **_: Any) -> int:
    weights, head_dim = rest[2], rest[11]
    return sum(product(x, weight) for weight in weights) + attention(*heads_of(x, weights, head_dim))


@formula
def norm_attention_backward(grad: Shape, x: Shape, *rest: Any, **_: Any) -> int:
    weights, wanted, head_dim = rest[6], rest[12], rest[17]
    flat = [(*x[:2], weight[0]) for weight in weights]
    count = sum(product(x, weight) for weight in weights)  # once more
    count += attention_backward((), *heads_of(x, weights, head_dim))
    return count + linears_backward(flat, weights, wanted, any(rest[-1]))


def register(counter: ModuleType) -> None:
    for name, function in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.pykernels, name))(function)


class _Finder(MetaPathFinder):
    """Registers the formulas when the counter is imported, whoever does so: it imports triton, which costs a second."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers the formulas, now or when the counter is imported. Called once, after every operator is defined."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
