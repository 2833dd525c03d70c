"""Watching what goes into each linear layer, for configs that fix scales or outlier columns beforehand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .observers import LEVELS, OBSERVERS, Observer
from .places import FilterFn
from .run import call_model, evaluating, track


@dataclass(frozen=True)
class InputStatistics:
    """What ``calibrate`` saw at the input of one layer.

    Attributes:
        threshold: the magnitude that the observer chose to represent by code 127.
        column_absmax: float32 [in_features], the largest magnitude in each column.
        column_rms: float32 [in_features], the root of the mean square of each column.
        rows: input rows seen.
    """

    threshold: float
    column_absmax: Tensor
    column_rms: Tensor
    rows: int


@dataclass(frozen=True)
class CalibrationResult:
    """Statistics of the inputs of a model's linear layers, by the layer's name."""

    observer: str
    inputs: dict[str, InputStatistics]

    def input_scale(self, name: str) -> Tensor:
        """float32 scalar: the static scale of the layer's input. Raises ValueError for an unknown layer."""
        return torch.tensor(self._of(name).threshold / LEVELS, dtype=torch.float32)

    def outlier_columns(self, name: str, threshold: float) -> Tensor:
        """int64 [columns], ascending: where the input passed ``threshold``. Raises ValueError for an unknown layer."""
        return (self._of(name).column_absmax > threshold).nonzero().flatten()

    def _of(self, name: str) -> InputStatistics:
        if name not in self.inputs:
            known = ", ".join(list(self.inputs)[:3]) or "none"
            raise ValueError(
                f"calibration: got no statistics for the layer {name!r}; it knows {len(self.inputs)} layers"
                f" ({known}, ...). Calibrate the model that you quantise, with batches that run this layer."
            )
        return self.inputs[name]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    observer: str = "absmax",
    *,
    filter_fn: FilterFn | None = None,
    progress: bool | None = None,
) -> CalibrationResult:
    """Run ``model`` over ``batches`` in evaluation mode and observe the input of each ``nn.Linear``.

    The model is left as it was: hooks are removed and training modes restored, also after an error.

    Args:
        batches: each a mapping (``model(**batch)``), a tuple or list (``model(*batch)``) or one argument.
        observer: "absmax", "moving_average", "percentile" (99.99), "mse" or "entropy" (KL divergence); see
            ``pykernels.quantization.observers``.
        filter_fn: ``filter_fn(module, name)``; True observes. Default: every ``nn.Linear``.
        progress: True for a bar, False for none, None for one on a terminal when it takes over a second.

    Raises:
        ValueError: an unknown observer, no batches, no layer to observe, or a layer's input is not finite.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"observer: got {observer!r}, accepts {', '.join(map(repr, OBSERVERS))}.")
    watches = {
        name: _Watch(name, OBSERVERS[observer]())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (filter_fn is None or filter_fn(module, name))
    }
    if not watches:
        raise ValueError("model: got no torch.nn.Linear to observe (or filter_fn selects none), accepts at least one.")
    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True) for name, watch in watches.items()
    ]
    count = 0
    with evaluating(model, handles):
        for batch in track(batches, "Calibrating", progress):
            call_model(model, batch)
            count += 1
    if count == 0:
        raise ValueError("batches: got none, accepts at least one.")
    return CalibrationResult(observer, {name: w.statistics() for name, w in watches.items() if w.rows})


class _Watch:
    """A forward pre-hook that feeds an observer."""

    def __init__(self, name: str, observer: Observer) -> None:
        self._name = name
        self._observer = observer
        self._column_absmax: Tensor | None = None
        self._column_squares: Tensor | None = None
        self.rows = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        x = x.reshape(-1, x.shape[-1])
        if x.numel() == 0:
            return
        columns = x.abs().amax(0).float()
        if not bool(torch.isfinite(columns).all()):
            raise ValueError(
                f"batches: the input of layer {self._name} got NaN or infinite values, accepts finite ones."
            )
        self._column_absmax = columns if self._column_absmax is None else torch.maximum(self._column_absmax, columns)
        squares = x.double().square().sum(0)
        self._column_squares = squares if self._column_squares is None else self._column_squares + squares
        self._observer.update(x)
        self.rows += x.shape[0]

    def statistics(self) -> InputStatistics:
        assert self._column_absmax is not None and self._column_squares is not None
        rms = (self._column_squares / self.rows).sqrt().float()
        return InputStatistics(self._observer.threshold(), self._column_absmax, rms, self.rows)
