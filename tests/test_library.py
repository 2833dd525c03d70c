"""What the compiled libraries may contain: torch through DT_NEEDED, no Python symbol, no C++ ABI of torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pykernels

PACKAGE = Path(pykernels.__file__).parent
LIBRARIES = sorted(path.name for path in PACKAGE.glob("*.so") if not path.name.startswith("_host"))


def _read(tool: str, *arguments: str) -> str:
    assert shutil.which(tool), f"{tool} (binutils) is needed to look into the libraries"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def test_the_cpu_library_is_built() -> None:
    assert "_C.so" in LIBRARIES


@pytest.mark.parametrize("name", LIBRARIES)
def test_needed_libraries(name: str) -> None:
    dynamic = _read("readelf", "-d", str(PACKAGE / name))
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert "libtorch.so" in needed
    assert not [lib for lib in needed if "python" in lib or "cudart" in lib or "libcuda" in lib], needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@pytest.mark.parametrize("name", LIBRARIES)
def test_symbols(name: str) -> None:
    """Undefined symbols are the C shim of torch's stable ABI; the only things exported are our own switches."""
    undefined = _read("nm", "-D", "--undefined-only", "-C", str(PACKAGE / name))
    for line in undefined.splitlines():
        symbol = line.split()[-1]
        assert not symbol.startswith(("Py", "_Py")), symbol
    assert "at::" not in undefined and "c10::" not in undefined and "THPVariable" not in undefined
    exported = _read("nm", "-D", "--defined-only", str(PACKAGE / name)).splitlines()
    ours = [line.split()[-1] for line in exported if line.split()[-2] == "T"]
    assert all(symbol.startswith("pykernels_") for symbol in ours), ours


def test_loads_in_a_process_that_has_only_torch() -> None:
    """The library needs nothing of this package: torch.ops.load_library of the file is enough."""
    code = (
        "import sys, torch; lib = torch.library.Library('pykernels', 'DEF');"
        "lib.define('quantize_asymmetric(Tensor x) -> (Tensor, Tensor, Tensor)');"
        "torch.ops.load_library(sys.argv[1]);"
        "print(torch.ops.pykernels.quantize_asymmetric(torch.ones(2, 3))[0].dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(PACKAGE / "_C.so")], capture_output=True, text=True)
    assert done.stdout.strip() == str(torch.int8), done.stderr
