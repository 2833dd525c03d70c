"""Where each tile of int8_grouped_matmul lies, counted in Triton's interpreter with the device function itself."""

from __future__ import annotations

import random

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pykernels.kernels import _tuning  # noqa: E402
from pykernels.kernels import int8_grouped_matmul as module  # noqa: E402
from pykernels.ops.int8_grouped_matmul import reference  # noqa: E402

pytestmark = pytest.mark.skipif(not _tuning.interpreted(), reason="with a GPU the launchers take CUDA tensors")


@triton.jit
def _count_rows(counts_ptr, written_ptr, expert_ptr, T, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    expert, first, end = module.group_tile(counts_ptr, tl.program_id(0), T, E, BLOCK_M, BLOCK_E)
    rows = first + tl.arange(0, BLOCK_M)
    tl.atomic_add(written_ptr + rows, 1, mask=rows < end)
    tl.store(expert_ptr + rows, expert, mask=rows < end)


def count(counts: torch.Tensor, rows: int, block: int) -> tuple[list[int], list[int], int]:
    """How often each row is written, by which expert, and the number of row tiles launched."""
    experts = counts.numel()
    written = torch.zeros(rows + 64, dtype=torch.int32)  # room for what must not be written
    expert = torch.full((rows + 64,), -1, dtype=torch.int32)
    tiles = module.most_row_tiles(rows, experts, block)
    _count_rows[(tiles,)](
        counts, written, expert, rows, experts, BLOCK_M=block, BLOCK_E=triton.next_power_of_2(experts + 1)
    )
    assert not written[rows:].any()
    return written[:rows].tolist(), expert[:rows].tolist(), tiles


@pytest.mark.parametrize("seed", range(8))
def test_each_row_is_written_once_by_its_expert(seed: int) -> None:
    g = random.Random(seed)
    block = g.choice([16, 32])
    # Routers leave experts without rows and crowd others; multiples of a tile, and one more or less, are its edges.
    sizes = [0, 0, 1, 2, block - 1, block, block + 1, 2 * block, 3 * block - 1]
    counts = [g.choice(sizes) for _ in range(g.choice([1, 3, 8, 15]))]
    rows = sum(counts) + g.choice([0, 0, 1, 3 * block])
    written, expert, _ = count(torch.tensor(counts, dtype=torch.int64), rows, block)
    want = [e for e, size in enumerate(counts) for _ in range(size)]
    assert written == [1] * rows
    assert expert == want + [len(counts)] * (rows - len(want))


@pytest.mark.parametrize("counts", [[17] * 5, [1] * 5, [0] * 5, [33, 0, 0, 0, 16], [1, 1, 1, 1, 93]])
def test_the_grid_has_no_tile_too_few(counts: list[int]) -> None:
    """The worst case of the bound: every group, and the uncounted rows, end in a tile with a single row."""
    for beyond in (0, 17):
        rows = sum(counts) + beyond
        if rows:
            assert count(torch.tensor(counts), rows, 16)[0] == [1] * rows
    assert module.most_row_tiles(17 * 6, 5, 16) == 12


@pytest.mark.parametrize("counts", [[-5, 3, 9], [4, 100, 7], [2**62, 2**62, 2**62], [-(2**63), 2**63 - 1, 5]])
def test_counts_that_cannot_be_stay_inside(counts: list[int]) -> None:
    """Nobody waits to refuse them on a GPU. A negative count is 0, and groups end with the rows."""
    written, expert, _ = count(torch.tensor(counts), 20, 16)
    clipped = [min(max(c, 0), 20) for c in counts]
    want = [e for e, size in enumerate(clipped) for _ in range(size)][:20]
    assert written == [1] * 20 and expert == want + [3] * (20 - len(want))


@pytest.mark.parametrize("config", [c for configs in module.CONFIGS.values() for c in configs] + [module.UNALIGNED])
def test_every_configuration(config: dict[str, int]) -> None:
    m, n, k = config["BLOCK_M"], config["BLOCK_N"] + 1, config["BLOCK_K"] + 16
    counts = torch.tensor([0, m + 1, 3])
    a = torch.randint(-128, 128, (m + 6, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (3, n, k), dtype=torch.int8)
    with _tuning.force_config(config):
        got = module.int8_grouped_matmul(a, b, counts, out_dtype=torch.int32)
    assert torch.equal(got, reference(a, b, counts, out_dtype=torch.int32))
