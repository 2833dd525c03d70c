"""Runs cells and makes rows of them."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from . import machine, memory
from .case import Absent, Cell, Context, Provider
from .ceilings import Ceilings, CpuCeilings, CudaCeilings
from .rows import Row
from .stats import Samples
from .timer import Call, CpuTimer, CudaTimer, Timer, measure

Tick = Callable[[str, int], None]
FAILED = "failed:"


def run(cells: list[Cell], device: torch.device, threads: int, tick: Tick) -> tuple[list[Row], Ceilings]:
    """Measures every cell; `tick(text, done)` hears of each step.

    The ceilings are measured before the first cell, between operations and after the last, and the best is kept:
    percentages are filled in at the end, so every row is held against the same numbers.
    """
    timer: Timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    ceilings = CudaCeilings(device) if device.type == "cuda" else CpuCeilings(threads)
    stamp = machine.stamp(device, threads)
    measured: list[tuple[Cell, Row]] = []
    last = ""
    for done, cell in enumerate(cells):
        if cell.op != last:
            tick("ceilings", done)
            ceilings.measure()
            last = cell.op
        tick(f"{cell.op} {cell.shape}", done)
        measured += [(cell, row) for row in run_cell(cell, device, timer, stamp, partial(_tick, tick, done))]
        gc.collect()
    tick("ceilings", len(cells))
    ceilings.measure()
    return list(_finish(measured, ceilings.found, stamp)), ceilings.found


def _tick(tick: Tick, done: int, text: str) -> None:
    tick(text, done)


def run_cell(
    cell: Cell, device: torch.device, timer: Timer, stamp: dict[str, Any], tick: Callable[[str], None]
) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)
    # On CUDA the timer overwrites the cache before every call, so one copy is cold each time.
    copies = cell.copies(machine.last_level_cache(device)) if device.type == "cpu" else 1
    context = Context(device, copies, generator)
    providers: dict[str, Provider] = {}
    facts: dict[str, dict[str, Any]] = {}
    rows: list[Row] = []
    grads = torch.enable_grad() if "backward" in cell.variant else torch.no_grad()
    with grads, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in cell.build(cell, context):
            tick(f"{cell.op} {cell.shape}: {name}")
            try:
                provider = make()
                output = provider.call(0)
            except Absent as absent:
                rows.append(_without(cell, name, f"absent: {absent}", stamp))
                continue
            except Exception as error:  # a peer of another version must not end the run: its row says what it did
                rows.append(_without(cell, name, f"{FAILED} {type(error).__name__}: {str(error)[:300]}", stamp))
                continue
            facts[name] = {"rel_error": _rel_error(output, context.truth)}
            facts[name]["peak_bytes"] = memory.peak_bytes(partial(provider.call, 1), device)
            if provider.forward is not None:
                facts[name]["saved_bytes"] = memory.saved_bytes(provider.forward, provider.parameters)
            providers[name] = provider
            del output
        for cache in cell.caches:
            tick(f"{cell.op} {cell.shape}: {len(providers)} providers, {cache}")
            calls: dict[str, Call] = {name: provider.call for name, provider in providers.items()}
            samples = measure(calls, timer, seconds=cell.seconds, rotate=cache == "cold")
            rows += [_row(cell, name, p, cache, samples[name], facts[name], stamp) for name, p in providers.items()]
    return rows


def _without(cell: Cell, name: str, note: str, stamp: dict[str, Any]) -> Row:
    text = " ".join(note.split())
    return Row(cell.op, cell.variant, name, cell.shape, "", "", note=text, **stamp)


def _row(
    cell: Cell,
    name: str,
    provider: Provider,
    cache: str,
    samples: Samples,
    facts: dict[str, Any],
    stamp: dict[str, Any],
) -> Row:
    p20, p50, p80 = samples.percentiles()
    return Row(
        cell.op,
        cell.variant,
        name,
        cell.shape,
        provider.dtype,
        cache,
        p20 * 1e6,
        p50 * 1e6,
        p80 * 1e6,
        cell.operations,
        cell.bytes,
        cell.operations / p50 * 1e-12,
        cell.bytes / p50 * 1e-9,
        samples=len(samples.used),
        disturbed=len(samples.seconds) - samples.clean,
        quiet=int(samples.quiet),
        note=provider.note,
        **facts,
        **stamp,
    )


def _rel_error(output: object, truth: torch.Tensor | None) -> float | None:
    """||output - truth|| / ||truth|| over the rows that the truth has."""
    if truth is None or not isinstance(output, torch.Tensor):
        return None
    rows = output.detach()[: truth.shape[0]].to(truth)
    return ((rows - truth).norm() / truth.norm()).item()


def _finish(measured: Iterable[tuple[Cell, Row]], ceilings: Ceilings, stamp: dict[str, Any]) -> Iterable[Row]:
    for kind in ("int8", "read", "copy"):
        rate = ceilings.rates.get(kind)
        if rate is None:
            reason = ceilings.absent.get(kind, "not measured")
            yield Row("ceiling", kind, "", "", "", "", note=f"absent: {reason}", **stamp)
        else:
            rates: dict[str, Any] = {"tops": rate * 1e-12} if kind == "int8" else {"gbps": rate * 1e-9}
            yield Row("ceiling", kind, ceilings.names[kind], "", "", "", **rates, **stamp)
    for cell, row in measured:
        # Warm weights come out of a cache whose bandwidth is not measured: only the arithmetic bounds them.
        floor = ceilings.floor_seconds(cell.operations, {} if row.cache == "warm" else cell.memory)
        if floor is not None and row.p50_us is not None:
            row = dataclasses.replace(row, ceiling=floor[1], ceiling_percent=100 * floor[0] / (row.p50_us * 1e-6))
        yield row


def seconds_needed(cells: Iterable[Cell]) -> float:
    """A first guess at the wall time: what the cells ask for and a second for each cell's set-up."""
    return sum(cell.seconds * len(cell.caches) + 1.0 for cell in cells)
