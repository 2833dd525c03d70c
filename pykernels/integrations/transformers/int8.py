"""INT8 weights through transformers' from_pretrained and save_pretrained: a quantisation config and its quantiser."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ... import nn as pnn
from ...quantization import CheckpointError, Int8DynamicConfig, Int8WeightOnlyConfig, QuantizationReport, quantize_
from ...quantization.container import Entry, read_container
from ...quantization.places import Place, find_places, skip_reason
from ._version import needs

METHOD = "pykernels_int8"
MODES = ("dynamic", "weight_only")


@register_quantization_config(METHOD)
class PykernelsInt8Config(QuantizationConfigMixin):
    """INT8 weights for ``from_pretrained(folder, quantization_config=PykernelsInt8Config(...))``.

    Args:
        mode: "dynamic" for W8A8, activations quantised per token; "weight_only" for W8A16.
        group_size: columns that share a scale, for "weight_only"; None for one scale a row. It must divide the columns
            of every layer that is converted.
        modules_to_not_convert: names, or last parts of names, of linear layers that stay in float. The layer that makes
            logits always does.

    Every other ``torch.nn.Linear`` is converted, after the float weights are loaded: at its peak the model is held in
    its float dtype and in INT8. ``save_pretrained`` writes ``X.weight`` (int8) and ``X.scale`` (float32) and this
    config; after ``import pykernels.integrations.transformers`` the folder loads again without an argument, and the
    float weights never exist. Layers and scales are those of ``quantize_``.

    Raises:
        ValueError: an unknown mode, a group_size that is not a positive int or does not belong to the mode, or a field
            that is unknown. ImportError: transformers is older than 5; there, call ``quantize_`` on the loaded model.
    """

    def __init__(
        self,
        mode: str = "dynamic",
        group_size: int | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        *,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        needs(5, "PykernelsInt8Config", "load the model in float and call pykernels.quantize_ on it")
        if unknown or quant_method != METHOD:
            wrong = ", ".join([*unknown, *([] if quant_method == METHOD else [f"quant_method={quant_method!r}"])])
            raise ValueError(
                f"PykernelsInt8Config: got {wrong}, accepts mode, group_size and modules_to_not_convert: the folder "
                "may be of another quantisation, or of a newer pykernels"
            )
        if mode not in MODES:
            raise ValueError(f"PykernelsInt8Config: got mode {mode!r}, accepts {', '.join(map(repr, MODES))}")
        if mode == "dynamic" and group_size is not None:
            raise ValueError(
                f'PykernelsInt8Config: got group_size {group_size!r} with "dynamic", it needs "weight_only"'
            )
        Int8WeightOnlyConfig(group_size)  # for its check
        self.quant_method = METHOD  # type: ignore[assignment]
        self.mode, self.group_size = mode, group_size
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)

    def of_layers(self) -> Int8DynamicConfig | Int8WeightOnlyConfig:
        """The config for ``quantize_``."""
        return Int8DynamicConfig() if self.mode == "dynamic" else Int8WeightOnlyConfig(self.group_size)


@register_quantizer(METHOD)
class PykernelsInt8Quantizer(HfQuantizer):
    """What transformers calls around the loading of weights. ``report`` is that of ``quantize_``, if it ran."""

    quantization_config: PykernelsInt8Config
    report: QuantizationReport | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1:
            raise ValueError(
                f"PykernelsInt8Config: got a device_map of several places, {device_map}: quantise on one device, "
                "save_pretrained, and load that folder with the device_map"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        new = super().get_new_dtype(converter, param, dtype)
        if new is torch.int8:  # a float weight where codes belong: a cast would make zeros of it
            sources = ", ".join(getattr(converter, "source_patterns", ()))
            raise CheckpointError(
                f"{sources or 'a weight'}: the checkpoint holds float weights, and its config.json says that they are "
                "INT8 of pykernels: remove quantization_config from config.json, or get the folder again"
            )
        return new

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        layers = self._places(model)
        if checkpoint_files:
            self._check_files(layers, checkpoint_files)
        for place in layers:
            linear = place.module
            made = self._empty(linear, linear.weight.dtype if dtype is None else dtype)
            for parent, attribute in place.holders:
                parent._modules[attribute] = made.train(linear.training)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            chosen = {place.module for place in self._places(model)}
            self.report = quantize_(model, self.quantization_config.of_layers(), lambda module, name: module in chosen)

    def _places(self, model: Any) -> list[Place]:
        """The linear layers that are converted. ValueError where there is none."""
        spared, head = self.quantization_config.modules_to_not_convert or [], model.get_output_embeddings()
        config = self.quantization_config.of_layers()

        def keeps(name: str) -> bool:
            return any(name == one or name.endswith("." + one) or f".{one}." in f".{name}." for one in spared)

        found = [
            place
            for place in find_places(model)
            if place.module is not head
            and not any(map(keeps, place.names))
            and skip_reason(place, config, None) is None
        ]
        if not found:
            raise ValueError(
                f"PykernelsInt8Config: {type(model).__name__} has no torch.nn.Linear to convert beside its head "
                "(GPT-2's layers are Conv1D), or modules_to_not_convert names them all"
            )
        return found

    def _empty(self, linear: nn.Linear, dtype: torch.dtype) -> pnn.Int8Linear:
        options: dict[str, Any] = {"device": "meta", "dtype": dtype}
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        if self.quantization_config.mode == "dynamic":
            return pnn.Int8Linear(*sizes, **options)
        return pnn.Int8WeightOnlyLinear(*sizes, group_size=self.quantization_config.group_size, **options)

    def _check_files(self, layers: list[Place], files: Iterable[Any]) -> None:
        """CheckpointError where a layer's tensors are of another dtype or shape, or the scale is not there."""
        entries: dict[str, Entry] = {}
        for file in files:
            if str(file).endswith(".safetensors"):
                entries |= read_container(Path(file)).entries
        for place in layers:
            if f"{place.name}.weight" not in entries:
                continue
            made = self._empty(place.module, torch.float32)
            for name, kind in (("weight", "I8"), ("scale", "F32")):
                key, shape = f"{place.name}.{name}", tuple(getattr(made, name).shape)
                entry = entries.get(key)
                if entry is None or entry.dtype != kind or entry.shape != shape:
                    got = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                    raise CheckpointError(
                        f"{key}: got {got}, {type(made).__name__} accepts {kind} {list(shape)}: the weights "
                        f"are not those of the folder's quantization_config {self.quantization_config.to_dict()}. Save "
                        "it again, or mend config.json"
                    )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if isinstance(child, pnn.Int8Linear):
                    module._modules[name] = child.to_float(dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True
