"""Builds csrc/cuda for the CPU emulator and calls its launchers on memory that ends at a guard page."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-w", "-DPYKERNELS_CUDA_EMULATED"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.int32: 4}

Pointer, I64, Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class QuantizeRowwise(ctypes.Structure):
    _fields_ = [
        ("x", Pointer), ("x_dtype", Int), ("x_stride", I64), ("K", I64),
        ("given_scale", Pointer), ("given_scale_stride", I64), ("stochastic", ctypes.c_bool), ("seed", ctypes.c_uint64),
        ("q", Pointer), ("q_stride", I64), ("scale", Pointer),
    ]  # fmt: skip


class Epilogue(ctypes.Structure):
    _fields_ = [
        ("a_scale", Pointer), ("a_scale_stride", I64), ("b_scale", Pointer), ("b_scale_stride", I64),
        ("a_zero_point", Pointer), ("a_zero_point_stride", I64), ("b_sum", Pointer),
        ("bias", Pointer), ("bias_dtype", Int),
        ("residual", Pointer), ("residual_stride", I64), ("residual_dtype", Int),
        ("activation", Int), ("out", Pointer), ("out_stride", I64), ("out_dtype", Int),
    ]  # fmt: skip


class Int8Matmul(ctypes.Structure):
    _fields_ = [
        ("a", Pointer), ("a_stride", I64), ("b", Pointer), ("b_stride", I64),
        ("m", I64), ("n", I64), ("k", I64), ("epilogue", Epilogue),
    ]  # fmt: skip


class Int8BlockScaled(ctypes.Structure):
    _fields_ = [
        ("a", Pointer), ("a_stride", I64), ("a_scale", Pointer), ("b", Pointer), ("b_stride", I64),
        ("b_scale", Pointer), ("blocks", I64), ("M", I64), ("N", I64), ("K", I64), ("epilogue", Epilogue),
    ]  # fmt: skip


class Int8GroupedMatmul(ctypes.Structure):
    _fields_ = [
        ("a", Pointer), ("a_stride", I64), ("b", Pointer), ("b_step", I64), ("b_stride", I64),
        ("counts", Pointer), ("counts_are_wide", ctypes.c_bool),
        ("experts", I64), ("rows", I64), ("n", I64), ("k", I64), ("epilogue", Epilogue), ("row_tiles", I64),
    ]  # fmt: skip


class Int8WeightOnlyLinear(ctypes.Structure):
    _fields_ = [
        ("x", Pointer), ("x_dtype", Int), ("weight", Pointer), ("weight_scale", Pointer),
        ("group_size", I64), ("m", I64), ("n", I64), ("k", I64), ("epilogue", Epilogue),
    ]  # fmt: skip


class Guarded:
    """A copy of a tensor whose last byte is followed by a page that may not be touched, shared with forked children."""

    def __init__(self, tensor: torch.Tensor, misalign: int = 0) -> None:
        data = tensor.contiguous()
        size = data.numel() * data.element_size()
        room = -(-(size + 32) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, room + mmap.PAGESIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        padded = size if misalign else -(-size // 16) * 16
        offset = room - padded - (misalign if misalign else 0)
        self.address = base + offset
        self.tensor = torch.frombuffer(self._map, dtype=data.dtype, count=data.numel(), offset=offset) if size else data
        self.tensor = self.tensor.view(data.shape)
        self.tensor.copy_(data)


def _cached_library(name: str, arguments: list[str], inputs: list[Path]) -> Path:
    """build/cuda_emulator/<name>-<content>.so, made by g++ when it is not there."""
    digest = hashlib.sha256(" ".join(arguments).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    library = ROOT / "build" / "cuda_emulator" / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["nice", "g++", "-shared", "-o", str(partial), *arguments], check=True)
        partial.replace(library)
    return library


def kernels() -> Path:
    """The kernels of csrc/cuda over the emulator, as a library of launchers."""
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "entry.cpp"]
    headers = [*sorted((ROOT / "csrc/cuda").glob("*.*h")), *sorted((ROOT / "csrc/launchers").glob("*.h"))]
    headers += [ROOT / "csrc/launchers.h", *sorted(HERE.glob("*.h"))]
    arguments = [*FLAGS, f"-I{HERE}", f"-I{ROOT}", "-x", "c++", *map(str, sources)]
    return _cached_library("kernels", arguments, sources + headers)


def bindings() -> Path:
    """csrc/cuda/bind for CPU tensors, linked to kernels()."""
    torch_root = Path(torch.__file__).parent
    sources = sorted((ROOT / "csrc/cuda/bind").glob("*.cpp"))
    headers = [*(ROOT / "csrc").rglob("*.h"), HERE / "torch_on_cpu.h"]
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
    arguments = ["-std=c++20", "-O1", "-fPIC", "-w", *stable, f"-isystem{torch_root / 'include'}"]
    arguments += ["-include", str(HERE / "torch_on_cpu.h"), *map(str, sources), str(kernels())]
    arguments += [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
    return _cached_library("bindings", arguments, sources + headers)


def load() -> ctypes.CDLL:
    """The launchers of kernels() for ctypes."""
    loaded = ctypes.CDLL(str(kernels()))
    names = ("quantize_rowwise", "int8_matmul", "int8_matmul_tiled", "int8_grouped_matmul", "int8_row_sum")
    for name in (*names, "int8_block_scaled_matmul", "int8_weight_only_linear", "group_tiles"):
        getattr(loaded, f"emulated_{name}").restype = ctypes.c_char_p
    return loaded


def in_child(work: Callable[[], bytes | None]) -> None:
    """Runs `work` in a fork, so that a touched guard page or a failed emulator check fails one test, not the run."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            message = work()
            os.write(write, message or b"")
            code = 0
        except Exception:
            os.write(write, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the emulated kernel ended with wait status {status} (11: out of bounds, 6: {said or 'abort'})"
    assert not said, said


def run_under(work: Callable[[], bytes | None], library: ctypes.CDLL, *, deferred: bool, seed: int, sms: int) -> None:
    """Runs `work` under one schedule of threads and copies, as if the GPU had `sms` multiprocessors."""
    library.emulator_configure(int(deferred), seed, sms)
    in_child(work)
