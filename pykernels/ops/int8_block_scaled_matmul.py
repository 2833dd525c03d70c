"""int8_block_scaled_matmul: INT8 with a scale for each 1 x 128 of a and each 128 x 128 of b, added up in float32.

The recipe of DeepSeek-V3 (2024), section 3.3, with INT8 for its FP8: an outlier costs the precision of the 128
elements beside it, not that of its whole row.
"""

import torch

from .. import _library
from ._checks import FLOATS, check, check_device, check_dim, check_dtype, check_vector, names
from .quantize_blockwise import expand_blocks

NAME = "int8_block_scaled_matmul"
BLOCK = 128
SCHEMA = (
    f"{NAME}(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, ScalarType? out_dtype=None)"
    " -> Tensor"
)


def check_block_scale(
    op: str, name: str, scale: torch.Tensor, shape: list[int], of: str, other_name: str, other: torch.Tensor
) -> None:
    """float32 [rows, ceil(K / 128)] on the device of the codes."""
    check_dtype(op, name, scale, torch.float32)
    check_device(op, name, scale, other_name, other)
    check(
        list(scale.shape) == shape,
        op,
        f"expected {name} to have shape {shape}, one element for each {of}, got {list(scale.shape)}",
    )


def check_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
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
    blocks = -(-k // BLOCK)
    check_block_scale(NAME, "a_scale", a_scale, [m, blocks], "row's block of 128", "a", a)
    check_block_scale(NAME, "b_scale", b_scale, [-(-n // BLOCK), blocks], "tile of 128 x 128", "a", a)
    if bias is not None:
        check_dtype(NAME, "bias", bias, *FLOATS)
        check_device(NAME, "bias", bias, "the input", a)
        check_vector(NAME, "bias", bias, n, "output column")
    check(out_dtype in FLOATS, NAME, f"expected out_dtype to be {names(FLOATS)}, got {out_dtype}")


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or torch.float32
    check_arguments(a, b, a_scale, b_scale, bias, out_dtype)
    left = a.double() * expand_blocks(a_scale.double(), a.shape, [BLOCK])
    right = b.double() * expand_blocks(b_scale.double(), b.shape, [BLOCK, BLOCK])
    out = (left @ right.t()).float()
    return (out if bias is None else out + bias.float()).to(out_dtype)


def fake(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    out_dtype = out_dtype or torch.float32
    check_arguments(a, b, a_scale, b_scale, bias, out_dtype)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


_library.define(SCHEMA, reference, fake)


def int8_block_scaled_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """sum over blocks of K of (a_block @ b_block.T) * a_scale * b_scale, + bias: the accuracy option of INT8.

    a int8 [M, K] with a_scale float32 [M, ceil(K / 128)], as quantize_blockwise(x, 128) returns; b int8 [N, K] with
    b_scale float32 [ceil(N / 128), ceil(K / 128)], as quantize_blockwise(w, (128, 128)) returns; bias [N] -> [M, N] in
    out_dtype: float32 (default), bfloat16 or float16. Last blocks may be ragged.
    Each block's sum is exact (int32); blocks are added in float32, so K has no limit.
    Saves nothing for backward (not differentiable). Errors: RuntimeError names the argument, before anything runs.
    Source: DeepSeek-V3 (2024), section 3.3, there with FP8.
    """
    return torch.ops.pykernels.int8_block_scaled_matmul.default(a, b, a_scale, b_scale, bias, out_dtype)
