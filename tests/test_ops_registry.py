"""Properties every operator has: an opcheck, a named backend, a working override, full-graph compile."""

import json
import subprocess
import sys

import pytest
import torch

import pykernels
import pykernels.functional as F
from pykernels import _library
from tests import opcheck_samples


def _samples() -> dict[str, tuple]:
    """One call of each operator with every tensor argument it can take."""
    return _int8_samples() | opcheck_samples.collect()


def _int8_samples() -> dict[str, tuple]:
    x = torch.randn(6, 40)
    w, w_scale = F.quantize_rowwise(torch.randn(24, 40))
    a, a_scale = F.quantize_rowwise(x)
    bias, residual = torch.randn(24), torch.randn(6, 24)
    zero_point = torch.arange(6, dtype=torch.int32)
    columns = torch.tensor([3, 17])
    return {
        "quantize_rowwise": (x, True, 5, None),
        "quantize_colwise": (x, True, 5),
        "quantize_both": (x, False, 0),
        "quantize_transposed": (x, True, 5),
        "quantize_blockwise": (x, [4, 16]),
        "quantize_asymmetric": (x,),
        "dequantize": (a, a_scale[:, None], [40], zero_point[:, None], torch.bfloat16),
        "int8_matmul": (a, w, a_scale, w_scale, bias, residual, 3, zero_point, w.sum(1, dtype=torch.int32), None),
        "int8_linear": (x.clone().requires_grad_(), w, w_scale, bias.clone().requires_grad_(), residual, 4, None, None),
        "int8_weight_only_linear": (x.clone().requires_grad_(), w, w_scale.repeat(5, 1).t().contiguous(), bias, 2),
        "int8_linear_outliers": (x.clone().requires_grad_(), w, w_scale, bias, 1.0, 0, columns, torch.randn(24, 2)),
    }


OWN_TESTS = {name for name in _library.OPS if "train" in name}  # checked in tests/test_training.py


def test_every_operator_has_a_sample() -> None:
    assert set(_samples()) | OWN_TESTS == set(_library.OPS)


@pytest.mark.parametrize("name", sorted(_samples()))
def test_opcheck(name: str) -> None:
    """Schema, fake function, autograd registration and AOT dispatch agree with what the operator does."""
    torch.library.opcheck(getattr(torch.ops.pykernels, name).default, _samples()[name])


@pytest.mark.parametrize("name", sorted(_samples()))
def test_every_operator_is_native_on_the_cpu(name: str) -> None:
    """An operator that silently lost its kernel would still pass every numerical test."""
    backend, why = _library.serving(name, "cpu")
    assert backend == ("composite" if _library.OPS[name].composite else "native"), why


@pytest.mark.parametrize("name", sorted(_samples()))
def test_compiles_into_one_graph(name: str) -> None:
    torch.compiler.reset()
    op = getattr(torch.ops.pykernels, name).default
    sample = _samples()[name]

    def arguments() -> tuple:  # anew each time: an operator may write into them
        return tuple(v.detach().clone() if isinstance(v, torch.Tensor) else v for v in sample)

    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments()), op(*arguments()), rtol=0, atol=0, equal_nan=True)


def test_backend_override_is_scoped_and_nested() -> None:
    before = _library.serving("quantize_rowwise", "cpu")
    with pykernels.backend("reference"):
        assert _library.serving("quantize_rowwise", "cpu") == ("reference", "forced")
        with pykernels.backend("reference"):
            F.quantize_rowwise(torch.ones(2, 3))
        assert _library.serving("quantize_rowwise", "cpu") == ("reference", "forced")
    assert _library.serving("quantize_rowwise", "cpu") == before


def test_backend_override_really_changes_the_kernel() -> None:
    """Counts calls of the reference rather than trusting the label."""
    calls = []
    op = _library.OPS["quantize_asymmetric"]
    original = op.reference
    op.reference = lambda x: calls.append(1) or original(x)
    try:
        F.quantize_asymmetric(torch.ones(2, 3))
        assert not calls
        with pykernels.backend("reference"):
            F.quantize_asymmetric(torch.ones(2, 3))
        F.quantize_asymmetric(torch.ones(2, 3))
        assert len(calls) == 1
    finally:
        op.reference = original


def test_override_survives_an_exception() -> None:
    before = _library.serving("int8_matmul", "cpu")
    with pytest.raises(RuntimeError, match="expected x"), pykernels.backend("reference"):
        F.quantize_rowwise(torch.ones(2, 3, dtype=torch.int32))
    assert _library.serving("int8_matmul", "cpu") == before


@pytest.mark.parametrize("call", [lambda: pykernels.backend("cuda"), lambda: pykernels.cpu_isa("sse2")])
def test_unknown_names_say_what_is_accepted(call) -> None:
    with pytest.raises(ValueError, match="expected one of"), call():
        pass


def test_info_json_names_a_backend_and_a_reason_for_each_operator() -> None:
    done = subprocess.run([sys.executable, "-m", "pykernels", "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert set(info["ops"]) == set(_library.OPS)
    assert all(row["cpu"]["backend"] and row["cpu"]["reason"] for row in info["ops"].values())
    assert info["libraries"]["cpu"]["loaded"]


def test_a_forced_backend_from_the_environment() -> None:
    code = "import pykernels; print(pykernels._library.serving('int8_linear', 'cpu')[0])"
    for asked in ("reference", "native"):
        env = {"PYKERNELS_BACKEND": asked, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == asked, done.stderr


def test_a_missing_library_is_said_once_and_the_reference_serves(tmp_path) -> None:
    """A copy of the package without its libraries: one warning with the fix; an error when native is required."""
    import shutil
    from pathlib import Path

    package = Path(pykernels.__file__).parent
    shutil.copytree(package, tmp_path / "pykernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import torch, pykernels; print(pykernels.functional.quantize_rowwise(torch.ones(2, 3))[1].tolist())"
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join([str(tmp_path), *[p for p in sys.path if "site-packages" in p]]),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("_C.so is not built") == 1, done.stderr
    env["PYKERNELS_REQUIRE_NATIVE"] = "1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode != 0 and "build_ext --inplace" in done.stderr
