"""Argument checks shared by the references and the Triton path; the C++ bindings say the same in the same words."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# One more product of 127 * 127 could leave the range of an int32 accumulator that a later one has to hold.
MAX_K = 131071


class ArgumentError(ValueError, RuntimeError):
    """An argument is not what an operation accepts: a ValueError, and a RuntimeError as PyTorch's operators raise."""


Function = TypeVar("Function", bound=Callable[..., Any])


def names_argument(function: Function) -> Function:
    """Makes an ArgumentError of what a compiled kernel refuses, without the place in its source."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            place, found, message = str(error).partition(": expected ")
            if not found or type(error) is not RuntimeError:
                raise
            raise ArgumentError(f"{place.split(', ')[-1]}: expected {message}") from None

    return call  # type: ignore[return-value]


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def names(dtypes: Sequence[torch.dtype]) -> str:
    """The dtypes as an English list."""
    words = [dtype_name(dtype) for dtype in dtypes]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def check(condition: bool, op: str, message: str) -> None:
    """Raises ArgumentError when the condition does not hold."""
    if not condition:
        raise ArgumentError(f"{op}: {message}")


def check_dtype(op: str, name: str, tensor: torch.Tensor, *accepted: torch.dtype) -> None:
    """The tensor has one of the accepted dtypes."""
    check(tensor.dtype in accepted, op, f"expected {name} to be {names(accepted)}, got {dtype_name(tensor.dtype)}")


def check_device(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both tensors are on one device."""
    check(
        tensor.device == other.device,
        op,
        f"expected {name} on the device of {other_name} ({other.device}), got {tensor.device}",
    )


def check_dim(op: str, name: str, tensor: torch.Tensor, dim: int) -> None:
    """The tensor has exactly dim dimensions."""
    plural = "" if dim == 1 else "s"
    check(tensor.dim() == dim, op, f"expected {name} to have {dim} dimension{plural}, got {tensor.dim()}")


def check_float_input(op: str, name: str, x: torch.Tensor) -> None:
    """A float32, bf16 or fp16 tensor with at least one dimension."""
    check_dtype(op, name, x, *FLOATS)
    check(x.dim() >= 1, op, f"expected {name} to have at least 1 dimension, got 0")


def check_vector(op: str, name: str, tensor: torch.Tensor, length: int, of: str) -> None:
    """A vector with one element for each of `length` things."""
    check(
        tensor.dim() == 1 and tensor.numel() == length,
        op,
        f"expected {name} to have shape [{length}], one element for each {of}, got {list(tensor.shape)}",
    )


def check_one_or_each(op: str, name: str, tensor: torch.Tensor, length: int, of: str) -> None:
    """One element, or a vector with one for each of `length` things."""
    check(
        tensor.numel() == 1 or (tensor.dim() == 1 and tensor.numel() == length),
        op,
        f"expected {name} to have 1 element or shape [{length}], one for each {of}, got {list(tensor.shape)}",
    )


def check_k(op: str, k: int) -> None:
    """The contraction is short enough for exact int32 accumulation."""
    check(k <= MAX_K, op, f"expected K to be at most {MAX_K}, so that int32 accumulation is exact, got {k}: split K")
