"""docs/gallery.md: every committed result as tables and plots, made from the CSVs and nothing else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .rows import Row, ratios, read_csv

HEAD = """# Gallery

Every committed result. `make gallery` makes this page and the plots from the CSVs in benchmarks/results; a test fails
when they differ, so edit those, not this. How each figure is measured: benchmarks/README.md.

*ratio* is the fastest peer's time over ours, in the same run: above 1 pykernels is the faster. *% of ceiling* holds the
least time that the work can take, by the arithmetic or the bandwidth of that run, against ours. A cell in which another
process held a core throughout is marked *busy*.
"""
FOLD = 24  # rows of a table that are shown unfolded
ELSEWHERE = {"accuracy-cpu": "demo-cpu"}  # a CSV whose picture has another name


def render(results: Path, plots: Path) -> str:
    """The page, as Markdown for a file beside the folder `plots`."""
    benches = [path for path in sorted(results.glob("*.csv")) if path.read_text().startswith("op,")]
    others = [path for path in sorted(results.glob("*.csv")) if path not in benches]
    parts = [HEAD, *(_bench(path, plots) for path in benches)]
    if others:
        parts.append("## Whole models and training\n\n" + "\n".join(_other(path, plots) for path in others))
    return "\n".join(parts)


def _bench(path: Path, plots: Path) -> str:
    rows = read_csv(path)
    measured = [row for row in rows if row.measured]
    device = next(row.device for row in rows if row.device)
    threads = next((row.threads for row in measured if row.threads), None)
    ops = list(dict.fromkeys(row.op for row in measured))
    lines = [f"## {device}: {', '.join(ops[:3])}{' and more' if len(ops) > 3 else ''}", ""]
    dates = sorted({row.date for row in measured})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines.append(
        f"benchmarks/results/{path.name}, {span}{f', {threads} threads' if threads else ''}. Ceilings of the run:"
    )
    for row in rows:
        if row.op == "ceiling":
            rate = f"{row.tops * 1e3:,.0f} Gop/s" if row.tops else f"{row.gbps:.1f} GB/s" if row.gbps else row.note
            lines.append(f"{row.variant} {rate} ({row.provider});")
    lines[-1] = lines[-1].removesuffix(";") + "."
    lines.append("")
    for figure in sorted(plots.glob("*.png")):
        # A CSV's name may begin another's: the rest must be one of its own figures.
        rest = figure.stem.removeprefix(f"{path.stem}-")
        longer = any(figure.stem.startswith(other.stem) for other in _longer(path))
        if rest != figure.stem and not longer:
            lines += [f"![{rest}, {device}]({plots.name}/{figure.name})", ""]
    for op in ops:
        lines += _table(op, [row for row in rows if row.op == op])
    return "\n".join(lines)


def _longer(path: Path) -> list[Path]:
    return [other for other in path.parent.glob(f"{path.stem}-*.csv") if other != path]


def _table(op: str, rows: Sequence[Row]) -> list[str]:
    found = ratios(list(rows))
    against = {id(ours): (peer, ratio) for ours, peer, ratio in found}
    lines = [f"### {op}", ""]
    if found:
        values = sorted(ratio for _, _, ratio in found)
        ahead = sum(value >= 1 for value in values)
        lines += [
            f"{len(values)} cell{'s' * (len(values) > 1)}: {values[0]:.2f} to {values[-1]:.2f} times the fastest "
            f"peer's speed, median {median(values):.2f}; {ahead} at or above 1.",
            "",
        ]
    ours = [row for row in rows if row.ours and row.measured]
    held = any((row.peak_bytes or row.saved_bytes or 0) > 5e4 for row in ours)
    heading = ["", "shape", "weights", "ms", "% of ceiling", "fastest peer", "ratio", *(["MB"] if held else [])]
    table = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row in ours:
        peer, ratio = against.get(id(row), (None, None))
        name = f"{row.variant}{row.provider.removeprefix('pykernels')}"
        percent = "" if row.ceiling_percent is None else f"{row.ceiling_percent:.0f} {row.ceiling}"
        busy = "" if row.quiet else " *busy*"
        cells = [name, row.shape, row.cache, f"{(row.p50_us or 0) / 1e3:.3g}{busy}", percent]
        cells += [peer.provider if peer else "", f"{ratio:.2f}" if ratio else ""]
        if held:
            size = row.peak_bytes or row.saved_bytes
            cells.append(f"{size / 1e6:,.1f}" if size and size > 5e4 else "")
        table.append("| " + " | ".join(cells) + " |")
    notes = {(row.provider, row.note.removeprefix("absent: ")) for row in rows if not row.measured and row.note}
    absent = [f"{provider} ({note})" for provider, note in sorted(notes)]
    if len(ours) > FOLD:
        table = [f'<details markdown="1"><summary>{len(ours)} rows</summary>', "", *table, "", "</details>"]
    return [*lines, *table, "", *([f"Not measured: {'; '.join(absent)}.", ""] if absent else [])]


def _other(path: Path, plots: Path) -> str:
    with path.open(newline="") as file:
        commits = sorted({row.get("commit", "") for row in csv.DictReader(file)} - {""})
    made = f" (commit {', '.join(commits)})" if commits else ""
    lines = [f"### {path.stem}", "", f"benchmarks/results/{path.name}{made}", ""]
    figure = plots / f"{ELSEWHERE.get(path.stem, path.stem)}.png"
    if figure.exists():
        lines += [f"![{path.stem}]({plots.name}/{figure.name})", ""]
    return "\n".join(lines)
