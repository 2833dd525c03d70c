"""What the examples that train on the King James text share: the text, its batches, the schedule, the curves' files."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pykernels.train.batches import learning_rate, windows
from pykernels.train.corpus import king_james
from pykernels.train.curves import draw_curves, provenance, read_csv, write_csv
from pykernels.train.errors import TrainingError
from pykernels.train.progress import bars

__all__ = ["COLUMNS", "Run", "batches", "command", "corpus", "draw_curves", "final_losses", "finish", "lockstep"]
__all__ += ["parse", "read_csv"]
COLUMNS = ("run", "step", "tokens", "train_loss", "validation_loss", "step_ms", "device", "threads", "torch", "commit")
NUMBERS = "loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"


def corpus() -> Tensor:
    """The 4.2 million bytes of the King James text, as uint8."""
    try:
        text = king_james()
    except TrainingError as error:
        raise SystemExit(f"{error}") from None
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def batches(text: Tensor, batch: int, context: int, count: int, seed: int, device: str) -> list[Tensor]:
    """count batches int64 [batch, context + 1] from random places."""
    return list(windows(text, batch, context, count, seed).to(device))


@dataclass
class Run:
    """One model with its optimizer. The model gives the mean loss of tokens [batch, context + 1]."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)

    def loss(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def step(self, tokens: Tensor, lr: float) -> float:
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = lr
        loss = self.loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = loss.item()
        self.seconds.append(time.perf_counter() - start)
        return value

    @torch.no_grad()
    def validate(self, held_out: list[Tensor]) -> float:
        return sum(self.loss(batch).item() for batch in held_out) / len(held_out)


def lockstep(
    runs: Sequence[Run], train: list[Tensor], held_out: list[Tensor], lr: float, every: int, device: str, show: bool
) -> list[dict[str, Any]]:
    """Gives every run each batch in turn; returns rows of COLUMNS, one a run for each `every` steps and the last."""
    about, rows, steps = provenance(device), [], len(train)
    with bars(show, NUMBERS) as shown:
        tasks = {run.name: shown.add_task(run.name, total=steps, loss=math.nan, speed=0.0) for run in runs}
        sums = {run.name: 0.0 for run in runs}
        for step, batch in enumerate(train, 1):
            tokens = batch.numel() - batch.shape[0]
            for run in runs:
                loss = run.step(batch, learning_rate(step - 1, steps, lr))
                sums[run.name] += loss
                shown.update(tasks[run.name], advance=1, loss=loss, speed=tokens / run.seconds[-1])
                if step % every == 0 or step == steps:
                    count = (step - 1) % every + 1
                    recent = sorted(run.seconds[-count:])
                    row = {"run": run.name, "step": step, "tokens": step * tokens, "train_loss": sums[run.name] / count}
                    row |= {"validation_loss": run.validate(held_out), "step_ms": 1e3 * recent[len(recent) // 2]}
                    rows.append({**row, **about})
                    sums[run.name] = 0.0
    return rows


def final_losses(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The last validation loss of each run."""
    return {row["run"]: row["validation_loss"] for row in rows}


def command(doc: str, runs: Sequence[str], known: Sequence[str], steps: int) -> argparse.ArgumentParser:
    """The options that every example has. known: the runs there are; runs: those without --runs."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--runs", default=",".join(runs), help=f"of {', '.join(known)}; the first is the baseline")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the tables")
    parser.add_argument("--csv", type=Path, help="write the curves here")
    parser.add_argument("--plot", type=Path, help="draw the CSV here; needs --csv")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None, known: Sequence[str]) -> argparse.Namespace:
    """The options, checked; `names` are the runs."""
    args = parser.parse_args(argv)
    args.names = tuple(args.runs.split(","))
    if unknown := set(args.names) - set(known):
        parser.error(f"--runs: unknown {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    if args.steps < 1:
        parser.error(f"--steps: got {args.steps}, accepts 1 or more")
    if args.plot and not args.csv:
        parser.error("--plot draws what --csv wrote: give both")
    return args


def finish(
    args: argparse.Namespace,
    result: dict[str, Any],
    report: Callable[[dict[str, Any]], None],
    plot: Callable[[Path, Path], None],
    columns: Sequence[str] = COLUMNS,
) -> None:
    """Writes, draws and prints what the options ask for."""
    if args.csv:
        write_csv(args.csv, result["rows"], columns)
    if args.plot:
        plot(args.csv, args.plot)
    if args.json:
        json.dump(result, sys.stdout)
    else:
        report(result)
