"""The shape of a causal language model, read from keywords or from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Layers of these model types are a TransformerBlock; those of others differ (a norm on query and key, experts, ...).
MODEL_TYPES = ("llama", "mistral", "qwen2")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS |= {"gelu_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class CausalLMConfig:
    """Sizes of a CausalLM, by the names of transformers' LlamaConfig.

    intermediate_size: of all layers, or one a layer. num_key_value_heads: None for num_attention_heads. head_dim: None
    for hidden_size / num_attention_heads. attention_bias: False, True (every linear layer but lm_head has one), or
    "qkv" as in Qwen2. hidden_act: "silu", "gelu" or "gelu_tanh". norm: "pre", Llama's RMSNorm, or "post", LayerNorm
    after each branch. rms_norm_eps: None for the norm's default.
    Errors: ValueError for a size below 1, heads that do not divide, or a number of intermediate sizes that is not the
    number of layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int | tuple[int, ...]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False
    attention_bias: bool | str = False
    hidden_act: str = "silu"
    norm: str = "pre"

    def __post_init__(self) -> None:
        if isinstance(self.intermediate_size, list):
            object.__setattr__(self, "intermediate_size", tuple(self.intermediate_size))
        for name in (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if value is None and name in ("num_key_value_heads", "head_dim"):
                continue
            for size in value if isinstance(value, tuple) else (value,):
                if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                    raise ValueError(f"{name}: got {value!r}, accepts a whole number of 1 or more.")
        if len(self.intermediate_sizes) != self.num_hidden_layers:
            raise ValueError(
                f"intermediate_size: got {len(self.intermediate_sizes)} sizes, accepts one, or one for each of the "
                f"{self.num_hidden_layers} layers."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, accepts a divisor of hidden_size "
                f"{self.hidden_size}."
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads: got {self.kv_heads}, accepts a divisor of num_attention_heads "
                f"{self.num_attention_heads}."
            )

    @property
    def kv_heads(self) -> int:
        """Heads of key and value."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def intermediate_sizes(self) -> tuple[int, ...]:
        """One a layer."""
        sizes = self.intermediate_size
        return sizes if isinstance(sizes, tuple) else (sizes,) * self.num_hidden_layers

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CausalLMConfig:
        """Reads a Hugging Face configuration of model_type "llama", "mistral" or "qwen2", or one of these fields.

        Not read: what changes neither shapes nor memory (dtype, token ids), rope_scaling and sliding_window: a CausalLM
        attends to all earlier positions and turns by rope_theta alone.
        Errors: ValueError that names the missing field, or the value that no CausalLM has.
        """
        kind = values.get("model_type")
        if kind is not None and kind not in MODEL_TYPES:
            raise ValueError(f"model_type: got {kind!r}, accepts {', '.join(map(repr, MODEL_TYPES))}.")
        if missing := [name for name in REQUIRED if values.get(name) is None]:
            raise ValueError(f"the configuration lacks {', '.join(map(repr, missing))}: give each a value.")
        known = {name: values[name] for name in cls.__dataclass_fields__ if values.get(name) is not None}
        rope = values.get("rope_parameters")
        if isinstance(rope, Mapping) and "rope_theta" in rope:
            known["rope_theta"] = rope["rope_theta"]
        known["attention_bias"] = _bias(values, kind)
        act = values.get("hidden_act", "silu")
        if act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act: got {act!r}, accepts {', '.join(map(repr, _ACTIVATIONS))}.")
        known["hidden_act"] = _ACTIVATIONS[act]
        return cls(**known)

    @classmethod
    def from_file(cls, path: str | Path) -> CausalLMConfig:
        """Reads a config.json, or that of a folder. Errors: ValueError names the file and what is wrong with it."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}.") from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON in UTF-8 ({error}).") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}.")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _bias(values: Mapping[str, Any], kind: str | None) -> bool | str:
    if kind == "qwen2":
        return "qkv"
    attention, mlp = values.get("attention_bias") or False, values.get("mlp_bias")
    if kind is not None and attention is True and not mlp:
        raise ValueError("attention_bias: got true without mlp_bias, accepts both, or neither.")
    if mlp and attention is not True:
        raise ValueError("mlp_bias: got true without attention_bias, accepts both, or neither.")
    return attention
