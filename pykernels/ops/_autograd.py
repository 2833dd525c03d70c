"""Gradients of the operators: what torch.library.register_autograd does, with a schema read once, not at each call.

PyTorch's own builds the list of a schema's arguments anew for every argument it looks at, and flattens and unflattens
the call as a tree twice each way. For an operator of 14 arguments with lists of tensors that is longer than its kernels
take on a small batch. A schema only says where the lists are: knowing that, a call is flattened by slicing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library

_C = torch._C
_BELOW = _C._after_autograd_keyset


class _Call:
    """One call: the dispatch keys it came with, and how long its lists are, of the arguments and of the results."""

    __slots__ = ("keyset", "lengths", "results")

    def __init__(self, keyset: Any, lengths: list[int]) -> None:
        self.keyset, self.lengths = keyset, lengths
        self.results: list[int] = []


def _list_places(values: Sequence[Any]) -> tuple[int, ...]:
    """Which arguments or results of a schema are lists of tensors."""
    return tuple(
        place for place, value in enumerate(values) if str(value.type) in ("List[Tensor]", "List[Optional[Tensor]]")
    )


def _flatten(values: Sequence[Any], places: Sequence[int]) -> tuple[list[Any], list[int]]:
    """Values with the lists at `places` spread out, and the lists' lengths."""
    flat: list[Any] = []
    start = 0
    for place in places:
        flat += values[start:place]
        flat += values[place]
        start = place + 1
    flat += values[start:]
    return flat, [len(values[place]) for place in places]


def _nest(flat: Sequence[Any], places: Sequence[int], lengths: Sequence[int]) -> list[Any]:
    """The reverse of _flatten."""
    values: list[Any] = []
    start = 0
    for place, length in zip(places, lengths, strict=True):
        end = start + place - len(values)
        values += flat[start:end]
        values.append(list(flat[end : end + length]))
        start = end + length
    values += flat[start:]
    return values


def register(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None
) -> None:
    """Gives the operator `pykernels::<name>` its gradient.

    setup_context(ctx, inputs, output): as in torch.library.register_autograd; inputs has every argument of the schema.
    backward(ctx, *grads): one gradient for each argument, lists where the arguments are; trailing None may be left out,
    and None stands for a list of None. ctx.needs_input_grad has, in both, an entry for every argument, and for a list
    of tensors a list. A backward that raises is how an operator refuses a gradient.
    """
    operator = getattr(torch.ops.pykernels, name).default
    arguments, returns = list(operator._schema.arguments), list(operator._schema.returns)
    if any(argument.kwarg_only for argument in arguments):
        raise ValueError(f"{name}: keyword-only arguments are not supported here")
    defaults = tuple(argument.default_value for argument in arguments)
    lists, result_lists = _list_places(arguments), _list_places(returns)
    single = len(returns) == 1

    def run(keyset: Any, args: Sequence[Any]) -> Any:
        with _C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & _BELOW, *args)

    def forward(ctx: Any, call: _Call, *flat: Any) -> Any:
        args = tuple(_nest(flat, lists, call.lengths)) if lists else flat
        result = run(call.keyset, args)
        ctx.pykernels_call = call
        ctx.needs_input_grad = tuple(_nest(ctx.needs_input_grad[1:], lists, call.lengths))
        if setup_context is not None:
            setup_context(ctx, args, result)
        if not result_lists:
            return result
        spread, call.results = _flatten((result,) if single else result, result_lists)
        return tuple(spread)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call = ctx.pykernels_call
        found = backward(ctx, *(_nest(grads, result_lists, call.results) if result_lists else grads))
        found = list(found) if isinstance(found, tuple) else [found]
        found += [None] * (len(arguments) - len(found))
        for place, length in zip(lists, call.lengths, strict=True):
            if found[place] is None:
                found[place] = [None] * length
        return (None, *_flatten(found, lists)[0])

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function = type(f"{name}_autograd", (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *args: Any) -> Any:
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            return run(keyset, args)
        args += defaults[len(args) :]
        flat, lengths = _flatten(args, lists) if lists else (args, [])
        call = _Call(keyset, lengths)
        result = function.apply(call, *flat)  # type: ignore[attr-defined]
        if not result_lists:
            return result
        nested = _nest(result, result_lists, call.results)
        return nested[0] if single else tuple(nested)

    _library.LIB.impl(name, kernel, "Autograd", with_keyset=True)
