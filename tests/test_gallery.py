"""The gallery on small results made for it; test_docs holds the committed page against the committed results."""

import dataclasses
from pathlib import Path

from pykernels.bench import cli
from pykernels.bench.gallery import FOLD, render
from pykernels.bench.rows import Row, write_csv

CEILING = Row("ceiling", "copy", "memmove, 2 threads", "", "", "", gbps=20.0, threads=2, device="a CPU")
OURS = Row(
    "rms_norm", "forward", "pykernels", "8x8", "float32", "cold", p20_us=1.0, p50_us=2.0, p80_us=3.0,
    ceiling="copy", ceiling_percent=81.4, quiet=1, threads=2, device="a CPU", commit="abc", date="2026-01-02",
)  # fmt: skip
PEER = dataclasses.replace(OURS, provider="torch.compile", p50_us=3.0)
SLOW = dataclasses.replace(OURS, provider="torch eager", p50_us=9.0)
ABSENT = Row("rms_norm", "forward", "another", "8x8", "float32", "cold", note="absent: not installed")


def page(folder: Path, **files: list[Row]) -> str:
    results, plots = folder / "results", folder / "plots"
    plots.mkdir(exist_ok=True)
    for name, rows in files.items():
        write_csv(results / f"{name}.csv", rows)
    return render(results, plots)


def test_a_row_stands_beside_its_fastest_peer(tmp_path: Path) -> None:
    text = page(tmp_path, cpu=[CEILING, OURS, PEER, SLOW, ABSENT])
    assert "| forward | 8x8 | cold | 0.002 | 81 copy | torch.compile | 1.50 |" in text
    assert "1 cell: 1.50 to 1.50 times the fastest peer's speed, median 1.50; 1 at or above 1." in text
    assert "copy 20.0 GB/s (memmove, 2 threads)." in text
    assert "Not measured: another (not installed)." in text
    assert "2026-01-02, 2 threads" in text


def test_a_busy_row_says_so_and_a_loss_is_not_hidden(tmp_path: Path) -> None:
    slow = dataclasses.replace(OURS, p50_us=6.0, quiet=0)
    text = page(tmp_path, cpu=[CEILING, slow, PEER])
    assert "0.006 *busy*" in text and "| 0.50 |" in text and "; 0 at or above 1." in text


def test_long_tables_fold(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, shape=f"{n}x8") for n in range(FOLD + 1) for row in (OURS, PEER)]
    assert f"<summary>{FOLD + 1} rows</summary>" in page(tmp_path, cpu=[CEILING, *rows])
    assert "<summary>" not in page(tmp_path, cpu=[CEILING, *rows[: 2 * FOLD]])


def test_each_file_shows_its_own_pictures(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    for name in ("cpu-blocks", "cpu-losses-losses"):
        (tmp_path / "plots" / f"{name}.png").touch()
    text = page(tmp_path, **{"cpu": [CEILING, OURS], "cpu-losses": [CEILING, OURS]})
    assert text.count("plots/cpu-blocks.png") == 1 and text.count("plots/cpu-losses-losses.png") == 1
    own = text.index("benchmarks/results/cpu-losses.csv")
    assert own < text.index("plots/cpu-losses-losses.png") < text.index("benchmarks/results/cpu.csv")


def test_the_command_draws_and_writes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "benchmarks" / "results" / "cpu.csv", [CEILING, OURS, PEER])
    assert cli.main(["--gallery", "docs/gallery.md"]) == 0
    text = (tmp_path / "docs" / "gallery.md").read_text()
    assert "plots/cpu-blocks.png" in text and (tmp_path / "docs" / "plots" / "cpu-blocks.png").stat().st_size > 1000
    assert cli.main(["--gallery", "elsewhere/gallery.md"]) == 2
    assert "a file beside the folder of the plots" in capsys.readouterr().err
