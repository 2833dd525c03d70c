"""checkpoint_: which modules recompute their forward in backward, as a policy on any model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..nn._save import SAVE

Policy = str | tuple[str, int] | Sequence[str]
ACCEPTS = (
    '"none", "checkpoint", "every k-th" such as "every 2nd" or ("every", 2), a list of module name patterns, or a '
    "value of the dial: " + ", ".join(f'"{value}"' for value in SAVE if value != "checkpoint")
)
_BEFORE = "_save_before_checkpoint"


@dataclass
class CheckpointReport:
    """What a call of checkpoint_ left in force.

    checkpointed: names of the modules whose forward is recomputed. dialled: module name -> its value of `save`.
    changed: the names among these, and among what an earlier policy had touched, whose state this call changed.
    """

    policy: Policy
    checkpointed: list[str] = field(default_factory=list)
    dialled: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)


class _Checkpointed(nn.Module):
    """Mixed in before a module's own class, so that its keys, its attributes and isinstance stay as they are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # a method of object since 3.11
        return _blank, (_own_class(self),), state


def _blank(own: type[nn.Module]) -> nn.Module:
    cls = _checkpointed_class(own)
    return cls.__new__(cls)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _checkpointed_class(own: type[nn.Module]) -> type[nn.Module]:
    if own not in _classes:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        _classes[own] = type(own.__name__, (_Checkpointed, own), names)
    return _classes[own]


def _own_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__bases__[1] if cls.__bases__[0] is _Checkpointed else cls


def checkpoint_(model: nn.Module, policy: Policy) -> CheckpointReport:
    """Sets what the modules of a model keep for backward, in place; returns what changed. Replaces an earlier policy.

    policy:
      "none": as the model was before its first checkpoint_;
      "checkpoint": every block recomputes its forward (Chen et al., "Training deep nets with sublinear memory cost",
          2016). Blocks are the elements of the longest ModuleList or Sequential whose elements share one class, or,
          where several lists as long are inside another (the experts of each layer), of that one;
      "every 2nd", "every 3rd", ..., or ("every", k): of the blocks numbered from 1, those that k divides;
      a list of patterns: the modules whose names match one (fnmatch: "layers.*.mlp"); one inside another that matches
          is left out, as the outer one recomputes it;
      "all", "inputs+preact", "int8", "recompute_mlp", "recompute_qkv": set as `save` on every module that has it.
    Recomputing goes through torch.utils.checkpoint(use_reentrant=False), RNG state kept: a checkpointed module keeps
    its inputs. Applying a policy twice changes nothing more. State dict keys, deepcopy, pickle, train and eval are as
    without it; without gradients nothing is recomputed. Hooks on a checkpointed module run once, those inside it again.
    Errors: ValueError for a policy that is unknown or matches nothing, for lists of blocks as long as each other (an
    encoder's and a decoder's: name them with patterns), or for a module that cannot follow it; the model is then left
    as it was. Apply before torch.compile, DistributedDataParallel or FSDP wrap the model.
    """
    chosen, dial = _choose(model, policy)
    for name, module in chosen.items():
        if "forward" in vars(module):
            raise ValueError(
                f"checkpoint_: expected the forward of {name!r} to be that of its class, got one set on the module "
                "itself by another tool: undo that first"
            )
    modules = dict(model.named_modules())
    before = {name: _state(module) for name, module in modules.items()}
    try:
        dialled = _apply(modules, chosen, dial)
    except ValueError as error:
        for name, module in modules.items():
            _restore(module, before[name])
        raise ValueError(f"checkpoint_: {error}") from error
    changed = [name for name, module in modules.items() if _state(module) != before[name]]
    return CheckpointReport(policy, list(chosen), dialled, changed)


def _choose(model: nn.Module, policy: Policy) -> tuple[dict[str, nn.Module], str | None]:
    """The modules to checkpoint, by name, and the value of the dial to set."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"checkpoint_: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(policy, list | tuple) and all(isinstance(pattern, str) for pattern in policy):
        return _matches(model, policy), None
    every = _every(policy)
    if every is not None:
        return _every_kth(_blocks(model), every, policy), None
    if policy == "none":
        return {}, None
    if isinstance(policy, str) and policy in SAVE:
        if not any(_has_dial(module) for module in model.modules()):
            raise ValueError(f"checkpoint_: no module has the dial `save` that {policy!r} would set; accepts {ACCEPTS}")
        return {}, policy
    raise ValueError(f"checkpoint_: got the policy {policy!r}, accepts {ACCEPTS}")


def _every(policy: Any) -> int | None:
    """k of "every k-th" and of ("every", k); 1 of "checkpoint"; None for another policy."""
    if policy == "checkpoint":
        return 1
    if isinstance(policy, str) and (found := re.fullmatch(r"every (\d+)(?:st|nd|rd|th)", policy)):
        return int(found[1])
    if isinstance(policy, tuple) and len(policy) == 2 and policy[0] == "every" and type(policy[1]) is int:
        return policy[1]
    return None


def _every_kth(blocks: dict[str, nn.Module], k: int, policy: Policy) -> dict[str, nn.Module]:
    chosen = {name: block for place, (name, block) in enumerate(blocks.items(), 1) if k > 0 and place % k == 0}
    if not chosen:
        what = f"{len(blocks)} blocks" if blocks else "no ModuleList or Sequential of modules of one class"
        raise ValueError(f"checkpoint_: {policy!r} matches nothing: the model has {what}; accepts {ACCEPTS}")
    return chosen


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the longest list of modules of one class; where a model is one module with the dial, that one.

    Several as long, each inside an element of one list (the experts of every layer), stand back for that list.
    """
    lists: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        elements = {f"{name}.{key}".lstrip("."): element for key, element in module.named_children()}
        same = len({_own_class(element) for element in elements.values()}) == 1
        if same and all(map(_runs, elements.values())):
            lists[name] = elements
    if not lists:
        return {"": model} if _has_dial(model) else {}
    most = max(map(len, lists.values()))
    longest = [name for name, elements in lists.items() if len(elements) == most]
    around = [name for name in lists if all(name == inner or _is_inside(inner, name) for inner in longest)]
    if len(longest) > 1 and not around:
        first = longest[0] or "0"
        raise ValueError(
            f"checkpoint_: expected one longest list of blocks, got {len(longest)} of {most} modules each: "
            f"{', '.join(map(repr, longest[:8]))}{', ...' if len(longest) > 8 else ''}; name the blocks with patterns, "
            f"such as [{first + '.*'!r}] or, for one block of them, [{first + '.0'!r}]"
        )
    return lists[around[-1] if len(longest) > 1 else longest[0]]


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(outer + "."))


def _matches(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    runnable = {name: module for name, module in model.named_modules() if name and _runs(module)}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        if not fnmatch.filter(runnable, pattern):
            names = ", ".join(list(runnable)[:8])
            raise ValueError(f"checkpoint_: the pattern {pattern!r} matches nothing; the model has {names}, ...")
    for name, module in runnable.items():  # an outer module comes before those inside it
        inside = any(name.startswith(outer + ".") for outer in chosen)
        if not inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            chosen[name] = module
    if not chosen:
        raise ValueError(f"checkpoint_: got an empty list of patterns, accepts {ACCEPTS}")
    return chosen


def _runs(module: nn.Module) -> bool:
    """Whether it has a forward at all: a ModuleList and a ModuleDict do not."""
    return type(module).forward is not nn.Module.forward


def _has_dial(module: nn.Module) -> bool:
    value = getattr(module, "save", None)
    return isinstance(value, str) and value in SAVE


def _apply(modules: dict[str, nn.Module], chosen: dict[str, nn.Module], dial: str | None) -> dict[str, str]:
    """Undoes the policy in force, then sets the new one; returns the dials set."""
    for module in modules.values():
        module.__class__ = _own_class(module)
        if _BEFORE in vars(module):
            module.save = vars(module).pop(_BEFORE)
    for module in chosen.values():
        module.__class__ = _checkpointed_class(type(module))
    # Read before any is set: a module may pass its own value on to those inside it.
    saves = {name: module.save for name, module in modules.items() if dial is not None and _has_dial(module)}
    dialled: dict[str, str] = {}
    for name, save in saves.items():
        try:
            modules[name].save = dial  # type: ignore[assignment]
        except ValueError:
            if not any(not outer or name.startswith(outer + ".") for outer in dialled):
                raise
            continue  # part of a module that follows the dial as a whole
        vars(modules[name])[_BEFORE] = save
        dialled[name] = str(modules[name].save)
    return dialled


def _state(module: nn.Module) -> tuple[Any, ...]:
    return type(module), module.save if _has_dial(module) else None, vars(module).get(_BEFORE)


def _restore(module: nn.Module, state: tuple[Any, ...]) -> None:
    module.__class__, save, marker = state
    if save is not None:
        module.save = save
    vars(module).pop(_BEFORE, None)
    if marker is not None:
        vars(module)[_BEFORE] = marker
