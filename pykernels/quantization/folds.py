"""Which layers can take over a factor on each input channel of a linear layer, and the arithmetic of moving it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .places import tied_names
from .trace import Trace, close, scaled_inputs

_LOOK_BACK = 3  # linear layers before a reader that may produce its input: v, up and their siblings


@dataclass(frozen=True)
class Fold:
    """``readers`` read channels of ``producer``; channel j of theirs is channel ``index[j]`` of the producer's output.

    Attributes:
        kind: "norm", whose weight is a vector; "offset_norm", which multiplies by 1 + weight; "linear".
        index: int64 [in_features of the readers], or None where the channels are the same.
    """

    kind: str
    producer: str
    readers: tuple[str, ...]
    index: Tensor | None = None

    def channels(self, model: nn.Module) -> int:
        return _weight(model, self.producer).shape[0]

    def by_producer(self, values: Tensor, model: nn.Module) -> Tensor:
        """The largest of the readers' channel ``values`` that share a channel of the producer, [channels]."""
        if self.index is None:
            return values
        zeros = values.new_zeros(self.channels(model))
        return zeros.scatter_reduce(0, self.index.to(values.device), values, "amax")

    def by_reader(self, factors: Tensor) -> Tensor:
        return factors if self.index is None else factors[self.index.to(factors.device)]

    def producer_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """The weight and bias that the producer's output is linear in."""
        producer = model.get_submodule(self.producer)
        return {name: p for name, p in producer.named_parameters(recurse=False) if name in ("weight", "bias")}

    def is_exact(self, model: nn.Module, factors: Tensor) -> bool:
        """True if no weight leaves the range in which its dtype holds it times a power of two without rounding."""
        pairs = [] if self.kind == "offset_norm" else list(self.producer_parameters(model).values())
        scales = [_along_rows(1 / factors, parameter) for parameter in pairs]
        for name in self.readers:
            pairs.append(_weight(model, name))
            scales.append(self.by_reader(factors).to(pairs[-1]))
        return all(torch.equal(p * scale / scale, p) for p, scale in zip(pairs, scales, strict=True))

    @torch.no_grad()
    def apply(self, model: nn.Module, factors: Tensor) -> None:
        """Divide the producer's output by ``factors`` [channels] and multiply the readers' weights to match."""
        for name, parameter in self.producer_parameters(model).items():
            inverse = _along_rows(1 / factors, parameter)
            if self.kind == "offset_norm" and name == "weight":
                parameter.copy_((1 + parameter) * inverse - 1)
            else:
                parameter.mul_(inverse)
        for name in self.readers:
            weight = _weight(model, name)
            weight.mul_(self.by_reader(factors).to(weight))


def _along_rows(factors: Tensor, parameter: Tensor) -> Tensor:
    factors = factors.to(parameter)
    return factors[:, None] if parameter.dim() == 2 else factors


def find_folds(model: nn.Module, batch: Any, seen: Trace, targets: list[str]) -> tuple[list[Fold], dict[str, str]]:
    """Folds that reach ``targets``, each target at most once, and why the others have none."""
    ties = tied_names(model)
    reasons: dict[str, str] = {}
    folds: list[Fold] = []
    open_targets: list[str] = []
    for name in targets:
        if name not in seen.inputs:
            reasons[name] = "the batch never ran it"
        elif any(name in fold.readers for fold in folds):
            continue
        elif len(ties[id(model.get_submodule(name).weight)]) > 1:
            reasons[name] = "its weight is tied to another layer's"
        else:
            fold, reason = _norm_fold(model, seen, ties, name)
            if fold is not None:
                folds.append(fold)
            else:
                reasons[name] = reason
                open_targets.append(name)
    for fold in _linear_folds(model, batch, seen, ties, open_targets):
        folds.append(fold)
        for name in fold.readers:
            reasons.pop(name, None)
    covered = {name for fold in folds for name in fold.readers}
    return folds, {name: reason for name, reason in reasons.items() if name not in covered}


def _norm_fold(model: nn.Module, seen: Trace, ties: dict[int, list[str]], name: str) -> tuple[Fold | None, str]:
    sources = seen.sources[name]
    if None in sources or len(sources) != 1:
        return None, "its input comes from no norm, and not channel by channel from one linear layer"
    (norm,) = sources
    assert norm is not None
    readers = seen.readers[norm]
    if None in readers:
        return None, f"the output of {norm} is also read by other than linear layers"
    names = tuple(sorted(reader for reader in readers if reader is not None))
    if any(seen.sources[reader] != {norm} for reader in names):
        return None, f"a layer that reads {norm} also runs on another input"
    tensors = [model.get_submodule(norm), *(model.get_submodule(reader) for reader in names)]
    if any(len(ties[id(module.weight)]) > 1 for module in tensors):
        return None, f"{norm} or one of its readers has a tied weight"
    kind = _norm_kind(model, seen, norm)
    return (
        (None, f"the output of {norm} does not scale with its weight")
        if kind is None
        else (Fold(kind, norm, names), "")
    )


def _norm_kind(model: nn.Module, seen: Trace, norm: str) -> str | None:
    """Halve every other channel through the parameters and see whether exactly these channels of the output halve."""
    args, kwargs, output = seen.norm_calls[norm]
    factors = torch.ones(output.shape[-1], device=output.device)
    factors[::2] = 2.0
    module = model.get_submodule(norm)
    saved = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}
    for kind in ("norm", "offset_norm"):
        try:
            Fold(kind, norm, ()).apply(model, factors)
            with torch.no_grad():
                if close(module(*args, **kwargs), output / factors.to(output)):
                    return kind
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    module.get_parameter(name).copy_(value)
    return None


def _linear_folds(
    model: nn.Module, batch: Any, seen: Trace, ties: dict[int, list[str]], targets: list[str]
) -> list[Fold]:
    """Pairs in which each input channel of a reader is one output channel of an earlier layer times something.

    True of v -> o through attention, of up -> down through a gate, of two layers around a ReLU. It is found by
    trying: multiply each output channel by a random power of two, and compare what reaches the reader.
    """
    position = {name: seen.order.index(name) for name in seen.order if seen.order.count(name) == 1}
    generator = torch.Generator().manual_seed(0)
    folds: list[Fold] = []
    for back in range(1, _LOOK_BACK + 1):
        taken = {fold.producer for fold in folds} | {name for fold in folds for name in fold.readers}
        pairs = {}
        for name in targets:
            if name in taken or position.get(name, -1) < back:
                continue
            producer = seen.order[position[name] - back]
            siblings = seen.inputs[producer] is seen.inputs[name]
            free = producer in position and producer not in taken and len(ties[id(_weight(model, producer))]) == 1
            if free and not siblings:
                pairs[name] = producer
        if not pairs:
            continue
        factors = {
            producer: torch.randint(0, 3, (_weight(model, producer).shape[0],), generator=generator).float().exp2()
            for producer in pairs.values()
        }
        got = scaled_inputs(model, batch, seen, factors)
        for name, producer in pairs.items():
            for index in _channel_maps(_weight(model, producer).shape[0], _weight(model, name).shape[1]):
                factor = factors[producer] if index is None else factors[producer][index]
                if name in got and close(got[name], seen.inputs[name] * factor.to(seen.inputs[name])):
                    folds.append(Fold("linear", producer, (name,), index))
                    break
    return folds


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight  # type: ignore[return-value]


def _channel_maps(out_features: int, in_features: int) -> list[Tensor | None]:
    """The same channels, or with grouped queries each head of the producer repeated, for every possible head size."""
    if out_features == in_features:
        return [None]
    repeats, rest = divmod(in_features, out_features)
    if rest or repeats < 2:
        return []
    channel = torch.arange(in_features)
    return [
        channel // (size * repeats) * size + channel % size
        for size in range(1, out_features + 1)
        if out_features % size == 0
    ]
