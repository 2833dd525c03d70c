"""Imports flow one way: integrations -> nn, quantization -> functional -> ops -> {kernels, the compiled library}."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pykernels"
# What each layer may import of this package. A name stands for the module and all below it.
ALLOWED = {
    "_library": {"kernels"},
    "_nvcc": set(),
    "ops": {"_host", "_library", "ops"},
    "functional": {"ops", "quantization.config"},
    "nn": {"functional", "nn", "quantization.config", "ops"},
    "memory": {"_host", "_library", "distributed", "functional", "memory", "nn", "ops", "optim", "quantization"},
    "optim": {"_library", "functional", "ops", "optim"},
    "distributed": {"distributed", "functional", "ops", "optim"},
    "quantization": {"functional", "nn", "quantization", "_library"},
    "integrations": {"functional", "integrations", "memory", "nn", "quantization"},
    "demo": {"demo", "quantization", "nn", "functional", "_library", "_info", ""},
    "bench": {"bench", "optim", "quantization", "nn", "functional", "ops", "_library", "_nvcc", "_info", ""},
    "train": {"train", "bench", "distributed", "optim", "quantization", "nn"},
    "_info": {"_host", "_library", ""},
    "_plan": {"distributed", "memory", "nn", ""},
    "__main__": {"_info", "_plan", "demo", "bench", "quantization", "train"},
    "__init__": {"_library", "distributed", "ops", "functional", "memory", "nn", "optim", "quantization"},
}


def imports(path: Path) -> set[str]:
    """Dotted names below `pykernels` that a file imports, "" for the package itself."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.add(module) if node.module else found.update(f"{module}.{alias.name}" for alias in node.names)
    ours = {name.removeprefix("pykernels").lstrip(".") for name in found if name.split(".")[0] == "pykernels"}
    return {"" if name == "__version__" else name for name in ours}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if "kernels" not in p.relative_to(PACKAGE).parts]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    assert layer(path) in ALLOWED, f"{path} is in a layer that this test does not know: add it with what it may import"
    allowed = ALLOWED[layer(path)]
    for name in imports(path):
        reachable = name in allowed or any(name.startswith(a + ".") for a in allowed if a)
        assert reachable, f"{layer(path)} imports pykernels.{name}: it may import {sorted(allowed)}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_triton_kernels_import_triton_torch_and_common_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            bad = [a.name for a in node.names if a.name.split(".")[0] not in STANDARD | {"triton", "torch"}]
            assert not bad, bad
        elif isinstance(node, ast.ImportFrom):
            root = (node.module or "").split(".")[0]
            assert node.level == 1 or root in STANDARD | {"triton", "torch"}, ast.unparse(node)


STANDARD = {"__future__", "collections", "contextlib", "dataclasses", "functools", "json", "math", "os", "pathlib"}
STANDARD |= {"typing", "warnings"}


def test_files_stay_small() -> None:
    """400 lines, and about 250 for a kernel: split by meaning."""
    sources = [
        p for folder in ("pykernels", "csrc", "kernels", "tests", "benchmarks") for p in (ROOT / folder).rglob("*")
    ]
    for path in sources:
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}:
            lines = len(path.read_text().splitlines())
            kernel = "kernels" in path.parts or "csrc" in path.parts
            assert lines <= (275 if kernel else 400), f"{path.relative_to(ROOT)} has {lines} lines"


def test_csrc_keeps_torch_out_of_the_kernels() -> None:
    """Only bind/ may include torch, and only its stable headers; nothing but host/ may include Python."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in {".cpp", ".h", ".cu", ".cuh"}:
            continue
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        torch_headers = [line for line in includes if "torch/" in line or "ATen" in line or "c10" in line]
        if "bind" in path.parts:
            stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/")
            assert all(any(part in line for part in stable) for line in torch_headers), (path, torch_headers)
        else:
            assert not torch_headers, (path, torch_headers)
        if "host" not in path.parts:
            assert not any("Python.h" in line or "pybind11" in line for line in includes), path
