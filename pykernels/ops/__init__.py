"""The operators: one file holds an operation's schema, reference, fake function and backward, in that order."""

from . import (
    cross_entropy,
    cross_entropy_tiles,
    dequantize,
    int8_linear,
    int8_linear_outliers,
    int8_matmul,
    int8_training,
    int8_weight_only_linear,
    linear_cross_entropy,
    quantize_asymmetric,
    quantize_blockwise,
    quantize_colwise,
    quantize_rowwise,
)

__all__ = [
    "cross_entropy",
    "cross_entropy_tiles",
    "dequantize",
    "int8_linear",
    "int8_linear_outliers",
    "int8_matmul",
    "int8_training",
    "int8_weight_only_linear",
    "linear_cross_entropy",
    "quantize_asymmetric",
    "quantize_blockwise",
    "quantize_colwise",
    "quantize_rowwise",
]
