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

import torch

from .stats import Samples
from .timer import CpuTimer, wait_ns

_BYTES = 256 << 20
_SAMPLES = 15


@dataclass
class Ceilings:
    """Rates per second: `int8` in operations, `read` and `copy` in bytes. A missing one is in `absent` with the reason.

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
            for kind in ("int8", "read"):
                self.found.absent[kind] = "pykernels/_C*.so is not built: run `python setup.py build_ext --inplace`"
        generator = torch.Generator().manual_seed(0)
        self._source = torch.randint(1, 127, (_BYTES,), dtype=torch.int8, generator=generator)
        self._target = torch.empty_like(self._source)

    def measure(self) -> None:
        time.sleep(0.05)  # the threads of the last parallel region spin for a while before they give up their cores
        part = _BYTES // self.threads
        source, target = self._source.data_ptr(), self._target.data_ptr()
        with ThreadPoolExecutor(self.threads) as pool:
            if self._library is not None:
                library, name = self._library, self._library.pykernels_ceiling_int8_name().decode()
                iterations = max(1000, int(1000 * 5e-3 / self._seconds(pool, library.pykernels_ceiling_int8, 1000)))
                operations = library.pykernels_ceiling_int8(iterations) * self.threads
                seconds = self._median(pool, lambda _i: library.pykernels_ceiling_int8(iterations))
                self.found.update("int8", f"{name}, {self.threads} threads", operations / seconds)
                seconds = self._median(pool, lambda i: library.pykernels_ceiling_read(source + i * part, part))
                self.found.update("read", f"read, {self.threads} threads", part * self.threads / seconds)
            seconds = self._median(pool, lambda i: ctypes.memmove(target + i * part, source + i * part, part))
            self.found.update("copy", f"memmove, {self.threads} threads", 2 * part * self.threads / seconds)
        samples = Samples()
        CpuTimer().sample(lambda _index: self._target.copy_(self._source), 0, _SAMPLES, samples)
        self.found.update("copy", "torch copy_", 2 * _BYTES / statistics.median(samples.used))

    def _median(self, pool: ThreadPoolExecutor, work: Callable[[int], object]) -> float:
        samples = Samples()
        for _ in range(_SAMPLES):
            waited = wait_ns()
            elapsed = self._seconds(pool, work)
            samples.add(elapsed, (wait_ns() - waited) * 1e-9 / elapsed)
        return statistics.median(samples.used)

    def _seconds(self, pool: ThreadPoolExecutor, work: Callable[[int], object], argument: int | None = None) -> float:
        """From the first thread's start to the last one's end; `argument` replaces the thread's index."""

        def timed(index: int) -> tuple[float, float]:
            barrier.wait()
            begin = time.perf_counter()
            work(index if argument is None else argument)
            return begin, time.perf_counter()

        barrier = threading.Barrier(self.threads)
        spans = list(pool.map(timed, range(self.threads)))
        return max(end for _, end in spans) - min(begin for begin, _ in spans)


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
            self.found.update("int8", name, 2 * size**3 / self._median(product))
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


def _native_library() -> ctypes.CDLL | None:
    found = sorted(Path(__file__).resolve().parent.parent.glob("_C*.so"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.pykernels_ceiling_int8.restype = ctypes.c_int64
    library.pykernels_ceiling_int8.argtypes = [ctypes.c_int64]
    library.pykernels_ceiling_int8_name.restype = ctypes.c_char_p
    library.pykernels_ceiling_read.restype = ctypes.c_uint64
    library.pykernels_ceiling_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library
