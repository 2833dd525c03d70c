"""Builds pykernels/_C.so (CPU), pykernels/_cuda.so (when nvcc is found) and pykernels._host (pybind11).

The two operator libraries use LibTorch's stable ABI only, so that one binary serves every Python and every torch
from 2.10 on. Environment:
  PYKERNELS_CUDA=0|1       never build, or insist on, the CUDA library (default: when nvcc is found)
  PYKERNELS_CUDA_ARCHS     e.g. "8.0+PTX;9.0a" (default: the architecture of the GPU that is present, else 9.0a)
  PYKERNELS_CUTLASS        CUTLASS's include folder, or 0 for none (default: that of the package nvidia-cutlass)
  CUDA_HOME, CXX, MAX_JOBS the usual meaning
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DTORCH_STABLE_ONLY"]
# -ffp-contract=off: codes must be bit-equal on every path, and a fused x * inv + u would round differently.
# -Wno-*uninitialized: GCC 12 warns about its own AVX-512 headers.
CXXFLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
CXXFLAGS += [f"-ffile-prefix-map={ROOT}/="]  # error messages name csrc/..., not a folder of the build machine
CXXFLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def load_nvcc_module() -> ModuleType:
    """pykernels/_nvcc.py without the package, which is not built yet."""
    spec = importlib.util.spec_from_file_location("_nvcc", ROOT / "pykernels" / "_nvcc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_nvcc = load_nvcc_module()


def find_nvcc() -> str | None:
    if os.environ.get("PYKERNELS_CUDA") == "0":
        return None
    found = _nvcc.find_nvcc()
    if found is None and os.environ.get("PYKERNELS_CUDA") == "1":
        raise SystemExit("PYKERNELS_CUDA=1, but no nvcc was found: set CUDA_HOME to the toolkit's folder")
    return found


def cuda_archs() -> str:
    archs = os.environ.get("PYKERNELS_CUDA_ARCHS")
    if archs:
        return archs
    import torch

    if not torch.cuda.is_available():
        return "9.0a"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def why_no_hopper(archs: str) -> str | None:
    """Why the Hopper kernels are left out; None where they are built."""
    if "9.0a" not in archs.replace(",", ";").replace("+PTX", "").split(";"):
        return f"9.0a is not among the architectures ({archs})"
    try:
        _nvcc.find_cutlass()
    except _nvcc.NoCutlass as reason:
        return str(reason)
    return None


def jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free_gb = 4.0
    return max(1, min(cores, int(free_gb / 4)))


def write_build_info(folder: Path, **values: str) -> None:
    """build_info.h for csrc/host, touched only where it changes; a macro on the command line could hold no blanks."""
    text = "#pragma once\n" + "".join(
        f"#define PYKERNELS_{name.upper()} {json.dumps(value)}\n" for name, value in values.items()
    )
    header = folder / "build_info.h"
    if not header.is_file() or header.read_text() != text:
        header.write_text(text)


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

        def compile_all(rule: str, sources: list[Path], flags: list[str], folder: str, header: str = "") -> list[Path]:
            """``header`` is one that every source begins with: compiled once, it halves the time of a binding."""
            objects, needs = [], ""
            if header:
                begin = work / folder / "begin.h"
                begin.parent.mkdir(exist_ok=True)
                if not begin.exists():
                    begin.write_text(f'#include "{header}"\n')
                words = quote([*flags, "-x", "c++-header"])
                edges.append(f"build {begin}.gch: cxx {begin}\n  flags = {words}\n  name = {header}")
                flags, needs = [*flags, "-include", str(begin)], f" | {begin}.gch"
            for source in sources:
                name = source.relative_to(ROOT / "csrc")
                obj = work / folder / f"{str(name).replace('/', '.')}.o"
                edges.append(f"build {obj}: {rule} {source}{needs}\n  flags = {quote(flags)}\n  name = {name}")
                objects.append(obj)
            return objects

        def link(name: str, objects: list[Path], flags: list[str]) -> None:
            target = work / name
            words = " ".join(map(str, objects))
            edges.append(f"build {target}: link {words}\n  flags = {quote(flags)}\n  name = {name}")
            targets.append(target)

        csrc = ROOT / "csrc"
        cpu_flags = [*CXXFLAGS, *STABLE, *include]
        objects = compile_all("cxx", sorted(csrc.glob("cpu/bind/*.cpp")), cpu_flags, "cpu", "cpu/bind/checks.h")
        objects += compile_all("cxx", sorted(csrc.glob("cpu/*.cpp")), cpu_flags, "cpu")
        link("_C.so", objects, link_torch)

        nvcc = find_nvcc()
        archs, no_hopper = "", "PYKERNELS_CUDA=0" if os.environ.get("PYKERNELS_CUDA") == "0" else "no nvcc was found"
        cuda_objects: dict[Path, tuple[Path, str]] = {}
        if nvcc:
            home = _nvcc.cuda_home(nvcc)
            archs = cuda_archs()
            no_hopper = why_no_hopper(archs)
            rules.append(
                f"rule nvcc\n  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || "
                "(cat $out.log; exit 1)\n  depfile = $out.d\n  deps = gcc\n  description = nvcc $name"
            )
            objects = []
            for source in _nvcc.sources():
                flags = _nvcc.flags_for(source) + _nvcc.gencode(archs)
                objects += compile_all("nvcc", [source], flags, "cuda")
                cuda_objects[source] = objects[-1], archs
            cxx_flags = [*CXXFLAGS, *STABLE, "-DUSE_CUDA", *include, f"-isystem{home / 'include'}"]
            if no_hopper is None:
                for source in _nvcc.hopper_sources():
                    flags = _nvcc.flags_for(source) + _nvcc.gencode("9.0a")
                    objects += compile_all("nvcc", [source], flags, "cuda")
                    cuda_objects[source] = objects[-1], "9.0a"
                cxx_flags.append("-DPYKERNELS_HOPPER")
                objects += compile_all("cxx", sorted(csrc.glob("cuda/hopper/*.cpp")), cxx_flags, "cuda")
            else:
                print(f"pykernels: no Hopper kernels, those of sm_80 serve in their place: {no_hopper}", flush=True)
            bindings = sorted(csrc.glob("cuda/bind/*.cpp"))
            objects += compile_all("cxx", bindings, cxx_flags, "cuda", "cuda/bind/checks.h")
            static = next(
                (d for d in (home / "lib64", home / "lib") if (d / "libcudart_static.a").is_file()), home / "lib64"
            )
            link("_cuda.so", objects, [*link_torch, f"-L{static}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"])
        else:
            print("pykernels: no nvcc found, so the CUDA library is not built; Triton serves on a GPU", flush=True)

        host_sources = sorted(csrc.glob("host/*.cpp"))
        if host_sources:
            import pybind11

            host_name = "_host" + sysconfig.get_config_var("EXT_SUFFIX")
            cutlass = "" if no_hopper else _nvcc.cutlass_version(_nvcc.find_cutlass())
            write_build_info(
                work,
                cxxflags=" ".join(CXXFLAGS),
                torch=torch.__version__,
                cuda_archs=archs,
                hopper=f"no: {no_hopper}" if no_hopper else f"yes, CUTLASS {cutlass}",
            )
            host_include = [
                f"-I{work}",
                f"-isystem{pybind11.get_include()}",
                f"-isystem{sysconfig.get_paths()['include']}",
            ]
            link(
                host_name,
                compile_all("cxx", host_sources, [*CXXFLAGS, f"-I{csrc}", f"-I{work}", *host_include], "host"),
                [],
            )

        # What the objects are made from, so that the static report and the tests need not compile it again. Before the
        # build: a file that is edited while it runs is compiled again then.
        notes = {
            obj.with_suffix(".json"): {"digest": _nvcc.digest(source, nvcc), "archs": of}
            for source, (obj, of) in cuda_objects.items()
        }
        for path in notes:
            path.unlink(missing_ok=True)
        (work / "build.ninja").write_text("\n\n".join(rules + edges) + "\n")
        command = [sys.executable, "-m", "ninja", "-C", str(work), "-j", str(jobs())]
        print(f"pykernels: {len(edges)} build steps with {jobs()} jobs", flush=True)
        if subprocess.run(command).returncode != 0:
            raise SystemExit("pykernels: the build failed; the first error above says where")
        for path, note in notes.items():
            path.write_text(json.dumps(note))
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
