"""The demo's tables, its CSV file and its JSON."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .run import QUESTION, Row


@dataclass(frozen=True)
class Column:
    """A measured value: its key in ``Row.values``, its heading and how a number is written."""

    key: str
    heading: str
    write: Callable[[float], str]


COLUMNS = {
    "SmolLM2-135M": (
        Column("bytes", "size\nMB", lambda v: f"{v / 1e6:.0f}"),
        Column("prefill_ms", "prefill 512\nms", lambda v: f"{v:.0f}"),
        Column("decode_ms", "decode 1\nms", lambda v: f"{v:.1f}"),
        Column("loss", "loss\nnats/token", lambda v: f"{v:.4f}"),
        Column("loss_rise", "loss rise\nover float32", lambda v: f"{v:+.4f}"),
    ),
    "MiniLM-L6": (
        Column("bytes", "size\nMB", lambda v: f"{v / 1e6:.0f}"),
        Column("one_ms", "1 sentence\nms", lambda v: f"{v:.1f}"),
        Column("batch_ms", "32 sentences\nms", lambda v: f"{v:.1f}"),
        Column("cosine", "cosine\nto float32", lambda v: f"{v:.5f}"),
        Column("neighbour_agreement", "same nearest\nneighbour", lambda v: f"{100 * v:.1f} %"),
    ),
}
TITLES = {
    "SmolLM2-135M": "SmolLM2-135M-Instruct, language model",
    "MiniLM-L6": "all-MiniLM-L6-v2, sentence encoder",
}


def tables(rows: Sequence[Row]) -> Group:
    """One table for each model; a variant that is absent says why in place of its numbers."""
    shown: list[Any] = []
    for model, columns in COLUMNS.items():
        of_model = [row for row in rows if row.model == model]
        if not of_model:
            continue
        table = Table(title=TITLES[model], title_justify="left", title_style="bold")
        table.add_column("variant", no_wrap=True)
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
        notes = []
        for row in of_model:
            style = "bold" if row.variant.startswith("pykernels") else None
            if row.absent:
                table.add_row(row.variant, *["absent"] * len(columns), style="dim")
                notes.append(Text(f"  {row.variant}: absent, {row.absent}", style="dim"))
            else:
                table.add_row(row.variant, *(c.write(row.values[c.key]) for c in columns), style=style)
                for key, what in (("loss_windows", "windows"), ("sentences", "sentences")):
                    read, of = (r.values.get(key, 0) for r in (row, of_model[0]))
                    if read < of:
                        note = f"  {row.variant}: judged on {read:.0f} of {of:.0f} {what}, for it is slow here"
                        notes.append(Text(note, style="dim"))
        shown += [table, *notes, Text()]
        if any(row.text for row in of_model):
            answers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
            answers.add_column(no_wrap=True, style="cyan")
            answers.add_column(overflow="fold")
            for row in of_model:
                answers.add_row(row.variant, Text(row.text or "absent"))
            shown += [Text(f"What each answers to “{QUESTION}”", style="bold"), answers, Text()]
    return Group(*shown)


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers depend on: the date, the versions, the commit and the device."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "pykernels": _version(),
        "commit": _commit(),
    }


def _version() -> str:
    import pykernels

    return pykernels.__version__


def _cpu_name() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the working tree that this file is in, with ``-dirty`` when files differ; empty outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def caption(device: torch.device) -> str:
    """The machine and the versions, in one line."""
    where = environment(device)
    threads = "" if device.type == "cuda" else f", {where['threads']} threads"
    versions = f"torch {where['torch']}, pykernels {where['pykernels']} {where['commit']}"
    return f"{where['device']}{threads}, {versions}".strip()


def records(rows: Sequence[Row], device: torch.device) -> list[dict[str, Any]]:
    """One flat dictionary for each row, with the environment."""
    where = environment(device)
    return [
        {"model": r.model, "variant": r.variant, **r.values, "absent": r.absent, "text": r.text, **where} for r in rows
    ]


def write_csv(rows: Sequence[Row], device: torch.device, path: Path) -> None:
    """Write one line for each row; a value that a model does not have is left empty."""
    keys = list(dict.fromkeys(column.key for columns in COLUMNS.values() for column in columns))
    fields = ["model", "variant", *keys, "absent", *environment(device)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for record in records(rows, device):
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in record.items()})


def print_tables(rows: Sequence[Row], device: torch.device) -> None:
    """Print the tables, at least 100 columns wide so that nothing is cut in a log."""
    console = Console()
    console = Console(width=max(console.width, 100))
    console.print(tables(rows))
    console.print(caption(device), highlight=False, style="dim")
