"""The gradients of int8_grouped_linear with frozen experts: of x through the dequantised weights, and of bias."""

import torch

from .. import _library
from . import _autograd
from ._checks import FLOATS, check, check_device, check_dim, check_dtype, check_vector, names
from ._segment_call import refuse_second_backward
from ._weight_grad import grad_input
from .int8_grouped_matmul import check_per_expert, split

NAME = "int8_grouped_linear_backward"
SUM = "grouped_sum"
SCHEMA = f"{NAME}(Tensor grad, Tensor weight, Tensor weight_scale, Tensor counts, ScalarType? out_dtype=None) -> Tensor"
SUM_SCHEMA = f"{SUM}(Tensor rows, Tensor counts) -> Tensor"


def check_counts_tensor(op: str, counts: torch.Tensor, name: str, rows: torch.Tensor) -> None:
    check_dtype(op, "counts", counts, torch.int32, torch.int64)
    check_device(op, "counts", counts, name, rows)


def check_arguments(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    out_dtype: torch.dtype,
) -> None:
    """Everything a kernel relies on but the values of counts, in the order of the arguments."""
    check_dtype(NAME, "grad", grad, *FLOATS)
    check_dim(NAME, "grad", grad, 2)
    check_dtype(NAME, "weight", weight, torch.int8)
    check_dim(NAME, "weight", weight, 3)
    check_device(NAME, "weight", weight, "grad", grad)
    (experts, w_n, _), n = weight.shape, grad.shape[1]
    check(w_n == n, NAME, f"expected weight to have shape [E, {n}, K], with the N of grad, got {list(weight.shape)}")
    check_counts_tensor(NAME, counts, "grad", grad)
    check_vector(NAME, "counts", counts, experts, "expert")
    check_per_expert(NAME, "weight_scale", weight_scale, "weight", weight, torch.float32)
    check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)}, got {out_dtype}")


def reference(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """grad_e @ (weight[e] * weight_scale[e]) for each expert e: grad [T, N] sorted by expert, weight [E, N, K] to
    [T, K].

    As the gradient of int8_linear for each expert, of whose weight a slice at a time is float. Rows that no expert
    counts become 0.
    """
    out_dtype = out_dtype or grad.dtype
    check_arguments(grad, weight, weight_scale, counts, out_dtype)
    out = grad.new_zeros((grad.shape[0], weight.shape[2]), dtype=out_dtype)
    for expert, (first, end) in enumerate(split(counts, grad.shape[0], NAME)):
        if end > first:
            out[first:end] = grad_input(grad[first:end], weight[expert], weight_scale[expert], out_dtype)
    return out


def fake(
    grad: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    counts: torch.Tensor,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or grad.dtype
    check_arguments(grad, weight, weight_scale, counts, out_dtype)
    return grad.new_empty((grad.shape[0], weight.shape[2]), dtype=out_dtype)


def check_sum(rows: torch.Tensor, counts: torch.Tensor) -> None:
    check_dtype(SUM, "rows", rows, *FLOATS)
    check_dim(SUM, "rows", rows, 2)
    check_counts_tensor(SUM, counts, "rows", rows)
    check_dim(SUM, "counts", counts, 1)


def sum_reference(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The sum of each expert's rows [T, N], in float32: [E, N]."""
    check_sum(rows, counts)
    groups = split(counts, rows.shape[0], SUM)
    sums = [rows[first:end].sum(0, dtype=torch.float32) for first, end in groups]
    return torch.stack(sums) if sums else rows.new_empty((0, rows.shape[1]), dtype=torch.float32)


def sum_fake(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    check_sum(rows, counts)
    return rows.new_empty((counts.shape[0], rows.shape[1]), dtype=torch.float32)


# PyTorch's own float products are what a CPU has for it; on a GPU, one launch that finds the groups on the device.
_library.define(SCHEMA, reference, fake, composite=True, triton=NAME)
_library.define(SUM_SCHEMA, sum_reference, sum_fake, composite=True, triton=NAME)
for _name in (NAME, SUM):
    _autograd.register(_name, refuse_second_backward("int8_grouped_linear"))
