"""Small copies of a module, whose own forward is run on made-up numbers: what it computes decides what it is."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...nn._hooks import HOOKS

SIZE = 8  # columns of a made-up residual stream
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


def numbers(*shape: int, seed: float = 0.0) -> Tensor:
    """float32 between -1 and 1, all different, without touching the random state."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32, device="cpu") * 1.7 + 0.3 + seed).view(shape)


def linear(inputs: int, outputs: int, bias: bool = False, seed: float = 0.0) -> nn.Linear:
    """A torch.nn.Linear of made-up numbers."""
    # Not initialised: that would draw from the random state.
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias, device="cpu", dtype=torch.float32)
    layer.weight = nn.Parameter(numbers(outputs, inputs, seed=seed) / inputs**0.5)
    if bias:
        layer.bias = nn.Parameter(numbers(outputs, seed=seed + 1))
    return layer


def skeleton(module: nn.Module, children: dict[str, nn.Module | None], **attributes: Any) -> Any:
    """A module of the same class and settings with other children, no hooks, and parameters of its own on the CPU."""
    small = object.__new__(type(module))
    small.__dict__.update(module.__dict__)
    small.__dict__.update({name: OrderedDict() for name in HOOKS})
    small.__dict__.pop("forward", None)
    small.__dict__["training"] = False
    small.__dict__["_modules"] = dict(children)
    small.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(numbers(*p.shape, seed=0.5)) for name, p in module._parameters.items()
    }
    small.__dict__.update(attributes)
    return small


def free_children(module: nn.Module, without: set[str]) -> dict[str, nn.Module | None]:
    """The other children, which must own nothing: dropouts, activations. ValueError names one that does."""
    rest = {name: child for name, child in module._modules.items() if name not in without}
    for name, child in rest.items():
        if child is not None and (any(True for _ in child.parameters()) or any(True for _ in child.buffers())):
            raise ValueError(f"it has a part {name!r} that is not known here")
    return rest


def small_norm(norm: Any, size: int) -> nn.Module:
    """The norm over `size` columns."""
    small = skeleton(norm, {})
    small._parameters = {
        name: None if p is None else nn.Parameter(numbers(size, seed=2.0)) for name, p in norm._parameters.items()
    }
    if isinstance(small, nn.LayerNorm | nn.RMSNorm):
        small.normalized_shape = (size,)
    return small


def same(got: Tensor, expected: Tensor) -> bool:
    """Within what float32 rounding explains."""
    return got.shape == expected.shape and bool(torch.allclose(got.float(), expected.float(), rtol=1e-4, atol=1e-5))


def activation_name(function: Any) -> str | None:
    """Which of ACTIVATIONS it computes, or None."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        y = function(x.clone())
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name, known in ACTIVATIONS.items():
        if bool((y - known(x)).abs().max() < 2e-6):
            return name
    return None


def eager_config(config: Any, **changes: Any) -> Any:
    """A copy of a configuration that asks for attention in plain PyTorch."""
    changed = copy.copy(config)
    changed.__dict__ = {**config.__dict__, "_attn_implementation_internal": "eager", **changes}
    return changed
