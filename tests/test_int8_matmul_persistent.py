"""The persistent int8_matmul of Hopper: in Triton's interpreter, where descriptors work too, and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

triton = pytest.importorskip("triton")

from pykernels.kernels import _int8_matmul_persistent as persistent  # noqa: E402
from pykernels.kernels import _tuning, int8_linear, int8_matmul  # noqa: E402
from pykernels.ops.int8_linear import reference as int8_linear_reference  # noqa: E402
from pykernels.ops.int8_matmul import reference as int8_matmul_reference  # noqa: E402

interpreted = pytest.mark.skipif(not _tuning.interpreted(), reason="with a GPU the launchers take CUDA tensors")
CONFIGS = [persistent.WIDE, persistent.PAIR, persistent.SHORT]


def multiprocessors(monkeypatch: pytest.MonkeyPatch, count: int, major: int = 9) -> None:
    monkeypatch.setattr(persistent, "device_properties", lambda device: (major, count))


def codes(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.cpu().long() @ b.cpu().long().t()).int()


def test_every_configuration_is_tested() -> None:
    assert all(config in CONFIGS for listed in persistent.CONFIGS.values() for config in listed)


@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("count", [1, 3, 50])
def test_exact_and_every_element_stored_once(
    config: dict[str, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine rows of tiles, so one full group of eight and a ragged one, by two ragged columns: more tiles than programs,
    a multiple of them or not, and more programs than tiles. K ends inside a step."""
    multiprocessors(monkeypatch, count)
    m, n, k = 8 * config["BLOCK_M"] + 5, config["BLOCK_N"] + 37, config["BLOCK_K"] + 16
    a, b = codes(m, k), codes(n, k)
    stores, programs = [], []
    builder = triton.runtime.interpreter.interpreter_builder
    store, run = builder.create_masked_store, triton.runtime.interpreter.GridExecutor.__call__

    def counted(pointers, value, mask, *rest):
        stores.append(pointers.data[mask.data])
        return store(pointers, value, mask, *rest)

    def watched(self, *args, **kwargs):
        programs.append(self.grid)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_masked_store", counted)
    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", watched)
    with _tuning.force_config(config):
        out = int8_matmul.int8_matmul(a, b, out_dtype=torch.int32)
    assert torch.equal(out, exact(a, b))
    written = torch.cat([torch.from_numpy(addresses.astype("int64")) for addresses in stores])
    assert written.numel() == m * n
    addresses = written.sort().values
    assert bool((addresses.diff() == out.element_size()).all())  # m * n places without a gap: each once
    assert programs == [(min(18, count * config["PER_SM"]),)]


@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shapes_and_strides(config: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    multiprocessors(monkeypatch, 1)
    for m, n, k in ((1, 1, 16), (3, 300, 48), (70, 3, 400)):
        for a, b in (
            (codes(m, k), codes(n, k)),
            (codes(m, k + 32)[:, 16 : k + 16], codes(2 * n, k)[::2]),
        ):
            with _tuning.force_config(config):
                assert torch.equal(int8_matmul.int8_matmul(a, b, out_dtype=torch.int32), exact(a, b))


def epilogues(m: int, n: int, device: str = "cpu") -> Iterator[dict]:
    """Every activation and every type of result, with what may come before and after it and with none of that."""
    generator = torch.Generator().manual_seed(1)
    row, column = (torch.rand(size, generator=generator).to(device) / 100 for size in (m, n))
    bias = torch.randn(n, generator=generator).to(device)
    residual = torch.randn(m, n + 16, generator=generator).to(device)[:, :n]
    zero_point = torch.randint(-128, 128, (m,), generator=generator, dtype=torch.int32).to(device)
    types = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for activation, dtype in zip(range(5), types, strict=False):
        common = {"activation": activation, "out_dtype": dtype}
        yield {"a_scale": row, "b_scale": column, "bias": bias, **common}
        yield {
            "a_scale": row,
            "b_scale": column[:1],
            "bias": bias.to(dtype),
            "residual": residual.to(dtype),
            "a_zero_point": zero_point,
            **common,
        }


@interpreted
def test_epilogue_is_the_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: tests/test_triton.py holds that one to one rounding of float64."""
    multiprocessors(monkeypatch, 1)
    config = {**persistent.SHORT, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}  # two slices a tile; fast here
    a, b = codes(21, 48), codes(75, 48)
    for how in epilogues(21, 75):
        with _tuning.force_config(int8_matmul.UNALIGNED):
            plain = int8_matmul.int8_matmul(a, b, **how)
        with _tuning.force_config(config):
            ours = int8_matmul.int8_matmul(a, b, **how)
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


@interpreted
def test_what_tma_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = codes(40, 64), codes(48, 64)
    residual = torch.randn(40, 96)
    assert not persistent.usable(a, b, None)  # no GPU
    multiprocessors(monkeypatch, 132, major=8)
    assert not persistent.usable(a, b, None)
    for major in (9, 10, 12):
        multiprocessors(monkeypatch, 132, major)
        assert persistent.usable(a, b, None)
    assert persistent.usable(codes(40, 128)[:, :64], b, residual[:, 32:80])
    assert not persistent.usable(a, b, residual[:, 1:49])
    assert not persistent.usable(a, b, torch.randn(40, 49)[:, :48])
    assert not persistent.usable(a, b[:40], None)  # rows of the result off their alignment
    assert not persistent.usable(a[:, :0], b[:, :0], None)
    assert not persistent.usable(a[:1].expand(40, 64), b, None)
    assert not persistent.usable(a, codes(1024).as_strided((48, 64), (16, 1)), None)
    monkeypatch.setenv("PYKERNELS_TMA", "0")
    assert not persistent.usable(a, b, None)
    monkeypatch.delenv("PYKERNELS_TMA")
    monkeypatch.setattr(persistent, "TensorDescriptor", None)
    assert not persistent.usable(a, b, None)


@interpreted
def test_what_the_tuner_chooses_among(monkeypatch: pytest.MonkeyPatch) -> None:
    """Persistent configurations stand behind the plain ones and only where TMA may be used, which the key says."""
    multiprocessors(monkeypatch, 132)
    asked = []

    def tuned(op, key, configs, device, launch):
        asked.append((key, configs))
        return configs[0]

    monkeypatch.setattr(int8_matmul, "tuned", tuned)

    def offered(a: torch.Tensor, b: torch.Tensor, **how: torch.Tensor) -> tuple[bool, list[dict[str, int]]]:
        ours = int8_matmul.int8_matmul(a, b, **how)
        assert torch.equal(ours, exact(a, b).float())
        key, configs = asked.pop()
        assert "PER_SM" not in configs[0]
        return key[-1], [config for config in configs if "PER_SM" in config]

    b = codes(16, 32)
    assert offered(codes(5, 32), b) == (True, [])  # decoding reads weights once, whatever reads them
    assert offered(codes(20, 32), b) == (True, persistent.CONFIGS[64])
    assert offered(codes(70, 32), b) == (True, persistent.CONFIGS[8192])
    assert offered(codes(70, 24), codes(16, 24)) == (False, [])
    assert offered(codes(70, 48)[:, 8:40], b) == (False, [])
    assert offered(codes(70, 32), codes(17, 32)) == (False, [])
    assert offered(codes(70, 32), b, residual=torch.zeros(70, 17)[:, 1:]) == (False, [])
    assert offered(codes(70, 0), codes(16, 0)) == (False, [])
    monkeypatch.setenv("PYKERNELS_TMA", "0")
    assert offered(codes(70, 32), b) == (False, [])
    monkeypatch.delenv("PYKERNELS_TMA")
    int8_linear.int8_linear(torch.randn(70, 32), b, torch.rand(16))
    ((key, configs),) = asked
    assert key[-1] and configs[-3:] == persistent.CONFIGS[8192]


@interpreted
def test_int8_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    multiprocessors(monkeypatch, 1)
    x, weight, scale = torch.randn(3, 30, 64), codes(150, 64), torch.rand(150)
    plain = int8_linear.int8_linear(x, weight, scale)
    monkeypatch.setattr(int8_matmul, "tuned", lambda *_: persistent.SHORT)
    ours = int8_linear.int8_linear(x, weight, scale)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    torch.testing.assert_close(ours, int8_linear_reference(x, weight, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_on_a_gpu(config: dict[str, int]) -> None:
    """Sums to the bit; a tile or two for each program and some hundred; every epilogue as in the plain kernel's."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA needs sm_90")
    torch.cuda.manual_seed(0)
    for m, n, k in ((1, 16, 16), (65, 304, 144), (257, 528, 1040), (2048, 3008, 4096), (9000, 9008, 128)):
        a, b = codes(m, k, device="cuda"), codes(n, k, device="cuda")
        assert persistent.usable(a, b, None)
        want = int8_matmul.int8_matmul(a, b, out_dtype=torch.int32)
        if m * n * k < 1e9:
            assert torch.equal(want.cpu(), exact(a, b))
        with _tuning.force_config(config):
            for _ in range(5):  # a race need not show the first time
                assert torch.equal(int8_matmul.int8_matmul(a, b, out_dtype=torch.int32), want)
    a, b = codes(300, 528, device="cuda"), codes(528, 528, device="cuda")
    for how in epilogues(300, 528, "cuda"):
        with _tuning.force_config(config):
            ours = int8_matmul.int8_matmul(a, b, **how)
        on_host = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in how.items()}
        sums = b.cpu().sum(1, dtype=torch.int32) if "a_zero_point" in how else None
        truth = int8_matmul_reference(a.cpu(), b.cpu(), **on_host, b_sum=sums)
        torch.testing.assert_close(ours.cpu(), truth, rtol=torch.finfo(ours.dtype).eps, atol=1e-4)
