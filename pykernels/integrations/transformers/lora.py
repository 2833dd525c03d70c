"""PEFT's LoRA on INT8 layers: the base stays frozen INT8, the adapters are float and trained."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from ... import nn as pnn

Config = TypeVar("Config")


def int8_lora(config: Config) -> Config:
    """``peft.LoraConfig`` that also knows the INT8 layers of pykernels.nn; the config itself, changed, is returned.

    ``get_peft_model(model, int8_lora(LoraConfig(...)))``, and ``PeftModel.from_pretrained(model, folder,
    config=int8_lora(LoraConfig.from_pretrained(folder)))``. The base's weight is neither copied nor dequantised; the
    gradient of a layer's input passes through it as ``functional.int8_linear`` says. Adapters are in the default dtype
    and cannot be merged into codes: ``merge_and_unload`` raises NotImplementedError; dequantise first.

    Raises ImportError where peft is not installed, and TypeError for anything but a LoraConfig.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ImportError("int8_lora needs peft: pip install 'pykernels[transformers]'") from None
    if not isinstance(config, LoraConfig):
        raise TypeError(f"int8_lora: expected a peft.LoraConfig, got {type(config).__name__}")
    known: Any = config
    known._register_custom_module({pnn.Int8Linear: _layer_class()})
    return config


_made: list[type] = []


def _layer_class() -> type:
    """peft's LoRA layer, which computes base_layer(x) + B(A(x)) whatever the base is, without merging."""
    if not _made:
        from peft.tuners.lora import Linear

        class Int8LoraLinear(Linear):
            """A frozen INT8 layer and its LoRA adapters."""

            def __init__(self, base_layer: Any, *args: Any, **kwargs: Any) -> None:
                with warnings.catch_warnings():  # it says so of every class that is not peft's own
                    warnings.filterwarnings("ignore", message="Unsupported layer type")
                    super().__init__(base_layer, *args, **kwargs)

            def merge(self, *args: Any, **kwargs: Any) -> None:
                raise NotImplementedError(
                    "an adapter cannot be merged into INT8 codes: call model.dequantize(), or load the model in float, "
                    "and merge there"
                )

            def unmerge(self, *args: Any, **kwargs: Any) -> None:
                self.merge()

        _made.append(Int8LoraLinear)
    return _made[0]
