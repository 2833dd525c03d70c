"""Observers: what range of a layer's inputs a fixed INT8 scale should cover.

Each watches |x| batch by batch and names a threshold; the scale is threshold / 127, and what lies above saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127


class AbsmaxObserver:
    """The largest magnitude seen: nothing saturates."""

    def __init__(self) -> None:
        self._absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        absmax = x.abs().amax().float()
        self._absmax = absmax if self._absmax is None else torch.maximum(self._absmax, absmax)

    def threshold(self) -> float:
        return 0.0 if self._absmax is None else float(self._absmax)


class MovingAverageObserver:
    """Exponential moving average of each batch's largest magnitude, starting at that of the first."""

    def __init__(self, momentum: float = 0.9) -> None:
        self._momentum = momentum
        self._average: Tensor | None = None

    def update(self, x: Tensor) -> None:
        absmax = x.abs().amax().float()
        self._average = absmax if self._average is None else torch.lerp(absmax, self._average, self._momentum)

    def threshold(self) -> float:
        return 0.0 if self._average is None else float(self._average)


class HistogramObserver:
    """A streaming histogram of |x| over [0, range], which doubles when a batch passes its end.

    Doubling adds neighbouring bins in pairs, so it moves no count across a bin edge and loses none.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(f"bins: got {bins}, accepts an even number.")
        self.bins = bins
        self.range = 0.0
        self.absmax = 0.0
        self.counts: Tensor | None = None

    def update(self, x: Tensor) -> None:
        x = x.abs().float()
        absmax = float(x.amax())
        self.absmax = max(self.absmax, absmax)
        if self.counts is None or (self.range == 0.0 and absmax > 0.0):
            zeros_seen = 0 if self.counts is None else int(self.counts[0])
            self.counts = torch.zeros(self.bins, dtype=torch.float64, device=x.device)
            self.counts[0] = zeros_seen
            self.range = absmax
        if self.range == 0.0:
            self.counts[0] += x.numel()
            return
        while self.range < absmax:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.range *= 2
        self.counts += torch.histc(x, self.bins, 0.0, self.range)

    def _centers(self, counts: Tensor) -> Tensor:
        width = self.range / self.bins
        return (torch.arange(self.bins, dtype=torch.float64, device=counts.device) + 0.5) * width

    def threshold(self) -> float:
        if self.counts is None or self.range == 0.0:
            return 0.0
        return min(self._choose(self.counts), self.absmax)

    def _choose(self, counts: Tensor) -> float:
        raise NotImplementedError


class PercentileObserver(HistogramObserver):
    """The magnitude that ``percentile`` percent of the values do not pass, to within one bin."""

    def __init__(self, percentile: float = 99.99, bins: int = 2048) -> None:
        super().__init__(bins)
        if not 0.0 < percentile <= 100.0:
            raise ValueError(f"percentile: got {percentile}, accepts a number in (0, 100].")
        self._percentile = percentile

    def _choose(self, counts: Tensor) -> float:
        cumulative = counts.cumsum(0)
        wanted = cumulative[-1] * (self._percentile / 100.0)
        # searchsorted may pass the end when rounding lifts `wanted` above the total.
        index = min(int(torch.searchsorted(cumulative, wanted)), self.bins - 1)
        return (index + 1) * self.range / self.bins


class MSEObserver(HistogramObserver):
    """The threshold with the least mean squared error of quantising, every value taken at its bin's centre."""

    def __init__(self, candidates: int = 256, bins: int = 2048) -> None:
        super().__init__(bins)
        self._candidates = candidates

    def _choose(self, counts: Tensor) -> float:
        centers = self._centers(counts)
        fractions = torch.arange(1, self._candidates + 1, dtype=torch.float64, device=counts.device)
        scales = (fractions / self._candidates * self.absmax / LEVELS)[:, None]
        error = centers - (centers / scales).round().clamp_(max=LEVELS) * scales
        return float(scales[(error.square_() @ counts).argmin(), 0] * LEVELS)


class EntropyObserver(HistogramObserver):
    """The threshold with the least Kullback-Leibler divergence of the quantised distribution (TensorRT's method).

    For each candidate i, P is the histogram cut after i bins with the tail added to the last one, and Q is the cut
    histogram merged into 128 levels, each level spread evenly over its bins that are not empty.
    """

    def __init__(self, stride: int = 8, bins: int = 2048, levels: int = 128) -> None:
        super().__init__(bins)
        if bins < levels:
            raise ValueError(f"bins: got {bins}, accepts at least levels = {levels}.")
        self._stride = stride
        self._levels = levels

    def _choose(self, counts: Tensor) -> float:
        device, bins, levels = counts.device, self.bins, self._levels
        last = min(bins, int(self.absmax / self.range * bins) + 1)
        cuts = torch.arange(levels, last + 1, self._stride, device=device)
        if cuts.numel() == 0:
            return self.absmax
        index = torch.arange(bins, device=device)
        inside = index < cuts[:, None]
        kept = counts * inside
        tail = counts.sum() - kept.sum(1)
        p = kept.scatter_add(1, cuts[:, None] - 1, tail[:, None])

        level = torch.where(inside, index * levels // cuts[:, None], 0)
        filled = (kept > 0).double()
        zeros = torch.zeros(cuts.numel(), levels, dtype=torch.float64, device=device)
        mass = zeros.scatter_add(1, level, kept)
        width = zeros.scatter_add(1, level, filled)
        q = (mass / width.clamp(min=1.0)).gather(1, level) * filled

        p = p / p.sum(1, keepdim=True)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-300)
        # Q may be empty where P holds only the clipped tail; the floor makes that cost dear but finite.
        divergence = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(1)
        return float(cuts[divergence.argmin()]) * self.range / bins


Observer = AbsmaxObserver | MovingAverageObserver | HistogramObserver

OBSERVERS: dict[str, type[Observer]] = {
    "absmax": AbsmaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "entropy": EntropyObserver,
}
