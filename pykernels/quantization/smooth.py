"""SmoothQuant (Xiao et al., 2023, arXiv 2211.10438): move the range of activations into the weights, offline."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import CalibrationResult, calibrate
from .folds import Fold, find_folds
from .places import FilterFn, default_filter
from .trace import Trace, close, trace

_SMALLEST, _LARGEST = 2.0**-8, 2.0**8


@dataclass(frozen=True)
class SmoothingReport:
    """What ``smooth_`` did: ``folded`` maps a producer to the layers it feeds, ``unsmoothed`` a layer to why not."""

    alpha: float
    folded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unsmoothed: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many layers."""
        layers = sum(len(readers) for readers in self.folded.values())
        return f"smoothed {layers} layers with alpha {self.alpha:g}, {len(self.unsmoothed)} left as they were"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table()
        table.add_column("layer", overflow="fold")
        table.add_column("result", overflow="fold")
        for producer, readers in self.folded.items():
            table.add_row(", ".join(readers), f"folded into {producer}")
        for name, reason in self.unsmoothed.items():
            table.add_row(name, reason, style="dim")
        return Group(self.summary(), table)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, no_color=True, highlight=False).print(self)
        return text.getvalue().rstrip()


def smooth_(
    model: nn.Module,
    batches: Iterable[Any],
    alpha: float = 0.5,
    *,
    filter_fn: FilterFn | None = None,
    progress: bool | None = None,
) -> SmoothingReport:
    """Even out the input channels of linear layers, so that INT8 loses less; call it before ``quantize_``.

    Channel j of a layer's input is divided by ``rms(x_j)^alpha / max|w_j|^(1 - alpha)`` and its weights are multiplied
    by it. (The paper takes max|x_j|. The few huge activations of a first token decide that, though every token has a
    scale of its own: with the root mean square SmolLM2 loses a fifth less.) The division is folded into what comes
    before: the norm (when only linear layers read it), or the linear layer whose channels reach this one unmixed: v
    before o (also with grouped queries), up before down, the layer before a ReLU. Factors are powers of two, which no
    float format rounds, so the model computes what it did.

    Each fold is found and checked by running the first batch; where an output would change, the fold is undone. On
    an error the model is as it was.

    Args:
        model: a float model. It is run in evaluation mode, and its training modes are restored.
        batches: as for ``calibrate``. The activations that the first leaves in norms and linears are held for a while.
        alpha: 0 leaves the range to the activations, 1 moves it all into the weights.
        filter_fn: ``filter_fn(module, name)``: which layers to smooth. Default: those ``quantize_`` converts.

    Returns:
        A ``SmoothingReport``; ``print`` it.

    Raises:
        ValueError: ``alpha`` is outside [0, 1], there are no batches, or an activation is not finite.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha!r}, accepts a number in [0, 1].")
    chosen = filter_fn or default_filter
    targets = [n for n, m in model.named_modules() if type(m) is nn.Linear and chosen(m, n)]
    if not targets:
        raise ValueError("model: got no torch.nn.Linear to smooth (or filter_fn selects none), accepts at least one.")
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("batches: got none, accepts at least one.")
    calibration = calibrate(model, _Chained(first, iterator, batches), filter_fn=_linear, progress=progress)
    seen = trace(model, first)
    folds, unsmoothed = find_folds(model, first, seen, targets)
    wanted = set(targets)
    factors = [_factors(model, fold, calibration, alpha, wanted) for fold in folds]
    refused = _apply_checked(model, first, seen, list(zip(folds, factors, strict=True)))
    folded = {fold.producer: fold.readers for fold in folds if fold.producer not in refused}
    for fold in folds:
        if fold.producer in refused:
            unsmoothed |= dict.fromkeys(fold.readers, refused[fold.producer])
    return SmoothingReport(alpha, folded, unsmoothed)


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


class _Chained:
    """The first batch and the rest of an iterator, with the length of the whole where it is known."""

    def __init__(self, first: Any, rest: Any, whole: Any) -> None:
        self._batches = itertools.chain([first], rest)
        self._whole = whole

    def __iter__(self) -> Any:
        return self._batches


def _factors(model: nn.Module, fold: Fold, calibration: CalibrationResult, alpha: float, wanted: set[str]) -> Tensor:
    """Powers of two, float32 [channels of the producer], around a geometric mean of 1."""
    readers = [name for name in fold.readers if name in wanted]
    x = calibration.inputs[readers[0]].column_rms
    weights = [model.get_submodule(name).get_parameter("weight") for name in readers]
    w = torch.stack([weight.detach().abs().amax(0).float() for weight in weights]).amax(0)
    x, w = fold.by_producer(x, model), fold.by_producer(w, model)
    ratio = x.double() ** alpha / w.double() ** (1 - alpha)
    usable = (x > 0) & (w > 0)
    exponent = torch.where(usable, ratio, 1.0).log2()
    if bool(usable.any()):
        exponent -= exponent[usable].mean()
    exponent = torch.where(usable, exponent, 0.0)
    return exponent.round().exp2().clamp(_SMALLEST, _LARGEST).float()


@dataclass(frozen=True)
class _Applied:
    """A fold that is in the model, and what takes it out again bit for bit."""

    fold: Fold
    factors: Tensor
    norm: dict[str, Tensor]

    def undo(self, model: nn.Module) -> None:
        self.fold.apply(model, 1 / self.factors)
        for name, value in self.norm.items():
            model.get_submodule(self.fold.producer).get_parameter(name).data.copy_(value)


def _apply_checked(model: nn.Module, batch: Any, seen: Trace, folds: list[tuple[Fold, Tensor]]) -> dict[str, str]:
    """Apply all folds, then undo those after which a layer's output differs. Returns producer -> why it was undone."""
    refused: dict[str, str] = {}
    applied: list[_Applied] = []
    try:
        for fold, factors in folds:
            if not fold.is_exact(model, factors):
                refused[fold.producer] = f"the factors would round a weight of {fold.producer} or of its readers"
                continue
            norm = {} if fold.kind == "linear" else fold.producer_parameters(model)
            applied.append(_Applied(fold, factors, {name: value.clone() for name, value in norm.items()}))
            fold.apply(model, factors)
        while applied:
            guilty = _first_changed(model, batch, seen, applied)
            if guilty is None:
                break
            guilty.undo(model)
            applied.remove(guilty)
            refused[guilty.fold.producer] = f"folding into {guilty.fold.producer} changed the model's output"
    except BaseException:
        for item in applied:
            item.undo(model)
        raise
    return refused


def _first_changed(model: nn.Module, batch: Any, seen: Trace, applied: list[_Applied]) -> _Applied | None:
    """The fold behind the first linear layer, in order of execution, whose output changed; None if all is well."""
    now = trace(model, batch)
    by_reader = {name: item for item in applied for name in item.fold.readers}
    producers = {item.fold.producer for item in applied}
    for position, name in enumerate(seen.order):
        if name in producers or close(now.samples[name], seen.samples[name]):
            continue
        before = [reader for reader in seen.order[: position + 1] if reader in by_reader]
        return by_reader[before[-1]] if before else applied[-1]
    same = len(now.outputs) == len(seen.outputs) and all(map(close, now.outputs, seen.outputs))
    return None if same else applied[-1]
