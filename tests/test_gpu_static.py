"""The committed static report: made from these sources, and green. `make gpu-static` writes it anew."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu_static import collect, devices
from pykernels import _nvcc
from pykernels.ops import heuristics

REPORT = json.loads((_nvcc.ROOT / "docs" / "gpu_static.json").read_text())
ROWS = REPORT["rows"]
# Resident warps over the 64 of an SM. A Hopper product has three warpgroups, enough for TMA and WGMMA to keep the pipes
# busy; the least of the others is one warpgroup whose stages fill shared memory.
HOPPER_OCCUPANCY = 12 / 64
LEAST_OCCUPANCY = 4 / 64


def test_it_is_of_these_sources() -> None:
    now = collect.digests()
    changed = sorted(
        name for name in now.keys() | REPORT["digests"].keys() if now.get(name) != REPORT["digests"].get(name)
    )
    assert not changed, f"docs/gpu_static.* is older than {', '.join(changed)}: run `make gpu-static`"


def test_every_source_and_architecture_is_in_it() -> None:
    hopper = {f"hopper/{source.stem}" for source in _nvcc.hopper_sources()}
    seen = {(row["source"], row["arch"]) for row in ROWS if row["kind"] == "CUDA"}
    assert seen == {(source.stem, arch) for source in _nvcc.sources() for arch in ("sm_80", "sm_90a")} | {
        (name, "sm_90a") for name in hopper
    }
    assert {row["arch"] for row in ROWS if row["kind"] == "Triton"} == {"sm_80", "sm_90", "sm_100"}
    # Each member of the set, for 16-bit and 32-bit results.
    members = [s.name for s in heuristics.schedules() if any(s.tile)]
    assert sorted(row["source"] for row in ROWS if row["source"] in hopper) == sorted(
        2 * [f"hopper/int8_matmul_{member}" for member in members]
    )


def test_nothing_spills_and_all_of_it_fits() -> None:
    for row in ROWS:
        assert row["stack"] == 0 and row["spills"] == 0, row
        assert row["registers"] <= 255
        assert row["shared"] <= devices.LIMITS[row["arch"]].shared_block, row
        assert row["blocks"] >= 1, row


def test_hopper_products_use_the_warpgroup_instruction() -> None:
    hopper = [row for row in ROWS if row["source"].startswith("hopper/")]
    assert hopper
    for row in hopper:
        assert row["tensor_cores"].keys() == {"IGMMA"} and row["tensor_cores"]["IGMMA"] > 0, row
        assert row["occupancy"] >= HOPPER_OCCUPANCY, row


def test_persistent_product_of_triton_loads_by_tma() -> None:
    persistent = [row for row in ROWS if row["kernel"] == "_int8_matmul_persistent"]
    assert {row["arch"] for row in persistent} == {"sm_90", "sm_100"}
    for row in persistent:
        assert row["tma_loads"] > 0 and "tile" in row, row
        assert ("IGMMA" if row["arch"] == "sm_90" else "IMMA") in row["tensor_cores"], row
    assert all(row["tma_loads"] > 0 for row in ROWS if row["source"].startswith("hopper/"))
    assert not any(row["tma_loads"] for row in ROWS if row["arch"] == "sm_80")


def test_products_of_sm_80_use_the_warp_instruction() -> None:
    mma = [row for row in ROWS if row["kind"] == "CUDA" and row["source"].startswith("int8_matmul") and "tile" in row]
    assert mma
    assert all(row["tensor_cores"].keys() == {"IMMA"} for row in mma), mma


def test_occupancy_is_not_below_what_the_page_says() -> None:
    least = min(row["occupancy"] for row in ROWS)
    assert least == REPORT["least_occupancy"] >= LEAST_OCCUPANCY
    page = (_nvcc.ROOT / "docs" / "gpu_static.md").read_text()
    assert f"occupancy not below {100 * least:g} %" in page


def test_occupancy_by_hand() -> None:
    """Worked by hand from the programming guide's table; the last is limited by registers, the others as said."""
    assert devices.blocks_per_multiprocessor("sm_90a", 384, 168, 200 * 1024) == 1  # shared memory
    assert devices.occupancy("sm_90a", 384, 168, 200 * 1024) == 12 / 64
    assert devices.blocks_per_multiprocessor("sm_80", 256, 128, 32 * 1024) == 2  # 256 * 128 registers a block
    assert devices.blocks_per_multiprocessor("sm_90", 1024, 32, 0) == 2  # threads
    assert devices.blocks_per_multiprocessor("sm_90", 32, 16, 0) == 32  # blocks
    assert devices.blocks_per_multiprocessor("sm_80", 128, 120, 0) == 4  # 3840 registers a warp: 17 warps
    assert devices.ceiling(devices.H100, "int8", 2 * 128 * 128, 256) == pytest.approx(128 * 3.35e12)
    assert devices.ceiling(devices.H100, "int8", 2 * 8192 * 8192, 2 * 8192) == 1979e12
