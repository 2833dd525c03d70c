"""int8_grouped_matmul: a product for each expert of a mixture, of rows sorted by expert, in one call.

Group e is the counts[e] rows of `a` that follow those of the experts before it, times b[e] transposed; everything else
is as in int8_matmul. The counts stay on the device: nothing waits for it.
"""

import torch

from .. import _library
from . import int8_matmul
from ._checks import FLOATS, check, check_device, check_dim, check_dtype, check_k, names
from ._enums import ACTIVATIONS, activation_code
from ._epilogue import check_scale

NAME = "int8_grouped_matmul"
SCHEMA = (
    f"{NAME}(Tensor a, Tensor b, Tensor counts, Tensor? a_scale=None, Tensor? b_scale=None, Tensor? bias=None, "
    "int activation=0, ScalarType? out_dtype=None) -> Tensor"
)


def check_groups(op: str, name: str, rows: torch.Tensor, b_name: str, b: torch.Tensor, counts: torch.Tensor) -> None:
    """rows [T, K], b int8 [E, N, K] and counts [E], on one device."""
    check_dim(op, name, rows, 2)
    check_dtype(op, b_name, b, torch.int8)
    check_dim(op, b_name, b, 3)
    check_device(op, b_name, b, name, rows)
    (experts, _, b_k), k = b.shape, rows.shape[1]
    check(b_k == k, op, f"expected {b_name} to have shape [E, N, {k}], with the K of {name}, got {list(b.shape)}")
    check_k(op, k)
    check_dtype(op, "counts", counts, torch.int32, torch.int64)
    check_device(op, "counts", counts, name, rows)
    check(
        list(counts.shape) == [experts],
        op,
        f"expected counts to have shape [{experts}], one element for each expert, got {list(counts.shape)}",
    )


def check_per_expert(
    op: str, name: str, value: torch.Tensor, b_name: str, b: torch.Tensor, *dtypes: torch.dtype
) -> None:
    """value [E, N], one element for each output column of each expert."""
    check_dtype(op, name, value, *dtypes)
    check_device(op, name, value, b_name, b)
    shape = list(b.shape[:2])
    check(list(value.shape) == shape, op, f"expected {name} to have shape {shape}, got {list(value.shape)}")


def check_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    counts: torch.Tensor,
    a_scale: torch.Tensor | None,
    b_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: int,
    out_dtype: torch.dtype,
) -> None:
    """Everything a kernel relies on but the values of counts, in the order of the arguments."""
    check_dtype(NAME, "a", a, torch.int8)
    check_groups(NAME, "a", a, "b", b, counts)
    check_scale(NAME, "a_scale", a_scale, a, a.shape[0], "row")
    if b_scale is not None:
        check_per_expert(NAME, "b_scale", b_scale, "b", b, torch.float32)
    if bias is not None:
        check_per_expert(NAME, "bias", bias, "b", b, *FLOATS)
    check(activation in ACTIVATIONS.values(), NAME, f"expected activation to be 0 to 4, got {activation}")
    if out_dtype == torch.int32:
        extras = {"a_scale": a_scale, "b_scale": b_scale, "bias": bias, "activation": activation or None}
        given = [name for name, value in extras.items() if value is not None]
        check(
            not given,
            NAME,
            f"expected no {' and no '.join(given) or 'epilogue'} with out_dtype int32, the raw accumulator",
        )
    else:
        check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)} or int32, got {out_dtype}")


def check_counts(op: str, counts: torch.Tensor, rows: int) -> list[int]:
    """The counts as a list, none negative, together at most `rows`. On the CPU only: elsewhere a look would wait."""
    values = counts.tolist()
    check(all(count >= 0 for count in values), op, f"expected counts to be 0 or more, got {values}")
    check(sum(values) <= rows, op, f"expected counts to sum to at most the {rows} rows, got {sum(values)}")
    return values


def split(counts: torch.Tensor, rows: int, op: str) -> list[tuple[int, int]]:
    """(first row, end) of every expert, of the reference. Without a check, a negative count is 0 and groups end with
    the rows."""
    if counts.device.type == "cpu":
        values = check_counts(op, counts, rows)
    else:
        values = counts.clamp_min(0).tolist()
    found, first = [], 0
    for count in values:
        found.append((first, first := min(rows, first + count)))
    return found


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    counts: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or torch.float32
    check_arguments(a, b, counts, a_scale, b_scale, bias, activation, out_dtype)
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    each = a_scale is not None and a_scale.numel() == a.shape[0]
    for expert, (first, end) in enumerate(split(counts, a.shape[0], NAME)):
        out[first:end] = int8_matmul.reference(
            a[first:end],
            b[expert],
            a_scale.reshape(-1)[first:end] if a_scale is not None and each else a_scale,
            None if b_scale is None else b_scale[expert],
            None if bias is None else bias[expert],
            activation=activation,
            out_dtype=out_dtype,
        )
    return out


def fake(
    a: torch.Tensor,
    b: torch.Tensor,
    counts: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: int = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or torch.float32
    check_arguments(a, b, counts, a_scale, b_scale, bias, activation, out_dtype)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


_library.define(SCHEMA, reference, fake)


def int8_grouped_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    counts: torch.Tensor,
    a_scale: torch.Tensor | None = None,
    b_scale: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act(a_e @ b[e].T * a_scale * b_scale[e] + bias[e]) for each expert e, in one launch and without a look at counts.

    a int8 [T, K], its rows sorted by expert: the first counts[0] belong to expert 0, the next counts[1] to expert 1,
    and so on; b int8 [E, N, K]; counts int32 or int64 [E] on the device of a -> [T, N] in out_dtype: float32 (default),
    bfloat16, float16, or int32 for the bare accumulators. a_scale: one element or [T]; b_scale, bias: [E, N].
    activation: as in int8_matmul, to which each group's result is equal bit for bit. Experts may have no rows. Rows
    that no expert counts are 0 in the result, so that a buffer may be larger than what is routed into it.
    Saves nothing for backward (not differentiable). Errors: RuntimeError names the argument, before anything runs; so
    does a negative count, or a sum of counts above T, on the CPU. On a GPU nothing waits to see them: there a negative
    count is one of 0, and groups end where the rows do.
    """
    code = activation_code(NAME, activation)
    op = torch.ops.pykernels.int8_grouped_matmul.default
    return op(a, b, counts, a_scale, b_scale, bias, code, out_dtype)
