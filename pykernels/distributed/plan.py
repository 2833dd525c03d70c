"""`python -m pykernels plan`: what a rank keeps under each ZeRO stage, for every width of state and every rounding."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from .memory import DTYPES, FLAGS, STAGES, STATE_BITS, memory_per_rank, state_bytes_per_parameter

PAPER = "float32 copy"


def choices(param_dtype: str) -> Iterator[tuple[int, str | None]]:
    """(state_bits, rounding), the paper's mixed precision first. float32 parameters leave nothing to round."""
    if param_dtype == "float32":
        yield from ((bits, "nearest") for bits in STATE_BITS)
        return
    yield 32, None
    for bits in STATE_BITS:
        yield from ((bits, rounding) for rounding in ("split_master", "kahan", "stochastic", "nearest"))


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One dictionary for each choice: what it is, state bytes a parameter, and bytes a rank under each stage."""
    rows = []
    for state_bits, rounding in choices(options.param_dtype):
        shared: dict[str, Any] = {
            "state_bits": state_bits,
            "rounding": rounding,
            "param_dtype": DTYPES[options.param_dtype],
            "algorithm": options.algorithm,
            "block_size": options.block_size,
        }
        grad_dtype = DTYPES[options.grad_dtype] if options.grad_dtype else None
        stages = {
            str(stage): memory_per_rank(
                options.params, options.world_size, stage, grad_dtype=grad_dtype, offload=options.offload, **shared
            )
            for stage in STAGES
        }
        rows.append(
            {
                "state_bits": state_bits,
                "rounding": rounding or PAPER,
                "state_bytes_per_parameter": state_bytes_per_parameter(**shared),
                "bytes_per_rank": stages,
            }
        )
    return rows


def show(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The table for people, in GB of 10^9 bytes."""
    from rich.console import Console
    from rich.table import Table

    where = ", optimizer state on the host" if options.offload else ""
    table = Table(
        title=f"{options.params:.4g} parameters in {options.param_dtype}, {options.algorithm}, "
        f"{options.world_size} ranks{where}: GB a rank (10^9 bytes)"
    )
    table.add_column("state\nbits", justify="right")
    table.add_column("rounding", no_wrap=True)
    table.add_column("state\nB/param", justify="right")
    for heading in ("stage 0\n", "stage 1\nstate", "stage 2\n+ grads", "stage 3\n+ params"):
        table.add_column(heading, justify="right")
    for row in rows:
        gigabytes = [value / 1e9 for value in row["bytes_per_rank"].values()]
        cells = [f"{value:.1f}" if value >= 1 else f"{value:.3g}" for value in gigabytes]
        table.add_row(str(row["state_bits"]), row["rounding"], f"{row['state_bytes_per_parameter']:.5g}", *cells)
    console = Console()
    console.print(table)
    console.print("Not in it: activations, and in stages 2 and 3 the parameters in use.")


def _count(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def main(argv: list[str]) -> int:
    """The command line of `plan`."""
    parser = argparse.ArgumentParser(prog="python -m pykernels plan", description=__doc__)
    parser.add_argument("--params", type=_count, required=True, help="number of parameters, such as 7.5e9")
    parser.add_argument("--world-size", type=_positive, default=1, help="number of ranks (default 1)")
    parser.add_argument("--param-dtype", choices=DTYPES, default="bfloat16", help="(default bfloat16)")
    parser.add_argument("--grad-dtype", choices=DTYPES, help="(default: as the parameters)")
    parser.add_argument("--algorithm", choices=FLAGS, default="adamw", help="(default adamw)")
    parser.add_argument("--block-size", type=_positive, default=256, help="of 8-bit state (default 256)")
    parser.add_argument("--offload", choices=["optimizer"], help="leave the optimizer state to the host")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(argv)
    rows = plan(options)
    if options.json:
        about = {name: value for name, value in vars(options).items() if name != "json"}
        json.dump({**about, "choices": rows}, sys.stdout, indent=2)
        print()
    else:
        show(options, rows)
    return 0
