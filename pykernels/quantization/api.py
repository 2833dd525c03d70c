"""``quantize_``: convert the linear layers of a model in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import nn as pnn
from ..nn._hooks import HOOKS
from .config import BF16Config, FP16Config, Int8TrainingConfig, Int8WeightConfig, QuantizationConfig
from .places import FilterFn, Place, find_places, skip_reason, tied_names
from .report import Converted, QuantizationReport, Skipped, model_bytes, storage_bytes


def quantize_(model: nn.Module, config: QuantizationConfig, filter_fn: FilterFn | None = None) -> QuantizationReport:
    """Replace the linear layers of ``model`` by the ones that ``config`` asks for, in place.

    Every replacement is made first, and they are swapped in only when all succeeded: on an error, ``model`` is as it
    was. So at its peak the model is held once as it was and once as it will be (with INT8 of a float32 model,
    1.25 times its bytes); the replaced weights are freed on return unless something else holds them.

    Args:
        model: the module that holds the layers. Training mode, hooks and shared modules are kept.
        config: ``Int8DynamicConfig()``, ``Int8WeightOnlyConfig(group_size)``, ``Int8StaticConfig(calibration)``,
            ``Int8OutlierConfig(threshold, calibration)``, ``Int8TrainingConfig()``, ``BF16Config()``, ``FP16Config()``.
        filter_fn: called as ``filter_fn(module, name)``; True converts. By default every ``nn.Linear`` but
            ``lm_head``. An ``nn.Embedding`` that it selects becomes ``Int8Embedding`` under an INT8 weight config.

    Returns:
        A ``QuantizationReport``; ``print`` it.

    Raises:
        TypeError: ``model`` or ``config`` is of another type, or ``model`` itself is the layer to replace.
        ValueError: a weight or bias is not finite, or does not fit the config. The message names the module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, accepts torch.nn.Module.")
    if not isinstance(config, QuantizationConfig):
        raise TypeError(f"config: got {config!r}, accepts one of pykernels' configs, such as Int8DynamicConfig().")
    if isinstance(model, nn.Linear):
        raise TypeError(
            "model: got a torch.nn.Linear, which cannot replace itself; accepts a module that holds it."
            " For one layer use pykernels.nn.Int8Linear.from_float."
        )
    ties = tied_names(model)
    report = QuantizationReport(config, bytes_before=model_bytes(model))
    replacements: list[tuple[Place, nn.Module]] = []
    quantized: dict[tuple[int, torch.Size], Any] = {}
    for place in find_places(model):
        reason = skip_reason(place, config, filter_fn)
        if reason is not None:
            report.skipped.append(Skipped(place.name, type(place.module).__name__, reason))
            continue
        after = _convert(place.module, config, place.name)
        shared = _share_codes(place.module, after, quantized)
        others = [name for name in ties[id(place.module.weight)] if name not in place.names]
        note = f"weight {'shared with' if shared else 'was tied to'} {', '.join(others)}" if others else ""
        replacements.append((place, after))
        report.converted.append(_converted(place, after, note))
    for place, after in replacements:
        _swap(place, after)
    return QuantizationReport(config, report.converted, report.skipped, report.bytes_before, model_bytes(model))


def _convert(module: Any, config: QuantizationConfig, name: str) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return pnn.Int8Embedding.from_float(module, name=name)
    if isinstance(config, Int8WeightConfig):
        return pnn.Int8Linear.from_float(module, config, name=name)
    if isinstance(config, Int8TrainingConfig):
        return pnn.Int8TrainingLinear.from_float(module, config)
    dtype = {BF16Config: torch.bfloat16, FP16Config: torch.float16}[type(config)]
    return pnn.CastLinear.from_float(module, dtype, name=name)


def _share_codes(before: Any, after: Any, quantized: dict[tuple[int, torch.Size], Any]) -> bool:
    """Let layers whose float weight was one tensor hold one INT8 tensor too."""
    if type(after) not in (pnn.Int8Linear, pnn.Int8WeightOnlyLinear, pnn.Int8Embedding):
        return False
    first = quantized.setdefault((id(before.weight), after.scale.shape), after)
    after.weight, after.scale = first.weight, first.scale
    return first is not after


def _converted(place: Place, after: nn.Module, note: str) -> Converted:
    def tensors(module: nn.Module) -> list[torch.Tensor]:
        return [*module.parameters(), *module.buffers()]

    return Converted(
        name=place.name,
        before=type(place.module).__name__,
        after=type(after).__name__,
        bytes_before=storage_bytes(tensors(place.module)),
        bytes_after=storage_bytes(tensors(after)),
        names=place.names,
        note=note,
    )


def _swap(place: Place, after: nn.Module) -> None:
    # Share the dicts themselves: a RemovableHandle made before still removes its hook.
    for hooks in HOOKS:
        after.__dict__[hooks] = place.module.__dict__[hooks]
    for parent, attribute in place.holders:
        parent._modules[attribute] = after
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # keep it off its fused path, which reads float weights
