"""The operators: one file holds an operation's schema, reference, fake function and backward, in that order."""

from . import (
    dequantize,
    dropout,
    int8_linear,
    int8_linear_outliers,
    int8_matmul,
    int8_training,
    int8_weight_only_linear,
    quantize_asymmetric,
    quantize_blockwise,
    quantize_colwise,
    quantize_rowwise,
    rope,
)

__all__ = [
    "dequantize",
    "dropout",
    "int8_linear",
    "int8_linear_outliers",
    "int8_matmul",
    "int8_training",
    "int8_weight_only_linear",
    "quantize_asymmetric",
    "quantize_blockwise",
    "quantize_colwise",
    "quantize_rowwise",
    "rope",
]
