"""The pybind11 module: optional, free of torch, and in agreement with the compiled CPU library."""

import subprocess
import sys

import pytest

import pykernels
from pykernels import _library

_host = pytest.importorskip("pykernels._host", reason="the optional host module is not built")


def test_build_info_says_how_the_library_was_built():
    info = _host.build_info()
    assert set(info) == {"compiler", "cxx_standard", "cxx_flags", "torch", "cuda_archs", "hopper"}
    assert info["hopper"].startswith(("yes, CUTLASS ", "no: "))
    assert "-ffp-contract=off" in info["cxx_flags"].split()
    assert info["cxx_standard"] >= 201703


def test_cpu_features_allow_the_instruction_set_in_force():
    needs = {
        "portable": [],
        "avx2": ["avx2", "fma", "f16c"],
        "avx512_vnni": ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"],
    }
    features = _host.cpu_features()
    for isa, wanted in needs.items():
        if all(features.get(name, False) for name in wanted):
            with pykernels.cpu_isa(isa):
                assert _library.current_cpu_isa() == isa
        else:
            with pytest.raises(RuntimeError, match="this CPU does not support"), pykernels.cpu_isa(isa):
                pass


def test_host_module_imports_no_torch():
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('_host', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "module.build_info(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, _host.__file__], check=True)
