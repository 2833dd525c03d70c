"""What the machine does at most, measured in the same run as the rows that are compared with it."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .case import Absent
from .stats import Samples
from .timer import CpuTimer, wait_ns

_BYTES = 256 << 20
_PIECES = 32
_CLEAN = 7  # tries that count
_TRIES = 40
_BUSY = 0.1  # share of a try that threads may have waited for a core


@dataclass
class Ceilings:
    """Rates per second: `int8`, `float32` and `bfloat16` in operations, `read` and `copy` in bytes.

    A missing one is in `absent` with the reason; bfloat16 is measured on a GPU only, float32 on a CPU only.

    A copy counts the bytes read and the bytes written. Each rate is the best median of the run's measurements.
    """

    rates: dict[str, float] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def update(self, kind: str, name: str, rate: float) -> None:
        if rate > self.rates.get(kind, 0.0):
            self.rates[kind], self.names[kind] = rate, name


class CpuCeilings:
    """Measures with one Python thread a core: the native loops run outside the interpreter lock."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.found = Ceilings()
        self._library = _native_library()
        if self._library is None:
            for kind in ("int8", "float32", "read"):
                self.found.absent[kind] = "pykernels/_C*.so is not built: run `python setup.py build_ext --inplace`"
        generator = torch.Generator().manual_seed(0)
        self._source = torch.randint(1, 127, (_BYTES,), dtype=torch.int8, generator=generator)
        self._target = torch.empty_like(self._source)

    def measure(self) -> None:
        time.sleep(0.05)  # the threads of the last parallel region spin for a while before they give up their cores
        piece = _BYTES // self.threads // _PIECES
        source, target = self._source.data_ptr(), self._target.data_ptr()

        def offset(index: int, turn: int) -> int:
            return (index * _PIECES + turn) * piece

        with ThreadPoolExecutor(self.threads) as pool:
            if self._library is not None:
                library = self._library
                for kind, loop, name in (
                    ("int8", library.pykernels_ceiling_int8, library.pykernels_ceiling_int8_name()),
                    ("float32", library.pykernels_ceiling_float32, library.pykernels_ceiling_float32_name()),
                ):
                    self._arithmetic(pool, kind, loop, name.decode())
                rate = self._rate(pool, lambda i, t: library.pykernels_ceiling_read(source + offset(i, t), piece))
                self.found.update("read", f"read, {self.threads} threads", rate * piece)
            rate = self._rate(pool, lambda i, t: ctypes.memmove(target + offset(i, t), source + offset(i, t), piece))
            self.found.update("copy", f"memmove, {self.threads} threads", 2 * rate * piece)
        samples = Samples()
        CpuTimer().sample(lambda _index: self._target.copy_(self._source), 0, 9, samples)
        self.found.update("copy", "torch copy_", 2 * _BYTES / statistics.median(samples.used))

    def _arithmetic(self, pool: ThreadPoolExecutor, kind: str, loop: Callable[[int], int], name: str) -> None:
        begin = time.perf_counter()
        operations = loop(1000)
        iterations = max(1000, int(1000 * 1e-3 / (time.perf_counter() - begin)))
        rate = self._rate(pool, lambda _i, _t: loop(iterations))
        self.found.update(kind, f"{name}, {self.threads} threads", rate * operations * iterations / 1000)

    def _rate(self, pool: ThreadPoolExecutor, work: Callable[[int, int], object]) -> float:
        """Pieces of work a second by all threads: the median over tries that no other process disturbed.

        Each thread works through _PIECES pieces. Its rate is that of its median piece among those that lie in the time
        in which every thread was at work: threads start apart, and a piece can lose its core.
        """
        found: list[tuple[float, float]] = []
        for _ in range(_TRIES):
            waited = wait_ns()
            spans = self._pieces(pool, work)
            first, last = max(thread[0][0] for thread in spans), min(thread[-1][1] for thread in spans)
            shared = [[end - begin for begin, end in thread if begin >= first and end <= last] for thread in spans]
            if min(map(len, shared)) < _PIECES // 4:
                time.sleep(0.05)
                continue
            wait = (wait_ns() - waited) * 1e-9 / (last - first)
            found.append((wait, sum(1 / statistics.median(thread) for thread in shared)))
            if sum(wait < _BUSY for wait, _ in found) == _CLEAN:
                break
            if wait > _BUSY:
                time.sleep(0.05)
        if not found:
            return 0.0
        return statistics.median(rate for _, rate in sorted(found)[:_CLEAN])

    def _pieces(self, pool: ThreadPoolExecutor, work: Callable[[int, int], object]) -> list[list[tuple[float, float]]]:
        def thread(index: int) -> list[tuple[float, float]]:
            barrier.wait()
            spans = []
            for turn in range(_PIECES):
                begin = time.perf_counter()
                work(index, turn)
                spans.append((begin, time.perf_counter()))
            return spans

        barrier = threading.Barrier(self.threads)
        return list(pool.map(thread, range(self.threads)))


class CudaCeilings:
    """The fastest plain matrix product (int8 or bf16) and a device-to-device copy."""

    def __init__(self, device: torch.device) -> None:
        self.found = Ceilings()
        self._device = device

    def measure(self) -> None:
        size = 8192
        a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=self._device)
        b = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=self._device)
        x, y = (torch.randn(size, size, dtype=torch.bfloat16, device=self._device) for _ in range(2))
        products: list[tuple[str, Callable[[], object]]] = [
            ("torch._int_mm 8192", lambda: torch._int_mm(a, b.t())),
            ("bfloat16 matmul 8192", lambda: x @ y.t()),
        ]
        for name, product in products:
            rate = 2 * size**3 / self._median(product)
            self.found.update("int8", name, rate)
            if name.startswith("bfloat16"):
                self.found.update("bfloat16", name, rate)
        source = torch.randint(1, 127, (2 << 30,), dtype=torch.int8, device=self._device)
        target = torch.empty_like(source)
        rate = 2 * source.numel() / self._median(lambda: target.copy_(source))
        self.found.update("copy", "device copy", rate)
        self.found.update("read", "device copy", rate)

    @staticmethod
    def _median(call: Callable[[], object], count: int = 10) -> float:
        for _ in range(3):
            call()
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e-3


class UpdateLoop:
    """A plain C loop that reads some byte arrays and reads and writes others, all of them once, on all threads.

    What an optimizer's step is held against: the same bytes, and nothing computed. Arrays of one length share a
    lengthwise cut, so that every thread has its part of each.
    """

    def __init__(self, updated: list[int], read: list[int], threads: int) -> None:
        library = _native_library()
        if library is None:
            raise Absent("pykernels/_C*.so is not built: run `python setup.py build_ext --inplace`")
        self._library = library
        self._arrays = [torch.ones(size, dtype=torch.uint8) for size in (*updated, *read)]
        self._pool = ThreadPoolExecutor(threads)
        self._parts = [(*self._part(0, len(updated), t, threads), *self._part(len(updated), None, t, threads))
                       for t in range(threads)]  # fmt: skip

    def _part(self, first: int, last: int | None, thread: int, threads: int) -> tuple[Any, Any, int]:
        arrays = self._arrays[first:last]
        size = [array.numel() // threads // 64 * 64 for array in arrays]
        starts = [array.data_ptr() + thread * n for array, n in zip(arrays, size, strict=True)]
        count = len(arrays)
        return (ctypes.c_void_p * count)(*starts), (ctypes.c_int64 * count)(*size), count

    def __call__(self) -> None:
        list(self._pool.map(lambda part: self._library.pykernels_ceiling_update(*part), self._parts))


def _native_library() -> ctypes.CDLL | None:
    found = sorted(Path(__file__).resolve().parent.parent.glob("_C*.so"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    for loop in (library.pykernels_ceiling_int8, library.pykernels_ceiling_float32):
        loop.restype, loop.argtypes = ctypes.c_int64, [ctypes.c_int64]
    for name in (library.pykernels_ceiling_int8_name, library.pykernels_ceiling_float32_name):
        name.restype = ctypes.c_char_p
    library.pykernels_ceiling_read.restype = ctypes.c_uint64
    library.pykernels_ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.pykernels_ceiling_update.restype = ctypes.c_uint64
    library.pykernels_ceiling_update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64] * 2
    return library
