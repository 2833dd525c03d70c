"""What the architectures allow a block, and what published figures allow a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (CUDA C++ Programming Guide, technical specifications by compute capability)."""

    shared: int  # bytes a multiprocessor has
    shared_block: int  # and a block may have
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


LIMITS = {
    "sm_80": Limits(164 * 1024, 163 * 1024),
    "sm_90": Limits(228 * 1024, 227 * 1024),
    "sm_90a": Limits(228 * 1024, 227 * 1024),
    "sm_100": Limits(228 * 1024, 227 * 1024),
}
_RESERVED = 1024  # bytes of shared memory that the system takes from each block


def blocks_per_multiprocessor(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks that reside together. Registers are given to warps, 256 at a time; shared memory 128 bytes at a time."""
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = limits.shared // (-(-(shared + _RESERVED) // 128) * 128)
    return min(limits.blocks, limits.threads // (32 * warps), by_registers, by_shared)


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps over those a multiprocessor has room for."""
    warps = -(-threads // 32)
    return blocks_per_multiprocessor(arch, threads, registers, shared) * warps / (LIMITS[arch].threads // 32)


@dataclass(frozen=True)
class Device:
    """Published rates: of the tensor cores, dense, and of float32 in operations a second, a fused multiply-add being
    two; of memory in bytes a second. lanes: float32 instructions a cycle of a multiprocessor, for 16 of the special
    functions (CUDA C++ Programming Guide, throughput of native arithmetic instructions)."""

    name: str
    int8: float
    half: float
    single: float
    lanes: int
    bandwidth: float
    source: str

    def product_rate(self, kind: str) -> float:
        """Operations a second of a product. TF32 takes half of the rate of 16 bits."""
        return {"int8": self.int8, "half": self.half, "tf32": self.half / 2, "single": self.single}[kind]


A100 = Device("A100 80GB SXM", 624e12, 312e12, 19.5e12, 64, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet, 2021")
H100 = Device(
    "H100 SXM",
    1979e12,
    989.5e12,
    67e12,
    128,
    3.35e12,
    "NVIDIA H100 Tensor Core GPU data sheet, 2023, without sparsity",
)
H200 = Device(
    "H200 SXM",
    1979e12,
    989.5e12,
    67e12,
    128,
    4.8e12,
    "NVIDIA H200 Tensor Core GPU data sheet, 2024, without sparsity",
)
B200 = Device(
    "B200",
    4500e12,
    2250e12,
    75e12,
    128,
    8.0e12,
    "NVIDIA DGX B200 data sheet, 2024, and HGX B200's for float32, an eighth, without sparsity",
)
BY_ARCH = {"sm_80": (A100,), "sm_90": (H100, H200), "sm_90a": (H100, H200), "sm_100": (B200,)}


def ceiling(device: Device, kind: str, operations: float, loaded: float) -> float:
    """Operations a second of a tile whose operands all come from memory: the roofline without any reuse in L2."""
    return min(device.product_rate(kind), operations / loaded * device.bandwidth)


def element_ceiling(device: Device, tile: dict[str, float]) -> tuple[float, str]:
    """Elements a second of a tile {elements, bytes, operations, special}, and what it is that allows no more."""
    slots = device.single / 2
    seconds = {
        "memory": tile["bytes"] / device.bandwidth,
        "float32": tile["operations"] / slots,
        "special": tile["special"] / (slots * 16 / device.lanes),
    }
    limit = max(seconds, key=lambda name: seconds[name])
    return tile["elements"] / seconds[limit], limit
