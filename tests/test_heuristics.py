"""The choice among the Hopper kernels: legal everywhere, never far from the least idle, by formulas written here."""

from __future__ import annotations

import itertools
import math

import pytest

from pykernels.ops import heuristics
from pykernels.ops.heuristics import Schedule, choose, schedules, spread
from tests.test_hopper_gpu import SHAPES

pytest.importorskip("pykernels._host", reason="the optional host module is not built")

# Every power of two and its neighbours, rows in between, and the layers of Llama-3 8B and 70B (N, K).
ROWS = sorted({*(m + d for m in (16, 32, 64, 128, 256, 512, 1024, 4096, 8192) for d in (-1, 0, 1)), 1, 100, 333, 3000})
LAYERS = [(6144, 4096), (4096, 4096), (28672, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (128256, 4096)]
LAYERS += [(10240, 8192), (8192, 8192), (57344, 8192), (28672, 8192), (8192, 28672), (1024, 8192)]
SIZES = [(n, k) for n in (8, 64, 136, 1000, 2048, 16384) for k in (16, 128, 144, 1024, 131056)]
GPUS = [132, 114, 78, 16, 2, 1]  # H100 SXM and H200, H100 PCIe, GH200's slices, and what is left of one
SHARED_LIMIT = 227 * 1024


def grid():
    return itertools.product(ROWS, [*LAYERS, *SIZES], GPUS, (2, 4))


def least_shared(s: Schedule, out_bytes: int) -> int:
    """Three stages of both operands, two output subtiles of 32 columns, the terms of rows and columns."""
    m, n, k = s.tile
    return 3 * (m + n) * k + 2 * m * 32 * out_bytes + 12 * n + 8 * m


def may_serve(s: Schedule, M: int, N: int, K: int, sms: int, out_bytes: int) -> bool:
    cluster = math.prod(s.cluster)
    if s.stream_k and 16 * s.tile[2] > K:
        return False  # CUTLASS cuts no less than 8 steps off a tile
    return K % 16 == 0 and N * out_bytes % 16 == 0 and cluster <= sms and cluster <= 8


def efficiency(s: Schedule, M: int, N: int, K: int, sms: int) -> float:
    """Tiles that hold results over what the SMs could have done in the time of the one that works longest."""
    (m, n, k), (down, across) = s.tile, s.cluster
    units = sms // (down * across) * (down * across)
    rows, columns, steps = -(-M // m), -(-N // n), -(-K // k)
    grid = -(-rows // down) * down * -(-columns // across) * across
    if not s.stream_k or grid % units == 0:
        return rows * columns / (math.ceil(grid / units) * units)
    parts = min(units, grid * steps // 8 // (down * across) * (down * across))
    return rows * columns * steps / ((math.ceil(grid * steps / parts) + 7) * units)


def test_the_set() -> None:
    names = [s.name for s in schedules()]
    assert len(set(names)) == len(names) and {"small_m", "mma_sync"} < set(names)
    for s in schedules():
        if any(s.tile):
            assert s.tile[0] % 64 == 0 and s.tile[1] % 8 == 0 and s.tile[1] <= 256, "what WGMMA multiplies"
            assert s.tile[2] % 128 == 0, "what a swizzled TMA box holds"
            assert s.pingpong or s.tile[0] >= 128, "a cooperative kernel has 64 rows for each of two warpgroups"
            assert not (s.pingpong and s.stream_k)
            for out_bytes in (2, 4):
                assert least_shared(s, out_bytes) <= SHARED_LIMIT


def test_every_choice_is_legal_and_no_choice_is_idle() -> None:
    """Wave quantisation within 10 % of the best of the set, over the whole grid."""
    hopper = [s for s in schedules() if any(s.tile)]
    for M, (N, K), sms, out_bytes in grid():
        chosen = choose(M, N, K, sms, out_bytes)
        where = f"{M}x{N}x{K} on {sms} SMs, {out_bytes} bytes: {chosen.name}"
        legal = [s for s in hopper if may_serve(s, M, N, K, sms, out_bytes)]
        if M <= 16:
            assert chosen.name == "small_m", where
        elif not legal:
            assert chosen.name == "mma_sync", where
        else:
            assert chosen in legal, where
            best = max(efficiency(s, M, N, K, sms) for s in legal)
            assert efficiency(chosen, M, N, K, sms) >= 0.9 * best - 0.002, where  # thousandths, rounded down


def test_the_model_agrees_with_the_formulas_here() -> None:
    for M, (N, K), sms, out_bytes in itertools.islice(grid(), 0, None, 37):
        for s in schedules():
            found = spread(s, M, N, K, sms, out_bytes)
            expected = any(s.tile) and may_serve(s, M, N, K, sms, out_bytes)
            assert (found is not None) == expected, (s.name, M, N, K, sms)
            if found is not None:
                assert found.efficiency == pytest.approx(efficiency(s, M, N, K, sms), rel=1e-12)
                assert found.cycles > 0


def test_every_member_is_chosen_for_what_it_is_for() -> None:
    """A kernel that no layer of a Llama gets is compile time for nothing."""
    for M, N, K, name in [
        (1, 4096, 4096, "small_m"),
        (16, 28672, 8192, "small_m"),
        (64, 4096, 4096, "tile_64x64"),
        (256, 4096, 4096, "tile_64x128"),  # the example: tiles of 128 rows would leave half of the SMs idle
        (512, 4096, 4096, "tile_128x128"),
        (8192, 8192, 8192, "tile_128x256"),
        (512, 14336, 4096, "stream_128x128"),
        (64, 1000, 1001, "mma_sync"),
    ]:
        assert choose(M, N, K, 132).name == name
    seen = {choose(M, N, K, 132).name for M in (1, 8, 16, 64, 128, 256, 1024, 4096, 8192) for N, K in LAYERS}
    assert seen == {s.name for s in schedules()} - {"mma_sync"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 8, 16, 132), "expected M to be at least 0, got -1"),
        ((8, 8, 16, 0), "expected sm_count to be at least 1, got 0"),
        ((8, 8, 16, 132, 1), "expected out_bytes to be 2 or 4, got 1"),
    ],
)
def test_refusals(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*arguments)


def test_empty_products_are_someone_s() -> None:
    assert choose(0, 0, 0, 132).name == "small_m"
    assert choose(64, 64, 0, 132).name == "mma_sync"
    assert heuristics.spread(schedules()[2], 64, 64, 0, 132) is None


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
def test_the_gpu_tests_reach_every_branch(name: str, shape: tuple[int, int, int]) -> None:
    assert choose(*shape, 132, 4).name == name
    assert {each for each, _ in SHAPES} == {s.name for s in schedules()}
