"""glu_linear: the gate of a gated MLP and the linear layer that reads it as one node; the product is never saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from . import _autograd
from . import _segment as segment
from . import _segment_call as call
from ._checks import check, check_device, names_argument

NAME = "glu_linear"
BACKWARD = f"{NAME}_backward"
# Without a weight the result is the product. group_size 0 keeps gate and up as they are, else in int8.
SCHEMA = (
    f"{NAME}(Tensor gate, Tensor? up, Tensor? weight, Tensor? bias, int activation, ScalarType compute, "
    "int group_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, Tensor gate, Tensor? up, Tensor? weight, int activation, bool wants_input, "
    "bool wants_weight) -> (Tensor, Tensor, Tensor)"
)
_ops = torch.ops.pykernels


def check_arguments(gate: Tensor, up: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> int:
    """The columns of the product; gated_activation checks gate and up."""
    check(gate.dim() >= 1, NAME, "expected gate to have at least 1 dimension, got 0")
    columns = gate.shape[-1] // (2 if up is None else 1)
    if weight is not None:
        call.check_weight(NAME, "weight", weight, columns, gate)
    if bias is not None:
        check(weight is not None, NAME, "expected no bias without a weight")
        check_device(NAME, "bias", bias, "gate", gate)
        n = weight.shape[0] if weight is not None else 0
        check(bias.shape == (n,), NAME, f"expected bias to have shape [{n}], got {list(bias.shape)}")
    return columns


def _compressed(x: Tensor | None, like: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    if x is None or group_size == 0:
        return like.new_empty(0, dtype=torch.int8), like.new_empty(0, dtype=torch.float32)
    return segment.compress(x, group_size)


def reference(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    compute: torch.dtype,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_arguments(gate, up, weight, bias)
    out = _ops.gated_activation.default(gate, up, activation)
    if weight is not None:
        out = segment.apply_linears(out, [weight], [bias], compute)[0]
    return out, *_compressed(gate, gate, group_size), *_compressed(up, gate, group_size)


def fake(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    compute: torch.dtype,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = check_arguments(gate, up, weight, bias)
    lead = gate.shape[:-1]
    out = gate.new_empty(*lead, columns) if weight is None else gate.new_empty(*lead, weight.shape[0], dtype=compute)

    def codes(x: Tensor | None) -> tuple[Tensor, Tensor]:
        kept = x is not None and group_size > 0
        shape = x.shape if x is not None and kept else (0,)
        groups = (*lead, -(-shape[-1] // group_size)) if kept else (0,)
        return gate.new_empty(shape, dtype=torch.int8), gate.new_empty(groups, dtype=torch.float32)

    return out, *codes(gate), *codes(up)


def backward_reference(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor | None,
    activation: int,
    wants_input: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = segment.gate_backward(grad, gate, up, weight, activation, wants_weight, wants_input)
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in found)  # type: ignore[return-value]


def backward_fake(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor | None,
    activation: int,
    wants_input: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        gate.new_empty(gate.shape) if wants_input else grad.new_empty(0),
        gate.new_empty(gate.shape) if wants_input and up is not None else grad.new_empty(0),
        weight.new_empty(weight.shape) if wants_weight and weight is not None else grad.new_empty(0),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, up, weight, bias, ctx.activation, _, ctx.group_size = inputs
    _, *codes = output
    ctx.mark_non_differentiable(*codes)
    ctx.dtype, ctx.packed, ctx.bias_dtype = gate.dtype, up is None, None if bias is None else bias.dtype
    ctx.save_for_backward(weight, *(codes if ctx.group_size else (gate, up)))


def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    weight, *kept = ctx.saved_tensors
    needs_gate, needs_up, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    if ctx.group_size:
        gate = segment.expand(kept[0], kept[1], ctx.group_size, ctx.dtype)
        up = None if ctx.packed else segment.expand(kept[2], kept[3], ctx.group_size, ctx.dtype)
    else:
        gate, up = kept
    to_gate, to_up, to_weight = _ops.glu_linear_backward.default(
        grad, gate, up, weight, ctx.activation, needs_gate or needs_up, needs_weight
    )
    return (
        to_gate if needs_gate else None,
        to_up if needs_up else None,
        to_weight if needs_weight else None,
        segment.rows(grad).sum(0).to(ctx.bias_dtype) if needs_bias else None,
        None,
        None,
        None,
    )


_library.define(SCHEMA, reference, fake, composite=True)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, call.refuse_second_backward(NAME))


@names_argument
def glu_linear(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    activation: str = "silu",
    group_size: int | None = None,
) -> Tensor:
    """(act(gate) * up) @ weight.T + bias as one node: the second half of a gated MLP (Shazeer, 2020).

    gate, up: [..., I], or packed gate [..., 2 * I] with up None. weight [N, I], bias [N] -> [..., N]; without a weight
    the product itself, [..., I]. float32, bfloat16 or float16; activation: "silu", "gelu", "gelu_tanh" or "relu".

    Numbers are those of swiglu (geglu, reglu) and torch.nn.functional.linear one after the other, bit for bit, under
    autocast too, where the weight is cast for the call and no copy is kept.

    Saved for backward, with M rows: gate and up by reference, 2*M*I*itemsize bytes; the product, which the weight's
    gradient needs, is computed again. The separate calls keep 3*M*I*itemsize.
    group_size: keeps gate and up as int8 with one float32 scale for each group of so many columns instead, rounded to
    nearest: 2*(M*I + 4*M*ceil(I/group_size)) bytes. The result is unchanged; gradients see gate and up to within
    absmax / 254 of their group.

    Errors: ValueError for an unknown activation or a group_size below 1; RuntimeError names a wrong dtype, shape or
    device, before anything runs; NotImplementedError for a second derivative.
    """
    return _ops.glu_linear.default(
        gate,
        up,
        weight,
        bias,
        call.gate_code(NAME, activation),
        call.compute_dtype(NAME, gate, [] if weight is None else [weight]),
        call.saved_group(NAME, group_size, gate, up, weight, bias),
    )[0]
