"""smooth_: which folds it finds, that the float model computes what it did, and that INT8 gains from it."""

import copy

import pytest
import torch
from torch import nn

from pykernels import Int8DynamicConfig, quantize_
from pykernels.quantization import calibrate, smooth_

transformers = pytest.importorskip("transformers")

TOKENS = [torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def llama(kv_heads: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    return spread(transformers.LlamaForCausalLM(config).eval())


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return spread(transformers.BertModel(config, add_pooling_layer=False).eval())


def spread(model: nn.Module) -> nn.Module:
    """Give the norms a few large channels, as trained models have, and biases and weights that are not all alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.mul_(torch.randn(parameter.shape).exp())
                parameter[::7] *= 30
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, torch.Tensor) else result[0]


def int8_error(model: nn.Module, reference: nn.Module) -> float:
    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicConfig())
    pairs = [(output(model, tokens), output(reference, tokens)) for tokens in TOKENS]
    return sum(((y - expected).norm() / expected.norm()).item() for y, expected in pairs)


class TestLlama:
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_folds_every_layer_and_changes_no_bit(self, kv_heads: int) -> None:
        model = llama(kv_heads)
        original = copy.deepcopy(model)
        report = smooth_(model, TOKENS)
        layer = "model.layers.0."
        attention = layer + "self_attn."
        assert report.folded[layer + "input_layernorm"] == tuple(attention + p + "_proj" for p in "kqv")
        assert report.folded[layer + "post_attention_layernorm"] == (layer + "mlp.gate_proj", layer + "mlp.up_proj")
        assert report.folded[attention + "v_proj"] == (attention + "o_proj",)
        assert report.folded[layer + "mlp.up_proj"] == (layer + "mlp.down_proj",)
        assert report.unsmoothed == {} and len(report.folded) == 8
        assert not torch.equal(
            model.model.layers[0].self_attn.o_proj.weight, original.model.layers[0].self_attn.o_proj.weight
        )
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, original.lm_head.weight)
        for tokens in TOKENS:
            assert torch.equal(output(model, tokens), output(original, tokens))

    def test_int8_gains(self) -> None:
        model = llama()
        original = copy.deepcopy(model)
        before = int8_error(model, original)
        smooth_(model, TOKENS)
        assert int8_error(model, original) < 0.6 * before

    def test_evens_out_the_inputs(self) -> None:
        model = llama()
        name = "model.layers.1.mlp.gate_proj"

        def unevenness() -> float:
            columns = calibrate(model, TOKENS).inputs[name].column_absmax
            return (columns.max() / columns.median()).item()

        before = unevenness()
        smooth_(model, TOKENS, alpha=1.0)
        assert before > 10 and unevenness() < 3

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_models_change_no_bit(self, dtype: torch.dtype) -> None:
        model = llama().to(dtype)
        expected = output(model, TOKENS[0])
        report = smooth_(model, TOKENS)
        assert report.folded
        assert torch.equal(output(model, TOKENS[0]), expected)

    def test_decoding_with_a_cache_is_the_same(self) -> None:
        model = llama()
        arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(TOKENS[0], **arguments)
        smooth_(model, TOKENS)
        assert torch.equal(model.generate(TOKENS[0], **arguments), expected)


def test_bert_norms_feed_the_residual_so_only_attention_folds() -> None:
    model = bert()
    expected = output(model, TOKENS[0])
    report = smooth_(model, TOKENS)
    attention = "encoder.layer.{}.attention."
    assert report.folded == {
        attention.format(i) + "self.value": (attention.format(i) + "output.dense",) for i in range(2)
    }
    reason = report.unsmoothed["encoder.layer.0.attention.self.query"]
    assert reason == "the output of embeddings.LayerNorm is also read by other than linear layers"
    assert "encoder.layer.1.output.dense" in report.unsmoothed
    torch.testing.assert_close(output(model, TOKENS[0]), expected, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """A norm and two linears, in variants that must or must not fold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        spread(self)
        if kind == "tied":
            self.other = nn.Linear(16, 24)
            self.other.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        if self.kind == "slice":
            return self.down(self.up(hidden).relu()) + hidden[..., :1]
        if self.kind == "keyword":
            return self.down(input=nn.functional.gelu(self.up(input=hidden)))
        if self.kind == "shape":
            return self.down(self.up(hidden).relu()) * hidden.shape[-1]
        if self.kind == "twice":
            return self.down(self.up(hidden).relu()) + self.down(self.up(x).relu())
        if self.kind == "tied":
            return self.down((self.up(hidden) + self.other(x)).relu())
        return self.down(nn.functional.gelu(self.up(hidden)))


class OffsetNorm(nn.Module):
    """RMS norm that multiplies by 1 + weight, as Gemma's does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 4.0, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


X = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.mark.parametrize(
    ("kind", "folded", "words"),
    [
        ("gelu", {"norm": ("up",)}, "not channel by channel"),
        ("keyword", {"norm": ("up",)}, "not channel by channel"),
        ("shape", {"norm": ("up",), "up": ("down",)}, ""),  # reading the shape reads no values; ReLU passes factors
        ("slice", {"up": ("down",)}, "the output of norm is also read by other than linear layers"),
        ("twice", {}, "comes from no norm"),
        ("tied", {}, "tied"),
    ],
)
def test_folds_only_what_nothing_else_reads(kind: str, folded: dict[str, tuple[str, ...]], words: str) -> None:
    model = Block(kind)
    expected = output(model, X[0])
    report = smooth_(model, X)
    assert report.folded == folded
    assert words in " ".join(report.unsmoothed.values())
    torch.testing.assert_close(output(model, X[0]), expected, rtol=1e-5, atol=1e-4)


def test_norms_with_an_offset() -> None:
    model = Block("gelu")
    model.norm = OffsetNorm()
    expected = output(model, X[0])
    assert smooth_(model, X).folded["norm"] == ("up",)
    torch.testing.assert_close(output(model, X[0]), expected, rtol=1e-4, atol=1e-4)


def test_a_fold_that_changes_the_output_is_undone() -> None:
    class Leaky(nn.Module):
        """Reads the norm's weight behind the tracer's back."""

        def __init__(self) -> None:
            super().__init__()
            self.block = Block("gelu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x) + x * self.block.norm.weight

    model = Leaky()
    before = copy.deepcopy(model.state_dict())
    report = smooth_(model, X)
    assert report.folded == {}
    assert report.unsmoothed["block.up"] == "folding into block.norm changed the model's output"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestCare:
    def test_an_error_leaves_the_model_as_it_was(self) -> None:
        model = Block("gelu").train()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"layer up got NaN"):
            smooth_(model, [X[0], X[1] * float("nan")])
        assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"alpha: got 1\.5"):
            smooth_(Block("gelu"), X, alpha=1.5)
        with pytest.raises(ValueError, match="batches: got none"):
            smooth_(Block("gelu"), [])
        with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
            smooth_(Block("gelu"), X, filter_fn=lambda module, name: False)

    def test_report_reads_as_a_table(self) -> None:
        text = str(smooth_(Block("gelu"), X))
        assert text.splitlines()[0] == "smoothed 1 layers with alpha 0.5, 1 left as they were"
        assert "folded into norm" in text and "not channel by channel" in text
