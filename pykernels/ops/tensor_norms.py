"""squared_norms and scale_tensors_: the two passes of clipping gradients by their norm, over many tensors at once."""

import torch
from torch import Tensor

from .. import _library
from ._checks import FLOATS, check, check_dtype

NORMS = "squared_norms"
NORMS_SCHEMA = f"{NORMS}(Tensor[] tensors) -> Tensor"
SCALE = "scale_tensors_"
SCALE_SCHEMA = f"{SCALE}(Tensor(a!)[] tensors, Tensor factor) -> ()"


def check_tensors(op: str, tensors: list[Tensor]) -> None:
    """At least one; all float, contiguous and on one device; dtypes may differ."""
    check(len(tensors) > 0, op, "expected tensors to have at least 1 tensor, got 0")
    for i, tensor in enumerate(tensors):
        check_dtype(op, f"tensors[{i}]", tensor, *FLOATS, torch.float64)
        check(
            tensor.is_contiguous(), op, f"expected tensors[{i}] to be contiguous, got strides {list(tensor.stride())}"
        )
        check(tensor.device == tensors[0].device, op, f"expected tensors[{i}] on the device of tensors[0]")


def norms_fake(tensors: list[Tensor]) -> Tensor:
    check_tensors(NORMS, tensors)
    return tensors[0].new_empty(len(tensors), dtype=torch.float64)


def norms_reference(tensors: list[Tensor]) -> Tensor:
    """[n] float64: the sum of squares of each tensor, accumulated in float64 at every 64 Ki elements or oftener."""
    result = norms_fake(tensors)
    for i, tensor in enumerate(tensors):
        result[i] = tensor.double().square().sum()
    return result


def scale_fake(tensors: list[Tensor], factor: Tensor) -> None:
    check_tensors(SCALE, tensors)
    check_dtype(SCALE, "factor", factor, torch.float32, torch.float64)
    check(factor.numel() == 1, SCALE, f"expected factor to have 1 element, got {factor.numel()}")


def scale_reference(tensors: list[Tensor], factor: Tensor) -> None:
    """Each tensor times factor, in float32 and rounded once; where factor is 1 nothing is read or written."""
    scale_fake(tensors, factor)
    if factor.item() == 1.0:
        return
    for tensor in tensors:
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        tensor.copy_(tensor.to(wide) * factor.to(tensor.device, wide))


_library.define(NORMS_SCHEMA, norms_reference, norms_fake, triton="tensor_norms")
_library.define(SCALE_SCHEMA, scale_reference, scale_fake, triton="tensor_norms")
