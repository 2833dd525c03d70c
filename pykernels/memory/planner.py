"""plan: the memory that a training step will take, before any weight exists."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import CausalLM, CausalLMConfig
from .contract import LayerShape, saved_bytes_per_token
from .recipe import DTYPES, Recipe
from .tracing import Timeline, trace_step

if TYPE_CHECKING:
    from .ranks import Ranks

DEVICES = ("cpu", "cuda")
ModelOrConfig = nn.Module | CausalLMConfig | Mapping[str, Any] | str | Path


class DoesNotFit(ValueError):
    """No recipe, or not the one asked for, fits the device. `needs` and `smallest`: bytes that the recipe takes, and
    that the smallest takes; `smallest_recipe` is that one, None where the model has no dial to search."""

    def __init__(self, message: str, needs: int, smallest: int, smallest_recipe: Recipe | None) -> None:
        super().__init__(message)
        self.needs, self.smallest, self.smallest_recipe = needs, smallest, smallest_recipe


@dataclass(frozen=True)
class Plan:
    """What a step takes on each device, in bytes.

    bytes: the most of each kind at any time: "parameters" (with buffers), "optimizer state", "gradients", "saved
    activations", "logits", "temporaries", and "in flight": parameters gathered and gradients not yet reduced.
    peak: the most at once; peak_phase and peak_operation say when; at_peak is what it is made of. phases: the peak of
    forward, backward and step. layers: bytes that each layer of a CausalLM keeps for backward.
    steps: (what to switch on, the peak after it), in order, where the recipe was searched for.
    """

    recipe: Recipe
    batch: int
    seq: int
    world_size: int
    device: str
    parameter_count: int
    peak: int
    peak_phase: str
    peak_operation: str
    at_peak: dict[str, int]
    bytes: dict[str, int]
    phases: dict[str, int]
    largest_temporary: int
    layers: tuple[int, ...] = ()
    device_memory: int | None = None
    steps: tuple[tuple[str, int], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is within device_memory; True where none was given."""
        return self.device_memory is None or self.peak <= self.device_memory

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "fits": self.fits}


def plan(
    model_or_config: ModelOrConfig,
    *,
    batch: int,
    seq: int,
    world_size: int = 1,
    recipe: Recipe | None = None,
    device_memory: int | None = None,
    device: str = "cuda",
    forward: Callable[[nn.Module], Tensor] | None = None,
) -> Plan:
    """The memory of a training step in the steady state, on each of world_size devices; nothing is allocated.

    The step is run on the meta device and every allocation followed, those inside this package's operators too. Not in
    it: the CUDA context and what its libraries take, fragmentation, and scratch that a kernel takes by itself.

    model_or_config: a CausalLMConfig, the dictionary or path of a Hugging Face config.json, or a module, meta or real
        (which is left as it is). forward: of a module that is no CausalLM, a function of the module on the meta device
        that gives the loss.
    batch, seq: sequences on each device, and tokens in one.
    recipe: None for the default Recipe; or, with device_memory, for the fastest that fits: pykernels.memory.search.
    device_memory: bytes. device: "cuda" or "cpu", whose kernels are followed.
    Errors: DoesNotFit (a ValueError) for a recipe that takes more than device_memory: by how much, and which is the
    smallest; ValueError for an argument outside these.
    """
    for name, value in (("batch", batch), ("seq", seq), ("world_size", world_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, accepts a whole number of 1 or more.")
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, accepts {', '.join(map(repr, DEVICES))}.")
    if device_memory is not None and device_memory < 1:
        raise ValueError(f"device_memory: got {device_memory}, accepts a number of bytes above 0.")
    if device == "cpu" and recipe is not None and recipe.offload:
        raise ValueError(f"offload: got {recipe.offload!r} with device 'cpu', accepts None: its memory is the host's.")
    if world_size > 1 and recipe is not None and recipe.offload and not recipe.stage:
        raise ValueError(f"offload: got {recipe.offload!r} with stage 0 on several devices, accepts stages 1 to 3.")
    where: dict[str, Any] = {"batch": batch, "seq": seq, "world_size": world_size, "device": device}
    config = config_of(model_or_config)
    if config is not None:
        from .search import search, smallest

        if recipe is None and device_memory is not None:
            return search(config, device_memory=device_memory, **where)
        made = plan_config(config, recipe or Recipe(), **where)
        if device_memory is not None and made.peak > device_memory:
            refuse(made, device_memory, smallest(config, dtype=made.recipe.dtype, **where))
        return dataclasses.replace(made, device_memory=device_memory)
    assert isinstance(model_or_config, nn.Module)
    made = plan_module(model_or_config, recipe or Recipe(dtype=_dtype_of(model_or_config)), forward, **where)
    if device_memory is not None and made.peak > device_memory:
        refuse(made, device_memory, None)
    return dataclasses.replace(made, device_memory=device_memory)


def config_of(model_or_config: ModelOrConfig) -> CausalLMConfig | None:
    """The configuration that is given, or that of a CausalLM; None for another module."""
    if isinstance(model_or_config, CausalLMConfig):
        return model_or_config
    if isinstance(model_or_config, CausalLM):
        return model_or_config.config
    if isinstance(model_or_config, nn.Module):
        return None
    if isinstance(model_or_config, str | Path):
        return CausalLMConfig.from_file(model_or_config)
    if isinstance(model_or_config, Mapping):
        return CausalLMConfig.from_dict(model_or_config)
    raise TypeError(
        f"model_or_config: got a {type(model_or_config).__name__}, accepts a torch.nn.Module, a CausalLMConfig, a "
        "dictionary or the path of a config.json."
    )


@functools.lru_cache(maxsize=256)
def plan_config(config: CausalLMConfig, recipe: Recipe, *, batch: int, seq: int, world_size: int, device: str) -> Plan:
    """The plan of a CausalLM."""
    model = recipe.model(config)
    ids = torch.empty(batch, seq, dtype=torch.int64, device="meta")
    line = trace_step(
        model,
        recipe.loss_of(model, ids, ids),
        recipe.make_optimizer(model.parameters()),
        device=device,
        vocabulary=config.vocab_size,
        sharding=sharding_of(model, recipe, world_size, device),
    )
    dial = (recipe.save,) * config.num_hidden_layers if isinstance(recipe.save, str) else recipe.save
    layers = (
        ()
        if recipe.eager
        else tuple(
            batch * seq * saved_bytes_per_token(layer_shape(config, size, recipe), save)
            for size, save in zip(config.intermediate_sizes, dial, strict=True)
        )
    )
    return _made(line, model, recipe, batch, seq, world_size, device, layers)


def layer_shape(config: CausalLMConfig, intermediate_size: int, recipe: Recipe) -> LayerShape:
    """A layer as the memory contract describes it."""
    return LayerShape(
        config.hidden_size,
        config.num_attention_heads,
        config.kv_heads,
        intermediate_size,
        DTYPES[recipe.dtype].itemsize,
        config.norm,
        head_dim=config.head_dim,
    )


def plan_module(
    model: nn.Module,
    recipe: Recipe,
    forward: Callable[[nn.Module], Tensor] | None,
    *,
    batch: int,
    seq: int,
    world_size: int,
    device: str,
) -> Plan:
    """The plan of any module, from a copy of it on the meta device."""
    if forward is None:
        raise ValueError(
            "forward: got None for a module that is no CausalLM, accepts a function that gives the loss of the module "
            "on the meta device, such as lambda model: model(torch.empty(4, 8192, 64, device='meta')).sum()."
        )
    copied = recipe.change_(meta_copy(model))
    line = trace_step(
        copied,
        lambda: forward(copied),
        recipe.make_optimizer([p for p in copied.parameters() if p.requires_grad]),
        device=device,
        sharding=sharding_of(copied, recipe, world_size, device),
    )
    return _made(line, copied, recipe, batch, seq, world_size, device, ())


def meta_copy(model: nn.Module) -> nn.Module:
    """The module with parameters and buffers on the meta device; those of the original are never copied."""
    known: dict[int, Any] = {}
    for p in model.parameters():
        known[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for buffer in model.buffers():
        known[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, known)


def sharding_of(model: nn.Module, recipe: Recipe, world_size: int, device: str) -> Ranks | None:
    """What one of several ranks holds beside the step; None for a single device."""
    from .ranks import Ranks

    return Ranks(model, recipe, world_size, device) if recipe.stage or world_size > 1 else None


def refuse(made: Plan, device_memory: int, least: Plan | None) -> None:
    """Raises DoesNotFit for a plan that is too large; least: the smallest there is."""
    message = (
        f"the recipe needs {gigabytes(made.peak)}, {gigabytes(made.peak - device_memory)} more than "
        f"{gigabytes(device_memory)}"
    )
    if least is None:
        raise DoesNotFit(message + ".", made.peak, made.peak, None)
    if least.peak > device_memory:
        message += f", and so does every other: the smallest, {describe(least.recipe)}, needs {gigabytes(least.peak)}."
    else:
        message += f": the smallest that fits, {describe(least.recipe)}, needs {gigabytes(least.peak)}."
    raise DoesNotFit(message, made.peak, least.peak, least.recipe)


def gigabytes(nbytes: float) -> str:
    """In units of 10^9, 10^6 or 10^3 bytes, to three digits."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.3g} {unit}" if abs(nbytes) < 1000 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes:.0f} bytes"


def describe(recipe: Recipe) -> str:
    """A recipe in a few words."""
    parts = [recipe.dtype, "plain PyTorch" if recipe.eager else _dial(recipe.save)]
    if recipe.int8_training:
        parts.append("INT8 training")
    parts.append(f"{recipe.state_bits}-bit {recipe.optimizer}")
    if recipe.stage:
        parts.append(f"ZeRO-{recipe.stage}")
    if recipe.offload:
        parts.append(f"offload={recipe.offload!r}")
    return ", ".join(parts)


def _dial(save: str | tuple[str, ...]) -> str:
    if isinstance(save, str):
        return f'save="{save}"'
    counts = {value: save.count(value) for value in dict.fromkeys(save)}
    if len(counts) == 1:
        return f'save="{save[0]}"'
    return "save " + " + ".join(f'"{value}" x {count}' for value, count in counts.items())


def _dtype_of(model: nn.Module) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return next((names[p.dtype] for p in model.parameters() if p.dtype in names), "float32")


def _made(
    line: Timeline,
    model: nn.Module,
    recipe: Recipe,
    batch: int,
    seq: int,
    world_size: int,
    device: str,
    layers: tuple[int, ...],
) -> Plan:
    return Plan(
        recipe=recipe,
        batch=batch,
        seq=seq,
        world_size=world_size,
        device=device,
        parameter_count=sum(p.numel() for p in model.parameters()),
        peak=line.peak,
        peak_phase=line.peak_phase,
        peak_operation=line.peak_operation,
        at_peak=line.at_peak,
        bytes=line.most,
        phases=line.phases,
        largest_temporary=line.largest_temporary,
        layers=layers,
    )
