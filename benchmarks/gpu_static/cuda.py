"""The CUDA kernels as machine code: compiled for an architecture, or taken from the build, and read back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pykernels import _nvcc

CACHE = _nvcc.ROOT / "build" / "gpu_static"
ARCHS = ("sm_80", "sm_90a")
_EDITION = 1  # of what is read out of the machine code


def units() -> list[tuple[Path, str]]:
    """Every CUDA source with every architecture it is for."""
    found = [(source, arch) for source in _nvcc.sources() for arch in ARCHS]
    return found + [(source, _nvcc.HOPPER_ARCH) for source in _nvcc.hopper_sources()]


def label(source: Path) -> str:
    """The source as its path below csrc/cuda without a suffix."""
    return source.relative_to(_nvcc.CSRC / "cuda").with_suffix("").as_posix()


def why_not(source: Path) -> str | None:
    """Why a source cannot be compiled here; None where it can."""
    if _nvcc.find_nvcc() is None:
        return "nvcc is not installed"
    if find_cuobjdump() is None:
        return "nvcc is here but cuobjdump is not: install triton, which brings one"
    if source.parent.name == "hopper":
        try:
            _nvcc.find_cutlass()
        except _nvcc.NoCutlass as reason:
            return str(reason)
    return None


def find_cuobjdump() -> str | None:
    """cuobjdump beside nvcc, else the one that Triton brings."""
    nvcc = _nvcc.find_nvcc()
    beside = Path(nvcc).parent / "cuobjdump" if nvcc else None
    if beside is not None and beside.exists():
        return str(beside)
    try:
        import triton
    except ImportError:
        return shutil.which("cuobjdump")
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.exists() else shutil.which("cuobjdump")


def examine(source: Path, arch: str) -> dict[str, Any]:
    """{"ptxas": its report, "kernels": one dictionary each} of a source, kept by the content that it was made from."""
    nvcc = _nvcc.find_nvcc()
    assert nvcc is not None
    digest = _nvcc.digest(source, nvcc)
    known = CACHE / f"{label(source).replace('/', '.')}.{arch}.{digest}.{_EDITION}.json"
    if known.exists():
        return json.loads(known.read_text())
    CACHE.mkdir(parents=True, exist_ok=True)
    built = built_object(source, arch, digest)
    if built is not None:
        found = read(built, arch, built.with_suffix(".o.log").read_text())
    else:
        target = CACHE / f"{source.stem}.{arch}.{os.getpid()}.o"
        gencode = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
        command = ["nice", nvcc, *_nvcc.flags_for(source), gencode, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = read(target, arch, done.stderr)
        target.unlink()
    partial = known.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(known)
    return found


def built_object(source: Path, arch: str, digest: str) -> Path | None:
    """The object that setup.py made of this very source for this architecture, if there is one."""
    name = source.relative_to(_nvcc.CSRC).as_posix().replace("/", ".")
    for note in sorted((_nvcc.ROOT / "build").glob(f"ninja-*/cuda/{name}.json")):
        made = json.loads(note.read_text())
        if made["digest"] == digest and f"code={arch}" in " ".join(_nvcc.gencode(made["archs"])):
            return note.with_suffix(".o")
    return None


def read(binary: Path, arch: str, log: str) -> dict[str, Any]:
    """What ptxas said and what the machine code of each kernel holds."""
    tool = find_cuobjdump()
    assert tool is not None

    def dump(what: str) -> str:
        command = [tool, what, "-arch", arch, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\S+):\n\s+(REG:.*)", dump("-res-usage")))
    threads = max_threads(dump("-elf"))
    kernels = []
    for part in re.split(r"^\s+Function : ", dump("-sass"), flags=re.M)[1:]:
        name, body = part.split("\n", 1)
        resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[name])}
        opcodes: dict[str, int] = {}
        for opcode in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][A-Za-z0-9_.]+)", body, re.M):
            opcodes[opcode] = opcodes.get(opcode, 0) + 1
        kernels.append(
            {
                "symbol": name,
                "registers": resources["REG"],
                "stack": resources["STACK"],
                "local": resources["LOCAL"],
                "static_shared": resources["SHARED"],
                "threads": threads[name],
                "opcodes": opcodes,
            }
        )
    for kernel, name in zip(kernels, demangle([kernel["symbol"] for kernel in kernels]), strict=True):
        kernel["name"] = name
    # Of a log for several architectures, the part of this one.
    blocks = re.split(r"(?=^ptxas info    : Compiling entry function)", log, flags=re.M)
    mine = [block for block in blocks if f"for '{arch}'" in block.split("\n", 1)[0]]
    return {"ptxas": "".join(blocks[:1] + mine), "kernels": kernels}


def max_threads(elf: str) -> dict[str, int]:
    """Threads of a block, which every kernel here states in its __launch_bounds__."""
    found, kernel, wanted = {}, "", False
    for line in elf.splitlines():
        if line.startswith(".nv.info."):
            kernel = line.strip().removeprefix(".nv.info.")
        elif "Attribute:" in line:
            wanted = "EIATTR_MAX_THREADS" in line
        elif wanted and "Value:" in line:
            found[kernel] = int(line.split("Value:")[1].split()[0], 16)
    return found


def demangle(symbols: list[str]) -> list[str]:
    """Names as they are written, without this package's own namespaces; the symbols where binutils are absent."""
    if not symbols or shutil.which("c++filt") is None:
        return symbols
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [re.sub(r"pykernels::(cuda::)?|\(anonymous namespace\)::", "", name) for name in done.stdout.splitlines()]
