"""Starts ranks and runs checks in them: one start of the interpreter and of torch serves many checks.

A check is a function of a `Rank`. What it raises is recorded under its name; a check after one that failed does not
run, since its ranks would no longer be in step. What it returns, the first rank writes to `<check>.pt` for the parent.
"""

from __future__ import annotations

import datetime
import importlib
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60  # seconds a collective may take: a hang fails
LIMIT = 240  # seconds for all checks


@dataclass
class Rank:
    """Where a check runs, and a folder that all ranks and the parent share."""

    rank: int
    world: int
    folder: Path


def _main(rank: int, world: int, checks: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    for check in checks:
        module, name = check.split(".")
        try:
            torch.manual_seed(0)
            begin = time.perf_counter()
            result = getattr(importlib.import_module(f".{module}", __package__), name)(Rank(rank, world, folder))
        except Exception:
            (folder / f"{name}.{rank}.error").write_text(traceback.format_exc())
            break
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
        (folder / f"{name}.{rank}.ok").write_text(f"{time.perf_counter() - begin:.1f} s")
    dist.destroy_process_group()


def run(world: int, checks: list[str], folder: Path) -> None:
    """Runs checks, each named `module.function` of this folder, on `world` gloo ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.start_processes(_main, (world, checks, folder), nprocs=world, join=False, start_method="spawn")
    end = datetime.datetime.now() + datetime.timedelta(seconds=LIMIT)
    try:
        while not context.join(timeout=1):
            assert datetime.datetime.now() < end, f"the ranks did not end within {LIMIT} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def result(world: int, check: str, folder: Path) -> Any:
    """What a check returned on the first rank; an assertion with every rank's traceback if it failed."""
    errors = [f.read_text() for f in sorted(folder.glob(f"{check}.*.error"))]
    assert not errors, "\n".join(errors)
    done = [(folder / f"{check}.{rank}.ok").exists() for rank in range(world)]
    assert all(done), f"{check} did not run: one before it failed"
    return torch.load(folder / f"{check}.pt", weights_only=False)
