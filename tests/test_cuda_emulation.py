"""The CUDA kernels, run thread by thread on the CPU against plain torch. See cuda_emulator/cuda_emulator.h."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.cuda_emulator import harness as emu

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the CUDA emulator is built with g++")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = [(False, 1), (True, 2)]  # (cp.async lands only when waited for, order of threads)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return emu.load()


def philox_uniform(count: int, seed: int) -> torch.Tensor:
    """u of flat elements 0 .. count - 1, in Python integers."""
    out, mask = [], 0xFFFFFFFF
    for group in range(-(-count // 4)):
        c, k = [group & mask, group >> 32, 0, 0], [seed & mask, seed >> 32]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        out += [(r >> 8) * 2.0**-24 for r in c]
    return torch.tensor(out[:count], dtype=torch.float32)


def test_philox_known_answer() -> None:
    # Random123's known-answer vector for philox4x32-10 with counter and key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    known = torch.tensor([(r >> 8) * 2.0**-24 for r in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)])
    assert torch.equal(philox_uniform(4, 0), known)


def quantize_reference(x: torch.Tensor, static: torch.Tensor | None, u: torch.Tensor | None):
    xf = x.float()
    absmax = xf.abs().amax(1)
    if static is None:
        scale, inv = absmax / 127, torch.full_like(absmax, 127) / absmax  # 127 / tensor would round twice
        tiny = absmax < 127 * torch.finfo(torch.float32).tiny
        scale, inv = scale.masked_fill(tiny, 0), inv.masked_fill(tiny, 0)
    else:
        scale = static.expand(x.shape[0]).clone()
        inv = torch.where(scale == 0, 0.0, 1 / scale)
    bad = ~xf.isfinite().all(1)
    scale = scale.masked_fill(bad, float("nan"))
    v = xf * inv[:, None]
    q = (v.round() if u is None else (v + u).floor()).clamp(-127, 127)
    return q.masked_fill(bad[:, None], 0).to(torch.int8), scale


# One per path: a warp per row with 1, 2 and 4 vectors (and a last block of warps without rows), a block per row
# with its last vectors missing, and the guarded path for lengths that 16 bytes do not divide.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("cols", [8, 256, 512, 1000, 1032, 2048, 1, 7, 33, 1025])
@pytest.mark.parametrize("mode", ["dynamic", "stochastic", "static", "static rows"])
def test_quantize_rowwise(library: ctypes.CDLL, dtype: torch.dtype, cols: int, mode: str) -> None:
    rows = 11
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(rows, cols, generator=generator).mul_(torch.logspace(-6, 3, rows)[:, None]).to(dtype)
    x[1] = 0
    x[2, cols // 2] = float("nan")
    x[3, -1] = -float("inf")
    x[4] = 1e-38 if dtype != torch.float16 else 0
    static = {"static": torch.tensor([0.01]), "static rows": torch.linspace(0, 0.2, rows)}.get(mode)
    seed = 0x9E3779B97F4A7C15
    u = philox_uniform(rows * cols, seed).view(rows, cols) if mode == "stochastic" else None
    want_q, want_scale = quantize_reference(x, static, u)

    gx = emu.Guarded(x)
    gq = emu.Guarded(torch.full((rows, cols), 99, dtype=torch.int8))
    gs = emu.Guarded(torch.full((rows,), -1.0))
    gstatic = emu.Guarded(static) if static is not None else None
    p = emu.QuantizeRowwise(
        gx.address, emu.DTYPES[dtype], cols, cols, gstatic and gstatic.address,
        int(static is not None and static.numel() > 1), u is not None, seed, gq.address, cols, gs.address,
    )  # fmt: skip
    work = lambda: library.emulated_quantize_rowwise(ctypes.byref(p), ctypes.c_int64(rows))  # noqa: E731
    emu.run_under(work, library, deferred=False, seed=3, sms=4)
    assert torch.equal(gs.tensor.nan_to_num(7e9), want_scale.nan_to_num(7e9))
    assert torch.equal(gq.tensor, want_q)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_rowwise_longer_than_registers(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    cols = 4 * 1024 * (16 // dtype.itemsize) + 16
    x = torch.randn(2, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    want_q, want_scale = quantize_reference(x, None, None)
    gx, gq, gs = emu.Guarded(x), emu.Guarded(torch.full(x.shape, 99, dtype=torch.int8)), emu.Guarded(torch.zeros(2))
    p = emu.QuantizeRowwise(gx.address, emu.DTYPES[dtype], cols, cols, None, 0, False, 0, gq.address, cols, gs.address)
    work = lambda: library.emulated_quantize_rowwise(ctypes.byref(p), ctypes.c_int64(2))  # noqa: E731
    emu.run_under(work, library, deferred=False, seed=5, sms=4)
    assert torch.equal(gs.tensor, want_scale)
    assert torch.equal(gq.tensor, want_q)


def activation_reference(v: torch.Tensor, activation: int) -> torch.Tensor:
    f = torch.nn.functional
    return [lambda t: t, f.relu, f.gelu, lambda t: f.gelu(t, approximate="tanh"), f.silu][activation](v)


def int8(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def run_matmul(library, call: str, a, b, epilogue: dict, out, schedule, sms: int, misalign: int = 0, pad: int = 0):
    """Runs one launcher with row strides of k + pad; returns what it wrote."""
    k = a.shape[1]
    strided = [torch.nn.functional.pad(t, (0, pad), value=77) for t in (a, b)]
    ga, gb = (emu.Guarded(t, misalign) for t in strided)
    held = {name: emu.Guarded(value) for name, value in epilogue.items() if isinstance(value, torch.Tensor)}
    gout = emu.Guarded(out)
    e = emu.Epilogue(out=gout.address, out_stride=out.shape[1], out_dtype=emu.DTYPES[out.dtype])
    for name, guarded in held.items():
        setattr(e, name, guarded.address)
        if hasattr(e, f"{name}_stride"):
            stride = out.shape[1] if name == "residual" else int(guarded.tensor.numel() > 1)
            setattr(e, f"{name}_stride", stride)
        if hasattr(e, f"{name}_dtype"):
            setattr(e, f"{name}_dtype", emu.DTYPES[guarded.tensor.dtype])
    e.activation = epilogue.get("activation", 0)
    p = emu.Int8Matmul(ga.address, k + pad, gb.address, k + pad, a.shape[0], b.shape[0], k, e)
    work = lambda: getattr(library, f"emulated_{call}")(ctypes.byref(p))  # noqa: E731
    emu.run_under(work, library, deferred=schedule[0], seed=schedule[1], sms=sms)
    return gout.tensor


# (m, n, k): one tile and less, one step of k and fewer than there are stages, more steps than stages with a ragged
# last, ragged tiles in both directions, and two bands of tiles whose last is ragged (9 tiles of 64 down).
TILED = [
    (1, 1, 16),
    (17, 9, 1),
    (64, 64, 64),
    (65, 130, 48),
    (33, 70, 208),
    (40, 24, 576),
    (129, 129, 320),
    (520, 65, 16),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("sms", [1, 132], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("m,n,k", TILED)
def test_int8_matmul_tiled_is_exact(library: ctypes.CDLL, m: int, n: int, k: int, sms: int, schedule) -> None:
    g = torch.Generator().manual_seed(m * n + k)
    a, b = int8(g, m, k), int8(g, n, k)
    want = (a.double() @ b.double().T).to(torch.int32)
    poison = torch.full((m, n), -(2**31), dtype=torch.int32)
    got = run_matmul(library, "int8_matmul_tiled", a, b, {}, poison, schedule, sms)
    assert torch.equal(got, want)


# The guarded path: odd k, rows off their alignment, a base off its alignment; and a stride that is not k.
@pytest.mark.parametrize("call", ["int8_matmul_tiled", "int8_matmul"])
@pytest.mark.parametrize(
    "m,n,k,misalign,pad", [(3, 70, 37, 0, 0), (16, 9, 64, 3, 0), (5, 17, 200, 0, 8), (7, 8, 65, 0, 15)]
)
def test_int8_matmul_any_alignment(library: ctypes.CDLL, call: str, m, n, k, misalign, pad) -> None:
    g = torch.Generator().manual_seed(k)
    a, b = int8(g, m, k), int8(g, n, k)
    poison = torch.full((m, n), -(2**31), dtype=torch.int32)
    got = run_matmul(library, call, a, b, {}, poison, (True, 4), 132, misalign, pad)
    assert torch.equal(got, (a.double() @ b.double().T).to(torch.int32))


# One and two n-tiles a block (sms), several passes of 16 rows never reach this path but the launcher allows them.
@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize(
    "m,n,k", [(1, 1, 16), (1, 40, 4096), (4, 100, 1040), (5, 33, 272), (16, 64, 512), (9, 7, 2064)]
)
def test_int8_matmul_small_m_is_exact(library: ctypes.CDLL, m: int, n: int, k: int, sms: int) -> None:
    g = torch.Generator().manual_seed(m + n + k)
    a, b = int8(g, m, k), int8(g, n, k)
    poison = torch.full((m, n), -(2**31), dtype=torch.int32)
    got = run_matmul(library, "int8_matmul", a, b, {}, poison, (False, 6), sms)
    assert torch.equal(got, (a.double() @ b.double().T).to(torch.int32))


@pytest.mark.parametrize("call", ["int8_matmul_tiled", "int8_matmul"])
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", ["vectors", "scalars"])
def test_int8_matmul_epilogue(library, call: str, activation: int, out_dtype: torch.dtype, rows: str) -> None:
    m, n, k = 13, 70, 80
    g = torch.Generator().manual_seed(activation)
    a, b = int8(g, m, k), int8(g, n, k)
    vectors = rows == "vectors"
    e = {
        "a_scale": torch.rand(m if vectors else 1, generator=g) * 0.02,
        "b_scale": torch.rand(n if vectors else 1, generator=g) * 0.01,
        "a_zero_point": torch.randint(-128, 128, (m if vectors else 1,), generator=g, dtype=torch.int32),
        "b_sum": b.sum(1, dtype=torch.int32),
        "bias": torch.randn(n, generator=g).to(FLOATS[activation % 3]),
        "residual": torch.randn(m, n, generator=g).to(FLOATS[(activation + 1) % 3]),
        "activation": activation,
    }
    got = run_matmul(library, call, a, b, e, torch.full((m, n), float("nan"), dtype=out_dtype), (True, 7), 132)
    acc = (a.double() - e["a_zero_point"].double()[:, None]) @ b.double().T
    v = acc * e["a_scale"].double()[:, None] * e["b_scale"].double() + e["bias"].double()
    want = activation_reference(v, activation) + e["residual"].double()
    # Half a unit in the last place of the output, and float32's own steps at the size of the largest term.
    eps = torch.finfo(out_dtype).eps
    size = torch.maximum(v.abs(), e["residual"].double().abs()) + e["bias"].double().abs()
    bound = eps / 2 * want.abs() + 8 * 2.0**-24 * size
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"worst {float((error / bound).max())} of the bound"


def test_int8_row_sum(library: ctypes.CDLL) -> None:
    b = int8(torch.Generator().manual_seed(0), 9, 131)
    gb, gout = emu.Guarded(b), emu.Guarded(torch.full((9,), -7, dtype=torch.int32))
    args = (ctypes.c_void_p(gb.address), *(ctypes.c_int64(v) for v in (131, 9, 131)), ctypes.c_void_p(gout.address))
    emu.run_under(lambda: library.emulated_int8_row_sum(*args), library, deferred=False, seed=1, sms=4)
    assert torch.equal(gout.tensor, b.sum(1, dtype=torch.int32))


def run_weight_only(library, m: int, n: int, k: int, group: int, dtype: torch.dtype, schedule, sms: int) -> None:
    """One call against float64."""
    g = torch.Generator().manual_seed(k + m)
    x = torch.randn(m, k, generator=g).to(dtype)
    weight = int8(g, n, k)
    scale = torch.rand(n, k // group, generator=g) * 0.02 + 0.001
    bias = torch.randn(n, generator=g).to(dtype)
    gx, gw, gs, gb = emu.Guarded(x), emu.Guarded(weight), emu.Guarded(scale), emu.Guarded(bias)
    gout = emu.Guarded(torch.full((m, n), float("nan"), dtype=dtype))
    e = emu.Epilogue(bias=gb.address, bias_dtype=emu.DTYPES[dtype], out=gout.address, out_stride=n)
    e.out_dtype = emu.DTYPES[dtype]
    p = emu.Int8WeightOnlyLinear(gx.address, emu.DTYPES[dtype], gw.address, gs.address, group, m, n, k, e)
    work = lambda: library.emulated_int8_weight_only_linear(ctypes.byref(p))  # noqa: E731
    emu.run_under(work, library, deferred=schedule[0], seed=schedule[1], sms=sms)
    full = weight.double() * scale.double().repeat_interleave(group, 1)
    want = x.double() @ full.T + bias.double()
    # Float32 sums of k terms in any order: a few roundings at the size of the sum of magnitudes.
    bound = torch.finfo(dtype).eps / 2 * want.abs() + 2.0**-22 * (x.double().abs() @ full.abs().T + bias.double().abs())
    error = (gout.tensor.double() - want).abs()
    assert bool((error <= bound).all()), f"worst {float((error / bound).max())} of the bound"


# k and group: tensor cores with one scale a row and with groups, and with more steps than are under way; multiply-adds
# for groups of 16, for groups of 5 (the scale changes inside a 16-byte chunk), and for a length no vector divides.
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "k,group",
    [(64, 64), (1072, 1072), (4112, 4112), (512, 128), (256, 64), (2304, 128), (160, 16), (40, 5), (37, 37), (33, 11)],
)
@pytest.mark.parametrize("m,n", [(1, 9), (3, 16), (18, 5)])
def test_int8_weight_only_linear(library, dtype: torch.dtype, k: int, group: int, m: int, n: int) -> None:
    run_weight_only(library, m, n, k, group, dtype, (False, 9), 4)


# Many rows: both tile sizes (sms), ragged tiles, k shorter than a step, a ragged last step, more steps than stages.
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("sms", [1, 132], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("m,n,k,group", [(40, 9, 16, 16), (65, 131, 336, 336), (33, 70, 384, 128), (130, 64, 64, 64)])
def test_int8_weight_only_linear_tiled(library, m, n, k, group, dtype: torch.dtype, sms: int, schedule) -> None:
    run_weight_only(library, m, n, k, group, dtype, schedule, sms)


def test_bindings_on_cpu_tensors() -> None:
    """csrc/cuda/bind over the emulator: results and refusals as the references'. In a process of its own, because the
    bindings take the place of the CPU operators."""
    script = emu.HERE / "drive_bindings.py"
    done = subprocess.run(
        [sys.executable, str(script), str(emu.bindings())],
        env={**os.environ, "PYTHONPATH": str(emu.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compared ")
