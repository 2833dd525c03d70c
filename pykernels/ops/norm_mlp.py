"""norm_mlp: a norm and a gated MLP as one node that keeps its input alone; gate and up are computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd
from . import _segment as segment
from . import _segment_call as call
from ._checks import check, names_argument
from ._segment import LAYER, NO_NORM, Norm

NAME = "norm_mlp"
BACKWARD = f"{NAME}_backward"
# weights: gate, up, down. biased names those that have a bias, in the order of biases.
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, Tensor[] biases, "
    "int[] biased, int norm, float eps, float weight_offset, int activation, ScalarType compute, bool give_normed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# wanted and wanted_biases name layers; wants: of h, norm_weight, norm_bias.
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, Tensor? grad_y, Tensor? grad_h, Tensor h, Tensor? rstd, Tensor? mean, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, Tensor[] biases, int[] biased, int[] wanted, "
    "int[] wanted_biases, int norm, float eps, float weight_offset, int activation, ScalarType compute, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor[], Tensor[])"
)
DOWN = 2
_ops = torch.ops.pykernels


def check_arguments(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    biased: Sequence[int],
    give_normed: bool,
) -> None:
    """As segment_call.check_segment, of gate and up; down [N, I] reads their I rows."""
    check(len(weights) == 3, NAME, f"expected 3 weights, gate, up and down, got {len(weights)}")
    gate, up, down = weights
    call.check_segment(NAME, x, residual, norm, [gate, up], biases)
    check(gate.shape == up.shape, NAME, f"expected up of the shape of gate, {list(gate.shape)}, got {list(up.shape)}")
    call.check_weight(NAME, "down", down, gate.shape[0], x)
    call.check_biases(NAME, weights, biases, biased)
    alone = norm.kind == NO_NORM
    check(not (alone and (give_normed or residual is not None)), NAME, "expected a norm with residual or give_normed")


def reference(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    activation: int,
    compute: torch.dtype,
    give_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    check_arguments(x, residual, before, weights, biases, biased, give_normed)
    normed = segment.apply_norm(before, x, residual)
    spread = segment.spread(biases, biased, 3)
    gate, up = segment.apply_linears(normed.y, weights[:DOWN], spread[:DOWN], compute)
    product = _ops.gated_activation.default(gate, up, activation)
    del gate, up
    return (
        segment.apply_linears(product, weights[DOWN:], spread[DOWN:], compute)[0],
        normed.y if give_normed else x.new_empty(0),
        x.new_empty(0) if residual is None else normed.h,
        x.new_empty(0) if normed.rstd is None else normed.rstd,
        x.new_empty(0) if normed.mean is None else normed.mean,
    )


def fake(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    activation: int,
    compute: torch.dtype,
    give_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    check_arguments(x, residual, before, weights, biases, biased, give_normed)
    return (
        x.new_empty(*x.shape[:-1], weights[DOWN].shape[0], dtype=compute),
        x.new_empty(x.shape if give_normed else (0,)),
        x.new_empty((0,) if residual is None else x.shape),
        *call.fake_statistics(norm, x),
    )


def backward_reference(
    grad: Tensor,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    rstd: Tensor | None,
    mean: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    wanted: list[int],
    wanted_biases: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    activation: int,
    compute: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    spread = segment.spread(biases, biased, 3)
    y = segment.normed_again(before, h)
    gate, up = segment.apply_linears(y, weights[:DOWN], spread[:DOWN], compute)
    first = [place for place in wanted if place != DOWN]
    into = any(wants) or bool(first) or any(place != DOWN for place in wanted_biases)
    to_gate, to_up, to_down = segment.gate_backward(grad, gate, up, weights[DOWN], activation, DOWN in wanted, into)
    del gate, up
    to_y: Tensor | None = None
    to_weights: list[Tensor] = []
    if to_gate is not None and to_up is not None:
        to_y, to_weights = segment.linears_backward(
            [to_gate, to_up], y, weights[:DOWN], first, grad_y, h.dtype, any(wants)
        )
    del y
    to_biases = segment.bias_gradients(
        [(to_gate, to_up, grad)[place] for place in wanted_biases], [spread[place] for place in wanted_biases]
    )
    return (
        *segment.norm_backward(before, to_y, grad_h, h, rstd, mean, wants),
        [*to_weights, *([] if to_down is None else [to_down])],
        to_biases,
    )


def backward_fake(
    grad: Tensor,
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor,
    rstd: Tensor | None,
    mean: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    wanted: list[int],
    wanted_biases: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    activation: int,
    compute: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    return (
        *call.fake_norm_gradients(norm, h, h.shape, h.dtype, norm_weight, norm_bias, wants),
        call.like_parameters(weights, wanted),
        call.like_parameters(biases, [biased.index(place) for place in wanted_biases]),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, norm_weight, norm_bias, weights, biases, ctx.biased, ctx.norm, *options, give_normed = inputs
    _, y, h, rstd, mean = output
    ctx.options = options  # eps, weight_offset, activation, compute
    ctx.mark_non_differentiable(rstd, mean, *([] if give_normed else [y]), *([h] if residual is None else []))
    ctx.set_materialize_grads(False)
    statistics = (None if ctx.norm == NO_NORM else rstd, mean if ctx.norm == LAYER else None)
    ctx.save_for_backward(x if residual is None else h, *statistics, norm_weight, norm_bias, *weights, *biases)


def backward(ctx: Any, grad: Tensor | None, grad_y: Tensor | None, grad_h: Tensor | None, *_: Any) -> Any:
    h, rstd, mean, norm_weight, norm_bias, *parameters = ctx.saved_tensors
    weights, biases = parameters[:3], parameters[3:]
    needs_x, needs_residual, *needs_norm, needs_weights, needs_biases = ctx.needs_input_grad[:6]
    wants = [needs_x or needs_residual, *needs_norm]
    if grad is None and grad_y is not None:  # the norm alone was used
        grad = h.new_zeros(*h.shape[:-1], weights[DOWN].shape[0], dtype=ctx.options[-1])
    to_h, to_norm_weight, to_norm_bias = grad_h, None, None
    to_weights: list[Tensor | None] = [None] * 3
    to_biases: list[Tensor | None] = [None] * len(biases)
    if grad is not None:
        wanted = [place for place in range(3) if needs_weights[place]]
        wanted_biases = [place for place, need in zip(ctx.biased, needs_biases, strict=True) if need]
        to_h, to_norm_weight, to_norm_bias, found, found_biases = _ops.norm_mlp_backward.default(
            grad,
            grad_y,
            grad_h,
            h,
            rstd,
            mean,
            norm_weight,
            norm_bias,
            weights,
            biases,
            ctx.biased,
            wanted,
            wanted_biases,
            ctx.norm,
            *ctx.options,
            wants,
        )
        to_weights = segment.spread(found, wanted, 3)
        to_biases = segment.spread(found_biases, [ctx.biased.index(place) for place in wanted_biases], len(biases))
    return (
        to_h if needs_x else None,
        to_h if needs_residual else None,
        to_norm_weight if needs_norm[0] else None,
        to_norm_bias if needs_norm[1] else None,
        to_weights,
        to_biases,
    )


_library.define(SCHEMA, reference, fake, composite=True)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, call.refuse_second_backward(NAME))


@names_argument
def norm_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    biases: Sequence[Tensor | None] = (None, None, None),
    *,
    activation: str = "silu",
    norm: str | None = "rms_norm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    prenorm: bool = False,
    normed: bool = False,
) -> Any:
    """A gated MLP behind a norm, as one node that computes gate and up again in backward.

        h = x + residual        n = norm(h)        y = (act(n @ gate.T) * (n @ up.T)) @ down.T, with biases where given

    x, residual: [..., K]; gate, up [I, K]; down [N, I] -> y [..., N], then n if normed, then h if prenorm, as
    norm_linear. biases: of gate, up and down. activation: "silu", "gelu", "gelu_tanh" or "relu".

    Numbers are those of norm_linear and glu_linear one after the other, bit for bit.

    Saved for backward, with M rows: h, M*K*itemsize bytes (x by reference without a residual), and rstd, 4*M (with
    layer_norm the mean, 4*M, too). norm_linear and glu_linear keep 2*M*I*itemsize more. The price is the products of
    gate and up, once more: 4*M*K*I operations, a fifth of the MLP's forward and backward.

    Errors: as norm_linear and glu_linear.
    """
    weights = [gate, up, down]
    kind = call.norm_code(NAME, norm)
    if kind == NO_NORM and (residual is not None or normed):
        raise ValueError(f"{NAME}: expected a norm where there is a residual or normed=True, got norm=None")
    if residual is not None and residual.dtype != x.dtype and residual.is_floating_point():
        residual = residual.to(x.dtype)
    given, biased = call.split_biases(NAME, biases, 3)
    out, y, h, *_ = _ops.norm_mlp.default(
        x,
        residual,
        norm_weight,
        norm_bias,
        weights,
        given,
        biased,
        kind,
        call.norm_eps(NAME, kind, eps),
        weight_offset,
        call.gate_code(NAME, activation),
        call.compute_dtype(NAME, x, weights),
        normed,
    )
    result = (out, *([y] if normed else []), *([x if residual is None else h] if prenorm else []))
    return result if len(result) > 1 else out
