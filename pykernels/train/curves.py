"""Loss curves as CSV files and pictures: for this command and for the examples."""

from __future__ import annotations

import csv
import itertools
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def provenance(device: str) -> dict[str, str | int]:
    """The last columns of a row: where it was measured, and at which commit."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
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


def draw_curves(
    top: Any, bottom: Any, runs: dict[str, list[dict[str, str]]], title: str, unit: str = "nats a byte"
) -> None:
    """Validation losses on one matplotlib axis, their distance from the first run's in percent on the other."""
    curves = {name: [(int(r["step"]), float(r["validation_loss"])) for r in rows] for name, rows in runs.items()}
    first = next(iter(curves.values()))
    for (name, curve), style in zip(curves.items(), itertools.cycle(("-", "--", ":", "-."))):
        top.plot(*zip(*curve, strict=True), style, label=f"{name}: {curve[-1][1]:.4f}")
        gap = [(step, 100 * (loss / base - 1)) for (step, loss), (_, base) in zip(curve, first, strict=True)]
        bottom.plot(*zip(*gap, strict=True), style, label=name)
    top.set_ylabel(f"validation loss, {unit}")
    top.set_title(title)
    top.legend(title="final")
    bottom.axhspan(-1, 1, color="0.92", zorder=0, label="within 1 %")
    bottom.set(xlabel="step", ylabel=f"loss against {next(iter(curves))}, %")
    if len(runs) <= 4:  # more would not fit, and the legend above names them
        bottom.legend(ncols=4)
