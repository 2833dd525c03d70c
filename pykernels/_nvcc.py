"""How the CUDA sources are compiled: the compiler, its flags, CUTLASS, and digests of what went in.

setup.py loads this file by its path, before there is a package; the static report and the tests import it. Standard
library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
HOPPER_ARCH = "sm_90a"
HOPPER_FLAGS = ["-DNDEBUG"]  # CUTLASS asserts in device code
CUTLASS_VERSION = "4.2.0"


class NoCutlass(Exception):
    """Why the Hopper kernels cannot be built, for people."""


def find_nvcc() -> str | None:
    """nvcc through CUDA_HOME, the PATH or its usual place; torch's own CUDA_HOME is None on a CPU-only torch."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path("/usr/local/cuda/bin/nvcc")] + ([Path(on_path)] if on_path else [])
    return next((str(candidate) for candidate in candidates if candidate.is_file()), None)


def cuda_home(nvcc: str) -> Path:
    """The toolkit's folder, asked of nvcc itself: a wrapper on the PATH need not lie inside it."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    for line in dry.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parents[1]


def gencode(archs: str) -> list[str]:
    """The flags for a list of architectures such as "8.0+PTX;9.0a"."""
    flags = []
    for arch in archs.replace(",", ";").split(";"):
        number = arch.strip().removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.strip().endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_cutlass() -> Path:
    """The folder of CUTLASS's headers: PYKERNELS_CUTLASS, else the package nvidia-cutlass. Raises NoCutlass."""
    asked = os.environ.get("PYKERNELS_CUTLASS")
    if asked == "0":
        raise NoCutlass("PYKERNELS_CUTLASS=0")
    if asked:
        include = Path(asked)
    else:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or not spec.submodule_search_locations:
            wanted = f"pip install --no-deps nvidia-cutlass=={CUTLASS_VERSION}.0"
            raise NoCutlass(f"CUTLASS is not installed ({wanted}; or PYKERNELS_CUTLASS=its include folder)")
        include = Path(next(iter(spec.submodule_search_locations))) / "source" / "include"
    version = cutlass_version(include)
    if version is None and asked:
        raise SystemExit(
            f"PYKERNELS_CUTLASS={asked}: expected CUTLASS's include folder, got no cutlass/version.h in it"
        )
    if version is None:
        raise NoCutlass(f"{include} holds no cutlass/version.h")
    if version.split(".")[0] != CUTLASS_VERSION.split(".")[0]:
        raise NoCutlass(f"CUTLASS {version} was found and {CUTLASS_VERSION} is what the kernels are written for")
    return include


def cutlass_version(include: Path) -> str | None:
    header = include / "cutlass" / "version.h"
    if not header.is_file():
        return None
    parts = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
    return ".".join(parts.get(name, "0") for name in ("MAJOR", "MINOR", "PATCH"))


def sources() -> list[Path]:
    """The CUDA files that serve every architecture."""
    return sorted((CSRC / "cuda").glob("*.cu"))


def hopper_sources() -> list[Path]:
    """The CUDA files that need CUTLASS and sm_90a."""
    return sorted((CSRC / "cuda" / "hopper").glob("*.cu"))


def flags_for(source: Path) -> list[str]:
    """All that decides what a source compiles to but the architectures."""
    flags = [*FLAGS, f"-I{CSRC}"]
    if source.parent.name == "hopper":
        flags += [*HOPPER_FLAGS, "-isystem", str(find_cutlass())]
    return flags


def included(source: Path) -> list[Path]:
    """A source and every header of ours that it includes, directly or not."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop().resolve()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.M):
            waiting += [folder / name for folder in (path.parent, CSRC) if (folder / name).is_file()][:1]
    return sorted(found)


def source_digest(source: Path) -> str:
    """Of a CUDA source and every header of ours that it includes."""
    digest = hashlib.sha256()
    for path in included(source):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def digest(source: Path, nvcc: str) -> str:
    """Of everything that decides what a source compiles to but the architectures."""
    parts = [source_digest(source), *FLAGS]
    parts.append(subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if source.parent.name == "hopper":
        parts += [*HOPPER_FLAGS, str(cutlass_version(find_cutlass()))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
