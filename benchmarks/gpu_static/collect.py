"""The rows of the static report: one a kernel, architecture and configuration, and digests of their sources."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pykernels import _nvcc

from . import cuda, tiles, traffic, triton_aot
from .devices import BY_ARCH, blocks_per_multiprocessor, ceiling, element_ceiling, occupancy

TENSOR_CORES = ("IGMMA", "HGMMA", "IMMA", "HMMA", "UTCIMMA", "UTCHMMA")
Row = dict[str, Any]


def digests() -> dict[str, str]:
    """Of every file that decides what a row says. Comments and layout of Python count for nothing."""
    found = {f"csrc/cuda/{cuda.label(source)}.cu": _nvcc.source_digest(source) for source, _ in cuda.units()}
    kernels = sorted((_nvcc.ROOT / "kernels").glob("*.py"))
    for path in [*kernels, *sorted((_nvcc.ROOT / "tests" / "triton_aot_calls").glob("*.py"))]:
        found[path.relative_to(_nvcc.ROOT).as_posix()] = python_digest(path)
    return found


def python_digest(path: Path) -> str:
    return hashlib.sha256(ast.dump(ast.parse(path.read_text())).encode()).hexdigest()[:16]


def rows() -> list[Row]:
    """Compiles what is not compiled yet: minutes the first time."""
    with ThreadPoolExecutor(2) as pool:
        examined = list(pool.map(lambda unit: cuda.examine(*unit), cuda.units()))
    found = [
        _cuda_row(source, arch, kernel)
        for (source, arch), result in zip(cuda.units(), examined, strict=True)
        for kernel in result["kernels"]
    ]
    return found + [_triton_row(report) for report in triton_aot.reports()]


def _cuda_row(source: Path, arch: str, kernel: dict[str, Any]) -> Row:
    tile, dynamic, name = tiles.cuda(cuda.label(source), kernel["symbol"], kernel["name"])
    opcodes: dict[str, int] = kernel["opcodes"]
    by_kind: dict[str, int] = {}
    for opcode, count in opcodes.items():
        kind = opcode.split(".")[0]
        by_kind[kind] = by_kind.get(kind, 0) + count
    row = {
        "kind": "CUDA",
        "source": cuda.label(source),
        "kernel": name,
        "arch": arch,
        "threads": kernel["threads"],
        "registers": kernel["registers"],
        "stack": kernel["stack"],
        "spills": by_kind.get("LDL", 0) + by_kind.get("STL", 0),
        # sm_90's own kilobyte is counted in the static part, and again by the occupancy: take it out here.
        "shared": dynamic + max(0, kernel["static_shared"] - (1024 if arch.startswith("sm_9") else 0)),
        "tensor_cores": {kind: by_kind[kind] for kind in TENSOR_CORES if kind in by_kind},
        "tma_loads": by_kind.get("UTMALDG", 0),
    }
    return row | _derived(row, tile, traffic.of_cuda(name, kernel["threads"]))


def _triton_row(report: dict[str, Any]) -> Row:
    row = {
        "kind": "Triton",
        "source": report["call"],
        "kernel": report["kernel"],
        "arch": f"sm_{report['arch']}",
        "threads": report["threads"],
        "registers": report["registers"],
        "stack": report["stack"],
        "spills": report["spills"],
        "shared": report["shared"],
        "tensor_cores": report["tensor_cores"],
        "tma_loads": report["tma_loads"],
    }
    tile = tiles.triton(report["kernel"], report["constants"], report["tensors"])
    return row | _derived(row, tile, report["traffic"])


def _derived(row: Row, tile: tiles.Tile | None, moved: dict[str, float] | None) -> Row:
    """Occupancy, and the ceiling of a product (operations a second) or of any other kernel (elements a second)."""
    shape = (row["arch"], row["threads"], row["registers"], row["shared"])
    found: Row = {"blocks": blocks_per_multiprocessor(*shape), "occupancy": occupancy(*shape)}
    if tile is not None:
        found["tile"] = f"{tile.m} x {tile.n} x {tile.k}"
        found["operations"], found["bytes"] = tile.operations, tile.bytes
        found["ceilings"] = {
            device.name: ceiling(device, tile.kind, tile.parts * tile.operations, tile.bytes) / tile.parts
            for device in BY_ARCH[row["arch"]]
        }
    else:
        assert moved is not None, f"{row['kernel']} has no model in tiles.py or traffic.py"
        found |= {name: round(value, 3) for name, value in moved.items()}
        limits = {device.name: element_ceiling(device, moved) for device in BY_ARCH[row["arch"]]}
        found["ceilings"] = {name: each for name, (each, _) in limits.items()}
        found["limits"] = {name: limit for name, (_, limit) in limits.items()}
    return found


def families(found: Iterable[Row]) -> list[list[Row]]:
    """Rows of the kernels that multiply no matrices, those of one kernel on one architecture together."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        if "tile" not in row:
            name = row["kernel"].split("<")[0]
            grouped.setdefault((row["kind"], name, row["arch"]), []).append(row)
    return [grouped[key] for key in sorted(grouped)]
