"""Which configuration a kernel is launched with: measured once per device and size, kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import triton

Config = dict[str, int]

_tuned: dict[tuple[Any, ...], Config] = {}
_forced: Config | None = None


def bucket(M: int) -> int:
    """The power of two at or above M, between 16 and 8192: sizes in one bucket share a tuned configuration."""
    return min(8192, max(16, triton.next_power_of_2(M)))


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


@contextmanager
def force_config(config: Config) -> Iterator[None]:
    """Make every tuned kernel use `config`, for tests."""
    global _forced
    previous, _forced = _forced, config
    try:
        yield
    finally:
        _forced = previous


def _cache_file(device: torch.device) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))
    return root / "pykernels" / f"{name}-triton-{triton.__version__}.json"


def _read(path: Path) -> dict[str, Config]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(path: Path, key: str, config: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({**_read(path), key: config}, indent=0))
    os.replace(temporary, path)


def tuned(
    op: str, key: tuple[Any, ...], configs: list[Config], device: torch.device, launch: Callable[[Config], object]
) -> Config:
    """The fastest of `configs` for `key`; measured once per device and kept on disk, a dictionary look-up after that.

    The first of `configs` is the default: taken without measuring in the interpreter, under CUDA graph capture, and
    with PYKERNELS_AUTOTUNE=0. Measuring is the only place where the host waits for the device.
    """
    if _forced is not None:
        return _forced
    memory_key = (op, device.index, *key)
    found = _tuned.get(memory_key)
    if found is not None:
        return found
    if (
        len(configs) == 1
        or interpreted()
        or device.type != "cuda"
        or os.environ.get("PYKERNELS_AUTOTUNE") == "0"
        or torch.cuda.is_current_stream_capturing()
    ):
        return configs[0]
    path, disk_key = _cache_file(device), ":".join(map(str, (op, *key)))
    config = _read(path).get(disk_key)
    if config not in configs:  # also when the list has changed since the file was written
        config = _fastest(op, configs, launch)
        with suppress(OSError):  # a read-only home costs a measurement per process, nothing else
            _write(path, disk_key, config)
    _tuned[memory_key] = config
    return config


def _fastest(op: str, configs: list[Config], launch: Callable[[Config], object]) -> Config:
    times: list[tuple[float, int]] = []
    for i, config in enumerate(configs):
        try:
            times.append(
                (triton.testing.do_bench(lambda c=config: launch(c), warmup=10, rep=40, return_mode="median"), i)
            )
        except triton.runtime.errors.OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"{op}: no configuration fits this device's shared memory and registers, tried {configs}")
    return configs[min(times)[1]]
