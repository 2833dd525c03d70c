"""INT8 training of a linear layer: its three products in INT8, and one byte an element kept between them.

    y  = q_row(x) q_row(w)^T          grad_x = q_row(g) q_col(w)          grad_w = q_col(g)^T q_col(x)

Each operand is scaled along the rows that its product keeps, so every scale leaves the sum over the contracted
dimension: the INT8 product is exact, and the only error is that of rounding the operands. Only g is rounded
stochastically, so that the gradients are unbiased given the rounded x and w (Chmiel et al., "Accurate Neural Training
with 4-bit Matrix Multiplications at Standard Formats", 2023; torchao trains with the same three products).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _library
from . import _autograd, int8_matmul, quantize_colwise, quantize_rowwise  # noqa: F401 the operators this one is made of
from ._autocast import autocast
from ._checks import MAX_K, check, check_device, check_dim, check_float_input

NAME = "int8_training_linear"
BACKWARD = f"{NAME}_backward"
SCHEMA = (
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias, Tensor? x_row, Tensor? x_row_scale, Tensor? x_column, "
    "Tensor? x_column_scale, Tensor? seed, bool grad_input) -> Tensor"
)
BACKWARD_SCHEMA = (
    f"{BACKWARD}(Tensor grad, Tensor? weight, Tensor? x, Tensor? x_scale, Tensor? seed, bool grad_input, "
    "ScalarType weight_dtype) -> (Tensor, Tensor)"
)
PIECE = MAX_K // 64 * 64  # of a contraction too long for int32; pieces stay aligned
_ops = torch.ops.pykernels


@dataclass(frozen=True)
class Int8TrainingConfig:
    """INT8 training of a float weight: which of a linear layer's three products run in INT8.

    Args:
        output: the forward product. grad_input, grad_weight: the two of backward.
        stochastic_rounding: round the gradient stochastically, so that its error has zero mean.
    """

    output: bool = True
    grad_input: bool = True
    grad_weight: bool = True
    stochastic_rounding: bool = True


# Activation -> (version, dtype, columns, scale), so that the query, key and value layers keep one copy of their input.
_columns_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x [..., K], weight [N, K] and bias [N], each of any of the three float dtypes, on one device."""
    check_float_input(NAME, "x", x)
    check_float_input(NAME, "weight", weight)
    check_dim(NAME, "weight", weight, 2)
    check_device(NAME, "weight", weight, "x", x)
    (n, k), last = weight.shape, x.shape[-1]
    check(k == last, NAME, f"expected weight to have shape [N, {last}], with the K of x, got {list(weight.shape)}")
    if bias is not None:
        check_float_input(NAME, "bias", bias)
        check_device(NAME, "bias", bias, "x", x)
        check(bias.shape == (n,), NAME, f"expected bias to have shape [{n}], got {list(bias.shape)}")


def _matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """int8_matmul of any K: pieces short enough for int32 are added up in float32."""
    k = a.shape[1]
    total = None
    for start in range(0, k - PIECE, PIECE):
        end = start + PIECE
        total = _ops.int8_matmul.default(
            a[:, start:end], b[:, start:end], a_scale, b_scale, residual=total, out_dtype=torch.float32
        )
    rest = slice(max(0, (k - 1) // PIECE) * PIECE, k)
    return _ops.int8_matmul.default(
        a[:, rest], b[:, rest], a_scale, b_scale, bias=bias, residual=total, out_dtype=out_dtype
    )


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_row: Tensor | None,
    x_row_scale: Tensor | None,
    x_column: Tensor | None,
    x_column_scale: Tensor | None,
    seed: Tensor | None,
    grad_input: bool,
) -> Tensor:
    check_arguments(x, weight, bias)
    if x_row is None or x_row_scale is None:
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    w_row, w_scale = _ops.quantize_rowwise.default(weight)
    y = _matmul(x_row, w_row, x_row_scale, w_scale, x.dtype, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    check_arguments(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def backward_reference(
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    x_scale: Tensor | None,
    seed: Tensor | None,
    grad_input: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """weight is None when grad_x is not asked for, x when grad_w is not; x is int8 [K, M] if x_scale is given."""
    stochastic, number = (False, 0) if seed is None else (True, int(seed))
    rows, columns = weight is not None and grad_input, x_scale is not None
    if rows and columns:
        g_row, g_row_scale, g_column, g_column_scale = _ops.quantize_both.default(grad, stochastic, number)
    elif rows:
        g_row, g_row_scale = _ops.quantize_rowwise.default(grad, stochastic, number)
    elif columns:
        g_column, g_column_scale = _ops.quantize_transposed.default(grad, stochastic, number)

    grad_x, grad_weight = grad.new_empty(0), grad.new_empty(0, dtype=weight_dtype)
    if weight is not None:
        if grad_input:
            w_column, w_scale = _ops.quantize_transposed.default(weight)
            grad_x = _matmul(g_row, w_column, g_row_scale, w_scale, grad.dtype)
        else:
            grad_x = grad @ weight.to(grad.dtype)
    if x is not None:
        if x_scale is not None:
            grad_weight = _matmul(g_column, x, g_column_scale, x_scale, weight_dtype)
        else:
            grad_weight = (grad.t() @ x).to(weight_dtype)
    return grad_x, grad_weight


def backward_fake(
    grad: Tensor,
    weight: Tensor | None,
    x: Tensor | None,
    x_scale: Tensor | None,
    seed: Tensor | None,
    grad_input: bool,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    m, n = grad.shape
    grad_x = grad.new_empty(0) if weight is None else grad.new_empty(m, weight.shape[1])
    if x is None:
        return grad_x, grad.new_empty(0, dtype=weight_dtype)
    k = x.shape[1] if x_scale is None else x.shape[0]
    return grad_x, grad.new_empty(n, k, dtype=weight_dtype)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, _, x_column, x_column_scale, seed, grad_input = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    kept, scale = (x.reshape(-1, x.shape[-1]), None) if x_column is None else (x_column, x_column_scale)
    ctx.save_for_backward(
        weight if needs_x else None, kept if needs_weight else None, scale if needs_weight else None, seed
    )
    ctx.shape, ctx.grad_input, ctx.weight_dtype = x.shape, grad_input, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, x, x_scale, seed = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weight = grad_bias = None
    if needs_x or needs_weight:
        to_x, to_weight = _ops.int8_training_linear_backward.default(
            grad, weight, x, x_scale, seed, ctx.grad_input, ctx.weight_dtype
        )
        grad_x = to_x.view(ctx.shape) if needs_x else None
        grad_weight = to_weight if needs_weight else None
    if needs_bias:
        grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (
        grad_x,
        grad_weight,
        grad_bias,
        *[None] * 6,
    )


def refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("int8_training_linear: a second derivative is not defined for a rounded gradient")


_library.define(SCHEMA, reference, fake, composite=True)
_library.define(BACKWARD_SCHEMA, backward_reference, backward_fake, composite=True)
_autograd.register(NAME, backward, setup_context)
_autograd.register(BACKWARD, refuse_second_backward)


def _quantize_activation(source: Tensor, x: Tensor, rows: bool, columns: bool) -> tuple[Tensor | None, ...]:
    """Rows and transposed columns of x, which is source in the dtype to compute in, and their scales.

    Only intermediate results are remembered: the entry dies with the activation, never with a tensor the caller keeps.
    """
    flat = x.detach().reshape(-1, x.shape[-1])
    if not columns:
        return (*_ops.quantize_rowwise.default(flat), None, None) if rows else (None,) * 4
    # A compiler merges equal calls by itself, and cannot trace grad_fn: ask it first.
    remember = not torch.compiler.is_compiling() and source.grad_fn is not None
    known = _columns_of.get(source) if remember else None
    if known is not None and known[:2] == (source._version, x.dtype):
        row, row_scale = _ops.quantize_rowwise.default(flat) if rows else (None, None)
        return row, row_scale, *known[2:]
    result = _ops.quantize_both.default(flat) if rows else (None, None, *_ops.quantize_transposed.default(flat))
    if remember:
        _columns_of[source] = (source._version, x.dtype, *result[2:])
    return result


def int8_training_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    config: Int8TrainingConfig = Int8TrainingConfig(),
    seed: int | None = None,
) -> Tensor:
    """Linear layer for training whose products run in INT8 where ``config`` says so.

    Shapes: x [..., K], weight [N, K], bias [N] -> [..., N]; M below is the product of x's leading sizes. Any of the
    three may be float32, bfloat16 or float16; y and grad_x have x's dtype, each parameter's gradient has its own.
    Under autocast x is cast as torch.nn.functional.linear casts it; the weight is quantised from its own precision.

    config: which of the output, the gradient of x and the gradient of weight are INT8 products. The others run in x's
    dtype.
    seed: of the stochastic rounding. None draws one from torch's CPU generator at each call that needs it, so
    torch.manual_seed fixes a run, activation checkpointing repeats it and the device is never waited for. The rounding
    depends on the seed and the element's index alone, never on the number of threads.

    Saved for backward, in bytes:

        M*K + 4*K        INT8 column-quantised x and its scales, when grad_weight is INT8
        M*K*itemsize     x itself, when grad_weight is not INT8
        0                of x, when weight needs no gradient
        + 8              the seed, with stochastic rounding

    Layers that read the same activation (query, key and value) share its INT8 copy, as they would share x. The weight
    is saved by reference. A row of x or of the gradient that holds NaN or infinity gives NaN, never zeros.
    A contraction longer than int32 can hold (K, N or M above 131,071) is added up in float32 pieces.

    Errors: RuntimeError names a wrong dtype, shape or device before anything runs; NotImplementedError for a second
    derivative.
    """
    check_arguments(x, weight, bias)
    source = x
    x = autocast(x)
    needs_x, needs_weight = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))

    columns = config.grad_weight and needs_weight
    x_row, x_row_scale, x_column, x_column_scale = _quantize_activation(source, x, config.output, columns)
    number = None
    if config.stochastic_rounding and (columns or (config.grad_input and needs_x)):
        number = torch.randint(2**63 - 1, (), device="cpu") if seed is None else torch.tensor(seed, device="cpu")
    return _ops.int8_training_linear.default(
        x, weight, bias, x_row, x_row_scale, x_column, x_column_scale, number, config.grad_input
    )
