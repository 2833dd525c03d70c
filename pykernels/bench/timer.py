"""Interleaved timing: every provider of a cell takes its turn in every round, so drift falls on all of them alike."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .stats import CLEAN_SHARE, Samples

Call = Callable[[int], object]

_LONGEST_REST = 0.1
_LONG = 0.05  # seconds
_WAIT_FLOOR_NS = 2_000  # what a thread waits in being woken on an idle machine


def wait_ns() -> int:
    """Nanoseconds that threads of this process were ready to run and had no core (Linux; 0 elsewhere)."""
    total = 0
    try:
        for task in os.scandir("/proc/self/task"):
            total += int(Path(task.path, "schedstat").read_text().split()[1])
    except (OSError, IndexError):  # no such accounting here, or a thread that ended between listing and reading
        return total
    return total


class CpuTimer:
    """Wall clock per call, and how long our threads waited for a core in it.

    After a disturbed sample it rests, longer each time: the scheduler lets a process in first that has slept, so on a
    busy machine more samples are clean (7 of 39 without the rest and 23 of 45 with it, calls of 1 ms, 12 processes on
    2 cores). It never rests on a quiet machine.
    """

    def __init__(self) -> None:
        self._rest = 0.0

    def sample(self, call: Call, start: int, count: int, samples: Samples) -> None:
        if self._rest:
            time.sleep(self._rest)
        if count > 1:
            call(start)  # untimed: the others' turns have taken the caches
        for index in range(start + 1, start + 1 + count):
            waited = wait_ns()
            begin = time.perf_counter_ns()
            call(index)
            elapsed = time.perf_counter_ns() - begin
            waited = max(0, wait_ns() - waited - _WAIT_FLOOR_NS)
            samples.add(elapsed * 1e-9, waited / elapsed)
            if waited > CLEAN_SHARE * elapsed:
                self._rest = min(_LONGEST_REST, 2 * self._rest + 0.01)
                return
        self._rest = 0.0

    def estimate(self, call: Call) -> float:
        call(0)
        best = float("inf")
        for index in (1, 2, 3):
            begin = time.perf_counter()
            call(index)
            best = min(best, time.perf_counter() - begin)
            if best > _LONG:
                break
        return best


class CudaTimer:
    """CUDA events around each call, the L2 cache overwritten before it."""

    def __init__(self, device: torch.device) -> None:
        l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._flush = torch.empty(max(4 * l2, 256 << 20), dtype=torch.int8, device=device)

    def sample(self, call: Call, start: int, count: int, samples: Samples) -> None:
        call(start)
        events = []
        for index in range(start + 1, start + 1 + count):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            begin.record()
            call(index)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        for begin, end in events:
            samples.add(begin.elapsed_time(end) * 1e-3, 0.0)

    def estimate(self, call: Call) -> float:
        call(0)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call(1)
        torch.cuda.synchronize()
        return time.perf_counter() - begin


Timer = CpuTimer | CudaTimer


def measure(
    calls: Mapping[str, Call],
    timer: Timer,
    *,
    seconds: float,
    rotate: bool,
    patience: float = 2.0,
    min_rounds: int = 3,
    max_samples: int = 60,
    known: Mapping[str, float] | None = None,
) -> dict[str, Samples]:
    """Times the providers in `calls`, interleaved, for about `seconds` of wall time in all.

    Args:
        calls: provider name to a callable taking the index of the call. With `rotate` the index runs on from call to
            call, so a provider that keeps several copies of its weights finds each of them out of the cache;
            without it the index is always 0 and the weights stay where the last call left them.
        seconds: wall time to spend. Every provider gets `min_rounds` turns whatever that takes. On a busy machine those
            that lack the clean samples their percentiles need go on taking turns until `patience` times as long.
        known: seconds a call of a provider took before, where it need not be called again to be estimated.
    Returns: the samples of each provider, the disturbed told from the clean.
    """
    estimates = dict(known or {})
    for name, call in calls.items():
        if name not in estimates:
            estimates[name] = timer.estimate(call if rotate else _first(call))
    turn = min(max(sum(estimates.values()), 1e-4) / len(calls), 0.02)
    # A long call fills the caches by itself: it is timed without an untimed one before it.
    counts = {
        name: 1 if cost > _LONG else max(2, min(10, round(turn / max(cost, 1e-7)))) for name, cost in estimates.items()
    }
    samples = {name: Samples() for name in calls}
    position = dict.fromkeys(calls, 4)
    order = list(calls)
    shuffle = random.Random(0)
    begin = time.perf_counter()
    rounds = 0
    while order:
        shuffle.shuffle(order)
        for name in order:
            call = calls[name] if rotate else _first(calls[name])
            before = len(samples[name].seconds)
            timer.sample(call, position[name], counts[name], samples[name])
            position[name] += len(samples[name].seconds) - before + 1
        rounds += 1
        elapsed = time.perf_counter() - begin
        if rounds < min_rounds:
            continue
        if elapsed > patience * seconds or all(s.clean >= max_samples for s in samples.values()):
            break
        if elapsed > seconds:
            order = [name for name in order if not samples[name].quiet]
    return samples


def _first(call: Call) -> Call:
    return lambda _index: call(0)
