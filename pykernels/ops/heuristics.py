"""Which kernel an int8 product gets on sm_90: a pure function of its shape and of the number of SMs.

The rule and the set it chooses from stand once, in csrc/cuda/hopper/choose.h: the CUDA launcher includes it, and this
file asks the same code through pykernels._host, so that what is tested on a CPU is what a GPU does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """One kernel of the set.

    Attributes:
        name: as in csrc/cuda/hopper/schedule.h, which says what each is for.
        tile: rows, columns and bytes of K of an output tile; zeros for the kernels that are not Hopper's ("small_m",
            which reads b once for 16 rows, and "mma_sync", which serves what TMA cannot address).
        cluster: how many tiles, down and across, share their operands through multicast.
        pingpong: two warpgroups alternate over tiles, one multiplying while the other stores.
        stream_k: K is cut so that every SM has equally much to do.
    """

    name: str
    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    pingpong: bool
    stream_k: bool


@dataclass(frozen=True)
class Spread:
    """How a schedule spreads a product over the SMs.

    Attributes:
        tiles: that hold results. units: SMs that whole clusters can use. steps: of K, for each tile.
        makespan: steps of the SM that works longest; of stream-K's up to 7 less than it may be.
        cycles: predicted by the model, with the merging of partial sums; no GPU has confirmed it.
    """

    tiles: int
    units: int
    steps: int
    makespan: int
    cycles: int

    @property
    def efficiency(self) -> float:
        """Share of the SMs' steps that go into tiles: what wave quantisation leaves of 1."""
        return self.tiles * self.steps / (self.makespan * self.units)


def _host() -> Any:
    try:
        from .. import _host
    except ImportError as error:
        raise RuntimeError(
            "heuristics: pykernels._host is not built: run `python setup.py build_ext --inplace`"
        ) from error
    return _host


def _check(M: int, N: int, K: int, sm_count: int, out_bytes: int) -> None:
    for name, value, least in (("M", M, 0), ("N", N, 0), ("K", K, 0), ("sm_count", sm_count, 1)):
        if value < least:
            raise ValueError(f"choose: expected {name} to be at least {least}, got {value}")
    if out_bytes not in (2, 4):
        raise ValueError(f"choose: expected out_bytes to be 2 or 4, got {out_bytes}")


@functools.cache
def schedules() -> tuple[Schedule, ...]:
    """The set `choose` chooses from. Raises RuntimeError where pykernels._host is not built."""
    return tuple(Schedule(**each) for each in _host().int8_schedules())


def choose(M: int, N: int, K: int, sm_count: int, out_bytes: int = 2) -> Schedule:
    """The kernel for int8 [M, K] by int8 [N, K] transposed on a GPU with compute capability 9.0.

    Up to 16 rows "small_m". Beyond, of the Hopper kernels that may serve the shape (K a multiple of 16 and, to be cut,
    at least 2048; rows of the result on 16 bytes) those whose `Spread.efficiency` is within 10 % of the best, and of
    them the one predicted fastest. "mma_sync" where none may.

    Args:
        M, N, K: the sizes.
        sm_count: multiprocessors of the GPU, 132 for an H100 SXM or H200.
        out_bytes: width of an element of the result: 2 (bfloat16, float16) or 4 (float32, int32).

    Raises ValueError for a negative size, no multiprocessor or another width; RuntimeError where pykernels._host is not
    built.
    """
    _check(M, N, K, sm_count, out_bytes)
    return schedules()[_host().choose_int8_schedule(M, N, K, sm_count, out_bytes)]


def spread(schedule: Schedule, M: int, N: int, K: int, sm_count: int, out_bytes: int = 2) -> Spread | None:
    """How a schedule would spread a product; None where it may not serve it, or is not a Hopper kernel."""
    _check(M, N, K, sm_count, out_bytes)
    found = _host().int8_spread(schedules().index(schedule), M, N, K, sm_count, out_bytes)
    return Spread(**found) if found.pop("legal") and found else None
