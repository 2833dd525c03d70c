"""The operators: one file holds an operation's schema, reference, fake function and backward, in that order."""

from . import (
    dequantize,
    gated_activation,
    int8_linear,
    int8_linear_outliers,
    int8_matmul,
    int8_training,
    int8_weight_only_linear,
    layer_norm,
    quantize_asymmetric,
    quantize_blockwise,
    quantize_colwise,
    quantize_rowwise,
    rms_norm,
)

__all__ = [
    "dequantize",
    "gated_activation",
    "int8_linear",
    "int8_linear_outliers",
    "int8_matmul",
    "int8_training",
    "int8_weight_only_linear",
    "layer_norm",
    "quantize_asymmetric",
    "quantize_blockwise",
    "quantize_colwise",
    "quantize_rowwise",
    "rms_norm",
]
