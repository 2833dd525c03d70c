"""The CUDA kernels compiled for sm_80 and sm_90a: no spills, and the instructions that were meant."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_compile"
ARCHS = ("sm_80", "sm_90a")
SOURCES = sorted(path.stem for path in CUDA.glob("*.cu"))


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    inside = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next((path for path in inside if os.access(path, os.X_OK)), shutil.which("nvcc"))


def find_cuobjdump() -> str | None:
    nvcc = find_nvcc()
    beside = Path(nvcc).parent / "cuobjdump" if nvcc else None
    if beside is not None and beside.exists():
        return str(beside)
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.exists() else shutil.which("cuobjdump")


def setup_flags() -> list[str]:
    """NVCCFLAGS as setup.py has them, so that the tested code is the shipped code."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "NVCCFLAGS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py no longer assigns NVCCFLAGS")


def compiled(name: str) -> dict:
    """{"ptxas": its report, "sass": {arch: disassembly's opcodes}} of csrc/cuda/<name>.cu, cached by content."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    flags = setup_flags()
    for arch in ARCHS:
        flags += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
    digest = hashlib.sha256(" ".join(flags).encode() + subprocess.run([nvcc, "--version"], capture_output=True).stdout)
    for path in [*sorted(CUDA.glob("*.*h")), ROOT / "csrc" / "launchers.h", CUDA / f"{name}.cu"]:
        digest.update(path.read_bytes())
    result = CACHE / f"{name}.{digest.hexdigest()[:16]}.json"
    if not result.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        target = CACHE / f"{name}.{os.getpid()}.o"
        command = [
            "nice",
            "-n",
            "19",
            nvcc,
            *flags,
            f"-I{ROOT / 'csrc'}",
            "-c",
            str(CUDA / f"{name}.cu"),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        sass: dict[str, list[str]] = {}
        dump = find_cuobjdump()
        for arch in ARCHS if dump else ():
            text = subprocess.run([dump, "-sass", "-arch", arch, str(target)], capture_output=True, text=True).stdout
            sass[arch] = sorted(
                set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", text, re.M))
            )
        target.unlink()
        result.write_text(json.dumps({"ptxas": done.stderr, "sass": sass}))
    return json.loads(result.read_text())


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_lives_in_local_memory(name: str) -> None:
    report = compiled(name)["ptxas"]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    entries = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'", report)
    assert {arch for _, arch in entries} == set(ARCHS), "ptxas reported other architectures than were asked for"
    assert len(frames) >= len(entries)
    assert set(frames) == {("0", "0", "0")}, report
    assert "warning" not in report, report


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_no_local_memory_instruction(name: str, arch: str) -> None:
    opcodes = compiled(name)["sass"].get(arch)
    assert opcodes is not None, "nvcc is here but cuobjdump is not: install triton, which brings one"
    assert opcodes, "the disassembly is empty"
    assert not [op for op in opcodes if op.split(".")[0] in ("LDL", "STL")]


# What makes each kernel the one it claims to be: INT8 or half tensor cores, asynchronous copies, 16-byte loads.
MEANT = {
    "int8_grouped_matmul": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "SHFL.UP"],
    "int8_matmul": ["IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"],
    "int8_matmul_small_m": ["IMMA.16832.S8.S8", "LDG.E.128"],
    "int8_weight_only_linear": ["HMMA.16816.F32", "HMMA.16816.F32.BF16", "LDG.E.128"],
    "int8_weight_only_linear_tiled": ["HMMA.16816.F32", "HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128"],
    "optimizer_update": ["LDG.E.128", "STG.E.128", "LDG.E.64", "STG.E.64", "REDUX.MAX"],
    "quantize_rowwise": ["LDG.E.128", "REDUX.MAX"],
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_sass_holds_what_was_meant(name: str, arch: str) -> None:
    opcodes = compiled(name)["sass"].get(arch)
    assert opcodes is not None, "nvcc is here but cuobjdump is not: install triton, which brings one"
    for meant in MEANT[name]:
        words = set(meant.split("."))
        assert any(words <= set(op.split(".")) for op in opcodes), f"no {meant} among {opcodes}"


def test_the_library_needs_one_symbol_a_cpu_torch_lacks(tmp_path: Path) -> None:
    """With a stand-in for it, pykernels/_cuda.so loads without a GPU and registers its operators for CUDA."""
    library = ROOT / "pykernels" / "_cuda.so"
    if find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    assert library.is_file(), "nvcc is here but pykernels/_cuda.so is not built: python setup.py build_ext --inplace"
    source, stub = tmp_path / "stub.c", tmp_path / "stub.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(stub), str(source)], check=True)
    ops = ["quantize_rowwise", "int8_matmul", "int8_linear", "int8_weight_only_linear", "optimizer_update_"]
    ops += ["int8_grouped_matmul", "int8_grouped_linear"]
    code = (
        "import ctypes, sys, torch; import pykernels; ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL);"
        "torch.ops.load_library(sys.argv[2]); has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print([has('pykernels::' + op, 'CUDA') for op in sys.argv[3:]])"
    )
    command = [sys.executable, "-c", code, str(stub), str(library), *ops]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == str([True] * len(ops)), done.stderr
