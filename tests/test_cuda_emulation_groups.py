"""The CUDA products of experts and of scaled blocks, run thread by thread on the CPU against plain torch, and the order
in which they and int8_matmul visit their tiles."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from tests.cuda_emulator import harness as emu
from tests.test_cuda_emulation import FLOATS, SCHEDULES, activation_reference, int8

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the CUDA emulator is built with g++")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emu.load()


def grouped(library, counts, beyond: int, n: int, k: int, epilogue: dict, out_dtype, schedule, sms: int, pad: int = 0):
    """int8_grouped_matmul over guarded memory; returns its operands, the epilogue's tensors and what it wrote."""
    g = torch.Generator().manual_seed(n + k)
    rows, experts = max(0, sum(c for c in counts.tolist() if c > 0)) + beyond, counts.numel()
    a, b = int8(g, rows, k), int8(g, experts, n, k)
    ga, gb, gc = (emu.Guarded(t) for t in (*(torch.nn.functional.pad(t, (0, pad), value=77) for t in (a, b)), counts))
    poison = -(2**31) if out_dtype == torch.int32 else float("nan")
    gout = emu.Guarded(torch.full((rows, n), poison, dtype=out_dtype))
    held = {name: emu.Guarded(value) for name, value in epilogue.items()}
    e = emu.Epilogue(out=gout.address, out_stride=n, out_dtype=emu.DTYPES[out_dtype], activation=4 if epilogue else 0)
    for name, guarded in held.items():
        setattr(e, name, guarded.address)
        if name != "bias":
            setattr(e, f"{name}_stride", int(guarded.tensor.numel() > 1))
    e.bias_dtype = emu.DTYPES[epilogue["bias"].dtype] if epilogue else 0
    wide = counts.dtype == torch.int64
    p = emu.Int8GroupedMatmul(
        ga.address, k + pad, gb.address, n * (k + pad), k + pad, gc.address, wide, experts, rows, n, k, e, 0
    )
    work = lambda: library.emulated_int8_grouped_matmul(ctypes.byref(p))  # noqa: E731
    emu.run_under(work, library, deferred=schedule[0], seed=schedule[1], sms=sms)
    return a, b, gout.tensor


# Tiles of 32, 64 and 128 rows (by the average group, and sms): an edge on, before and after a tile; a warp's 32 experts
# and more; an expert beyond the first 32 that has rows after many that have none; nothing counted at all.
GROUPS = [
    ([5, 0, 32, 33, 1], 7, 9, 80, 132),
    ([0] * 33 + [3, 0, 40], 2, 17, 48, 132),
    ([1] * 32, 1, 5, 16, 132),
    ([0, 0], 3, 4, 16, 132),
    ([65, 64, 0, 150], 0, 66, 208, 132),
    ([129, 128, 300, 0], 5, 130, 64, 1),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("pad", [0, 16, 3], ids=["contiguous", "strided", "unaligned"])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_int8_grouped_matmul_is_exact(library: ctypes.CDLL, group: tuple, pad: int, schedule) -> None:
    counts, beyond, n, k, sms = group
    dtype = torch.int64 if schedule[0] else torch.int32
    a, b, got = grouped(library, torch.tensor(counts, dtype=dtype), beyond, n, k, {}, torch.int32, schedule, sms, pad)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    want = torch.zeros_like(got)
    for e in set(expert.tolist()):
        rows = torch.nonzero(expert == e)[:, 0]
        want[rows] = (a[rows].double() @ b[e].double().T).to(torch.int32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_int8_grouped_matmul_epilogue(library: ctypes.CDLL, out_dtype: torch.dtype) -> None:
    counts, n = torch.tensor([3, 0, 6, 2]), 21
    g = torch.Generator().manual_seed(1)
    e = {
        "a_scale": torch.rand(13, generator=g) * 0.02,
        "b_scale": torch.rand(4, n, generator=g) * 0.01,
        "bias": torch.randn(4, n, generator=g).to(out_dtype),
    }
    a, b, got = grouped(library, counts, 2, n, 48, e, out_dtype, (True, 7), 132)
    expert = torch.arange(4).repeat_interleave(counts)
    acc = torch.einsum("tk,tnk->tn", a[:11].double(), b[expert].double())
    scaled = acc * e["a_scale"][:11, None].double() * e["b_scale"][expert].double()
    v = scaled + e["bias"][expert].double()
    want = activation_reference(v, 4)
    bound = torch.finfo(out_dtype).eps / 2 * want.abs() + 8 * 2.0**-24 * (v.abs() + e["bias"][expert].double().abs())
    assert bool(((got[:11].double() - want).abs() <= bound).all()) and not got[11:].any()


def test_int8_grouped_matmul_counts_that_cannot_be(library: ctypes.CDLL) -> None:
    """Nothing outside is touched: a negative count is 0, and groups end with the rows."""
    for counts, clipped in (
        ([-(2**63), 4, 2**63 - 1, 5], [0, 4, 6, 0]),
        ([2**62, 2**62, 1, 1], [10, 0, 0, 0]),
        ([3, -1, 5, 9], [3, 0, 5, 2]),
    ):
        given = torch.tensor(counts)
        beyond = 10 - sum(c for c in counts if c > 0)
        a, b, got = grouped(library, given, beyond, 6, 32, {}, torch.int32, (True, 3), 132)
        expert = torch.arange(4).repeat_interleave(torch.tensor(clipped))
        assert torch.equal(got, torch.einsum("tk,tnk->tn", a.int(), b[expert].int()).int())


def test_every_output_tile_has_one_block(library: ctypes.CDLL) -> None:
    """The order of tiles in bands of eight rows: all of them once, whole bands and ragged ones, tall and wide."""
    for tiles_m, tiles_n in [(1, 1), (1, 9), (7, 3), (8, 5), (9, 1), (16, 16), (23, 11), (64, 3)]:
        seen = torch.zeros(tiles_m, tiles_n, dtype=torch.int32)
        pointer = ctypes.c_void_p(seen.data_ptr())
        library.emulated_tile_order(ctypes.c_int64(tiles_m), ctypes.c_int64(tiles_n), pointer)
        assert bool((seen == 1).all()), (tiles_m, tiles_n, seen)


@pytest.mark.parametrize("tile_rows", [32, 64, 128])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_every_row_of_a_group_has_one_tile(library: ctypes.CDLL, group: tuple, tile_rows: int) -> None:
    """In each of three columns of tiles: every row once, with its expert; those that none counts as expert E."""
    counts, beyond, columns = group[0], group[1], 3
    rows = sum(counts) + beyond
    given, seen = emu.Guarded(torch.tensor(counts)), emu.Guarded(torch.zeros(rows, dtype=torch.int32))
    expert = emu.Guarded(torch.full((rows,), -1, dtype=torch.int32))
    p = emu.Int8GroupedMatmul(counts=given.address, counts_are_wide=True, experts=len(counts), rows=rows, n=columns)
    args = ctypes.byref(p), ctypes.c_int(tile_rows), *(ctypes.c_void_p(t.address) for t in (seen, expert))
    emu.run_under(lambda: library.emulated_group_tiles(*args), library, deferred=False, seed=1, sms=4)
    want = [e for e, count in enumerate(counts) for _ in range(count)]
    assert seen.tensor.tolist() == [columns] * rows
    assert expert.tensor.tolist() == want + [len(counts)] * beyond


def block_scaled(library, m: int, n: int, k: int, bias, out_dtype, schedule, sms: int, misalign: int = 0, pad: int = 0):
    """Codes of every value, the extremes among them, and scales over several binades; what was wanted and written."""
    g = torch.Generator().manual_seed(m * n + k)
    a, b, blocks = int8(g, m, k), int8(g, n, k), -(-k // 128)
    a[0, : min(k, 128)] = b[0, : min(k, 128)] = -128  # the largest sum of a block
    a_scale = torch.exp2(torch.randn(m, blocks, generator=g) * 2)
    b_scale = torch.exp2(torch.randn(-(-n // 128), blocks, generator=g) * 2) * 2.0**-16
    ga, gb = (emu.Guarded(torch.nn.functional.pad(t, (0, pad), value=77), misalign) for t in (a, b))
    held = [emu.Guarded(a_scale), emu.Guarded(b_scale)]
    gout = emu.Guarded(torch.full((m, n), float("nan"), dtype=out_dtype))
    e = emu.Epilogue(out=gout.address, out_stride=n, out_dtype=emu.DTYPES[out_dtype])
    if bias is not None:
        held.append(emu.Guarded(bias))
        e.bias, e.bias_dtype = held[-1].address, emu.DTYPES[bias.dtype]
    scales = held[0].address, held[1].address
    p = emu.Int8BlockScaled(ga.address, k + pad, scales[0], gb.address, k + pad, scales[1], blocks, m, n, k, e)
    work = lambda: library.emulated_int8_block_scaled_matmul(ctypes.byref(p))  # noqa: E731
    emu.run_under(work, library, deferred=schedule[0], seed=schedule[1], sms=sms)

    spread = lambda scale, tile, of: scale.double().repeat_interleave(tile, 0)[: of.shape[0]]  # noqa: E731
    terms = []
    for block in range(blocks):
        at = slice(block * 128, block * 128 + 128)
        factor = spread(a_scale[:, block], 1, a)[:, None] * spread(b_scale[:, block], 128, b)
        terms.append((a[:, at].double() @ b[:, at].double().T) * factor)
    last = torch.zeros(m, n, dtype=torch.float64) + (0 if bias is None else bias.double())
    want, size = sum(terms, last), sum((term.abs() for term in terms), last.abs())
    # The product of the scales, and each addition that follows, rounds; a block's own sum is exact.
    bound = torch.finfo(out_dtype).eps / 2 * want.abs() + (2 + blocks / 2) * 2.0**-24 * size
    error = (gout.tensor.double() - want).abs()
    assert bool((error <= bound).all()), f"worst {float((error / bound).max())} of the bound"


# Few rows (tiles of 16 x 32), small and large tiles (by sms); less than a block of K, one, and a ragged last; fewer
# blocks than stages and more; a second tile of b's scales in N, ragged; two bands of tiles.
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("sms", [1, 132], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize(
    "m,n,k",
    [(1, 1, 16), (16, 200, 900), (5, 33, 128), (17, 9, 1), (65, 130, 112), (129, 129, 640), (520, 65, 16)],
)
def test_int8_block_scaled_matmul(library: ctypes.CDLL, m: int, n: int, k: int, sms: int, schedule) -> None:
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n))
    block_scaled(library, m, n, k, bias if m % 2 else None, torch.float32, schedule, sms)


# Odd k, rows off their alignment, a base off its alignment, a stride that is not k; no k at all.
@pytest.mark.parametrize(
    "m,n,k,misalign,pad",
    [(3, 70, 137, 0, 0), (33, 9, 256, 3, 0), (5, 17, 200, 0, 8), (40, 130, 300, 0, 15), (2, 3, 0, 0, 16)],
)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_int8_block_scaled_matmul_any_alignment(library, m, n, k, misalign, pad, out_dtype: torch.dtype) -> None:
    bias = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(out_dtype)
    block_scaled(library, m, n, k, bias, out_dtype, (True, 4), 132, misalign, pad)
