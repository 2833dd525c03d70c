"""Layers: drop-in behaviour, persistence, dtype and device moves, gradients, and what they refuse to load."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pykernels
from pykernels.nn import (
    CastLinear,
    Int8Embedding,
    Int8GroupedLinear,
    Int8Linear,
    Int8OutlierLinear,
    Int8WeightOnlyLinear,
)
from pykernels.quantization import CalibrationResult, InputStatistics

IN, OUT = 24, 10


def calibration(name: str = "layer") -> CalibrationResult:
    columns = torch.ones(IN)
    columns[[3, 17]] = 50.0
    return CalibrationResult("absmax", {name: InputStatistics(50.0, columns, columns, 4)})


CONFIGS = {
    "dynamic": pykernels.Int8DynamicConfig(),
    "static": pykernels.Int8StaticConfig(calibration()),
    "weight_only": pykernels.Int8WeightOnlyConfig(),
    "grouped": pykernels.Int8WeightOnlyConfig(group_size=8),
    "outlier_columns": pykernels.Int8OutlierConfig(calibration=calibration()),
    "outlier_rows": pykernels.Int8OutlierConfig(),
}
CLASSES = {
    "dynamic": Int8Linear,
    "static": Int8Linear,
    "weight_only": Int8WeightOnlyLinear,
    "grouped": Int8WeightOnlyLinear,
    "outlier_columns": Int8OutlierLinear,
    "outlier_rows": Int8OutlierLinear,
}


def make(kind: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    return linear, Int8Linear.from_float(linear, CONFIGS[kind], name="layer")


def sample() -> torch.Tensor:
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1))
    x[..., [3, 17]] *= 15
    return x.clamp(-50, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_linear_is_a_drop_in(kind: str, bias: bool, dtype: torch.dtype) -> None:
    linear, layer = make(kind, bias, dtype)
    assert type(layer) is CLASSES[kind]
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert list(layer.parameters()) == []
    assert layer.weight.dtype == torch.int8 and layer.scale.dtype == torch.float32
    x = sample().to(dtype)
    y, expected = layer(input=x), linear(input=x)
    assert y.shape == expected.shape and y.dtype == dtype
    # Every code is at most half a step off, so elementwise: |dy| <= dx * sum|w| + dw * (sum|x| + K dx).
    rows = {"weight_only": 0.0, "grouped": 0.0, "static": 50.0}.get(kind, x.float().abs().amax(-1, keepdim=True))
    dx = torch.as_tensor(rows) / 254
    dw = linear.weight.float().abs().amax(1) / 254
    bound = dx * linear.weight.float().abs().sum(1) + dw * (x.float().abs().sum(-1, keepdim=True) + IN * dx)
    rounding = 4 * torch.finfo(dtype).eps * (x.float().abs().sum(-1, keepdim=True) * dw * 127 + 1)
    assert ((y - expected).float().abs() <= bound + rounding).all()


class TestOutliers:
    def test_columns_are_exact_and_keep_the_rest_accurate(self) -> None:
        linear, layer = make("outlier_columns")
        assert layer.outlier_columns.tolist() == [3, 17]
        assert not layer.weight[:, [3, 17]].any()
        assert torch.equal(layer.outlier_weight, linear.weight[:, [3, 17]])
        x = torch.zeros(1, IN)
        x[0, 3], x[0, 17] = 40.0, -33.3
        torch.testing.assert_close(layer(x), linear(x))
        x = sample()
        error = (layer(x) - linear(x)).abs().mean()
        assert error < 0.3 * (make("dynamic")[1](x) - linear(x)).abs().mean()

    def test_a_row_does_not_depend_on_its_neighbours(self) -> None:
        for kind in ("outlier_columns", "outlier_rows"):
            layer = make(kind)[1]
            x = sample().reshape(-1, IN)
            torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-6, atol=1e-6)

    def test_no_outliers_is_the_dynamic_layer(self) -> None:
        linear, dynamic = make("dynamic")
        quiet = pykernels.Int8OutlierConfig(threshold=100.0, calibration=calibration())
        layer = Int8Linear.from_float(linear, quiet, name="layer")
        assert layer.outlier_columns.numel() == 0
        assert torch.equal(layer(sample()), dynamic(sample()))


def test_static_saturates_at_the_calibrated_range() -> None:
    layer = make("static", bias=False)[1]
    assert layer.input_scale == torch.tensor(50.0 / 127)
    x = torch.full((1, IN), 50.0)
    assert torch.equal(layer(x), layer(x * 3))


@pytest.mark.parametrize("kind", CONFIGS)
def test_to_float_is_the_dequantised_layer(kind: str) -> None:
    linear, layer = make(kind)
    restored = layer.to_float()
    assert type(restored) is nn.Linear and restored.weight.requires_grad
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((restored.weight - linear.weight).abs() <= 0.5001 * step).all()
    assert torch.equal(restored.bias, linear.bias)
    assert restored.bias.data_ptr() != layer.bias.data_ptr()
    again = Int8Linear.from_float(restored, CONFIGS[kind], name="layer")
    assert torch.equal(again.weight, layer.weight)
    assert layer.to_float(torch.bfloat16).weight.dtype == torch.bfloat16


def embedding() -> Int8Embedding:
    torch.manual_seed(0)
    return Int8Embedding.from_float(nn.Embedding(12, 8, padding_idx=3))


def experts() -> Int8GroupedLinear:
    torch.manual_seed(0)
    return Int8GroupedLinear.from_float([nn.Linear(IN, OUT) for _ in range(3)])


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{kind: (lambda kind=kind: make(kind)[1]) for kind in CONFIGS},
    "embedding": embedding,
    "experts": experts,
}


def call(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, Int8Embedding):
        return layer(torch.tensor([[0, 3], [11, 5]]))
    dtype = layer.bias.dtype
    if isinstance(layer, Int8GroupedLinear):
        return layer(sample().reshape(-1, IN).to(dtype), torch.tensor([4, 0, 5]))
    return layer(sample().to(dtype))


@pytest.mark.parametrize("make_layer", LAYERS.values(), ids=LAYERS.keys())
class TestPersistence:
    def fresh(self, make_layer: Callable[[], nn.Module]) -> nn.Module:
        layer = make_layer()
        for name, buffer in layer.named_buffers():
            if name != "outlier_columns":
                buffer.zero_()
        return layer

    def test_state_dict_holds_plain_tensors(self, make_layer, tmp_path) -> None:
        layer = make_layer()
        state = layer.state_dict()
        assert all(type(value) is torch.Tensor for value in state.values())
        assert {"weight", "scale"} <= state.keys()
        call(layer)  # whatever a kernel caches at the first call must not show
        assert layer.state_dict().keys() == state.keys()
        save_file(state, tmp_path / "layer.safetensors")
        other = self.fresh(make_layer)
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        assert torch.equal(call(other), call(layer))

    def test_torch_save_weights_only(self, make_layer) -> None:
        layer, file = make_layer(), io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = self.fresh(make_layer)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(call(other), call(layer))

    def test_assign_on_the_meta_device(self, make_layer) -> None:
        layer = make_layer()
        other = make_layer().to("meta")
        other.load_state_dict(layer.state_dict(), assign=True)
        if isinstance(other, Int8Embedding):
            assert torch.equal(other.weight, layer.weight) and torch.equal(other.scale, layer.scale)
        else:
            assert torch.equal(call(other), call(layer))

    def test_copies(self, make_layer) -> None:
        layer = make_layer()
        expected = call(layer)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer) and repr(other) == repr(layer)
            assert torch.equal(call(other), expected)
            other.weight.zero_()
        assert torch.equal(call(layer), expected)

    def test_casts_leave_codes_and_scales(self, make_layer) -> None:
        layer = make_layer()
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16), lambda m: m.type(torch.half)):
            other = cast(copy.deepcopy(layer))
            for name, value in other.state_dict().items():
                if name in ("bias", "outlier_weight"):
                    assert value.dtype in (torch.float16, torch.bfloat16)
                else:
                    assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
            assert call(other).dtype in (torch.float16, torch.bfloat16)
            back = other.float()
            assert torch.equal(back.scale, before["scale"])

    def test_devices(self, make_layer) -> None:
        layer = make_layer().to("meta", torch.bfloat16)
        assert {value.device.type for value in layer.state_dict().values()} == {"meta"}
        assert layer.scale.dtype == torch.float32 and layer.weight.dtype == torch.int8
        empty = layer.to_empty(device="cpu")
        assert empty.weight.device.type == "cpu" and empty.weight.shape == make_layer().weight.shape


class TestBadStateDict:
    @pytest.mark.parametrize(
        ("key", "change", "words"),
        [
            ("weight", lambda s: s["weight"].float(), ["0.weight", "torch.float32 [10, 24]", "torch.int8 [10, 24]"]),
            ("weight", lambda s: s["weight"][:, :8], ["0.weight", "[10, 8]", "[10, 24]"]),
            ("scale", None, ["0.scale", "missing", "torch.float32 [10]"]),
            ("bias", None, ["0.bias", "missing"]),
            ("scale", lambda s: s["scale"].half(), ["0.scale", "torch.float16", "torch.float32"]),
            ("scale", lambda s: s["scale"][:5], ["0.scale", "[5]", "[10]"]),
            ("scale", lambda s: s["scale"] / 0, ["0.scale", "infinite", "finite"]),
            ("bias", lambda s: s["bias"].int(), ["0.bias", "torch.int32"]),
            ("bias", lambda s: "text", ["0.bias", "a str"]),
            ("input_scale", lambda s: torch.ones(()), ["0.input_scale", "another config"]),
        ],
    )
    def test_names_key_got_and_accepts(self, key, change, words) -> None:
        model = nn.Sequential(make("dynamic")[1])
        before = copy.deepcopy(model.state_dict())
        state = {name: value.clone() + 1 if name.endswith("bias") else value for name, value in before.items()}
        plain = {name.removeprefix("0."): value for name, value in state.items()}
        if change is None:
            del state[f"0.{key}"]
        else:
            state[f"0.{key}"] = change(plain)
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(state, strict=False)
        for word in words:
            assert word in str(error.value)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])

    def test_absent_layer_is_a_missing_key(self) -> None:
        model = nn.Sequential(make("dynamic")[1])
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({})
        result = model.load_state_dict({}, strict=False)
        assert set(result.missing_keys) == {"0.weight", "0.scale", "0.bias"}

    def test_outlier_checkpoints_may_differ_in_columns(self) -> None:
        layer = make("outlier_columns")[1]
        empty = Int8OutlierLinear(IN, OUT, columns=0)
        empty.load_state_dict(layer.state_dict())
        assert torch.equal(empty(sample()), layer(sample()))
        state = layer.state_dict() | {"outlier_columns": torch.tensor([3, IN])}
        with pytest.raises(RuntimeError, match=r"outlier_columns: accepts indices in \[0, 24\)"):
            empty.load_state_dict(state)
        state = layer.state_dict() | {"outlier_columns": torch.tensor([3])}
        with pytest.raises(RuntimeError, match="outlier_weight: got 2 columns, accepts 1"):
            empty.load_state_dict(state)


class TestGradients:
    @pytest.mark.parametrize("kind", ["dynamic", "static", "weight_only", "outlier_columns", "outlier_rows"])
    def test_flow_to_x_and_bias(self, kind: str) -> None:
        _, layer = make(kind)
        layer.bias.requires_grad_()
        x = sample().requires_grad_()
        y = layer(x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        y.backward(grad)
        weight = layer.dequantized_weight()
        torch.testing.assert_close(x.grad, grad @ weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)), rtol=1e-4, atol=1e-5)

    def test_lora_on_a_frozen_base_learns(self) -> None:
        class LoRA(nn.Module):
            def __init__(self, base: nn.Module) -> None:
                super().__init__()
                self.base = base
                self.down = nn.Linear(IN, 4, bias=False)
                self.up = nn.Linear(4, OUT, bias=False)
                nn.init.zeros_(self.up.weight)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.base(x) + self.up(self.down(x))

        torch.manual_seed(0)
        first, second = make("dynamic")[1], Int8Linear.from_float(nn.Linear(OUT, 3))
        model = nn.Sequential(LoRA(first), second)  # the gradient of the adapter passes through the second layer
        frozen = copy.deepcopy(first.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        x = torch.randn(64, IN)
        target = x @ torch.randn(IN, 3) * 0.3
        losses = []
        for _ in range(60):
            loss = nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.3 * losses[0]
        assert all(torch.equal(value, frozen[name]) for name, value in first.state_dict().items())


def test_fsdp_shards_around_frozen_int8_buffers(tmp_path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN), make("dynamic")[1], nn.Linear(OUT, 2))
    expected = model(sample())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        y = model(sample())
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        assert model[0].weight.grad is not None
        assert type(model[1].weight) is torch.Tensor and model[1].weight.dtype == torch.int8
        assert model.state_dict()["1.scale"].dtype == torch.float32
    finally:
        dist.destroy_process_group()


class TestEmbedding:
    def test_looks_up_dequantised_rows(self) -> None:
        torch.manual_seed(0)
        table = nn.Embedding(12, 8, padding_idx=3)
        layer = Int8Embedding.from_float(table)
        indices = torch.tensor([[0, 3], [11, 5]])
        half_step = table(indices).abs().amax(-1, keepdim=True) * 0.5001 / 127
        assert ((layer(indices) - table(indices)).abs() <= half_step).all()
        assert not layer(torch.tensor(3)).any() and layer.padding_idx == 3
        assert torch.equal(layer.to_float()(indices), layer(indices))
        assert layer.bfloat16()(indices).dtype == torch.bfloat16 == layer.dtype

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"table\.max_norm: got 1.0, accepts None"):
            Int8Embedding.from_float(nn.Embedding(3, 2, max_norm=1.0), name="table")
        with pytest.raises(TypeError, match="Linear"):
            Int8Embedding.from_float(nn.Linear(3, 2))


def test_cast_linear_answers_in_the_dtype_of_its_input() -> None:
    linear = nn.Linear(IN, OUT)
    layer = CastLinear.from_float(linear, torch.bfloat16)
    x = sample()
    assert layer(x).dtype == torch.float32 and layer(x.half()).dtype == torch.float16
    torch.testing.assert_close(layer(x), linear(x), rtol=0.05, atol=0.2)
    linear.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"head\.weight: .*float16"):
        CastLinear.from_float(linear, torch.float16, name="head")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_moves_to_cuda_and_back(kind: str) -> None:
    layer = make(kind, dtype=torch.float16)[1]
    x = sample().half()
    expected = layer(x)
    moved = copy.deepcopy(layer).cuda()
    assert {value.device.type for value in moved.state_dict().values()} == {"cuda"}
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=2e-3, atol=2e-3)
    back = moved.cpu()
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in back.state_dict().items())
