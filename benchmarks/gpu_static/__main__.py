"""`make gpu-static`: writes docs/gpu_static.json, every row, and docs/gpu_static.md, what of it people want to read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable

import triton

from pykernels import _nvcc
from pykernels.ops import heuristics

from . import collect, devices

DOCS = _nvcc.ROOT / "docs"
# (N, K) of the linear layers of Llama-3: q and k and v in one, attention's output, gate and up in one, down.
LAYERS = {
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
}
ROWS = (1, 8, 16, 64, 128, 256, 1024, 4096, 8192)
CLOCK = 1.83e9  # cycles a second at which 132 SMs reach the published rate

INTRODUCTION = """# What the compiler says of the GPU kernels

Written by `make gpu-static` without a GPU; [gpu_static.json](gpu_static.json) has every row. None of these kernels has
run on a GPU yet ([what has been seen](gpu_status.md)): this page says what was compiled, not how fast it is.
`tests/test_gpu_static.py` holds the page to the sources it was made from, and every row to: no stack, no spill, IGMMA
in every Hopper product, occupancy not below {floor}.

Compiled with {nvcc}, CUTLASS {cutlass}, Triton {triton}. Occupancy is resident warps over {warps}, by registers, shared
memory and threads. *Operations a byte* are of one step of a tile against the bytes it brings from
beyond the SM, of which a cluster's multicast spares a part; *ceiling* is the roofline if all of those came from memory
with no reuse in L2, at the published figures, of H100 and H200 where there are two:

{figures}
"""

OTHERS = """A tile is what a program, or a step of its loop, takes. *Bytes an element* are those that the kernel must
move, each tensor read or written once, at the shapes of tests/triton_aot_calls; *operations* are float32 instructions
(a fused pair is one) and *special* ones an exponential, a root or a quotient, by element. Both are counted in Triton's
own code and modelled for the CUDA kernels, as `benchmarks/gpu_static/traffic.py` says. The ceiling is the least of
memory's bandwidth, the float32 rate and a quarter (sm_80) or an eighth of that for special functions; integer work,
conversions and the latency of a reduction are left out, so that it bounds and does not predict. Variants differ in
dtype and in what else they are asked for: [gpu_static.json](gpu_static.json) has each.

"""

LLAMA = """By `pykernels.ops.heuristics.choose`, with bfloat16 results. *SMs' steps used* is what wave quantisation
leaves; *model* is the prediction it chooses by, at an assumed share of L2; the bound counts operands, scales and result
once.

"""


def table(head: list[str], body: list[list[object]]) -> str:
    lines = [" | ".join(map(str, row)) for row in [head, ["---"] * len(head), *body]]
    return "".join(f"| {line} |\n" for line in lines)


def kilobytes(count: int) -> str:
    return f"{count / 1024:.0f}"


def instructions(row: collect.Row) -> str:
    """Of the tensor cores and of TMA's loads."""
    kinds = row["tensor_cores"]
    found = [f"{count} {kind}" for kind, count in kinds.items()] if isinstance(kinds, dict) else list(kinds)
    if row["tma_loads"]:
        found.append(f"{row['tma_loads']} UTMALDG")
    return ", ".join(found) or "none"


def products(rows: list[collect.Row], kind: str) -> str:
    head = ["kernel", "for", "tile", "threads", "registers", "shared, KB", "blocks", "occupancy", "tensor cores, TMA"]
    head += ["operations a byte", "ceiling, T/s"]
    body = []
    for row in rows:
        if "tile" in row and row["kind"] == kind:
            name = row["kernel"] if kind == "CUDA" else f"{row['kernel']} ({row['source']})"
            ceilings = ", ".join(f"{each / 1e12:.0f}" for each in row["ceilings"].values())
            cells = [name, row["arch"], row["tile"], row["threads"], row["registers"], kilobytes(row["shared"])]
            cells += [row["blocks"], f"{100 * row['occupancy']:.1f} %", instructions(row)]
            body.append([*cells, f"{row['operations'] / row['bytes']:.0f}", ceilings])
    return table(head, body)


def span(values: Iterable[float]) -> str:
    """The least and the most, as a reader wants them."""
    found = sorted(values)
    least, most = (f"{value:.0f}" if value >= 20 else f"{value:.2g}" for value in (found[0], found[-1]))
    return least if least == most else f"{least} to {most}"


def others(rows: list[collect.Row]) -> str:
    head = ["kernel", "", "for", "variants", "registers at most", "shared at most, KB", "occupancy at least"]
    head += ["elements a tile", "bytes an element", "operations + special", "ceiling, G elements/s", "by"]
    body = []
    for family in collect.families(rows):
        first = family[0]
        cells = [first["kernel"].split("<")[0], first["kind"], first["arch"], len(family)]
        cells += [max(row["registers"] for row in family), kilobytes(max(row["shared"] for row in family))]
        cells.append(f"{100 * min(row['occupancy'] for row in family):.1f} %")
        cells += [span(row["elements"] for row in family), span(row["bytes"] / row["elements"] for row in family)]
        arithmetic = (span(row[kind] / row["elements"] for row in family) for kind in ("operations", "special"))
        cells.append(" + ".join(arithmetic))
        devices_of = list(first["ceilings"])
        cells.append(", ".join(span(row["ceilings"][device] / 1e9 for row in family) for device in devices_of))
        body.append([*cells, ", ".join(sorted({limit for row in family for limit in row["limits"].values()}))])
    return table(head, body)


def choices() -> str:
    """What an H100 would be given for Llama-3, and the time below which no kernel can be."""
    head = ["M", "N x K", "kernel", "SMs' steps used", "model, TOPS", "bound, us: H100", "H200", "by"]
    body = []
    for name, layers in LAYERS.items():
        for n, k in layers:
            for m in ROWS:
                schedule = heuristics.choose(m, n, k, 132)
                found = heuristics.spread(schedule, m, n, k, 132)
                operations, moved = 2 * m * n * k, m * k + n * k + 4 * (m + n) + 2 * m * n
                times = [max(operations / d.int8, moved / d.bandwidth) for d in (devices.H100, devices.H200)]
                arithmetic = operations / devices.H100.int8 > moved / devices.H100.bandwidth
                cells: list[object] = [m, f"{n} x {k} ({name})", schedule.name, "-", "-"]
                if found:
                    tops = operations / (found.cycles / CLOCK) / 1e12
                    cells[3:] = [f"{100 * found.efficiency:.0f} %", f"{tops:.0f}"]
                cells += [f"{1e6 * time:.1f}" for time in times]
                body.append([*cells, "operations" if arithmetic else "bytes"])
    return table(head, body)


def main() -> None:
    nvcc = _nvcc.find_nvcc()
    if nvcc is None:
        raise SystemExit("gpu-static: nvcc was not found: set CUDA_HOME to the toolkit's folder")
    cutlass = _nvcc.cutlass_version(_nvcc.find_cutlass())
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.splitlines()[-2]
    rows = collect.rows()
    least = min(row["occupancy"] for row in rows)
    made = {
        "nvcc": version,
        "cutlass": cutlass,
        "triton": triton.__version__,
        "least_occupancy": least,
        "digests": collect.digests(),
        "rows": rows,
    }
    (DOCS / "gpu_static.json").write_text(json.dumps(made, indent=0) + "\n")
    figures = "".join(
        f"- {d.name}: INT8 {d.int8 / 1e12:.0f} TOPS, bf16 {d.half / 1e12:.0f} TFLOPS, "
        f"float32 {d.single / 1e12:g} TFLOPS, {d.bandwidth / 1e12:g} TB/s ({d.source})\n"
        for d in (devices.A100, devices.H100, devices.H200, devices.B200)
    )
    page = INTRODUCTION.format(
        floor=f"{100 * least:g} %",
        nvcc=f"nvcc {version.split('V')[-1]}",
        cutlass=cutlass,
        triton=triton.__version__,
        warps=devices.LIMITS["sm_90"].threads // 32,
        figures=figures.rstrip(),
    )
    page += "\n## CUDA products\n\n" + products(rows, "CUDA")
    page += "\n## Triton products\n\n" + products(rows, "Triton")
    page += "\n## All other kernels\n\n" + OTHERS + others(rows)
    page += "\n## What Llama-3 would get on 132 SMs\n\n" + LLAMA + choices()
    (DOCS / "gpu_static.md").write_text(page)
    print(f"{len(rows)} rows, occupancy from {100 * least:g} %: docs/gpu_static.md, docs/gpu_static.json")


if __name__ == "__main__":
    main()
