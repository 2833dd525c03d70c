"""Finds and loads the compiled libraries, defines the operators, picks the backend that serves each, and says why."""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "pykernels"
BACKENDS = ("reference", "triton", "native")
CPU_ISAS = ("portable", "avx2", "avx512_vnni")
LIB = torch.library.Library(NAMESPACE, "DEF")


@dataclass
class Op:
    """One operator: what it is (schema, reference) and which kernels exist for it."""

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    triton: bool = False
    composite: bool = False
    module: str = ""  # of pykernels.kernels, where its Triton launcher is


@dataclass
class NativeLibrary:
    """A compiled library: where it is, whether it is loaded, and if not, why and what to do."""

    name: str
    path: Path | None = None
    loaded: bool = False
    reason: str = ""
    handle: ctypes.CDLL | None = field(default=None, repr=False)


OPS: dict[str, Op] = {}
_native: dict[str, NativeLibrary] = {}
_forced: list[str] = []
_triton_default: torch.library.Library | None = None


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    triton: bool | str = True,
    composite: bool = False,
    tags: tuple[Any, ...] = (),
) -> Op:
    """Defines `pykernels::<schema>` with its reference for every device and its fake function.

    triton: kernels/<op>.py has a launcher of the op's name with the op's arguments; a string names another module of
    kernels/ that has it.
    composite: the op is made of other ops of ours, so that no backend implements it itself, but Triton where `triton`
    names the module that does.
    """
    LIB.define(schema, tags=tags)
    name = schema.split("(")[0]
    reference = _without_autocast(reference)
    LIB.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIB)
    module = triton if isinstance(triton, str) else name
    has_triton = isinstance(triton, str) or (triton and not composite)
    op = Op(name, reference, fake, has_triton, composite, module)
    OPS[name] = op
    return op


def _without_autocast(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference computes in the precision it says, also where autocast would recast its own products."""

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return reference(*args, **kwargs)
        flat = (part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        device = next(part.device.type for part in flat if isinstance(part, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return call


def triton_launcher(name: str) -> Callable[..., Any]:
    """The Triton launcher of an op, imported on first use: importing triton costs a second."""
    return getattr(importlib.import_module(f"pykernels.kernels.{OPS[name].module}"), name)


def _lazy_triton(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        OPS[name].fake(*args, **kwargs)  # for its checks; the output it allocates is freed before ours is taken
        return triton_launcher(name)(*args, **kwargs)

    return call


def triton_available() -> tuple[bool, str]:
    """Whether Triton kernels can run, and if not, why."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "Triton's interpreter"
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return False, "the GPU is older than sm_80"
    return True, "Triton"


def has_native(name: str, device_type: str) -> bool:
    """Whether a loaded library implements the op for the device."""
    library = _native.get("cpu" if device_type == "cpu" else "cuda")
    key = "CPU" if device_type == "cpu" else "CUDA"
    if library is None or not library.loaded:
        return False
    return name in _native_ops[key]


_native_ops: dict[str, set[str]] = {"CPU": set(), "CUDA": set()}


def _load(name: str, filename: str, wanted: bool, why_not: str) -> NativeLibrary:
    library = NativeLibrary(name)
    _native[name] = library
    path = Path(__file__).parent / filename
    if not wanted:
        library.reason = why_not
        return library
    if not path.is_file():
        library.reason = f"{filename} is not built: run `python setup.py build_ext --inplace`, or install a wheel"
        return library
    library.path = path
    key = "CPU" if name == "cpu" else "CUDA"
    try:
        torch.ops.load_library(str(path))
        library.handle = ctypes.CDLL(str(path))
        library.loaded = True
    except OSError as error:
        library.reason = f"{filename} does not load ({error}): rebuild it for this torch ({torch.__version__})"
        return library
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    _native_ops[key] = {op for op in OPS if has_kernel(f"{NAMESPACE}::{op}", key)}
    return library


def load() -> None:
    """Loads what is built, then applies PYKERNELS_BACKEND. Called once, after every op is defined."""
    global _triton_default
    cpu = _load("cpu", "_C.so", True, "")
    cuda = _load(
        "cuda",
        "_cuda.so",
        torch.version.cuda is not None and torch.cuda.is_available(),
        "this torch sees no CUDA device",
    )
    missing = [lib for lib in (cpu, cuda) if not lib.loaded and lib.reason != "this torch sees no CUDA device"]
    if missing and os.environ.get("PYKERNELS_REQUIRE_NATIVE") == "1":
        raise ImportError("PYKERNELS_REQUIRE_NATIVE=1: " + "; ".join(lib.reason for lib in missing))
    if missing:
        # Said once: the reference is right but slow, and a user who timed it would blame the kernels.
        warnings.warn(
            "pykernels: " + "; ".join(lib.reason for lib in missing) + ". Slower kernels serve.", stacklevel=3
        )
    if torch.cuda.is_available() and triton_available()[0]:
        _triton_default = torch.library.Library(NAMESPACE, "IMPL")
        for op in OPS.values():
            if op.triton and op.name not in _native_ops["CUDA"]:
                _triton_default.impl(op.name, _lazy_triton(op.name), "CUDA")
    asked = os.environ.get("PYKERNELS_BACKEND")
    if asked:
        _push(asked)


def _push(name: str) -> torch.library.Library | None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "native":
        if not any(library.loaded for library in _native.values()):
            raise RuntimeError("backend: 'native' was asked for, but " + _native["cpu"].reason)
        _forced.append(name)
        return None
    if name == "triton" and not triton_available()[0]:
        raise RuntimeError(f"backend: 'triton' was asked for, but {triton_available()[1]}")
    override = torch.library.Library(NAMESPACE, "IMPL")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    with warnings.catch_warnings():
        # PyTorch warns that a kernel is overridden, which is the point here.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for op in OPS.values():
            if name == "reference" and op.composite:
                continue
            if name == "reference":
                for key in ("CPU", "CUDA"):
                    override.impl(op.name, op.reference, key, allow_override=True)
            elif op.triton:
                override.impl(op.name, _lazy_triton(op.name), "CPU" if interpreted else "CUDA", allow_override=True)
    _forced.append(name)
    _overrides.append(override)
    return override


_overrides: list[torch.library.Library] = []


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend ("reference", "triton" or "native") for every op, process-wide, within the block.

    Compiled graphs and autograd follow too: the override is made in PyTorch's dispatcher. "native" inside a block that
    forces another backend is refused. An op without a kernel of the forced kind keeps what it has (see `info`).
    """
    if name == "native" and _overrides:
        raise RuntimeError("backend: 'native' cannot be forced inside a block that forces another backend")
    override = _push(name)
    try:
        yield
    finally:
        _forced.pop()
        if override is not None:
            _overrides.remove(override)
            override._destroy()


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Forces the instruction set of the CPU kernels ("portable", "avx2", "avx512_vnni") within the block."""
    if name not in CPU_ISAS:
        raise ValueError(f"cpu_isa: expected one of {', '.join(CPU_ISAS)}, got {name!r}")
    handle = _native["cpu"].handle
    if handle is None:
        raise RuntimeError(f"cpu_isa: the compiled CPU library is not loaded: {_native['cpu'].reason}")
    before = handle.pykernels_get_cpu_isa()
    if handle.pykernels_set_cpu_isa(CPU_ISAS.index(name)) < 0:
        raise RuntimeError(f"cpu_isa: this CPU does not support {name}")
    try:
        yield
    finally:
        handle.pykernels_set_cpu_isa(before)


def current_cpu_isa() -> str | None:
    """The instruction set the CPU kernels use now; None without the compiled library."""
    handle = _native["cpu"].handle
    return None if handle is None else CPU_ISAS[handle.pykernels_get_cpu_isa()]


def libraries() -> dict[str, NativeLibrary]:
    """The compiled libraries by name, as found at import."""
    return _native


def serving(name: str, device_type: str) -> tuple[str, str]:
    """(backend, reason) of an op on a device type, as calls are dispatched now."""
    op = OPS[name]
    forced = _forced[-1] if _forced else None
    on_triton = device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if op.composite and not (op.triton and (device_type == "cuda" or (forced == "triton" and on_triton))):
        return "composite", "made of the ops above"
    if forced == "reference":
        return "reference", "forced"
    if forced == "triton" and op.triton and on_triton:
        return "triton", "forced"
    if has_native(name, device_type):
        detail = f"{current_cpu_isa()} kernels" if device_type == "cpu" else "CUDA kernels"
        return "native", f"{detail} in {_native[device_type].path.name}"  # type: ignore[union-attr]
    if device_type == "cuda" and op.triton:
        available, why = triton_available()
        return ("triton", "no CUDA kernel for it") if available else ("reference", why)
    library = _native.get(device_type)
    if library is not None and library.loaded:
        return "reference", "no kernel for it yet"
    return "reference", library.reason if library else f"no kernels for {device_type}"
