"""The CUDA kernels compiled for sm_80 and sm_90a: no spills, and the instructions that were meant."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_static import cuda
from pykernels import _nvcc

ROOT = _nvcc.ROOT
UNITS = cuda.units()
EVERY_UNIT = pytest.mark.parametrize(
    ("source", "arch"), UNITS, ids=[f"{cuda.label(source)}-{arch}" for source, arch in UNITS]
)


def compiled(source: Path, arch: str) -> dict:
    why_not = cuda.why_not(source)
    if why_not is not None:
        pytest.skip(why_not)
    return cuda.examine(source, arch)


@EVERY_UNIT
def test_nothing_lives_in_local_memory(source: Path, arch: str) -> None:
    found = compiled(source, arch)
    report = found["ptxas"]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    entries = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", report)
    assert {of for _, of in entries} == {arch}, "ptxas reported other architectures than were asked for"
    assert len(frames) >= len(entries) == len(found["kernels"]) > 0
    assert set(frames) == {("0", "0", "0")}, report
    # Among them that wgmma instructions would be serialised.
    assert "warning" not in report.lower() and "Potential Performance Loss" not in report, report


@EVERY_UNIT
def test_no_local_memory_instruction(source: Path, arch: str) -> None:
    for kernel in compiled(source, arch)["kernels"]:
        assert kernel["opcodes"], "the disassembly is empty"
        assert not [op for op in kernel["opcodes"] if op.split(".")[0] in ("LDL", "STL")], kernel["name"]
        assert kernel["stack"] == kernel["local"] == 0, kernel["name"]


# What makes each kernel the one it claims to be: INT8 or half tensor cores, asynchronous copies, 16-byte loads; on
# Hopper warpgroup products, TMA in with multicast and out, and registers moved from the loading warps to the others.
MEANT = {
    "int8_block_scaled_matmul": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"],
    "int8_grouped_matmul": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "SHFL.UP"],
    "int8_matmul": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"],
    "int8_matmul_small_m": ["IMMA.16832.S8.S8", "LDG.E.128", "LDGSTS.E.BYPASS.128"],
    "int8_weight_only_linear": ["HMMA.16816.F32", "HMMA.16816.F32.BF16", "LDG.E.128", "LDGSTS.E.BYPASS.128", "PRMT"],
    "int8_weight_only_linear_tiled": [
        *("HMMA.16816.F32", "HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "PRMT"),
    ],
    "optimizer_update": ["LDG.E.128", "STG.E.128", "LDG.E.64", "STG.E.64", "REDUX.MAX"],
    "quantize_rowwise": ["LDG.E.128", "REDUX.MAX"],
}
HOPPER = ["IGMMA", "UTMALDG.3D", "UTMALDG.3D.MULTICAST", "UTMASTG.3D", "USETMAXREG"]


@EVERY_UNIT
def test_sass_holds_what_was_meant(source: Path, arch: str) -> None:
    kernels = compiled(source, arch)["kernels"]
    hopper = source.parent.name == "hopper"
    # A file of kernels for several paths holds what was meant somewhere, a Hopper kernel every time.
    groups = [kernel["opcodes"] for kernel in kernels] if hopper else [{op for k in kernels for op in k["opcodes"]}]
    for opcodes in groups:
        for meant in HOPPER if hopper else MEANT[source.stem]:
            words = set(meant.split("."))
            assert any(words <= set(op.split(".")) for op in opcodes), f"no {meant} among {sorted(opcodes)}"


def test_an_object_of_the_build_is_used_as_it_is() -> None:
    """So that nothing is compiled twice: what the tests examine for sm_90a is what was linked."""
    if _nvcc.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    notes = list((ROOT / "build").glob("ninja-*/cuda/*.json"))
    assert notes, "nvcc is here but nothing was built with it: python setup.py build_ext --inplace"
    source = _nvcc.sources()[0]
    digest = _nvcc.digest(source, str(_nvcc.find_nvcc()))
    built = cuda.built_object(source, "sm_90a", digest)
    if built is not None:
        names = {kernel["symbol"] for kernel in cuda.read(built, "sm_90a", "")["kernels"]}
        assert names == {kernel["symbol"] for kernel in cuda.examine(source, "sm_90a")["kernels"]}
    assert cuda.built_object(source, "sm_90a", "another digest") is None


def test_the_library_needs_one_symbol_a_cpu_torch_lacks(tmp_path: Path) -> None:
    """With a stand-in for it, pykernels/_cuda.so loads without a GPU and registers its operators for CUDA."""
    library = ROOT / "pykernels" / "_cuda.so"
    if _nvcc.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    assert library.is_file(), "nvcc is here but pykernels/_cuda.so is not built: python setup.py build_ext --inplace"
    source, stub = tmp_path / "stub.c", tmp_path / "stub.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(stub), str(source)], check=True)
    ops = ["quantize_rowwise", "int8_matmul", "int8_linear", "int8_weight_only_linear", "optimizer_update_"]
    ops += ["int8_block_scaled_matmul", "int8_grouped_matmul", "int8_grouped_linear"]
    code = (
        "import ctypes, sys, torch; import pykernels; ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL);"
        "torch.ops.load_library(sys.argv[2]); has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print([has('pykernels::' + op, 'CUDA') for op in sys.argv[3:]])"
    )
    command = [sys.executable, "-c", code, str(stub), str(library), *ops]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == str([True] * len(ops)), done.stderr
