"""`python -m pykernels info`: what is here and which backend serves each operation, and why."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, _library


def cpu_features() -> list[str]:
    """The vector extensions of this CPU that the kernels ask about."""
    wanted = (
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
    )
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in wanted if name in flags]


def build_info() -> dict[str, Any]:
    """What the optional host module recorded when it was built; empty without it."""
    try:
        from . import _host  # type: ignore[attr-defined]
    except ImportError:
        return {}
    return dict(_host.build_info())


def gather() -> dict[str, Any]:
    """Everything `info` prints, as plain values."""
    devices = ["cpu"]
    gpu = None
    if torch.cuda.is_available():
        devices.append("cuda")
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory
        gpu = {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "memory_bytes": memory}
    triton_ok, triton_why = _library.triton_available()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": {"features": cpu_features(), "isa": _library.current_cpu_isa()},
        "gpu": gpu,
        "libraries": {
            name: {"path": str(lib.path) if lib.path else None, "loaded": lib.loaded, "reason": lib.reason}
            for name, lib in _library.libraries().items()
        },
        "build": build_info(),
        "triton": {"usable": triton_ok, "reason": triton_why},
        "forced_backend": os.environ.get("PYKERNELS_BACKEND"),
        "ops": {
            name: {
                device: dict(zip(("backend", "reason"), _library.serving(name, device), strict=True))
                for device in devices
            }
            for name in sorted(_library.OPS)
        },
    }


def show(info: dict[str, Any]) -> None:
    """The report for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"pykernels {info['version']}   torch {info['torch']}   Python {info['python']}   {info['threads']} threads"
    )
    cpu = info["cpu"]
    console.print(
        f"CPU: {' '.join(cpu['features']) or 'no known vector extensions'}; kernels use {cpu['isa'] or 'nothing'}"
    )
    gpu = info["gpu"]
    console.print(f"GPU: {gpu['name']} (sm_{gpu['capability'].replace('.', '')})" if gpu else "GPU: none")
    for name, library in info["libraries"].items():
        state = f"loaded from {library['path']}" if library["loaded"] else f"not loaded: {library['reason']}"
        console.print(f"{name} library: {state}", soft_wrap=True)
    console.print(f"Triton: {'usable' if info['triton']['usable'] else 'not usable'}, {info['triton']['reason']}")
    if info["build"]:
        how = {key: value for key, value in info["build"].items() if key != "hopper"}
        console.print("built with " + ", ".join(f"{key} {value}" for key, value in how.items()), soft_wrap=True)
        console.print(f"Hopper kernels in the CUDA library: {info['build']['hopper']}", soft_wrap=True)
    devices = list(next(iter(info["ops"].values())))
    table = Table("operation", *[f"{device}: backend (why)" for device in devices])
    for name, by_device in info["ops"].items():
        table.add_row(name, *[f"{row['backend']} ({row['reason']})" for row in by_device.values()])
    console.print(table)


def main(argv: list[str]) -> int:
    """The command line of `info`."""
    parser = argparse.ArgumentParser(prog="python -m pykernels info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    options = parser.parse_args(argv)
    info = gather()
    if options.json:
        json.dump(info, sys.stdout, indent=2)
        print()
    else:
        show(info)
    return 0
