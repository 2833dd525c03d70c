"""Bad input: each operator names the argument, what it got and what it accepts, on every backend, before it runs."""

import pytest
import torch

import pykernels.functional as F
from tests.matrix import BACKENDS, DEVICE, use


def i8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8, device=DEVICE)


def f32(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE)


W = (i8(6, 8), f32(6))
BAD = {
    "int input": (lambda: F.quantize_rowwise(i8(2, 3)), "expected x to be float32, bfloat16 or float16, got int8"),
    "scalar input": (lambda: F.quantize_rowwise(f32()), "expected x to have at least 1 dimension, got 0"),
    "float64 input": (lambda: F.quantize_asymmetric(f32(2, 3).double()), "got float64"),
    "short static scale": (lambda: F.quantize_rowwise(f32(4, 3), scale=f32(3)), r"4 rows of x, got shape \[3\]"),
    "int static scale": (lambda: F.quantize_rowwise(f32(4, 3), scale=i8(4)), "expected scale to be float32, got int8"),
    "colwise of 3-D": (lambda: F.quantize_colwise(f32(2, 3, 4)), "expected x to have 2 dimensions, got 3"),
    "transposed of 1-D": (lambda: F.quantize_transposed(f32(3)), "expected x to have 2 dimensions, got 1"),
    "both of 1-D": (lambda: F.quantize_both(f32(3)), "expected x to have 2 dimensions, got 1"),
    "zero block": (lambda: F.quantize_blockwise(f32(2, 3), 0), "expected block_size"),
    "three block sizes": (lambda: F.quantize_blockwise(f32(2, 3), (1, 2, 3)), "expected block_size"),
    "2-D blocks of 3-D": (lambda: F.quantize_blockwise(f32(2, 3, 4), (2, 2)), "2 dimensions"),
    "float codes": (lambda: F.dequantize_rowwise(f32(2, 3), f32(2)), "expected q to be int8, got float32"),
    "long scale": (lambda: F.dequantize_rowwise(i8(2, 3), f32(3)), r"expected scale to have shape \[2, 1\]"),
    "int out_dtype": (lambda: F.dequantize_rowwise(i8(2, 3), f32(2), torch.int32), "expected out_dtype"),
    "float a": (lambda: F.int8_matmul(f32(2, 8), i8(6, 8)), "expected a to be int8, got float32"),
    "1-D b": (lambda: F.int8_matmul(i8(2, 8), i8(8)), "expected b to have 2 dimensions, got 1"),
    "K mismatch": (lambda: F.int8_matmul(i8(2, 8), i8(6, 9)), r"expected b to have shape \[N, 8\]"),
    "K too long": (lambda: F.int8_matmul(i8(1, 131072), i8(1, 131072)), "at most 131071.*got 131072"),
    "a_scale length": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), f32(3)), r"expected a_scale .*\[2\].*got \[3\]"),
    "b_scale dtype": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), None, f32(6).half()), "expected b_scale to be float32"),
    "bias length": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), bias=f32(5)), r"expected bias .*\[6\].*got \[5\]"),
    "residual shape": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), residual=f32(6)), "expected residual to have shape"),
    "zero point dtype": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), a_zero_point=i8(2)), "a_zero_point to be int32"),
    "b_sum alone": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), b_sum=f32(6).int()), "expected a_zero_point with b_sum"),
    "scaled int32": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), f32(2), out_dtype=torch.int32), "out_dtype int32"),
    "float64 out": (lambda: F.int8_matmul(i8(2, 8), i8(6, 8), out_dtype=torch.float64), "expected out_dtype"),
    "linear float weight": (lambda: F.int8_linear(f32(2, 8), (f32(6, 8), f32(6))), "expected weight to be int8"),
    "linear K": (lambda: F.int8_linear(f32(2, 9), W), r"expected weight to have shape \[N, 9\]"),
    "linear scale": (lambda: F.int8_linear(f32(2, 8), (W[0], f32(5))), "expected weight_scale"),
    "linear x_scale": (lambda: F.int8_linear(f32(2, 8), W, x_scale=f32(2)), "expected x_scale to have 1 element"),
    "linear int x": (lambda: F.int8_linear(i8(2, 8), W), "expected x to be float32, bfloat16 or float16, got int8"),
    "weight-only groups": (lambda: F.int8_weight_only_linear(f32(2, 8), (W[0], f32(6, 3))), "divisor of K = 8"),
    "weight-only bias": (lambda: F.int8_weight_only_linear(f32(2, 8), W, f32(7)), "expected bias"),
    "outlier columns missing": (lambda: F.int8_linear_outliers(f32(2, 8), W, mode="columns"), "columns and weight_fp"),
    "outlier weight shape": (
        lambda: F.int8_linear_outliers(f32(2, 8), W, f32(6, 3), columns=torch.tensor([1, 2], device=DEVICE)),
        r"expected weight_fp to have shape \[6, 2\]",
    ),
    "outlier threshold": (lambda: F.int8_linear_outliers(f32(2, 8), W, threshold=0.0), "threshold to be positive"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused_by_name(case: str, backend: str) -> None:
    call, message = BAD[case]
    with use(backend), pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("case", list(BAD))
def test_the_compiler_sees_the_same_error(case: str) -> None:
    """The fake functions check too, so that a traced model fails where an eager one does."""
    call, message = BAD[case]
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("function", [F.int8_matmul, F.int8_linear])
def test_unknown_activation(function) -> None:
    arguments = (i8(2, 8), i8(6, 8)) if function is F.int8_matmul else (f32(2, 8), W)
    with pytest.raises(ValueError, match="expected activation to be one of None, 'relu'"):
        function(*arguments, activation="swish")


def test_unknown_outlier_mode() -> None:
    with pytest.raises(ValueError, match="expected mode to be one of columns, row, batch"):
        F.int8_linear_outliers(f32(2, 8), W, mode="token")
