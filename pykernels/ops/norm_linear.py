"""norm_linear: a norm and the linear layers that read it as one node, so that the normalised tensor is never saved."""

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

NAME = "norm_linear"
BACKWARD = f"{NAME}_backward"
# biased names the weights that have a bias, in the order of biases. group_size 0 keeps h as it is, else in int8.
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, Tensor[] biases, "
    "int[] biased, int norm, float eps, float weight_offset, ScalarType compute, bool give_normed, int group_size) "
    "-> (Tensor[], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# One gradient for each of weights; wanted: of which weights; wants: of h, norm_weight and norm_bias.
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor[] grads, Tensor? grad_y, Tensor? grad_h, Tensor? h, Tensor? rstd, Tensor? mean, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, int[] wanted, int norm, float eps, float weight_offset, "
    "ScalarType dtype, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor[])"
)
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
    """As call.check_segment; what the norm alone makes can only be asked for where there is one."""
    call.check_segment(NAME, x, residual, norm, weights, biases)
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
    compute: torch.dtype,
    give_normed: bool,
    group_size: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    check_arguments(x, residual, before, weights, biases, biased, give_normed)
    normed = segment.apply_norm(before, x, residual)
    outs = segment.apply_linears(normed.y, weights, segment.spread(biases, biased, len(weights)), compute)
    codes = scale = None
    if group_size:
        codes, scale = segment.compress(normed.h, group_size)
    empty = x.new_empty
    return (
        outs,
        normed.y if give_normed else empty(0),
        empty(0) if residual is None else normed.h,
        empty(0) if normed.rstd is None else normed.rstd,
        empty(0) if normed.mean is None else normed.mean,
        empty(0, dtype=torch.int8) if codes is None else codes,
        empty(0, dtype=torch.float32) if scale is None else scale,
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
    compute: torch.dtype,
    give_normed: bool,
    group_size: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    check_arguments(x, residual, before, weights, biases, biased, give_normed)
    empty, lead = x.new_empty, x.shape[:-1]
    rstd, mean = call.fake_statistics(norm, x)
    codes = list(x.shape) if group_size else [0]
    scale = [*lead, -(-x.shape[-1] // group_size)] if group_size else [0]
    return (
        [empty(*lead, weight.shape[0], dtype=compute) for weight in weights],
        empty(x.shape if give_normed else (0,)),
        empty((0,) if residual is None else x.shape),
        rstd,
        mean,
        empty(codes, dtype=torch.int8),
        empty(scale, dtype=torch.float32),
    )


def backward_reference(
    grads: list[Tensor],
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    wanted: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    dtype: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    y = segment.normed_again(before, h) if h is not None and wanted else None
    to_y, to_weights = segment.linears_backward(grads, y, weights, wanted, grad_y, dtype, any(wants))
    del y
    to_h, to_norm_weight, to_norm_bias = segment.norm_backward(before, to_y, grad_h, h, rstd, mean, wants)
    return to_h, to_norm_weight, to_norm_bias, to_weights


def backward_fake(
    grads: list[Tensor],
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    h: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    wanted: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    dtype: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    given = grads[0] if grads else grad_y
    assert given is not None
    columns = weights[0].shape[1] if weights else given.shape[-1]
    return (
        *call.fake_norm_gradients(norm, given, (*given.shape[:-1], columns), dtype, norm_weight, norm_bias, wants),
        call.like_parameters(weights, wanted),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, norm_weight, norm_bias, weights, biases, ctx.biased, *rest = inputs
    ctx.norm, ctx.eps, ctx.weight_offset, _, give_normed, ctx.group_size = rest
    _, y, h, rstd, mean, codes, scale = output
    absent = [] if give_normed else [y]
    ctx.mark_non_differentiable(rstd, mean, codes, scale, *absent, *([h] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.count, ctx.bias_dtypes = x.dtype, len(weights), [bias.dtype for bias in biases]
    kept: tuple[Tensor | None, ...] = (x if residual is None else h, None, None)
    if ctx.norm == NO_NORM and not any(weight.requires_grad for weight in weights):
        kept = (None, None, None)
    elif ctx.group_size:
        kept = (None, codes, scale)
    statistics = (None if ctx.norm == NO_NORM else rstd, mean if ctx.norm == LAYER else None)
    ctx.save_for_backward(*kept, *statistics, norm_weight, norm_bias, *weights)


def backward(ctx: Any, grads: list[Tensor | None], grad_y: Tensor | None, grad_h: Tensor | None, *_: Any) -> Any:
    h, codes, scale, rstd, mean, norm_weight, norm_bias, *weights = ctx.saved_tensors
    needs_x, needs_residual, *needs_norm, needs_weights, needs_biases = ctx.needs_input_grad[:6]
    flowing = [place for place in range(ctx.count) if grads[place] is not None]
    wanted = [place for place in flowing if needs_weights[place]]
    wants = [needs_x or needs_residual, *needs_norm]
    to_h, to_norm_weight, to_norm_bias = grad_h, None, None
    to_weights: dict[int, Tensor] = {}
    if flowing or grad_y is not None:
        if codes is not None:
            h = segment.expand(codes, scale, ctx.group_size, ctx.dtype)
        to_h, to_norm_weight, to_norm_bias, found = _ops.norm_linear_backward.default(
            [grads[place] for place in flowing],
            grad_y,
            grad_h,
            h,
            rstd,
            mean,
            norm_weight,
            norm_bias,
            [weights[place] for place in flowing],
            [flowing.index(place) for place in wanted],
            ctx.norm,
            ctx.eps,
            ctx.weight_offset,
            ctx.dtype,
            wants,
        )
        to_weights = dict(zip(wanted, found, strict=True))
    return (
        to_h if needs_x else None,
        to_h if needs_residual else None,
        to_norm_weight if needs_norm[0] else None,
        to_norm_bias if needs_norm[1] else None,
        [to_weights.get(place) for place in range(ctx.count)],
        [
            None if grad is None or not need else segment.rows(grad).sum(0).to(dtype)
            for grad, need, dtype in zip((grads[p] for p in ctx.biased), needs_biases, ctx.bias_dtypes, strict=True)
        ],
    )


_library.define(SCHEMA, reference, fake, composite=True)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, call.refuse_second_backward(NAME))


@names_argument
def norm_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    norm: str | None = "rms_norm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    prenorm: bool = False,
    normed: bool = False,
    group_size: int | None = None,
) -> Any:
    """norm(x + residual) @ weight.T + bias for one weight or several, as one node of the graph.

        h = x + residual          n = norm(h) * (norm_weight + weight_offset) + norm_bias          y_i = n @ W_i.T + b_i

    x, residual: [..., K] float32, bfloat16, float16. weight: [N, K], or a sequence of them (query, key, value; gate,
    up) whose products share the norm; an empty sequence leaves the norm. bias: [N], or one or None for each weight.
    norm: "rms_norm" (eps 1e-6), "layer_norm" (eps 1e-5) or None; see rms_norm and layer_norm.

    Returns y, or a tuple of them for a sequence; then n if normed; then h if prenorm (x itself without a residual).

    Numbers are those of rms_norm or layer_norm and torch.nn.functional.linear one after the other, bit for bit,
    gradients too, and under autocast too, where the weights are cast for the call and no copy is kept.

    Saved for backward, with M rows: h, M*K*itemsize bytes (x itself, by reference, without a residual), and rstd,
    4*M (float32), with layer_norm also the mean, 4*M. n is computed again: it is not saved. The separate calls keep
    2*M*K*itemsize. Without a norm, x by reference.
    group_size: keeps h as int8 with one float32 scale for each group of so many columns instead, rounded to nearest:
    M*K + 4*M*ceil(K/group_size) bytes. y is unchanged; gradients see h to within absmax / 254 of its group.

    Errors: ValueError for an unknown norm, a group_size below 1, or biases that do not match; RuntimeError names a
    wrong dtype, shape or device, before anything runs; NotImplementedError for a second derivative.
    """
    many = not isinstance(weight, Tensor)
    weights: list[Tensor] = list(weight) if many else [weight]  # type: ignore[arg-type, list-item]
    biases: list[Any] = [None] * len(weights) if bias is None else list(bias) if many else [bias]
    kind = call.norm_code(NAME, norm)
    if kind == NO_NORM and (residual is not None or normed or not weights):
        raise ValueError(f"{NAME}: expected a norm where there is a residual, normed=True or no weight, got norm=None")
    if residual is not None and residual.dtype != x.dtype and residual.is_floating_point():
        residual = residual.to(x.dtype)
    given, biased = call.split_biases(NAME, biases, len(weights))
    outs, y, h, *_ = _ops.norm_linear.default(
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
        call.compute_dtype(NAME, x, weights),
        normed,
        call.saved_group(NAME, group_size, x, residual, norm_weight, norm_bias, *weights, *given),
    )
    result = (*outs, *([y] if normed else []), *([x if residual is None else h] if prenorm else []))
    return result if many or len(result) > 1 else result[0]
