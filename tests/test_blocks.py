"""The blocks: every value of the dial gives the same bits, right ones, and inner layers stay replaceable."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pykernels
import pykernels.functional as F
from pykernels import Int8TrainingConfig, quantize_
from pykernels import nn as pnn
from pykernels.ops import attention as attention_op

SAVE = pnn._save.SAVE
EXACT = [save for save in SAVE if save not in ("all", "int8")]
HIDDEN, HEADS, KV, WIDE = 64, 8, 2, 224


def block(dtype: torch.dtype = torch.float32, **options: object) -> pnn.TransformerBlock:
    torch.manual_seed(0)
    sizes = {"num_kv_heads": KV, "intermediate_size": WIDE, "max_position_embeddings": 32}
    layer = pnn.TransformerBlock(HIDDEN, HEADS, **(sizes | options))
    for name, parameter in layer.named_parameters():
        if "norm" in name:  # away from 1 and 0, which would hide a missing factor
            nn.init.uniform_(parameter, 0.5, 1.5)
    return layer.to(dtype)


def results(layer: nn.Module, x: Tensor, autocast: bool = False, **arguments: object) -> list[Tensor]:
    """Output, gradient of x, gradients of the parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x, **arguments)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters() if p.grad is not None]]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for place, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"result {place}: {(a - b).abs().max()}"


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


FORMS = {
    "pre": {},
    "post": {"norm": "post"},
    "pre, biases, tanh": {"bias": True, "activation": "gelu_tanh"},
    "post, qkv biases, gelu": {"norm": "post", "bias": "qkv", "activation": "gelu"},
    "dropout": {"dropout": 0.3},
    "post, dropout": {"norm": "post", "dropout": 0.3},
    "partial rope, interleaved": {"rotary_dim": 4, "interleaved": True},
    "no rope, not causal": {"rope": False, "causal": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "float16", "autocast"],
)
def test_the_dial_changes_no_bit(form: str, dtype: torch.dtype, autocast: bool) -> None:
    layer = block(dtype, save="all", **FORMS[form])
    x = torch.randn(2, 13, HIDDEN).to(dtype)
    expected = results(layer, x, autocast)
    for save in EXACT:
        layer.save = save
        got = results(layer, x, autocast)
        if dtype == torch.float16:
            # PyTorch's own float16 products on a CPU with AVX-512 are not the same bits each time ("checkpoint", which
            # is autograd alone, differs too), so a weight's gradient may be rounded the other way.
            assert_equal(got[:2], expected[:2])
            assert all(distance(a, b) <= torch.finfo(dtype).eps for a, b in zip(got, expected, strict=True))
        else:
            assert_equal(got, expected)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_exact_forward_and_close_backward(norm: str, dtype: torch.dtype) -> None:
    """Rounded to 1 / 254 of a group's largest value, the kept tensors are off by 0.7 % in the mean square; the bound is
    three times that. A scale of the wrong group, or a code off by a few steps, is far outside."""
    layer = block(dtype, save="all", norm=norm)
    x = torch.randn(2, 13, HIDDEN).to(dtype)
    expected = results(layer, x)
    layer.save = "int8"
    got = results(layer, x)
    assert torch.equal(got[0], expected[0])
    assert all(distance(a, b) < 0.02 for a, b in zip(got[1:], expected[1:], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(got[1:], expected[1:], strict=True))


def test_int8_gradients_are_those_of_the_rounded_tensors() -> None:
    """Bit for bit: the exact nodes, with their saved h, gate and up replaced by what INT8 holds of them."""
    torch.manual_seed(0)
    x, weight, down = torch.randn(3, 200), torch.randn(48, 200) * 0.1, torch.randn(16, 24)
    gate, up, norm_weight = torch.randn(3, 24), torch.randn(3, 24), torch.rand(200)

    def gradients(group_size: int | None) -> list[Tensor]:
        a = [t.clone().requires_grad_() for t in (x, weight, norm_weight, gate, up, down)]
        y = F.norm_linear(a[0], a[1], norm_weight=a[2], group_size=group_size)
        z = F.glu_linear(a[3], a[4], a[5], group_size=group_size)
        return list(torch.autograd.grad((y.sum() + y.square().sum(), z.sin().sum()), a, (torch.ones(()),) * 2))

    def rounded(saved: Tensor) -> Tensor:
        if saved.shape not in (x.shape, gate.shape):
            return saved
        return F.dequantize_blockwise(*F.quantize_blockwise(saved, 64), 64, saved.dtype)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, rounded):
        expected_norm = gradients(None)
    got = gradients(64)
    # y itself is saved by square(), and has another shape
    assert_equal(got, expected_norm)


class Eager(nn.Module):
    """The two forms in plain PyTorch, for float64 truth; reads a block's parameters."""

    def __init__(self, layer: pnn.TransformerBlock) -> None:
        super().__init__()
        self.layer = layer

    def normalise(self, norm: nn.Module, x: Tensor) -> Tensor:
        if isinstance(norm, nn.LayerNorm):
            return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return nn.functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)

    def attend(self, x: Tensor) -> Tensor:
        a = self.layer.self_attn
        q, k, v = (p(x).unflatten(-1, (-1, HIDDEN // HEADS)) for p in (a.q_proj, a.k_proj, a.v_proj))
        cos, sin = (t[: x.shape[1], None].to(x.dtype) for t in F.rope_tables(HIDDEN // HEADS, 32))
        halves = [t.chunk(2, -1) for t in (q, k)]
        q, k = (torch.cat((first * cos - second * sin, second * cos + first * sin), -1) for first, second in halves)
        k, v = (t.repeat_interleave(HEADS // KV, 2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (HIDDEN // HEADS) ** -0.5
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
        return a.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        mlp = lambda n: layer.mlp.down_proj(nn.functional.silu(layer.mlp.gate_proj(n)) * layer.mlp.up_proj(n))  # noqa: E731
        if layer.norm == "pre":
            h = x + self.attend(self.normalise(layer.input_layernorm, x))
            return h + mlp(self.normalise(layer.post_attention_layernorm, h))
        h = self.normalise(layer.post_attention_layernorm, x + self.attend(x))
        return self.normalise(layer.post_feedforward_layernorm, h + mlp(h))


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_plain_pytorch(norm: str, dtype: torch.dtype) -> None:
    """Against the same weights and input in float64: at most 1.5 times plain PyTorch's error in the same dtype."""
    layer = block(dtype, norm=norm, save="recompute_qkv")
    x = torch.randn(2, 13, HIDDEN).to(dtype)
    got, plain = results(layer, x), results(Eager(layer), x)
    truth = results(Eager(copy.deepcopy(layer).double()), x.double())
    for a, b, c in zip(got, plain, truth, strict=True):
        assert distance(a, c) <= 1.5 * distance(b, c) + 2**-24


@pytest.mark.parametrize("save", EXACT)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_in_float64(save: str, norm: str) -> None:
    torch.manual_seed(0)
    sizes = {"num_kv_heads": 1, "intermediate_size": 6, "max_position_embeddings": 4, "bias": True}
    layer = pnn.TransformerBlock(8, 2, norm=norm, save=save, **sizes).double()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True), *parameters)
    with pykernels.backend("reference"):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["torch", "plain"])
def test_grouped_attention_is_attention_with_expanded_heads(
    causal: bool, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernels, and the one for devices without any: 300 queries are more than one block of it."""
    if kernel == "plain":
        monkeypatch.setattr(attention_op, "_kernel", lambda *_: "plain")
    torch.manual_seed(0)
    shapes = [(2, 300, 6, 16), (2, 300, 2, 16), (2, 300, 2, 16)]
    wide = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    grad = torch.randn(*shapes[0], dtype=torch.float64)

    def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))
        heads = tuple(t.transpose(1, 2) for t in heads)
        return nn.functional.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)

    def run(function, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    narrow = [t.to(dtype) for t in wide]
    got = run(lambda *t: F.attention(*t, causal=causal), narrow)
    truth = run(expanded, [t.double() for t in narrow])
    for a, b, c in zip(got, run(expanded, narrow), truth, strict=True):
        assert distance(a, c) <= 1.5 * distance(b, c)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_odd_batches(shape: tuple[int, int]) -> None:
    for save in SAVE:
        layer = block(save=save)
        got = results(layer, torch.randn(*shape, HIDDEN))
        assert got[0].shape == (*shape, HIDDEN) and all(torch.isfinite(t).all() for t in got)


def test_strided_input_and_position_ids() -> None:
    x = torch.randn(2, 9, 2 * HIDDEN)[..., ::2]
    shifted = torch.arange(3, 12)
    for save in SAVE:
        layer = block(save=save)
        assert_equal(results(layer, x), results(layer, x.contiguous()))
        moved = results(layer, x, position_ids=shifted)
        tables = tuple(t[3:] for t in F.rope_tables(HIDDEN // HEADS, 12))
        assert_equal(moved, results(layer, x, tables=tables))


def test_second_backward_accumulation_and_inference() -> None:
    for save in SAVE:
        layer = block(save=save)
        x = torch.randn(2, 5, HIDDEN)
        y = layer(x)
        y.sum().backward(retain_graph=True)
        once = [p.grad.clone() for p in layer.parameters()]
        y.sum().backward()
        assert_equal([p.grad for p in layer.parameters()], [2 * g for g in once])
        with torch.no_grad():
            assert torch.equal(layer(x), y)


def test_frozen_parameters_get_no_gradient_and_the_others_theirs() -> None:
    x = torch.randn(2, 5, HIDDEN)
    for save in EXACT:
        layer, full = block(save=save), block(save=save)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("k_proj" in name or "up_proj" in name or name == "input_layernorm.weight")
        results(full, x)
        results(layer, x)
        for (name, a), b in zip(layer.named_parameters(), full.parameters(), strict=True):
            assert (a.grad is None) == (not a.requires_grad), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name


class Lora(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.parametrize("where", ["q_proj", "o_proj", "gate_proj", "down_proj"])
def test_a_wrapped_layer_is_called(where: str) -> None:
    """Within roundings of "all": where torch's checkpoint stands in, the stream is added up in another order."""
    layer = block(save="all")
    parent = layer.self_attn if where in ("q_proj", "o_proj") else layer.mlp
    setattr(parent, where, Lora(getattr(parent, where)))
    x = torch.randn(2, 5, HIDDEN)
    expected = results(layer, x)
    for save in EXACT:
        layer.save = save
        got = results(layer, x)
        assert len(got) == len(expected) and all(distance(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))


def test_hooks_and_replaced_modules_run() -> None:
    calls: list[str] = []
    for save in SAVE:
        layer = block(save=save)
        calls.clear()
        plain = layer(torch.ones(1, 3, HIDDEN))
        for name in ("self_attn.v_proj", "mlp.up_proj", "post_attention_layernorm", "mlp"):
            layer.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        torch.testing.assert_close(layer(torch.ones(1, 3, HIDDEN)), plain)
        assert sorted(set(calls)) == ["mlp", "mlp.up_proj", "post_attention_layernorm", "self_attn.v_proj"], save
        layer.mlp = nn.Identity()
        assert layer(torch.ones(1, 3, HIDDEN)).shape == plain.shape


def test_int8_training_layers_train() -> None:
    x = torch.randn(2, 64, HIDDEN)
    for save in ("inputs+preact", "recompute_mlp"):
        layer = block(save=save)
        expected = results(layer, x)
        quantize_(layer, Int8TrainingConfig(stochastic_rounding=False))
        got = results(layer, x)
        assert all(distance(a, b) < 0.05 for a, b in zip(got, expected, strict=True))
        assert distance(got[0], expected[0]) > 0


def test_copies_and_state_dicts() -> None:
    layer = block(save="int8")
    twin = copy.deepcopy(layer)
    assert twin.save == "int8"
    names = set(layer.state_dict())
    assert names == {
        *(f"self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    other = block(save="all", intermediate_size=WIDE)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, HIDDEN)
    assert torch.equal(twin(x), other(x))


def test_norm_linear_forms() -> None:
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    for norm in ("rms_norm", "layer_norm"):
        one = pnn.NormLinear(16, 8, norm=norm)
        assert torch.equal(one(x), one.linears[0](one.norm(x)))
        packed = pnn.NormLinear(16, (8, 4), norm=norm, packed=True, bias=True)
        outs = packed(x, residual, prenorm=True)
        assert [t.shape[-1] for t in outs] == [8, 4, 16] and torch.equal(outs[2], x + residual)
        for save in SAVE:
            packed.save = save
            assert all(torch.equal(a, b) for a, b in zip(packed(x, residual, prenorm=True), outs, strict=True))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: block(save="some"), "save: got 'some', accepts 'all', 'inputs\\+preact'"),
        (lambda: setattr(block(), "save", None), "save: got None, accepts"),
        (lambda: block(norm="middle"), "norm: got 'middle', accepts 'pre', 'post'"),
        (lambda: block(activation="swish"), "activation: got 'swish', accepts"),
        (lambda: block(dropout=1.5), "dropout: got 1.5"),
        (lambda: block(num_kv_heads=3), "num_kv_heads: got 3, accepts a divisor"),
        (lambda: pnn.Attention(10, 3), "num_heads: got 3, accepts a divisor"),
        (lambda: pnn.NormLinear(4, 4, norm="batch"), "norm: got 'batch'"),
        (lambda: pnn.GEGLUMLP(4, 4, approximate="erf"), "approximate: got 'erf'"),
        (lambda: F.norm_linear(torch.ones(2, 4), torch.ones(3, 4), norm="l2"), "expected norm to be one of"),
        (lambda: F.norm_linear(torch.ones(2, 4), torch.ones(3, 4), group_size=0), "expected group_size to be None"),
        (lambda: F.norm_linear(torch.ones(2, 4), [torch.ones(3, 4)], [None, None]), "expected bias to have one entry"),
        (lambda: F.glu_linear(torch.ones(2, 4), None, None, activation="relu6"), "expected activation to be one of"),
    ],
)
def test_values_are_checked(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: F.norm_linear(torch.ones(2, 4), torch.ones(3, 5)), "expected weights to have shape"),
        (lambda: F.norm_linear(torch.ones(2, 4), torch.ones(3, 4).bfloat16()), "expected each weight to be float32"),
        (lambda: F.norm_linear(torch.ones(2, 4).int(), torch.ones(3, 4).int()), "expected x to be"),
        (lambda: F.attention(*[torch.ones(1, 2, n, 4) for n in (3, 2, 2)]), "expected the 3 heads of q to be"),
        (lambda: F.attention(*[torch.ones(1, n, 2, 4) for n in (2, 3, 3)]), "expected k to have the 2 positions"),
        (lambda: F.attention(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4)), "expected q to have 4 dimensions"),
        (lambda: F.norm_mlp(torch.ones(2, 4), *[torch.ones(3, 4)] * 3), "expected down to have shape"),
        (
            lambda: F.norm_attention(torch.ones(1, 2, 4), *[torch.ones(6, 4)] * 3, head_dim=4),
            "expected the rows of each weight to be a multiple of head_dim",
        ),
    ],
)
def test_tensors_are_checked(call, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        call()


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(F.norm_linear(x, torch.randn(3, 4)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()
