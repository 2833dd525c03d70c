"""The one optimizer class: parameters in buckets, one operator call for each; an algorithm adds its table entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import _optimizer_reference as rules
from . import _shard
from ._arguments import check_gradient, check_group, check_parameter, name_of
from ._layout import arrange
from ._load import load
from ._plan import Bucket, Numbers, Plan
from ._state import DEFAULTS, Group, StateOptions, new_state, quantised, slots
from ._trust import ratio_of

Closure = Callable[[], float]
_MOST_PLANS = 64  # an offloaded optimizer steps bucket by bucket, and a mixture of experts without some of them


class FusedOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose step is one operator call for all tensors of a kind.

    A subclass gives its algorithm and says which flags and numbers the operator gets from a parameter group. Hooks,
    schedulers, GradScaler, closures, pickling and state_dict work as with torch's optimizers. `foreach` and `fused` are
    accepted for drop-in use and change nothing.
    """

    _step_supports_amp_scaling = True
    algorithm: ClassVar[int]
    first_stream = 0  # number of the first parameter in the randomness; optimizer_in_backward gives each its own

    def __init__(self, params: ParamsT, defaults: Group, options: StateOptions) -> None:
        unknown = set(options) - set(DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__}: unexpected keyword argument {sorted(unknown)[0]!r}")
        self._plans: dict[tuple[bool, ...], Plan] = {}  # by which parameters have no gradient
        self._structure: list[tuple[Any, ...]] = []
        common = {"foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None}
        super().__init__(params, {**common, **defaults, **DEFAULTS, **options})

    def flags(self, group: Group) -> int:
        """The operator's flags for a parameter group."""
        return rules.MAXIMIZE if group["maximize"] else 0

    def numbers(self, group: Group) -> Numbers:
        """beta1, beta2, eps and weight_decay as the operator names them."""
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2), group.get("eps", 0.0), group["weight_decay"]

    def slots(self, group: Group) -> dict[str, str]:
        """{state: "s" for signed or "u" for unsigned} of a parameter group."""
        return slots(self.algorithm, self.flags(group))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with this group's own hyperparameters and parameters checked first."""
        index = len(self.param_groups)
        check_group(type(self).__name__, index, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[index]
        try:
            for position, param in enumerate(group["params"]):
                check_parameter(type(self).__name__, name_of(group, index, position), group, param)
        except Exception:
            del self.param_groups[index]
            raise
        self._plans.clear()

    @torch.no_grad()
    def init_states(self) -> None:
        """Takes all memory that steps will need, for every parameter that requires a gradient, before the first one."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    self._state_of(group, param)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        closure: computes the loss and its gradients anew. Errors (ValueError or RuntimeError, naming the parameter):
        a sparse gradient, one of another kind than its parameter; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan, grads = self._planned()
        if grads is None:
            return loss
        if plan.on_accelerator:
            self._accelerator_graph_capture_health_check()
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found: Tensor | None = getattr(self, "found_inf", None)
        scale = self._gradient_divisor(plan, grads, scale)
        for bucket, bucket_grads in zip(plan.buckets, grads, strict=True):
            group = bucket.group
            numbers = self.numbers(group)
            here = None if scale is None else _shard.moved(scale, bucket.device)
            ratio = ratio_of(bucket, bucket_grads, numbers, here)
            inf = None if found is None else _shard.moved(found, bucket.device)
            bucket.update(bucket_grads, numbers, ratio, here, inf)
        return loss

    def _gradient_divisor(self, plan: Plan, grads: list[list[Tensor]], scale: Tensor | None) -> Tensor | None:
        """What the operator divides every gradient by."""
        return scale

    def _structure_now(self) -> list[tuple[Any, ...]]:
        keys = ("state_bits", "rounding", "block_size", "min_8bit_size", "capturable")
        return [(self.flags(group), len(group["params"]), *(group[key] for key in keys)) for group in self.param_groups]

    def _planned(self) -> tuple[Plan, list[list[Tensor]] | None]:
        """The plan for the parameters that have gradients now, and these; None in place of them is no step."""
        if self._structure != self._structure_now():
            self._plans.clear()
        missing = tuple(p.grad is None for group in self.param_groups for p in group["params"])
        plan = self._plans.get(missing)
        grads = None if plan is None else plan.gather(self.state)
        if plan is not None and grads is not None:
            return plan, grads
        if plan is not None or len(self._plans) >= _MOST_PLANS:
            self._plans.clear()  # what made one stale made all of them so
        plan, grads = self._make_plan()
        self._plans[missing] = plan
        return plan, grads

    def _make_plan(self) -> tuple[Plan, list[list[Tensor]] | None]:
        """Checks everything by name, makes the state that is missing, fills the buckets and gathers the gradients."""
        self._check_gradients()
        fresh = not self.state and all(_is_zero(group["lr"]) for group in self.param_groups)
        buckets: dict[tuple[Any, ...], Bucket] = {}
        stream = self.first_stream
        for index, group in enumerate(self.param_groups):
            named, flags = self.slots(group), self.flags(group)
            for param in group["params"]:
                if param.grad is not None:
                    state = self._state_of(group, param)
                    arrange(state, group, param)
                    dtype = param.grad.dtype
                    eight = quantised(group, param.shape, param.dtype)
                    key = (index, param.device, param.dtype, dtype, eight, _shard.is_dtensor(param))
                    key = (*key, *_shard.sharding(param))
                    if key not in buckets:
                        buckets[key] = Bucket(self.algorithm, flags, group, list(named), param, dtype)
                    buckets[key].add(param, state, stream)
                stream += 1
        for bucket in buckets.values():
            bucket.close()
        params = [param for group in self.param_groups for param in group["params"]]
        self._structure = self._structure_now()
        plan = Plan(params, self.state, buckets.values())
        grads = plan.gather(self.state)
        if grads is None:
            raise RuntimeError(f"{type(self).__name__}: parameters changed while they were looked at")
        # A checkpoint's dry run: a step of a fresh optimizer with lr 0 and gradients 0, made for the state alone.
        return plan, None if fresh and not _any_nonzero(plan, grads) else grads

    def _check_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    name = name_of(group, index, position)
                    check_parameter(type(self).__name__, name, group, param)
                    check_gradient(type(self).__name__, name, param, param.grad)

    def _state_of(self, group: Group, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        wanted = self.slots(group)
        if not all(name in state for name in ("step", *wanted)):
            # Adds what is missing (all of it at first, a slot when a flag was set later) to what is there.
            self.state[param] = {**new_state(group, wanted, param), **state}
        return cast(dict[str, Tensor], self.state[param])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state keeps the dtype that this optimizer keeps it in.

        A state_dict of torch.optim's class of the same name loads into 32-bit state, and the other way round. State
        with another block_size, state_bits, dtype or shape: ValueError naming the parameter, with nothing changed.
        Tensors are copied, but those that are this optimizer's own already.
        """
        load(self, state_dict)
        self._plans.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        self._structure = []


def _any_nonzero(plan: Plan, grads: list[list[Tensor]]) -> bool:
    """Whether any gradient of any rank has an element that is not 0."""
    count = 0.0
    for bucket, part in zip(plan.buckets, grads, strict=True):
        here = torch.stack([g.count_nonzero() for g in part]).sum().double()
        count += _shard.all_reduce(here, bucket.sharded).item()
    return count > 0


def _is_zero(lr: float | Tensor) -> bool:
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return False  # reading it would wait for the device
    return float(lr) == 0.0
