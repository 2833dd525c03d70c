"""The harness: its statistics, its counts of work, its files and its plots. No time is asserted anywhere."""

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from pykernels.bench import cases, ceilings, cli, memory, peers
from pykernels.bench.case import Absent, Cell, Context, Provider
from pykernels.bench.rows import Row, ceilings_of, fastest_peer, merge, ratios, read_csv, to_json, write_csv
from pykernels.bench.run import run, run_cell
from pykernels.bench.stats import MIN_CLEAN, Samples, percentile
from pykernels.bench.timer import CpuTimer, measure

CPU = torch.device("cpu")


def test_percentile_is_numpys():
    numpy = pytest.importorskip("numpy")
    values = [random.Random(seed).uniform(1, 9) for seed in range(17)]
    for q in (0, 20, 50, 80, 100):
        assert percentile(values, q) == pytest.approx(float(numpy.percentile(values, q)), rel=1e-12)
    assert percentile([3.0], 20) == 3.0


@pytest.mark.parametrize(("values", "q", "message"), [([], 50, "values is empty"), ([1.0], 101, "q is 101")])
def test_percentile_refuses(values, q, message):
    with pytest.raises(ValueError, match=message):
        percentile(values, q)


def test_samples_use_the_clean_ones_alone_when_there_are_enough():
    samples = Samples()
    for index in range(MIN_CLEAN):
        samples.add(1.0 + index, 0.0)
    samples.add(0.001, 0.5)
    assert samples.quiet
    assert samples.used == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert samples.percentiles()[1] == 3.0


def test_samples_fall_back_to_those_that_waited_least_not_to_the_fastest():
    samples = Samples()  # the later, the faster and the more disturbed
    for index in range(2 * MIN_CLEAN):
        samples.add(seconds=float(2 * MIN_CLEAN - index), wait=0.1 + 0.05 * index)
    assert not samples.quiet
    assert samples.used == [10.0, 9.0, 8.0, 7.0, 6.0]


def test_measure_interleaves_and_rotates():
    calls: list[tuple[str, int]] = []
    providers = {name: (lambda index, name=name: calls.append((name, index))) for name in ("a", "b")}
    found = measure(providers, CpuTimer(), seconds=0.01, rotate=True, max_samples=30)
    assert all(len(samples.seconds) >= 3 for samples in found.values())
    for name in providers:
        indexes = [index for caller, index in calls if caller == name]
        assert indexes == sorted(set(indexes)), "no call takes the copy of the weights that the last one left warm"
    turns = [name for (name, _), (after, _) in itertools.pairwise(calls) if name != after]
    assert len(turns) >= 6, "the providers take turns"
    calls.clear()
    measure(providers, CpuTimer(), seconds=0.01, rotate=False, max_samples=30)
    assert {index for _, index in calls} == {0}


# Closed forms, written out here for one small shape of each: M = 3, N = 5, K = 7.
WORK = [
    ("int8_linear", (3, 5, 7), (2 * 105, 3 * 7 * 4 + 5 * 7 + 5 * 4 + 3 * 5 * 4)),
    ("int8_llama", (3, 5, 7), (2 * 105, 2 * 21 + 35 + 4 * 5 + 2 * 15)),
    ("int8_block_scaled_linear", (3, 5, 130), (2 * 1950, 3 * 130 * 4 + 5 * 130 + 4 * 2 + 60)),
    ("int8_grouped_linear", (3, 5, 7), (2 * 105, 3 * 7 * 4 + 2 * (35 + 20) + 60)),  # two experts have rows
    ("int8_matmul", (3, 5, 7), (2 * 105, 21 + 35 + 4 * 8 + 60)),
    ("int8_weight_only_linear", (3, 5, 7), (2 * 105, 42 + 35 + 20 + 30)),
    ("int8_training_linear", (3, 5, 7), (6 * 105, 2 * (21 + 35) + 2 * 15 + 2 * (15 + 21 + 35))),
    ("cross_entropy", (3, 7, 2), 3 * 42),
    ("linear_cross_entropy", (3, 5, 7, 4), (6 * 105, 2 * 4 * (21 + 35) + 24)),
    ("linear_kl_div", (3, 5, 7, 2), (8 * 105, 3 * 2 * (21 + 35))),
    ("quantize_rowwise", (3, 7, 4), 84 + 21 + 12),
    ("quantize_both", (3, 7, 2), 42 + 42 + 12 + 28),
    ("rms_norm", (3, 7, 2), 5 * 42 + 2 * 4 * 3),
    ("layer_norm", (3, 7, 4), 5 * 84 + 2 * 8 * 3),
    ("dropout", (3, 7, 2), 4 * 42),
    ("optimizer_step", (2, 3, 7, 4, 12, 2), 42 * (2 * 12 + 4 + 12 + 4)),
    ("rope", (3, 8, 6, 2), 4 * 2 * 3 * (8 + 2) * 6),
    ("swiglu", (3, 7, 2), 8 * 42),
    ("geglu", (3, 7, 4), 8 * 84),
    # Weights: query and output 8 x 8, key and value 2 x 8, three of the MLP 5 x 8; causal scores of 3 x 3 / 2.
    ("transformer_block", (3, 8, 5, 2), (6 * 3 * (2 * 64 + 2 * 16 + 3 * 40 + 24), 2 * (3 * 280 + 4 * 24))),
]


@pytest.mark.parametrize(("op", "dims", "expected"), WORK)
def test_work_of_a_case(op, dims, expected):
    assert cases.load()[op].work(*dims) == expected


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_every_case_lists_cells_that_state_their_work(quick, cuda):
    modules = cases.load()
    assert {op for op, _, _ in WORK} == set(modules), "a case without a closed form above"
    for op, module in modules.items():
        found = module.cells(quick, cuda)
        assert found
        for cell in found:
            assert cell.op == op and cell.bytes > 0 and cell.traffic in {"read", "copy"}
            assert len(cell.dims) in (2, 3) and cell.shape == "x".join(map(str, cell.dims))


def test_the_issues_cells_are_measured():
    modules = cases.load()
    llama = {cell.dims for cell in modules["int8_llama"].cells(False, True)}
    layers = {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}  # 8B
    layers |= {(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)}  # 70B
    assert llama == {(m, *layer) for m in (1, 8, 16, 64, 128, 256, 1024, 4096, 8192) for layer in layers}
    linear = {cell.shape: cell for cell in modules["int8_linear"].cells(False, False)}
    wanted = {f"{m}x{n}x{n}" for m in (1, 16, 64, 256, 1024, 4096) for n in (1024, 2048, 4096)}
    assert set(linear) == wanted and all(cell.caches == ("cold", "warm") for cell in linear.values())
    matmul = {cell.shape for cell in modules["int8_matmul"].cells(False, False)}
    assert matmul == {f"{m}x4096x4096" for m in (512, 2048, 4096)}


def test_cold_weights_exceed_the_cache():
    cell = Cell("op", "1x8", 0, 1, "read", lambda _cell, _context: iter(()), weight_bytes=3 << 20)
    assert cell.copies(32 << 20) * cell.weight_bytes >= 64 << 20
    cell.caches = ("warm",)
    assert cell.copies(32 << 20) == 1


def test_the_ceiling_of_a_row_is_the_one_that_binds_it():
    ceilings = {"int8": 100e12, "float32": 25e12, "read": 10e9}
    row = Row("int8_op", "forward", "pykernels", "1x1", "", "cold", 1.0, 4.0, 5.0, 200_000_000, 10_000, "read")
    assert row.against(ceilings).ceiling == "int8" and row.against(ceilings).ceiling_percent == pytest.approx(50)
    row = dataclasses.replace(row, bytes=30_000)
    assert row.against(ceilings).ceiling == "read" and row.against(ceilings).ceiling_percent == pytest.approx(75)
    warm = dataclasses.replace(row, traffic="")
    assert warm.against(ceilings).ceiling == "int8", "warm weights come out of a cache, not from memory"
    assert row.against({}).ceiling_percent is None
    single = dataclasses.replace(warm, op="op", dtype="float32", operations=50_000_000)
    assert single.against(ceilings).ceiling == "float32" and single.against(ceilings).ceiling_percent == pytest.approx(
        50
    )
    assert dataclasses.replace(single, dtype="float16").against(ceilings).ceiling == "", (
        "no such arithmetic was measured"
    )


def test_merging_takes_whole_cells_and_the_higher_ceilings():
    def pair(quiet: int, commit: str, ceiling: float, cache: str = "warm") -> list[Row]:
        rows = [Row("ceiling", "int8", commit, "", "", "", tops=ceiling)]
        for name in ("pykernels", "peer"):
            rows.append(_timed("int8_matmul", "forward", name, "8x8x8", cache, 4.0))
        return [dataclasses.replace(row, quiet=quiet, commit=commit) for row in rows]

    def commits(rows: list[Row]) -> list[str]:
        return [row.commit for row in rows if row.op != "ceiling"]

    assert commits(merge(pair(0, "a", 1.0), pair(1, "b", 0.5))) == ["b", "b"]
    assert commits(merge(pair(1, "a", 1.0), pair(0, "b", 0.5))) == ["a", "a"]
    assert sorted(commits(merge(pair(1, "a", 1.0, "cold"), pair(1, "b", 0.5)))) == ["a", "a", "b", "b"]
    merged = merge(pair(0, "a", 2.0), pair(1, "b", 1.0))
    assert ceilings_of(merged) == {"int8": 2e12}
    assert merged[-1].ceiling_percent == pytest.approx(1e8 * (1 << 30) / 2e12 / 5.0)


def test_resuming_measures_what_is_missing_or_was_busy():
    cells = [_cell(lambda _cell, _context: iter(()), caches=("cold", "warm"))]
    rows = [_timed("int8_matmul", "forward", "pykernels", "2x3x4", cache, 4.0) for cache in ("cold", "warm")]
    assert cli._unfinished(cells, []) == cells
    assert cli._unfinished(cells, rows) == []
    rows[0] = dataclasses.replace(rows[0], quiet=0)
    assert [cell.caches for cell in cli._unfinished(cells, rows)] == [("cold",)]


def _cell(build, **more) -> Cell:
    return Cell("int8_matmul", "2x3x4", 48, 100, "read", build, seconds=0.01, **more)


def test_rows_carry_errors_peaks_saved_bytes_and_the_absent():
    inputs = torch.randn(2, 4, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(3, 4))

    def build(cell: Cell, context: Context):
        context.truth = inputs.detach().double() @ weight.detach().double().t()

        def forward() -> torch.Tensor:
            return (inputs @ weight.t()).exp()

        def absent() -> Provider:
            raise Absent("not installed")

        def broken() -> Provider:
            raise RuntimeError("needs another\nmachine")

        yield "pykernels", lambda: Provider(lambda _i: inputs @ weight.t(), "float32", forward, (weight,))
        yield "doubled", lambda: Provider(lambda _i: (inputs + inputs) @ weight.t(), "float32")
        yield "missing", absent
        yield "broken", broken

    rows = {row.provider: row for row in run_cell(_cell(build, variant="forward+backward"), CPU, CpuTimer(), {}, print)}
    assert rows["pykernels"].rel_error == pytest.approx(0, abs=1e-6)
    assert rows["doubled"].rel_error == pytest.approx(1, rel=1e-6)
    assert rows["pykernels"].peak_bytes == 2 * 3 * 4
    assert rows["doubled"].peak_bytes == 2 * 4 * 4 + 2 * 3 * 4, "the sum is held while the product is made"
    assert rows["pykernels"].saved_bytes == 2 * 4 * 4 + 2 * 3 * 4, "the input and exp's output; not the weight"
    assert rows["missing"].note == "absent: not installed" and not rows["missing"].measured
    assert rows["broken"].note == "failed: RuntimeError: needs another machine"
    assert rows["pykernels"].tops == pytest.approx(48 / rows["pykernels"].p50_us * 1e-6)


def test_peak_counts_what_a_call_frees_too():
    x = torch.randn(1000)
    assert memory.peak_bytes(lambda: x + x, CPU) == 4000
    assert memory.peak_bytes(lambda: (x + x).sum(), CPU) == 4004


def test_absent_peers_are_named(monkeypatch):
    monkeypatch.setattr(peers, "OPTIONAL", ("no_such_peer_package",))
    assert "absent (no_such_peer_package does not import" in peers.versions()["no_such_peer_package"]
    with pytest.raises(Absent, match="no_such_peer_package does not import"):
        peers.require("no_such_peer_package")
    with pytest.raises(Absent, match="lacks no_such_engine"), peers.quantized_engine("no_such_engine"):
        pass


def test_linear_peers_compute_the_linear():
    generator = torch.Generator().manual_seed(0)
    context = Context(CPU, 2, generator)
    x, weights = context.randn(33, 64), [context.randn(48, 64) for _ in range(2)]
    checked = []
    with torch.no_grad():
        for name, make in peers.linear(x, weights, context):
            if "compiled" in name or "bitsandbytes" in name:  # seconds of compiling, and a package that may be absent
                continue
            try:
                provider = make()
            except Absent:
                continue
            for index in range(3):
                truth = x.double() @ weights[index % 2].double().t()
                error = (provider.call(index).double() - truth).norm() / truth.norm()
                assert error < 0.03, (name, index)
            checked.append(name)
    assert {"torch float32", "torch bfloat16", "torch._int_mm"} <= set(checked)


def _timed(op: str, variant: str, provider: str, shape: str, cache: str, time: float, **more) -> Row:
    times = (time, time * 1.25, time * 2)
    return Row(
        op,
        variant,
        provider,
        shape,
        "float32",
        cache,
        *times,
        1 << 30,
        1 << 20,
        "read",
        0.5 / time,
        16.0 / time,
        peak_bytes=4096,
        samples=9,
        disturbed=1,
        quiet=1,
        device="cpu",
        commit="abc",
        **more,
    )


ROWS = [
    Row("ceiling", "int8", "vpdpbusd zmm, 2 threads", "", "", "", tops=0.94, device="cpu"),
    Row("ceiling", "read", "read, 2 threads", "", "", "", gbps=60.0, device="cpu"),
    Row("ceiling", "copy", "torch copy_", "", "", "", gbps=50.0, device="cpu"),
    Row("int8_linear", "forward", "torchao compiled", "16x1024x1024", "", "", note='absent: "torchao", of course'),
]
for m in (1, 16):
    for cache in ("cold", "warm"):
        for name, time in (("pykernels", 4.0), ("torch float32", 16.0), ("torch.ao x86", 8.0)):
            ROWS.append(_timed("int8_linear", "forward", name, f"{m}x1024x1024", cache, time, rel_error=0.0078125))
for op, variant, shape, peer, ceiling in (
    ("int8_matmul", "forward", "512x1024x1024", "torch._int_mm", "int8"),
    ("int8_training_linear", "forward+backward", "4x4x4", "torch bfloat16", "int8"),
    ("quantize_rowwise", "float32", "64x64", "torch eager", "copy"),
):
    for name, time in (("pykernels", 2.0), (peer, 4.0)):
        held = {"ceiling": ceiling, "ceiling_percent": 90 / time, "saved_bytes": 17}
        ROWS.append(_timed(op, variant, name, shape, "warm", time, **held))


def test_csv_round_trip(tmp_path):
    path = tmp_path / "deep" / "cpu.csv"
    write_csv(path, ROWS)
    assert read_csv(path) == ROWS
    assert json.loads(to_json(ROWS))[0]["tops"] == 0.94
    path.write_text("op,provider\nx,y\n")
    with pytest.raises(ValueError, match="columns are"):
        read_csv(path)


def test_ratios_are_against_the_fastest_peer():
    best = fastest_peer(ROWS)
    assert best[("int8_linear", "forward", "16x1024x1024", "cold")].provider == "torch.ao x86"
    found = {(ours.op, ours.shape, ours.cache): ratio for ours, _peer, ratio in ratios(ROWS)}
    assert found[("int8_linear", "16x1024x1024", "cold")] == 2.0
    assert found[("int8_matmul", "512x1024x1024", "warm")] == 2.0


def test_plots_come_from_a_csv(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "cpu-some.csv"
    write_csv(path, ROWS)
    assert cli.main(["--plot", str(path), "--out", str(tmp_path / "plots")]) == 0
    figures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = {figure.stem for figure in figures}
    assert {"cpu-some-roofline", "cpu-some-int8_linear", "cpu-some-int8_matmul", "cpu-some-quantize"} <= names
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_op"], "op: got no_such_op; accepts cross_entropy"),
        (["--plot", "no/such.csv"], "no/such.csv is not a file"),
    ],
)
def test_the_command_line_refuses(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_dry_run_measures_nothing_and_names_the_peers(capsys):
    assert cli.main(["--gpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "int8_matmul" in out and "peer torchao:" in out and "on the CUDA device" in out


def test_a_run_end_to_end(tmp_path, monkeypatch, capsys):
    """One tiny cell through the command: progress, ceilings, a row of ours, the CSV."""
    module = cases.load()["quantize_rowwise"]
    cell = module.cells(True, False)[0]
    cell.shape, cell.seconds = "64x64", 0.01
    monkeypatch.setattr(module, "cells", lambda _quick, _cuda: [cell])
    monkeypatch.setattr(peers, "compiled", lambda function: function)  # compiling takes seconds and is not the harness
    monkeypatch.setattr(ceilings, "_BYTES", 1 << 20)
    path = tmp_path / "run.csv"
    assert cli.main(["quantize_rowwise", "--csv", str(path)]) == 0
    rows = read_csv(path)
    ours = next(row for row in rows if row.ours)
    assert ours.measured and ours.p20_us <= ours.p50_us <= ours.p80_us and ours.commit and ours.versions
    assert {row.variant for row in rows if row.op == "ceiling"} == {"int8", "float32", "read", "copy"}
    assert math.isfinite(ours.ceiling_percent)
    assert "quantize_rowwise" in capsys.readouterr().out
    monkeypatch.setattr(ceilings, "_native_library", lambda: None)
    rows = run([cell], CPU, 1, lambda _text, _done: None, lambda _rows: None, limit=-1.0)
    assert rows[0].note.startswith("absent: pykernels/_C*.so is not built")
    assert rows[-1].note == "left out: the limit of -1 s was reached"


def test_only_the_csvs_of_this_command_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    (tmp_path / "accuracy-cpu.csv").write_text("model,variant\n")
    (tmp_path / "cpu.csv").write_text("op,variant,provider\n")
    assert cli._csvs("") == [tmp_path / "cpu.csv"]
