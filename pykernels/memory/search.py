"""The fastest recipe that fits a device, by operations counted, and what each layer of it keeps.

Cost is in floating-point operations a step on one device: those of the matrix products of forward and backward,
repeated ones included, and what else takes time put into the same unit by rates stated here. The rates are round
numbers of a current accelerator (4e14 operations a second in 16 bits): they decide between recipes, and promise no
speed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..nn import SAVE, CausalLM, CausalLMConfig, TransformerBlock
from ..quantization import Int8TrainingConfig, quantize_
from .planner import DoesNotFit, Plan, describe, gigabytes, plan_config
from .recipe import DTYPES, Recipe
from .tracing import LayerTrace, trace_layer

LINK = 2_000  # operations in the time of a byte between devices: 200 GB/s
HOST_LINK = 16_000  # in that of a byte between device and host: 25 GB/s
INT8_SPEED = 2  # of INT8 products against 16-bit ones
INT8_COPIES = 0.02  # time to write and read save="int8"'s copies, of the layer's products
DIAL = SAVE[1:]  # "all" repeats as few products as "inputs+preact" and keeps more
UNITS = 1 << 15  # the budget is counted in so many units
OPTIMISM = 1.05  # of the first budget: the moments that it is kept for are summed from each one's own worst


@dataclass(frozen=True)
class LayerProfile:
    """A layer with one value of the dial: its memory, and the operations of its products, forward and backward."""

    memory: LayerTrace
    flops: float
    parameters: int  # elements


def search(
    config: CausalLMConfig,
    *,
    batch: int,
    seq: int,
    device_memory: int,
    world_size: int = 1,
    device: str = "cuda",
    dtype: str = "bfloat16",
    int8_training: bool = False,
) -> Plan:
    """The plan of the cheapest recipe whose peak is at most device_memory bytes.

    Tried are 32- and 8-bit state, the stages of ZeRO (with world_size above 1), the optimizer's state in host memory
    and, with int8_training, training in INT8; for each of them what every layer keeps is chosen by dynamic programming
    (csrc/host/placement.h) over what the layers keep, hold at work and repeat, so that no moment of forward and
    backward is above the budget. Of equal cost the fewer approximations win. The winner's whole step is then run on the
    meta device; where that is above device_memory, the search goes on with as much less. Layers are counted in
    units of 1/32,768 of the budget, rounded up.
    Errors: DoesNotFit says by how much the smallest recipe is too large, and which it is.
    """
    where: dict[str, Any] = {"batch": batch, "seq": seq, "world_size": world_size, "device": device}
    host = _host()
    found: list[tuple[float, int, Recipe]] = []
    budgets = dict.fromkeys(_recipes(dtype, world_size, int8_training, device), int(OPTIMISM * device_memory))
    for recipe, budget in budgets.items():
        found += _placed(host, config, recipe, budget, **where)
    while found:
        found.sort(key=lambda entry: entry[:2])
        recipe = found.pop(0)[2]
        made = plan_config(config, recipe, **where)
        if made.peak <= device_memory:
            steps = tuple(ladder(config, recipe, **where))
            return dataclasses.replace(made, device_memory=device_memory, steps=steps)
        base = dataclasses.replace(recipe, save=DIAL[0])
        budgets[base] -= max(made.peak - device_memory, device_memory // 500)
        found += _placed(host, config, base, budgets[base], **where)
    least = smallest(config, dtype=dtype, **where)
    if least.peak <= device_memory:
        return dataclasses.replace(
            least, device_memory=device_memory, steps=tuple(ladder(config, least.recipe, **where))
        )
    raise DoesNotFit(
        f"no recipe fits {gigabytes(device_memory)}: the smallest, {describe(least.recipe)}, needs "
        f"{gigabytes(least.peak)}, {gigabytes(least.peak - device_memory)} more. A smaller batch or seq, or more "
        "devices, would take less.",
        least.peak,
        least.peak,
        least.recipe,
    )


def smallest(
    config: CausalLMConfig, *, batch: int, seq: int, world_size: int, device: str, dtype: str = "bfloat16"
) -> Plan:
    """The plan of the recipe with the lowest peak that is found: one value of the dial for all layers, or the placement
    at the lowest budget for which there is one."""
    where: dict[str, Any] = {"batch": batch, "seq": seq, "world_size": world_size, "device": device}
    base = Recipe(
        dtype,
        state_bits=8,
        rounding=_rounding(dtype),
        stage=3 if world_size > 1 else 0,
        offload=None if device == "cpu" else "parameters" if world_size > 1 else "optimizer",
    )
    plans = [plan_config(config, dataclasses.replace(base, save=save), **where) for save in DIAL[1:]]
    least = min(plans, key=lambda made: made.peak)
    if (host := _host(required=False)) is None:
        return least
    low, high = least.peak // 2, int(1.1 * least.peak)
    placed: list[tuple[float, int, Recipe]] = []
    while high - low > least.peak // 1000:
        middle = (low + high) // 2
        if found := _placed(host, config, base, middle, **where):
            placed, high = found, middle
        else:
            low = middle
    plans = [plan_config(config, recipe, **where) for _, _, recipe in placed]
    return min([least, *plans], key=lambda made: made.peak)


def ladder(
    config: CausalLMConfig, recipe: Recipe, *, batch: int, seq: int, world_size: int, device: str
) -> Iterator[tuple[str, int]]:
    """(what to switch on, the peak after it), from plain PyTorch to the recipe: what costs least first."""
    where: dict[str, Any] = {"batch": batch, "seq": seq, "world_size": world_size, "device": device}
    now = Recipe.baseline(recipe.dtype)
    yield f"plain PyTorch, {recipe.dtype}", plan_config(config, now, **where).peak
    changes = (
        ("fused layers and linear_cross_entropy", {"eager": False, "loss": "linear_cross_entropy"}),
        (f"{recipe.state_bits}-bit {recipe.optimizer}", ("optimizer", "state_bits", "rounding")),
        (f"ZeRO stage {recipe.stage}", ("stage",)),
        ("INT8 training", ("int8_training",)),
        (describe(recipe).split(", ")[1], ("save",)),
        (f"offload={recipe.offload!r}", ("offload",)),
    )
    for what, change in changes:
        values = change if isinstance(change, dict) else {name: getattr(recipe, name) for name in change}
        then = dataclasses.replace(now, **values)
        if then != now:
            now = then
            yield what, plan_config(config, now, **where).peak


def _recipes(dtype: str, world_size: int, int8_training: bool, device: str) -> Iterator[Recipe]:
    for int8, bits, stage, offload in itertools.product(
        (False, True) if int8_training else (False,),
        (32, 8),
        (0, 1, 2, 3) if world_size > 1 else (0,),
        (None,) if device == "cpu" else (None, "optimizer"),
    ):
        if offload and not stage and world_size > 1:
            continue
        yield Recipe(
            dtype, int8_training=int8, state_bits=bits, rounding=_rounding(dtype), stage=stage, offload=offload
        )


def _rounding(dtype: str) -> str:
    return {"bfloat16": "stochastic", "float16": "kahan"}.get(dtype, "nearest")


def _placed(
    host: Any,
    config: CausalLMConfig,
    recipe: Recipe,
    budget: int,
    *,
    batch: int,
    seq: int,
    world_size: int,
    device: str,
) -> list[tuple[float, int, Recipe]]:
    """[(cost, approximations, the recipe with its dial)], or nothing where it does not fit."""
    fixed, head, gradient_share = _around(
        config, dataclasses.replace(recipe, save=DIAL[0]), batch, seq, world_size, device
    )
    layers, gradients, after = [], [], 0
    itemsize = DTYPES[recipe.dtype].itemsize
    for size in reversed(config.intermediate_sizes):
        options = [
            _profile(config, size, save, recipe.dtype, recipe.int8_training, batch, seq, device) for save in DIAL
        ]
        least = options[0].flops
        extra = [
            o.flops - least + (INT8_COPIES * least if s == "int8" else 0) for o, s in zip(options, DIAL, strict=True)
        ]
        layers.append(
            [(o.memory.saved, o.memory.forward, o.memory.backward, e) for o, e in zip(options, extra, strict=True)]
        )
        gradients.append(after)
        after += int(gradient_share * options[0].parameters * itemsize)
    layers.reverse()
    gradients.reverse()
    left = budget - fixed
    if left <= 0:
        return []
    found = host.place_layers(layers, gradients, head, left, max(1, left // UNITS))
    if found is None:
        return []
    choices, _, cost = found
    save = tuple(DIAL[choice] for choice in choices)
    uniform: str | tuple[str, ...] = save[0] if len(set(save)) == 1 else save
    approximations = save.count("int8") + recipe.int8_training + (recipe.state_bits == 8)
    cost += _other_cost(config, recipe, batch, seq, world_size, device)
    return [(cost, approximations, dataclasses.replace(recipe, save=uniform))]


@functools.lru_cache(maxsize=256)
def _around(
    config: CausalLMConfig, recipe: Recipe, batch: int, seq: int, world_size: int, device: str
) -> tuple[int, int, float]:
    """Bytes that are there all the time; what loss and head hold beside what the layers keep; the share of each
    gradient that stays."""
    from ..distributed.replicated import BUCKET_BYTES, IN_FLIGHT  # here: it brings torch's engine with it

    model = CausalLM(config, device="meta", dtype=DTYPES[recipe.dtype])
    whole = sum(p.nbytes for p in model.parameters())
    layer = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    rest = whole - sum(p.nbytes for p in model.model.layers.parameters())
    state = _state_bytes(config, recipe.dtype, recipe.state_bits, recipe.rounding)
    share = 1.0 / world_size if recipe.stage else 1.0
    # About what pykernels.memory.ranks finds at the end of forward, when most is kept for backward.
    fixed = {
        0: whole if world_size == 1 else 2 * whole,
        1: whole + min(whole, IN_FLIGHT * BUCKET_BYTES),
        2: share * whole + whole,
        3: share * whole + rest + 2 * layer,
    }[recipe.stage]
    gradients = share if recipe.stage or world_size == 1 else 0.0
    return (
        int(fixed + (0 if recipe.offload else share * state)),
        _head(config, recipe.dtype, batch, seq, device),
        gradients,
    )


@functools.lru_cache(maxsize=256)
def _head(config: CausalLMConfig, dtype: str, batch: int, seq: int, device: str) -> int:
    """What loss and head hold beside parameters, state and the input of the layers: of a model with one small layer."""
    one = dataclasses.replace(config, num_hidden_layers=1, intermediate_size=1)
    made = plan_config(one, Recipe(dtype, save="checkpoint"), batch=batch, seq=seq, world_size=1, device=device)
    inputs = batch * seq * config.hidden_size * DTYPES[dtype].itemsize
    return max(0, made.peak - made.at_peak["parameters"] - made.at_peak["optimizer state"] - inputs)


@functools.lru_cache(maxsize=256)
def _state_bytes(config: CausalLMConfig, dtype: str, state_bits: int, rounding: str) -> int:
    model = CausalLM(config, device="meta", dtype=DTYPES[dtype])
    optimizer = Recipe(dtype, state_bits=state_bits, rounding=rounding).make_optimizer(model.parameters())
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.nbytes for t in kept if t.is_meta)


@functools.lru_cache(maxsize=4096)
def _profile(
    config: CausalLMConfig, intermediate_size: int, save: str, dtype: str, int8: bool, batch: int, seq: int, device: str
) -> LayerProfile:
    from torch.utils.flop_counter import FlopCounterMode

    one = dataclasses.replace(config, num_hidden_layers=1, intermediate_size=intermediate_size, vocab_size=1)
    model = CausalLM(one, save=save, device="meta", dtype=DTYPES[dtype])
    if int8:
        quantize_(model, Int8TrainingConfig())
    layer = model.model.layers[0]
    assert isinstance(layer, TransformerBlock)
    shape = (batch, seq, config.hidden_size)
    memory = trace_layer(layer, list(layer.parameters()), shape, DTYPES[dtype], device)
    x = torch.empty(shape, dtype=DTYPES[dtype], device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
        y.backward(torch.empty_like(y))
    flops = float(counter.get_total_flops())
    if int8:
        products = 6 * batch * seq * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        flops -= products * (1 - 1 / INT8_SPEED)
    return LayerProfile(memory, flops, sum(p.numel() for p in layer.parameters()))


def _other_cost(config: CausalLMConfig, recipe: Recipe, batch: int, seq: int, world_size: int, device: str) -> float:
    """What the recipe costs beside what its layers repeat: communication, the way to the host, less what INT8 saves."""
    layers = [
        _profile(config, size, DIAL[0], recipe.dtype, recipe.int8_training, batch, seq, device)
        for size in config.intermediate_sizes
    ]
    elements = sum(layer.parameters for layer in layers) + config.vocab_size * config.hidden_size * (
        1 if config.tie_word_embeddings else 2
    )
    nbytes = elements * DTYPES[recipe.dtype].itemsize
    cost = sum(layer.flops for layer in layers)
    if world_size > 1:
        # Stages 0 to 2 move every gradient and every parameter once; stage 3 gathers parameters twice.
        cost += LINK * nbytes * (3 if recipe.stage == 3 else 2) * (world_size - 1) / world_size
    if recipe.offload == "optimizer":
        cost += HOST_LINK * 2 * nbytes / (world_size if recipe.stage else 1)
    return cost


def _host(required: bool = True) -> Any:
    try:
        from .. import _host as host
    except ImportError:
        if not required:
            return None
        raise RuntimeError(
            "the search needs pykernels._host, which is not built: run `python setup.py build_ext --inplace`, or give "
            "plan a recipe"
        ) from None
    return host
