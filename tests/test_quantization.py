"""quantize_: what it converts and skips, ties and sharing, all or nothing, and its report."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pykernels
from pykernels import (
    BF16Config,
    FP16Config,
    Int8DynamicConfig,
    Int8OutlierConfig,
    Int8StaticConfig,
    Int8TrainingConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from pykernels.nn import CastLinear, Int8Embedding, Int8Linear, Int8OutlierLinear, Int8WeightOnlyLinear
from pykernels.quantization import calibrate


class Tiny(nn.Module):
    """An embedding tied to lm_head, two linears, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.down = nn.Linear(32, 16, bias=False)
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.lm_head(x + self.down(self.norm(self.up(x)).relu()))


TOKENS = torch.arange(12).view(2, 6)


def everything(module: nn.Module, name: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Int8DynamicConfig(), Int8Linear),
        (Int8WeightOnlyConfig(), Int8WeightOnlyLinear),
        (Int8WeightOnlyConfig(group_size=8), Int8WeightOnlyLinear),
        ("static", Int8Linear),
        ("outlier", Int8OutlierLinear),
        (Int8OutlierConfig(), Int8OutlierLinear),
        (BF16Config(), CastLinear),
        (FP16Config(), CastLinear),
    ],
)
def test_every_config_converts_and_stays_close(config: Any, kind: type) -> None:
    model = Tiny().eval()
    expected = model(TOKENS)
    if isinstance(config, str):
        calibration = calibrate(model, [TOKENS])
        config = Int8StaticConfig(calibration) if config == "static" else Int8OutlierConfig(2.5, calibration)
    report = quantize_(model, config)
    assert type(model.up) is type(model.down) is kind
    assert type(model.lm_head) is nn.Linear and type(model.embed) is nn.Embedding
    assert [row.name for row in report.converted] == ["up", "down"]
    assert {row.name: row.reason for row in report.skipped} == {
        "embed": "an embedding stays in float unless filter_fn selects it",
        "lm_head": "lm_head stays in float unless filter_fn selects it",
    }
    assert report.bytes_after < report.bytes_before
    error = (model(TOKENS) - expected).norm() / expected.norm()
    assert 0 < error < 0.02


def test_bytes_are_those_of_the_model() -> None:
    model = Tiny()
    report = quantize_(model, Int8DynamicConfig())
    rest = 4 * (20 * 16 + 2 * 32)  # the tied table once, the norm
    assert report.bytes_before == rest + 4 * (16 * 32 + 32 + 32 * 16)
    assert report.bytes_after == rest + (16 * 32 + 4 * 32 + 4 * 32) + (32 * 16 + 4 * 16)
    assert [row.bytes_after for row in report.converted] == [16 * 32 + 8 * 32, 32 * 16 + 4 * 16]


def test_filter_decides_alone() -> None:
    model = Tiny()
    report = quantize_(model, Int8DynamicConfig(), lambda module, name: name == "lm_head")
    assert [row.name for row in report.converted] == ["lm_head"]
    assert {row.reason for row in report.skipped} == {"filter_fn did not select it"}
    assert type(model.up) is nn.Linear


def test_training_config_keeps_the_parameters() -> None:
    model = Tiny()
    weight = model.up.weight
    report = quantize_(model, Int8TrainingConfig())
    assert [row.after for row in report.converted] == ["Int8TrainingLinear"] * 2
    assert model.up.weight is weight and type(model.lm_head) is nn.Linear
    model(TOKENS).square().mean().backward()
    assert weight.grad is not None
    again = quantize_(model, Int8TrainingConfig())
    assert not again.converted and {row.reason for row in again.skipped} > {"already converted"}
    quantize_(model, Int8DynamicConfig())  # after training, for inference
    assert type(model.up) is Int8Linear


class TestTiedWeights:
    def test_untouched_by_default(self) -> None:
        model = Tiny()
        quantize_(model, Int8DynamicConfig())
        assert model.lm_head.weight is model.embed.weight

    def test_head_alone_leaves_the_embedding(self) -> None:
        model = Tiny()
        before = model.embed.weight.clone()
        report = quantize_(model, Int8DynamicConfig(), lambda module, name: isinstance(module, nn.Linear))
        assert torch.equal(model.embed.weight, before)
        assert report.converted[-1].note == "weight was tied to embed"

    def test_both_share_their_codes(self) -> None:
        model = Tiny().eval()
        expected = model(TOKENS)
        report = quantize_(model, Int8WeightOnlyConfig(), everything_but_norms)
        assert type(model.embed) is Int8Embedding and type(model.lm_head) is Int8WeightOnlyLinear
        assert model.embed.weight is model.lm_head.weight and model.embed.scale is model.lm_head.scale
        assert report.converted[-1].note == "weight shared with embed"
        assert (model(TOKENS) - expected).norm() < 0.02 * expected.norm()


def everything_but_norms(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def test_shared_modules_are_converted_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleDict({"inner": shared})["inner"])
    report = quantize_(model, Int8DynamicConfig())
    assert model[0] is model[2] is model[3] and type(model[0]) is Int8Linear
    assert len(report.converted) == 1 and report.converted[0].names == ("0", "2", "3")


class TestAllOrNothing:
    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda m: m.down.weight.data.__setitem__((0, 0), float("nan")), r"down\.weight: got NaN"),
            (lambda m: m.down.weight.data.__setitem__((0, 0), float("-inf")), r"down\.weight: got NaN or inf"),
            (lambda m: m.up.bias.data.__setitem__(0, float("nan")), r"up\.bias: got NaN"),
        ],
    )
    def test_non_finite_weights(self, spoil: Any, words: str) -> None:
        model = Tiny()
        spoil(model)
        self.check_unchanged(model, Int8DynamicConfig(), ValueError, words)

    def test_group_size_that_does_not_divide(self) -> None:
        self.check_unchanged(Tiny(), Int8WeightOnlyConfig(group_size=24), ValueError, "group_size: got 24")
        # 32 divides the input of `down` only
        self.check_unchanged(Tiny(), Int8WeightOnlyConfig(group_size=32), ValueError, "in_features = 16")

    def test_a_filter_that_fails_late(self) -> None:
        def fails_at_down(module: nn.Module, name: str) -> bool:
            if name == "down":
                raise KeyError("stop")
            return isinstance(module, nn.Linear)

        self.check_unchanged(Tiny(), Int8DynamicConfig(), KeyError, "stop", fails_at_down)

    def check_unchanged(self, model: nn.Module, config: Any, error: Any, words: str, filter_fn: Any = None) -> None:
        modules = dict(model.named_modules())
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=words):
            quantize_(model, config, filter_fn)
        assert dict(model.named_modules()) == modules
        for name, value in model.state_dict().items():
            assert torch.equal(value.nan_to_num(), state[name].nan_to_num())


class TestSkips:
    def reasons(self, model: nn.Module, config: Any = None, filter_fn: Any = None) -> dict[str, str]:
        report = quantize_(model, config or Int8DynamicConfig(), filter_fn)
        return {row.name: row.reason for row in report.skipped}

    def test_already_converted(self) -> None:
        model = Tiny()
        quantize_(model, Int8DynamicConfig())
        up = model.up
        report = quantize_(model, Int8WeightOnlyConfig())
        assert model.up is up and not report.converted
        assert {row.name for row in report.skipped if row.reason == "already converted"} == {"up", "down"}

    def test_subclasses_and_parametrized_weights(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        model = nn.ModuleDict(
            {
                "scaled": Scaled(4, 4),
                "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
                "conv": nn.Conv1d(4, 4, 1),
            }
        )
        reasons = self.reasons(model)
        assert reasons == {
            "scaled": "a subclass of torch.nn.Linear, which may compute something else",
            "normed": "its weight is parametrized: remove the parametrization first",
            "conv": "not a torch.nn.Linear",
        }

    def test_dtypes_and_sizes(self) -> None:
        model = nn.ModuleDict(
            {"float64": nn.Linear(4, 4).double(), "wide": nn.Linear(131_072, 1, device="meta"), "ok": nn.Linear(4, 4)}
        )
        reasons = self.reasons(model)
        assert set(reasons) == {"float64", "wide"}
        assert "float64" in reasons["float64"] and "131071" in reasons["wide"]

    def test_layers_that_the_calibration_never_ran(self) -> None:
        model = Tiny()
        calibration = calibrate(model, [TOKENS], filter_fn=lambda module, name: name == "up")
        reasons = self.reasons(model, Int8StaticConfig(calibration))
        assert reasons["down"] == "the calibration never ran it" and type(model.up) is Int8Linear

    def test_embedding_needs_an_int8_weight_config(self) -> None:
        reasons = self.reasons(Tiny(), BF16Config(), everything_but_norms)
        assert reasons == {"embed": "BF16Config converts linear layers only"}


def test_attention_of_torch_keeps_working() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        report = quantize_(model, Int8DynamicConfig())
        y = model(x)  # the fused path of the encoder layer would read linear1.weight as float
    assert {row.name.rpartition(".")[2] for row in report.converted} == {"linear1", "linear2"}
    assert {row.name.rpartition(".")[2] for row in report.skipped} == {"out_proj"}
    assert 0 < (y - expected).norm() < 0.02 * expected.norm()


def test_mode_and_hooks_survive() -> None:
    model = Tiny().eval()
    model.down.train()
    calls = []
    handle = model.up.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    quantize_(model, Int8DynamicConfig())
    assert not model.up.training and model.down.training
    model(TOKENS)
    assert calls == [Int8Linear]
    handle.remove()
    model(TOKENS)
    assert len(calls) == 1


def test_half_models() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = Tiny().to(dtype).eval()
        quantize_(model, Int8DynamicConfig())
        assert model.up.bias.dtype == dtype and model.up.scale.dtype == torch.float32
        assert model(TOKENS).dtype == dtype


def test_on_the_meta_device_then_loaded() -> None:
    source = Tiny().eval()
    quantize_(source, Int8DynamicConfig())
    with torch.device("meta"):
        model = Tiny().eval()
    quantize_(model, Int8DynamicConfig())
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(TOKENS), source(TOKENS))


def test_compiles_without_graph_breaks() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    quantize_(model, Int8DynamicConfig())
    x = torch.randn(3, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


class TestReport:
    def test_reads_as_a_table(self) -> None:
        report = quantize_(Tiny(), Int8DynamicConfig())
        text = str(report)
        assert text.splitlines()[0].startswith("Int8DynamicConfig: 2 converted, 2 skipped")
        for words in ("up", "Linear -> Int8Linear", "lm_head", "skipped: lm_head stays in float"):
            assert words in text
        assert "\x1b" not in text and max(map(len, text.splitlines())) <= 120

    def test_refuses_what_it_cannot_convert(self) -> None:
        with pytest.raises(TypeError, match="model: got a dict, accepts"):
            quantize_({}, Int8DynamicConfig())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"config: got <class .*Int8DynamicConfig'>, accepts one of"):
            quantize_(Tiny(), Int8DynamicConfig)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"Int8Linear\.from_float"):
            quantize_(nn.Linear(2, 2), Int8DynamicConfig())


def test_everything_is_exported_at_the_top() -> None:
    for name in ("quantize_", "Int8TrainingConfig", "Int8StaticConfig", "Int8OutlierConfig"):
        assert getattr(pykernels, name) is getattr(pykernels.quantization, name)
