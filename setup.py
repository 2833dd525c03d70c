"""Builds pykernels/_C.so (CPU), pykernels/_cuda.so (when nvcc is found) and pykernels._host (pybind11).

The two operator libraries use LibTorch's stable ABI only, so that one binary serves every Python and every torch
from 2.10 on. Environment:
  PYKERNELS_CUDA=0|1       never build, or insist on, the CUDA library (default: when nvcc is found)
  PYKERNELS_CUDA_ARCHS     e.g. "8.0+PTX;9.0a" (default: the architecture of the GPU that is present, else 9.0a)
  CUDA_HOME, CXX, MAX_JOBS the usual meaning
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DTORCH_STABLE_ONLY"]
# -ffp-contract=off: codes must be bit-equal on every path, and a fused x * inv + u would round differently.
# -Wno-*uninitialized: GCC 12 warns about its own AVX-512 headers.
CXXFLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
CXXFLAGS += [f"-ffile-prefix-map={ROOT}/="]  # error messages name csrc/..., not a folder of the build machine
CXXFLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
NVCCFLAGS = [
    "-O3",
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]


def find_nvcc() -> str | None:
    """nvcc through CUDA_HOME, the PATH or its usual place; torch's own CUDA_HOME is None on a CPU-only torch."""
    if os.environ.get("PYKERNELS_CUDA") == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path("/usr/local/cuda/bin/nvcc")] + ([Path(on_path)] if on_path else [])
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    if os.environ.get("PYKERNELS_CUDA") == "1":
        raise SystemExit("PYKERNELS_CUDA=1, but no nvcc was found: set CUDA_HOME to the toolkit's folder")
    return None


def cuda_home(nvcc: str) -> Path:
    """The toolkit's folder, asked of nvcc itself: a wrapper on the PATH need not lie inside it."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    for line in dry.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parents[1]


def gencode() -> list[str]:
    archs = os.environ.get("PYKERNELS_CUDA_ARCHS")
    if not archs:
        archs = "9.0a"
        import torch

        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            archs = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
    flags = []
    for arch in archs.replace(",", ";").split(";"):
        number = arch.strip().removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.strip().endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free_gb = 4.0
    return max(1, min(cores, int(free_gb / 4)))


def quote(words: list[str]) -> str:
    return " ".join(word.replace("$", "$$").replace(" ", "$ ") if " " in word else word for word in words)


def place(built: Path, folder: Path) -> None:
    """Copies by rename, so that a running process keeps the file it has mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (built.name + ".tmp")
    shutil.copy2(built, temporary)
    os.replace(temporary, folder / built.name)


class NinjaBuild(build_ext):
    """Writes one build.ninja for everything, so that an unchanged file costs nothing."""

    def build_extensions(self) -> None:
        import torch

        torch_root = Path(torch.__file__).parent
        out = Path(self.build_lib) / "pykernels"
        work = (
            ROOT / "build" / f"ninja-torch{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
        ).resolve()
        work.mkdir(parents=True, exist_ok=True)
        include = [f"-I{ROOT / 'csrc'}", f"-isystem{torch_root / 'include'}"]
        link_torch = [
            f"-L{torch_root / 'lib'}",
            "-Wl,--no-as-needed",
            "-ltorch",
            "-Wl,--as-needed",
            "-Wl,--exclude-libs,ALL",
        ]
        cxx = os.environ.get("CXX", "g++")
        rules = [
            "ninja_required_version = 1.5",
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
            "  description = c++ $name",
            f"rule link\n  command = {cxx} -shared -o $out $in $flags\n  description = link $name",
        ]
        edges: list[str] = []
        targets: list[Path] = []

        def compile_all(rule: str, sources: list[Path], flags: list[str], folder: str) -> list[Path]:
            objects = []
            for source in sources:
                name = source.relative_to(ROOT / "csrc")
                obj = work / folder / f"{str(name).replace('/', '.')}.o"
                edges.append(f"build {obj}: {rule} {source}\n  flags = {quote(flags)}\n  name = {name}")
                objects.append(obj)
            return objects

        def link(name: str, objects: list[Path], flags: list[str]) -> None:
            target = work / name
            words = " ".join(map(str, objects))
            edges.append(f"build {target}: link {words}\n  flags = {quote(flags)}\n  name = {name}")
            targets.append(target)

        csrc = ROOT / "csrc"
        cpu_sources = sorted([*csrc.glob("cpu/*.cpp"), *csrc.glob("cpu/bind/*.cpp")])
        link("_C.so", compile_all("cxx", cpu_sources, CXXFLAGS + STABLE + include, "cpu"), link_torch)

        cuda_sources = sorted(csrc.glob("cuda/*.cu"))
        nvcc = find_nvcc() if cuda_sources else None
        archs = ""
        if nvcc:
            home = cuda_home(nvcc)
            flags = gencode()
            archs = " ".join(flags)
            rules.append(
                f"rule nvcc\n  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || "
                "(cat $out.log; exit 1)\n  depfile = $out.d\n  deps = gcc\n  description = nvcc $name"
            )
            cuda_include = [*include, f"-isystem{home / 'include'}"]
            objects = compile_all("nvcc", cuda_sources, NVCCFLAGS + flags + [f"-I{csrc}"], "cuda")
            objects += compile_all(
                "cxx", sorted(csrc.glob("cuda/bind/*.cpp")), [*CXXFLAGS, *STABLE, "-DUSE_CUDA", *cuda_include], "cuda"
            )
            static = next(
                (d for d in (home / "lib64", home / "lib") if (d / "libcudart_static.a").is_file()), home / "lib64"
            )
            link("_cuda.so", objects, [*link_torch, f"-L{static}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"])
        elif cuda_sources:
            print("pykernels: no nvcc found, so the CUDA library is not built; Triton serves on a GPU", flush=True)

        host_sources = sorted(csrc.glob("host/*.cpp"))
        if host_sources:
            import pybind11

            host_name = "_host" + sysconfig.get_config_var("EXT_SUFFIX")
            info = [
                f'-DPYKERNELS_CXXFLAGS=\\"{",".join(CXXFLAGS)}\\"',
                f'-DPYKERNELS_TORCH=\\"{torch.__version__}\\"',
                f'-DPYKERNELS_CUDA_ARCHS=\\"{archs.replace(" ", ",")}\\"',
            ]
            host_include = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
            link(
                host_name, compile_all("cxx", host_sources, [*CXXFLAGS, f"-I{csrc}", *host_include, *info], "host"), []
            )

        (work / "build.ninja").write_text("\n\n".join(rules + edges) + "\n")
        command = [sys.executable, "-m", "ninja", "-C", str(work), "-j", str(jobs())]
        print(f"pykernels: {len(edges)} build steps with {jobs()} jobs", flush=True)
        if subprocess.run(command).returncode != 0:
            raise SystemExit("pykernels: the build failed; the first error above says where")
        for target in targets:
            place(target, out)

    def copy_extensions_to_source(self) -> None:
        for built in (Path(self.build_lib) / "pykernels").glob("*.so"):
            place(built, ROOT / "pykernels")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "pykernels").glob("*.so")]


setup(
    ext_modules=[Extension("pykernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
