"""The operators: one file holds an operation's schema, reference, fake function and backward, in that order."""

from . import (
    attention,
    dequantize,
    gated_activation,
    glu_linear,
    int8_linear,
    int8_linear_outliers,
    int8_matmul,
    int8_training,
    int8_weight_only_linear,
    layer_norm,
    norm_linear,
    quantize_asymmetric,
    quantize_blockwise,
    quantize_colwise,
    quantize_rowwise,
    rms_norm,
)

__all__ = [
    "attention",
    "dequantize",
    "gated_activation",
    "glu_linear",
    "int8_linear",
    "int8_linear_outliers",
    "int8_matmul",
    "int8_training",
    "int8_weight_only_linear",
    "layer_norm",
    "norm_linear",
    "quantize_asymmetric",
    "quantize_blockwise",
    "quantize_colwise",
    "quantize_rowwise",
    "rms_norm",
]
