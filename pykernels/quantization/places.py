"""Where a model holds weight matrices, and whether ``quantize_`` may convert each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .. import nn as pnn
from ..nn._int8_module import Int8Module
from .config import Int8TrainingConfig, Int8WeightConfig, QuantizationConfig

FilterFn = Callable[[nn.Module, str], bool]

CONTRACTION_LIMIT = 131_071  # 127 * 127 * in_features must stay below 2^31
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Place:
    """A module and every (parent, attribute) that holds it; ``names`` are those places' dotted names."""

    module: Any
    names: tuple[str, ...]
    holders: tuple[tuple[nn.Module, str], ...]

    @property
    def name(self) -> str:
        return self.names[0]


def find_places(model: nn.Module) -> list[Place]:
    """Modules below ``model`` that own a weight matrix, each once."""
    names: dict[nn.Module, list[str]] = {}
    holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent_name, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None and _has_matrix(child):
                names.setdefault(child, []).append(f"{parent_name}.{attribute}" if parent_name else attribute)
                holders.setdefault(child, []).append((parent, attribute))
    return [Place(module, tuple(where), tuple(holders[module])) for module, where in names.items()]


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    return parametrize.is_parametrized(module, "weight") or (weight is not None and weight.dim() >= 2)


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """For the id of each parameter, the names of all modules that own it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def default_filter(module: nn.Module, name: str) -> bool:
    """Every ``nn.Linear`` except one called ``lm_head``."""
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head"


def skip_reason(place: Place, config: QuantizationConfig, filter_fn: FilterFn | None) -> str | None:
    """Why ``quantize_`` leaves this module alone, or None where it converts it."""
    module = place.module
    if isinstance(module, Int8Module | pnn.CastLinear):
        return "already converted"
    if filter_fn is not None:
        if not any(filter_fn(module, name) for name in place.names):
            return "filter_fn did not select it"
    elif isinstance(module, nn.Embedding):
        return "an embedding stays in float unless filter_fn selects it"
    elif isinstance(module, nn.Linear) and not all(default_filter(module, name) for name in place.names):
        return "lm_head stays in float unless filter_fn selects it"
    return _unfit_reason(module, config, place.name)


def _unfit_reason(module: Any, config: QuantizationConfig, name: str) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    if isinstance(module, nn.Embedding):
        if not isinstance(config, Int8WeightConfig):
            return f"{type(config).__name__} converts linear layers only"
    elif not isinstance(module, nn.Linear):
        return "not a torch.nn.Linear"
    elif isinstance(module, pnn.Int8TrainingLinear):
        if isinstance(config, Int8TrainingConfig):
            return "already converted"
    elif type(module) is not nn.Linear:
        return "a subclass of torch.nn.Linear, which may compute something else"
    if type(module.weight) is not nn.Parameter:
        return f"its weight is a {type(module.weight).__name__}: quantise before sharding or wrapping"
    if module.weight.dtype not in _FLOATS:
        return f"its weight is {module.weight.dtype}, not float32, bfloat16 or float16"
    if isinstance(module, nn.Linear) and isinstance(config, Int8WeightConfig):
        if module.in_features > CONTRACTION_LIMIT:
            return f"in_features {module.in_features} is over {CONTRACTION_LIMIT}: the int32 sum could overflow"
        calibration = getattr(config, "calibration", None)
        if calibration is not None and name not in calibration.inputs:
            return "the calibration never ran it"
    return None
