"""What comes out: one table, a CSV of the curves, one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from .curves import draw_curves, provenance, read_csv
from .run import PERCENTILES
from .settings import Settings

BYTES = ("parameter_bytes", "gradient_bytes", "state_bytes", "saved_bytes", "peak_bytes")
TIMES = tuple(f"step_ms_p{percent}" for percent in PERCENTILES)
COLUMNS: tuple[str, ...] = (
    "run",
    "ranks",
    "step",
    "tokens",
    "train_loss",
    "validation_loss",
    "tokens_per_s",
    *TIMES,
    *BYTES,
)
COLUMNS += ("hidden_size", "layers", "vocab_size", "batch", "context", "device", "threads", "torch", "commit")
_MEMORY = dict(zip(BYTES, ("parameters", "gradients", "state", "saved", "peak"), strict=True))


def rows_of(name: str, result: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Rows of COLUMNS for a recipe: one for each validation."""
    memory = {column: result["memory"].get(key, "") for column, key in _MEMORY.items()}
    model = settings.model
    about: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "layers": model.num_hidden_layers,
        "vocab_size": model.vocab_size,
    }
    about |= {"batch": settings.batch, "context": settings.context, **provenance(settings.device)}
    rows, before = [], 0
    for step, loss in result["validation"]:
        recent = result["losses"][before:step]
        row = {"run": name, "ranks": result["ranks"], "step": step, "tokens": step * result["tokens_per_step"]}
        row |= {"train_loss": sum(recent) / len(recent), "validation_loss": loss}
        times = {column: result[column] for column in TIMES}
        rows.append({**row, "tokens_per_s": result["tokens_per_second"], **times, **memory, **about})
        before = step
    return rows


def table(results: dict[str, dict[str, Any]]) -> Table:
    """The table a person reads, at most 80 columns wide; percentages are of the first recipe."""
    shown = Table(
        title="Held-out loss; MB (10^6 bytes) of a rank; % of the first recipe\n",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("\nrecipe", no_wrap=True)
    headings = ("\nloss", "\n%", "tokens\n/s", "\n%", "saved\nMB", "\n%", "peak\nMB", "\n%")
    for heading in (*headings, "weight\nMB", "grads\nMB", "state\nMB"):
        shown.add_column(heading, justify="right", no_wrap=True)
    first = next(iter(results.values()))
    for name, result in results.items():
        loss, base = result["validation"][-1][1], first["validation"][-1][1]
        cells = [f"{loss:.4f}", f"{100 * (loss / base - 1):+.2f}"]
        speed, reference = result["tokens_per_second"], first["tokens_per_second"]
        cells += [f"{speed:,.0f}", f"{100 * speed / reference:.0f}" if reference else ""]
        for key in ("saved", "peak"):
            cells += [_megabytes(result, key), _percent(result, first, key)]
        cells += [_megabytes(result, key) for key in ("parameters", "gradients", "state")]
        shown.add_row(_label(name, result["ranks"], " "), *cells)
    return shown


def _megabytes(result: dict[str, Any], key: str) -> str:
    return f"{result['memory'][key] / 1e6:.1f}" if key in result["memory"] else ""


def _percent(result: dict[str, Any], first: dict[str, Any], key: str) -> str:
    if key not in result["memory"] or not first["memory"].get(key):
        return ""
    return f"{100 * result['memory'][key] / first['memory'][key]:.0f}"


def plot(csv_path: Path, png_path: Path) -> None:
    """Draws a CSV of this command: loss curves, what fills the peak of a step, tokens a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = read_csv(csv_path)
    last = {name: rows[-1] for name, rows in runs.items()}
    figure, axes = plt.subplot_mosaic(
        [["loss", "memory"], ["gap", "speed"]], figsize=(12, 8), height_ratios=(3, 2), layout="constrained"
    )
    about = next(iter(last.values()))
    tokens = int(about["batch"]) * int(about["context"])
    title = f"hidden {about['hidden_size']}, {about['layers']} layers, {tokens:,} tokens a step, {about['device']}"
    draw_curves(axes["loss"], axes["gap"], runs, title, "nats a token")
    _stack(axes["memory"], last)
    labels = [_label(name, row["ranks"]) for name, row in last.items()]
    speeds = [float(row["tokens_per_s"]) for row in last.values()]
    bars = axes["speed"].barh(labels, speeds, color=[f"C{i}" for i in range(len(labels))])
    axes["speed"].bar_label(bars, fmt="{:,.0f}", padding=3)
    axes["speed"].margins(x=0.15)
    axes["speed"].invert_yaxis()
    axes["speed"].set(title="tokens a second", xlabel="by the 20th percentile of the steps, all ranks together")
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path, dpi=130)
    plt.close(figure)


def _label(name: str, ranks: int | str, between: str = "\n") -> str:
    return f"{name}{between}x {ranks}" if int(ranks) > 1 else name


def _stack(axis: Any, last: dict[str, dict[str, str]]) -> None:
    """The peak in its parts. What is neither weight, state nor saved is gradients and temporaries at that moment."""
    measured = {name: row for name, row in last.items() if row["peak_bytes"]}
    labels = [_label(name, row["ranks"]) for name, row in measured.items()]
    left = [0.0] * len(labels)
    peaks = [int(row["peak_bytes"]) / 1e6 for row in measured.values()]
    parts = (("weights", "parameter_bytes"), ("optimizer state", "state_bytes"), ("saved for backward", "saved_bytes"))
    shades = ("#1b3a5b", "#2f6fa8", "#7fb3d9", "#cfd6dd")
    for (part, column), shade in zip(parts, shades, strict=False):
        sizes = [int(row[column]) / 1e6 for row in measured.values()]
        axis.barh(labels, sizes, left=left, label=part, color=shade)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    rest = [max(0.0, peak - start) for peak, start in zip(peaks, left, strict=True)]
    bars = axis.barh(labels, rest, left=left, label="gradients, temporaries", color=shades[-1])
    first = peaks[0] if peaks else 1.0
    axis.bar_label(bars, [f"{peak:.0f} MB, {100 * peak / first:.0f} %" for peak in peaks], padding=3)
    axis.margins(x=0.35)
    axis.invert_yaxis()
    axis.set(title="peak of a training step, on each rank", xlabel="MB")
    axis.legend(loc="lower right")
