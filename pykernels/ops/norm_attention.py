"""norm_attention: norm, query, key and value, rope and attention as one node; q, k and v are computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import (
    _autograd,
    rope,  # noqa: F401 an operator used
)
from . import _segment as segment
from . import _segment_call as call
from . import attention as core
from ._checks import check, check_dim, names_argument
from ._segment import LAYER, NO_NORM, Norm

NAME = "norm_attention"
BACKWARD = f"{NAME}_backward"
# weights: of query, key and value. biased names those that have a bias, in the order of biases.
_OPTIONS = (
    "int norm, float eps, float weight_offset, int head_dim, bool interleaved, bool causal, float scale, "
    "ScalarType compute"
)
SCHEMA = (
    f"{NAME}(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor[] weights, Tensor[] biases, int[] biased, "
    f"Tensor? cos, Tensor? sin, Tensor? position_ids, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
# wanted and wanted_biases name layers; wants: of x, norm_weight, norm_bias.
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, Tensor x, Tensor out, Tensor lse, Tensor? rstd, Tensor? mean, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor[] weights, Tensor[] biases, int[] biased, Tensor? cos, Tensor? sin, "
    f"Tensor? position_ids, int[] wanted, int[] wanted_biases, {_OPTIONS}, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor[], Tensor[])"
)
_ops = torch.ops.pykernels


def check_arguments(
    x: Tensor, norm: Norm, weights: Sequence[Tensor], biases: Sequence[Tensor], biased: Sequence[int], head_dim: int
) -> None:
    """x [B, S, K]; the rows of each weight are whole heads."""
    check(len(weights) == 3, NAME, f"expected 3 weights, query, key and value, got {len(weights)}")
    check_dim(NAME, "x", x, 3)
    call.check_segment(NAME, x, None, norm, weights, biases)
    call.check_biases(NAME, weights, biases, biased)
    for weight in weights:
        check(
            head_dim > 0 and weight.shape[0] % head_dim == 0,
            NAME,
            f"expected the rows of each weight to be a multiple of head_dim {head_dim}, got {weight.shape[0]}",
        )


def _qkv(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tables: Sequence[Tensor | None],
    head_dim: int,
    interleaved: bool,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key, rotated, and value, each [B, S, heads, head_dim]."""
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in segment.apply_linears(y, weights, biases, compute))
    cos, sin, position_ids = tables
    if cos is not None:
        q, k = _ops.rope.default(q, k, cos, sin, position_ids, interleaved, False)
    return q, k, v


def reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    norm: int,
    eps: float,
    weight_offset: float,
    head_dim: int,
    interleaved: bool,
    causal: bool,
    scale: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    check_arguments(x, before, weights, biases, biased, head_dim)
    normed = segment.apply_norm(before, x)
    spread = segment.spread(biases, biased, 3)
    q, k, v = _qkv(normed.y, weights, spread, (cos, sin, position_ids), head_dim, interleaved, compute)
    return (
        *core.reference(q, k, v, causal, scale),
        x.new_empty(0) if normed.rstd is None else normed.rstd,
        x.new_empty(0) if normed.mean is None else normed.mean,
    )


def fake(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    norm: int,
    eps: float,
    weight_offset: float,
    head_dim: int,
    interleaved: bool,
    causal: bool,
    scale: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    check_arguments(x, before, weights, biases, biased, head_dim)
    batch, length, _ = x.shape
    q, k, v = (x.new_empty(batch, length, w.shape[0] // head_dim, head_dim, dtype=compute) for w in weights)
    return *core.fake(q, k, v, causal, scale), *call.fake_statistics(norm, x)


def backward_reference(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    lse: Tensor,
    rstd: Tensor | None,
    mean: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    wanted: list[int],
    wanted_biases: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    head_dim: int,
    interleaved: bool,
    causal: bool,
    scale: float,
    compute: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    before = Norm(norm, norm_weight, norm_bias, eps, weight_offset)
    spread = segment.spread(biases, biased, 3)
    y = segment.normed_again(before, x)
    q, k, v = _qkv(y, weights, spread, (cos, sin, position_ids), head_dim, interleaved, compute)
    to_q, to_k, to_v = core.backward_reference(grad, q, k, v, out, lse, causal, scale)
    del q, k, v
    if cos is not None:
        to_q, to_k = _ops.rope.default(to_q, to_k, cos, sin, position_ids, interleaved, True)
    gradients = [gradient.flatten(-2) for gradient in (to_q, to_k, to_v)]
    to_y, to_weights = segment.linears_backward(gradients, y, weights, wanted, None, x.dtype, any(wants))
    del y
    to_biases = segment.bias_gradients(
        [gradients[place] for place in wanted_biases], [spread[place] for place in wanted_biases]
    )
    return *segment.norm_backward(before, to_y, None, x, rstd, mean, wants), to_weights, to_biases


def backward_fake(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    lse: Tensor,
    rstd: Tensor | None,
    mean: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: list[int],
    cos: Tensor | None,
    sin: Tensor | None,
    position_ids: Tensor | None,
    wanted: list[int],
    wanted_biases: list[int],
    norm: int,
    eps: float,
    weight_offset: float,
    head_dim: int,
    interleaved: bool,
    causal: bool,
    scale: float,
    compute: torch.dtype,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    return (
        *call.fake_norm_gradients(norm, x, x.shape, x.dtype, norm_weight, norm_bias, wants),
        call.like_parameters(weights, wanted),
        call.like_parameters(biases, [biased.index(place) for place in wanted_biases]),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, weights, biases, ctx.biased, cos, sin, position_ids, *ctx.options = inputs
    out, lse, rstd, mean = output
    ctx.mark_non_differentiable(lse, rstd, mean)
    norm = ctx.options[0]
    statistics = (None if norm == NO_NORM else rstd, mean if norm == LAYER else None)
    tables = (cos, sin, position_ids)
    ctx.save_for_backward(x, out, lse, *statistics, norm_weight, norm_bias, *tables, *weights, *biases)


def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    x, out, lse, rstd, mean, norm_weight, norm_bias, cos, sin, position_ids, *parameters = ctx.saved_tensors
    weights, biases = parameters[:3], parameters[3:]
    *wants, needs_weights, needs_biases = ctx.needs_input_grad[:5]
    wanted = [place for place in range(3) if needs_weights[place]]
    wanted_biases = [place for place, need in zip(ctx.biased, needs_biases, strict=True) if need]
    to_x, to_norm_weight, to_norm_bias, found, found_biases = _ops.norm_attention_backward.default(
        grad,
        x,
        out,
        lse,
        rstd,
        mean,
        norm_weight,
        norm_bias,
        weights,
        biases,
        ctx.biased,
        cos,
        sin,
        position_ids,
        wanted,
        wanted_biases,
        *ctx.options,
        wants,
    )
    return (
        to_x if wants[0] else None,
        to_norm_weight if wants[1] else None,
        to_norm_bias if wants[2] else None,
        segment.spread(found, wanted, 3),
        segment.spread(found_biases, [ctx.biased.index(place) for place in wanted_biases], len(biases)),
    )


_library.define(SCHEMA, reference, fake, composite=True)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, call.refuse_second_backward(NAME))


@names_argument
def norm_attention(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    biases: Sequence[Tensor | None] = (None, None, None),
    *,
    head_dim: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    causal: bool = True,
    scale: float | None = None,
    norm: str | None = "rms_norm",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
) -> Tensor:
    """Norm, query, key and value, rope and attention as one node that computes q, k and v again in backward.

    x [B, S, K]; query [H*head_dim, K]; key, value [G*head_dim, K]; biases: of the three -> [B, S, H, head_dim].
    cos, sin, position_ids, interleaved: as rope; without cos nothing turns. causal, scale: as attention. norm and its
    options: as norm_linear.

    Numbers are those of norm_linear, rope and attention one after the other, bit for bit. Attention itself is not
    computed again.

    Saved for backward: x by reference, the result by reference, 4*B*S*H bytes of lse and 4*B*S of rstd (with layer_norm
    as much of the mean). The price is the products of query, key and value once more.

    Errors: as norm_linear, rope and attention.
    """
    weights = [query, key, value]
    kind = call.norm_code(NAME, norm)
    given, biased = call.split_biases(NAME, biases, 3)
    if (cos is None) != (sin is None):
        raise ValueError(f"{NAME}: expected both cos and sin, or neither, got {'sin' if cos is None else 'cos'} alone")
    return _ops.norm_attention.default(
        x,
        norm_weight,
        norm_bias,
        weights,
        given,
        biased,
        cos,
        sin,
        position_ids,
        kind,
        call.norm_eps(NAME, kind, eps),
        weight_offset,
        head_dim,
        interleaved,
        causal,
        max(head_dim, 1) ** -0.5 if scale is None else scale,
        call.compute_dtype(NAME, x, weights),
    )[0]
