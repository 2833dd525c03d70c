"""Percentiles of timing samples, and which samples count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_CLEAN = 5
CLEAN_SHARE = 0.02


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation between order statistics."""
    if not values:
        raise ValueError("percentile: values is empty, accepts one value or more")
    if not 0 <= q <= 100:
        raise ValueError(f"percentile: q is {q}, accepts 0 to 100")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass
class Samples:
    """Seconds per call of one provider, each with the share of it that our threads waited for a core.

    A sample is clean when that share is below CLEAN_SHARE: nobody else was running where we were.
    """

    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def add(self, seconds: float, wait: float) -> None:
        self.seconds.append(seconds)
        self.waits.append(wait)

    @property
    def clean(self) -> int:
        return sum(wait <= CLEAN_SHARE for wait in self.waits)

    @property
    def quiet(self) -> bool:
        """Whether enough samples are clean for the percentiles to rest on them alone."""
        return self.clean >= MIN_CLEAN

    @property
    def used(self) -> list[float]:
        """The clean samples; where they are too few, the MIN_CLEAN that waited least. Never chosen by their time."""
        ordered = sorted(zip(self.waits, range(len(self.waits)), strict=True))
        return [self.seconds[index] for _wait, index in ordered[: max(MIN_CLEAN, self.clean)]]

    def percentiles(self) -> tuple[float, float, float]:
        used = self.used
        return percentile(used, 20), percentile(used, 50), percentile(used, 80)
