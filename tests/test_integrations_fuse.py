"""fuse_ on small random models of every family: the numbers of transformers, fewer bytes, and the way back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from torch import Tensor, nn

from pykernels.bench.memory import saved_bytes
from pykernels.integrations.transformers import fuse_, unfuse_
from pykernels.memory import checkpoint_
from pykernels.memory.contract import GROUP, LayerShape, int8_row, saved_bytes_per_token
from tests import hf_families as hf
from tests.hf_families import CAUSAL, FAMILIES, WHOLE, batch, build, clone

DIAL = ("all", "inputs+preact", "int8", "recompute_mlp", "recompute_qkv", "checkpoint")
FIVE = int(transformers.__version__.split(".")[0]) >= 5
NO_QKV = ("qwen3", "gemma2", "gemma3", "gpt2", "bert")


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the loss, by name; the loss itself under ""."""
    model.zero_grad()
    loss = (
        model(**inputs).loss
        if isinstance(model, transformers.BertForMaskedLM)
        else model(**inputs, use_cache=False).loss
    )
    loss.backward()
    return {"": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def assert_as_exact(got: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """The error against float64 is at most twice eager's, and what two roundings of a typical gradient add; of the
    loss, a single number, whose error chance may cancel, four times."""
    assert got.keys() == eager.keys() == truth.keys()
    typical = rms(torch.cat([t.flatten() for name, t in truth.items() if name]) if len(truth) > 1 else truth[""])
    for name, exact in truth.items():
        rounding = 2 * torch.finfo(got[name].dtype).eps * max(rms(exact), typical)
        error, own = rms(got[name].double() - exact), rms(eager[name].double() - exact)
        assert error <= (2 if name else 4) * own + rounding, (name, error, own, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_eager(family: str, dtype: torch.dtype) -> None:
    inputs, model = batch(), build(family, dtype)
    fused, exact = clone(model), clone(model, torch.float64)
    report = fuse_(fused)
    assert len(report.converted) >= 5
    with torch.no_grad():
        got, eager, truth = ({"": logits(m, inputs)} for m in (fused, model, exact))
    assert_as_exact(got, eager, truth)
    assert_as_exact(*(gradients(m, inputs) for m in (fused, model, exact)))


@pytest.mark.parametrize("save", [value for value in DIAL if value != "inputs+preact"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "qwen3", "gpt2", "bert"])
def test_every_value_of_the_dial_trains_alike(family: str, save: str) -> None:
    if save == "recompute_qkv" and family in NO_QKV:
        return test_recompute_qkv_is_refused_where_it_cannot_be(family)
    inputs, model = batch(padded=False), build(family)
    other = clone(model)
    fuse_(model), fuse_(other, save=save)
    expected, got = gradients(model, inputs), gradients(other, inputs)
    assert expected.keys() == got.keys()
    typical = rms(torch.cat([g.flatten() for name, g in expected.items() if name]))
    for name, grad in expected.items():
        if save == "int8" and name:  # at most absmax / 254 of each group of what was kept
            assert rms(got[name] - grad) <= 0.01 * max(rms(grad), typical), name
        else:
            assert rms(got[name] - grad) <= 1e-6 * max(rms(grad), typical), name
    return None


@pytest.mark.parametrize("family", NO_QKV)
def test_recompute_qkv_is_refused_where_it_cannot_be(family: str) -> None:
    model = build(family)
    with pytest.raises(ValueError, match=r'cannot follow save="recompute_qkv": .* possible: "all", .*"checkpoint"'):
        fuse_(model, save="recompute_qkv")
    assert unfuse_(model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_unfuse_restores_bit_for_bit(family: str) -> None:
    inputs, model = batch(), build(family)
    before = {name: (id(module), type(module), dict(vars(module))) for name, module in model.named_modules()}
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    expected = logits(model, inputs)
    random = torch.get_rng_state()
    report = fuse_(model)
    assert torch.equal(torch.get_rng_state(), random), "a script that fuses draws the same numbers afterwards"
    assert list(model.state_dict()) == keys and {n: id(p) for n, p in model.named_parameters()} == parameters
    assert all(id(module) == before[name][0] for name, module in model.named_modules())
    assert all(isinstance(module, before[name][1]) for name, module in model.named_modules())
    assert all(type(module).__name__ == before[name][1].__name__ for name, module in model.named_modules())
    assert sorted(unfuse_(model)) == sorted(row.name for row in report.converted)
    for name, module in model.named_modules():
        assert type(module) is before[name][1] and vars(module).keys() == before[name][2].keys(), name
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("family", CAUSAL)
def test_generate_gives_the_same_tokens(family: str) -> None:
    model = build(family).eval()
    fused = clone(model)
    fuse_(fused)
    inputs = {name: value for name, value in batch(side="left").items() if name != "labels"}
    options = {"max_new_tokens": 10, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected, got = model.generate(**inputs, **options), fused.generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores), atol=2e-5, rtol=2e-5)
    assert torch.equal(got.sequences, expected.sequences)
    options |= {"cache_implementation": "static"}
    assert torch.equal(fused.generate(**inputs, **options).sequences, expected.sequences)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert"])
def test_attentions_hidden_states_and_eager_attention(family: str) -> None:
    model = build(family).eval()
    model.set_attn_implementation("eager")
    fused, inputs = clone(model), batch()
    fuse_(fused)
    expected = model(**inputs, output_attentions=True, output_hidden_states=True)
    got = fused(**inputs, output_attentions=True, output_hidden_states=True)
    for name in ("attentions", "hidden_states"):
        assert len(getattr(got, name)) == len(getattr(expected, name)) >= 2
        for a, b in zip(getattr(got, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def per_token(family: str, save: str) -> int:
    """The contract's bytes of a layer; for what stands around its fused nodes, their own."""
    heads = 32 if family == "qwen3" else 16
    shape = LayerShape(64, 4, 2, 160, itemsize=4, head_dim=heads)
    if save in DIAL:
        return saved_bytes_per_token(shape, save)
    raise AssertionError(save)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_saved_bytes_are_the_contracts(family: str) -> None:
    """What a layer keeps beside, the same for each value, is taken away by the difference."""
    inputs, model = batch(padded=False), build(family)
    eager = saved_bytes(lambda: model(**inputs, use_cache=False).loss, model.parameters())
    found = {}
    for save in DIAL:
        fuse_(model, save=save)
        found[save] = saved_bytes(lambda: model(**inputs, use_cache=False).loss, model.parameters())
        unfuse_(model)
    tokens = inputs["input_ids"].numel()
    for save in DIAL[:-1]:
        # A window shorter than the row makes a mask: then query, key and value are kept.
        does = "recompute_mlp" if family == "mistral" and save == "recompute_qkv" else save
        less = per_token(family, "all") - per_token(family, does)
        if family == "phi3" and save != "all":  # v is a view of the packed product, which holds q and k unturned
            less += (64 + 32) * 4
        if save == "int8" and family == "phi3":  # gate and up lie in one matrix, and share its groups
            less += 2 * int8_row(160) - int8_row(320)
        assert found["all"] - found[save] == 2 * tokens * less, save
    assert found["checkpoint"] < found["recompute_qkv"] and found["all"] < eager
    assert GROUP == 128


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "gpt2", "bert"])
def test_saved_bytes_fall_along_the_dial(family: str) -> None:
    inputs, model = batch(padded=False), build(family)

    def kept() -> int:
        return saved_bytes(lambda: model(**inputs).loss, model.parameters())

    eager, found = kept(), {}
    for save in ("all", "inputs+preact", "int8", "recompute_mlp", "checkpoint"):
        fuse_(model, save=save)
        found[save] = kept()
        unfuse_(model)
    # So few tokens: the head's gradient, made in forward already, is more than BERT's logits were.
    head = sum(p.nbytes for p in model.get_output_embeddings().parameters()) if family == "bert" else 0
    assert eager + head >= found["all"] > found["inputs+preact"] > found["int8"] > found["checkpoint"]
    tokens, hidden, inner = inputs["input_ids"].numel(), 64 * 4, 160 * 4
    if family == "gemma3" and not FIVE:  # fused part by part: the normalised tensors are kept
        assert found["all"] - found["inputs+preact"] == 2 * tokens * inner
    elif family in ("qwen3", "gemma2", "gemma3"):  # per layer: two normalised tensors and the gate's product
        assert found["all"] - found["inputs+preact"] == 2 * tokens * (2 * hidden + inner)
        assert found["inputs+preact"] - found["recompute_mlp"] == 2 * tokens * 2 * inner
    elif family == "gpt2":  # what the activation gave, of 4 * 64 columns
        assert found["all"] - found["inputs+preact"] == 2 * tokens * 4 * hidden
        assert found["inputs+preact"] - found["recompute_mlp"] == 2 * tokens * 4 * hidden
    else:
        assert found["all"] - found["inputs+preact"] == 2 * tokens * inner


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"rope": False}, {"linear cross entropy": 1, "gated MLP": 2, "norm": 5}),
        ({"mlp": False}, {"linear cross entropy": 1, "attention": 2, "norm": 5}),
        ({"rms_norm": False, "loss": False}, {"attention": 2, "gated MLP": 2}),
        ({"rope": False, "mlp": False, "loss": False}, {"norm": 5}),
    ],
)
def test_parts_can_be_left_out(options: dict[str, bool], kinds: dict[str, int]) -> None:
    inputs, model = batch(), build("llama")
    expected = gradients(model, inputs)
    report = fuse_(model, **options)
    found: dict[str, int] = {}
    for row in report.converted:
        found[row.what] = found.get(row.what, 0) + 1
    assert found == kinds
    for name, grad in gradients(model, inputs).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4)


def test_an_unknown_family_is_fused_where_it_is_alike() -> None:
    """Granite scales its branches, OLMo 2 has its norms behind, Cohere turns pairs: each is served in part or not."""
    sizes = {**hf.SIZES}
    models = {
        "granite": transformers.GraniteForCausalLM(
            transformers.GraniteConfig(**sizes, residual_multiplier=0.5, logits_scaling=2.0)
        ),
        "olmo2": transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes)),
        "cohere": transformers.CohereForCausalLM(transformers.CohereConfig(**sizes)),
    }
    wanted = {
        "granite": {"attention", "gated MLP", "norm"},
        "olmo2": {"linear cross entropy", "gated MLP", "norm"},
        "cohere": {"gated MLP"},
    }
    inputs = batch()
    for name, model in models.items():
        expected = gradients(model.train(), inputs)
        report = fuse_(model)
        assert {row.what for row in report.converted} == wanted[name], report
        assert {skip.reason for skip in report.skipped} and "skipped" in str(report)
        for parameter, grad in gradients(model, inputs).items():
            torch.testing.assert_close(grad, expected[parameter], atol=1e-5, rtol=1e-4)


def test_the_loss_of_a_masked_model_holds_no_logits() -> None:
    config = transformers.BertConfig(**{**hf.BERT, "vocab_size": 5000, "num_hidden_layers": 1})
    model, inputs = transformers.BertForMaskedLM(config).train(), batch()
    rows, expected, truth = (
        inputs["input_ids"].numel(),
        gradients(model, inputs),
        gradients(clone(model, torch.float64), inputs),
    )
    before = saved_bytes(lambda: model(**inputs).loss, model.parameters())
    report = fuse_(model)
    assert any(row.name == "" and row.what == "linear cross entropy" for row in report.converted)
    assert model(**inputs).logits is None and model(**inputs, return_dict=False)[0].dim() == 0
    assert_as_exact(gradients(model, inputs), expected, truth)
    after = saved_bytes(lambda: model(**inputs).loss, model.parameters())
    gradient = (5000 + 1) * config.hidden_size * 4 + 5000 * 4  # of the decoder, made in forward already
    assert before - after > rows * 5000 * 4 - gradient
    assert model(input_ids=inputs["input_ids"]).logits.shape[-1] == 5000
    assert model.eval()(**inputs).logits.shape[-1] == 5000
    # A head with a hook, or a decoder that is no plain layer, is called.
    model.train().cls.register_forward_hook(lambda *_: None)
    assert model(**inputs).logits.shape[-1] == 5000


def test_a_masked_model_with_another_head_keeps_its_own_loss() -> None:
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**hf.BERT))
    report = fuse_(model)
    (skip,) = (skip for skip in report.skipped if skip.name == "")
    assert "linear" in skip.reason and model.train()(**batch()).logits is not None


def test_a_model_of_no_known_part_is_reported_and_refuses_the_dial() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    report = fuse_(model)
    assert not report.converted and [skip.name for skip in report.skipped] == ["1"]
    with pytest.raises(ValueError, match='no layer or MLP of this model can follow save="int8"'):
        fuse_(model, save="int8")


def test_refusals() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"save: got 'everything', accepts 'all'"):
        fuse_(model, save="everything")
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got dict"):
        fuse_({})  # type: ignore[arg-type]
    checkpoint_(model, ["model.layers.0"])
    with pytest.raises(ValueError, match=r'is checkpointed: call checkpoint_\(model, "none"\) first'):
        fuse_(model)
    checkpoint_(model, "none")
    fuse_(model)
    with pytest.raises(ValueError, match="is fused already: call unfuse_ first"):
        fuse_(model)
    checkpoint_(model, "every 2nd")
    with pytest.raises(ValueError, match=r'has changed its class since fuse_: undo checkpoint_\(model, "none"\)'):
        unfuse_(model)
    checkpoint_(model, "none")
    assert len(unfuse_(model)) == 12


def test_checkpoint_turns_the_dial_of_a_fused_model() -> None:
    inputs, model = batch(), build("llama")
    fuse_(model)
    before = saved_bytes(lambda: model(**inputs).loss, model.parameters())
    expected = gradients(model, inputs)
    report = checkpoint_(model, "int8")
    assert "model.layers.0" in report.dialled
    assert saved_bytes(lambda: model(**inputs).loss, model.parameters()) < 0.75 * before
    checkpoint_(model, "every 2nd")
    for name, grad in gradients(model, inputs).items():
        assert torch.equal(grad, expected[name])
    checkpoint_(model, "none")
    assert model.model.layers[0].save == "inputs+preact"
    model.model.layers[0].save = "checkpoint"
    with pytest.raises(ValueError, match="save: got"):
        model.model.layers[0].save = "nothing"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert"])
def test_copies_and_pickles_stay_fused(family: str) -> None:
    inputs, model = batch(), build(family)
    fuse_(model)
    expected = gradients(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():  # it reads its own parameters
            for parameter in model.parameters():
                parameter.mul_(2)
        for name, grad in gradients(twin, inputs).items():
            assert torch.equal(grad, expected[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(2)
        assert len(unfuse_(twin)) == sum(1 for m in model.modules() if "_pykernels" in vars(m))


@pytest.mark.parametrize("family", WHOLE)
def test_layers_are_fused_as_a_whole(family: str) -> None:
    model = build(family)
    if family == "gemma3" and not FIVE:
        return  # its layers take two pairs of tables there: their parts are fused one by one
    whats = [row.what for row in fuse_(model).converted]
    assert whats.count("decoder layer") == whats.count("attention") == whats.count("gated MLP") == 2
