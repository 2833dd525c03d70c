"""Every Triton kernel, in every configuration it may be launched with, compiled ahead of time without a GPU.

A spill, a stack frame or too much shared memory in any of them fails the test (benchmarks/gpu_static/triton_aot.py
compiles them).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.gpu_static import triton_aot
from benchmarks.gpu_static.devices import LIMITS, blocks_per_multiprocessor


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    pytest.importorskip("triton.backends.nvidia")
    found = triton_aot.reports()
    path = os.environ.get("PYKERNELS_AOT_REPORT") or tmp_path_factory.mktemp("aot") / "triton_aot.json"
    Path(path).write_text(json.dumps(found, indent=1))
    return found


def test_nothing_spills(reports: list[dict]) -> None:
    bad = [r for r in reports if r["stack"] or r["local"] or r["spills"]]
    assert reports and not bad, bad


def test_shared_memory_fits(reports: list[dict]) -> None:
    bad = [r for r in reports if r["shared"] > LIMITS[f"sm_{r['arch']}"].shared_block]
    assert not bad, bad


def test_products_use_tensor_cores(reports: list[dict]) -> None:
    """IGMMA on Hopper wherever a tile has the 64 rows it needs, the warp-wide instruction below that."""
    products = [r for r in reports if r["kernel"] == "_int8_matmul"]
    assert {r["arch"] for r in products} == {80, 90, 100}
    for r in products:
        wide = r["arch"] == 90 and r["constants"]["BLOCK_M"] >= 64
        assert ("IGMMA" if wide else "IMMA") in r["tensor_cores"], r
    halves = [r for r in reports if r["kernel"] == "_weight_only" and "unaligned" not in r["call"] and r["arch"] != 100]
    assert halves
    for r in halves:
        assert ("HGMMA" if r["arch"] == 90 else "HMMA") in r["tensor_cores"], r


def test_products_of_experts_and_blocks_use_tensor_cores(reports: list[dict]) -> None:
    """The same of the products beside int8_matmul, and the gradient of the first in bfloat16."""
    for kernel, warpgroup, warp in (
        ("_int8_grouped_matmul", "IGMMA", "IMMA"),
        ("_int8_block_scaled", "IGMMA", "IMMA"),
        ("_grouped_grad_input", "HGMMA", "HMMA"),
    ):
        found = [r for r in reports if r["kernel"] == kernel]
        assert {r["arch"] for r in found} == {80, 90, 100}
        for r in found:
            wide = r["arch"] == 90 and r["constants"]["BLOCK_M"] >= 64
            blackwell = r["arch"] == 100 and warp == "HMMA" and "UTCHMMA" in r["tensor_cores"]
            assert blackwell or (warpgroup if wide else warp) in r["tensor_cores"], r


def test_persistent_product_loads_by_tma(reports: list[dict]) -> None:
    """By tensor cores and TMA, no load before every warpgroup is done with what it overwrites, and as many programs on
    an SM as the launch counts on."""
    from pykernels.kernels._int8_matmul_persistent import CONFIGS

    products = [r for r in reports if r["kernel"] == "_int8_matmul_persistent"]
    assert {(r["arch"], r["call"].split()[-1]) for r in products} == {
        (90, "bfloat16"), (90, "float32"), (90, "int32"), (100, "bfloat16"), (100, "float32")
    }  # fmt: skip
    for config in CONFIGS[8192]:
        launched = {name: value for name, value in config.items() if name != "PER_SM"}
        compiled = [r for r in products if r["constants"].items() >= launched.items()]
        assert len(compiled) == 5, config
        for r in compiled:
            assert ("IGMMA" if r["arch"] == 90 else "IMMA") in r["tensor_cores"], r
            assert r["tma_loads"] > 0 and not r["unordered_loads"], r
            shape = (f"sm_{r['arch']}", r["threads"], r["registers"], r["shared"])
            assert blocks_per_multiprocessor(*shape) >= config["PER_SM"], r


def test_unordered_loads_are_seen() -> None:
    wait, barrier, load = (
        "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n",
        "BAR.SYNC.DEFER_BLOCKING 0x0 ;\n",
        "@UP2 UTMALDG.2D [UR20] ;\n",
    )
    assert triton_aot._unordered_loads(load + wait + barrier + load + load) == 0
    assert triton_aot._unordered_loads(barrier + wait + load + load + barrier + load) == 2


def test_rounding_kernels_are_not_contracted(reports: list[dict]) -> None:
    """x * inverse + u must round twice: no fused multiply-add in the PTX of a quantiser, and ptxas told to add none.
    Nor in an optimizer, whose results are the reference's bits."""
    for names in ("_quantize", ("optimizer_step", "prepare_step")):
        rounding = [r for r in reports if r["kernel"].startswith(names)]
        assert rounding
        assert all(not r["fused"] and not r["fusion"] for r in rounding), rounding
