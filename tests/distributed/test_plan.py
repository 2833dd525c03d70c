"""The ZeRO formulas against the paper's numbers and bytes counted by hand, and the command that prints them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pykernels import optim
from pykernels.__main__ import main
from pykernels.distributed import memory_per_rank, state_bytes_per_parameter
from pykernels.distributed.plan import choices

PAPER = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.9}  # GB, Rajbhandari et al. 2020, figure 1


@pytest.mark.parametrize("stage", PAPER)
def test_the_papers_table(stage: int) -> None:
    assert round(memory_per_rank(7.5e9, 64, stage) / 1e9, 1) == PAPER[stage]


@pytest.mark.parametrize(
    ("bits", "rounding", "dtype", "algorithm", "expected"),
    [
        (32, None, torch.bfloat16, "adamw", 12),  # a float32 copy and two moments
        (32, None, torch.float32, "adamw", 8),  # the weight is its own master
        (32, "split_master", torch.bfloat16, "adamw", 10),
        (32, "kahan", torch.bfloat16, "adamw", 10),
        (16, "kahan", torch.bfloat16, "lion", 4),
        (16, "stochastic", torch.bfloat16, "adamw", 4),
        (8, "nearest", torch.float32, "lamb", 2 + 8 / 256),
        (8, "split_master", torch.bfloat16, "adam", 4 + 8 / 256),
        (8, "stochastic", torch.bfloat16, "sgd", 1 + 4 / 256),
    ],
)
def test_state_bytes(bits: int, rounding: str | None, dtype: torch.dtype, algorithm: str, expected: float) -> None:
    assert state_bytes_per_parameter(bits, rounding, algorithm=algorithm, param_dtype=dtype) == expected


def test_what_each_stage_divides() -> None:
    """10 parameters, 4 bytes each, gradients of 2, state of 8, on 5 ranks."""
    settings = {"param_dtype": torch.float32, "grad_dtype": torch.bfloat16, "rounding": "nearest"}
    assert [memory_per_rank(10, 5, stage, **settings) for stage in range(4)] == pytest.approx([140, 76, 60, 28])
    offloaded = [memory_per_rank(10, 5, s, offload="optimizer", **settings) for s in range(4)]
    assert offloaded == pytest.approx([60, 60, 44, 12])
    assert memory_per_rank(10, 1, 3, **settings) == 140


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stage": 4}, "stage to be 0, 1, 2 or 3, got 4"),
        ({"world_size": 0}, "world_size to be 1 or more, got 0"),
        ({"n_params": -1}, "n_params to be 0 or more, got -1"),
        ({"state_bits": 4}, "state_bits to be 32, 16 or 8, got 4"),
        ({"rounding": "up"}, "rounding to be None or one of .*, got 'up'"),
        ({"algorithm": "sophia"}, "algorithm to be one of .*, got 'sophia'"),
        ({"block_size": 0}, "block_size to be 1 or more, got 0"),
        ({"offload": "disk"}, "offload to be None or .*, got 'disk'"),
    ],
)
def test_bad_input(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        memory_per_rank(**{"n_params": 10, "world_size": 2, "stage": 1} | settings)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--params", "7.5e9", "--world-size", "64"]) == 0
    printed = capsys.readouterr().out
    paper = next(line for line in printed.splitlines() if "float32 copy" in line)
    assert [cell.strip() for cell in paper.split("│")[1:-1]] == [
        "32",
        "float32 copy",
        "12",
        "120.0",
        "31.4",
        "16.6",
        "1.9",
    ]
    for rounding in ("nearest", "stochastic", "kahan", "split_master"):
        assert printed.count(f" {rounding} ") == 3  # for each width of state
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--params", "1e6", "--world-size", "4", "--algorithm", "lion", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["params"] == 1e6 and report["world_size"] == 4 and report["algorithm"] == "lion"
    for row in report["choices"]:
        rounding = None if row["rounding"] == "float32 copy" else row["rounding"]
        settings = {"state_bits": row["state_bits"], "rounding": rounding, "algorithm": "lion"}
        assert row["state_bytes_per_parameter"] == state_bytes_per_parameter(**settings)
        assert row["bytes_per_rank"] == {str(s): memory_per_rank(1e6, 4, s, **settings) for s in range(4)}
    assert len(report["choices"]) == 13

    assert main(["plan", "--params", "1e6", "--param-dtype", "float32", "--offload", "optimizer", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["rounding"] for row in report["choices"]] == ["nearest"] * 3
    assert all(set(row["bytes_per_rank"].values()) == {8e6} for row in report["choices"])


@pytest.mark.parametrize("arguments", [[], ["--params", "0"], ["--params", "1", "--world-size", "0"]])
def test_bad_arguments_stop_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2 and "plan" in capsys.readouterr().err


def test_importing_the_package_does_not_import_the_engine() -> None:
    code = (
        "import sys, pykernels; pykernels.distributed.memory_per_rank(1, 1, 1)\n"
        "heavy = ('torch.distributed.tensor', 'torch.distributed.fsdp', 'torch.distributed.checkpoint')\n"
        "assert not [m for m in sys.modules if m.startswith(heavy)]\n"
        "assert callable(pykernels.distributed.zero)\n"
        "assert 'torch.distributed.tensor' in sys.modules\n"
        "try: pykernels.distributed.one\n"
        "except AttributeError as error: print(error)\n"
        "import torch; torch.distributed.is_available = lambda: False; del pykernels.distributed.zero\n"
        "try: pykernels.distributed.zero\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no attribute 'one'" in done.stdout and "this build of torch lacks" in done.stdout, done.stderr


def test_the_formula_is_that_of_the_optimizers() -> None:
    """optim.state_bytes counts the tensors that an optimizer makes for one parameter, its step's 4 bytes included."""
    for bits in (32, 16, 8):
        for rounding in ("nearest", "stochastic", "kahan", "split_master"):
            made = optim.state_bytes((512, 1024), torch.bfloat16, optim.AdamW, state_bits=bits, rounding=rounding)
            assert made - 4 == state_bytes_per_parameter(bits, rounding) * 512 * 1024


def test_the_documents_table() -> None:
    """docs/distributed.md shows what the command prints."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    for state_bits, rounding in choices("bfloat16"):
        settings = {"state_bits": state_bits, "rounding": rounding}
        gigabytes = [memory_per_rank(7.5e9, 64, stage, **settings) / 1e9 for stage in range(4)]
        cells = [f"{value:.1f}" if value >= 1 else f"{value:.3g}" for value in gigabytes]
        name = "float32 copy" if rounding is None else f'`"{rounding}"`'
        row = f"| {state_bits} | {name} | {state_bytes_per_parameter(**settings):.5g} | {' | '.join(cells)} |"
        assert row in page.splitlines(), row
