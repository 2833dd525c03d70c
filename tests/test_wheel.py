"""What tests/wheel/check.py refuses, on small wheels made for it; that the settings for publishing agree with it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pykernels

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(pykernels.__file__).parent / "_C.so"
GOOD = "pykernels-0.1.0-cp311-cp311-linux_x86_64.whl"

spec = importlib.util.spec_from_file_location("wheel_check", ROOT / "tests" / "wheel" / "check.py")
assert spec and spec.loader
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def wheel(folder: Path, name: str = GOOD, *extra: str, library: Path = LIBRARY) -> Path:
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(library, "pykernels/_C.so")
        for member in ("pykernels/py.typed", "pykernels-0.1.0.dist-info/METADATA", *extra):
            archive.writestr(member, "")
    return path


def test_facts_of_a_wheel_that_may_ship(tmp_path: Path) -> None:
    facts = check.inspect(wheel(tmp_path))
    about = facts["libraries"]["pykernels/_C.so"]
    assert "libtorch.so" in about["needed"]
    assert re.fullmatch(r"2\.\d+", about["glibc"])


@pytest.mark.parametrize("name", ["pykernels-0.1.0-py3-none-any.whl", "pykernels-0.1.0-cp311-abi3-linux_x86_64.whl"])
def test_another_tag(tmp_path: Path, name: str) -> None:
    with pytest.raises(check.Wrong, match="cp3X-cp3X"):
        check.inspect(wheel(tmp_path, name))


@pytest.mark.parametrize("member", ["kernels/__init__.py", "tests/matrix.py", "pykernels/__pycache__/a.pyc"])
def test_a_file_that_does_not_belong(tmp_path: Path, member: str) -> None:
    with pytest.raises(check.Wrong, match=re.escape(member)):
        check.inspect(wheel(tmp_path, GOOD, member))


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_BYTES", 1000)
    with pytest.raises(check.Wrong, match="accepts 1,000"):
        check.inspect(wheel(tmp_path))


def test_a_tag_that_promises_an_older_c_library(tmp_path: Path) -> None:
    with pytest.raises(check.Wrong, match="more than the tag manylinux_2_4_x86_64 promises"):
        check.inspect(wheel(tmp_path, GOOD.replace("linux_", "manylinux_2_4_")))


@pytest.mark.parametrize(("link", "complaint"), [("-lpython3", "needs libpython3"), ("-lm", "does not need libtorch")])
def test_a_library_bound_to_the_wrong_things(tmp_path: Path, link: str, complaint: str) -> None:
    (tmp_path / "python.c").write_text("int from_python(void) { return 1; }")
    (tmp_path / "C.c").write_text("#include <math.h>\ndouble f(double x) { return sin(x); }")
    compiler = shutil.which("gcc") or shutil.which("g++")
    assert compiler, "a C compiler is needed"
    shared = [compiler, "-shared", "-fPIC", "-Wl,--no-as-needed"]
    subprocess.run([*shared, "python.c", "-o", "libpython3.so"], cwd=tmp_path, check=True)
    subprocess.run([*shared, "C.c", "-L.", link, "-lm", "-o", "_C.so"], cwd=tmp_path, check=True)
    with pytest.raises(check.Wrong, match=complaint):
        check.inspect(wheel(tmp_path, library=tmp_path / "_C.so"))


def test_the_command_fails_in_words(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "wheel" / "check.py"), str(wheel(tmp_path, "other-1-py3.whl"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("wheel check: other-1-py3.whl: expected") and "Traceback" not in done.stderr


def test_the_published_wheels_leave_out_what_they_link() -> None:
    """auditwheel copies in whatever it is not told to leave: torch, or the driver, would be a second copy."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    excluded = set(re.findall(r"--exclude (\S+)", settings["linux"]["repair-wheel-command"]))
    needs = {n for n in check.needed(LIBRARY) if re.match(r"lib(torch|c10|cuda|python)", n)}
    assert needs <= excluded
    pythons = {f"cp3{minor}-*" for minor in range(10, 14)}
    assert set(settings["build"]) == pythons
