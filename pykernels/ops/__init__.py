"""The operators: one file holds an operation's schema, reference, fake function and backward, in that order."""

from . import (
    dequantize,
    distillation,
    int8_linear,
    int8_linear_outliers,
    int8_matmul,
    int8_training,
    int8_weight_only_linear,
    linear_distillation,
    linear_kl_div,
    quantize_asymmetric,
    quantize_blockwise,
    quantize_colwise,
    quantize_rowwise,
)

__all__ = [
    "dequantize",
    "distillation",
    "int8_linear",
    "int8_linear_outliers",
    "int8_matmul",
    "int8_training",
    "int8_weight_only_linear",
    "linear_distillation",
    "linear_kl_div",
    "quantize_asymmetric",
    "quantize_blockwise",
    "quantize_colwise",
    "quantize_rowwise",
]
