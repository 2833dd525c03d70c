"""What the INT8 layers refuse to be made from: each error names the tensor, what it got and what it accepts."""

import pytest
from torch import nn

import pykernels
from pykernels.nn import Int8Linear
from tests.test_nn import CONFIGS, IN, OUT


class TestRefusals:
    @pytest.mark.parametrize(
        ("spoil", "error", "words"),
        [
            (lambda m: m.weight.data.__setitem__((0, 0), float("nan")), ValueError, r"proj\.weight: got NaN"),
            (lambda m: m.bias.data.__setitem__(0, float("inf")), ValueError, r"proj\.bias: got NaN or inf"),
            (lambda m: m.double(), TypeError, r"proj\.weight: got torch.float64 \[10, 24\], accepts a float32"),
        ],
    )
    def test_bad_weights(self, spoil, error, words) -> None:
        linear = nn.Linear(IN, OUT)
        spoil(linear)
        with pytest.raises(error, match=words):
            Int8Linear.from_float(linear, name="proj")

    def test_bad_arguments(self) -> None:
        with pytest.raises(TypeError, match=r"linear: got a Conv1d, accepts torch\.nn\.Linear"):
            Int8Linear.from_float(nn.Conv1d(2, 2, 1))
        with pytest.raises(TypeError, match="config: got BF16Config"):
            Int8Linear.from_float(nn.Linear(2, 2), pykernels.BF16Config())
        with pytest.raises(ValueError, match="group_size: got 7, accepts a divisor of in_features = 24"):
            Int8Linear.from_float(nn.Linear(IN, OUT), pykernels.Int8WeightOnlyConfig(group_size=7))
        with pytest.raises(ValueError, match="no statistics for the layer 'other'"):
            Int8Linear.from_float(nn.Linear(IN, OUT), CONFIGS["static"], name="other")
        with pytest.raises(ValueError, match="group_size: got 0"):
            pykernels.Int8WeightOnlyConfig(group_size=0)
        with pytest.raises(ValueError, match="threshold: got 0"):
            pykernels.Int8OutlierConfig(threshold=0)
