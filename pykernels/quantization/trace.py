"""One run of a model that sees which linear layers read a norm's output, and whether anything else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .run import call_model, evaluating

SAMPLE_ROWS = 64


@dataclass
class Trace:
    """What one run of a model did. Tensors are those of the run, not copies.

    Attributes:
        order: names of the linear layers in the order of their calls; one called twice is there twice.
        readers: for a norm, the linear layers that read its output; None among them is any other reader.
        sources: for a linear layer, the norms that its inputs come from; None among them is any other source.
        norm_calls: for a norm, its last arguments and output.
        inputs: for a linear layer, its last input.
        samples: for a linear layer, up to ``SAMPLE_ROWS`` rows of its last output.
        outputs: the tensors that the model returned.
    """

    order: list[str] = field(default_factory=list)
    readers: dict[str, set[str | None]] = field(default_factory=dict)
    sources: dict[str, set[str | None]] = field(default_factory=dict)
    norm_calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


def trace(model: nn.Module, batch: Any) -> Trace:
    """Run ``model`` on ``batch`` in evaluation mode and record it. Holds the activations of linears and norms."""
    seen = Trace()
    names = {module: name for name, module in model.named_modules()}
    linears = {id(module.weight): name for module, name in names.items() if isinstance(module, nn.Linear)}
    norm_outputs: dict[int, tuple[str, Tensor]] = {}

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[-1:] == module.weight.shape:
                norm_outputs[id(output)] = (name, output)  # kept alive, so that no other tensor gets its id
                seen.norm_calls[name] = (args, kwargs, output)
                seen.readers.setdefault(name, set())

        return hook

    def linear_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            seen.order.append(name)
            seen.inputs[name] = x
            seen.samples[name] = output.reshape(-1, output.shape[-1])[:SAMPLE_ROWS].float().clone()
            seen.sources.setdefault(name, set()).add(norm_outputs[id(x)][0] if id(x) in norm_outputs else None)

        return hook

    class Readers(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            read = [norm_outputs[id(t)][0] for t in tree_leaves((args, kwargs)) if id(t) in norm_outputs]
            # A function that returns no tensor, such as Tensor.shape, reads no values.
            if read and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                linear = linears.get(id(args[1])) if func is nn.functional.linear and len(args) > 1 else None
                for norm in read:
                    seen.readers[norm].add(linear)
            return result

    handles: list[RemovableHandle] = []
    for module, name in names.items():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear_hook(name), with_kwargs=True))
        elif _may_be_norm(module):
            handles.append(module.register_forward_hook(norm_hook(name), with_kwargs=True))
    with evaluating(model, handles), Readers():
        result = call_model(model, batch)
    seen.outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    for output in seen.outputs:
        if id(output) in norm_outputs:
            seen.readers[norm_outputs[id(output)][0]].add(None)
    return seen


def _may_be_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not module._modules


def run_with(model: nn.Module, batch: Any, handles: list[RemovableHandle]) -> None:
    """Run ``model`` once with hooks that ``handles`` remove."""
    with evaluating(model, handles):
        call_model(model, batch)


def scaled_inputs(model: nn.Module, batch: Any, seen: Trace, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What reaches each linear layer when the outputs of some are multiplied channel by channel.

    Every layer is then handed its input of ``seen`` instead, so that no change passes a second linear layer.

    Args:
        factors: for a linear layer, [out_features].
    """
    got: dict[str, Tensor] = {}

    def reader_hook(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            got[name] = args[0] if args else kwargs["input"]
            return (seen.inputs[name],), {}

        return hook

    def producer_hook(factor: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, output: output * factor.to(output)

    once = [name for name in seen.inputs if seen.order.count(name) == 1]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(reader_hook(name), with_kwargs=True) for name in once
    ]
    for name, factor in factors.items():
        handles.append(model.get_submodule(name).register_forward_hook(producer_hook(factor)))
    run_with(model, batch, handles)
    return got


def close(got: Tensor, expected: Tensor) -> bool:
    """Equal to within rounding of the dtype, relative to the largest magnitude."""
    if got.shape != expected.shape:
        return False
    if not got.is_floating_point():
        return bool(torch.equal(got, expected))
    tolerance = 2e-2 if torch.finfo(got.dtype).bits < 32 else 1e-4
    difference = (got.float() - expected.float()).abs().max() if got.numel() else torch.zeros(())
    return bool(difference <= tolerance * expected.float().abs().max() if got.numel() else True)
