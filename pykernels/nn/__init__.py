"""Layers. Each is a drop-in for the layer of torch.nn that its name ends in."""

from __future__ import annotations

from ..quantization.config import (
    Int8DynamicConfig,
    Int8OutlierConfig,
    Int8StaticConfig,
    Int8WeightConfig,
    Int8WeightOnlyConfig,
)
from ._save import SAVE
from .attention import Attention
from .cast_linear import CastLinear
from .causal_lm import CausalLM
from .causal_lm_config import CausalLMConfig
from .cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from .distillation import DistillationLoss, LinearDistillationLoss
from .dropout import Dropout
from .gated_activation import GEGLU, ReGLU, ReLU2, SwiGLU
from .int8_embedding import Int8Embedding
from .int8_grouped_linear import Int8GroupedLinear
from .int8_linear import Int8Linear
from .int8_linear_outliers import Int8OutlierLinear
from .int8_training import Int8TrainingLinear
from .int8_weight_only_linear import Int8WeightOnlyLinear
from .layer_norm import LayerNorm
from .mlp import GEGLUMLP, SwiGLUMLP
from .norm_linear import NormLinear
from .rms_norm import RMSNorm
from .transformer_block import TransformerBlock

__all__ = [
    "GEGLU",
    "GEGLUMLP",
    "SAVE",
    "Attention",
    "CastLinear",
    "CausalLM",
    "CausalLMConfig",
    "CrossEntropyLoss",
    "DistillationLoss",
    "Dropout",
    "Int8Embedding",
    "Int8GroupedLinear",
    "Int8Linear",
    "Int8OutlierLinear",
    "Int8TrainingLinear",
    "Int8WeightOnlyLinear",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "NormLinear",
    "RMSNorm",
    "ReGLU",
    "ReLU2",
    "SwiGLU",
    "SwiGLUMLP",
    "TransformerBlock",
]

_LINEAR_CLASSES: dict[type, type[Int8Linear]] = {
    Int8DynamicConfig: Int8Linear,
    Int8StaticConfig: Int8Linear,
    Int8WeightOnlyConfig: Int8WeightOnlyLinear,
    Int8OutlierConfig: Int8OutlierLinear,
}


def linear_class_for(config: Int8WeightConfig) -> type[Int8Linear]:
    """The layer that a config asks for; raises TypeError for anything else."""
    try:
        return _LINEAR_CLASSES[type(config)]
    except KeyError:
        accepts = ", ".join(known.__name__ for known in _LINEAR_CLASSES)
        raise TypeError(f"config: got {config!r}, accepts {accepts}.") from None
