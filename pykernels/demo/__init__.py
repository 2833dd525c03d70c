"""``python -m pykernels demo``: two pretrained transformers, quantised and measured on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pykernels demo", description=__doc__)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--quick", action="store_true", help="measure less: a check that all works, not a result")
    amount.add_argument("--full", action="store_true", help="twice the text and more rounds, for a result that is kept")
    parser.add_argument("--model", choices=("all", "language", "encoder"), default="all", help="which model to measure")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder of demo.png")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the rows to this CSV file as well")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON in place of the tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns 0, or 1 with a message when a package is missing.

    Tables (or JSON) go to stdout, progress to stderr, the picture to ``DIR/demo.png``.
    """
    arguments = _arguments(argv)
    start = time.perf_counter()
    try:
        import torch
        from rich.console import Console

        from . import report
        from .models import MissingPackage
        from .plot import save_plot
        from .progress import Steps
        from .run import DEMO, FULL, QUICK, measure_encoder, measure_language_model
    except ModuleNotFoundError as error:
        print(f"The demo needs {error.name}. Install it: pip install 'pykernels[demo]'", file=sys.stderr)
        return 1

    warnings.filterwarnings("ignore", message=".*(torch.ao.quantization|torch.quantize_per_tensor).*")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    steps = Steps(Console(stderr=True))
    sizes = QUICK if arguments.quick else FULL if arguments.full else DEMO
    rows = []
    try:
        if arguments.model != "encoder":
            rows += measure_language_model(sizes, device, steps)
        if arguments.model != "language":
            rows += measure_encoder(sizes, device, steps)
    except MissingPackage as error:
        print(f"The demo cannot run: {error}", file=sys.stderr)
        return 1

    with steps("Drawing"):
        picture = arguments.output / "demo.png"
        save_plot(rows, report.caption(device), picture)
    if arguments.csv:
        report.write_csv(rows, device, arguments.csv)
    if arguments.json:
        print(json.dumps(report.records(rows, device), indent=1))
    else:
        report.print_tables(rows, device)
    written = ", ".join(str(path) for path in (picture, arguments.csv) if path)
    print(f"Wrote {written} in {time.perf_counter() - start:.0f} s.", file=sys.stderr)
    return 0
