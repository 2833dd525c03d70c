"""int8_matmul: int8 [M, K] by int8 [N, K] transposed, int32 accumulation, everything after it fused."""

import torch

from .. import _library
from ._checks import (
    FLOATS,
    check,
    check_device,
    check_dim,
    check_dtype,
    check_k,
    check_one_or_each,
    check_vector,
    names,
)
from ._epilogue import check_epilogue, check_scale, epilogue

NAME = "int8_matmul"
SCHEMA = (
    f"{NAME}(Tensor a, Tensor b, Tensor? a_scale=None, Tensor? b_scale=None, Tensor? bias=None, "
    "Tensor? residual=None, int activation=0, Tensor? a_zero_point=None, Tensor? b_sum=None, "
    "ScalarType? out_dtype=None) -> Tensor"
)


def check_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    a_zero_point: torch.Tensor | None,
    b_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Everything a kernel relies on, in the order of the arguments."""
    check_dtype(NAME, "a", a, torch.int8)
    check_dtype(NAME, "b", b, torch.int8)
    check_dim(NAME, "a", a, 2)
    check_dim(NAME, "b", b, 2)
    check_device(NAME, "b", b, "a", a)
    (m, k), n = a.shape, b.shape[0]
    check(b.shape[1] == k, NAME, f"expected b to have shape [N, {k}], with the K of a, got {list(b.shape)}")
    check_k(NAME, k)
    check_scale(NAME, "a_scale", a_scale, a, m, "row")
    check_scale(NAME, "b_scale", b_scale, a, n, "output column")
    check_epilogue(NAME, a, torch.Size([m]), n, bias, residual, activation)
    if a_zero_point is not None:
        check_dtype(NAME, "a_zero_point", a_zero_point, torch.int32)
        check_device(NAME, "a_zero_point", a_zero_point, "a", a)
        check_one_or_each(NAME, "a_zero_point", a_zero_point, m, "row")
    if b_sum is not None:
        check(a_zero_point is not None, NAME, "expected a_zero_point with b_sum, got None")
        check_dtype(NAME, "b_sum", b_sum, torch.int32)
        check_device(NAME, "b_sum", b_sum, "a", a)
        check_vector(NAME, "b_sum", b_sum, n, "output column")
    if out_dtype == torch.int32:
        extras = {
            "a_scale": a_scale,
            "b_scale": b_scale,
            "bias": bias,
            "residual": residual,
            "a_zero_point": a_zero_point,
            "activation": activation or None,
        }
        given = [name for name, value in extras.items() if value is not None]
        check(
            not given,
            NAME,
            f"expected no {' and no '.join(given) or 'epilogue'} with out_dtype int32, the raw accumulator",
        )
    else:
        check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)} or int32, got {out_dtype}")


def accumulate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The exact product as float64: every partial sum is an integer far below 2^53."""
    return a.double() @ b.double().t()


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    a_zero_point: torch.Tensor | None = None,
    b_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or torch.float32
    check_arguments(a, b, a_scale, b_scale, bias, residual, activation, a_zero_point, b_sum, out_dtype)
    exact = accumulate(a, b)
    if out_dtype == torch.int32:
        return exact.to(torch.int32)
    if a_zero_point is not None:
        sums = b.sum(1) if b_sum is None else b_sum
        exact = exact - a_zero_point.reshape(-1, 1).double() * sums.double()
    return epilogue(exact, a_scale, b_scale, bias, residual, activation, out_dtype)


def fake(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    a_zero_point: torch.Tensor | None = None,
    b_sum: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or torch.float32
    check_arguments(a, b, a_scale, b_scale, bias, residual, activation, a_zero_point, b_sum, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


_library.define(SCHEMA, reference, fake)
