"""The committed static report: made from these sources, and green. `make gpu-static` writes it anew."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu_static import collect, devices, traffic
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


def test_every_row_has_bytes_operations_and_a_ceiling() -> None:
    """And none above what the device is sold for, or above what its own bytes and operations allow."""
    for row in ROWS:
        known = {device.name: device for device in devices.BY_ARCH[row["arch"]]}
        assert row["ceilings"].keys() == known.keys() and row["bytes"] > 0 and row["operations"] >= 0, row
        for name, ceiling in row["ceilings"].items():
            device = known[name]
            assert 0 < ceiling <= device.bandwidth * row.get("elements", row["operations"]) / row["bytes"] * 1.001, row
            if "tile" in row:
                assert ceiling <= device.int8, row
            else:
                used = (row["operations"] + row["special"] * device.lanes / 16) * ceiling / row["elements"]
                assert used <= device.single, row  # at most two pipes' worth of half of the published operations
                assert row["limits"][name] in ("memory", "float32", "special"), row
    assert {limit for row in ROWS if "tile" not in row for limit in row["limits"].values()} >= {"memory", "special"}


def test_ceilings_by_hand() -> None:
    def only(kernel: str, source: str, arch: str = "sm_90") -> dict:
        found = [r for r in ROWS if r["kernel"] == kernel and r["source"] == source and r["arch"] == arch]
        assert len(found) == 1, (kernel, source, len(found))
        return found[0]

    # A row of 4096 bf16 read and written; over 512 rows, weight and bias in float32 and one float32 a row.
    norm = only("_norm_forward", "rms_norm plain")
    moved = 4096 * (2 + 2) + (2 * 4 * 4096) / 512 + 4
    assert (norm["elements"], norm["bytes"]) == (4096, moved)
    assert norm["ceilings"]["H100 SXM"] == pytest.approx(3.35e12 * 4096 / moved)
    assert norm["limits"] == {"H100 SXM": "memory", "H200 SXM": "memory"}
    # AdamW in float32: parameter and both states read and written, the gradient read: 28 bytes, and a tile's share of
    # its tensor's row of the table.
    step = only("optimizer_step", "adamw float32", "sm_80")
    assert 28 <= step["bytes"] / step["elements"] < 28.2
    assert step["ceilings"]["A100 80GB SXM"] == pytest.approx(2.039e12 / 28, rel=0.01)
    # The logits of 32,000 classes in bf16, and four special functions each for all options at once: on an H100, 16 of
    # them a cycle of a multiprocessor against 128 float32 ones, of which 33.5e12 a second make 67 TFLOPS.
    loss = only("_cross_entropy", "cross_entropy 32000, all options")
    assert loss["special"] / loss["elements"] == pytest.approx(4, rel=0.01)
    assert loss["ceilings"]["H100 SXM"] == pytest.approx(33.5e12 / 8 / 4, rel=0.01)
    assert loss["limits"] == {"H100 SXM": "special", "H200 SXM": "special"}
    # 64 x 128 outputs, 32 of the sum a step: bf16 by int8, as two products of bf16.
    grad = [r for r in ROWS if r["kernel"] == "_grouped_grad_input" and "bfloat16" in r["source"]]
    (grad,) = [r for r in grad if r["tile"] == "64 x 128 x 32" and r["arch"] == "sm_80"]
    assert (grad["operations"], grad["bytes"]) == (2 * 64 * 128 * 32, 64 * 32 * 2 + 32 * 128)
    assert grad["ceilings"]["A100 80GB SXM"] == pytest.approx(min(312e12 / 2, 64 * 2.039e12))
    # 256 threads with two vectors of 8 bf16 each become int8.
    codes = only("quantize_resident<BFloat16, 2, true, false>", "quantize_rowwise", "sm_90a")
    assert (codes["elements"], codes["bytes"]) == (4096, 4096 * 3)


def test_traffic_of_a_code_by_hand() -> None:
    """Loads of 2 x 64 bf16 and of 64 float32, a sum of squares, a root, a quotient; integers do not count."""
    code = """
    %x = tt.load %0, %1, %2 : tensor<2x64x!tt.ptr<bf16>> loc(#loc1)
    %w = tt.load %3 : tensor<64x!tt.ptr<f32>>
    %y = arith.extf %x : tensor<2x64xbf16> to tensor<2x64xf32> loc("a : b"(#loc))
    %z = arith.mulf %y, %y : tensor<2x64xf32>
    %s = "tt.reduce"(%z) <{axis = 1 : i32}> ({
    ^bb0(%a: f32 loc(#loc), %b: f32 loc(#loc)):
      %t = arith.addf %a, %b : f32 loc(#loc2)
      tt.reduce.return %t : f32
    }) : (tensor<2x64xf32>) -> tensor<2xf32>
    %r = tt.precise_sqrt %s : tensor<2xf32>
    %i = arith.muli %4, %5 : tensor<2x64xi32>
    %d = arith.divf %y, %z : tensor<2x64xf32>
    tt.store %0, %d, %1 : tensor<2x64x!tt.ptr<bf16>>
    """
    assert traffic.of_code("k", code) == (128, 128 * 2 + 64 * 4 + 128 * 2, 128 + 128, 2 + 128)
    found = traffic.of_launch("k", {"x_ptr": [1024, 2], "w_ptr": [64, 4], "y_ptr": [1024, 2]}, 8, code)
    assert found == {"elements": 128, "bytes": 128 * 4 + 64 * 4 / 8, "operations": 256, "special": 130}


def test_the_page_has_a_ceiling_in_every_line() -> None:
    page = (_nvcc.ROOT / "docs" / "gpu_static.md").read_text()
    for title, column in (("CUDA products", 10), ("Triton products", 10), ("All other kernels", 10)):
        lines = [
            line for line in page.split(f"## {title}\n")[1].split("\n## ")[0].splitlines() if line.startswith("| ")
        ]
        assert len(lines) > 20
        for line in lines[2:]:
            assert any(character.isdigit() for character in line.split(" | ")[column]), line
    families = {(row["kernel"].split("<")[0], row["arch"]) for row in ROWS if "tile" not in row}
    assert all(f"| {kernel} |" in page for kernel, _ in families)
