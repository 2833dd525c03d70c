"""The order in which the Hopper kernels visit tiles, by CUTLASS's own schedulers run on the CPU: every element of the
result is stored once, every step of K counted once, and the model that chooses the kernel knows how long it takes."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pykernels import _nvcc
from pykernels.ops.heuristics import Schedule, choose, schedules, spread

pytest.importorskip("pykernels._host", reason="the optional host module is not built")

HERE = Path(__file__).resolve().parent / "hopper_scheduler"
BUILD = _nvcc.ROOT / "build" / "hopper_scheduler"


def absent() -> str | None:
    if shutil.which("g++") is None:
        return "the emulator is built with g++"
    if _nvcc.find_nvcc() is None:
        return "CUTLASS's headers need those of CUDA, and nvcc is not installed"
    try:
        _nvcc.find_cutlass()
    except _nvcc.NoCutlass as reason:
        return str(reason)
    return None


pytestmark = pytest.mark.skipif(absent() is not None, reason=absent() or "")


@functools.cache
def program() -> Path:
    cutlass, cuda = _nvcc.find_cutlass(), _nvcc.cuda_home(_nvcc.find_nvcc())
    inputs = [HERE / "schedulers.cpp", HERE / "device_names.h"]
    flags = ["-std=c++20", "-O1", "-w", "-fpermissive", "-include", str(inputs[1]), f"-I{_nvcc.CSRC}"]
    for folder in (cutlass, cuda / "include", cuda / "include" / "cccl"):
        flags += ["-isystem", str(folder)]
    digest = hashlib.sha256(" ".join(flags).encode() + str(_nvcc.cutlass_version(cutlass)).encode())
    for path in [*inputs, *sorted((_nvcc.CSRC / "cuda" / "hopper").glob("*.*h"))]:
        digest.update(path.read_bytes())
    built = BUILD / digest.hexdigest()[:16]
    if not built.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = built.with_suffix(f".{os.getpid()}")
        libraries = [f"-L{cuda / 'lib64'}", f"-L{cuda / 'lib'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        subprocess.run(["g++", *flags, str(inputs[0]), "-o", str(partial), *libraries], check=True)
        partial.replace(built)
    return built


Case = tuple[Schedule, int, int, int, int]


def run(cases: list[Case]) -> list[list[int]]:
    """[tiles, blocks launched, steps of the block that works longest, blocks that share a tile at most] of each."""
    names = [s.name for s in schedules()]
    text = "".join(f"{names.index(s.name)} {m} {n} {k} {sms}\n" for s, m, n, k, sms in cases)
    done = subprocess.run([program()], input=text, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    wrong = [(case, line) for case, line in zip(cases, lines, strict=True) if not line.replace(" ", "").isdigit()]
    assert not wrong, wrong[:5]
    return [list(map(int, line.split())) for line in lines]


# One tile and less, one more than one of each size, odd bands, tall, wide; K of one step, of a few, of
# a ragged last, and long; GPUs whole, cut, and with fewer SMs than tiles.
ROWS = [17, 64, 65, 128, 129, 333, 768, 1024, 2049]
COLUMNS = [8, 64, 136, 1000, 4096, 10240]
DEPTHS = [16, 128, 1040, 2064, 4096]


@pytest.mark.parametrize("schedule", [s for s in schedules() if any(s.tile)], ids=lambda s: s.name)
def test_every_element_is_stored_once(schedule: Schedule) -> None:
    cases = [(schedule, m, n, k, sms) for m, n, k in itertools.product(ROWS, COLUMNS, DEPTHS) for sms in (132, 78, 16)]
    cases = [case for case in cases if spread(*case)]
    seen = run(cases)
    shared = 0
    for (_, m, n, k, sms), (tiles, blocks, longest, together) in zip(cases, seen, strict=True):
        model = spread(schedule, m, n, k, sms)
        assert model is not None and tiles == model.tiles
        assert blocks <= model.units <= sms
        assert longest <= model.makespan + 7 * schedule.stream_k, (m, n, k, sms, longest, model)
        if not schedule.stream_k:
            assert longest == model.makespan and together == 1, (m, n, k, sms, longest, model)
        shared = max(shared, together)
    assert (shared > 1) == schedule.stream_k, "stream-K never cut a tile, so nothing of it was tested"


def test_every_layer_of_llama_as_it_is_chosen() -> None:
    layers = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 8192), (8192, 28672)]
    cases = [(choose(m, n, k, 132), m, n, k, 132) for m in (64, 128, 256, 1024, 4096, 8192) for n, k in layers]
    for (schedule, m, n, k, sms), (_, _, longest, _) in zip(cases, run(cases), strict=True):
        model = spread(schedule, m, n, k, sms)
        assert model is not None and longest <= model.makespan + 7 * schedule.stream_k
