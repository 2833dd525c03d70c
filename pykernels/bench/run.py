"""Runs cells and makes rows of them."""

from __future__ import annotations

import gc
import math
import time
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
LONG = 1.0  # seconds: what the profiler adds to such a call is nothing beside it


def run(
    cells: list[Cell],
    device: torch.device,
    threads: int,
    tick: Tick,
    save: Callable[[list[Row]], None],
    limit: float = math.inf,
    patience: float = 2.0,
) -> list[Row]:
    """Measures the cells and returns their rows, the ceilings first.

    The ceilings are measured before the first cell, between operations and after the last, and the best of each is
    kept: every row is held against the same numbers. `tick(text, done)` hears of each step; `save` gets the rows so
    far after each cell, so that a run that is killed leaves what it saw. After `limit` seconds no cell is begun.
    `patience`: see timer.measure.
    """
    timer: Timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
    ceilings = CudaCeilings(device) if device.type == "cuda" else CpuCeilings(threads)
    stamp = machine.stamp(device, threads)
    begin = time.monotonic()
    rows: list[Row] = []
    last = ""
    for done, cell in enumerate(cells):
        if time.monotonic() - begin > limit:
            rows.append(_without(cell, "pykernels", f"left out: the limit of {limit:g} s was reached", stamp))
            continue
        if cell.op != last:
            tick("ceilings", done)
            ceilings.measure()
            last = cell.op
        tick(f"{cell.op} {cell.shape}", done)
        rows += run_cell(cell, device, timer, stamp, partial(_tick, tick, done), patience)
        save(_against(ceilings.found, rows, stamp))
        gc.collect()
    tick("ceilings", len(cells))
    ceilings.measure()
    rows = _against(ceilings.found, rows, stamp)
    save(rows)
    return rows


def _tick(tick: Tick, done: int, text: str) -> None:
    tick(text, done)


def run_cell(
    cell: Cell,
    device: torch.device,
    timer: Timer,
    stamp: dict[str, Any],
    tick: Callable[[str], None],
    patience: float = 2.0,
) -> list[Row]:
    generator = torch.Generator(device).manual_seed(0)
    # On CUDA the timer overwrites the cache before every call, so one copy is cold each time.
    copies = cell.copies(machine.last_level_cache(device)) if device.type == "cpu" else 1
    context = Context(device, copies, generator)
    providers: dict[str, Provider] = {}
    known: dict[str, float] = {}
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
            begin = time.perf_counter()
            facts[name]["peak_bytes"] = memory.peak_bytes(partial(provider.call, 1), device)
            if device.type == "cpu" and (seconds := time.perf_counter() - begin) > LONG:
                known[name] = seconds
            if provider.forward is not None:
                facts[name]["saved_bytes"] = memory.saved_bytes(provider.forward, provider.parameters)
            providers[name] = provider
            del output
        for cache in cell.caches:
            tick(f"{cell.op} {cell.shape}: {len(providers)} providers, {cache}")
            calls: dict[str, Call] = {name: provider.call for name, provider in providers.items()}
            samples = measure(
                calls,
                timer,
                seconds=cell.seconds,
                rotate=cache == "cold",
                patience=patience,
                min_rounds=cell.rounds,
                known=known,
            )
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
        operations=cell.operations,
        bytes=cell.bytes,
        traffic="" if cache == "warm" else cell.traffic,
        tops=cell.operations / p50 * 1e-12,
        gbps=cell.bytes / p50 * 1e-9,
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


def _against(ceilings: Ceilings, rows: list[Row], stamp: dict[str, Any]) -> list[Row]:
    """The ceilings as rows, then the rows held against them."""
    first = []
    for kind in ("int8", "float32", "bfloat16", "read", "copy"):
        rate = ceilings.rates.get(kind)
        if rate is None and kind in ("float32", "bfloat16") and kind not in ceilings.absent:
            continue
        if rate is None:
            reason = ceilings.absent.get(kind, "not measured")
            first.append(Row("ceiling", kind, "", "", "", "", note=f"absent: {reason}", **stamp))
        else:
            rates: dict[str, Any] = {"gbps": rate * 1e-9} if kind in ("read", "copy") else {"tops": rate * 1e-12}
            first.append(Row("ceiling", kind, ceilings.names[kind], "", "", "", **rates, **stamp))
    return first + [row.against(ceilings.rates) for row in rows]


def seconds_needed(cells: Iterable[Cell]) -> float:
    """A first guess at the wall time: what the cells ask for and a second for each cell's set-up."""
    return sum(cell.seconds * len(cell.caches) + 1.0 for cell in cells)
