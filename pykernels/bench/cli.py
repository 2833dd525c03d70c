"""`python -m pykernels bench`: measures, prints, writes a CSV; or draws plots from CSVs that were written before."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import machine, peers
from .case import Cell
from .rows import Row, merge, ratios, read_csv, to_json, write_csv
from .run import FAILED, Tick, run, seconds_needed

RESULTS = Path("benchmarks/results")
PLOTS = Path("docs/plots")
PLANNED = "planned: not measured yet"
GPU_LIMIT = 170.0  # a lent machine's time is short: what is left out then is named in the CSV


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m pykernels bench", description=__doc__)
    made.add_argument("op", nargs="*", help="operations to measure or draw (default: all; --list names them)")
    made.add_argument("--shape", default="*", metavar="PATTERN", help="only these cells, as in --shape '16x*'")
    made.add_argument("--list", action="store_true", help="name the operations and their cells")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would run, and which peers are installed; with --csv a skeleton",
    )
    made.add_argument("--quick", action="store_true", help="small shapes: a check of the harness, under a minute")
    made.add_argument("--gpu", action="store_true", help="measure on the CUDA device instead of the CPU")
    made.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    made.add_argument("--csv", type=Path, metavar="PATH", help="write the rows there")
    made.add_argument("--resume", action="store_true", help="measure only what --csv lacks or has from a busy machine")
    made.add_argument(
        "--limit", type=float, metavar="SECONDS", help=f"begin no cell after this long (with --gpu: {GPU_LIMIT:g})"
    )
    made.add_argument(
        "--patience", type=float, default=2.0, metavar="TIMES", help="how long to wait for quiet in a cell (default: 2)"
    )
    made.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    made.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="CSV",
        help="draw from a CSV: this one, or the one --csv writes, or all of benchmarks/results",
    )
    made.add_argument(
        "--gallery",
        type=Path,
        metavar="PAGE",
        help="write a Markdown page of all of benchmarks/results, its plots drawn",
    )
    made.add_argument("--out", type=Path, default=PLOTS, help="folder for the plots (default: docs/plots)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.gallery is not None:
        return _gallery(arguments.gallery, arguments.out)
    if arguments.plot is not None and arguments.csv is None:
        return _plot(_csvs(arguments.plot), arguments.out, arguments.op)
    if arguments.gpu and not arguments.dry_run and not torch.cuda.is_available():
        return _fail("--gpu: torch.cuda.is_available() is False; accepts a machine with CUDA and a torch built for it")
    from . import cases

    known = cases.load()
    unknown = [op for op in arguments.op if op not in known]
    if unknown:
        return _fail(f"op: got {', '.join(unknown)}; accepts {', '.join(known)}")
    modules = [known[op] for op in arguments.op or known]
    cells: list[Cell] = [cell for module in modules for cell in module.cells(arguments.quick, arguments.gpu)]
    cells = [cell for cell in cells if fnmatch.fnmatch(cell.shape, arguments.shape)]
    if arguments.list or arguments.dry_run:
        if arguments.dry_run and arguments.csv is not None:
            # The table's skeleton: --resume measures what such a row leaves open.
            write_csv(arguments.csv, (Row(c.op, c.variant, "pykernels", c.shape, "", "", note=PLANNED) for c in cells))
        return _describe(cells, arguments.gpu)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if arguments.gpu else "cpu")
    machine.keep_freed_memory()
    before = read_csv(arguments.csv) if arguments.resume and arguments.csv and arguments.csv.exists() else []
    cells = _unfinished(cells, before)

    def save(rows: list[Row]) -> None:
        if arguments.csv is not None:
            write_csv(arguments.csv, merge(before, rows))

    limit = arguments.limit or (GPU_LIMIT if arguments.gpu else math.inf)
    with _progress(len(cells)) as tick:
        rows = merge(before, run(cells, device, torch.get_num_threads(), tick, save, limit, arguments.patience))
    if arguments.json:
        print(to_json(rows))
    else:
        _print(rows)
    if arguments.plot is not None:
        _plot([arguments.csv], arguments.out, arguments.op)
    return 1 if any(row.ours and row.note.startswith(FAILED) for row in rows) else 0


def _csvs(given: str) -> list[Path]:
    if given:
        return [Path(given)]
    # The demo and the examples write their CSVs there too.
    return [path for path in sorted(RESULTS.glob("*.csv")) if path.read_text().startswith("op,")]


def _unfinished(cells: list[Cell], rows: list[Row]) -> list[Cell]:
    """The cells, and of their caches those, that have no rows or a row whose samples were all disturbed."""
    seen = {row.cell for row in rows if row.measured}
    busy = {row.cell for row in rows if row.measured and not row.quiet}
    found = []
    for cell in cells:
        keys = {cache: (cell.op, cell.variant, cell.shape, cache) for cache in cell.caches}
        caches = tuple(cache for cache, key in keys.items() if key not in seen or key in busy)
        if caches:
            found.append(dataclasses.replace(cell, caches=caches))
    return found


def _plot(paths: list[Path], out: Path, ops: list[str]) -> int:
    from .plot import draw

    if not paths:
        return _fail(f"--plot: no CSV in {RESULTS}; name one, or run from the root of the repository")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        return _fail(f"--plot: {missing[0]} is not a file; accepts a CSV written by --csv")
    for path in paths:
        for figure in draw(path, out, ops):
            print(figure)
    return 0


def _gallery(page: Path, plots: Path) -> int:
    from .gallery import render

    if page.parent.resolve() != plots.parent.resolve():
        return _fail(f"--gallery: got {page}; accepts a file beside the folder of the plots, {plots}")
    status = _plot(_csvs(""), plots, [])
    if status == 0:
        page.write_text(render(RESULTS, plots))
        print(page)
    return status


def _describe(cells: list[Cell], cuda: bool) -> int:
    for cell in cells:
        print(
            f"{cell.op:26s} {cell.variant:18s} {cell.shape:18s} {'+'.join(cell.caches):10s} "
            f"{cell.operations:.3g} operations, {cell.bytes:.3g} bytes"
        )
    for name, version in peers.versions().items():
        print(f"peer {name}: {version}")
    device = "the CUDA device" if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{len(cells)} cells on {device}, about {seconds_needed(cells) / 60:.1f} minutes and what compiling takes")
    return 0


def _fail(message: str) -> int:
    print(f"pykernels bench: {message}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[progress.description]{task.description:60s}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Redrawn by hand at each step: a refreshing thread would take a core from what is being timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=total)

        def tick(text: str, done: int) -> None:
            progress.update(task, description=text, completed=done)
            progress.refresh()

        yield tick


def _print(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(140, Console().width))
    for row in rows:
        if row.op == "ceiling":
            rate = f"{row.tops * 1e3:.0f} Gop/s" if row.tops else f"{row.gbps:.1f} GB/s" if row.gbps else row.note
            console.print(f"ceiling {row.variant}: {rate} {row.provider}", highlight=False)
    table = Table(title="pykernels against the fastest peer of each cell")
    for name in (
        "op",
        "variant",
        "shape",
        "cache",
        "p50 us",
        "p20-p80",
        "% of",
        "ceiling",
        "fastest peer",
        "p50 us",
        "ratio",
        "quiet",
    ):
        table.add_column(name, justify="left" if name in ("op", "variant", "fastest peer", "ceiling") else "right")
    for ours, peer, ratio in ratios(rows):
        percent = "" if ours.ceiling_percent is None else f"{ours.ceiling_percent:.0f}"
        quiet = "yes" if ours.quiet and peer.quiet else "no"
        table.add_row(
            ours.op + ours.provider.removeprefix("pykernels"),
            ours.variant,
            ours.shape,
            ours.cache,
            f"{ours.p50_us:.1f}",
            f"{ours.p20_us:.1f}-{ours.p80_us:.1f}",
            percent,
            ours.ceiling,
            peer.provider,
            f"{peer.p50_us:.1f}",
            f"{ratio:.2f}x",
            quiet,
        )
    console.print(table)
    notes = {(row.provider, row.note) for row in rows if not row.measured and row.op != "ceiling"}
    for provider, note in sorted(notes):
        console.print(f"{provider}: {note}", highlight=False)
