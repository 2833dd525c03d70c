"""Observers against brute force over all the data at once, and calibrate's care for the model."""

import math

import pytest
import torch
from torch import nn

from pykernels.quantization import calibrate
from pykernels.quantization.observers import (
    OBSERVERS,
    AbsmaxObserver,
    EntropyObserver,
    HistogramObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
)


def batches(count: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """Batches whose range grows and shrinks, with a few outliers in one."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(40, 25, generator=generator) * scale for scale in (0.1, 1.0, 3.0, 0.5, 2.0, 1.0)[:count]]
    made[2][0, :3] = torch.tensor([30.0, -41.5, 25.0])
    return made


def watch(observer, data):
    for batch in data:
        observer.update(batch)
    return observer


def test_absmax_is_the_maximum() -> None:
    assert watch(AbsmaxObserver(), batches()).threshold() == 41.5


def test_moving_average_is_the_recurrence() -> None:
    expected = None
    for batch in batches():
        value = batch.abs().max().item()
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    assert math.isclose(watch(MovingAverageObserver(), batches()).threshold(), expected, rel_tol=1e-5)


def test_histogram_counts_every_value_in_its_bin() -> None:
    observer = watch(HistogramObserver(bins=64), batches())
    everything = torch.cat(batches()).abs().flatten().double()
    width = observer.range / 64
    expected = torch.bincount((everything / width).long().clamp(max=63), minlength=64)
    assert observer.counts.sum() == everything.numel()
    # A value within float32 rounding of an edge may fall on either side of it.
    assert (observer.counts - expected).abs().sum() <= 2
    assert observer.range / 2 < 41.5 <= observer.range


def test_histogram_starts_at_the_first_batch_that_is_not_zero() -> None:
    observer = watch(HistogramObserver(bins=8), [torch.zeros(5), torch.tensor([1.0, 2.0]), torch.tensor([0.0])])
    assert observer.range == 2.0 and observer.counts.tolist() == [6, 0, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile_is_the_quantile_to_one_bin(percentile: float) -> None:
    observer = watch(PercentileObserver(percentile), batches())
    everything = torch.cat(batches()).abs().flatten()
    exact = torch.quantile(everything, percentile / 100, interpolation="higher").item()
    assert abs(observer.threshold() - exact) <= observer.range / observer.bins


def test_mse_is_as_good_as_trying_every_threshold() -> None:
    everything = torch.cat(batches()).abs().flatten().double()

    def error(threshold: float) -> float:
        scale = threshold / 127
        return (everything - (everything / scale).round().clamp(max=127) * scale).square().mean().item()

    observer = watch(MSEObserver(), batches())
    best = min(error(41.5 * i / 256) for i in range(1, 257))
    assert error(observer.threshold()) <= 1.02 * best


def brute_force_entropy(counts: list[float], width: float, stride: int, levels: int, last: int) -> float:
    """TensorRT's search with plain loops."""
    best, best_cut = math.inf, 0
    for cut in range(levels, last + 1, stride):
        p = counts[:cut].copy()
        p[-1] += sum(counts[cut:])
        q = [0.0] * cut
        for level in range(levels):
            members = [i for i in range(cut) if i * levels // cut == level]
            filled = [i for i in members if counts[i] > 0]
            for i in filled:
                q[i] = sum(counts[j] for j in members) / len(filled)
        total_p, total_q = sum(p), sum(q)
        divergence = sum(
            a / total_p * math.log((a / total_p) / max(b / total_q, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0
        )
        if divergence < best:
            best, best_cut = divergence, cut
    return best_cut * width


@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_is_the_brute_force_search(seed: int) -> None:
    observer = watch(EntropyObserver(stride=4, bins=128, levels=16), batches(seed=seed))
    last = min(128, int(observer.absmax / observer.range * 128) + 1)
    expected = brute_force_entropy(observer.counts.tolist(), observer.range / 128, 4, 16, last)
    assert math.isclose(observer.threshold(), min(expected, observer.absmax), rel_tol=1e-9)
    assert observer.threshold() < 41.5  # three outliers do not set the range


@pytest.mark.parametrize("name", OBSERVERS)
def test_zeros_and_constants(name: str) -> None:
    assert OBSERVERS[name]().threshold() == 0.0
    assert watch(OBSERVERS[name](), [torch.zeros(4, 4)] * 2).threshold() == 0.0
    threshold = watch(OBSERVERS[name](), [torch.full((4, 4), -3.0)] * 2).threshold()
    assert math.isclose(threshold, 3.0, rel_tol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBSERVERS)
def test_half_precision_inputs(name: str, dtype: torch.dtype) -> None:
    expected = watch(OBSERVERS[name](), [batch.to(dtype).float() for batch in batches()]).threshold()
    assert watch(OBSERVERS[name](), [batch.to(dtype) for batch in batches()]).threshold() == expected


def test_bad_settings() -> None:
    for make, words in (
        (lambda: PercentileObserver(0.0), "percentile: got 0.0"),
        (lambda: HistogramObserver(bins=7), "bins: got 7"),
        (lambda: EntropyObserver(bins=64), "bins: got 64, accepts at least levels = 128"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


class TestCalibrate:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))

    @pytest.mark.parametrize("observer", OBSERVERS)
    def test_statistics_and_kinds_of_batches(self, observer: str) -> None:
        model = self.model()
        x, y = torch.randn(5, 6), torch.randn(2, 4, 6) * 3
        result = calibrate(model, iter([x, [y], {"input": x}]), observer)
        assert list(result.inputs) == ["0", "3"] and result.observer == observer
        assert result.inputs["0"].rows == 5 + 8 + 5
        everything = torch.cat([x, y.reshape(-1, 6)])
        assert torch.equal(result.inputs["0"].column_absmax, everything.abs().amax(0))
        assert 0 < result.inputs["0"].threshold <= everything.abs().max()
        assert result.input_scale("0") == torch.tensor(result.inputs["0"].threshold / 127)
        hot = everything.abs().amax(0).max().item()
        assert result.outlier_columns("0", hot - 1e-6).tolist() == [everything.abs().amax(0).argmax().item()]

    def test_leaves_the_model_as_it_was(self) -> None:
        model = self.model().train()
        model[3].eval()
        calibrate(model, [torch.randn(2, 6)])
        assert [module.training for module in model] == [True, True, True, False]
        with pytest.raises(ValueError, match="layer 0 got NaN"):
            calibrate(model, [torch.randn(2, 6), torch.full((2, 6), float("inf"))])
        assert [module.training for module in model] == [True, True, True, False]
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match="observer: got 'max', accepts 'absmax'"):
            calibrate(self.model(), [torch.randn(2, 6)], "max")
        with pytest.raises(ValueError, match="batches: got none"):
            calibrate(self.model(), [])
        with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
            calibrate(nn.ReLU(), [torch.randn(2, 6)])
        result = calibrate(self.model(), [torch.randn(2, 6)])
        with pytest.raises(ValueError, match="no statistics for the layer 'x'"):
            result.input_scale("x")

    def test_shows_a_bar_when_asked(self, capfd: pytest.CaptureFixture[str]) -> None:
        calibrate(self.model(), [torch.randn(2, 6)] * 3, progress=True)
        quiet_output = capfd.readouterr()
        assert quiet_output.out == ""
        calibrate(self.model(), [torch.randn(2, 6)] * 3, progress=False)
        assert capfd.readouterr() == ("", "")
