"""What a product's kernel multiplies at a time and the shared memory it asks for at launch, read from its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pykernels.ops import heuristics


@dataclass(frozen=True)
class Tile:
    """m rows by n columns in steps of k; bytes of an element of either operand; times each is loaded (multicast)."""

    m: int
    n: int
    k: int
    a_bytes: int = 1
    b_bytes: int = 1
    a_share: int = 1
    b_share: int = 1
    kind: str = "int8"  # of the tensor cores: "int8", "half" or "tf32"; "single" is without them
    parts: int = 1  # products that one is made of

    @property
    def operations(self) -> int:
        """Of one step."""
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """That one step brings from beyond the SM."""
        return self.m * self.k * self.a_bytes // self.a_share + self.n * self.k * self.b_bytes // self.b_share


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def cuda(source: str, symbol: str, name: str) -> tuple[Tile | None, int, str]:
    """(tile or None, dynamic shared memory in bytes, a short name) of a kernel of csrc/cuda/<source>.cu."""
    if source.startswith("hopper/"):
        return _hopper(source.removeprefix("hopper/int8_matmul_"), symbol)
    short = re.sub(r"^void |\(.*\)$", "", name)
    shape = re.search(r"Shape<([\d, ]+)>", name)
    if shape:
        m, n, _, _, a_bytes, b_bytes, stages = _numbers(shape[1])
        shared = max(stages * (m * a_bytes + n * b_bytes), m * (n + 8) * 4)
        half = "weight_only" in name
        k = b_bytes  # int8 of b in a stage; two bytes each of a where a is half
        return Tile(m, n, k, a_bytes // k, 1, kind="half" if half else "int8"), shared, short
    small = re.search(r"int8_matmul_small_m_kernel<(\d+)", name)
    if small:
        return Tile(16, 8 * int(small[1]), 256), 0, short
    if short.startswith("weight_only_mma"):  # four warps, 64 of K each
        return Tile(16, 8, 256, 2, kind="half"), 0, short
    return None, 0, short


def _hopper(member: str, symbol: str) -> tuple[Tile, int, str]:
    """The set says what the member multiplies, CUTLASS's types how many stages it found room for."""
    schedule = next(s for s in heuristics.schedules() if s.name == member)
    (m, n, k), (down, across) = schedule.tile, schedule.cluster
    stages = re.search(r"MainloopSm90TmaGmmaWarpSpecializedILi(\d+)E", symbol)
    epilogue = re.search(r"22Sm90TmaWarpSpecializedILi(\d+)E", symbol)
    width = re.search(r"FinishSumsI\w+?_Li(\d)E", symbol)
    assert stages and epilogue and width, symbol
    subtile = (64 if schedule.pingpong else 128) * 32 * int(width[1])
    terms = 12 * n + 8 * m  # of columns and rows, in epilogue.cuh
    shared = int(stages[1]) * (m + n) * k + int(epilogue[1]) * subtile + terms
    tile = Tile(m, n, k, a_share=across, b_share=down)
    return tile, shared, f"{member}, {8 * int(width[1])}-bit results, {stages[1]} stages"


def triton(kernel: str, constants: dict[str, object], tensors: dict[str, list[int]]) -> Tile | None:
    """The tile of a Triton product, by the constants it was compiled with and {tensor: [elements, bytes of one]}."""
    if kernel == "_int8_block_scaled":
        constants = {**constants, "BLOCK_K": constants["SCALED"]}
    sizes = [constants.get(f"BLOCK_{axis}") for axis in "MNK"]
    if not all(isinstance(size, int) for size in sizes):
        return None
    m, n, k = sizes
    if kernel in ("_int8_matmul", "_int8_matmul_persistent", "_int8_grouped_matmul", "_int8_block_scaled"):
        return Tile(m, n, k)
    if kernel == "_weight_only":
        size = tensors["x_ptr"][1]  # a float32 is the sum of three bfloat16
        return Tile(m, n, k, size, kind="half", parts=3 if size == 4 else 1)
    if kernel == "_grouped_grad_input":  # [T, N] by [N, K]: N is summed over
        return Tile(m, k, n, tensors["grad_ptr"][1], kind="half", parts=int(str(constants["PARTS"])))
    if kernel == "_linear_statistics":
        size = tensors["x_ptr"][1]
        kind = "half" if size == 2 else "tf32" if constants["TF32"] else "single"
        return Tile(m, n, k, size, tensors["w_ptr"][1], kind=kind)
    return None
