"""CausalLM: read from a configuration, equal to its plain twin and to transformers' Llama; clear where it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pykernels.bench.memory import saved_bytes
from pykernels.memory.contract import LayerShape, saved_bytes_per_token
from pykernels.nn import SAVE, CausalLM, CausalLMConfig
from pykernels.nn.attention import _tables

TINY = CausalLMConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA = {"model_type": "llama"} | {k: v for k, v in dataclasses.asdict(TINY).items() if v is not None}
VARIANTS = {
    "llama": TINY,
    "tied, qkv bias": dataclasses.replace(TINY, tie_word_embeddings=True, attention_bias="qkv"),
    "head_dim, bias": dataclasses.replace(TINY, head_dim=16, attention_bias=True, rope_theta=500.0),
    "post-norm, unequal": dataclasses.replace(TINY, norm="post", hidden_act="gelu", intermediate_size=(32, 112)),
}


def tokens(rows: int = 2, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(97, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, :3] = -100
    return ids[:, :-1], targets


def twins(config: CausalLMConfig, save: str = "inputs+preact") -> tuple[CausalLM, CausalLM]:
    torch.manual_seed(0)
    ours, plain = CausalLM(config, save=save), CausalLM(config, eager=True)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_its_plain_twin(name: str) -> None:
    ours, plain = twins(VARIANTS[name])
    inputs, targets = tokens()
    torch.testing.assert_close(ours(inputs), plain(inputs), rtol=1e-4, atol=1e-6)
    losses = [model(inputs, targets) for model in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for (key, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and (p.grad - q.grad).norm() <= 2e-5 * q.grad.norm() + 1e-9, key


def test_a_dial_for_each_layer() -> None:
    inputs, targets = tokens()
    gradients = []
    for save in ("all", ("recompute_mlp", "checkpoint")):
        torch.manual_seed(0)
        model = CausalLM(TINY, save=save)
        model(inputs, targets).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert [layer.save for layer in model.model.layers] == ["recompute_mlp", "checkpoint"]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with pytest.raises(ValueError, match="save: got 3 values, accepts one, or one for each of the 2 layers"):
        CausalLM(TINY, save=["all"] * 3)
    with pytest.raises(ValueError, match="save: got 'some'"):
        CausalLM(TINY, save="some", device="meta")


@pytest.mark.parametrize("save", SAVE)
def test_a_layer_more_keeps_what_the_contract_says(save: str) -> None:
    inputs, targets = tokens()
    kept = []
    for layers in (1, 2):
        model = CausalLM(dataclasses.replace(TINY, num_hidden_layers=layers), save=save)
        model(inputs, targets)
        held = [*model.parameters(), *(table for pair in _tables.values() for table in pair)]
        kept.append(saved_bytes(lambda model=model: model(inputs, targets), held))
    layer = LayerShape(48, 4, 2, 80, itemsize=4)
    # The second layer's input is the sum that the first made: kept by the second alone.
    assert kept[1] - kept[0] == inputs.numel() * saved_bytes_per_token(layer, save)


def test_takes_the_weights_of_transformers_llama_and_gives_its_logits() -> None:
    transformers = pytest.importorskip("transformers", reason="the integration's extra")
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k not in ("model_type", "norm")})
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = CausalLM(config.to_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs, _ = tokens()
    torch.testing.assert_close(ours(inputs), theirs(inputs).logits, rtol=1e-4, atol=1e-6)


def test_reads_the_configurations_of_transformers() -> None:
    assert CausalLMConfig.from_dict(LLAMA) == TINY
    assert CausalLMConfig.from_dict({**LLAMA, "model_type": "qwen2"}).attention_bias == "qkv"
    nested = {**LLAMA, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert CausalLMConfig.from_dict(nested).rope_theta == 1e6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"intermediate_size": None, "vocab_size": None}, "lacks 'vocab_size', 'intermediate_size'"),
        ({"model_type": "t5"}, "model_type: got 't5', accepts 'llama', 'mistral', 'qwen2'"),
        ({"hidden_act": "relu2"}, "hidden_act: got 'relu2', accepts 'silu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, accepts a divisor of num_attention_heads 4"),
        ({"num_attention_heads": 5}, "num_attention_heads: got 5, accepts a divisor of hidden_size 48"),
        ({"hidden_size": 0}, "hidden_size: got 0, accepts a whole number"),
        ({"hidden_size": "48"}, "hidden_size: got '48', accepts a whole number"),
        ({"attention_bias": True}, "attention_bias: got true without mlp_bias"),
        ({"mlp_bias": True}, "mlp_bias: got true without attention_bias"),
    ],
)
def test_refuses_a_configuration_it_cannot_build(change: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLMConfig.from_dict(LLAMA | change)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with pytest.raises(ValueError, match="config.json: .*" + message):
        CausalLMConfig.from_file(tmp_path)


def test_refuses_a_file_that_is_no_configuration(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"config.json: No such file"):
        CausalLMConfig.from_file(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="not JSON in UTF-8"):
        CausalLMConfig.from_file(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        CausalLMConfig.from_file(path)


def test_on_the_meta_device_nothing_is_allocated() -> None:
    huge = CausalLMConfig(128256, 16384, 53248, 126, 128, 8)
    model = CausalLM(huge, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 405_853_388_800
