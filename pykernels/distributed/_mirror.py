"""MirrorOptimizer: an optimizer whose groups hold the model's parameters, while another updates mirrors of them.

A mirror is a shard of a replicated parameter, or a copy in host memory. Learning-rate schedulers, gradient scalers and
torch.distributed.checkpoint see one optimizer over the model's own parameters, whose state lies where the mirrors lie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Inner = Callable[..., torch.optim.Optimizer]  # called as an optimizer class is


class MirrorOptimizer(torch.optim.Optimizer):
    """The bookkeeping: subclasses make the mirrors and move gradients and values."""

    inner: torch.optim.Optimizer

    def __init__(self, params: Iterable[Any], optimizer_cls: Inner, kwargs: dict[str, Any]) -> None:
        self._mirrors: dict[torch.Tensor, torch.Tensor] = {}
        groups = list(params)
        if not groups:
            raise ValueError(f"{type(self).__name__}: expected params to have at least 1 parameter, got none")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        groups = [{**group, "params": _as_list(group["params"])} for group in groups]
        self.inner = optimizer_cls([self._mirrored(group) for group in groups], **kwargs)
        super().__init__(groups, self.inner.defaults)
        self._pull_hyperparameters()

    def _mirror_of(self, p: torch.Tensor) -> torch.Tensor:
        """A leaf that stands for p."""
        raise NotImplementedError

    def _update(self) -> None:
        """One step of the mirrors, and the new values in the parameters."""
        raise NotImplementedError

    def _mirrored(self, group: dict[str, Any]) -> dict[str, Any]:
        def one(entry: Any) -> Any:
            name, p = entry if isinstance(entry, tuple) else (None, entry)
            if p not in self._mirrors:
                self._mirrors[p] = self._mirror_of(p)
            return self._mirrors[p] if name is None else (name, self._mirrors[p])

        return {**group, "params": [one(entry) for entry in group["params"]]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer; the mirrors are made here."""
        param_group = {**param_group, "params": _as_list(param_group["params"])}
        if len(self.inner.param_groups) == len(self.param_groups):  # not while __init__ registers its own
            self.inner.add_param_group(self._mirrored(param_group))
        super().add_param_group(param_group)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((p, self._mirrors[p]) for group in self.param_groups for p in group["params"])

    def _push_hyperparameters(self) -> None:
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update({name: value for name, value in mine.items() if name not in ("params", "param_names")})

    def _pull_hyperparameters(self) -> None:
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update({name: value for name, value in theirs.items() if name not in ("params", "param_names")})

    @property
    def state(self) -> defaultdict[torch.Tensor, dict[str, Any]]:  # type: ignore[override]
        """{parameter: the state of its mirror}: the tensors themselves, in a new dictionary."""
        kept = self.inner.state
        return defaultdict(dict, {p: {**kept[m], **self._extra_state(p)} for p, m in self._pairs() if m in kept})

    @state.setter
    def state(self, value: Any) -> None:
        pass  # torch.optim.Optimizer.__init__ sets an empty one

    def _extra_state(self, p: torch.Tensor) -> dict[str, Any]:
        return {}

    def _load_extra_state(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        pass

    def init_states(self) -> None:
        """Takes the memory of the state now, if the optimizer's class can."""
        if init := getattr(self.inner, "init_states", None):
            self._push_hyperparameters()
            init()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The counterpart of state_dict(); the inner optimizer checks it before anything changes."""
        names = {name for p in self._mirrors for name in self._extra_state(p)}
        entries = state_dict["state"]
        plain = {key: {n: v for n, v in entry.items() if n not in names} for key, entry in entries.items()}
        self.inner.load_state_dict({**state_dict, "state": plain})
        self._pull_hyperparameters()
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, (p, _) in zip(saved, self._pairs(), strict=True):
            self._load_extra_state(p, entries.get(index, {}))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.inner, "_step_supports_amp_scaling", False))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; gradients are those of the model's parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._push_hyperparameters()
        for name in ("grad_scale", "found_inf"):  # set by torch.amp.GradScaler for this one step
            if hasattr(self, name):
                setattr(self.inner, name, getattr(self, name))
        try:
            self._update()
        finally:
            for name in ("grad_scale", "found_inf"):
                if name in self.inner.__dict__:
                    delattr(self.inner, name)
        return loss


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)
