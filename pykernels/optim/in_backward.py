"""Each parameter updated as soon as its gradient is ready, and the gradient freed: they never exist all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._base import FusedOptimizer
from ._load import prepare

Factory = Callable[[list[Tensor]], torch.optim.Optimizer]


class OptimizerInBackward:
    """What `optimizer_in_backward` returns: one optimizer for each parameter, by the parameter's name.

    step() and zero_grad() do nothing, so that a training loop need not change: backward has done both.
    param_groups: all groups, for a schedule that sets "lr" itself. state_dict: {name: state_dict}.
    remove() takes the hooks off the model.
    """

    def __init__(
        self, model: torch.nn.Module, factory: Factory, accumulation_steps: int, clip_value: float | None
    ) -> None:
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._accumulation_steps, self._clip_value = accumulation_steps, clip_value
        for i, (name, param) in enumerate(model.named_parameters()):
            if not param.requires_grad:
                continue
            optimizer = factory([param])
            if any(group.get("max_grad_norm") for group in optimizer.param_groups):
                raise ValueError(
                    "optimizer_in_backward: expected max_grad_norm to be None or 0, got "
                    f"{optimizer.param_groups[0]['max_grad_norm']}: no norm of all gradients exists in backward"
                )
            if isinstance(optimizer, FusedOptimizer):
                optimizer.first_stream = i  # randomness of its own, the same as in one optimizer for the whole model
            self.optimizers[name] = optimizer
        self._handles = [
            model.get_parameter(name).register_post_accumulate_grad_hook(self._hook(optimizer))
            for name, optimizer in self.optimizers.items()
        ]

    def _hook(self, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        seen = 0

        def update(param: Tensor) -> None:
            nonlocal seen
            seen += 1
            if seen % self._accumulation_steps:
                return
            if self._clip_value is not None and param.grad is not None:
                torch.nn.utils.clip_grad_value_([param], self._clip_value)
            optimizer.step()
            param.grad = None

        return update

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self, closure: None = None) -> None:
        """Nothing: backward has made the step."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: backward has freed the gradients."""

    def init_states(self) -> None:
        """Takes the memory of all states now."""
        for optimizer in self.optimizers.values():
            if isinstance(optimizer, FusedOptimizer):
                optimizer.init_states()

    def state_dict(self) -> dict[str, Any]:
        """{parameter name: its optimizer's state_dict}."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict gave. ValueError for other names or other state, with nothing changed."""
        if state_dict.keys() != self.optimizers.keys():
            missing, extra = self.optimizers.keys() - state_dict.keys(), state_dict.keys() - self.optimizers.keys()
            raise ValueError(
                "optimizer_in_backward: expected state for every parameter and no other, "
                f"got none for {sorted(missing)} and some for {sorted(extra)}"
            )
        ours = {name: o for name, o in self.optimizers.items() if isinstance(o, FusedOptimizer)}
        commits = [prepare(optimizer, state_dict[name]) for name, optimizer in ours.items()]
        for commit in commits:
            commit()
        for name, optimizer in self.optimizers.items():
            if name not in ours:
                optimizer.load_state_dict(state_dict[name])

    def remove(self) -> None:
        """Takes the hooks off: gradients are kept again from the next backward on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def optimizer_in_backward(
    model: torch.nn.Module, factory: Factory, *, accumulation_steps: int = 1, clip_value: float | None = None
) -> OptimizerInBackward:
    """Updates each parameter of the model inside backward, as its gradient is ready, and frees the gradient.

    factory: makes the optimizer of one parameter, as `lambda params: AdamW(params, lr=1e-3)`; any torch.optim class.
    accumulation_steps: an update at every so many backwards; gradients are then kept between them (sums, as torch's).
    clip_value: gradients are clamped to [-clip_value, clip_value] first. Clipping by the global norm cannot be had: it
    needs all gradients at once. Peak memory of gradients: that of the largest parameter (with accumulation_steps=1),
    whatever the model. FSDP2 models work: FSDP calls the same hooks after its reduction.
    Errors: ValueError for values outside these, and for an optimizer with max_grad_norm; no hook is left then.
    """
    if accumulation_steps < 1:
        raise ValueError(
            f"optimizer_in_backward: expected accumulation_steps to be at least 1, got {accumulation_steps}"
        )
    if clip_value is not None and not clip_value >= 0.0:
        raise ValueError(f"optimizer_in_backward: expected clip_value to be at least 0, got {clip_value}")
    return OptimizerInBackward(model, factory, accumulation_steps, clip_value)
