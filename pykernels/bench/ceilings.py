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

from .stats import CLEAN_SHARE, Samples
from .timer import wait_ns

_BYTES = 128 << 20
_CLEAN = 9  # samples of a few milliseconds each
_TRIES = 60
_APART = 0.1  # share of a sample in which the threads may start and end apart


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
                seconds, _ = self._sample(pool, lambda _i: library.pykernels_ceiling_int8(1000), 1)
                iterations = max(1000, int(1000 * 3e-3 / seconds))
                operations = library.pykernels_ceiling_int8(iterations) * self.threads
                seconds = self._median(pool, lambda _i: library.pykernels_ceiling_int8(iterations))
                self.found.update("int8", f"{name}, {self.threads} threads", operations / seconds)
                seconds = self._median(pool, lambda i: library.pykernels_ceiling_read(source + i * part, part))
                self.found.update("read", f"read, {self.threads} threads", part * self.threads / seconds)
            seconds = self._median(pool, lambda i: ctypes.memmove(target + i * part, source + i * part, part))
            self.found.update("copy", f"memmove, {self.threads} threads", 2 * part * self.threads / seconds)
            seconds = self._median(pool, lambda _i: self._target.copy_(self._source), threads=1)
            self.found.update("copy", "torch copy_", 2 * _BYTES / seconds)

    def _median(self, pool: ThreadPoolExecutor, work: Callable[[int], object], threads: int = 0) -> float:
        """The median of _CLEAN clean samples, resting between samples while the machine is busy."""
        samples = Samples()
        for _ in range(_TRIES):
            waited = wait_ns()
            elapsed, apart = self._sample(pool, work, threads or self.threads)
            wait = (wait_ns() - waited) * 1e-9 / elapsed
            samples.add(elapsed, max(wait, apart - _APART))
            if samples.clean == _CLEAN:
                break
            if samples.waits[-1] > CLEAN_SHARE:
                time.sleep(0.1)
        return statistics.median(samples.used)

    @staticmethod
    def _sample(pool: ThreadPoolExecutor, work: Callable[[int], object], threads: int) -> tuple[float, float]:
        """Seconds from the first thread's start to the last one's end, and the share of it that not all of them ran."""

        def timed(index: int) -> tuple[float, float]:
            barrier.wait()
            begin = time.perf_counter()
            work(index)
            return begin, time.perf_counter()

        barrier = threading.Barrier(threads)
        begins, ends = zip(*pool.map(timed, range(threads)), strict=True)
        span = max(ends) - min(begins)
        return span, 1 - (min(ends) - max(begins)) / span


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
